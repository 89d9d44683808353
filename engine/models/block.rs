//! A transformer block of any family, in halves: attention, and the perceptron behind it. An engine streams
//! it as one segment, or where the perceptron is wide as one of the attention and one for each tile of the
//! perceptron.
//!
//! A tile has some of the perceptron's units: their rows of the matrices into the perceptron and their
//! columns of the one out of it. Tiles add up what they make, one after another, so what lies between two of
//! them is what all tiles read, the normed hidden states, beside the sum so far: [2, B, T, C]. B: batch, T:
//! tokens of a sequence, C: hidden width.

use super::cache::{Cache, LayerCache};
use crate::autograd::segment::Segment;
use crate::engine::Engine;
use crate::error::Result;
use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;
use std::sync::Arc;

/// Elements of a perceptron's matrices from which on it runs in tiles: more than 1 GiB in f32. A number of
/// the design and not of a machine: how many tiles there are changes how sums are rounded, and memory must
/// not.
const LARGEST_WHOLE_ELEMENTS: usize = 256 << 20;

/// Tiles of a perceptron of so many elements in its matrices, behind attention of so many. As many as make
/// none of them larger than the attention, which is fetched as one, or if that is small than what runs whole:
/// each tile has a boundary of its own, so more would cost and spare nothing.
pub fn perceptron_tiles(elements: usize, attention_elements: usize) -> usize {
    elements.div_ceil(LARGEST_WHOLE_ELEMENTS.max(attention_elements)).max(1)
}

/// Units that tiles have together, so that files' blocks of numbers and matrix products are not cut where
/// they need not be.
const UNITS_TOGETHER: usize = 256;

/// Some units of a perceptron.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Units {
    /// Which.
    pub range: Range<usize>,
    /// How many there are in all.
    pub all: usize,
}

impl Units {
    /// All of them in one tile.
    pub fn whole(all: usize) -> Self {
        Self { range: 0..all, all }
    }

    /// `all` in at most `tiles` tiles of as many each, the last one fewer.
    pub fn tiles(all: usize, tiles: usize) -> impl Iterator<Item = Self> {
        let each = all.div_ceil(tiles.max(1)).max(1);
        let each = if each > UNITS_TOGETHER { each.next_multiple_of(UNITS_TOGETHER) } else { each };
        (0..all).step_by(each).map(move |first| Self { range: first..(first + each).min(all), all })
    }

    /// Whether they are all there are.
    pub fn are_all(&self) -> bool {
        self.range.len() == self.all
    }

    /// Whether the last one is among them.
    pub fn are_last(&self) -> bool {
        self.range.end == self.all
    }
}

/// The first half of a block.
pub trait Attend: Send + Sync + 'static {
    /// Hidden states `xs` [B, T, C] after attention, and normed as the perceptron reads them. With a cache,
    /// of the tokens that follow those in it, without gradients.
    ///
    /// # Errors
    /// What candle says.
    fn attend(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> candle_core::Result<[Tensor; 2]>;
}

/// The second half of a block, or a tile of it.
pub trait Perceive: Send + Sync + 'static {
    /// What the units make of `normed`, both [B, T, C].
    ///
    /// # Errors
    /// What candle says.
    fn forward(&self, normed: &Tensor) -> candle_core::Result<Tensor>;

    /// `sum` plus that, as the end of a segment: in a backward the value need not be computed again.
    ///
    /// # Errors
    /// What candle says.
    fn close(&self, sum: &Tensor, normed: &Tensor) -> candle_core::Result<Tensor>;
}

/// One transformer block.
pub struct Block<A, P> {
    pub(super) attention: A,
    pub(super) perceptron: P,
}

impl<A: Attend, P: Perceive> Block<A, P> {
    fn run(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> candle_core::Result<Tensor> {
        let [residual, normed] = self.attention.attend(xs, cache)?;
        self.perceptron.close(&residual, &normed)
    }

    /// As the module's forward for the tokens that follow those in `cache`, without gradients. `xs` [B, T,
    /// C].
    ///
    /// # Errors
    /// What candle says.
    pub fn forward_cached(&self, xs: &Tensor, cache: &mut LayerCache) -> candle_core::Result<Tensor> {
        self.run(xs, Some(cache))
    }
}

impl<A: Attend, P: Perceive> Module for Block<A, P> {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.run(xs, None)
    }
}

/// A block as an engine streams it.
pub enum StreamedBlock<A, P> {
    /// One segment.
    Whole(Segment<Block<A, P>>),
    /// The attention, and tiles of the perceptron.
    Tiled {
        /// The attention.
        attention: Segment<A>,
        /// All tiles but the last.
        tiles: Vec<Segment<P>>,
        /// The last tile.
        last: Segment<P>,
    },
}

/// What a tile reads and the sum so far, side by side.
fn beside([sum, normed]: &[Tensor; 2]) -> candle_core::Result<Tensor> {
    Tensor::stack(&[normed, sum], 0)
}

/// The sum so far and what tiles read, apart, of `carried` [2, B, T, C].
fn apart(carried: &Tensor) -> candle_core::Result<[Tensor; 2]> {
    let part = |index| carried.get(index)?.contiguous();
    Ok([part(1)?, part(0)?])
}

/// `carried` [2, B, T, C] with what a tile adds to the sum.
fn pass_on<P: Perceive>(tile: &P, carried: &Tensor) -> candle_core::Result<Tensor> {
    let [sum, normed] = apart(carried)?;
    beside(&[(sum + tile.forward(&normed)?)?, normed])
}

/// The block's value [B, T, C], which is what the last tile makes of `carried` [2, B, T, C].
fn end<P: Perceive>(tile: &P, carried: &Tensor) -> candle_core::Result<Tensor> {
    let [sum, normed] = apart(carried)?;
    tile.close(&sum, &normed)
}

impl<A: Attend, P: Perceive> StreamedBlock<A, P> {
    /// A block in segments of `engine`: one for one tile. `units` are all of its perceptron.
    ///
    /// # Errors
    /// What the engine says of segments, and what the functions say.
    pub fn new(
        engine: &Engine,
        vb: VarBuilder<'static>,
        (units, tiles): (usize, usize),
        attention: impl Fn(VarBuilder) -> candle_core::Result<A>,
        perceptron: impl Fn(&Units, VarBuilder) -> candle_core::Result<P>,
    ) -> Result<Self> {
        let mut cut: Vec<Units> = Units::tiles(units, tiles).collect();
        let last = match cut.pop() {
            Some(last) if !cut.is_empty() => last,
            _ => {
                let whole = |vb: VarBuilder<'static>| {
                    let attention = attention(vb.clone())?;
                    Ok(Block { attention, perceptron: perceptron(&Units::whole(units), vb)? })
                };
                return engine.segment(vb, whole).map(Self::Whole);
            }
        };
        let attention = engine.segment(vb.clone(), &attention)?;
        let tile = |units: Units| {
            let name = vb.pp(format!("units_{}_{}", units.range.start, units.range.end));
            engine.segment(name, |_| perceptron(&units, vb.clone()))
        };
        let tiles = cut.into_iter().map(tile).collect::<Result<_>>()?;
        Ok(Self::Tiled { attention, tiles, last: tile(last)? })
    }

    /// Runs the block of a number for each text on its own: the bits of one do not depend on those beside it.
    /// `xs` [1, N, C] are the new tokens of all texts.
    pub(super) fn forward_each(
        &self,
        number: usize,
        texts: &Arc<Vec<Rows>>,
        xs: &Tensor,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole(block) => {
                let texts = texts.clone();
                block.call(&[xs], move |block, inputs| {
                    each(&texts, &inputs[0], 1, |text, xs| {
                        text.cache.with(number, |cache| block.forward_cached(xs, cache))
                    })
                })
            }
            Self::Tiled { attention, tiles, last } => {
                let of_attention = texts.clone();
                let mut carried = attention.call(&[xs], move |attention, inputs| {
                    each(&of_attention, &inputs[0], 1, |text, xs| {
                        beside(&text.cache.with(number, |cache| attention.attend(xs, Some(cache)))?)
                    })
                })?;
                for tile in tiles {
                    let texts = texts.clone();
                    carried = tile.call(&[&carried], move |tile, inputs| {
                        each(&texts, &inputs[0], 2, |_, carried| pass_on(tile, carried))
                    })?;
                }
                let texts = texts.clone();
                last.call(&[&carried], move |tile, inputs| {
                    each(&texts, &inputs[0], 2, |_, carried| end(tile, carried))
                })
            }
        }
    }
}

impl<A: Attend, P: Perceive> Module for StreamedBlock<A, P> {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Whole(block) => block.forward(xs),
            Self::Tiled { attention, tiles, last } => {
                let mut carried = attention
                    .call(&[xs], |attention, inputs| beside(&attention.attend(&inputs[0], None)?))?;
                for tile in tiles {
                    carried = tile.call(&[&carried], |tile, inputs| pass_on(tile, &inputs[0]))?;
                }
                last.call(&[&carried], |tile, inputs| end(tile, &inputs[0]))
            }
        }
    }
}

/// Which rows of a tensor of all texts' new tokens are those of one.
pub(super) struct Rows {
    pub first: usize,
    pub count: usize,
    pub cache: Cache,
}

/// Runs each text's rows of `xs`, which has all of them along dimension `dimension`, on their own; they lie
/// along the last but one of what `run` answers.
fn each(
    texts: &[Rows],
    xs: &Tensor,
    dimension: usize,
    run: impl Fn(&Rows, &Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let outputs =
        texts.iter().map(|text| run(text, &xs.narrow(dimension, text.first, text.count)?.contiguous()?));
    Tensor::cat(&outputs.collect::<candle_core::Result<Vec<_>>>()?, candle_core::D::Minus2)
}
