//! Softmax over the last dimension, plain and causal.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use std::ops::Range;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input};
use super::output::{cpu_tensor, in_chunks};
use super::vector::{chunk_elements, maximum, share, sum_by, sum_by2, vectorized};

/// `e^(x − max) / Σ e^(x − max)` over the last dimension, as [`candle_nn::ops::softmax_last_dim`].
///
/// Any shape of rank 1 or more. Backward: `dx = y·(dy − Σ dy·y)`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in;
/// [`OpError::Shapes`](super::OpError::Shapes) for a scalar.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    let Some(&columns) = xs.dims().last() else {
        return Err(shapes_error("softmax_last_dim", "expected [.., S]", &[xs.shape()]));
    };
    // One query row a matrix sees every column: causal over nothing.
    let shape = Rows::new(columns, 1, None);
    xs.contiguous()?.apply_op1(Softmax { name: "softmax_last_dim", shape, scale: 1.0 })
}

/// `softmax(scale·scores)` where row `i` sees the columns `j ≤ i + (S − T)` and the others become 0; with a
/// window only the last `window` of them, `j > i + (S − T) − window`.
///
/// `scores` `[.., T, S]` with `S ≥ T`: the last `T` of `S` positions are the queries, as with a key-value
/// cache. Masked scores are not read. Backward: `d scores = scale·y·(dy − Σ dy·y)`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in;
/// [`OpError::Shapes`](super::OpError::Shapes) unless `S ≥ T`;
/// [`OpError::EmptyWindow`](super::OpError::EmptyWindow) for a window of 0.
pub fn causal_softmax(scores: &Tensor, scale: f32, window: Option<usize>) -> Result<Tensor> {
    const NAME: &str = "causal_softmax";
    OpError::check_window(NAME, window)?;
    match *scores.dims() {
        [.., query_rows, columns] if columns >= query_rows => {
            let shape = Rows::new(columns, query_rows, window);
            scores.contiguous()?.apply_op1(Softmax { name: NAME, shape, scale })
        }
        _ => Err(shapes_error(NAME, "expected [.., T, S] with S ≥ T", &[scores.shape()])),
    }
}

/// How the rows of a stack of matrices see their columns.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// Elements a row.
    pub(super) columns: usize,
    /// Rows a matrix, at most `columns`; the last sees up to the last column, each before it one less far.
    pub(super) query_rows: usize,
    /// Columns that a row sees at most, which end with its own; at most `columns`.
    pub(super) window: usize,
}

impl Rows {
    /// Rows that see at most the last `window` columns up to their own, or all.
    pub(super) fn new(columns: usize, query_rows: usize, window: Option<usize>) -> Self {
        Rows { columns, query_rows, window: window.unwrap_or(columns).min(columns) }
    }

    /// The columns that a row sees, counting rows over all matrices.
    #[inline(always)]
    fn visible(self, row: usize) -> Range<usize> {
        let end = row % self.query_rows + self.columns - self.query_rows + 1;
        end.saturating_sub(self.window)..end
    }
}

struct Softmax {
    name: &'static str,
    shape: Rows,
    scale: f32,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = Elements::of(self.name, storage, layout)?;
        let columns = self.shape.columns;
        let out = in_chunks(scores, scores.len(), chunk_elements(columns), |range, out| {
            scores.widen(range.clone(), out);
            softmax_rows(out, range.start / columns, self.shape, self.scale);
        });
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::softmax::forward(self.name, storage, layout, self.shape, self.scale)
    }

    fn bwd(&self, _scores: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if res.device().is_cuda() {
            return cuda::softmax::backward(self.name, res, grad, self.shape, self.scale).map(Some);
        }
        let grad = grad.contiguous()?;
        let (y, dy) = (Input::new(self.name, res), Input::new(self.name, &grad));
        let (y, dy) = (y.real()?, dy.real()?);
        let columns = self.shape.columns;
        let dx = in_chunks(y, y.len(), chunk_elements(columns), |range, dx| {
            dy.widen(range.clone(), dx);
            softmax_rows_backward(dx, &y.wide(range.clone()), range.start / columns, self.shape, self.scale);
        });
        Ok(Some(cpu_tensor(dx, res)))
    }
}

vectorized! {
    /// Turns rows of scores into probabilities in place; `first_row` is the number of the first.
    pub(super) fn softmax_rows(scores: &mut [f32], first_row: usize, shape: Rows, scale: f32) {
        for (row, scores) in scores.chunks_exact_mut(shape.columns).enumerate() {
            let visible = shape.visible(first_row + row);
            let (scores, later) = scores.split_at_mut(visible.end);
            let (earlier, scores) = scores.split_at_mut(visible.start);
            // The largest of the scaled scores: a negative scale turns the order around.
            for score in scores.iter_mut() {
                *score *= scale;
            }
            let largest = maximum(scores);
            for score in scores.iter_mut() {
                *score = share(*score - largest);
            }
            let inverse = 1.0 / sum_by(scores, |power| power);
            for score in scores.iter_mut() {
                *score *= inverse;
            }
            earlier.fill(0.0);
            later.fill(0.0);
        }
    }

    /// Turns gradients of probabilities into gradients of scores in place.
    pub(super) fn softmax_rows_backward(
        gradients: &mut [f32],
        probabilities: &[f32],
        first_row: usize,
        shape: Rows,
        scale: f32,
    ) {
        let rows = gradients.chunks_exact_mut(shape.columns).zip(probabilities.chunks_exact(shape.columns));
        for (row, (gradients, probabilities)) in rows.enumerate() {
            let visible = shape.visible(first_row + row);
            let probabilities = &probabilities[visible.clone()];
            let (gradients, later) = gradients.split_at_mut(visible.end);
            let (earlier, gradients) = gradients.split_at_mut(visible.start);
            let dot = sum_by2(gradients, probabilities, |gradient, probability| gradient * probability);
            for (gradient, &probability) in gradients.iter_mut().zip(probabilities) {
                *gradient = scale * probability * (*gradient - dot);
            }
            earlier.fill(0.0);
            later.fill(0.0);
        }
    }
}
