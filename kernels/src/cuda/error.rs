//! The errors of kernels.

use candle_core::cuda_backend::cudarc::driver::DriverError;

/// Why a kernel was not enqueued, or its result not fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// Runs that do not fit together.
    #[error(transparent)]
    Run(#[from] crate::Error),
    /// The device or its driver failed. An earlier kernel's failure can surface here.
    #[error("{doing}: the CUDA driver says {source}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's error.
        source: DriverError,
    },
}

/// Says what was being done when the driver failed.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, doing: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| CudaError::Driver { doing, source })
    }
}
