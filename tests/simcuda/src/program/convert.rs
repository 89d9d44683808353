//! Conversions between types.

use half::{bf16, f16};

use super::float::directed::rounded_f32;
use super::logic::low_bits;
use super::{Compute, Form};
use crate::program::float::Float;
use crate::ptx::types::{Instruction, Rounding, Type};

/// The function of a conversion.
pub fn compute(instruction: &Instruction) -> Option<Compute> {
    let Instruction { kind, source_kind, rounding, .. } = *instruction;
    if [kind, source_kind].iter().any(|kind| matches!(kind, Type::Pred | Type::F16x2 | Type::BF16x2))
        || instruction.sources.len() != 1
    {
        return None;
    }
    let is_plain = !instruction.saturate && !instruction.flush && !instruction.to_integer;
    let is_nearest = rounding.is_none_or(|rounding| rounding == Rounding::Nearest);
    // The commonest have functions of their own.
    if is_plain && is_nearest {
        match (kind, source_kind) {
            (Type::F32, Type::F16) => return Some(|r, s, m| r.map(s, m, |[x]| widened(f16::of(x)))),
            (Type::F32, Type::BF16) => return Some(|r, s, m| r.map(s, m, |[x]| (x << 16) & 0xffff_ffff)),
            (Type::F16, Type::F32) => {
                return Some(|r, s, m| r.map(s, m, |[x]| f16::from_f32(f32::of(x)).lane()));
            }
            (Type::BF16, Type::F32) => {
                return Some(|r, s, m| r.map(s, m, |[x]| bf16::from_f32(f32::of(x)).lane()));
            }
            (Type::F64, Type::F32) => return Some(|r, s, m| r.map(s, m, |[x]| f32::of(x).wide().lane())),
            (Type::F32, Type::U32) => {
                return Some(|r, s, m| r.map(s, m, |[x]| (x as u32 as f32).lane()));
            }
            (Type::F32, Type::S32) => {
                return Some(|r, s, m| r.map(s, m, |[x]| (x as i32 as f32).lane()));
            }
            _ => {}
        }
    }
    if kind.is_float() || source_kind.is_float() || instruction.saturate {
        return Some(|r, s, m| r.map(s, m, |[x]| converted(x, &s.form)));
    }
    Some(between_integers(source_kind))
}

fn widened(half: f16) -> u64 {
    half.to_f32().lane()
}

/// Extends a number to 64 bits and keeps as many as the result has.
fn between_integers(from: Type) -> Compute {
    macro_rules! from {
        ($type:ident) => {
            |r, s, m| {
                let keep = low_bits(s.form.kind);
                r.map(s, m, |[x]| x as $type as u64 & keep);
            }
        };
    }
    match from {
        Type::S8 => from!(i8),
        Type::S16 => from!(i16),
        Type::S32 => from!(i32),
        Type::U8 | Type::B8 => from!(u8),
        Type::U16 | Type::B16 => from!(u16),
        Type::U32 | Type::B32 => from!(u32),
        _ => from!(u64),
    }
}

/// A number of any type, converted to any other.
fn converted(x: u64, form: &Form) -> u64 {
    let (to, from) = (form.kind, form.source_kind);
    if !from.is_float() {
        let value = integer(x, from);
        return if to.is_float() { float_of_integer(value, form) } else { clamped(value, to) };
    }
    let mut value = match from {
        Type::F16 => f16::of(x).wide(),
        Type::BF16 => bf16::of(x).wide(),
        Type::F32 if form.flush => f32::of(x).flushed().wide(),
        Type::F32 => f32::of(x).wide(),
        _ => f64::of(x),
    };
    if form.to_integer || !to.is_float() {
        value = match form.rounding {
            None => value,
            Some(Rounding::Nearest) => value.round_ties_even(),
            Some(Rounding::TowardZero) => value.trunc(),
            Some(Rounding::Down) => value.floor(),
            Some(Rounding::Up) => value.ceil(),
        };
    }
    if !to.is_float() {
        return integer_of_float(value, to);
    }
    if form.saturate {
        value = if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) };
    }
    match to {
        Type::F16 => f16::from_f64(value).lane(),
        Type::BF16 => bf16::from_f64(value).lane(),
        Type::F32 => {
            let nearest = value as f32;
            let rounding = form.rounding.filter(|_| !form.to_integer).unwrap_or(Rounding::Nearest);
            let rounded = rounded_f32(nearest, value - f64::from(nearest), rounding);
            if form.flush { rounded.flushed().lane() } else { rounded.lane() }
        }
        _ => value.lane(),
    }
}

/// The integer in a row's element.
fn integer(x: u64, kind: Type) -> i128 {
    match kind {
        Type::S8 => i128::from(x as i8),
        Type::S16 => i128::from(x as i16),
        Type::S32 => i128::from(x as i32),
        Type::S64 => i128::from(x as i64),
        _ => i128::from(x & low_bits(kind)),
    }
}

fn float_of_integer(value: i128, form: &Form) -> u64 {
    match form.kind {
        Type::F64 => (value as f64).lane(),
        Type::F32 => {
            let nearest = value as f32;
            // The nearest number of what has at most 64 bits is an integer of fewer than 128.
            let error = (value - nearest as i128) as f64;
            rounded_f32(nearest, error, form.rounding.unwrap_or(Rounding::Nearest)).lane()
        }
        Type::F16 => f16::from_f64(value as f64).lane(),
        _ => bf16::from_f64(value as f64).lane(),
    }
}

/// The nearest integer that the type has.
fn clamped(value: i128, to: Type) -> u64 {
    let bits = to.bytes() as u32 * 8;
    let (least, most) = if to.is_signed() {
        (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    };
    value.clamp(least, most) as u64 & low_bits(to)
}

/// An integer of at most as many bits as the type has; of NaN zero, in 64 bits the least number.
fn integer_of_float(value: f64, to: Type) -> u64 {
    if value.is_nan() {
        return if to.bytes() == 8 { 1 << 63 } else { 0 };
    }
    clamped(value as i128, to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::opcode;

    fn convert(opcode: &str, x: u64) -> u64 {
        let instruction = opcode::instruction(opcode, 1).unwrap();
        converted(x, &Form::of(&instruction))
    }

    #[test]
    fn conversions_round_and_clamp_as_ptx_says() {
        assert_eq!(convert("cvt.rzi.s32.f32", (-2.7f32).lane()), u64::from(-2i32 as u32));
        assert_eq!(convert("cvt.rni.s32.f32", 2.5f32.lane()), 2);
        assert_eq!(convert("cvt.rzi.u32.f32", (-1f32).lane()), 0);
        assert_eq!(convert("cvt.rzi.s32.f32", 1e20f32.lane()), i32::MAX as u64);
        assert_eq!(convert("cvt.rzi.u8.f32", 300f32.lane()), 255);
        assert_eq!(convert("cvt.rzi.s64.f32", f32::NAN.lane()), 1 << 63);
        assert_eq!(convert("cvt.sat.u8.s32", 300), 255);
        assert_eq!(convert("cvt.rz.f32.u32", 0x0100_0001), 16_777_216f32.lane());
        assert_eq!(convert("cvt.rp.f32.u32", 0x0100_0001), 16_777_218f32.lane());
        assert_eq!(convert("cvt.sat.f32.f32", 1.5f32.lane()), 1f32.lane());
        assert_eq!(convert("cvt.rmi.f32.f32", (-0.5f32).lane()), (-1f32).lane());
    }
}
