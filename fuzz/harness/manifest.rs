//! What is done with a document that may be a manifest: by the fuzzer, and by the tests on the stored
//! documents.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ferrozero_offload::{
    Error, Notice, Store,
    io::{FileId, FileSpec, Io, OnDone, Request},
};

/// Bytes of each file that the document is about.
const FILE_BYTES: u64 = 1 << 20;

/// A disk whose only content is a document and files of some length.
struct Document {
    bytes: Vec<u8>,
    files: AtomicU64,
}

impl Io for Document {
    fn allocate_files(&self, _files: &[FileSpec]) -> Result<(), Error> {
        Ok(())
    }
    fn open_files(&self, files: &[FileSpec]) -> Result<(), Error> {
        self.files.store(files.len() as u64, Ordering::SeqCst);
        match files.iter().find(|file| file.bytes > FILE_BYTES) {
            Some(FileSpec { name, bytes: expected_bytes }) => {
                let (path, expected_bytes) = (self.path_of(name), *expected_bytes);
                Err(Error::TruncatedFile { path, expected_bytes, found_bytes: FILE_BYTES })
            }
            None => Ok(()),
        }
    }
    fn submit(&self, request: Request, on_done: OnDone) {
        on_done(request.complete(Ok(())));
    }
    fn sync(&self, _file: FileId) -> Result<(), Error> {
        Ok(())
    }
    fn save_document(&self, _name: &str, _bytes: &[u8]) -> Result<(), Error> {
        Ok(())
    }
    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok((name == "manifest.json").then(|| self.bytes.clone()))
    }
    fn check_files(&self) -> Result<(), Error> {
        Ok(())
    }
    fn check_paths(&self) -> Result<(), Error> {
        Ok(())
    }
    fn path_of(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
    fn notices(&self) -> Vec<Notice> {
        Vec::new()
    }
}

/// Opens a store by the document; where that works, asks it everything and commits. Answers whether it
/// worked.
pub fn open(document: &[u8]) -> bool {
    let disk = Arc::new(Document { bytes: document.to_vec(), files: AtomicU64::new(0) });
    let store = match Store::open_on(disk.clone()) {
        Ok(store) => store,
        Err(error) => {
            assert!(
                error.to_string().contains("manifest.json") || matches!(error, Error::TruncatedFile { .. })
            );
            return false;
        }
    };
    for extent in store.extents() {
        let id = store.extent(&extent.spec.name);
        let count = id.map(|id| store.piece_count(id));
        let (Some(id), Some(Ok(count))) = (id, count) else { panic!("{} is lost", extent.spec.name) };
        let bytes = (0..count).map(|piece| store.piece_bytes_of(id, piece).unwrap_or(0) as u64);
        assert_eq!(bytes.sum::<u64>(), extent.spec.bytes, "pieces tile their extent");
    }
    let generation = store.committed().map_or(0, |commit| commit.generation);
    assert!(matches!(store.commit(serde_json::Value::Null), Ok(next) if next == generation + 1));
    true
}

/// The document with the checksum that it should have, so that what is behind the checksum is reached.
pub fn sealed(document: &[u8]) -> Vec<u8> {
    let seal = b",\"crc32c\":\"";
    let at = document.windows(seal.len()).position(|window| window == seal);
    let mut sealed = match at {
        Some(at) => document[..at].to_vec(),
        None => document.strip_suffix(b"}").unwrap_or(document).to_vec(),
    };
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &sealed);
    sealed.extend_from_slice(seal);
    sealed.extend_from_slice(format!("{crc:08x}\"}}\n").as_bytes());
    sealed
}
