//! How settings come together: defaults, then a resumed run's, then a file's, then the command line's.

use super::super::output::Output;
use super::super::{CommandResult, configuration, deepspeed};
use super::{RunArguments, RunSettings};
use crate::Engine;
use crate::error::{Error, Result};
use crate::observe::run_log;
use clap::Args;
use ferrozero_offload::{Folder, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A file as it is, JSON or, by its name, TOML.
///
/// # Errors
/// [`Error::File`], and [`Error::Configuration`] with line and column of what cannot be read.
pub fn read_document(path: &Path) -> Result<Value> {
    document(&read_text(path)?, path)
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

fn document(text: &str, path: &Path) -> Result<Value> {
    let wrong =
        |kind: &str, error: String| configuration(format!("{} is not valid {kind}: {error}", path.display()));
    match path.extension().is_some_and(|extension| extension == "toml") {
        true => toml::from_str(text).map_err(|error| wrong("TOML", error.to_string())),
        false => serde_json::from_str(text).map_err(|error| wrong("JSON", error.to_string())),
    }
}

/// Settings of a command that trains: its own beside a [`RunSettings`], in one object.
pub trait Settings: Default + Serialize + DeserializeOwned + schemars::JsonSchema {
    /// The options of its command.
    type Arguments: clap::Args;

    /// Those that it shares with others.
    fn run(&self) -> &RunSettings;

    /// Refuses what cannot be.
    ///
    /// # Errors
    /// [`Error::Configuration`] naming it.
    fn check(&self) -> Result<()>;

    /// The settings of a file, over the defaults.
    ///
    /// # Errors
    /// As `resolve`.
    fn from_file(path: &Path) -> Result<Self> {
        resolve(&Value::Null, Some(path), None)
    }

    /// The settings of a text that would be in a file of this name, over the defaults.
    ///
    /// # Errors
    /// [`Error::Configuration`].
    fn from_text(text: &str, name: &Path) -> Result<Self> {
        resolve(&Value::Null, None, Some(settings_of::<Self>(text, name)?))
    }
}

fn to_value(settings: &impl Serialize) -> Result<Value> {
    serde_json::to_value(settings).map_err(|error| configuration(error.to_string()))
}

/// Puts the members of `upper` over those of `lower`, and those of groups over those of the same groups.
fn overlay(lower: &mut Value, upper: Value) {
    let (Value::Object(lower), Value::Object(upper)) = (lower, upper) else { return };
    for (key, upper) in upper {
        match lower.get_mut(&key).filter(|lower| lower.is_object() && upper.is_object()) {
            Some(lower) => overlay(lower, upper),
            None => drop(lower.insert(key, upper)),
        }
    }
}

/// Reads settings, of which those that are missing have their defaults.
fn parse<S: Settings>(value: Value) -> Result<S> {
    let known = to_value(&S::default())?;
    if let (Value::Object(found), Value::Object(known)) = (&value, &known)
        && let Some(key) = found.keys().find(|key| !known.contains_key(*key))
    {
        let known: Vec<_> = known.keys().map(|key| format!("`{key}`")).collect();
        return Err(configuration(format!("unknown field `{key}`, expected one of {}", known.join(", "))));
    }
    serde_json::from_value(value).map_err(|error| configuration(error.to_string()))
}

/// The settings in a file, which may be a configuration of DeepSpeed's.
fn read_file<S: Settings>(path: &Path) -> Result<Value> {
    settings_of::<S>(&read_text(path)?, path)
}

fn settings_of<S: Settings>(text: &str, path: &Path) -> Result<Value> {
    let mut value = document(text, path)?;
    let of_file = |error: Error| configuration(format!("{}: {error}", path.display()));
    if deepspeed::is_deepspeed(&value) {
        value = Value::Object(deepspeed::map(&value).map_err(of_file)?.settings);
    }
    // Checked on its own, so that an error is known to be the file's.
    parse::<S>(value.clone()).map_err(of_file)?;
    Ok(value)
}

/// Brings the layers together. `arguments` are those of the command line, null where none was given, and `resumed` the settings
/// of the run that is resumed.
///
/// # Errors
/// [`Error::Configuration`] and [`Error::File`].
pub fn resolve<S: Settings>(
    arguments: &impl Serialize,
    config: Option<&Path>,
    resumed: Option<Value>,
) -> Result<S> {
    let mut value = to_value(&S::default())?;
    overlay(&mut value, resumed.unwrap_or_default());
    if let Some(path) = config {
        overlay(&mut value, read_file::<S>(path)?);
    }
    let mut given = to_value(arguments)?;
    if let Value::Object(given) = &mut given {
        let is_given = |value: &Value| !(value.is_null() || value.as_array().is_some_and(Vec::is_empty));
        given.retain(|_, value| is_given(value));
    }
    overlay(&mut value, given);
    let settings: S = parse(value)?;
    settings.check()?;
    Ok(settings)
}

/// Settings of a command that trains.
pub struct Resolved<S> {
    pub settings: S,
    /// What the commit that it goes on from says of its run: null where it begins.
    pub committed: Value,
    /// Whether there is such a commit.
    pub resumes: bool,
}

/// The settings of a command. A run that is to be resumed and ended before its first commit starts from the
/// beginning, and that is said.
///
/// # Errors
/// As [`resolve`], those of the commit, and [`Error::Configuration`] for a folder of another kind.
pub fn resolve_run<S: Settings>(
    arguments: &impl Serialize,
    run: &RunArguments,
    output: &Output,
) -> CommandResult<Resolved<S>> {
    let config = run.config.as_deref();
    let begins = || -> CommandResult<Resolved<S>> {
        let settings = resolve(arguments, config, None)?;
        Ok(Resolved { settings, committed: Value::Null, resumes: false })
    };
    if !run.resume {
        return begins();
    }
    // The folder, before a checkpoint in it is known.
    let folder = match &run.dir {
        Some(dir) => dir.clone(),
        None => {
            let from_file = config.map(read_file::<S>).transpose()?.unwrap_or_default();
            from_file["dir"].as_str().map_or_else(|| S::default().run().dir.clone(), PathBuf::from)
        }
    };
    // Before anything is opened, because that makes a lock in the folder.
    refuse_other_contents(&folder)?;
    let committed = match Engine::committed(&folder) {
        Err(Error::Offload(ferrozero_offload::Error::NoCommit { .. })) => {
            output.say(format_args!(
                "notice: {} holds no commit yet: the run starts from the beginning",
                folder.display()
            ));
            return begins();
        }
        committed => committed?,
    };
    let mut stored = committed.get("settings").cloned();
    if let Some(Value::Object(stored)) = &mut stored {
        // The folder is the one that was found, whatever it was called when the commit was made.
        stored.remove("dir");
    }
    let settings = resolve(arguments, config, stored)?;
    Ok(Resolved { settings, committed, resumes: true })
}

/// Refuses a folder that has something in it and nothing of a run: its name may be a mistake.
fn refuse_other_contents(path: &Path) -> Result<()> {
    let names = match Folder::open(path).and_then(|folder| folder.names()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        names => names.map_err(|source| Error::File { path: path.to_owned(), source })?,
    };
    // What a run has before its states.
    let early = [".lock", run_log::FILE];
    let is_of_run =
        |name: &OsString| Store::is_name_of_states(name) || early.iter().any(|early| name == early);
    match names.iter().find(|name| !is_of_run(name)) {
        Some(name) if !names.iter().any(|name| Store::is_name_of_states(name)) => {
            Err(configuration(format!(
                "--resume: {} holds no run, but {}: choose the folder of the run with --dir, or leave --resume out",
                path.display(),
                name.display()
            )))
        }
        _ => Ok(()),
    }
}

/// The JSON schema of a file of settings. A setting is described as the option of its name is, which has the words already.
///
/// # Errors
/// None that this program can cause.
pub fn schema<S: Settings>() -> Result<Value> {
    let mut schema = schemars::schema_for!(S).to_value();
    let defaults = to_value(&S::default())?;
    let options = S::Arguments::augment_args(clap::Command::new(""));
    for (key, property) in schema["properties"].as_object_mut().into_iter().flatten() {
        // Those of the command, where the shared ones have others.
        property["default"] = defaults[key].clone();
        let option = options.get_arguments().find(|option| option.get_id() == key.as_str());
        if let Some(help) = option.and_then(clap::Arg::get_help) {
            property["description"] = help.to_string().into();
        }
    }
    schema["additionalProperties"] = false.into();
    Ok(schema)
}

/// Adds to the help of a command's options what they are if none is given.
pub fn with_defaults<S: Settings>(command: clap::Command) -> clap::Command {
    let defaults = to_value(&S::default()).unwrap_or_default();
    command.mut_args(|argument| {
        let default = match defaults.get(argument.get_id().as_str()) {
            Some(Value::String(text)) => text.clone(),
            Some(number @ Value::Number(_)) => number.to_string(),
            _ => return argument,
        };
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        argument.help(format!("{help} [default: {default}]"))
    })
}
