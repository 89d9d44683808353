//! `ferrozero bench predict`: the step time that each plan predicts against the one that is measured, over
//! models, homes, budgets and disks of different speeds; and with `--choice`, the planner's choice against
//! all others.
//!
//! A prediction is made as in every run, from the machine's numbers and the rehearsal. Machine and
//! configurations take turns, so that all see the same machine.

use super::super::{CommandResult, configuration};
use super::choice;
use super::verdict;
use super::workload::{Sizes, measure, slow_disk};
use crate::planner::machine::Machine;
use crate::statistics::median;
use crate::{Config, Placement, Tier, probe};
use serde::Serialize;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
/// By how much predictions may be off in the median and at worst, as shares of what was measured.
const MEDIAN_LIMIT: f64 = 0.10;
const WORST_LIMIT: f64 = 0.20;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct PredictArguments {
    /// Folder for states on disk; what is made there is removed afterwards
    #[arg(long, default_value = "ferrozero-bench")]
    dir: PathBuf,
    /// Times that each configuration is planned and run
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Measured steps of each run
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// What ferrozero probe wrote, for all predictions [default: a quick measurement before each round]
    #[arg(long, value_name = "FILE.json")]
    machine: Option<PathBuf>,
    /// Instead, run everything that a planner could choose for three budgets, and compare its choice with the
    /// best
    #[arg(long)]
    choice: bool,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
}

/// One configuration.
struct Case {
    name: &'static str,
    sizes: Sizes,
    config: Config,
}

/// Predicted and measured seconds of a step, of each round.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    predicted_s: f64,
    measured_s: f64,
    /// By how much the prediction is off, as a share of what was measured: the median over rounds.
    off: f64,
}

fn gpt(layers: usize, hidden: usize, batch: usize) -> Sizes {
    Sizes { layers, hidden, heads: hidden / 64, vocabulary: 1024, sequence: 128, batch }
}

fn cases() -> CommandResult<Vec<Case>> {
    let case = |name, sizes, config| Case { name, sizes, config };
    let disk = || Config { placement: Placement::All(Tier::Disk), clip: Some(1.0), ..Config::default() };
    let within = |mib: u64| Config { memory_bytes: Some(mib * MIB), clip: Some(1.0), ..Config::default() };
    Ok(vec![
        case("6 × 256, in memory", gpt(6, 256, 4), within(1024)),
        case(
            "6 × 256, on host",
            gpt(6, 256, 4),
            Config { placement: Placement::All(Tier::Host), ..within(1024) },
        ),
        case("6 × 256, on disk", gpt(6, 256, 4), disk()),
        case("6 × 256, on disk of 100 MB/s", gpt(6, 256, 4), Config { throttle: slow_disk(1e8)?, ..disk() }),
        case(
            "6 × 256, on disk of 300 MB/s, not clipped",
            gpt(6, 256, 4),
            Config { throttle: slow_disk(3e8)?, clip: None, ..disk() },
        ),
        case(
            "6 × 256, 160 MiB, disk of 100 MB/s",
            gpt(6, 256, 4),
            Config { throttle: slow_disk(1e8)?, ..within(160) },
        ),
        case("4 × 512, in memory", gpt(4, 512, 2), within(1024)),
        case("4 × 512, on disk", gpt(4, 512, 2), disk()),
        case("4 × 512, on disk of 300 MB/s", gpt(4, 512, 2), Config { throttle: slow_disk(3e8)?, ..disk() }),
        case(
            "4 × 512, 224 MiB, disk of 200 MB/s",
            gpt(4, 512, 2),
            Config { throttle: slow_disk(2e8)?, ..within(224) },
        ),
        case(
            "4 × 512, on disk of 300 MB/s, 2 micro-batches",
            gpt(4, 512, 2),
            Config { throttle: slow_disk(3e8)?, accumulate: 2, ..disk() },
        ),
        case(
            "8 × 384, on disk of 200 MB/s, boundaries too",
            gpt(8, 384, 2),
            Config { throttle: slow_disk(2e8)?, boundaries: Some(Tier::Disk), ..disk() },
        ),
    ])
}

/// Runs the bench.
pub fn run(arguments: PredictArguments) -> CommandResult {
    let is_new = !arguments.dir.exists();
    std::fs::create_dir_all(&arguments.dir)
        .map_err(|error| configuration(format!("--dir {}: {error}", arguments.dir.display())))?;
    let result = match arguments.choice {
        true => choice::run(&arguments.dir, arguments.steps.into(), arguments.json),
        false => compare(&arguments),
    };
    if is_new {
        // Fails, as it should, when anything else was put there meanwhile.
        let _ = std::fs::remove_dir(&arguments.dir);
    }
    result
}

fn compare(arguments: &PredictArguments) -> CommandResult {
    let given = arguments.machine.as_deref().map(Machine::from_file).transpose()?;
    let cases = cases()?;
    let mut found: Vec<Vec<(f64, f64)>> = vec![vec![]; cases.len()];
    for round in 0..arguments.rounds {
        // The next plan measures the machine again.
        probe::forget();
        for (case, found) in cases.iter().zip(&mut found) {
            let config = Config { machine: given.clone(), ..case.config.clone() };
            found.extend(measure(case.sizes, config, &arguments.dir, arguments.steps.into(), &mut |_| true)?);
        }
        eprintln!("round {}/{}", round + 1, arguments.rounds);
    }
    let rows: Vec<Row> = cases.iter().zip(&found).map(|(case, found)| row(case.name, found)).collect();
    report(&rows, arguments.json)
}

fn row(name: &'static str, found: &[(f64, f64)]) -> Row {
    Row {
        name,
        predicted_s: median(found.iter().map(|(predicted_s, _)| *predicted_s).collect()),
        measured_s: median(found.iter().map(|(_, measured_s)| *measured_s).collect()),
        off: median(found.iter().map(|(predicted_s, measured_s)| predicted_s / measured_s - 1.0).collect()),
    }
}

/// Tells what was found; an error where predictions are not good enough.
fn report(rows: &[Row], json: bool) -> CommandResult {
    let mut off: Vec<f64> = rows.iter().map(|row| row.off.abs()).collect();
    off.sort_by(f64::total_cmp);
    let (middle, worst) = (off[off.len() / 2], off[off.len() - 1]);
    let passes = middle <= MEDIAN_LIMIT && worst <= WORST_LIMIT;
    if json {
        let found =
            serde_json::json!({ "rows": rows, "median_off": middle, "worst_off": worst, "passes": passes });
        println!("{found}");
        return verdict(passes, PREDICTIONS);
    }
    println!("| configuration | predicted | measured | off |\n|---|---|---|---|");
    for Row { name, predicted_s, measured_s, off } in rows {
        println!("| {name} | {predicted_s:.3} s | {measured_s:.3} s | {:+.0} % |", 100.0 * off);
    }
    println!("\nOff by {:.0} % in the median and {:.0} % at worst.", 100.0 * middle, 100.0 * worst);
    println!("{}: {PREDICTIONS}", if passes { "PASS" } else { "FAIL" });
    verdict(passes, PREDICTIONS)
}

/// What is asked of predictions.
const PREDICTIONS: &str = "predictions are to be off by 10 % at most in the median and by 20 % at worst";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_pass_within_both_limits_and_fail_beyond_one() {
        let rows = |off: &[f64]| -> Vec<Row> {
            let row = |&off| Row { name: "", predicted_s: 1.0 + off, measured_s: 1.0, off };
            off.iter().map(row).collect()
        };
        assert!(report(&rows(&[0.05, -0.10, 0.20]), true).is_ok());
        assert!(report(&rows(&[0.05, -0.11, 0.20]), true).is_err(), "the median");
        let error = report(&rows(&[0.05, 0.10, -0.21]), false).unwrap_err().to_string();
        assert!(error.contains("20 % at worst"), "{error}");
    }
}
