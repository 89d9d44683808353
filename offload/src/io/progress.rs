//! What one system call moved, and what is left to do.

use std::io;

use super::Verb;
use crate::PAGE_BYTES;

/// System calls in a row that may move nothing before a transfer is given up.
const STALLS_MAX: u32 = 1000;

/// How far a transfer has come.
#[derive(Debug)]
pub(crate) struct Progress {
    verb: Verb,
    length_bytes: usize,
    done_bytes: usize,
    stalls: u32,
}

/// What to do after a system call.
#[derive(Debug)]
pub(crate) enum Step {
    /// All bytes are there.
    Done,
    /// Call again for the bytes from `done_bytes` on.
    Again,
    /// Report this.
    Failed(io::Error),
}

impl Progress {
    pub(crate) fn new(verb: Verb, length_bytes: usize) -> Self {
        Self { verb, length_bytes, done_bytes: 0, stalls: 0 }
    }

    pub(crate) fn done_bytes(&self) -> usize {
        self.done_bytes
    }

    pub(crate) fn left_bytes(&self) -> usize {
        self.length_bytes - self.done_bytes
    }

    /// Takes the result of a call for all bytes from `done_bytes` on.
    ///
    /// A short transfer is continued at the last whole page, because direct transfers start at pages.
    pub(crate) fn record(&mut self, result: io::Result<usize>) -> Step {
        let left_bytes = self.left_bytes();
        let forward_bytes = match result {
            Ok(moved_bytes) if moved_bytes >= left_bytes => return Step::Done,
            Ok(0) => return Step::Failed(self.ended()),
            Ok(moved_bytes) => moved_bytes / PAGE_BYTES * PAGE_BYTES,
            Err(error) if is_transient(&error) && self.stalls < STALLS_MAX => 0,
            Err(error) => return Step::Failed(error),
        };
        self.done_bytes += forward_bytes;
        self.stalls = if forward_bytes > 0 { 0 } else { self.stalls + 1 };
        if self.stalls > STALLS_MAX { Step::Failed(self.ended()) } else { Step::Again }
    }

    /// Makes the calls `call(done_bytes)` until the transfer has ended.
    pub(crate) fn run(mut self, mut call: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
        loop {
            let result = call(self.done_bytes);
            match self.record(result) {
                Step::Done => return Ok(()),
                Step::Again => {}
                Step::Failed(error) => return Err(error),
            }
        }
    }

    fn ended(&self) -> io::Error {
        match self.verb {
            Verb::Read => io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before the request"),
            Verb::Write => io::Error::new(io::ErrorKind::WriteZero, "the file takes no more bytes"),
        }
    }
}

/// Makes a call that moves no bytes, again as long as it is interrupted or asks to be tried again.
pub(crate) fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..STALLS_MAX {
        match call() {
            Err(error) if is_transient(&error) => {}
            other => return other,
        }
    }
    call()
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn short_and_interrupted_calls_go_on_where_whole_pages_ended() {
        let mut results =
            vec![failure(libc::EINTR), Ok(5000), failure(libc::EAGAIN), Ok(100), Ok(8192)].into_iter();
        let mut starts = Vec::new();
        let run = Progress::new(Verb::Read, 12288).run(|done_bytes| {
            starts.push(done_bytes);
            results.next().unwrap()
        });
        assert!(run.is_ok());
        assert_eq!(starts, [0, 0, 4096, 4096, 4096]);
    }

    #[test]
    fn lasting_failures_are_reported_as_they_are() {
        let error = Progress::new(Verb::Write, 4096).run(|_| failure(libc::ENOSPC)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_and_no_endless_loop() {
        for (verb, kind) in
            [(Verb::Read, io::ErrorKind::UnexpectedEof), (Verb::Write, io::ErrorKind::WriteZero)]
        {
            assert_eq!(Progress::new(verb, 8192).run(|_| Ok(0)).unwrap_err().kind(), kind);
            assert_eq!(Progress::new(verb, 8192).run(|_| Ok(1)).unwrap_err().kind(), kind);
        }
        let error = Progress::new(Verb::Read, 8192).run(|_| failure(libc::EAGAIN)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    }
}
