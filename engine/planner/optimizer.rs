//! The optimizer's settings.

use crate::error::{Error, Result};
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

impl AdamW {
    /// Whether an update with these settings is defined, in f32 too.
    ///
    /// # Errors
    /// [`Error::Configuration`] with the first setting that is not a number in its range.
    pub fn check(&self) -> Result<()> {
        let Self { learning_rate, beta1, beta2, epsilon, weight_decay, decays: _ } = self;
        check_learning_rate(*learning_rate)?;
        let is_below_one = |value: f64| (0.0..1.0).contains(&(value as f32));
        check_setting("beta1", *beta1, is_below_one, "at least 0 and below 1")?;
        check_setting("beta2", *beta2, is_below_one, "at least 0 and below 1")?;
        // A moment of zero is divided by it.
        let is_positive = |value: f64| value as f32 > 0.0 && (value as f32).is_finite();
        check_setting("epsilon", *epsilon, is_positive, "a finite number above 0")?;
        check_setting("weight_decay", *weight_decay, is_amount, "a finite number of 0 or more")
    }
}

/// Whether a step can be made with this learning rate.
///
/// # Errors
/// [`Error::Configuration`] if it is negative or not finite.
pub fn check_learning_rate(learning_rate: f64) -> Result<()> {
    check_setting("learning_rate", learning_rate, is_amount, "a finite number of 0 or more")
}

fn is_amount(value: f64) -> bool {
    value >= 0.0 && (value as f32).is_finite()
}

fn check_setting(name: &str, value: f64, is_valid: impl Fn(f64) -> bool, must_be: &str) -> Result<()> {
    match is_valid(value) {
        true => Ok(()),
        false => Err(Error::Configuration(format!("{name} is {value}: it must be {must_be}"))),
    }
}
