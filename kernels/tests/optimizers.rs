//! Optimizers: the numbers of references, and the same bits for any threads, path and cut into pieces, in
//! every format.

use ferrozero_kernels::adamw::{AdamWState, AdamWStep, LowPrecision, adamw};
use ferrozero_kernels::format::{Format, UNIT_ELEMENTS};
use ferrozero_kernels::optimizer::{
    Adafactor, Adagrad, Adam, AdamP, AdamW, Adjustment, Formats, Gradient, Lion, Masters, Muon, Optimizer,
    Part, Piece, Scope, Sgd, State, States, Step, StoredOptimizer, Tools, Values,
};
use ferrozero_kernels::philox::Stream as Random;
use ferrozero_kernels::{Error, Path, Pool};
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

const MASTERS: [Masters; 3] = [Masters::F32, Masters::Bf16, Masters::Split];
const STATES: [States; 3] = [States::F32, States::Bf16, States::EightBit];

fn step(number: u64) -> Step {
    Step { number, learning_rate: 1e-2, weight_decay: 0.1, gradient_scale: 1.0 }
}

/// A parameter with its streams.
#[derive(Clone, PartialEq, Debug)]
struct Parameter {
    shape: Vec<usize>,
    /// In words, so that they are aligned.
    streams: Vec<Vec<u32>>,
}

/// Where pieces of a parameter start in the run of its group.
const GROUP_START: u64 = 7 * UNIT_ELEMENTS as u64;

impl Parameter {
    /// New, with zeros as states. Values that bf16 can say are the same in every format of masters.
    fn new(stored: &StoredOptimizer, shape: &[usize], values: &[f32]) -> Self {
        let streams = stored.streams().iter().enumerate();
        let bytes = streams.map(|(n, s)| s.format.bytes(stored.stream_elements(n, shape)));
        let mut streams: Vec<Vec<u32>> = bytes.map(|bytes| vec![0; bytes.div_ceil(4)]).collect();
        if stored.formats().masters == Masters::F32 {
            bytemuck::cast_slice_mut(&mut streams[0]).copy_from_slice(values);
        } else {
            let rounded: &mut [u16] = bytemuck::cast_slice_mut(&mut streams[0]);
            for (rounded, &value) in rounded.iter_mut().zip(values) {
                *rounded = bf16::from_f32(value).to_bits();
            }
        }
        Self { shape: shape.to_vec(), streams }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn masters(&self) -> &[f32] {
        bytemuck::cast_slice(&self.streams[0])
    }

    fn update(
        &mut self,
        stored: &StoredOptimizer,
        (path, pool): (Path, &Pool),
        step: &Step,
        range: Range<usize>,
        gradient: Gradient<'_>,
    ) -> Result<(), Error> {
        let mut scratch = vec![f32::NAN; stored.scratch_elements(&self.shape)];
        let elements = self.elements();
        let all = stored.streams().iter().enumerate().zip(&mut self.streams);
        let mut streams: Vec<&mut [u8]> = all
            .map(|((number, stream), words)| {
                let last = stored.stream_elements(number, &self.shape);
                let (start, end) = (range.start.min(last), range.end.min(last));
                let end = if range.end == elements { last } else { end };
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
                let unit = start / UNIT_ELEMENTS * UNIT_ELEMENTS;
                &mut bytes[stream.format.bytes(unit)..][..stream.format.bytes(end - start)]
            })
            .collect();
        let piece = Piece {
            shape: &self.shape,
            group: 11,
            first_element: GROUP_START + range.start as u64,
            streams: &mut streams,
            gradient,
            copy: None,
            scratch: &mut scratch,
        };
        stored.update_on(path, pool, step, piece)
    }
}

fn stored(optimizer: impl Optimizer + 'static, masters: Masters, states: States) -> StoredOptimizer {
    StoredOptimizer::new(Arc::new(optimizer), Formats { masters, states }, 5).unwrap()
}

fn optimizers() -> Vec<Arc<dyn Optimizer>> {
    vec![
        Arc::new(AdamW::default()),
        Arc::new(Adam::default()),
        Arc::new(Sgd::default()),
        Arc::new(Sgd { momentum: 0.9, dampening: 0.3, nesterov: false }),
        Arc::new(Sgd { momentum: 0.9, dampening: 0.0, nesterov: true }),
        Arc::new(Lion::default()),
        Arc::new(Adagrad::default()),
        Arc::new(Adafactor::default()),
        Arc::new(AdamP::default()),
        Arc::new(AdamP { delta: 30.0, ..AdamP::default() }),
        Arc::new(Muon::default()),
    ]
}

fn normal(name: &str, elements: usize) -> Vec<f32> {
    let random = Random::new(3, name);
    (0..elements as u64).map(|i| bf16::from_f64(random.normal(i)).to_f32()).collect()
}

/// A parameter and two gradients of it.
struct Run {
    shape: Vec<usize>,
    values: Vec<f32>,
    first: Vec<f32>,
    second: Vec<bf16>,
}

impl Run {
    fn new(shape: &[usize]) -> Self {
        let elements = shape.iter().product();
        let second = normal("h", elements).into_iter().map(bf16::from_f32).collect();
        let (values, first) = (normal("p", elements), normal("g", elements));
        Self { shape: shape.to_vec(), values, first, second }
    }

    /// Two steps, in pieces that are cut at `cuts`; the second in the other direction, with a scale.
    fn train(&self, stored: &StoredOptimizer, path: Path, pool: &Pool, cuts: &[usize]) -> Parameter {
        let mut parameter = Parameter::new(stored, &self.shape, &self.values);
        let borders: Vec<usize> = [0].iter().chain(cuts).chain([&self.values.len()]).copied().collect();
        for pair in borders.windows(2) {
            let range = pair[0]..pair[1];
            let gradient = Gradient::F32(&self.first[range.clone()]);
            parameter.update(stored, (path, pool), &step(1), range, gradient).unwrap();
        }
        for pair in borders.windows(2).rev() {
            let range = pair[0]..pair[1];
            let gradient = Gradient::Bf16(&self.second[range.clone()]);
            let step = Step { gradient_scale: 0.3, ..step(2) };
            parameter.update(stored, (path, pool), &step, range, gradient).unwrap();
        }
        parameter
    }
}

#[test]
fn every_optimizer_and_format_has_the_same_bits_for_any_threads_path_and_pieces() {
    let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
    // More than one task of a thread, and no multiple of anything.
    for run in [&[70_001][..], &[131, 501], &[2, 45, 67]].map(Run::new) {
        for optimizer in optimizers() {
            for (masters, states) in MASTERS.into_iter().flat_map(|m| STATES.map(|s| (m, s))) {
                let formats = Formats { masters, states };
                let stored = StoredOptimizer::new(optimizer.clone(), formats, 5).unwrap();
                let expected = run.train(&stored, Path::best(), &pools[0], &[]);
                let same = |path, pool, cuts: &[usize]| {
                    let found = run.train(&stored, path, pool, cuts);
                    assert!(found == expected, "{optimizer:?} {formats:?} {:?} {path:?}", run.shape);
                };
                for path in Path::available().into_iter().skip(1) {
                    same(path, &pools[1], &[]);
                }
                if stored.scope(&run.shape) == Scope::Elements {
                    same(Path::best(), &pools[2], &[UNIT_ELEMENTS, 3 * UNIT_ELEMENTS]);
                }
            }
        }
    }
}

#[test]
fn adamw_has_the_bits_of_its_loop() {
    let elements = 70_000;
    let stored = stored(AdamW::default(), Masters::F32, States::F32);
    let mut parameter = Parameter::new(&stored, &[elements], &normal("p", elements));
    let (mut master, mut first, mut second) =
        (normal("p", elements), vec![0.0; elements], vec![0.0; elements]);
    let pool = Pool::new(2).unwrap();
    for number in 1..4 {
        let gradient = normal(&format!("g{number}"), elements);
        let step = Step { gradient_scale: 0.7, ..step(number) };
        let whole = 0..elements;
        parameter.update(&stored, (Path::best(), &pool), &step, whole, Gradient::F32(&gradient)).unwrap();
        let numbers = AdamWStep {
            learning_rate: step.learning_rate,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: step.weight_decay,
            step: number,
            gradient_scale: 0.7,
        };
        let state = AdamWState { master: &mut master, first_moment: &mut first, second_moment: &mut second };
        adamw(&pool, &numbers, state, &gradient, None).unwrap();
    }
    assert_eq!(parameter.masters(), master);
    assert_eq!(bytemuck::cast_slice::<_, f32>(&parameter.streams[1]), first);
    assert_eq!(bytemuck::cast_slice::<_, f32>(&parameter.streams[2]), second);
}

#[test]
fn split_masters_have_the_bits_of_masters_in_f32() {
    for optimizer in optimizers() {
        for run in [&[5000][..], &[40, 50]].map(Run::new) {
            let [plain, split] = [Masters::F32, Masters::Split].map(|masters| {
                let formats = Formats { masters, states: States::F32 };
                let stored = StoredOptimizer::new(optimizer.clone(), formats, 5).unwrap();
                run.train(&stored, Path::best(), &Pool::new(2).unwrap(), &[])
            });
            let rounded: &[u16] = bytemuck::cast_slice(&split.streams[0]);
            let remainder: &[u16] = bytemuck::cast_slice(&split.streams[1]);
            for ((&master, &rounded), &remainder) in plain.masters().iter().zip(rounded).zip(remainder) {
                let difference = i64::from(master.to_bits()) - (i64::from(rounded) << 16);
                assert_eq!(difference, i64::from(remainder as i16), "{optimizer:?}");
            }
        }
    }
}

/// Of `scripts/optimizer_reference.py`.
fn reference() -> serde_json::Value {
    serde_json::from_str(include_str!("data/optimizers.json")).unwrap()
}

/// The numbers of the reference's generator.
fn drawn(seed: u64, elements: usize) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..elements).map(next).collect()
}

fn drawn_cubes(seed: u64, elements: usize) -> Vec<f32> {
    drawn(seed, elements).into_iter().map(|x| x * x * x).collect()
}

/// A parameter after 50 steps.
fn after_50_steps(
    stored: &StoredOptimizer,
    number: u64,
    shape: &[usize],
    gradient: impl Fn(u64) -> Vec<f32>,
) -> Parameter {
    let elements = shape.iter().product();
    let pool = Pool::new(1).unwrap();
    let mut parameter = Parameter::new(stored, shape, &drawn(number, elements));
    for at in 1..=50 {
        let gradient = gradient(at);
        let gradient = Gradient::F32(&gradient);
        parameter.update(stored, (Path::best(), &pool), &step(at), 0..elements, gradient).unwrap();
    }
    parameter
}

#[test]
fn parameters_are_those_of_references_after_50_steps() {
    let reference = reference();
    let sgd = |momentum, dampening, nesterov| Arc::new(Sgd { momentum, dampening, nesterov });
    let cases: [(&str, Arc<dyn Optimizer>); 13] = [
        ("AdamW", Arc::new(AdamW::default())),
        ("Adam", Arc::new(Adam::default())),
        ("SGD", sgd(0.0, 0.0, false)),
        ("SGD momentum", sgd(0.9, 0.0, false)),
        ("SGD dampened", sgd(0.9, 0.3, false)),
        ("SGD Nesterov", sgd(0.9, 0.0, true)),
        ("Adagrad", Arc::new(Adagrad::default())),
        ("Adafactor", Arc::new(Adafactor::default())),
        ("Lion", Arc::new(Lion::default())),
        ("AdamP", Arc::new(AdamP::default())),
        ("AdamP near", Arc::new(AdamP { delta: 1.2, ..AdamP::default() })),
        ("Muon", Arc::new(Muon::default())),
        ("Muon matched", Arc::new(Muon { adjustment: Adjustment::MatchAdamW, ..Muon::default() })),
    ];
    for (name, optimizer) in cases {
        let stored = StoredOptimizer::new(optimizer, Formats::default(), 5).unwrap();
        for (number, shape) in [&[6, 5][..], &[5, 8], &[7]].into_iter().enumerate() {
            let number = number as u64;
            let elements = shape.iter().product();
            let gradient = |step| drawn_cubes(1000 * step + number, elements);
            let found = after_50_steps(&stored, number, shape, gradient);
            let expected = &reference["parameters"][name][number as usize];
            let expected: Vec<f64> =
                expected.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            assert_eq!(found.elements(), expected.len());
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let pairs = found.masters().iter().zip(&expected);
            let distance = norm(&mut pairs.map(|(&found, expected)| f64::from(found) - expected));
            let relative = distance / norm(&mut expected.iter().copied());
            assert!(relative < 1e-6, "{name}, {shape:?}: {relative:e}");
        }
    }
}

fn bytes(value: &serde_json::Value) -> Vec<u8> {
    let text = value.as_str().unwrap().as_bytes();
    let digit = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.chunks(2).map(digit).collect()
}

fn singles(value: &serde_json::Value) -> Vec<f32> {
    bytes(value).as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// What every byte stands for, from a stream with one scale of 1.
fn codebook(values: Values) -> Vec<f32> {
    /// Shows its state as the parameters.
    #[derive(Debug)]
    struct Show(Values);
    impl Optimizer for Show {
        fn name(&self) -> &'static str {
            "show"
        }
        fn validate(&self) -> Result<(), Error> {
            Ok(())
        }
        fn states(&self) -> Vec<State> {
            vec![State { name: "shown", values: self.0 }]
        }
        fn update(&self, _: Tools<'_>, _: &Step, part: Part<'_, '_>) {
            part.parameters.copy_from_slice(part.states[0]);
        }
    }
    let stored = stored(Show(values), Masters::F32, States::EightBit);
    let mut parameter = Parameter::new(&stored, &[256], &[0.0; 256]);
    let stream: &mut [u8] = bytemuck::cast_slice_mut(&mut parameter.streams[1]);
    stream[..4].copy_from_slice(&1f32.to_le_bytes());
    for (code, byte) in (0..=255).zip(&mut stream[16..]) {
        *byte = code;
    }
    let pool = Pool::new(1).unwrap();
    parameter.update(&stored, (Path::best(), &pool), &step(1), 0..256, Gradient::F32(&[0.0; 256])).unwrap();
    parameter.masters().to_vec()
}

#[test]
fn codes_are_those_of_bitsandbytes() {
    let reference = reference();
    for (name, values) in [("signed", Values::Signed), ("unsigned", Values::NonNegative)] {
        assert_eq!(codebook(values), singles(&reference["codes"][name]), "{name}");
    }
}

#[test]
fn adamw_in_8_bits_is_that_of_bitsandbytes() {
    let reference = &reference()["eight_bit"];
    let elements = 1024;
    let (exact, ours) = (
        stored(AdamW::default(), Masters::F32, States::F32),
        stored(AdamW::default(), Masters::F32, States::EightBit),
    );
    let mut once = Parameter::new(&ours, &[elements], &drawn(0, elements));
    let gradient = drawn(1000, elements);
    let pool = Pool::new(1).unwrap();
    once.update(&ours, (Path::best(), &pool), &step(1), 0..elements, Gradient::F32(&gradient)).unwrap();
    let states = once.streams[1..].iter().zip([&reference["codes"]["state1"], &reference["codes"]["state2"]]);
    let different: usize = states
        .map(|(ours, theirs)| {
            let ours: &[u8] = bytemuck::cast_slice(ours);
            ours[16..].iter().zip(bytes(theirs)).filter(|(ours, theirs)| **ours != *theirs).count()
        })
        .sum();
    assert!(different * 1000 <= 2 * elements, "{different} of {}", 2 * elements);

    let gradient = |step| drawn(1000 * step, elements);
    let [exact, ours] =
        [exact, ours].map(|stored| after_50_steps(&stored, 0, &[elements], gradient).masters().to_vec());
    let theirs = singles(&reference["parameters"]);
    let distance =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
    let (error, its_error) = (distance(&ours, &exact), distance(&theirs, &exact));
    assert!(error <= 1.001 * its_error, "{error} and {its_error}");
    assert!(distance(&ours, &theirs) <= its_error, "{} and {its_error}", distance(&ours, &theirs));
}

#[test]
fn settings_that_are_no_numbers_of_an_update_are_refused_by_name() {
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0];
    let refused = |optimizer: Arc<dyn Optimizer>, name: &str| {
        let error = StoredOptimizer::new(optimizer.clone(), Formats::default(), 1).unwrap_err();
        assert!(
            matches!(&error, Error::Setting { name: found, .. } if *found == name),
            "{optimizer:?}: {error}"
        );
    };
    for value in bad {
        refused(Arc::new(AdamW { beta1: value, ..AdamW::default() }), "beta1");
        refused(Arc::new(AdamW { beta2: value, ..AdamW::default() }), "beta2");
        refused(Arc::new(AdamW { epsilon: value, ..AdamW::default() }), "epsilon");
        refused(Arc::new(Adam { beta2: value, ..Adam::default() }), "beta2");
        refused(Arc::new(Sgd { momentum: value, ..Sgd::default() }), "momentum");
        refused(Arc::new(Sgd { momentum: 0.9, dampening: value, nesterov: false }), "dampening");
        refused(Arc::new(Lion { beta1: value, ..Lion::default() }), "beta1");
        refused(Arc::new(Adagrad { epsilon: value }), "epsilon");
        refused(Arc::new(Adafactor { clip: value, ..Adafactor::default() }), "the clip of a step");
        refused(Arc::new(AdamP { delta: value, ..AdamP::default() }), "delta");
        refused(Arc::new(Muon { momentum: value, ..Muon::default() }), "momentum");
        assert!(Step { learning_rate: value, ..step(1) }.validate().is_err());
        assert!(Step { weight_decay: value, ..step(1) }.validate().is_err());
        assert!(Step { gradient_scale: value as f32, ..step(1) }.validate().is_err());
    }
    assert!(step(0).validate().is_err());
    // What rounds to one, or to nothing, in f32.
    refused(Arc::new(AdamW { beta1: 1.0 - 1e-12, ..AdamW::default() }), "beta1");
    refused(Arc::new(AdamW { epsilon: 1e-60, ..AdamW::default() }), "epsilon");
    refused(Arc::new(Sgd { momentum: 0.0, dampening: 0.0, nesterov: true }), "Nesterov's momentum");
}

#[test]
fn runs_that_do_not_fit_are_refused_and_nothing_is_changed() {
    let stored = stored(AdamW::default(), Masters::F32, States::EightBit);
    let pool = Pool::new(1).unwrap();
    let before = Parameter::new(&stored, &[2000], &normal("p", 2000));
    let mut parameter = before.clone();
    let gradient = normal("g", 2000);
    let mut refused = |step: &Step, range: Range<usize>, gradient: &[f32]| {
        let gradient = Gradient::F32(gradient);
        let result = parameter.update(&stored, (Path::best(), &pool), step, range, gradient);
        assert!(parameter == before);
        result.unwrap_err()
    };
    assert!(matches!(refused(&step(1), 0..2000, &gradient[1..]), Error::Length { .. }));
    assert!(matches!(refused(&step(1), 5..2000, &gradient[5..]), Error::Setting { .. }));
    let hot = Step { learning_rate: f64::NAN, ..step(1) };
    let error = refused(&hot, 0..2000, &gradient);
    assert_eq!(error.to_string(), "the learning rate is NaN; it must be a finite number of 0 or more");
    // A run of f32 that starts at an odd address.
    let mut words = vec![0u32; 3];
    let odd: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut words)[1..5];
    let (mut first, mut second) = (vec![0u8; 1040], vec![0u8; 1040]);
    let piece = Piece {
        shape: &[1],
        group: 1,
        first_element: 0,
        streams: &mut [odd, &mut first, &mut second],
        gradient: Gradient::F32(&[1.0]),
        copy: None,
        scratch: &mut [],
    };
    assert!(matches!(stored.update(&pool, &step(1), piece), Err(Error::Alignment { .. })));
}

#[test]
fn a_copy_is_the_rounded_parameter() {
    let stored = stored(Lion::default(), Masters::F32, States::Bf16);
    let pool = Pool::new(2).unwrap();
    let (elements, values) = (70_000, normal("p", 70_000));
    let mut parameter = Parameter::new(&stored, &[elements], &values);
    let gradient = normal("g", elements);
    let mut copy = vec![bf16::ZERO; elements];
    let [master, moment] = parameter.streams.as_mut_slice() else { unreachable!() };
    let piece = Piece {
        shape: &[elements],
        group: 1,
        first_element: 0,
        streams: &mut [bytemuck::cast_slice_mut(master), bytemuck::cast_slice_mut(moment)],
        gradient: Gradient::F32(&gradient),
        copy: Some(LowPrecision::Bf16(&mut copy)),
        scratch: &mut [],
    };
    stored.update(&pool, &step(1), piece).unwrap();
    for (&master, copy) in parameter.masters().iter().zip(copy) {
        assert_eq!(copy, bf16::from_f32(master));
    }
}

#[test]
fn streams_are_data() {
    let stored = stored(Muon::default(), Masters::Split, States::EightBit);
    let streams: Vec<_> = stored.streams().iter().map(|stream| (stream.name, stream.format)).collect();
    assert_eq!(
        streams,
        [
            ("parameter", Format::Rounded),
            ("remainder", Format::Remainder),
            ("momentum", Format::Signed8),
            ("second moment", Format::Unsigned8),
        ]
    );
    let elements = |shape: &[usize]| [0, 1, 2, 3].map(|stream| stored.stream_elements(stream, shape));
    assert_eq!(elements(&[30, 40]), [1200, 1200, 1200, 0]);
    assert_eq!(elements(&[1200]), [1200; 4]);
    let bytes: Vec<usize> = streams.iter().map(|(_, format)| format.bytes(1200)).collect();
    assert_eq!(bytes, [2400, 2400, 2080, 2080]);
}
