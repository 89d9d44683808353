//! Models that others have trained: their configuration, where their tensors are, and the model in an engine.

use super::block::Rows;
pub use super::cache::Cache;
use super::cache::scores_bytes;
use super::gguf;
use super::gguf_tokenizer;
use super::gpt::{self, Gpt, GptConfig};
use super::linear::Adapting;
use super::llama::{self, Llama};
use super::llama_config::LlamaConfig;
use crate::data::error::DataError;
use crate::data::tokenizer::Tokenizer;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::models::weights::{ElementOrder, StoredName, Weights};
use crate::tiled_linear::{TiledLinear, linear_by_rows};
use candle_core::{Device, Module, Tensor};
use candle_nn::VarBuilder;
use ferrozero_kernels::ops;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The prefix that GPT-2's tensors have where the head is part of the model.
const GPT2_PREFIX: &str = "transformer.";

/// Sizes of a model of one of the families.
#[derive(Debug, Clone)]
enum Family {
    Llama(LlamaConfig),
    Gpt2(GptConfig),
}

impl Family {
    /// By a configuration, for sequences of so many tokens. `source` is for messages.
    fn from_configuration(configuration: &Value, source: &str, sequence: usize) -> Result<Self> {
        match configuration.get("model_type").and_then(Value::as_str) {
            Some("gpt2") => Ok(Self::Gpt2(gpt2_config(configuration, source, sequence)?)),
            _ => Ok(Self::Llama(LlamaConfig::from_json(configuration, source, sequence)?)),
        }
    }

    fn head_tiles(&self) -> usize {
        match self {
            Self::Llama(config) if !config.tied => {
                config.vocabulary.saturating_mul(config.hidden).div_ceil(config.layer_elements().max(1))
            }
            _ => 1,
        }
    }

    fn perceptron_tiles(&self) -> usize {
        match self {
            Self::Llama(config) => config.perceptron_tiles(),
            Self::Gpt2(config) => config.perceptron_tiles(),
        }
    }
}

/// A model's folder or GGUF file.
#[derive(Debug, Clone)]
pub struct Pretrained {
    /// The folder or file.
    pub path: PathBuf,
    /// Hugging Face's configuration; made of the metadata for a GGUF file.
    pub configuration: Value,
    /// The weights.
    pub weights: Arc<Weights>,
    /// Tiles of an untied head in an engine. As many as make none of them larger than a layer: by the shape
    /// alone, so that memory changes no number.
    pub head_tiles: usize,
    /// Tiles of the perceptron of each block in an engine, likewise by the shape alone.
    pub perceptron_tiles: usize,
    family: Family,
}

impl Pretrained {
    /// Opens a Hugging Face folder (`config.json` and safetensors files) or a GGUF file. Nothing of the
    /// weights is read. `sequence` is the longest sequence of tokens that the model is used for.
    ///
    /// # Errors
    /// [`Error::Configuration`], [`Error::Unsupported`], [`Error::Weights`] and [`Error::File`].
    pub fn open(path: &Path, sequence: usize) -> Result<Self> {
        if path.is_dir() { Self::from_folder(path, sequence) } else { Self::from_gguf(path, sequence) }
    }

    fn from_folder(folder: &Path, sequence: usize) -> Result<Self> {
        let path = folder.join("config.json");
        let configuration = read_json(&path)?;
        let family = Family::from_configuration(&configuration, &path.display().to_string(), sequence)?;
        let tied = matches!(&family, Family::Llama(LlamaConfig { tied: true, .. }));
        let weights = match &family {
            Family::Gpt2(_) => Weights::from_folder(folder, &gpt2_name)?,
            Family::Llama(_) => Weights::from_folder(folder, &|name| {
                let derived = name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
                (!derived).then(|| (name.to_owned(), ElementOrder::Same))
            })?,
        };
        Ok(Self::new(folder, configuration, weights, family))
    }

    fn from_gguf(path: &Path, sequence: usize) -> Result<Self> {
        let content = gguf::read(path)?;
        let configuration = gguf::configuration(path, &content)?;
        let family = Family::from_configuration(&configuration, &path.display().to_string(), sequence)?;
        // The converter of Llama's checkpoints turns rows for another form of rotation; those of other
        // families are as they were.
        let interleaved = matches!(configuration["model_type"].as_str(), Some("llama" | "mistral"));
        let naming = |name: &str| match &family {
            Family::Llama(config) => {
                gguf::llama_parameter_name(name, interleaved.then_some(config.head_width))
            }
            Family::Gpt2(_) => gguf::gpt2_parameter_name(name),
        };
        let stored_name: StoredName = match &family {
            Family::Llama(_) => |name| gguf::LLAMA_NAMES.stored(name),
            Family::Gpt2(_) => |name| gguf::GPT2_NAMES.stored(name),
        };
        let weights = Weights::from_gguf(path, &content, &naming, stored_name)?;
        Ok(Self::new(path, configuration, weights, family))
    }

    fn new(path: &Path, configuration: Value, weights: Weights, family: Family) -> Self {
        let (head_tiles, perceptron_tiles) = (family.head_tiles(), family.perceptron_tiles());
        let weights = Arc::new(weights.with_own_parameters(Adapting::is_adapter));
        Self { path: path.to_owned(), configuration, weights, head_tiles, perceptron_tiles, family }
    }

    /// The tokenizer of a file, or else the model's own: `tokenizer.json` in its folder, or what the metadata
    /// of a GGUF file say.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] for a file that is missing or damaged, and for a kind of GGUF's that is not
    /// implemented.
    pub fn tokenizer(&self, file: Option<&Path>) -> std::result::Result<Tokenizer, DataError> {
        match file {
            Some(file) => Tokenizer::from_file(file),
            None if self.path.is_dir() => Tokenizer::from_file(&self.path.join("tokenizer.json")),
            None => gguf_tokenizer::read(&self.path),
        }
    }

    /// `tokenizer_config.json` of the folder, or the same of a GGUF file's metadata; null where there is
    /// none.
    ///
    /// # Errors
    /// [`Error::Configuration`] for JSON that is damaged, [`Error::File`], [`Error::Weights`].
    pub fn tokenizer_configuration(&self) -> Result<Value> {
        if !self.path.is_dir() {
            return Ok(gguf::tokenizer_configuration(&gguf::read(&self.path)?));
        }
        let path = self.path.join("tokenizer_config.json");
        let mut configuration = if path.exists() { read_json(&path)? } else { Value::Null };
        // Newer folders keep the template in a file of its own.
        let path = self.path.join("chat_template.jinja");
        if path.exists() {
            let template = std::fs::read_to_string(&path).map_err(Error::file(&path))?;
            configuration["chat_template"] = template.into();
        }
        Ok(configuration)
    }

    /// The model with its blocks as segments of an engine, whose configuration has [`Self::weights`] as
    /// initial values.
    ///
    /// # Errors
    /// What the engine says of parameters and segments.
    pub fn build(&self, engine: &Engine, adapting: &Adapting) -> Result<StreamedModel> {
        let tiles = self.perceptron_tiles;
        self.build_with(
            engine.var_builder(),
            |vb, layer, config| llama::StreamedBlock::from_config(engine, config, layer, adapting, tiles, vb),
            |vb, config| gpt::StreamedBlock::from_config(engine, config, adapting, tiles, vb),
            |vb, config| {
                let sizes = (config.hidden, config.vocabulary);
                let tiled = || TiledLinear::new(engine, sizes, self.head_tiles, false, llama::WEIGHTS, vb);
                (self.head_tiles > 1).then(tiled).transpose()
            },
        )
    }

    /// The model as plain candle, with parameters of any `VarBuilder`.
    ///
    /// # Errors
    /// What the `VarBuilder` says.
    pub fn build_plain(&self, vb: VarBuilder<'static>) -> Result<LanguageModel<llama::Block, gpt::Block>> {
        let none = Adapting::default();
        self.build_with(
            vb,
            |vb, layer, config| Ok(llama::Block::new(config, layer, &none, vb)?),
            |vb, config| Ok(gpt::Block::new(config, vb)?),
            |_, _| Ok(None),
        )
    }

    fn build_with<L, G: Module>(
        &self,
        vb: VarBuilder<'static>,
        llama_block: impl Fn(VarBuilder<'static>, usize, &LlamaConfig) -> Result<L>,
        gpt_block: impl Fn(VarBuilder<'static>, &GptConfig) -> Result<G>,
        tiled_head: impl FnOnce(VarBuilder<'static>, &LlamaConfig) -> Result<Option<TiledLinear>>,
    ) -> Result<LanguageModel<L, G>> {
        match &self.family {
            Family::Llama(config) => {
                let (block, head) = (|vb, layer| llama_block(vb, layer, config), |vb| tiled_head(vb, config));
                Ok(LanguageModel::Llama(Llama::new(config, vb, block, head)?))
            }
            Family::Gpt2(config) => {
                Ok(LanguageModel::Gpt2(Gpt::new(config, vb, |vb, _| gpt_block(vb, config))?))
            }
        }
    }

    /// Adapters of a rank and a factor beside the layers that `targets` name by the ends of their names, or
    /// beside all linear layers of the blocks if there are none.
    ///
    /// # Errors
    /// [`Error::Configuration`] for a target that the model has not, with those that it has.
    pub fn adapting(&self, rank: usize, alpha: f64, targets: &[String]) -> Result<Adapting> {
        Adapting::new(rank, alpha, targets, self.linear_layers())
    }

    fn linear_layers(&self) -> &'static [&'static str] {
        match self.family {
            Family::Llama(_) => &llama::LINEAR_LAYERS,
            Family::Gpt2(_) => &gpt::LINEAR_LAYERS,
        }
    }

    /// Whether linear layers lie as [in, out] in the file that transformers loads, which PEFT calls
    /// `fan_in_fan_out`.
    pub fn is_transposed(&self) -> bool {
        matches!(self.family, Family::Gpt2(_))
    }

    /// Name of a parameter in the file that transformers loads, and whether it lies there as its transpose.
    pub fn stored_name(&self, parameter: &str) -> (String, bool) {
        match self.family {
            Family::Llama(_) => (parameter.to_owned(), false),
            Family::Gpt2(_) => (format!("{GPT2_PREFIX}{parameter}"), is_gpt2_transposed(parameter)),
        }
    }

    /// Bytes that attention takes beside what a plan counts, while a text of so many tokens is continued, in
    /// f32.
    pub fn scores_bytes(&self, tokens: usize) -> u64 {
        let heads = match &self.family {
            Family::Llama(config) => config.heads,
            Family::Gpt2(config) => config.heads,
        };
        scores_bytes(heads, tokens)
    }

    /// Bytes of keys and values for so many tokens, in f32; a layer with a window keeps those within it.
    pub fn cache_bytes(&self, tokens: usize) -> u64 {
        match &self.family {
            Family::Llama(config) => {
                let kept = config.windows.iter().map(|window| window.unwrap_or(tokens).min(tokens));
                (kept.sum::<usize>() * 2 * config.key_value_heads * config.head_width * 4) as u64
            }
            Family::Gpt2(config) => (config.layers * 2 * config.hidden * tokens * 4) as u64,
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::file(path))?;
    let invalid = |error| Error::Configuration(format!("{} is not valid JSON: {error}", path.display()));
    serde_json::from_str(&text).map_err(invalid)
}

/// GPT-2's linear layers lie as [in, out] in its checkpoints.
fn is_gpt2_transposed(name: &str) -> bool {
    ["c_attn.weight", "c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end))
}

fn gpt2_name(stored: &str) -> Option<(String, ElementOrder)> {
    let name = stored.strip_prefix(GPT2_PREFIX).unwrap_or(stored);
    // Masks, and the head, which is the token embedding.
    let derived =
        name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name == "lm_head.weight";
    let order = if is_gpt2_transposed(name) { ElementOrder::Transposed } else { ElementOrder::Same };
    (!derived).then(|| (name.to_owned(), order))
}

fn gpt2_config(value: &Value, source: &str, sequence: usize) -> Result<GptConfig> {
    let size = |key: &str| {
        let found = value.get(key).and_then(Value::as_u64).filter(|&size| size > 0 && size < 1 << 32);
        found.map(|size| size as usize).ok_or_else(|| {
            let found = value.get(key).cloned().unwrap_or_default();
            Error::Configuration(format!("{source}: {key} is {found} and must be a whole number above 0"))
        })
    };
    let unsupported = |what: String| Err(Error::Unsupported(format!("{source}: {what}")));
    let config = GptConfig {
        vocabulary: size("vocab_size")?,
        layers: size("n_layer")?,
        hidden: size("n_embd")?,
        heads: size("n_head")?,
        sequence: size("n_positions")?,
    };
    let is = |key: &str, accepted: &[Value]| value.get(key).is_none_or(|found| accepted.contains(found));
    if !is("n_inner", &[Value::Null, json!(4 * config.hidden)]) {
        return unsupported("n_inner must be 4·n_embd".into());
    }
    if !is("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")]) {
        return unsupported("activation_function must be gelu_new".into());
    }
    if !is("layer_norm_epsilon", &[json!(1e-5)]) {
        return unsupported("layer_norm_epsilon must be 0.00001".into());
    }
    if !config.hidden.is_multiple_of(config.heads) || sequence > config.sequence {
        return Err(Error::Configuration(format!(
            "{source}: n_embd must be a multiple of n_head, and sequences have at most {} tokens",
            config.sequence
        )));
    }
    Ok(config)
}

/// A model of one of the families, over blocks or segments of them.
pub enum LanguageModel<L, G> {
    /// Llama and what is like it.
    Llama(Llama<L>),
    /// GPT-2.
    Gpt2(Gpt<G>),
}

impl<L: Module, G: Module> LanguageModel<L, G> {
    fn hidden(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Llama(model) => model.hidden(tokens, |_, layer, xs| layer.forward(xs)),
            Self::Gpt2(model) => model.hidden(tokens),
        }
    }

    /// Mean cross-entropy of `targets` after `tokens`, both `[B, T]`, at the places `counted` `[N]`, numbers
    /// below B·T, or at all.
    ///
    /// # Errors
    /// What the model says.
    pub fn loss(
        &self,
        tokens: &Tensor,
        targets: &Tensor,
        counted: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let mut hidden = self.hidden(tokens)?.flatten(0, 1)?; // [B·T, C]
        let mut targets = ops::to_device(targets, hidden.device())?.flatten_all()?; // [B·T]
        if let Some(counted) = counted {
            let counted = ops::to_device(counted, hidden.device())?;
            hidden = hidden.index_select(&counted, 0)?; // [N, C]
            targets = targets.index_select(&counted, 0)?; // [N]
        }
        match self {
            Self::Llama(model) => model.cross_entropy(&hidden, &targets),
            Self::Gpt2(model) => ops::linear_cross_entropy(&hidden, model.head(), &targets),
        }
    }

    /// Logits [B, V] of the token after the last one of `tokens` [B, T].
    ///
    /// # Errors
    /// What the model says.
    pub fn next_logits(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        self.last_logits(self.hidden(tokens)?)
    }

    fn last_logits(&self, hidden: Tensor) -> candle_core::Result<Tensor> {
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?.contiguous()?; // [B, C]
        self.logits(&last)
    }
}

/// A text that is continued: all of its tokens, and the keys and values of those that the model has seen.
pub struct Continued<'a> {
    /// The tokens; at least one is not in the cache yet.
    pub tokens: &'a [u32],
    /// Grows by the tokens that are not in it.
    pub cache: &'a Cache,
}

/// A model that an engine streams.
pub type StreamedModel = LanguageModel<llama::StreamedBlock, gpt::StreamedBlock>;

impl StreamedModel {
    /// Logits [N, V] of the token after the last one of each of N texts, of which only those tokens are
    /// computed that their caches have not yet. Weights are fetched once for all texts, and each gets the
    /// bits that it gets alone.
    ///
    /// # Errors
    /// For a text without a new token, and what the model says.
    pub fn next_logits_of(&self, texts: &[Continued]) -> candle_core::Result<Tensor> {
        let (mut rows, mut tokens, mut positions) = (vec![], vec![], vec![]);
        for text in texts {
            let known = text.cache.tokens();
            let new = text.tokens.get(known..).filter(|new| !new.is_empty());
            let new = new.ok_or_else(|| candle_core::Error::Msg("a text without a new token".into()))?;
            rows.push(Rows { first: tokens.len(), count: new.len(), cache: text.cache.clone() });
            tokens.extend_from_slice(new);
            positions.extend(known as u32..text.tokens.len() as u32);
        }
        let (rows, count) = (Arc::new(rows), tokens.len());
        let tokens = Tensor::from_vec(tokens, (1, count), &Device::Cpu)?;
        let hidden = match self {
            Self::Llama(model) => {
                model.hidden(&tokens, |number, block, xs| block.forward_each(number, &rows, xs))?
            }
            Self::Gpt2(model) => {
                let positions = Tensor::from_vec(positions, (1, count), &Device::Cpu)?;
                model.hidden_at(&tokens, &positions, |number, block, xs| {
                    block.forward_each(number, &rows, xs)
                })?
            }
        };
        let last = rows.iter().map(|rows| hidden.narrow(1, rows.first + rows.count - 1, 1)?.squeeze(0));
        self.logits(&Tensor::cat(&last.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}

impl<L, G> LanguageModel<L, G> {
    /// Logits [N, V] of hidden states [N, C], each row on its own.
    fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Llama(model) => model.logits(hidden),
            Self::Gpt2(model) => linear_by_rows(hidden, model.head(), None),
        }
    }
}
