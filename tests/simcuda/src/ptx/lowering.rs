//! Turns a kernel's statements into instructions: names become registers, addresses and constants, branches
//! become numbers of instructions, and called functions are written out where they are called.

use std::collections::HashMap;

use super::lexer::number;
use super::module::{Function, Item, Module};
use super::opcode;
use super::statement::{Argument, Statement};
use super::types::{Guard, Instruction, Opcode, Operand, Register, Space, Special, Type};
use crate::fault::{Fault, Result};

/// A kernel as instructions.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Where each parameter is among [`Kernel::parameter_bytes`], and its size.
    pub parameters: Vec<(usize, usize)>,
    /// Bytes of all parameters.
    pub parameter_bytes: usize,
    /// What it does. The last one returns.
    pub instructions: Vec<Instruction>,
    /// Registers that hold a number a lane.
    pub rows: u32,
    /// Registers that hold a bit a lane. The first is the carry.
    pub predicates: u32,
    /// Bytes of a thread's own memory.
    pub local_bytes: usize,
    /// Bytes of a block's shared memory whose size the text gives.
    pub shared_bytes: usize,
}

/// The predicate that holds the carry.
pub const CARRY: u32 = 0;

/// What a name means.
#[derive(Clone, Copy)]
enum Symbol {
    Register(Register),
    /// Bytes from the start of a space.
    Address(Space, usize),
}

type Names<'m> = HashMap<std::borrow::Cow<'m, str>, Symbol>;

struct Lowering<'m> {
    module: &'m Module,
    kernel: Kernel,
    scopes: Vec<Names<'m>>,
    /// Labels with the call that they belong to, because a function may be called more than once.
    labels: HashMap<(usize, &'m str), u32>,
    branches: Vec<(usize, (usize, &'m str))>,
    /// Number of the call that is being written out; zero is the kernel itself.
    call: usize,
    calls: usize,
}

/// Where the end of a called function is. No label of a text is empty.
const END: &str = "";

/// The instructions of a kernel of the module.
pub fn kernel(module: &Module, name: &str, function: &Function) -> Result<Kernel> {
    let kernel = Kernel {
        name: name.to_owned(),
        parameters: vec![],
        parameter_bytes: 0,
        instructions: vec![],
        rows: 0,
        predicates: CARRY + 1,
        local_bytes: 0,
        shared_bytes: 0,
    };
    let mut lowering = Lowering {
        module,
        kernel,
        scopes: vec![],
        labels: HashMap::new(),
        branches: vec![],
        call: 0,
        calls: 0,
    };
    let mut names = Names::new();
    for item in &function.parameters {
        let start = lowering.kernel.parameter_bytes.next_multiple_of(item.alignment);
        lowering.kernel.parameters.push((start, item.bytes));
        lowering.kernel.parameter_bytes = start + item.bytes;
        names.insert(item.name.as_str().into(), Symbol::Address(Space::Parameter, start));
    }
    for item in module.shared.iter().filter(|item| item.bytes > 0) {
        let start = reserve(&mut lowering.kernel.shared_bytes, item.bytes, item.alignment);
        names.insert(item.name.as_str().into(), Symbol::Address(Space::Shared, start));
    }
    lowering.scopes.push(names);
    lowering.body(function)?;
    lowering.kernel.instructions.push(Instruction::new(Opcode::Ret, 0));
    for (instruction, label) in std::mem::take(&mut lowering.branches) {
        let line = lowering.kernel.instructions[instruction].line;
        let target = lowering.labels.get(&label);
        let target = target.ok_or_else(|| Fault::ptx(line, format!("there is no label {}", label.1)))?;
        lowering.kernel.instructions[instruction].target = *target;
    }
    Ok(lowering.kernel)
}

/// Takes so many bytes behind those that are taken.
fn reserve(taken: &mut usize, bytes: usize, alignment: usize) -> usize {
    let start = taken.next_multiple_of(alignment);
    *taken = start + bytes;
    start
}

fn special(name: &str) -> Option<Special> {
    let axis = |prefix: &str| match name.strip_prefix(prefix)? {
        ".x" => Some(0),
        ".y" => Some(1),
        ".z" => Some(2),
        _ => None,
    };
    let along = [
        axis("%tid").map(Special::Thread),
        axis("%ntid").map(Special::BlockSize),
        axis("%ctaid").map(Special::Block),
        axis("%nctaid").map(Special::GridSize),
    ];
    along.into_iter().flatten().next().or(match name {
        "%laneid" => Some(Special::Lane),
        "%warpid" => Some(Special::Warp),
        "%lanemask_lt" => Some(Special::LanesBefore),
        _ => None,
    })
}

impl<'m> Lowering<'m> {
    fn here(&self) -> u32 {
        self.kernel.instructions.len() as u32
    }

    fn declare(&mut self, name: impl Into<std::borrow::Cow<'m, str>>, symbol: Symbol) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.into(), symbol);
        }
    }

    fn body(&mut self, function: &Function) -> Result<()> {
        self.scopes.push(Names::new());
        for statement in self.module.statements(function)? {
            match statement {
                Statement::Scope => self.scopes.push(Names::new()),
                Statement::EndScope => drop(self.scopes.pop()),
                Statement::Label(label) => drop(self.labels.insert((self.call, label), self.here())),
                Statement::Registers(kind, names) => self.registers(kind, names),
                Statement::Variable(space, item) => {
                    let taken = match space {
                        Space::Shared => &mut self.kernel.shared_bytes,
                        _ => &mut self.kernel.local_bytes,
                    };
                    let start = reserve(taken, item.bytes, item.alignment);
                    self.declare(item.name, Symbol::Address(space, start));
                }
                Statement::Instruction { guard, opcode, arguments, line } => {
                    let done = self.instruction(guard, opcode, &arguments, line);
                    done.map_err(|reason| Fault::ptx(line, format!("{opcode}: {reason}")))?;
                }
            }
        }
        self.scopes.pop();
        Ok(())
    }

    fn registers(&mut self, kind: Type, names: Vec<(&'m str, Option<usize>)>) {
        for (name, count) in names {
            for index in 0..count.unwrap_or(1) {
                let number = match kind {
                    Type::Pred => &mut self.kernel.predicates,
                    _ => &mut self.kernel.rows,
                };
                let register = match kind {
                    Type::Pred => Register::Predicate(*number),
                    _ => Register::Row(*number),
                };
                *number += 1;
                match count {
                    Some(_) => self.declare(format!("{name}{index}"), Symbol::Register(register)),
                    None => self.declare(name, Symbol::Register(register)),
                }
            }
        }
    }

    fn symbol(&self, name: &str) -> Option<Symbol> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name)).copied()
    }

    fn register(&self, name: &str) -> Result<Register, String> {
        match self.symbol(name) {
            Some(Symbol::Register(register)) => Ok(register),
            None if name == "_" => Ok(Register::Nowhere),
            _ => Err(format!("{name} is not a register")),
        }
    }

    fn operand(&self, name: &str) -> Result<Operand, String> {
        if let Some(symbol) = self.symbol(name) {
            return Ok(match symbol {
                Symbol::Register(register) => Operand::Register(register),
                Symbol::Address(_, start) => Operand::Value(start as u64),
            });
        }
        if let Some(value) = number(name) {
            return Ok(Operand::Value(value));
        }
        if let Some(special) = special(name) {
            return Ok(Operand::Special(special));
        }
        if let Some(index) = self.module.variables.iter().position(|variable| variable.name == name) {
            return Ok(Operand::Variable(index as u32));
        }
        if self.module.shared.iter().any(|item| item.name == name) {
            return Ok(Operand::Special(Special::DynamicShared));
        }
        match name {
            "WARP_SZ" => Ok(Operand::Value(32)),
            // A part of a vector that is not written.
            "_" => Ok(Operand::Value(0)),
            _ => Err(format!("{name} is not known")),
        }
    }

    fn instruction(
        &mut self,
        guard: Option<(&'m str, bool)>,
        opcode: &str,
        arguments: &[Argument<'m>],
        line: u32,
    ) -> Result<(), String> {
        let mut found = opcode::instruction(opcode, line)?;
        if let Some((name, negated)) = guard {
            let Register::Predicate(predicate) = self.register(name)? else {
                return Err(format!("{name} is not a predicate"));
            };
            found.guard = Some(Guard { predicate, negated });
        }
        match found.opcode {
            Opcode::Assert => return self.call(found, arguments),
            Opcode::Bra => {
                let [Argument::Name(label)] = arguments else { return Err("it needs one label".to_owned()) };
                self.branches.push((self.kernel.instructions.len(), (self.call, label)));
            }
            Opcode::Ret if self.call > 0 => {
                found.opcode = Opcode::Bra;
                self.branches.push((self.kernel.instructions.len(), (self.call, END)));
            }
            Opcode::Ret | Opcode::Bar | Opcode::Fence | Opcode::Trap => {}
            _ => self.arguments(&mut found, opcode, arguments)?,
        }
        self.kernel.instructions.push(found);
        Ok(())
    }

    /// Resolves arguments, of which the first is the result, except where there is none.
    fn arguments(
        &self,
        found: &mut Instruction,
        opcode: &str,
        arguments: &[Argument<'m>],
    ) -> Result<(), String> {
        let has_result = found.opcode != Opcode::St && !opcode.starts_with("red.");
        for (index, argument) in arguments.iter().enumerate() {
            let is_result = index == 0 && has_result;
            match argument {
                Argument::Name(name) if is_result => found.results = vec![self.register(name)?],
                Argument::Pair(first, second) if is_result => {
                    found.results = vec![self.register(first)?, self.register(second)?];
                }
                Argument::Vector(names) if is_result => {
                    found.results = names.iter().map(|name| self.register(name)).collect::<Result<_, _>>()?;
                    if found.opcode == Opcode::Mov {
                        found.opcode = Opcode::Unpack;
                    }
                }
                Argument::Name(name) => found.sources.push(self.operand(name)?),
                Argument::Not(name) => {
                    found.negated |= 1 << found.sources.len();
                    found.sources.push(self.operand(name)?);
                }
                Argument::Vector(names) => {
                    if found.opcode == Opcode::Mov {
                        found.opcode = Opcode::Pack;
                    }
                    for name in names {
                        found.sources.push(self.operand(name)?);
                    }
                }
                Argument::Memory(name, offset) => {
                    found.offset = *offset;
                    if let Some(Symbol::Address(space @ (Space::Local | Space::Parameter), _)) =
                        self.symbol(name)
                    {
                        found.space = space;
                    }
                    found.sources.push(self.operand(name)?);
                }
                _ => return Err(format!("the argument {argument:?} is not expected")),
            }
        }
        Ok(())
    }

    /// Writes a called function out; the call of an assertion that failed stays an instruction.
    fn call(&mut self, mut call: Instruction, arguments: &[Argument<'m>]) -> Result<(), String> {
        let mut lists = arguments.iter().filter_map(|argument| match argument {
            Argument::List(names) => Some(names.as_slice()),
            _ => None,
        });
        let name = arguments.iter().find_map(|argument| match argument {
            Argument::Name(name) => Some(*name),
            _ => None,
        });
        let name = name.ok_or("it needs a function")?;
        if name == "__assertfail" {
            // Its first argument is the address of the text.
            if let Some(text) = lists.next().and_then(|names| names.first()) {
                call.sources.push(self.operand(text)?);
            }
            self.kernel.instructions.push(call);
            return Ok(());
        }
        if call.guard.is_some() {
            return Err("calls on a condition are not supported".to_owned());
        }
        let module = self.module;
        let function = module.function_named(name).ok_or_else(|| format!("there is no function {name}"))?;
        let results = if function.results.is_empty() { &[][..] } else { lists.next().unwrap_or_default() };
        let parameters = lists.next().unwrap_or_default();
        let mut names = Names::new();
        let given = |items: &'m [Item], given: &[&'m str], names: &mut Names<'m>| {
            for (item, name) in items.iter().zip(given) {
                let symbol = self.symbol(name).ok_or_else(|| format!("{name} is not known"))?;
                names.insert(item.name.as_str().into(), symbol);
            }
            Ok::<_, String>(())
        };
        given(&function.parameters, parameters, &mut names)?;
        given(&function.results, results, &mut names)?;
        // A function sees its own names only.
        let scopes = std::mem::replace(&mut self.scopes, vec![names]);
        let caller = self.call;
        self.calls += 1;
        self.call = self.calls;
        self.body(function).map_err(|fault| fault.message)?;
        self.labels.insert((self.call, END), self.here());
        self.call = caller;
        self.scopes = scopes;
        Ok(())
    }
}
