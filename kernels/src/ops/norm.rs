//! Layer normalisation and root-mean-square normalisation over the last dimension.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::shapes_error;
use super::input::{Input, cpu_tensor, elements};
use super::recompute::hand_over;
use super::vector::{chunk_elements, sum_by, sum_by2, sum_by3, vectorized};

/// `(x − mean)/√(variance + eps)·weight + bias` over the last dimension (Ba et al., arXiv 1607.06450).
///
/// `xs` `[.., C]`, `weight` and `bias` `[C]`; the result has the shape of `xs`. Arguments as
/// [`candle_nn::ops::layer_norm`]. With `x̂` the normalised row, `r` its `1/√(variance + eps)` and `g = dy·weight`, the
/// backward is `dx = r·(g − mean(g) − x̂·mean(g·x̂))`, `d weight = Σ dy·x̂`, `d bias = Σ dy` over the rows.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than one;
/// [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above.
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
/// `xs` `[.., C]`, `weight` `[C]`; the result has the shape of `xs`. Arguments as [`candle_nn::ops::rms_norm`]. The
/// backward is that of [`layer_norm`] without the means of `x` and `g`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than one;
/// [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above.
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
        let xs = elements::<f32>(Self::NAME, xs, xs_layout)?;
        let weight = elements::<f32>(Self::NAME, weight, weight_layout)?;
        let bias = elements::<f32>(Self::NAME, bias, bias_layout)?;
        let mut out = vec![0f32; xs.len()];
        let chunk = chunk_elements(weight.len());
        out.par_chunks_mut(chunk)
            .zip(xs.par_chunks(chunk))
            .for_each(|(out, xs)| layer_norm_forward(out, xs, weight, bias, self.eps));
        Ok((CpuStorage::F32(out), xs_layout.shape().clone()))
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
            return Ok((Some(dx), hand_over(weight, d_weight)?, hand_over(bias, d_bias)?));
        }
        let kernel = |dx: &mut [f32], statistics: &mut [[f32; 2]], x: &[f32], dy: &[f32], weight: &[f32]| {
            layer_norm_backward(dx, statistics, x, dy, weight, self.eps)
        };
        let [dx, d_weight, d_bias] = backward(Self::NAME, xs, weight, grad, kernel)?;
        let d_weight = hand_over(weight, Some(cpu_tensor(d_weight, weight)?))?;
        let d_bias = hand_over(bias, Some(cpu_tensor(d_bias, bias)?))?;
        Ok((Some(cpu_tensor(dx, xs)?), d_weight, d_bias))
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
        let xs = elements::<f32>(Self::NAME, xs, xs_layout)?;
        let weight = elements::<f32>(Self::NAME, weight, weight_layout)?;
        let mut out = vec![0f32; xs.len()];
        let chunk = chunk_elements(weight.len());
        out.par_chunks_mut(chunk)
            .zip(xs.par_chunks(chunk))
            .for_each(|(out, xs)| rms_norm_forward(out, xs, weight, self.eps));
        Ok((CpuStorage::F32(out), xs_layout.shape().clone()))
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
            return Ok((Some(dx), hand_over(weight, d_weight)?));
        }
        let kernel = |dx: &mut [f32], statistics: &mut [[f32; 2]], x: &[f32], dy: &[f32], weight: &[f32]| {
            rms_norm_backward(dx, statistics, x, dy, weight, self.eps)
        };
        let [dx, d_weight, _] = backward(Self::NAME, xs, weight, grad, kernel)?;
        Ok((Some(cpu_tensor(dx, xs)?), hand_over(weight, Some(cpu_tensor(d_weight, weight)?))?))
    }
}

/// Rows whose contributions to a weight's gradient are summed before they join the total.
const BLOCK_ROWS: usize = 64;
/// Columns that one task sums.
const STRIPE_COLUMNS: usize = 64;

/// The gradients of input, weight and bias. `kernel(dx, statistics, x, dy, weight)` fills `dx` of a few rows, and the
/// (mean, 1/deviation) of each, which the second pass, over columns, needs.
fn backward(
    op: &'static str,
    xs: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    kernel: impl Fn(&mut [f32], &mut [[f32; 2]], &[f32], &[f32], &[f32]) + Sync,
) -> Result<[Vec<f32>; 3]> {
    let grad = grad.contiguous()?;
    let (x, weight, dy) = (Input::new(op, xs), Input::new(op, weight), Input::new(op, &grad));
    let (x, weight, dy) = (x.elements::<f32>()?, weight.elements::<f32>()?, dy.elements::<f32>()?);
    let width = weight.len();
    let mut dx = vec![0f32; x.len()];
    let mut statistics = vec![[0f32; 2]; x.len() / width];
    let chunk = chunk_elements(width);
    dx.par_chunks_mut(chunk)
        .zip(statistics.par_chunks_mut(chunk / width))
        .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
        .for_each(|((dx, statistics), (x, dy))| kernel(dx, statistics, x, dy, weight));

    let mut d_weight = vec![0f32; width];
    let mut d_bias = vec![0f32; width];
    d_weight.par_chunks_mut(STRIPE_COLUMNS).zip(d_bias.par_chunks_mut(STRIPE_COLUMNS)).enumerate().for_each(
        |(stripe, (d_weight, d_bias))| {
            let first_column = stripe * STRIPE_COLUMNS;
            weight_gradient(d_weight, d_bias, &statistics, x, dy, first_column, width);
        },
    );
    Ok([dx, d_weight, d_bias])
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
        statistics: &mut [[f32; 2]],
        xs: &[f32],
        dy: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let width = weight.len();
        let inputs = xs.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((dx, statistics), (xs, dy)) in dx.chunks_exact_mut(width).zip(statistics).zip(inputs) {
            let (mean, inverse) = moments(xs, eps);
            *statistics = [mean, inverse];
            let mean_g = sum_by2(dy, weight, |dy, weight| dy * weight) / width as f32;
            let sum_g_x = sum_by3(dy, weight, xs, |dy, weight, x| dy * weight * ((x - mean) * inverse));
            let mean_g_x = sum_g_x / width as f32;
            for (((dx, &x), &dy), &weight) in dx.iter_mut().zip(xs).zip(dy).zip(weight) {
                *dx = inverse * (dy * weight - mean_g - (x - mean) * inverse * mean_g_x);
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
        statistics: &mut [[f32; 2]],
        xs: &[f32],
        dy: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let width = weight.len();
        let inputs = xs.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((dx, statistics), (xs, dy)) in dx.chunks_exact_mut(width).zip(statistics).zip(inputs) {
            let inverse = inverse_root_mean_square(xs, eps);
            *statistics = [0.0, inverse];
            let sum_g_x = sum_by3(dy, weight, xs, |dy, weight, x| dy * weight * (x * inverse));
            let mean_g_x = sum_g_x / width as f32;
            for (((dx, &x), &dy), &weight) in dx.iter_mut().zip(xs).zip(dy).zip(weight) {
                *dx = inverse * (dy * weight - x * inverse * mean_g_x);
            }
        }
    }

    /// Adds up `dy·x̂` and `dy` over the rows, for the columns of one stripe: blocks of rows in order, which keeps the
    /// rounding error of long sums small.
    fn weight_gradient(
        d_weight: &mut [f32],
        d_bias: &mut [f32],
        statistics: &[[f32; 2]],
        xs: &[f32],
        dy: &[f32],
        first_column: usize,
        width: usize,
    ) {
        let columns = d_weight.len();
        for (block, statistics) in statistics.chunks(BLOCK_ROWS).enumerate() {
            let mut weight_sums = [0f32; STRIPE_COLUMNS];
            let mut bias_sums = [0f32; STRIPE_COLUMNS];
            for (row, &[mean, inverse]) in statistics.iter().enumerate() {
                let start = (block * BLOCK_ROWS + row) * width + first_column;
                let inputs = xs[start..start + columns].iter().zip(&dy[start..start + columns]);
                for ((weight_sum, bias_sum), (&x, &dy)) in weight_sums.iter_mut().zip(&mut bias_sums).zip(inputs) {
                    *weight_sum += dy * ((x - mean) * inverse);
                    *bias_sum += dy;
                }
            }
            for (total, sum) in d_weight.iter_mut().zip(weight_sums) {
                *total += sum;
            }
            for (total, sum) in d_bias.iter_mut().zip(bias_sums) {
                *total += sum;
            }
        }
    }
}
