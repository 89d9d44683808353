//! Access to the elements of candle tensors on the CPU.

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType};

use super::error::OpError;

/// The elements of a contiguous CPU storage, as the forward of an operation receives it.
pub(super) fn elements<'a, T: WithDType>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    if dtype != T::DTYPE {
        let expected = T::DTYPE;
        return Err(OpError::DType { op, dtype, expected }.into());
    }
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op }),
    }
}

/// A tensor that a backward reads: holds the lock of its storage.
pub(super) struct Input<'a> {
    op: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Input<'a> {
    /// Locks the storage of a contiguous tensor for reading.
    pub(super) fn new(op: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Input { op, storage, layout }
    }

    /// The operation that asked.
    #[cfg(feature = "cuda")]
    pub(super) fn op(&self) -> &'static str {
        self.op
    }

    /// The storage on a CUDA device, and where the elements lie in it.
    #[cfg(feature = "cuda")]
    pub(super) fn cuda_storage(&self) -> Result<(&candle_core::CudaStorage, &Layout)> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok((storage, self.layout)),
            other => Err(OpError::Device { op: self.op, device: other.device().location() }.into()),
        }
    }

    /// The elements, row-major.
    pub(super) fn elements<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => elements(self.op, storage, self.layout),
            other => Err(OpError::Device { op: self.op, device: other.device().location() }.into()),
        }
    }
}

/// Wraps elements that an operation computed on the CPU, without a copy.
pub(super) fn cpu_tensor(elements: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(elements, like.shape(), like.device())
}
