//! Dropout in a model: the pass that is under way says which mask, so that the recompute of a segment draws
//! the same.

use candle_core::{Result, Tensor, bail};
use ferrozero_kernels::ops::{self, Draw};
use std::cell::Cell;

/// Where in a run a dropout is.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
    /// Micro-batch of the step.
    pub micro_batch: usize,
    /// Call of a segment; none: outside of segments.
    pub call: Option<usize>,
}

/// What a dropout does.
#[derive(Debug, Clone, Copy)]
pub enum Dropping {
    /// Nothing: no pass is under way.
    Refused,
    /// The identity, as in an evaluation.
    Off,
    /// It draws the next mask of a place.
    On {
        /// The place.
        place: Place,
        /// How many it has drawn there.
        drawn: u32,
    },
}

thread_local! {
    static DROPPING: Cell<Dropping> = const { Cell::new(Dropping::Refused) };
}

impl Dropping {
    /// At the beginning of a place.
    pub fn at(place: Place) -> Self {
        Self::On { place, drawn: 0 }
    }

    /// Runs a part of the user's code with dropouts that do this.
    pub fn during<T>(self, run: impl FnOnce() -> T) -> T {
        /// Puts back what was before, also where `run` panics.
        struct Before(Dropping);
        impl Drop for Before {
            fn drop(&mut self) {
                DROPPING.set(self.0);
            }
        }
        let _before = Before(DROPPING.replace(self));
        run()
    }
}

/// Sets elements of a tensor to zero with a probability and scales the others, in a training step; in an
/// evaluation it answers the tensor. Any shape.
///
/// Which elements they are depends on the run's seed, step, micro-batch and segment, and on how many dropouts
/// were before it there: not on the plan, and not on whether a run was resumed. A segment that is computed
/// again drops the same.
///
/// # Errors
/// A probability that is not from 0 to below 1; a call outside of [`Trainer::step`](crate::Trainer::step),
/// [`Trainer::evaluate`](crate::Trainer::evaluate) and [`Engine::plan`](crate::Engine::plan).
pub fn dropout(xs: &Tensor, probability: f32) -> Result<Tensor> {
    match DROPPING.get() {
        Dropping::Refused => {
            bail!("dropout ran outside of Trainer::step, Trainer::evaluate and Engine::plan")
        }
        Dropping::Off => Ok(xs.clone()),
        Dropping::On { place, drawn } => {
            DROPPING.set(Dropping::On { place, drawn: drawn + 1 });
            let Place { seed, step, micro_batch, call } = place;
            let part = call.map_or(0, |call| call as u32 + 1);
            ops::dropout(xs, probability, Draw::new(seed, step, [micro_batch as u32, part, drawn]))
        }
    }
}
