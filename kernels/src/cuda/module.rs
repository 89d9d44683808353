//! Modules of kernels, loaded once a device.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, LaunchConfig};

use super::error::{CudaError, Doing};

/// The PTX that `build.rs` made of `cuda/$name.cu`.
macro_rules! ptx {
    ($name:literal) => {
        include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx"))
    };
}

/// Threads of a thread block where a kernel does not ask for another number.
const BLOCK_THREADS: u32 = 256;
/// Thread blocks a multiprocessor: enough to keep its memory requests coming, few enough to be started once.
const BLOCKS_A_PROCESSOR: u32 = 8;

/// The loops over runs, loaded on one device. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kernels {
    pub(super) adamw: Arc<CudaModule>,
    pub(super) gradient: Arc<CudaModule>,
    pub(super) convert: Arc<CudaModule>,
    processors: u32,
}

impl Kernels {
    /// Loads them. A candle device's context is that of its stream.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if the driver refuses them, as one that is older than the toolkit does.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self, CudaError> {
        let load = |ptx: &str| context.load_module(ptx.into()).doing("loading kernels");
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(processors).doing("asking for the number of multiprocessors")?;
        Ok(Self {
            adamw: load(ptx!("adamw"))?,
            gradient: load(ptx!("gradient"))?,
            convert: load(ptx!("convert"))?,
            processors: u32::try_from(processors).unwrap_or(1).max(1),
        })
    }

    /// A launch of at most as many thread blocks as the device runs at once; `units` are what `unit_threads`
    /// threads do.
    pub(super) fn launch_for(&self, units: usize, unit_threads: u32) -> LaunchConfig {
        let blocks = units.div_ceil((BLOCK_THREADS / unit_threads) as usize);
        let blocks = super::blocks(blocks, (self.processors * BLOCKS_A_PROCESSOR) as usize);
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (BLOCK_THREADS, 1, 1), shared_mem_bytes: 0 }
    }
}

/// A kernel of a module.
pub(super) fn function(module: &Arc<CudaModule>, name: &str) -> Result<CudaFunction, CudaError> {
    module.load_function(name).doing("looking a kernel up")
}
