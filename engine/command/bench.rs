//! `ferrozero bench`.

mod adamw;
mod choice;
mod copy;
mod io;
mod ops;
mod predict;
mod scale;
mod step;
mod workload;

use super::CommandResult;
use clap::Subcommand;
use serde::Serialize;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The optimizer's loop, in turns with a loop that moves the same bytes.
    #[command(name = "adamw")]
    AdamW(adamw::AdamWArguments),
    /// Pieces between host and device as the engine moves them, in turns with one copy of all their bytes.
    Copy(copy::CopyArguments),
    /// The disk store, in turns with fio where that is installed.
    Io(io::IoArguments),
    /// Forward and backward of each fused operation, in turns with the same composed of candle's own.
    Ops(ops::OpsArguments),
    /// The largest model that there is a plan for, by host memory: predicted, not run.
    Scale(Box<scale::ScaleArguments>),
    /// Training steps of a GPT under a placement, in turns with another placement.
    Step(step::StepArguments),
    /// What plans predict against what is measured, and with --choice the planner's choice against all
    /// others.
    ///
    /// Ends with PASS where predictions are off by 10 % at most in the median and by 20 % at worst, and where
    /// the choice reaches 0.95 of the best for each budget; else with FAIL and the exit code 1.
    Predict(predict::PredictArguments),
}

/// Measures.
pub fn run(bench: Bench) -> CommandResult {
    match bench {
        Bench::AdamW(arguments) => adamw::run(arguments),
        Bench::Copy(arguments) => copy::run(arguments),
        Bench::Io(arguments) => io::run(arguments),
        Bench::Ops(arguments) => ops::run(arguments),
        Bench::Scale(arguments) => scale::run(*arguments),
        Bench::Step(arguments) => step::run(arguments),
        Bench::Predict(arguments) => predict::run(arguments),
    }
}

/// Several measurements of one thing.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    Spread { median: at(values.len() / 2), least: at(0), most: at(values.len().saturating_sub(1)) }
}

/// An error where what is asked for was not reached, so that the exit code says so.
fn verdict(passes: bool, asked: &str) -> CommandResult {
    if passes { Ok(()) } else { Err(format!("it was not reached that {asked}").into()) }
}
