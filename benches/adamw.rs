//! The optimizer's loop against a loop that moves the same bytes: `ferrozero bench adamw`, with the same
//! options.

#[path = "../engine/bin/start.rs"]
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(|| ferrozero::internals::command::bench("adamw"))
}
