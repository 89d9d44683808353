//! The planner: counts what a schedule needs, costs it on a machine, and searches for the plan whose steps
//! are shortest.

pub mod catalog;
pub mod machine;
pub mod observed;
pub mod optimizer;
pub mod plan;
pub(crate) mod search;
pub mod simulator;
