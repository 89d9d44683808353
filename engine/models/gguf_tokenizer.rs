//! The tokenizer that a GGUF file carries, made into the same as a Hugging Face `tokenizer.json`. Two kinds
//! are known: merges of bytes with the name of a way of cutting text into words (`gpt2`), and SentencePiece's
//! pieces with scores (`llama`).

use super::gguf;
use crate::data::error::DataError;
use crate::data::tokenizer::Tokenizer;
use candle_core::quantized::gguf_file::{Content, Value as Metadata};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Words of Llama 3, of which a number has at most three digits, as its `tokenizer.json` says.
const LLAMA3_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Words of Qwen 2, of which each digit is one.
const QWEN2_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// What to do about a tokenizer that cannot be read.
const OTHER: &str = "give another tokenizer";

/// Reads the tokenizer of a GGUF file.
///
/// # Errors
/// [`DataError::Tokenizer`] if there is none, or one of a kind that is not implemented.
pub(super) fn read(path: &Path) -> Result<Tokenizer, DataError> {
    let refused = |reason: String| DataError::Tokenizer { path: path.to_owned(), reason };
    let content = gguf::read(path).map_err(|error| refused(error.to_string()))?;
    let json = tokenizer_json(&Keys(&content)).map_err(refused)?;
    Tokenizer::from_json(json.to_string().as_bytes(), path)
}

/// The metadata whose keys begin with `tokenizer.ggml.`, by the rest of the key.
struct Keys<'a>(&'a Content);

impl<'a> Keys<'a> {
    fn find(&self, key: &str) -> Option<&'a Metadata> {
        self.0.metadata.get(&format!("tokenizer.ggml.{key}"))
    }

    fn text(&self, key: &str) -> &'a str {
        self.find(key).and_then(|value| value.to_string().ok()).map_or("", |text| text)
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.find(key).and_then(|value| value.to_bool().ok()).unwrap_or(default)
    }

    fn list<T>(
        &self,
        key: &str,
        read: impl Fn(&'a Metadata) -> candle_core::Result<T>,
    ) -> Result<Vec<T>, String> {
        let found = self.find(key).and_then(|value| value.to_vec().ok());
        let found = found.ok_or_else(|| format!("the file has no tokenizer.ggml.{key}: {OTHER}"))?;
        let read: candle_core::Result<_> = found.iter().map(read).collect();
        read.map_err(|error| format!("tokenizer.ggml.{key} is damaged, {error}: {OTHER}"))
    }

    /// The token that is named by its number, and the number.
    fn token(&self, key: &str, tokens: &[&'a str]) -> Option<(&'a str, usize)> {
        let id = self.find(&format!("{key}_token_id"))?.to_u64().ok()?;
        let id = usize::try_from(id).ok()?;
        tokens.get(id).map(|token| (*token, id))
    }
}

/// What is different between the kinds.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    /// The members of the model that are not the same for all.
    model: Value,
    /// Whether the beginning of a text is put before it, where the file does not say.
    begins: bool,
}

/// The metadata as a `tokenizer.json`, or what is wrong with them.
fn tokenizer_json(keys: &Keys) -> Result<Value, String> {
    let tokens: Vec<&str> = keys.list("tokens", |token| token.to_string().map(String::as_str))?;
    let kinds = keys.list("token_type", |kind| kind.to_i32().map(i64::from))?;
    if kinds.len() != tokens.len() {
        return Err(format!(
            "tokenizer.ggml.token_type has {} kinds for {} tokens",
            kinds.len(),
            tokens.len()
        ));
    }
    let parts = match keys.text("model") {
        "gpt2" => merges_of_bytes(keys)?,
        "llama" => sentence_piece(keys, &tokens, &kinds)?,
        model => {
            return Err(format!(
                "tokenizer.ggml.model is {model:?}; of GGUF files \"gpt2\", merges of bytes, and \"llama\", \
                 SentencePiece's pieces, are read: {OTHER}"
            ));
        }
    };
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
    if vocabulary.len() != tokens.len() {
        return Err("tokenizer.ggml.tokens has the same token twice".into());
    }
    let added: Vec<Value> = tokens
        .iter()
        .zip(0..)
        .zip(&kinds)
        .filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
        .map(|((token, id), kind)| {
            json!({
                "id": id, "content": token, "special": *kind != USER_DEFINED,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let mut model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocabulary,
    });
    for (key, value) in parts.model.as_object().into_iter().flatten() {
        model[key] = value.clone();
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": around(keys, &tokens, parts.begins),
        "decoder": parts.decoder,
        "model": model,
    }))
}

/// What is put before and behind a text, or null.
fn around(keys: &Keys, tokens: &[&str], begins: bool) -> Value {
    let token = |key: &str, default: bool| {
        keys.token(key, tokens).filter(|_| keys.flag(&format!("add_{key}_token"), default))
    };
    let (first, last) = (token("bos", begins), token("eos", false));
    if first.is_none() && last.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(&str, usize)>| {
        token.map(|(token, _)| json!({ "SpecialToken": { "id": token, "type_id": 0 } }))
    };
    let template = |texts: &[&str]| -> Vec<Value> {
        let each = texts.iter().map(|text| json!({ "Sequence": { "id": text, "type_id": 0 } }));
        each.flat_map(|text| [special(first), Some(text), special(last)]).flatten().collect()
    };
    let named = [first, last].into_iter().flatten();
    let named: serde_json::Map<String, Value> = named
        .map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    json!({
        "type": "TemplateProcessing", "single": template(&["A"]), "pair": template(&["A", "B"]),
        "special_tokens": named,
    })
}

/// Merges of bytes, as GPT-2's.
fn merges_of_bytes(keys: &Keys) -> Result<Parts, String> {
    let name = keys.text("pre");
    let (normalizer, pre_tokenizer, ignore_merges) = words(name).ok_or_else(|| {
        format!("tokenizer.ggml.pre is {name:?}; gpt-2, smollm, llama-bpe and qwen2 are known: {OTHER}")
    })?;
    let merges = keys.list("merges", Metadata::to_string)?;
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        decoder: bytes(true),
        model: json!({ "ignore_merges": ignore_merges, "merges": merges }),
        // Llama 3's, whose words alone are cut so.
        begins: ignore_merges,
    })
}

/// Bytes as printable characters, in words of GPT-2's if `use_regex`.
fn bytes(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// How text is cut into words: a normalizer, a pre-tokenizer, and whether a word that is a token is not cut
/// further.
fn words(name: &str) -> Option<(Value, Value, bool)> {
    let sequence =
        |first: Value, second: Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    let by = |pattern: &str| {
        let pattern = json!({ "Regex": pattern });
        json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false })
    };
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

/// SentencePiece's pieces (Kudo and Richardson, arXiv 1808.06226): of all pairs of neighbours that make a
/// piece together, the one whose piece has the highest score is joined first. A character that is no piece is
/// written as its bytes.
fn sentence_piece(keys: &Keys, tokens: &[&str], kinds: &[i64]) -> Result<Parts, String> {
    let scores = keys.list("scores", Metadata::to_f32)?;
    if scores.len() != tokens.len() {
        return Err(format!("tokenizer.ggml.scores has {} scores for {} tokens", scores.len(), tokens.len()));
    }
    let unknown = tokens.iter().zip(kinds).find(|(_, kind)| **kind == UNKNOWN).map(|(token, _)| token);
    let has_prefix = keys.flag("add_space_prefix", true);
    let replace =
        |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let prefix = has_prefix.then(|| json!({ "type": "Prepend", "prepend": SPACE }));
    let normalizers: Vec<Value> = prefix.into_iter().chain([replace(" ", SPACE)]).collect();
    let mut decoders =
        vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    decoders.extend(has_prefix.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 })));
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        // Pieces may go over the ends of words.
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
            "merges": merges(tokens, kinds, &scores),
        }),
        begins: true,
    })
}

/// Every way to make a piece of two others, best pieces first. Pieces that no text is made of, such as those
/// that mark its beginning, are left out.
fn merges<'a>(tokens: &[&'a str], kinds: &[i64], scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let pieces = || tokens.iter().zip(scores).zip(kinds).filter(|(_, kind)| **kind == NORMAL);
    let known: HashMap<&str, f32> = pieces().map(|((token, score), _)| (*token, *score)).collect();
    let mut merges: Vec<(f32, &str, &str)> = vec![];
    for ((token, score), _) in pieces() {
        let halves = token.char_indices().skip(1).map(|(place, _)| token.split_at(place));
        let made = halves.filter(|(left, right)| known.contains_key(left) && known.contains_key(right));
        merges.extend(made.map(|(left, right)| (*score, left, right)));
    }
    // A stable sort: of pieces with one score the first comes first.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}
