//! The command `ferrozero`.

mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(ferrozero::internals::command::run)
}
