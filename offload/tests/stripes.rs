//! A store over several directories is one store, on every backend.

mod common;

use std::{fs, path::PathBuf, sync::Arc};

use common::*;
use ferrozero_offload::{
    io::{Fault, FaultKind, FaultPlan, FaultPoint, Io, Mem, Throttle, Throttled},
    *,
};
use serde_json::json;

const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Pool];

/// Directories of one store: its own and the others.
struct Directories {
    root: tempfile::TempDir,
    stripes: usize,
}

impl Directories {
    fn new(stripes: usize) -> Self {
        Self { root: tempfile::tempdir().unwrap(), stripes }
    }

    fn own(&self) -> PathBuf {
        self.root.path().canonicalize().unwrap().join("own")
    }

    fn stripe(&self, number: usize) -> PathBuf {
        self.root.path().canonicalize().unwrap().join(format!("disk-{number}"))
    }

    fn options(&self, backend: BackendChoice) -> StoreOptions {
        let stripes = (0..self.stripes).map(|number| self.stripe(number)).collect();
        StoreOptions { stripes, backend, ..of_pieces(8192) }
    }

    fn create(&self, backend: BackendChoice) -> Result<Store, Error> {
        Store::create(&self.own(), specs(), self.options(backend))
    }

    /// Without a word of its stripes, which the manifest knows.
    fn open(&self, backend: BackendChoice) -> Result<Store, Error> {
        Store::open(&self.own(), StoreOptions { backend, ..StoreOptions::default() })
    }
}

fn specs() -> Vec<ExtentSpec> {
    vec![
        spec("h.0/master", 100_000, ExtentKind::State),
        spec("gradients", 30_001, ExtentKind::Scratch),
        spec("h.1/master", 1, ExtentKind::State),
        spec("h.2/master", 60_000, ExtentKind::State),
    ]
}

#[test]
fn pieces_are_spread_and_come_back_from_the_last_commit() {
    for (backend, stripes) in BACKENDS.into_iter().flat_map(|backend| [1, 2, 3].map(|n| (backend, n))) {
        let directories = Directories::new(stripes);
        let arena = arena(2 << 20);
        let store = directories.create(backend).unwrap();
        for round in 1..4 {
            write_all(&store, &arena, round);
            store.commit(json!(round)).unwrap();
        }
        write_all(&store, &arena, 9);
        let state: Vec<_> = pieces(&store)
            .into_iter()
            .filter(|piece| piece.0 != store.extent("gradients").unwrap())
            .collect();
        let bytes = |directory: PathBuf| fs::metadata(directory.join("state-a.bin")).unwrap().len();
        let mut in_all = bytes(directories.own());
        for stripe in (0..stripes).map(|number| directories.stripe(number)) {
            let apart = bytes(stripe.clone()).abs_diff(bytes(directories.own()));
            assert!(apart <= 3 * 8192, "{apart} bytes more or less in {}", stripe.display());
            in_all += bytes(stripe);
        }
        assert_eq!(in_all, 102_400 + 4096 + 61_440);
        drop(store);
        let store = directories.open(backend).unwrap();
        assert_eq!(store.committed().unwrap().generation, 3);
        for piece in state {
            expect_round(&store, &arena, piece, 3);
        }
    }
}

#[test]
fn stripes_work_in_place_in_memory_and_below_wrappers() {
    let options =
        StoreOptions { in_place: true, stripes: vec!["/one".into(), "/two".into()], ..of_pieces(4096) };
    let mem = Arc::new(Mem::new(&FaultPlan::default()).unwrap());
    let io: Arc<dyn Io> = Arc::new(Throttled::new(mem.clone(), Throttle::new(1e12, 1e12).unwrap()));
    let arena = arena(1 << 20);
    let store = Store::create_on(io.clone(), specs(), &options).unwrap();
    write_all(&store, &arena, 1);
    store.commit(json!(null)).unwrap();
    drop(store);
    let store = Store::open_on(io).unwrap();
    for piece in pieces(&store).into_iter().filter(|piece| piece.0 != store.extent("gradients").unwrap()) {
        expect_round(&store, &arena, piece, 1);
    }
}

#[test]
fn a_stripe_that_is_not_there_is_named() {
    for backend in BACKENDS {
        let directories = Directories::new(2);
        let store = directories.create(backend).unwrap();
        write_all(&store, &arena(2 << 20), 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let (stripe, aside) = (directories.stripe(1), directories.root.path().join("aside"));
        fs::rename(&stripe, &aside).unwrap();
        let missing = |opened: Result<Store, Error>| match opened.map(drop) {
            Err(Error::MissingStripe { directory, .. }) => assert_eq!(directory, stripe),
            other => panic!("{other:?}"),
        };
        missing(directories.open(backend));
        // As when the disk is not mounted: the directory is there and has nothing in it, and stays so.
        fs::create_dir(&stripe).unwrap();
        missing(directories.open(backend));
        fs::remove_dir(&stripe).unwrap();
        fs::rename(&aside, &stripe).unwrap();
        drop(directories.open(backend).unwrap());
    }
}

#[test]
fn directories_in_use_or_of_another_store_are_refused_by_name() {
    for backend in BACKENDS {
        let directories = Directories::new(2);
        let store = directories.create(backend).unwrap();
        let other = directories.root.path().join("other");
        let taken = || {
            let options = StoreOptions { stripes: vec![directories.stripe(0)], backend, ..of_pieces(8192) };
            Store::create(&other, specs(), options).map(drop)
        };
        match taken() {
            Err(Error::Locked { directory }) => assert_eq!(directory, directories.stripe(0)),
            other => panic!("{other:?}"),
        }
        assert!(!other.exists(), "what was made for it is gone again");
        write_all(&store, &arena(2 << 20), 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let refused = |result: Result<(), Error>, expected: PathBuf| match result {
            Err(Error::AlreadyCommitted { directory }) => assert_eq!(directory, expected),
            other => panic!("{other:?}"),
        };
        refused(taken(), directories.stripe(0));
        // Whatever a directory is to the store, it is nothing to another one.
        let create = |own: PathBuf, stripes: Vec<PathBuf>| {
            Store::create(&own, specs(), StoreOptions { stripes, backend, ..of_pieces(8192) }).map(drop)
        };
        refused(create(directories.stripe(1), vec![]), directories.stripe(1));
        refused(create(directories.own(), vec![]), directories.own());
        refused(create(other.clone(), vec![directories.own()]), directories.own());
        refused(create(directories.stripe(1), vec![other.clone()]), directories.stripe(1));
        let mut options = directories.options(backend);
        options.stripes.push(directories.stripe(0).join("..").join("disk-0"));
        let twice = Store::create(&other, specs(), options).map(drop);
        assert!(matches!(twice, Err(Error::BadLayout { .. })), "{twice:?}");
        drop(directories.open(backend).unwrap());
    }
}

#[test]
fn a_first_commit_that_was_cut_off_may_be_made_again() {
    for backend in BACKENDS {
        let directories = Directories::new(2);
        let arena = arena(2 << 20);
        drop(directories.create(backend).unwrap());
        // The notes of three directories, and then no manifest.
        let fault = Fault { point: FaultPoint::Rename, nth: 3, kind: FaultKind::InputOutput };
        let options = StoreOptions { faults: Some(FaultPlan(vec![fault])), ..directories.options(backend) };
        let store = Store::create(&directories.own(), specs(), options).unwrap();
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap_err();
        drop(store);
        assert!(directories.stripe(1).join("stripe.json").exists());
        assert!(matches!(directories.open(backend), Err(Error::NoCommit { .. })));

        let store = directories.create(backend).unwrap();
        write_all(&store, &arena, 2);
        store.commit(json!(null)).unwrap();
        drop(store);
        // Moved away, it needs its stripes as before, and nobody takes them who comes to its old place.
        fs::rename(directories.own(), directories.root.path().join("moved")).unwrap();
        match directories.create(backend).map(drop) {
            Err(Error::AlreadyCommitted { directory }) => assert_eq!(directory, directories.stripe(0)),
            other => panic!("{other:?}"),
        }
        let moved = directories.root.path().join("moved");
        let store = Store::open(&moved, StoreOptions { backend, ..StoreOptions::default() }).unwrap();
        expect_round(&store, &arena, (store.extent("h.0/master").unwrap(), 1), 2);
    }
}

#[test]
fn a_copy_moves_a_checkpoint_to_other_directories() {
    for backend in BACKENDS {
        let arena = arena(1 << 20);
        let (from, into) = (Directories::new(1), Directories::new(3));
        let source = from.create(backend).unwrap();
        write_all(&source, &arena, 1);
        source.commit(json!({ "step": 7 })).unwrap();
        drop(source);
        let source = from.open(backend).unwrap();
        let target = into.create(backend).unwrap();
        source.copy_to(&target, &arena).unwrap();
        drop(target);
        assert!(
            matches!(into.open(backend), Err(Error::NoCommit { .. })),
            "a copy counts when it is committed"
        );

        let mut options = into.options(backend);
        options.in_place = true;
        let target = Store::create(&into.own(), specs(), options).unwrap();
        source.copy_to(&target, &arena).unwrap();
        target.commit(source.committed().unwrap().application.clone()).unwrap();
        drop(target);
        let target = into.open(backend).unwrap();
        assert_eq!(target.committed().unwrap().application, json!({ "step": 7 }));
        let scratch = target.extent("gradients").unwrap();
        for piece in pieces(&target).into_iter().filter(|piece| piece.0 != scratch) {
            expect_round(&target, &arena, piece, 1);
        }
        assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");

        let other = Disk::Mem(Arc::new(Mem::new(&FaultPlan::default()).unwrap())).create(specs(), 4096);
        assert!(matches!(source.copy_to(&other, &arena), Err(Error::BadLayout { .. })));
    }
}

#[test]
fn damage_is_not_copied() {
    for backend in BACKENDS {
        let arena = arena(1 << 20);
        let (from, into) = (Directories::new(1), Directories::new(2));
        let source = from.create(backend).unwrap();
        write_all(&source, &arena, 1);
        source.commit(json!(null)).unwrap();
        let file = from.stripe(0).join("state-a.bin");
        let mut bytes = fs::read(&file).unwrap();
        bytes[9000] ^= 1;
        fs::write(&file, bytes).unwrap();
        let target = into.create(backend).unwrap();
        match source.copy_to(&target, &arena).unwrap_err() {
            Error::Checksum { path, offset_bytes: 8192, .. } => assert_eq!(path, file),
            other => panic!("{other}"),
        }
        assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    }
}
