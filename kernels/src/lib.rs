//! Numeric loops over slices and differentiable candle operations. Knows numbers, not tiers.
//!
//! | module | what it computes |
//! |---|---|
//! | [`adamw`] | the optimizer's update of a run, with an optional low-precision copy |
//! | [`gradient`] | scale, accumulate, squared norm and finite check of a run, in one pass |
//! | [`finite`] | how many values of a run are infinite or NaN |
//! | [`convert`] | f32 to and from bf16 and f16 |
//! | [`quantize`] | optimizer states in 8 bits, with a scale a block |
//! | [`philox`], [`initialize`] | random numbers and initial values by position |
//! | [`ops`] | candle operations with a backward |
//! | `cuda` | the loops over runs on a CUDA device (feature `cuda`) |
//!
//! Loops over runs give the same bits for every number of threads and on every instruction set: work is cut into chunks of
//! a fixed size, sums are taken in a fixed order, and no multiplication is fused with an addition.

pub mod adamw;
pub mod convert;
#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod error;
pub mod finite;
pub mod gradient;
pub mod initialize;
pub mod ops;
pub mod philox;
mod pool;
pub mod quantize;
mod simd;

pub use element::Element;
pub use error::Error;
pub use pool::Pool;
pub use simd::Path;
