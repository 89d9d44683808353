//! Dynamic codes of eight bits with a scale for each block of 256 elements (Dettmers et al., "8-bit
//! optimizers via block-wise quantization", arXiv 2110.02861). An element is a value of its code times the
//! block's largest magnitude.
//!
//! The codes are those of bitsandbytes. Between 10^-7 and 1 each decade has twice as many values as the one
//! below it, 64 in the uppermost (128 in the unsigned code); a decade is cut into equal parts, whose centres
//! are its values. Zero and one are values too. The signed code has the same values with both signs, but for
//! one.
//!
//! | | signed | unsigned |
//! |---|---|---|
//! | for | first moments | second moments |
//! | least value above zero | 5.5e-7 | 3.25e-7 |
//!
//! An element takes the nearest value, with one exception: what is not zero does not become zero in the
//! unsigned code, since roots of it are divided by. Blocks whose largest magnitude is subnormal become zero.
//! A block with an element that is infinite or NaN, or negative where the code is unsigned, becomes NaN as a
//! whole: nothing bad is hidden.
//!
//! A unit of 1024 elements is stored as the four scales of its blocks and then its codes.

use super::{EIGHT_BIT_BLOCK_ELEMENTS as BLOCK_ELEMENTS, UNIT_ELEMENTS};
use crate::simd::{Path, on_paths};
use std::sync::LazyLock;

const BLOCKS: usize = UNIT_ELEMENTS / BLOCK_ELEMENTS;
/// Bytes of a unit.
pub(super) const UNIT_BYTES: usize = 4 * BLOCKS + UNIT_ELEMENTS;

/// Decades that the values lie in.
const DECADES: u32 = 7;
/// Code of zero in the signed code, whose values are in ascending order.
const SIGNED_ZERO: u32 = 127;

/// Magnitudes are looked up by their bits from this one on. Below it lies no border between two values.
const LEAST_BITS: u32 = (127 - 23) << 23;
const ONE_BITS: u32 = 127 << 23;
/// Bits of a magnitude that are not looked up but compared.
const COMPARED_BITS: u32 = 16;
const COMPARED: u32 = (1 << COMPARED_BITS) - 1;
/// A power of two, so that an index needs no check.
const ENTRIES: usize = 4096;
const INFINITY_BITS: u32 = 0x7f80_0000;
const MAGNITUDE_BITS: u32 = 0x7fff_ffff;

/// A code.
pub(super) struct Code {
    /// What each byte stands for, in ascending order.
    values: [f32; 256],
    /// For the upper bits of a magnitude, the number of the value that its least takes, and from which lower
    /// bits on it is the
    /// next: `number << 17 | bits`.
    entries: [u32; ENTRIES],
    signed: bool,
}

static SIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(true));
static UNSIGNED: LazyLock<Code> = LazyLock::new(|| Code::new(false));

/// The code for elements of either sign.
pub(super) fn signed() -> &'static Code {
    &SIGNED
}

/// The code for elements that are not negative.
pub(super) fn unsigned() -> &'static Code {
    &UNSIGNED
}

/// `parts + 1` numbers from 0.1 to 1, each from the nearer end and rounded to f32 once.
fn borders(parts: usize) -> impl Fn(usize) -> f32 {
    let step = f64::from((1.0f32 - 0.1f32) / parts as f32);
    let (first, middle) = (f64::from(0.1f32), parts.div_ceil(2));
    move |i| if i < middle { first + step * i as f64 } else { 1.0 - step * (parts - i) as f64 } as f32
}

/// Zero, the centres and one, in ascending order.
fn magnitudes(signed: bool) -> Vec<f32> {
    let mut magnitudes = vec![0.0];
    for decade in 0..DECADES {
        let parts = if signed { 1 << decade } else { 2 << decade };
        let border = borders(parts);
        let scale = 10f64.powi(decade as i32 + 1 - DECADES as i32) as f32;
        magnitudes.extend((0..parts).map(|i| scale * ((border(i) + border(i + 1)) / 2.0)));
    }
    magnitudes.push(1.0);
    magnitudes
}

/// The bits of the least magnitude that is nearer to `upper` than to `lower`, or as near.
fn border_bits(lower: f32, upper: f32) -> u32 {
    let middle = (f64::from(lower) + f64::from(upper)) / 2.0;
    let nearest = middle as f32;
    nearest.to_bits() + u32::from(f64::from(nearest) < middle)
}

impl Code {
    fn new(signed: bool) -> Self {
        let magnitudes = magnitudes(signed);
        let mut values = [0.0; 256];
        for (code, value) in values.iter_mut().enumerate() {
            *value = match code.checked_sub(if signed { SIGNED_ZERO as usize } else { 0 }) {
                Some(number) => magnitudes[number],
                None => -magnitudes[SIGNED_ZERO as usize - code],
            };
        }
        // What lies between zero and the least value takes that one in the unsigned code.
        let first = if signed { border_bits(0.0, magnitudes[1]) } else { 1 };
        let borders: Vec<u32> = std::iter::once(first)
            .chain(magnitudes.windows(2).skip(1).map(|pair| border_bits(pair[0], pair[1])))
            .collect();
        let mut entries = [0; ENTRIES];
        for (entry, start) in entries.iter_mut().zip((LEAST_BITS..).step_by(1 << COMPARED_BITS)) {
            let number = borders.partition_point(|&border| border <= start);
            let next = borders.get(number).map_or(COMPARED + 1, |border| border - start);
            *entry = (number as u32) << (COMPARED_BITS + 1) | next.min(COMPARED + 1);
        }
        Self { values, entries, signed }
    }

    /// The number of the value that a magnitude of at most one takes, given by its bits.
    #[inline(always)]
    fn number(&self, magnitude: u32) -> u32 {
        let magnitude = magnitude.clamp(LEAST_BITS, ONE_BITS);
        let entry = self.entries[((magnitude - LEAST_BITS) >> COMPARED_BITS) as usize % ENTRIES];
        (entry >> (COMPARED_BITS + 1)) + u32::from(magnitude & COMPARED >= entry & (2 * COMPARED + 1))
    }
}

/// The bits of a block's largest magnitude. NaN is above infinity, and what the code cannot say above both.
#[inline(always)]
fn largest_bits(values: &[f32], mask: u32) -> u32 {
    // Adding zero makes of negative zero the other one.
    values.iter().fold(0, |largest, &value| ((value + 0.0).to_bits() & mask).max(largest))
}

/// What a block is stored with, and multiplied by before: its scale and one over it.
#[inline(always)]
fn scales(largest: u32) -> (f32, f32) {
    let scale = f32::from_bits(largest);
    match largest {
        INFINITY_BITS.. => (f32::NAN, 0.0),
        _ if scale.is_normal() => (scale, 1.0 / scale),
        _ => (0.0, 0.0),
    }
}

on_paths! {
    fn encode_block(code: &Code, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = largest_bits(values, if code.signed { MAGNITUDE_BITS } else { u32::MAX });
        let (scale, inverse) = scales(largest);
        if inverse == 0.0 {
            codes.fill(if code.signed { SIGNED_ZERO as u8 } else { 0 });
        } else if code.signed {
            for (byte, &value) in codes.iter_mut().zip(values) {
                let bits = (value * inverse).to_bits();
                let number = code.number(bits & MAGNITUDE_BITS);
                let negative = SIGNED_ZERO - number.min(SIGNED_ZERO);
                *byte = if bits > MAGNITUDE_BITS { negative } else { SIGNED_ZERO + number } as u8;
            }
        } else {
            for (byte, &value) in codes.iter_mut().zip(values) {
                let bits = (value * inverse).to_bits();
                *byte = if value > 0.0 { code.number(bits) } else { 0 } as u8;
            }
        }
        scale
    }

    fn decode_block(code: &Code, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, &byte) in values.iter_mut().zip(codes) {
            *value = code.values[usize::from(byte)] * scale;
        }
    }
}

/// Stores a run. What a unit has beyond the run's end is zero bytes.
pub(super) fn encode_run(path: Path, code: &Code, values: &[f32], bytes: &mut [u8]) {
    for (values, unit) in values.chunks(UNIT_ELEMENTS).zip(bytes.chunks_exact_mut(UNIT_BYTES)) {
        let (scales, codes) = unit.split_at_mut(4 * BLOCKS);
        if values.len() < UNIT_ELEMENTS {
            scales.fill(0);
            codes.fill(0);
        }
        let blocks = values.chunks(BLOCK_ELEMENTS).zip(codes.chunks_mut(BLOCK_ELEMENTS));
        for ((values, codes), stored) in blocks.zip(scales.as_chunks_mut::<4>().0) {
            *stored = encode_block(path, code, values, &mut codes[..values.len()]).to_le_bytes();
        }
    }
}

/// The values of a run.
pub(super) fn decode_run(path: Path, code: &Code, bytes: &[u8], values: &mut [f32]) {
    for (values, unit) in values.chunks_mut(UNIT_ELEMENTS).zip(bytes.chunks_exact(UNIT_BYTES)) {
        let (scales, codes) = unit.split_at(4 * BLOCKS);
        let blocks = values.chunks_mut(BLOCK_ELEMENTS).zip(codes.chunks(BLOCK_ELEMENTS));
        for ((values, codes), &scale) in blocks.zip(scales.as_chunks::<4>().0) {
            decode_block(path, code, codes, f32::from_le_bytes(scale), values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn codes_ascend_and_borders_are_one_an_entry() {
        for code in [signed(), unsigned()] {
            assert!(code.values.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(code.values[255], 1.0);
            let magnitudes = magnitudes(code.signed);
            assert_eq!(magnitudes.len(), if code.signed { 129 } else { 256 });
            let upper = |bits: u32| bits >> COMPARED_BITS;
            let borders: Vec<u32> =
                magnitudes[1..].windows(2).map(|pair| border_bits(pair[0], pair[1])).collect();
            assert!(borders.windows(2).all(|pair| upper(pair[0]) < upper(pair[1])));
            assert!(upper(border_bits(0.0, magnitudes[1])) < upper(borders[0]));
        }
    }

    fn round_trip(code: &Code, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let mut bytes = vec![0xa5; values.len().div_ceil(UNIT_ELEMENTS) * UNIT_BYTES];
        encode_run(Path::best(), code, values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        decode_run(Path::best(), code, &bytes, &mut back);
        (bytes, back)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn an_element_takes_the_nearest_value(
            magnitude in 0f32..1.0, shift in 0i32..26, scale in -30i32..30
        ) {
            let value = magnitude * 0.5f32.powi(shift);
            let scale = 2f32.powi(scale);
            for code in [signed(), unsigned()] {
                let nearest = |value: f32, values: &[f32]| {
                    let distances = values.iter().map(|v| (f64::from(*v) - f64::from(value)).abs());
                    distances.fold(f64::INFINITY, f64::min)
                };
                let allowed = if code.signed || value == 0.0 { &code.values[..] } else { &code.values[1..] };
                let (_, back) = round_trip(code, &[scale, value * scale]);
                prop_assert_eq!(back[0], scale);
                let distance = (f64::from(back[1] / scale) - f64::from(value)).abs();
                prop_assert_eq!(distance, nearest(value, allowed));
                if code.signed {
                    let (_, back) = round_trip(code, &[scale, -value * scale]);
                    let distance = (f64::from(back[1] / scale) + f64::from(value)).abs();
                    prop_assert_eq!(distance, nearest(-value, &code.values));
                }
            }
        }
    }

    #[test]
    fn nothing_that_is_not_a_number_is_hidden_or_spread() {
        for (code, bad) in [
            (signed(), f32::NAN),
            (signed(), f32::NEG_INFINITY),
            (unsigned(), f32::INFINITY),
            (unsigned(), -f32::NAN),
            (unsigned(), -1e-30),
        ] {
            let mut values = vec![1.0; 1600];
            values[300] = bad;
            let (_, back) = round_trip(code, &values);
            assert!(back[256..512].iter().all(|x| x.is_nan()), "{bad} was hidden");
            assert!(back[..256].iter().chain(&back[512..]).all(|&x| x == 1.0), "{bad} was spread");
        }
    }

    #[test]
    fn zeros_subnormal_blocks_and_ends_of_runs_are_zeros() {
        for code in [signed(), unsigned()] {
            for value in [0.0, -0.0, 1e-40] {
                let (bytes, back) = round_trip(code, &[value; 700]);
                assert!(back.iter().all(|&x| x == 0.0));
                assert!(bytes[..16].iter().all(|&byte| byte == 0), "a scale of zero");
                assert!(bytes[16 + 700..].iter().all(|&byte| byte == 0));
            }
            let mut back = vec![1.0; UNIT_ELEMENTS];
            decode_run(Path::best(), code, &[0; UNIT_BYTES], &mut back);
            assert!(back.iter().all(|&x| x == 0.0), "zero bytes are zeros");
        }
    }

    #[test]
    fn all_paths_give_the_same_bytes() {
        let values: Vec<f32> = (0..5003u32)
            .map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)))
            .map(|x| if x.is_finite() { x.abs() } else { 0.0 })
            .collect();
        for code in [signed(), unsigned()] {
            let run = |path| {
                let (mut bytes, mut back) = (vec![0; 5 * UNIT_BYTES], vec![0f32; 5003]);
                encode_run(path, code, &values, &mut bytes);
                decode_run(path, code, &bytes, &mut back);
                (bytes, back)
            };
            let paths = Path::available();
            for &path in &paths {
                assert_eq!(run(path), run(paths[paths.len() - 1]), "{path:?}");
            }
        }
    }
}
