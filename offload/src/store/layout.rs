//! Where each extent and each piece is.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{
    Error, PAGE_BYTES,
    io::{FileId, FileSpec},
};

/// What an extent is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentSpec {
    /// Unique in the store.
    pub name: String,
    /// Its bytes, at least one.
    pub bytes: u64,
    /// What happens to it at a commit.
    pub kind: ExtentKind,
}

/// Whether a commit keeps an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentKind {
    /// Kept by commits; takes twice its bytes on disk.
    State,
    /// Forgotten when the store is opened again; takes its bytes once.
    Scratch,
}

/// An extent by its place in the list; an id is good for the store that gave it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentId(pub(super) usize);

/// An extent of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// What was asked for.
    #[serde(flatten)]
    pub spec: ExtentSpec,
    /// Where it starts in its file, a multiple of [`PAGE_BYTES`].
    pub offset_bytes: u64,
}

/// Which file holds a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Place {
    A,
    B,
    Scratch,
}

impl Place {
    pub(super) fn file(self) -> FileId {
        FileId(self as usize)
    }
}

/// Longest file: all files of a store together are still a number of bytes.
const FILE_BYTES_MAX: u64 = i64::MAX as u64 / 3;

const FILE_NAMES: [&str; 3] = ["state-a.bin", "state-b.bin", "scratch.bin"];

pub(super) fn file_name(place: Place) -> &'static str {
    FILE_NAMES[place as usize]
}

pub(super) fn state_files() -> [FileId; 2] {
    [Place::A.file(), Place::B.file()]
}

/// One piece of an extent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) extent: ExtentId,
    pub(super) number: usize,
    /// Offset in the file.
    pub(super) offset_bytes: u64,
    /// Bytes without padding.
    pub(super) bytes: usize,
    /// Position among all pieces of the store.
    pub(super) index: usize,
}

impl Piece {
    /// CRC-32C of the bytes followed by the extent and piece numbers, so that a piece in another's place is found.
    pub(super) fn checksum(&self, bytes: &[u8]) -> u32 {
        let crc = crc32c::crc32c(bytes);
        let crc = crc32c::crc32c_append(crc, &(self.extent.0 as u64).to_le_bytes());
        crc32c::crc32c_append(crc, &(self.number as u64).to_le_bytes())
    }
}

#[derive(Debug)]
pub(super) struct Layout {
    piece_bytes: usize,
    extents: Vec<Extent>,
    /// Number of the first piece of each extent, and of all pieces at the end.
    first_pieces: Vec<usize>,
    by_name: HashMap<String, ExtentId>,
    state_bytes: u64,
    scratch_bytes: u64,
}

impl Layout {
    pub(super) fn new(specs: Vec<ExtentSpec>, piece_bytes: usize) -> Result<Self, Error> {
        let page_bytes = PAGE_BYTES as u64;
        let is_size = piece_bytes > 0 && piece_bytes as u64 <= FILE_BYTES_MAX;
        if !is_size || !piece_bytes.is_multiple_of(PAGE_BYTES) {
            let reason = format!("pieces of {piece_bytes} bytes: use a positive multiple of {PAGE_BYTES}");
            return Err(Error::BadLayout { reason });
        }
        let mut layout = Self {
            piece_bytes,
            extents: Vec::with_capacity(specs.len()),
            first_pieces: vec![0],
            by_name: HashMap::new(),
            state_bytes: 0,
            scratch_bytes: 0,
        };
        let mut pieces = 0_usize;
        for (index, spec) in specs.into_iter().enumerate() {
            let bad = |what: &str| Error::BadLayout { reason: format!("extent {} {what}", spec.name) };
            if spec.bytes == 0 {
                return Err(bad("has no bytes: leave it out"));
            }
            if layout.by_name.insert(spec.name.clone(), ExtentId(index)).is_some() {
                return Err(bad("is there twice: give each extent a name of its own"));
            }
            let end_bytes = match spec.kind {
                ExtentKind::State => &mut layout.state_bytes,
                ExtentKind::Scratch => &mut layout.scratch_bytes,
            };
            let offset_bytes = *end_bytes;
            let padded_bytes = spec.bytes.checked_next_multiple_of(page_bytes);
            let end = padded_bytes.and_then(|bytes| bytes.checked_add(offset_bytes));
            let end = end.filter(|&end| end <= FILE_BYTES_MAX);
            *end_bytes = end.ok_or_else(|| bad("is larger than a file can be"))?;
            let count = usize::try_from(spec.bytes.div_ceil(piece_bytes as u64));
            let total = count.ok().and_then(|count| pieces.checked_add(count));
            pieces = total.ok_or_else(|| bad("has more pieces than can be counted: use larger pieces"))?;
            layout.first_pieces.push(pieces);
            layout.extents.push(Extent { spec, offset_bytes });
        }
        Ok(layout)
    }

    pub(super) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    pub(super) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub(super) fn find(&self, name: &str) -> Option<ExtentId> {
        self.by_name.get(name).copied()
    }

    pub(super) fn name(&self, extent: ExtentId) -> &str {
        self.extents.get(extent.0).map_or("unknown", |extent| &extent.spec.name)
    }

    /// The files, in the order of [`Place`].
    pub(super) fn files(&self) -> Vec<FileSpec> {
        let sizes = [self.state_bytes, self.state_bytes, self.scratch_bytes];
        FILE_NAMES
            .iter()
            .zip(sizes)
            .map(|(name, bytes)| FileSpec { name: (*name).to_owned(), bytes })
            .collect()
    }

    /// Pieces of all extents.
    pub(super) fn pieces_in_all(&self) -> usize {
        self.first_pieces[self.extents.len()]
    }

    /// Positions of an extent's pieces among all pieces.
    pub(super) fn pieces_of(&self, extent: ExtentId) -> Result<std::ops::Range<usize>, Error> {
        match self.first_pieces.get(extent.0..extent.0 + 2) {
            Some(&[first, next]) => Ok(first..next),
            _ => Err(Error::UnknownPiece { extent: extent.0, piece: 0 }),
        }
    }

    /// The extent and the number of the piece at a position among all pieces.
    pub(super) fn piece_at(&self, index: usize) -> Option<(ExtentId, usize)> {
        let extent = self.first_pieces.partition_point(|&first| first <= index).checked_sub(1)?;
        (extent < self.extents.len()).then(|| (ExtentId(extent), index - self.first_pieces[extent]))
    }

    pub(super) fn piece_count(&self, extent: ExtentId) -> Result<usize, Error> {
        Ok(self.pieces_of(extent)?.len())
    }

    pub(super) fn piece(&self, id: ExtentId, number: usize) -> Result<Piece, Error> {
        let pieces = self.pieces_of(id)?;
        if number >= pieces.len() {
            return Err(Error::UnknownPiece { extent: id.0, piece: number });
        }
        let extent = &self.extents[id.0];
        let start = number as u64 * self.piece_bytes as u64;
        let bytes = (extent.spec.bytes - start).min(self.piece_bytes as u64);
        Ok(Piece {
            extent: id,
            number,
            offset_bytes: extent.offset_bytes + start,
            bytes: bytes as usize,
            index: pieces.start + number,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::padded_bytes;
    use proptest::prelude::*;

    fn spec(name: &str, bytes: u64, kind: ExtentKind) -> ExtentSpec {
        ExtentSpec { name: name.to_owned(), bytes, kind }
    }

    #[test]
    fn pieces_tile_their_extents_and_extents_do_not_overlap() {
        let specs = vec![
            spec("first", 10_000, ExtentKind::State),
            spec("second", 1, ExtentKind::Scratch),
            spec("third", 8192, ExtentKind::State),
        ];
        let layout = Layout::new(specs, 8192).unwrap();
        let pieces = |name: &str| -> Vec<(u64, usize)> {
            let id = layout.find(name).unwrap();
            let count = layout.piece_count(id).unwrap();
            let piece = |number| layout.piece(id, number).unwrap();
            (0..count).map(|number| (piece(number).offset_bytes, piece(number).bytes)).collect()
        };
        assert_eq!(pieces("first"), [(0, 8192), (8192, 1808)]);
        assert_eq!(pieces("third"), [(12288, 8192)]);
        assert_eq!(pieces("second"), [(0, 1)]);
        let sizes: Vec<u64> = layout.files().iter().map(|file| file.bytes).collect();
        assert_eq!(sizes, [20480, 20480, 4096]);
        assert_eq!(layout.pieces_in_all(), 4);
        let places: Vec<_> = (0..5).map(|index| layout.piece_at(index)).collect();
        let at = |extent, piece| Some((ExtentId(extent), piece));
        assert_eq!(places, [at(0, 0), at(0, 1), at(1, 0), at(2, 0), None]);
        assert!(matches!(layout.piece(ExtentId(0), 2), Err(Error::UnknownPiece { extent: 0, piece: 2 })));
        assert!(matches!(layout.piece(ExtentId(3), 0), Err(Error::UnknownPiece { extent: 3, .. })));
    }

    #[test]
    fn layouts_that_make_no_sense_are_refused_by_name() {
        let refusals = [
            (vec![spec("empty", 0, ExtentKind::State)], 4096, "extent empty has no bytes"),
            (vec![spec("twin", 1, ExtentKind::State); 2], 4096, "extent twin is there twice"),
            (vec![spec("huge", u64::MAX, ExtentKind::State)], 4096, "extent huge is larger"),
            (vec![], 1000, "pieces of 1000 bytes"),
            (vec![], 0, "pieces of 0 bytes"),
            (vec![], usize::MAX - 4095, "pieces of 18446744073709547520 bytes"),
        ];
        for (specs, piece_bytes, expected) in refusals {
            let text = Layout::new(specs, piece_bytes).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn the_same_bytes_elsewhere_have_another_checksum() {
        let layout =
            Layout::new(vec![spec("a", 8192, ExtentKind::State), spec("b", 1, ExtentKind::State)], 4096);
        let layout = layout.unwrap();
        let checksum = |extent, number| layout.piece(ExtentId(extent), number).unwrap().checksum(b"same");
        let mut checksums = vec![checksum(0, 0), checksum(0, 1), checksum(1, 0)];
        checksums.dedup();
        assert_eq!(checksums.len(), 3);
    }

    fn specs() -> impl Strategy<Value = Vec<ExtentSpec>> {
        let kind = prop_oneof![Just(ExtentKind::State), Just(ExtentKind::Scratch)];
        let bytes = prop_oneof![1..40_000_u64, (1..10_u64).prop_map(|pages| pages * PAGE_BYTES as u64)];
        prop::collection::vec((bytes, kind), 0..20).prop_map(|extents| {
            let named = extents.into_iter().enumerate();
            named.map(|(index, (bytes, kind))| spec(&format!("extent {index}"), bytes, kind)).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_pieces_are_aligned_apart_within_their_file_and_found_again(specs in specs(), pages in 1..6_usize) {
            let piece_bytes = pages * PAGE_BYTES;
            let layout = Layout::new(specs.clone(), piece_bytes).unwrap();
            let [a, b, scratch] = &layout.files()[..] else { panic!("three files") };
            prop_assert_eq!(a.bytes, b.bytes);
            let mut index = 0;
            let mut ends = [0, 0];
            for (number, spec) in specs.iter().enumerate() {
                let id = layout.find(&spec.name).unwrap();
                prop_assert_eq!((id, layout.name(id)), (ExtentId(number), spec.name.as_str()));
                let (end, file) = match spec.kind {
                    ExtentKind::State => (&mut ends[0], a),
                    ExtentKind::Scratch => (&mut ends[1], scratch),
                };
                let mut extent_bytes = 0;
                for piece_number in 0..layout.piece_count(id).unwrap() {
                    let piece = layout.piece(id, piece_number).unwrap();
                    prop_assert_eq!((piece.index, layout.piece_at(index)), (index, Some((id, piece_number))));
                    prop_assert!(piece.offset_bytes.is_multiple_of(PAGE_BYTES as u64));
                    prop_assert!(piece.offset_bytes >= *end, "after the piece before it");
                    prop_assert!(piece.bytes > 0 && piece.bytes <= piece_bytes);
                    // Transfers move whole pages.
                    *end = piece.offset_bytes + padded_bytes(piece.bytes) as u64;
                    prop_assert!(*end <= file.bytes);
                    extent_bytes += piece.bytes as u64;
                    index += 1;
                }
                prop_assert_eq!(extent_bytes, spec.bytes, "pieces tile their extent");
            }
            prop_assert_eq!((ends[0], ends[1]), (a.bytes, scratch.bytes), "nothing is left over");
            prop_assert_eq!((index, layout.piece_at(index)), (layout.pieces_in_all(), None));
        }
    }
}
