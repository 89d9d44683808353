//! The optimizer's settings.

use crate::schedule::layout::ParameterRule;
use std::fmt;
use std::sync::Arc;

/// The AdamW optimizer (Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101).
#[derive(Clone)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Weight decay of the parameters that decay.
    pub weight_decay: f64,
    /// Which parameters decay. The default: those of two and more dimensions, so neither norms nor biases.
    pub decays: ParameterRule,
}

impl fmt::Debug for AdamW {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { learning_rate, beta1, beta2, epsilon, weight_decay, decays: _ } = self;
        write!(f, "AdamW {{ {learning_rate}, {beta1}, {beta2}, {epsilon}, {weight_decay} }}")
    }
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            decays: Arc::new(|_, shape| shape.len() >= 2),
        }
    }
}
