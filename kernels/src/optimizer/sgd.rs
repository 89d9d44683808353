//! Stochastic gradient descent, with (Nesterov) momentum as PyTorch defines it (Sutskever et al., ICML 2013).

use super::{Optimizer, Part, State, Step, Tools, Values, at_least_zero, below_one, check};
use crate::Error;
use crate::simd::on_paths;

/// `v ← momentum · v + (1 - dampening) · g`, `p ← p - rate · v`; without momentum `p ← p - rate · g`. Weight
/// decay is a part of `g`. In the first step `v` is `g`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sgd {
    /// What is left of the momentum; 0 keeps no state.
    pub momentum: f64,
    /// Part of a gradient that does not enter the momentum.
    pub dampening: f64,
    /// Whether to look ahead: `p ← p - rate · (g + momentum · v)`.
    pub nesterov: bool,
}

#[derive(Clone, Copy)]
pub(super) struct Numbers {
    learning_rate: f32,
    decay: f32,
    momentum: f32,
    part: f32,
}

impl Optimizer for Sgd {
    fn name(&self) -> &'static str {
        "SGD"
    }

    fn validate(&self) -> Result<(), Error> {
        below_one("momentum", self.momentum)?;
        at_least_zero("dampening", self.dampening)?;
        check("dampening", self.dampening, self.dampening <= 1.0, "at most 1")?;
        let plain = !self.nesterov || (self.momentum > 0.0 && self.dampening == 0.0);
        check("Nesterov's momentum", self.momentum, plain, "above 0, with a dampening of 0")
    }

    fn states(&self) -> Vec<State> {
        let momentum = State { name: "momentum", values: Values::Signed };
        if self.momentum > 0.0 { vec![momentum] } else { vec![] }
    }

    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>) {
        let first = step.number == 1;
        let numbers = Numbers {
            learning_rate: step.learning_rate as f32,
            decay: step.weight_decay as f32,
            momentum: self.momentum as f32,
            part: if first { 1.0 } else { (1.0 - self.dampening) as f32 },
        };
        match (part.states, self.nesterov) {
            ([], _) => plain(tools.path, numbers, part.parameters, part.gradient),
            ([velocity], false) => momentum(tools.path, numbers, part.parameters, part.gradient, velocity),
            ([velocity, ..], _) => nesterov(tools.path, numbers, part.parameters, part.gradient, velocity),
        }
    }
}

on_paths! {
    fn plain(numbers: Numbers, parameters: &mut [f32], gradient: &[f32]) {
        for (p, &g) in parameters.iter_mut().zip(gradient) {
            *p -= (g + *p * numbers.decay) * numbers.learning_rate;
        }
    }

    fn momentum(numbers: Numbers, parameters: &mut [f32], gradient: &[f32], velocity: &mut [f32]) {
        for ((p, &g), v) in parameters.iter_mut().zip(gradient).zip(velocity) {
            *v = *v * numbers.momentum + (g + *p * numbers.decay) * numbers.part;
            *p -= *v * numbers.learning_rate;
        }
    }

    fn nesterov(numbers: Numbers, parameters: &mut [f32], gradient: &[f32], velocity: &mut [f32]) {
        for ((p, &g), v) in parameters.iter_mut().zip(gradient).zip(velocity) {
            let g = g + *p * numbers.decay;
            *v = *v * numbers.momentum + g;
            *p -= (g + *v * numbers.momentum) * numbers.learning_rate;
        }
    }
}
