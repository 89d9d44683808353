//! Predicted step times against measured ones: `ferrozero bench predict`, with the same options.

#[path = "../engine/bin/start.rs"]
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(|| ferrozero::internals::command::bench("predict"))
}
