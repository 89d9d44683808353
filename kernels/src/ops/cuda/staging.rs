//! Tokens on their way between host and device, by way of page-locked memory that is kept.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaView};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Shape, Storage, Tensor};

use crate::cuda::Pinned;

/// Of each context that was used, the memory.
static STAGING: Mutex<Vec<(Arc<CudaContext>, Pinned<u32>)>> = Mutex::new(vec![]);

/// Runs `copy` with memory for `elements`.
fn staged<T>(
    device: &CudaDevice,
    elements: usize,
    copy: impl FnOnce(&mut Pinned<u32>) -> Result<T>,
) -> Result<T> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let mut kept = STAGING.lock().unwrap_or_else(PoisonError::into_inner);
    let of_context = kept.iter().position(|(of, _)| of.cu_ctx() == context.cu_ctx());
    let index = match of_context {
        Some(index) if kept[index].1.elements() >= elements => index,
        too_small => {
            let larger =
                Pinned::new(context, elements.next_power_of_two()).map_err(candle_core::Error::wrap)?;
            if let Some(index) = too_small {
                kept.swap_remove(index);
            }
            kept.push((context.clone(), larger));
            kept.len() - 1
        }
    };
    copy(&mut kept[index].1)
}

/// Looks at tokens on the host, once the device has them.
pub(super) fn look_at(
    device: &CudaDevice,
    tokens: &CudaView<'_, u32>,
    check: impl FnOnce(&[u32]) -> Result<()>,
) -> Result<()> {
    staged(device, tokens.len(), |memory| {
        check(memory.fetch(&device.cuda_stream(), tokens).map_err(candle_core::Error::wrap)?)
    })
}

/// Tokens of the host on the device.
pub(in crate::ops) fn send(device: &CudaDevice, tokens: &[u32], shape: &Shape) -> Result<Tensor> {
    let mut on_device = super::launch::allocate_words(device, tokens.len())?;
    if !tokens.is_empty() {
        staged(device, tokens.len(), |memory| {
            let mut to = on_device.slice_mut(..tokens.len());
            memory.send(&device.cuda_stream(), tokens, &mut to).map_err(candle_core::Error::wrap)
        })?;
    }
    let storage = CudaStorage { slice: CudaStorageSlice::U32(on_device), device: device.clone() };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false))
}
