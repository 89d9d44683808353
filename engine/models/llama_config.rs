//! Sizes of a Llama-like model, from Hugging Face's `config.json` or the metadata of a GGUF file.

use crate::error::{Error, Result};
use serde_json::Value;
use std::f64::consts::TAU;

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
    /// Base of the angles of positions.
    pub theta: f64,
    /// How angles are stretched for longer sequences.
    pub scaling: RopeScaling,
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

/// How the angles of positions are stretched for longer sequences than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor (Chen et al., arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Slow ones by a factor, fast ones not, those between in part, as Llama 3.1.
    Llama3 {
        /// Factor of the slow ones.
        factor: f64,
        /// Waves longer than the original sequence over this are slow.
        low: f64,
        /// Waves shorter than the original sequence over this are fast.
        high: f64,
        /// Sequence of the first training.
        original: f64,
    },
}

/// Reads a member of a configuration.
struct Reader<'a> {
    value: &'a Value,
    source: &'a str,
}

impl Reader<'_> {
    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.value.get(key).cloned().unwrap_or_default();
        Error::Configuration(format!("{}: {key} is {found} and must be {expected}", self.source))
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let limit = 1 << 32;
        match (self.present(key).map(Value::as_u64), default) {
            (Some(Some(size)), _) if size > 0 && size < limit => Ok(size as usize),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.present(key).map(Value::as_f64), default) {
            (Some(Some(number)), _) if number.is_finite() && number > 0.0 => Ok(number),
            (None, Some(default)) => Ok(default),
            _ => Err(self.wrong(key, "a number above 0")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
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
            theta: theta(&reader)?,
            scaling: scaling(&reader)?,
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

    fn checked(self, source: &str) -> Result<Self> {
        let Self { heads, key_value_heads, head_width, .. } = self;
        if heads % key_value_heads != 0 || head_width % 2 != 0 {
            return Err(Error::Configuration(format!(
                "{source}: {heads} query heads must be a multiple of {key_value_heads} key heads, and their width {head_width} even"
            )));
        }
        Ok(self)
    }

    /// Angle a position of each pair of a head's elements, D/2 numbers (Su et al., arXiv 2104.09864).
    pub fn frequencies(&self) -> Vec<f32> {
        let pairs = self.head_width / 2;
        (0..pairs)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / self.head_width as f32;
                let frequency = 1.0 / f64::from(self.theta as f32).powf(f64::from(exponent));
                match self.scaling {
                    RopeScaling::None => frequency as f32,
                    RopeScaling::Linear { factor } => (frequency / factor) as f32,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let wave = TAU / frequency;
                        if wave < original / high {
                            frequency as f32
                        } else if wave > original / low {
                            (frequency / factor) as f32
                        } else {
                            let fast = (original / wave - low) / (high - low);
                            ((1.0 - fast) * frequency / factor + fast * frequency) as f32
                        }
                    }
                }
            })
            .collect()
    }
}

/// Newer configurations keep everything of the angles in one object, older ones beside it.
fn rope<'a>(reader: &Reader<'a>) -> Option<Reader<'a>> {
    let value = ["rope_parameters", "rope_scaling"]
        .iter()
        .find_map(|key| reader.value.get(key).filter(|value| !value.is_null()))?;
    Some(Reader { value, source: reader.source })
}

fn theta(reader: &Reader) -> Result<f64> {
    match rope(reader).filter(|rope| rope.present("rope_theta").is_some()) {
        Some(rope) => rope.number("rope_theta", None),
        None => reader.number("rope_theta", Some(10_000.0)),
    }
}

fn scaling(reader: &Reader) -> Result<RopeScaling> {
    let Some(rope) = rope(reader) else { return Ok(RopeScaling::None) };
    let kind = rope.present("rope_type").or_else(|| rope.present("type")).and_then(Value::as_str);
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: rope.number("factor", None)? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: rope.number("factor", None)?,
            low: rope.number("low_freq_factor", None)?,
            high: rope.number("high_freq_factor", None)?,
            original: rope.number("original_max_position_embeddings", None)?,
        }),
        other => Err(Error::Unsupported(format!(
            "{}: rope type {other:?} is not implemented; default, linear and llama3 are",
            reader.source
        ))),
    }
}
