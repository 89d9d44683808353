//! The registers of a warp, and loops over its lanes.

use crate::program::{Mask, Program, Step};

/// Threads of a warp.
pub const LANES: usize = 32;
/// Lanes that are worked on at a time, so that the compiler makes vector instructions of it.
const CHUNK: usize = 8;
/// With fewer active lanes than this, each is worked on by itself.
const FEW: u32 = 5;

/// A number for each lane, in 64 bits whatever its type. Narrow types use the low bits.
pub type Row = [u64; LANES];

/// What registers hold that nobody has written.
const UNWRITTEN: u64 = 0xdead_beef_dead_beef;

/// The registers of a warp.
pub struct Registers {
    /// Numbers.
    pub rows: Vec<Row>,
    /// Conditions, a bit a lane.
    pub predicates: Vec<Mask>,
}

/// The numbers of the active lanes.
pub fn lanes(mask: Mask) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest.wrapping_sub(1);
        (lane < LANES).then_some(lane)
    })
}

impl Registers {
    /// Registers for a program, with its constants in place.
    pub fn new(program: &Program) -> Self {
        let mut rows = vec![[UNWRITTEN; LANES]; program.rows];
        for (value, row) in &program.constants {
            rows[*row] = [*value; LANES];
        }
        let mut predicates = vec![UNWRITTEN as Mask; program.predicates];
        for (mask, predicate) in &program.constant_predicates {
            predicates[*predicate] = *mask;
        }
        Self { rows, predicates }
    }

    /// The lanes of a mask whose predicate is true, or false if `negated`.
    pub fn guarded(&self, mask: Mask, predicate: u32, negated: bool) -> Mask {
        let bits = self.predicates[predicate as usize];
        mask & if negated { !bits } else { bits }
    }

    /// Some neighbouring lanes of a row.
    #[inline(always)]
    fn chunk(&self, row: u32, start: usize) -> [u64; CHUNK] {
        let mut chunk = [0; CHUNK];
        chunk.copy_from_slice(&self.rows[row as usize][start..start + CHUNK]);
        chunk
    }

    /// Computes the first result of the active lanes from the first operands. The function may be called for
    /// other lanes, too.
    #[inline(always)]
    pub fn map<const N: usize>(&mut self, step: &Step, mask: Mask, compute: impl Fn([u64; N]) -> u64) {
        let result = step.results[0];
        if mask.count_ones() < FEW {
            for lane in lanes(mask) {
                let mut operands = [0; N];
                for (operand, row) in operands.iter_mut().zip(step.sources) {
                    *operand = self.rows[row as usize][lane];
                }
                self.rows[result as usize][lane] = compute(operands);
            }
            return;
        }
        for start in (0..LANES).step_by(CHUNK) {
            let mut chunks = [[0; CHUNK]; N];
            for (chunk, row) in chunks.iter_mut().zip(step.sources) {
                *chunk = self.chunk(row, start);
            }
            let mut found = [0; CHUNK];
            for lane in 0..CHUNK {
                let mut operands = [0; N];
                for (operand, chunk) in operands.iter_mut().zip(&chunks) {
                    *operand = chunk[lane];
                }
                found[lane] = compute(operands);
            }
            if mask != Mask::MAX {
                let before = self.chunk(result, start);
                for lane in 0..CHUNK {
                    let keep = u64::from((mask >> (start + lane)) & 1).wrapping_sub(1);
                    found[lane] = (found[lane] & !keep) | (before[lane] & keep);
                }
            }
            self.rows[result as usize][start..start + CHUNK].copy_from_slice(&found);
        }
    }

    /// A bit for each lane: what holds for its first two operands.
    #[inline(always)]
    pub fn test(&self, step: &Step, holds: impl Fn(u64, u64) -> bool) -> Mask {
        let mut bits = 0;
        for start in (0..LANES).step_by(CHUNK) {
            let (a, b) = (self.chunk(step.sources[0], start), self.chunk(step.sources[1], start));
            for lane in 0..CHUNK {
                bits |= Mask::from(holds(a[lane], b[lane])) << (start + lane);
            }
        }
        bits
    }

    /// Sets the predicate of the active lanes.
    pub fn set_predicate(&mut self, predicate: u32, mask: Mask, bits: Mask) {
        let old = &mut self.predicates[predicate as usize];
        *old = (*old & !mask) | (bits & mask);
    }
}

#[cfg(test)]
mod tests {
    use super::lanes;

    #[test]
    fn lanes_of_a_mask() {
        assert_eq!(lanes(0b1011).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(lanes(u32::MAX).count(), 32);
        assert_eq!(lanes(0).count(), 0);
        assert_eq!(lanes(1 << 31).collect::<Vec<_>>(), [31]);
    }
}
