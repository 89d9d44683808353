//! Models that others have trained: their configuration, where their tensors are, and the model in an engine.

use super::cache::LayerCache;
use super::gpt::{self, Gpt, GptConfig};
use super::linear::Adapting;
use super::llama::{self, Llama};
use super::llama_config::LlamaConfig;
use crate::error::{Error, Result};
use crate::pass::lock;
use crate::weights::{Arrangement, Weights};
use crate::{Engine, Segment};
use candle_core::quantized::gguf_file;
use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;
use ferrozero_kernels::ops;
use serde_json::{Value, json};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The prefix that GPT-2's tensors have where the head is part of the model.
const GPT2_PREFIX: &str = "transformer.";

/// Sizes of a model of one of the families.
#[derive(Debug, Clone)]
enum Family {
    Llama(LlamaConfig),
    Gpt2(GptConfig),
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
    family: Family,
}

impl Pretrained {
    /// Opens a Hugging Face folder (`config.json` and safetensors files) or a GGUF file. Nothing of the weights is read.
    /// `sequence` is the longest sequence of tokens that the model is used for.
    ///
    /// # Errors
    /// [`Error::Configuration`], [`Error::Unsupported`], [`Error::Weights`] and [`Error::File`].
    pub fn open(path: &Path, sequence: usize) -> Result<Self> {
        if path.is_dir() { Self::of_folder(path, sequence) } else { Self::of_gguf(path, sequence) }
    }

    fn of_folder(folder: &Path, sequence: usize) -> Result<Self> {
        let path = folder.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        let configuration: Value = serde_json::from_str(&text).map_err(|error| {
            Error::Configuration(format!("{} is not valid JSON: {error}", path.display()))
        })?;
        let source = path.display().to_string();
        let family = match configuration.get("model_type").and_then(Value::as_str) {
            Some("gpt2") => Family::Gpt2(gpt2_config(&configuration, &source, sequence)?),
            _ => Family::Llama(LlamaConfig::from_json(&configuration, &source, sequence)?),
        };
        let tied = matches!(&family, Family::Llama(LlamaConfig { tied: true, .. }));
        let weights = match &family {
            Family::Gpt2(_) => Weights::of_folder(folder, &gpt2_name)?,
            Family::Llama(_) => Weights::of_folder(folder, &|name| {
                let derived = name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
                (!derived).then(|| (name.to_owned(), Arrangement::Same))
            })?,
        };
        Ok(Self { path: folder.to_owned(), configuration, weights: Arc::new(weights), family })
    }

    fn of_gguf(path: &Path, sequence: usize) -> Result<Self> {
        let damaged = |reason: String| Error::Weights { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
        let content = gguf_file::Content::read(&mut BufReader::new(file))
            .map_err(|error| damaged(format!("its table of contents cannot be read as GGUF: {error}")))?;
        let configuration = gguf_configuration(path, &content)?;
        let config = LlamaConfig::from_json(&configuration, &path.display().to_string(), sequence)?;
        if content.tensor_infos.contains_key("rope_freqs.weight") {
            return Err(damaged(
                "rope_freqs.weight: frequencies kept in a GGUF file are not implemented".into(),
            ));
        }
        // The converter of Llama's checkpoints turns rows for another form of rotation; those of other families are as they were.
        let interleaved = configuration["model_type"] == "llama";
        let naming = |name: &str| gguf_name(name, interleaved.then_some(config.head_width));
        let weights = Weights::of_gguf(path, &content, &naming)?;
        Ok(Self {
            path: path.to_owned(),
            configuration,
            weights: Arc::new(weights),
            family: Family::Llama(config),
        })
    }

    /// The model with its blocks as segments of an engine, whose configuration has [`Self::weights`] as initial values.
    ///
    /// # Errors
    /// What the engine says of parameters and segments, and [`Error::Unsupported`] for adapters on GPT-2.
    pub fn build(
        &self,
        engine: &Engine,
        adapting: &Adapting,
    ) -> Result<LanguageModel<Segment<llama::Block>, Segment<gpt::Block>>> {
        self.build_with(
            engine.var_builder(),
            adapting,
            |vb, config| engine.segment(vb, |vb| llama::Block::new(config, adapting, vb)),
            |vb, config| engine.segment(vb, |vb| gpt::Block::new(config, vb)),
        )
    }

    /// The model as plain candle, with parameters of any `VarBuilder`.
    ///
    /// # Errors
    /// What the `VarBuilder` says, and [`Error::Unsupported`] for adapters on GPT-2.
    pub fn build_plain(&self, vb: VarBuilder<'static>) -> Result<LanguageModel<llama::Block, gpt::Block>> {
        let none = Adapting::default();
        self.build_with(
            vb,
            &none,
            |vb, config| Ok(llama::Block::new(config, &none, vb)?),
            |vb, config| Ok(gpt::Block::new(config, vb)?),
        )
    }

    fn build_with<L, G: Module>(
        &self,
        vb: VarBuilder<'static>,
        adapting: &Adapting,
        llama_block: impl Fn(VarBuilder<'static>, &LlamaConfig) -> Result<L>,
        gpt_block: impl Fn(VarBuilder<'static>, &GptConfig) -> Result<G>,
    ) -> Result<LanguageModel<L, G>> {
        match &self.family {
            Family::Llama(config) => {
                Ok(LanguageModel::Llama(Llama::new(config, vb, |vb| llama_block(vb, config))?))
            }
            Family::Gpt2(_) if adapting.rank > 0 => Err(Error::Unsupported(
                "adapters are implemented for Llama-like models, not for GPT-2".into(),
            )),
            Family::Gpt2(config) => {
                Ok(LanguageModel::Gpt2(Gpt::new(config, vb, |vb, _| gpt_block(vb, config))?))
            }
        }
    }

    /// Name of a parameter in the file that transformers loads, and whether it lies there as its transpose.
    pub fn stored_name(&self, parameter: &str) -> (String, bool) {
        match self.family {
            Family::Llama(_) => (parameter.to_owned(), false),
            Family::Gpt2(_) => (format!("{GPT2_PREFIX}{parameter}"), is_gpt2_transposed(parameter)),
        }
    }

    /// Bytes of keys and values for so many tokens, in f32.
    pub fn cache_bytes(&self, tokens: usize) -> u64 {
        match &self.family {
            Family::Llama(config) => {
                (config.layers * 2 * config.key_value_heads * config.head_width * tokens * 4) as u64
            }
            Family::Gpt2(_) => 0,
        }
    }
}

/// GPT-2's linear layers lie as [in, out] in its checkpoints.
fn is_gpt2_transposed(name: &str) -> bool {
    ["c_attn.weight", "c_proj.weight", "c_fc.weight"].iter().any(|end| name.ends_with(end))
}

fn gpt2_name(stored: &str) -> Option<(String, Arrangement)> {
    let name = stored.strip_prefix(GPT2_PREFIX).unwrap_or(stored);
    // Masks, and the head, which is the token embedding.
    let derived =
        name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name == "lm_head.weight";
    let arrangement = if is_gpt2_transposed(name) { Arrangement::Transposed } else { Arrangement::Same };
    (!derived).then(|| (name.to_owned(), arrangement))
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

/// Metadata of a GGUF file as Hugging Face's configuration says the same.
fn gguf_configuration(path: &Path, content: &gguf_file::Content) -> Result<Value> {
    let damaged = |reason: String| Error::Weights { path: path.to_owned(), reason };
    let architecture = content.metadata.get("general.architecture").and_then(|value| value.to_string().ok());
    let architecture = architecture.ok_or_else(|| damaged("it has no general.architecture".into()))?;
    let metadata = |key: &str| content.metadata.get(&format!("{architecture}.{key}"));
    let size = |key: &str| metadata(key).and_then(|value| value.to_u64().ok());
    let number = |key: &str| metadata(key).and_then(|value| value.to_f32().ok());
    let embedding = content.tensor_infos.get("token_embd.weight");
    let embedding = embedding.ok_or_else(|| damaged("it has no token_embd.weight".into()))?;
    Ok(json!({
        "architectures": [match architecture.as_str() {
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        }],
        "model_type": architecture,
        "vocab_size": embedding.shape.dims().first(),
        "hidden_size": size("embedding_length"),
        "num_hidden_layers": size("block_count"),
        "intermediate_size": size("feed_forward_length"),
        "num_attention_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": size("attention.key_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base").unwrap_or(10_000.0),
        "max_position_embeddings": size("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": !content.tensor_infos.contains_key("output.weight"),
    }))
}

/// The name of a GGUF file's tensor in Hugging Face's checkpoints.
fn gguf_name(stored: &str, interleaved_head_rows: Option<usize>) -> Option<(String, Arrangement)> {
    let same = |name: &str| Some((name.to_owned(), Arrangement::Same));
    match stored {
        "token_embd.weight" => return same("model.embed_tokens.weight"),
        "output_norm.weight" => return same("model.norm.weight"),
        "output.weight" => return same("lm_head.weight"),
        _ => {}
    }
    let Some((layer, rest)) = stored.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        // Kept under its own name, so that it is found to be left over.
        return same(stored);
    };
    let (part, kind) = rest.split_once('.').unwrap_or((rest, "weight"));
    let name = match part {
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return same(stored),
    };
    let arrangement = match interleaved_head_rows {
        Some(head_rows) if matches!(part, "attn_q" | "attn_k") => Arrangement::InterleavedHeads { head_rows },
        _ => Arrangement::Same,
    };
    Some((format!("model.layers.{layer}.{name}.{kind}"), arrangement))
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

    fn head(&self) -> &Tensor {
        match self {
            Self::Llama(model) => model.head(),
            Self::Gpt2(model) => model.head(),
        }
    }

    /// Mean cross-entropy of `targets` after `tokens`, both [B, T], at the places `counted` [N], numbers below B·T, or at all.
    ///
    /// # Errors
    /// What the model says.
    pub fn loss(
        &self,
        tokens: &Tensor,
        targets: &Tensor,
        counted: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let head = self.head();
        let mut hidden = self.hidden(tokens)?.flatten(0, 1)?; // [B·T, C]
        let mut targets = ops::to_device(targets, head.device())?.flatten_all()?; // [B·T]
        if let Some(counted) = counted {
            let counted = ops::to_device(counted, head.device())?;
            hidden = hidden.index_select(&counted, 0)?; // [N, C]
            targets = targets.index_select(&counted, 0)?; // [N]
        }
        ops::linear_cross_entropy(&hidden, head, &targets)
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
        ops::linear(&last, self.head(), None)
    }
}

/// Keys and values of all layers of a model; they are locked while a layer runs.
#[derive(Clone, Default)]
pub struct Cache(Arc<Mutex<Vec<LayerCache>>>);

impl Cache {
    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        lock(&self.0).first().map_or(0, LayerCache::tokens)
    }
}

impl LanguageModel<Segment<llama::Block>, Segment<gpt::Block>> {
    /// As [`Self::next_logits`] of all `tokens` [B, T], of which only those are computed that `cache` has not yet. GPT-2
    /// computes all of them.
    ///
    /// # Errors
    /// What the model says.
    pub fn next_logits_cached(&self, tokens: &Tensor, cache: &Cache) -> candle_core::Result<Tensor> {
        let Self::Llama(model) = self else { return self.next_logits(tokens) };
        let known = cache.tokens();
        let new = tokens.narrow(1, known, tokens.dim(1)? - known)?.contiguous()?;
        let hidden = model.hidden(&new, |number, layer, xs| {
            let cache = cache.clone();
            layer.call(&[xs], move |block, inputs| {
                let mut layers = lock(&cache.0);
                if layers.len() <= number {
                    layers.resize_with(number + 1, LayerCache::default);
                }
                block.forward_cached(&inputs[0], &mut layers[number])
            })
        })?;
        self.last_logits(hidden)
    }
}
