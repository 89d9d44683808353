//! Memory-centric tiling (Rajbhandari et al., "ZeRO-Infinity", arXiv 2104.07857, section 5.1.3): a linear
//! layer that is too large to be on the device as a whole runs in tiles, each a segment with some rows of the
//! weight.

use crate::autograd::segment::Segment;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::schedule::tile::Cut;
use candle_core::{D, DType, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use ferrozero_kernels::ops;
use std::ops::Range;

/// Some rows of the weight, and of the bias.
struct Tile {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// A linear layer in tiles that are fetched, run and released one after another. The product is that of the
/// whole layer; gradients of its input are summed over the tiles, and differ from those of the whole layer by
/// rounding.
pub struct TiledLinear {
    tiles: Vec<(Range<usize>, Segment<Tile>)>,
    /// First input of every tile: what they all read is none's boundary, which could leave the device.
    nothing: Tensor,
}

impl TiledLinear {
    /// A layer with a weight [outputs, inputs] in `tiles` tiles of as many rows each, the last one fewer.
    /// More tiles than outputs are as many as there are outputs.
    ///
    /// # Errors
    /// [`Error::Configuration`] for no tiles or no outputs, and what [`Engine::segment`] says.
    pub fn new(
        engine: &Engine,
        (inputs, outputs): (usize, usize),
        tiles: usize,
        bias: bool,
        init: Init,
        vb: VarBuilder<'static>,
    ) -> Result<Self> {
        if tiles == 0 || outputs == 0 {
            return Err(Error::Configuration(format!(
                "{}: a layer of {outputs} outputs in {tiles} tiles: both must be above 0",
                vb.prefix()
            )));
        }
        let rows = outputs.div_ceil(tiles);
        let tiles = (0..outputs).step_by(rows).map(|first| {
            let rows = first..(first + rows).min(outputs);
            let vb = vb.pp(Cut::Rows(rows.clone()));
            let tile = engine.segment(vb, |vb| -> candle_core::Result<Tile> {
                let make_bias = || vb.get_with_hints(rows.len(), "bias", Init::Const(0.0));
                Ok(Tile {
                    weight: vb.get_with_hints((rows.len(), inputs), "weight", init)?,
                    bias: bias.then(make_bias).transpose()?,
                })
            })?;
            Ok((rows, tile))
        });
        let tiles = tiles.collect::<Result<_>>()?;
        Ok(Self { tiles, nothing: Tensor::zeros(1, DType::U32, vb.device())? })
    }

    /// `xs` [.., inputs] to [.., outputs].
    ///
    /// # Errors
    /// As [`Segment::call`].
    pub fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let outputs: candle_core::Result<Vec<Tensor>> = self
            .tiles
            .iter()
            .map(|(_, tile)| {
                tile.call(&[&self.nothing, xs], |tile, inputs| {
                    ops::linear(&inputs[1], &tile.weight, tile.bias.as_ref())
                })
            })
            .collect();
        Tensor::cat(&outputs?, D::Minus1)
    }

    /// As [`Self::forward`] of `xs` [N, inputs], row by row: the bits of a row do not depend on those beside
    /// it.
    ///
    /// # Errors
    /// As [`Segment::call`].
    #[cfg(feature = "models")]
    pub(crate) fn forward_by_rows(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let outputs = self.tiles.iter().map(|(_, tile)| {
            tile.call(&[&self.nothing, xs], |tile, inputs| {
                linear_by_rows(&inputs[1], &tile.weight, tile.bias.as_ref())
            })
        });
        Tensor::cat(&outputs.collect::<candle_core::Result<Vec<_>>>()?, D::Minus1)
    }

    /// Mean cross-entropy of `targets` `[N]` of u32 for `hidden` `[N, inputs]` by way of logits. Only a part of
    /// a tile's logits exists at a time: the log-sums of the tiles are summed. There must be no bias.
    ///
    /// # Errors
    /// As [`Segment::call`], and for a target that is none of the outputs.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        let outputs = self.tiles.last().map_or(0, |(rows, _)| rows.end) as u32;
        let largest = targets.max(0)?.to_scalar::<u32>()?;
        if largest >= outputs {
            bail!("target {largest} for a layer of {outputs} outputs")
        }
        let full = |value: u32| Tensor::full(value, targets.shape(), targets.device());
        let outside = full(u32::MAX)?;
        let parts = self.tiles.iter().map(|(rows, tile)| {
            let first = rows.start as u32;
            let shifted = (targets.maximum(first)? - full(first)?)?;
            let targets = targets.ge(first)?.where_cond(&shifted, &outside)?; // [N]
            tile.call(&[&self.nothing, hidden, &targets], |tile, inputs| {
                ops::linear_log_sums(&inputs[1], &tile.weight, &inputs[2])
            })
        });
        let parts = Tensor::stack(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?; // [tiles, 2, N]
        let (log_sums, target_logits) = (parts.get_on_dim(1, 0)?, parts.get_on_dim(1, 1)?); // [tiles, N]
        let largest = log_sums.detach().max(0)?; // [N]
        let sums = log_sums.broadcast_sub(&largest)?.exp()?.sum(0)?;
        ((sums.log()? + largest)? - target_logits.sum(0)?)?.mean(0)
    }
}

/// The layer of each row of `xs` [N, in] on its own. A product of several rows may sum in another order.
#[cfg(feature = "models")]
pub(crate) fn linear_by_rows(
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    let rows = (0..xs.dim(0)?).map(|row| ops::linear(&xs.narrow(0, row, 1)?, weight, bias));
    Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
}
