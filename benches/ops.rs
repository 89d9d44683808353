//! Forward and backward of each fused operation against the same composed of candle's own:
//! `ferrozero bench ops`, with the same options.

#[path = "../engine/bin/start.rs"]
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    start::start(|| ferrozero::internals::command::bench("ops"))
}
