//! Files in memory.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use super::{
    FileId, FileSpec, Io, OnDone, Request, Verb, Workers,
    fault::{FaultPlan, Script},
    progress::Progress,
};
use crate::{Error, Notice, locked};

/// An [`Io`] whose files are in memory and live as long as it does. Another store can be opened on the same
/// one. Of its operations only transfers can be made to fail.
#[derive(Debug)]
pub struct Mem {
    contents: Arc<Mutex<Contents>>,
    script: Arc<Script>,
    workers: Workers,
}

#[derive(Debug, Default)]
struct Contents {
    files: Vec<(FileSpec, Vec<u8>)>,
    documents: BTreeMap<String, Vec<u8>>,
}

impl Mem {
    /// No files yet. Transfers fail as `faults` says.
    pub fn new(faults: &FaultPlan) -> Result<Self, Error> {
        Self::over(Arc::new(Script::below(faults)))
    }

    pub(crate) fn over(script: Arc<Script>) -> Result<Self, Error> {
        Ok(Self { contents: Arc::default(), script, workers: Workers::spawn("ferrozero-mem", 1)? })
    }

    /// The same files with other faults, as when a directory is opened again.
    pub fn reopen(&self, faults: &FaultPlan) -> Result<Self, Error> {
        Ok(Self { contents: self.contents.clone(), ..Self::new(faults)? })
    }
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from(format!("memory:{name}"))
}

impl Io for Mem {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        let mut made = Vec::with_capacity(files.len());
        let needed_bytes = files.iter().map(|spec| spec.bytes).sum();
        let full = || Error::DiskFull { path: path_of(""), needed_bytes, available_bytes: 0 };
        for spec in files {
            let bytes = usize::try_from(spec.bytes).map_err(|_| full())?;
            let mut file = Vec::new();
            file.try_reserve_exact(bytes).map_err(|_| full())?;
            file.resize(bytes, 0);
            made.push((spec.clone(), file));
        }
        locked(&self.contents).files = made;
        Ok(())
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        let contents = locked(&self.contents);
        for (index, spec) in files.iter().enumerate() {
            let found_bytes = contents.files.get(index).map_or(0, |(_, bytes)| bytes.len() as u64);
            if found_bytes < spec.bytes {
                let path = path_of(&spec.name);
                return Err(Error::TruncatedFile { path, expected_bytes: spec.bytes, found_bytes });
            }
        }
        Ok(())
    }

    fn submit(&self, mut request: Request, on_done: OnDone) {
        let (contents, script) = (self.contents.clone(), self.script.clone());
        self.workers.run(move || {
            let result = transfer(&contents, &script, &mut request);
            on_done(request.complete(result));
        });
    }

    fn sync(&self, _file: FileId) -> Result<(), Error> {
        Ok(())
    }

    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        locked(&self.contents).documents.insert(name.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(locked(&self.contents).documents.get(name).cloned())
    }

    fn check_files(&self) -> Result<(), Error> {
        Ok(())
    }

    fn check_paths(&self) -> Result<(), Error> {
        Ok(())
    }

    fn path_of(&self, name: &str) -> PathBuf {
        path_of(name)
    }

    fn notices(&self) -> Vec<Notice> {
        Vec::new()
    }
}

fn transfer(contents: &Mutex<Contents>, script: &Script, request: &mut Request) -> Result<(), Error> {
    let mut contents = locked(contents);
    let mut nowhere = (FileSpec { name: String::new(), bytes: 0 }, Vec::new());
    let (spec, bytes) = contents.files.get_mut(request.file().0).unwrap_or(&mut nowhere);
    let verb = request.verb();
    let start = usize::try_from(request.offset_bytes()).unwrap_or(usize::MAX).min(bytes.len());
    let end = start.saturating_add(request.length_bytes()).min(bytes.len());
    let region = &mut bytes[start..end];
    let moved = Progress::new(verb, request.length_bytes()).run(|done_bytes| {
        let region = region.get_mut(done_bytes..).unwrap_or(&mut []);
        match verb {
            Verb::Read => request.buffer_mut()[done_bytes..][..region.len()].copy_from_slice(region),
            Verb::Write => region.copy_from_slice(&request.buffer()[done_bytes..][..region.len()]),
        }
        script.distort(verb, Ok(region.len()))
    });
    moved.map_err(|source| request.error(path_of(&spec.name), source))
}
