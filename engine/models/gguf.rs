//! GGUF files: their table of contents, and their metadata as Hugging Face's configuration says the same.

use crate::error::{Error, Result};
use crate::models::weights::ElementOrder;
use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Content};
use serde_json::{Value, json};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Reads the table of contents and the metadata.
///
/// # Errors
/// [`Error::File`], and [`Error::Weights`] for what is no GGUF file.
pub(super) fn read(path: &Path) -> Result<Content> {
    let file = File::open(path).map_err(Error::file(path))?;
    Content::read(&mut BufReader::new(file)).map_err(|error| Error::Weights {
        path: path.to_owned(),
        reason: format!("its table of contents cannot be read as GGUF: {error}"),
    })
}

/// Metadata of a GGUF file as Hugging Face's configuration says the same.
///
/// # Errors
/// [`Error::Weights`] for metadata that are missing, [`Error::Unsupported`] for an architecture that is not
/// implemented.
pub(super) fn configuration(path: &Path, content: &Content) -> Result<Value> {
    let damaged = |reason: String| Error::Weights { path: path.to_owned(), reason };
    let architecture = content.metadata.get("general.architecture").and_then(|value| value.to_string().ok());
    let architecture = architecture.ok_or_else(|| damaged("it has no general.architecture".into()))?;
    if !["llama", "qwen2", "qwen3", "gpt2"].contains(&architecture.as_str()) {
        return Err(Error::Unsupported(format!(
            "{}: its architecture is {architecture:?}; llama, qwen2, qwen3 and gpt2 are read from GGUF files",
            path.display()
        )));
    }
    let metadata = |key: &str| content.metadata.get(&format!("{architecture}.{key}"));
    let size = |key: &str| metadata(key).and_then(|value| value.to_u64().ok());
    // The decimal that was meant: 0.00001 and not what is nearest to it in f32.
    let number = |key: &str| metadata(key)?.to_f32().ok()?.to_string().parse::<f64>().ok();
    let token = |key: &str| {
        content.metadata.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(|value| value.to_u64().ok())
    };
    let longest = size("context_length");
    let rows = |name: &str| {
        let found = content.tensor_infos.get(name).and_then(|info| info.shape.dims().first().copied());
        found.ok_or_else(|| damaged(format!("it has no {name}")))
    };
    let vocabulary = rows("token_embd.weight")?;
    let window = window(path, content, architecture)?;
    if architecture == "gpt2" {
        let positions = rows("position_embd.weight")?;
        return Ok(json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": architecture,
            "vocab_size": vocabulary,
            "n_embd": size("embedding_length"),
            "n_layer": size("block_count"),
            "n_head": size("attention.head_count"),
            "n_inner": size("feed_forward_length"),
            "n_positions": positions,
            "n_ctx": positions,
            "layer_norm_epsilon": number("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
            "bos_token_id": token("bos"),
            "eos_token_id": token("eos"),
            "tie_word_embeddings": true,
        }));
    }
    // The names of the kinds are Hugging Face's.
    let scaling =
        metadata("rope.scaling.type").and_then(|kind| kind.to_string().ok()).filter(|kind| *kind != "none");
    let scaling = scaling.map(|kind| {
        json!({
            "rope_type": kind,
            "factor": number("rope.scaling.factor"),
            "original_max_position_embeddings": size("rope.scaling.original_context_length"),
        })
    });
    let scaling = match (frequency_factors(path, content)?, scaling) {
        (Some(_), Some(_)) => {
            let reason = format!("{FREQUENCY_FACTORS} beside rope.scaling.type is not implemented");
            return Err(Error::Unsupported(format!("{}: {reason}", path.display())));
        }
        // The same factors for every length, which transformers loads too.
        (Some(factors), None) => Some(json!({
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": longest,
        })),
        (None, scaling) => scaling,
    };
    let (class, kind) = match architecture.as_str() {
        "qwen2" => ("Qwen2ForCausalLM", "qwen2"),
        "qwen3" => ("Qwen3ForCausalLM", "qwen3"),
        // Llama with a window is Mistral, whose files say that they are Llama's.
        _ if window.is_some() => ("MistralForCausalLM", "mistral"),
        _ => ("LlamaForCausalLM", "llama"),
    };
    let mut configuration = json!({
        "architectures": [class],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": size("embedding_length"),
        "num_hidden_layers": size("block_count"),
        "intermediate_size": size("feed_forward_length"),
        "num_attention_heads": size("attention.head_count"),
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": size("attention.key_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base").unwrap_or(10_000.0),
        "rope_scaling": scaling,
        "max_position_embeddings": longest,
        "hidden_act": "silu",
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "tie_word_embeddings": !content.tensor_infos.contains_key("output.weight"),
    });
    match window {
        Some(Window { tokens, .. }) if kind == "mistral" => configuration["sliding_window"] = tokens.into(),
        Some(Window { tokens, layers }) => {
            configuration["use_sliding_window"] = true.into();
            configuration["sliding_window"] = tokens.into();
            configuration["max_window_layers"] = 0.into();
            let kind = |slides: bool| if slides { "sliding_attention" } else { "full_attention" };
            let kinds = layers.map(|layers| layers.into_iter().map(kind).collect::<Vec<_>>());
            configuration["layer_types"] = json!(kinds);
        }
        // Left out, Mistral's would be transformers' default.
        None => {}
    }
    Ok(configuration)
}

/// A sliding window.
struct Window {
    /// Tokens that one sees, itself included.
    tokens: u64,
    /// Whether each layer has it; none: all have.
    layers: Option<Vec<bool>>,
}

/// The window that the metadata tell of, if there is one.
fn window(path: &Path, content: &Content, architecture: &str) -> Result<Option<Window>> {
    let key = format!("{architecture}.attention.sliding_window");
    let refused = |reason: String| Error::Unsupported(format!("{}: {reason}", path.display()));
    let Some(found) = content.metadata.get(&key) else { return Ok(None) };
    let tokens = found.to_u64().map_err(|error| Error::Weights {
        path: path.to_owned(),
        reason: format!("{key} is no number of tokens: {error}"),
    })?;
    if tokens == 0 {
        return Ok(None);
    }
    if architecture == "gpt2" {
        return Err(refused(format!("{key} is {tokens}, and windows are not implemented for GPT-2")));
    }
    let key = format!("{key}_pattern");
    let Some(pattern) = content.metadata.get(&key) else { return Ok(Some(Window { tokens, layers: None })) };
    let layers: Option<Vec<bool>> =
        pattern.to_vec().ok().and_then(|layers| layers.iter().map(|layer| layer.to_bool().ok()).collect());
    match layers {
        Some(layers) if layers.iter().all(|slides| *slides) => Ok(Some(Window { tokens, layers: None })),
        Some(layers) if !layers.contains(&true) => Ok(None),
        Some(layers) if architecture != "llama" => Ok(Some(Window { tokens, layers: Some(layers) })),
        Some(_) => {
            Err(refused(format!("{key}: windows in some layers are implemented for qwen2 and qwen3 only")))
        }
        None => Err(refused(format!("{key} is implemented as a list of truth values, one a layer"))),
    }
}

/// What the frequency of each pair of a head is divided by: how the converter of Llama 3.1 and later keeps
/// their stretched angles.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// More than any head has pairs.
const LONGEST_FACTORS: usize = 1 << 16;

/// The factors, if the file has them.
fn frequency_factors(path: &Path, content: &Content) -> Result<Option<Vec<f32>>> {
    let Some(info) = content.tensor_infos.get(FREQUENCY_FACTORS) else { return Ok(None) };
    let damaged = |reason: String| Error::Weights {
        path: path.to_owned(),
        reason: format!("{FREQUENCY_FACTORS}: {reason}"),
    };
    // Before memory is taken for them.
    if info.shape.elem_count() > LONGEST_FACTORS {
        return Err(damaged(format!("{:?} are not the factors of a head's pairs", info.shape)));
    }
    let mut file = File::open(path).map_err(Error::file(path))?;
    let factors = content.tensor(&mut file, FREQUENCY_FACTORS, &Device::Cpu);
    let factors = factors.and_then(|factors| factors.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1());
    factors.map(Some).map_err(|error| damaged(format!("it cannot be read: {error}")))
}

/// Metadata of a GGUF file as Hugging Face's `tokenizer_config.json` says the same.
pub(super) fn tokenizer_configuration(content: &Content) -> Value {
    let find = |key: &str| content.metadata.get(&format!("tokenizer.{key}"));
    let text = |value: &gguf_file::Value| value.to_string().ok().cloned();
    let tokens = find("ggml.tokens").and_then(|tokens| tokens.to_vec().ok());
    let token = |key: &str| {
        let id = find(&format!("ggml.{key}_token_id"))?.to_u64().ok()?;
        text(tokens?.get(usize::try_from(id).ok()?)?)
    };
    let mut configuration = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
    let members = [
        ("bos_token", token("bos")),
        ("eos_token", token("eos")),
        ("pad_token", token("padding")),
        ("chat_template", find("chat_template").and_then(text)),
    ];
    for (key, value) in members {
        if let Some(value) = value {
            configuration[key] = value.into();
        }
    }
    configuration
}

/// How a family's tensors are called in GGUF files and in Hugging Face's checkpoints, without `.weight` and
/// `.bias`.
pub(super) struct Names {
    /// Outside layers.
    outside: &'static [(&'static str, &'static str)],
    /// What comes before the number of a layer in checkpoints.
    layers: &'static str,
    /// Within a layer.
    within: &'static [(&'static str, &'static str)],
}

/// Llama's and those like it.
pub(super) const LLAMA_NAMES: Names = Names {
    outside: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    layers: "model.layers.",
    within: &[
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
};

/// GPT-2's.
pub(super) const GPT2_NAMES: Names = Names {
    outside: &[("token_embd", "wte"), ("position_embd", "wpe"), ("output_norm", "ln_f")],
    layers: "h.",
    within: &[
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
};

impl Names {
    /// The name in checkpoints of a tensor of a file, if it has one.
    fn parameter(&self, stored: &str) -> Option<String> {
        let (part, kind) = stored.rsplit_once('.')?;
        let Some((number, part)) = part.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            let (_, name) = self.outside.iter().find(|(stored, _)| *stored == part)?;
            return Some(format!("{name}.{kind}"));
        };
        let (_, name) = self.within.iter().find(|(stored, _)| *stored == part)?;
        Some(format!("{}{number}.{name}.{kind}", self.layers))
    }

    /// The name in files of a parameter, if it has one.
    pub(super) fn stored(&self, parameter: &str) -> Option<String> {
        let (part, kind) = parameter.rsplit_once('.')?;
        let Some((number, part)) = part.strip_prefix(self.layers).and_then(|rest| rest.split_once('.'))
        else {
            let (stored, _) = self.outside.iter().find(|(_, name)| *name == part)?;
            return Some(format!("{stored}.{kind}"));
        };
        let (stored, _) = self.within.iter().find(|(_, name)| *name == part)?;
        Some(format!("blk.{number}.{stored}.{kind}"))
    }
}

/// The name of a tensor of a GGUF file of GPT-2's in its Hugging Face checkpoints, or none for what is no
/// parameter. Matrices lie as [out, in], which is the transpose of those checkpoints' and as the model has
/// them.
pub(super) fn gpt2_parameter_name(stored: &str) -> Option<(String, ElementOrder)> {
    // The head is the token embedding, which some files have twice.
    if stored == "output.weight" {
        return None;
    }
    // What is unknown keeps its own name, so that it is found to be left over.
    let name = GPT2_NAMES.parameter(stored).unwrap_or_else(|| stored.to_owned());
    Some((name, ElementOrder::Same))
}

/// The name of a GGUF file's tensor in Hugging Face's checkpoints of Llama's family.
pub(super) fn llama_parameter_name(
    stored: &str,
    interleaved_head_rows: Option<usize>,
) -> Option<(String, ElementOrder)> {
    // No parameter: part of the configuration.
    if stored == FREQUENCY_FACTORS {
        return None;
    }
    // What is unknown keeps its own name, so that it is found to be left over.
    let name = LLAMA_NAMES.parameter(stored).unwrap_or_else(|| stored.to_owned());
    let is_turned = [".attn_q.", ".attn_k."].iter().any(|part| stored.contains(part));
    let order = match interleaved_head_rows {
        Some(head_rows) if is_turned => ElementOrder::InterleavedHeads { head_rows },
        _ => ElementOrder::Same,
    };
    Some((name, order))
}
