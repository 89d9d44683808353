//! What the driver of the process tells when the process ends.

use std::fmt::Write as _;
use std::io::Write as _;

use crate::driver::{Driver, State};

/// Kernels that are listed.
const MOST_KERNELS: usize = 40;

/// Kernels by the time that they took, and how often each function of the interface was called.
fn table(state: &State, races: usize) -> String {
    let mut kernels: Vec<_> = state.kernels.iter().collect();
    kernels.sort_by(|(_, a), (_, b)| b.seconds.total_cmp(&a.seconds));
    let launches: u64 = kernels.iter().map(|(_, count)| count.launches).sum();
    let instructions: u64 = kernels.iter().map(|(_, count)| count.lane_instructions).sum();
    let seconds: f64 = kernels.iter().map(|(_, count)| count.seconds).sum();
    let mut text = format!(
        "simcuda: {} kernels, {launches} launches, {instructions} lane instructions in {seconds:.3} s; \
         {races} races; {} bytes live\n",
        kernels.len(),
        state.memory.live_bytes()
    );
    for (name, count) in kernels.into_iter().take(MOST_KERNELS) {
        let milliseconds = 1e3 * count.seconds;
        let (launches, instructions) = (count.launches, count.lane_instructions);
        let _ = writeln!(
            text,
            "  {name}: {launches} launches, {instructions} lane instructions, {milliseconds:.3} ms"
        );
    }
    for (name, count) in &state.calls {
        let _ = writeln!(text, "  {name}: {count} calls");
    }
    text
}

/// Races go to the file that `SIMCUDA_RACE_FILE` names, the table to stderr if `SIMCUDA_STATS` is there.
extern "C" fn at_exit() {
    let driver = Driver::of_process();
    let races = driver.races();
    if let (true, Ok(path)) = (races > 0, std::env::var("SIMCUDA_RACE_FILE")) {
        let program = std::env::args().next().unwrap_or_default();
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        if file.and_then(|mut file| writeln!(file, "{races} races in {program}")).is_err() {
            eprintln!("simcuda: {races} races, and {path} could not be written");
        }
    }
    if std::env::var_os("SIMCUDA_STATS").is_some() {
        eprint!("{}", table(&driver.lock(), races));
    }
}

extern "C" fn at_start() {
    // SAFETY: the function is one of the C library's calling convention that may be called at any time.
    unsafe { libc::atexit(at_exit) };
}

/// The loader runs this when the library is loaded. A program that ends by a crash tells nothing.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
