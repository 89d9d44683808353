//! Rows of a table by index.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{allocate, by_dtype, enqueue, module, result, rows, size, tensor, view};
use super::staging;
use crate::ops::embedding::NAME;
use crate::ops::error::OpError;
use crate::ops::input::Input;

module!("embedding");

/// The rows of `weight`, `[V, C]`, that the tokens name. Their values are looked at on the host first: an
/// index out of range is an error, not a wrong address.
pub(in crate::ops) fn forward(
    weight: (&CudaStorage, &Layout),
    tokens: (&CudaStorage, &Layout),
    out_shape: Shape,
) -> Result<(CudaStorage, Shape)> {
    let device = &weight.0.device;
    let (vocabulary_size, width) = weight.1.shape().dims2()?;
    let tokens = view::<u32>(NAME, tokens.0, tokens.1)?;
    staging::look_at(device, &tokens, |tokens| Ok(OpError::check_tokens(NAME, tokens, vocabulary_size)?))?;
    by_dtype!(NAME, weight.0.dtype(), T => {
        let weight = view::<T>(NAME, weight.0, weight.1)?;
        let mut out = allocate::<T>(device, tokens.len() * width)?;
        let kernel = kernel::<T>(device, "embedding_forward")?;
        let (count, columns) = (tokens.len() as u64, size::<u32>(NAME, width)?);
        let mut launch = kernel.builder();
        launch.arg(&mut out).arg(&weight).arg(&tokens).arg(&count).arg(&columns);
        // SAFETY: the arguments are those of the kernel; the table has the row of every token, which was
        // checked above.
        unsafe { enqueue(&mut launch, rows(tokens.len(), width)) }?;
        Ok(result(device, out, out_shape))
    })
}

/// The gradient of the weight, from the contiguous upstream gradient.
pub(in crate::ops) fn backward(weight: &Tensor, tokens: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let width = weight.dim(1)?;
    let (tokens, upstream) = (Input::new(NAME, tokens), Input::new(NAME, grad));
    let device = upstream.cuda_device()?;
    by_dtype!(NAME, weight.dtype(), T => {
        let (tokens, dy) = (tokens.view::<u32>()?, upstream.view::<T>()?);
        let mut gradient = device.alloc_zeros::<T>(weight.elem_count().max(1))?;
        let kernel = kernel::<T>(device, "embedding_backward")?;
        let (count, columns) = (tokens.len() as u64, size::<u32>(NAME, width)?);
        let mut launch = kernel.builder();
        launch.arg(&mut gradient).arg(&dy).arg(&tokens).arg(&count).arg(&columns);
        let config = LaunchConfig { block_dim: (256, 1, 1), ..rows(tokens.len(), width) };
        // SAFETY: the arguments are those of the kernel, which is written for 256 threads; the forward has
        // checked that the table has the row of every token, and there is a row of upstream gradients for
        // each.
        unsafe { enqueue(&mut launch, config) }?;
        Ok(tensor(device, gradient, weight.shape()))
    })
}
