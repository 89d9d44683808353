//! Where each extent and each piece is.

use std::{collections::HashMap, path::PathBuf};

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
    /// Kept by commits; takes twice its bytes on disk, or once in a store that is written in place.
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
    /// Where it starts in its file of each directory, a multiple of [`PAGE_BYTES`].
    pub offsets_bytes: Vec<u64>,
}

/// What is fixed when a store is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Form {
    /// Bytes of all pieces of an extent but the last.
    pub(super) piece_bytes: usize,
    /// Whether state has one place, that is overwritten, in the stead of two.
    pub(super) in_place: bool,
    /// Directories beside the store's own that pieces are dealt out to.
    pub(super) stripes: Vec<PathBuf>,
}

/// Which file of its directory holds a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Place {
    A,
    B,
    Scratch,
}

/// Longest file: all files of a directory together are still a number of bytes.
const FILE_BYTES_MAX: u64 = i64::MAX as u64 / 3;

pub(super) const FILE_NAMES: [&str; 3] = ["state-a.bin", "state-b.bin", "scratch.bin"];

/// One piece of an extent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) extent: ExtentId,
    pub(super) number: usize,
    /// Number of its directory: 0 is the store's own.
    directory: usize,
    /// Offset in the file.
    pub(super) offset_bytes: u64,
    /// Bytes without padding.
    pub(super) bytes: usize,
    /// Position among all pieces of the store.
    pub(super) index: usize,
}

impl Piece {
    pub(super) fn file(&self, place: Place) -> FileId {
        FileId(self.directory * FILE_NAMES.len() + place as usize)
    }

    pub(super) fn checksum(&self, bytes: &[u8]) -> u32 {
        let mut checksum = Checksum::default();
        checksum.update(bytes);
        checksum.of(self)
    }
}

/// The checksum of a piece, whose bytes come in parts: CRC-32C (Castagnoli) of the bytes followed by the
/// extent and piece numbers, so that a piece in another's place is found.
pub(super) struct Checksum(crc_fast::Digest);

impl Default for Checksum {
    fn default() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }
}

impl Checksum {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn of(mut self, piece: &Piece) -> u32 {
        let (extent, number) = (piece.extent.0 as u64, piece.number as u64);
        self.update(&extent.to_le_bytes());
        self.update(&number.to_le_bytes());
        self.value()
    }

    fn value(self) -> u32 {
        // Wider than its 32 bits because of its longer siblings.
        self.0.finalize() as u32
    }
}

/// CRC-32C (Castagnoli) of all bytes, one part after the other.
pub(super) fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut checksum = Checksum::default();
    parts.iter().for_each(|part| checksum.update(part));
    checksum.value()
}

#[derive(Debug)]
pub(super) struct Layout {
    form: Form,
    extents: Vec<Extent>,
    /// Number of the first piece of each extent, and of all pieces at the end.
    first_pieces: Vec<usize>,
    by_name: HashMap<String, ExtentId>,
    /// Bytes of state in each directory.
    state_bytes: Vec<u64>,
    /// Bytes of scratch in each directory.
    scratch_bytes: Vec<u64>,
}

impl Layout {
    pub(super) fn new(specs: Vec<ExtentSpec>, form: Form) -> Result<Self, Error> {
        let piece_bytes = form.piece_bytes;
        let is_size = piece_bytes > 0 && piece_bytes as u64 <= FILE_BYTES_MAX;
        if !is_size || !piece_bytes.is_multiple_of(PAGE_BYTES) {
            let reason = format!("pieces of {piece_bytes} bytes: use a positive multiple of {PAGE_BYTES}");
            return Err(Error::BadLayout { reason });
        }
        let stripes = form.stripes.iter().map(|stripe| stripe.to_str());
        if let Some(odd) = stripes.zip(&form.stripes).find_map(|(text, path)| text.is_none().then_some(path))
        {
            let reason = format!("the name of {} is not UTF-8: rename the directory", odd.display());
            return Err(Error::BadLayout { reason });
        }
        let directories = 1 + form.stripes.len();
        let mut layout = Self {
            form,
            extents: Vec::with_capacity(specs.len()),
            first_pieces: vec![0],
            by_name: HashMap::new(),
            state_bytes: vec![0; directories],
            scratch_bytes: vec![0; directories],
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
            let ends_bytes = match spec.kind {
                ExtentKind::State => &mut layout.state_bytes,
                ExtentKind::Scratch => &mut layout.scratch_bytes,
            };
            let offsets_bytes = ends_bytes.clone();
            let first_piece = pieces;
            let count = usize::try_from(spec.bytes.div_ceil(piece_bytes as u64));
            let total = count.ok().and_then(|count| pieces.checked_add(count));
            pieces = total.ok_or_else(|| bad("has more pieces than can be counted: use larger pieces"))?;
            let last_bytes = spec.bytes - (pieces - first_piece - 1) as u64 * piece_bytes as u64;
            for (directory, end_bytes) in ends_bytes.iter_mut().enumerate() {
                // Pieces of the extent that are dealt to this directory, the last of which may be a short
                // one.
                let dealt = |pieces: usize| (pieces + directories - 1 - directory) / directories;
                let full_pieces = (dealt(pieces - 1) - dealt(first_piece)) as u64;
                let has_last = (pieces - 1) % directories == directory;
                let own_bytes = full_pieces.checked_mul(piece_bytes as u64).and_then(|bytes| {
                    bytes.checked_add(if has_last {
                        last_bytes.next_multiple_of(PAGE_BYTES as u64)
                    } else {
                        0
                    })
                });
                let end = own_bytes.and_then(|bytes| bytes.checked_add(*end_bytes));
                // All directories together have a number of bytes too.
                let end = end.filter(|&end| end <= FILE_BYTES_MAX / directories as u64);
                *end_bytes = end.ok_or_else(|| bad("is larger than a file can be"))?;
            }
            layout.first_pieces.push(pieces);
            layout.extents.push(Extent { spec, offsets_bytes });
        }
        Ok(layout)
    }

    pub(super) fn form(&self) -> &Form {
        &self.form
    }

    pub(super) fn piece_bytes(&self) -> usize {
        self.form.piece_bytes
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

    pub(super) fn is_state(&self, extent: ExtentId) -> bool {
        self.extents.get(extent.0).is_some_and(|extent| extent.spec.kind == ExtentKind::State)
    }

    /// The files of one directory after the other, in the order of [`Place`].
    pub(super) fn files(&self) -> Vec<FileSpec> {
        let mut files = Vec::with_capacity(FILE_NAMES.len() * self.state_bytes.len());
        for directory in 0..self.state_bytes.len() {
            let state_bytes = self.state_bytes[directory];
            let second_bytes = if self.form.in_place { 0 } else { state_bytes };
            let sizes = [state_bytes, second_bytes, self.scratch_bytes[directory]];
            let named = FILE_NAMES.iter().zip(sizes);
            files.extend(named.map(|(name, bytes)| FileSpec { name: self.name_in(directory, name), bytes }));
        }
        files
    }

    /// Those files that commits keep.
    pub(super) fn state_files(&self) -> impl Iterator<Item = FileId> {
        let is_state = |&FileId(number): &FileId| number % FILE_NAMES.len() != Place::Scratch as usize;
        let has_bytes = self.files().into_iter().map(|file| file.bytes > 0);
        let numbered = has_bytes.enumerate().filter_map(|(number, full)| full.then_some(FileId(number)));
        numbered.filter(is_state)
    }

    /// Name of the file that holds a place of a piece.
    pub(super) fn file_name(&self, piece: &Piece, place: Place) -> String {
        self.name_in(piece.directory, FILE_NAMES[place as usize])
    }

    fn name_in(&self, directory: usize, name: &str) -> String {
        let stripe = directory.checked_sub(1).and_then(|stripe| self.form.stripes.get(stripe));
        // Paths that are not UTF-8 were refused.
        stripe.map_or(name.to_owned(), |stripe| stripe.join(name).to_string_lossy().into_owned())
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
        let piece_bytes = self.form.piece_bytes as u64;
        let bytes = (extent.spec.bytes - number as u64 * piece_bytes).min(piece_bytes);
        let index = pieces.start + number;
        let directories = self.state_bytes.len();
        let directory = index % directories;
        // Each directory has one of every so many pieces, in order.
        let offset_bytes = extent.offsets_bytes[directory] + (number / directories) as u64 * piece_bytes;
        Ok(Piece { extent: id, number, directory, offset_bytes, bytes: bytes as usize, index })
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

    fn form(piece_bytes: usize) -> Form {
        Form { piece_bytes, in_place: false, stripes: Vec::new() }
    }

    #[test]
    fn pieces_tile_their_extents_and_extents_do_not_overlap() {
        let specs = vec![
            spec("first", 10_000, ExtentKind::State),
            spec("second", 1, ExtentKind::Scratch),
            spec("third", 8192, ExtentKind::State),
        ];
        let layout = Layout::new(specs, form(8192)).unwrap();
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
    fn striped_pieces_are_dealt_out_in_turn_and_fill_each_file_without_overlap() {
        for (directories, in_place) in [(1, true), (2, false), (3, true), (4, false)] {
            let stripes = (1..directories).map(|number| PathBuf::from(format!("/{number}"))).collect();
            let specs = [30_000, 1, 8192, 12_289, 4096, 100_000].iter().enumerate();
            let specs = specs.map(|(number, &bytes)| spec(&number.to_string(), bytes, ExtentKind::State));
            let form = Form { piece_bytes: 8192, in_place, stripes };
            let layout = Layout::new(specs.collect(), form).unwrap();
            let files = layout.files();
            let mut ends = vec![0; files.len()];
            for index in 0..layout.pieces_in_all() {
                let (extent, number) = layout.piece_at(index).unwrap();
                let piece = layout.piece(extent, number).unwrap();
                let FileId(file) = piece.file(Place::A);
                assert_eq!(file, 3 * (index % directories));
                assert_eq!(piece.offset_bytes, ends[file], "pieces lie in order, one after the other");
                ends[file] += piece.bytes.next_multiple_of(PAGE_BYTES) as u64;
            }
            for (number, file) in files.iter().enumerate() {
                let state_bytes = ends[number - number % 3];
                let expected = [state_bytes, if in_place { 0 } else { state_bytes }, 0][number % 3];
                assert_eq!(file.bytes, expected, "{}", file.name);
            }
            assert_eq!(layout.state_files().count(), directories * if in_place { 1 } else { 2 });
        }
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
            let text = Layout::new(specs, form(piece_bytes)).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn the_checksum_is_the_one_of_the_standard() {
        // RFC 3720, B.4.
        let ascending: Vec<u8> = (0..32).collect();
        let cases: [(&[u8], u32); 4] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
        ];
        for (bytes, expected) in cases {
            let (head, tail) = bytes.split_at(5);
            assert_eq!((crc32c(&[bytes]), crc32c(&[head, &[], tail])), (expected, expected));
        }
    }

    #[test]
    fn the_same_bytes_elsewhere_have_another_checksum() {
        let layout = Layout::new(
            vec![spec("a", 8192, ExtentKind::State), spec("b", 1, ExtentKind::State)],
            form(4096),
        );
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
        fn any_pieces_are_aligned_apart_within_their_file_and_found_again(
            specs in specs(),
            pages in 1..6_usize,
            in_place: bool,
            stripes in 0..4_usize,
        ) {
            let piece_bytes = pages * PAGE_BYTES;
            let stripes: Vec<_> = (0..stripes).map(|number| PathBuf::from(format!("/{number}"))).collect();
            let layout = Layout::new(specs.clone(), Form { piece_bytes, in_place, stripes }).unwrap();
            let files = layout.files();
            let mut index = 0;
            let mut ends = vec![0; files.len()];
            for (number, spec) in specs.iter().enumerate() {
                let id = layout.find(&spec.name).unwrap();
                prop_assert_eq!((id, layout.name(id)), (ExtentId(number), spec.name.as_str()));
                let mut extent_bytes = 0;
                for piece_number in 0..layout.piece_count(id).unwrap() {
                    let piece = layout.piece(id, piece_number).unwrap();
                    prop_assert_eq!((piece.index, layout.piece_at(index)), (index, Some((id, piece_number))));
                    prop_assert!(piece.offset_bytes.is_multiple_of(PAGE_BYTES as u64));
                    prop_assert!(piece.bytes > 0 && piece.bytes <= piece_bytes);
                    let places: &[Place] = match (spec.kind, in_place) {
                        (ExtentKind::Scratch, _) => &[Place::Scratch],
                        (ExtentKind::State, true) => &[Place::A],
                        (ExtentKind::State, false) => &[Place::A, Place::B],
                    };
                    for &place in places {
                        let FileId(file) = piece.file(place);
                        prop_assert!(piece.offset_bytes >= ends[file], "after the piece before it");
                        // Transfers move whole pages.
                        ends[file] = piece.offset_bytes + padded_bytes(piece.bytes) as u64;
                    }
                    extent_bytes += piece.bytes as u64;
                    index += 1;
                }
                prop_assert_eq!(extent_bytes, spec.bytes, "pieces tile their extent");
            }
            let sizes: Vec<_> = files.iter().map(|file| file.bytes).collect();
            prop_assert_eq!(ends, sizes, "nothing lies outside, and nothing is left over");
            prop_assert_eq!((index, layout.piece_at(index)), (layout.pieces_in_all(), None));
        }
    }
}
