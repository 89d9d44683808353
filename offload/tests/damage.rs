//! What happened to a store's files while nobody used it: found when it is opened or when the damage is read,
//! by name.

mod common;

use std::{fs, os::unix::process::CommandExt, path::Path, process::Command};

use common::*;
use ferrozero_offload::{
    io::{Fault, FaultKind, FaultPlan, FaultPoint},
    *,
};
use serde_json::json;

const PIECE_BYTES: usize = 8192;

fn options() -> StoreOptions {
    StoreOptions { backend: BackendChoice::Pool, piece_bytes: PIECE_BYTES, ..StoreOptions::default() }
}

/// A store of three pieces with rounds 1, 2 and 3 committed: piece 0 is in place A, the older round in B.
fn committed(arena: &Arena) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let specs = state("h.0/master", 3 * PIECE_BYTES as u64);
    let store = Store::create(directory.path(), specs, options()).unwrap();
    for round in 1..=3 {
        write_all(&store, arena, round);
        store.commit(json!({ "round": round })).unwrap();
    }
    directory
}

fn open(directory: &Path) -> Result<Store, Error> {
    Store::open(directory, options())
}

/// Reads everything; the first error ends it.
fn read_all(directory: &Path, arena: &Arena) -> Result<(), Error> {
    let store = open(directory)?;
    pieces(&store).into_iter().try_for_each(|piece| read(&store, arena, piece).map(drop))
}

#[test]
fn a_piece_of_an_older_generation_or_of_another_place_is_found() {
    let arena = arena(1 << 20);
    // What lies where it should not: (from file, from piece) to (file, piece).
    let moves = [
        ("state-b.bin", 1, "state-a.bin", 1),
        ("state-a.bin", 0, "state-a.bin", 1),
        ("state-a.bin", 1, "state-a.bin", 2),
    ];
    for (from_file, from, into_file, into) in moves {
        let directory = committed(&arena);
        let source = fs::read(directory.path().join(from_file)).unwrap();
        let path = directory.path().join(into_file);
        let mut target = fs::read(&path).unwrap();
        target[into * PIECE_BYTES..][..PIECE_BYTES]
            .copy_from_slice(&source[from * PIECE_BYTES..][..PIECE_BYTES]);
        fs::write(&path, target).unwrap();
        match read_all(directory.path(), &arena).unwrap_err() {
            Error::Checksum { path: named, extent, piece, generation: 3, .. } => {
                assert_eq!((named, extent.as_str(), piece), (path, "h.0/master", into));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_file_cut_anywhere_or_missing_is_refused_by_name() {
    let arena = arena(1 << 20);
    for name in ["state-a.bin", "state-b.bin"] {
        let directory = committed(&arena);
        let path = directory.path().join(name);
        let whole = fs::read(&path).unwrap();
        for found_bytes in (0..whole.len()).step_by(4096).chain([1, whole.len() - 1]) {
            fs::write(&path, &whole[..found_bytes]).unwrap();
            match open(directory.path()).map(drop).unwrap_err() {
                Error::TruncatedFile { path: named, found_bytes: found, .. } => {
                    assert_eq!((named, found), (path.clone(), found_bytes as u64));
                }
                other => panic!("{other}"),
            }
        }
        fs::remove_file(&path).unwrap();
        let error = open(directory.path()).map(drop).unwrap_err();
        assert!(matches!(&error, Error::File { path: named, .. } if *named == path), "{error}");
        fs::write(&path, whole).unwrap();
        read_all(directory.path(), &arena).unwrap();
    }
}

#[test]
fn a_manifest_missing_damaged_or_of_another_format_is_refused() {
    let arena = arena(1 << 20);
    let directory = committed(&arena);
    let path = directory.path().join("manifest.json");
    let whole = fs::read(&path).unwrap();
    for index in 0..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[index] ^= 1 << bit;
            fs::write(&path, damaged).unwrap();
            match open(directory.path()).map(drop).unwrap_err() {
                Error::CorruptManifest { path: named, .. }
                | Error::OlderFormat { path: named, .. }
                | Error::NewerFormat { path: named, .. } => assert_eq!(named, path),
                other => panic!("byte {index}, bit {bit}: {other}"),
            }
        }
        fs::write(&path, &whole[..index]).unwrap();
        let error = open(directory.path()).map(drop).unwrap_err();
        assert!(matches!(error, Error::CorruptManifest { .. }), "cut at {index}: {error}");
    }
    let text = String::from_utf8(whole.clone()).unwrap();
    for (format, found) in [("0", 0), ("2", 2), ("18446744073709551615", u64::MAX)] {
        fs::write(&path, text.replace("\"format\":1", &format!("\"format\":{format}"))).unwrap();
        match open(directory.path()).map(drop).unwrap_err() {
            Error::OlderFormat { found: 0, supported: 1, .. } if found == 0 => {}
            Error::NewerFormat { found: newer, supported: 1, .. } if found > 1 => assert_eq!(newer, found),
            other => panic!("{other}"),
        }
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(open(directory.path()), Err(Error::NoCommit { .. })));
    fs::write(&path, whole).unwrap();
    read_all(directory.path(), &arena).unwrap();
}

/// What is half written when a run ends, and a file of another kind in the manifest's place.
#[test]
fn remains_of_a_commit_do_no_harm_and_no_file_takes_all_memory() {
    let arena = arena(1 << 20);
    let directory = committed(&arena);
    fs::write(directory.path().join("manifest.json.new"), b"{\"format\":1,\"gen").unwrap();
    read_all(directory.path(), &arena).unwrap();
    let store = open(directory.path()).unwrap();
    write_all(&store, &arena, 4);
    assert_eq!(store.commit(json!(null)).unwrap(), 4);
    drop(store);
    let manifest = directory.path().join("manifest.json");
    fs::File::create(&manifest).unwrap().set_len(1 << 40).unwrap();
    match open(directory.path()).map(drop).unwrap_err() {
        Error::File { operation: "read", path, .. } => assert_eq!(path, manifest),
        other => panic!("{other}"),
    }
}

/// Nobody says so when the write of a manifest is damaged or lost: the next opening does, or has the commit
/// before it.
#[test]
fn a_manifest_damaged_or_lost_on_its_way_is_found_when_it_is_opened() {
    for disk in disks() {
        for kind in [FaultKind::BitFlip { bit: 1234 }, FaultKind::Stale] {
            let disk = match &disk {
                Disk::Mem(_) => Disk::Mem(std::sync::Arc::new(io::Mem::new(&FaultPlan::default()).unwrap())),
                _ => Disk::Pool(tempfile::tempdir().unwrap()),
            };
            let arena = arena(1 << 20);
            let faults = FaultPlan(vec![Fault { point: FaultPoint::SaveDocument, nth: 1, kind }]);
            let store = Store::create_on(disk.io(&faults), state("weights", 8192), &of_pieces(8192)).unwrap();
            for round in 1..=2 {
                write_all(&store, &arena, round);
                store.commit(json!(null)).unwrap();
            }
            drop(store);
            let opened = Store::open_on(disk.io(&FaultPlan::default()));
            match kind {
                FaultKind::Stale => {
                    let store = opened.unwrap();
                    assert_eq!(store.committed().unwrap().generation, 1);
                    expect_round(&store, &arena, pieces(&store)[0], 1);
                }
                _ => assert!(matches!(opened, Err(Error::CorruptManifest { .. }))),
            }
        }
    }
}

/// Set in the process that plays a user without permission: the store's directory.
const ROLE: &str = "FERROZERO_TEST_UNPERMITTED_STORE";

#[test]
fn permission_that_was_lost_is_named() {
    if let Some(directory) = std::env::var_os(ROLE) {
        let error = open(directory.as_ref()).map(drop).unwrap_err();
        println!("the error is: {error}");
        return;
    }
    let arena = arena(1 << 20);
    let directory = committed(&arena);
    let path = directory.path();
    // A path whose permission goes, and the path that the error is to name.
    let cases = [
        (path.to_owned(), path.to_owned()),
        (path.join(".lock"), path.join(".lock")),
        (path.join("manifest.json"), path.join("manifest.json")),
        (path.join("state-a.bin"), path.join("state-a.bin")),
    ];
    for (closed, named) in cases {
        let everything = [
            path.to_owned(),
            path.join(".lock"),
            path.join("manifest.json"),
            path.join("state-a.bin"),
            path.join("state-b.bin"),
        ];
        for each in &everything {
            set_mode(each, if *each == closed { 0o000 } else { 0o777 });
        }
        // The super-user may do everything, so that somebody else has to try.
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "permission_that_was_lost_is_named", "--nocapture"]).env(ROLE, path);
        // SAFETY: the call takes no pointers and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            child.uid(65_534).gid(65_534);
        }
        let output = match child.current_dir("/").output() {
            Ok(output) => output,
            Err(error) => return println!("skipping: no process of another user can be started ({error})"),
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        set_mode(path, 0o777);
        let line = text.lines().find(|line| line.contains("the error is"));
        let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
        let named = named.display().to_string();
        assert!(line.contains(&named) && line.contains("ermission denied"), "{line}");
    }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
