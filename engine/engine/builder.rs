//! The settings that most programs give, one call each.

use crate::config::Config;
use crate::engine::Engine;
use crate::error::Result;
use candle_core::{DType, Device};
use std::path::PathBuf;

/// Settings of an engine that is to be built. [`Config`] has all that there are, for [`Engine::new`].
#[derive(Debug, Clone, Default)]
#[must_use = "an engine is made by build()"]
pub struct EngineBuilder(Config);

impl EngineBuilder {
    /// The device that computes; the CPU by default. [`open_device`](crate::open_device) makes others.
    pub fn device(self, device: Device) -> Self {
        Self(Config { device, ..self.0 })
    }

    /// The type of parameters, gradients and activations on the device: f32 by default, bf16 or f16.
    pub fn dtype(self, dtype: DType) -> Self {
        Self(Config { dtype, ..self.0 })
    }

    /// Bytes of host memory that the engine may use; on the CPU device the model's tensors are among them.
    pub fn memory_bytes(self, bytes: u64) -> Self {
        Self(Config { memory_bytes: Some(bytes), ..self.0 })
    }

    /// Bytes of device memory that the engine and the model may use.
    pub fn device_memory_bytes(self, bytes: u64) -> Self {
        Self(Config { device_memory_bytes: Some(bytes), ..self.0 })
    }

    /// Folder of the state on disk, which is the checkpoint. Without one there is no disk tier and no commit.
    pub fn directory(self, directory: impl Into<PathBuf>) -> Self {
        Self(Config { directory: Some(directory.into()), ..self.0 })
    }

    /// Whether to open the last commit in the folder instead of starting anew; not by default.
    pub fn resume(self, resume: bool) -> Self {
        Self(Config { resume, ..self.0 })
    }

    /// Micro-batches of a step: 1 by default.
    pub fn accumulate(self, micro_batches: usize) -> Self {
        Self(Config { accumulate: micro_batches, ..self.0 })
    }

    /// The largest norm of all gradients that is not scaled down; by default nothing is clipped.
    pub fn clip(self, norm: f64) -> Self {
        Self(Config { clip: Some(norm), ..self.0 })
    }

    /// Seed of the initial values: 0 by default.
    pub fn seed(self, seed: u64) -> Self {
        Self(Config { seed, ..self.0 })
    }

    /// Makes the engine.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn build(self) -> Result<Engine> {
        Engine::new(self.0)
    }
}
