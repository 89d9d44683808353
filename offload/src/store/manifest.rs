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

/// The newest format that is read, and the one that is written.
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
    /// In a store that is written in place: whether writes have begun since the commit, so that it may be gone.
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

    /// Checks a document and makes of it what a store works with.
    pub(super) fn decode(document: &[u8], path: &Path) -> Result<(Layout, Table), Error> {
        // The format comes first: a newer one may be sealed in another way.
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        if let Ok(Format { format }) = serde_json::from_slice(document)
            && format > FORMAT
        {
            return Err(Error::NewerFormat { path: path.to_owned(), found: format, supported: FORMAT });
        }
        if !is_sealed(document) {
            return Err(corrupt(path, "its checksum does not match".to_owned()));
        }
        let manifest = serde_json::from_slice::<Self>(document);
        let manifest = manifest.map_err(|error| corrupt(path, error.to_string()))?;
        if manifest.overwriting {
            return Err(Error::Overwritten { path: path.to_owned(), generation: manifest.generation });
        }
        manifest.into_table(path)
    }

    fn into_table(self, path: &Path) -> Result<(Layout, Table), Error> {
        let (extents, pieces): (Vec<Extent>, Vec<_>) =
            self.extents.into_iter().map(|entry| (entry.extent, entry.pieces)).unzip();
        let specs = extents.iter().map(|extent| extent.spec.clone()).collect();
        let layout = Layout::new(specs, self.form).map_err(|error| corrupt(path, error.to_string()))?;
        let mut located = Vec::with_capacity(layout.pieces_in_all());
        for (index, (extent, pieces)) in extents.iter().zip(pieces).enumerate() {
            let count = layout.piece_count(ExtentId(index))?;
            let is_state = extent.spec.kind == ExtentKind::State;
            if *extent != layout.extents()[index] || pieces.len() != if is_state { count } else { 0 } {
                return Err(corrupt(path, format!("extent {} does not fit its pieces", extent.spec.name)));
            }
            located.extend(pieces.iter().map(|piece| piece.map(|(place, crc)| Located { place, crc })));
            located.resize(located.len() + count - pieces.len(), None);
        }
        let commit = Commit { generation: self.generation, application: self.application };
        let table = Table::of_commit(&layout, commit, located);
        Ok((layout, table))
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
}
