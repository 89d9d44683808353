//! Optimizers: what state each keeps, and how it updates parameters from it.
//!
//! | optimizer | states of a parameter of n elements | sees |
//! |---|---|---|
//! | [`AdamW`], [`Adam`] | two moments, n each | elements |
//! | [`Sgd`] | momentum, n, or none | elements |
//! | [`Lion`] | first moment, n | elements |
//! | [`Adagrad`] | sum of squares, n | elements |
//! | [`AdamP`] | two moments, n each | matrices whole |
//! | [`Adafactor`] | of a matrix a row and a column, else n | parameters whole |
//! | [`Muon`] | of a matrix its momentum, n; else AdamW's | matrices whole |
//!
//! An [`Optimizer`] computes in f32 and knows no formats. A [`StoredOptimizer`] adds the formats that masters
//! and states are stored in, and updates a [`Piece`]: it reads the state as it is stored, lets the optimizer
//! update one block after another in the processor's cache, and stores it again, in one pass over memory.
//!
//! Results have the same bits for every number of threads, on every instruction set, and for every cut into
//! pieces at multiples of [`UNIT_ELEMENTS`](crate::format::UNIT_ELEMENTS). [`Muon`]'s products of matrices
//! are the exception: they are the `gemm` crate's, and depend on the instruction set.
//!
//! An optimizer of your own is a page. It says what it keeps, and updates elements in f32. It need not know of
//! formats, threads or pieces:
//!
//! ```
//! use ferrozero_kernels::optimizer::*;
//! use ferrozero_kernels::{Error, Pool};
//! use std::sync::Arc;
//!
//! /// Steps of one size against the sign of a momentum (Bernstein et al., "signSGD", arXiv 1802.04434).
//! #[derive(Debug)]
//! struct Signum {
//!     momentum: f32,
//! }
//!
//! impl Optimizer for Signum {
//!     fn name(&self) -> &'static str {
//!         "Signum"
//!     }
//!
//!     fn validate(&self) -> Result<(), Error> {
//!         if (0.0..1.0).contains(&self.momentum) {
//!             return Ok(());
//!         }
//!         let value = self.momentum.to_string();
//!         Err(Error::Setting { name: "momentum", value, needed: "a number from 0 to below 1" })
//!     }
//!
//!     fn states(&self) -> Vec<State> {
//!         vec![State { name: "momentum", values: Values::Signed }]
//!     }
//!
//!     fn update(&self, _: Tools<'_>, step: &Step, part: Part<'_, '_>) {
//!         let [momentum] = part.states else { return };
//!         let rate = step.learning_rate as f32;
//!         for ((p, &g), m) in part.parameters.iter_mut().zip(part.gradient).zip(momentum.iter_mut()) {
//!             *m = *m * self.momentum + g * (1.0 - self.momentum);
//!             *p -= rate * if *m == 0.0 { 0.0 } else { m.signum() };
//!         }
//!     }
//! }
//!
//! // Masters in f32, the momentum in 8 bits: two streams of bytes.
//! let formats = Formats { masters: Masters::F32, states: States::EightBit };
//! let stored = StoredOptimizer::new(Arc::new(Signum { momentum: 0.9 }), formats, 0)?;
//! let mut masters = [1f32; 3];
//! let mut momentum = vec![0; stored.streams()[1].format.bytes(3)];
//! let piece = Piece {
//!     shape: &[3],
//!     group: 0,
//!     first_element: 0,
//!     streams: &mut [bytemuck::cast_slice_mut(&mut masters), &mut momentum],
//!     gradient: Gradient::F32(&[0.5, -0.5, 0.0]),
//!     copy: None,
//!     scratch: &mut [],
//! };
//! let step = Step { number: 1, learning_rate: 0.5, weight_decay: 0.0, gradient_scale: 1.0 };
//! stored.update(&Pool::new(1)?, &step, piece)?;
//! assert_eq!(masters, [0.5, 1.5, 1.0]);
//! # Ok::<(), Error>(())
//! ```

mod adafactor;
mod adagrad;
mod adam;
mod adamp;
mod lion;
mod matrix;
mod muon;
mod sgd;
mod stored;
mod streams;
mod sums;
mod view;
mod whole;

pub use adafactor::Adafactor;
pub use adagrad::Adagrad;
pub use adam::{Adam, AdamW};
pub use adamp::AdamP;
pub use lion::Lion;
pub use muon::{Adjustment, Muon};
pub use sgd::Sgd;
pub use stored::{Gradient, Piece, StoredOptimizer};
pub use streams::{Formats, Masters, States, Stream};

use crate::{Error, Path, Pool};
use std::fmt;

/// An update of parameters from gradients and a state that it keeps.
///
/// What is fixed for a run is in the optimizer itself; what changes with the step or the parameter is in
/// [`Step`].
pub trait Optimizer: fmt::Debug + Send + Sync {
    /// The name in plans, manifests and options.
    fn name(&self) -> &'static str;

    /// Whether every setting is a number that the update is defined for.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first one that is not.
    fn validate(&self) -> Result<(), Error>;

    /// What it keeps of every parameter, at most [`MOST_STATES`]. A state is zero before the first step.
    fn states(&self) -> Vec<State>;

    /// Elements of state `state` of a parameter of this shape: as many as the parameter has, unless an
    /// optimizer says otherwise.
    fn state_elements(&self, _state: usize, shape: &[usize]) -> usize {
        shape.iter().product()
    }

    /// What an update of a parameter of this shape must see at once.
    fn scope(&self, _shape: &[usize]) -> Scope {
        Scope::Elements
    }

    /// Elements of f32 that an update of a parameter of this shape needs beside its state; only for
    /// [`Scope::Parameter`].
    fn scratch_elements(&self, _shape: &[usize]) -> usize {
        0
    }

    /// Updates `part` in place. Of [`Scope::Elements`] it is at most 1024 neighbouring elements of a
    /// parameter; of [`Scope::Parameter`] a whole one. The result must not depend on `tools`.
    fn update(&self, tools: Tools<'_>, step: &Step, part: Part<'_, '_>);
}

/// Most states that an optimizer may keep of a parameter.
pub const MOST_STATES: usize = 6;

/// A state that an optimizer keeps of every parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The name in plans and manifests.
    pub name: &'static str,
    /// Which values it has.
    pub values: Values,
}

/// Which values a state has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Of either sign.
    Signed,
    /// Never negative.
    NonNegative,
    /// Few, and always stored in f32.
    Few,
}

/// What an update must see at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Any run of elements.
    Elements,
    /// The whole parameter.
    Parameter,
}

/// What an update may compute with.
#[derive(Debug, Clone, Copy)]
pub struct Tools<'a> {
    /// The instruction set.
    pub path: Path,
    /// Threads, for updates of a whole parameter.
    pub pool: &'a Pool,
}

/// What is to be updated, in f32.
#[derive(Debug)]
pub struct Part<'a, 'b> {
    /// The shape of the parameter.
    pub shape: &'a [usize],
    /// Master parameters.
    pub parameters: &'a mut [f32],
    /// Their gradient, scaled.
    pub gradient: &'a [f32],
    /// The states, in the order of [`Optimizer::states`].
    pub states: &'a mut [&'b mut [f32]],
    /// As many elements as [`Optimizer::scratch_elements`] says, with any values.
    pub scratch: &'a mut [f32],
}

/// The numbers of one step for a parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Number of the step, from 1.
    pub number: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Weight decay of this parameter.
    pub weight_decay: f64,
    /// Factor on every gradient, for clipping. The optimizer sees gradients after it.
    pub gradient_scale: f32,
}

impl Step {
    /// Whether every number is one that updates are defined for.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first one that is not.
    pub fn validate(&self) -> Result<(), Error> {
        check("the step's number", self.number as f64, self.number > 0, "1 or more")?;
        at_least_zero("the learning rate", self.learning_rate)?;
        at_least_zero("the weight decay", self.weight_decay)?;
        at_least_zero("the gradients' scale", f64::from(self.gradient_scale))
    }

    /// What is left of a parameter after decoupled weight decay.
    pub(crate) fn keep(&self) -> f32 {
        (1.0 - self.learning_rate * self.weight_decay) as f32
    }
}

fn check(name: &'static str, value: f64, holds: bool, needed: &'static str) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Error::Setting { name, value: value.to_string(), needed }) }
}

/// Finite in f32 and not negative.
fn at_least_zero(name: &'static str, value: f64) -> Result<(), Error> {
    check(name, value, value >= 0.0 && (value as f32).is_finite(), "a finite number of 0 or more")
}

/// Finite and above zero, in f32 too.
fn above_zero(name: &'static str, value: f64) -> Result<(), Error> {
    let single = value as f32;
    check(name, value, single > 0.0 && single.is_finite(), "a finite number above 0")
}

/// A part of what there was, in f32 too.
fn below_one(name: &'static str, value: f64) -> Result<(), Error> {
    check(name, value, value >= 0.0 && (value as f32) < 1.0, "a number from 0 to below 1")
}
