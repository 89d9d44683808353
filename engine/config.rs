//! Settings of a run, as a user's code gives them.

#[cfg(feature = "testing")]
use crate::device::compute::CudaFault;
use crate::execution::initial_values::InitialValues;
use crate::planner::machine::Machine;
use crate::planner::plan::{Placement, Updates};
use candle_core::{DType, Device};
use ferrozero_kernels::ops::Products;
#[cfg(feature = "testing")]
use ferrozero_offload::Throttle;
#[cfg(feature = "testing")]
use ferrozero_offload::io::FaultPlan;
use ferrozero_offload::{BackendChoice, Tier};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Settings of an engine. Everything has a default; what is none is found out or not limited.
#[derive(Debug, Clone)]
pub struct Config {
    /// The device that computes: the CPU device, or one that [`open_device`](crate::open_device) made.
    pub device: Device,
    /// The type of parameters, gradients and boundary activations on the device: f32, bf16 or f16. Masters,
    /// moments and accumulated gradients are f32 always.
    pub dtype: DType,
    /// What the model's linear layers and losses multiply matrices of f32 by on the CPU device: f32, or bf16
    /// where the processor has matrix tiles for that. It changes bits, and is as fast as bf16 there;
    /// everything else is computed in f32.
    pub products: Products,
    /// Bytes of host memory for everything that the engine uses, and on the CPU device for the model's
    /// tensors too: there it needs [`CountingAllocator`](crate::CountingAllocator), which counts them, or
    /// `working_bytes`.
    pub memory_bytes: Option<u64>,
    /// Bytes that may be device memory.
    pub device_memory_bytes: Option<u64>,
    /// Bytes that the model's own tensors take on a device whose driver does not count them. Where neither is
    /// known, no states come home to the device by themselves.
    pub working_bytes: Option<u64>,
    /// Folder of the state on disk, which is the checkpoint. Without one there is no disk tier and no commit.
    pub directory: Option<PathBuf>,
    /// More folders, on other disks, that the state is dealt out to. A run that resumes finds its own.
    pub stripes: Vec<PathBuf>,
    /// Keeps the state on disk once and not twice, which **gives up crash safety**: a run that is killed
    /// between two commits cannot be resumed. A run that resumes stays as it was made.
    pub in_place: bool,
    /// Opens the last commit in `directory` instead of starting anew.
    pub resume: bool,
    /// Homes of the state streams.
    pub placement: Placement,
    /// Home of boundary activations; none: what makes steps shortest.
    pub boundaries: Option<Tier>,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Largest gradient norm that is not scaled down; none: no clipping.
    pub clip: Option<f64>,
    /// Where initial values come from; none: the random numbers that the model's `Init`s say.
    pub initial_values: Option<Arc<dyn InitialValues>>,
    /// Seed of the initial values.
    pub seed: u64,
    /// Threads of the host's arithmetic; none: one a processor.
    pub threads: Option<usize>,
    /// What moves the bytes of the disk tier.
    pub backend: BackendChoice,
    /// Bytes of a piece, a multiple of 4 KiB; none: 4 MiB. A run that resumes keeps those of its checkpoint.
    pub piece_bytes: Option<usize>,
    /// Slots of each class of groups; none: what makes steps shortest.
    pub slots: Option<usize>,
    /// Pieces of parameters that may be read ahead of their upload; none: what makes steps shortest.
    pub look_ahead: Option<usize>,
    /// Pieces that are between disk and optimizer at once, a multiple of four; none: what makes steps
    /// shortest.
    pub state_pieces: Option<usize>,
    /// Groups whose gradients may be on the device at once; none: what makes steps shortest.
    pub gradient_sets: Option<usize>,
    /// When updates are made that clipping makes wait for the norm; none: what makes steps shortest.
    pub updates: Option<Updates>,
    /// Micro-batches that run vertically, all of them through a segment before the next one, so that its
    /// parameters cross once for all; none: what makes steps shortest.
    pub vertical: Option<usize>,
    /// The longest that a micro-batch's own code may take from one segment to the next while others of its
    /// step wait for it; the step then fails. It ends a wait for what one of those holds.
    pub turn_limit: Duration,
    /// Calls of segments that keep the graph of their forward, from the last one on, and are not computed
    /// again in the backward; none: what makes steps shortest, within the limit of memory.
    pub kept: Option<usize>,
    /// How fast the machine is, from `ferrozero probe`; none: measured when the plan is made, in less than a
    /// second.
    pub machine: Option<Machine>,
    /// Faults that the disk tier acts out, for tests.
    #[cfg(feature = "testing")]
    pub faults: Option<FaultPlan>,
    /// Bandwidths of a slower disk, for tests and measurements.
    #[cfg(feature = "testing")]
    pub throttle: Option<Throttle>,
    /// A call of the CUDA driver's that fails, for tests.
    #[cfg(feature = "testing")]
    pub cuda_fault: Option<CudaFault>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            products: Products::F32,
            memory_bytes: None,
            device_memory_bytes: None,
            working_bytes: None,
            directory: None,
            stripes: vec![],
            in_place: false,
            resume: false,
            placement: Placement::Auto,
            boundaries: None,
            accumulate: 1,
            clip: None,
            initial_values: None,
            seed: 0,
            threads: None,
            backend: BackendChoice::Auto,
            piece_bytes: None,
            slots: None,
            look_ahead: None,
            state_pieces: None,
            gradient_sets: None,
            updates: None,
            vertical: None,
            turn_limit: Duration::from_secs(300),
            kept: None,
            machine: None,
            #[cfg(feature = "testing")]
            faults: None,
            #[cfg(feature = "testing")]
            throttle: None,
            #[cfg(feature = "testing")]
            cuda_fault: None,
        }
    }
}
