//! The operations as compositions of candle's own, with the gradients of candle's graph: the plain form, which runs on every
//! device and in every float type. Devices without a fused kernel take it.

use candle_core::{D, DType, Device, Result, Tensor};

use super::error::OpError;

/// [`super::layer_norm`].
pub(super) fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?; // [.., C]
    rms_norm(&centred, weight, eps)?.broadcast_add(bias)
}

/// [`super::rms_norm`].
pub(super) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let mean_square = xs.sqr()?.mean_keepdim(D::Minus1)?; // [.., 1]
    xs.broadcast_div(&(mean_square + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

/// [`super::causal_softmax`]; unlike there, masked scores are read.
pub(super) fn causal_softmax(scores: &Tensor, scale: f32) -> Result<Tensor> {
    let mask = causal_mask(scores.dim(D::Minus2)?, scores.dim(D::Minus1)?, scores.dtype(), scores.device())?;
    let masked = (scores * f64::from(scale))?.broadcast_add(&mask)?;
    candle_nn::ops::softmax(&masked, D::Minus1)
}

/// 0 where a row sees a column, −∞ elsewhere: `[T, S]`.
fn causal_mask(query_rows: usize, columns: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let element = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        if column <= row + columns - query_rows { 0f32 } else { f32::NEG_INFINITY }
    };
    let mask: Vec<f32> = (0..query_rows * columns).map(element).collect();
    Tensor::from_vec(mask, (query_rows, columns), device)?.to_dtype(dtype)
}

/// [`super::rope`] and [`super::rope_i`].
pub(super) fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    let (batch, heads, positions, width) = xs.dims4()?;
    let pairs = width / 2;
    let table = |table: &Tensor| {
        let table = if table.rank() == 2 { table.unsqueeze(0)? } else { table.clone() };
        let table = table.narrow(1, 0, positions)?.unsqueeze(1)?; // [1 or B, 1, T, D/2]
        table.broadcast_as((batch, heads, positions, pairs))
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let (pair_dimension, shape) = match interleaved {
        true => (4, (batch, heads, positions, pairs, 2)),
        false => (3, (batch, heads, positions, 2, pairs)),
    };
    let split = xs.reshape(shape)?;
    let (a, b) = (split.get_on_dim(pair_dimension, 0)?, split.get_on_dim(pair_dimension, 1)?);
    let rotated_a = ((&a * &cos)? - (&b * &sin)?)?;
    let rotated_b = ((&a * &sin)? + (&b * &cos)?)?;
    Tensor::stack(&[rotated_a, rotated_b], pair_dimension)?.reshape(xs.shape())
}

/// [`super::linear`].
pub(super) fn linear(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out_width, in_width) = weight.dims2()?;
    let mut out_shape = xs.dims().to_vec();
    out_shape.pop();
    let rows: usize = out_shape.iter().product();
    out_shape.push(out_width);
    let out = xs.reshape((rows, in_width))?.matmul(&weight.t()?)?; // [rows, out]
    match bias {
        Some(bias) => out.broadcast_add(bias)?.reshape(out_shape),
        None => out.reshape(out_shape),
    }
}

/// [`super::causal_attention`]; unlike there, all probabilities exist at once and are kept for the backward.
pub(super) fn causal_attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, positions, width) = qkv.dims3()?;
    let channels = width / 3;
    let head_width = channels / heads;
    let part = |index: usize| {
        let part = qkv.narrow(2, index * channels, channels)?;
        part.reshape((batch, positions, heads, head_width))?.transpose(1, 2)?.contiguous() // [B, heads, T, D]
    };
    let scores = part(0)?.matmul(&part(1)?.t()?)?; // [B, heads, T, T]
    let probabilities = causal_softmax(&scores, 1.0 / (head_width as f32).sqrt())?;
    let mixed = probabilities.matmul(&part(2)?)?; // [B, heads, T, D]
    mixed.transpose(1, 2)?.reshape((batch, positions, channels))
}

/// [`super::cross_entropy`].
pub(super) fn cross_entropy(op: &'static str, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocabulary_size = logits.dim(1)?;
    OpError::check_targets(op, &targets.to_vec1()?, vocabulary_size)?;
    let log_sums = logits.log_sum_exp(1)?; // [N]
    let picked = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?; // [N]
    (log_sums - picked)?.mean_all()
}

/// [`super::linear_cross_entropy`]; unlike there, all logits exist at once.
pub(super) fn linear_cross_entropy(
    op: &'static str,
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    cross_entropy(op, &hidden.matmul(&weight.t()?)?, targets)
}
