//! Whether numbers are finite.

use crate::Pool;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::{Path, on_paths};

/// Counters of a loop: as many as vector registers hide the latency of.
const LANES: usize = 16;

on_paths! {
    fn count_chunk(values: &[f32]) -> u64 {
        let mut counts = [0u32; LANES];
        let (lanes, rest) = values.as_chunks::<LANES>();
        for lane in lanes {
            for i in 0..LANES {
                counts[i] += u32::from(!lane[i].is_finite());
            }
        }
        let rest = rest.iter().filter(|value| !value.is_finite()).count();
        counts.iter().map(|&count| u64::from(count)).sum::<u64>() + rest as u64
    }
}

/// How many of the values are infinite or NaN.
pub fn count_non_finite(pool: &Pool, values: &[f32]) -> u64 {
    pool.map(values.chunks(CHUNK_ELEMENTS).collect(), |chunk| count_chunk(Path::best(), chunk)).iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_that_is_not_finite_is_counted_on_every_path() {
        let mut values = vec![1.0f32; 2 * CHUNK_ELEMENTS + 21];
        let last = values.len() - 1;
        for (at, value) in [(0, f32::NAN), (70_000, f32::INFINITY), (last, f32::NEG_INFINITY)] {
            values[at] = value;
        }
        assert_eq!(count_non_finite(&Pool::new(2).unwrap(), &values), 3);
        for path in Path::available() {
            assert_eq!(count_chunk(path, &values), 3);
        }
    }
}
