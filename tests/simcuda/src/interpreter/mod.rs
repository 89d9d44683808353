//! Runs kernels: grids of blocks, one block after another, and each block's warps in turns from barrier to
//! barrier.

mod access;
pub mod registers;
mod shuffle;
mod warp;

pub use registers::Registers;
pub use warp::Warp;

use crate::configuration::Order;
use crate::fault::{Code, Fault, Result};
use crate::memory::{Accesses, Memory};
use crate::program::Program;
use access::Offsets;
use registers::LANES;
use warp::Stop;

/// What shared and local memory hold before anything is written.
const UNWRITTEN: u8 = 0xcd;

/// A launch of a kernel.
pub struct Launch<'a> {
    /// The kernel.
    pub program: &'a Program,
    /// Blocks along each axis.
    pub grid: [u32; 3],
    /// Threads of a block along each axis.
    pub block: [u32; 3],
    /// Bytes of shared memory that the launch adds.
    pub dynamic_shared_bytes: usize,
    /// The kernel's parameters, as its program places them.
    pub parameters: &'a [u8],
    /// Addresses of the module's variables.
    pub variables: &'a [u64],
    /// In which order blocks and warps run.
    pub order: Order,
}

impl Launch<'_> {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// What runs a launch's kernel.
pub struct Machine<'a> {
    launch: &'a Launch<'a>,
    memory: &'a mut Memory,
    accesses: &'a mut Accesses,
    shared: Vec<u8>,
    /// Where the lanes of the step that runs access memory.
    offsets: Offsets,
    /// Instructions of lanes that were run.
    lane_instructions: u64,
}

/// Runs a launch. Answers how many instructions it took, counted for each lane.
pub fn run(launch: &Launch<'_>, memory: &mut Memory, accesses: &mut Accesses) -> Result<u64> {
    let program = launch.program;
    let shared = vec![UNWRITTEN; program.shared_bytes + launch.dynamic_shared_bytes];
    let mut machine =
        Machine { launch, memory, accesses, shared, offsets: Offsets::default(), lane_instructions: 0 };
    let mut warps = program.take_warps((launch.threads() as usize).div_ceil(LANES));
    for (number, warp) in warps.iter_mut().enumerate() {
        warp.begin_launch(launch, number as u32);
    }
    let [width, height, depth] = launch.grid.map(u64::from);
    let blocks = width * height * depth;
    for turn in 0..blocks {
        let number = if launch.order == Order::Reverse { blocks - 1 - turn } else { turn };
        let block = [number % width, number / width % height, number / (width * height)];
        machine.block(&mut warps, block.map(|axis| axis as u32))?;
    }
    program.give_back(warps);
    Ok(machine.lane_instructions)
}

impl Machine<'_> {
    fn block(&mut self, warps: &mut [Warp], block: [u32; 3]) -> Result<()> {
        self.shared.fill(UNWRITTEN);
        for warp in &mut *warps {
            warp.begin_block(self.launch, block);
        }
        loop {
            let mut waiting = 0;
            for turn in 0..warps.len() {
                let reverse = self.launch.order == Order::Reverse;
                let number = if reverse { warps.len() - 1 - turn } else { turn };
                let stop = self.warp(&mut warps[number]);
                let stop = stop.map_err(|fault| {
                    let [x, y, z] = block;
                    fault.at(format!("kernel {}, block {x},{y},{z}", self.launch.program.name))
                })?;
                waiting += usize::from(stop == Stop::Barrier);
            }
            if waiting == 0 {
                return Ok(());
            }
            // Threads that have ended count as arrived.
            warps.iter_mut().for_each(Warp::pass_barrier);
        }
    }

    /// A failure of a kernel that no thread can go on from.
    fn stuck(reason: String) -> Fault {
        Fault::new(Code::LaunchFailed, reason)
    }
}
