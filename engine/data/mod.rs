//! Data: text as tokens, what a step sees of them, and the choice of the next token from a model's answer.

pub mod chat;
pub mod corpus;
pub mod error;
pub mod examples;
pub mod sampling;
pub mod tokenizer;
