//! The one error type of the crate: what failed, where, and what to do about it.

use std::{fmt, io, path::PathBuf};

use crate::Tier;

/// Everything that can go wrong in this crate. Messages name the place and the cure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A reservation would take a tier over its budget.
    #[error(
        "the {tier} budget cannot give {requested_bytes} bytes: {used_bytes} of {limit_bytes} are in use; \
         raise the budget, or plan for fewer bytes on this tier"
    )]
    OverBudget {
        /// The tier whose budget is spent.
        tier: Tier,
        /// Bytes asked for.
        requested_bytes: u64,
        /// Bytes reserved when they were asked for.
        used_bytes: u64,
        /// Bytes that the tier may use.
        limit_bytes: u64,
    },

    /// A call of the CUDA driver failed.
    #[error("CUDA: {action}: {reason}")]
    Cuda {
        /// What was to be done.
        action: &'static str,
        /// What the driver said.
        reason: String,
    },

    /// The operating system gave no memory for an arena.
    #[error("no memory for an arena of {capacity_bytes} bytes: {source}; ask for a smaller arena")]
    ArenaMap {
        /// Bytes of the arena that was to be made.
        capacity_bytes: usize,
        /// What the system answered.
        source: io::Error,
    },

    /// No free range of an arena is long enough.
    #[error(
        "the arena has no free run of {requested_bytes} bytes: {free_bytes} are free, the longest run has \
         {largest_free_bytes}; wait for a lease to come back, or make the arena larger"
    )]
    ArenaExhausted {
        /// Bytes asked for.
        requested_bytes: usize,
        /// Bytes free in all.
        free_bytes: usize,
        /// Bytes of the longest free run.
        largest_free_bytes: usize,
    },

    /// The two ends of a device copy differ in length.
    #[error("a copy from {from_bytes} bytes to {into_bytes} bytes: both ends must have the same length")]
    CopyLength {
        /// Bytes of the source.
        from_bytes: usize,
        /// Bytes of the target.
        into_bytes: usize,
    },

    /// An I/O thread could not be started.
    #[error("cannot start an I/O thread: {source}; check the limit on threads")]
    Thread {
        /// What the system answered.
        source: io::Error,
    },

    /// This system offers no io_uring, or forbids it.
    #[error("io_uring is not available: {source}; use the pool backend, or let `Auto` choose it")]
    UringUnavailable {
        /// What the system answered.
        source: io::Error,
    },

    /// A read or write failed on the device.
    #[error("{operation} of {length_bytes} bytes at offset {offset_bytes} of {path} failed: \
             {source}", path = path.display())]
    Transfer {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Offset of the request in the file.
        offset_bytes: u64,
        /// Length of the request.
        length_bytes: usize,
        /// What the system answered.
        source: io::Error,
    },

    /// An operation on a whole file or directory failed.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },

    /// The file system has no room for the store's files. Nothing was left behind.
    #[error(
        "{path} needs {needed_bytes} bytes and its file system has {available_bytes} free; free some space, \
         choose another directory, or plan for fewer bytes on disk", path = path.display()
    )]
    DiskFull {
        /// The directory that was to hold the files.
        path: PathBuf,
        /// Bytes of all files together.
        needed_bytes: u64,
        /// Bytes that were free.
        available_bytes: u64,
    },

    /// A file would be larger than the process or the file system allows.
    #[error(
        "{path} would have {bytes} bytes{}: raise the limit on the size of files (ulimit -f), choose another \
         file system, or plan for fewer bytes on disk", limit(*limit_bytes), path = path.display()
    )]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that it was to have.
        bytes: u64,
        /// Most bytes that a file of this process may have; none where it is the file system that allows no
        /// more.
        limit_bytes: Option<u64>,
    },

    /// The path by which a directory was opened does not lead to it any more.
    #[error("{path} does not lead to the directory any more that was opened by this name: \
             {now}", path = path.display())]
    FolderMoved {
        /// The path that it was opened by.
        path: PathBuf,
        /// What became of the directory.
        now: Whereabouts,
    },

    /// A file was removed, renamed or replaced while it was in use.
    #[error("{path} does not lead to the file any more that is in use: {now}", path = path.display())]
    FileReplaced {
        /// The path that it was opened by.
        path: PathBuf,
        /// What became of the file.
        now: Whereabouts,
    },

    /// A store that was opened to be read was to be written.
    #[error("the store in {directory} was opened to be read only", directory = directory.display())]
    ReadOnly {
        /// The directory.
        directory: PathBuf,
    },

    /// A directory that a manifest names as a part of its store belongs to another one.
    #[error(
        "{directory} is named as a part of the store of {manifest} and belongs to that of {owner}: if the \
         store was moved or copied, its parts in other directories are still those of the first",
        directory = directory.display(), manifest = manifest.display(), owner = owner.display()
    )]
    ForeignStripe {
        /// The directory.
        directory: PathBuf,
        /// The manifest that names it.
        manifest: PathBuf,
        /// The manifest of the store that it belongs to.
        owner: PathBuf,
    },

    /// Another process, or another store of this one, uses the directory.
    #[error("the store in {directory} is in use by another process; wait for it, or choose another \
             directory", directory = directory.display())]
    Locked {
        /// The directory.
        directory: PathBuf,
    },

    /// A store was to be created where one with a commit already is.
    #[error("{directory} already holds a committed store; open it, or delete the directory \
             first", directory = directory.display())]
    AlreadyCommitted {
        /// The directory.
        directory: PathBuf,
    },

    /// There is nothing to open.
    #[error(
        "{directory} holds no commit: it is no store, or its run ended before the first commit; create the \
         store anew",
        directory = directory.display()
    )]
    NoCommit {
        /// The directory.
        directory: PathBuf,
    },

    /// The manifest was written by a newer version of this crate.
    #[error("{path} has format {found}, this program reads up to format {supported}; use a newer \
             program", path = path.display())]
    NewerFormat {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The newest format that this program reads.
        supported: u64,
    },

    /// The manifest was written in a format that this version no longer reads.
    #[error("{path} has format {found}, this program reads format {supported}; use an older program, or \
             create the store anew", path = path.display())]
    OlderFormat {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The format that this program reads.
        supported: u64,
    },

    /// The manifest is damaged.
    #[error("{path} is damaged ({reason}); restore the directory from a copy, or create the store \
             anew", path = path.display())]
    CorruptManifest {
        /// The manifest.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },

    /// A store that is written in place was left between two commits.
    #[error(
        "the store of {path} is written in place, and its process ended while it was overwriting generation \
         {generation}: no whole state is left; restore the directory from a copy, or delete it and start \
         anew",
        path = path.display()
    )]
    Overwritten {
        /// The manifest.
        path: PathBuf,
        /// Generation of the commit that is gone.
        generation: u64,
    },

    /// A directory that holds a part of a store is not there, or is empty as when its disk is not mounted.
    #[error(
        "{directory} holds a part of the store, and {missing} is not there: mount the disk or put the \
         directory back under the same name", directory = directory.display(), missing = missing.display()
    )]
    MissingStripe {
        /// The directory.
        directory: PathBuf,
        /// What was looked for.
        missing: PathBuf,
    },

    /// A file of the store is missing bytes.
    #[error(
        "{path} has {found_bytes} bytes and the manifest says {expected_bytes}: it was cut or replaced; \
         restore it from a copy, or create the store anew", path = path.display()
    )]
    TruncatedFile {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        expected_bytes: u64,
        /// Bytes that it has.
        found_bytes: u64,
    },

    /// The extents or options of a store make no sense.
    #[error("bad store layout: {reason}")]
    BadLayout {
        /// What is wrong and what would be right.
        reason: String,
    },

    /// An extent or piece that this store does not have.
    #[error("the store has no piece {piece} in extent number {extent}")]
    UnknownPiece {
        /// Number of the extent.
        extent: usize,
        /// Number of the piece.
        piece: usize,
    },

    /// A piece was read before it was ever written.
    #[error("piece {piece} of extent {extent} was never written: write it before reading it")]
    NeverWritten {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
    },

    /// The last write of a piece failed, so that neither its old nor its new bytes may be used.
    #[error(
        "the last write of piece {piece} of extent {extent} failed: write it again before reading or \
         committing it; {}", way_back(*generation)
    )]
    FailedWrite {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
        /// Generation of the last commit; 0 when there is none to come back to.
        generation: u64,
    },

    /// A piece is being written, or is being read and was to be written.
    #[error("piece {piece} of extent {extent} is in use by another transfer: wait for its completion")]
    PieceBusy {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
    },

    /// A lease is too short for the piece that it is to carry.
    #[error(
        "piece {piece} of extent {extent} needs a lease of {needed_bytes} bytes, this one has {lease_bytes}"
    )]
    LeaseTooSmall {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
        /// Bytes that the piece needs.
        needed_bytes: usize,
        /// Bytes of the lease.
        lease_bytes: usize,
    },

    /// A request asks for more bytes than its lease has.
    #[error("a request of {length_bytes} bytes does not fit its lease of {capacity_bytes} bytes")]
    RequestTooLong {
        /// Bytes of the request.
        length_bytes: usize,
        /// Bytes of the lease.
        capacity_bytes: usize,
    },

    /// The bytes read back are not those that were written.
    #[error(
        "damage in {path} at offset {offset_bytes}: piece {piece} of extent {extent} does not match its \
         checksum; the last commit is generation {generation}: check the disk, then resume from a copy of \
         it", path = path.display()
    )]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
        /// Offset of the piece in the file.
        offset_bytes: u64,
        /// Generation of the last commit; 0 when there is none.
        generation: u64,
    },

    /// A transfer of a piece failed.
    #[error("piece {piece} of extent {extent} (last commit: generation {generation}): {source}")]
    Piece {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
        /// Generation of the last commit; 0 when there is none.
        generation: u64,
        /// What failed.
        source: Box<Error>,
    },

    /// A commit was asked for while pieces of state were being written.
    #[error("{writes_in_flight} writes are in flight: wait for their completions, then commit")]
    WritesInFlight {
        /// How many.
        writes_in_flight: usize,
    },

    /// Two commits were asked for at once.
    #[error("another commit is under way: wait for it")]
    CommitUnderWay,

    /// A piece was to be written while a commit is under way.
    #[error("a commit is under way: write piece {piece} of extent {extent} after it")]
    Committing {
        /// Name of the extent.
        extent: String,
        /// Number of the piece.
        piece: usize,
    },

    /// A commit failed half way, so both places of a piece may be needed.
    #[error(
        "an earlier commit failed and may or may not be on disk; commit again before writing; \
         {}", way_back(*generation)
    )]
    Unsettled {
        /// Generation of the last commit known to be durable; 0 when there is none to come back to.
        generation: u64,
    },

    /// The device did not make data durable, so nothing written since the last commit can be trusted.
    #[error(
        "the disk did not make data durable, so what was written since the last commit is in doubt; {}",
        way_back(*generation)
    )]
    SyncFailed {
        /// Generation of the last commit; 0 when there is none to come back to.
        generation: u64,
    },
}

/// A limit on the size of files, for messages.
fn limit(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |bytes| format!(", and this process may write files of {bytes} bytes"))
}

/// What became of a file or directory that its path does not lead to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// It has no name any more.
    Removed,
    /// It has another path.
    MovedTo(PathBuf),
    /// Something was mounted over it.
    Covered,
    /// The system does not tell.
    Unknown,
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Removed => f.write_str(
                "it was removed, and what it held ends with this process; restore it from a copy, or start \
                 anew",
            ),
            Self::MovedTo(path) => write!(
                f,
                "it is {} now, with all that it held; move it back, or use it by that name",
                path.display()
            ),
            Self::Covered => f.write_str(
                "something was mounted over it; unmount that, and all that it held \
                                          is there",
            ),
            Self::Unknown => f.write_str("it was moved, and the system does not tell where to; move it back"),
        }
    }
}

/// What a store can be reopened to; generation 0 stands for nothing.
fn way_back(generation: u64) -> String {
    match generation {
        0 => "there is no commit to come back to".to_owned(),
        generation => format!("reopening the store continues from generation {generation}"),
    }
}
