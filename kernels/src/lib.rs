//! Numeric loops over slices and differentiable candle operations. Knows numbers, not tiers.

pub mod adamw;
pub mod convert;
pub mod gradient;
pub mod initialize;
pub mod ops;
pub mod philox;
mod pool;
mod simd;

pub use pool::Pool;
