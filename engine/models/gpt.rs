//! The GPT-2 architecture (Radford et al., "Language models are unsupervised multitask learners", 2019) as
//! plain candle modules. B: batch, T: tokens of a sequence, C: hidden width, V: vocabulary.

use super::block::{self, Attend, Perceive, Units, perceptron_tiles};
use super::cache::LayerCache;
use super::linear::{Adapting, Linear};
use crate::engine::Engine;
use crate::error::Result as EngineResult;
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero_kernels::ops;
use serde::{Deserialize, Serialize};

const EPSILON: f32 = 1e-5;

/// Sizes of a GPT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// Different tokens, V.
    pub vocabulary: usize,
    /// Blocks.
    pub layers: usize,
    /// Width, C.
    pub hidden: usize,
    /// Attention heads; C must be a multiple.
    pub heads: usize,
    /// Longest sequence, T.
    pub sequence: usize,
}

impl GptConfig {
    /// Parameters of the model.
    pub fn parameter_count(&self) -> u64 {
        let (v, l, c, t) =
            (self.vocabulary as u64, self.layers as u64, self.hidden as u64, self.sequence as u64);
        v * c + t * c + l * (12 * c * c + 13 * c) + 2 * c
    }

    /// Tiles of a block's perceptron in an engine, by its size alone.
    pub fn perceptron_tiles(&self) -> usize {
        tiles_of_width(self.hidden)
    }

    /// Deviation of the initial weights of a residual branch's last layer. Branches add up over the layers;
    /// GPT-2 scales their last layers down accordingly.
    fn residual_stdev(&self) -> f64 {
        0.02 / (2.0 * self.layers as f64).sqrt()
    }
}

/// Tiles of the perceptron of a block of the width `hidden`: of four squares of it in attention, and twice as
/// many behind it.
pub(crate) fn tiles_of_width(hidden: usize) -> usize {
    let square = hidden.saturating_mul(hidden);
    perceptron_tiles(square.saturating_mul(8), square.saturating_mul(4))
}

fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0.0, stdev }
}

/// Scale and shift of a layer norm.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(width, "bias", Init::Const(0.0))?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        ops::layer_norm(xs, &self.weight, &self.bias, EPSILON)
    }
}

/// Last parts of the names of a block's linear layers, which may have adapters.
pub(super) const LINEAR_LAYERS: [&str; 4] = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

/// Attention with the norms before and behind it.
pub struct NormedAttention {
    ln_1: Norm,
    c_attn: Linear,
    c_proj: Linear,
    ln_2: Norm,
    heads: usize,
}

impl NormedAttention {
    fn new(config: &GptConfig, adapting: &Adapting, vb: VarBuilder) -> Result<Self> {
        let c = config.hidden;
        let linear =
            |outputs, stdev, name: &str| Linear::new(c, outputs, true, normal(stdev), adapting, vb.pp(name));
        let [c_attn, c_proj, ..] = LINEAR_LAYERS;
        Ok(Self {
            ln_1: Norm::new(c, vb.pp("ln_1"))?,
            c_attn: linear(3 * c, 0.02, c_attn)?,
            c_proj: linear(c, config.residual_stdev(), c_proj)?,
            ln_2: Norm::new(c, vb.pp("ln_2"))?,
            heads: config.heads,
        })
    }

    /// Of the tokens behind those in a cache, `qkv` [B, T, 3C]: [B, T, C].
    fn attend_cached(&self, qkv: &Tensor, cache: &mut LayerCache) -> Result<Tensor> {
        let (b, t, c) = qkv.dims3()?;
        let qkv = qkv.reshape((b, t, 3, self.heads, c / 3 / self.heads))?;
        let qkv = qkv.permute((2, 0, 3, 1, 4))?; // [3, B, H, T, D]
        let [q, k, v] = [0, 1, 2].map(|part| qkv.get(part)?.contiguous());
        cache.attend(&q?, &k?, &v?, None)
    }
}

impl Attend for NormedAttention {
    fn attend(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<[Tensor; 2]> {
        let qkv = self.c_attn.forward(&self.ln_1.forward(xs)?)?; // [B, T, 3C]
        let attended = match cache {
            Some(cache) => self.attend_cached(&qkv, cache)?,
            None => ops::causal_attention(&qkv, self.heads, None)?,
        };
        let xs = (xs + self.c_proj.forward(&attended)?)?; // [B, T, C]
        let normed = self.ln_2.forward(&xs)?;
        Ok([xs, normed])
    }
}

/// The perceptron of two layers, or some units of it.
pub struct Perceptron {
    c_fc: Linear,
    c_proj: Linear,
}

impl Perceptron {
    fn new(config: &GptConfig, adapting: &Adapting, units: &Units, vb: VarBuilder) -> Result<Self> {
        let c = config.hidden;
        let [.., c_fc, c_proj] = LINEAR_LAYERS;
        let out = normal(config.residual_stdev());
        Ok(Self {
            c_fc: Linear::of_outputs(c, units, true, normal(0.02), adapting, vb.pp(c_fc))?,
            c_proj: Linear::of_inputs(units, c, true, out, adapting, vb.pp(c_proj))?,
        })
    }
}

impl Perceive for Perceptron {
    fn forward(&self, normed: &Tensor) -> Result<Tensor> {
        self.c_proj.forward(&ops::gelu(&self.c_fc.forward(normed)?)?)
    }

    fn close(&self, sum: &Tensor, normed: &Tensor) -> Result<Tensor> {
        self.c_proj.close(sum, &ops::gelu(&self.c_fc.forward(normed)?)?)
    }
}

/// One transformer block: attention and a two-layer perceptron, each with a norm before and a residual around
/// it.
pub type Block = block::Block<NormedAttention, Perceptron>;

/// One transformer block as an engine streams it.
pub type StreamedBlock = block::StreamedBlock<NormedAttention, Perceptron>;

impl Block {
    /// The block with the names of GPT-2's checkpoints.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn new(config: &GptConfig, vb: VarBuilder) -> Result<Self> {
        let (none, units) = (Adapting::default(), Units::whole(4 * config.hidden));
        Ok(Self {
            attention: NormedAttention::new(config, &none, vb.clone())?,
            perceptron: Perceptron::new(config, &none, &units, vb)?,
        })
    }
}

impl StreamedBlock {
    /// The block in segments of `engine`, with adapters beside the linear layers that get one, and the
    /// perceptron in `tiles`: [`GptConfig::perceptron_tiles`], or more.
    ///
    /// # Errors
    /// What the engine says.
    pub fn from_config(
        engine: &Engine,
        config: &GptConfig,
        adapting: &Adapting,
        tiles: usize,
        vb: VarBuilder<'static>,
    ) -> EngineResult<Self> {
        Self::new(
            engine,
            vb,
            (4 * config.hidden, tiles),
            |vb| NormedAttention::new(config, adapting, vb),
            |units, vb| Perceptron::new(config, adapting, units, vb),
        )
    }
}

/// The whole model, generic over what a block is wrapped in: nothing for plain candle, a
/// [`Segment`](crate::Segment) for the engine.
pub struct Gpt<B> {
    wte: Tensor,
    wpe: Tensor,
    blocks: Vec<B>,
    ln_f: Norm,
}

impl<B> Gpt<B> {
    /// The model; `make_block` is given the builder and the number of each block.
    ///
    /// # Errors
    /// What the `VarBuilder` or `make_block` says.
    pub fn new<'a, E: From<candle_core::Error>>(
        config: &GptConfig,
        vb: VarBuilder<'a>,
        make_block: impl Fn(VarBuilder<'a>, usize) -> std::result::Result<B, E>,
    ) -> std::result::Result<Self, E> {
        let blocks = (0..config.layers)
            .map(|i| make_block(vb.pp(format!("h.{i}")), i))
            .collect::<std::result::Result<_, E>>()?;
        Ok(Self {
            wte: vb.get_with_hints((config.vocabulary, config.hidden), "wte.weight", normal(0.02))?,
            wpe: vb.get_with_hints((config.sequence, config.hidden), "wpe.weight", normal(0.01))?,
            blocks,
            ln_f: Norm::new(config.hidden, vb.pp("ln_f"))?,
        })
    }

    /// Hidden states [B, T, C] of tokens [B, T] at `positions` [B, T], both of u32; `run` runs the block of a
    /// number.
    ///
    /// # Errors
    /// For positions that the sequence has not, and what `run` says.
    pub fn hidden_at(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        run: impl FnMut(usize, &B, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let [tokens, positions] = [tokens, positions].map(|tensor| ops::to_device(tensor, self.wte.device()));
        let xs = (ops::embedding(&self.wte, &tokens?)? + ops::embedding(&self.wpe, &positions?)?)?;
        self.after_embedding(xs, run)
    }

    /// `xs` [B, T, C].
    fn after_embedding(
        &self,
        mut xs: Tensor,
        mut run: impl FnMut(usize, &B, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for (number, block) in self.blocks.iter().enumerate() {
            xs = run(number, block, &xs)?;
        }
        self.ln_f.forward(&xs)
    }

    /// The matrix [V, C] that makes logits of hidden states: the token embedding.
    pub fn head(&self) -> &Tensor {
        &self.wte
    }
}

impl<B: Module> Gpt<B> {
    /// Hidden states [B, T, C] of tokens [B, T].
    ///
    /// # Errors
    /// For more tokens than the sequence has, and what the blocks say.
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let tokens = ops::to_device(tokens, self.wte.device())?;
        let t = tokens.dim(1)?;
        let embedded = ops::embedding(&self.wte, &tokens)?; // [B, T, C]
        let xs = embedded.broadcast_add(&self.wpe.narrow(0, 0, t)?)?; // [B, T, C]
        self.after_embedding(xs, |_, block, xs| block.forward(xs))
    }

    /// Mean cross-entropy of `targets` [B, T] after `tokens` [B, T]. The head is the token embedding.
    ///
    /// # Errors
    /// As [`Self::hidden`], and for targets outside the vocabulary.
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden(tokens)?.flatten(0, 1)?; // [B·T, C]
        let targets = ops::to_device(targets, self.wte.device())?.flatten_all()?; // [B·T]
        ops::linear_cross_entropy(&hidden, &self.wte, &targets)
    }

    /// Logits [B, V] of the token after the last one of `tokens` [B, T].
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn next_logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let t = tokens.dim(1)?;
        let last = self.hidden(tokens)?.narrow(1, t - 1, 1)?.squeeze(1)?.contiguous()?; // [B, C]
        ops::linear(&last, &self.wte, None)
    }
}
