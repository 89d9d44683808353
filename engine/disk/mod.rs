//! What of a run lies on disk, and its way to and from safetensors files.

pub mod checkpoint;
pub mod import;
pub mod safetensors;
pub mod stores;
