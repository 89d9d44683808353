//! A slower disk.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use super::{FileId, FileSpec, Io, OnDone, Request, Verb, Workers};
use crate::{Error, Notice, clock::Clock, locked};

/// An [`Io`] whose transfers take at least the time of a given bandwidth in each direction.
pub struct Throttled {
    inner: Arc<dyn Io>,
    read: Lane,
    write: Lane,
}

/// One direction: a clock, and the thread that waits for it.
struct Lane {
    clock: Arc<Mutex<Clock>>,
    worker: Workers,
}

impl Throttled {
    /// Slows `inner` down to these bandwidths, in bytes a second.
    pub fn new(inner: Arc<dyn Io>, read_bytes_per_s: f64, write_bytes_per_s: f64) -> Result<Self, Error> {
        let lane = |name, bytes_per_s| -> Result<Lane, Error> {
            let clock = Arc::new(Mutex::new(Clock::new(bytes_per_s)));
            Ok(Lane { clock, worker: Workers::spawn(name, 1)? })
        };
        Ok(Self {
            inner,
            read: lane("ferrozero-slow-read", read_bytes_per_s)?,
            write: lane("ferrozero-slow-write", write_bytes_per_s)?,
        })
    }
}

impl Io for Throttled {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.inner.allocate_files(files)
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.inner.open_files(files)
    }

    fn submit(&self, request: Request, on_done: OnDone) {
        let lane = match request.verb() {
            Verb::Read => &self.read,
            Verb::Write => &self.write,
        };
        let (inner, clock) = (self.inner.clone(), lane.clock.clone());
        lane.worker.run(move || {
            locked(&clock).wait_for(request.length_bytes());
            inner.submit(request, on_done);
        });
    }

    fn sync(&self, file: FileId) -> Result<(), Error> {
        self.inner.sync(file)
    }

    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.inner.save_document(name, bytes)
    }

    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.inner.load_document(name)
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.inner.path_of(name)
    }

    fn notices(&self) -> Vec<Notice> {
        self.inner.notices()
    }
}
