//! The shape of a model that need not exist: its groups, its activations and its arithmetic, for plans made
//! before anything is built. B: batch, T: tokens of a sequence, C: hidden width, V: vocabulary.

use crate::error::{Error, Result};
use crate::models::block::Units;
use crate::models::gpt::tiles_of_width;
use crate::models::llama_config::LlamaConfig;
use crate::planner::simulator::{Compute, ComputeTime};
use crate::schedule::layout::{Group, Layout};
use crate::schedule::operation::Call;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// Tensors of a block's backward, in numbers a token and width: what the graph of candle keeps of the
/// recomputed forward, and the gradients that are under way beside it. Counted over the engine's own blocks,
/// whose attention keeps no scores.
const WORKING_WIDTHS: u64 = 34;

/// The same of a block's attention alone, and of a tile of its perceptron beside what its units take: what
/// tiles read and the sum so far, taken apart and put together again, and their gradients.
const ATTENTION_WIDTHS: u64 = 18;
const TILE_WIDTHS: u64 = 14;

/// The same of a perceptron, in numbers a token and unit: what its activation reads and gives, and the
/// gradients of both.
const UNIT_NUMBERS: u64 = 4;

/// Tensors of a block's graph of the model's width that stay until the backward: input, norms and the sum
/// between them.
const KEPT_WIDTHS: u64 = 4;

/// Rows whose logits the engine's cross-entropy on the CPU device has at once.
const LOGIT_ROWS: u64 = 256;

/// What kind of blocks a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// GPT-2: learned positions, layer norms, biases, a perceptron of two layers, the head tied to the
    /// embedding.
    Gpt,
    /// Llama's and those like it, as Mistral and Qwen: rotary positions, RMS norms, a gated perceptron of
    /// three matrices.
    Llama,
}

/// Floating-point operations a second of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speeds {
    /// Of matrix products.
    pub matmul: f64,
    /// Of attention, counted as 4·T·C a token, with what the mask hides.
    pub attention: f64,
    /// Whether what lies outside of a sliding window takes no time.
    pub spares_windows: bool,
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
    /// Width of a head, D.
    pub head_width: usize,
    /// Width of the perceptron.
    pub feed_forward: usize,
    /// Whether queries, keys and values have biases.
    pub query_key_value_bias: bool,
    /// Whether the output of attention has a bias.
    pub output_bias: bool,
    /// Whether the perceptron has biases.
    pub perceptron_bias: bool,
    /// Whether the heads of queries and keys are normed.
    pub query_key_norms: bool,
    /// By block, how many tokens one sees at most, itself included; none where it sees all before it.
    pub windows: Vec<Option<usize>>,
    /// Longest sequence, which decides the learned positions of GPT-2.
    pub positions: usize,
    /// Whether the head is the token embedding.
    pub tied: bool,
    /// Segments of one size that a block is made of: more of them need less of the device. One: as the models
    /// here have it, which are one segment, or one of attention and one for each of the perceptron's tiles.
    pub segments_per_block: usize,
    /// Tiles of a block's perceptron; by its size, as in the models here.
    pub perceptron_tiles: usize,
}

/// A parameter's name and shape.
type Shape = (String, Vec<usize>);

/// Models by name: layers, width, heads. GPT-2 after Radford et al. 2019, GPT-3 after Brown et al. (arXiv
/// 2005.14165, table 2.1, its 13B with the width of 5120 that 40 heads of 128 make), 1t after ZeRO-Infinity
/// (arXiv 2104.07857, table 1).
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
/// Width of a head, and layers to width, in the shapes that [`ModelShape::grown`] makes: those of GPT-3's
/// larger models.
const GROWN_HEAD: usize = 128;

/// What is read of GPT-2's `config.json`.
#[derive(Debug, Deserialize)]
struct Gpt2 {
    vocab_size: usize,
    n_layer: usize,
    n_embd: usize,
    n_head: usize,
    n_inner: Option<usize>,
    n_positions: usize,
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
            head_width: hidden / heads.max(1),
            feed_forward: 4 * hidden,
            query_key_value_bias: true,
            output_bias: true,
            perceptron_bias: true,
            query_key_norms: false,
            windows: vec![None; layers],
            positions,
            tied: true,
            segments_per_block: 1,
            perceptron_tiles: tiles_of_width(hidden),
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

    /// The model of a Hugging Face `config.json` of GPT-2's or Llama's family, for sequences of so many
    /// tokens. Those like Llama are read as models are.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Configuration`] for sizes that are missing or wrong, [`Error::Unsupported`]
    /// for other families.
    pub fn from_hugging_face(path: &Path, sequence: usize) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::file(path))?;
        let wrong = |what: String| Error::Configuration(format!("{}: {what}", path.display()));
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let shape = match value.get("model_type").and_then(Value::as_str) {
            Some("gpt2") => {
                let config: Gpt2 = serde_json::from_value(value).map_err(|error| wrong(error.to_string()))?;
                let gpt = Self::gpt(
                    config.vocab_size,
                    config.n_layer,
                    config.n_embd,
                    config.n_head,
                    config.n_positions,
                );
                let feed_forward = config.n_inner.unwrap_or(gpt.feed_forward);
                Self { feed_forward, ..gpt }
            }
            _ => {
                let longest = value.get("max_position_embeddings").and_then(Value::as_u64);
                let config = LlamaConfig::from_json(&value, &path.display().to_string(), sequence)?;
                Self::from_llama(config, longest.unwrap_or(sequence as u64) as usize)
            }
        };
        let Self { vocabulary, layers, hidden, heads, key_value_heads, head_width, feed_forward, .. } =
            &shape;
        let sizes = [vocabulary, layers, hidden, heads, key_value_heads, head_width, feed_forward];
        if sizes.into_iter().any(|&size| size == 0 || size > 1 << 24) {
            return Err(wrong("every size must be from 1 to 16 Mi".into()));
        }
        Ok(shape)
    }

    fn from_llama(config: LlamaConfig, positions: usize) -> Self {
        Self {
            family: Family::Llama,
            perceptron_tiles: config.perceptron_tiles(),
            vocabulary: config.vocabulary,
            layers: config.layers,
            hidden: config.hidden,
            heads: config.heads,
            key_value_heads: config.key_value_heads,
            head_width: config.head_width,
            feed_forward: config.perceptron,
            query_key_value_bias: config.query_key_value_bias,
            output_bias: config.output_bias,
            perceptron_bias: config.perceptron_bias,
            query_key_norms: config.query_key_norms,
            windows: config.windows,
            positions,
            tied: config.tied,
            segments_per_block: 1,
        }
    }

    /// A larger or smaller model of the same family: a GPT of `layers` blocks and a width of 128 a block, as
    /// GPT-3 has it; for Llama the same block `layers` times.
    pub fn grown(&self, layers: usize) -> Self {
        match self.family {
            Family::Llama => {
                let windows = self.windows.iter().cycle().take(layers).copied().collect();
                Self { layers, windows, ..self.clone() }
            }
            Family::Gpt => Self {
                segments_per_block: self.segments_per_block,
                ..Self::gpt(self.vocabulary, layers, GROWN_HEAD * layers, layers, self.positions)
            },
        }
    }

    /// Names and shapes of a block's parameters.
    fn block(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (c, f, d) = (self.hidden, self.feed_forward, self.head_width);
        let (q, kv) = (self.heads * d, self.key_value_heads * d);
        if self.family == Family::Gpt {
            return vec![
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
            ];
        }
        let (attention, output, perceptron, norms) =
            (self.query_key_value_bias, self.output_bias, self.perceptron_bias, self.query_key_norms);
        let all = [
            ("input_layernorm.weight", vec![c], true),
            ("self_attn.q_proj.weight", vec![q, c], true),
            ("self_attn.q_proj.bias", vec![q], attention),
            ("self_attn.k_proj.weight", vec![kv, c], true),
            ("self_attn.k_proj.bias", vec![kv], attention),
            ("self_attn.v_proj.weight", vec![kv, c], true),
            ("self_attn.v_proj.bias", vec![kv], attention),
            ("self_attn.o_proj.weight", vec![c, q], true),
            ("self_attn.o_proj.bias", vec![c], output),
            ("self_attn.q_norm.weight", vec![d], norms),
            ("self_attn.k_norm.weight", vec![d], norms),
            ("post_attention_layernorm.weight", vec![c], true),
            ("mlp.gate_proj.weight", vec![f, c], true),
            ("mlp.gate_proj.bias", vec![f], perceptron),
            ("mlp.up_proj.weight", vec![f, c], true),
            ("mlp.up_proj.bias", vec![f], perceptron),
            ("mlp.down_proj.weight", vec![c, f], true),
            ("mlp.down_proj.bias", vec![c], perceptron),
        ];
        all.into_iter().filter(|(.., there)| *there).map(|(name, shape, _)| (name, shape)).collect()
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

    /// Tiles of the perceptron, if a block is a segment of attention and some of those.
    fn tiles(&self) -> Option<Vec<Units>> {
        let tiles: Vec<Units> = Units::tiles(self.feed_forward, self.perceptron_tiles).collect();
        (self.segments_per_block == 1 && tiles.len() > 1).then_some(tiles)
    }

    /// Names and shapes of the parameters of each segment of a block; where all are of one size those of the
    /// block, for each.
    fn parts(&self) -> Vec<Vec<Shape>> {
        let block: Vec<Shape> =
            self.block().into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect();
        let Some(tiles) = self.tiles() else { return vec![block; self.segments_per_block] };
        let (perceptron, attention): (Vec<_>, Vec<_>) =
            block.into_iter().partition(|(name, _)| name.starts_with("mlp."));
        let tiles = tiles.into_iter().map(|units| {
            let of_tile = perceptron.iter().filter_map(|(name, shape)| {
                let closes = name.starts_with("mlp.down_proj") || name.starts_with("mlp.c_proj");
                let mut shape = shape.clone();
                match (closes, shape.len()) {
                    // The bias of the layer out of the perceptron is the last tile's.
                    (true, 1) if !units.are_last() => return None,
                    (true, 1) => {}
                    (true, _) => shape[1] = units.range.len(),
                    (false, _) => shape[0] = units.range.len(),
                }
                Some((name.clone(), shape))
            });
            of_tile.collect()
        });
        [attention].into_iter().chain(tiles).collect()
    }

    /// Segments of a block.
    fn segments_of_block(&self) -> usize {
        self.tiles().map_or(self.segments_per_block, |tiles| 1 + tiles.len())
    }

    /// Segments of the model.
    pub fn segments(&self) -> usize {
        self.layers * self.segments_of_block()
    }

    /// Groups as the engine lays them out, in pieces of `piece_elements`; of `ranks` that share the states,
    /// those of one.
    pub fn layout(&self, piece_elements: usize, ranks: usize) -> Layout {
        let share = self.segments_per_block * ranks;
        let group = |name: String, shapes: &[Shape], share: usize, resident: bool| {
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
        let parts = self.parts();
        let segments = (0..self.segments())
            .map(|index| group(format!("h.{index}"), &parts[index % parts.len()], share, false));
        let outside: Vec<Shape> =
            self.outside_blocks().into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect();
        let resident = group("resident".into(), &outside, ranks, true);
        Layout { groups: segments.chain([resident]).collect(), piece_elements }
    }

    /// Segments of a step over B·T `tokens`, whose boundaries are of elements of `element_bytes`.
    pub fn calls(&self, tokens: usize, element_bytes: usize) -> Vec<Call> {
        let (of_block, tiled) = (self.segments_of_block(), self.tiles().is_some());
        let calls = (0..self.segments()).map(|group| {
            // Tiles read what they compute with and the sum so far.
            let tensors = if tiled && group % of_block > 0 { 2 } else { 1 };
            let boundary_elements = (tensors * tokens * self.hidden * element_bytes).div_ceil(4);
            Call::new(group, boundary_elements, true)
        });
        calls.collect()
    }

    /// Bytes of the model's own tensors at their peak, boundaries apart: the backward of a block, or the
    /// loss, whichever is more. Of a gated perceptron's backward more is kept than of a plain one's. The loss
    /// has all logits of B·T `tokens` and their gradients where `logits` says so, else those of some rows.
    pub fn working_bytes(&self, tokens: usize, element_bytes: usize, logits: bool) -> u64 {
        // Heads may be wider together than the model is.
        let c = self.hidden.max(self.heads * self.head_width) as u64;
        let (tokens, f) = (tokens as u64, self.feed_forward as u64);
        let gated = match self.family {
            Family::Gpt => 0,
            Family::Llama => 2,
        };
        let block = tokens
            * match self.tiles().as_deref() {
                Some([tile, ..]) => {
                    let tile = TILE_WIDTHS * c + (UNIT_NUMBERS + gated) * tile.range.len() as u64;
                    tile.max(ATTENTION_WIDTHS * c)
                }
                _ => WORKING_WIDTHS * c + gated * f,
            };
        let all = tokens * self.vocabulary as u64;
        let logits = if logits { 2 * all } else { self.vocabulary as u64 * tokens.min(LOGIT_ROWS) };
        let loss = 4 * tokens * c + logits;
        block.max(loss) * element_bytes as u64
    }

    /// Bytes that the graph of each segment holds from its forward to its backward, over B·T `tokens`, with a
    /// copy of its input.
    pub fn kept_bytes(&self, tokens: usize, element_bytes: usize) -> Vec<u64> {
        let (tokens, c, f) = (tokens as u64, self.hidden as u64, self.feed_forward as u64);
        let (q, kv) =
            ((self.heads * self.head_width) as u64, (self.key_value_heads * self.head_width) as u64);
        // Before and within the perceptron: its input, what its activation reads, and what that gives.
        let of_unit = match self.family {
            Family::Gpt => 2,
            Family::Llama => 3,
        };
        let attention = KEPT_WIDTHS * c + 2 * (q + kv);
        let parts = match self.tiles() {
            // Attention has what the first tile reads beside its own, and tiles take that apart and put it
            // together again.
            Some(tiles) => {
                let tiles =
                    tiles.iter().map(|units| 2 * KEPT_WIDTHS * c + of_unit * units.range.len() as u64);
                [attention + 2 * c].into_iter().chain(tiles).collect()
            }
            None => vec![(attention + of_unit * f) / self.segments_per_block as u64; self.segments_per_block],
        };
        let parts = parts.into_iter().map(|numbers| tokens * numbers * element_bytes as u64);
        parts.cycle().take(self.segments()).collect()
    }

    /// Bytes of the model's own tensors that a micro-batch of B·T `tokens` holds between two segments,
    /// boundaries apart: the gradient of the head, which comes with the loss, and some activations; with
    /// `logits`, those and their gradients too.
    pub fn parked_bytes(&self, tokens: usize, element_bytes: usize, logits: bool) -> u64 {
        let (tokens, c, v) = (tokens as u64, self.hidden as u64, self.vocabulary as u64);
        let logits = if logits { 2 * tokens * v } else { 0 };
        (4 * tokens * c + v * c + logits) * element_bytes as u64
    }

    /// Floating-point operations of one token's forward: of the matrices of each segment of a block, of the
    /// attention of each block, and of the head.
    ///
    /// Two a parameter of a matrix, and 4·T·H·D a block for attention's scores and their product with the
    /// values, which with a backward of twice the forward are 6·P + 12·L·T·C a token (Chowdhery et al., arXiv
    /// 2204.02311, appendix B).
    fn forward_flop(&self, sequence: usize, spares_windows: bool) -> (Vec<f64>, Vec<f64>, f64) {
        let matrices = self.parts().into_iter().map(|parameters| {
            let matrices = parameters.into_iter().filter(|(_, shape)| shape.len() > 1);
            let elements = matrices.map(|(_, shape)| shape.iter().map(|&size| size as f64).product::<f64>());
            2.0 * elements.sum::<f64>() / self.segments_per_block as f64
        });
        let whole = 4.0 * sequence as f64 * (self.heads * self.head_width) as f64;
        let attention = self.windows.iter().map(|window| match window {
            Some(window) if spares_windows => whole * share_seen(sequence as f64, *window as f64),
            _ => whole,
        });
        let head = 2.0 * self.vocabulary as f64 * self.hidden as f64;
        (matrices.collect(), attention.collect(), head)
    }

    /// How long computing takes for `batch` sequences on a device of these `speeds`. A backward is a forward
    /// again, which is the recomputation, and twice as much for the gradients.
    pub fn compute(&self, batch: usize, sequence: usize, speeds: Speeds) -> Compute {
        let tokens = (batch * sequence) as f64;
        let (matrices, attention, head) = self.forward_flop(sequence, speeds.spares_windows);
        let (of_block, tiled) = (self.segments_of_block(), self.tiles().is_some());
        let mut compute = Compute::none(self.segments());
        let Compute { forward, backward, again_s, .. } = &mut compute;
        for (segment, ((forward, backward), again_s)) in
            forward.iter_mut().zip(backward).zip(again_s).enumerate()
        {
            let part = segment % of_block;
            let attention = match attention.get(segment / of_block) {
                Some(_) if tiled && part > 0 => 0.0,
                Some(attention) => attention / self.segments_per_block as f64,
                None => 0.0,
            };
            let forward_s = tokens * (matrices[part] / speeds.matmul + attention / speeds.attention);
            *forward = ComputeTime { before_s: 0.0, within_s: forward_s };
            *backward = ComputeTime { before_s: 0.0, within_s: 3.0 * forward_s };
            *again_s = forward_s;
        }
        // The head and its gradients come between the last forward and the first backward.
        if let Some(last) = compute.backward.last_mut() {
            last.before_s = 3.0 * tokens * head / speeds.matmul;
        }
        compute
    }
}

/// Which share of the tokens before them the tokens of a sequence see through a window: T·W - W·(W - 1)/2 of
/// T·(T + 1)/2.
fn share_seen(sequence: f64, window: f64) -> f64 {
    let window = window.min(sequence);
    (sequence * window - window * (window - 1.0) / 2.0) / (sequence * (sequence + 1.0) / 2.0)
}
