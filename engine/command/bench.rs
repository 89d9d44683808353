//! `ferrozero bench`.

use super::CommandResult;
use clap::Subcommand;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {}

/// Measures.
pub fn run(bench: Bench) -> CommandResult {
    match bench {}
}
