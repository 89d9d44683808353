//! Sizes of a Llama-like model, from Hugging Face's `config.json` or the metadata of a GGUF file.

use super::rope::Rope;
use crate::error::{Error, Result};
use serde_json::Value;

/// Sizes and details of a Llama-like model.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Different tokens, V.
    pub vocabulary: usize,
    /// Layers.
    pub layers: usize,
    /// Width, C.
    pub hidden: usize,
    /// Width of the perceptron, F.
    pub perceptron: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, K.
    pub key_value_heads: usize,
    /// Width of a head, D.
    pub head_width: usize,
    /// Longest sequence that the model is made for here; at most what it was trained for.
    pub sequence: usize,
    /// Added to the mean square in norms.
    pub epsilon: f64,
    /// The angles of positions.
    pub rope: Rope,
    /// Whether the token embedding is the head.
    pub tied: bool,
    /// Whether queries, keys and values have a bias.
    pub query_key_value_bias: bool,
    /// Whether the output of attention has a bias.
    pub output_bias: bool,
    /// Whether the perceptron has biases.
    pub perceptron_bias: bool,
    /// Whether the heads of queries and keys are normed.
    pub query_key_norms: bool,
}

/// Reads a member of a configuration.
pub(super) struct Reader<'a> {
    pub(super) value: &'a Value,
    pub(super) source: &'a str,
}

impl Reader<'_> {
    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.value.get(key).cloned().unwrap_or_default();
        Error::Configuration(format!("{}: {key} is {found} and must be {expected}", self.source))
    }

    pub(super) fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let limit = 1 << 32;
        match (self.present(key).map(Value::as_u64), default) {
            (Some(Some(size)), _) if size > 0 && size < limit => Ok(size as usize),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    pub(super) fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.present(key).map(Value::as_f64), default) {
            (Some(Some(number)), _) if number.is_finite() && number > 0.0 => Ok(number),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a number above 0")),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.present(key)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.wrong(key, "a truth value")))
    }
}

impl LlamaConfig {
    /// Reads Hugging Face's configuration. `source` names it in messages; `sequence` is the longest sequence that is wanted.
    ///
    /// # Errors
    /// [`Error::Configuration`] for members that are missing or wrong, [`Error::Unsupported`] for what is not implemented.
    pub fn from_json(value: &Value, source: &str, sequence: usize) -> Result<Self> {
        let reader = Reader { value, source };
        let unsupported = |what: String| Err(Error::Unsupported(format!("{source}: {what}")));
        let kind = value.get("model_type").and_then(Value::as_str).unwrap_or("");
        let (qwen2, qwen3) = match kind {
            "llama" | "mistral" => (false, false),
            "qwen2" => (true, false),
            "qwen3" => (false, true),
            other => {
                return unsupported(format!(
                    "model_type {other:?} is not one of llama, mistral, qwen2, qwen3, gpt2"
                ));
            }
        };
        let activation = value.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if activation != "silu" {
            return unsupported(format!("hidden_act {activation:?} is not implemented, only \"silu\""));
        }
        let hidden = reader.size("hidden_size", None)?;
        let heads = reader.size("num_attention_heads", None)?;
        let bias = reader.flag("attention_bias", false)?;
        let config = Self {
            vocabulary: reader.size("vocab_size", None)?,
            layers: reader.size("num_hidden_layers", None)?,
            hidden,
            perceptron: reader.size("intermediate_size", None)?,
            heads,
            key_value_heads: reader.size("num_key_value_heads", Some(heads))?,
            head_width: reader.size("head_dim", Some((hidden / heads).max(1)))?,
            sequence,
            epsilon: reader.number("rms_norm_eps", Some(1e-6))?,
            rope: Rope::read(&reader)?,
            tied: reader.flag("tie_word_embeddings", false)?,
            query_key_value_bias: bias || qwen2,
            output_bias: bias && !qwen2,
            perceptron_bias: reader.flag("mlp_bias", false)?,
            query_key_norms: qwen3,
        };
        let longest = reader.size("max_position_embeddings", Some(2048))?;
        // Within the window a sliding one sees what a full one sees.
        let windowed = kind == "mistral" || reader.flag("use_sliding_window", false)?;
        let window = match windowed {
            true => reader.size("sliding_window", Some(usize::MAX))?,
            false => usize::MAX,
        };
        if sequence > longest.min(window) {
            return Err(Error::Configuration(format!(
                "{source}: sequences of {sequence} tokens are longer than the {} that the model sees at once: \
                 choose a shorter --seq",
                longest.min(window)
            )));
        }
        config.checked(source)
    }

    /// Elements of the matrices of a layer.
    pub fn layer_elements(&self) -> usize {
        let rows = 2 * (self.heads + self.key_value_heads) * self.head_width + 3 * self.perceptron;
        rows * self.hidden
    }

    fn checked(self, source: &str) -> Result<Self> {
        let Self { heads, key_value_heads, head_width, .. } = self;
        if heads % key_value_heads != 0 || head_width % 2 != 0 {
            return Err(Error::Configuration(format!(
                "{source}: {heads} query heads must be a multiple of {key_value_heads} key heads, and their width {head_width} even"
            )));
        }
        Ok(self)
    }
}
