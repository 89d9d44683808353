//! Failures by a script, so that every error path can be walked.
//!
//! What a system answers (broken disk, full disk, interrupted, fewer bytes than asked for) is injected below
//! a backend, in the place of its system calls, so that it passes through all that the backend does about it.
//! Damage that nobody reports (flipped bit, lost write) is injected above it, by [`Faulty`].

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Completion, FileId, FileSpec, Io, OnDone, Request, Verb, progress::retried};
use crate::{Error, Notice};

/// What a fault interferes with. Damage that nobody reports counts verbs of [`Io`], all else counts system
/// calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// Making the files, and directories for them.
    Allocate,
    /// Opening the files.
    Open,
    /// A read.
    Read,
    /// A write.
    Write,
    /// Making a file's data durable, a new document's too.
    Sync,
    /// Reading a document.
    LoadDocument,
    /// Writing a new document, before the old one is touched.
    SaveDocument,
    /// Putting the new document in the old one's place.
    Rename,
    /// Making that durable: the new document is in place when this fails.
    SyncDirectory,
}

const POINTS: usize = 9;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The device reports an error (`EIO`).
    InputOutput,
    /// The file system is full (`ENOSPC`).
    NoSpace,
    /// This process may not (`EACCES`).
    NoPermission,
    /// A signal came (`EINTR`); transient.
    Interrupted,
    /// The system asks to try again (`EAGAIN`); transient.
    Again,
    /// The call moves fewer bytes than it was asked for; transient.
    Short {
        /// Most bytes that it moves. With 0 it says that the file has ended, which no backend rides out.
        bytes: usize,
    },
    /// One bit of the bytes moved is wrong and nobody says so.
    BitFlip {
        /// Which one, counted modulo the bits of the request.
        bit: usize,
    },
    /// Nothing is moved and success is reported: a lost write, or a read that left old bytes in the buffer.
    Stale,
    /// The bytes beside those asked for are moved, and nobody says so.
    Misplaced,
    /// The process ends at the system call, as if it had been killed.
    Kill,
}

impl FaultKind {
    /// Whether the transfer reports success and is none.
    fn is_silent(self) -> bool {
        matches!(self, FaultKind::BitFlip { .. } | FaultKind::Stale | FaultKind::Misplaced)
    }

    fn os_error(self) -> Option<io::Error> {
        let code = match self {
            FaultKind::InputOutput => libc::EIO,
            FaultKind::NoSpace => libc::ENOSPC,
            FaultKind::Interrupted => libc::EINTR,
            FaultKind::Again => libc::EAGAIN,
            FaultKind::NoPermission => libc::EACCES,
            FaultKind::Short { .. } | FaultKind::BitFlip { .. } => return None,
            FaultKind::Stale | FaultKind::Misplaced | FaultKind::Kill => return None,
        };
        Some(io::Error::from_raw_os_error(code))
    }
}

/// One failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it interferes with.
    pub point: FaultPoint,
    /// Which operation of that kind, counted from 0.
    pub nth: u64,
    /// What goes wrong.
    pub kind: FaultKind,
}

/// All failures of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan(pub Vec<Fault>);

/// A plan under way: which operation of each kind is next.
#[derive(Debug, Default)]
pub(crate) struct Script {
    faults: Vec<Fault>,
    counts: [AtomicU64; POINTS],
}

impl Script {
    /// What a system answers: the faults of a plan below a backend.
    pub(crate) fn below(plan: &FaultPlan) -> Self {
        Self::of(plan, |kind| !kind.is_silent())
    }

    /// What nobody reports: the faults of a plan above a backend.
    fn above(plan: &FaultPlan) -> Self {
        Self::of(plan, FaultKind::is_silent)
    }

    fn of(plan: &FaultPlan, wanted: impl Fn(FaultKind) -> bool) -> Self {
        let faults = plan.0.iter().copied().filter(|fault| wanted(fault.kind)).collect();
        Self { faults, counts: Default::default() }
    }

    /// Counts one operation and says what is to go wrong with it.
    fn next(&self, point: FaultPoint) -> Option<FaultKind> {
        if self.faults.is_empty() {
            return None;
        }
        let nth = self.counts[point as usize].fetch_add(1, Ordering::SeqCst);
        let fault = self.faults.iter().find(|fault| fault.point == point && fault.nth == nth)?;
        if fault.kind == FaultKind::Kill {
            std::process::abort();
        }
        Some(fault.kind)
    }

    /// The result of a system call that transfers, made worse if the script says so.
    pub(crate) fn distort(&self, verb: Verb, result: io::Result<usize>) -> io::Result<usize> {
        self.distort_at(point_of(verb), result)
    }

    fn distort_at(&self, point: FaultPoint, result: io::Result<usize>) -> io::Result<usize> {
        match self.next(point) {
            None => result,
            Some(FaultKind::Short { bytes }) => result.map(|moved_bytes| moved_bytes.min(bytes)),
            Some(kind) => kind.os_error().map_or(result, Err),
        }
    }

    /// A system call that transfers bytes of a document.
    pub(crate) fn transfer(
        &self,
        point: FaultPoint,
        path: &Path,
        call: impl FnOnce() -> io::Result<usize>,
    ) -> io::Result<usize> {
        record(point, path);
        self.distort_at(point, call())
    }

    /// A system call that moves no bytes, until it is no longer interrupted. The script's failure comes in
    /// its place.
    pub(crate) fn call<T>(
        &self,
        point: FaultPoint,
        path: &Path,
        call: impl Fn() -> io::Result<T>,
    ) -> io::Result<T> {
        retried(|| {
            if let Some(error) = self.next(point).and_then(FaultKind::os_error) {
                return Err(error);
            }
            record(point, path);
            call()
        })
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_directory(&self, path: &Path) -> Result<(), Error> {
        let sync = || File::open(path).and_then(|directory| directory.sync_all());
        let synced = self.call(FaultPoint::SyncDirectory, path, sync);
        synced.map_err(|source| Error::File { operation: "sync", path: path.to_owned(), source })
    }
}

fn point_of(verb: Verb) -> FaultPoint {
    match verb {
        Verb::Read => FaultPoint::Read,
        Verb::Write => FaultPoint::Write,
    }
}

/// An [`Io`] that damages silently what a plan says, and otherwise passes everything on.
pub struct Faulty {
    inner: Arc<dyn Io>,
    script: Script,
}

impl Faulty {
    /// Injects the silent faults of `plan`. Give the plan to the backend itself too, for all others.
    pub fn new(inner: Arc<dyn Io>, plan: &FaultPlan) -> Self {
        Self { inner, script: Script::above(plan) }
    }
}

impl Io for Faulty {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.inner.allocate_files(files)
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.inner.open_files(files)
    }

    fn submit(&self, mut request: Request, on_done: OnDone) {
        let verb = request.verb();
        let Some(kind) = self.script.next(point_of(verb)) else { return self.inner.submit(request, on_done) };
        match (kind, verb) {
            (FaultKind::BitFlip { bit }, Verb::Read) => {
                let length_bytes = request.length_bytes();
                let damaged = move |mut done: Completion| {
                    flip(&mut done.lease.padded_mut()[..length_bytes], bit);
                    on_done(done);
                };
                self.inner.submit(request, Box::new(damaged));
            }
            (FaultKind::BitFlip { bit }, Verb::Write) => {
                // Damaged on its way only: the writer's own buffer is right again at the end.
                let length_bytes = request.length_bytes();
                flip(request.buffer_mut(), bit);
                let repaired = move |mut done: Completion| {
                    flip(&mut done.lease.padded_mut()[..length_bytes], bit);
                    on_done(done);
                };
                self.inner.submit(request, Box::new(repaired));
            }
            (FaultKind::Misplaced, _) => {
                let length_bytes = request.length_bytes as u64;
                let before = request.offset_bytes.checked_sub(length_bytes);
                request.offset_bytes = before.unwrap_or(request.offset_bytes.saturating_add(length_bytes));
                self.inner.submit(request, on_done);
            }
            _ => on_done(request.complete(Ok(()))),
        }
    }

    fn sync(&self, file: FileId) -> Result<(), Error> {
        match self.script.next(FaultPoint::Sync) {
            Some(FaultKind::Stale) => Ok(()),
            _ => self.inner.sync(file),
        }
    }

    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        match self.script.next(FaultPoint::SaveDocument) {
            Some(FaultKind::BitFlip { bit }) => {
                let mut damaged = bytes.to_vec();
                flip(&mut damaged, bit);
                self.inner.save_document(name, &damaged)
            }
            Some(FaultKind::Stale) => Ok(()),
            _ => self.inner.save_document(name, bytes),
        }
    }

    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let silent = self.script.next(FaultPoint::LoadDocument);
        let mut document = self.inner.load_document(name)?;
        if let (Some(FaultKind::BitFlip { bit }), Some(bytes)) = (silent, &mut document) {
            flip(bytes, bit);
        }
        Ok(document)
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

fn flip(bytes: &mut [u8], bit: usize) {
    let bit = bit % (bytes.len() * 8).max(1);
    if let Some(byte) = bytes.get_mut(bit / 8) {
        *byte ^= 1 << (bit % 8);
    }
}

#[cfg(not(test))]
fn record(_point: FaultPoint, _path: &Path) {}

#[cfg(test)]
use journal::record;

/// The system calls of a thread on files and directories, in order, for tests of what must come before what.
#[cfg(test)]
pub(crate) mod journal {
    use super::{FaultPoint, Path, PathBuf};
    use std::cell::RefCell;

    /// What was done, and with which file or directory: of a rename, the new name.
    pub(crate) type Call = (FaultPoint, PathBuf);

    thread_local! {
        static CALLS: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn record(point: FaultPoint, path: &Path) {
        CALLS.with_borrow_mut(|calls| calls.push((point, path.to_owned())));
    }

    /// The calls since the last time.
    pub(crate) fn take() -> Vec<Call> {
        CALLS.take()
    }
}
