//! GELU, SiLU and SwiGLU.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{allocate, by_dtype, enqueue, module, result, size, tensor, threads, view};
use crate::ops::input::Input;

module!("activation");

/// `op`, which is `gelu` or `silu`, of every element.
pub(in crate::ops) fn forward(
    op: &'static str,
    xs: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    by_dtype!(op, xs.dtype(), T => {
        let x = view::<T>(op, xs, layout)?;
        let mut out = allocate::<T>(&xs.device, x.len())?;
        let kernel = kernel::<T>(&xs.device, &format!("{op}_forward"))?;
        let elements = x.len() as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&x).arg(&elements);
        // SAFETY: the arguments are those of the kernel, and both runs have `elements` elements.
        unsafe { enqueue(&mut launch, threads(x.len().div_ceil(4))) }?;
        Ok(result(&xs.device, out, layout.shape()))
    })
}

/// The gradient of the input of [`forward`].
pub(in crate::ops) fn backward(op: &'static str, xs: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let grad = grad.contiguous()?;
    let (input, upstream) = (Input::new(op, xs), Input::new(op, &grad));
    let device = input.cuda_device()?;
    by_dtype!(op, xs.dtype(), T => {
        let (x, dy) = (input.view::<T>()?, upstream.view::<T>()?);
        let mut dx = allocate::<T>(device, x.len())?;
        let kernel = kernel::<T>(device, &format!("{op}_backward"))?;
        let elements = x.len() as u64;
        let mut launch = kernel.builder();
        launch.arg(&mut dx).arg(&x).arg(&dy).arg(&elements);
        // SAFETY: the arguments are those of the kernel, and all runs have `elements` elements.
        unsafe { enqueue(&mut launch, threads(x.len().div_ceil(4))) }?;
        Ok(tensor(device, dx, xs.shape()))
    })
}

const SWIGLU: &str = "swiglu";

/// `silu(gate)·up` of rows that are `width` gates and `width` others.
pub(in crate::ops) fn swiglu_forward(
    xs: &CudaStorage,
    layout: &Layout,
    width: usize,
    out_shape: Shape,
) -> Result<(CudaStorage, Shape)> {
    by_dtype!(SWIGLU, xs.dtype(), T => {
        let x = view::<T>(SWIGLU, xs, layout)?;
        let count = x.len() / 2;
        let mut out = allocate::<T>(&xs.device, count)?;
        let kernel = kernel::<T>(&xs.device, "swiglu_forward")?;
        let (elements, width) = (count as u64, size::<u32>(SWIGLU, width)?);
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&x).arg(&elements).arg(&width);
        // SAFETY: the arguments are those of the kernel; the input has twice the `elements` of the output, in
        // rows of twice the width.
        unsafe { enqueue(&mut launch, threads(count.div_ceil(4))) }?;
        Ok(result(&xs.device, out, out_shape))
    })
}

/// The gradient of the input of [`swiglu_forward`].
pub(in crate::ops) fn swiglu_backward(xs: &Tensor, grad: &Tensor, width: usize) -> Result<Tensor> {
    let grad = grad.contiguous()?;
    let (input, upstream) = (Input::new(SWIGLU, xs), Input::new(SWIGLU, &grad));
    let device = input.cuda_device()?;
    by_dtype!(SWIGLU, xs.dtype(), T => {
        let (x, dy) = (input.view::<T>()?, upstream.view::<T>()?);
        let mut dx = allocate::<T>(device, x.len())?;
        let kernel = kernel::<T>(device, "swiglu_backward")?;
        let (elements, width) = (dy.len() as u64, size::<u32>(SWIGLU, width)?);
        let mut launch = kernel.builder();
        launch.arg(&mut dx).arg(&x).arg(&dy).arg(&elements).arg(&width);
        // SAFETY: the arguments are those of the kernel; input and its gradient have twice the `elements` of
        // the upstream gradient, in rows of twice the width.
        unsafe { enqueue(&mut launch, threads(dy.len().div_ceil(4))) }?;
        Ok(tensor(device, dx, xs.shape()))
    })
}
