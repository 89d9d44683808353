//! `stripe.json`: whose the directories of a store of several are.
//!
//! Before the first commit of such a store each of its directories gets one, the own directory first. A
//! directory with one, or with a manifest, is not taken for another store. There is one exception: a first
//! commit that was cut off after these notes and before the manifest has committed nothing, and the same
//! store may be made again. What tells that from a store that was moved to another place, and still needs its
//! stripes, is the note in the own directory: it would have moved along.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{layout::Form, manifest};
use crate::{Error, io::Io};

const NAME: &str = "stripe.json";

/// The directories of a store, its own first. That one has no name, as its files have none but their own.
fn directories(form: &Form) -> impl Iterator<Item = PathBuf> {
    std::iter::once(PathBuf::new()).chain(form.stripes.iter().cloned())
}

fn document(directory: &Path, name: &str) -> String {
    directory.join(name).to_string_lossy().into_owned()
}

/// The manifest of the store by its one absolute name, as it is in the notes.
fn manifest_path(io: &dyn Io) -> PathBuf {
    let own = io.path_of("");
    own.canonicalize().unwrap_or(own).join(manifest::NAME)
}

/// Refuses directories that hold a commit or a part of one.
///
/// # Errors
/// [`Error::AlreadyCommitted`] with the directory, or what the file system answers.
pub(super) fn refuse_taken(io: &dyn Io, form: &Form) -> Result<(), Error> {
    let manifest = Value::from(manifest_path(io).to_string_lossy());
    let mut was_cut_off = false;
    for (number, directory) in directories(form).enumerate() {
        let is_committed = io.load_document(&document(&directory, manifest::NAME))?.is_some();
        let note = io.load_document(&document(&directory, NAME))?;
        let is_of_others = note.as_ref().is_some_and(|note| {
            let note = serde_json::from_slice::<Value>(note).unwrap_or_default();
            note["manifest"] != manifest || (number > 0 && !was_cut_off)
        });
        if is_committed || is_of_others {
            // By its components, since the own directory's empty name leaves a separator at the end.
            let directory = io.path_of(&directory.to_string_lossy()).components().collect();
            return Err(Error::AlreadyCommitted { directory });
        }
        was_cut_off |= number == 0 && note.is_some();
    }
    Ok(())
}

/// Notes in the directories of a store of several whose they are.
pub(super) fn note(io: &dyn Io, form: &Form) -> Result<(), Error> {
    if form.stripes.is_empty() {
        return Ok(());
    }
    for (number, directory) in directories(form).enumerate() {
        let note = serde_json::json!({ "manifest": manifest_path(io).to_string_lossy(), "stripe": number });
        io.save_document(&document(&directory, NAME), note.to_string().as_bytes())?;
    }
    Ok(())
}

/// Refuses directories that a manifest names and that are those of another store, which would be overwritten.
///
/// # Errors
/// [`Error::ForeignStripe`], or what the file system answers.
pub(super) fn refuse_foreign(io: &dyn Io, form: &Form) -> Result<(), Error> {
    let own = manifest_path(io);
    for directory in &form.stripes {
        let foreign = |owner: PathBuf| {
            let (directory, manifest) = (directory.clone(), io.path_of(manifest::NAME));
            Err(Error::ForeignStripe { directory, manifest, owner })
        };
        if io.load_document(&document(directory, manifest::NAME))?.is_some() {
            return foreign(directory.join(manifest::NAME));
        }
        let note = io.load_document(&document(directory, NAME))?.unwrap_or_default();
        let note = serde_json::from_slice::<Value>(&note).unwrap_or_default();
        let owner = note["manifest"].as_str().map(PathBuf::from);
        // The own directory may have been moved: then nothing is where it was.
        if let Some(owner) = owner.filter(|owner| is_another(owner, &own)) {
            return foreign(owner);
        }
    }
    Ok(())
}

/// Whether a file is there and is another one, whatever both are called.
fn is_another(path: &Path, own: &Path) -> bool {
    let identity = |path: &Path| path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()));
    identity(path).is_some_and(|found| identity(own) != Some(found))
}
