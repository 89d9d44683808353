//! An opened directory: everything in it is reached through its handle, whatever becomes of its name.
//!
//! A path is looked up anew each time that it is used, so a folder that is renamed, replaced or mounted over
//! would be another one from one call to the next. A handle stays with the directory that was opened. And a
//! folder may be a stranger's: in it, only regular files are opened, and no symbolic link is followed.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use crate::{Error, Whereabouts};

/// How a file of a [`Folder`] is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be read. It must be there.
    Read,
    /// To be read and written. It must be there.
    Write,
    /// To be read and written. It is made, empty, where it is not there.
    Make,
    /// To be read and written. It is made; whatever has its name, other than a directory, is unlinked first.
    Replace,
}

/// An opened directory. Names in it are single names, without a separator.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    handle: OwnedFd,
}

impl Folder {
    /// Opens the directory that `path` leads to. Symbolic links in `path` itself are followed: its owner has
    /// chosen them.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let named = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let handle = rustix::fs::openat(CWD, named, flags, Mode::empty())?;
        Ok(Self { path: path.to_owned(), handle })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is now, by an absolute path without symbolic links: none where the system does not tell.
    pub fn place(&self) -> Option<PathBuf> {
        place_of(&self.handle)
    }

    /// Opens or makes a file.
    ///
    /// # Errors
    /// What the file system answers, and an error for what is not a regular file: a symbolic link, a FIFO, a
    /// device.
    pub fn open_file(&self, name: &str, access: Access) -> io::Result<File> {
        self.open_with(name, access, OFlags::empty())
    }

    /// As [`Self::open_file`], with flags such as `O_DIRECT`.
    pub(crate) fn open_with(&self, name: &str, access: Access, extra: OFlags) -> io::Result<File> {
        let kind = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
            Access::Make => OFlags::RDWR | OFlags::CREATE,
            Access::Replace => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
        };
        if access == Access::Replace {
            self.unlink(name)?;
        }
        // Without O_NONBLOCK a FIFO would wait for its other end.
        let flags = kind | extra | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.handle, single(name)?, flags, Mode::from_raw_mode(0o644));
        let file = opened.map_err(|errno| match errno {
            Errno::LOOP => irregular("a symbolic link"),
            errno => errno.into(),
        })?;
        match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(io::ErrorKind::IsADirectory.into()),
            FileType::Fifo => return Err(irregular("a FIFO")),
            _ => return Err(irregular("a device")),
        }
        // It would make io_uring answer EAGAIN where it should wait for the disk.
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Ok(file.into())
    }

    /// Makes a file without a name, which ends with its last handle: a kill leaves nothing of it behind.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn make_temporary(&self) -> io::Result<File> {
        self.make_temporary_with(OFlags::empty())
    }

    /// As [`Self::make_temporary`], with flags such as `O_DIRECT`.
    pub(crate) fn make_temporary_with(&self, extra: OFlags) -> io::Result<File> {
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC | extra, Mode::from_raw_mode(0o600));
        match rustix::fs::openat(&self.handle, c".", flags | OFlags::TMPFILE, mode) {
            // Not every file system can, and older kernels say so in other words.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => self.make_hidden(flags, mode),
            opened => Ok(opened?.into()),
        }
    }

    /// A file that has a name for a moment, of which nobody would think.
    fn make_hidden(&self, flags: OFlags, mode: Mode) -> io::Result<File> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".ferrozero-temporary-{}-{number}", std::process::id());
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.handle, name.as_str(), flags, mode)?;
        self.unlink(&name)?;
        Ok(file.into())
    }

    /// Gives a file another name; whatever has that name is replaced, in one step.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.handle, single(from)?, &self.handle, single(to)?)?)
    }

    /// Removes a file, if it is there. Of a symbolic link, the link.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn unlink(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.handle, single(name)?, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            unlinked => Ok(unlinked?),
        }
    }

    /// Makes the names in it durable.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.handle)?)
    }

    /// The names in it, in order.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = Dir::read_from(&self.handle)?.map(|entry| {
            let name = entry?.file_name().to_bytes().to_vec();
            Ok(OsString::from_vec(name))
        });
        let mut names = entries.collect::<io::Result<Vec<_>>>()?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    /// Whether something has this name, of whatever kind.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn has(&self, name: &str) -> io::Result<bool> {
        match rustix::fs::statat(&self.handle, single(name)?, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            found => Ok(found.map(|_| true)?),
        }
    }

    /// Bytes that its file system has free; 0 where it does not say.
    pub(crate) fn free_bytes(&self) -> u64 {
        rustix::fs::fstatvfs(&self.handle)
            .map_or(0, |statistics| statistics.f_bavail.saturating_mul(statistics.f_frsize))
    }

    /// Checks that its path still leads to it: nobody has moved, replaced or removed it, or mounted something
    /// over it.
    ///
    /// # Errors
    /// [`Error::FolderMoved`], which says where it is, and [`Error::File`].
    pub fn check_path(&self) -> Result<(), Error> {
        let named = if self.path.as_os_str().is_empty() { Path::new(".") } else { &self.path };
        let failed =
            |errno: Errno| Error::File { operation: "find", path: self.path.clone(), source: errno.into() };
        let own = rustix::fs::fstat(&self.handle).map_err(failed)?;
        match rustix::fs::stat(named) {
            Ok(found) if is_same(&own, &found) => Ok(()),
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                Err(Error::FolderMoved { path: self.path.clone(), now: whereabouts(&self.handle, &own) })
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Checks that a name still leads to the file that was opened by it.
    ///
    /// # Errors
    /// [`Error::FileReplaced`] and [`Error::File`].
    pub fn check_file(&self, name: &str, file: &File) -> Result<(), Error> {
        let path = || self.path.join(name);
        let failed = |source: io::Error| Error::File { operation: "find", path: path(), source };
        let own = rustix::fs::fstat(file).map_err(|errno| failed(errno.into()))?;
        let name = single(name).map_err(failed)?;
        match rustix::fs::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if is_same(&own, &found) => Ok(()),
            Ok(_) | Err(Errno::NOENT) => {
                Err(Error::FileReplaced { path: path(), now: whereabouts(file, &own) })
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

/// A name that stays in its directory.
fn single(name: &str) -> io::Result<&str> {
    let leaves = name.is_empty() || name.contains('/') || name == "." || name == "..";
    if leaves { Err(io::ErrorKind::InvalidFilename.into()) } else { Ok(name) }
}

fn irregular(what: &str) -> io::Error {
    let text = format!("it is {what}, and only a regular file is opened here: remove it");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// Where an open file or directory is, as Linux tells it (`/proc/self/fd`, proc(5)).
fn place_of(handle: impl AsFd) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd())).ok()
}

/// What became of an open file or directory.
fn whereabouts(handle: impl AsFd, own: &Stat) -> Whereabouts {
    if own.st_nlink == 0 {
        return Whereabouts::Removed;
    }
    let Some(place) = place_of(handle) else { return Whereabouts::Unknown };
    match rustix::fs::stat(&place) {
        Ok(found) if is_same(own, &found) => Whereabouts::MovedTo(place),
        _ => Whereabouts::Covered,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn folder() -> (tempfile::TempDir, Folder) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("run")).unwrap();
        let folder = Folder::open(&root.path().join("run")).unwrap();
        (root, folder)
    }

    #[test]
    fn nothing_but_a_regular_file_is_opened_and_nothing_waits() {
        let (root, folder) = folder();
        let (outside, path) = (root.path().join("outside"), folder.path());
        fs::write(&outside, "mine").unwrap();
        symlink(&outside, path.join("link")).unwrap();
        rustix::fs::mknodat(CWD, path.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        fs::create_dir(path.join("directory")).unwrap();
        for access in [Access::Read, Access::Write, Access::Make] {
            for (name, word) in [("link", "symbolic link"), ("fifo", "FIFO"), ("directory", "directory")] {
                let error = folder.open_file(name, access).unwrap_err().to_string();
                assert!(error.contains(word), "{access:?} {name}: {error}");
            }
            for name in ["", ".", "..", "../outside", "directory/x"] {
                assert!(folder.open_file(name, access).is_err(), "{access:?} {name}");
            }
        }
        // What has a name that is to be ours gives way, and what a link leads to stays as it is.
        for name in ["link", "fifo"] {
            assert_eq!(folder.open_file(name, Access::Replace).unwrap().metadata().unwrap().len(), 0);
        }
        assert!(folder.open_file("directory", Access::Replace).is_err());
        assert_eq!(fs::read(&outside).unwrap(), b"mine");
    }

    #[test]
    fn temporary_files_have_no_name_also_where_the_file_system_must_give_them_one() {
        use std::io::{Read, Seek, Write};
        let (_root, folder) = folder();
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        for mut file in [folder.make_temporary().unwrap(), folder.make_hidden(flags, mode).unwrap()] {
            assert_eq!(folder.names().unwrap(), Vec::<OsString>::new());
            let mut text = String::new();
            file.write_all(b"bytes").unwrap();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "bytes");
        }
    }

    #[test]
    fn a_folder_that_moved_says_where_it_is_and_is_reached_all_the_same() {
        let (root, folder) = folder();
        let (path, aside) = (folder.path().to_owned(), root.path().canonicalize().unwrap().join("aside"));
        let file = folder.open_file("state", Access::Make).unwrap();
        folder.check_path().unwrap();
        folder.check_file("state", &file).unwrap();
        fs::rename(&path, &aside).unwrap();
        let moved = |now: Whereabouts| match folder.check_path() {
            Err(Error::FolderMoved { path: named, now: found }) => {
                assert_eq!((named, found), (path.clone(), now));
            }
            other => panic!("{other:?}"),
        };
        moved(Whereabouts::MovedTo(aside.clone()));
        fs::create_dir(&path).unwrap();
        moved(Whereabouts::MovedTo(aside.clone()));
        folder.check_file("state", &file).unwrap();
        folder.rename("state", "other").unwrap();
        assert!(aside.join("other").exists() && !path.join("other").exists());
        match folder.check_file("state", &file) {
            Err(Error::FileReplaced { now, .. }) => {
                assert_eq!(now, Whereabouts::MovedTo(aside.join("other")))
            }
            other => panic!("{other:?}"),
        }
        fs::remove_dir_all(&aside).unwrap();
        match folder.check_file("other", &file) {
            Err(Error::FileReplaced { now, .. }) => assert_eq!(now, Whereabouts::Removed),
            other => panic!("{other:?}"),
        }
        moved(Whereabouts::Removed);
    }
}
