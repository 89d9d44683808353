//! Training steps under a placement against another placement: `ferrozero bench step`, with the same options.

#[path = "../engine/bin/start.rs"]
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(|| ferrozero::internals::command::bench("step"))
}
