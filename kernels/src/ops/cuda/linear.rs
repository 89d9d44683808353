//! The affine layer.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, result, tensor, view};
use super::matrix::{self, multiply};
use super::norm::{bias_gradient, repeat_row};
use crate::ops::input::Input;
use crate::ops::linear::{Dimensions, NAME};

/// `xs·weightᵀ + bias`.
pub(in crate::ops) fn forward(
    dims: Dimensions,
    xs: (&CudaStorage, &Layout),
    weight: (&CudaStorage, &Layout),
    bias: Option<(&CudaStorage, &Layout)>,
) -> Result<(CudaStorage, Shape)> {
    let device = &xs.0.device;
    by_dtype!(NAME, xs.0.dtype(), T => {
        let (x, w) = (view::<T>(NAME, xs.0, xs.1)?, view::<T>(NAME, weight.0, weight.1)?);
        // The product is added to rows that start as the bias: no pass of its own, and one rounding.
        let mut out = match bias {
            Some((bias, layout)) => repeat_row(NAME, device, &view::<T>(NAME, bias, layout)?, dims.rows)?,
            None => zeros_or_allocate(device, dims.rows * dims.out_width, dims.in_width)?,
        };
        if dims.in_width > 0 {
            let destination = (&mut out, matrix::Shape::new(dims.rows, dims.out_width));
            let x = (&x, matrix::Shape::new(dims.rows, dims.in_width));
            let w = (&w, matrix::Shape::new(dims.out_width, dims.in_width).transposed());
            multiply(NAME, device, 1, bias.is_some(), destination, x, w)?;
        }
        Ok(result(device, out, dims.out_shape))
    })
}

/// A sum of nothing is zero.
fn zeros_or_allocate<T: Float>(device: &CudaDevice, elements: usize, terms: usize) -> Result<CudaSlice<T>> {
    if terms == 0 { device.alloc_zeros(elements.max(1)) } else { allocate(device, elements) }
}

/// The gradients of input, weight and bias, each only if it is tracked.
pub(in crate::ops) fn backward(
    dims: &Dimensions,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let grad = grad.contiguous()?;
    let [x, w, dy] = [xs, weight, &grad].map(|tensor| Input::new(NAME, tensor));
    let device = x.cuda_device()?;
    by_dtype!(NAME, xs.dtype(), T => {
        let (x, w, dy) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
        let dy_shape = matrix::Shape::new(dims.rows, dims.out_width);
        let x_shape = matrix::Shape::new(dims.rows, dims.in_width);
        let w_shape = matrix::Shape::new(dims.out_width, dims.in_width);
        type View<'a> = CudaView<'a, T>;
        let product = |like: &Tensor, shape, terms, a: (&View<'_>, _), b: (&View<'_>, _)| {
            if !like.track_op() {
                return Ok(None);
            }
            let mut out = zeros_or_allocate::<T>(device, like.elem_count(), terms)?;
            if terms > 0 {
                multiply(NAME, device, 1, false, (&mut out, shape), a, b)?;
            }
            Result::Ok(Some(tensor(device, out, like.shape())))
        };
        let d_xs = product(xs, x_shape, dims.out_width, (&dy, dy_shape), (&w, w_shape))?;
        let d_weight = product(weight, w_shape, dims.rows, (&dy, dy_shape.transposed()), (&x, x_shape))?;
        let d_bias = bias.filter(|bias| bias.track_op()).map(|bias| {
            let sums = bias_gradient(NAME, device, &dy, dims.out_width)?;
            Result::Ok(tensor(device, sums, bias.shape()))
        });
        Ok((d_xs, d_weight, d_bias.transpose()?))
    })
}
