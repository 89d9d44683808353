//! Groups and their tables: which parameter lies where in the contiguous run of its group, and how runs
//! are cut into pieces.
//!
//! A run holds the trainable parameters first and the frozen ones after them, so that moments and gradients,
//! which only trainable parameters have, are a prefix of it. Every tensor starts at a multiple of
//! [`ALIGNMENT_ELEMENTS`]: direct I/O needs 4 KiB, and the blocks over which squared norms are summed then
//! never straddle two tensors or two pieces, so a norm has the same bits whatever the piece size.

use crate::error::{Error, Result};
use crate::schedule::tile::{Cut, Tile};
use ferrozero_kernels::gradient::BLOCK_ELEMENTS;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Tensors start at multiples of this many elements within the run of their group.
pub const ALIGNMENT_ELEMENTS: usize = BLOCK_ELEMENTS;

/// Bytes of a piece where nobody says otherwise.
pub const DEFAULT_PIECE_BYTES: usize = 4 << 20;
/// Name of the group of all parameters outside segments.
pub const RESIDENT: &str = "resident";

/// Says whether something holds for the parameter of a name and shape.
pub type ParameterRule = Arc<dyn Fn(&str, &[usize]) -> bool + Send + Sync>;
/// Puts some values of a parameter from the element of a number on.
pub type Put<'a> = dyn FnMut(usize, &[f32]) -> Result<()> + 'a;

/// Whether pieces can be of this size.
///
/// # Errors
/// [`Error::Configuration`] if not.
pub fn check_piece(bytes: Option<usize>) -> Result<()> {
    match bytes {
        Some(bytes) if bytes == 0 || bytes % (4 * ALIGNMENT_ELEMENTS) != 0 => Err(Error::Configuration(
            format!("pieces of {bytes} bytes cannot be: use a multiple of 4096 bytes, as 4MiB"),
        )),
        _ => Ok(()),
    }
}

/// One parameter in the table of its group.
#[derive(Debug, Clone)]
pub struct TableEntry {
    /// Full name, for instance `h.0.attn.c_attn.weight`.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// First element within the run of the group.
    pub offset_elements: usize,
    /// Number of elements.
    pub elements: usize,
    /// Whether it has a gradient and moments.
    pub trainable: bool,
    /// Whether weight decay applies to it.
    pub decays: bool,
    /// Index of the parameter in the registry.
    pub(crate) parameter: usize,
}

/// The unit of movement: all parameters of one segment, or the resident group.
#[derive(Debug, Clone)]
pub struct Group {
    /// Name: the prefix of its segment, or `resident`.
    pub name: String,
    /// Parameters, the trainable ones first.
    pub table: Vec<TableEntry>,
    /// Elements of the run, alignment included.
    pub elements: usize,
    /// Elements of the prefix that holds the trainable parameters.
    pub trainable_elements: usize,
    /// Whether the group stays on the device for the whole run.
    pub resident: bool,
}

/// A part of a piece that belongs to one parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index into the table of the group.
    pub entry: usize,
    /// First element within the piece.
    pub piece_start: usize,
    /// First element within the parameter.
    pub entry_start: usize,
    /// Number of elements.
    pub elements: usize,
}

impl Group {
    /// Lays out parameters given as (registry index, name, shape, trainable, decays).
    pub fn new(
        name: String,
        resident: bool,
        parameters: Vec<(usize, String, Vec<usize>, bool, bool)>,
    ) -> Self {
        let mut table = Vec::with_capacity(parameters.len());
        let mut offset_elements = 0;
        let mut trainable_elements = 0;
        let (trainable, frozen): (Vec<_>, Vec<_>) = parameters.into_iter().partition(|p| p.3);
        for (parameter, name, shape, trainable, decays) in trainable.into_iter().chain(frozen) {
            let elements = shape.iter().product::<usize>();
            table.push(TableEntry { name, shape, offset_elements, elements, trainable, decays, parameter });
            offset_elements += elements.next_multiple_of(ALIGNMENT_ELEMENTS);
            if trainable {
                trainable_elements = offset_elements;
            }
        }
        Self { name, table, elements: offset_elements, trainable_elements, resident }
    }

    /// Elements of the parameters as the device holds them, without alignment.
    pub fn device_elements(&self) -> u64 {
        self.table.iter().map(|entry| entry.elements as u64).sum()
    }

    /// Elements of the trainable parameters' gradients as autograd makes them.
    pub fn gradient_elements(&self) -> u64 {
        self.table.iter().filter(|entry| entry.trainable).map(|entry| entry.elements as u64).sum()
    }

    /// The parts of parameters that lie in elements `piece` of the run, in order.
    pub fn runs(&self, piece: Range<usize>) -> impl Iterator<Item = Run> + '_ {
        self.table.iter().enumerate().filter_map(move |(entry, table)| {
            let start = table.offset_elements.max(piece.start);
            let end = (table.offset_elements + table.elements).min(piece.end);
            (start < end).then(|| Run {
                entry,
                piece_start: start - piece.start,
                entry_start: start - table.offset_elements,
                elements: end - start,
            })
        })
    }
}

/// All groups of a model. Group `i` belongs to segment `i`; the resident group is the last one.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The groups.
    pub groups: Vec<Group>,
    /// Elements of a piece, a multiple of [`ALIGNMENT_ELEMENTS`].
    pub piece_elements: usize,
}

impl Layout {
    /// Index of the resident group.
    pub fn resident(&self) -> usize {
        self.groups.len() - 1
    }

    /// Number of pieces that a run of `elements` is cut into.
    pub fn piece_count(&self, elements: usize) -> usize {
        elements.div_ceil(self.piece_elements)
    }

    /// Elements of piece `piece` of a run of `elements`.
    pub fn piece_range(&self, elements: usize, piece: usize) -> Range<usize> {
        let start = piece * self.piece_elements;
        start..(start + self.piece_elements).min(elements)
    }

    /// Groups, and places in their tables, of a parameter: one, or those of its parts from the first row or
    /// column on.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an unknown name.
    pub fn find(&self, name: &str) -> Result<Vec<(usize, usize)>> {
        let entries = self.groups.iter().enumerate().flat_map(|(group, of_group)| {
            of_group.table.iter().enumerate().map(move |(index, entry)| (group, index, entry))
        });
        let mut found: Vec<(usize, usize, usize)> = entries
            .filter_map(|(group, index, entry)| {
                let tile = Tile::from_name(&entry.name);
                (tile.whole == name).then(|| (tile.cut.as_ref().map_or(0, Cut::first), group, index))
            })
            .collect();
        if found.is_empty() {
            return Err(Error::Misuse(format!("the model has no parameter {name}")));
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, group, index)| (group, index)).collect())
    }

    /// Elements of a parameter.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an unknown name.
    pub fn elements_of(&self, name: &str) -> Result<usize> {
        Ok(self.find(name)?.iter().map(|&(group, index)| self.groups[group].table[index].elements).sum())
    }

    /// The pieces of a group's run that hold a parameter.
    pub fn pieces_of(&self, group: usize, entry: usize) -> Range<usize> {
        let entry = &self.groups[group].table[entry];
        let last = entry.offset_elements + entry.elements.max(1) - 1;
        entry.offset_elements / self.piece_elements..last / self.piece_elements + 1
    }

    /// Names of the parameters of which a piece of a group's run of `elements` holds a part.
    pub fn parameters_in(&self, group: usize, elements: usize, piece: usize) -> Vec<String> {
        let group = &self.groups[group];
        let runs = group.runs(self.piece_range(elements, piece));
        runs.map(|run| group.table[run.entry].name.clone()).collect()
    }

    /// Names and shapes of all parameters, in the order of their names. Parts of one are one.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut all: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for entry in self.groups.iter().flat_map(|group| &group.table) {
            let Tile { whole, cut } = Tile::from_name(&entry.name);
            match (all.get_mut(whole.as_ref()), cut.map(|cut| cut.dimension())) {
                (Some(shape), Some(dimension)) => shape[dimension] += entry.shape[dimension],
                _ => drop(all.insert(whole.into_owned(), entry.shape.clone())),
            }
        }
        all.into_iter().collect()
    }

    /// Puts values of a parameter's part from the element `start` of the part on where the whole has them.
    pub(crate) fn put(entry: &TableEntry, start: usize, values: &[f32], put: &mut Put) -> Result<()> {
        let mut runs = Tile::from_name(&entry.name).runs(&entry.shape, start, values.len());
        runs.try_for_each(|(first, run)| put(first, &values[run]))
    }

    /// Number of parameters' elements, alignment not counted.
    pub fn parameter_elements(&self) -> u64 {
        self.groups.iter().flat_map(|group| &group.table).map(|entry| entry.elements as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> Group {
        let parameter = |index: usize, elements: usize, trainable| {
            (index, format!("p{index}"), vec![elements], trainable, true)
        };
        Group::new(
            "g".into(),
            false,
            vec![parameter(0, 3000, true), parameter(1, 10, false), parameter(2, 1024, true)],
        )
    }

    #[test]
    fn trainable_parameters_are_an_aligned_prefix() {
        let group = group();
        assert_eq!(group.table.iter().map(|e| e.parameter).collect::<Vec<_>>(), [0, 2, 1]);
        assert_eq!(group.table.iter().map(|e| e.offset_elements).collect::<Vec<_>>(), [0, 3072, 4096]);
        assert_eq!((group.trainable_elements, group.elements), (4096, 5120));
    }

    #[test]
    fn runs_of_all_pieces_cover_every_parameter_once() {
        let group = group();
        for piece_elements in [1024, 2048, 8192] {
            let layout = Layout { groups: vec![], piece_elements };
            let mut covered = vec![0; group.table.len()];
            for piece in 0..layout.piece_count(group.elements) {
                for run in group.runs(layout.piece_range(group.elements, piece)) {
                    assert_eq!(run.entry_start, covered[run.entry]);
                    covered[run.entry] += run.elements;
                }
            }
            assert_eq!(covered, group.table.iter().map(|e| e.elements).collect::<Vec<_>>());
        }
    }
}
