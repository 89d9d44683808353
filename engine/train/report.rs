//! What a step did, and what a run uses.

use crate::schedule::trace::Trace;

/// What one optimizer step did.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss over the micro-batches.
    pub loss: f32,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Whether the gradients of f16 have overflowed, so that nothing was updated and the scale of the loss
    /// was halved.
    pub skipped: bool,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Seconds from call to return. Updates may go on behind it.
    pub step_s: f64,
    /// Share of that in which computing waited for a tier, 0 to 1: the training thread, or a CUDA device by
    /// its own clock.
    pub exposed_stall: f64,
    /// Operations that finished since the last step's report.
    pub trace: Trace,
}

/// What a run uses, against what its plan said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Peak bytes leased of the host arena.
    pub peak_host_bytes: u64,
    /// Host bytes of the plan.
    pub planned_host_bytes: u64,
    /// Peak bytes of device memory: leased, and on the CPU device what the heap held beyond its level at the
    /// plan. Without the counting allocator only what is leased.
    pub peak_device_bytes: u64,
    /// Device bytes of the plan.
    pub planned_device_bytes: u64,
    /// Bytes of all files of the disk tier.
    pub disk_bytes: u64,
    /// Bytes written to the disk tier so far, initial values included.
    pub written_bytes: u64,
    /// Bytes read from it.
    pub read_bytes: u64,
}
