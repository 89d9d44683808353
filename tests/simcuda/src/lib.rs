//! A software CUDA driver that looks for bugs.
//!
//! The shared library stands in for libcuda, libcublas and libcurand. It runs PTX on the CPU, keeps a queue
//! for each stream, and decides by its [`Configuration`] when the operations of streams run and in which
//! order blocks and warps do. README.md says what it finds, and what it cannot tell.
//!
//! | module | what it does |
//! |---|---|
//! | [`api`] | the C interface |
//! | `driver` | devices: streams, events, modules and the operations of streams |
//! | `races` | accesses on two streams without an order between them |
//! | `memory` | addresses that are checked at each access |
//! | `ptx` | PTX from text to instructions |
//! | `program` | kernels, decoded: a function a step that works on all lanes of a warp |
//! | `interpreter` | grids, blocks, warps and their lanes |
//! | `gemm`, `random` | what cuBLAS and cuRAND do |
//! | `exit` | what is told when the process ends |
//!
//! Tests choose a device of their own for a thread: see [`Driver::within`].

pub mod api;
mod configuration;
mod driver;
mod exit;
mod fault;
mod gemm;
mod interpreter;
mod memory;
mod program;
mod ptx;
mod races;
mod random;

pub use configuration::{Configuration, Mode, Order};
pub use driver::Driver;
