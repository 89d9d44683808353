//! A value that is not computed.

use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaStorage, DType, Result, bail};

use super::launch::allocate;

/// One element of the type of `like`, for [`vacate`] to take away.
pub(in crate::ops) fn no_value(like: &CudaStorage) -> Result<CudaStorage> {
    use candle_core::backend::BackendStorage;
    let slice = match like.dtype() {
        DType::F32 => CudaStorageSlice::F32(allocate(&like.device, 1)?),
        DType::BF16 => CudaStorageSlice::BF16(allocate(&like.device, 1)?),
        DType::F16 => CudaStorageSlice::F16(allocate(&like.device, 1)?),
        dtype => bail!("closing_linear: the residual is of type {dtype:?}; use f32, bf16 or f16"),
    };
    Ok(CudaStorage { slice, device: like.device.clone() })
}

/// Puts a storage in place that no operation accepts.
pub(in crate::ops) fn vacate(storage: &mut CudaStorage) -> Result<()> {
    // One byte: the driver gives no address for none.
    storage.slice = CudaStorageSlice::F6E2M3(storage.device.cuda_stream().alloc_zeros::<u8>(1).w()?);
    Ok(())
}
