//! A small transformer of the operations, trained on a CUDA device.

use candle_core::{DType, Device, Result, Tensor, Var};
use ferrozero_kernels::ops;

use crate::cases::random;
use crate::device;

const TOKENS: [usize; 2] = [2, 9];
const WIDTH: usize = 12;
const HEADS: usize = 3;
const VOCABULARY: usize = 29;

/// Two blocks of GPT-2's form on an embedding that is also the head.
struct Model {
    embedding: Var,
    blocks: Vec<[Var; 8]>,
}

impl Model {
    fn new(dtype: DType, device: &Device) -> Self {
        let parameter = |shape: &[usize], seed| {
            let values = (random(shape, seed) * 0.2).unwrap();
            Var::from_tensor(&values.to_dtype(dtype).unwrap().to_device(device).unwrap()).unwrap()
        };
        let block = |seed| {
            [
                parameter(&[WIDTH], seed),
                parameter(&[WIDTH], seed + 1),
                parameter(&[3 * WIDTH, WIDTH], seed + 2),
                parameter(&[3 * WIDTH], seed + 3),
                parameter(&[WIDTH, WIDTH], seed + 4),
                parameter(&[2 * WIDTH, WIDTH], seed + 5),
                parameter(&[WIDTH, WIDTH], seed + 6),
                parameter(&[WIDTH], seed + 7),
            ]
        };
        Self { embedding: parameter(&[VOCABULARY, WIDTH], 1), blocks: vec![block(10), block(20)] }
    }

    fn parameters(&self) -> impl Iterator<Item = &Var> {
        std::iter::once(&self.embedding).chain(self.blocks.iter().flatten())
    }

    fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let mut xs = ops::embedding(&self.embedding, &tokens.reshape((TOKENS[0], TOKENS[1]))?)?;
        for [gain, shift, qkv, qkv_bias, out, gate_and_up, down, root] in &self.blocks {
            let normed = ops::layer_norm(&xs, &(gain.as_tensor() + 1.0)?, shift, 1e-5)?;
            let attended = ops::causal_attention(&ops::linear(&normed, qkv, Some(qkv_bias))?, HEADS, None)?;
            xs = (xs + ops::linear(&attended, out, None)?)?;
            let normed = ops::rms_norm(&xs, &(root.as_tensor() + 1.0)?, 1e-5)?;
            let gated = ops::swiglu(&ops::linear(&normed, gate_and_up, None)?)?;
            xs = (xs + ops::linear(&ops::gelu(&gated)?, down, None)?)?;
        }
        ops::linear_cross_entropy(&xs.flatten(0, 1)?, &self.embedding, targets)
    }

    /// Losses of plain gradient descent.
    fn train(&self, steps: usize) -> Vec<f32> {
        let device = self.embedding.device();
        let ids = |step: u32| -> Vec<u32> {
            (0..(TOKENS[0] * TOKENS[1]) as u32).map(|at| (at * step) % VOCABULARY as u32).collect()
        };
        let [tokens, targets] = [ids(7), ids(3)].map(|ids| Tensor::new(ids, device).unwrap());
        let step = |_| {
            let loss = self.loss(&tokens, &targets).unwrap();
            let gradients = loss.backward().unwrap();
            for parameter in self.parameters() {
                let gradient = gradients.get(parameter).expect("a parameter without a gradient");
                parameter.set(&(parameter.as_tensor() - (gradient * 0.5).unwrap()).unwrap()).unwrap();
            }
            loss.to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap()
        };
        (0..steps).map(step).collect()
    }
}

#[test]
fn a_model_trains_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let on_cpu = Model::new(DType::F32, &Device::Cpu).train(8);
    let on_device = Model::new(DType::F32, &device).train(8);
    for (step, (cpu, device)) in on_cpu.iter().zip(&on_device).enumerate() {
        assert!((cpu - device).abs() < 1e-4, "step {step}: {device} on the device, {cpu} on the CPU");
    }
    assert!(on_cpu[7] < on_cpu[0] - 0.2, "nothing was learnt: {on_cpu:?}");
    assert_eq!(on_device, Model::new(DType::F32, &device).train(8), "not the same bits again");
}

#[test]
fn a_model_trains_in_16_bits() {
    let Some(device) = device() else { return };
    let exact = Model::new(DType::F32, &Device::Cpu).train(8);
    for dtype in [DType::BF16, DType::F16] {
        let losses = Model::new(dtype, &device).train(8);
        for (step, (exact, loss)) in exact.iter().zip(&losses).enumerate() {
            assert!((exact - loss).abs() < 0.05, "{dtype:?}, step {step}: {loss}, in f32 {exact}");
        }
    }
}
