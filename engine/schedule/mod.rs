//! A step is data: what a model's state looks like, the operations that move and use it, and the one maker of
//! lists of them.

pub mod buffer_plan;
pub mod builder;
pub mod layout;
pub mod operation;
pub(crate) mod order;
pub(crate) mod tile;
pub mod trace;
