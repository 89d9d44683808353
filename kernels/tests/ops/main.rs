//! Promises of the differentiable operations, each tested on the table in `cases`.

mod cases;
mod recompute;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use cases::{Case, large, random, small};
use ferrozero_kernels::ops::{self, OpError, Products};

/// The result of an operation and the gradients of its inputs for the upstream gradient
/// `upstream(result's shape)`.
struct Run {
    result: Tensor,
    gradients: Vec<Tensor>,
}

fn upstream(shape: &[usize], dtype: DType) -> Result<Tensor> {
    random(shape, 1000).to_dtype(dtype)
}

fn run(operation: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Run {
    let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let result = operation(&tensors).unwrap();
    let weights = upstream(result.dims(), result.dtype()).unwrap();
    let store = (&result * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |var: &Var| store.get(var).expect("no gradient reached an input").clone();
    Run { result, gradients: vars.iter().map(gradient).collect() }
}

fn to_f64(inputs: &[Tensor]) -> Vec<Tensor> {
    inputs.iter().map(|input| input.to_dtype(DType::F64).unwrap()).collect()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The bits of every element, in f32, which is exact.
fn bits(tensor: &Tensor) -> Vec<u32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// Every element within `tolerance`, relative to the largest magnitude (or 1) of what is expected.
fn assert_close(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let magnitude = expected.iter().fold(1f64, |largest, x| largest.max(x.abs()));
    for (index, (a, b)) in actual.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * magnitude, "{what}: element {index} is {a}, expected {b}");
    }
}

/// f32 rounding over the longest sums in the table.
const TOLERANCE: f64 = 1e-5;

fn assert_matches_composed(case: &Case) {
    let inputs = case.inputs();
    let ours = run(&case.ours, &inputs);
    let composed = run(&case.composed, &to_f64(&inputs));
    assert_eq!(ours.result.dims(), composed.result.dims(), "{}", case.name);
    assert_close(&case.name, &values(&ours.result), &values(&composed.result), TOLERANCE);
    for (index, (ours, composed)) in ours.gradients.iter().zip(&composed.gradients).enumerate() {
        assert_eq!(ours.dims(), composed.dims());
        let what = format!("{}, gradient of input {index}", case.name);
        assert_close(&what, &values(ours), &values(composed), TOLERANCE);
    }
}

#[test]
fn values_and_gradients_match_the_composed_operations_in_f64() {
    small().iter().chain(&large()).for_each(assert_matches_composed);
}

fn to(dtype: DType, inputs: &[Tensor]) -> Vec<Tensor> {
    inputs.iter().map(|input| input.to_dtype(dtype).unwrap()).collect()
}

/// The mantissas of both types, over sums in f32.
#[test]
fn in_16_bits_values_and_gradients_are_close_to_exact_ones_on_the_same_inputs() {
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        for case in small().iter().chain(&large()) {
            let inputs = to(dtype, &case.inputs());
            let ours = run(&case.ours, &inputs);
            let composed = run(&case.composed, &to_f64(&inputs));
            let what = format!("{} in {dtype:?}", case.name);
            assert_close(&what, &values(&ours.result), &values(&composed.result), tolerance);
            for (index, (ours, composed)) in ours.gradients.iter().zip(&composed.gradients).enumerate() {
                assert_eq!((ours.dims(), ours.dtype()), (composed.dims(), dtype), "{what}");
                let what = format!("{what}, gradient of input {index}");
                assert_close(&what, &values(ours), &values(composed), tolerance);
            }
        }
    }
}

#[test]
fn products_of_bf16_leave_everything_else_as_it_is() {
    if !Products::Bf16.is_native() {
        eprintln!("skipped: this processor has no matrix tiles for bf16, or the system does not grant them");
        return;
    }
    let mut others = 0;
    for case in small().iter().chain(&large()) {
        let inputs = case.inputs();
        let exact = run(&case.composed, &to_f64(&inputs));
        let in_f32 = run(&case.ours, &inputs);
        let ours = ops::with_products(Products::Bf16, || run(&case.ours, &inputs));
        let multiplies = ["linear", "closing"].iter().any(|name| case.name.starts_with(name));
        if !multiplies {
            assert_same_bits(&case.name, &ours, &in_f32);
            continue;
        }
        others += usize::from(bits(&ours.result) != bits(&in_f32.result));
        assert_close(&case.name, &values(&ours.result), &values(&exact.result), 2e-2);
        for (ours, exact) in ours.gradients.iter().zip(&exact.gradients) {
            assert_close(&case.name, &values(ours), &values(exact), 2e-2);
        }
        let again = ops::with_products(Products::Bf16, || run(&case.ours, &inputs));
        assert_same_bits(&case.name, &ours, &again);
    }
    assert!(others > 10, "{others} results differ from products of f32");
}

/// `Σ result·upstream` of the composed operation in f64.
fn objective(case: &Case, inputs: &[Tensor]) -> f64 {
    let result = (case.composed)(inputs).unwrap();
    let weights = upstream(result.dims(), DType::F64).unwrap();
    (result * weights).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn gradients_match_central_differences() {
    const STEP: f64 = 1e-5;
    for case in small() {
        let inputs = case.inputs();
        let ours = run(&case.ours, &inputs);
        for (index, gradient) in ours.gradients.iter().enumerate() {
            let original = values(&inputs[index]);
            let difference = |at: usize| {
                let moved = |step: f64| {
                    let mut elements = original.clone();
                    elements[at] += step;
                    let mut inputs = to_f64(&inputs);
                    inputs[index] = Tensor::from_vec(elements, inputs[index].shape(), &Device::Cpu).unwrap();
                    objective(&case, &inputs)
                };
                (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
            };
            let differences: Vec<f64> = (0..original.len()).map(difference).collect();
            let what = format!("{}, differences of input {index}", case.name);
            assert_close(&what, &values(gradient), &differences, TOLERANCE);
        }
    }
}

fn assert_same_bits(what: &str, a: &Run, b: &Run) {
    assert_eq!(bits(&a.result), bits(&b.result), "{what}: result");
    for (index, (a, b)) in a.gradients.iter().zip(&b.gradients).enumerate() {
        assert_eq!(bits(a), bits(b), "{what}: gradient of input {index}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    for (case, dtype) in large().iter().flat_map(|case| [(case, DType::F32), (case, DType::BF16)]) {
        let inputs = to(dtype, &case.inputs());
        let on_threads = |count: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
            pool.install(|| run(&case.ours, &inputs))
        };
        let one = on_threads(1);
        for count in [2, 3] {
            assert_same_bits(
                &format!("{} in {dtype:?} on {count} threads", case.name),
                &one,
                &on_threads(count),
            );
        }
    }
}

/// The same elements, laid out so that no dimension is where a row-major tensor has it.
fn scattered(tensor: &Tensor) -> Tensor {
    let shape: Vec<usize> = tensor.dims().iter().rev().map(|dimension| dimension + 1).collect();
    let order: Vec<usize> = (0..tensor.rank()).rev().collect();
    let padded = tensor.permute(order.clone()).unwrap();
    let padded = (0..tensor.rank()).fold(padded, |padded, dimension| {
        padded.contiguous().unwrap().pad_with_zeros(dimension, 1, 0).unwrap()
    });
    assert_eq!(padded.dims(), shape);
    let padded = padded.contiguous().unwrap().permute(order).unwrap();
    (0..tensor.rank())
        .fold(padded, |view, dimension| view.narrow(dimension, 1, tensor.dims()[dimension]).unwrap())
}

#[test]
fn layout_does_not_change_a_bit() {
    for (case, dtype) in small().iter().flat_map(|case| [(case, DType::F32), (case, DType::BF16)]) {
        let inputs = to(dtype, &case.inputs());
        let contiguous = run(&case.ours, &inputs);
        // The gradient goes through the scattering too, back to the row-major variable.
        let scattered = run(
            |inputs: &[Tensor]| {
                let inputs: Vec<Tensor> = inputs.iter().map(scattered).collect();
                // A transposed result makes the upstream gradient arrive in another layout.
                let result = (case.ours)(&inputs)?;
                match result.rank() {
                    0 | 1 => Ok(result),
                    _ => result.t()?.contiguous()?.t(),
                }
            },
            &inputs,
        );
        assert_same_bits(&case.name, &contiguous, &scattered);
    }
}

#[test]
fn frozen_inputs_leave_the_other_gradients_alone() {
    for case in small() {
        let inputs = case.inputs();
        let all = run(&case.ours, &inputs);
        for tracked in 0..inputs.len() {
            let var = [inputs[tracked].clone()];
            let one = run(
                |var: &[Tensor]| {
                    let mut inputs = inputs.clone();
                    inputs[tracked] = var[0].clone();
                    (case.ours)(&inputs)
                },
                &var,
            );
            assert_eq!(
                bits(&one.gradients[0]),
                bits(&all.gradients[tracked]),
                "{} input {tracked}",
                case.name
            );
        }
    }
}

#[test]
fn masked_scores_are_not_read() {
    let scores = random(&[2, 5, 7], 1);
    let not_a_number = scores.ones_like().unwrap().affine(f64::NAN, 0.0).unwrap();
    for window in [None, Some(1), Some(2), Some(4)] {
        let expected = ops::causal_softmax(&scores, 0.5, window).unwrap();
        let hidden = |at: usize| {
            let (column, own) = (at % 7, (at / 7) % 5 + 2);
            u8::from(column > own || window.is_some_and(|window| column + window <= own))
        };
        let hidden =
            Tensor::from_vec((0..70).map(hidden).collect::<Vec<_>>(), (2, 5, 7), &Device::Cpu).unwrap();
        let poisoned = hidden.where_cond(&not_a_number, &scores).unwrap();
        assert_eq!(
            bits(&ops::causal_softmax(&poisoned, 0.5, window).unwrap()),
            bits(&expected),
            "{window:?}"
        );
    }
}

/// What a masked product does with a NaN would show in its result: 0·NaN is NaN.
#[test]
fn what_lies_outside_of_every_window_of_a_block_is_not_computed() {
    const POSITIONS: usize = 150;
    let inputs =
        [random(&[1, POSITIONS, 8], 1), random(&[1, POSITIONS, 4], 2), random(&[1, POSITIONS, 4], 3)];
    let at = |position: usize, inputs: &[Tensor]| -> Vec<Tensor> {
        let poison = |xs: &Tensor| {
            let mut rows = xs.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
            rows[position].fill(f32::NAN);
            Tensor::new(rows, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
        };
        inputs.iter().map(poison).collect()
    };
    let attention = |x: &[Tensor]| ops::grouped_causal_attention(&x[0], &x[1], &x[2], 4, 2, Some(10));
    let clean = run(attention, &inputs);
    // Blocks have 64 rows: the first alone sees position 0, the third alone 140, and the third sees nothing
    // before 119.
    for (position, untouched) in [(0, 64..POSITIONS), (140, 0..119)] {
        let poisoned = run(attention, &at(position, &inputs));
        assert!(values(&poisoned.result.narrow(1, position, 1).unwrap()).iter().all(|x| x.is_nan()));
        let part = |tensor: &Tensor| bits(&tensor.narrow(1, untouched.start, untouched.len()).unwrap());
        assert_eq!(part(&poisoned.result), part(&clean.result));
        for (poisoned, clean) in poisoned.gradients.iter().zip(&clean.gradients) {
            assert_eq!(part(poisoned), part(clean));
        }
    }
}

#[test]
fn a_window_as_long_as_the_sequence_changes_no_bit() {
    let inputs = [random(&[2, 150, 12], 1)];
    let attention = |window| move |x: &[Tensor]| ops::causal_attention(&x[0], 2, window);
    let all = run(attention(None), &inputs);
    for window in [150, 151, usize::MAX] {
        assert_same_bits("all", &run(attention(Some(window)), &inputs), &all);
    }
}

#[test]
fn a_window_of_nothing_is_refused() {
    let (wide, narrow) = (random(&[1, 2, 8], 1), random(&[1, 2, 4], 1));
    for result in [
        ops::causal_softmax(&narrow, 1.0, Some(0)),
        ops::causal_attention(&random(&[1, 2, 12], 1), 2, Some(0)),
        ops::grouped_causal_attention(&wide, &narrow, &narrow, 4, 2, Some(0)),
    ] {
        assert!(message(result).contains("a window of 0 positions"));
    }
}

#[test]
fn softmax_of_a_mask_gives_exact_zeros() {
    let scores = Tensor::new(&[[1f32, f32::NEG_INFINITY, 2.0]], &Device::Cpu).unwrap();
    let probabilities = values(&ops::softmax_last_dim(&scores).unwrap());
    assert_eq!(probabilities[1], 0.0);
    assert_close("softmax", &probabilities, &[0.268941421, 0.0, 0.731058579], 1e-6);
}

#[test]
fn not_a_number_is_never_hidden() {
    for case in small() {
        let mut inputs = case.inputs();
        inputs[0] = inputs[0].affine(f64::NAN, 0.0).unwrap();
        let run = run(&case.ours, &inputs);
        assert!(
            values(&run.result).iter().all(|x| x.is_nan()) || case.name.contains("softmax"),
            "{}",
            case.name
        );
        assert!(values(&run.result).iter().any(|x| x.is_nan()), "{}", case.name);
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
    let targets = Tensor::new(&[1u32, 9, 12], &Device::Cpu).unwrap();
    let (hidden, weight) = (random(&[3, 4], 1), random(&[9, 4], 2));
    for (op, result) in [
        ("cross_entropy", ops::cross_entropy(&random(&[3, 9], 1), &targets)),
        ("linear_cross_entropy", ops::linear_cross_entropy(&hidden, &weight, &targets)),
    ] {
        let expected = OpError::TargetOutOfRange { op, row: 1, target: 9, vocabulary_size: 9 };
        assert_eq!(message(result), expected.to_string());
    }
}

#[test]
fn a_token_out_of_range_is_named() {
    let tokens = Tensor::new(&[[1u32, 8], [9, 12]], &Device::Cpu).unwrap();
    let expected = OpError::TokenOutOfRange { op: "embedding", position: 2, token: 9, vocabulary_size: 9 };
    assert_eq!(message(ops::embedding(&random(&[9, 4], 1), &tokens)), expected.to_string());
}

#[test]
fn an_embedding_has_the_shape_of_its_tokens() {
    let tokens = Tensor::new(&[[1u32, 8, 0], [2, 2, 2]], &Device::Cpu).unwrap();
    assert_eq!(ops::embedding(&random(&[9, 4], 1), &tokens).unwrap().dims(), [2, 3, 4]);
    let none = Tensor::zeros((2, 0), DType::U32, &Device::Cpu).unwrap();
    assert_eq!(ops::embedding(&random(&[9, 4], 1), &none).unwrap().dims(), [2, 0, 4]);
}

#[test]
fn other_dtypes_are_refused_with_the_cure() {
    for case in small() {
        let inputs: Vec<Tensor> =
            case.inputs().iter().map(|input| input.to_dtype(DType::F64).unwrap()).collect();
        let message = message((case.ours)(&inputs));
        assert!(message.contains("cast the tensor to F32"), "{}: {message}", case.name);
    }
}

#[test]
fn inputs_of_two_dtypes_are_refused() {
    for case in small().iter().filter(|case| case.inputs().len() > 1 && !case.name.contains("closing")) {
        let mut inputs = case.inputs();
        inputs[0] = inputs[0].to_dtype(DType::BF16).unwrap();
        let message = message((case.ours)(&inputs));
        assert!(message.contains("cast the tensor to BF16"), "{}: {message}", case.name);
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let (matrix, row) = (random(&[4, 6], 1), random(&[5], 2));
    let targets = Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap();
    let scalar = random(&[], 3);
    let refused = [
        ops::layer_norm(&matrix, &row, &row, 1e-5),
        ops::layer_norm(&scalar, &row, &row, 1e-5),
        ops::rms_norm(&matrix, &row, 1e-5),
        ops::swiglu(&row),
        ops::embedding(&row, &targets),
        ops::softmax_last_dim(&scalar),
        ops::causal_softmax(&random(&[3, 2], 1), 1.0, None),
        ops::linear(&row, &matrix, None),
        ops::linear(&matrix, &matrix, Some(&row)),
        ops::rope(&matrix, &matrix, &matrix),
        ops::causal_attention(&random(&[1, 2, 12], 1), 3, None),
        ops::causal_attention(&random(&[1, 2, 12], 1), 0, None),
        ops::cross_entropy(&matrix, &targets),
        ops::linear_cross_entropy(&matrix, &matrix, &targets),
    ];
    for (index, result) in refused.into_iter().enumerate() {
        assert!(message(result).contains("got ["), "attempt {index}");
    }
}

#[test]
fn tracked_tables_of_rope_are_refused() {
    let tables = Var::from_tensor(&random(&[3, 2], 1)).unwrap();
    let result = ops::rope(&random(&[1, 1, 3, 4], 2), &tables, &tables);
    assert!(message(result).contains("cos receives no gradient"));
}

#[test]
fn empty_inputs_give_empty_results() {
    let empty = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (weight, bias) = (random(&[3, 4], 1), random(&[4], 2));
    let results = [
        ops::gelu(&empty(&[0, 3])),
        ops::swiglu(&empty(&[2, 0])),
        ops::layer_norm(&empty(&[0, 4]), &bias, &bias, 1e-5),
        ops::softmax_last_dim(&empty(&[2, 0])),
        ops::causal_softmax(&empty(&[0, 2, 3]), 1.0, None),
        ops::linear(&empty(&[0, 4]), &weight, None),
        ops::causal_attention(&empty(&[2, 0, 6]), 2, Some(3)),
    ];
    for (index, result) in results.into_iter().enumerate() {
        assert_eq!(result.unwrap().elem_count(), 0, "attempt {index}");
    }
}
