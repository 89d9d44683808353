//! Models that are trained by command, as plain candle modules.

pub mod gpt;
