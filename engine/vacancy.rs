//! Moving storage in and out of tensors that candle's graph already knows.
//!
//! A vacant tensor keeps its identity, shape and type while its storage lies in a tier. Its place is held by an
//! empty storage of a type that no operation accepts, so using it is an error and never a wrong number.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail};
use std::sync::Mutex;

/// Storage of one f32 tensor on the device: the CPU device's is a vector.
pub type DeviceRun = Vec<f32>;

/// Exchanges the storage of a tensor with the one it carries.
struct Exchange(Mutex<CpuStorage>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "exchange storage"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match self.0.lock() {
            Ok(mut carried) => std::mem::swap(&mut *carried, storage),
            Err(_) => bail!("exchange storage: a thread panicked while it moved this storage"),
        }
        Ok(())
    }

    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        bail!("segments on CUDA devices are not built yet: use Device::Cpu")
    }
}

fn vacant_storage() -> CpuStorage {
    CpuStorage::F6E2M3(Vec::new())
}

fn exchange(tensor: &Tensor, storage: CpuStorage) -> Result<CpuStorage> {
    let exchange = Exchange(Mutex::new(storage));
    tensor.inplace_op1(&exchange)?;
    exchange.0.into_inner().map_err(|_| candle_core::Error::Msg("exchange storage: poisoned".into()))
}

/// A tensor of `shape` without storage, of type f32. `trainable` ones get gradients.
pub fn vacant_tensor(shape: &Shape, trainable: bool) -> Result<Tensor> {
    let storage = Storage::Cpu(CpuStorage::F32(Vec::new()));
    let tensor = Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), trainable);
    vacate(&tensor)?;
    Ok(tensor)
}

/// Takes the storage out of an f32 tensor.
pub fn take(tensor: &Tensor) -> Result<DeviceRun> {
    match exchange(tensor, vacant_storage())? {
        CpuStorage::F32(values) => Ok(values),
        other => {
            let dtype = other.dtype();
            exchange(tensor, other)?;
            bail!(
                "this tensor has no f32 storage to take (it holds {dtype:?}): was it used after its release?"
            )
        }
    }
}

/// Makes a tensor vacant and frees what it held.
pub fn vacate(tensor: &Tensor) -> Result<()> {
    exchange(tensor, vacant_storage()).map(drop)
}

/// Gives a vacant tensor its storage.
pub fn fill(tensor: &Tensor, values: DeviceRun) -> Result<()> {
    if values.len() != tensor.elem_count() {
        bail!("storage of {} elements for a tensor of shape {:?}", values.len(), tensor.shape());
    }
    exchange(tensor, CpuStorage::F32(values)).map(drop)
}

/// Whether the tensor has storage.
pub fn is_vacant(tensor: &Tensor) -> bool {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => !matches!(storage.dtype(), DType::F32) && tensor.dtype() == DType::F32,
        _ => false,
    }
}

/// Whether the whole storage of an f32 tensor is its own elements in order, so that it can be taken and given back.
pub fn owns_plain_storage(tensor: &Tensor) -> bool {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            layout.is_contiguous()
                && layout.start_offset() == 0
                && values.len() == layout.shape().elem_count()
        }
        _ => false,
    }
}

/// Address of the first element, to see whether two tensors share storage.
pub fn address(tensor: &Tensor) -> Option<usize> {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Some(values.as_ptr() as usize),
        _ => None,
    }
}

/// Takes the elements of an f32 tensor out as one run, copying only where they are not already one.
pub fn into_run(tensor: &Tensor) -> Result<DeviceRun> {
    if owns_plain_storage(tensor) { take(tensor) } else { tensor.flatten_all()?.to_vec1::<f32>() }
}

/// A trainable leaf that holds `values`.
pub fn leaf(values: DeviceRun, shape: &Shape) -> Tensor {
    Tensor::from_storage(Storage::Cpu(CpuStorage::F32(values)), shape.clone(), BackpropOp::none(), true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_vacant_tensor_refuses_every_use_and_comes_back_with_its_values() -> Result<()> {
        let tensor = vacant_tensor(&Shape::from((2, 2)), true)?;
        let other = Tensor::ones((2, 2), DType::F32, &Device::Cpu)?;
        assert!(is_vacant(&tensor));
        assert!((&tensor + &other).is_err());
        assert!(tensor.matmul(&other).is_err());
        assert!(other.matmul(&tensor).is_err());
        assert!(tensor.t()?.contiguous().is_err());
        assert!(tensor.sum_all().is_err());
        assert!(tensor.gelu().is_err());
        assert!(tensor.to_vec2::<f32>().is_err());
        fill(&tensor, vec![1., 2., 3., 4.])?;
        assert_eq!(tensor.matmul(&other)?.to_vec2::<f32>()?, [[3., 3.], [7., 7.]]);
        assert_eq!(take(&tensor)?, [1., 2., 3., 4.]);
        assert!(take(&tensor).is_err());
        assert!(fill(&tensor, vec![0.; 3]).is_err());
        Ok(())
    }
}
