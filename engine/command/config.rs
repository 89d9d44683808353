//! `ferrozero config`: what a file of settings means, and what a file may hold.

use super::settings::{TrainSettings, read_document};
use super::{CommandResult, deepspeed};
use std::path::PathBuf;

/// What can be asked of settings.
#[derive(Debug, clap::Subcommand)]
pub enum Config {
    /// Tell what each key of a file means here: a file of settings, or a ds_config.json of DeepSpeed's.
    Explain {
        /// JSON or TOML
        file: PathBuf,
    },
    /// Write the JSON schema of a file of settings.
    Schema,
}

/// Tells.
pub fn run(config: Config) -> CommandResult {
    match config {
        Config::Schema => {
            println!("{}", serde_json::to_string_pretty(&schemars::schema_for!(TrainSettings))?);
            Ok(())
        }
        Config::Explain { file } => explain(&file),
    }
}

fn explain(file: &std::path::Path) -> CommandResult {
    let document = read_document(file)?;
    if deepspeed::is_deepspeed(&document) {
        let mapping = deepspeed::map(&document)
            .map_err(|error| super::configuration(format!("{}: {error}", file.display())))?;
        println!("{}: a configuration of DeepSpeed's", file.display());
        let width = mapping.notes.iter().map(|note| note.path.len()).max().unwrap_or(0);
        for note in &mapping.notes {
            println!("  {:<width$}  {}", note.path, note.meaning);
        }
        println!("\nas settings of ferrozero:");
        println!("{}", serde_json::to_string_pretty(&mapping.settings)?);
        println!("\nnext: ferrozero train --config {}", file.display());
        return Ok(());
    }
    let settings = TrainSettings::of_file(file)?;
    println!("{}: settings of ferrozero; those that it leaves out have their defaults", file.display());
    println!("{}", serde_json::to_string_pretty(&settings)?);
    Ok(())
}
