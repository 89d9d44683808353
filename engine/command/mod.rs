//! The command line.

mod bench;
mod checkpoint;
mod finetune;
mod pretrained;
mod settings;
mod train;

use crate::error::Error;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

pub use settings::{TrainArguments, TrainSettings};

/// Trains models that are larger than the memory of the machine that trains them.
#[derive(Debug, Parser)]
#[command(name = "ferrozero", version, arg_required_else_help = true)]
pub struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a GPT on text, with its states over memory and disk.
    ///
    /// Without options: about 38 million parameters at byte level, on the sources of cargo's packages, in 384 MiB of
    /// memory, in about three minutes.
    #[command(after_help = TRAIN_EXAMPLES, args_override_self = true)]
    Train(Box<TrainArguments>),
    /// Train a model further that others have trained, on prompts and answers or on text.
    Finetune(Box<finetune::FinetuneArguments>),
    /// Continue a text with a model that others have trained, which may be larger than memory.
    Generate(Box<pretrained::GenerateArguments>),
    /// Tell what a run's folder holds: commit, step, groups, bytes, homes.
    Inspect(checkpoint::FolderArguments),
    /// Read all of a run's states, check all sums, and name what is damaged.
    Verify(checkpoint::FolderArguments),
    /// Copy a run's last commit to another folder, or over several disks.
    Copy(checkpoint::CopyArguments),
    /// Write the parameters of a run's last commit to a safetensors file.
    Export(checkpoint::ExportArguments),
    /// Make a run's folder of a safetensors file: its parameters, no step, moments of zero.
    Import(checkpoint::ImportArguments),
    /// Measure against a reference that runs in the same process.
    #[command(subcommand)]
    Bench(bench::Bench),
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  ferrozero train
  ferrozero train --data book.txt --layers 6 --hidden 384 --heads 6 --steps 300 --dir book-run
  ferrozero train --dir book-run --resume --steps 600
  ferrozero train --json > steps.jsonl

Ctrl-C finishes the step, commits and stops; a second one stops at once.";

/// Runs the command line of the process.
pub fn run() -> ExitCode {
    let CommandLine { command } = CommandLine::parse();
    let result = match command {
        Command::Train(arguments) => train::run(*arguments),
        Command::Finetune(arguments) => finetune::run(*arguments),
        Command::Generate(arguments) => pretrained::generate(*arguments),
        Command::Inspect(arguments) => checkpoint::inspect(arguments),
        Command::Verify(arguments) => checkpoint::verify(arguments),
        Command::Copy(arguments) => checkpoint::copy(arguments),
        Command::Export(arguments) => checkpoint::export(arguments),
        Command::Import(arguments) => checkpoint::import(arguments),
        Command::Bench(bench) => bench::run(bench),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Any error of a command.
type CommandResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn configuration(text: String) -> Error {
    Error::Configuration(text)
}
