//! ferrozero trains models that are larger than the memory of the machine that trains them.
//!
//! Optimizer state, gradients, parameters and boundary activations live where a plan puts them (device
//! memory, host memory, disk), move just in time, and move while something computes. Where they are never
//! changes what comes out: losses and weights have the same bits under every placement.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::VarBuilder;
//! use ferrozero::{AdamW, Config, Engine};
//! use ferrozero_kernels::ops;
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
//! let engine = Engine::new(Config { memory_bytes: Some(256 << 20), ..Config::default() })?;
//! let vb = engine.var_builder(); // instead of a VarMap
//! let block = |vb: VarBuilder| {
//!     let init = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
//!     Ok(Block { weight: vb.get_with_hints((64, 64), "weight", init)? })
//! };
//! let blocks =
//!     (0..4).map(|i| engine.segment(vb.pp(format!("h.{i}")), block)).collect::<Result<Vec<_>, _>>()?;
//! let inputs = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
//! let loss = || {
//!     let mut xs = inputs.clone();
//!     for block in &blocks {
//!         xs = block.forward(&xs)?;
//!     }
//!     xs.sqr()?.mean_all()
//! };
//! // One rehearsal of the loss: shapes, order, working memory.
//! let plan = engine.plan(AdamW::default(), loss)?;
//! println!("{plan}");
//! let mut trainer = engine.trainer(plan)?;
//! let first = trainer.step(|_| loss())?; // instead of loss.backward() and optimizer.step()
//! let second = trainer.step(|_| loss())?;
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
//! # Modules
//!
//! A step is data: [`schedule`] says what operations are and makes lists of them, [`planner`] counts and
//! costs them before anything is allocated, the executor runs them, and a [trace](schedule::trace) records
//! what happened. [`Segment`] is where candle's autograd and the schedule meet.

mod autograd;
pub mod byte_size;
pub mod command;
mod config;
pub mod data;
mod device;
mod disk;
mod engine;
mod error;
pub mod estimate;
mod execution;
pub mod models;
pub mod observe;
pub mod planner;
mod probe;
pub mod schedule;
mod statistics;
mod sync;
mod train;

pub use autograd::gradient::{Gradient, GradientObserver};
pub use autograd::segment::Segment;
pub use config::Config;
#[cfg(feature = "cuda")]
pub use device::compute::{CudaCall, CudaFailure, CudaLane};
pub use device::compute::{CudaFault, DeviceCounter, DeviceCounts, Moved, open as open_device};
pub use disk::checkpoint::{Checkpoint, Damage, GroupSummary, Summary};
pub use disk::import::import_safetensors;
pub use engine::Engine;
pub use error::{Error, Result};
pub use execution::initial_values::InitialValues;
pub use ferrozero_kernels::ops::Products;
pub use ferrozero_offload::io::{Fault, FaultKind, FaultPlan, FaultPoint};
pub use ferrozero_offload::memory::CountingAllocator;
pub use ferrozero_offload::{BackendChoice, Notice, Throttle, Tier};
pub use models::tiled_linear::TiledLinear;
pub use planner::optimizer::AdamW;
pub use planner::plan::{Choices, Placement, Plan, Updates};
pub use schedule::layout::ParameterRule;
pub use train::report::{StepReport, Usage};
pub use train::trainer::Trainer;
