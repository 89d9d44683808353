//! Layer normalisation and root-mean-square normalisation over the last dimension.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::array;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::shapes_error;
use super::input::{Elements, Input};
use super::output::{cpu_tensor, in_chunks, in_chunks_beside, storage};
use super::recompute::hand_over;
use super::vector::{chunk_elements, sum_by, sum_by2, sum_by3, vectorized};

/// `(x − mean)/√(variance + eps)·weight + bias` over the last dimension (Ba et al., arXiv 1607.06450).
///
/// `xs` `[.., C]`, `weight` and `bias` `[C]`; the result has the shape of `xs`. Arguments as
/// [`candle_nn::ops::layer_norm`]. With `x̂` the normalised row, `r` its `1/√(variance + eps)` and
/// `g = dy·weight`, the backward is `dx = r·(g − mean(g) − x̂·mean(g·x̂))`, `d weight = Σ dy·x̂`,
/// `d bias = Σ dy` over the rows.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than
/// one; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above.
pub fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let width = last_dimension(xs);
    if weight.dims() != [width] || bias.dims() != [width] || width == 0 {
        let shapes = [xs.shape(), weight.shape(), bias.shape()];
        return Err(shapes_error(LayerNorm::NAME, "expected [.., C], [C], [C]", &shapes));
    }
    xs.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps })
}

/// `x/√(mean(x²) + eps)·weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).
///
/// `xs` `[.., C]`, `weight` `[C]`; the result has the shape of `xs`. Arguments as
/// [`candle_nn::ops::rms_norm`]. The backward is that of [`layer_norm`] without the means of `x` and `g`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than
/// one; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above.
pub fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let width = last_dimension(xs);
    if weight.dims() != [width] || width == 0 {
        let shapes = [xs.shape(), weight.shape()];
        return Err(shapes_error(RmsNorm::NAME, "expected [.., C], [C]", &shapes));
    }
    xs.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })
}

fn last_dimension(xs: &Tensor) -> usize {
    xs.dim(D::Minus1).unwrap_or(0)
}

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    const NAME: &'static str = "layer_norm";
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(xs, xs_layout), (weight, weight_layout), (bias, bias_layout)];
        let [xs, weight, bias] = Elements::of_all(Self::NAME, inputs)?;
        let [weight, bias] = [weight, bias].map(|elements| elements.wide(0..elements.len()));
        let out = forward(xs, weight.len(), |out, xs| layer_norm_forward(out, xs, &weight, &bias, self.eps));
        Ok((out, xs_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (weight, bias) = ((weight, weight_layout), Some((bias, bias_layout)));
        cuda::norm::forward(Self::NAME, (xs, xs_layout), weight, bias, self.eps)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            let (dx, d_weight, d_bias) = cuda::norm::backward(Self::NAME, xs, weight, grad, self.eps, true)?;
            return Ok((hand_over(xs, Some(dx))?, hand_over(weight, d_weight)?, hand_over(bias, d_bias)?));
        }
        let (dx, [d_weight, d_bias]) =
            backward(Self::NAME, xs, weight, grad, |dx, [weight_sums, bias_sums], x, dy, weight| {
                layer_norm_backward(dx, weight_sums, bias_sums, x, dy, weight, self.eps)
            })?;
        let d_xs = hand_over(xs, Some(cpu_tensor(dx, xs)))?;
        let d_weight = hand_over(weight, Some(cpu_tensor(d_weight, weight)))?;
        let d_bias = hand_over(bias, Some(cpu_tensor(d_bias, bias)))?;
        Ok((d_xs, d_weight, d_bias))
    }
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    const NAME: &'static str = "rms_norm";
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [xs, weight] = Elements::of_all(Self::NAME, [(xs, xs_layout), (weight, weight_layout)])?;
        let weight = weight.wide(0..weight.len());
        let out = forward(xs, weight.len(), |out, xs| rms_norm_forward(out, xs, &weight, self.eps));
        Ok((out, xs_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::norm::forward(Self::NAME, (xs, xs_layout), (weight, weight_layout), None, self.eps)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            let (dx, d_weight, _) = cuda::norm::backward(Self::NAME, xs, weight, grad, self.eps, false)?;
            return Ok((hand_over(xs, Some(dx))?, hand_over(weight, d_weight)?));
        }
        let (dx, [d_weight]) = backward(Self::NAME, xs, weight, grad, |dx, [weight_sums], x, dy, weight| {
            rms_norm_backward(dx, weight_sums, x, dy, weight, self.eps)
        })?;
        let d_xs = hand_over(xs, Some(cpu_tensor(dx, xs)))?;
        Ok((d_xs, hand_over(weight, Some(cpu_tensor(d_weight, weight)))?))
    }
}

/// Rows of one task of the backward, whose contributions to a weight's gradient are summed before they join
/// the total: it keeps the rounding error of long sums small, and does not depend on the number of threads.
const BLOCK_ROWS: usize = 32;

/// The result for rows of `width` elements; `kernel` makes some of them.
fn forward(xs: Elements<'_>, width: usize, kernel: impl Fn(&mut [f32], &[f32]) + Sync) -> CpuStorage {
    in_chunks(xs, xs.len(), chunk_elements(width), |range, out| kernel(out, &xs.wide(range)))
}

/// The gradients of the input, and of the weight and what else is one element a column.
/// `kernel(dx, sums, x, dy, weight)` makes `dx` of some rows, and adds their contributions to the sums, in
/// one pass over memory.
fn backward<const SUMS: usize>(
    op: &'static str,
    xs: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    kernel: impl Fn(&mut [f32], [&mut [f32]; SUMS], &[f32], &[f32], &[f32]) + Sync,
) -> Result<(CpuStorage, [CpuStorage; SUMS])> {
    let grad = grad.contiguous()?;
    let (x, weight, dy) = (Input::new(op, xs), Input::new(op, weight), Input::new(op, &grad));
    let (x, weight, dy) = (x.real()?, weight.real()?, dy.real()?);
    if dy.len() != x.len() {
        return Err(shapes_error(
            op,
            "expected a gradient of the result's shape",
            &[xs.shape(), grad.shape()],
        ));
    }
    let width = weight.len();
    let block = BLOCK_ROWS * width;
    let wide_weight = weight.wide(0..width);
    let mut sums = vec![0f32; x.len().div_ceil(block) * SUMS * width]; // [blocks, SUMS, C]
    let of_blocks = sums.par_chunks_mut(SUMS * width);
    let [dx] = in_chunks_beside(x, x.len(), block, of_blocks, |range, [dx], sums| {
        let mut sums = sums.chunks_exact_mut(width);
        let sums = array::from_fn(|_| sums.next().unwrap_or_default());
        kernel(dx, sums, &x.wide(range.clone()), &dy.wide(range), &wide_weight);
    });
    let total = |sum: usize| {
        let mut total = vec![0f32; width];
        for block in sums.chunks_exact(SUMS * width) {
            total.iter_mut().zip(&block[sum * width..]).for_each(|(total, sum)| *total += sum);
        }
        storage(total, weight)
    };
    Ok((dx, array::from_fn(total)))
}

/// The mean of a row and `1/√(variance + eps)`.
#[inline(always)]
fn moments(xs: &[f32], eps: f32) -> (f32, f32) {
    let count = xs.len() as f32;
    let mean = sum_by(xs, |x| x) / count;
    let variance = sum_by(xs, |x| (x - mean) * (x - mean)) / count;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// `1/√(mean(x²) + eps)` of a row.
#[inline(always)]
fn inverse_root_mean_square(xs: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(xs, |x| x * x) / xs.len() as f32 + eps).sqrt()
}

vectorized! {
    fn layer_norm_forward(out: &mut [f32], xs: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        for (out, xs) in out.chunks_exact_mut(weight.len()).zip(xs.chunks_exact(weight.len())) {
            let (mean, inverse) = moments(xs, eps);
            for (((out, &x), &weight), &bias) in out.iter_mut().zip(xs).zip(weight).zip(bias) {
                *out = (x - mean) * inverse * weight + bias;
            }
        }
    }

    fn layer_norm_backward(
        dx: &mut [f32],
        weight_sums: &mut [f32],
        bias_sums: &mut [f32],
        xs: &[f32],
        dy: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let width = weight.len();
        let inputs = xs.chunks_exact(width).zip(dy.chunks_exact(width));
        for (dx, (xs, dy)) in dx.chunks_exact_mut(width).zip(inputs) {
            let (mean, inverse) = moments(xs, eps);
            let mean_g = sum_by2(dy, weight, |dy, weight| dy * weight) / width as f32;
            let sum_g_x = sum_by3(dy, weight, xs, |dy, weight, x| dy * weight * ((x - mean) * inverse));
            let mean_g_x = sum_g_x / width as f32;
            let sums = weight_sums.iter_mut().zip(bias_sums.iter_mut());
            for ((((dx, &x), &dy), &weight), (weight_sum, bias_sum)) in
                dx.iter_mut().zip(xs).zip(dy).zip(weight).zip(sums)
            {
                let normed = (x - mean) * inverse;
                *dx = inverse * (dy * weight - mean_g - normed * mean_g_x);
                *weight_sum += dy * normed;
                *bias_sum += dy;
            }
        }
    }

    fn rms_norm_forward(out: &mut [f32], xs: &[f32], weight: &[f32], eps: f32) {
        for (out, xs) in out.chunks_exact_mut(weight.len()).zip(xs.chunks_exact(weight.len())) {
            let inverse = inverse_root_mean_square(xs, eps);
            for ((out, &x), &weight) in out.iter_mut().zip(xs).zip(weight) {
                *out = x * inverse * weight;
            }
        }
    }

    fn rms_norm_backward(
        dx: &mut [f32],
        weight_sums: &mut [f32],
        xs: &[f32],
        dy: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let width = weight.len();
        let inputs = xs.chunks_exact(width).zip(dy.chunks_exact(width));
        for (dx, (xs, dy)) in dx.chunks_exact_mut(width).zip(inputs) {
            let inverse = inverse_root_mean_square(xs, eps);
            let sum_g_x = sum_by3(dy, weight, xs, |dy, weight, x| dy * weight * (x * inverse));
            let mean_g_x = sum_g_x / width as f32;
            for ((((dx, &x), &dy), &weight), weight_sum) in
                dx.iter_mut().zip(xs).zip(dy).zip(weight).zip(weight_sums.iter_mut())
            {
                let normed = x * inverse;
                *dx = inverse * (dy * weight - normed * mean_g_x);
                *weight_sum += dy * normed;
            }
        }
    }
}
