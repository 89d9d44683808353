//! ferrozero trains models that are larger than the memory of the machine that trains them.
//!
//! Optimizer state, gradients, parameters and boundary activations live where a plan puts them (device
//! memory, host memory, disk), move just in time, and move while something computes. Where they are never
//! changes what comes out: losses and weights have the same bits under every placement.
//!
//! ```
//! use ferrozero::candle_core::{self, DType, Device, Module, Tensor};
//! use ferrozero::{AdamW, Engine, candle_nn, ops};
//!
//! // Counts what candle's tensors take, for `memory_bytes`.
//! #[global_allocator]
//! static ALLOCATOR: ferrozero::CountingAllocator = ferrozero::CountingAllocator;
//!
//! /// A part of a model: plain candle.
//! struct Block {
//!     weight: Tensor,
//! }
//!
//! impl Module for Block {
//!     fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
//!         xs + ops::gelu(&ops::linear(xs, &self.weight, None)?)?
//!     }
//! }
//!
//! # fn main() -> ferrozero::Result<()> {
//! let engine = Engine::builder().memory_bytes(256 << 20).build()?;
//! let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
//! let blocks = engine.segments("h", 4, |_, vb| {
//!     Ok(Block { weight: vb.get_with_hints((64, 64), "weight", init)? })
//! })?;
//! let inputs = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
//! let loss = |_| blocks.iter().try_fold(inputs.clone(), |xs, block| block.forward(&xs))?.sqr()?.mean_all();
//! let mut trainer = engine.trainer(AdamW::default(), loss)?; // rehearses the loss, plans, and allocates
//! println!("{}", trainer.plan());
//! let first = trainer.step(loss)?; // instead of loss.backward() and optimizer.step()
//! let second = trainer.step(loss)?;
//! assert!(second.loss < first.loss);
//! # Ok(())
//! # }
//! ```
//!
//! # Memory
//!
//! | tier | what lies there | bounded by |
//! |---|---|---|
//! | device | slots that groups take turns in, the resident group, the model's own tensors | the plan; checked against a counting allocator |
//! | host | pieces of state at home, pieces on their way | one arena, made once |
//! | disk | everything else, in two places of which the last commit holds one | files reserved before the first step |
//!
//! What is within a segment is computed again in the backward. Where a limit is granted and leaves room, the
//! last segments keep it instead ([`Config::kept`]).
//!
//! # Features
//!
//! | feature | what it adds | default |
//! |---|---|---|
//! | `cli` | the program `ferrozero`; implies `models` and `testing`. Embedders leave it out: `default-features = false` | yes |
//! | `models` | models of the GPT-2 and Llama families and their tokenizers: [`Pretrained`] | with `cli` |
//! | `cuda` | CUDA devices; needs the CUDA toolkit to build | no |
//! | `testing` | disks that fail or are slow: [`testing`] | with `cli` |

mod autograd;
mod byte_size;
#[cfg(feature = "cli")]
mod command;
mod config;
#[cfg(feature = "models")]
mod data;
mod device;
mod disk;
mod engine;
mod error;
#[cfg(feature = "models")]
mod estimate;
mod execution;
#[cfg(feature = "models")]
mod models;
mod observe;
mod planner;
mod probe;
mod schedule;
mod statistics;
mod sync;
mod tiled_linear;
mod train;

pub use candle_core;
pub use candle_nn;
pub use ferrozero_kernels::ops;

pub use autograd::dropout::dropout;
pub use autograd::gradient::Gradient;
pub use autograd::segment::Segment;
pub use config::Config;
pub use device::compute::open as open_device;
pub use disk::checkpoint::{Checkpoint, Damage, GroupSummary, Summary};
pub use disk::import::import_safetensors;
pub use engine::{Engine, EngineBuilder};
pub use error::{Error, Result};
pub use execution::initial_values::InitialValues;
pub use ferrozero_kernels::ops::Products;
pub use ferrozero_offload::memory::CountingAllocator;
pub use ferrozero_offload::{BackendChoice, Notice, Tier};
pub use planner::machine::Machine;
pub use planner::optimizer::AdamW;
pub use planner::plan::{Choices, Placement, Plan, Updates};
pub use schedule::buffer_plan::GroupPlacement;
pub use schedule::layout::ParameterRule;
pub use schedule::trace::Trace;
pub use tiled_linear::TiledLinear;
pub use train::report::{StepReport, Usage};
pub use train::trainer::Trainer;

#[cfg(feature = "models")]
pub use data::tokenizer::Tokenizer;
#[cfg(feature = "models")]
pub use models::linear::Adapting;
#[cfg(feature = "models")]
pub use models::pretrained::{LanguageModel, Pretrained, StreamedModel};

/// Makes [`CountingAllocator`] the program's allocator, so that plans count what candle's tensors take on the
/// heap. Without it they leave that out.
#[macro_export]
macro_rules! global_allocator {
    () => {
        #[global_allocator]
        static FERROZERO_ALLOCATOR: $crate::CountingAllocator = $crate::CountingAllocator;
    };
}

/// Disks that fail or are slow, and calls of the CUDA driver that fail.
#[cfg(feature = "testing")]
pub mod testing {
    pub use crate::device::compute::CudaFault;
    #[cfg(feature = "cuda")]
    pub use crate::device::compute::{CudaCall, CudaFailure, CudaLane};
    pub use ferrozero_offload::Throttle;
    pub use ferrozero_offload::io::{Fault, FaultKind, FaultPlan, FaultPoint};
}

/// What this project's own tests and program reach. It may change with every version.
#[doc(hidden)]
pub mod internals {
    macro_rules! open {
        ($($(#[$when:meta])* $room:ident),* $(,)?) => {
            $($(#[$when])* pub mod $room { pub use crate::$room::*; })*
        };
    }
    open!(
        byte_size,
        #[cfg(feature = "cli")]
        command,
        #[cfg(feature = "models")]
        data,
        device,
        #[cfg(feature = "models")]
        estimate,
        #[cfg(feature = "models")]
        models,
        observe,
        planner,
        probe,
        schedule,
        train,
    );
}
