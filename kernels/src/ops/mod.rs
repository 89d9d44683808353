//! Differentiable, fused, threaded candle operations for training.
//!
//! candle-nn's fast layers have no backward: they cut the gradient without a word. The operations here take
//! the same arguments where candle-nn has one, and every tracked input receives its gradient.
//!
//! | operation | shapes | what it fuses |
//! |---|---|---|
//! | [`to_device`] | tokens of any shape | nothing: the copy of tokens, by way of page-locked memory |
//! | [`embedding`] | `[V, C], [..] → [.., C]` | gradients of a row, in the order of its tokens |
//! | [`linear`] | `[.., in] → [.., out]` | product and bias; weight gradient laid out like the weight |
//! | [`closing_linear`] | `[.., in], residual [.., out] → [.., out]` | the end of a block, not computed where only gradients are asked for |
//! | [`layer_norm`], [`rms_norm`] | `[.., C] → [.., C]` | statistics, scale and shift |
//! | [`gelu`], [`silu`], [`swiglu`], [`gated_silu`] | element by element | the whole formula, one pass each way |
//! | [`dropout`] | any shape | mask by counter, scale |
//! | [`softmax_last_dim`], [`causal_softmax`] | `[.., T, S]` | scale, mask and softmax |
//! | [`rope`], [`rope_i`] | `[B, H, T, D]` | both halves of the rotation |
//! | [`rope_by_position`] | `[B, T, H·D]` | the same on heads that lie side by side |
//! | [`causal_attention`] | `[B, T, 3·C] → [B, T, C]` | attention on packed q, k, v, over all positions before or a window of them; no T×T matrix is kept |
//! | [`grouped_causal_attention`] | `[B, T, H·D], twice [B, T, K·D] → [B, T, H·D]` | the same where query heads share keys and values |
//! | [`cross_entropy`], [`linear_cross_entropy`] | `[N, C] → []` | log-softmax and mean; no full logits in the latter |
//! | [`linear_log_sums`] | `[N, C] → [2, N]` | what a part of the vocabulary adds to a cross-entropy |
//!
//! **Devices and dtypes.** On the CPU and on a CUDA device (feature `cuda`) the elements are `f32`, `bf16` or
//! `f16`, one type for all inputs, and arithmetic is `f32` in any case; losses are `f32` whatever the logits
//! are. Every other dtype and device is refused with an [`OpError`] that says what to do. Inputs need not be
//! contiguous (they are made so first). Within [`with_products`] the CPU multiplies matrices of `f32` as
//! `bf16`, if its processor is made for that.
//!
//! **Reproducibility.** Work is split in chunks that depend on shapes alone, and partial sums are combined in
//! a fixed order: on one machine the bits are the same from run to run and for any number of rayon threads.
//! CUDA kernels use no atomics, so that a device gives the same bits each time; they are not the CPU's.
//!
//! **Waiting.** Work on a CUDA device is enqueued on candle's stream. Only the losses and [`embedding`] wait:
//! they fetch targets and tokens, because an index out of range is an error and not a wrong address.

mod activation;
mod attention;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod embedding;
mod error;
mod input;
mod linear;
mod log_sums;
pub(crate) mod matrix;
mod norm;
mod output;
mod products;
mod recompute;
mod rope;
mod softmax;
mod vector;

pub use activation::{gated_silu, gelu, silu, swiglu};
pub use attention::{causal_attention, grouped_causal_attention};
pub use cross_entropy::{cross_entropy, linear_cross_entropy};
pub use dropout::{Draw, dropout};
pub use embedding::{embedding, to_device};
pub use error::OpError;
pub use linear::linear;
pub use log_sums::linear_log_sums;
pub use norm::{layer_norm, rms_norm};
pub use products::{Products, with_products};
pub use recompute::{backward, before_backward, closing_linear, keep, recompute, without_graph};
pub use rope::{rope, rope_by_position, rope_i};
pub use softmax::{causal_softmax, softmax_last_dim};
