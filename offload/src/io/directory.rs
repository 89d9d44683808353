//! Locked directories of preallocated files: what the backends of real disks share.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use rustix::fs::{FallocateFlags, OFlags};

use super::{
    FileId, FileSpec, Verb,
    fault::{FaultPoint, Script},
    limits,
    progress::Progress,
};
use crate::{Access, Error, Folder, Notice, locked};

const LOCK_NAME: &str = ".lock";

/// Longest document that is read: a file of another kind in its place must not take all memory.
const DOCUMENT_BYTES_MAX: u64 = 1 << 30;

/// What a directory is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To keep files in it, alone.
    Write,
    /// To read what is there. Nothing is made or changed, so that a file system may be read-only, and its
    /// files another user's; a lock that may not be taken is done without.
    Read,
    /// To keep files in it that have no names and end with the process. No name in it is touched.
    Temporary,
}

#[derive(Debug)]
pub(crate) struct Directory {
    own: Arc<Folder>,
    purpose: Purpose,
    /// The other directories that files are in, opened when they are first asked for.
    stripes: Mutex<Vec<Arc<Folder>>>,
    locks: Mutex<Vec<Lock>>,
    files: OnceLock<Vec<OpenFile>>,
    notices: Mutex<Vec<Notice>>,
    script: Arc<Script>,
}

#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Whether transfers go past the page cache.
    pub(crate) is_direct: bool,
    folder: Arc<Folder>,
    name: String,
}

#[derive(Debug)]
struct Lock {
    folder: Arc<Folder>,
    file: File,
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Closing is not enough: a child process that is just being started has the file open too.
        for lock in locked(&self.locks).iter() {
            let _ = lock.file.unlock();
        }
    }
}

impl Directory {
    /// Opens an existing directory, and locks it if it is to be written. System calls fail as the script
    /// says.
    pub(crate) fn open(path: &Path, purpose: Purpose, script: Arc<Script>) -> Result<Self, Error> {
        limits::report_file_size_limit();
        let own = Folder::open(path);
        let own = own.map_err(|source| Error::File { operation: "open", path: path.to_owned(), source })?;
        let this = Self {
            own: Arc::new(own),
            purpose,
            stripes: Mutex::default(),
            locks: Mutex::default(),
            files: OnceLock::new(),
            notices: Mutex::default(),
            script,
        };
        this.lock(&this.own)?;
        Ok(this)
    }

    pub(crate) fn script(&self) -> &Arc<Script> {
        &self.script
    }

    pub(crate) fn folder(&self) -> &Arc<Folder> {
        &self.own
    }

    pub(crate) fn files(&self) -> &[OpenFile] {
        self.files.get().map_or(&[], Vec::as_slice)
    }

    /// The file of a request. A number that was never given out is an error of the request, not of the
    /// process.
    pub(crate) fn file(&self, file: FileId) -> Result<&OpenFile, Error> {
        self.files().get(file.0).ok_or_else(|| Error::File {
            operation: "find file number",
            path: self.path_of(&file.0.to_string()),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// Directories with files.
    pub(crate) fn count(&self) -> usize {
        1 + locked(&self.stripes).len()
    }

    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.own.path().join(name)
    }

    pub(crate) fn notices(&self) -> Vec<Notice> {
        locked(&self.notices).clone()
    }

    /// The directory of a file or document, and its name there.
    fn locate(&self, name: &str) -> Result<(Arc<Folder>, String), Error> {
        let path = Path::new(name);
        let directory = path.parent().unwrap_or(Path::new(""));
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if directory.as_os_str().is_empty() {
            return Ok((self.own.clone(), file));
        }
        let mut stripes = locked(&self.stripes);
        if let Some(known) = stripes.iter().find(|stripe| stripe.path() == directory) {
            return Ok((known.clone(), file));
        }
        let opened = Folder::open(directory).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Error::MissingStripe { directory: directory.to_owned(), missing: path.to_owned() }
            }
            _ => Error::File { operation: "open", path: directory.to_owned(), source },
        })?;
        let opened = Arc::new(opened);
        stripes.push(opened.clone());
        Ok((opened, file))
    }

    /// All directories, the own one first.
    fn folders(&self) -> Vec<Arc<Folder>> {
        std::iter::once(&self.own).chain(locked(&self.stripes).iter()).cloned().collect()
    }

    /// Locks the directories of files that are not locked yet.
    fn lock_stripes(&self, files: &[FileSpec]) -> Result<(), Error> {
        for spec in files {
            let (folder, _) = self.locate(&spec.name)?;
            let is_locked = Arc::ptr_eq(&folder, &self.own)
                || locked(&self.locks).iter().any(|lock| Arc::ptr_eq(&folder, &lock.folder));
            if !is_locked {
                self.lock(&folder)?;
            }
        }
        Ok(())
    }

    /// Locks a directory as its purpose asks for.
    fn lock(&self, folder: &Arc<Folder>) -> Result<(), Error> {
        let access = match self.purpose {
            Purpose::Write => Access::Make,
            Purpose::Read => Access::Read,
            Purpose::Temporary => return Ok(()),
        };
        let failed = |source| Error::File { operation: "lock", path: folder.path().join(LOCK_NAME), source };
        let file = match folder.open_file(LOCK_NAME, access) {
            // Without it, nobody can say whether a run is under way. What is read is checked by its sums.
            Err(error) if self.purpose == Purpose::Read && is_denied(&error) => return Ok(()),
            opened => opened.map_err(failed)?,
        };
        let in_use = || Error::Locked { directory: folder.path().to_owned() };
        let taken = if self.purpose == Purpose::Read { file.try_lock_shared() } else { file.try_lock() };
        match taken {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use()),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // Somebody may have removed it between the two calls, and another process have made it anew.
        folder.check_file(LOCK_NAME, &file).map_err(|_| in_use())?;
        locked(&self.locks).push(Lock { folder: folder.clone(), file });
        Ok(())
    }

    /// Makes the files at their full size; on an error removes what was made.
    pub(crate) fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.lock_stripes(files)?;
        let mut made = Vec::with_capacity(files.len());
        let all = files.iter().try_for_each(|spec| self.allocate_file(spec, &mut made));
        let all = all.and_then(|()| self.folders().iter().try_for_each(|folder| self.sync_folder(folder)));
        if let Err(error) = all {
            for OpenFile { folder, name, .. } in made.iter().filter(|_| self.purpose == Purpose::Write) {
                let _ = folder.unlink(name);
            }
            return Err(match error {
                Error::File { source, path, .. } if is_full(&source) => self.disk_full(files, &path),
                other => other,
            });
        }
        self.keep(made);
        Ok(())
    }

    /// The error of a file system that was full when this file, or directory, was made or synced.
    fn disk_full(&self, files: &[FileSpec], path: &Path) -> Error {
        let directory_of = |spec: &FileSpec| self.locate(&spec.name).ok().map(|(folder, _)| folder);
        let folders = self.folders();
        let folder =
            folders.iter().find(|folder| path == folder.path() || path.parent() == Some(folder.path()));
        let folder = folder.unwrap_or(&self.own);
        let here = files.iter().filter(|spec| directory_of(spec).is_some_and(|of| Arc::ptr_eq(&of, folder)));
        Error::DiskFull {
            path: folder.path().to_owned(),
            needed_bytes: here.map(|spec| spec.bytes).sum(),
            available_bytes: folder.free_bytes(),
        }
    }

    fn sync_folder(&self, folder: &Folder) -> Result<(), Error> {
        let synced = self.script.call(FaultPoint::SyncDirectory, folder.path(), || folder.sync());
        synced.map_err(|source| Error::File { operation: "sync", path: folder.path().to_owned(), source })
    }

    /// Opens files made earlier and checks their sizes.
    pub(crate) fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        // Before anything is locked: in the directory of a disk that is not mounted nothing must be made.
        for spec in files {
            let (folder, name) = self.locate(&spec.name)?;
            let missing = self.path_of(&spec.name);
            let is_there = folder.has(&name);
            let is_there = is_there.map_err(|source| Error::File {
                operation: "find",
                path: missing.clone(),
                source,
            })?;
            if !Arc::ptr_eq(&folder, &self.own) && !is_there {
                return Err(Error::MissingStripe { directory: folder.path().to_owned(), missing });
            }
        }
        self.lock_stripes(files)?;
        let mut opened = Vec::with_capacity(files.len());
        let access = if self.purpose == Purpose::Read { Access::Read } else { Access::Write };
        for spec in files {
            let open = self.open_file(&spec.name, access, FaultPoint::Open)?;
            let failed = |source| Error::File { operation: "inspect", path: open.path.clone(), source };
            let metadata = self.script.call(FaultPoint::Open, &open.path, || open.file.metadata());
            let found_bytes = metadata.map_err(failed)?.len();
            if found_bytes < spec.bytes {
                let path = open.path;
                return Err(Error::TruncatedFile { path, expected_bytes: spec.bytes, found_bytes });
            }
            opened.push(open);
        }
        self.keep(opened);
        Ok(())
    }

    fn keep(&self, files: Vec<OpenFile>) {
        // A second call keeps the first files; a store makes only one.
        let _ = self.files.set(files);
    }

    fn allocate_file(&self, spec: &FileSpec, made: &mut Vec<OpenFile>) -> Result<(), Error> {
        // A file that is there already is left of a run that ended before its first commit.
        let open = self.open_file(&spec.name, Access::Make, FaultPoint::Allocate)?;
        made.push(open);
        let Some(OpenFile { file, path, .. }) = made.last() else { return Ok(()) };
        let failed = |operation, source| Error::File { operation, path: path.clone(), source };
        let call = |call: &dyn Fn() -> io::Result<()>| self.script.call(FaultPoint::Allocate, path, call);
        file.set_len(0).map_err(|source| failed("empty", source))?;
        match call(&|| reserve_space(file, spec.bytes)) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                file.set_len(spec.bytes).map_err(|source| failed("set the size of", source))?;
                let text =
                    format!("the file system of {} cannot reserve space: it may fill up", path.display());
                self.note_once(Notice::new("space-not-reserved", text));
            }
            Err(error) => return Err(too_large(path, spec.bytes, error, "reserve the space of")),
        }
        let synced = self.script.call(FaultPoint::Sync, path, || file.sync_all());
        synced.map_err(|source| failed("sync", source))
    }

    /// Opens past the page cache where the file system allows it.
    fn open_file(&self, name: &str, access: Access, point: FaultPoint) -> Result<OpenFile, Error> {
        let path = self.path_of(name);
        let (folder, name) = self.locate(name)?;
        let open = |extra| match self.purpose {
            Purpose::Temporary => folder.make_temporary_with(extra),
            _ => folder.open_with(&name, access, extra),
        };
        let direct = self.script.call(point, &path, || open(OFlags::DIRECT));
        let is_direct = direct.is_ok();
        let file = match direct {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let text = format!(
                    "the file system of {} refuses direct transfers: they are buffered",
                    path.display()
                );
                self.note_once(Notice::new("direct-io-refused", text));
                open(OFlags::empty())
            }
            other => other,
        };
        let file = file.map_err(|source| Error::File { operation: "open", path: path.clone(), source })?;
        Ok(OpenFile { path, file, is_direct, folder, name })
    }

    fn note_once(&self, notice: Notice) {
        let mut notices = locked(&self.notices);
        if !notices.iter().any(|earlier| earlier.code == notice.code) {
            notices.push(notice);
        }
    }

    pub(crate) fn sync(&self, file: FileId) -> Result<(), Error> {
        let open = self.file(file)?;
        let synced = self.script.call(FaultPoint::Sync, &open.path, || open.file.sync_data());
        synced.map_err(|source| Error::File { operation: "sync", path: open.path.clone(), source })
    }

    /// Checks that every file, and every lock, is still the one that has its name.
    pub(crate) fn check_files(&self) -> Result<(), Error> {
        if self.purpose != Purpose::Write {
            return Ok(());
        }
        for lock in locked(&self.locks).iter() {
            lock.folder.check_file(LOCK_NAME, &lock.file)?;
        }
        self.files().iter().try_for_each(|open| open.folder.check_file(&open.name, &open.file))
    }

    /// Checks that the path of every directory still leads to it.
    pub(crate) fn check_paths(&self) -> Result<(), Error> {
        match self.purpose {
            Purpose::Temporary => Ok(()),
            _ => self.folders().iter().try_for_each(|folder| folder.check_path()),
        }
    }

    /// New file, sync, rename, sync of the directory: a reader finds the old document or the new one.
    pub(crate) fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        match self.purpose {
            Purpose::Write => {}
            Purpose::Temporary => return Ok(()),
            Purpose::Read => return Err(Error::ReadOnly { directory: self.own.path().to_owned() }),
        }
        let (path, new_path) = (self.path_of(name), self.path_of(&format!("{name}.new")));
        let (folder, name) = self.locate(name)?;
        let new_name = format!("{name}.new");
        let script = &self.script;
        let made =
            script.call(FaultPoint::SaveDocument, &new_path, || folder.open_file(&new_name, Access::Replace));
        let written = made.and_then(|file| {
            Progress::new(Verb::Write, bytes.len()).run(|done_bytes| {
                script.transfer(FaultPoint::SaveDocument, &new_path, || {
                    file.write_at(&bytes[done_bytes..], done_bytes as u64)
                })
            })?;
            script.call(FaultPoint::Sync, &new_path, || file.sync_all())
        });
        written.map_err(|source| too_large(&new_path, bytes.len() as u64, source, "write"))?;
        let replaced = script.call(FaultPoint::Rename, &path, || folder.rename(&new_name, &name));
        replaced.map_err(|source| Error::File { operation: "replace", path: path.clone(), source })?;
        self.sync_folder(&folder)
    }

    pub(crate) fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        if self.purpose == Purpose::Temporary {
            return Ok(None);
        }
        let path = self.path_of(name);
        let (folder, name) = self.locate(name)?;
        let script = &self.script;
        let opened = script.call(FaultPoint::LoadDocument, &path, || folder.open_file(&name, Access::Read));
        let read = opened.and_then(|file| {
            let bytes = file.metadata()?.len();
            if bytes > DOCUMENT_BYTES_MAX {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut document = Vec::new();
            document.try_reserve_exact(bytes as usize)?;
            document.resize(bytes as usize, 0);
            Progress::new(Verb::Read, document.len()).run(|done_bytes| {
                script.transfer(FaultPoint::LoadDocument, &path, || {
                    file.read_at(&mut document[done_bytes..], done_bytes as u64)
                })
            })?;
            Ok(document)
        });
        match read {
            Ok(document) => Ok(Some(document)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { operation: "read", path, source }),
        }
    }
}

/// Makes a directory. Answers false for one that is there already, which is left as it is.
pub(crate) fn make_directory(script: &Script, path: &Path) -> Result<bool, Error> {
    match script.call(FaultPoint::Allocate, path, || fs::create_dir(path)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(Error::File { operation: "make", path: path.to_owned(), source }),
    }
}

/// Makes the entry of a directory in the one above it durable.
pub(crate) fn sync_entry(script: &Script, path: &Path) -> Result<(), Error> {
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    script.sync_directory(above.unwrap_or(Path::new(".")))
}

fn reserve_space(file: &File, bytes: u64) -> io::Result<()> {
    match bytes {
        0 => Ok(()),
        _ => Ok(rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes)?),
    }
}

fn is_denied(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// An error of a file that was to have so many bytes, which may be too many.
fn too_large(path: &Path, bytes: u64, source: io::Error, operation: &'static str) -> Error {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EFBIG) => Error::FileTooLarge { path, bytes, limit_bytes: limits::file_bytes_max() },
        _ => Error::File { operation, path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::journal::{self, Call};
    use super::*;

    fn directory(path: &Path) -> Directory {
        Directory::open(path, Purpose::Write, Arc::default()).unwrap()
    }

    /// What a disk that keeps nothing it was not told to, and writes what it likes before that, may do to a
    /// document that was replaced by these calls: none where the power may go at every instant.
    fn harm(calls: &[Call], document: &Path, new: &Path) -> Option<&'static str> {
        let last = |calls: &[Call], point: FaultPoint, path: &Path| {
            calls.iter().rposition(|(of, on)| *of == point && on == path)
        };
        for end in 0..=calls.len() {
            let before = &calls[..end];
            // The new name may be on the disk at once, and its bytes then have to be there already.
            let is_renamed = last(before, FaultPoint::Rename, document).is_some();
            let synced = last(before, FaultPoint::Sync, new);
            let is_whole = synced.is_some() && synced > last(before, FaultPoint::SaveDocument, new);
            if is_renamed && !is_whole {
                return Some("a name without its bytes");
            }
        }
        // At the end the new document is there to stay.
        let renamed = last(calls, FaultPoint::Rename, document);
        let synced = last(calls, FaultPoint::SyncDirectory, document.parent().unwrap());
        (renamed.is_none() || synced <= renamed).then_some("the old document after the new one was promised")
    }

    #[test]
    fn a_document_is_replaced_in_an_order_that_no_power_loss_harms_and_each_step_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let (document, new) = (folder.path().join("manifest.json"), folder.path().join("manifest.json.new"));
        let directory = directory(folder.path());
        for bytes in [&b"first"[..], b"second"] {
            journal::take();
            directory.save_document("manifest.json", bytes).unwrap();
            let calls = journal::take();
            assert_eq!(harm(&calls, &document, &new), None, "{calls:?}");
            assert_eq!(fs::read(&document).unwrap(), bytes);
            // The disk that stands for a real one finds each step that is left out, and the two that are
            // exchanged.
            for step in [FaultPoint::Sync, FaultPoint::Rename, FaultPoint::SyncDirectory] {
                let without: Vec<_> = calls.iter().filter(|(point, _)| *point != step).cloned().collect();
                assert_eq!(without.len() + 1, calls.len(), "{step:?} is done once");
                assert!(harm(&without, &document, &new).is_some(), "nobody misses {step:?}");
            }
            for first in 1..calls.len() - 1 {
                let mut exchanged = calls.clone();
                exchanged.swap(first, first + 1);
                assert!(harm(&exchanged, &document, &new).is_some(), "{exchanged:?}");
            }
        }
    }

    #[test]
    fn what_was_made_is_durable_before_it_is_answered_names_too() {
        let folder = tempfile::tempdir().unwrap();
        let (above, own) = (folder.path().join("above"), folder.path().join("above/own"));
        journal::take();
        for path in [&above, &own] {
            assert!(make_directory(&Script::default(), path).unwrap());
            sync_entry(&Script::default(), path).unwrap();
        }
        let made = journal::take();
        let expected = [
            (FaultPoint::Allocate, above.clone()),
            (FaultPoint::SyncDirectory, folder.path().to_owned()),
            (FaultPoint::Allocate, own.clone()),
            (FaultPoint::SyncDirectory, above),
        ];
        assert_eq!(made, expected, "a directory is an entry of the one above it");

        let stripe = folder.path().join("stripe");
        assert!(make_directory(&Script::default(), &stripe).unwrap());
        assert!(!make_directory(&Script::default(), &stripe).unwrap());
        let names = ["a".into(), stripe.join("b").to_string_lossy().into_owned()];
        let specs = names.map(|name| FileSpec { name, bytes: 8192 });
        journal::take();
        directory(&own).allocate_files(&specs).unwrap();
        let calls = journal::take();
        let last = |point, path: &Path| calls.iter().rposition(|call| *call == (point, path.to_owned()));
        for (directory, name) in [(&own, "a"), (&stripe, "b")] {
            let file = directory.join(name);
            let allocated = last(FaultPoint::Allocate, &file);
            assert!(allocated.is_some() && last(FaultPoint::Sync, &file) > allocated, "{calls:?}");
            assert!(last(FaultPoint::SyncDirectory, directory) > allocated, "{calls:?}");
        }
    }
}
