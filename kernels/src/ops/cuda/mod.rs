//! The operations on CUDA devices: what their `cuda_fwd` and their backward do there.
//!
//! Elements are f32, bf16 or f16, of one type for all inputs of an operation, and arithmetic is f32 in any
//! case. Products are cuBLAS's; everything else is a kernel of `kernels/cuda`, none of which uses atomics, so
//! that a device gives the same bits each time. All work is enqueued on the stream of the candle device. What
//! is copied between it and the host goes by way of page-locked memory.

pub(super) mod activation;
pub(super) mod attention;
pub(super) mod cross_entropy;
pub(super) mod embedding;
mod launch;
pub(super) mod linear;
mod matrix;
pub(super) mod norm;
pub(super) mod recompute;
pub(super) mod rope;
pub(super) mod softmax;
pub(super) mod staging;
