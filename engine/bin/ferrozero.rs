//! The command `ferrozero`.

use ferrozero::CountingAllocator;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// How long candle's threads look out for work before they sleep, and the name under which candle reads it. They are
/// others than those of the products, which they would keep from a processor: with candle's own 25,000, a step took
/// 7 % longer on two processors.
const CANDLE_SPINS: (&str, &str) = ("CANDLE_BARRIER_POOL_SPIN_LIMIT", "200");

fn main() -> ExitCode {
    let (name, spins) = CANDLE_SPINS;
    if std::env::var_os(name).is_none() {
        // SAFETY: no other thread runs yet that could read the environment meanwhile.
        unsafe { std::env::set_var(name, spins) };
    }
    ferrozero::command::run()
}
