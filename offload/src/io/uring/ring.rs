//! The thread that owns the ring, and every request until its completion.

use std::collections::VecDeque;

use crossbeam::channel::TryRecvError;
use io_uring::{squeue, types};

use super::*;
use crate::io::{
    Verb,
    progress::{Progress, Step},
};

/// Marks the wake-up among the completions; parts are marked by their place.
const WAKE: u64 = u64::MAX;

/// Times in a row, a millisecond apart, that the system may refuse to be entered: where it asks to be asked
/// again, and where it gives another reason.
const REFUSALS_MAX: [u32; 2] = [30_000, 100];

/// A request on its way to the thread.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) on_done: OnDone,
}

/// A request with parts waiting or in flight.
struct Active {
    submission: Submission,
    parts_left: usize,
    /// The first failure of a part.
    error: Option<io::Error>,
}

/// A range of a request that is moved by one entry at a time.
struct Part {
    request: usize,
    file: types::Fd,
    start_bytes: usize,
    progress: Progress,
}

pub(super) struct Ring {
    // Dropped first: no request, with its buffer, is dropped before the ring that may write to it.
    ring: IoUring,
    shape: Shape,
    directory: Arc<Directory>,
    submissions: Receiver<Submission>,
    sleeper: Sleeper,
    is_waker_armed: bool,
    /// Whether submissions can no longer wake this thread while it waits for completions.
    is_deaf: bool,
    is_closing: bool,
    active: Vec<Option<Active>>,
    waiting: VecDeque<Part>,
    in_flight: Vec<Option<Part>>,
    /// Entries that the kernel may not have taken yet, in order.
    pushed: VecDeque<u64>,
    /// Times in a row that the system refused to be entered.
    refusals: u32,
}

/// Requests own their buffers, and the kernel may be writing to them: if this thread were to unwind and drop
/// them, other parts of the process would find foreign bytes in their memory.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("the io_uring thread panicked with buffers in flight");
            std::process::abort();
        }
    }
}

impl Ring {
    pub(super) fn new(
        ring: IoUring,
        shape: Shape,
        directory: Arc<Directory>,
        submissions: Receiver<Submission>,
        sleeper: Sleeper,
    ) -> Self {
        Self {
            ring,
            shape,
            directory,
            submissions,
            sleeper,
            is_waker_armed: false,
            is_deaf: false,
            is_closing: false,
            active: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: (0..shape.depth).map(|_| None).collect(),
            pushed: VecDeque::new(),
            refusals: 0,
        }
    }

    /// Until the sender of submissions is gone and all requests have ended.
    pub(super) fn run(mut self) {
        let _guard = AbortOnPanic;
        loop {
            self.take_submissions();
            let is_idle = self.active.iter().all(Option::is_none);
            if self.is_closing && is_idle {
                return;
            }
            if self.is_deaf && is_idle {
                self.wait_for_submission();
                continue;
            }
            self.arm_waker();
            self.start_parts();
            if let Err(error) = self.wait() {
                return self.give_up(&error);
            }
            self.take_completions();
        }
    }

    fn take_submissions(&mut self) {
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => self.split(submission),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.is_closing = true;
                    return;
                }
            }
        }
    }

    fn wait_for_submission(&mut self) {
        match self.submissions.recv() {
            Ok(submission) => self.split(submission),
            Err(_) => self.is_closing = true,
        }
    }

    fn split(&mut self, submission: Submission) {
        let (verb, length_bytes) = (submission.request.verb(), submission.request.length_bytes());
        let part_bytes = self.shape.part_bytes;
        let starts = (0..length_bytes).step_by(part_bytes);
        let parts_left = starts.len();
        if parts_left == 0 {
            return call_back(submission.on_done, submission.request, Ok(()));
        }
        let file = match self.directory.file(submission.request.file()) {
            Ok(open) => types::Fd(open.file.as_raw_fd()),
            Err(error) => return call_back(submission.on_done, submission.request, Err(error)),
        };
        let free = self.active.iter().position(Option::is_none);
        let request = free.unwrap_or_else(|| {
            self.active.push(None);
            self.active.len() - 1
        });
        self.active[request] = Some(Active { submission, parts_left, error: None });
        self.waiting.extend(starts.map(|start_bytes| {
            let progress = Progress::new(verb, part_bytes.min(length_bytes - start_bytes));
            Part { request, file, start_bytes, progress }
        }));
    }

    fn arm_waker(&mut self) {
        if self.is_waker_armed || self.is_deaf || self.is_closing {
            return;
        }
        let poll = opcode::PollAdd::new(types::Fd(self.sleeper.descriptor()), libc::POLLIN as u32);
        // SAFETY: a poll points to no memory, and `self` keeps the descriptor open longer than the ring.
        let pushed = unsafe { self.ring.submission().push(&poll.build().user_data(WAKE)) };
        self.is_waker_armed = pushed.is_ok();
        self.pushed.extend(pushed.ok().map(|()| WAKE));
    }

    /// Fills the free places with waiting parts.
    fn start_parts(&mut self) {
        for (place, slot) in self.in_flight.iter_mut().enumerate() {
            if slot.is_some() {
                continue;
            }
            let Some(part) = self.waiting.pop_front() else { return };
            let Some(Some(active)) = self.active.get_mut(part.request) else { continue };
            let entry = entry(&part, &mut active.submission.request);
            // SAFETY: the buffer is a part of the lease that `active` owns until all of the request's parts
            // have completed, and this thread aborts rather than drop it earlier. `self.directory` keeps the
            // file open.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(place as u64)) };
            if pushed.is_err() {
                // The queue takes all parts and the wake-up, so it is full only after a refused submission.
                self.waiting.push_front(part);
                return;
            }
            self.pushed.push_back(place as u64);
            *slot = Some(part);
        }
    }

    /// Enters the kernel until there is a completion. An error when that is refused again and again.
    fn wait(&mut self) -> io::Result<()> {
        let entered = self.ring.submit_and_wait(1);
        let untaken = self.ring.submission().len();
        self.pushed.drain(..self.pushed.len().saturating_sub(untaken));
        let Err(error) = entered else {
            self.refusals = 0;
            return Ok(());
        };
        let refusals_max = match error.raw_os_error() {
            Some(libc::EINTR) => return Ok(()),
            Some(libc::EAGAIN | libc::EBUSY) => REFUSALS_MAX[0],
            _ => REFUSALS_MAX[1],
        };
        self.refusals += 1;
        if self.refusals > refusals_max {
            return Err(error);
        }
        tracing::warn!(%error, "io_uring refused a submission");
        thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    /// Ends all requests, and those that are still to come, with an error. The kernel is not entered any
    /// more.
    fn give_up(mut self, error: &io::Error) {
        tracing::error!(%error, "io_uring takes no more submissions");
        // What the kernel has not taken it never will; all else completes by itself, and owns its buffer
        // until then.
        for place in std::mem::take(&mut self.pushed) {
            if let Some(slot) = self.in_flight.get_mut(place as usize) {
                *slot = None;
            }
        }
        while self.in_flight.iter().any(Option::is_some) {
            thread::sleep(Duration::from_millis(1));
            self.take_completions();
        }
        let again = || match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => error.kind().into(),
        };
        let refuse = |directory: &Directory, Submission { request, on_done }: Submission| {
            let path =
                directory.file(request.file()).map_or_else(|_| PathBuf::new(), |open| open.path.clone());
            let refusal = request.error(path, again());
            call_back(on_done, request, Err(refusal));
        };
        for Active { submission, .. } in self.active.iter_mut().filter_map(Option::take) {
            refuse(&self.directory, submission);
        }
        while let Ok(submission) = self.submissions.recv() {
            refuse(&self.directory, submission);
        }
    }

    fn take_completions(&mut self) {
        loop {
            let Some(completion) = self.ring.completion().next() else { return };
            let place = completion.user_data();
            if place == WAKE {
                self.is_waker_armed = false;
                self.is_deaf = !self.sleeper.clear();
                continue;
            }
            if let Some(part) = self.in_flight.get_mut(place as usize).and_then(Option::take) {
                let result = completion.result();
                let moved = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                self.advance(part, moved);
            }
        }
    }

    /// Continues a part, or ends it and perhaps its request.
    fn advance(&mut self, mut part: Part, moved: io::Result<usize>) {
        let Some(slot) = self.active.get_mut(part.request) else { return };
        let Some(active) = slot else { return };
        let moved = self.directory.script().distort(active.submission.request.verb(), moved);
        match part.progress.record(moved) {
            Step::Again => return self.waiting.push_back(part),
            Step::Failed(error) => drop(active.error.get_or_insert(error)),
            Step::Done => {}
        }
        active.parts_left -= 1;
        if active.parts_left > 0 {
            return;
        }
        if let Some(Active { submission: Submission { request, on_done }, error, .. }) = slot.take() {
            let result = match (error, self.directory.file(request.file())) {
                (None, _) => Ok(()),
                (Some(source), Ok(open)) => Err(request.error(open.path.clone(), source)),
                (Some(_), Err(unknown)) => Err(unknown),
            };
            call_back(on_done, request, result);
        }
    }
}

fn call_back(on_done: OnDone, request: Request, result: Result<(), Error>) {
    if catch_unwind(AssertUnwindSafe(|| on_done(request.complete(result)))).is_err() {
        tracing::error!("a completion callback panicked");
    }
}

/// What the kernel is asked to do next for a part.
fn entry(part: &Part, request: &mut Request) -> squeue::Entry {
    let done_bytes = part.start_bytes + part.progress.done_bytes();
    let offset_bytes = request.offset_bytes() + done_bytes as u64;
    let verb = request.verb();
    let buffer = &mut request.buffer_mut()[done_bytes..][..part.progress.left_bytes()];
    let (start, length) = (buffer.as_mut_ptr(), buffer.len() as u32);
    match verb {
        Verb::Read => opcode::Read::new(part.file, start, length).offset(offset_bytes).build(),
        Verb::Write => opcode::Write::new(part.file, start, length).offset(offset_bytes).build(),
    }
}
