//! AdamW and gradient accumulation: the same bits on every path, for every number of threads and any cut, and
//! close to references.

use candle_core::{Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use ferrozero_kernels::adamw::{AdamWState, AdamWStep, LowPrecision, adamw, adamw_on};
use ferrozero_kernels::gradient::{
    Accumulate, BLOCK_ELEMENTS, GradientStatistics, accumulate, accumulate_on,
};
use ferrozero_kernels::philox::Stream;
use ferrozero_kernels::{Element, Path, Pool};
use half::{bf16, f16};
use proptest::prelude::*;

fn values(name: &str, elements: usize) -> Vec<f32> {
    let stream = Stream::new(1, name);
    (0..elements as u64).map(|position| stream.normal(position) as f32).collect()
}

fn step(number: u64) -> AdamWStep {
    AdamWStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: number,
        gradient_scale: 1.0,
    }
}

/// A run of parameters with its moments.
#[derive(Clone, PartialEq, Debug)]
struct Run(Vec<f32>, Vec<f32>, Vec<f32>);

impl Run {
    fn new(elements: usize) -> Self {
        let squares = values("v", elements).iter().map(|v| v * v).collect();
        Self(values("p", elements), values("m", elements), squares)
    }

    fn state(&mut self, range: std::ops::Range<usize>) -> AdamWState<'_> {
        AdamWState {
            master: &mut self.0[range.clone()],
            first_moment: &mut self.1[range.clone()],
            second_moment: &mut self.2[range],
        }
    }
}

fn same_bits_everywhere<G: Element>() {
    // More than two chunks, and no multiple of any vector width.
    let elements = 150_001;
    let gradient: Vec<G> = values("g", elements).into_iter().map(G::narrow).collect();
    let mut expected = Run::new(elements);
    adamw(&Pool::new(1).unwrap(), &step(3), expected.state(0..elements), &gradient, None).unwrap();
    for threads in 1..=3 {
        let pool = Pool::new(threads).unwrap();
        for path in Path::available() {
            let mut run = Run::new(elements);
            adamw_on(path, &pool, &step(3), run.state(0..elements), &gradient, None).unwrap();
            assert!(run == expected, "{path:?}, {threads} threads");
        }
    }
    let mut cut = Run::new(elements);
    for range in [0..1, 1..77_777, 77_777..elements] {
        adamw(&Pool::new(2).unwrap(), &step(3), cut.state(range.clone()), &gradient[range], None).unwrap();
    }
    assert!(cut == expected);
}

#[test]
fn adamw_has_the_same_bits_on_every_path_for_any_threads_and_cut() {
    same_bits_everywhere::<f32>();
    same_bits_everywhere::<bf16>();
    same_bits_everywhere::<f16>();
}

#[test]
fn the_low_precision_copy_is_the_rounded_parameter() {
    let pool = Pool::new(2).unwrap();
    let gradient = values("g", 70_000);
    let (mut plain, mut with_bf16, mut with_f16) = (Run::new(70_000), Run::new(70_000), Run::new(70_000));
    let (mut b, mut h) = (vec![bf16::ZERO; 70_000], vec![f16::ZERO; 70_000]);
    adamw(&pool, &step(1), plain.state(0..70_000), &gradient, None).unwrap();
    adamw(&pool, &step(1), with_bf16.state(0..70_000), &gradient, Some(LowPrecision::Bf16(&mut b))).unwrap();
    adamw(&pool, &step(1), with_f16.state(0..70_000), &gradient, Some(LowPrecision::F16(&mut h))).unwrap();
    assert!(plain == with_bf16 && plain == with_f16);
    for ((&p, b), h) in plain.0.iter().zip(b).zip(h) {
        assert_eq!((b, h), (bf16::from_f32(p), f16::from_f32(p)));
    }
}

#[test]
fn adamw_is_that_of_candle_and_of_the_formula() {
    let elements = 1000;
    let mut run = Run(values("p", elements), vec![0.0; elements], vec![0.0; elements]);
    let mut exact: Vec<[f64; 3]> = run.0.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
    let variable = Var::new(run.0.clone(), &Device::Cpu).unwrap();
    let numbers = step(1);
    let params =
        ParamsAdamW { lr: numbers.learning_rate, weight_decay: numbers.weight_decay, ..Default::default() };
    let mut candle = candle_nn::AdamW::new(vec![variable.clone()], params).unwrap();
    let pool = Pool::new(2).unwrap();
    for number in 1..=20 {
        let gradient = values(&format!("g{number}"), elements);
        adamw(&pool, &step(number), run.state(0..elements), &gradient, None).unwrap();
        for (state, &g) in exact.iter_mut().zip(&gradient) {
            let g = f64::from(g);
            state[1] = 0.9 * state[1] + (1.0 - 0.9) * g;
            state[2] = 0.999 * state[2] + (1.0 - 0.999) * g * g;
            let (m, v) = (
                state[1] / (1.0 - 0.9f64.powi(number as i32)),
                state[2] / (1.0 - 0.999f64.powi(number as i32)),
            );
            state[0] = state[0] * (1.0 - 1e-2 * 0.1) - 1e-2 * m / (v.sqrt() + 1e-8);
        }
        let mut store = (variable.as_tensor() * 0.0).unwrap().sum_all().unwrap().backward().unwrap();
        store.insert(variable.as_tensor(), Tensor::new(gradient, &Device::Cpu).unwrap());
        candle.step(&store).unwrap();
    }
    let candle = variable.to_vec1::<f32>().unwrap();
    for ((&ours, exact), candle) in run.0.iter().zip(exact).zip(candle) {
        assert!((f64::from(ours) - exact[0]).abs() < 5e-6, "{ours} {}", exact[0]);
        assert!((ours - candle).abs() < 5e-6, "{ours} {candle}");
    }
}

#[test]
fn lengths_that_differ_are_refused_by_name() {
    let pool = Pool::new(1).unwrap();
    let mut run = Run::new(5);
    let error = adamw(&pool, &step(1), run.state(0..5), &[0f32; 4], None).unwrap_err();
    assert_eq!(error.to_string(), "the gradient has 4 elements where 5 are needed");
    let mut statistics = GradientStatistics::default();
    assert!(accumulate(&pool, &mut [0.0; 2], &[0f32; 3], 1.0, Accumulate::Add, &mut statistics).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]
    #[test]
    fn a_norm_has_the_same_bits_for_any_threads_path_and_cut(
        elements in 1usize..200_000, cut in 0usize..200, threads in 1usize..4, add: bool,
    ) {
        let gradient = values("g", elements);
        let how = if add { Accumulate::Add } else { Accumulate::Overwrite };
        let (mut expected, mut whole) = (values("a", elements), GradientStatistics::default());
        accumulate(&Pool::new(1).unwrap(), &mut expected, &gradient, 0.25, how, &mut whole).unwrap();
        for path in Path::available() {
            let (mut found, mut statistics) = (values("a", elements), GradientStatistics::default());
            let cut = (cut * BLOCK_ELEMENTS).min(elements);
            for range in [0..cut, cut..elements] {
                let (sum, part) = (&mut found[range.clone()], &gradient[range]);
                let pool = Pool::new(threads).unwrap();
                accumulate_on(path, &pool, sum, part, 0.25, how, &mut statistics).unwrap();
            }
            prop_assert!(found == expected);
            prop_assert_eq!(statistics, whole);
        }
        let exact: f64 = expected.iter().map(|&value| f64::from(value).powi(2)).sum();
        prop_assert!((whole.squared_norm - exact).abs() <= 1e-12 * exact);
    }
}

#[test]
fn what_is_not_finite_is_counted() {
    let mut gradient = vec![1f32; 5000];
    gradient[3] = f32::NAN;
    gradient[4999] = f32::INFINITY;
    let (mut sum, mut statistics) = (vec![0.0; 5000], GradientStatistics::default());
    accumulate(&Pool::new(2).unwrap(), &mut sum, &gradient, 1.0, Accumulate::Overwrite, &mut statistics)
        .unwrap();
    assert_eq!(statistics.non_finite, 2);
}
