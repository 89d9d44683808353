//! Adam (Kingma and Ba, arXiv 1412.6980) and AdamW (Loshchilov and Hutter, arXiv 1711.05101).

use super::{Optimizer, Part, State, Step, Tools, Values, above_zero, below_one};
use crate::Error;
use crate::adamw::{AdamWState, AdamWStep, Numbers, adamw_chunk};
use crate::simd::on_paths;

/// AdamW: Adam with weight decay that is apart from the gradient. Its bits are those of [`crate::adamw`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// Adam: weight decay is a part of the gradient, and so of the moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// The two moments of Adam and its kin.
pub(super) fn moments() -> Vec<State> {
    vec![
        State { name: "first moment", values: Values::Signed },
        State { name: "second moment", values: Values::NonNegative },
    ]
}

pub(super) fn validate(beta1: f64, beta2: f64, epsilon: f64) -> Result<(), Error> {
    below_one("beta1", beta1)?;
    below_one("beta2", beta2)?;
    above_zero("epsilon", epsilon)
}

/// The numbers of a step whose gradients are scaled already.
pub(super) fn numbers(step: &Step, beta1: f64, beta2: f64, epsilon: f64) -> Numbers {
    Numbers::new(&AdamWStep {
        learning_rate: step.learning_rate,
        beta1,
        beta2,
        epsilon,
        weight_decay: step.weight_decay,
        step: step.number,
        gradient_scale: 1.0,
    })
}

impl Optimizer for AdamW {
    fn name(&self) -> &'static str {
        "AdamW"
    }

    fn validate(&self) -> Result<(), Error> {
        validate(self.beta1, self.beta2, self.epsilon)
    }

    fn states(&self) -> Vec<State> {
        moments()
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [first_moment, second_moment] = part.states else { return };
        let state = AdamWState { master: part.parameters, first_moment, second_moment };
        let numbers = numbers(step, self.beta1, self.beta2, self.epsilon);
        adamw_chunk(tools.path, numbers, state, part.gradient);
    }
}

impl Optimizer for Adam {
    fn name(&self) -> &'static str {
        "Adam"
    }

    fn validate(&self) -> Result<(), Error> {
        validate(self.beta1, self.beta2, self.epsilon)
    }

    fn states(&self) -> Vec<State> {
        moments()
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let [first_moment, second_moment] = part.states else { return };
        let state = AdamWState { master: part.parameters, first_moment, second_moment };
        // The decay is in the gradient and nowhere else.
        let decay = step.weight_decay as f32;
        let numbers = numbers(&Step { weight_decay: 0.0, ..*step }, self.beta1, self.beta2, self.epsilon);
        adam_block(tools.path, numbers, decay, state, part.gradient);
    }
}

on_paths! {
    fn adam_block(numbers: Numbers, decay: f32, state: AdamWState<'_>, gradient: &[f32]) {
        let AdamWState { master, first_moment, second_moment } = state;
        let elements = master.len();
        let (first_moment, second_moment) = (&mut first_moment[..elements], &mut second_moment[..elements]);
        let gradient = &gradient[..elements];
        for i in 0..elements {
            let g = gradient[i] + master[i] * decay;
            let (m, v) = numbers.moments(first_moment[i], second_moment[i], g);
            master[i] -= numbers.direction(m, v) * numbers.learning_rate;
            first_moment[i] = m;
            second_moment[i] = v;
        }
    }
}
