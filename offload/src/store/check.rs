//! Checks of everything that is committed, in memory that does not depend on how long pieces are.

use std::collections::VecDeque;

use super::{
    ExtentId, Store,
    layout::{Checksum, Piece},
    table::Located,
};
use crate::{
    Arena, Completion, Error, Lease, Ticket,
    io::{Request, Verb},
    locked, padded_bytes,
};

/// Most bytes that are read by one request, and requests in flight at once.
const PART_BYTES: usize = 4 << 20;
const PARTS_IN_FLIGHT: usize = 4;

/// A part of a piece that is being read.
struct Part {
    piece: Piece,
    bytes: usize,
    ticket: Ticket,
}

impl Store {
    /// Bytes of the arena that [`Self::check`] needs.
    pub fn check_bytes(&self) -> usize {
        PARTS_IN_FLIGHT * PART_BYTES.min(padded_bytes(self.longest_piece_bytes().max(1)))
    }

    /// Reads the latest bytes of each piece of an extent and checks its sum; hands the outcomes to `each`, in
    /// order. The store must not be written meanwhile.
    ///
    /// # Errors
    /// [`Error::UnknownPiece`] for an extent of another store; [`Error::ArenaExhausted`] where the arena has
    /// less than [`Self::check_bytes`]. What is wrong with a piece is handed to `each`.
    pub fn check(
        &self,
        extent: ExtentId,
        arena: &Arena,
        mut each: impl FnMut(usize, Result<(), Error>),
    ) -> Result<(), Error> {
        let mut leases = Vec::new();
        for _ in 0..PARTS_IN_FLIGHT {
            leases.push(arena.lease(self.check_bytes() / PARTS_IN_FLIGHT)?);
        }
        let mut in_flight: VecDeque<Part> = VecDeque::new();
        let mut open = Open::default();
        for number in 0..self.piece_count(extent)? {
            let piece = self.shared.layout.piece(extent, number)?;
            let mut start_bytes = 0;
            while start_bytes < piece.bytes {
                if leases.is_empty()
                    && let Some(oldest) = in_flight.pop_front()
                {
                    leases.push(self.take(oldest, &mut open, &mut each));
                }
                let Some(lease) = leases.pop() else { break };
                let bytes = (piece.bytes - start_bytes).min(lease.len());
                let (ticket, on_done) = Ticket::new();
                self.read_part(piece, start_bytes, lease, on_done);
                in_flight.push_back(Part { piece, bytes, ticket });
                start_bytes += bytes;
            }
        }
        in_flight.into_iter().for_each(|part| drop(self.take(part, &mut open, &mut each)));
        Ok(())
    }

    fn read_part(
        &self,
        piece: Piece,
        start_bytes: usize,
        lease: Lease,
        on_done: impl FnOnce(Completion) + Send + 'static,
    ) {
        // What was never written is told when its piece is judged.
        let Some(Located { place, .. }) = self.located(&piece) else {
            return on_done(Completion { lease, result: Ok(()) });
        };
        let length_bytes = padded_bytes((piece.bytes - start_bytes).min(lease.len()));
        let offset_bytes = piece.offset_bytes + start_bytes as u64;
        match Request::new(Verb::Read, piece.file(place), offset_bytes, length_bytes, lease) {
            Ok(request) => self.io.submit(request, Box::new(on_done)),
            Err(refused) => on_done(refused),
        }
    }

    fn located(&self, piece: &Piece) -> Option<Located> {
        locked(&self.shared.table).latest(piece.index..piece.index + 1).next().flatten()
    }

    /// Waits for a part, and tells of its piece if it was the last one.
    fn take(&self, part: Part, open: &mut Open, each: &mut impl FnMut(usize, Result<(), Error>)) -> Lease {
        let Part { piece, bytes, ticket } = part;
        let Completion { lease, result } = ticket.wait();
        open.checksum.update(&lease[..bytes]);
        open.done_bytes += bytes;
        open.result = std::mem::replace(&mut open.result, Ok(())).and(result);
        if open.done_bytes == piece.bytes {
            let Open { checksum, result, .. } = std::mem::take(open);
            let layout = &self.shared.layout;
            let outcome = match self.located(&piece) {
                Some(located) => {
                    let path = self.io.path_of(&layout.file_name(&piece, located.place));
                    let found = result.map(|()| checksum.of(&piece));
                    self.shared.judge(piece, &path, found, Some(located.crc))
                }
                None => {
                    let extent = layout.name(piece.extent).to_owned();
                    Err(Error::NeverWritten { extent, piece: piece.number })
                }
            };
            each(piece.number, outcome);
        }
        lease
    }
}

/// The piece whose parts are arriving.
struct Open {
    checksum: Checksum,
    done_bytes: usize,
    result: Result<(), Error>,
}

impl Default for Open {
    fn default() -> Self {
        Self { checksum: Checksum::default(), done_bytes: 0, result: Ok(()) }
    }
}
