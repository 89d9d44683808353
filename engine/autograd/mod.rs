//! Where candle's autograd and the schedule meet: parameters that are only there while a segment runs.

pub mod dropout;
pub mod gradient;
pub mod output;
pub mod registry;
pub mod rehearsal;
pub mod segment;
pub mod segment_call;
