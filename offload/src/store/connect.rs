//! What a store stands on: its directories, and the backend that moves its bytes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{BackendChoice, StoreOptions};
use crate::{
    Error, Folder, Notice,
    io::{Directory, Faulty, Io, Mem, Pool, Purpose, Script, Throttled, Uring, make_directory, sync_entry},
};

/// A backend in its wrappers.
pub(super) struct Connected {
    pub(super) io: Arc<dyn Io>,
    pub(super) notices: Vec<Notice>,
    pub(super) folder: Option<Arc<Folder>>,
}

impl Connected {
    pub(super) fn over(io: Arc<dyn Io>) -> Self {
        Self { io, notices: Vec::new(), folder: None }
    }
}

/// The backend that the options ask for.
pub(super) fn connect(
    path: &Path,
    purpose: Purpose,
    options: &StoreOptions,
    script: Arc<Script>,
) -> Result<Connected, Error> {
    let mut notices = Vec::new();
    let mut folder = None;
    let mut open = |script| {
        let directory = Directory::open(path, purpose, script)?;
        folder = Some(directory.folder().clone());
        Ok::<_, Error>(Arc::new(directory))
    };
    let mut io: Arc<dyn Io> = match options.backend {
        BackendChoice::Memory => Arc::new(Mem::over(script)?),
        BackendChoice::Pool => Arc::new(Pool::over(open(script)?)?),
        BackendChoice::Uring => Arc::new(Uring::over(open(script)?)?),
        BackendChoice::Auto => {
            let directory = open(script)?;
            match Uring::over(directory.clone()) {
                Ok(uring) => Arc::new(uring),
                Err(error) => {
                    let text = format!("{error}; the disk is used through a pool of threads");
                    notices.push(Notice::new("uring-unavailable", text));
                    Arc::new(Pool::over(directory)?)
                }
            }
        }
    };
    if let Some(faults) = &options.faults {
        io = Arc::new(Faulty::new(io, faults));
    }
    if let Some(throttle) = &options.throttle {
        io = Arc::new(Throttled::new(io, throttle.clone()));
    }
    Ok(Connected { io, notices, folder })
}

/// Directories that were made for a store; removed again, if nothing else was put there, unless they are
/// kept.
pub(super) struct MadeDirectories {
    script: Arc<Script>,
    made: Vec<Folder>,
}

impl MadeDirectories {
    pub(super) fn new(script: Arc<Script>) -> Self {
        Self { script, made: Vec::new() }
    }

    /// Makes a directory, with those above it, if it is not there yet and may be made, and answers its one
    /// absolute name. A power loss does not take it away any more.
    pub(super) fn ensure(&mut self, path: &Path, makes: bool) -> Result<PathBuf, Error> {
        let is_missing = |path: &&Path| makes && !path.as_os_str().is_empty() && !path.exists();
        let missing: Vec<_> = path.ancestors().take_while(is_missing).collect();
        for directory in missing.into_iter().rev() {
            if make_directory(&self.script, directory)? {
                let made = Folder::open(directory);
                let failed = |source| Error::File { operation: "open", path: directory.to_owned(), source };
                self.made.push(made.map_err(failed)?);
                sync_entry(&self.script, directory)?;
            }
        }
        path.canonicalize().map_err(|source| Error::File { operation: "make", path: path.to_owned(), source })
    }

    pub(super) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            let _ = folder.unlink(".lock");
            let _ = fs::remove_dir(folder.path());
        }
    }
}

/// A directory that is named more than once.
pub(super) fn duplicate<'a>(directory: &'a Path, stripes: &'a [PathBuf]) -> Option<&'a Path> {
    let mut seen = vec![directory];
    stripes.iter().map(PathBuf::as_path).find(|stripe| {
        let is_known = seen.contains(stripe);
        seen.push(stripe);
        is_known
    })
}
