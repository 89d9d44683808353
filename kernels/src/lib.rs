//! Numeric loops over slices and differentiable candle operations. Knows numbers, not tiers.
//!
//! | module | what it computes |
//! |---|---|
//! | [`optimizer`] | optimizers, and updates of state as it is stored |
//! | [`format`](mod@format) | the formats that a state is stored in: f32, bf16 with stochastic rounding, 8-bit blocks, split f32 |
//! | [`adamw`] | AdamW of a run with states in f32, with an optional low-precision copy |
//! | [`gradient`] | scale, accumulate, squared norm and finite check of a run, in one pass |
//! | [`finite`] | how many values of a run are infinite or NaN |
//! | [`convert`] | f32 to and from bf16 and f16 |
//! | [`philox`], [`initialize`] | random numbers and initial values by position |
//! | [`ops`] | candle operations with a backward |
//! | `cuda` | the loops over runs on a CUDA device (feature `cuda`) |
//!
//! Loops over runs give the same bits for every number of threads and on every instruction set: work is cut
//! into chunks of a fixed size, sums are taken in a fixed order, and no multiplication is fused with an
//! addition.

pub mod adamw;
pub mod convert;
#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod error;
pub mod finite;
pub mod format;
pub mod gradient;
pub mod initialize;
pub mod ops;
pub mod optimizer;
pub mod philox;
mod pool;
mod simd;

pub use element::Element;
pub use error::Error;
pub use pool::Pool;
pub use simd::Path;
