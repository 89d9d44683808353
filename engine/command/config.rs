//! `ferrozero config`: what a file of settings means, and what a file may hold.

use super::settings::{Settings, read_document, schema};
use super::{CommandResult, FinetuneSettings, TrainSettings, deepspeed};
use std::path::{Path, PathBuf};

/// What can be asked of settings.
#[derive(Debug, clap::Subcommand)]
pub enum Config {
    /// Tell what each key of a file means here: a file of settings, or a ds_config.json of DeepSpeed's.
    Explain {
        /// JSON or TOML
        file: PathBuf,
        /// The command that it is for
        #[arg(long = "for", value_enum, default_value_t)]
        command: Trains,
    },
    /// Write the JSON schema of a file of settings.
    Schema {
        /// The command that it is for
        #[arg(long = "for", value_enum, default_value_t)]
        command: Trains,
    },
}

/// A command that trains.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub enum Trains {
    #[default]
    Train,
    Finetune,
}

/// Tells.
pub fn run(config: Config) -> CommandResult {
    match config {
        Config::Schema { command } => {
            let schema = match command {
                Trains::Train => schema::<TrainSettings>()?,
                Trains::Finetune => schema::<FinetuneSettings>()?,
            };
            println!("{}", serde_json::to_string_pretty(&schema)?);
            Ok(())
        }
        Config::Explain { file, command: Trains::Train } => explain::<TrainSettings>(&file, "train"),
        Config::Explain { file, command: Trains::Finetune } => {
            explain::<FinetuneSettings>(&file, "finetune MODEL")
        }
    }
}

fn explain<S: Settings>(file: &Path, command: &str) -> CommandResult {
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
        // What each key means is told before one of the values is refused.
        S::from_file(file)?;
        println!("\nnext: ferrozero {command} --config {}", file.display());
        return Ok(());
    }
    let settings = S::from_file(file)?;
    println!("{}: settings of ferrozero; those that it leaves out have their defaults", file.display());
    println!("{}", serde_json::to_string_pretty(&settings)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect_described(schema: &serde_json::Value) {
        let groups = [&schema["properties"], &schema["$defs"]["Overrides"]["properties"]];
        for settings in groups {
            let settings = settings.as_object().unwrap();
            assert!(settings.len() > 8);
            for (name, setting) in settings {
                let description = setting["description"].as_str();
                assert!(description.is_some_and(|text| text.len() > 8), "{name}: {setting}");
            }
        }
        let warmup = schema["properties"]["warmup"]["description"].as_str();
        assert!(warmup.unwrap().contains("learning rate rises"));
    }

    #[test]
    fn every_setting_is_described() {
        expect_described(&schema::<TrainSettings>().unwrap());
        expect_described(&schema::<FinetuneSettings>().unwrap());
    }
}
