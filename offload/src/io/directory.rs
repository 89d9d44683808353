//! Locked directories of preallocated files: what the backends of real disks share.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use super::{
    FileId, FileSpec, Verb,
    fault::{FaultPoint, Script},
    progress::Progress,
};
use crate::{Error, Notice, locked};

const LOCK_NAME: &str = ".lock";

/// Longest document that is read: a file of another kind in its place must not take all memory.
const DOCUMENT_BYTES_MAX: u64 = 1 << 30;

#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    lock: File,
    /// Locks of the other directories that files are in.
    stripe_locks: OnceLock<Vec<File>>,
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
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Closing is not enough: a child process that is just being started has the file open too.
        for lock in self.stripe_locks.get().into_iter().flatten().chain([&self.lock]) {
            let _ = lock.unlock();
        }
    }
}

impl Directory {
    /// Locks an existing directory. System calls fail as the script says.
    pub(crate) fn lock(path: &Path, script: Arc<Script>) -> Result<Self, Error> {
        Ok(Self {
            path: path.to_owned(),
            lock: lock(path)?,
            stripe_locks: OnceLock::new(),
            files: OnceLock::new(),
            notices: Mutex::default(),
            script,
        })
    }

    pub(crate) fn script(&self) -> &Arc<Script> {
        &self.script
    }

    pub(crate) fn files(&self) -> &[OpenFile] {
        self.files.get().map_or(&[], Vec::as_slice)
    }

    /// The file of a request. A number that was never given out is an error of the request, not of the process.
    pub(crate) fn file(&self, file: FileId) -> Result<&OpenFile, Error> {
        self.files().get(file.0).ok_or_else(|| Error::File {
            operation: "find file number",
            path: self.path.join(file.0.to_string()),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// Directories with files.
    pub(crate) fn count(&self) -> usize {
        1 + self.stripe_locks.get().map_or(0, Vec::len)
    }

    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn notices(&self) -> Vec<Notice> {
        locked(&self.notices).clone()
    }

    /// The directory of a file.
    fn directory_of(&self, spec: &FileSpec) -> PathBuf {
        self.path_of(&spec.name).parent().map_or_else(|| self.path.clone(), Path::to_owned)
    }

    /// The directories that files are in beside this one.
    fn stripes_of(&self, files: &[FileSpec]) -> Vec<PathBuf> {
        let mut stripes: Vec<_> = files.iter().map(|spec| self.directory_of(spec)).collect();
        stripes.dedup();
        stripes.retain(|stripe| *stripe != self.path);
        stripes
    }

    fn lock_stripes(&self, files: &[FileSpec]) -> Result<(), Error> {
        let locks =
            self.stripes_of(files).iter().map(|stripe| lock(stripe)).collect::<Result<Vec<_>, _>>()?;
        // A second call keeps the first locks; a store makes only one.
        let _ = self.stripe_locks.set(locks);
        Ok(())
    }

    /// Makes the files at their full size; on an error removes what was made.
    pub(crate) fn allocate_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.lock_stripes(files)?;
        let made = files.iter().map(|spec| self.allocate_file(spec)).collect::<Result<Vec<_>, Error>>();
        let made = made.and_then(|made| {
            for stripe in self.stripes_of(files) {
                self.script.sync_directory(&stripe)?;
            }
            self.script.sync_directory(&self.path)?;
            Ok(made)
        });
        let made = made.map_err(|error| {
            for spec in files {
                let _ = fs::remove_file(self.path_of(&spec.name));
            }
            match error {
                Error::File { source, path, .. } if is_full(&source) => {
                    // What could not be made or synced is a file, or the directory itself.
                    let of_file = path.parent().filter(|_| !path.is_dir()).map(Path::to_owned);
                    let directory = of_file.unwrap_or(path);
                    let here = files.iter().filter(|spec| self.directory_of(spec) == directory);
                    Error::DiskFull {
                        needed_bytes: here.map(|spec| spec.bytes).sum(),
                        available_bytes: available_bytes(&directory),
                        path: directory,
                    }
                }
                other => other,
            }
        })?;
        self.keep(made);
        Ok(())
    }

    /// Opens files made earlier and checks their sizes.
    pub(crate) fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        // Before anything is locked: in the directory of a disk that is not mounted nothing must be made.
        for spec in files {
            let (directory, missing) = (self.directory_of(spec), self.path_of(&spec.name));
            if directory != self.path && !missing.exists() {
                return Err(Error::MissingStripe { directory, missing });
            }
        }
        self.lock_stripes(files)?;
        let mut opened = Vec::with_capacity(files.len());
        for spec in files {
            let open = self.open(&spec.name, OpenOptions::new().read(true).write(true), FaultPoint::Open)?;
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

    fn allocate_file(&self, spec: &FileSpec) -> Result<OpenFile, Error> {
        let open = self.open(
            &spec.name,
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o644),
            FaultPoint::Allocate,
        )?;
        let failed = |operation, source| Error::File { operation, path: self.path_of(&spec.name), source };
        match self.script.call(FaultPoint::Allocate, &open.path, || reserve_space(&open.file, spec.bytes)) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                open.file.set_len(spec.bytes).map_err(|source| failed("set the size of", source))?;
                let text = format!(
                    "the file system of {} cannot reserve space: it may fill up",
                    open.path.display()
                );
                self.note_once(Notice::new("space-not-reserved", text));
            }
            Err(error) => return Err(failed("reserve the space of", error)),
        }
        let synced = self.script.call(FaultPoint::Sync, &open.path, || open.file.sync_all());
        synced.map_err(|source| failed("sync", source))?;
        Ok(open)
    }

    /// Opens past the page cache where the file system allows it.
    fn open(&self, name: &str, options: &mut OpenOptions, point: FaultPoint) -> Result<OpenFile, Error> {
        let path = self.path_of(name);
        let direct =
            self.script.call(point, &path, || options.clone().custom_flags(libc::O_DIRECT).open(&path));
        let is_direct = direct.is_ok();
        let file = match direct {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let text = format!(
                    "the file system of {} refuses direct transfers: they are buffered",
                    path.display()
                );
                self.note_once(Notice::new("direct-io-refused", text));
                options.open(&path)
            }
            other => other,
        };
        let file = file.map_err(|source| Error::File { operation: "open", path: path.clone(), source })?;
        Ok(OpenFile { path, file, is_direct })
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

    /// New file, sync, rename, sync of the directory: a reader finds the old document or the new one.
    pub(crate) fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (path, new_path) = (self.path_of(name), self.path_of(&format!("{name}.new")));
        let script = &self.script;
        let made = script.call(FaultPoint::SaveDocument, &new_path, || File::create(&new_path));
        let written = made.and_then(|file| {
            Progress::new(Verb::Write, bytes.len()).run(|done_bytes| {
                script.transfer(FaultPoint::SaveDocument, &new_path, || {
                    file.write_at(&bytes[done_bytes..], done_bytes as u64)
                })
            })?;
            script.call(FaultPoint::Sync, &new_path, || file.sync_all())
        });
        written.map_err(|source| Error::File { operation: "write", path: new_path.clone(), source })?;
        let replaced = script.call(FaultPoint::Rename, &path, || fs::rename(&new_path, &path));
        replaced.map_err(|source| Error::File { operation: "replace", path: path.clone(), source })?;
        self.script.sync_directory(path.parent().unwrap_or(&self.path))
    }

    pub(crate) fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path_of(name);
        let script = &self.script;
        let opened = script.call(FaultPoint::LoadDocument, &path, || File::open(&path));
        let read = opened.and_then(|file| {
            let bytes = file.metadata()?.len();
            if bytes > DOCUMENT_BYTES_MAX {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut document = vec![0; bytes as usize];
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

/// Makes a directory, and its entry in the one above it durable. One that is there already is left as it is.
pub(crate) fn make_directory(script: &Script, path: &Path) -> Result<(), Error> {
    let made = script.call(FaultPoint::Allocate, path, || fs::create_dir(path));
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(|source| Error::File { operation: "make", path: path.to_owned(), source })?,
    }
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    script.sync_directory(above.unwrap_or(Path::new(".")))
}

fn lock(directory: &Path) -> Result<File, Error> {
    let path = directory.join(LOCK_NAME);
    let failed = |source| Error::File { operation: "lock", path: path.clone(), source };
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { directory: directory.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

fn reserve_space(file: &File, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let length = libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: the descriptor is open, and the call touches no memory of this process.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// Free bytes of a file system; 0 when it does not say.
fn available_bytes(path: &Path) -> u64 {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else { return 0 };
    let mut statistics = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends in a zero byte and the target has room for the answer.
    if unsafe { libc::statvfs(path.as_ptr(), statistics.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: the call succeeded and so has filled it in.
    let statistics = unsafe { statistics.assume_init() };
    statistics.f_bavail * statistics.f_frsize
}

#[cfg(test)]
mod tests {
    use super::super::fault::journal::{self, Call};
    use super::*;

    fn directory(path: &Path) -> Directory {
        Directory::lock(path, Arc::default()).unwrap()
    }

    /// What a disk that keeps nothing it was not told to, and writes what it likes before that, may do to a document
    /// that was replaced by these calls: none where the power may go at every instant.
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
            // The disk that stands for a real one finds each step that is left out, and the two that are exchanged.
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
            make_directory(&Script::default(), path).unwrap();
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
        make_directory(&Script::default(), &stripe).unwrap();
        make_directory(&Script::default(), &stripe).unwrap();
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
