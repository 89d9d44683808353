//! Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011).

use super::{Optimizer, Part, State, Step, Tools, Values, above_zero};
use crate::Error;
use crate::simd::on_paths;

/// Adagrad: every element's steps shrink with the root of the sum of its squared gradients. Weight decay is a
/// part of the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adagrad {
    /// Added to the root.
    pub epsilon: f64,
}

impl Default for Adagrad {
    fn default() -> Self {
        Self { epsilon: 1e-10 }
    }
}

impl Optimizer for Adagrad {
    fn name(&self) -> &'static str {
        "Adagrad"
    }

    fn validate(&self) -> Result<(), Error> {
        above_zero("epsilon", self.epsilon)
    }

    fn states(&self) -> Vec<State> {
        vec![State { name: "sum of squares", values: Values::NonNegative }]
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [sum] = part.states else { return };
        let numbers = [step.learning_rate as f32, step.weight_decay as f32, self.epsilon as f32];
        adagrad(tools.path, numbers, part.parameters, part.gradient, sum);
    }
}

on_paths! {
    fn adagrad(numbers: [f32; 3], parameters: &mut [f32], gradient: &[f32], sum: &mut [f32]) {
        let [learning_rate, decay, epsilon] = numbers;
        for ((p, &g), sum) in parameters.iter_mut().zip(gradient).zip(sum) {
            let g = g + *p * decay;
            *sum += g * g;
            *p -= g / (sum.sqrt() + epsilon) * learning_rate;
        }
    }
}
