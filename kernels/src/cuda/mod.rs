//! The loops over runs on a CUDA device, with the bits of their twins on the CPU.
//!
//! | here | its twin | bits |
//! |---|---|---|
//! | [`Kernels::adamw`] | [`crate::adamw`] | the same |
//! | [`Kernels::accumulate`] | [`crate::gradient`] | the same, norm included |
//! | [`Kernels::narrow`], [`Kernels::widen`] | [`crate::convert`] | the same, NaN included |
//!
//! "The same" is said of numbers: where arithmetic makes a NaN, its bits are the machine's.
//!
//! **Streams.** Every call takes the stream that it is enqueued on, and returns before the work is done.
//! Joins with other streams are the caller's: candle's own kernels are invisible to cudarc's event tracking,
//! so a program that uses several streams turns it off. Nothing here allocates, except
//! [`DeviceStatistics::new`] and [`Pinned::new`], and nothing waits, except [`DeviceStatistics::read`] and
//! [`Pinned`].
//!
//! The sources are `kernels/cuda/*.cu`; `build.rs` compiles them to the PTX that is embedded here.

mod adamw;
mod convert;
mod error;
mod gradient;
mod limits;
mod module;
mod pinned;

pub use adamw::{RunCopy, RunState};
pub use convert::HalfElement;
pub use error::CudaError;
pub use gradient::DeviceStatistics;
#[doc(hidden)]
pub use limits::{Launches, Limits, with_limits};
pub(crate) use limits::{blocks, scratch_elements};
pub use module::Kernels;
pub use pinned::{Pinned, pinned_copies};

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use half::{bf16, f16};

/// A type of the elements that kernels read and write.
pub trait CudaElement: crate::Element + DeviceRepr {
    /// What the names of its kernels end with.
    const SUFFIX: &'static str;
}

impl CudaElement for f32 {
    const SUFFIX: &'static str = "f32";
}

impl CudaElement for bf16 {
    const SUFFIX: &'static str = "bf16";
}

impl CudaElement for f16 {
    const SUFFIX: &'static str = "f16";
}
