//! How programs of ferrozero's start, the command and each of `cargo bench`: with an allocator that counts,
//! and with what candle reads from the environment.

use ferrozero::CountingAllocator;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// How long candle's threads look out for work before they sleep, and the name under which candle reads it.
/// They compete with the threads of the products for processors: with candle's own 25,000, a step took 7 %
/// longer on two processors.
const CANDLE_SPINS: (&str, &str) = ("CANDLE_BARRIER_POOL_SPIN_LIMIT", "200");

/// Runs a program.
pub fn start(program: impl FnOnce() -> ExitCode) -> ExitCode {
    let (name, spins) = CANDLE_SPINS;
    if std::env::var_os(name).is_none() {
        // SAFETY: no other thread runs yet that could read the environment meanwhile.
        unsafe { std::env::set_var(name, spins) };
    }
    program()
}
