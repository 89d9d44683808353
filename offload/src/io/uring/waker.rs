//! How the ring's thread is woken while it waits for completions: a pipe that the ring itself watches.
//!
//! A pipe that is closed wakes who reads from it. So a wake-up that cannot be written closes it, and the
//! thread then waits for submissions by their channel whenever it has nothing in flight: less goes on at
//! once, and nothing waits for ever.

use std::{
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{io::progress::retried, locked};

/// The end of those who submit.
#[derive(Debug)]
pub(super) struct Waker {
    pipe: Mutex<Option<PipeWriter>>,
    is_pending: Arc<AtomicBool>,
}

/// The end of the ring's thread.
#[derive(Debug)]
pub(super) struct Sleeper {
    pipe: PipeReader,
    is_pending: Arc<AtomicBool>,
}

pub(super) fn pair() -> io::Result<(Waker, Sleeper)> {
    let (reader, writer) = io::pipe()?;
    let is_pending = Arc::new(AtomicBool::new(false));
    let waker = Waker { pipe: Mutex::new(Some(writer)), is_pending: is_pending.clone() };
    Ok((waker, Sleeper { pipe: reader, is_pending }))
}

impl Waker {
    /// Wakes the thread, now or when it next would sleep.
    pub(super) fn wake(&self) {
        // There is at most one byte in the pipe, so that writing never waits.
        if self.is_pending.swap(true, Ordering::SeqCst) {
            return;
        }
        let mut pipe = locked(&self.pipe);
        if let Some(Err(error)) = pipe.as_mut().map(|pipe| retried(|| pipe.write_all(&[1]))) {
            tracing::warn!(%error, "the io_uring thread cannot be woken while it has transfers in flight");
            *pipe = None;
        }
    }

    /// Wakes the thread for good.
    pub(super) fn close(&self) {
        // Both ways: either may fail.
        self.wake();
        *locked(&self.pipe) = None;
    }
}

impl Sleeper {
    /// What becomes readable at a wake-up.
    pub(super) fn descriptor(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }

    /// Takes back the wake-up that there is. Answers whether there can be another.
    pub(super) fn clear(&mut self) -> bool {
        let read = retried(|| self.pipe.read(&mut [0]));
        // What is submitted from here on wakes again; what was submitted before is found by who clears.
        self.is_pending.store(false, Ordering::SeqCst);
        matches!(read, Ok(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wake_ups_are_one_until_they_are_cleared_and_the_end_is_told_too() {
        let (waker, mut sleeper) = pair().unwrap();
        for _ in 0..3 {
            waker.wake();
            waker.wake();
            assert!(sleeper.clear());
        }
        waker.close();
        waker.wake();
        assert!(sleeper.clear(), "a wake-up, in case the pipe cannot be closed");
        assert!(!sleeper.clear(), "and the end");
    }
}
