//! Failures of the driver's calls, acted out for tests.

use super::Lane;
use crate::{Error, locked};
use std::sync::Mutex;

/// A kind of call of the driver's, for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The engine allocates memory of the device.
    Allocate,
    /// The engine launches a kernel, or sets a few numbers to zero.
    Launch,
    /// A copy between the tiers of host and device.
    Copy,
    /// A loss, a norm or a count is fetched.
    Fetch,
    /// An event is recorded.
    Record,
    /// A stream is told to wait for an event.
    Wait(Lane),
    /// The host waits for a stream.
    Synchronize,
}

impl Call {
    /// All calls that can be made to fail.
    pub const ALL: [Self; 10] = [
        Self::Allocate,
        Self::Launch,
        Self::Copy,
        Self::Fetch,
        Self::Record,
        Self::Wait(Lane::Compute),
        Self::Wait(Lane::Upload),
        Self::Wait(Lane::Download),
        Self::Wait(Lane::Optimizer),
        Self::Synchronize,
    ];
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CudaFailure {
    /// With an error.
    Error,
    /// Says nothing and does not happen, as if somebody had forgotten it.
    Forgotten,
    /// With the error of a device that has no memory left, as do the next calls of the kind: so many in all.
    OutOfMemory {
        /// How many calls fail, from 1.
        times: u64,
    },
}

/// A failure to be acted out, for tests: what happens to the call of this kind with this number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaFault {
    /// Kind of call.
    pub call: Call,
    /// Its number.
    pub index: u64,
    /// What happens to it.
    pub how: CudaFailure,
}

/// The failure that is still to come.
#[derive(Debug)]
pub(super) struct Faults(Mutex<Option<CudaFault>>);

impl Faults {
    pub(super) fn new(planned: Option<CudaFault>) -> Self {
        Self(Mutex::new(planned))
    }

    /// Whether a call is to be made, unless a test wants it to fail.
    pub(super) fn happens(&self, call: Call) -> Result<bool, Error> {
        let mut planned = locked(&self.0);
        let Some(fault) = planned.as_mut().filter(|fault| fault.call == call) else { return Ok(true) };
        if fault.index > 0 {
            fault.index -= 1;
            return Ok(true);
        }
        let how = fault.how;
        match &mut fault.how {
            CudaFailure::OutOfMemory { times } if *times > 1 => *times -= 1,
            _ => *planned = None,
        }
        let reason = match how {
            CudaFailure::Forgotten => return Ok(false),
            CudaFailure::Error => format!("{call:?}"),
            CudaFailure::OutOfMemory { .. } => super::OUT_OF_MEMORY.to_owned(),
        };
        Err(Error::Cuda { action: "a fault that a test asked for", reason })
    }
}
