//! Arithmetic of integers. Results that do not fit wrap around, as on the device.

use super::{Compute, Step};
use crate::interpreter::Registers;
use crate::interpreter::registers::lanes;
use crate::program::Mask;
use crate::ptx::lowering::CARRY;
use crate::ptx::types::{Instruction, Opcode, Type};

/// An integer of 16 to 64 bits.
pub trait Integer: Copy + Ord {
    /// Bits of a number.
    const BITS: u32;
    /// The low bits of a row's element.
    fn of(lane: u64) -> Self;
    /// As a row's element; higher bits are zero.
    fn lane(self) -> u64;
    /// The same number with more bits.
    fn long(self) -> i128;
    /// The low bits of a number.
    fn low(long: i128) -> Self;
    fn wrapping_add(self, other: Self) -> Self;
    fn wrapping_sub(self, other: Self) -> Self;
    fn wrapping_mul(self, other: Self) -> Self;
    /// The quotient; all ones where it is divided by zero.
    fn divide(self, other: Self) -> Self;
    /// The remainder; the number itself where it is divided by zero.
    fn remainder(self, other: Self) -> Self;
    /// Shifted to lower bits, keeping the sign.
    fn shift_down(self, bits: u32) -> Self;
    /// The product in twice the bits, as a row's element.
    fn wide_product(self, other: Self) -> u64;
}

macro_rules! integer {
    ($($name:ident, $unsigned:ident, $wide:ident, $wide_unsigned:ident;)*) => {$(
        impl Integer for $name {
            const BITS: u32 = $name::BITS;
            fn of(lane: u64) -> Self {
                lane as Self
            }
            fn lane(self) -> u64 {
                u64::from(self as $unsigned)
            }
            fn long(self) -> i128 {
                i128::from(self)
            }
            fn low(long: i128) -> Self {
                long as Self
            }
            fn wrapping_add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            fn wrapping_sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            fn wrapping_mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            fn divide(self, other: Self) -> Self {
                if other == 0 { !0 } else { self.wrapping_div(other) }
            }
            fn remainder(self, other: Self) -> Self {
                if other == 0 { self } else { self.wrapping_rem(other) }
            }
            fn shift_down(self, bits: u32) -> Self {
                if bits < Self::BITS {
                    self >> bits
                } else {
                    // All bits are the sign; of numbers without one they are zero.
                    (self >> (Self::BITS - 1)) >> 1
                }
            }
            fn wide_product(self, other: Self) -> u64 {
                // Of 64 bits the high half is left out: PTX has no such product.
                (self as $wide).wrapping_mul(other as $wide) as $wide_unsigned as u64
            }
        }
    )*};
}

integer! {
    i16, u16, i32, u32;
    i32, u32, i64, u64;
    i64, u64, i64, u64;
    u16, u16, u32, u32;
    u32, u32, u64, u64;
    u64, u64, u64, u64;
}

/// The function of an instruction on integers of one type.
pub fn compute<T: Integer>(opcode: Opcode) -> Option<Compute> {
    Some(match opcode {
        Opcode::Add => |r, s, m| r.map(s, m, |[a, b]| T::of(a).wrapping_add(T::of(b)).lane()),
        Opcode::Sub => |r, s, m| r.map(s, m, |[a, b]| T::of(a).wrapping_sub(T::of(b)).lane()),
        Opcode::Mul => |r, s, m| r.map(s, m, |[a, b]| T::of(a).wrapping_mul(T::of(b)).lane()),
        Opcode::MulWide => |r, s, m| r.map(s, m, |[a, b]| T::of(a).wide_product(T::of(b))),
        Opcode::MulHigh => |r, s, m| r.map(s, m, |[a, b]| high_product(T::of(a), T::of(b)).lane()),
        Opcode::Mad => |r, s, m| {
            r.map(s, m, |[a, b, c]| T::of(a).wrapping_mul(T::of(b)).wrapping_add(T::of(c)).lane());
        },
        Opcode::MadWide => |r, s, m| r.map(s, m, |[a, b, c]| wide_sum(T::of(a), T::of(b), c)),
        Opcode::MadHigh => |r, s, m| {
            r.map(s, m, |[a, b, c]| high_product(T::of(a), T::of(b)).wrapping_add(T::of(c)).lane());
        },
        Opcode::Div => |r, s, m| r.map(s, m, |[a, b]| T::of(a).divide(T::of(b)).lane()),
        Opcode::Rem => |r, s, m| r.map(s, m, |[a, b]| T::of(a).remainder(T::of(b)).lane()),
        Opcode::Min => |r, s, m| r.map(s, m, |[a, b]| T::of(a).min(T::of(b)).lane()),
        Opcode::Max => |r, s, m| r.map(s, m, |[a, b]| T::of(a).max(T::of(b)).lane()),
        Opcode::Abs => |r, s, m| r.map(s, m, |[a]| T::low(T::of(a).long().abs()).lane()),
        Opcode::Neg => |r, s, m| r.map(s, m, |[a]| T::low(-T::of(a).long()).lane()),
        // The number of bits is one of 32 bits, whatever is shifted.
        Opcode::Shl => |r, s, m| r.map(s, m, |[a, b]| shift_up(T::of(a), b as u32).lane()),
        Opcode::Shr => |r, s, m| r.map(s, m, |[a, b]| T::of(a).shift_down(b as u32).lane()),
        Opcode::Clz => |r, s, m| {
            r.map(s, m, |[a]| u64::from(T::of(a).lane().leading_zeros() + T::BITS - u64::BITS));
        },
        Opcode::Popc => |r, s, m| r.map(s, m, |[a]| u64::from(T::of(a).lane().count_ones())),
        _ => return None,
    })
}

fn high_product<T: Integer>(a: T, b: T) -> T {
    T::low(a.long().wrapping_mul(b.long()) >> T::BITS)
}

/// A product in twice the bits, and a number of as many.
fn wide_sum<T: Integer>(a: T, b: T, c: u64) -> u64 {
    let sum = a.wide_product(b).wrapping_add(c);
    if T::BITS == 16 { u64::from(sum as u32) } else { sum }
}

fn shift_up<T: Integer>(a: T, bits: u32) -> T {
    T::of(a.lane().checked_shl(bits).unwrap_or(0))
}

/// The function of an instruction that adds a carry or leaves one.
pub fn with_carry(instruction: &Instruction) -> Option<Compute> {
    let is_known = matches!(instruction.opcode, Opcode::Add | Opcode::Sub | Opcode::Mad | Opcode::MadHigh);
    is_known.then_some(carried as Compute)
}

fn carried(registers: &mut Registers, step: &Step, mask: Mask) {
    let bits = step.form.kind.bytes() as u32 * 8;
    let keep = (1u128 << bits) - 1;
    for lane in lanes(mask) {
        let operand = |n: usize| u128::from(registers.rows[step.sources[n] as usize][lane]) & keep;
        let (a, b) = (operand(0), operand(1));
        let carry = u128::from((registers.predicates[CARRY as usize] >> lane) & 1);
        let carry = if step.form.carry_in { carry } else { 0 };
        let (whole, leaves) = match step.form.opcode {
            Opcode::Sub => (a.wrapping_sub(b + carry), a < b + carry),
            opcode => {
                let whole = match opcode {
                    Opcode::Add => a + b,
                    Opcode::Mad => ((a * b) & keep) + operand(2),
                    _ => high_bits(step.form.kind, a as u64, b as u64) + operand(2),
                } + carry;
                (whole, whole > keep)
            }
        };
        registers.rows[step.results[0] as usize][lane] = (whole & keep) as u64;
        if step.form.carry_out {
            registers.set_predicate(CARRY, 1 << lane, Mask::from(leaves) << lane);
        }
    }
}

/// The upper half of a product's bits.
fn high_bits(kind: Type, a: u64, b: u64) -> u128 {
    let product = match kind {
        Type::S32 => high_product(i32::of(a), i32::of(b)).lane(),
        Type::S64 => high_product(i64::of(a), i64::of(b)).lane(),
        Type::U32 | Type::B32 => high_product(u32::of(a), u32::of(b)).lane(),
        _ => high_product(u64::of(a), u64::of(b)).lane(),
    };
    u128::from(product)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_keep_all_their_bits() {
        assert_eq!(i16::of(0xffff).wide_product(i16::of(2)), u64::from((-2i32) as u32));
        assert_eq!(i32::of(0xffff_ffff).wide_product(i32::of(3)), (-3i64) as u64);
        assert_eq!(high_product(u64::MAX, u64::MAX), u64::MAX - 1);
        assert_eq!(high_product(-1i64, 1), -1);
    }

    #[test]
    fn shifts_by_too_much_leave_the_sign() {
        assert_eq!((-5i32).shift_down(40), -1);
        assert_eq!(5u32.shift_down(32), 0);
        assert_eq!(shift_up(1u32, 32), 0);
        assert_eq!(shift_up(1u16, 17), 0);
        assert_eq!(shift_up(3u32, 31), 1 << 31);
    }

    #[test]
    fn division_by_zero_has_the_bits_of_the_device() {
        assert_eq!(7u32.divide(0), u32::MAX);
        assert_eq!((-7i64).remainder(0), -7);
        assert_eq!(i32::MIN.divide(-1), i32::MIN);
    }
}
