//! The Llama architecture (Touvron et al., arXiv 2302.13971) and those that differ from it in details: Llama
//! 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3, SmolLM2. Plain candle modules with the tensor names of Hugging
//! Face's checkpoints.
//!
//! B: batch, T: tokens of a sequence, C: hidden width, H: query heads, K: key and value heads, D: width of a
//! head, F: width of the perceptron, V: vocabulary.

use super::block::{self, Attend, Perceive, Units};
use super::cache::LayerCache;
use super::linear::{Adapting, Linear};
use super::llama_config::LlamaConfig;
use crate::engine::Engine;
use crate::error::Result as EngineResult;
use crate::tiled_linear::{TiledLinear, linear_by_rows};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero_kernels::ops;

/// Last parts of the names of a layer's linear layers, which may have adapters.
pub(super) const LINEAR_LAYERS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Initial weights of linear layers.
pub(super) const WEIGHTS: Init = Init::Randn { mean: 0.0, stdev: 0.02 };

/// Root mean square norm with a scale.
struct Norm {
    weight: Tensor,
    epsilon: f32,
}

impl Norm {
    fn new(width: usize, epsilon: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", Init::Const(1.0))?;
        Ok(Self { weight, epsilon: epsilon as f32 })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        ops::rms_norm(xs, &self.weight, self.epsilon)
    }
}

/// Cosines and sines of the positions' angles, both [T, D/2].
#[derive(Clone)]
struct Angles {
    cosines: Tensor,
    sines: Tensor,
}

impl Angles {
    fn new(config: &LlamaConfig, vb: &VarBuilder) -> Result<Self> {
        let frequencies = config.rope.frequencies(config.head_width);
        let magnitude = config.rope.magnitude() as f32;
        let shape = (config.sequence, frequencies.len());
        let of = |function: fn(f64) -> f64| {
            let angles = (0..config.sequence).flat_map(|position| {
                // In f32, as the checkpoints were trained.
                frequencies.iter().map(move |frequency| position as f32 * frequency)
            });
            let values: Vec<f32> =
                angles.map(|angle| function(f64::from(angle)) as f32 * magnitude).collect();
            Tensor::from_vec(values, shape, vb.device())?.to_dtype(vb.dtype())
        };
        Ok(Self { cosines: of(f64::cos)?, sines: of(f64::sin)? })
    }

    /// Rotates `xs` [B, H, T, D], whose first token is at `position`.
    fn rotate(&self, xs: &Tensor, position: usize) -> Result<Tensor> {
        let t = xs.dim(2)?;
        let sequence = self.cosines.dim(0)?;
        if position + t > sequence {
            candle_core::bail!(
                "{} tokens for a model that was made for sequences of {sequence}",
                position + t
            )
        }
        let [cosines, sines] =
            [&self.cosines, &self.sines].map(|table| table.narrow(0, position, t)?.contiguous());
        ops::rope(xs, &cosines?, &sines?)
    }
}

/// Attention in which several query heads share a key and value head (Ainslie et al., arXiv 2305.13245).
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    angles: Angles,
    heads: usize,
    key_value_heads: usize,
    head_width: usize,
    /// Tokens that one sees at most, itself included.
    window: Option<usize>,
}

impl Attention {
    fn new(config: &LlamaConfig, layer: usize, adapting: &Adapting, vb: VarBuilder) -> Result<Self> {
        let (c, d) = (config.hidden, config.head_width);
        let (q, kv) = (config.heads * d, config.key_value_heads * d);
        let linear = |inputs, outputs, bias, name: &str| {
            Linear::new(inputs, outputs, bias, WEIGHTS, adapting, vb.pp(name))
        };
        let norm = |name: &str| {
            let norm = || Norm::new(d, config.epsilon, vb.pp(name));
            config.query_key_norms.then(norm).transpose()
        };
        Ok(Self {
            q_proj: linear(c, q, config.query_key_value_bias, "q_proj")?,
            k_proj: linear(c, kv, config.query_key_value_bias, "k_proj")?,
            v_proj: linear(c, kv, config.query_key_value_bias, "v_proj")?,
            o_proj: linear(q, c, config.output_bias, "o_proj")?,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            angles: Angles::new(config, &vb)?,
            heads: config.heads,
            key_value_heads: config.key_value_heads,
            head_width: d,
            window: config.windows.get(layer).copied().flatten(),
        })
    }

    /// Heads of `xs` [B, T, heads·D], normed and rotated: [B, heads, T, D].
    fn heads(&self, xs: &Tensor, heads: usize, norm: Option<&Norm>, position: usize) -> Result<Tensor> {
        let (b, t, _) = xs.dims3()?;
        let mut xs = xs.reshape((b, t, heads, self.head_width))?;
        if let Some(norm) = norm {
            xs = norm.forward(&xs)?;
        }
        self.angles.rotate(&xs.transpose(1, 2)?.contiguous()?, position)
    }

    /// As [`Self::heads`] from the first position on, with the heads side by side as they were: [B, T,
    /// heads·D].
    fn side_by_side(&self, xs: &Tensor, heads: usize, norm: Option<&Norm>) -> Result<Tensor> {
        let normed = match norm {
            Some(norm) => {
                let (b, t, width) = xs.dims3()?;
                norm.forward(&xs.reshape((b, t, heads, self.head_width))?)?.reshape((b, t, width))?
            }
            None => xs.clone(),
        };
        ops::rope_by_position(&normed, &self.angles.cosines, &self.angles.sines, heads)
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (h, k_heads) = (self.heads, self.key_value_heads);
        let q = self.side_by_side(&self.q_proj.forward(xs)?, h, self.q_norm.as_ref())?; // [B, T, H·D]
        let k = self.side_by_side(&self.k_proj.forward(xs)?, k_heads, self.k_norm.as_ref())?; // [B, T, K·D]
        let v = self.v_proj.forward(xs)?; // [B, T, K·D]
        self.o_proj.forward(&ops::grouped_causal_attention(&q, &k, &v, h, k_heads, self.window)?)
    }

    /// As [`Self::forward`] for the tokens that follow those in `cache`, without gradients.
    fn forward_cached(&self, xs: &Tensor, cache: &mut LayerCache) -> Result<Tensor> {
        let (b, t, _) = xs.dims3()?;
        let (position, k_heads, d) = (cache.tokens(), self.key_value_heads, self.head_width);
        let q = self.heads(&self.q_proj.forward(xs)?, self.heads, self.q_norm.as_ref(), position)?;
        let k = self.heads(&self.k_proj.forward(xs)?, k_heads, self.k_norm.as_ref(), position)?;
        let v = self.v_proj.forward(xs)?.reshape((b, t, k_heads, d))?.transpose(1, 2)?.contiguous()?;
        self.o_proj.forward(&cache.attend(&q, &k, &v, self.window)?)
    }
}

/// The gated perceptron (Shazeer, arXiv 2002.05202), or some units of it.
pub struct Perceptron {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Perceptron {
    fn new(config: &LlamaConfig, adapting: &Adapting, units: &Units, vb: VarBuilder) -> Result<Self> {
        let (c, bias) = (config.hidden, config.perceptron_bias);
        let into = |name: &str| Linear::of_outputs(c, units, bias, WEIGHTS, adapting, vb.pp(name));
        Ok(Self {
            gate_proj: into("gate_proj")?,
            up_proj: into("up_proj")?,
            down_proj: Linear::of_inputs(units, c, bias, WEIGHTS, adapting, vb.pp("down_proj"))?,
        })
    }

    /// What the units answer, [B, T, F], or as many of F as there are.
    fn gated(&self, normed: &Tensor) -> Result<Tensor> {
        ops::gated_silu(&self.gate_proj.forward(normed)?, &self.up_proj.forward(normed)?)
    }
}

impl Perceive for Perceptron {
    fn forward(&self, normed: &Tensor) -> Result<Tensor> {
        self.down_proj.forward(&self.gated(normed)?)
    }

    fn close(&self, sum: &Tensor, normed: &Tensor) -> Result<Tensor> {
        self.down_proj.close(sum, &self.gated(normed)?)
    }
}

/// Attention with the norms before and behind it.
pub struct NormedAttention {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
}

impl NormedAttention {
    fn new(config: &LlamaConfig, layer: usize, adapting: &Adapting, vb: VarBuilder) -> Result<Self> {
        let norm = |name: &str| Norm::new(config.hidden, config.epsilon, vb.pp(name));
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(config, layer, adapting, vb.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
        })
    }
}

impl Attend for NormedAttention {
    fn attend(&self, xs: &Tensor, cache: Option<&mut LayerCache>) -> Result<[Tensor; 2]> {
        let normed = self.input_layernorm.forward(xs)?;
        let attended = match cache {
            Some(cache) => self.self_attn.forward_cached(&normed, cache)?,
            None => self.self_attn.forward(&normed)?,
        };
        let xs = (xs + attended)?; // [B, T, C]
        let normed = self.post_attention_layernorm.forward(&xs)?;
        Ok([xs, normed])
    }
}

/// One decoder layer.
pub type Block = block::Block<NormedAttention, Perceptron>;

/// One decoder layer as an engine streams it.
pub type StreamedBlock = block::StreamedBlock<NormedAttention, Perceptron>;

impl Block {
    /// The layer of a number with the names of Hugging Face's checkpoints.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn new(config: &LlamaConfig, layer: usize, adapting: &Adapting, vb: VarBuilder) -> Result<Self> {
        let units = Units::whole(config.perceptron);
        Ok(Self {
            attention: NormedAttention::new(config, layer, adapting, vb.clone())?,
            perceptron: Perceptron::new(config, adapting, &units, vb.pp("mlp"))?,
        })
    }
}

impl StreamedBlock {
    /// The layer of a number in segments of `engine`, with the perceptron in `tiles`:
    /// [`LlamaConfig::perceptron_tiles`], or more.
    ///
    /// # Errors
    /// What the engine says.
    pub fn from_config(
        engine: &Engine,
        config: &LlamaConfig,
        layer: usize,
        adapting: &Adapting,
        tiles: usize,
        vb: VarBuilder<'static>,
    ) -> EngineResult<Self> {
        Self::new(
            engine,
            vb,
            (config.perceptron, tiles),
            |vb| NormedAttention::new(config, layer, adapting, vb),
            |units, vb| Perceptron::new(config, adapting, units, vb.pp("mlp")),
        )
    }
}

/// The whole model, generic over what a layer is wrapped in: nothing for plain candle, a
/// [`Segment`](crate::Segment) for the engine.
pub struct Llama<B> {
    embed_tokens: Tensor,
    layers: Vec<B>,
    norm: Norm,
    head: Head,
}

/// What makes logits of hidden states.
enum Head {
    /// The token embedding.
    Tied,
    /// [V, C].
    Whole(Tensor),
    Tiled(TiledLinear),
}

impl<B> Llama<B> {
    /// The model; `make_block` is given the builder and the number of each layer, and `make_head` that of an
    /// untied head, which is whole where it answers none.
    ///
    /// # Errors
    /// What the `VarBuilder`, `make_block` or `make_head` says.
    pub fn new<'a, E: From<candle_core::Error>>(
        config: &LlamaConfig,
        vb: VarBuilder<'a>,
        make_block: impl Fn(VarBuilder<'a>, usize) -> std::result::Result<B, E>,
        make_head: impl FnOnce(VarBuilder<'a>) -> std::result::Result<Option<TiledLinear>, E>,
    ) -> std::result::Result<Self, E> {
        let model = vb.pp("model");
        let shape = (config.vocabulary, config.hidden);
        let layers = (0..config.layers)
            .map(|i| make_block(model.pp(format!("layers.{i}")), i))
            .collect::<std::result::Result<_, E>>()?;
        let head = match config.tied {
            true => Head::Tied,
            false => match make_head(vb.pp("lm_head"))? {
                Some(tiled) => Head::Tiled(tiled),
                None => Head::Whole(vb.get_with_hints(shape, "lm_head.weight", WEIGHTS)?),
            },
        };
        Ok(Self {
            embed_tokens: model.get_with_hints(shape, "embed_tokens.weight", WEIGHTS)?,
            layers,
            norm: Norm::new(config.hidden, config.epsilon, model.pp("norm"))?,
            head,
        })
    }

    /// Hidden states [B, T, C] of `tokens` [B, T] after the final norm; `run` runs the layer of a number.
    ///
    /// # Errors
    /// What `run` says, which knows at what positions the tokens are.
    pub fn hidden(
        &self,
        tokens: &Tensor,
        mut run: impl FnMut(usize, &B, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let tokens = ops::to_device(tokens, self.embed_tokens.device())?;
        let mut xs = ops::embedding(&self.embed_tokens, &tokens)?; // [B, T, C]
        for (number, layer) in self.layers.iter().enumerate() {
            xs = run(number, layer, &xs)?;
        }
        self.norm.forward(&xs)
    }

    /// Different tokens, V.
    pub fn vocabulary(&self) -> usize {
        self.embed_tokens.dims()[0]
    }

    /// Mean cross-entropy of `targets` [N] for `hidden` [N, C].
    ///
    /// # Errors
    /// For targets outside the vocabulary, and what the operations say.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        match &self.head {
            Head::Tied => ops::linear_cross_entropy(hidden, &self.embed_tokens, targets),
            Head::Whole(weight) => ops::linear_cross_entropy(hidden, weight, targets),
            Head::Tiled(head) => head.cross_entropy(hidden, targets),
        }
    }

    /// Logits [N, V] of `hidden` [N, C], each row on its own.
    ///
    /// # Errors
    /// What the operations say.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match &self.head {
            Head::Tied => linear_by_rows(hidden, &self.embed_tokens, None),
            Head::Whole(weight) => linear_by_rows(hidden, weight, None),
            Head::Tiled(head) => head.forward_by_rows(hidden),
        }
    }
}
