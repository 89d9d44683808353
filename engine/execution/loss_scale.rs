//! Keeps the gradients of f16 in the range that f16 has: the loss is multiplied by a scale before it is
//! propagated back, and gradients are divided by it in f32 (Micikevicius et al., "Mixed precision training",
//! arXiv 1710.03740). A step whose gradients overflow is skipped and halves the scale; many without an
//! overflow double it.

use serde::{Deserialize, Serialize};

/// Steps without an overflow after which the scale is doubled.
const GROWTH_STEPS: u64 = 2000;
const FIRST: f32 = 32768.0;
const LARGEST: f32 = 16_777_216.0;

/// The scale of the loss, a power of two, and what led to it. A commit keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the loss is multiplied with.
    pub scale: f32,
    /// Steps since it last changed.
    steps: u64,
    /// Steps that were skipped so far.
    pub skipped: u64,
}

impl LossScale {
    /// Of a run that begins.
    pub fn new() -> Self {
        Self { scale: FIRST, steps: 0, skipped: 0 }
    }

    /// After a step whose gradients have overflowed or have not.
    pub fn after(self, overflow: bool) -> Self {
        let steps = self.steps + 1;
        match overflow {
            true => Self { scale: self.scale / 2.0, steps: 0, skipped: self.skipped + 1 },
            false if steps >= GROWTH_STEPS => {
                Self { scale: (2.0 * self.scale).min(LARGEST), steps: 0, ..self }
            }
            false => Self { steps, ..self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overflow_halves_the_scale_and_many_steps_without_one_double_it() {
        let first = LossScale::new();
        let halved = first.after(true);
        assert_eq!((halved.scale, halved.skipped), (FIRST / 2.0, 1));
        let steps = |from: LossScale, count| (0..count).fold(from, |scale, _| scale.after(false));
        assert_eq!(steps(halved, GROWTH_STEPS - 1).scale, FIRST / 2.0);
        assert_eq!(steps(halved, GROWTH_STEPS).scale, FIRST);
        // An overflow begins the count anew.
        assert_eq!(steps(steps(first, GROWTH_STEPS - 1).after(true), GROWTH_STEPS - 1).scale, FIRST / 2.0);
        assert_eq!(steps(first, 20 * GROWTH_STEPS).scale, LARGEST);
    }
}
