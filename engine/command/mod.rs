//! The command line.

mod advice;
mod bench;
mod checkpoint;
mod config;
mod deepspeed;
mod finetune;
mod help;
mod journal;
mod output;
mod overrides;
mod plan;
mod pretrained;
mod probe;
mod report;
mod settings;
mod train;

use crate::error::Error;
use clap::{CommandFactory, Parser, Subcommand};
use finetune::{FinetuneArguments, FinetuneSettings};
use std::ffi::OsString;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

pub use overrides::{Home, Homes, Overrides, UpdateTime};
pub use settings::{Reporting, RunArguments, RunSettings, Settings};
pub use train::{TrainArguments, TrainSettings};

/// Trains models that are larger than the memory of the machine that trains them.
#[derive(Debug, Parser)]
#[command(name = "ferrozero", version, arg_required_else_help = true, after_help = help::EXIT_CODES)]
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
    #[command(after_help = help::TRAIN, args_override_self = true, defer(settings::with_defaults::<TrainSettings>))]
    Train(Box<TrainArguments>),
    /// Train a model further that others have trained, on prompts and answers or on text.
    #[command(after_help = help::FINETUNE, args_override_self = true, defer(settings::with_defaults::<FinetuneSettings>))]
    Finetune(Box<FinetuneArguments>),
    /// Continue a text with a model that others have trained, which may be larger than memory.
    #[command(after_help = help::GENERATE)]
    Generate(Box<pretrained::GenerateArguments>),
    /// Make a page of a run's log: loss, time, memory and disk, as predicted and as they were.
    #[command(after_help = help::REPORT)]
    Report(report::ReportArguments),
    /// Tell what a run's folder holds: commit, step, groups, bytes, homes.
    #[command(after_help = help::INSPECT)]
    Inspect(checkpoint::FolderArguments),
    /// Read all of a run's states, check all sums, and name what is damaged.
    #[command(after_help = help::VERIFY)]
    Verify(checkpoint::FolderArguments),
    /// Copy a run's last commit to another folder, or over several disks.
    #[command(after_help = help::COPY)]
    Copy(checkpoint::CopyArguments),
    /// Write the parameters of a run's last commit to a safetensors file.
    #[command(after_help = help::EXPORT)]
    Export(checkpoint::ExportArguments),
    /// Make a run's folder of a safetensors file: its parameters, no step, moments of zero.
    #[command(after_help = help::IMPORT)]
    Import(checkpoint::ImportArguments),
    /// Measure this machine, in about 10 seconds, and write machine.json for `ferrozero plan`.
    #[command(after_help = help::PROBE)]
    Probe(probe::ProbeArguments),
    /// Tell what fits and how fast it will be, without the model and without the machine.
    #[command(after_help = help::PLAN)]
    Plan(Box<plan::PlanArguments>),
    /// Explain a file of settings, or a configuration of DeepSpeed's; write the schema of settings.
    #[command(subcommand, after_help = help::CONFIG)]
    Config(config::Config),
    /// Write what a shell needs to complete this command line.
    #[command(after_help = help::COMPLETIONS)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages: of this program, and of each of its commands.
    #[command(after_help = help::MAN)]
    Man,
    /// Measure against a reference that runs in the same process.
    #[command(subcommand, after_help = help::BENCH)]
    Bench(bench::Bench),
}

/// Runs the command line of the process.
pub fn run() -> ExitCode {
    perform(CommandLine::parse().command)
}

/// Runs `ferrozero bench NAME` with the options of the process: a program of `cargo bench`, which adds `--bench`.
pub fn bench(name: &str) -> ExitCode {
    let options = std::env::args_os().skip(1).filter(|option| option != "--bench");
    let line = ["ferrozero", "bench", name].map(OsString::from).into_iter().chain(options);
    perform(CommandLine::parse_from(line).command)
}

fn perform(command: Command) -> ExitCode {
    ferrozero_offload::report_file_size_limit();
    let trains = matches!(command, Command::Train(_) | Command::Finetune(_));
    if !trains {
        // A reader that goes away ends a command, as it does with other programs. It is no reason to stop training.
        sigpipe::reset();
    }
    match observe().and_then(|()| execute(command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say_error(&advice::in_options(error.to_string()));
            if let Some(advice) = advice::advice(&*error) {
                output::say_next(advice);
            }
            ExitCode::FAILURE
        }
    }
}

/// Writes on standard error what the engine does, as far as `FERROZERO_LOG` asks for it.
fn observe() -> CommandResult {
    let Ok(filter) = std::env::var("FERROZERO_LOG") else { return Ok(()) };
    let filter = EnvFilter::try_new(&filter).map_err(|error| {
        configuration(format!("FERROZERO_LOG={filter}: {error}; write it as debug, or as ferrozero=trace"))
    })?;
    let is_coloured = anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_coloured);
    subscriber.with_writer(std::io::stderr).try_init().map_err(|error| error as _)
}

fn execute(command: Command) -> CommandResult {
    match command {
        Command::Train(arguments) => train::run(*arguments),
        Command::Finetune(arguments) => finetune::run(*arguments),
        Command::Generate(arguments) => pretrained::generate(*arguments),
        Command::Report(arguments) => report::run(arguments),
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
    }
}

fn manual() -> CommandResult {
    let mut command = CommandLine::command().disable_help_subcommand(true);
    // Names of commands are then those of their pages, as ferrozero-train.
    command.build();
    pages(&command, &mut std::io::stdout())
}

/// The page of a command, and behind it those of its own commands.
fn pages(command: &clap::Command, out: &mut dyn std::io::Write) -> CommandResult {
    clap_mangen::Man::new(command.clone()).render(out)?;
    command.get_subcommands().try_for_each(|command| pages(command, out))
}

/// Any error of a command.
type CommandResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn configuration(text: String) -> Error {
    Error::Configuration(text)
}
