//! The few things that a store needs of a disk, as a trait, with backends and wrappers that compose over it.
//!
//! | | what it is for |
//! |---|---|
//! | [`Uring`] | io_uring: one ring thread, many requests in flight |
//! | [`Pool`] | threads that call pread and pwrite, where io_uring is forbidden |
//! | [`Mem`] | files in memory, for tests and for runs without a disk |
//! | [`Faulty`] | damages bytes silently, by a script; what a system reports is injected in the backends |
//! | [`Throttled`] | makes a disk slower, so that overlap can be seen on a laptop |

use std::path::PathBuf;

use crate::{Error, Lease, Notice};

mod directory;
mod fault;
#[allow(unsafe_code)]
mod limits;
mod mem;
mod pool;
mod progress;
mod throttled;
mod ticket;
#[allow(unsafe_code)]
mod uring;
mod workers;

pub(crate) use directory::{Directory, Purpose, make_directory, sync_entry};
pub(crate) use fault::Script;
pub use fault::{Fault, FaultKind, FaultPlan, FaultPoint, Faulty};
pub use limits::report_file_size_limit;
pub use mem::Mem;
pub use pool::Pool;
pub use throttled::{Throttle, Throttled};
pub use ticket::Ticket;
pub use uring::Uring;
pub(crate) use workers::{Job, Workers};

/// A set of files and small documents in one directory, or with files in several.
///
/// `submit` never blocks on the disk. Its callback runs exactly once, on any thread and perhaps before
/// `submit` returns, so it must be short. All other verbs block until done.
pub trait Io: Send + Sync {
    /// Makes the files, with all their space reserved, or none of them. [`FileId`]s count from 0 in this
    /// order. To be called once, instead of [`Io::open_files`].
    fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error>;

    /// Opens files made earlier and checks that they still have their bytes.
    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error>;

    /// Starts a transfer. The lease comes back through `on_done`, also after an error.
    fn submit(&self, request: Request, on_done: OnDone);

    /// Makes all completed writes of a file durable.
    fn sync(&self, file: FileId) -> Result<(), Error>;

    /// Replaces a named document as one step that is durable when this returns. After an error the old
    /// document or the new one is there, whole.
    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error>;

    /// Reads a named document, if there is one.
    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error>;

    /// Checks that every file is still the one that has its name: nobody has removed, moved or replaced it.
    ///
    /// # Errors
    /// [`Error::FileReplaced`], or what the file system answers.
    fn check_files(&self) -> Result<(), Error>;

    /// Checks that the path of every directory still leads to it.
    ///
    /// # Errors
    /// [`Error::FolderMoved`], or what the file system answers.
    fn check_paths(&self) -> Result<(), Error>;

    /// Where a file or document of this name is, for messages.
    fn path_of(&self, name: &str) -> PathBuf;

    /// Fallbacks that were taken.
    fn notices(&self) -> Vec<Notice>;
}

/// What [`Io::submit`] calls at the end.
pub type OnDone = Box<dyn FnOnce(Completion) + Send>;

/// A file by its number in the list given to [`Io::allocate_files`] or [`Io::open_files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub usize);

/// A file to make or to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// Its name in the directory, or an absolute path in another directory, which is then locked too.
    pub name: String,
    /// Its size, fixed from the start. May be 0.
    pub bytes: u64,
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// From the file into the lease.
    Read,
    /// From the lease into the file.
    Write,
}

impl Verb {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Verb::Read => "read",
            Verb::Write => "write",
        }
    }
}

/// One transfer, with the buffer that it owns until its end.
#[derive(Debug)]
pub struct Request {
    verb: Verb,
    file: FileId,
    offset_bytes: u64,
    length_bytes: usize,
    lease: Lease,
}

impl Request {
    /// A transfer of the first `length_bytes` of the lease's pages. Offset and length must be multiples of
    /// [`crate::PAGE_BYTES`] where the files are opened for direct transfers.
    ///
    /// # Errors
    /// A completion with [`Error::RequestTooLong`] that gives the lease back.
    pub fn new(
        verb: Verb,
        file: FileId,
        offset_bytes: u64,
        length_bytes: usize,
        lease: Lease,
    ) -> Result<Self, Completion> {
        let capacity_bytes = lease.capacity_bytes();
        if length_bytes > capacity_bytes {
            return Err(Completion {
                lease,
                result: Err(Error::RequestTooLong { length_bytes, capacity_bytes }),
            });
        }
        Ok(Self { verb, file, offset_bytes, length_bytes, lease })
    }

    /// Direction.
    pub fn verb(&self) -> Verb {
        self.verb
    }

    /// File.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Offset in the file.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Bytes to move.
    pub fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    /// The bytes to write, or those read.
    pub fn buffer(&self) -> &[u8] {
        &self.lease.padded()[..self.length_bytes]
    }

    /// The bytes to read into.
    pub fn buffer_mut(&mut self) -> &mut [u8] {
        &mut self.lease.padded_mut()[..self.length_bytes]
    }

    /// Ends the request: what its callback is to be given.
    pub fn complete(self, result: Result<(), Error>) -> Completion {
        Completion { lease: self.lease, result }
    }

    /// The error that names this request.
    pub(crate) fn error(&self, path: PathBuf, source: std::io::Error) -> Error {
        Error::Transfer {
            operation: self.verb.name(),
            path,
            offset_bytes: self.offset_bytes,
            length_bytes: self.length_bytes,
            source,
        }
    }
}

/// The end of a transfer: the buffer, and whether its bytes arrived.
#[derive(Debug)]
pub struct Completion {
    /// The buffer that was in flight. After a failed read its contents mean nothing.
    pub lease: Lease,
    /// Whether all bytes arrived.
    pub result: Result<(), Error>,
}
