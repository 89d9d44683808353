//! AdamW on flat runs: one pass over parameter, moments and gradient, at the speed of memory.

use crate::convert::narrow_chunk;
use crate::error::same_length;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::{Path, on_paths};
use crate::{Element, Error, Pool};
use half::{bf16, f16};

/// The numbers of one AdamW step (Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv
/// 1711.05101).
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of the step, from 1, for the correction of the moments' bias.
    pub step: u64,
    /// Factor on every gradient, for clipping.
    pub gradient_scale: f32,
}

/// The state of a run of parameters. All runs have the same length.
#[derive(Debug)]
pub struct AdamWState<'a> {
    /// Master parameters.
    pub master: &'a mut [f32],
    /// First moments.
    pub first_moment: &'a mut [f32],
    /// Second moments.
    pub second_moment: &'a mut [f32],
}

/// A copy of the updated parameters in the type that the device computes with, rounded to nearest even.
#[derive(Debug)]
pub enum LowPrecision<'a> {
    /// In bf16.
    Bf16(&'a mut [bf16]),
    /// In f16.
    F16(&'a mut [f16]),
}

/// The same numbers as the loop needs them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Numbers {
    gradient_scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    first_correction: f32,
    second_correction: f32,
    pub(crate) keep: f32,
    pub(crate) learning_rate: f32,
    epsilon: f32,
}

impl Numbers {
    /// Everything that is the same for all elements is computed in f64 and rounded once.
    pub(crate) fn new(step: &AdamWStep) -> Self {
        let correction = |beta: f64| 1.0 / (1.0 - beta.powf(step.step as f64));
        Self {
            gradient_scale: step.gradient_scale,
            beta1: step.beta1 as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            first_correction: correction(step.beta1) as f32,
            second_correction: correction(step.beta2) as f32,
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            learning_rate: step.learning_rate as f32,
            epsilon: step.epsilon as f32,
        }
    }

    /// The moments after a gradient.
    #[inline(always)]
    pub(crate) fn moments(&self, first: f32, second: f32, gradient: f32) -> (f32, f32) {
        let first = first * self.beta1 + gradient * self.one_minus_beta1;
        (first, second * self.beta2 + gradient * gradient * self.one_minus_beta2)
    }

    /// What a parameter moves against, before the learning rate.
    #[inline(always)]
    pub(crate) fn direction(&self, first: f32, second: f32) -> f32 {
        (first * self.first_correction) / ((second * self.second_correction).sqrt() + self.epsilon)
    }
}

on_paths! {
    /// In the order of operations of `candle_nn::AdamW`. Only IEEE operations and no contraction: the same
    /// bits everywhere.
    fn adamw_chunk[G: Element](numbers: Numbers, state: AdamWState<'_>, gradient: &[G]) {
        let AdamWState { master, first_moment, second_moment } = state;
        let elements = master.len();
        // One length for all, so that the loop has no checks left.
        let (first_moment, second_moment) = (&mut first_moment[..elements], &mut second_moment[..elements]);
        let gradient = &gradient[..elements];
        for i in 0..elements {
            let g = gradient[i].widen() * numbers.gradient_scale;
            let (m, v) = numbers.moments(first_moment[i], second_moment[i], g);
            master[i] = master[i] * numbers.keep - numbers.direction(m, v) * numbers.learning_rate;
            first_moment[i] = m;
            second_moment[i] = v;
        }
    }
}

/// Updates a run of parameters in place, and its low-precision copy if there is one.
///
/// # Errors
/// [`Error::Length`] if the runs' lengths differ.
pub fn adamw<G: Element>(
    pool: &Pool,
    step: &AdamWStep,
    state: AdamWState<'_>,
    gradient: &[G],
    low_precision: Option<LowPrecision<'_>>,
) -> Result<(), Error> {
    adamw_on(Path::best(), pool, step, state, gradient, low_precision)
}

/// As [`adamw`], on a given path.
///
/// # Errors
/// As [`adamw`].
pub fn adamw_on<G: Element>(
    path: Path,
    pool: &Pool,
    step: &AdamWStep,
    state: AdamWState<'_>,
    gradient: &[G],
    low_precision: Option<LowPrecision<'_>>,
) -> Result<(), Error> {
    let elements = state.master.len();
    same_length("the first moment", state.first_moment.len(), elements)?;
    same_length("the second moment", state.second_moment.len(), elements)?;
    same_length("the gradient", gradient.len(), elements)?;
    let numbers = Numbers::new(step);
    match low_precision {
        None => {
            pool.map(chunks(state, gradient), |(state, gradient)| {
                adamw_chunk(path, numbers, state, gradient)
            });
        }
        Some(LowPrecision::Bf16(copy)) => with_copy(path, pool, numbers, state, gradient, copy)?,
        Some(LowPrecision::F16(copy)) => with_copy(path, pool, numbers, state, gradient, copy)?,
    }
    Ok(())
}

fn chunks<'a, G>(state: AdamWState<'a>, gradient: &'a [G]) -> Vec<(AdamWState<'a>, &'a [G])> {
    let master = state.master.chunks_mut(CHUNK_ELEMENTS);
    let first_moment = state.first_moment.chunks_mut(CHUNK_ELEMENTS);
    let second_moment = state.second_moment.chunks_mut(CHUNK_ELEMENTS);
    let states = master.zip(first_moment).zip(second_moment);
    let states = states.map(|((master, first_moment), second_moment)| AdamWState {
        master,
        first_moment,
        second_moment,
    });
    states.zip(gradient.chunks(CHUNK_ELEMENTS)).collect()
}

/// Updates, and rounds each chunk into the copy while it is still in the cache.
fn with_copy<G: Element, E: Element>(
    path: Path,
    pool: &Pool,
    numbers: Numbers,
    state: AdamWState<'_>,
    gradient: &[G],
    copy: &mut [E],
) -> Result<(), Error> {
    same_length("the copy", copy.len(), state.master.len())?;
    let chunks = chunks(state, gradient).into_iter().zip(copy.chunks_mut(CHUNK_ELEMENTS)).collect();
    pool.map(chunks, |((AdamWState { master, first_moment, second_moment }, gradient), copy)| {
        adamw_chunk(
            path,
            numbers,
            AdamWState { master: &mut *master, first_moment, second_moment },
            gradient,
        );
        narrow_chunk(path, master, copy);
    });
    Ok(())
}
