//! Arithmetic of floating-point numbers.
//!
//! Instructions that are exact by definition (IEEE 754, one rounding each) are exact here. Approximate ones
//! (`ex2.approx`, `rsqrt.approx`) give the nearest number: their last bits are those of no chip.

#![expect(clippy::disallowed_methods, reason = "an fma of PTX rounds once")]

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{Compute, simd};
use crate::ptx::types::{Instruction, Opcode, Rounding};

/// A floating-point type of PTX.
pub trait Float:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The bit of the sign.
    const SIGN: u64;
    /// The number in the low bits of a row's element.
    fn of(lane: u64) -> Self;
    /// As a row's element; higher bits are zero.
    fn lane(self) -> u64;
    /// The same number in f64.
    fn wide(self) -> f64;
    /// The nearest number.
    fn nearest(wide: f64) -> Self;
    /// A product and a sum, rounded once.
    fn fused(self, factor: Self, addend: Self) -> Self;
    /// Zero in the place of a subnormal number, where the type can be asked for that.
    fn flushed(self) -> Self;
}

macro_rules! native {
    ($name:ident, $bits:ident, $flushed:expr) => {
        impl Float for $name {
            const SIGN: u64 = 1 << ($bits::BITS - 1);
            fn of(lane: u64) -> Self {
                Self::from_bits(lane as $bits)
            }
            fn lane(self) -> u64 {
                u64::from(self.to_bits())
            }
            fn wide(self) -> f64 {
                f64::from(self)
            }
            fn nearest(wide: f64) -> Self {
                wide as $name
            }
            #[inline(always)]
            fn fused(self, factor: Self, addend: Self) -> Self {
                self.mul_add(factor, addend)
            }
            fn flushed(self) -> Self {
                $flushed(self)
            }
        }
    };
}

native!(f32, u32, |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x });
native!(f64, u64, std::convert::identity);

macro_rules! half {
    ($name:ident) => {
        impl Float for $name {
            const SIGN: u64 = 1 << 15;
            fn of(lane: u64) -> Self {
                Self::from_bits(lane as u16)
            }
            fn lane(self) -> u64 {
                u64::from(self.to_bits())
            }
            fn wide(self) -> f64 {
                f64::from(self.to_f32())
            }
            fn nearest(wide: f64) -> Self {
                Self::from_f64(wide)
            }
            fn fused(self, factor: Self, addend: Self) -> Self {
                Self::from_f64(self.wide().mul_add(factor.wide(), addend.wide()))
            }
            fn flushed(self) -> Self {
                self
            }
        }
    };
}

half!(f16);
half!(bf16);

/// The smaller or larger number; where one is NaN, the other, or NaN if that is to be kept.
fn extreme<T: Float>(a: T, b: T, larger: bool, keep_nan: bool) -> T {
    let (x, y) = (a.wide(), b.wide());
    if x.is_nan() || y.is_nan() {
        return match (keep_nan, x.is_nan()) {
            (true, _) => T::nearest(f64::NAN),
            (false, true) => b,
            (false, false) => a,
        };
    }
    // Zeros of both signs are equal, and yet the positive one is the larger.
    let first = if x == y { larger == x.is_sign_positive() } else { (x > y) == larger };
    if first { a } else { b }
}

/// A function over lanes of numbers, with subnormal ones as zero if the instruction says so.
macro_rules! over_lanes {
    ($flush:expr, |$($x:ident),*| $value:expr) => {
        if $flush {
            (|r, s, m| r.map(s, m, |[$($x),*]| {
                $(let $x = T::of($x).flushed();)*
                $value.flushed().lane()
            })) as Compute
        } else {
            |r, s, m| r.map(s, m, |[$($x),*]| {
                $(let $x = T::of($x);)*
                $value.lane()
            })
        }
    };
}

/// The function of an instruction on numbers of one type.
pub fn compute<T: Float>(instruction: &Instruction) -> Option<Compute> {
    let Instruction { opcode, flush, keep_nan, .. } = *instruction;
    if instruction.saturate {
        return None;
    }
    if instruction.rounding.is_some_and(|rounding| rounding != Rounding::Nearest) {
        return directed::compute(instruction);
    }
    Some(match opcode {
        Opcode::Add => over_lanes!(flush, |a, b| a + b),
        Opcode::Sub => over_lanes!(flush, |a, b| a - b),
        Opcode::Mul => over_lanes!(flush, |a, b| a * b),
        Opcode::Fma => match simd::fused::<T>().filter(|_| !flush) {
            Some(fused) => fused,
            None => over_lanes!(flush, |a, b, c| a.fused(b, c)),
        },
        Opcode::Div => over_lanes!(flush, |a, b| a / b),
        // The approximate reciprocal of an f64 has the upper half of its bits.
        Opcode::Rcp if instruction.approximate && T::SIGN == f64::SIGN => {
            |r, s, m| r.map(s, m, |[a]| (1.0 / f64::of(a)).lane() & !0xffff_ffff)
        }
        Opcode::Rcp => over_lanes!(flush, |a| T::nearest(1.0) / a),
        Opcode::Sqrt => over_lanes!(flush, |a| T::nearest(a.wide().sqrt())),
        Opcode::Rsqrt => over_lanes!(flush, |a| T::nearest(1.0 / a.wide().sqrt())),
        Opcode::Ex2 => over_lanes!(flush, |a| T::nearest(a.wide().exp2())),
        Opcode::Lg2 => over_lanes!(flush, |a| T::nearest(a.wide().log2())),
        Opcode::Sin => over_lanes!(flush, |a| T::nearest(a.wide().sin())),
        Opcode::Cos => over_lanes!(flush, |a| T::nearest(a.wide().cos())),
        Opcode::Tanh => over_lanes!(flush, |a| T::nearest(a.wide().tanh())),
        Opcode::Min if keep_nan => over_lanes!(flush, |a, b| extreme(a, b, false, true)),
        Opcode::Min => over_lanes!(flush, |a, b| extreme(a, b, false, false)),
        Opcode::Max if keep_nan => over_lanes!(flush, |a, b| extreme(a, b, true, true)),
        Opcode::Max => over_lanes!(flush, |a, b| extreme(a, b, true, false)),
        Opcode::Abs => |r, s, m| r.map(s, m, |[a]| T::of(a).lane() & !T::SIGN),
        Opcode::Neg => |r, s, m| r.map(s, m, |[a]| T::of(a).lane() ^ T::SIGN),
        Opcode::Copysign => |r, s, m| r.map(s, m, |[a, b]| (a & T::SIGN) | (T::of(b).lane() & !T::SIGN)),
        _ => return None,
    })
}

/// The function of an instruction on pairs of numbers of 16 bits.
pub fn compute_pair<T: Float>(instruction: &Instruction) -> Option<Compute> {
    fn both<T: Float, const N: usize>(lanes: [u64; N], compute: impl Fn([T; N]) -> T) -> u64 {
        let [low, high] = [0, 16].map(|shift| compute(lanes.map(|lane| T::of(lane >> shift))).lane());
        low | (high << 16)
    }
    let is_plain = !instruction.saturate && !instruction.flush && !instruction.keep_nan;
    Some(match instruction.opcode {
        _ if !is_plain => return None,
        Opcode::Add => |r, s, m| r.map(s, m, |lanes| both(lanes, |[a, b]: [T; 2]| a + b)),
        Opcode::Sub => |r, s, m| r.map(s, m, |lanes| both(lanes, |[a, b]: [T; 2]| a - b)),
        Opcode::Mul => |r, s, m| r.map(s, m, |lanes| both(lanes, |[a, b]: [T; 2]| a * b)),
        Opcode::Fma => |r, s, m| r.map(s, m, |lanes| both(lanes, |[a, b, c]: [T; 3]| a.fused(b, c))),
        _ => return None,
    })
}

/// Results that are rounded down, up or toward zero: the nearest number is corrected by the sign of its
/// error, which is exact (T. J. Dekker, "A floating-point technique for extending the available precision",
/// 1971).
pub mod directed {
    use super::{Compute, Float, Instruction, Opcode, Rounding};
    use crate::ptx::types::Type;

    /// The rounded sum, and what the rounding lost.
    fn sum(a: f64, b: f64) -> (f64, f64) {
        let sum = a + b;
        let of_b = sum - a;
        (sum, (a - (sum - of_b)) + (b - of_b))
    }

    /// Whether a number that is `error` less than the exact result has to be replaced by the next one up or
    /// down.
    fn correction(nearest: f64, error: f64, rounding: Rounding) -> Option<bool> {
        if error == 0.0 || !nearest.is_finite() {
            return None;
        }
        match rounding {
            Rounding::Down if error < 0.0 => Some(false),
            Rounding::Up if error > 0.0 => Some(true),
            Rounding::TowardZero if error < 0.0 && nearest > 0.0 => Some(false),
            Rounding::TowardZero if error > 0.0 && nearest < 0.0 => Some(true),
            _ => None,
        }
    }

    /// The nearest number, corrected where the exact result is more or less by `error`.
    pub fn rounded_f32(nearest: f32, error: f64, rounding: Rounding) -> f32 {
        match correction(f64::from(nearest), error, rounding) {
            Some(true) => nearest.next_up(),
            Some(false) => nearest.next_down(),
            None => nearest,
        }
    }

    fn rounded_f64(nearest: f64, error: f64, rounding: Rounding) -> f64 {
        match correction(nearest, error, rounding) {
            Some(true) => nearest.next_up(),
            Some(false) => nearest.next_down(),
            None => nearest,
        }
    }

    /// Of `a * b + c`: the product of two f32 is exact in f64.
    fn fused_f32(a: f32, b: f32, c: f32, rounding: Rounding) -> f32 {
        let nearest = a.mul_add(b, c);
        let (sum, lost) = sum(f64::from(a) * f64::from(b), f64::from(c));
        rounded_f32(nearest, (sum - f64::from(nearest)) + lost, rounding)
    }

    fn sum_f64(a: f64, b: f64, rounding: Rounding) -> f64 {
        let (nearest, lost) = sum(a, b);
        rounded_f64(nearest, lost, rounding)
    }

    fn product_f64(a: f64, b: f64, rounding: Rounding) -> f64 {
        let nearest = a * b;
        rounded_f64(nearest, a.mul_add(b, -nearest), rounding)
    }

    /// A function over lanes, given how results are rounded.
    macro_rules! over_lanes {
        ($type:ident, |$($x:ident),*; $how:ident| $value:expr) => {
            |r, s, m| {
                let $how = s.form.rounding.unwrap_or(Rounding::Nearest);
                r.map(s, m, |[$($x),*]| {
                    $(let $x = $type::of($x);)*
                    if s.form.flush { $value.flushed().lane() } else { $value.lane() }
                });
            }
        };
    }

    /// The function of an instruction whose result is not rounded to the nearest number.
    pub fn compute(instruction: &Instruction) -> Option<Compute> {
        Some(match (instruction.opcode, instruction.kind) {
            (Opcode::Add, Type::F32) => over_lanes!(f32, |a, b; how| fused_f32(a, 1.0, b, how)),
            (Opcode::Sub, Type::F32) => over_lanes!(f32, |a, b; how| fused_f32(a, 1.0, -b, how)),
            // A negative zero changes no sum, not even that of a negative zero.
            (Opcode::Mul, Type::F32) => over_lanes!(f32, |a, b; how| fused_f32(a, b, -0.0, how)),
            (Opcode::Fma, Type::F32) => over_lanes!(f32, |a, b, c; how| fused_f32(a, b, c, how)),
            (Opcode::Add, Type::F64) => over_lanes!(f64, |a, b; how| sum_f64(a, b, how)),
            (Opcode::Sub, Type::F64) => over_lanes!(f64, |a, b; how| sum_f64(a, -b, how)),
            (Opcode::Mul, Type::F64) => over_lanes!(f64, |a, b; how| product_f64(a, b, how)),
            _ => return None,
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn directed_results_enclose_the_exact_one() {
            let tiny = f32::EPSILON / 8.0;
            assert_eq!(fused_f32(1.0, 1.0, tiny, Rounding::Down), 1.0);
            assert_eq!(fused_f32(1.0, 1.0, tiny, Rounding::Up), 1f32.next_up());
            assert_eq!(fused_f32(1.0, 1.0, -tiny, Rounding::TowardZero), 1f32.next_down());
            assert_eq!(fused_f32(-1.0, 1.0, tiny, Rounding::TowardZero), (-1f32).next_up());
            assert_eq!(fused_f32(1.5, 2.0, 0.0, Rounding::Up), 3.0);
            assert_eq!(sum_f64(1.0, 1e-30, Rounding::Up), 1f64.next_up());
            let third = 1.0 / 3.0;
            assert!(product_f64(third, third, Rounding::Down) < product_f64(third, third, Rounding::Up));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_tell_zeros_and_nan_apart() {
        assert_eq!(extreme(-0.0f32, 0.0, true, false).to_bits(), 0f32.to_bits());
        assert_eq!(extreme(0.0f32, -0.0, false, false).to_bits(), (-0f32).to_bits());
        assert_eq!(extreme(f32::NAN, 2.0, false, false), 2.0);
        assert!(extreme(2.0, f32::NAN, false, true).is_nan());
        assert_eq!(extreme(3.0f64, 2.0, true, false), 3.0);
    }
}
