//! The operations of streams.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::State;
use super::modules::Function;
use crate::fault::Result;
use crate::gemm::Gemm;
use crate::interpreter::{self, Launch};
use crate::memory::Accesses;
use crate::races::Clock;
use crate::random::Draw;

/// What an event has recorded, once the stream came to it.
#[derive(Default)]
pub struct Recorded {
    /// What was done by then, and when that was.
    pub reached: OnceLock<(Clock, Instant)>,
}

/// An operation of a stream.
pub enum Work {
    /// Runs a kernel.
    Launch {
        function: Arc<Function>,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        parameters: Vec<u8>,
    },
    /// Copies bytes to the device that the host has already given away.
    Upload { to: u64, bytes: Vec<u8> },
    /// Copies page-locked memory of the host to the device; the host may still change it.
    UploadPinned { to: u64, from: usize, length: usize },
    /// Copies to the host.
    Download { to: usize, from: u64, length: usize },
    /// Copies within the device.
    Copy { to: u64, from: u64, length: usize },
    /// Fills memory with a byte.
    Fill { to: u64, value: u8, length: usize },
    /// An allocation begins its life.
    Allocate { address: u64 },
    /// An allocation ends its life.
    Free { address: u64 },
    /// An event records what is done.
    Record { recorded: Arc<Recorded> },
    /// The stream waits for what an event records.
    Wait { recorded: Arc<Recorded>, stream: usize, number: u64 },
    /// Calls a function of the host.
    Call { function: extern "C" fn(*mut c_void), argument: usize },
    /// Multiplies matrices.
    Multiply(Gemm),
    /// Draws random numbers.
    Draw(Draw),
}

impl Work {
    /// What it is, for a person.
    pub fn name(&self) -> Arc<str> {
        match self {
            Self::Launch { function, .. } => return function.label.clone(),
            Self::Upload { .. } => "a copy to the device",
            Self::UploadPinned { .. } => "a copy of page-locked memory to the device",
            Self::Download { .. } => "a copy to the host",
            Self::Copy { .. } => "a copy within the device",
            Self::Fill { .. } => "a fill",
            Self::Allocate { .. } => "an allocation",
            Self::Free { .. } => "a free",
            Self::Record { .. } => "a record of an event",
            Self::Wait { .. } => "a wait for an event",
            Self::Call { .. } => "a call of the host",
            Self::Multiply(_) => "a product of matrices",
            Self::Draw(_) => "a draw of random numbers",
        }
        .into()
    }
}

impl State {
    /// Does an operation; what it waited for is added to the clock.
    pub fn perform(&mut self, work: &Work, accesses: &mut Accesses, clock: &mut Clock) -> Result<()> {
        let memory = &mut self.memory;
        match work {
            Work::Launch { .. } => self.launch(work, accesses)?,
            Work::Upload { to, bytes } => memory.write(*to, bytes.len(), accesses)?.copy_from_slice(bytes),
            Work::UploadPinned { to, from, length } => {
                let to = memory.write(*to, *length, accesses)?;
                // SAFETY: the range was page-locked when the copy was enqueued, and `cuMemFreeHost` runs all
                // work first.
                let from = unsafe { std::slice::from_raw_parts(*from as *const u8, *length) };
                to.copy_from_slice(from);
            }
            Work::Download { to, from, length } => {
                let from = memory.read(*from, *length, accesses)?;
                // SAFETY: the caller of the copy promises that so many bytes may be written there until it
                // has waited for the copy, which is CUDA's own contract.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), *to as *mut u8, *length) };
            }
            Work::Copy { to, from, length } => {
                let bytes = memory.read(*from, *length, accesses)?.to_vec();
                memory.write(*to, *length, accesses)?.copy_from_slice(&bytes);
            }
            Work::Fill { to, value, length } => memory.write(*to, *length, accesses)?.fill(*value),
            Work::Allocate { address } => accesses.note(memory.whole(*address, "allocation")?, true),
            // Its accesses are looked at before the memory is gone: see `State::run_next`.
            Work::Free { address } => memory.free(*address)?,
            Work::Record { recorded } => {
                let _ = recorded.reached.set((clock.clone(), Instant::now()));
            }
            Work::Wait { recorded, .. } => {
                if let Some((reached, _)) = recorded.reached.get() {
                    clock.join(reached);
                }
            }
            Work::Call { function, argument } => function(*argument as *mut c_void),
            Work::Multiply(product) => product.run(memory, accesses)?,
            Work::Draw(draw) => draw.run(memory, accesses)?,
        }
        Ok(())
    }

    fn launch(&mut self, work: &Work, accesses: &mut Accesses) -> Result<()> {
        let Work::Launch { function, grid, block, shared_bytes, parameters } = work else { return Ok(()) };
        let launch = Launch {
            program: &function.program,
            grid: *grid,
            block: *block,
            dynamic_shared_bytes: *shared_bytes,
            parameters,
            variables: &function.variables,
            order: self.configuration.order,
        };
        let start = Instant::now();
        let lane_instructions = interpreter::run(&launch, &mut self.memory, accesses)?;
        let count = self.kernels.entry(function.label.clone()).or_default();
        count.launches += 1;
        count.lane_instructions += lane_instructions;
        count.seconds += start.elapsed().as_secs_f64();
        Ok(())
    }
}
