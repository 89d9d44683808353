//! The device that computes, and the storage of tensors there.

pub mod compute;
pub mod tensor_storage;
