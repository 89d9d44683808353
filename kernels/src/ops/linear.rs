//! The affine layer.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::shapes_error;
use super::input::{Elements, Input};
use super::matrix::{Matrix, Threads, product, product_and_bias};
use super::output::{cpu_tensor, storage};
use super::recompute::hand_over;
use super::vector::vectorized;

/// `xs·weightᵀ + bias`: `xs` `[.., in]`, `weight` `[out, in]`, `bias` `[out]`, result `[.., out]`.
///
/// Backward, with the leading dimensions taken together as rows: `d xs = dy·weight`, `d weight = dyᵀ·xs`
/// (contiguous in `[out, in]`, so that an optimizer reads it as it lies), `d bias = Σ dy` over the rows.
/// Gradients of inputs that are not tracked, such as a frozen weight or the first layer's input, are not
/// computed.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than
/// one; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above.
pub fn linear(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check(xs, weight, bias)?;
    let (xs, weight) = (xs.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => xs.apply_op3(&weight, &bias.contiguous()?, Linear),
        None => xs.apply_op2(&weight, Linear),
    }
}

/// Whether the shapes fit.
pub(super) fn check(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (out_width, in_width) = weight.dims2().unwrap_or((0, 0));
    let bias_fits = bias.is_none_or(|bias| bias.dims() == [out_width]);
    if weight.rank() != 2 || xs.dim(D::Minus1).ok() != Some(in_width) || !bias_fits {
        let mut shapes = vec![xs.shape(), weight.shape()];
        shapes.extend(bias.map(|bias| bias.shape()));
        return Err(shapes_error(NAME, "expected [.., in], [out, in] and, if any, a bias [out]", &shapes));
    }
    Ok(())
}

pub(super) const NAME: &str = "linear";

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [xs, weight] = Elements::of_all(NAME, [(xs, xs_layout), (weight, weight_layout)])?;
        let dims = Dimensions::new(xs_layout.shape(), weight_layout.shape())?;
        let (xs, weight) = dims.matrices(xs, weight);
        Ok((product(xs, weight.transposed(), Threads::All), dims.out_shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let dims = Dimensions::new(xs_layout.shape(), weight_layout.shape())?;
        cuda::linear::forward(dims, (xs, xs_layout), (weight, weight_layout), None)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_xs, d_weight, _) = backward(xs, weight, None, grad)?;
        Ok((d_xs, hand_over(weight, d_weight)?))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        NAME
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
        let [xs, weight, bias] = Elements::of_all(NAME, inputs)?;
        let dims = Dimensions::new(xs_layout.shape(), weight_layout.shape())?;
        let (xs, weight) = dims.matrices(xs, weight);
        Ok((product_and_bias(xs, weight.transposed(), bias), dims.out_shape))
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
        let dims = Dimensions::new(xs_layout.shape(), weight_layout.shape())?;
        let bias = Some((bias, bias_layout));
        cuda::linear::forward(dims, (xs, xs_layout), (weight, weight_layout), bias)
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (d_xs, d_weight, d_bias) = backward(xs, weight, Some(bias), grad)?;
        Ok((d_xs, hand_over(weight, d_weight)?, hand_over(bias, d_bias)?))
    }
}

/// The sizes of the product, and the shape of its result.
pub(super) struct Dimensions {
    pub(super) rows: usize,
    pub(super) in_width: usize,
    pub(super) out_width: usize,
    pub(super) out_shape: Shape,
}

impl Dimensions {
    fn new(xs: &Shape, weight: &Shape) -> Result<Self> {
        let (out_width, in_width) = weight.dims2()?;
        let mut dims = xs.dims().to_vec();
        dims.pop();
        let rows = dims.iter().product();
        dims.push(out_width);
        Ok(Dimensions { rows, in_width, out_width, out_shape: Shape::from(dims) })
    }

    fn matrices<'a>(&self, xs: Elements<'a>, weight: Elements<'a>) -> (Matrix<'a>, Matrix<'a>) {
        (Matrix::new(xs, self.rows, self.in_width), Matrix::new(weight, self.out_width, self.in_width))
    }
}

/// The gradients of the input, the weight and the bias, each only if it is tracked.
pub(super) fn backward(
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let dims = Dimensions::new(xs.shape(), weight.shape())?;
    #[cfg(feature = "cuda")]
    if xs.device().is_cuda() {
        return cuda::linear::backward(&dims, xs, weight, bias, grad);
    }
    let grad = grad.contiguous()?;
    let (x, w, dy) = (Input::new(NAME, xs), Input::new(NAME, weight), Input::new(NAME, &grad));
    let ((x, w), dy) = (dims.matrices(x.real()?, w.real()?), dy.real()?);
    let d_bias = bias.filter(|bias| bias.track_op());
    let d_bias = d_bias.map(|bias| cpu_tensor(column_sums(dy, dims.out_width), bias));
    let dy = Matrix::new(dy, dims.rows, dims.out_width);
    let gradient =
        |tensor: &Tensor, a, b| tensor.track_op().then(|| cpu_tensor(product(a, b, Threads::All), tensor));
    Ok((gradient(xs, dy, w), gradient(weight, dy.transposed(), x), d_bias))
}

/// Rows that are summed before they join the total.
const BLOCK_ROWS: usize = 64;
/// Columns that one task sums.
const STRIPE_COLUMNS: usize = 64;

/// Sums each column of rows of `width` elements.
fn column_sums(grad: Elements<'_>, width: usize) -> CpuStorage {
    let wide = grad.wide(0..grad.len());
    let mut sums = vec![0f32; width];
    sums.par_chunks_mut(STRIPE_COLUMNS)
        .enumerate()
        .for_each(|(stripe, sums)| sum_stripe(sums, &wide, stripe * STRIPE_COLUMNS, width));
    storage(sums, grad)
}

vectorized! {
    /// Adds up the columns of one stripe: blocks of rows in order, which keeps the rounding error of long
    /// sums small.
    fn sum_stripe(totals: &mut [f32], grad: &[f32], first_column: usize, width: usize) {
        for block in grad.chunks(BLOCK_ROWS * width) {
            let mut sums = [0f32; STRIPE_COLUMNS];
            for row in block.chunks_exact(width) {
                let row = &row[first_column..first_column + totals.len()];
                for (sum, &element) in sums.iter_mut().zip(row) {
                    *sum += element;
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += sum;
            }
        }
    }
}
