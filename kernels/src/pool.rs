//! The host's arithmetic has threads of its own, so that it never waits for, or holds up, candle's.

use crate::Error;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Elements of one task. Fixed, so that no result depends on the number of threads.
pub(crate) const CHUNK_ELEMENTS: usize = 64 * 1024;

/// Threads for loops over runs of elements.
#[derive(Debug)]
pub struct Pool(rayon::ThreadPool);

impl Pool {
    /// Starts `threads` threads, at least one.
    ///
    /// # Errors
    /// [`Error::Threads`] if the system gives none.
    pub fn new(threads: usize) -> Result<Self, Error> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|number| format!("ferrozero host {number}"))
            .build()
            .map(Self)
            .map_err(|error| Error::Threads(error.to_string()))
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.0.current_num_threads()
    }

    /// Does `work` on every chunk and answers the results in order.
    pub(crate) fn map<T: Send, R: Send>(
        &self,
        chunks: Vec<T>,
        work: impl Fn(T) -> R + Sync + Send,
    ) -> Vec<R> {
        if chunks.len() < 2 {
            return chunks.into_iter().map(work).collect();
        }
        self.0.install(|| chunks.into_par_iter().map(work).collect())
    }
}
