//! Finds the function that computes an instruction.

use super::{Compute, convert, float, integer, logic};
use crate::ptx::types::{Instruction, Opcode, Space, Type};

/// The function of an instruction that computes; none where the interpreter has none.
pub fn compute(instruction: &Instruction) -> Option<Compute> {
    let enough = instruction.sources.len() >= sources(instruction.opcode);
    if !enough || instruction.results.is_empty() {
        return None;
    }
    match instruction.opcode {
        Opcode::Mov => mov(instruction),
        Opcode::Pack => logic::pack(instruction.kind, instruction.sources.len()),
        Opcode::Unpack => logic::unpack(instruction.kind, instruction.results.len()),
        Opcode::And | Opcode::Or | Opcode::Xor | Opcode::Not => {
            logic::bits(instruction.opcode, instruction.kind)
        }
        Opcode::Selp => Some(logic::select),
        Opcode::Bfi => Some(logic::insert),
        Opcode::Setp => logic::compare(instruction),
        Opcode::Set => logic::compare_to_number(instruction),
        Opcode::Cvt => convert::compute(instruction),
        _ if instruction.carry_in || instruction.carry_out => integer::with_carry(instruction),
        _ => match instruction.kind {
            Type::F32 => float::compute::<f32>(instruction),
            Type::F64 => float::compute::<f64>(instruction),
            Type::F16 => float::compute::<half::f16>(instruction),
            Type::BF16 => float::compute::<half::bf16>(instruction),
            Type::BF16x2 => float::compute_pair::<half::bf16>(instruction),
            Type::F16x2 => float::compute_pair::<half::f16>(instruction),
            Type::S16 => integer::compute::<i16>(instruction.opcode),
            Type::S32 => integer::compute::<i32>(instruction.opcode),
            Type::S64 => integer::compute::<i64>(instruction.opcode),
            Type::U16 | Type::B16 => integer::compute::<u16>(instruction.opcode),
            Type::U32 | Type::B32 => integer::compute::<u32>(instruction.opcode),
            Type::U64 | Type::B64 => integer::compute::<u64>(instruction.opcode),
            Type::Pred | Type::B8 | Type::U8 | Type::S8 => None,
        },
    }
}

/// Sources that the function of an opcode reads at least.
fn sources(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Bfi => 4,
        Opcode::Mad | Opcode::MadWide | Opcode::MadHigh | Opcode::Fma | Opcode::Selp => 3,
        Opcode::Add
        | Opcode::Sub
        | Opcode::Mul
        | Opcode::MulWide
        | Opcode::MulHigh
        | Opcode::Div
        | Opcode::Rem
        | Opcode::Min
        | Opcode::Max
        | Opcode::And
        | Opcode::Or
        | Opcode::Xor
        | Opcode::Shl
        | Opcode::Shr
        | Opcode::Setp
        | Opcode::Set
        | Opcode::Copysign => 2,
        _ => 1,
    }
}

fn mov(instruction: &Instruction) -> Option<Compute> {
    if instruction.kind == Type::Pred {
        return Some(|registers, step, mask| {
            let bits = registers.predicates[step.sources[0] as usize];
            registers.set_predicate(step.results[0], mask, bits);
        });
    }
    // Addresses of shared and local memory as generic ones: the interpreter has no such addresses.
    if matches!(instruction.space, Space::Shared | Space::Local) {
        return None;
    }
    Some(|registers, step, mask| registers.map(step, mask, |[value]| value))
}
