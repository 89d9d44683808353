//! The mean cross-entropy of next-token prediction, from logits or straight from hidden states.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Mutex;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input, elements};
use super::matrix::{Matrix, MatrixMut, Threads, multiply};
use super::output::{cpu_tensor, in_chunks, rounded_like, storage};
use super::recompute::{backward_follows, hand_over};
use super::vector::{chunk_elements, exp, maximum, share, sum_by, vectorized};

/// `mean(log Σ e^logits − logits[target])` over the rows: `logits` `[N, V]`, `targets` `[N]` of `u32`, a
/// scalar.
///
/// Arguments as [`candle_nn::loss::cross_entropy`]. Rows are summed in `f32`, their losses in `f64` in the
/// order of the rows. Backward: `d logits = dy·(softmax(logits) − one_hot(targets))/N`, made in one pass in
/// its own memory.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for logits in a dtype that the device does not compute in, or
/// targets that are not `u32`; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above
/// with `N > 0`; [`OpError::TargetOutOfRange`](super::OpError::TargetOutOfRange) for a target of `V` or more.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let rows = targets.elem_count();
    if logits.rank() != 2 || targets.dims() != [logits.dims()[0]] || rows == 0 {
        let shapes = [logits.shape(), targets.shape()];
        return Err(shapes_error(CrossEntropy::NAME, "expected [N, V], [N] with N > 0", &shapes));
    }
    let loss_and_sums = logits.contiguous()?.apply_op2(&targets.contiguous()?, CrossEntropy)?;
    loss_and_sums.get(0)
}

/// [`cross_entropy`] of the logits `hidden·weightᵀ`, of which only a part exists at a time.
///
/// `hidden` `[N, C]`, `weight` `[V, C]`, `targets` `[N]` of `u32`, result a scalar. On the CPU the part is
/// those of 256 rows, on a CUDA device 16 Mi logits of all rows, whose sums run over the parts as in Milakov
/// and Gimelshein, *Online normalizer calculation for softmax* (arXiv 1805.02867). With `d` the gradient of a
/// part of the logits, `d·weight` is added to `d hidden` and `dᵀ·hidden` to `d weight`. The backward makes
/// the logits again for that; on the CPU, the forward within [`before_backward`](super::before_backward)
/// makes the gradients while it has them. Gradients of inputs that are not tracked are not computed.
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
    let gradients = match backward_follows() {
        true => Some([hidden.track_op(), weight.track_op()]),
        false => None,
    };
    let operation = LinearCrossEntropy { wanted: gradients, made: Mutex::new(None) };
    let loss_and_sums = hidden.apply_op3(&weight, &targets, operation)?;
    loss_and_sums.get(0)
}

/// What the loss needs to know of a row's logits.
#[derive(Clone, Copy)]
pub(super) struct RowSum {
    maximum: f32,
    /// `Σ e^(logit − maximum)`.
    sum: f32,
    pub(super) target_logit: f32,
}

impl RowSum {
    pub(super) const EMPTY: RowSum = RowSum { maximum: f32::NEG_INFINITY, sum: 0.0, target_logit: 0.0 };

    pub(super) fn log_sum(&self) -> f32 {
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
        let logits = Elements::of(Self::NAME, logits, logits_layout)?;
        let targets = elements::<u32>(Self::NAME, targets, targets_layout)?;
        OpError::check_targets(Self::NAME, targets, vocabulary_size)?;
        let mut sums = vec![RowSum::EMPTY; targets.len()];
        add_logits(&mut sums, logits, targets, vocabulary_size);
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
        let (input, targets) = (input.real()?, targets.elements::<u32>()?);
        let gradient = in_chunks(input, input.len(), chunk_elements(vocabulary_size), |range, gradient| {
            let rows = range.start / vocabulary_size..range.end / vocabulary_size;
            input.widen(range, gradient);
            row_gradients(gradient, &log_sums[rows.clone()], &targets[rows], vocabulary_size, scale);
        });
        Ok((Some(cpu_tensor(gradient, logits)), None))
    }
}

/// Gradients of the hidden states and of the weight, where they are wanted.
pub(super) type HeadGradients = [Option<Vec<f32>>; 2];

struct LinearCrossEntropy {
    /// Whether the forward makes gradients, and of which inputs.
    wanted: Option<[bool; 2]>,
    /// What it made of the loss's, until the backward takes it.
    made: Mutex<Option<HeadGradients>>,
}

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
        let inputs = [(hidden, hidden_layout), (weight, weight_layout)];
        let [hidden, weight] = Elements::of_all(Self::NAME, inputs)?;
        let hidden = Matrix::new(hidden, rows, width);
        let weight = Matrix::new(weight, vocabulary_size, width);
        let targets = elements::<u32>(Self::NAME, targets, targets_layout)?;
        OpError::check_targets(Self::NAME, targets, vocabulary_size)?;
        let head = Head { hidden, weight, targets };
        let mut gradients = self.wanted.map(|wanted| head.zeros(wanted));
        let mut sums = vec![RowSum::EMPTY; rows];
        let mut logits = Vec::new();
        for block in head.blocks() {
            head.logits(&block, &mut logits);
            let block_logits = Elements::F32(&logits);
            add_logits(&mut sums[block.clone()], block_logits, &targets[block.clone()], vocabulary_size);
            if let Some(gradients) = &mut gradients {
                let log_sums: Vec<f32> = sums[block.clone()].iter().map(RowSum::log_sum).collect();
                head.add_gradients(&block, &mut logits, &log_sums, head.scales(1.0).0, gradients);
            }
        }
        if let Ok(mut made) = self.made.lock() {
            *made = gradients;
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
        let upstream = grad.get(0)?.to_scalar::<f32>()?;
        let made = self.made.lock().ok().and_then(|mut made| made.take());
        let (rows, width) = hidden.dims2()?;
        let [h, w, targets, res] =
            [hidden, weight, targets, res].map(|tensor| Input::new(Self::NAME, tensor));
        let like = h.real()?;
        let head = Head {
            hidden: Matrix::new(like, rows, width),
            weight: Matrix::new(w.real()?, weight.dim(0)?, width),
            targets: targets.elements::<u32>()?,
        };
        let (mut gradients, scale) = match made {
            Some(made) => (made, head.scales(1.0).1 * upstream),
            None => {
                let (scale, scale_after) = head.scales(upstream);
                let log_sums = &res.elements::<f32>()?[1..];
                let mut gradients = head.zeros([hidden.track_op(), weight.track_op()]);
                let mut logits = Vec::new();
                for block in head.blocks() {
                    head.logits(&block, &mut logits);
                    let log_sums = &log_sums[block.clone()];
                    head.add_gradients(&block, &mut logits, log_sums, scale, &mut gradients);
                }
                (gradients, scale_after)
            }
        };
        if scale != 1.0 {
            gradients.iter_mut().flatten().for_each(|gradient| multiply_by(gradient, scale));
        }
        let [d_hidden, d_weight] = gradients.map(|gradient| gradient.map(|gradient| storage(gradient, like)));
        let d_hidden = d_hidden.map(|gradient| cpu_tensor(gradient, hidden));
        let d_weight = d_weight.map(|gradient| cpu_tensor(gradient, weight));
        Ok((d_hidden, hand_over(weight, d_weight)?, None))
    }
}

/// Rows whose logits exist together: the weight, and its gradient, is passed over once for so many.
const BLOCK_ROWS: usize = 256;

/// The layer that makes logits, and what they should be.
pub(super) struct Head<'a> {
    pub(super) hidden: Matrix<'a>,
    pub(super) weight: Matrix<'a>,
    pub(super) targets: &'a [u32],
}

impl Head<'_> {
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.targets.len();
        (0..rows).step_by(BLOCK_ROWS).map(move |first| first..(first + BLOCK_ROWS).min(rows))
    }

    pub(super) fn vocabulary_size(&self) -> usize {
        self.weight.row_count()
    }

    /// By what gradients of logits are multiplied before their products, and by what these are after:
    /// `upstream` over the rows in all. In 16 bits it comes after, because what a row of many adds to a mean
    /// may be too small for the type.
    fn scales(&self, upstream: f32) -> (f32, f32) {
        let scale = upstream / self.targets.len() as f32;
        match self.hidden.elements() {
            Elements::F32(_) => (scale, 1.0),
            Elements::BF16(_) | Elements::F16(_) => (1.0, scale),
        }
    }

    pub(super) fn zeros(&self, wanted: [bool; 2]) -> HeadGradients {
        let width = self.hidden.columns();
        let [hidden, weight] = [self.targets.len(), self.vocabulary_size()].map(|rows| rows * width);
        [wanted[0].then(|| vec![0f32; hidden]), wanted[1].then(|| vec![0f32; weight])]
    }

    /// The logits of some rows.
    pub(super) fn logits(&self, block: &Range<usize>, out: &mut Vec<f32>) {
        out.resize(block.len() * self.vocabulary_size(), 0.0);
        let destination = MatrixMut::new(out, block.len(), self.vocabulary_size());
        let hidden = self.hidden.rows(block.start, block.len());
        multiply(destination, false, hidden, self.weight.transposed(), Threads::All);
    }

    /// Turns the logits of some rows into their gradient, and adds what follows for the inputs.
    fn add_gradients(
        &self,
        block: &Range<usize>,
        logits: &mut [f32],
        log_sums: &[f32],
        scale: f32,
        gradients: &mut HeadGradients,
    ) {
        logits_gradient(logits, log_sums, &self.targets[block.clone()], self.vocabulary_size(), scale);
        self.add_products(block, logits, gradients);
    }

    /// Adds what follows for the inputs of the gradient of the logits of some rows.
    pub(super) fn add_products(
        &self,
        block: &Range<usize>,
        d_logits: &[f32],
        [d_hidden, d_weight]: &mut HeadGradients,
    ) {
        let (width, vocabulary_size) = (self.hidden.columns(), self.vocabulary_size());
        rounded_like(self.hidden.elements(), d_logits, |d_logits| {
            let d_logits = Matrix::new(d_logits, block.len(), vocabulary_size);
            if let Some(d_hidden) = d_hidden {
                let destination = &mut d_hidden[block.start * width..block.end * width];
                let destination = MatrixMut::new(destination, block.len(), width);
                multiply(destination, false, d_logits, self.weight, Threads::All);
            }
            if let Some(d_weight) = d_weight {
                let destination = MatrixMut::new(d_weight, vocabulary_size, width);
                let hidden = self.hidden.rows(block.start, block.len());
                multiply(destination, block.start > 0, d_logits.transposed(), hidden, Threads::All);
            }
        });
    }
}

/// Adds the logits of some rows to their sums.
pub(super) fn add_logits(sums: &mut [RowSum], logits: Elements<'_>, targets: &[u32], vocabulary_size: usize) {
    let chunk_rows = chunk_elements(vocabulary_size) / vocabulary_size;
    let tasks = sums.par_chunks_mut(chunk_rows).zip(targets.par_chunks(chunk_rows)).enumerate();
    tasks.for_each(|(task, (sums, targets))| {
        let first = task * chunk_rows * vocabulary_size;
        let logits = logits.wide(first..first + sums.len() * vocabulary_size);
        add_rows(sums, &logits, targets, vocabulary_size);
    });
}

/// Turns logits into their gradient in place.
fn logits_gradient(
    logits: &mut [f32],
    log_sums: &[f32],
    targets: &[u32],
    vocabulary_size: usize,
    scale: f32,
) {
    let chunk = chunk_elements(vocabulary_size);
    let chunk_rows = chunk / vocabulary_size;
    logits
        .par_chunks_mut(chunk)
        .zip(log_sums.par_chunks(chunk_rows))
        .zip(targets.par_chunks(chunk_rows))
        .for_each(|((logits, log_sums), targets)| {
            row_gradients(logits, log_sums, targets, vocabulary_size, scale);
        });
}

fn multiply_by(gradient: &mut [f32], factor: f32) {
    gradient.par_chunks_mut(chunk_elements(1)).for_each(|chunk| {
        for element in chunk {
            *element *= factor;
        }
    });
}

vectorized! {
    fn add_rows(sums: &mut [RowSum], logits: &[f32], targets: &[u32], vocabulary_size: usize) {
        let rows = sums.iter_mut().zip(logits.chunks_exact(vocabulary_size)).zip(targets);
        for ((row, logits), &target) in rows {
            row.maximum = maximum(logits);
            row.sum = sum_by(logits, |logit| exp(logit - row.maximum));
            row.target_logit = logits.get(target as usize).copied().unwrap_or(f32::NAN);
        }
    }

    fn row_gradients(
        logits: &mut [f32],
        log_sums: &[f32],
        targets: &[u32],
        vocabulary_size: usize,
        scale: f32,
    ) {
        let rows = logits.chunks_exact_mut(vocabulary_size).zip(log_sums).zip(targets);
        for ((logits, &log_sum), &target) in rows {
            for logit in logits.iter_mut() {
                *logit = scale * share(*logit - log_sum);
            }
            if let Some(gradient) = logits.get_mut(target as usize) {
                *gradient -= scale;
            }
        }
    }
}
