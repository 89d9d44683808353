//! The shape of a model that need not exist: its groups, its activations and its arithmetic, for plans made before
//! anything is built. B: batch, T: tokens of a sequence, C: hidden width, V: vocabulary.

use crate::arrangement::Call;
use crate::error::{Error, Result};
use crate::layout::{Group, Layout};
use crate::simulator::{Compute, ComputeTime};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Tensors of a block's backward, in numbers a token and width: what the graph of candle keeps of the recomputed forward,
/// and the gradients that are under way beside it. Counted over the engine's own blocks, whose attention keeps no scores.
const WORKING_WIDTHS: u64 = 34;

/// Rows whose logits the engine's cross-entropy on the CPU device has at once.
const LOGIT_ROWS: u64 = 256;

/// What kind of blocks a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// GPT-2: learned positions, layer norms, biases, a perceptron of two layers, the head tied to the embedding.
    Gpt,
    /// Llama: rotary positions, RMS norms, no biases, a gated perceptron of three matrices.
    Llama,
}

/// Floating-point operations a second of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speeds {
    /// Of matrix products.
    pub matmul: f64,
    /// Of attention, counted as 4·T·C a token, with what the mask hides.
    pub attention: f64,
}

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelShape {
    /// Kind of blocks.
    pub family: Family,
    /// Different tokens, V.
    pub vocabulary: usize,
    /// Blocks.
    pub layers: usize,
    /// Width, C.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_value_heads: usize,
    /// Width of the perceptron.
    pub feed_forward: usize,
    /// Longest sequence, which decides the learned positions of GPT-2.
    pub positions: usize,
    /// Whether the head is the token embedding.
    pub tied: bool,
    /// Segments that a block is made of: more of them need less of the device.
    pub segments_per_block: usize,
}

/// Models by name: layers, width, heads. GPT-2 after Radford et al. 2019, GPT-3 after Brown et al. (arXiv 2005.14165,
/// table 2.1, its 13B with the width of 5120 that 40 heads of 128 make), 1t after ZeRO-Infinity (arXiv 2104.07857, table 1).
pub const NAMED: [(&str, usize, usize, usize); 9] = [
    ("gpt2", 12, 768, 12),
    ("gpt2-medium", 24, 1024, 16),
    ("gpt2-large", 36, 1280, 20),
    ("gpt2-xl", 48, 1600, 25),
    ("gpt3-6.7b", 32, 4096, 32),
    ("gpt3-13b", 40, 5120, 40),
    ("gpt-100b", 125, 8192, 64),
    ("gpt3-175b", 96, 12288, 96),
    ("gpt-1t", 128, 25600, 256),
];

/// Tokens of GPT-2's vocabulary.
const GPT2_VOCABULARY: usize = 50257;
/// Width of a head, and layers to width, in the shapes that [`ModelShape::grown`] makes: those of GPT-3's larger models.
const GROWN_HEAD: usize = 128;

/// What is read of a Hugging Face `config.json`.
#[derive(Debug, Deserialize)]
struct HuggingFace {
    model_type: String,
    vocab_size: usize,
    #[serde(alias = "n_layer")]
    num_hidden_layers: usize,
    #[serde(alias = "n_embd")]
    hidden_size: usize,
    #[serde(alias = "n_head")]
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<usize>,
    #[serde(alias = "n_positions")]
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
}

impl ModelShape {
    /// A GPT.
    pub fn gpt(vocabulary: usize, layers: usize, hidden: usize, heads: usize, positions: usize) -> Self {
        Self {
            family: Family::Gpt,
            vocabulary,
            layers,
            hidden,
            heads,
            key_value_heads: heads,
            feed_forward: 4 * hidden,
            positions,
            tied: true,
            segments_per_block: 1,
        }
    }

    /// A model of [`NAMED`] with GPT-2's vocabulary.
    ///
    /// # Errors
    /// [`Error::Configuration`] for other names, with those that there are.
    pub fn named(name: &str, positions: usize) -> Result<Self> {
        let found = NAMED.iter().find(|(known, ..)| *known == name);
        let &(_, layers, hidden, heads) = found.ok_or_else(|| {
            let known: Vec<_> = NAMED.iter().map(|(known, ..)| *known).collect();
            let known = known.join(", ");
            Error::Configuration(format!(
                "model {name:?} is unknown: use one of {known}, or the path of a Hugging Face config.json"
            ))
        })?;
        Ok(Self::gpt(GPT2_VOCABULARY, layers, hidden, heads, positions))
    }

    /// The model of a Hugging Face `config.json` of the GPT-2 or Llama family.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::Configuration`] for other families and missing sizes.
    pub fn from_hugging_face(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
        let wrong = |what: String| Error::Configuration(format!("{}: {what}", path.display()));
        let config: HuggingFace = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let (family, tied) = match config.model_type.as_str() {
            "gpt2" => (Family::Gpt, true),
            "llama" | "mistral" => (Family::Llama, false),
            other => {
                return Err(wrong(format!(
                    "model_type {other:?} is not of the families gpt2, llama, mistral"
                )));
            }
        };
        let feed_forward = match (config.intermediate_size, family) {
            (Some(width), _) => width,
            (None, Family::Gpt) => 4 * config.hidden_size,
            (None, Family::Llama) => return Err(wrong("intermediate_size is missing".into())),
        };
        let sizes = [
            config.vocab_size,
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads.unwrap_or(1),
            feed_forward,
        ];
        if sizes.iter().any(|&size| size == 0 || size > 1 << 24) {
            return Err(wrong("every size must be from 1 to 16 Mi".into()));
        }
        Ok(Self {
            family,
            vocabulary: config.vocab_size,
            layers: config.num_hidden_layers,
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            key_value_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            feed_forward,
            positions: config.max_position_embeddings,
            tied: config.tie_word_embeddings.unwrap_or(tied),
            segments_per_block: 1,
        })
    }

    /// A larger or smaller model of the same family: a GPT of `layers` blocks and a width of 128 a block, as GPT-3 has it;
    /// for Llama the same block `layers` times.
    pub fn grown(&self, layers: usize) -> Self {
        match self.family {
            Family::Llama => Self { layers, ..self.clone() },
            Family::Gpt => Self {
                segments_per_block: self.segments_per_block,
                ..Self::gpt(self.vocabulary, layers, GROWN_HEAD * layers, layers, self.positions)
            },
        }
    }

    /// Names and shapes of a block's parameters.
    fn block(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (c, f) = (self.hidden, self.feed_forward);
        let kv = self.hidden / self.heads.max(1) * self.key_value_heads;
        match self.family {
            Family::Gpt => vec![
                ("ln_1.weight", vec![c]),
                ("ln_1.bias", vec![c]),
                ("attn.c_attn.weight", vec![3 * c, c]),
                ("attn.c_attn.bias", vec![3 * c]),
                ("attn.c_proj.weight", vec![c, c]),
                ("attn.c_proj.bias", vec![c]),
                ("ln_2.weight", vec![c]),
                ("ln_2.bias", vec![c]),
                ("mlp.c_fc.weight", vec![f, c]),
                ("mlp.c_fc.bias", vec![f]),
                ("mlp.c_proj.weight", vec![c, f]),
                ("mlp.c_proj.bias", vec![c]),
            ],
            Family::Llama => vec![
                ("input_layernorm.weight", vec![c]),
                ("self_attn.q_proj.weight", vec![c, c]),
                ("self_attn.k_proj.weight", vec![kv, c]),
                ("self_attn.v_proj.weight", vec![kv, c]),
                ("self_attn.o_proj.weight", vec![c, c]),
                ("post_attention_layernorm.weight", vec![c]),
                ("mlp.gate_proj.weight", vec![f, c]),
                ("mlp.up_proj.weight", vec![f, c]),
                ("mlp.down_proj.weight", vec![c, f]),
            ],
        }
    }

    fn outside_blocks(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (v, c) = (self.vocabulary, self.hidden);
        let mut outside = vec![("embedding.weight", vec![v, c]), ("norm.weight", vec![c])];
        if self.family == Family::Gpt {
            outside.push(("norm.bias", vec![c]));
            outside.push(("positions.weight", vec![self.positions, c]));
        }
        if !self.tied {
            outside.push(("head.weight", vec![v, c]));
        }
        outside
    }

    /// Parameters of the model.
    pub fn parameters(&self) -> u64 {
        let count = |shapes: Vec<(&str, Vec<usize>)>| -> u64 {
            shapes.iter().map(|(_, shape)| shape.iter().map(|&size| size as u64).product::<u64>()).sum()
        };
        self.layers as u64 * count(self.block()) + count(self.outside_blocks())
    }

    /// Segments of the model.
    pub fn segments(&self) -> usize {
        self.layers * self.segments_per_block
    }

    /// Groups as the engine lays them out, in pieces of `piece_elements`; of `ranks` that share the states, those of one.
    pub fn layout(&self, piece_elements: usize, ranks: usize) -> Layout {
        let share = self.segments_per_block * ranks;
        let group = |name: String, shapes: &[(&str, Vec<usize>)], share: usize, resident: bool| {
            let parameters = shapes.iter().enumerate().map(|(index, (parameter, shape))| {
                let decays = shape.len() > 1;
                let shape = match share {
                    1 => shape.clone(),
                    _ => vec![shape.iter().product::<usize>().div_ceil(share)],
                };
                (index, format!("{name}.{parameter}"), shape, true, decays)
            });
            Group::new(name.clone(), resident, parameters.collect())
        };
        let block = self.block();
        let segments = (0..self.segments()).map(|index| group(format!("h.{index}"), &block, share, false));
        let resident = group("resident".into(), &self.outside_blocks(), ranks, true);
        Layout { groups: segments.chain([resident]).collect(), piece_elements }
    }

    /// Segments of a step over B·T `tokens`, whose boundaries are of elements of `element_bytes`.
    pub fn calls(&self, tokens: usize, element_bytes: usize) -> Vec<Call> {
        let boundary_elements = (tokens * self.hidden * element_bytes).div_ceil(4);
        (0..self.segments()).map(|group| Call { group, boundary_elements, boundary_moves: true }).collect()
    }

    /// Bytes of the model's own tensors at their peak, boundaries apart: the backward of a block, or the loss, whichever is
    /// more. Of a gated perceptron's backward more is kept than of a plain one's. The loss has all logits of B·T `tokens`
    /// and their gradients where `logits` says so, else those of some rows.
    pub fn working_bytes(&self, tokens: usize, element_bytes: usize, logits: bool) -> u64 {
        let (tokens, c, f) = (tokens as u64, self.hidden as u64, self.feed_forward as u64);
        let gated = match self.family {
            Family::Gpt => 0,
            Family::Llama => 2 * f,
        };
        let block = tokens * (WORKING_WIDTHS * c + gated);
        let all = tokens * self.vocabulary as u64;
        let logits = if logits { 2 * all } else { self.vocabulary as u64 * tokens.min(LOGIT_ROWS) };
        let loss = 4 * tokens * c + logits;
        block.max(loss) * element_bytes as u64
    }

    /// Bytes of the model's own tensors that a micro-batch of B·T `tokens` holds between two segments, boundaries apart: the
    /// gradient of the head, which comes with the loss, and some activations; with `logits`, those and their gradients too.
    pub fn parked_bytes(&self, tokens: usize, element_bytes: usize, logits: bool) -> u64 {
        let (tokens, c, v) = (tokens as u64, self.hidden as u64, self.vocabulary as u64);
        let logits = if logits { 2 * tokens * v } else { 0 };
        (4 * tokens * c + v * c + logits) * element_bytes as u64
    }

    /// Floating-point operations of one token's forward: of the matrices of a block, of its attention, and of the head.
    ///
    /// Two a parameter of a matrix, and 4·T·C a block for attention's scores and their product with the values, which with a
    /// backward of twice the forward are 6·P + 12·L·T·C a token (Chowdhery et al., arXiv 2204.02311, appendix B).
    fn forward_flop(&self, sequence: usize) -> (f64, f64, f64) {
        let matrices = self.block().into_iter().filter(|(_, shape)| shape.len() > 1);
        let matrices: f64 =
            matrices.map(|(_, shape)| shape.iter().map(|&size| size as f64).product::<f64>()).sum();
        let attention = 4.0 * sequence as f64 * self.hidden as f64;
        let head = 2.0 * self.vocabulary as f64 * self.hidden as f64;
        (2.0 * matrices, attention, head)
    }

    /// How long computing takes for `batch` sequences on a device of these `speeds`. A backward is a forward again, which is
    /// the recomputation, and twice as much for the gradients.
    pub fn compute(&self, batch: usize, sequence: usize, speeds: Speeds) -> Compute {
        let tokens = (batch * sequence) as f64;
        let (matrices, attention, head) = self.forward_flop(sequence);
        let block_s = matrices / speeds.matmul + attention / speeds.attention;
        let forward_s = tokens * block_s / self.segments_per_block as f64;
        let mut compute = Compute::none(self.segments());
        compute.forward.fill(ComputeTime { before_s: 0.0, within_s: forward_s });
        compute.backward.fill(ComputeTime { before_s: 0.0, within_s: 3.0 * forward_s });
        // The head and its gradients come between the last forward and the first backward.
        if let Some(last) = compute.backward.last_mut() {
            last.before_s = 3.0 * tokens * head / speeds.matmul;
        }
        compute
    }
}
