//! What a device was asked for, counted.

use super::ComputeDevice;
use std::sync::Arc;

/// Copies, and how long they took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moved {
    /// How many.
    pub copies: u64,
    /// Bytes.
    pub bytes: u64,
    /// Seconds by the device's clock; 0 where the driver does not tell.
    pub seconds: f64,
}

/// What a CUDA device was asked for so far. On the CPU device everything is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DeviceCounts {
    /// Times that the engine allocated memory of the device: for slots, buffers, boundaries and statistics.
    pub allocations: u64,
    /// Bytes that were allocated one by one to hold the place of a storage that is elsewhere.
    pub placeholders: u64,
    /// Times that there was no memory left, so that the driver's pool was made to give back what nobody used.
    pub trims: u64,
    /// Copies of the engine from or to memory of the host that was not page-locked, which make the host wait.
    pub pageable_copies: u64,
    /// Copies of this process to devices beside those below, of tokens, by way of page-locked memory.
    pub small_uploads: u64,
    /// Copies of this process from devices beside those below, of tokens to be looked at, losses and norms,
    /// by way of page-locked memory.
    pub small_downloads: u64,
    /// From the host's tier to the device.
    pub uploads: Moved,
    /// From the device to the host's tier.
    pub downloads: Moved,
}

/// Reads the counts of a run's device, from any thread and also while a step is under way.
#[derive(Debug, Clone)]
pub struct DeviceCounter(Arc<ComputeDevice>);

impl DeviceCounter {
    pub(crate) fn new(device: Arc<ComputeDevice>) -> Self {
        Self(device)
    }

    /// The counts.
    pub fn read(&self) -> DeviceCounts {
        self.0.counts()
    }
}
