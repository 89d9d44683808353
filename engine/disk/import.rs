//! Makes checkpoints of safetensors files.

use crate::disk::checkpoint::layout_of;
use crate::disk::safetensors::SafetensorsFile;
use crate::disk::stores::{self, ParameterRow, Progress};
use crate::error::{Error, Result};
use crate::schedule::layout::{Layout, RESIDENT};
use crate::schedule::operation::Stream;
use ferrozero_offload::{
    Arena, Budget, Completion, ExtentId, Lease, Store, StoreOptions, Ticket, Tier, padded_bytes,
};
use std::path::Path;

/// Makes a checkpoint of a safetensors file: its tensors are the parameters, the moments are zero, and no
/// step is made. Parameters under a name with a number, as `h.3.` or `model.layers.3.`, are the group of that
/// prefix, all others are resident.
///
/// # Errors
/// [`Error::File`], [`Error::Safetensors`], [`Error::CheckpointExists`] and errors of the disk tier.
pub fn import_safetensors(path: &Path, directory: &Path) -> Result<()> {
    let source = SafetensorsFile::open(path)?;
    let mut rows: Vec<ParameterRow> = source
        .tensors
        .iter()
        .map(|(name, info)| ParameterRow {
            group: group_of(name),
            name: name.clone(),
            shape: info.shape.clone(),
            trainable: true,
        })
        .collect();
    if rows.is_empty() {
        return Err(Error::Safetensors { path: path.to_owned(), reason: "it has no tensors".into() });
    }
    rows.sort_by_key(|row| (row.group == RESIDENT, number_in(&row.group), row.name.clone()));
    Making::start(directory, rows, StoreOptions::default())?
        .finish(|name, first, out| source.fill(name, first, out))
}

/// The prefix of a name up to its first part that is a number.
fn group_of(name: &str) -> String {
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let parts: Vec<&str> = name.split('.').collect();
    match parts.iter().position(is_number) {
        Some(number) if number + 1 < parts.len() => parts[..=number].join("."),
        _ => RESIDENT.to_owned(),
    }
}

/// The number at the end of a group's name, and what is before it, so that h.2 comes before h.10.
fn number_in(group: &str) -> (String, u64) {
    let (prefix, number) = group.rsplit_once('.').unwrap_or((group, ""));
    (prefix.to_owned(), number.parse().unwrap_or(0))
}

/// Makes checkpoints of files in another format.
pub(crate) struct Making {
    layout: Layout,
    rows: Vec<ParameterRow>,
    store: Store,
}

impl Making {
    /// Reserves the space of a checkpoint with these parameters.
    pub(crate) fn start(directory: &Path, rows: Vec<ParameterRow>, options: StoreOptions) -> Result<Self> {
        let layout = layout_of(&rows, options.piece_bytes / 4);
        let store = stores::create_state(directory, &stores::state_extents(&layout), options)?;
        Ok(Self { layout, rows, store })
    }

    /// Writes all states, with master parameters as `fill` gives them, by name and from an element on, and
    /// moments of zero, and commits. In memory is a piece at a time.
    pub(crate) fn finish(self, fill: impl Fn(&str, usize, &mut [f32]) -> Result<()>) -> Result<()> {
        let bytes = padded_bytes(self.store.piece_bytes());
        let budget = Budget::new(Tier::Host, bytes as u64);
        let arena = Arena::new(&budget, bytes)?;
        let mut lease = arena.lease(bytes)?;
        for (index, group) in self.layout.groups.iter().enumerate() {
            for stream in Stream::STATE {
                let elements = stream.elements(&self.layout, index);
                let Some(extent) = self.store.extent(&stream.extent_name(group)) else { continue };
                for piece in 0..self.layout.piece_count(elements) {
                    lease.as_f32_mut().fill(0.0);
                    let runs = group.runs(self.layout.piece_range(elements, piece));
                    for run in runs.filter(|_| stream == Stream::Master) {
                        let out = &mut lease.as_f32_mut()[run.piece_start..run.piece_start + run.elements];
                        fill(&group.table[run.entry].name, run.entry_start, out)?;
                    }
                    lease = self.write(extent, piece, lease)?;
                }
            }
        }
        let progress = Progress { step: 0, parameters: self.rows, homes: vec![], loss_scale: None };
        self.store.commit(serde_json::json!({ "engine": progress, "user": null }))?;
        Ok(())
    }

    fn write(&self, extent: ExtentId, piece: usize, lease: Lease) -> Result<Lease> {
        let (ticket, on_done) = Ticket::new();
        self.store.write(extent, piece, lease, on_done);
        let Completion { lease, result } = ticket.wait();
        result?;
        Ok(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_named_after_the_first_number() {
        assert_eq!(group_of("h.3.attn.c_attn.weight"), "h.3");
        assert_eq!(group_of("model.layers.11.mlp.2.weight"), "model.layers.11");
        assert_eq!(group_of("wte.weight"), RESIDENT);
        assert_eq!(group_of("bias.0"), RESIDENT);
        assert!(number_in("h.2") < number_in("h.10"));
    }
}
