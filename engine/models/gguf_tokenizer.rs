//! The tokenizer that a GGUF file carries: tokens, merges and the name of a way of cutting text into words, made into the
//! same as a Hugging Face `tokenizer.json`.

use super::gguf;
use crate::data::{DataError, Tokenizer};
use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use serde_json::{Value, json};
use std::path::Path;

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Words of Llama 3, of which a number has at most three digits, as its `tokenizer.json` says.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Qwen 2, of which each digit is one.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Reads the tokenizer of a GGUF file.
///
/// # Errors
/// [`DataError::Tokenizer`] if there is none, or one of a kind that is not implemented.
pub(super) fn read(path: &Path) -> Result<Tokenizer, DataError> {
    let refused = |reason: String| DataError::Tokenizer { path: path.to_owned(), reason };
    let content = gguf::read(path).map_err(|error| refused(error.to_string()))?;
    let json = tokenizer_json(&content).map_err(refused)?;
    Tokenizer::from_json(json.to_string().as_bytes(), path)
}

/// How text is cut into words: a normalizer, a pre-tokenizer, and whether a word that is a token is not cut further.
fn words(name: &str) -> Option<(Value, Value, bool)> {
    let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let sequence =
        |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    let by = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    match name {
        "gpt-2" => Some((Value::Null, bytes(true), false)),
        "smollm" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            Some((Value::Null, sequence(digits, bytes(true)), false))
        }
        "llama-bpe" | "llama3" => Some((Value::Null, sequence(by(LLAMA3_WORDS), bytes(false)), true)),
        "qwen2" => Some((json!({ "type": "NFC" }), sequence(by(QWEN2_WORDS), bytes(false)), false)),
        _ => None,
    }
}

/// The metadata as a `tokenizer.json`, or what is wrong with them.
fn tokenizer_json(content: &Content) -> Result<Value, String> {
    let other = "give another tokenizer with --tokenizer";
    let find = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let text = |key: &str| find(key).and_then(|value| value.to_string().ok()).map_or("", |text| text);
    let list = |key: &str| -> Result<&Vec<Metadata>, String> {
        let found = find(key).and_then(|value| value.to_vec().ok());
        found.ok_or_else(|| format!("the file has no tokenizer.ggml.{key}: {other}"))
    };
    let strings = |key: &str| -> Result<Vec<&String>, String> {
        let strings: candle_core::Result<_> = list(key)?.iter().map(Metadata::to_string).collect();
        strings.map_err(|error| format!("tokenizer.ggml.{key} is damaged: {error}"))
    };
    let (model, name) = (text("model"), text("pre"));
    if model != "gpt2" {
        return Err(format!(
            "tokenizer.ggml.model is {model:?}; of GGUF files \"gpt2\", merges of bytes, is read: {other}"
        ));
    }
    let (normalizer, pre_tokenizer, ignore_merges) = words(name).ok_or_else(|| {
        format!("tokenizer.ggml.pre is {name:?}; gpt-2, smollm, llama-bpe and qwen2 are known: {other}")
    })?;
    let (tokens, merges) = (strings("tokens")?, strings("merges")?);
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id)| ((*token).clone(), json!(id))).collect();
    if vocabulary.len() != tokens.len() {
        return Err("tokenizer.ggml.tokens has the same token twice".into());
    }
    let kinds = list("token_type")?.iter().map(|kind| kind.to_i32().map_or(0, i64::from));
    let added: Vec<Value> = tokens
        .iter()
        .zip(0..)
        .zip(kinds)
        .filter(|(_, kind)| [CONTROL, USER_DEFINED].contains(kind))
        .map(|((token, id), kind)| {
            json!({
                "id": id, "content": token, "special": kind == CONTROL,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges,
        },
    }))
}
