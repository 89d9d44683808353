//! The state of one store in another that lies on disk differently.

use std::sync::mpsc::channel;

use super::{ExtentId, Store};
use crate::{Arena, Completion, Error, io::Verb};

/// Pieces in flight at once, where the arena has room for so many.
const PIECES_IN_FLIGHT: usize = 8;

impl Store {
    /// Copies the latest bytes of all state to `target`, a store made with the same extents and pieces but
    /// perhaps over other directories, or in place, or on another backend. `target` is not committed: do that
    /// with what [`Store::committed`] of this one says. Until then it holds nothing, and this one stays as it
    /// is, so a kill at any time loses nothing.
    ///
    /// # Errors
    /// [`Error::BadLayout`] if extents or pieces differ; [`Error::ArenaExhausted`] if not one piece fits the
    /// arena; the first error of a transfer, such as [`Error::Checksum`].
    pub fn copy_to(&self, target: &Store, arena: &Arena) -> Result<(), Error> {
        let specs =
            |store: &Store| store.extents().iter().map(|extent| extent.spec.clone()).collect::<Vec<_>>();
        if self.piece_bytes() != target.piece_bytes() || specs(self) != specs(target) {
            let reason = "a copy needs a store with the same extents and the same piece_bytes".to_owned();
            return Err(Error::BadLayout { reason });
        }
        let mut leases = vec![arena.lease(self.longest_piece_bytes())?];
        while leases.len() < PIECES_IN_FLIGHT
            && let Ok(lease) = arena.lease(self.longest_piece_bytes())
        {
            leases.push(lease);
        }
        let mut left = self.written_state().into_iter();
        let (sender, done) = channel();
        let (mut in_flight, mut result) = (0, Ok(()));
        loop {
            while result.is_ok()
                && let Some(lease) = leases.pop()
            {
                let Some((extent, piece)) = left.next() else { break };
                let done = sender.clone();
                let on_done = move |completion| drop(done.send((Verb::Read, extent, piece, completion)));
                self.read(extent, piece, lease, on_done);
                in_flight += 1;
            }
            if in_flight == 0 {
                return result;
            }
            // INVARIANT: `sender` is alive, and every transfer calls its callback.
            let (verb, extent, piece, completion) = done.recv().expect("a transfer ends");
            let Completion { lease, result: ended } = completion;
            match (verb, ended) {
                (Verb::Read, Ok(())) => {
                    let done = sender.clone();
                    let on_done = move |completion| drop(done.send((Verb::Write, extent, piece, completion)));
                    target.write(extent, piece, lease, on_done);
                    continue;
                }
                (Verb::Write, Ok(())) => leases.push(lease),
                (_, Err(error)) => result = result.and(Err(error)),
            }
            in_flight -= 1;
        }
    }

    /// Pieces of state that have bytes.
    fn written_state(&self) -> Vec<(ExtentId, usize)> {
        let layout = &self.shared.layout;
        let table = crate::locked(&self.shared.table);
        let written = table.latest(0..layout.pieces_in_all()).enumerate();
        let written = written.filter_map(|(index, located)| located.and_then(|_| layout.piece_at(index)));
        written.filter(|&(extent, _)| layout.is_state(extent)).collect()
    }
}
