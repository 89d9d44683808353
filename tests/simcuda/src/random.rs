//! Random numbers in the place of cuRAND's: other sequences, the same distributions.

use crate::fault::Result;
use crate::memory::{Accesses, Memory};

/// How numbers are distributed.
#[derive(Clone, Copy, Debug)]
pub enum Distribution {
    /// Above zero, up to one.
    Uniform,
    /// Normal with this mean and standard deviation.
    Normal(f64, f64),
}

/// Fills memory with random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// The first number.
    pub address: u64,
    /// Numbers.
    pub count: usize,
    /// Whether they are f64, and not f32.
    pub is_double: bool,
    /// How they are distributed.
    pub distribution: Distribution,
    /// What they are made from.
    pub seed: u64,
}

/// Numbers from zero up to one (G. L. Steele, D. Lea and C. H. Flood, "Fast splittable pseudorandom number
/// generators", 2014).
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Draw {
    /// Writes the numbers.
    pub fn run(&self, memory: &mut Memory, accesses: &mut Accesses) -> Result<()> {
        let mut uniform = Uniform(self.seed);
        let width = if self.is_double { 8 } else { 4 };
        let bytes = memory.write(self.address, self.count * width, accesses)?;
        for number in bytes.chunks_exact_mut(width) {
            let first = 1.0 - uniform.next();
            let value = match self.distribution {
                Distribution::Uniform => first,
                // G. E. P. Box and M. E. Muller, "A note on the generation of random normal deviates", 1958.
                Distribution::Normal(mean, deviation) => {
                    let turn = std::f64::consts::TAU * uniform.next();
                    mean + deviation * (-2.0 * first.ln()).sqrt() * turn.cos()
                }
            };
            if self.is_double {
                number.copy_from_slice(&value.to_le_bytes());
            } else {
                number.copy_from_slice(&(value as f32).to_le_bytes());
            }
        }
        Ok(())
    }
}
