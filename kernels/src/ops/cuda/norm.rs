//! Layer norm and RMS norm, and the sums over rows that gradients of weights and biases are.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, enqueue, module, result, rows, size, tensor, threads, view};
use crate::cuda::blocks;
use crate::ops::input::Input;

module!("norm");

/// Layer norm if there is a bias, RMS norm otherwise. `weight` and `bias` are `[width]`.
pub(in crate::ops) fn forward(
    op: &'static str,
    xs: (&CudaStorage, &Layout),
    weight: (&CudaStorage, &Layout),
    bias: Option<(&CudaStorage, &Layout)>,
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let device = &xs.0.device;
    by_dtype!(op, xs.0.dtype(), T => {
        let (x, weight) = (view::<T>(op, xs.0, xs.1)?, view::<T>(op, weight.0, weight.1)?);
        let bias = bias.map(|bias| view::<T>(op, bias.0, bias.1)).transpose()?;
        let (row_count, width) = (x.len() / weight.len(), size::<u32>(op, weight.len())?);
        let mut out = allocate::<T>(device, x.len())?;
        let kernel = kernel::<T>(device, &format!("{op}_forward"))?;
        let count = row_count as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&x).arg(&weight);
        if let Some(bias) = &bias {
            launch.arg(bias);
        }
        launch.arg(&count).arg(&width).arg(&eps);
        // SAFETY: the arguments are those of the kernel: a layer norm has a bias, an RMS norm has none. The
        // rows are `width` wide, as weight and bias are.
        unsafe { enqueue(&mut launch, rows(row_count, weight.len())) }?;
        Ok(result(device, out, xs.1.shape()))
    })
}

/// The gradients of input, weight and, if `with_bias`, bias.
pub(in crate::ops) fn backward(
    op: &'static str,
    xs: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    eps: f32,
    with_bias: bool,
) -> Result<(Tensor, Option<Tensor>, Option<Tensor>)> {
    let grad = grad.contiguous()?;
    let [x, w, dy] = [xs, weight, &grad].map(|tensor| Input::new(op, tensor));
    let device = x.cuda_device()?;
    by_dtype!(op, xs.dtype(), T => {
        let (x, w, dy) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
        let (row_count, width) = (x.len() / w.len(), size::<u32>(op, w.len())?);
        let mut dx = allocate::<T>(device, x.len())?;
        let mut statistics = allocate::<f32>(device, 2 * row_count)?;
        let kernel = kernel::<T>(device, &format!("{op}_backward"))?;
        let count = row_count as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut dx).arg(&mut statistics).arg(&x).arg(&dy).arg(&w).arg(&count).arg(&width).arg(&eps);
        // SAFETY: the arguments are those of the kernel; the rows are `width` wide, as the weight is, and
        // each has a pair of statistics.
        unsafe { enqueue(&mut launch, rows(row_count, w.len())) }?;
        drop(launch);
        let inputs = Some((&x, &statistics));
        let columns = column_sums::<T>(device, &dy, row_count, width, with_bias, inputs)?;
        let d_weight = columns.products.map(|sums| tensor(device, sums, weight.shape()));
        let d_bias = columns.sums.map(|sums| tensor(device, sums, weight.shape()));
        Ok((tensor(device, dx, xs.shape()), d_weight, d_bias))
    })
}

/// The gradient of a bias: the sums of the columns of `dy`, `[rows, width]`.
pub(super) fn bias_gradient<T: Float>(
    op: &'static str,
    device: &CudaDevice,
    dy: &CudaView<'_, T>,
    width: usize,
) -> Result<CudaSlice<T>> {
    let ColumnSums { sums, .. } =
        column_sums(device, dy, dy.len() / width.max(1), size(op, width)?, true, None)?;
    match sums {
        Some(sums) => Ok(sums),
        None => allocate(device, width),
    }
}

/// Sums over rows, those that were asked for.
struct ColumnSums<T> {
    /// Of the upstream gradient.
    sums: Option<CudaSlice<T>>,
    /// Of the upstream gradient times the normalised input.
    products: Option<CudaSlice<T>>,
}

/// Rows that are summed before they join the total, as in `cuda/norm.cu`.
const GROUP_ROWS: usize = 64;
/// Columns of a thread block that sums them, as there.
const BLOCK_COLUMNS: u32 = 128;

/// Sums over the rows of `dy`, if asked for, and of `dy` times the normalised input, if that and its
/// statistics are given.
fn column_sums<T: Float>(
    device: &CudaDevice,
    dy: &CudaView<'_, T>,
    row_count: usize,
    width: u32,
    sums: bool,
    inputs: Option<(&CudaView<'_, T>, &CudaSlice<f32>)>,
) -> Result<ColumnSums<T>> {
    let groups = row_count.div_ceil(GROUP_ROWS);
    let partial = |wanted: bool| wanted.then(|| allocate::<f32>(device, groups * width as usize)).transpose();
    let (sums, products) = (partial(sums)?, partial(inputs.is_some())?);
    {
        let stream = device.cuda_stream();
        // The kernel takes null for what is not wanted.
        let sums = sums.as_ref().map(|sums| sums.device_ptr(&stream));
        let products = products.as_ref().map(|products| products.device_ptr(&stream));
        let xs = inputs.map(|(xs, _)| xs.device_ptr(&stream));
        let statistics = inputs.map(|(_, statistics)| statistics.device_ptr(&stream));
        let [sums, products, xs, statistics] = [&sums, &products, &xs, &statistics]
            .map(|input| input.as_ref().map_or(0, |(pointer, _)| *pointer));
        let kernel = kernel::<T>(device, "column_sums")?;
        let count = row_count as u64;
        let mut launch = kernel.builder();
        launch.arg(&sums).arg(&products).arg(dy).arg(&xs).arg(&statistics).arg(&count).arg(&width);
        let grid = (width.div_ceil(BLOCK_COLUMNS), blocks(groups, 65_535), 1);
        let config = LaunchConfig { grid_dim: grid, block_dim: (32, 8, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel; inputs have `row_count` rows of `width` elements,
        // each with a pair of statistics, and there is a partial sum for every group of rows and column.
        unsafe { enqueue(&mut launch, config) }?;
    }
    let total = |partial: Option<CudaSlice<f32>>| {
        partial.map(|partial| column_totals::<T>(device, &partial, groups, width)).transpose()
    };
    Ok(ColumnSums { sums: total(sums)?, products: total(products)? })
}

fn column_totals<T: Float>(
    device: &CudaDevice,
    partial: &CudaSlice<f32>,
    groups: usize,
    width: u32,
) -> Result<CudaSlice<T>> {
    let mut totals = allocate::<T>(device, width as usize)?;
    let kernel = kernel::<T>(device, "column_totals")?;
    let count = groups as u64;
    let mut launch = kernel.builder();
    launch.arg(&mut totals).arg(partial).arg(&count).arg(&width);
    // SAFETY: the arguments are those of the kernel; there are `groups` rows of `width` partial sums.
    unsafe { enqueue(&mut launch, threads(width as usize)) }?;
    drop(launch);
    Ok(totals)
}

/// Rows that are all `row`.
pub(super) fn repeat_row<T: Float>(
    op: &'static str,
    device: &CudaDevice,
    row: &CudaView<'_, T>,
    rows: usize,
) -> Result<CudaSlice<T>> {
    let count = rows * row.len();
    let mut out = allocate::<T>(device, count)?;
    let kernel = kernel::<T>(device, "repeat_row")?;
    let (elements, width) = (count as u64, size::<u32>(op, row.len())?);
    let mut launch = kernel.builder();
    launch.arg(&mut out).arg(row).arg(&elements).arg(&width);
    // SAFETY: the arguments are those of the kernel; `elements` is a multiple of the width.
    unsafe { enqueue(&mut launch, threads(count.div_ceil(4))) }?;
    drop(launch);
    Ok(out)
}
