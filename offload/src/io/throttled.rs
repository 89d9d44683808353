//! A slower disk.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use super::{FileId, FileSpec, Io, OnDone, Request, Verb, Workers};
use crate::{Error, Notice, clock::Clock, locked};

/// The bandwidths of a slower disk. Whatever is given clones of it shares them, as stores on one disk do.
#[derive(Clone)]
pub struct Throttle(Arc<Lanes>);

struct Lanes {
    read: Lane,
    write: Lane,
}

/// One direction: a clock, and the thread that waits for it.
struct Lane {
    bytes_per_s: f64,
    clock: Arc<Mutex<Clock>>,
    worker: Workers,
}

impl Lane {
    fn new(name: &str, bytes_per_s: f64) -> Result<Self, Error> {
        let clock = Arc::new(Mutex::new(Clock::new(bytes_per_s)));
        Ok(Self { bytes_per_s, clock, worker: Workers::spawn(name, 1)? })
    }
}

impl Throttle {
    /// A disk with these bandwidths, in bytes a second.
    ///
    /// # Errors
    /// [`Error::Thread`] where the system gives no thread.
    pub fn new(read_bytes_per_s: f64, write_bytes_per_s: f64) -> Result<Self, Error> {
        Ok(Self(Arc::new(Lanes {
            read: Lane::new("ferrozero-slow-read", read_bytes_per_s)?,
            write: Lane::new("ferrozero-slow-write", write_bytes_per_s)?,
        })))
    }

    /// Bytes a second that are read.
    pub fn read_bytes_per_s(&self) -> f64 {
        self.0.read.bytes_per_s
    }

    /// Bytes a second that are written.
    pub fn write_bytes_per_s(&self) -> f64 {
        self.0.write.bytes_per_s
    }
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Throttle({} B/s, {} B/s)", self.read_bytes_per_s(), self.write_bytes_per_s())
    }
}

/// An [`Io`] whose transfers take at least their time on a slower disk.
pub struct Throttled {
    inner: Arc<dyn Io>,
    throttle: Throttle,
}

impl Throttled {
    /// Slows `inner` down.
    pub fn new(inner: Arc<dyn Io>, throttle: Throttle) -> Self {
        Self { inner, throttle }
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
            Verb::Read => &self.throttle.0.read,
            Verb::Write => &self.throttle.0.write,
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

    fn check_files(&self) -> Result<(), Error> {
        self.inner.check_files()
    }

    fn check_paths(&self) -> Result<(), Error> {
        self.inner.check_paths()
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.inner.path_of(name)
    }

    fn notices(&self) -> Vec<Notice> {
        self.inner.notices()
    }
}
