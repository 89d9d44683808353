//! A warp: 32 threads that run one instruction together. Those that branch apart run in groups, of which the
//! one that is furthest behind goes first, until groups meet again.

use super::registers::{LANES, Registers};
use super::{Launch, Machine, UNWRITTEN};
use crate::fault::{Code, Fault, Result};
use crate::program::{Action, Mask, Program, Step};
use crate::ptx::types::{Space, Special};

/// Lanes that are at the same step.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// The step.
    pub at: u32,
    /// The lanes.
    pub mask: Mask,
}

/// A warp of a block.
pub struct Warp {
    /// Its registers.
    pub registers: Registers,
    /// Lanes that can go on.
    pub groups: Vec<Group>,
    /// Lanes that wait at the block's barrier.
    pub at_barrier: Vec<Group>,
    /// Lanes that wait for others of the warp, to exchange operands.
    pub at_shuffle: Vec<Group>,
    /// Lanes that have not ended.
    pub live: Mask,
    /// The threads' own memories, one after another.
    pub local: Vec<u8>,
    /// Number of its first thread in the block.
    pub first_thread: u32,
    /// Its number, and the grid and block that the rows of what a thread knows of itself are of.
    shape: Option<(u32, [u32; 3], [u32; 3])>,
}

/// Why a warp does not go on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Some lanes wait at the barrier.
    Barrier,
    /// All lanes have ended.
    Done,
}

/// What is next for the lanes that run.
enum Next {
    /// The step after this one.
    Following,
    /// Another one.
    Step(u32),
    /// Nothing: they wait, or have ended.
    Leave,
}

impl Warp {
    /// A warp for a program.
    pub fn new(program: &Program) -> Self {
        Self {
            registers: Registers::new(program),
            groups: vec![],
            at_barrier: vec![],
            at_shuffle: vec![],
            live: 0,
            local: vec![UNWRITTEN; program.local_bytes * LANES],
            first_thread: 0,
            shape: None,
        }
    }

    /// Sets what does not change within a launch.
    pub fn begin_launch(&mut self, launch: &Launch<'_>, number: u32) {
        self.first_thread = number * LANES as u32;
        for (index, row) in &launch.program.variables {
            self.registers.rows[*row] = [launch.variables[*index]; LANES];
        }
        // Most launches have the shape of the one before.
        let shape = Some((number, launch.grid, launch.block));
        if self.shape == shape {
            return;
        }
        self.shape = shape;
        let [width, height, _] = launch.block;
        let thread = |lane: usize| self.first_thread + lane as u32;
        for (special, row) in &launch.program.specials {
            let value = |lane: usize| match *special {
                Special::Thread(0) => u64::from(thread(lane) % width),
                Special::Thread(1) => u64::from(thread(lane) / width % height),
                Special::Thread(_) => u64::from(thread(lane) / (width * height)),
                Special::BlockSize(axis) => u64::from(launch.block[axis]),
                Special::GridSize(axis) => u64::from(launch.grid[axis]),
                Special::Lane => lane as u64,
                Special::Warp => u64::from(number),
                Special::LanesBefore => (1 << lane) - 1,
                Special::DynamicShared => launch.program.shared_bytes as u64,
                // Set where each block begins.
                Special::Block(_) => 0,
            };
            self.registers.rows[*row] = std::array::from_fn(value);
        }
    }

    /// All threads are at the first step of a block.
    pub fn begin_block(&mut self, launch: &Launch<'_>, block: [u32; 3]) {
        for (special, row) in &launch.program.specials {
            if let Special::Block(axis) = special {
                self.registers.rows[*row] = [u64::from(block[*axis]); LANES];
            }
        }
        let threads = (launch.threads() - self.first_thread).min(LANES as u32);
        self.live = Mask::MAX >> (LANES as u32 - threads);
        self.groups.clear();
        self.groups.push(Group { at: 0, mask: self.live });
        self.at_barrier.clear();
        self.at_shuffle.clear();
    }

    /// Lets the lanes go on that wait at the barrier.
    pub fn pass_barrier(&mut self) {
        self.groups.append(&mut self.at_barrier);
        join(&mut self.groups);
    }

    /// Takes the group that is furthest behind, and says where the next one is.
    fn take_group(&mut self) -> Option<(Group, u32)> {
        let (index, _) = self.groups.iter().enumerate().min_by_key(|(_, group)| group.at)?;
        let group = self.groups.swap_remove(index);
        Some((group, self.next_group()))
    }

    fn next_group(&self) -> u32 {
        self.groups.iter().map(|group| group.at).min().unwrap_or(u32::MAX)
    }
}

/// Makes one group of groups that are at the same step.
fn join(groups: &mut Vec<Group>) {
    groups.sort_unstable_by_key(|group| group.at);
    groups.dedup_by(|later, earlier| {
        let same = later.at == earlier.at;
        if same {
            earlier.mask |= later.mask;
        }
        same
    });
}

impl Machine<'_> {
    /// Runs a warp until it ends or all its lanes wait.
    pub fn warp(&mut self, warp: &mut Warp) -> Result<Stop> {
        while let Some((group, others)) = warp.take_group() {
            self.group(warp, group, others)?;
        }
        if let Some(group) = warp.at_shuffle.first() {
            let line = self.launch.program.steps[group.at as usize].line;
            return Err(Self::stuck(format!(
                "line {line}: lanes {:#x} wait for lanes that never come",
                group.mask
            )));
        }
        if warp.at_barrier.is_empty() {
            warp.live = 0;
            return Ok(Stop::Done);
        }
        Ok(Stop::Barrier)
    }

    /// Runs a group until it meets another, waits or ends.
    fn group(&mut self, warp: &mut Warp, group: Group, mut others: u32) -> Result<()> {
        let steps = &self.launch.program.steps;
        let Group { mut at, mut mask } = group;
        loop {
            if at >= others {
                warp.groups.push(Group { at, mask });
                join(&mut warp.groups);
                return Ok(());
            }
            let step = &steps[at as usize];
            self.lane_instructions += u64::from(mask.count_ones());
            let active = match step.guard {
                Some(guard) => warp.registers.guarded(mask, guard.predicate, guard.negated),
                None => mask,
            };
            if let Action::Compute(compute) = step.action {
                if active != 0 {
                    compute(&mut warp.registers, step, active);
                }
                at += 1;
                continue;
            }
            let next = self.step(warp, step, at, &mut mask, active);
            match next.map_err(|fault| fault.at(format!("line {}", step.line)))? {
                Next::Following => at += 1,
                Next::Step(step) => at = step,
                Next::Leave => return Ok(()),
            }
            others = warp.next_group();
        }
    }

    /// Runs a step that does more than compute. Lanes that leave the group are taken out of its mask.
    fn step(&mut self, warp: &mut Warp, step: &Step, at: u32, mask: &mut Mask, active: Mask) -> Result<Next> {
        match &step.action {
            Action::Branch(target) if active == *mask => return Ok(Next::Step(*target)),
            Action::Shuffle(shuffle) => match self.shuffle(warp, step, at, *shuffle, active)? {
                Some(arrived) => *mask |= arrived,
                None => *mask &= !active,
            },
            _ if active == 0 => return Ok(Next::Following),
            Action::Branch(target) => {
                warp.groups.push(Group { at: *target, mask: active });
                *mask &= !active;
            }
            Action::Exit => {
                warp.live &= !active;
                *mask &= !active;
            }
            Action::Barrier => {
                warp.at_barrier.push(Group { at: at + 1, mask: active });
                *mask &= !active;
            }
            Action::Load(access) => self.load(warp, step, *access, active)?,
            Action::Store(access) => self.store(warp, step, *access, active)?,
            Action::Atomic(access, combine) => self.atomic(warp, step, *access, *combine, active)?,
            Action::Assert(has_text) => return Err(self.assertion(warp, step, *has_text, active)),
            Action::Trap => return Err(Self::stuck("the kernel stopped itself".to_owned())),
            Action::Unknown(what) => {
                return Err(Fault::new(Code::InvalidPtx, format!("the interpreter does not know {what}")));
            }
            Action::Nothing | Action::Compute(_) => {}
        }
        Ok(if *mask == 0 { Next::Leave } else { Next::Following })
    }

    /// The failure of the first lane that asserts something.
    fn assertion(&mut self, warp: &Warp, step: &Step, has_text: bool, active: Mask) -> Fault {
        let lane = active.trailing_zeros() as usize;
        let place = warp.registers.rows[step.sources[0] as usize][lane];
        let address = self.read(warp, lane, Space::Local, place, 8).unwrap_or(0);
        let text = if has_text { self.memory.text(address) } else { String::new() };
        let thread = warp.first_thread as usize + lane;
        Fault::new(Code::Assert, format!("assertion of thread {thread} failed: {text}"))
    }
}
