//! PTX, the assembly language that CUDA's compiler writes: from text to instructions whose operands are
//! resolved.
//!
//! [`module::Module`] finds the functions and variables of a text. A kernel that a program asks for is parsed
//! into statements ([`statement`]) and lowered to instructions ([`lowering`]): names become registers and
//! constants, and calls of functions are replaced by the functions' instructions.

pub mod lexer;
pub mod lowering;
pub mod module;
pub mod opcode;
pub mod statement;
pub mod types;

pub use lowering::Kernel;
pub use module::Module;
