//! What the launches of all operations share: element types, inputs, results, kernels by name, sizes of
//! grids.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::sys::cudaDataType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, LaunchArgs, LaunchConfig, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Layout, Result, Shape, Storage, Tensor, WithDType};
use half::{bf16, f16};

use crate::cuda::{CudaElement, blocks};
use crate::ops::error::OpError;
use crate::ops::input::Input;

/// A type that the elements of a tensor may have.
pub(super) trait Float: CudaElement + CudaDType + WithDType + ValidAsZeroBits {
    /// The name of the type in cuBLAS.
    const CUBLAS: cudaDataType;
}

impl Float for f32 {
    const CUBLAS: cudaDataType = cudaDataType::CUDA_R_32F;
}

impl Float for bf16 {
    const CUBLAS: cudaDataType = cudaDataType::CUDA_R_16BF;
}

impl Float for f16 {
    const CUBLAS: cudaDataType = cudaDataType::CUDA_R_16F;
}

/// Evaluates an expression in which `$float` is the [`Float`] of a dtype.
macro_rules! by_dtype {
    ($op:expr, $dtype:expr, $float:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $float = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $float = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $float = half::f16;
                $body
            }
            dtype => {
                let expected = candle_core::DType::F32;
                Err(crate::ops::error::OpError::DType { op: $op, dtype, expected }.into())
            }
        }
    };
}
pub(super) use by_dtype;

/// The elements of a contiguous storage.
pub(super) fn view<'a, T: CudaDType + WithDType>(
    op: &'static str,
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    if dtype != T::DTYPE {
        return Err(OpError::DType { op, dtype, expected: T::DTYPE }.into());
    }
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => Err(candle_core::Error::RequiresContiguous { op }),
    }
}

impl Input<'_> {
    /// The elements on a CUDA device, row-major.
    pub(super) fn view<T: CudaDType + WithDType>(&self) -> Result<CudaView<'_, T>> {
        let (storage, layout) = self.cuda_storage()?;
        view(self.op(), storage, layout)
    }

    /// The device that they are on.
    pub(super) fn cuda_device(&self) -> Result<&CudaDevice> {
        Ok(&self.cuda_storage()?.0.device)
    }
}

/// Memory for a result, which the caller fills before anything reads it.
pub(super) fn allocate<T: Float>(device: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every element is written by the kernel or product that the caller enqueues next. At least one
    // element, because not every driver allocates nothing.
    unsafe { device.alloc(elements.max(1)) }
}

/// Memory for tokens, which the caller fills before anything reads it.
pub(super) fn allocate_words(device: &CudaDevice, elements: usize) -> Result<CudaSlice<u32>> {
    // SAFETY: as in `allocate`.
    unsafe { device.alloc(elements.max(1)) }
}

/// The result of a forward.
pub(super) fn result<T: Float>(
    device: &CudaDevice,
    elements: CudaSlice<T>,
    shape: impl Into<Shape>,
) -> (CudaStorage, Shape) {
    (CudaStorage::wrap_cuda_slice(elements, device.clone()), shape.into())
}

/// A gradient.
pub(super) fn tensor<T: Float>(device: &CudaDevice, elements: CudaSlice<T>, shape: &Shape) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(elements, device.clone()));
    Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false)
}

/// A size as kernels and cuBLAS take it.
///
/// # Errors
/// [`OpError::TooLarge`] beyond 2^31 − 1.
pub(super) fn size<N: TryFrom<usize> + TryInto<i32> + Copy>(op: &'static str, elements: usize) -> Result<N> {
    let size = N::try_from(elements).ok().filter(|&size| size.try_into().is_ok());
    size.ok_or_else(|| OpError::TooLarge { op, elements }.into())
}

/// Threads of a block whose threads work alone.
const THREADS: usize = 256;
/// Blocks that a launch asks for at most; each then takes several units of work. Many times what any device
/// runs at once.
const BLOCKS: usize = 1 << 14;

/// One thread for each of `units`.
pub(super) fn threads(units: usize) -> LaunchConfig {
    let blocks = blocks(units.div_ceil(THREADS), BLOCKS);
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 }
}

/// One thread block for each of `rows`, with about a thread for every four of `width` elements.
pub(super) fn rows(rows: usize, width: usize) -> LaunchConfig {
    let threads = width.div_ceil(4).next_multiple_of(32).clamp(32, THREADS) as u32;
    let blocks = blocks(rows, BLOCKS);
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Enqueues a launch, unless there is nothing to do.
///
/// # Safety
/// As [`LaunchArgs::launch`]: the arguments are those of the kernel, which stays within them.
pub(super) unsafe fn enqueue(launch: &mut LaunchArgs<'_>, config: LaunchConfig) -> Result<()> {
    if config.grid_dim.0 > 0 && config.grid_dim.1 > 0 {
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.w()?;
    }
    Ok(())
}

/// A kernel, and the stream of the device that it is launched on.
pub(super) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// Finds the kernel `name` in a module, which is loaded when it is first asked for.
    pub(super) fn find(device: &CudaDevice, module: &str, ptx: &str, name: &str) -> Result<Self> {
        let function = device.get_or_load_custom_func(name, module, ptx)?.into_cuda_function();
        Ok(Self { function, stream: device.cuda_stream() })
    }

    /// Starts a launch, which takes the kernel's arguments in order.
    pub(super) fn builder(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

/// Defines what looks kernels of `cuda/$module.cu` up: `kernel_named`, and `kernel`, which adds the element
/// type to the name.
macro_rules! module {
    ($module:literal) => {
        fn kernel_named(
            device: &candle_core::cuda_backend::CudaDevice,
            name: &str,
        ) -> candle_core::Result<super::launch::Kernel> {
            let ptx = include_str!(concat!(env!("OUT_DIR"), "/", $module, ".ptx"));
            super::launch::Kernel::find(device, concat!("ferrozero ", $module), ptx, name)
        }

        fn kernel<T: super::launch::Float>(
            device: &candle_core::cuda_backend::CudaDevice,
            name: &str,
        ) -> candle_core::Result<super::launch::Kernel> {
            kernel_named(device, &format!("{name}_{}", T::SUFFIX))
        }
    };
}
pub(super) use module;
