//! The differentiable operations: close to the CPU's in f32, close to exact ones in 16 bits, and the same
//! bits each time.

use candle_core::{D, DType, Device, Error, Result, Tensor, Var};
use ferrozero_kernels::cuda::{Limits, with_limits};
use ferrozero_kernels::ops::{self, OpError};

use crate::cases::{Case, causal_attention, linear_cross_entropy, random, several_blocks, small, wide_rows};
use crate::device;

/// The result of an operation and the gradients of its inputs, fetched to the CPU as f64.
#[derive(Debug, PartialEq)]
struct Run {
    result: Vec<f64>,
    gradients: Vec<Vec<f64>>,
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Runs an operation forward and backward on inputs where they lie; the upstream gradient is rounded to their
/// dtype.
fn run(operation: &dyn Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Run {
    let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let result = operation(&tensors).unwrap();
    // The rounding of the lowest precision, so that all runs have the same upstream gradient.
    let weights = random(result.dims(), 1000).to_dtype(DType::BF16).unwrap();
    let weights = weights.to_dtype(result.dtype()).unwrap().to_device(result.device()).unwrap();
    let store = (&result * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |var: &Var| values(store.get(var).expect("no gradient reached an input"));
    Run { result: values(&result), gradients: vars.iter().map(gradient).collect() }
}

fn all() -> Vec<Case> {
    small().into_iter().chain(several_blocks()).chain(wide_rows()).collect()
}

fn place(inputs: &[Tensor], dtype: DType, device: &Device) -> Vec<Tensor> {
    let place = |input: &Tensor| input.to_dtype(dtype).unwrap().to_device(device).unwrap();
    inputs.iter().map(place).collect()
}

/// Every element within `tolerance`, relative to the largest magnitude (or 0.1) of what is expected.
fn assert_close(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let magnitude = expected.iter().fold(0.1f64, |largest, x| largest.max(x.abs()));
    for (index, (a, b)) in actual.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * magnitude, "{what}: element {index} is {a}, expected {b}");
    }
}

fn assert_runs_close(what: &str, actual: &Run, expected: &Run, tolerance: f64) {
    assert_close(what, &actual.result, &expected.result, tolerance);
    for (index, (actual, expected)) in actual.gradients.iter().zip(&expected.gradients).enumerate() {
        assert_close(&format!("{what}, gradient of input {index}"), actual, expected, tolerance);
    }
}

#[test]
fn operations_and_their_gradients_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    for case in all() {
        let inputs = case.inputs();
        let on_device = run(&case.ours, &place(&inputs, DType::F32, &device));
        assert_runs_close(&case.name, &on_device, &run(&case.ours, &inputs), 1e-5);
    }
}

#[test]
fn operations_in_16_bits_are_close_to_exact_ones_on_the_same_inputs() {
    let Some(device) = device() else { return };
    // The larger shapes in one type: both run the same code, and the smaller mantissa finds more.
    for (dtype, tolerance, cases) in [(DType::BF16, 3e-2, all()), (DType::F16, 4e-3, small())] {
        for case in cases {
            let inputs = place(&case.inputs(), dtype, &Device::Cpu);
            let exact = run(&case.composed, &place(&inputs, DType::F64, &Device::Cpu));
            let on_device = run(&case.ours, &place(&inputs, dtype, &device));
            assert_runs_close(&format!("{} in {dtype:?}", case.name), &on_device, &exact, tolerance);
        }
    }
}

/// The same elements where no row-major tensor has them: columns first, and after an offset.
fn scattered(tensor: &Tensor) -> Tensor {
    if tensor.rank() < 2 {
        let padded = Tensor::cat(&[tensor, tensor], 0).unwrap();
        return padded.narrow(0, tensor.dims()[0], tensor.dims()[0]).unwrap();
    }
    let columns_first = tensor.t().unwrap().contiguous().unwrap();
    let padded = Tensor::cat(&[&columns_first, &columns_first], D::Minus1).unwrap();
    let rows = tensor.dim(D::Minus2).unwrap();
    padded.narrow(D::Minus1, rows, rows).unwrap().t().unwrap()
}

#[test]
fn every_run_gives_the_same_bits_whatever_the_layout() {
    let Some(device) = device() else { return };
    for case in all() {
        let inputs = place(&case.inputs(), DType::F32, &device);
        let first = run(&case.ours, &inputs);
        assert_eq!(first, run(&case.ours, &inputs), "{}", case.name);
        let elsewhere = |inputs: &[Tensor]| {
            let inputs: Vec<Tensor> = inputs.iter().map(scattered).collect();
            let result = (case.ours)(&inputs)?;
            // A transposed result makes the upstream gradient arrive in another layout.
            if result.rank() < 2 { Ok(result) } else { result.t()?.contiguous()?.t() }
        };
        assert_eq!(first, run(&elsewhere, &inputs), "{} of scattered inputs", case.name);
    }
}

#[test]
fn blocks_that_take_turn_after_turn_give_the_same_bits() {
    let Some(device) = device() else { return };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mut count = 0;
        for case in several_blocks() {
            let inputs = place(&case.inputs(), dtype, &device);
            let expected = run(&case.ours, &inputs);
            let limits = Limits { blocks: 2, ..Limits::default() };
            let (found, launches) = with_limits(limits, || run(&case.ours, &inputs));
            assert_eq!(found, expected, "{} in {dtype:?}", case.name);
            assert_eq!(launches.in_turns, launches.count, "{}", case.name);
            count += launches.count;
        }
        assert!(count > several_blocks().len(), "products alone launch nothing of ours");
    }
}

#[test]
fn less_scratch_memory_changes_only_the_order_of_sums() {
    let Some(device) = device() else { return };
    // Two heads of three, one head, four rows, and one row at a time of 11 positions; tiles of 200 logits a
    // row, whose first and last ones are among the targets.
    let attentions = [None, Some(1), Some(3), Some(11)].map(|window| causal_attention(2, 11, 3, 4, window));
    let attentions = attentions.iter().map(|case| (case, vec![2 * 121, 121, 4 * 11, 1]));
    let head = linear_cross_entropy(40, 5, 200);
    for (case, scratch) in attentions.chain([(&head, vec![40 * 130, 1])]) {
        let inputs = place(&case.inputs(), DType::F32, &device);
        let (whole, mut before) = with_limits(Limits::default(), || run(&case.ours, &inputs));
        for scratch_elements in scratch {
            let limits = Limits { scratch_elements, ..Limits::default() };
            let (pieces, launches) = with_limits(limits, || run(&case.ours, &inputs));
            let what = format!("{} with {scratch_elements} elements", case.name);
            assert!(launches.count > before.count, "{what}: {launches:?} after {before:?}");
            assert_runs_close(&what, &pieces, &whole, 1e-5);
            before = launches;
        }
    }
}

#[test]
fn frozen_inputs_leave_the_other_gradients_alone() {
    let Some(device) = device() else { return };
    for case in small() {
        let inputs = place(&case.inputs(), DType::F32, &device);
        let all = run(&case.ours, &inputs);
        for (tracked, input) in inputs.iter().enumerate() {
            let with_one_tracked = |var: &[Tensor]| {
                let mut inputs = inputs.clone();
                inputs[tracked] = var[0].clone();
                (case.ours)(&inputs)
            };
            let one = run(&with_one_tracked, std::slice::from_ref(input));
            assert_eq!(one.gradients[0], all.gradients[tracked], "{} input {tracked}", case.name);
        }
    }
}

#[test]
fn not_a_number_is_never_hidden() {
    let Some(device) = device() else { return };
    for case in small() {
        let mut inputs = place(&case.inputs(), DType::F32, &device);
        inputs[0] = inputs[0].affine(f64::NAN, 0.0).unwrap();
        assert!(run(&case.ours, &inputs).result.iter().any(|x| x.is_nan()), "{}", case.name);
    }
}

#[test]
fn masked_scores_are_not_read() {
    let Some(device) = device() else { return };
    let scores = random(&[2, 5, 7], 1);
    let not_a_number = scores.ones_like().unwrap().affine(f64::NAN, 0.0).unwrap();
    for window in [None, Some(1), Some(4)] {
        let hidden = |at: usize| {
            let (column, own) = (at % 7, (at / 7) % 5 + 2);
            u8::from(column > own || window.is_some_and(|window| column + window <= own))
        };
        let hidden =
            Tensor::from_vec((0..70).map(hidden).collect::<Vec<_>>(), (2, 5, 7), &Device::Cpu).unwrap();
        let poisoned = hidden.where_cond(&not_a_number, &scores).unwrap();
        let [clean, poisoned] = [&scores, &poisoned]
            .map(|scores| ops::causal_softmax(&scores.to_device(&device).unwrap(), 0.5, window).unwrap());
        assert_eq!(values(&poisoned), values(&clean), "{window:?}");
    }
}

/// The typed error inside a candle error.
fn message(result: Result<Tensor>) -> String {
    fn wrapped(error: &Error) -> String {
        match error {
            Error::Wrapped(inner) => inner.to_string(),
            Error::WithBacktrace { inner, .. } => wrapped(inner),
            other => panic!("not a typed error: {other}"),
        }
    }
    wrapped(&result.unwrap_err())
}

#[test]
fn a_target_out_of_range_is_named() {
    let Some(device) = device() else { return };
    let targets = Tensor::new(&[1u32, 9, 12], &device).unwrap();
    let on_device = |shape: &[usize], seed| random(shape, seed).to_device(&device).unwrap();
    let (hidden, weight) = (on_device(&[3, 4], 1), on_device(&[9, 4], 2));
    for (op, result) in [
        ("cross_entropy", ops::cross_entropy(&on_device(&[3, 9], 1), &targets)),
        ("linear_cross_entropy", ops::linear_cross_entropy(&hidden, &weight, &targets)),
    ] {
        let expected = OpError::TargetOutOfRange { op, row: 1, target: 9, vocabulary_size: 9 };
        assert_eq!(message(result), expected.to_string());
    }
    let expected = OpError::TokenOutOfRange { op: "embedding", position: 1, token: 9, vocabulary_size: 9 };
    assert_eq!(message(ops::embedding(&weight, &targets)), expected.to_string());
}

#[test]
fn dtypes_that_do_not_fit_are_refused() {
    let Some(device) = device() else { return };
    for case in small() {
        let mut inputs = place(&case.inputs(), DType::F64, &device);
        let text = message((case.ours)(&inputs));
        assert!(text.contains("cast the tensor to F32"), "{}: {text}", case.name);
        // The first input decides what the others must be.
        inputs[0] = inputs[0].to_dtype(DType::BF16).unwrap();
        if inputs.len() > 1 {
            let text = message((case.ours)(&inputs));
            assert!(text.contains("cast the tensor to BF16"), "{}: {text}", case.name);
        }
    }
}

#[test]
fn empty_inputs_give_empty_results_and_gradients() {
    let Some(device) = device() else { return };
    let empty = |shape: &[usize]| Var::zeros(shape, DType::F32, &device).unwrap();
    let row = random(&[4], 2).to_device(&device).unwrap();
    let weight = random(&[3, 4], 1).to_device(&device).unwrap();
    type Operation<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;
    let cases: Vec<(Var, Operation<'_>)> = vec![
        (empty(&[0, 3]), Box::new(ops::gelu)),
        (empty(&[2, 0]), Box::new(ops::swiglu)),
        (empty(&[0, 4]), Box::new(|xs| ops::layer_norm(xs, &row, &row, 1e-5))),
        (empty(&[2, 0]), Box::new(ops::softmax_last_dim)),
        (empty(&[0, 2, 3]), Box::new(|xs| ops::causal_softmax(xs, 1.0, None))),
        (empty(&[0, 4]), Box::new(|xs| ops::linear(xs, &weight, None))),
        (empty(&[2, 0, 6]), Box::new(|xs| ops::causal_attention(xs, 2, Some(3)))),
    ];
    for (index, (input, operation)) in cases.iter().enumerate() {
        let result = operation(input.as_tensor()).unwrap();
        assert_eq!(result.elem_count(), 0, "attempt {index}");
        let gradients = result.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(input).map(Tensor::elem_count), Some(0), "attempt {index}");
    }
}

#[test]
fn a_sum_of_nothing_is_the_bias() {
    let Some(device) = device() else { return };
    let bias = random(&[3], 1).to_device(&device).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &device).unwrap();
    let with_bias = ops::linear(&zeros(&[2, 0]), &zeros(&[3, 0]), Some(&bias)).unwrap();
    assert_eq!(values(&with_bias), values(&bias).repeat(2));
    let without = ops::linear(&zeros(&[2, 0]), &zeros(&[3, 0]), None).unwrap();
    assert_eq!(values(&without), vec![0.0; 6]);
}
