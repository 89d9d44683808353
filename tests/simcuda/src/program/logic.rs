//! Bits, comparisons, and values that are chosen or put together.

use super::{Compute, Mask, Step};
use crate::interpreter::Registers;
use crate::interpreter::registers::lanes;
use crate::program::float::Float;
use crate::program::integer::Integer;
use crate::ptx::types::{Combine, Comparison, Instruction, Opcode, Type};

/// The low bits of a row's element that a type has.
pub fn low_bits(kind: Type) -> u64 {
    match kind.bytes() {
        8 => u64::MAX,
        bytes => (1 << (8 * bytes)) - 1,
    }
}

/// Bits of an instruction on the bits of its operands.
pub fn bits(opcode: Opcode, kind: Type) -> Option<Compute> {
    if kind == Type::Pred {
        return Some(|registers, step, mask| {
            let [a, b] = [0, 1].map(|n| {
                let bits = registers.predicates[step.sources[n] as usize];
                if (step.form.negated >> n) & 1 == 1 { !bits } else { bits }
            });
            let bits = match step.form.opcode {
                Opcode::And => a & b,
                Opcode::Or => a | b,
                Opcode::Xor => a ^ b,
                _ => !a,
            };
            registers.set_predicate(step.results[0], mask, bits);
        });
    }
    Some(match opcode {
        Opcode::And => |r, s, m| r.map(s, m, |[a, b]| a & b),
        Opcode::Or => |r, s, m| r.map(s, m, |[a, b]| a | b),
        Opcode::Xor => |r, s, m| r.map(s, m, |[a, b]| a ^ b),
        _ => |r, s, m| {
            let keep = low_bits(s.form.kind);
            r.map(s, m, |[a]| !a & keep);
        },
    })
}

/// The first or the second operand, as the predicate says.
pub fn select(registers: &mut Registers, step: &Step, mask: Mask) {
    let bits = registers.predicates[step.sources[2] as usize];
    let chosen = if (step.form.negated >> 2) & 1 == 1 { !bits } else { bits };
    let rows = &mut registers.rows;
    for lane in lanes(mask) {
        let source = if (chosen >> lane) & 1 == 1 { step.sources[0] } else { step.sources[1] };
        rows[step.results[0] as usize][lane] = rows[source as usize][lane];
    }
}

/// Replaces some bits of the second operand by the first: as many as the fourth says, from the third on.
pub fn insert(registers: &mut Registers, step: &Step, mask: Mask) {
    let keep = low_bits(step.form.kind);
    registers.map(step, mask, |[bits, into, start, length]| {
        let (start, length) = ((start & 255) as u32, (length & 255) as u32);
        let field = 1u64.checked_shl(length).unwrap_or(0).wrapping_sub(1);
        let field = field.checked_shl(start).unwrap_or(0);
        ((into & !field) | (bits.checked_shl(start).unwrap_or(0) & field)) & keep
    });
}

/// Puts two or four numbers into one.
pub fn pack(kind: Type, parts: usize) -> Option<Compute> {
    Some(match (kind.bytes(), parts) {
        (4, 2) => |r, s, m| r.map(s, m, |[a, b]| (a & 0xffff) | ((b & 0xffff) << 16)),
        (8, 2) => |r, s, m| r.map(s, m, |[a, b]| (a & 0xffff_ffff) | (b << 32)),
        (4, 4) => |r, s, m| {
            r.map(s, m, |parts: [u64; 4]| {
                parts.iter().rev().fold(0, |whole, part| (whole << 8) | (part & 0xff))
            });
        },
        (8, 4) => |r, s, m| {
            r.map(s, m, |parts: [u64; 4]| {
                parts.iter().rev().fold(0, |whole, part| (whole << 16) | (part & 0xffff))
            });
        },
        _ => return None,
    })
}

/// Takes a number apart into two or four.
pub fn unpack(kind: Type, parts: usize) -> Option<Compute> {
    fn apart<const PARTS: usize>(registers: &mut Registers, step: &Step, mask: Mask) {
        let bits = step.form.kind.bytes() as u32 * 8 / PARTS as u32;
        for lane in lanes(mask) {
            let whole = registers.rows[step.sources[0] as usize][lane];
            for part in 0..PARTS {
                let value = (whole >> (bits * part as u32)) & ((1 << bits) - 1);
                registers.rows[step.results[part] as usize][lane] = value;
            }
        }
    }
    match (kind.bytes(), parts) {
        (4 | 8, 2) => Some(apart::<2>),
        (4 | 8, 4) => Some(apart::<4>),
        _ => None,
    }
}

/// Whether a comparison of floats holds.
fn floats_compare<T: Float>(a: T, b: T, comparison: Comparison) -> bool {
    let unordered = a.partial_cmp(&b).is_none();
    match comparison {
        Comparison::Equal => a == b,
        Comparison::NotEqual => !unordered && a != b,
        Comparison::Less => a < b,
        Comparison::LessOrEqual => a <= b,
        Comparison::Greater => a > b,
        Comparison::GreaterOrEqual => a >= b,
        Comparison::EqualOrUnordered => unordered || a == b,
        Comparison::NotEqualOrUnordered => a != b,
        Comparison::LessOrUnordered => unordered || a < b,
        Comparison::LessOrEqualOrUnordered => unordered || a <= b,
        Comparison::GreaterOrUnordered => unordered || a > b,
        Comparison::GreaterOrEqualOrUnordered => unordered || a >= b,
        Comparison::BothNumbers => !unordered,
        Comparison::Unordered => unordered,
    }
}

/// Tests two operands lane by lane.
pub type Test = fn(&Registers, &Step) -> Mask;

fn test_of_floats<T: Float>(comparison: Comparison) -> Test {
    macro_rules! tests {
        ($($name:ident)*) => {
            match comparison {
                $(Comparison::$name => |r, s| {
                    r.test(s, |a, b| floats_compare(T::of(a), T::of(b), Comparison::$name))
                },)*
            }
        };
    }
    tests! {
        Equal NotEqual Less LessOrEqual Greater GreaterOrEqual EqualOrUnordered NotEqualOrUnordered
        LessOrUnordered LessOrEqualOrUnordered GreaterOrUnordered GreaterOrEqualOrUnordered BothNumbers
        Unordered
    }
}

fn test_of_integers<T: Integer>(comparison: Comparison) -> Option<Test> {
    Some(match comparison {
        Comparison::Equal => |r, s| r.test(s, |a, b| T::of(a) == T::of(b)),
        Comparison::NotEqual => |r, s| r.test(s, |a, b| T::of(a) != T::of(b)),
        Comparison::Less => |r, s| r.test(s, |a, b| T::of(a) < T::of(b)),
        Comparison::LessOrEqual => |r, s| r.test(s, |a, b| T::of(a) <= T::of(b)),
        Comparison::Greater => |r, s| r.test(s, |a, b| T::of(a) > T::of(b)),
        Comparison::GreaterOrEqual => |r, s| r.test(s, |a, b| T::of(a) >= T::of(b)),
        _ => return None,
    })
}

/// The test that a comparison of this type makes.
fn test(kind: Type, comparison: Comparison) -> Option<Test> {
    match kind {
        Type::F32 => Some(test_of_floats::<f32>(comparison)),
        Type::F64 => Some(test_of_floats::<f64>(comparison)),
        Type::F16 => Some(test_of_floats::<half::f16>(comparison)),
        Type::BF16 => Some(test_of_floats::<half::bf16>(comparison)),
        Type::S16 => test_of_integers::<i16>(comparison),
        Type::S32 => test_of_integers::<i32>(comparison),
        Type::S64 => test_of_integers::<i64>(comparison),
        Type::U16 | Type::B16 => test_of_integers::<u16>(comparison),
        Type::U32 | Type::B32 => test_of_integers::<u32>(comparison),
        Type::U64 | Type::B64 => test_of_integers::<u64>(comparison),
        _ => None,
    }
}

/// Sets a predicate by a comparison, and a second one by its contrary; both are combined with a third operand
/// if there is one.
pub fn compare(instruction: &Instruction) -> Option<Compute> {
    fn set(registers: &mut Registers, step: &Step, mask: Mask) {
        let Some(test) = step.form.test else { return };
        let bits = test(registers, step);
        let other = registers.predicates[step.sources[2] as usize];
        let other = if (step.form.negated >> 2) & 1 == 1 { !other } else { other };
        let combined = |bits: Mask| match step.form.combine {
            Some(Combine::And) => bits & other,
            Some(Combine::Or) => bits | other,
            Some(Combine::Xor) => bits ^ other,
            _ => bits,
        };
        registers.set_predicate(step.results[0], mask, combined(bits));
        registers.set_predicate(step.results[1], mask, combined(!bits));
    }
    test_of(instruction).map(|_| set as Compute)
}

/// Sets a number to one, or all ones of an integer, by a comparison; else to zero.
pub fn compare_to_number(instruction: &Instruction) -> Option<Compute> {
    fn set(registers: &mut Registers, step: &Step, mask: Mask) {
        let Some(test) = step.form.test else { return };
        let bits = test(registers, step);
        let one = match step.form.kind {
            Type::F32 => 1f32.lane(),
            Type::F16 => half::f16::ONE.lane(),
            Type::BF16 => half::bf16::ONE.lane(),
            kind => low_bits(kind),
        };
        for lane in lanes(mask) {
            let holds = (bits >> lane) & 1 == 1;
            registers.rows[step.results[0] as usize][lane] = if holds { one } else { 0 };
        }
    }
    test_of(instruction).map(|_| set as Compute)
}

/// The test of a comparison; none of other instructions.
pub fn test_of(instruction: &Instruction) -> Option<Test> {
    let kind = match instruction.opcode {
        Opcode::Setp => instruction.kind,
        Opcode::Set => instruction.source_kind,
        _ => return None,
    };
    test(kind, instruction.comparison?)
}
