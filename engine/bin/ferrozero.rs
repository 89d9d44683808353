//! The command `ferrozero`.

use ferrozero::CountingAllocator;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    ferrozero::command::run()
}
