//! What a store promises, on every backend from one table.

mod common;

use std::{fs, process::Command, sync::Arc};

use common::*;
use ferrozero_offload::*;
use serde_json::json;

fn mixed_specs() -> Vec<ExtentSpec> {
    vec![
        spec("h.0/master", 100_000, ExtentKind::State),
        spec("gradients", 30_001, ExtentKind::Scratch),
        spec("h.1/master", 4096, ExtentKind::State),
        spec("h.2/master", 1, ExtentKind::State),
        spec("large", 3 << 20, ExtentKind::State),
    ]
}

#[test]
fn what_is_written_is_read_back_on_every_backend_and_piece_size() {
    for piece_bytes in [4096, 12 * 1024, 1 << 20, 8 << 20] {
        for disk in disks() {
            let arena = arena(16 << 20);
            let store = disk.create(mixed_specs(), piece_bytes);
            write_all(&store, &arena, 1);
            for piece in pieces(&store) {
                expect_round(&store, &arena, piece, 1);
            }
            let moved = Traffic {
                state_read_bytes: 104_097 + (3 << 20),
                state_written_bytes: 104_097 + (3 << 20),
                scratch_read_bytes: 30_001,
                scratch_written_bytes: 30_001,
            };
            assert_eq!(store.traffic(), moved);
            assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
        }
    }
}

#[test]
fn a_reopened_store_has_the_last_commit_and_nothing_after_it() {
    for disk in disks() {
        let arena = arena(16 << 20);
        let store = disk.create(mixed_specs(), 64 * 1024);
        assert_eq!(store.committed(), None);
        write_all(&store, &arena, 1);
        assert_eq!(store.commit(json!({ "step": 1, "loss": 0.1 + 0.2 })).unwrap(), 1);
        // Twice over some pieces, so that both places have been written since.
        let some: Vec<_> = pieces(&store).into_iter().step_by(2).collect();
        for round in [2, 3] {
            for &piece in &some {
                write(&store, &arena, piece, round).unwrap();
                expect_round(&store, &arena, piece, round);
            }
        }
        drop(store);

        let store = disk.open();
        let commit = store.committed().unwrap();
        assert_eq!((commit.generation, &commit.application), (1, &json!({ "step": 1, "loss": 0.1 + 0.2 })));
        assert_eq!((store.piece_bytes(), store.extents().len()), (64 * 1024, 5));
        let scratch = store.extent("gradients").unwrap();
        for piece in pieces(&store) {
            match piece.0 == scratch {
                true => assert!(matches!(read(&store, &arena, piece), Err(Error::NeverWritten { .. }))),
                false => expect_round(&store, &arena, piece, 1),
            }
        }
        // Commits alternate places piece by piece, however few pieces each of them changes.
        for generation in 2..6 {
            write(&store, &arena, some[0], generation).unwrap();
            assert_eq!(store.commit(json!(null)).unwrap(), generation);
        }
        drop(store);
        let store = disk.open();
        expect_round(&store, &arena, some[0], 5);
        expect_round(&store, &arena, (store.extent("large").unwrap(), 7), 1);
    }
}

#[test]
fn misuse_is_a_typed_error_that_gives_the_lease_back() {
    for disk in disks() {
        let arena = arena(1 << 20);
        let store = disk.create(state("weights", 10_000), 8192);
        let weights = store.extent("weights").unwrap();
        assert!(matches!(read(&store, &arena, (weights, 1)), Err(Error::NeverWritten { piece: 1, .. })));
        let (ticket, on_done) = Ticket::new();
        store.write(weights, 0, arena.lease(8191).unwrap(), on_done);
        let done = ticket.wait();
        assert!(matches!(
            done.result,
            Err(Error::LeaseTooSmall { needed_bytes: 8192, lease_bytes: 8191, .. })
        ));
        assert_eq!(done.lease.len(), 8191);
        drop(done.lease);
        assert!(matches!(store.piece_bytes_of(weights, 2), Err(Error::UnknownPiece { piece: 2, .. })));
        assert_eq!(arena.free_bytes(), arena.capacity_bytes());
    }
}

/// Holds every transfer until it is told to let them go.
struct Gate {
    inner: Arc<dyn io::Io>,
    held: std::sync::Mutex<Vec<(io::Request, io::OnDone)>>,
}

impl Gate {
    fn open(&self) {
        for (request, on_done) in self.held.lock().unwrap().drain(..) {
            self.inner.submit(request, on_done);
        }
    }
}

impl io::Io for Gate {
    fn allocate_files(&self, files: &[io::FileSpec]) -> Result<(), Error> {
        self.inner.allocate_files(files)
    }
    fn open_files(&self, files: &[io::FileSpec]) -> Result<(), Error> {
        self.inner.open_files(files)
    }
    fn submit(&self, request: io::Request, on_done: io::OnDone) {
        self.held.lock().unwrap().push((request, on_done));
    }
    fn sync(&self, file: io::FileId) -> Result<(), Error> {
        self.inner.sync(file)
    }
    fn save_document(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.inner.save_document(name, bytes)
    }
    fn load_document(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        self.inner.load_document(name)
    }
    fn check_files(&self) -> Result<(), Error> {
        self.inner.check_files()
    }
    fn check_paths(&self) -> Result<(), Error> {
        self.inner.check_paths()
    }
    fn path_of(&self, name: &str) -> std::path::PathBuf {
        self.inner.path_of(name)
    }
    fn notices(&self) -> Vec<Notice> {
        self.inner.notices()
    }
}

#[test]
fn a_piece_in_flight_is_busy_and_holds_up_commits() {
    let inner = Arc::new(io::Mem::new(&io::FaultPlan::default()).unwrap());
    let gate = Arc::new(Gate { inner, held: std::sync::Mutex::default() });
    let store = Store::create_on(gate.clone(), state("weights", 8192), &of_pieces(4096)).unwrap();
    let arena = arena(1 << 20);
    let weights = store.extent("weights").unwrap();
    let start = |verb: io::Verb, piece| {
        let (ticket, on_done) = Ticket::new();
        let lease = arena.lease(4096).unwrap();
        match verb {
            io::Verb::Read => store.read(weights, piece, lease, on_done),
            io::Verb::Write => store.write(weights, piece, lease, on_done),
        }
        ticket
    };
    let writing = start(io::Verb::Write, 0);
    for verb in [io::Verb::Read, io::Verb::Write] {
        assert!(matches!(start(verb, 0).wait().result, Err(Error::PieceBusy { piece: 0, .. })));
    }
    assert!(matches!(store.commit(json!(1)), Err(Error::WritesInFlight { writes_in_flight: 1 })));
    gate.open();
    writing.wait().result.unwrap();
    let reading = [start(io::Verb::Read, 0), start(io::Verb::Read, 0)];
    assert!(matches!(start(io::Verb::Write, 0).wait().result, Err(Error::PieceBusy { piece: 0, .. })));
    assert_eq!(store.commit(json!(1)).unwrap(), 1, "reads do not hold up a commit");
    gate.open();
    for ticket in reading {
        ticket.wait().result.unwrap();
    }
}

#[test]
fn callbacks_may_start_the_next_transfer_and_drop_the_store() {
    for disk in disks() {
        let store = Arc::new(disk.create(state("weights", 64 * 4096), 4096));
        let arena = arena(1 << 20);
        let (sender, done) = std::sync::mpsc::channel();
        chain(store, arena.lease(4096).unwrap(), 0, sender);
        assert_eq!(done.recv().unwrap(), 64);
    }

    /// Writes one piece after the other, each from the callback of the one before.
    fn chain(store: Arc<Store>, lease: Lease, piece: usize, done: std::sync::mpsc::Sender<usize>) {
        let weights = store.extent("weights").unwrap();
        if piece == store.piece_count(weights).unwrap() {
            drop(store);
            return done.send(piece).unwrap();
        }
        let next = store.clone();
        store.write(weights, piece, lease, move |completion| {
            completion.result.unwrap();
            chain(next, completion.lease, piece + 1, done);
        });
    }
}

#[test]
fn one_damaged_byte_on_disk_is_found_and_named() {
    for disk in disks() {
        let Some(path) = disk.path().map(ToOwned::to_owned) else { continue };
        let arena = arena(1 << 20);
        let store = disk.create(state("h.3/second_moment", 20_000), 4096);
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let file = path.join("state-a.bin");
        let mut bytes = fs::read(&file).unwrap();
        bytes[2 * 4096 + 17] ^= 0x40;
        fs::write(&file, bytes).unwrap();

        let store = disk.open();
        let extent = store.extent("h.3/second_moment").unwrap();
        let error = read(&store, &arena, (extent, 2)).unwrap_err();
        match &error {
            Error::Checksum { path, extent, piece: 2, offset_bytes: 8192, generation: 1 } => {
                assert_eq!((path, extent.as_str()), (&file, "h.3/second_moment"));
            }
            other => panic!("{other}"),
        }
        assert!(error.to_string().contains("state-a.bin at offset 8192"), "{error}");
        for piece in [0, 1, 3, 4] {
            expect_round(&store, &arena, (extent, piece), 1);
        }
    }
}

#[test]
fn what_is_no_store_or_no_whole_one_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let options = || StoreOptions { backend: BackendChoice::Pool, ..StoreOptions::default() };
    assert!(matches!(Store::open(path, options()), Err(Error::NoCommit { .. })));
    assert!(matches!(Store::open(&path.join("missing"), options()), Err(Error::NoCommit { .. })));

    drop(Store::create(path, state("weights", 8192), options()).unwrap());
    assert!(matches!(Store::open(path, options()), Err(Error::NoCommit { .. })), "never committed");
    let store = Store::create(path, state("weights", 8192), options()).unwrap();
    store.commit(json!(null)).unwrap();
    drop(store);
    let again = Store::create(path, state("weights", 8192), options());
    assert!(matches!(again, Err(Error::AlreadyCommitted { .. })));

    let manifest = path.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"format\":1", "\"format\":2")).unwrap();
    let newer = Store::open(path, options());
    assert!(matches!(newer, Err(Error::NewerFormat { found: 2, supported: 1, .. })));
    fs::write(&manifest, text.replace("weights", "weighty")).unwrap();
    assert!(matches!(Store::open(path, options()), Err(Error::CorruptManifest { .. })));
    fs::write(&manifest, &text).unwrap();
    drop(Store::open(path, options()).unwrap());

    let file = fs::OpenOptions::new().write(true).open(path.join("state-b.bin")).unwrap();
    file.set_len(4096).unwrap();
    match Store::open(path, options()).map(drop) {
        Err(Error::TruncatedFile { path, expected_bytes: 8192, found_bytes: 4096 }) => {
            assert!(path.ends_with("state-b.bin"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_second_user_of_a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let store = Store::create(path, state("weights", 8192), StoreOptions::default()).unwrap();
    store.commit(json!(null)).unwrap();
    let text = Store::open(path, StoreOptions::default()).map(drop).unwrap_err().to_string();
    assert!(text.contains(&path.display().to_string()), "{text}");
    // Another process is kept out by the same lock.
    let lock = path.join(".lock");
    let other = || Command::new("flock").arg("--nonblock").arg(&lock).arg("true").status();
    match other() {
        Ok(status) => assert!(!status.success()),
        Err(error) => println!("not tried from another process: no flock command ({error})"),
    }
    drop(store);
    drop(Store::open(path, StoreOptions::default()).unwrap());
}

/// A small file system mounted for one test, or a printed reason why not.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(kind: &str, options: &str) -> Option<Self> {
        let point = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(point.path()).output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(point)),
            Ok(output) => {
                println!("skipping, cannot mount {kind}: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                println!("skipping, cannot mount {kind}: {error}");
                None
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_leaves_nothing_half_made() {
    let Some(mount) = Mount::new("tmpfs", "size=1m") else { return };
    let directory = mount.0.path().join("store");
    for backend in [BackendChoice::Pool, BackendChoice::Auto] {
        let options = StoreOptions { backend, ..StoreOptions::default() };
        match Store::create(&directory, state("weights", 10 << 20), options).map(drop) {
            Err(Error::DiskFull { path, needed_bytes, available_bytes }) => {
                assert_eq!((path, needed_bytes), (directory.clone(), 20 << 20));
                assert!(available_bytes <= 1 << 20 && available_bytes > 1 << 19, "{available_bytes}");
            }
            other => panic!("{other:?}"),
        }
        assert!(!directory.exists());
    }
}

#[test]
fn folders_are_made_with_those_above_them_or_not_at_all() {
    use io::{Fault, FaultKind, FaultPlan, FaultPoint};
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("above/own");
    let create = |point, nth| {
        let fault = Fault { point, nth, kind: FaultKind::InputOutput };
        let options = StoreOptions { faults: Some(FaultPlan(vec![fault])), ..of_pieces(4096) };
        Store::create(&directory, state("weights", 8192), options)
    };
    // Both folders are made, and each becomes durable in the one above it.
    for (point, nth, path) in [
        (FaultPoint::Allocate, 0, "above"),
        (FaultPoint::SyncDirectory, 0, ""),
        (FaultPoint::Allocate, 1, "above/own"),
        (FaultPoint::SyncDirectory, 1, "above"),
        (FaultPoint::SyncDirectory, 2, "above/own"),
    ] {
        match create(point, nth).map(drop) {
            Err(Error::File { path: named, .. }) => assert_eq!(named, root.path().join(path)),
            other => panic!("{point:?} {nth}: {other:?}"),
        }
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "{point:?} {nth}: a folder is left");
    }
    drop(create(FaultPoint::SyncDirectory, 3).unwrap());
    assert!(directory.join("state-a.bin").exists());
}

#[test]
fn a_file_system_without_direct_transfers_works_buffered() {
    let Some(mount) = Mount::new("ramfs", "mode=755") else { return };
    for backend in [BackendChoice::Pool, BackendChoice::Auto] {
        let directory = mount.0.path().join(format!("{backend:?}"));
        let options = || StoreOptions { backend, piece_bytes: 4096, ..StoreOptions::default() };
        let arena = arena(1 << 20);
        let store = Store::create(&directory, state("weights", 50_000), options()).unwrap();
        let codes: Vec<_> = store.notices().iter().map(|notice| notice.code).collect();
        assert_eq!(codes.iter().filter(|code| **code == "direct-io-refused").count(), 1, "{codes:?}");
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let store = Store::open(&directory, options()).unwrap();
        for piece in pieces(&store) {
            expect_round(&store, &arena, piece, 1);
        }
    }
}

#[test]
fn wrappers_move_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let arena = arena(8 << 20);
    let options = StoreOptions {
        piece_bytes: 1 << 20,
        throttle: Some(Throttle::new(1e12, 1e12).unwrap()),
        ..StoreOptions::default()
    };
    let store = Store::create(directory.path(), state("weights", 5 << 20), options).unwrap();
    write_all(&store, &arena, 1);
    for piece in pieces(&store) {
        expect_round(&store, &arena, piece, 1);
    }
}
