//! Failures by a script, so that every error path can be walked.
//!
//! Failures that a backend must ride out (interrupted, try again, short transfer) are injected below it, at its
//! system calls. Failures that it must report or that nobody reports (broken disk, full disk, flipped bit, lost write)
//! are injected above it, by [`Faulty`].

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Completion, FileId, FileSpec, Io, OnDone, Request, Verb};
use crate::{Error, Notice};

/// What a fault interferes with. Transient kinds count system calls, the others count verbs of [`Io`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// Making the files.
    Allocate,
    /// Opening the files.
    Open,
    /// A read; for transient kinds, a system call that reads.
    Read,
    /// A write; for transient kinds, a system call that writes.
    Write,
    /// Making a file's data durable.
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
    /// The process ends at once, before the operation, as if it had been killed.
    Kill,
}

impl FaultKind {
    fn is_transient(self) -> bool {
        matches!(self, FaultKind::Interrupted | FaultKind::Again | FaultKind::Short { .. })
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
#[derive(Debug)]
pub(crate) struct Script {
    faults: Vec<Fault>,
    counts: [AtomicU64; POINTS],
}

impl Script {
    /// The transient faults of a plan: those below a backend.
    pub(crate) fn below(plan: &FaultPlan) -> Self {
        Self::of(plan, FaultKind::is_transient)
    }

    /// The lasting faults of a plan: those above a backend.
    fn above(plan: &FaultPlan) -> Self {
        Self::of(plan, |kind| !kind.is_transient())
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

    pub(crate) fn distort_at(&self, point: FaultPoint, result: io::Result<usize>) -> io::Result<usize> {
        match self.next(point) {
            None => result,
            Some(FaultKind::Short { bytes }) => result.map(|moved_bytes| moved_bytes.min(bytes)),
            Some(kind) => kind.os_error().map_or(result, Err),
        }
    }

    /// A system call, in whose place the script's failure comes.
    pub(crate) fn call<T>(&self, point: FaultPoint, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.next(point).and_then(FaultKind::os_error).map_or_else(call, Err)
    }
}

fn point_of(verb: Verb) -> FaultPoint {
    match verb {
        Verb::Read => FaultPoint::Read,
        Verb::Write => FaultPoint::Write,
    }
}

/// An [`Io`] that fails as planned and otherwise passes everything on.
pub struct Faulty {
    inner: Arc<dyn Io>,
    script: Script,
    /// Names by file number, for error messages.
    names: std::sync::OnceLock<Vec<String>>,
}

impl Faulty {
    /// Injects the lasting faults of `plan`. Give the transient ones to the backend itself.
    pub fn new(inner: Arc<dyn Io>, plan: &FaultPlan) -> Self {
        Self { inner, script: Script::above(plan), names: std::sync::OnceLock::new() }
    }

    fn remember(&self, files: &[FileSpec]) {
        let _ = self.names.set(files.iter().map(|spec| spec.name.clone()).collect());
    }

    fn path(&self, file: FileId) -> PathBuf {
        let name = self.names.get().and_then(|names| names.get(file.0));
        self.inner.path_of(name.map_or("", String::as_str))
    }

    /// Fails as planned, or answers the silent fault that is planned.
    fn check(
        &self,
        point: FaultPoint,
        operation: &'static str,
        path: PathBuf,
    ) -> Result<Option<FaultKind>, Error> {
        let kind = self.script.next(point);
        match kind.and_then(FaultKind::os_error) {
            Some(source) => Err(Error::File { operation, path, source }),
            None => Ok(kind),
        }
    }
}

impl Io for Faulty {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.remember(files);
        self.check(FaultPoint::Allocate, "allocate", self.path(FileId(0)))?;
        self.inner.allocate_files(files)
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.remember(files);
        self.check(FaultPoint::Open, "open", self.path(FileId(0)))?;
        self.inner.open_files(files)
    }

    fn submit(&self, mut request: Request, on_done: OnDone) {
        let verb = request.verb();
        let Some(kind) = self.script.next(point_of(verb)) else { return self.inner.submit(request, on_done) };
        if let Some(source) = kind.os_error() {
            let error = request.error(self.path(request.file()), source);
            return on_done(request.complete(Err(error)));
        }
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
        match self.check(FaultPoint::Sync, "sync", self.path(file))? {
            Some(FaultKind::Stale) => Ok(()),
            _ => self.inner.sync(file),
        }
    }

    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = || self.inner.path_of(name);
        let silent = self.check(FaultPoint::SaveDocument, "write", path())?;
        self.check(FaultPoint::Rename, "replace", path())?;
        match silent {
            Some(FaultKind::BitFlip { bit }) => {
                let mut damaged = bytes.to_vec();
                flip(&mut damaged, bit);
                self.inner.save_document(name, &damaged)?;
            }
            Some(FaultKind::Stale) => {}
            _ => self.inner.save_document(name, bytes)?,
        }
        let directory = Path::new(name).parent().map_or("".into(), Path::to_string_lossy);
        self.check(FaultPoint::SyncDirectory, "sync", self.inner.path_of(&directory)).map(drop)
    }

    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let silent = self.check(FaultPoint::LoadDocument, "read", self.inner.path_of(name))?;
        let mut document = self.inner.load_document(name)?;
        if let (Some(FaultKind::BitFlip { bit }), Some(bytes)) = (silent, &mut document) {
            flip(bytes, bit);
        }
        Ok(document)
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
