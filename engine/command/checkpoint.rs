//! `ferrozero inspect`, `verify`, `copy`, `export` and `import`: what can be done with a run's folder without its model.

use super::output::plain;
use super::{CommandResult, configuration};
use crate::disk::checkpoint::{Checkpoint, GroupSummary, Summary};
use crate::disk::import::import_safetensors;
use crate::planner::plan::Bytes;
use crate::schedule::buffer_plan::GroupPlacement;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::path::PathBuf;

/// A folder, and how to write about it.
#[derive(Debug, Clone, clap::Args)]
pub struct FolderArguments {
    /// Folder of a run
    dir: PathBuf,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

/// From a folder to a file.
#[derive(Debug, Clone, clap::Args)]
pub struct ExportArguments {
    /// Folder of a run
    dir: PathBuf,
    /// File to make
    #[arg(value_name = "OUT.safetensors")]
    file: PathBuf,
}

/// From a file to a folder.
#[derive(Debug, Clone, clap::Args)]
pub struct ImportArguments {
    /// File with parameters in F32, BF16 or F16
    #[arg(value_name = "IN.safetensors")]
    file: PathBuf,
    /// Folder to make; go on from it with `ferrozero train --resume --dir`
    dir: PathBuf,
}

/// From a folder to others.
#[derive(Debug, Clone, clap::Args)]
pub struct CopyArguments {
    /// Folder of a run
    dir: PathBuf,
    /// Folder to make
    #[arg(value_name = "NEW_DIR")]
    to: PathBuf,
    /// One more folder, on another disk, for a part of the new run's states; may be given several times
    #[arg(long, value_name = "DIR")]
    stripe: Vec<PathBuf>,
    /// Keep the new run's states once and not twice: a kill between two commits then loses them
    #[arg(long)]
    in_place: bool,
}

fn homes(homes: Option<GroupPlacement>) -> String {
    match homes {
        None => "none yet".into(),
        Some(GroupPlacement { master, first_moment, second_moment, .. })
            if master == first_moment && master == second_moment =>
        {
            master.to_string()
        }
        Some(GroupPlacement { master, first_moment, second_moment, .. }) => {
            format!("{master}, {first_moment}, {second_moment}")
        }
    }
}

/// Tells what is in a folder.
pub fn inspect(arguments: FolderArguments) -> CommandResult {
    let summary = Checkpoint::open(&arguments.dir)?.summary();
    if arguments.json {
        println!("{}", serde_json::to_string(&summary)?);
        return Ok(());
    }
    let Summary { generation, step, parameters, piece_bytes, disk_bytes, groups, .. } = summary;
    println!("commit {generation} of {}, after step {step}", arguments.dir.display());
    println!(
        "{:.1} M parameters in {} groups; files of {}, in pieces of {}\n",
        parameters as f64 / 1e6,
        groups.len(),
        Bytes(disk_bytes),
        Bytes(piece_bytes as u64)
    );
    println!(
        "{:<24}{:>8}{:>16}{:>12}  homes of parameters and moments",
        "group", "tensors", "parameters", "states"
    );
    for GroupSummary { name, tensors, parameters, bytes, homes: at } in &groups {
        // The folder may be a stranger's.
        let name = plain(name);
        println!("{name:<24}{tensors:>8}{parameters:>16}{:>12}  {}", Bytes(*bytes), homes(*at));
    }
    Ok(())
}

/// Reads everything and names what is damaged.
pub fn verify(arguments: FolderArguments) -> CommandResult {
    let checkpoint = Checkpoint::open(&arguments.dir)?;
    let bytes = checkpoint.state_bytes();
    let style =
        ProgressStyle::with_template("{bar:24} {bytes}/{total_bytes} {binary_bytes_per_sec} [{eta}]")?;
    let bar = ProgressBar::new(bytes).with_style(style);
    let damage = checkpoint.verify(|read_bytes| bar.inc(read_bytes))?;
    bar.finish_and_clear();
    if arguments.json {
        println!("{}", json!({ "bytes": bytes, "damage": damage }));
    }
    for piece in damage.iter().filter(|_| !arguments.json) {
        println!("damaged: {} (parameters {})", plain(&piece.error), plain(piece.parameters.join(", ")));
    }
    match damage.len() {
        0 if arguments.json => Ok(()),
        0 => {
            println!("{} of states are as the commit says", Bytes(bytes));
            Ok(())
        }
        count => Err(configuration(format!(
            "{}: {count} pieces are damaged; restore the folder from a copy, or start anew",
            arguments.dir.display()
        ))
        .into()),
    }
}

/// Writes the parameters to a file.
pub fn export(arguments: ExportArguments) -> CommandResult {
    let checkpoint = Checkpoint::open(&arguments.dir)?;
    checkpoint.export_safetensors(&arguments.file)?;
    let Summary { step, parameters, .. } = checkpoint.summary();
    println!("{}: {:.1} M parameters after step {step}", arguments.file.display(), parameters as f64 / 1e6);
    Ok(())
}

/// Makes another folder of the last commit.
pub fn copy(arguments: CopyArguments) -> CommandResult {
    let CopyArguments { dir, to, stripe, in_place } = arguments;
    Checkpoint::open(&dir)?.copy_to(&to, stripe, in_place)?;
    inspect(FolderArguments { dir: to, json: false })
}

/// Makes a checkpoint of a file.
pub fn import(arguments: ImportArguments) -> CommandResult {
    import_safetensors(&arguments.file, &arguments.dir)?;
    inspect(FolderArguments { dir: arguments.dir.clone(), json: false })?;
    println!("\ngo on with: ferrozero train --resume --dir {}", arguments.dir.display());
    Ok(())
}
