//! The document that is a commit.
//!
//! JSON, whose last member is the checksum of everything before it, so that the document can be read with any
//! tool and still be checked byte by byte.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    Commit,
    layout::{Extent, ExtentId, ExtentKind, Form, Layout, Place, crc32c},
    table::{Located, Table},
};
use crate::Error;

pub(super) const NAME: &str = "manifest.json";

/// The one format that is read and written.
const FORMAT: u64 = 1;

const SEAL_START: &[u8] = b",\"crc32c\":\"";
const SEAL_END: &[u8] = b"\"}\n";
const CRC_DIGITS: usize = 8;

#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u64,
    generation: u64,
    #[serde(flatten)]
    form: Form,
    /// In a store that is written in place: whether writes have begun since the commit, so that it may be
    /// gone.
    overwriting: bool,
    extents: Vec<ExtentEntry>,
    application: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct ExtentEntry {
    #[serde(flatten)]
    extent: Extent,
    /// Place and checksum of each piece; `null` for one that was never written. Empty for scratch.
    pieces: Vec<Option<(Place, u32)>>,
}

impl Manifest {
    /// The document of a commit of everything that is latest, or of the commit that is now to be overwritten.
    pub(super) fn encode(
        layout: &Layout,
        table: &Table,
        commit: &Commit,
        overwriting: bool,
        path: &Path,
    ) -> Result<Vec<u8>, Error> {
        let mut extents = Vec::with_capacity(layout.extents().len());
        for (index, extent) in layout.extents().iter().enumerate() {
            let pieces = match extent.spec.kind {
                ExtentKind::Scratch => Vec::new(),
                ExtentKind::State => {
                    let latest = table.latest(layout.pieces_of(ExtentId(index))?);
                    latest.map(|located| located.map(|located| (located.place, located.crc))).collect()
                }
            };
            extents.push(ExtentEntry { extent: extent.clone(), pieces });
        }
        let manifest = Self {
            format: FORMAT,
            generation: commit.generation,
            form: layout.form().clone(),
            overwriting,
            extents,
            application: commit.application.clone(),
        };
        let text = serde_json::to_vec(&manifest);
        let text = text.map_err(|error| corrupt(path, format!("it cannot be written: {error}")))?;
        Ok(seal(text))
    }

    /// Checks a document, and says which files it is about. What it takes to hold it is in proportion to its
    /// length, whatever numbers are in it.
    pub(super) fn decode(document: &[u8], path: &Path) -> Result<(Layout, Self), Error> {
        // The format comes first: another one may be sealed in another way.
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        if let Ok(Format { format: found }) = serde_json::from_slice(document)
            && found != FORMAT
        {
            let (path, supported) = (path.to_owned(), FORMAT);
            return Err(match found > FORMAT {
                true => Error::NewerFormat { path, found, supported },
                false => Error::OlderFormat { path, found, supported },
            });
        }
        if !is_sealed(document) {
            return Err(corrupt(path, "its checksum does not match".to_owned()));
        }
        let manifest = serde_json::from_slice::<Self>(document);
        let manifest = manifest.map_err(|error| corrupt(path, error.to_string()))?;
        // A generation after it must be possible, and the first is 1.
        if manifest.generation == 0 || manifest.generation == u64::MAX {
            return Err(corrupt(path, format!("generation {} cannot be", manifest.generation)));
        }
        if manifest.overwriting {
            return Err(Error::Overwritten { path: path.to_owned(), generation: manifest.generation });
        }
        let unfit =
            |extent: &Extent| corrupt(path, format!("extent {} does not fit its pieces", extent.spec.name));
        // The layout has an offset of each extent in each directory: as many as the document must have.
        let directories = 1 + manifest.form.stripes.len();
        let mut extents = manifest.extents.iter().map(|entry| &entry.extent);
        if let Some(extent) = extents.find(|extent| extent.offsets_bytes.len() != directories) {
            return Err(unfit(extent));
        }
        let specs = manifest.extents.iter().map(|entry| entry.extent.spec.clone()).collect();
        let layout = Layout::new(specs, manifest.form.clone());
        let layout = layout.map_err(|error| corrupt(path, error.to_string()))?;
        for (index, ExtentEntry { extent, pieces }) in manifest.extents.iter().enumerate() {
            let count = match extent.spec.kind {
                ExtentKind::State => layout.piece_count(ExtentId(index))?,
                ExtentKind::Scratch => 0,
            };
            let is_elsewhere = |place: Place| match place {
                Place::A => false,
                Place::B => manifest.form.in_place,
                Place::Scratch => true,
            };
            let elsewhere = pieces.iter().flatten().any(|(place, _)| is_elsewhere(*place));
            if *extent != layout.extents()[index] || pieces.len() != count || elsewhere {
                return Err(unfit(extent));
            }
        }
        Ok((layout, manifest))
    }

    /// What a store works with, once the files are known to be as long as the layout says: it takes memory
    /// for every piece.
    pub(super) fn into_table(self, layout: &Layout) -> Result<Table, Error> {
        let mut located = Vec::with_capacity(layout.pieces_in_all());
        for (index, ExtentEntry { pieces, .. }) in self.extents.into_iter().enumerate() {
            let count = layout.piece_count(ExtentId(index))?;
            located.extend(pieces.iter().map(|piece| piece.map(|(place, crc)| Located { place, crc })));
            located.resize(located.len() + count.saturating_sub(pieces.len()), None);
        }
        let commit = Commit { generation: self.generation, application: self.application };
        Ok(Table::of_commit(layout, commit, located))
    }
}

/// Adds the checksum as the last member of a JSON object.
fn seal(mut object: Vec<u8>) -> Vec<u8> {
    object.truncate(object.len().saturating_sub(1));
    let crc = crc32c(&[&object]);
    object.extend_from_slice(SEAL_START);
    object.extend_from_slice(format!("{crc:08x}").as_bytes());
    object.extend_from_slice(SEAL_END);
    object
}

fn is_sealed(document: &[u8]) -> bool {
    let sealed = || {
        let rest = document.strip_suffix(SEAL_END)?;
        let (rest, digits) = rest.split_at_checked(rest.len().checked_sub(CRC_DIGITS)?)?;
        let body = rest.strip_suffix(SEAL_START)?;
        Some(digits == format!("{:08x}", crc32c(&[body])).as_bytes())
    };
    sealed().unwrap_or(false)
}

fn corrupt(path: &Path, reason: String) -> Error {
    Error::CorruptManifest { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExtentSpec;
    use proptest::prelude::*;

    #[test]
    fn every_damaged_byte_breaks_the_seal() {
        let document = seal(br#"{"format":1,"generation":7}"#.to_vec());
        assert!(is_sealed(&document));
        assert!(serde_json::from_slice::<serde_json::Value>(&document).is_ok(), "a seal keeps it JSON");
        for index in 0..document.len() {
            let mut damaged = document.clone();
            damaged[index] ^= 1;
            assert!(!is_sealed(&damaged), "byte {index}");
            assert!(!is_sealed(&document[..index]), "cut at {index}");
        }
    }

    fn located() -> impl Strategy<Value = Option<Located>> {
        let place = prop_oneof![Just(Place::A), Just(Place::B)];
        prop::option::of((place, any::<u32>()).prop_map(|(place, crc)| Located { place, crc }))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_a_manifest_says_is_read_back(
            extents in prop::collection::vec((1..30_000_u64, any::<bool>()), 0..10),
            places in prop::collection::vec(located(), 80),
            generation in 1..u64::MAX,
            (in_place, is_striped) in any::<(bool, bool)>(),
            number in any::<f64>().prop_filter("JSON has no such numbers", |number| number.is_finite()),
        ) {
            let kind = |is_state| if is_state { ExtentKind::State } else { ExtentKind::Scratch };
            let specs = extents.iter().enumerate().map(|(index, &(bytes, is_state))| {
                ExtentSpec { name: format!("extent {index}"), bytes, kind: kind(is_state) }
            });
            let stripes = vec!["/other".into(); usize::from(is_striped)];
            let form = Form { piece_bytes: 4096, in_place, stripes };
            let layout = Layout::new(specs.collect(), form).unwrap();
            let commit = Commit { generation, application: serde_json::json!({ "number": number }) };
            let places: Vec<_> = (0..layout.pieces_in_all())
                .map(|index| {
                    let (extent, _) = layout.piece_at(index).unwrap();
                    let is_state = layout.extents()[extent.0].spec.kind == ExtentKind::State;
                    places[index]
                        .filter(|located| is_state && !(in_place && located.place == Place::B))
                })
                .collect();
            let table = Table::of_commit(&layout, commit.clone(), places.clone());
            let document = Manifest::encode(&layout, &table, &commit, false, Path::new("m")).unwrap();
            let (read, manifest) = Manifest::decode(&document, Path::new("m")).unwrap();
            prop_assert_eq!(read.extents(), layout.extents());
            prop_assert_eq!(read.files(), layout.files());
            let table = manifest.into_table(&read).unwrap();
            prop_assert_eq!(table.committed(), Some(commit.into()));
            let latest: Vec<_> = table.latest(0..read.pieces_in_all()).collect();
            prop_assert_eq!(latest, places);
        }
    }
}
