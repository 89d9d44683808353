//! Lion (Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675).

use super::{Optimizer, Part, State, Step, Tools, Values, below_one};
use crate::Error;
use crate::simd::on_paths;

/// Lion: steps of one size, in the direction of the sign of an interpolated momentum, with decoupled weight
/// decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Part of the momentum in the direction of a step.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99 }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Numbers {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    keep: f32,
    learning_rate: f32,
}

impl Optimizer for Lion {
    fn name(&self) -> &'static str {
        "Lion"
    }

    fn validate(&self) -> Result<(), Error> {
        below_one("beta1", self.beta1)?;
        below_one("beta2", self.beta2)
    }

    fn states(&self) -> Vec<State> {
        vec![State { name: "first moment", values: Values::Signed }]
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [moment] = part.states else { return };
        let numbers = Numbers {
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            keep: step.keep(),
            learning_rate: step.learning_rate as f32,
        };
        lion(tools.path, numbers, part.parameters, part.gradient, moment);
    }
}

on_paths! {
    fn lion(numbers: Numbers, parameters: &mut [f32], gradient: &[f32], moment: &mut [f32]) {
        for ((p, &g), m) in parameters.iter_mut().zip(gradient).zip(moment) {
            let direction = *m * numbers.beta1 + g * numbers.one_minus_beta1;
            // The sign of zero is zero, and that of NaN is NaN.
            let sign =
                if direction == 0.0 || direction.is_nan() { direction } else { 1f32.copysign(direction) };
            *p = *p * numbers.keep - sign * numbers.learning_rate;
            *m = *m * numbers.beta2 + g * numbers.one_minus_beta2;
        }
    }
}
