//! `ferrozero bench`.

mod step;

use super::CommandResult;
use clap::Subcommand;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Training steps of a GPT under a placement, in turns with another placement.
    Step(step::StepArguments),
}

/// Measures.
pub fn run(bench: Bench) -> CommandResult {
    match bench {
        Bench::Step(arguments) => step::run(arguments),
    }
}
