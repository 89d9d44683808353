//! ferrozero trains models that are larger than the memory of the machine that trains them.
//!
//! Optimizer state, gradients, parameters and boundary activations live where a plan puts them (device memory,
//! host memory, disk), move just in time, and move while something computes. Where they are never changes what
//! comes out: losses and weights have the same bits under every placement.
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
//!     (0..4).map(|i| engine.segment(vb.pp(format!("h.{i}")), block)).collect::<ferrozero::Result<Vec<_>>>()?;
//! let inputs = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
//! let loss = || {
//!     let mut xs = inputs.clone();
//!     for block in &blocks {
//!         xs = block.forward(&xs)?;
//!     }
//!     xs.sqr()?.mean_all()
//! };
//! let plan = engine.plan(AdamW::default(), loss)?; // one rehearsal of the loss: shapes, order, working memory
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
//! What is within a segment is computed again in the backward. Where a limit is granted and leaves room, the last segments keep it
//! instead ([`Config::kept`]).
//!
//! # Modules
//!
//! A step is data: [`schedule`] says what operations are, [`builder`] makes lists of them, [`plan`] counts them
//! before anything is allocated, the executor runs them, and [`trace`] records what happened. [`Segment`] is where
//! candle's autograd and the schedule meet.

mod abreast;
pub mod arrangement;
pub mod builder;
pub mod byte_size;
pub mod chat;
mod checkpoint;
pub mod command;
mod config;
pub mod data;
pub mod data_error;
mod device;
mod engine;
mod error;
pub mod examples;
mod executor;
mod export;
pub mod generate;
mod gradient;
mod import;
mod initial_values;
pub mod layout;
pub mod learning_rate;
mod loss_scale;
pub mod models;
pub mod observed;
pub mod optimizer;
mod order;
mod output;
mod part;
mod pass;
pub mod plan;
pub mod planner;
mod probe;
mod registry;
mod rehearsal;
pub mod run_log;
pub mod schedule;
mod search;
mod segment;
pub mod shape;
pub mod simulator;
mod stores;
mod sync;
pub mod tensorboard;
mod tiled_linear;
pub mod tokenizer;
pub mod trace;
mod trainer;
mod vacancy;
pub mod weights;
mod work;

pub use checkpoint::{Checkpoint, Damage, GroupSummary, Summary};
pub use config::Config;
#[cfg(feature = "cuda")]
pub use device::{CudaCall, CudaFailure, CudaLane};
pub use device::{CudaFault, DeviceCounter, DeviceCounts, Moved, open as open_device};
pub use engine::Engine;
pub use error::{Error, Result};
pub use ferrozero_kernels::ops::Products;
pub use ferrozero_offload::io::{Fault, FaultKind, FaultPlan, FaultPoint};
pub use ferrozero_offload::memory::CountingAllocator;
pub use ferrozero_offload::{BackendChoice, Notice, Throttle, Tier};
pub use gradient::{Gradient, GradientObserver};
pub use import::import_safetensors;
pub use initial_values::InitialValues;
pub use layout::ParameterRule;
pub use optimizer::AdamW;
pub use plan::{Choices, Placement, Plan, Updates};
pub use segment::Segment;
pub use tiled_linear::TiledLinear;
pub use trainer::{StepReport, Trainer, Usage};
