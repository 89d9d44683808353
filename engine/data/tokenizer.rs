//! How text becomes tokens, and tokens text.

use crate::data::error::DataError;
use std::ops::Range;
use std::path::Path;
use tokenizers::Tokenizer as HuggingFaceTokenizer;

/// How text becomes tokens.
pub enum Tokenizer {
    /// Every byte is a token.
    Bytes,
    /// A Hugging Face `tokenizer.json`.
    HuggingFace(Box<HuggingFaceTokenizer>),
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let refused = |error: tokenizers::Error| DataError::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Ok(Self::HuggingFace(Box::new(HuggingFaceTokenizer::from_file(path).map_err(refused)?)))
    }

    /// Reads the text of a `tokenizer.json` that is made of `path`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`].
    pub(crate) fn from_json(json: &[u8], path: &Path) -> Result<Self, DataError> {
        let refused = |error: tokenizers::Error| DataError::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Ok(Self::HuggingFace(Box::new(HuggingFaceTokenizer::from_bytes(json).map_err(refused)?)))
    }

    /// Writes a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], also for the bytes' tokenizer, of which there is no such file.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        let refused = |reason| DataError::Tokenizer { path: path.to_owned(), reason };
        match self {
            Self::Bytes => Err(refused("single bytes are tokens here, which needs no file".into())),
            Self::HuggingFace(tokenizer) => {
                tokenizer.save(path, false).map_err(|error| refused(error.to_string()))
            }
        }
    }

    /// Number of different tokens.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::HuggingFace(tokenizer) => tokenizer.get_vocab_size(true),
        }
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the tokenizer cannot encode it.
    pub fn encode(&self, text: &[u8]) -> Result<Vec<u32>, DataError> {
        match self {
            Self::Bytes => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            Self::HuggingFace(tokenizer) => {
                let mut tokens = vec![];
                // One document at a time: a tokenizer's working memory is many times its text.
                for document in text.split(|&byte| byte == 0) {
                    let document = String::from_utf8_lossy(document);
                    let encoded = tokenizer.encode_fast(document.as_ref(), false).map_err(unencodable)?;
                    tokens.extend_from_slice(encoded.get_ids());
                }
                Ok(tokens)
            }
        }
    }

    /// The tokens that [`Self::encode`] finds in a text, each with the bytes of the text that it stands for.
    /// A token that stands for a part of a character has the whole character's.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_places(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, DataError> {
        let Self::HuggingFace(tokenizer) = self else {
            return Ok(text.bytes().enumerate().map(|(at, byte)| (u32::from(byte), at..at + 1)).collect());
        };
        let mut tokens = vec![];
        let mut first = 0;
        for document in text.split('\0') {
            let encoded = tokenizer.encode(document, false).map_err(unencodable)?;
            let places = encoded.get_offsets().iter().map(|(start, end)| first + start..first + end);
            tokens.extend(encoded.get_ids().iter().copied().zip(places));
            first += document.len() + 1;
        }
        Ok(tokens)
    }

    /// Tokens that the tokenizer puts before a text, as Llama's puts the beginning of one; [`Self::encode`]
    /// leaves them out.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn prefix(&self) -> Result<Vec<u32>, DataError> {
        let Self::HuggingFace(tokenizer) = self else { return Ok(vec![]) };
        let encoded = tokenizer.encode_fast("a", true).map_err(unencodable)?;
        let marked = encoded.get_ids().iter().zip(encoded.get_special_tokens_mask());
        Ok(marked.take_while(|(_, special)| **special == 1).map(|(token, _)| *token).collect())
    }

    /// Whether a token was added to those that text is cut into, as marks are.
    pub fn is_added(&self, token: u32) -> bool {
        match self {
            Self::Bytes => false,
            Self::HuggingFace(tokenizer) => tokenizer.get_added_tokens_decoder().contains_key(&token),
        }
    }

    /// Text of tokens; what is no valid text is replaced.
    pub fn decode(&self, tokens: &[u32]) -> String {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Self::HuggingFace(tokenizer) => tokenizer.decode(tokens, true).unwrap_or_default(),
        }
    }
}

fn unencodable(error: tokenizers::Error) -> DataError {
    DataError::Tokenizer { path: "tokenizer.json".into(), reason: error.to_string() }
}
