//! The mean cross-entropy, from logits or straight from hidden states.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, LaunchConfig, PushKernelArg};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, enqueue, module, result, rows, size, tensor, threads, view};
use super::matrix::{self, multiply};
use super::staging;
use crate::cuda::scratch_elements;
use crate::ops::error::OpError;
use crate::ops::input::Input;

module!("cross_entropy");

/// Entries of the vocabulary that a tile of logits has at least. It has all rows, so that the gradient of its
/// part of the weight is one product.
const TILE_COLUMNS: usize = 64;

/// The mean loss, then each row's log-sum, in f32, of logits `[N, V]`.
pub(in crate::ops) fn forward(
    op: &'static str,
    logits: (&CudaStorage, &Layout),
    targets: (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let device = &logits.0.device;
    let (_, vocabulary_size) = logits.1.shape().dims2()?;
    let targets = checked_targets(op, device, targets, vocabulary_size)?;
    by_dtype!(op, logits.0.dtype(), T => {
        let logits = view::<T>(op, logits.0, logits.1)?;
        let mut sums = Sums::new(op, device, &targets)?;
        sums.add_tile(&logits, Columns { first: 0, count: vocabulary_size })?;
        sums.loss()
    })
}

/// The gradient of logits, from what [`forward`] answered and the gradient of that.
pub(in crate::ops) fn backward(
    op: &'static str,
    logits: &Tensor,
    targets: &Tensor,
    res: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let columns = Columns { first: 0, count: logits.dim(1)? };
    let grad = grad.contiguous()?;
    let [input, targets, res, upstream] = [logits, targets, res, &grad].map(|tensor| Input::new(op, tensor));
    let device = input.cuda_device()?;
    by_dtype!(op, logits.dtype(), T => {
        let input = input.view::<T>()?;
        let mut gradient = allocate::<T>(device, input.len())?;
        let upstream = Upstream::new(op, device, targets.view()?, res.view()?, upstream.view()?);
        upstream.tile_gradient(&mut gradient, Some(&input), columns)?;
        Ok(tensor(device, gradient, logits.shape()))
    })
}

/// As [`forward`], of the logits `hidden·weightᵀ`, a tile at a time.
pub(in crate::ops) fn linear_forward(
    op: &'static str,
    hidden: (&CudaStorage, &Layout),
    weight: (&CudaStorage, &Layout),
    targets: (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let device = &hidden.0.device;
    let (vocabulary_size, width) = weight.1.shape().dims2()?;
    let targets = checked_targets(op, device, targets, vocabulary_size)?;
    by_dtype!(op, hidden.0.dtype(), T => {
        let (hidden, weight) = (view::<T>(op, hidden.0, hidden.1)?, view::<T>(op, weight.0, weight.1)?);
        let head = Head { op, device, hidden: &hidden, weight: &weight, rows: targets.len(), width };
        let mut sums = Sums::new(op, device, &targets)?;
        let tiles = tiles(targets.len(), vocabulary_size);
        let mut logits = head.allocate_logits(&tiles)?;
        for &columns in &tiles {
            head.logits(&mut logits, columns)?;
            sums.add_tile(&logits.as_view(), columns)?;
        }
        sums.loss()
    })
}

/// The gradients of hidden states and weight, each only if it is tracked.
pub(in crate::ops) fn linear_backward(
    op: &'static str,
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    res: &Tensor,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (rows, width) = hidden.dims2()?;
    let grad = grad.contiguous()?;
    let [h, w, targets, res, upstream] =
        [hidden, weight, targets, res, &grad].map(|tensor| Input::new(op, tensor));
    let device = h.cuda_device()?;
    by_dtype!(op, hidden.dtype(), T => {
        let (h, w) = (h.view::<T>()?, w.view::<T>()?);
        let head = Head { op, device, hidden: &h, weight: &w, rows, width };
        let upstream = Upstream::new(op, device, targets.view()?, res.view()?, upstream.view()?);
        let wanted = (hidden.track_op(), weight.track_op());
        let tiles = tiles(rows, weight.dim(0)?);
        let gradients = head.gradients(&upstream, &tiles, wanted)?;
        let d_hidden = gradients.hidden.map(|elements| tensor(device, elements, hidden.shape()));
        Ok((d_hidden, gradients.weight.map(|elements| tensor(device, elements, weight.shape()))))
    })
}

/// The targets, after their values were looked at on the host: an index out of range is an error, not a wrong
/// address.
fn checked_targets<'a>(
    op: &'static str,
    device: &CudaDevice,
    (storage, layout): (&'a CudaStorage, &Layout),
    vocabulary_size: usize,
) -> Result<CudaView<'a, u32>> {
    let targets = view::<u32>(op, storage, layout)?;
    staging::look_at(device, &targets, |targets| Ok(OpError::check_targets(op, targets, vocabulary_size)?))?;
    Ok(targets)
}

/// Some columns of the logits: entries of the vocabulary.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    count: usize,
}

/// The columns of the tiles of `[rows, vocabulary_size]` logits.
fn tiles(rows: usize, vocabulary_size: usize) -> Vec<Columns> {
    let width = (scratch_elements() / rows.max(1)).max(TILE_COLUMNS);
    let tile = |first| Columns { first, count: width.min(vocabulary_size - first) };
    (0..vocabulary_size).step_by(width).map(tile).collect()
}

/// What is known of the rows' logits after some tiles of them, as the CPU's `RowSum`.
struct Sums<'a> {
    op: &'static str,
    device: &'a CudaDevice,
    targets: &'a CudaView<'a, u32>,
    maxima: CudaSlice<f32>,
    sums: CudaSlice<f32>,
    target_logits: CudaSlice<f32>,
}

impl<'a> Sums<'a> {
    fn new(op: &'static str, device: &'a CudaDevice, targets: &'a CudaView<'a, u32>) -> Result<Self> {
        let rows = || allocate(device, targets.len());
        Ok(Self { op, device, targets, maxima: rows()?, sums: rows()?, target_logits: rows()? })
    }

    /// Adds the next tile; the first one's columns start at 0.
    fn add_tile<T: Float>(&mut self, logits: &CudaView<'_, T>, columns: Columns) -> Result<()> {
        let row_count = self.targets.len();
        assert!(row_count * columns.count <= logits.len(), "a tile larger than its logits");
        let kernel = kernel::<T>(self.device, "add_tile")?;
        let row_total = size::<u32>(self.op, row_count)?;
        let [count, first] = [columns.count, columns.first].map(|columns| size::<u32>(self.op, columns));
        let (count, first) = (count?, first?);
        let mut launch = kernel.builder();
        launch.arg(&mut self.maxima).arg(&mut self.sums).arg(&mut self.target_logits).arg(logits);
        launch.arg(self.targets).arg(&row_total).arg(&count).arg(&first);
        // SAFETY: the arguments are those of the kernel; there are `rows` sums and targets and as many rows
        // of logits, and the kernel looks a target up only within the tile's columns.
        unsafe { enqueue(&mut launch, rows(row_count, columns.count)) }
    }

    /// The mean loss, then each row's log-sum.
    fn loss(self) -> Result<(CudaStorage, Shape)> {
        let row_count = self.targets.len();
        let mut out = allocate::<f32>(self.device, 1 + row_count)?;
        let kernel = kernel_named(self.device, "loss_and_log_sums")?;
        let row_total = size::<u32>(self.op, row_count)?;
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&self.maxima).arg(&self.sums).arg(&self.target_logits).arg(&row_total);
        let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel; there are `rows` sums, and one element more of the
        // result.
        unsafe { enqueue(&mut launch, one) }?;
        drop(launch);
        Ok(result(self.device, out, 1 + row_count))
    }
}

/// What the gradient of a tile needs beside its logits.
struct Upstream<'a> {
    op: &'static str,
    device: &'a CudaDevice,
    targets: CudaView<'a, u32>,
    log_sums: CudaView<'a, f32>,
    /// The gradient of the mean loss, and of the log-sums, which nobody uses.
    gradient: CudaView<'a, f32>,
}

impl<'a> Upstream<'a> {
    fn new(
        op: &'static str,
        device: &'a CudaDevice,
        targets: CudaView<'a, u32>,
        res: CudaView<'a, f32>,
        gradient: CudaView<'a, f32>,
    ) -> Self {
        Self { op, device, targets, log_sums: res.slice(1..), gradient }
    }

    /// The gradient of a tile of logits, or, without `logits`, of those that `gradients` holds.
    fn tile_gradient<T: Float>(
        &self,
        gradients: &mut CudaSlice<T>,
        logits: Option<&CudaView<'_, T>>,
        columns: Columns,
    ) -> Result<()> {
        use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
        let row_count = self.targets.len();
        let elements = row_count * columns.count;
        let inside = elements <= gradients.len() && logits.is_none_or(|logits| elements <= logits.len());
        assert!(inside, "a tile larger than its logits");
        let kernel = kernel::<T>(self.device, "tile_gradient")?;
        let row_total = size::<u32>(self.op, row_count)?;
        let [count, first] = [columns.count, columns.first].map(|columns| size::<u32>(self.op, columns));
        let (count, first) = (count?, first?);
        let stream = self.device.cuda_stream();
        let read = logits.map(|logits| logits.device_ptr(&stream));
        let (gradients, _written) = gradients.device_ptr_mut(&stream);
        let logits = read.as_ref().map_or(gradients, |(logits, _)| *logits);
        let mut launch = kernel.builder();
        launch.arg(&gradients).arg(&logits).arg(&self.log_sums).arg(&self.targets).arg(&self.gradient);
        launch.arg(&row_total).arg(&count).arg(&first);
        // SAFETY: the arguments are those of the kernel, which may write where it reads; there are `rows`
        // log-sums and targets and as many rows of logits and gradients, and the upstream gradient has an
        // element.
        unsafe { enqueue(&mut launch, rows(row_count, columns.count)) }
    }
}

/// The product that makes the logits: hidden states `[rows, width]` and weight `[V, width]`.
struct Head<'a, T> {
    op: &'static str,
    device: &'a CudaDevice,
    hidden: &'a CudaView<'a, T>,
    weight: &'a CudaView<'a, T>,
    rows: usize,
    width: usize,
}

/// The gradients of [`Head`]'s inputs, those that were asked for.
struct HeadGradients<T> {
    hidden: Option<CudaSlice<T>>,
    weight: Option<CudaSlice<T>>,
}

impl<T: Float> Head<'_, T> {
    fn allocate_logits(&self, tiles: &[Columns]) -> Result<CudaSlice<T>> {
        let widest = tiles.iter().map(|columns| columns.count).max().unwrap_or(0);
        allocate(self.device, self.rows * widest)
    }

    fn hidden_shape(&self) -> matrix::Shape {
        matrix::Shape::new(self.rows, self.width)
    }

    /// The weight's rows of a tile.
    fn weight_shape(&self, columns: Columns) -> matrix::Shape {
        matrix::Shape::new(columns.count, self.width).strided(columns.first * self.width, self.width, 0)
    }

    /// A tile's part of `hidden·weightᵀ`, `[rows, columns]`.
    fn logits(&self, out: &mut CudaSlice<T>, columns: Columns) -> Result<()> {
        let destination = (out, matrix::Shape::new(self.rows, columns.count));
        let hidden = (self.hidden, self.hidden_shape());
        let weight = (self.weight, self.weight_shape(columns).transposed());
        multiply(self.op, self.device, 1, false, destination, hidden, weight)
    }

    /// The gradients of hidden states and weight, each if wanted. That of the hidden states is summed over
    /// the tiles in f32.
    fn gradients(
        &self,
        upstream: &Upstream<'_>,
        tiles: &[Columns],
        (hidden_wanted, weight_wanted): (bool, bool),
    ) -> Result<HeadGradients<T>> {
        let elements = self.rows * self.width;
        let mut d_logits = self.allocate_logits(tiles)?;
        let mut d_weight = weight_wanted.then(|| allocate(self.device, self.weight.len())).transpose()?;
        let mut part = hidden_wanted.then(|| allocate(self.device, elements)).transpose()?;
        let mut d_hidden = hidden_wanted.then(|| allocate::<f32>(self.device, elements)).transpose()?;
        for &columns in tiles {
            self.logits(&mut d_logits, columns)?;
            upstream.tile_gradient(&mut d_logits, None, columns)?;
            let d_logits = d_logits.as_view();
            let shape = matrix::Shape::new(self.rows, columns.count);
            if let Some(d_weight) = &mut d_weight {
                let destination = (d_weight, self.weight_shape(columns));
                let hidden = (self.hidden, self.hidden_shape());
                let d_logits = (&d_logits, shape.transposed());
                multiply(self.op, self.device, 1, false, destination, d_logits, hidden)?;
            }
            if let (Some(part), Some(d_hidden)) = (&mut part, &mut d_hidden) {
                let weight = (self.weight, self.weight_shape(columns));
                let destination = (&mut *part, self.hidden_shape());
                multiply(self.op, self.device, 1, false, destination, (&d_logits, shape), weight)?;
                self.add_widened(d_hidden, part, elements, columns.first == 0)?;
            }
        }
        // The last part's memory is free to take the rounded sum.
        let d_hidden = match (d_hidden, part) {
            (Some(sum), Some(part)) => Some(self.narrow(&sum, part, elements)?),
            _ => None,
        };
        Ok(HeadGradients { hidden: d_hidden, weight: d_weight })
    }

    /// Adds a part to the sum, or makes it the sum.
    fn add_widened(
        &self,
        sum: &mut CudaSlice<f32>,
        part: &CudaSlice<T>,
        elements: usize,
        first: bool,
    ) -> Result<()> {
        let kernel = kernel::<T>(self.device, "add_widened")?;
        let (count, first) = (elements as u64, i32::from(first));
        let mut launch = kernel.builder();
        launch.arg(sum).arg(part).arg(&count).arg(&first);
        // SAFETY: the arguments are those of the kernel, and both have `elements` elements.
        unsafe { enqueue(&mut launch, threads(elements.div_ceil(4))) }
    }

    fn narrow(
        &self,
        values: &CudaSlice<f32>,
        mut out: CudaSlice<T>,
        elements: usize,
    ) -> Result<CudaSlice<T>> {
        let kernel = kernel::<T>(self.device, "narrow_all")?;
        let count = elements as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(values).arg(&count);
        // SAFETY: the arguments are those of the kernel, and both have `elements` elements.
        unsafe { enqueue(&mut launch, threads(elements.div_ceil(4))) }?;
        drop(launch);
        Ok(out)
    }
}
