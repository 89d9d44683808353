//! What can be wrong with the data.

use std::path::PathBuf;

/// What is wrong with the data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder that cannot be read.
    #[error("data {path}: {source}")]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing to train on.
    #[error("no text in {place}: give a text file, or a folder with text files")]
    Empty {
        /// Where text was looked for.
        place: String,
    },
    /// Less than training and validation need.
    #[error(
        "the data has {tokens} tokens and at least {needed} are needed: give more text, or shorter sequences"
    )]
    TooSmall {
        /// Tokens of the data.
        tokens: usize,
        /// Tokens that one sequence for training and one for validation need.
        needed: usize,
    },
    /// The file of tokens that cannot be made, read or written.
    #[error(
        "{path}: the file of the data's tokens beside it, {bytes} bytes, could not be {operation}: {source}"
    )]
    Tokens {
        /// Folder of the run.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// Bytes that it has so far.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line that is no example.
    #[error("{path}, line {line}: {reason}")]
    Example {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that cannot be used.
    #[error("chat template of {path}: {reason}")]
    ChatTemplate {
        /// The model.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer that cannot be used.
    #[error("tokenizer {path}: {reason}")]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}
