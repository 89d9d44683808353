//! Sizes of a Llama-like model, from Hugging Face's `config.json` or the metadata of a GGUF file.

use super::block::perceptron_tiles;
use super::reader::Reader;
use super::rope::{Rope, RopeScaling};
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
    /// By layer, how many tokens one sees at most, itself included; none where it sees all before it.
    pub windows: Vec<Option<usize>>,
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

impl LlamaConfig {
    /// Reads Hugging Face's configuration. `source` names it in messages; `sequence` is the longest sequence
    /// that is wanted.
    ///
    /// # Errors
    /// [`Error::Configuration`] for members that are missing or wrong, [`Error::Unsupported`] for what is not
    /// implemented.
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
        let layers = reader.size("num_hidden_layers", None)?;
        // A window that holds the whole sequence is none.
        let windows = windows(&reader, kind, layers)?
            .into_iter()
            .map(|window| window.filter(|&window| window < sequence))
            .collect();
        let config = Self {
            vocabulary: reader.size("vocab_size", None)?,
            layers,
            hidden,
            perceptron: reader.size("intermediate_size", None)?,
            heads,
            key_value_heads: reader.size("num_key_value_heads", Some(heads))?,
            head_width: reader.size("head_dim", Some((hidden / heads).max(1)))?,
            sequence,
            windows,
            epsilon: reader.number("rms_norm_eps", Some(1e-6))?,
            rope: Rope::read(&reader, sequence)?,
            tied: reader.flag("tie_word_embeddings", false)?,
            query_key_value_bias: bias || qwen2,
            output_bias: bias && !qwen2,
            perceptron_bias: reader.flag("mlp_bias", false)?,
            query_key_norms: qwen3,
        };
        let longest = reader.size("max_position_embeddings", Some(2048))?;
        if sequence > longest {
            return Err(Error::Configuration(format!(
                "{source}: sequences of {sequence} tokens are longer than the {longest} that the model is \
                 made for: choose shorter sequences"
            )));
        }
        config.checked(source)
    }

    /// Tiles of a layer's perceptron in an engine, by its size alone.
    pub fn perceptron_tiles(&self) -> usize {
        perceptron_tiles(self.perceptron_elements(), self.attention_elements())
    }

    /// Elements of the matrices of a layer.
    pub fn layer_elements(&self) -> usize {
        self.attention_elements().saturating_add(self.perceptron_elements())
    }

    fn attention_elements(&self) -> usize {
        let heads = 2 * (self.heads + self.key_value_heads);
        heads.saturating_mul(self.head_width).saturating_mul(self.hidden)
    }

    fn perceptron_elements(&self) -> usize {
        (3 * self.perceptron).saturating_mul(self.hidden)
    }

    fn checked(self, source: &str) -> Result<Self> {
        let Self { heads, key_value_heads, head_width, .. } = self;
        if let RopeScaling::Factors { factors, .. } = &self.rope.scaling
            && factors.len() != head_width / 2
        {
            return Err(Error::Configuration(format!(
                "{source}: there are {} factors of angles for the {} pairs of a head",
                factors.len(),
                head_width / 2
            )));
        }
        if heads % key_value_heads != 0 || head_width % 2 != 0 {
            return Err(Error::Configuration(format!(
                "{source}: {heads} query heads must be a multiple of {key_value_heads} key heads, and their \
                 width {head_width} even"
            )));
        }
        Ok(self)
    }
}

/// The windows of the layers, as transformers reads them: of all of Mistral's, and of those of Qwen's that
/// `layer_types` names, or else from `max_window_layers` on. Other families have none, whatever their
/// configuration says.
fn windows(reader: &Reader, kind: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let qwen = matches!(kind, "qwen2" | "qwen3");
    let has_window = kind == "mistral" || (qwen && reader.flag("use_sliding_window", false)?);
    let window = match reader.value.get("sliding_window") {
        // A window that is null is none, one that is not there is transformers' default.
        Some(Value::Null) => None,
        _ if !has_window => None,
        _ => Some(reader.size("sliding_window", Some(4096))?),
    };
    if !qwen {
        return Ok(vec![window; layers]);
    }
    let Some(types) = reader.present("layer_types") else {
        let first = reader.present("max_window_layers").map_or(Some(28), Value::as_u64);
        let first = first.ok_or_else(|| reader.wrong("max_window_layers", "a whole number"))?;
        return Ok((0..layers as u64).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    let expected = format!("a list of {layers} times \"full_attention\" or \"sliding_attention\"");
    let wrong = || reader.wrong("layer_types", &expected);
    let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(wrong)?;
    let of_layer = |layer: &Value| match layer.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => Err(Error::Configuration(format!(
            "{}: layer_types has \"sliding_attention\", but use_sliding_window and sliding_window give no \
             window",
            reader.source
        ))),
        _ => Err(wrong()),
    };
    types.iter().map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A configuration of four layers with some members more.
    fn read(kind: &str, members: Value, sequence: usize) -> Result<LlamaConfig> {
        let mut value = json!({
            "model_type": kind, "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 4,
            "intermediate_size": 8,
            "num_attention_heads": 2, "max_position_embeddings": 8192,
        });
        for (key, member) in members.as_object().into_iter().flatten() {
            value[key] = member.clone();
        }
        LlamaConfig::from_json(&value, "config.json", sequence)
    }

    fn windows_of(kind: &str, members: Value, sequence: usize) -> Vec<Option<usize>> {
        read(kind, members, sequence).unwrap().windows
    }

    #[test]
    fn windows_are_those_that_transformers_reads() {
        let (full, window) = (vec![None; 4], Some(16));
        let sliding = json!({ "sliding_window": 16 });
        assert_eq!(windows_of("mistral", sliding.clone(), 64), [window; 4]);
        assert_eq!(windows_of("mistral", sliding.clone(), 17), [window; 4]);
        // A sequence that is no longer than the window sees all of itself.
        assert_eq!(windows_of("mistral", sliding.clone(), 16), full);
        assert_eq!(windows_of("mistral", json!({ "sliding_window": null }), 8000), full);
        assert_eq!(windows_of("mistral", json!({}), 8000), [Some(4096); 4]);
        assert_eq!(windows_of("llama", sliding.clone(), 64), full);
        for kind in ["qwen2", "qwen3"] {
            let qwen = |mut members: Value, sequence| {
                members["use_sliding_window"] = true.into();
                windows_of(kind, members, sequence)
            };
            assert_eq!(windows_of(kind, sliding.clone(), 64), full, "without use_sliding_window");
            // max_window_layers is 28 if nothing says otherwise.
            assert_eq!(qwen(sliding.clone(), 64), full);
            let from = |first: usize| json!({ "sliding_window": 16, "max_window_layers": first });
            assert_eq!(qwen(from(0), 64), [window; 4]);
            assert_eq!(qwen(from(3), 64), [None, None, None, window]);
            assert_eq!(qwen(json!({ "sliding_window": null, "max_window_layers": 0 }), 8000), full);
            assert_eq!(qwen(json!({ "max_window_layers": 0 }), 8000), [Some(4096); 4]);
            let (one, other) = ("sliding_attention", "full_attention");
            let types = [one, other, other, one];
            let named = json!({ "sliding_window": 16, "max_window_layers": 0, "layer_types": types });
            assert_eq!(qwen(named, 64), [window, None, None, window]);
        }
    }

    #[test]
    fn windows_that_make_no_sense_are_refused_by_name() {
        let refused = |kind: &str, members: Value| read(kind, members, 64).unwrap_err().to_string();
        assert!(refused("mistral", json!({ "sliding_window": 0 })).contains("sliding_window is 0"));
        assert!(refused("qwen2", json!({ "max_window_layers": -1 })).contains("max_window_layers is -1"));
        let types = |types: Value| refused("qwen3", json!({ "layer_types": types, "sliding_window": 16 }));
        assert!(types(json!(["full_attention"])).contains("a list of 4 times"));
        assert!(
            types(json!(["full_attention", "full_attention", "full_attention", 1]))
                .contains("layer_types is")
        );
        // Without use_sliding_window, which transformers refuses too.
        assert!(types(json!(vec!["sliding_attention"; 4])).contains("give no window"));
    }
}
