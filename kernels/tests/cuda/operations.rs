//! The differentiable operations.

use candle_core::{DType, Device, Result, Tensor, Var};

use crate::cases::{Case, large, random, small};
use crate::device;

/// The result of an operation and the gradients of its inputs, fetched to the CPU as f64.
struct Run {
    result: Vec<f64>,
    gradients: Vec<Vec<f64>>,
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Runs an operation forward and backward on `device`, with inputs and upstream gradient rounded to `dtype`.
fn run(
    operation: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    dtype: DType,
    device: &Device,
) -> Run {
    let place = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(&place(input)).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let result = operation(&tensors).unwrap();
    let weights = place(&random(result.dims(), 1000));
    let store = (&result * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |var: &Var| values(store.get(var).expect("no gradient reached an input"));
    Run { result: values(&result), gradients: vars.iter().map(gradient).collect() }
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

fn assert_as_on_the_cpu(case: &Case, device: &Device) {
    let inputs = case.inputs();
    let cpu = run(&case.ours, &inputs, DType::F32, &Device::Cpu);
    let cuda = run(&case.ours, &inputs, DType::F32, device);
    assert_close(&case.name, &cuda.result, &cpu.result, TOLERANCE);
    for (index, (cuda, cpu)) in cuda.gradients.iter().zip(&cpu.gradients).enumerate() {
        assert_close(&format!("{}, gradient of input {index}", case.name), cuda, cpu, TOLERANCE);
    }
    let exact = run(&case.composed, &inputs, DType::F64, &Device::Cpu);
    assert_close(&format!("{} in f64", case.name), &cuda.result, &exact.result, TOLERANCE);
}

#[test]
fn operations_and_their_gradients_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    small().iter().chain(&large()).for_each(|case| assert_as_on_the_cpu(case, &device));
}
