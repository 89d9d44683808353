//! The state streams of an optimizer as data: names, formats, elements and bytes.

use super::{Optimizer, State, Values};
use crate::format::Format;

/// How master parameters are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Masters {
    /// In f32.
    #[default]
    F32,
    /// In bf16 with stochastic rounding.
    Bf16,
    /// In f32, split in two streams: the value rounded to bf16, which is all that computing fetches, and the
    /// bits that remain.
    Split,
}

/// How an optimizer's states are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum States {
    /// In f32.
    #[default]
    F32,
    /// In bf16 with stochastic rounding.
    Bf16,
    /// In 8-bit blocks.
    EightBit,
}

/// The formats of a training state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Formats {
    /// Of the master parameters.
    pub masters: Masters,
    /// Of the optimizer's states.
    pub states: States,
}

/// A stream of a training state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The name in plans and manifests.
    pub name: &'static str,
    /// How it is stored.
    pub format: Format,
}

impl Masters {
    /// The streams of master parameters.
    pub fn streams(self) -> &'static [Stream] {
        const fn stream(name: &'static str, format: Format) -> Stream {
            Stream { name, format }
        }
        match self {
            Self::F32 => const { &[stream("master", Format::F32)] },
            Self::Bf16 => const { &[stream("master", Format::Bf16)] },
            Self::Split => {
                const { &[stream("parameter", Format::Rounded), stream("remainder", Format::Remainder)] }
            }
        }
    }
}

impl States {
    fn stream(self, state: State) -> Stream {
        let format = match (self, state.values) {
            (Self::F32, _) | (_, Values::Few) => Format::F32,
            (Self::Bf16, _) => Format::Bf16,
            (Self::EightBit, Values::Signed) => Format::Signed8,
            (Self::EightBit, Values::NonNegative) => Format::Unsigned8,
        };
        Stream { name: state.name, format }
    }
}

impl Formats {
    /// The streams of an optimizer: those of the masters, then its states.
    pub fn streams(&self, optimizer: &dyn Optimizer) -> Vec<Stream> {
        let states = optimizer.states().into_iter().map(|state| self.states.stream(state));
        self.masters.streams().iter().copied().chain(states).collect()
    }
}
