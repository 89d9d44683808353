//! The GPT-2 architecture (Radford et al., "Language models are unsupervised multitask learners", 2019) as plain candle
//! modules. B: batch, T: tokens of a sequence, C: hidden width, V: vocabulary.

use super::cache::LayerCache;
use super::linear::{Adapting, Linear};
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

/// One transformer block: attention and a two-layer perceptron, each with a norm before and a residual around it.
pub struct Block {
    ln_1: Norm,
    c_attn: Linear,
    c_proj: Linear,
    ln_2: Norm,
    c_fc: Linear,
    mlp_c_proj: Linear,
    heads: usize,
}

impl Block {
    /// The block with the names of GPT-2's checkpoints.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn new(config: &GptConfig, vb: VarBuilder) -> Result<Self> {
        Self::adapted(config, &Adapting::default(), vb)
    }

    /// As [`Self::new`], with adapters beside the linear layers that get one.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn adapted(config: &GptConfig, adapting: &Adapting, vb: VarBuilder) -> Result<Self> {
        let c = config.hidden;
        // Residual branches add up over the layers; GPT-2 scales their last layers down accordingly.
        let residual = 0.02 / (2.0 * config.layers as f64).sqrt();
        let linear = |inputs, outputs, stdev, name: &str| {
            Linear::new(inputs, outputs, true, normal(stdev), adapting, vb.pp(name))
        };
        let [c_attn, c_proj, c_fc, mlp_c_proj] = LINEAR_LAYERS;
        Ok(Self {
            ln_1: Norm::new(c, vb.pp("ln_1"))?,
            c_attn: linear(c, 3 * c, 0.02, c_attn)?,
            c_proj: linear(c, c, residual, c_proj)?,
            ln_2: Norm::new(c, vb.pp("ln_2"))?,
            c_fc: linear(c, 4 * c, 0.02, c_fc)?,
            mlp_c_proj: linear(4 * c, c, residual, mlp_c_proj)?,
            heads: config.heads,
        })
    }
}

impl Block {
    /// As the module's forward for the tokens that follow those in `cache`, without gradients. `xs` [B, T, C].
    ///
    /// # Errors
    /// What candle says.
    pub fn forward_cached(&self, xs: &Tensor, cache: &mut LayerCache) -> Result<Tensor> {
        let (b, t, c) = xs.dims3()?;
        let qkv = self.c_attn.forward(&self.ln_1.forward(xs)?)?; // [B, T, 3C]
        let qkv = qkv.reshape((b, t, 3, self.heads, c / self.heads))?.permute((2, 0, 3, 1, 4))?; // [3, B, H, T, D]
        let [q, k, v] = [0, 1, 2].map(|part| qkv.get(part)?.contiguous());
        self.after_attention(xs, &cache.attend(&q?, &k?, &v?, None)?)
    }

    /// `attended` [B, T, C].
    fn after_attention(&self, xs: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let xs = (xs + self.c_proj.forward(attended)?)?; // [B, T, C]
        let hidden = ops::gelu(&self.c_fc.forward(&self.ln_2.forward(&xs)?)?)?; // [B, T, 4C]
        self.mlp_c_proj.close(&xs, &hidden) // [B, T, C]
    }
}

impl Module for Block {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let qkv = self.c_attn.forward(&self.ln_1.forward(xs)?)?; // [B, T, 3C]
        self.after_attention(xs, &ops::causal_attention(&qkv, self.heads, None)?)
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

    /// Hidden states [B, T, C] of tokens [B, T] at `positions` [B, T], both of u32; `run` runs the block of a number.
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
