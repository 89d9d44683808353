//! Kernels as the interpreter runs them: decoded once, operands resolved to rows of registers, and a function
//! a step that works on all lanes of a warp.
//!
//! Whatever a step reads is a row of 32 numbers: registers, values that a thread knows of itself, constants.
//! So no step has to find out what its operands are.

mod convert;
mod float;
mod integer;
mod logic;
mod select;
mod simd;

pub use logic::low_bits;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::fault::Result;
use crate::interpreter::{Registers, Warp};
use crate::ptx::Kernel;
use crate::ptx::lowering::CARRY;
use crate::ptx::types::{
    Combine, Guard, Instruction, Opcode, Operand, Register, Rounding, Shuffle, Space, Special, Type,
};

/// A bit for each lane of a warp.
pub type Mask = u32;
/// A step's work on the lanes of a mask.
pub type Compute = fn(&mut Registers, &Step, Mask);

/// What a step does.
pub enum Action {
    /// Computes results from operands, lane by lane.
    Compute(Compute),
    /// Reads memory at the address in the first operand.
    Load(Access),
    /// Writes the operands from the second one on to memory at the address in the first.
    Store(Access),
    /// Reads and changes memory at once.
    Atomic(Access, Combine),
    /// Goes on at this step.
    Branch(u32),
    /// The lanes are done.
    Exit,
    /// The lanes wait until all of the block's have come.
    Barrier,
    /// Lanes read each other's operand.
    Shuffle(Shuffle),
    /// An assertion failed. The text's address is in the thread's own memory at the first operand, if there
    /// is one.
    Assert(bool),
    /// The kernel stops itself.
    Trap,
    /// Orders memory, which here is in order anyway.
    Nothing,
    /// An instruction that the interpreter does not know, in words.
    Unknown(String),
}

/// An access to memory.
#[derive(Clone, Copy)]
pub struct Access {
    /// Which memory.
    pub space: Space,
    /// What is added to the address.
    pub offset: u64,
    /// Bytes of an element.
    pub bytes: usize,
    /// Neighbouring elements, 1 to 4.
    pub elements: usize,
    /// The type of an element.
    pub kind: Type,
}

/// What a step's function may need to know beside its operands.
#[derive(Clone, Copy)]
pub struct Form {
    /// See [`Instruction::opcode`].
    pub opcode: Opcode,
    /// See [`Instruction::kind`].
    pub kind: Type,
    /// See [`Instruction::source_kind`].
    pub source_kind: Type,
    /// See [`Instruction::rounding`].
    pub rounding: Option<Rounding>,
    /// See [`Instruction::to_integer`].
    pub to_integer: bool,
    /// See [`Instruction::flush`].
    pub flush: bool,
    /// See [`Instruction::saturate`].
    pub saturate: bool,
    /// See [`Instruction::carry_in`].
    pub carry_in: bool,
    /// See [`Instruction::carry_out`].
    pub carry_out: bool,
    /// See [`Instruction::negated`].
    pub negated: u8,
    /// How `setp` combines its result with its third operand.
    pub combine: Option<Combine>,
    /// What a comparison tests.
    pub test: Option<logic::Test>,
}

impl Form {
    /// The form of an instruction.
    pub fn of(instruction: &Instruction) -> Self {
        Self {
            opcode: instruction.opcode,
            kind: instruction.kind,
            source_kind: instruction.source_kind,
            rounding: instruction.rounding,
            to_integer: instruction.to_integer,
            flush: instruction.flush,
            saturate: instruction.saturate,
            carry_in: instruction.carry_in,
            carry_out: instruction.carry_out,
            negated: instruction.negated,
            combine: instruction.combine,
            test: logic::test_of(instruction),
        }
    }
}

/// One instruction.
pub struct Step {
    /// What it does.
    pub action: Action,
    /// The lanes that take part.
    pub guard: Option<Guard>,
    /// Rows or predicates that it writes.
    pub results: [u32; 4],
    /// Rows or predicates that it reads.
    pub sources: [u32; 5],
    /// What its function needs to know.
    pub form: Form,
    /// Its line in the text.
    pub line: u32,
}

/// A kernel, ready to run.
pub struct Program {
    /// Its name.
    pub name: String,
    /// Where each parameter is among [`Program::parameter_bytes`], and its size.
    pub parameters: Vec<(usize, usize)>,
    /// Bytes of all parameters.
    pub parameter_bytes: usize,
    /// Bytes of a thread's own memory.
    pub local_bytes: usize,
    /// Bytes of a block's shared memory before that which a launch adds.
    pub shared_bytes: usize,
    /// What it does.
    pub steps: Vec<Step>,
    /// Rows of a warp: registers, then specials and constants, then one that nobody reads.
    pub rows: usize,
    /// Predicates of a warp.
    pub predicates: usize,
    /// Rows of values that threads know of themselves.
    pub specials: Vec<(Special, usize)>,
    /// Rows of constants.
    pub constants: Vec<(u64, usize)>,
    /// Predicates that are constant.
    pub constant_predicates: Vec<(Mask, usize)>,
    /// Rows of addresses of the module's variables.
    pub variables: Vec<(usize, usize)>,
    /// Warps of earlier launches, whose constants are in place.
    idle: Mutex<Vec<Warp>>,
}

impl Program {
    /// Decodes a kernel.
    pub fn new(kernel: Kernel) -> Result<Self> {
        let mut rows = Rows { rows: kernel.rows, predicates: kernel.predicates, ..Rows::default() };
        let steps = kernel.instructions.iter().map(|instruction| rows.step(instruction)).collect();
        Ok(Self {
            name: kernel.name,
            parameters: kernel.parameters,
            parameter_bytes: kernel.parameter_bytes,
            local_bytes: kernel.local_bytes,
            shared_bytes: kernel.shared_bytes.next_multiple_of(16),
            steps,
            rows: rows.rows as usize,
            predicates: rows.predicates as usize,
            specials: rows.specials.into_iter().map(|(special, row)| (special, row as usize)).collect(),
            constants: rows.constants.into_iter().map(|(value, row)| (value, row as usize)).collect(),
            constant_predicates: rows.constant_predicates,
            variables: rows
                .variables
                .into_iter()
                .map(|(index, row)| (index as usize, row as usize))
                .collect(),
            idle: Mutex::default(),
        })
    }

    /// So many warps, with constants in place.
    pub fn take_warps(&self, count: usize) -> Vec<Warp> {
        let mut warps = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = idle.len().saturating_sub(count);
            idle.split_off(kept)
        };
        warps.resize_with(count, || Warp::new(self));
        warps
    }

    /// Keeps warps for the next launch.
    pub fn give_back(&self, warps: Vec<Warp>) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).extend(warps);
    }
}

/// Gives every operand its row.
#[derive(Default)]
struct Rows {
    rows: u32,
    predicates: u32,
    specials: HashMap<Special, u32>,
    constants: HashMap<u64, u32>,
    constant_predicates: Vec<(Mask, usize)>,
    variables: HashMap<u32, u32>,
    nowhere: Option<(u32, u32)>,
}

fn count(number: &mut u32) -> u32 {
    *number += 1;
    *number - 1
}

impl Rows {
    fn step(&mut self, instruction: &Instruction) -> Step {
        let mut step = Step {
            action: Action::Nothing,
            guard: instruction.guard,
            results: [CARRY; 4],
            sources: [CARRY; 5],
            form: Form::of(instruction),
            line: instruction.line,
        };
        let fits = instruction.sources.len() <= step.sources.len()
            && instruction.results.len() <= step.results.len();
        if !fits {
            step.action = unknown(instruction);
            return step;
        }
        for index in 0..2.max(instruction.results.len()) {
            let register = instruction.results.get(index).copied().unwrap_or(Register::Nowhere);
            step.results[index] = self.result(register, writes_predicate(instruction, index));
        }
        for (index, operand) in instruction.sources.iter().enumerate() {
            step.sources[index] = self.source(*operand, reads_predicate(instruction, index));
        }
        step.action = action(instruction);
        step
    }

    fn result(&mut self, register: Register, is_predicate: bool) -> u32 {
        match register {
            Register::Row(number) | Register::Predicate(number) => number,
            Register::Nowhere => {
                let (rows, predicates) = (&mut self.rows, &mut self.predicates);
                let (row, predicate) = *self.nowhere.get_or_insert_with(|| (count(rows), count(predicates)));
                if is_predicate { predicate } else { row }
            }
        }
    }

    fn source(&mut self, operand: Operand, is_predicate: bool) -> u32 {
        let rows = &mut self.rows;
        match operand {
            Operand::Register(register) => self.result(register, is_predicate),
            Operand::Value(value) if is_predicate => {
                let predicate = count(&mut self.predicates);
                let mask = if value == 0 { 0 } else { Mask::MAX };
                self.constant_predicates.push((mask, predicate as usize));
                predicate
            }
            Operand::Value(value) => *self.constants.entry(value).or_insert_with(|| count(rows)),
            Operand::Special(special) => *self.specials.entry(special).or_insert_with(|| count(rows)),
            Operand::Variable(index) => *self.variables.entry(index).or_insert_with(|| count(rows)),
        }
    }
}

/// Whether a result of the instruction is a predicate.
fn writes_predicate(instruction: &Instruction, index: usize) -> bool {
    match instruction.opcode {
        Opcode::Setp => true,
        Opcode::Shfl => index == 1,
        _ => instruction.kind == Type::Pred,
    }
}

/// Whether a source of the instruction is a predicate.
fn reads_predicate(instruction: &Instruction, index: usize) -> bool {
    match instruction.opcode {
        Opcode::Setp | Opcode::Selp => index == 2,
        _ => instruction.kind == Type::Pred,
    }
}

/// Whether each register is of the kind that its place asks for.
fn registers_fit(instruction: &Instruction) -> bool {
    let fits = |register: Register, is_predicate: bool| match register {
        Register::Row(_) => !is_predicate,
        Register::Predicate(_) => is_predicate,
        Register::Nowhere => true,
    };
    let results = instruction.results.iter().enumerate();
    let sources = instruction.sources.iter().enumerate();
    results.clone().all(|(index, register)| fits(*register, writes_predicate(instruction, index)))
        && sources.clone().all(|(index, operand)| match operand {
            Operand::Register(register) => fits(*register, reads_predicate(instruction, index)),
            _ => true,
        })
}

fn unknown(instruction: &Instruction) -> Action {
    let Instruction { opcode, kind, source_kind, space, .. } = instruction;
    Action::Unknown(format!("{opcode:?} of {kind:?} and {source_kind:?} in {space:?} memory"))
}

fn action(instruction: &Instruction) -> Action {
    let elements = match instruction.opcode {
        Opcode::Ld => instruction.results.len(),
        _ => instruction.sources.len().saturating_sub(1),
    };
    let access = Access {
        space: instruction.space,
        offset: instruction.offset as u64,
        bytes: instruction.kind.bytes(),
        elements,
        kind: instruction.kind,
    };
    if !registers_fit(instruction) {
        return unknown(instruction);
    }
    match (instruction.opcode, instruction.combine) {
        (Opcode::Ld, _) => Action::Load(access),
        (Opcode::St, _) => Action::Store(access),
        (Opcode::Atom, Some(combine)) => Action::Atomic(Access { elements: 1, ..access }, combine),
        (Opcode::Bra, _) => Action::Branch(instruction.target),
        (Opcode::Ret, _) => Action::Exit,
        (Opcode::Bar, _) => Action::Barrier,
        (Opcode::Shfl, _) => Action::Shuffle(instruction.shuffle),
        (Opcode::Assert, _) => Action::Assert(!instruction.sources.is_empty()),
        (Opcode::Trap, _) => Action::Trap,
        (Opcode::Fence, _) => Action::Nothing,
        _ => select::compute(instruction).map_or_else(|| unknown(instruction), Action::Compute),
    }
}
