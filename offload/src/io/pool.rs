//! Threads that read and write one request at a time.

use std::{io, os::unix::fs::FileExt, path::Path, path::PathBuf, sync::Arc};

use super::{
    FileId, FileSpec, Io, OnDone, Request, Verb, Workers,
    directory::{Directory, Purpose},
    fault::{FaultPlan, Script},
    progress::Progress,
};
use crate::{Error, Notice};

/// Enough to keep a NVMe drive busy with requests of some MiB.
const THREADS: usize = 4;

/// An [`Io`] of `pread` and `pwrite` on a few threads: works everywhere.
#[derive(Debug)]
pub struct Pool {
    directory: Arc<Directory>,
    workers: Workers,
}

impl Pool {
    /// Locks `directory`, which must exist. System calls fail as `faults` says.
    pub fn new(directory: &Path, faults: &FaultPlan) -> Result<Self, Error> {
        Self::over(Arc::new(Directory::open(directory, Purpose::Write, Arc::new(Script::below(faults)))?))
    }

    pub(crate) fn over(directory: Arc<Directory>) -> Result<Self, Error> {
        Ok(Self { directory, workers: Workers::spawn("ferrozero-pool", THREADS)? })
    }
}

impl Io for Pool {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.directory.allocate_files(files)
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.directory.open_files(files)
    }

    fn submit(&self, mut request: Request, on_done: OnDone) {
        let directory = self.directory.clone();
        self.workers.run(move || {
            let result = transfer(&directory, &mut request);
            on_done(request.complete(result));
        });
    }

    fn sync(&self, file: FileId) -> Result<(), Error> {
        self.directory.sync(file)
    }

    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.directory.save_document(name, bytes)
    }

    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.directory.load_document(name)
    }

    fn check_files(&self) -> Result<(), Error> {
        self.directory.check_files()
    }

    fn check_paths(&self) -> Result<(), Error> {
        self.directory.check_paths()
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.directory.path_of(name)
    }

    fn notices(&self) -> Vec<Notice> {
        self.directory.notices()
    }
}

fn transfer(directory: &Directory, request: &mut Request) -> Result<(), Error> {
    let open = directory.file(request.file())?;
    let (verb, offset_bytes) = (request.verb(), request.offset_bytes());
    let progress = Progress::new(verb, request.length_bytes());
    let moved: io::Result<()> = progress.run(|done_bytes| {
        let at = offset_bytes + done_bytes as u64;
        let result = match verb {
            Verb::Read => open.file.read_at(&mut request.buffer_mut()[done_bytes..], at),
            Verb::Write => open.file.write_at(&request.buffer()[done_bytes..], at),
        };
        directory.script().distort(verb, result)
    });
    moved.map_err(|source| request.error(open.path.clone(), source))
}
