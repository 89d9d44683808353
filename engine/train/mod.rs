//! Training: steps, evaluations, commits and exports of a model that an engine holds.

pub mod learning_rate;
pub mod report;
pub mod trainer;
pub mod vertical;
