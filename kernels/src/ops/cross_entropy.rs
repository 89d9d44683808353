//! The mean cross-entropy of next-token prediction, from logits or straight from hidden states.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Input, cpu_tensor, elements};
use super::matrix::{Matrix, MatrixMut, Threads, multiply};
use super::recompute::hand_over;
use super::vector::{chunk_elements, exp, maximum, sum_by, vectorized};

/// `mean(log Σ e^logits − logits[target])` over the rows: `logits` `[N, V]`, `targets` `[N]` of `u32`, a scalar.
///
/// Arguments as [`candle_nn::loss::cross_entropy`]. Rows are summed in `f32`, their losses in `f64` in the order of the
/// rows. Backward: `d logits = dy·(softmax(logits) − one_hot(targets))/N`, made in one pass in its own memory.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for logits in a dtype that the device does not compute in, or targets that are
/// not `u32`;
/// [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above with `N > 0`;
/// [`OpError::TargetOutOfRange`](super::OpError::TargetOutOfRange) for a target of `V` or more.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let rows = targets.elem_count();
    if logits.rank() != 2 || targets.dims() != [logits.dims()[0]] || rows == 0 {
        let shapes = [logits.shape(), targets.shape()];
        return Err(shapes_error(CrossEntropy::NAME, "expected [N, V], [N] with N > 0", &shapes));
    }
    let loss_and_sums = logits.contiguous()?.apply_op2(&targets.contiguous()?, CrossEntropy)?;
    loss_and_sums.get(0)
}

/// [`cross_entropy`] of the logits `hidden·weightᵀ`, of which only a tile exists at a time.
///
/// `hidden` `[N, C]`, `weight` `[V, C]`, `targets` `[N]` of `u32`, result a scalar. A tile has at most 8 MiB (1024 rows by
/// 2048 entries of the vocabulary, say), on a CUDA device 16 Mi logits of all rows; the sums of a row run over its tiles as in Milakov and Gimelshein,
/// *Online normalizer calculation for softmax* (arXiv 1805.02867). The backward recomputes the logits tile by tile,
/// and with `d` the gradient of a tile adds `d·weight` to `d hidden` and `dᵀ·hidden` to `d weight`. Gradients of
/// inputs that are not tracked are not computed.
///
/// In f16 the gradient of a logit, at most `dy/N`, soon is too small for its type: scale the loss.
///
/// # Errors
/// As [`cross_entropy`].
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let fits = match (hidden.dims(), weight.dims(), targets.dims()) {
        ([rows, width], [_, weight_width], [targets]) => {
            rows == targets && width == weight_width && *rows > 0
        }
        _ => false,
    };
    if !fits {
        let shapes = [hidden.shape(), weight.shape(), targets.shape()];
        return Err(shapes_error(
            LinearCrossEntropy::NAME,
            "expected [N, C], [V, C], [N] with N > 0",
            &shapes,
        ));
    }
    let (hidden, weight, targets) = (hidden.contiguous()?, weight.contiguous()?, targets.contiguous()?);
    let loss_and_sums = hidden.apply_op3(&weight, &targets, LinearCrossEntropy)?;
    loss_and_sums.get(0)
}

/// What is known of a row's logits after some of them.
#[derive(Clone, Copy)]
struct RowSum {
    maximum: f32,
    /// `Σ e^(logit − maximum)`.
    sum: f32,
    target_logit: f32,
}

impl RowSum {
    const EMPTY: RowSum = RowSum { maximum: f32::NEG_INFINITY, sum: 0.0, target_logit: 0.0 };

    fn log_sum(&self) -> f32 {
        self.maximum + self.sum.ln()
    }

    fn loss(&self) -> f64 {
        f64::from(self.maximum) - f64::from(self.target_logit) + f64::from(self.sum).ln()
    }
}

/// The result of both operations: the mean loss, then each row's log-sum, which the backward needs.
fn loss_and_log_sums(sums: &[RowSum]) -> (CpuStorage, Shape) {
    let mean = sums.iter().map(RowSum::loss).sum::<f64>() / sums.len() as f64;
    let out: Vec<f32> = std::iter::once(mean as f32).chain(sums.iter().map(RowSum::log_sum)).collect();
    let shape = Shape::from(out.len());
    (CpuStorage::F32(out), shape)
}

struct CrossEntropy;

impl CrossEntropy {
    const NAME: &'static str = "cross_entropy";
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, vocabulary_size) = logits_layout.shape().dims2()?;
        let logits = elements::<f32>(Self::NAME, logits, logits_layout)?;
        let targets = elements::<u32>(Self::NAME, targets, targets_layout)?;
        OpError::check_targets(Self::NAME, targets, vocabulary_size)?;
        let mut sums = vec![RowSum::EMPTY; targets.len()];
        add_tile(&mut sums, logits, targets, Columns { first: 0, count: vocabulary_size });
        Ok(loss_and_log_sums(&sums))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        targets: &CudaStorage,
        targets_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::cross_entropy::forward(Self::NAME, (logits, logits_layout), (targets, targets_layout))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if logits.device().is_cuda() {
            let gradient = cuda::cross_entropy::backward(Self::NAME, logits, targets, res, grad)?;
            return Ok((Some(gradient), None));
        }
        let (rows, vocabulary_size) = logits.dims2()?;
        let scale = grad.get(0)?.to_scalar::<f32>()? / rows as f32;
        let input = Input::new(Self::NAME, logits);
        let (targets, res) = (Input::new(Self::NAME, targets), Input::new(Self::NAME, res));
        let log_sums = &res.elements::<f32>()?[1..];
        let mut gradient = input.elements::<f32>()?.to_vec();
        let columns = Columns { first: 0, count: vocabulary_size };
        tile_gradient(&mut gradient, log_sums, targets.elements::<u32>()?, columns, scale);
        Ok((Some(cpu_tensor(gradient, logits)?), None))
    }
}

struct LinearCrossEntropy;

impl LinearCrossEntropy {
    const NAME: &'static str = "linear_cross_entropy";
}

impl CustomOp3 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = hidden_layout.shape().dims2()?;
        let (vocabulary_size, _) = weight_layout.shape().dims2()?;
        let hidden = Matrix::new(elements(Self::NAME, hidden, hidden_layout)?, rows, width);
        let weight = Matrix::new(elements(Self::NAME, weight, weight_layout)?, vocabulary_size, width);
        let targets = elements::<u32>(Self::NAME, targets, targets_layout)?;
        OpError::check_targets(Self::NAME, targets, vocabulary_size)?;
        let mut sums = vec![RowSum::EMPTY; rows];
        let mut logits = Vec::new();
        for tile in tiles(rows, vocabulary_size) {
            tile.logits(&mut logits, hidden, weight);
            add_tile(&mut sums[tile.rows()], &logits, &targets[tile.rows()], tile.columns);
        }
        Ok(loss_and_log_sums(&sums))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        targets: &CudaStorage,
        targets_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (hidden, weight) = ((hidden, hidden_layout), (weight, weight_layout));
        cuda::cross_entropy::linear_forward(Self::NAME, hidden, weight, (targets, targets_layout))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if hidden.device().is_cuda() {
            let gradients =
                cuda::cross_entropy::linear_backward(Self::NAME, hidden, weight, targets, res, grad)?;
            return Ok((gradients.0, hand_over(weight, gradients.1)?, None));
        }
        let (rows, width) = hidden.dims2()?;
        let vocabulary_size = weight.dim(0)?;
        let scale = grad.get(0)?.to_scalar::<f32>()? / rows as f32;
        let [h, w, targets, res] =
            [hidden, weight, targets, res].map(|tensor| Input::new(Self::NAME, tensor));
        let h = Matrix::new(h.elements()?, rows, width);
        let w = Matrix::new(w.elements()?, vocabulary_size, width);
        let (targets, log_sums) = (targets.elements::<u32>()?, &res.elements::<f32>()?[1..]);

        let gradient = |tensor: &Tensor| tensor.track_op().then(|| vec![0f32; tensor.elem_count()]);
        let (mut d_hidden, mut d_weight) = (gradient(hidden), gradient(weight));
        let mut d_logits = Vec::new();
        for tile in tiles(rows, vocabulary_size) {
            tile.logits(&mut d_logits, h, w);
            tile_gradient(&mut d_logits, &log_sums[tile.rows()], &targets[tile.rows()], tile.columns, scale);
            let Tile { first_row, row_count, columns } = tile;
            let d_logits = Matrix::new(&d_logits, row_count, columns.count);
            if let Some(d_hidden) = &mut d_hidden {
                let destination = &mut d_hidden[first_row * width..(first_row + row_count) * width];
                let destination = MatrixMut::new(destination, row_count, width);
                let weight = w.rows(columns.first, columns.count);
                multiply(destination, columns.first > 0, d_logits, weight, Threads::All);
            }
            if let Some(d_weight) = &mut d_weight {
                let destination =
                    &mut d_weight[columns.first * width..(columns.first + columns.count) * width];
                let destination = MatrixMut::new(destination, columns.count, width);
                let hidden = h.rows(first_row, row_count);
                multiply(destination, first_row > 0, d_logits.transposed(), hidden, Threads::All);
            }
        }
        let tensor = |elements: Option<Vec<f32>>, like| elements.map(|elements| cpu_tensor(elements, like));
        let d_weight = hand_over(weight, tensor(d_weight, weight).transpose()?)?;
        Ok((tensor(d_hidden, hidden).transpose()?, d_weight, None))
    }
}

/// Logits of a tile: 8 MiB.
const TILE_ELEMENTS: usize = 2 * 1024 * 1024;
/// Rows of a tile: the weight is read once for so many.
const TILE_ROWS: usize = 1024;

/// Some columns of the logits: entries of the vocabulary.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub(super) first: usize,
    pub(super) count: usize,
}

/// A part of the `[N, V]` logits.
struct Tile {
    first_row: usize,
    row_count: usize,
    columns: Columns,
}

/// The tiles of `[rows, vocabulary_size]` logits, row by row.
fn tiles(rows: usize, vocabulary_size: usize) -> impl Iterator<Item = Tile> {
    (0..rows).step_by(TILE_ROWS).flat_map(move |first_row| {
        let row_count = TILE_ROWS.min(rows - first_row);
        let width = TILE_ELEMENTS / row_count;
        (0..vocabulary_size).step_by(width).map(move |first| {
            let columns = Columns { first, count: width.min(vocabulary_size - first) };
            Tile { first_row, row_count, columns }
        })
    })
}

impl Tile {
    fn rows(&self) -> std::ops::Range<usize> {
        self.first_row..self.first_row + self.row_count
    }

    /// The tile's part of `hidden·weightᵀ`, row-major.
    fn logits(&self, out: &mut Vec<f32>, hidden: Matrix<'_>, weight: Matrix<'_>) {
        out.resize(self.row_count * self.columns.count, 0.0);
        let destination = MatrixMut::new(out, self.row_count, self.columns.count);
        let hidden = hidden.rows(self.first_row, self.row_count);
        let weight = weight.rows(self.columns.first, self.columns.count);
        multiply(destination, false, hidden, weight.transposed(), Threads::All);
    }
}

/// Adds a tile of logits to the sums of its rows.
fn add_tile(sums: &mut [RowSum], logits: &[f32], targets: &[u32], columns: Columns) {
    let chunk = chunk_elements(columns.count);
    let chunk_rows = chunk / columns.count;
    sums.par_chunks_mut(chunk_rows)
        .zip(targets.par_chunks(chunk_rows))
        .zip(logits.par_chunks(chunk))
        .for_each(|((sums, targets), logits)| add_rows(sums, logits, targets, columns));
}

/// Turns a tile of logits into its gradient in place.
fn tile_gradient(logits: &mut [f32], log_sums: &[f32], targets: &[u32], columns: Columns, scale: f32) {
    let chunk = chunk_elements(columns.count);
    let chunk_rows = chunk / columns.count;
    logits
        .par_chunks_mut(chunk)
        .zip(log_sums.par_chunks(chunk_rows))
        .zip(targets.par_chunks(chunk_rows))
        .for_each(|((logits, log_sums), targets)| row_gradients(logits, log_sums, targets, columns, scale));
}

vectorized! {
    fn add_rows(sums: &mut [RowSum], logits: &[f32], targets: &[u32], columns: Columns) {
        for ((row, logits), &target) in sums.iter_mut().zip(logits.chunks_exact(columns.count)).zip(targets) {
            let largest = row.maximum.max(maximum(logits));
            row.sum = row.sum * exp(row.maximum - largest) + sum_by(logits, |logit| exp(logit - largest));
            row.maximum = largest;
            if let Some(&logit) = (target as usize).checked_sub(columns.first).and_then(|column| logits.get(column)) {
                row.target_logit = logit;
            }
        }
    }

    fn row_gradients(logits: &mut [f32], log_sums: &[f32], targets: &[u32], columns: Columns, scale: f32) {
        for ((logits, &log_sum), &target) in logits.chunks_exact_mut(columns.count).zip(log_sums).zip(targets) {
            for logit in logits.iter_mut() {
                *logit = scale * exp(*logit - log_sum);
            }
            let column = (target as usize).checked_sub(columns.first);
            if let Some(gradient) = column.and_then(|column| logits.get_mut(column)) {
                *gradient -= scale;
            }
        }
    }
}
