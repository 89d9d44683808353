//! What a run tells of itself: its log, its timeline, and what each tier held.

pub mod chrome;
pub mod occupancy;
pub mod run_log;
#[cfg(feature = "cli")]
pub mod tensorboard;
pub mod timeline;
