//! What is known of each piece while a store is open.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Commit,
    layout::{ExtentId, ExtentKind, Layout, Piece, Place},
};
use crate::Error;

/// Bytes of pieces moved, without padding. Failed transfers do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read from state extents.
    pub state_read_bytes: u64,
    /// Written to state extents.
    pub state_written_bytes: u64,
    /// Read from scratch extents.
    pub scratch_read_bytes: u64,
    /// Written to scratch extents.
    pub scratch_written_bytes: u64,
}

/// Where a piece's bytes are, and their checksum (of no meaning for a write under way).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub(super) place: Place,
    pub(super) crc: u32,
}

/// One piece.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    committed: Option<Located>,
    latest: Option<Located>,
    readers: u32,
    writing: bool,
    /// The last write failed.
    failed: bool,
}

/// How far commits can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// The last commit in memory is the one on disk.
    Settled,
    /// A commit is being made.
    Committing,
    /// A commit failed: the one on disk is the last or the failed one.
    Unsettled,
    /// Data was not made durable.
    SyncFailed,
    /// Nothing is to be written.
    ReadOnly,
}

#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<Entry>,
    kinds: Vec<ExtentKind>,
    committed: Option<Arc<Commit>>,
    state_writes_in_flight: usize,
    /// The last commit is being overwritten in place, so that there is none to come back to until the next
    /// one.
    is_overwriting: bool,
    trust: Trust,
    traffic: Traffic,
    /// For messages of a store that is only read.
    directory: PathBuf,
}

impl Table {
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            entries: vec![Entry::default(); layout.pieces_in_all()],
            kinds: layout.extents().iter().map(|extent| extent.spec.kind).collect(),
            committed: None,
            state_writes_in_flight: 0,
            is_overwriting: false,
            trust: Trust::Settled,
            traffic: Traffic::default(),
            directory: PathBuf::new(),
        }
    }

    /// The table after a commit was read from disk; `located` has one item for each piece.
    pub(super) fn of_commit(layout: &Layout, commit: Commit, located: Vec<Option<Located>>) -> Self {
        let mut table = Self::new(layout);
        for (entry, located) in table.entries.iter_mut().zip(located) {
            (entry.committed, entry.latest) = (located, located);
        }
        table.committed = Some(Arc::new(commit));
        table
    }

    /// Refuses all writes from here on, naming the directory.
    pub(super) fn keep_unwritten(&mut self, directory: &Path) {
        self.trust = Trust::ReadOnly;
        self.directory = directory.to_owned();
    }

    fn read_only(&self) -> Error {
        Error::ReadOnly { directory: self.directory.clone() }
    }

    pub(super) fn committed(&self) -> Option<Arc<Commit>> {
        self.committed.clone()
    }

    pub(super) fn generation(&self) -> u64 {
        self.committed.as_ref().map_or(0, |commit| commit.generation)
    }

    /// The commit to come back to after a failure; 0 when there is none.
    fn reachable_generation(&self) -> u64 {
        if self.is_overwriting { 0 } else { self.generation() }
    }

    pub(super) fn is_overwriting(&self) -> bool {
        self.is_overwriting
    }

    /// Notes that the last commit is being overwritten in place, until the next one is made.
    pub(super) fn note_overwriting(&mut self) {
        self.is_overwriting = true;
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// The latest place of each of these pieces.
    pub(super) fn latest(&self, pieces: std::ops::Range<usize>) -> impl Iterator<Item = Option<Located>> {
        self.entries[pieces].iter().map(|entry| entry.latest)
    }

    pub(super) fn begin_read(&mut self, layout: &Layout, piece: Piece) -> Result<Located, Error> {
        let generation = self.reachable_generation();
        let entry = &mut self.entries[piece.index];
        let extent = || layout.name(piece.extent).to_owned();
        if entry.writing {
            return Err(Error::PieceBusy { extent: extent(), piece: piece.number });
        }
        if entry.failed {
            return Err(Error::FailedWrite { extent: extent(), piece: piece.number, generation });
        }
        let located =
            entry.latest.ok_or_else(|| Error::NeverWritten { extent: extent(), piece: piece.number })?;
        entry.readers += 1;
        Ok(located)
    }

    pub(super) fn end_read(&mut self, piece: Piece, arrived: bool) {
        self.entries[piece.index].readers -= 1;
        if arrived {
            *match self.kind(piece.extent) {
                ExtentKind::State => &mut self.traffic.state_read_bytes,
                ExtentKind::Scratch => &mut self.traffic.scratch_read_bytes,
            } += piece.bytes as u64;
        }
    }

    /// Chooses the place that the last commit does not hold, or the only one.
    pub(super) fn begin_write(&mut self, layout: &Layout, piece: Piece) -> Result<Located, Error> {
        let extent = || layout.name(piece.extent).to_owned();
        let kind = self.kind(piece.extent);
        let generation = self.reachable_generation();
        if self.trust == Trust::ReadOnly {
            return Err(self.read_only());
        }
        let entry = &mut self.entries[piece.index];
        if entry.writing || entry.readers > 0 {
            return Err(Error::PieceBusy { extent: extent(), piece: piece.number });
        }
        let place = match (kind, self.trust) {
            (ExtentKind::Scratch, _) => Place::Scratch,
            (_, Trust::Committing) => {
                return Err(Error::Committing { extent: extent(), piece: piece.number });
            }
            (_, Trust::Unsettled) => return Err(Error::Unsettled { generation }),
            (_, Trust::SyncFailed | Trust::ReadOnly) => return Err(Error::SyncFailed { generation }),
            (ExtentKind::State, Trust::Settled) => match entry.committed {
                Some(Located { place: Place::A, .. }) if !layout.form().in_place => Place::B,
                _ => Place::A,
            },
        };
        entry.writing = true;
        self.state_writes_in_flight += usize::from(kind == ExtentKind::State);
        Ok(Located { place, crc: 0 })
    }

    /// Takes back a write of which nothing reached the disk.
    pub(super) fn cancel_write(&mut self, piece: Piece) {
        self.entries[piece.index].writing = false;
        self.state_writes_in_flight -= usize::from(self.kind(piece.extent) == ExtentKind::State);
    }

    /// Notes a write: with its checksum if it succeeded.
    pub(super) fn end_write(&mut self, piece: Piece, place: Place, crc: Option<u32>) {
        let kind = self.kind(piece.extent);
        let entry = &mut self.entries[piece.index];
        entry.writing = false;
        entry.failed = crc.is_none();
        if let Some(crc) = crc {
            entry.latest = Some(Located { place, crc });
        }
        self.state_writes_in_flight -= usize::from(kind == ExtentKind::State);
        if crc.is_some() {
            *match kind {
                ExtentKind::State => &mut self.traffic.state_written_bytes,
                ExtentKind::Scratch => &mut self.traffic.scratch_written_bytes,
            } += piece.bytes as u64;
        }
    }

    /// Checks that a commit may be made now, and keeps writes of state out until [`Table::end_commit`].
    pub(super) fn begin_commit(
        &mut self,
        layout: &Layout,
        application: serde_json::Value,
    ) -> Result<Commit, Error> {
        let generation = self.reachable_generation();
        match self.trust {
            Trust::SyncFailed => return Err(Error::SyncFailed { generation }),
            Trust::Committing => return Err(Error::CommitUnderWay),
            Trust::ReadOnly => return Err(self.read_only()),
            Trust::Settled | Trust::Unsettled => {}
        }
        if self.state_writes_in_flight > 0 {
            return Err(Error::WritesInFlight { writes_in_flight: self.state_writes_in_flight });
        }
        if let Some(index) = self.entries.iter().position(|entry| entry.failed)
            && let Some((extent, piece)) = layout.piece_at(index)
            && self.kind(extent) == ExtentKind::State
        {
            let extent = layout.name(extent).to_owned();
            return Err(Error::FailedWrite { extent, piece, generation });
        }
        self.trust = Trust::Committing;
        Ok(Commit { generation: self.generation() + 1, application })
    }

    /// Notes that data was not made durable.
    pub(super) fn distrust(&mut self) {
        self.trust = Trust::SyncFailed;
    }

    /// The end of a commit; `None` when it failed.
    pub(super) fn end_commit(&mut self, commit: Option<Commit>) {
        match commit {
            Some(commit) => {
                self.committed = Some(Arc::new(commit));
                for entry in &mut self.entries {
                    entry.committed = entry.latest;
                }
                self.is_overwriting = false;
                self.trust = Trust::Settled;
            }
            None if self.trust == Trust::SyncFailed => {}
            None => self.trust = Trust::Unsettled,
        }
    }

    fn kind(&self, extent: ExtentId) -> ExtentKind {
        self.kinds.get(extent.0).copied().unwrap_or(ExtentKind::Scratch)
    }
}
