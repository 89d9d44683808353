//! Extents of bytes on disk, moved in checked pieces and committed as a whole.

use std::{
    ffi::OsStr,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use crate::{
    Completion, Error, Folder, Lease, Notice,
    io::{FaultPlan, Io, Job, Purpose, Request, Script, Throttle, Verb, Workers},
    locked, padded_bytes,
};

mod check;
mod claim;
mod connect;
mod copy;
mod layout;
mod manifest;
mod table;

pub use layout::{Extent, ExtentId, ExtentKind, ExtentSpec};
pub use table::Traffic;

use connect::{Connected, MadeDirectories, connect, duplicate};
use layout::{Form, Layout, Piece};
use manifest::Manifest;
use table::{Located, Table};

/// Threads that compute checksums and run the callbacks of users.
const CHECKER_THREADS: usize = 2;

/// How a store is made or opened. The default is right for a local NVMe drive.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Bytes of all pieces of an extent but the last: a multiple of [`crate::PAGE_BYTES`]. Default 4 MiB. A
    /// store that is opened keeps the piece size that it was made with.
    pub piece_bytes: usize,
    /// One place for each piece of state, half the disk: **a kill between commits then loses everything**,
    /// and the store says so with the notice `in-place`. Default: no. A store that is opened stays as it was
    /// made.
    pub in_place: bool,
    /// More directories, on other disks, that pieces are dealt out to in turn. Default: none. A store that is
    /// opened has them where it was made with them.
    pub stripes: Vec<PathBuf>,
    /// Files without names, that end with the store, also after a kill, and touch nothing in its directories,
    /// which must exist. Its commits cannot be opened again. Default: no.
    pub temporary: bool,
    /// What moves the bytes. Default: [`BackendChoice::Auto`].
    pub backend: BackendChoice,
    /// Failures to inject.
    pub faults: Option<FaultPlan>,
    /// Slower disk to be, shared with other stores that have it.
    pub throttle: Option<Throttle>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            piece_bytes: 4 << 20,
            in_place: false,
            stripes: Vec::new(),
            temporary: false,
            backend: BackendChoice::default(),
            faults: None,
            throttle: None,
        }
    }
}

impl StoreOptions {
    /// The failures that come in the place of system calls.
    fn script(&self) -> Arc<Script> {
        Arc::new(self.faults.as_ref().map(Script::below).unwrap_or_default())
    }
}

/// What moves the bytes of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// `Uring` where the system has it, else `Pool` with the notice `uring-unavailable`.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Threads with pread and pwrite.
    Pool,
    /// No disk at all: the files are in memory and end with the store.
    Memory,
}

/// What the last commit says.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// Counts commits, from 1.
    pub generation: u64,
    /// Whatever was given to [`Store::commit`].
    pub application: serde_json::Value,
}

/// Extents of bytes on disk, moved in checked pieces and committed as a whole. Shared by reference between
/// threads.
///
/// | file | holds |
/// |---|---|
/// | `state-a.bin`, `state-b.bin` | two places for each piece of the state extents, at the same offset in both |
/// | `scratch.bin` | one place for each piece of the scratch extents |
/// | `manifest.json` | the last commit: its generation, the extents, where each piece is, its checksum |
/// | `.lock` | kept locked by the one process that uses the directory |
///
/// A write goes to the place that the last commit does not hold, so until the next commit both the committed
/// and the new bytes of a piece are on disk. A commit makes the data durable and then replaces the manifest
/// in one step; no bytes of state are copied. What was written and not committed is forgotten when the store
/// is opened again.
///
/// A store with [`StoreOptions::stripes`] has such files, a lock and a `stripe.json`, which says whose it is,
/// in each of its directories, and the manifest in the first. One that is written [`StoreOptions::in_place`]
/// has no second place: before the first write after a commit it notes durably that the commit is being
/// overwritten, and until the next commit it cannot be opened again.
///
/// A store keeps the directories that it opened, whatever becomes of their names. A commit ends with an error
/// where the path of one does not lead to it any more: what was committed is there, but not where its user
/// would look for it.
pub struct Store {
    // Dropped in this order: the backend ends all transfers, and the checkers then run the callbacks.
    io: Arc<dyn Io>,
    checkers: Workers,
    shared: Arc<Shared>,
    notices: Vec<Notice>,
    /// None in memory, and on a backend of the caller's own.
    folder: Option<Arc<Folder>>,
}

struct Shared {
    layout: Layout,
    table: Mutex<Table>,
    /// Held while it is noted that a commit is being overwritten.
    marking: Mutex<()>,
}

impl Store {
    /// Makes the files of a new store in `directory`, which is made too if need be. Nothing is committed yet.
    ///
    /// # Errors
    /// [`Error::AlreadyCommitted`], [`Error::DiskFull`] (nothing is left behind), [`Error::Locked`],
    /// [`Error::BadLayout`], or what the file system answers. Directories that were made are then removed.
    pub fn create(directory: &Path, specs: Vec<ExtentSpec>, options: StoreOptions) -> Result<Self, Error> {
        let script = options.script();
        let mut made = MadeDirectories::new(script.clone());
        let (canonical, stripes) = match options.backend {
            BackendChoice::Memory => (directory.to_owned(), options.stripes.clone()),
            _ => {
                let mut ensure = |path: &PathBuf| made.ensure(path, !options.temporary);
                let stripes = options.stripes.iter().map(&mut ensure).collect::<Result<Vec<_>, Error>>()?;
                (ensure(&directory.to_owned())?, stripes)
            }
        };
        let options = StoreOptions { stripes, ..options };
        if let Some(twice) = duplicate(&canonical, &options.stripes) {
            let reason = format!("{} is there twice: name each directory once", twice.display());
            return Err(Error::BadLayout { reason });
        }
        let layout = layout_of(specs, &options)?;
        let purpose = if options.temporary { Purpose::Temporary } else { Purpose::Write };
        let connected = connect(directory, purpose, &options, script)?;
        let store = Self::create_from(connected, layout)?;
        made.keep();
        Ok(store)
    }

    /// Opens the last commit of the store in `directory`, to go on from it.
    ///
    /// # Errors
    /// [`Error::NoCommit`], [`Error::Locked`], [`Error::NewerFormat`], [`Error::OlderFormat`],
    /// [`Error::CorruptManifest`], [`Error::TruncatedFile`], [`Error::MissingStripe`],
    /// [`Error::ForeignStripe`], [`Error::Overwritten`], or what the file system answers.
    pub fn open(directory: &Path, options: StoreOptions) -> Result<Self, Error> {
        Self::open_for(directory, Purpose::Write, options)
    }

    /// As [`Store::open`], to read only: nothing in the directory is made or changed, so that its file system
    /// may be read-only and its files another user's. Writes and commits are refused with
    /// [`Error::ReadOnly`].
    ///
    /// # Errors
    /// As [`Store::open`]. [`Error::Locked`] only where the lock may be looked at: what a run changes
    /// meanwhile is otherwise found by its checksum.
    pub fn open_to_read(directory: &Path, options: StoreOptions) -> Result<Self, Error> {
        Self::open_for(directory, Purpose::Read, options)
    }

    fn open_for(directory: &Path, purpose: Purpose, options: StoreOptions) -> Result<Self, Error> {
        if options.backend == BackendChoice::Memory {
            return Err(Error::NoCommit { directory: directory.to_owned() });
        }
        let connected = connect(directory, purpose, &options, options.script());
        let connected = connected.map_err(|error| match error {
            Error::File { operation: "open", path, source }
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                Error::NoCommit { directory: path }
            }
            other => other,
        })?;
        Self::open_from(connected, directory, purpose)
    }

    /// Whether a store keeps its states under this name in each of its directories.
    pub fn is_name_of_states(name: &OsStr) -> bool {
        layout::FILE_NAMES.iter().any(|own| name == *own)
    }

    /// As [`Store::create`], on a backend or a stack of wrappers of your own. Of the options, `piece_bytes`,
    /// `in_place` and `stripes` count; the directories must exist.
    pub fn create_on(io: Arc<dyn Io>, specs: Vec<ExtentSpec>, options: &StoreOptions) -> Result<Self, Error> {
        Self::create_from(Connected::over(io), layout_of(specs, options)?)
    }

    /// As [`Store::open`], on a backend or a stack of wrappers of your own.
    pub fn open_on(io: Arc<dyn Io>) -> Result<Self, Error> {
        let directory = io.path_of("");
        Self::open_from(Connected::over(io), &directory, Purpose::Write)
    }

    fn create_from(connected: Connected, layout: Layout) -> Result<Self, Error> {
        claim::refuse_taken(&*connected.io, layout.form())?;
        connected.io.allocate_files(&layout.files())?;
        let table = Table::new(&layout);
        Self::start(connected, layout, table)
    }

    fn open_from(connected: Connected, directory: &Path, purpose: Purpose) -> Result<Self, Error> {
        let io = &*connected.io;
        let document = io.load_document(manifest::NAME)?;
        let document = document.ok_or_else(|| Error::NoCommit { directory: directory.to_owned() })?;
        let (layout, manifest) = Manifest::decode(&document, &io.path_of(manifest::NAME))?;
        claim::refuse_foreign(io, layout.form())?;
        io.open_files(&layout.files())?;
        let mut table = manifest.into_table(&layout)?;
        if purpose == Purpose::Read {
            table.keep_unwritten(directory);
        }
        Self::start(connected, layout, table)
    }

    fn start(connected: Connected, layout: Layout, table: Table) -> Result<Self, Error> {
        let Connected { io, mut notices, folder } = connected;
        let checkers = Workers::spawn("ferrozero-check", CHECKER_THREADS)?;
        notices.extend(io.notices());
        if layout.form().in_place {
            let text =
                "state is written in place: if the process ends between two commits, all of it is lost";
            notices.push(Notice::new("in-place", text));
        }
        let shared = Arc::new(Shared { layout, table: Mutex::new(table), marking: Mutex::new(()) });
        Ok(Self { io, checkers, shared, notices, folder })
    }

    /// The directory of the store, as it was opened: none in memory, and on a backend of the caller's own.
    pub fn folder(&self) -> Option<&Arc<Folder>> {
        self.folder.as_ref()
    }

    /// The last commit, if there is one.
    pub fn committed(&self) -> Option<Arc<Commit>> {
        locked(&self.shared.table).committed()
    }

    /// All extents, in the order in which they were specified.
    pub fn extents(&self) -> &[Extent] {
        self.shared.layout.extents()
    }

    /// Finds an extent by its name.
    pub fn extent(&self, name: &str) -> Option<ExtentId> {
        self.shared.layout.find(name)
    }

    /// Bytes of all pieces of an extent but the last.
    pub fn piece_bytes(&self) -> usize {
        self.shared.layout.piece_bytes()
    }

    /// Bytes of the longest piece that there is: pieces may be longer than all that is kept.
    pub fn longest_piece_bytes(&self) -> usize {
        let longest = self.extents().iter().map(|extent| extent.spec.bytes).max().unwrap_or(0);
        usize::try_from(longest).map_or(self.piece_bytes(), |longest| longest.min(self.piece_bytes()))
    }

    /// Pieces of an extent.
    ///
    /// # Errors
    /// [`Error::UnknownPiece`] when the id is of another store.
    pub fn piece_count(&self, extent: ExtentId) -> Result<usize, Error> {
        self.shared.layout.piece_count(extent)
    }

    /// Bytes of one piece, without padding.
    ///
    /// # Errors
    /// [`Error::UnknownPiece`].
    pub fn piece_bytes_of(&self, extent: ExtentId, piece: usize) -> Result<usize, Error> {
        Ok(self.shared.layout.piece(extent, piece)?.bytes)
    }

    /// Reads the latest bytes of a piece into the start of `lease`, which must be at least as long as the
    /// piece.
    ///
    /// `on_done` runs once, on a thread of the store, and may start the next transfer but must not wait for
    /// one. Its result is an error if the piece was never written, is being written, could not be read, or
    /// does not match its checksum.
    pub fn read(
        &self,
        extent: ExtentId,
        piece: usize,
        lease: Lease,
        on_done: impl FnOnce(Completion) + Send + 'static,
    ) {
        self.transfer(Verb::Read, extent, piece, lease, on_done);
    }

    /// Writes the start of `lease` to a piece, to the place that the last commit does not hold.
    ///
    /// In a store that is written in place, the first write after a commit blocks until it is durably noted.
    ///
    /// `on_done` runs once, on a thread of the store, and may start the next transfer but must not wait for
    /// one. After an error the piece can be neither read nor committed until a write of it succeeds; the last
    /// commit is untouched.
    pub fn write(
        &self,
        extent: ExtentId,
        piece: usize,
        lease: Lease,
        on_done: impl FnOnce(Completion) + Send + 'static,
    ) {
        self.transfer(Verb::Write, extent, piece, lease, on_done);
    }

    fn transfer(
        &self,
        verb: Verb,
        extent: ExtentId,
        piece: usize,
        lease: Lease,
        on_done: impl FnOnce(Completion) + Send + 'static,
    ) {
        let begun = self.shared.begin(verb, extent, piece, &lease);
        let begun = begun.and_then(|begun| self.prepare(verb, begun.0).map(|()| begun));
        let begun = match begun {
            Ok(begun) => begun,
            // Also a refusal comes from a thread of the store: the caller may hold a lock that `on_done`
            // takes.
            Err(error) => {
                return self.checkers.run(move || on_done(Completion { lease, result: Err(error) }));
            }
        };
        let (piece, located) = begun;
        let checkers = self.checkers.sender();
        let shared = self.shared.clone();
        let path = self.io.path_of(&self.shared.layout.file_name(&piece, located.place));
        let finish = move |completion: Completion| {
            let job: Job = Box::new(move || on_done(shared.finish(verb, piece, located, &path, completion)));
            // The store keeps the checkers alive until its backend has ended all transfers.
            let _ = checkers.send(job);
        };
        let length_bytes = padded_bytes(piece.bytes);
        match Request::new(verb, piece.file(located.place), piece.offset_bytes, length_bytes, lease) {
            Ok(request) => self.io.submit(request, Box::new(finish)),
            Err(refused) => finish(refused),
        }
    }

    /// Before the first write in place after a commit, notes durably that the commit is being overwritten.
    fn prepare(&self, verb: Verb, piece: Piece) -> Result<(), Error> {
        let Shared { layout, table, marking } = &*self.shared;
        if verb == Verb::Read || !layout.form().in_place || !layout.is_state(piece.extent) {
            return Ok(());
        }
        let _marking = locked(marking);
        let commit = {
            let table = locked(table);
            table.committed().filter(|_| !table.is_overwriting())
        };
        let Some(commit) = commit else { return Ok(()) };
        let path = self.io.path_of(manifest::NAME);
        let save = |is_overwriting| {
            // No write has got past here since the commit, so the latest pieces are those of the commit.
            let document = Manifest::encode(layout, &locked(table), &commit, is_overwriting, &path)?;
            self.io.save_document(manifest::NAME, &document)
        };
        match save(true) {
            Ok(()) => locked(table).note_overwriting(),
            Err(source) => {
                // The note may be in place all the same, as when only the directory could not be synced.
                // Nothing is overwritten, so it is taken back. Where that fails too, the first failure is the
                // one to tell.
                let _ = save(false);
                let mut table = locked(table);
                table.cancel_write(piece);
                return Err(Error::Piece {
                    extent: layout.name(piece.extent).to_owned(),
                    piece: piece.number,
                    generation: table.generation(),
                    source: Box::new(source),
                });
            }
        }
        Ok(())
    }

    /// Makes everything written so far the state to come back to, together with `application`, and answers
    /// the generation of the commit. Blocks until it is durable.
    ///
    /// # Errors
    /// [`Error::WritesInFlight`]; [`Error::SyncFailed`] once data could not be made durable: what was written
    /// since the last commit is then lost; [`Error::FileReplaced`], with nothing committed, where a file was
    /// removed or replaced meanwhile; [`Error::FolderMoved`], after a commit to the directory that was
    /// opened, where its path leads elsewhere by now; any other error leaves it open whether the commit is on
    /// disk, so that it must be tried again before the next write of state.
    pub fn commit(&self, application: serde_json::Value) -> Result<u64, Error> {
        let commit = locked(&self.shared.table).begin_commit(&self.shared.layout, application)?;
        let saved = self.save(&commit);
        let generation = commit.generation;
        locked(&self.shared.table).end_commit(saved.as_ref().ok().map(|()| commit));
        saved?;
        // After the commit, so that it loses nothing and a name that changes during it is noticed.
        self.io.check_paths()?;
        Ok(generation)
    }

    fn save(&self, commit: &Commit) -> Result<(), Error> {
        let Shared { layout, table, .. } = &*self.shared;
        // A manifest must not name pieces in files that are not there.
        self.io.check_files()?;
        for file in layout.state_files() {
            if let Err(error) = self.io.sync(file) {
                locked(table).distrust();
                return Err(error);
            }
        }
        let path = self.io.path_of(manifest::NAME);
        if commit.generation == 1 {
            claim::note(&*self.io, layout.form())?;
        }
        let document = Manifest::encode(layout, &locked(table), commit, false, &path)?;
        self.io.save_document(manifest::NAME, &document)
    }

    /// Bytes of pieces moved so far.
    pub fn traffic(&self) -> Traffic {
        locked(&self.shared.table).traffic()
    }

    /// Bytes of all files together: twice the state, or once in place, and once the scratch.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.layout.files().iter().map(|file| file.bytes).sum()
    }

    /// Fallbacks that were taken.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }
}

impl Shared {
    /// Checks a transfer and marks its piece as in use.
    fn begin(
        &self,
        verb: Verb,
        extent: ExtentId,
        piece: usize,
        lease: &Lease,
    ) -> Result<(Piece, Located), Error> {
        let piece = self.layout.piece(extent, piece)?;
        if lease.len() < piece.bytes {
            return Err(Error::LeaseTooSmall {
                extent: self.layout.name(extent).to_owned(),
                piece: piece.number,
                needed_bytes: piece.bytes,
                lease_bytes: lease.len(),
            });
        }
        let mut table = locked(&self.table);
        let located = match verb {
            Verb::Read => table.begin_read(&self.layout, piece)?,
            Verb::Write => table.begin_write(&self.layout, piece)?,
        };
        Ok((piece, located))
    }

    /// Checks what arrived, or notes the checksum of what was written.
    fn finish(
        &self,
        verb: Verb,
        piece: Piece,
        located: Located,
        path: &Path,
        completion: Completion,
    ) -> Completion {
        let Completion { lease, result } = completion;
        let found = result.map(|()| piece.checksum(&lease[..piece.bytes]));
        let crc = found.as_ref().ok().copied();
        match verb {
            Verb::Read => locked(&self.table).end_read(piece, crc.is_some()),
            Verb::Write => locked(&self.table).end_write(piece, located.place, crc),
        }
        let expected = (verb == Verb::Read).then_some(located.crc);
        Completion { lease, result: self.judge(piece, path, found, expected) }
    }

    /// The outcome of a transfer of a piece: what was found of its checksum, and which is expected if one is.
    fn judge(
        &self,
        piece: Piece,
        path: &Path,
        found: Result<u32, Error>,
        expected: Option<u32>,
    ) -> Result<(), Error> {
        let generation = locked(&self.table).generation();
        let extent = || self.layout.name(piece.extent).to_owned();
        match found {
            Ok(crc) if expected.is_none_or(|expected| crc == expected) => Ok(()),
            Ok(_) => Err(Error::Checksum {
                path: path.to_owned(),
                extent: extent(),
                piece: piece.number,
                offset_bytes: piece.offset_bytes,
                generation,
            }),
            Err(error) => Err(Error::Piece {
                extent: extent(),
                piece: piece.number,
                generation,
                source: Box::new(error),
            }),
        }
    }
}

fn layout_of(specs: Vec<ExtentSpec>, options: &StoreOptions) -> Result<Layout, Error> {
    let StoreOptions { piece_bytes, in_place, ref stripes, .. } = *options;
    Layout::new(specs, Form { piece_bytes, in_place, stripes: stripes.clone() })
}
