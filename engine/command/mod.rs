//! The command line.

mod bench;
mod checkpoint;
mod config;
mod deepspeed;
mod finetune;
mod plan;
mod pretrained;
mod probe;
mod settings;
mod train;

use crate::error::Error;
use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

pub use settings::{TrainArguments, TrainSettings};

/// Trains models that are larger than the memory of the machine that trains them.
#[derive(Debug, Parser)]
#[command(name = "ferrozero", version, arg_required_else_help = true, after_help = EXIT_CODES)]
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
    /// Measure this machine, in about 10 seconds, and write machine.json for `ferrozero plan`.
    #[command(after_help = PROBE_EXAMPLES)]
    Probe(probe::ProbeArguments),
    /// Tell what fits and how fast it will be, without the model and without the machine.
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(Box<plan::PlanArguments>),
    /// Explain a file of settings, or a configuration of DeepSpeed's; write the schema of settings.
    #[command(subcommand)]
    Config(config::Config),
    /// Write what a shell needs to complete this command line.
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual page.
    Man,
    /// Measure against a reference that runs in the same process.
    #[command(subcommand)]
    Bench(bench::Bench),
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 an error that is told on standard error, 2 a command line that is not understood, 130 ended at once by a
second Ctrl-C.";

const PLAN_EXAMPLES: &str = "\
Examples:
  ferrozero probe && ferrozero plan --machine machine.json --memory 384MiB
  ferrozero plan --model gpt3-13b --device rtx4090-24g --host 128GiB --nvme 7GB/s --seq 1024
  ferrozero plan --model llama/config.json --device h100-80g --host 128GiB --nvme nvme-gen4 --json
  ferrozero plan --model gpt2 --device rtx4090-24g --host 64GiB --nvme nvme-gen4 --max-model

Memory and time of computing are estimated from the model's shape. `ferrozero train` measures both before it plans.";

const PROBE_EXAMPLES: &str = "\
Examples:
  ferrozero probe
  ferrozero probe --dir /mnt/nvme/run --out workstation.json --again";

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
        Command::Probe(arguments) => probe::run(arguments),
        Command::Plan(arguments) => plan::run(*arguments),
        Command::Config(config) => config::run(config),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut CommandLine::command(), "ferrozero", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => manual(),
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

fn manual() -> CommandResult {
    Ok(clap_mangen::Man::new(CommandLine::command()).render(&mut std::io::stdout())?)
}

/// Any error of a command.
type CommandResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn configuration(text: String) -> Error {
    Error::Configuration(text)
}
