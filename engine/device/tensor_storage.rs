//! Moving storage in and out of tensors that candle's graph already knows.
//!
//! A vacant tensor keeps its identity, shape and type while its storage lies in a tier. Its place is held by
//! a storage of a type that no operation accepts, so using it is an error and never a wrong number.

use crate::error::Error;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail,
};
use std::sync::Mutex;

/// The type of the storage that holds the place of a vacant tensor's.
const VACANT: DType = DType::F6E2M3;

/// Storage of one tensor, on the device that computes.
#[derive(Debug)]
pub struct TensorStorage {
    storage: Storage,
    /// A tensor of ours alone that the storage is taken from, and returns to when it is let go. A tensor
    /// frees what it holds, so one that is let go vacant would take its placeholder with it.
    lender: Option<Tensor>,
}

impl Default for TensorStorage {
    fn default() -> Self {
        Self::none()
    }
}

impl From<Storage> for TensorStorage {
    fn from(storage: Storage) -> Self {
        Self { storage, lender: None }
    }
}

impl Drop for TensorStorage {
    fn drop(&mut self) {
        if let Some(lender) = self.lender.take() {
            let storage = std::mem::replace(&mut self.storage, no_storage());
            // Where it does not go back it is freed, which is what is to happen to it anyway.
            let _ = exchange(&lender, storage).map(keep_placeholder);
        }
    }
}

fn no_storage() -> Storage {
    Storage::Cpu(CpuStorage::F32(vec![]))
}

impl TensorStorage {
    /// No storage: in place of one that is elsewhere, or that a frozen parameter does not have.
    pub fn none() -> Self {
        no_storage().into()
    }

    /// `elements` zeros on a device.
    pub fn zeros(elements: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = Shape::from(elements);
        Ok(match device {
            Device::Cpu => Storage::Cpu(CpuDevice.zeros_impl(&shape, dtype)?),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Storage::Cuda(device.zeros_impl(&shape, dtype)?),
            device => bail!("no parameters can be held on {:?}", device.location()),
        }
        .into())
    }

    /// The storage alone. What it was lent by is let go.
    fn into_storage(mut self) -> Storage {
        self.lender = None;
        std::mem::replace(&mut self.storage, no_storage())
    }

    /// The tensor that the storage is lent by, which is from now on the caller's to keep.
    pub fn take_lender(&mut self) -> Option<Tensor> {
        self.lender.take()
    }

    /// Where the storage goes when it is let go. The tensor must be vacant and nobody else's.
    pub fn set_lender(&mut self, lender: Option<Tensor>) {
        self.lender = lender.filter(|lender| lender.elem_count() == self.elements());
    }

    /// Whether there is no storage.
    pub fn is_none(&self) -> bool {
        self.elements() == 0
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        storage_dtype(&self.storage)
    }

    /// Elements of a floating-point storage; of every other, 0.
    pub fn elements(&self) -> usize {
        elements(&self.storage)
    }

    fn device(&self) -> Device {
        self.storage.device()
    }

    /// The storage, on the CPU device.
    pub fn as_cpu(&self) -> Option<&CpuStorage> {
        match &self.storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// The storage, on the CPU device.
    pub fn as_cpu_mut(&mut self) -> Option<&mut CpuStorage> {
        match &mut self.storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// The numbers, in f32 on the CPU device.
    pub fn as_f32(&self) -> Result<&[f32]> {
        match self.as_cpu() {
            Some(CpuStorage::F32(values)) => Ok(values),
            _ => bail!("storage that is not f32 on the CPU device"),
        }
    }

    /// The numbers, in f32 on the CPU device.
    pub fn as_f32_mut(&mut self) -> Result<&mut [f32]> {
        match self.as_cpu_mut() {
            Some(CpuStorage::F32(values)) => Ok(values),
            _ => bail!("storage that is not f32 on the CPU device"),
        }
    }

    /// The storage, on a CUDA device.
    #[cfg(feature = "cuda")]
    pub fn as_cuda(&self) -> Option<&CudaStorage> {
        match &self.storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    /// The storage, on a CUDA device.
    #[cfg(feature = "cuda")]
    pub fn as_cuda_mut(&mut self) -> Option<&mut CudaStorage> {
        match &mut self.storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    /// A tensor around the storage; `trainable` ones are leaves that get a gradient.
    pub fn into_tensor(self, shape: &Shape, trainable: bool) -> Tensor {
        Tensor::from_storage(self.into_storage(), shape.clone(), BackpropOp::none(), trainable)
    }

    /// The storage as what a custom operation of the CPU device returns.
    pub fn into_cpu(self) -> Result<CpuStorage> {
        match self.into_storage() {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("storage of another device than the CPU"),
        }
    }

    /// The storage as what a custom operation of a CUDA device returns.
    pub fn into_cuda(self) -> Result<CudaStorage> {
        match self.into_storage() {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("storage of another device than a CUDA device"),
        }
    }
}

fn elements(storage: &Storage) -> usize {
    match storage {
        Storage::Cpu(CpuStorage::F32(values)) => values.len(),
        Storage::Cpu(CpuStorage::BF16(values)) => values.len(),
        Storage::Cpu(CpuStorage::F16(values)) => values.len(),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => cuda::elements(storage),
        _ => 0,
    }
}

/// Exchanges the storage of a tensor with the one it carries.
struct Exchange(Mutex<Storage>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "exchange storage"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match self.0.lock().as_deref_mut() {
            Ok(Storage::Cpu(carried)) => std::mem::swap(carried, storage),
            Ok(_) => bail!("exchange storage: the tensor is on the CPU device and its storage is not"),
            Err(_) => bail!("exchange storage: a thread panicked while it moved this storage"),
        }
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        match self.0.lock().as_deref_mut() {
            Ok(Storage::Cuda(carried)) => std::mem::swap(carried, storage),
            Ok(_) => bail!("exchange storage: the tensor is on a CUDA device and its storage is not"),
            Err(_) => bail!("exchange storage: a thread panicked while it moved this storage"),
        }
        Ok(())
    }
}

/// How many placeholders were allocated for the tensors of a device so far, of a byte each.
pub fn placeholders_made(device: &Device) -> u64 {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::made(device),
        _ => 0,
    }
}

fn vacant_storage(device: &Device) -> Result<Storage> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Storage::Cuda(cuda::vacant_storage(device)?)),
        Device::Cpu => Ok(Storage::Cpu(CpuStorage::F6E2M3(vec![]))),
        device => bail!("no parameters can be held on {:?}", device.location()),
    }
}

fn exchange(tensor: &Tensor, storage: Storage) -> Result<Storage> {
    let exchange = Exchange(Mutex::new(storage));
    tensor.inplace_op1(&exchange)?;
    exchange.0.into_inner().map_err(|_| candle_core::Error::Msg("exchange storage: poisoned".into()))
}

/// A tensor of `shape` without storage. `trainable` ones get gradients.
pub fn vacant_tensor(shape: &Shape, dtype: DType, device: &Device, trainable: bool) -> Result<Tensor> {
    // The tensor takes its type from the storage that it is made with, which is let go.
    let tensor = TensorStorage::zeros(1, dtype, device)?.into_tensor(shape, trainable);
    vacate(&tensor)?;
    Ok(tensor)
}

fn storage_dtype(storage: &Storage) -> DType {
    match storage {
        Storage::Cpu(storage) => storage.dtype(),
        Storage::Cuda(storage) => storage.dtype(),
        Storage::Metal(storage) => storage.dtype(),
    }
}

/// Takes the storage out of a tensor.
pub fn take(tensor: &Tensor) -> Result<TensorStorage> {
    if is_vacant(tensor) {
        bail!("this tensor has no storage to take: was it used after its release?")
    }
    Ok(exchange(tensor, vacant_storage(tensor.device())?)?.into())
}

/// Makes a tensor vacant and frees what it held.
pub fn vacate(tensor: &Tensor) -> Result<()> {
    exchange(tensor, vacant_storage(tensor.device())?).map(drop)
}

/// Gives a vacant tensor its storage.
pub fn fill(tensor: &Tensor, run: TensorStorage) -> Result<()> {
    if run.elements() != tensor.elem_count() {
        bail!("storage of {} elements for a tensor of shape {:?}", run.elements(), tensor.shape());
    }
    if storage_dtype(&run.storage) != tensor.dtype() {
        bail!("storage of type {:?} for a tensor of type {:?}", storage_dtype(&run.storage), tensor.dtype());
    }
    exchange(tensor, run.into_storage()).map(keep_placeholder)
}

/// The storage of a vacant tensor that got another one, for the next tensor that becomes vacant.
fn keep_placeholder(placeholder: Storage) {
    #[cfg(feature = "cuda")]
    cuda::keep_placeholder(placeholder);
    #[cfg(not(feature = "cuda"))]
    drop(placeholder);
}

/// Takes the storage out of a tensor that is nobody else's. When it is let go it goes back, and the tensor
/// with it.
fn lend(tensor: Tensor) -> Result<TensorStorage> {
    let mut run = take(&tensor)?;
    // The tensor, and not what it was computed from.
    run.set_lender(Some(tensor.detach()));
    Ok(run)
}

/// Leaves of segments' own graphs that are vacant at the moment. A leaf that is used again keeps its
/// placeholder.
#[derive(Debug, Default)]
pub struct Leaves(Mutex<Vec<Tensor>>);

impl Leaves {
    /// As many as are ever used at once are kept.
    const KEPT: usize = 4;

    /// A leaf around the storage.
    pub fn fill(&self, run: TensorStorage, shape: &Shape) -> Result<Tensor> {
        let kept = self.0.lock().ok().and_then(|mut kept| {
            let fits = |leaf: &Tensor| {
                let of_device = leaf.device().same_device(&run.device());
                leaf.shape() == shape && leaf.dtype() == storage_dtype(&run.storage) && of_device
            };
            let index = kept.iter().position(fits)?;
            Some(kept.swap_remove(index))
        });
        let Some(leaf) = kept else { return Ok(run.into_tensor(shape, true)) };
        fill(&leaf, run)?;
        Ok(leaf)
    }

    /// The storage of a leaf that is not needed any more.
    pub fn take(&self, leaf: &Tensor) -> Result<TensorStorage> {
        let run = take(leaf)?;
        if let Ok(mut kept) = self.0.lock()
            && kept.len() < Self::KEPT
        {
            kept.push(leaf.clone());
        }
        Ok(run)
    }
}

/// Whether the tensor has no storage.
pub fn is_vacant(tensor: &Tensor) -> bool {
    let (storage, _) = tensor.storage_and_layout();
    storage_dtype(&storage) == VACANT && tensor.dtype() != VACANT
}

/// Whether an error came of using a tensor without storage.
pub fn is_of_vacant(error: &Error) -> bool {
    error.to_string().contains(&format!("{VACANT:?}"))
}

/// Whether the whole storage of a tensor is its own elements in order, so that it can be taken and given
/// back.
pub fn owns_plain_storage(tensor: &Tensor) -> bool {
    let (storage, layout) = tensor.storage_and_layout();
    layout.is_contiguous()
        && layout.start_offset() == 0
        && elements(&storage) == layout.shape().elem_count()
        && storage_dtype(&storage) == tensor.dtype()
}

/// Whether two tensors are views of one storage.
pub fn share_storage(one: &Tensor, other: &Tensor) -> bool {
    let address = |tensor: &Tensor| std::ptr::from_ref::<Storage>(&tensor.storage_and_layout().0) as usize;
    address(one) == address(other)
}

/// Runs something on the elements of a tensor as they lie, where they are one run on the CPU device.
pub fn with_cpu<T>(tensor: &Tensor, run: impl FnOnce(&CpuStorage) -> T) -> Option<T> {
    if !owns_plain_storage(tensor) {
        return None;
    }
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(storage) => Some(run(storage)),
        _ => None,
    }
}

/// A copy of the elements as one run.
pub fn copy(tensor: &Tensor) -> Result<TensorStorage> {
    take(&tensor.detach().force_contiguous()?)
}

/// Takes the elements of a tensor that is nobody else's out as one run, copying only where they are not
/// already one.
pub fn into_run(tensor: Tensor) -> Result<TensorStorage> {
    if owns_plain_storage(&tensor) { lend(tensor) } else { lend(tensor.detach().force_contiguous()?) }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
    use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
    use std::sync::{Arc, PoisonError};

    /// Placeholders of one stream.
    struct Kept {
        stream: Arc<CudaStream>,
        /// Those that no tensor needs at the moment, so that moving storage allocates nothing.
        free: Vec<CudaSlice<u8>>,
        /// How many were allocated.
        made: u64,
    }

    static PLACEHOLDERS: Mutex<Vec<Kept>> = Mutex::new(vec![]);

    fn of_stream<T>(stream: &Arc<CudaStream>, run: impl FnOnce(&mut Kept) -> T) -> T {
        // Counted and listed in one go each, so whole after a panic elsewhere too.
        let mut all = PLACEHOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        let index = all.iter().position(|kept| &kept.stream == stream).unwrap_or_else(|| {
            all.push(Kept { stream: stream.clone(), free: vec![], made: 0 });
            all.len() - 1
        });
        run(&mut all[index])
    }

    pub(super) fn made(device: &candle_core::CudaDevice) -> u64 {
        of_stream(&device.cuda_stream(), |kept| kept.made)
    }

    pub(super) fn elements(storage: &CudaStorage) -> usize {
        match &storage.slice {
            CudaStorageSlice::F32(values) => values.len(),
            CudaStorageSlice::BF16(values) => values.len(),
            CudaStorageSlice::F16(values) => values.len(),
            _ => 0,
        }
    }

    pub(super) fn vacant_storage(device: &candle_core::CudaDevice) -> Result<CudaStorage> {
        let stream = device.cuda_stream();
        let placeholder = match of_stream(&stream, |kept| kept.free.pop()) {
            Some(placeholder) => placeholder,
            // One byte: the driver gives no address for none.
            None => {
                let placeholder = stream.alloc_zeros::<u8>(1).w()?;
                of_stream(&stream, |kept| kept.made += 1);
                placeholder
            }
        };
        Ok(CudaStorage { slice: CudaStorageSlice::F6E2M3(placeholder), device: device.clone() })
    }

    pub(super) fn keep_placeholder(storage: Storage) {
        if let Storage::Cuda(CudaStorage { slice: CudaStorageSlice::F6E2M3(placeholder), .. }) = storage {
            of_stream(&placeholder.stream().clone(), |kept| kept.free.push(placeholder));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vacant_tensor_refuses_every_use_and_comes_back_with_its_values() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let tensor = vacant_tensor(&Shape::from((2, 2)), dtype, &Device::Cpu, true)?;
            let other = Tensor::ones((2, 2), dtype, &Device::Cpu)?;
            assert!(is_vacant(&tensor));
            assert_eq!(tensor.dtype(), dtype);
            assert!((&tensor + &other).is_err());
            assert!(tensor.matmul(&other).is_err());
            assert!(other.matmul(&tensor).is_err());
            assert!(tensor.t()?.contiguous().is_err());
            assert!(tensor.sum_all().is_err());
            assert!(tensor.gelu().is_err());
            assert!(tensor.to_vec2::<f32>().is_err());
            let values = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?.to_dtype(dtype)?;
            fill(&tensor, take(&values)?)?;
            let product = tensor.matmul(&other)?.to_dtype(DType::F32)?;
            assert_eq!(product.to_vec2::<f32>()?, [[3., 3.], [7., 7.]]);
            assert_eq!(take(&tensor)?.elements(), 4);
            assert!(take(&tensor).is_err());
            assert!(fill(&tensor, TensorStorage::zeros(3, dtype, &Device::Cpu)?).is_err());
            let wrong = if dtype == DType::F32 { DType::BF16 } else { DType::F32 };
            assert!(fill(&tensor, TensorStorage::zeros(4, wrong, &Device::Cpu)?).is_err());
        }
        Ok(())
    }
}
