//! Runs schedules: who may start, and what each operation does to the memory that it holds.

pub mod device_clock;
pub mod executor;
pub mod initial_values;
pub mod loss_scale;
pub mod perform;
