//! Forward and backward of each operation against the same composed of candle's own differentiable operations.
//!
//! The sizes are those of a GPT-2 small block: width 768, 12 heads, 4 sequences of 256 tokens. The two versions take
//! turns, so that whatever else the machine does hits both; the table has the medians.

use std::time::Instant;

use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::Linear;
use ferrozero_kernels::ops;

const BATCH: usize = 4;
const POSITIONS: usize = 256;
const WIDTH: usize = 768;
const HEADS: usize = 12;
const VOCABULARY_SIZE: usize = 8192;
const ROUNDS: usize = 7;
const EPS: f32 = 1e-5;

type Operation = fn(&[Tensor]) -> Result<Tensor>;

fn main() -> Result<()> {
    let tokens = [BATCH, POSITIONS, WIDTH];
    let wide = [BATCH, POSITIONS, 4 * WIDTH];
    let scores = [BATCH * HEADS, POSITIONS, POSITIONS];
    let packed = [BATCH, POSITIONS, 3 * WIDTH];
    println!("{:<22} {:>10} {:>12} {:>7}", "forward + backward", "ours (ms)", "candle (ms)", "ratio");
    compare(
        "layer_norm",
        &[&tokens, &[WIDTH], &[WIDTH]],
        |x| ops::layer_norm(&x[0], &x[1], &x[2], EPS),
        layer_norm,
    )?;
    compare("rms_norm", &[&tokens, &[WIDTH]], |x| ops::rms_norm(&x[0], &x[1], EPS), rms_norm)?;
    compare("gelu", &[&wide], |x| ops::gelu(&x[0]), |x| x[0].gelu())?;
    compare("swiglu", &[&wide], |x| ops::swiglu(&x[0]), |x| candle_nn::ops::swiglu(&x[0]))?;
    compare(
        "causal_softmax",
        &[&scores],
        |x| ops::causal_softmax(&x[0], 0.125, None),
        |x| causal_softmax(&x[0], 0.125),
    )?;
    compare("linear", &[&tokens, &[4 * WIDTH, WIDTH], &[4 * WIDTH]], our_linear, linear)?;
    compare(
        "causal_attention",
        &[&packed],
        |x| ops::causal_attention(&x[0], HEADS, None),
        |x| causal_attention(&x[0]),
    )?;
    let logits = [BATCH * POSITIONS, VOCABULARY_SIZE];
    compare("cross_entropy", &[&logits], our_cross_entropy, cross_entropy)?;
    let (hidden, head) = ([BATCH * POSITIONS, WIDTH], [VOCABULARY_SIZE, WIDTH]);
    compare("linear_cross_entropy", &[&hidden, &head], our_linear_cross_entropy, linear_cross_entropy)?;
    let block: [&[usize]; 13] = [
        &tokens,
        &[WIDTH],
        &[WIDTH],
        &[3 * WIDTH, WIDTH],
        &[3 * WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH],
        &[WIDTH],
        &[WIDTH],
        &[4 * WIDTH, WIDTH],
        &[4 * WIDTH],
        &[WIDTH, 4 * WIDTH],
        &[WIDTH],
    ];
    compare("GPT block", &block, our_block, block_of_candle)
}

/// Times both versions in turns on the same random inputs and prints the medians.
fn compare(name: &str, shapes: &[&[usize]], ours: Operation, composed: Operation) -> Result<()> {
    let variable = |&shape: &&[usize]| Var::randn(0f32, 0.5, shape, &Device::Cpu);
    let vars = shapes.iter().map(variable).collect::<Result<Vec<_>>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let mut times_ms = [Vec::new(), Vec::new()];
    // The first round warms caches and the allocator up.
    for round in 0..=ROUNDS {
        for (operation, times_ms) in [ours, composed].into_iter().zip(&mut times_ms) {
            let start = Instant::now();
            operation(&inputs)?.backward()?;
            if round > 0 {
                times_ms.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let [ours, composed] = times_ms.map(|mut times_ms| {
        times_ms.sort_by(f64::total_cmp);
        times_ms[ROUNDS / 2]
    });
    println!("{name:<22} {ours:>10.2} {composed:>12.2} {:>7.2}", composed / ours);
    Ok(())
}

fn layer_norm(x: &[Tensor]) -> Result<Tensor> {
    let centred = x[0].broadcast_sub(&x[0].mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = centred.broadcast_div(&(variance + f64::from(EPS))?.sqrt()?)?;
    normalised.broadcast_mul(&x[1])?.broadcast_add(&x[2])
}

fn rms_norm(x: &[Tensor]) -> Result<Tensor> {
    let mean_square = x[0].sqr()?.mean_keepdim(D::Minus1)?;
    x[0].broadcast_div(&(mean_square + f64::from(EPS))?.sqrt()?)?.broadcast_mul(&x[1])
}

fn causal_softmax(scores: &Tensor, scale: f64) -> Result<Tensor> {
    let hidden = |at: usize| at % POSITIONS > at / POSITIONS;
    let mask = |at| if hidden(at) { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..POSITIONS * POSITIONS).map(mask).collect();
    let mask = Tensor::from_vec(mask, (POSITIONS, POSITIONS), scores.device())?;
    candle_nn::ops::softmax(&(scores * scale)?.broadcast_add(&mask)?, D::Minus1)
}

fn our_linear(x: &[Tensor]) -> Result<Tensor> {
    ops::linear(&x[0], &x[1], Some(&x[2]))
}

fn linear(x: &[Tensor]) -> Result<Tensor> {
    Linear::new(x[1].clone(), Some(x[2].clone())).forward(&x[0])
}

fn causal_attention(qkv: &Tensor) -> Result<Tensor> {
    let part = |index: usize| {
        let part = qkv.narrow(2, index * WIDTH, WIDTH)?;
        part.reshape((BATCH, POSITIONS, HEADS, WIDTH / HEADS))?.transpose(1, 2)?.contiguous()
    };
    let scores = part(0)?.matmul(&part(1)?.t()?)?;
    let scale = ((WIDTH / HEADS) as f64).powf(-0.5);
    let mixed = causal_softmax(&scores, scale)?.matmul(&part(2)?)?;
    mixed.transpose(1, 2)?.reshape((BATCH, POSITIONS, WIDTH))
}

fn targets(rows: usize) -> Result<Tensor> {
    (Tensor::arange(0u32, rows as u32, &Device::Cpu)? * 7.0)?.to_dtype(DType::U32)
}

fn our_cross_entropy(x: &[Tensor]) -> Result<Tensor> {
    ops::cross_entropy(&x[0], &targets(x[0].dim(0)?)?)
}

fn cross_entropy(x: &[Tensor]) -> Result<Tensor> {
    candle_nn::loss::cross_entropy(&x[0], &targets(x[0].dim(0)?)?)
}

fn our_linear_cross_entropy(x: &[Tensor]) -> Result<Tensor> {
    ops::linear_cross_entropy(&x[0], &x[1], &targets(x[0].dim(0)?)?)
}

fn linear_cross_entropy(x: &[Tensor]) -> Result<Tensor> {
    candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &targets(x[0].dim(0)?)?)
}

fn our_block(x: &[Tensor]) -> Result<Tensor> {
    let normalised = ops::layer_norm(&x[0], &x[1], &x[2], EPS)?;
    let mixed = ops::causal_attention(&our_linear(&[normalised, x[3].clone(), x[4].clone()])?, HEADS, None)?;
    let hidden = (&x[0] + our_linear(&[mixed, x[5].clone(), x[6].clone()])?)?;
    let normalised = ops::layer_norm(&hidden, &x[7], &x[8], EPS)?;
    let widened = ops::gelu(&our_linear(&[normalised, x[9].clone(), x[10].clone()])?)?;
    hidden + our_linear(&[widened, x[11].clone(), x[12].clone()])?
}

fn block_of_candle(x: &[Tensor]) -> Result<Tensor> {
    let normalised = layer_norm(&x[0..3])?;
    let mixed = causal_attention(&linear(&[normalised, x[3].clone(), x[4].clone()])?)?;
    let hidden = (&x[0] + linear(&[mixed, x[5].clone(), x[6].clone()])?)?;
    let normalised = layer_norm(&[hidden.clone(), x[7].clone(), x[8].clone()])?;
    let widened = linear(&[normalised, x[9].clone(), x[10].clone()])?.gelu()?;
    hidden + linear(&[widened, x[11].clone(), x[12].clone()])?
}
