//! Softmax over rows, plain and causal.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, PushKernelArg};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, enqueue, module, result, rows, size, tensor, view};
use crate::ops::input::Input;
use crate::ops::softmax::Rows;

module!("softmax");

/// Columns, rows a matrix and window, as the kernels take them.
fn sizes(op: &'static str, shape: Rows) -> Result<[u32; 3]> {
    Ok([size(op, shape.columns)?, size(op, shape.query_rows)?, size(op, shape.window)?])
}

/// Probabilities of rows of scores.
pub(in crate::ops) fn forward(
    op: &'static str,
    scores: &CudaStorage,
    layout: &Layout,
    shape: Rows,
    scale: f32,
) -> Result<(CudaStorage, Shape)> {
    let device = &scores.device;
    by_dtype!(op, scores.dtype(), T => {
        let scores = view::<T>(op, scores, layout)?;
        let mut out = allocate::<T>(device, scores.len())?;
        let row_count = scores.len() / shape.columns.max(1);
        let kernel = kernel::<T>(device, "softmax_forward")?;
        let sizes = sizes(op, shape)?;
        let count = row_count as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&scores).arg(&count);
        launch.arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&scale);
        // SAFETY: the arguments are those of the kernel; input and output have `count` rows of `columns`
        // elements.
        unsafe { enqueue(&mut launch, rows(row_count, shape.columns)) }?;
        Ok(result(device, out, layout.shape()))
    })
}

/// The gradient of the scores, from the probabilities.
pub(in crate::ops) fn backward(
    op: &'static str,
    probabilities: &Tensor,
    grad: &Tensor,
    shape: Rows,
    scale: f32,
) -> Result<Tensor> {
    let grad = grad.contiguous()?;
    let (y, dy) = (Input::new(op, probabilities), Input::new(op, &grad));
    let device = y.cuda_device()?;
    by_dtype!(op, probabilities.dtype(), T => {
        let (y, dy) = (y.view::<T>()?, dy.view::<T>()?);
        let mut dx = allocate::<T>(device, y.len())?;
        let row_count = y.len() / shape.columns.max(1);
        let kernel = kernel::<T>(device, "softmax_backward")?;
        let sizes = sizes(op, shape)?;
        let count = row_count as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut dx).arg(&dy).arg(&y).arg(&count);
        launch.arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&scale);
        // SAFETY: the arguments are those of the kernel; all have `count` rows of `columns` elements.
        unsafe { enqueue(&mut launch, rows(row_count, shape.columns)) }?;
        Ok(tensor(device, dx, probabilities.shape()))
    })
}

/// Turns the first `row_count` rows of scores into probabilities where they lie.
pub(super) fn forward_in_place<T: Float>(
    op: &'static str,
    device: &CudaDevice,
    scores: &mut CudaSlice<T>,
    row_count: usize,
    shape: Rows,
    scale: f32,
) -> Result<()> {
    assert!(row_count * shape.columns <= scores.len(), "more rows than scores");
    let kernel = kernel::<T>(device, "softmax_forward")?;
    let sizes = sizes(op, shape)?;
    let count = row_count as u64;
    let stream = device.cuda_stream();
    let (scores, _written) = scores.device_ptr_mut(&stream);
    let mut launch = kernel.builder();
    launch.arg(&scores).arg(&scores).arg(&count).arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&scale);
    // SAFETY: the arguments are those of the kernel, which may write where it reads, and the rows were
    // checked above.
    unsafe { enqueue(&mut launch, rows(row_count, shape.columns)) }
}

/// Turns the first `row_count` rows of gradients of probabilities into gradients of scores where they lie.
pub(super) fn backward_in_place<T: Float>(
    op: &'static str,
    device: &CudaDevice,
    gradients: &mut CudaSlice<T>,
    probabilities: &CudaSlice<T>,
    row_count: usize,
    shape: Rows,
    scale: f32,
) -> Result<()> {
    let shortest = gradients.len().min(probabilities.len());
    assert!(row_count * shape.columns <= shortest, "more rows than gradients");
    let kernel = kernel::<T>(device, "softmax_backward")?;
    let sizes = sizes(op, shape)?;
    let count = row_count as u64;
    let stream = device.cuda_stream();
    let (probabilities, _read) = probabilities.device_ptr(&stream);
    let (gradients, _written) = gradients.device_ptr_mut(&stream);
    let mut launch = kernel.builder();
    launch.arg(&gradients).arg(&gradients).arg(&probabilities).arg(&count);
    launch.arg(&sizes[0]).arg(&sizes[1]).arg(&sizes[2]).arg(&scale);
    // SAFETY: the arguments are those of the kernel, which may write where it reads, and the rows were
    // checked above.
    unsafe { enqueue(&mut launch, rows(row_count, shape.columns)) }
}
