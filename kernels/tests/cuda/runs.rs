//! The loops over runs: bit for bit those of the CPU, for every size and alignment.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DeviceRepr};
use ferrozero_kernels::adamw::{AdamWState, AdamWStep, LowPrecision, adamw};
use ferrozero_kernels::cuda::{
    CudaElement, CudaError, DeviceStatistics, HalfElement, Kernels, Launches, Limits, RunCopy, RunState,
    with_limits,
};
use ferrozero_kernels::gradient::{Accumulate, BLOCK_ELEMENTS, GradientStatistics, accumulate};
use ferrozero_kernels::philox::Stream;
use ferrozero_kernels::{Pool, convert};
use half::{bf16, f16};

use crate::device;

/// Around the four elements of a thread and the 1024 of a block.
const SIZES: [usize; 9] = [0, 1, 3, 4, 5, 1023, 1024, 1025, 2049];
/// More than two blocks of any kernel have work for at once.
const IN_TURNS: usize = 4999;

/// A run of so many elements, that many after an aligned address, on all blocks or on two, which take turn
/// after turn.
#[derive(Clone, Copy, Debug)]
struct Case {
    elements: usize,
    offset: usize,
    few_blocks: bool,
}

fn cases() -> impl Iterator<Item = Case> {
    let sizes = SIZES.into_iter().chain([IN_TURNS]);
    let cases = sizes.flat_map(|elements| [false, true].map(|few_blocks| (elements, few_blocks)));
    let cases = cases.filter(|&(elements, few_blocks)| elements == IN_TURNS || !few_blocks);
    cases.flat_map(|(elements, few_blocks)| [0, 1].map(|offset| Case { elements, offset, few_blocks }))
}

impl Case {
    fn range(self) -> Range<usize> {
        self.offset..self.offset + self.elements
    }

    fn launch(self, run: impl FnOnce() -> Result<(), CudaError>) {
        if !self.few_blocks {
            return run().unwrap();
        }
        let (done, launches) = with_limits(Limits { blocks: 2, ..Limits::default() }, run);
        done.unwrap();
        assert_eq!(launches, Launches { count: 1, in_turns: 1 }, "{self:?}");
    }
}

/// A stream of its own beside candle's, as the engine has.
fn machine() -> Option<(Kernels, Arc<CudaStream>)> {
    let Device::Cuda(device) = device()? else { return None };
    let context = device.cuda_stream().context().clone();
    Some((Kernels::load(&context).unwrap(), context.new_stream().unwrap()))
}

fn values(name: &str, elements: usize) -> Vec<f32> {
    let stream = Stream::new(1, name);
    (0..elements as u64).map(|position| stream.normal(position) as f32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The values from the second element of a slice on: no multiple of four elements from its start.
fn upload<T: DeviceRepr + Clone>(stream: &Arc<CudaStream>, values: &[T], offset: usize) -> CudaSlice<T> {
    let padding = values.first().into_iter().cycle().take(offset);
    let mut padded: Vec<T> = padding.cloned().collect();
    padded.extend_from_slice(values);
    // An empty run still needs an address.
    if padded.is_empty() {
        // SAFETY: nothing reads the element.
        return unsafe { stream.alloc(1) }.unwrap();
    }
    stream.clone_htod(&padded).unwrap()
}

fn step() -> AdamWStep {
    AdamWStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 3,
        gradient_scale: 0.7,
    }
}

/// Fetches `elements` elements after `offset`.
fn fetch<T: DeviceRepr + Clone>(
    stream: &Arc<CudaStream>,
    slice: &CudaSlice<T>,
    offset: usize,
    elements: usize,
) -> Vec<T> {
    let all = stream.clone_dtoh(slice).unwrap();
    stream.synchronize().unwrap();
    all[offset..offset + elements].to_vec()
}

/// The 16-bit types, which low-precision copies are in.
trait Half: HalfElement + PartialEq + std::fmt::Debug {
    fn from_bits(bits: u16) -> Self;
    fn bits(self) -> u16;
    fn on_host(copy: &mut [Self]) -> LowPrecision<'_>;
    fn on_device(copy: CudaViewMut<'_, Self>) -> RunCopy<'_>;
}

macro_rules! half {
    ($half:ty, $variant:ident) => {
        impl Half for $half {
            fn from_bits(bits: u16) -> Self {
                <$half>::from_bits(bits)
            }
            fn bits(self) -> u16 {
                self.to_bits()
            }
            fn on_host(copy: &mut [Self]) -> LowPrecision<'_> {
                LowPrecision::$variant(copy)
            }
            fn on_device(copy: CudaViewMut<'_, Self>) -> RunCopy<'_> {
                RunCopy::$variant(copy)
            }
        }
    };
}
half!(bf16, Bf16);
half!(f16, F16);

fn adamw_is_that_of_the_cpu<G: CudaElement, C: Half>() {
    let Some((kernels, stream)) = machine() else { return };
    let pool = Pool::new(1).unwrap();
    for case in cases() {
        let Case { elements, offset, .. } = case;
        let [mut p, mut m, mut v] = ["p", "m", "v"].map(|name| values(name, elements));
        v.iter_mut().for_each(|v| *v *= *v);
        let gradient: Vec<G> = values("g", elements).into_iter().map(G::narrow).collect();
        let mut copy = vec![C::narrow(0.0); elements];

        let [mut dp, mut dm, mut dv] = [&p, &m, &v].map(|run| upload(&stream, run, offset));
        let device_gradient = upload(&stream, &gradient, offset);
        let mut device_copy = upload(&stream, &copy, offset);
        let range = case.range();
        for with_copy in [false, true] {
            let state = AdamWState { master: &mut p, first_moment: &mut m, second_moment: &mut v };
            let low_precision = with_copy.then(|| C::on_host(&mut copy));
            adamw(&pool, &step(), state, &gradient, low_precision).unwrap();
            let state = RunState {
                master: dp.slice_mut(range.clone()),
                first_moment: dm.slice_mut(range.clone()),
                second_moment: dv.slice_mut(range.clone()),
            };
            let low_precision = with_copy.then(|| C::on_device(device_copy.slice_mut(range.clone())));
            let gradient = device_gradient.slice(range.clone());
            case.launch(|| kernels.adamw(&stream, &step(), state, &gradient, low_precision));
        }
        let what = format!("{} gradients, {case:?}", G::SUFFIX);
        for (name, host, device) in [("p", &p, &dp), ("m", &m, &dm), ("v", &v, &dv)] {
            let device = fetch(&stream, device, offset, elements);
            assert_eq!(bits(host), bits(&device), "{what}: {name}");
        }
        assert_eq!(copy, fetch(&stream, &device_copy, offset, elements), "{what}");
    }
}

#[test]
fn adamw_has_the_bits_of_the_cpu() {
    adamw_is_that_of_the_cpu::<f32, bf16>();
    adamw_is_that_of_the_cpu::<f32, f16>();
    adamw_is_that_of_the_cpu::<bf16, bf16>();
    adamw_is_that_of_the_cpu::<f16, f16>();
    adamw_is_that_of_the_cpu::<bf16, f16>();
    adamw_is_that_of_the_cpu::<f16, bf16>();
}

fn accumulation_is_that_of_the_cpu<G: CudaElement>() {
    let Some((kernels, stream)) = machine() else { return };
    let pool = Pool::new(1).unwrap();
    let mut on_device = DeviceStatistics::new(&stream, IN_TURNS).unwrap();
    let mut on_host = GradientStatistics::default();
    // The statistics run over all sizes: totals continue where the last run ended.
    for case in cases() {
        let Case { elements, offset, .. } = case;
        let gradient: Vec<G> = values("g", elements).into_iter().map(G::narrow).collect();
        let mut sum = values("a", elements);
        let mut device_sum = upload(&stream, &sum, offset);
        let device_gradient = upload(&stream, &gradient, offset);
        let range = case.range();
        for (scale, how) in [(0.3, Accumulate::Add), (3.0, Accumulate::Overwrite), (0.1, Accumulate::Add)] {
            accumulate(&pool, &mut sum, &gradient, scale, how, &mut on_host).unwrap();
            let mut device_sum = device_sum.slice_mut(range.clone());
            let device_gradient = device_gradient.slice(range.clone());
            case.launch(|| {
                kernels.accumulate(&stream, &mut device_sum, &device_gradient, scale, how, &mut on_device)
            });
        }
        let what = format!("{} gradients, {case:?}", G::SUFFIX);
        assert_eq!(bits(&sum), bits(&fetch(&stream, &device_sum, offset, elements)), "{what}");
        assert_eq!(on_device.read(&stream).unwrap(), on_host, "{what}");
    }
    on_device.reset(&stream).unwrap();
    assert_eq!(on_device.read(&stream).unwrap(), GradientStatistics::default());
}

#[test]
fn accumulation_and_its_statistics_have_the_bits_of_the_cpu() {
    accumulation_is_that_of_the_cpu::<f32>();
    accumulation_is_that_of_the_cpu::<bf16>();
    accumulation_is_that_of_the_cpu::<f16>();
}

/// The blocks' measures are added by one thread block of 256 threads, which here takes a second turn.
#[test]
fn measures_of_more_blocks_than_threads_are_those_of_the_cpu() {
    let Some((kernels, stream)) = machine() else { return };
    let elements = 257 * BLOCK_ELEMENTS + 1;
    let gradient = values("g", elements);
    let (mut sum, mut on_host) = (vec![0.0; elements], GradientStatistics::default());
    accumulate(&Pool::new(1).unwrap(), &mut sum, &gradient, 0.3, Accumulate::Overwrite, &mut on_host)
        .unwrap();
    let gradient = upload(&stream, &gradient, 0);
    let mut sum: CudaSlice<f32> = stream.alloc_zeros(elements).unwrap();
    let mut statistics = DeviceStatistics::new(&stream, elements).unwrap();
    let (mut sum, gradient) = (sum.as_view_mut(), gradient.as_view());
    kernels.accumulate(&stream, &mut sum, &gradient, 0.3, Accumulate::Overwrite, &mut statistics).unwrap();
    assert_eq!(statistics.read(&stream).unwrap(), on_host);
}

#[test]
fn elements_that_are_not_finite_are_counted() {
    let Some((kernels, stream)) = machine() else { return };
    let mut gradient = values("g", 3000);
    for (at, value) in [(0, f32::NAN), (1025, f32::INFINITY), (2999, f32::NEG_INFINITY)] {
        gradient[at] = value;
    }
    let gradient = upload(&stream, &gradient, 0);
    let mut sum: CudaSlice<f32> = stream.alloc_zeros(3000).unwrap();
    let mut statistics = DeviceStatistics::new(&stream, 3000).unwrap();
    let (mut sum, gradient) = (sum.as_view_mut(), gradient.as_view());
    kernels.accumulate(&stream, &mut sum, &gradient, 1.0, Accumulate::Overwrite, &mut statistics).unwrap();
    assert_eq!(statistics.read(&stream).unwrap().non_finite, 3);
}

/// All of so many values and all but one of them, beside short runs.
fn every_value(count: usize) -> [Case; 5] {
    [(0, 0), (1, 0), (5, 1), (count, 0), (count - 1, 1)].map(|(elements, offset)| Case {
        elements,
        offset,
        few_blocks: elements == count,
    })
}

fn conversions_are_those_of_the_cpu<E: Half>() {
    let Some((kernels, stream)) = machine() else { return };
    let pool = Pool::new(1).unwrap();
    // Every half, and then values between them, with NaN, infinities and subnormal numbers among both.
    let halves: Vec<E> = (0..=u16::MAX).map(E::from_bits).collect();
    let between = (0..=u16::MAX).map(|i| f32::from_bits(u32::from(i).wrapping_mul(0x9e37_79b9)));
    let wide: Vec<f32> = halves.iter().map(|half| half.widen()).chain(between).collect();
    for case in every_value(65_536) {
        let Case { elements, offset, .. } = case;
        let from = upload(&stream, &halves[..elements], offset);
        let mut to: CudaSlice<f32> = stream.alloc_zeros(elements + offset + 1).unwrap();
        let range = case.range();
        case.launch(|| kernels.widen(&stream, &from.slice(range.clone()), &mut to.slice_mut(range)));
        let mut expected = vec![0.0; elements];
        convert::widen(&pool, &halves[..elements], &mut expected).unwrap();
        assert_eq!(bits(&fetch(&stream, &to, offset, elements)), bits(&expected), "{}", E::SUFFIX);
    }
    for case in every_value(131_072) {
        let Case { elements, offset, .. } = case;
        let from = upload(&stream, &wide[..elements], offset);
        let mut to = upload(&stream, &vec![E::narrow(0.0); elements], offset);
        let range = case.range();
        case.launch(|| kernels.narrow(&stream, &from.slice(range.clone()), &mut to.slice_mut(range)));
        let mut expected = vec![E::narrow(0.0); elements];
        convert::narrow(&pool, &wide[..elements], &mut expected).unwrap();
        let found: Vec<u16> = fetch(&stream, &to, offset, elements).into_iter().map(E::bits).collect();
        let expected: Vec<u16> = expected.into_iter().map(E::bits).collect();
        assert_eq!(found, expected, "{}", E::SUFFIX);
    }
}

#[test]
fn conversions_have_the_bits_of_the_cpu() {
    conversions_are_those_of_the_cpu::<bf16>();
    conversions_are_those_of_the_cpu::<f16>();
}

#[test]
fn runs_that_do_not_fit_are_refused() {
    let Some((kernels, stream)) = machine() else { return };
    let mut sum: CudaSlice<f32> = stream.alloc_zeros(2000).unwrap();
    let gradient: CudaSlice<bf16> = stream.alloc_zeros(2000).unwrap();
    let mut statistics = DeviceStatistics::new(&stream, 1000).unwrap();
    let how = Accumulate::Add;
    let short = gradient.slice(1..);
    let too_short = kernels.accumulate(&stream, &mut sum.as_view_mut(), &short, 1.0, how, &mut statistics);
    let whole = gradient.as_view();
    let too_long = kernels.accumulate(&stream, &mut sum.as_view_mut(), &whole, 1.0, how, &mut statistics);
    let conversion = kernels.widen(&stream, &short, &mut sum.as_view_mut());
    let [mut p, mut m, mut v] = [2000, 1999, 2000].map(|n| stream.alloc_zeros::<f32>(n).unwrap());
    let state =
        RunState { master: p.as_view_mut(), first_moment: m.as_view_mut(), second_moment: v.as_view_mut() };
    let update = kernels.adamw(&stream, &step(), state, &whole, None);
    for (index, result) in [too_short, too_long, conversion, update].into_iter().enumerate() {
        assert!(matches!(result, Err(CudaError::Run(_))), "attempt {index}");
    }
}
