//! Optimizer states in 8 bits: every block of [`BLOCK_ELEMENTS`] has a scale of its own (Dettmers et al., "8-bit optimizers via
//! block-wise quantization", arXiv 2110.02861), and an element is an 8-bit floating-point number times its block's scale.
//!
//! | code | for | bits | smallest part of the block's largest magnitude | largest relative error above it |
//! |---|---|---|---|---|
//! | [`Code::Signed`] | first moments | sign, 4 exponent, 3 mantissa | 2^-15 | 1/16 |
//! | [`Code::Unsigned`] | second moments | 5 exponent, 3 mantissa | 2^-31 | 1/16 |
//!
//! An exponent instead of that paper's table of 256 values: second moments of one block differ by many orders of magnitude, their
//! relative error is what counts, and arithmetic needs no look-up.
//!
//! Nothing bad is hidden: a block with an element that is infinite or NaN, or negative where the code is unsigned, becomes NaN as a
//! whole.

use crate::error::same_length;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::{Path, on_paths};
use crate::{Error, Pool};

/// Elements that share a scale.
pub const BLOCK_ELEMENTS: usize = 256;

/// What the eight bits of an element mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// For elements of either sign.
    Signed,
    /// For elements that are not negative, over a wider range. What is not zero does not become zero, since roots of it are
    /// divided by.
    Unsigned,
}

/// A floating-point number of eight bits with a mantissa of three: value of the largest code is 1.875.
pub(crate) trait Format {
    /// Exponents are stored with this added; the largest one is 0.
    const BIAS: u32;
    /// The code of the largest magnitude.
    const LARGEST: u32;
    /// The smallest code of what is not zero.
    const SMALLEST: u32;
    /// Bit of the sign, or none.
    const SIGN: u32;
}

pub(crate) struct Signed;

impl Format for Signed {
    const BIAS: u32 = 15;
    const LARGEST: u32 = 0x7f;
    const SMALLEST: u32 = 0;
    const SIGN: u32 = 0x80;
}

pub(crate) struct Unsigned;

impl Format for Unsigned {
    const BIAS: u32 = 31;
    const LARGEST: u32 = 0xff;
    const SMALLEST: u32 = 1;
    const SIGN: u32 = 0;
}

/// What the code of the largest magnitude stands for.
const LARGEST_VALUE: f32 = 1.875;
const INFINITY_BITS: u32 = 0x7f80_0000;
const MAGNITUDE_BITS: u32 = 0x7fff_ffff;

/// The bits that are compared for the largest magnitude: NaN is above infinity, and what the code cannot say above both.
#[inline(always)]
fn rank<F: Format>(value: f32) -> u32 {
    // Adding zero makes of negative zero the other one.
    let bits = (value + 0.0).to_bits();
    if F::SIGN == 0 { bits } else { bits & MAGNITUDE_BITS }
}

#[inline(always)]
fn encode<F: Format>(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & MAGNITUDE_BITS;
    // Normal results: move the bias from 127 and round at bit 20, ties to even.
    let odd = (magnitude >> 20) & 1;
    let normal = magnitude.wrapping_sub((127 - F::BIAS) << 23).wrapping_add(0x7_ffff + odd) >> 20;
    // Subnormal results: adding this puts the result's last bit at the sum's last bit, rounded by the addition.
    let shift = f32::from_bits((127 + 21 - F::BIAS) << 23);
    let subnormal = (f32::from_bits(magnitude) + shift).to_bits().wrapping_sub(shift.to_bits());
    let rounded = if magnitude < (128 - F::BIAS) << 23 { subnormal } else { normal };
    let smallest = if magnitude == 0 { 0 } else { F::SMALLEST };
    (rounded.min(F::LARGEST).max(smallest) | (bits >> 24) & F::SIGN) as u8
}

#[inline(always)]
fn decode<F: Format>(code: u8) -> f32 {
    let code = u32::from(code);
    let magnitude = f32::from_bits((code & F::LARGEST) << 20) * f32::from_bits((254 - F::BIAS) << 23);
    f32::from_bits(magnitude.to_bits() | (code & F::SIGN) << 24)
}

on_paths! {
    fn quantize_chunk[F: Format](_format: F, from: &[f32], codes: &mut [u8], scales: &mut [f32]) {
        let blocks = from.chunks(BLOCK_ELEMENTS).zip(codes.chunks_mut(BLOCK_ELEMENTS));
        for ((from, codes), scale) in blocks.zip(scales) {
            let mut largest = 0;
            for &value in from {
                largest = rank::<F>(value).max(largest);
            }
            let finite = largest < INFINITY_BITS;
            *scale = if finite { f32::from_bits(largest) / LARGEST_VALUE } else { f32::NAN };
            // Zeros are divided by anything but zero.
            let divisor = if largest == 0 { 1.0 } else { *scale };
            for (code, &value) in codes.iter_mut().zip(from) {
                *code = if finite { encode::<F>(value / divisor) } else { 0 };
            }
        }
    }

    fn dequantize_chunk[F: Format](_format: F, codes: &[u8], scales: &[f32], to: &mut [f32]) {
        let blocks = codes.chunks(BLOCK_ELEMENTS).zip(to.chunks_mut(BLOCK_ELEMENTS));
        for ((codes, to), &scale) in blocks.zip(scales) {
            for (to, &code) in to.iter_mut().zip(codes) {
                *to = decode::<F>(code) * scale;
            }
        }
    }
}

/// The lengths that `codes` and `scales` of so many elements must have.
pub(crate) fn check_lengths(elements: usize, codes: usize, scales: usize) -> Result<(), Error> {
    same_length("the run of codes", codes, elements)?;
    same_length("the run of scales", scales, elements.div_ceil(BLOCK_ELEMENTS))
}

/// Rounds every element of `from` to 8 bits; `scales` has one element for each [`BLOCK_ELEMENTS`].
///
/// # Errors
/// [`Error::Length`] if the lengths do not fit.
pub fn quantize(
    pool: &Pool,
    code: Code,
    from: &[f32],
    codes: &mut [u8],
    scales: &mut [f32],
) -> Result<(), Error> {
    check_lengths(from.len(), codes.len(), scales.len())?;
    let scales = scales.chunks_mut(CHUNK_ELEMENTS / BLOCK_ELEMENTS);
    let chunks = from.chunks(CHUNK_ELEMENTS).zip(codes.chunks_mut(CHUNK_ELEMENTS)).zip(scales).collect();
    let path = Path::best();
    pool.map(chunks, |((from, codes), scales)| match code {
        Code::Signed => quantize_chunk(path, Signed, from, codes, scales),
        Code::Unsigned => quantize_chunk(path, Unsigned, from, codes, scales),
    });
    Ok(())
}

/// The values of codes, in f32.
///
/// # Errors
/// [`Error::Length`] if the lengths do not fit.
pub fn dequantize(
    pool: &Pool,
    code: Code,
    codes: &[u8],
    scales: &[f32],
    to: &mut [f32],
) -> Result<(), Error> {
    check_lengths(to.len(), codes.len(), scales.len())?;
    let scales = scales.chunks(CHUNK_ELEMENTS / BLOCK_ELEMENTS);
    let chunks = codes.chunks(CHUNK_ELEMENTS).zip(scales).zip(to.chunks_mut(CHUNK_ELEMENTS)).collect();
    let path = Path::best();
    pool.map(chunks, |((codes, scales), to)| match code {
        Code::Signed => dequantize_chunk(path, Signed, codes, scales, to),
        Code::Unsigned => dequantize_chunk(path, Unsigned, codes, scales, to),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a code says, from its definition.
    fn value(bits: u32, exponent_bias: i32) -> f64 {
        let (exponent, mantissa) = ((bits >> 3) as i32, f64::from(bits & 7));
        match exponent {
            0 => mantissa / 8.0 * 2f64.powi(1 - exponent_bias),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - exponent_bias),
        }
    }

    #[test]
    fn every_code_says_what_its_definition_says_and_comes_back() {
        for code in 0..=255u8 {
            assert_eq!(f64::from(decode::<Unsigned>(code)), value(u32::from(code), 31));
            assert_eq!(encode::<Unsigned>(decode::<Unsigned>(code)), code);
            let magnitude = value(u32::from(code & 0x7f), 15);
            let expected = if code & 0x80 == 0 { magnitude } else { -magnitude };
            assert_eq!(f64::from(decode::<Signed>(code)), expected);
            assert_eq!(encode::<Signed>(decode::<Signed>(code)), code);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn a_value_takes_the_nearest_code(magnitude in 0f32..1.875, shift in 0i32..40) {
            let value = magnitude * 0.5f32.powi(shift);
            let distance = |code: u8, decode: fn(u8) -> f32| (f64::from(decode(code)) - f64::from(value)).abs();
            let nearest = |decode: fn(u8) -> f32, codes: std::ops::RangeInclusive<u8>| {
                codes.map(|code| distance(code, decode)).fold(f64::INFINITY, f64::min)
            };
            let unsigned = encode::<Unsigned>(value);
            let floor = if value == 0.0 { 0 } else { 1 };
            prop_assert_eq!(distance(unsigned, decode::<Unsigned>), nearest(decode::<Unsigned>, floor..=255));
            let signed = encode::<Signed>(value);
            prop_assert_eq!(distance(signed, decode::<Signed>), nearest(decode::<Signed>, 0..=127));
            if signed != 0 {
                prop_assert_eq!(encode::<Signed>(-value), signed | 0x80);
            }
        }
    }

    #[test]
    fn all_paths_give_the_same_bits() {
        let from: Vec<f32> = (0..1003u32)
            .map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)))
            .map(|x| if x.is_finite() { x } else { 0.0 })
            .collect();
        let run = |path| {
            let (mut codes, mut scales, mut back) = (vec![0; 1003], vec![0.0; 4], vec![0f32; 1003]);
            quantize_chunk(path, Signed, &from, &mut codes, &mut scales);
            dequantize_chunk(path, Signed, &codes, &scales, &mut back);
            (codes, scales, back.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        let paths = Path::available();
        for &path in &paths {
            assert_eq!(run(path), run(paths[paths.len() - 1]), "{path:?}");
        }
    }
}
