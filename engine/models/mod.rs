//! Models that are trained by command, as plain candle modules.

pub mod cache;
pub mod gpt;
pub mod linear;
pub mod llama;
pub mod llama_config;
pub mod pretrained;
