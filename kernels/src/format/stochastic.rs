//! Rounding to bf16 at random: up with a probability that is the part cut off, so that the mean of what is
//! stored is the value.
//!
//! The random bits are a pure function of seed, group, stream, step and position, so they depend on neither
//! pieces nor threads.

use super::UNIT_ELEMENTS;
use crate::philox::{philox4x32, philox4x32_wide};
use crate::simd::{Path, on_paths};

/// Philox blocks of a unit. Each has 128 bits, 16 for an element.
const BLOCKS: usize = UNIT_ELEMENTS / 8;

/// The random bits of one stream in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    key: [u32; 2],
    step: u64,
    stream: u8,
}

impl Noise {
    /// Those of a stream of a group. `group` is a number that no other group has, such as
    /// [`key_of_name`](crate::philox::key_of_name) of its name. Steps differ below 2^56.
    pub fn new(seed: u64, group: u64, stream: u8, step: u64) -> Self {
        // The last words keep these keys apart from those that initial values are drawn with.
        let counter = [group as u32, (group >> 32) as u32, u32::MAX, u32::MAX];
        let [first, second, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
        Self { key: [first, second], step, stream }
    }
}

on_paths! {
    fn fill(unit: u64, noise: Noise, bits: &mut [u16; UNIT_ELEMENTS]) {
        let first = unit.wrapping_mul(BLOCKS as u64);
        let step = [noise.step & 0xffff_ffff, noise.step >> 32 & 0xff_ffff | u64::from(noise.stream) << 24];
        for i in 0..BLOCKS {
            // Blocks of one unit have the same upper half, because they start at a multiple of their number.
            let counter = [first & 0xffff_ffff | i as u64, first >> 32, step[0], step[1]];
            let words = philox4x32_wide(counter, noise.key);
            for word in 0..4 {
                bits[2 * word * BLOCKS + i] = words[word] as u16;
                bits[(2 * word + 1) * BLOCKS + i] = (words[word] >> 16) as u16;
            }
        }
    }

    fn round(values: &[f32], random: &[u16; UNIT_ELEMENTS], stored: &mut [u16]) {
        let elements = values.len().min(UNIT_ELEMENTS);
        let (values, random, stored) = (&values[..elements], &random[..elements], &mut stored[..elements]);
        for i in 0..elements {
            let bits = values[i].to_bits();
            // A carry into the exponent is the next number, too.
            let rounded = bits.wrapping_add(u32::from(random[i])) >> 16;
            let nan = (bits >> 16) | 0x40;
            // Compared as a whole number, which vectorises.
            stored[i] = if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded } as u16;
        }
    }
}

/// Rounds a run that starts with unit `unit` of its stream.
pub(super) fn encode_run(path: Path, values: &[f32], stored: &mut [u16], unit: u64, noise: &Noise) {
    let mut bits = [0; UNIT_ELEMENTS];
    let units = values.chunks(UNIT_ELEMENTS).zip(stored.chunks_mut(UNIT_ELEMENTS));
    for (unit, (values, stored)) in (unit..).zip(units) {
        fill(path, unit, *noise, &mut bits);
        round(path, values, &bits, stored);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn encode(value: f32, units: usize, noise: &Noise) -> Vec<u16> {
        let mut stored = vec![0; units * UNIT_ELEMENTS];
        encode_run(Path::best(), &vec![value; stored.len()], &mut stored, 5, noise);
        stored
    }

    /// Of N draws with probability p the number of hits has a standard deviation of √(N·p·(1-p)); five of
    /// them are allowed.
    #[test]
    fn rounding_is_unbiased() {
        let units = 256;
        let draws = (units * UNIT_ELEMENTS) as f64;
        for (case, part) in [1u32, 0x100, 0x4000, 0x8000, 0xc000, 0xff00, 0xffff].into_iter().enumerate() {
            for upper in [0x3f80u32, 0xbf80, 0x0001, 0x40ff] {
                let noise = Noise::new(7, case as u64, 1, u64::from(upper));
                let stored = encode(f32::from_bits(upper << 16 | part), units, &noise);
                assert!(stored.iter().all(|&s| u32::from(s) == upper || u32::from(s) == upper + 1));
                let hits = stored.iter().filter(|&&s| u32::from(s) == upper + 1).count() as f64;
                let probability = f64::from(part) / 65536.0;
                let deviation = (draws * probability * (1.0 - probability)).sqrt();
                assert!((hits - draws * probability).abs() < 5.0 * deviation + 1.0, "{part:#x}: {hits}");
            }
        }
    }

    #[test]
    fn what_bf16_can_say_is_kept_and_what_is_no_number_stays_none() {
        let noise = Noise::new(1, 2, 3, 4);
        for value in [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(encode(value, 1, &noise).iter().all(|&s| s == bf16::from_f32(value).to_bits()));
        }
        for bits in [0x7f80_0001, 0x7fff_ffff, 0xffff_ffff] {
            let stored = encode(f32::from_bits(bits), 1, &noise);
            assert!(stored.iter().all(|&s| bf16::from_bits(s).is_nan()));
        }
    }

    #[test]
    fn every_part_of_the_counter_and_the_key_counts() {
        let bits = |noise: Noise, unit| {
            let mut bits = [0; UNIT_ELEMENTS];
            fill(Path::best(), unit, noise, &mut bits);
            bits
        };
        let noise = Noise::new(1, 2, 3, 4);
        let others = [
            bits(Noise::new(2, 2, 3, 4), 0),
            bits(Noise::new(1, 3, 3, 4), 0),
            bits(Noise::new(1, 2, 4, 4), 0),
            bits(Noise::new(1, 2, 3, 5), 0),
            bits(Noise::new(1, 2, 3, 4 | 1 << 40), 0),
            bits(noise, 1),
            bits(noise, 1 << 30),
        ];
        assert!(others.iter().all(|other| *other != bits(noise, 0)));
        for path in Path::available() {
            let mut found = [0; UNIT_ELEMENTS];
            fill(path, 9, noise, &mut found);
            assert_eq!(found, bits(noise, 9), "{path:?}");
        }
    }
}
