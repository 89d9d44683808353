//! The directory of a store is the one that was opened, whatever becomes of its name; and it may be a
//! stranger's.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use common::*;
use ferrozero_offload::*;
use serde_json::json;

const BACKENDS: [BackendChoice; 2] = [BackendChoice::Auto, BackendChoice::Pool];

/// What is in every directory of a store.
const NAMES: [&str; 4] = [".lock", "scratch.bin", "state-a.bin", "state-b.bin"];

/// A store over its own directory and one stripe, with round 1 committed.
struct Case {
    root: tempfile::TempDir,
    backend: BackendChoice,
}

impl Case {
    fn new(backend: BackendChoice) -> Self {
        Self { root: tempfile::tempdir().unwrap(), backend }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().canonicalize().unwrap().join(name)
    }

    fn options(&self) -> StoreOptions {
        StoreOptions { backend: self.backend, stripes: vec![self.path("stripe")], ..of_pieces(8192) }
    }

    fn create(&self, arena: &Arena) -> Store {
        let store = Store::create(&self.path("run"), specs(), self.options()).unwrap();
        write_all(&store, arena, 1);
        store.commit(json!(1)).unwrap();
        store
    }

    fn open(&self, own: &str) -> Result<Store, Error> {
        Store::open(&self.path(own), StoreOptions { backend: self.backend, ..of_pieces(8192) })
    }

    #[track_caller]
    fn expect_round(&self, own: &str, arena: &Arena, round: u64) {
        let store = self.open(own).unwrap();
        let state = store.extent("h.0/master").unwrap();
        for piece in 0..store.piece_count(state).unwrap() {
            expect_round(&store, arena, (state, piece), round);
        }
    }
}

fn specs() -> Vec<ExtentSpec> {
    vec![spec("h.0/master", 60_000, ExtentKind::State), spec("gradients", 9_000, ExtentKind::Scratch)]
}

/// What was done to a directory, and what a commit is to say of it.
type Harm = fn(&Path, &Path);

fn rename(path: &Path, aside: &Path) {
    fs::rename(path, aside).unwrap();
}

/// The directory is put aside, and another with the same files is where it was.
fn replace(path: &Path, aside: &Path) {
    rename(path, aside);
    fs::create_dir(path).unwrap();
    for entry in fs::read_dir(aside).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_directory_that_moves_in_mid_run_takes_the_commit_along_and_the_run_is_told_where() {
    let harms: [Harm; 2] = [rename, replace];
    for (harm, name, backend) in harms
        .iter()
        .flat_map(|harm| ["run", "stripe"].map(|name| (harm, name)))
        .flat_map(|(harm, name)| BACKENDS.map(|backend| (harm, name, backend)))
    {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        let store = case.create(&arena);
        let (path, aside) = (case.path(name), case.path("aside"));
        harm(&path, &aside);
        write_all(&store, &arena, 2);
        for _ in 0..2 {
            match store.commit(json!(2)).unwrap_err() {
                Error::FolderMoved { path: named, now } => {
                    assert_eq!((named, now), (path.clone(), Whereabouts::MovedTo(aside.clone())));
                }
                other => panic!("{other}"),
            }
        }
        drop(store);
        // Moved back it opens with all that was committed after it had moved.
        if path.exists() {
            fs::remove_dir_all(&path).unwrap();
        }
        fs::rename(&aside, &path).unwrap();
        case.expect_round("run", &arena, 2);
    }
}

/// The path that the user names is a symbolic link, which is turned to a directory with another run.
#[test]
fn a_link_to_the_directory_that_turns_in_mid_run_is_told() {
    for backend in BACKENDS {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        for name in ["one", "two"] {
            fs::create_dir(case.path(name)).unwrap();
        }
        let options = || StoreOptions { backend, ..of_pieces(8192) };
        let link = case.path("run");
        symlink("one", &link).unwrap();
        let store = Store::create(&link, specs(), options()).unwrap();
        write_all(&store, &arena, 1);
        store.commit(json!(1)).unwrap();
        fs::remove_file(&link).unwrap();
        symlink("two", &link).unwrap();
        match store.commit(json!(2)).unwrap_err() {
            Error::FolderMoved { path, now } => {
                assert_eq!((path, now), (link, Whereabouts::MovedTo(case.path("one"))));
            }
            other => panic!("{other}"),
        }
        drop(store);
        assert_eq!(fs::read_dir(case.path("two")).unwrap().count(), 0, "the other is not touched");
        case.expect_round("one", &arena, 1);
    }
}

#[test]
fn files_that_are_removed_or_replaced_in_mid_run_are_told_and_not_committed() {
    for (name, number, backend) in NAMES
        .iter()
        .flat_map(|name| [0, 1, 2].map(|number| (name, number)))
        .flat_map(|(name, number)| BACKENDS.map(|backend| (name, number, backend)))
    {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        let store = case.create(&arena);
        let (path, aside) = (case.path("stripe").join(name), case.path("aside"));
        let expected = match number {
            0 => {
                fs::remove_file(&path).unwrap();
                Whereabouts::Removed
            }
            1 => {
                fs::rename(&path, &aside).unwrap();
                Whereabouts::MovedTo(aside.clone())
            }
            _ => {
                fs::rename(&path, &aside).unwrap();
                fs::copy(&aside, &path).unwrap();
                Whereabouts::MovedTo(aside.clone())
            }
        };
        write_all(&store, &arena, 2);
        match store.commit(json!(2)).unwrap_err() {
            Error::FileReplaced { path: named, now } => assert_eq!((named, now), (path.clone(), expected)),
            other => panic!("{name}: {other}"),
        }
        drop(store);
        if aside.exists() {
            fs::rename(&aside, &path).unwrap();
            case.expect_round("run", &arena, 1);
        }
    }
}

#[test]
fn a_directory_that_is_removed_with_all_its_files_is_told() {
    let (case, arena) = (Case::new(BackendChoice::Auto), arena(1 << 20));
    let store = case.create(&arena);
    fs::remove_dir_all(case.path("run")).unwrap();
    let error = store.commit(json!(2)).unwrap_err();
    assert!(matches!(&error, Error::FileReplaced { now: Whereabouts::Removed, .. }), "{error}");
}

/// Runs a program of the system; false where it is not there or may not.
fn runs(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// A file system in memory over a directory, while this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn new(over: &Path) -> Option<Self> {
        let path = over.to_str().unwrap();
        let is_mounted = runs("mount", &["-t", "tmpfs", "-o", "size=1m", "none", path]);
        if !is_mounted {
            println!("skipping: nothing can be mounted here");
        }
        is_mounted.then(|| Self(over.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        runs("umount", &["--lazy", self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_file_system_that_is_mounted_over_the_directory_in_mid_run_is_told() {
    for (name, backend) in ["run", "stripe"].iter().flat_map(|name| BACKENDS.map(|backend| (name, backend))) {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        let store = case.create(&arena);
        let Some(mounted) = Mounted::new(&case.path(name)) else { return };
        write_all(&store, &arena, 2);
        match store.commit(json!(2)).unwrap_err() {
            Error::FolderMoved { path, now } => {
                assert_eq!((path, now), (case.path(name), Whereabouts::Covered));
            }
            other => panic!("{other}"),
        }
        drop(store);
        assert_eq!(fs::read_dir(&mounted.0).unwrap().count(), 0, "what covers it is not touched");
        drop(mounted);
        case.expect_round("run", &arena, 2);
    }
}

/// What a stranger may have put in the place of a file.
const KINDS: [(&str, Harm); 3] = [
    ("symbolic link", |path, victim| symlink(victim, path).unwrap()),
    ("symbolic link", |path, _| symlink("/dev/zero", path).unwrap()),
    ("FIFO", |path, _| assert!(runs("mkfifo", &[path.to_str().unwrap()]))),
];

/// It is neither followed, nor waited for, nor read without an end.
#[test]
fn what_is_no_regular_file_is_refused_in_every_place_and_leads_nowhere() {
    let arena = arena(1 << 20);
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, vec![7; 100_000]).unwrap();
    let of_run = NAMES.iter().chain(&["manifest.json"]).map(|name| ("run", *name));
    let of_stripe = NAMES.iter().chain(&["manifest.json", "stripe.json"]).map(|name| ("stripe", *name));
    for ((directory, name), (word, put)) in
        of_run.chain(of_stripe).flat_map(|place| KINDS.map(|kind| (place, kind)))
    {
        let expect_refused = |outcome: Result<(), Error>, path: &Path| {
            let text = outcome.expect_err(name).to_string();
            assert!(text.contains(path.to_str().unwrap()) && text.contains(word), "{name}: {text}");
            assert!(
                fs::symlink_metadata(path).is_ok(),
                "{name} was not made by a store and is not removed by it"
            );
        };
        let case = Case::new(BackendChoice::Pool);
        drop(case.create(&arena));
        let path = case.path(directory).join(name);
        let _ = fs::remove_file(&path);
        put(&path, &victim);
        expect_refused(case.open("run").map(drop), &path);
        expect_refused(Store::open_to_read(&case.path("run"), case.options()).map(drop), &path);
        // A store that is made anew in such a directory.
        fs::create_dir(case.path("new")).unwrap();
        let path = case.path("new").join(name);
        put(&path, &victim);
        let options = StoreOptions { stripes: vec![], ..case.options() };
        expect_refused(Store::create(&case.path("new"), specs(), options).map(drop), &path);
    }
    // Documents on their way are ours, and a link in their place gives way.
    for name in ["manifest.json.new", "stripe.json.new"] {
        let case = Case::new(BackendChoice::Pool);
        fs::create_dir(case.path("run")).unwrap();
        symlink(&victim, case.path("run").join(name)).unwrap();
        drop(case.create(&arena));
        case.expect_round("run", &arena, 1);
    }
    assert_eq!(fs::read(&victim).unwrap(), vec![7; 100_000]);
}

/// A manifest that names a directory of another run as its own part: that run is neither read nor trained on.
#[test]
fn a_manifest_that_names_parts_of_another_store_is_refused() {
    let arena = arena(1 << 20);
    for part in ["run", "stripe"] {
        let (victim, case) = (Case::new(BackendChoice::Pool), Case::new(BackendChoice::Pool));
        drop(victim.create(&arena));
        let before = fs::read(victim.path(part).join("state-a.bin")).unwrap();
        drop(case.create(&arena));
        // The stranger can seal what they like; a link in the stripe's place leads there without a forged
        // manifest.
        fs::rename(case.path("stripe"), case.path("aside")).unwrap();
        symlink(victim.path(part), case.path("stripe")).unwrap();
        match case.open("run").map(drop) {
            Err(Error::ForeignStripe { directory, owner, .. }) => {
                assert_eq!(directory, case.path("stripe"));
                assert_eq!(owner.file_name().unwrap(), "manifest.json");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(fs::read(victim.path(part).join("state-a.bin")).unwrap(), before);
        victim.expect_round("run", &arena, 1);
    }
}

/// Names, sizes and times of everything in a directory.
fn listing(path: &Path) -> Vec<(PathBuf, u64, i64)> {
    let mut found: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| {
            let metadata = entry.as_ref().unwrap().metadata().unwrap();
            (entry.unwrap().path(), metadata.len(), metadata.mtime_nsec())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn temporary_files_touch_nothing_and_leave_nothing() {
    for backend in BACKENDS {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        drop(case.create(&arena));
        let before = [listing(&case.path("run")), listing(&case.path("stripe"))];
        // In the directories of another store, which may even be in use.
        let in_use = case.open("run").unwrap();
        let options = StoreOptions { temporary: true, ..case.options() };
        let store = Store::create(&case.path("run"), specs(), options).unwrap();
        for round in 1..=2 {
            write_all(&store, &arena, round);
            store.commit(json!(round)).unwrap();
        }
        for piece in pieces(&store) {
            expect_round(&store, &arena, piece, 2);
        }
        let during = [listing(&case.path("run")), listing(&case.path("stripe"))];
        assert_eq!(during, before, "no name and no byte, so that a kill leaves nothing");
        drop((store, in_use));
        case.expect_round("run", &arena, 1);
    }
}

#[test]
fn a_store_that_is_read_is_not_touched_and_refuses_writes() {
    for backend in BACKENDS {
        let (case, arena) = (Case::new(backend), arena(1 << 20));
        drop(case.create(&arena));
        for name in ["run", "stripe"] {
            fs::remove_file(case.path(name).join(".lock")).unwrap();
        }
        let before = [listing(&case.path("run")), listing(&case.path("stripe"))];
        let read_store = Store::open_to_read(&case.path("run"), case.options()).unwrap();
        let state = read_store.extent("h.0/master").unwrap();
        expect_round(&read_store, &arena, (state, 0), 1);
        let error = write(&read_store, &arena, (state, 0), 2).unwrap_err();
        assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
        assert!(matches!(read_store.commit(json!(2)), Err(Error::ReadOnly { .. })));
        drop(read_store);
        assert_eq!([listing(&case.path("run")), listing(&case.path("stripe"))], before);
        // With a lock, readers keep writers out and writers them, and any number of them reads.
        let writer = case.open("run").unwrap();
        let read = || Store::open_to_read(&case.path("run"), case.options());
        assert!(matches!(read().map(drop), Err(Error::Locked { .. })));
        drop(writer);
        let readers = [read().unwrap(), read().unwrap()];
        assert!(matches!(case.open("run").map(drop), Err(Error::Locked { .. })));
        drop(readers);
    }
}

#[test]
fn a_store_on_a_read_only_file_system_can_be_read() {
    let (case, arena) = (Case::new(BackendChoice::Auto), arena(1 << 20));
    drop(case.create(&arena));
    let (run, seen) = (case.path("run"), case.path("seen"));
    fs::create_dir(&seen).unwrap();
    let (from, to) = (run.to_str().unwrap(), seen.to_str().unwrap());
    if !runs("mount", &["--bind", from, to]) {
        return println!("skipping: nothing can be mounted here");
    }
    let _mounted = Mounted(seen.clone());
    assert!(runs("mount", &["-o", "remount,bind,ro", to]));
    let store = Store::open_to_read(&seen, case.options()).unwrap();
    expect_round(&store, &arena, (store.extent("h.0/master").unwrap(), 0), 1);
}

#[test]
fn a_check_of_everything_takes_as_much_memory_for_long_pieces_as_for_short_ones() {
    for piece_bytes in [8192, 64 << 20] {
        let directory = tempfile::tempdir().unwrap();
        let bytes = 9_000_001;
        let specs = state("weights", bytes);
        let store = Store::create(directory.path(), specs, of_pieces(piece_bytes)).unwrap();
        let weights = store.extent("weights").unwrap();
        let writing = arena(10 << 20);
        write_all(&store, &writing, 1);
        store.commit(json!(1)).unwrap();
        assert!(store.check_bytes() <= 16 << 20);
        let arena = arena(store.check_bytes());
        let check = |store: &Store| {
            let mut wrong = vec![];
            let mut told = 0;
            let each = |piece, outcome: Result<(), Error>| {
                assert_eq!(piece, told, "in order");
                told += 1;
                wrong.extend(outcome.err().map(|error| (piece, error)));
            };
            store.check(weights, &arena, each).unwrap();
            assert_eq!(told, store.piece_count(weights).unwrap());
            wrong
        };
        assert!(check(&store).is_empty());
        let path = directory.path().join("state-a.bin");
        let mut all = fs::read(&path).unwrap();
        all[bytes as usize - 1] ^= 1;
        fs::write(&path, all).unwrap();
        let damaged = check(&store);
        let last = store.piece_count(weights).unwrap() - 1;
        assert!(matches!(&damaged[..], [(piece, Error::Checksum { .. })] if *piece == last), "{damaged:?}");
        assert_eq!(arena.free_bytes(), arena.capacity_bytes());
    }
}

/// Set in the process that has a limit on the size of files: the directory.
const LIMITED: &str = "FERROZERO_TEST_LIMITED_FILES";

#[test]
fn a_file_beyond_the_limit_of_the_process_is_an_error_with_its_bytes_and_no_signal() {
    if let Some(directory) = std::env::var_os(LIMITED) {
        for bytes in [1 << 20, 40_000] {
            let created =
                Store::create(directory.as_ref(), state("weights", bytes), of_pieces(4096)).map(drop);
            println!(
                "the outcome is: {}",
                created.map_or_else(|error| error.to_string(), |()| "made".into())
            );
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let name = "a_file_beyond_the_limit_of_the_process_is_an_error_with_its_bytes_and_no_signal";
    // 128 blocks of 512 or 1024 bytes, as the shell has it.
    let line = format!("ulimit -f 128; exec '{}' --exact {name} --nocapture", program.display());
    let output = Command::new("sh").args(["-c", &line]).env(LIMITED, directory.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{:?}: {text}", output.status);
    let outcomes: Vec<_> = text.lines().filter(|line| line.contains("the outcome is")).collect();
    let [refused, made] = outcomes[..] else { panic!("{text}") };
    for word in ["state-a.bin", "1048576 bytes", "ulimit -f"] {
        assert!(refused.contains(word), "{refused}");
    }
    assert!(made.ends_with("made"), "{made}");
}
