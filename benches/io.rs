//! The disk store against fio: `ferrozero bench io`, with the same options.

#[path = "../engine/bin/start.rs"]
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(|| ferrozero::internals::command::bench("io"))
}
