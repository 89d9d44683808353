//! A few threads that take jobs from one queue.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread::{self, JoinHandle},
};

use crossbeam::channel::{Sender, unbounded};

use crate::Error;

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Threads that run jobs; dropping this runs those still queued and joins the threads.
///
/// The queue itself has no bound and so never blocks a callback that submits again; each job carries a lease,
/// so there are never more jobs than the arena has leases.
#[derive(Debug)]
pub(crate) struct Workers {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn spawn(name: &str, count: usize) -> Result<Self, Error> {
        let (jobs, queue) = unbounded::<Job>();
        let mut workers = Self { jobs: Some(jobs), threads: Vec::new() };
        for index in 0..count {
            let queue = queue.clone();
            let run = move || {
                for job in queue {
                    // A callback that panics must not take the thread, and with it all later jobs, along.
                    if catch_unwind(AssertUnwindSafe(job)).is_err() {
                        tracing::error!("a completion callback panicked");
                    }
                }
            };
            let builder = thread::Builder::new().name(format!("{name}-{index}"));
            workers.threads.push(builder.spawn(run).map_err(|source| Error::Thread { source })?);
        }
        Ok(workers)
    }

    /// A way to send jobs that keeps the threads alive as long as it exists.
    pub(crate) fn sender(&self) -> Sender<Job> {
        // INVARIANT: the sender is taken on drop only, and `self` is still there.
        self.jobs.clone().expect("taken only on drop")
    }

    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // The threads hold the receiver until the sender is dropped, so this cannot fail.
            let _ = jobs.send(Box::new(job));
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // The last owner may be a callback on one of these threads, which cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    #[test]
    fn a_panic_in_a_job_does_not_stop_the_next_one() {
        let finished = Arc::new(AtomicUsize::new(0));
        let workers = Workers::spawn("test", 1).unwrap();
        workers.run(|| std::panic::resume_unwind(Box::new("on purpose")));
        let counter = finished.clone();
        workers.run(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        drop(workers);
        assert_eq!(finished.load(Ordering::SeqCst), 1);
    }
}
