//! io_uring: one thread that keeps many transfers in flight.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam::channel::{Receiver, Sender, unbounded};
use io_uring::{IoUring, Probe, opcode};

use super::{
    FileId, FileSpec, Io, OnDone, Request,
    directory::{Directory, Purpose},
    fault::{FaultPlan, Script},
    progress::retried,
};
use crate::{Error, Notice, locked};

mod ring;
mod shape;
mod waker;

use shape::Shape;
use waker::{Sleeper, Waker};

use ring::{Ring, Submission};

/// An [`Io`] over io_uring: requests are split into parts, of which a bounded number is in flight.
///
/// Neither files nor buffers are registered with the ring, so nothing can be refused after it was chosen.
/// Measured in turns, registered buffers were no faster: arenas are of huge pages, and a request maps few of
/// those. A registered file saves about 0.1 µs a request, which is a thousandth of what the smallest part of
/// a large transfer takes.
#[derive(Debug)]
pub struct Uring {
    directory: Arc<Directory>,
    /// The ring until its thread starts, which is when the files are known.
    idle: Mutex<Option<Idle>>,
    running: OnceLock<Running>,
}

struct Idle {
    ring: IoUring,
    waker: Waker,
    sleeper: Sleeper,
}

impl Idle {
    /// A ring that has been asked for all that will be needed, so that whoever chooses a backend can take
    /// another one: kernels differ, and some systems forbid a part.
    fn new() -> io::Result<Self> {
        let (mut ring, (waker, sleeper)) = (IoUring::new(shape::ENTRIES)?, waker::pair()?);
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        require(|code| probe.is_supported(code))?;
        // Where entering is forbidden, everything up to here works.
        // SAFETY: an operation that does nothing points to no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        retried(|| ring.submit_and_wait(1))?;
        ring.completion().next().ok_or_else(|| io::Error::other("the ring completes nothing"))?;
        Ok(Self { ring, waker, sleeper })
    }
}

/// Refuses a kernel that does not know an operation of the ring's thread.
fn require(is_supported: impl Fn(u8) -> bool) -> io::Result<()> {
    let needed =
        [(opcode::Read::CODE, "read"), (opcode::Write::CODE, "write"), (opcode::PollAdd::CODE, "poll")];
    match needed.into_iter().find(|&(code, _)| !is_supported(code)) {
        Some((_, name)) => {
            let text = format!("the kernel's io_uring has no operation to {name}");
            Err(io::Error::new(io::ErrorKind::Unsupported, text))
        }
        None => Ok(()),
    }
}

#[derive(Debug)]
struct Running {
    submissions: Option<Sender<Submission>>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Uring {
    /// Locks `directory`, which must exist. System calls fail as `faults` says.
    ///
    /// # Errors
    /// [`Error::UringUnavailable`] where the system has no io_uring, forbids it or lacks a part of it that is
    /// needed; [`Error::Locked`].
    pub fn new(directory: &Path, faults: &FaultPlan) -> Result<Self, Error> {
        Self::over(Arc::new(Directory::open(directory, Purpose::Write, Arc::new(Script::below(faults)))?))
    }

    pub(crate) fn over(directory: Arc<Directory>) -> Result<Self, Error> {
        let idle = Idle::new().map_err(|source| Error::UringUnavailable { source })?;
        Ok(Self { directory, idle: Mutex::new(Some(idle)), running: OnceLock::new() })
    }

    /// Hands the ring, with the files that are now open, to its thread.
    fn start(&self, are_new: bool) -> Result<(), Error> {
        let Some(Idle { mut ring, waker, sleeper }) = locked(&self.idle).take() else { return Ok(()) };
        let shape = shape::choose(&mut ring, self.directory.files(), are_new).over(self.directory.count());
        let (sender, submissions) = unbounded();
        let directory = self.directory.clone();
        let run = move || Ring::new(ring, shape, directory, submissions, sleeper).run();
        let spawned = thread::Builder::new().name("ferrozero-uring".to_owned()).spawn(run);
        let thread = Some(spawned.map_err(|source| Error::Thread { source })?);
        let _ = self.running.set(Running { submissions: Some(sender), waker, thread });
        Ok(())
    }
}

impl Io for Uring {
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.directory.allocate_files(files)?;
        self.start(true)
    }

    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.directory.open_files(files)?;
        self.start(false)
    }

    fn submit(&self, request: Request, on_done: OnDone) {
        // Also checks that the ring runs: without open files there is nothing to transfer.
        let error = match (self.directory.file(request.file()), self.running.get()) {
            (Ok(_), Some(running)) => return running.submit(Submission { request, on_done }),
            (Err(error), _) => error,
            (Ok(open), None) => request.error(open.path.clone(), io::ErrorKind::NotConnected.into()),
        };
        on_done(request.complete(Err(error)));
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

impl Running {
    fn submit(&self, submission: Submission) {
        if let Some(submissions) = &self.submissions {
            // The thread holds the receiver until the sender is dropped, so this cannot fail.
            let _ = submissions.send(submission);
            self.waker.wake();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.submissions = None;
        self.waker.close();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Idle")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_an_operation_that_is_needed_is_refused_by_its_name() {
        require(|_| true).unwrap();
        let codes = [opcode::Read::CODE, opcode::Write::CODE, opcode::PollAdd::CODE];
        for (missing, name) in codes.into_iter().zip(["read", "write", "poll"]) {
            let refusal = require(|code| code != missing).unwrap_err();
            assert!(refusal.to_string().contains(name), "{refusal}");
        }
    }
}
