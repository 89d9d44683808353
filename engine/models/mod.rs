//! Models that are trained by command, as plain candle modules.

pub mod block;
pub mod cache;
mod gguf;
mod gguf_tokenizer;
pub mod gpt;
pub mod linear;
pub mod llama;
pub mod llama_config;
mod merged;
pub mod pretrained;
mod reader;
pub mod rope;
pub mod weights;
