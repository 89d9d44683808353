//! The promises, end to end: a module each. They are one program, because linking each alone takes longer than most of them
//! run. What needs an allocator or a device of its own is a program beside this one.

mod bitwise;
mod checkpoint;
mod command;
mod configurations;
mod crash;
mod examples;
mod faults;
mod finetune;
mod folders;
mod gguf;
mod parity;
mod planner;
mod precision;
mod pretrained;
mod report;
mod schedule;
#[path = "../support/mod.rs"]
mod support;
mod tidy;
mod tiled_linear;
mod tiled_perceptron;
mod trace;
mod training;
mod vertical;
