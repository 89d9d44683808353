//! A checkpoint without its model: what is in a run's folder, whether it is whole, and its way to and from safetensors.

use crate::disk::safetensors::export_safetensors;
use crate::disk::stores::{self, ParameterRow, Progress};
use crate::error::{Error, Result};
use crate::schedule::buffer_plan::GroupPlacement;
use crate::schedule::layout::{Group, Layout, Put, RESIDENT};
use crate::schedule::operation::Stream;
use ferrozero_offload::{
    Arena, Budget, Completion, ExtentId, Lease, Store, StoreOptions, Ticket, Tier, padded_bytes,
};
use serde::Serialize;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};

/// Pieces that are read at once.
const PIECES_IN_FLIGHT: usize = 4;

/// Bytes beyond which fewer pieces are read at once.
const READ_BYTES_MAX: usize = 64 << 20;

/// The last commit of a run, opened without a model.
pub struct Checkpoint {
    directory: PathBuf,
    store: Store,
    progress: Progress,
    user: serde_json::Value,
    layout: Layout,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Number of the commit.
    pub generation: u64,
    /// Optimizer steps that were made.
    pub step: u64,
    /// Elements of all parameters.
    pub parameters: u64,
    /// Bytes of one piece.
    pub piece_bytes: usize,
    /// Bytes of all files.
    pub disk_bytes: u64,
    /// Each group, in order.
    pub groups: Vec<GroupSummary>,
    /// What the run's own side of the commit says.
    pub user: serde_json::Value,
}

/// A group of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct GroupSummary {
    /// Name.
    pub name: String,
    /// Number of parameters by name.
    pub tensors: usize,
    /// Elements of its parameters.
    pub parameters: u64,
    /// Bytes of parameters and moments, alignment included.
    pub bytes: u64,
    /// Homes in the run that made the commit; none for an imported checkpoint.
    pub homes: Option<GroupPlacement>,
}

/// A piece that is not what the commit says.
#[derive(Debug, Clone, Serialize)]
pub struct Damage {
    /// Group and state stream.
    pub extent: String,
    /// Number of the piece.
    pub piece: usize,
    /// Parameters of which it holds a part.
    pub parameters: Vec<String>,
    /// What was found.
    pub error: String,
}

impl Checkpoint {
    /// Opens the last commit in a folder, to read it only: the folder may be another user's or on a read-only file system.
    /// No run may use it meanwhile.
    ///
    /// # Errors
    /// What the disk store says of the folder; [`Error::CheckpointMismatch`] if no trainer wrote it.
    pub fn open(directory: &Path) -> Result<Self> {
        let store = Store::open_to_read(directory, StoreOptions::default())?;
        let (progress, user) = stores::committed(&store, directory)?;
        let layout = stored_layout(&progress.parameters, &store, directory)?;
        Ok(Self { directory: directory.to_owned(), store, progress, user, layout })
    }

    /// What it holds.
    pub fn summary(&self) -> Summary {
        let groups = self.layout.groups.iter().enumerate().map(|(index, group)| GroupSummary {
            name: group.name.clone(),
            tensors: group.table.len(),
            parameters: group.table.iter().map(|entry| entry.elements as u64).sum(),
            bytes: Stream::STATE.iter().map(|s| 4 * s.elements(&self.layout, index) as u64).sum(),
            homes: self.progress.homes.iter().find(|(name, _)| *name == group.name).map(|(_, homes)| *homes),
        });
        Summary {
            generation: self.store.committed().map_or(0, |commit| commit.generation),
            step: self.progress.step,
            parameters: self.layout.parameter_elements(),
            piece_bytes: self.store.piece_bytes(),
            disk_bytes: self.store.disk_bytes(),
            groups: groups.collect(),
            user: self.user.clone(),
        }
    }

    /// Bytes that [`Self::verify`] reads.
    pub fn state_bytes(&self) -> u64 {
        self.summary().groups.iter().map(|group| group.bytes).sum()
    }

    /// Reads every piece and checks its sum; tells `on_read` the bytes of each. What is damaged is listed, by name.
    ///
    /// # Errors
    /// Of memory. Errors of the disk are damage.
    pub fn verify(&self, mut on_read: impl FnMut(u64)) -> Result<Vec<Damage>> {
        let mut damage = vec![];
        let bytes = self.store.check_bytes();
        let arena = Arena::new(&Budget::new(Tier::Host, bytes as u64), bytes)?;
        for (index, group) in self.layout.groups.iter().enumerate() {
            for stream in Stream::STATE {
                let elements = stream.elements(&self.layout, index);
                if elements == 0 {
                    continue;
                }
                let extent = stream.extent_name(group);
                self.store.check(self.extent(&extent)?, &arena, |piece, outcome| {
                    on_read(4 * self.layout.piece_range(elements, piece).len() as u64);
                    if let Err(error) = outcome {
                        let parameters = self.layout.parameters_in(index, elements, piece);
                        let (extent, error) = (extent.clone(), error.to_string());
                        damage.push(Damage { extent, piece, parameters, error });
                    }
                })?;
            }
        }
        Ok(damage)
    }

    /// Reads pieces in order, several in flight, and hands each to `each`.
    fn read(
        &self,
        extent: &str,
        pieces: std::ops::Range<usize>,
        mut each: impl FnMut(usize, &Lease, Result<()>) -> Result<()>,
    ) -> Result<()> {
        let id = self.extent(extent)?;
        // Pieces are as long as whoever wrote the folder liked.
        let bytes = padded_bytes(self.store.piece_bytes_of(id, 0)?);
        let most_in_flight = (READ_BYTES_MAX / bytes).clamp(1, PIECES_IN_FLIGHT);
        let arena_bytes = most_in_flight * bytes;
        let arena = Arena::new(&Budget::new(Tier::Host, arena_bytes as u64), arena_bytes)?;
        let mut in_flight: VecDeque<(usize, Ticket)> = VecDeque::new();
        let mut finish = |(piece, ticket): (usize, Ticket)| {
            let Completion { lease, result } = ticket.wait();
            each(piece, &lease, result.map_err(Error::from))
        };
        for piece in pieces {
            if in_flight.len() == most_in_flight
                && let Some(oldest) = in_flight.pop_front()
            {
                finish(oldest)?;
            }
            let (ticket, on_done) = Ticket::new();
            self.store.read(id, piece, arena.lease(bytes)?, on_done);
            in_flight.push_back((piece, ticket));
        }
        in_flight.into_iter().try_for_each(finish)
    }

    fn extent(&self, name: &str) -> Result<ExtentId> {
        self.store.extent(name).ok_or_else(|| Error::CheckpointMismatch {
            path: self.directory.clone(),
            mismatch: format!("it has no {name}"),
        })
    }

    /// Values of a parameter.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an unknown name, and what reading finds.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.layout.elements_of(name)?];
        self.show(name, &mut |first, values| {
            all[first..first + values.len()].copy_from_slice(values);
            Ok(())
        })?;
        Ok(all)
    }

    /// Puts the values of a parameter, a piece at a time.
    fn show(&self, name: &str, put: &mut Put) -> Result<()> {
        for (group, entry) in self.layout.find(name)? {
            let of_group = &self.layout.groups[group];
            let extent = Stream::Master.extent_name(of_group);
            self.read(&extent, self.layout.pieces_of(group, entry), |piece, lease, result| {
                result?;
                let range = self.layout.piece_range(of_group.elements, piece);
                let mut runs = of_group.runs(range).filter(|run| run.entry == entry);
                runs.try_for_each(|run| {
                    let values = &lease.as_f32()[run.piece_start..run.piece_start + run.elements];
                    Layout::put(&of_group.table[entry], run.entry_start, values, put)
                })
            })?;
        }
        Ok(())
    }

    /// Writes all parameters to a safetensors file, a piece at a time: no parameter is ever in memory as a whole.
    ///
    /// # Errors
    /// [`Error::File`] and what reading finds.
    pub fn export_safetensors(&self, path: &Path) -> Result<()> {
        export_safetensors(path, &self.layout.parameters(), &|name, put| self.show(name, put))
    }
}

impl Checkpoint {
    /// Copies the checkpoint to another folder, perhaps over `stripes`, perhaps to be written in place from then on.
    ///
    /// # Errors
    /// [`Error::CheckpointExists`], what reading finds, and errors of the disk tier.
    pub fn copy_to(&self, directory: &Path, stripes: Vec<PathBuf>, in_place: bool) -> Result<()> {
        let piece_bytes = self.store.piece_bytes();
        let options = StoreOptions { piece_bytes, stripes, in_place, ..StoreOptions::default() };
        let target = stores::create_state(directory, &stores::state_extents(&self.layout), options)?;
        let bytes = PIECES_IN_FLIGHT * padded_bytes(self.store.longest_piece_bytes());
        let arena = Arena::new(&Budget::new(Tier::Host, bytes as u64), bytes)?;
        self.store.copy_to(&target, &arena)?;
        let committed = self.store.committed();
        target.commit(committed.map(|commit| commit.application.clone()).unwrap_or_default())?;
        Ok(())
    }
}

/// The groups of a commit, which may be a stranger's: its extents must be there as the parameters ask for them.
fn stored_layout(rows: &[ParameterRow], store: &Store, directory: &Path) -> Result<Layout> {
    let mismatch = |mismatch: String| Err(Error::CheckpointMismatch { path: directory.to_owned(), mismatch });
    let mut left = store.disk_bytes() / 4;
    for row in rows {
        let elements = row.shape.iter().try_fold(1_u64, |all, &size| all.checked_mul(size as u64));
        match elements.and_then(|elements| left.checked_sub(elements)) {
            Some(rest) => left = rest,
            None => {
                return mismatch(format!(
                    "{} of shape {:?} is more than its files hold",
                    row.name, row.shape
                ));
            }
        }
    }
    let layout = layout_of(rows, store.piece_bytes() / 4);
    let stored: HashMap<_, _> =
        store.extents().iter().map(|extent| (&extent.spec.name, extent.spec.bytes)).collect();
    for (_, name, bytes) in stores::state_extents(&layout) {
        match stored.get(&name) {
            Some(&found) if found == bytes => {}
            Some(found) => {
                return mismatch(format!("{name} has {found} bytes, and its parameters ask for {bytes}"));
            }
            None => return mismatch(format!("it has no {name}")),
        }
    }
    Ok(layout)
}

/// The groups of a commit.
pub fn layout_of(rows: &[ParameterRow], piece_elements: usize) -> Layout {
    let mut members: Vec<(String, Vec<_>)> = vec![];
    for (index, row) in rows.iter().enumerate() {
        let member = (index, row.name.clone(), row.shape.clone(), row.trainable, false);
        match members.last_mut().filter(|(group, _)| *group == row.group) {
            Some((_, members)) => members.push(member),
            None => members.push((row.group.clone(), vec![member])),
        }
    }
    let groups = members.into_iter().map(|(name, members)| {
        let resident = name == RESIDENT;
        Group::new(name, resident, members)
    });
    Layout { groups: groups.collect(), piece_elements }
}
