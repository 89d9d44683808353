//! Each failure of a disk, on every backend: reported by name or ridden out, and never at the cost of the last commit.

mod common;

use common::*;
use ferrozero_offload::{
    io::{
        Fault, FaultKind, FaultPlan,
        FaultPoint::{self, *},
        Mem,
    },
    *,
};
use serde_json::json;

const PIECE_BYTES: usize = 8192;

fn plan(point: FaultPoint, nth: u64, kind: FaultKind) -> FaultPlan {
    FaultPlan(vec![Fault { point, nth, kind }])
}

/// A store with round 1 committed as generation 1, closed.
fn committed(disk: &Disk, arena: &Arena) {
    let store = disk.create(state("h.0/master", 3 * PIECE_BYTES as u64), PIECE_BYTES);
    write_all(&store, arena, 1);
    store.commit(json!({ "step": 1 })).unwrap();
}

#[track_caller]
fn expect_last_commit(disk: &Disk, arena: &Arena, generation: u64, round: u64) {
    let store = disk.open();
    assert_eq!(store.committed().unwrap().generation, generation);
    for piece in pieces(&store) {
        expect_round(&store, arena, piece, round);
    }
    assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
}

#[test]
fn a_failed_write_is_named_and_keeps_the_piece_out_of_reads_and_commits() {
    for kind in [FaultKind::InputOutput, FaultKind::NoSpace] {
        for disk in disks() {
            let arena = arena(1 << 20);
            committed(&disk, &arena);
            let store = Store::open_on(disk.io(&plan(FaultPoint::Write, 1, kind))).unwrap();
            let piece = |number| (store.extent("h.0/master").unwrap(), number);
            write(&store, &arena, piece(0), 2).unwrap();
            match write(&store, &arena, piece(1), 2).unwrap_err() {
                Error::Piece { extent, piece: 1, generation: 1, source } => {
                    assert_eq!(extent, "h.0/master");
                    let text = source.to_string();
                    assert!(text.contains("state-b.bin") && text.contains("offset 8192"), "{text}");
                }
                other => panic!("{other}"),
            }
            let refused = |error: Error| matches!(error, Error::FailedWrite { piece: 1, generation: 1, .. });
            assert!(refused(read(&store, &arena, piece(1)).unwrap_err()));
            assert!(refused(store.commit(json!(null)).unwrap_err()));
            write(&store, &arena, piece(1), 2).unwrap();
            write(&store, &arena, piece(2), 2).unwrap();
            assert_eq!(store.commit(json!(null)).unwrap(), 2);
            drop(store);
            expect_last_commit(&disk, &arena, 2, 2);
        }
    }
}

#[test]
fn a_failed_read_is_named_and_can_be_tried_again() {
    for disk in disks() {
        let arena = arena(1 << 20);
        committed(&disk, &arena);
        let plan = plan(FaultPoint::Read, 0, FaultKind::InputOutput);
        let store = Store::open_on(disk.io(&plan)).unwrap();
        let piece = (store.extent("h.0/master").unwrap(), 2);
        let text = read(&store, &arena, piece).unwrap_err().to_string();
        for word in ["piece 2", "h.0/master", "generation 1", "read", "state-a.bin", "offset 16384"] {
            assert!(text.contains(word), "{word} is missing in: {text}");
        }
        expect_round(&store, &arena, piece, 1);
    }
}

#[test]
fn silent_damage_is_found_by_the_checksum() {
    let silent = [FaultKind::BitFlip { bit: 12345 }, FaultKind::Stale];
    for (point, kind) in silent.iter().flat_map(|&kind| [(FaultPoint::Read, kind), (FaultPoint::Write, kind)])
    {
        for disk in disks() {
            let arena = arena(1 << 20);
            committed(&disk, &arena);
            let store = Store::open_on(disk.io(&plan(point, 0, kind))).unwrap();
            let piece = (store.extent("h.0/master").unwrap(), 1);
            write(&store, &arena, piece, 2).unwrap();
            match read(&store, &arena, piece).unwrap_err() {
                Error::Checksum { path, extent, piece: 1, offset_bytes: 8192, generation: 1 } => {
                    assert!(path.ends_with("state-b.bin") || path.to_string_lossy() == "memory:state-b.bin");
                    assert_eq!(extent, "h.0/master");
                }
                other => panic!("{point:?} {kind:?}: {other}"),
            }
            drop(store);
            expect_last_commit(&disk, &arena, 1, 1);
        }
    }
}

#[test]
fn data_that_is_not_made_durable_is_never_committed() {
    for disk in disks() {
        let arena = arena(1 << 20);
        committed(&disk, &arena);
        let store = Store::open_on(disk.io(&plan(FaultPoint::Sync, 1, FaultKind::InputOutput))).unwrap();
        write_all(&store, &arena, 2);
        let error = store.commit(json!(null)).unwrap_err();
        assert!(matches!(error, Error::File { operation: "sync", .. }), "{error}");
        // A second sync would succeed without having written what the first one lost.
        assert!(matches!(store.commit(json!(null)), Err(Error::SyncFailed { generation: 1 })));
        let piece = pieces(&store)[0];
        assert!(matches!(write(&store, &arena, piece, 3), Err(Error::SyncFailed { generation: 1 })));
        drop(store);
        expect_last_commit(&disk, &arena, 1, 1);
    }
}

#[test]
fn a_manifest_that_could_not_be_saved_holds_up_writes_until_it_is() {
    for disk in disks() {
        let arena = arena(1 << 20);
        committed(&disk, &arena);
        let plan = plan(FaultPoint::SaveDocument, 0, FaultKind::NoSpace);
        let store = Store::open_on(disk.io(&plan)).unwrap();
        write_all(&store, &arena, 2);
        assert!(matches!(store.commit(json!(null)), Err(Error::File { .. })));
        assert_eq!(store.committed().unwrap().generation, 1);
        // The failed commit may be on disk after all, so neither place of a piece is free.
        let piece = pieces(&store)[0];
        assert!(matches!(write(&store, &arena, piece, 3), Err(Error::Unsettled { generation: 1 })));
        expect_round(&store, &arena, piece, 2);
        assert_eq!(store.commit(json!(null)).unwrap(), 2);
        write(&store, &arena, piece, 3).unwrap();
        drop(store);
        expect_last_commit(&disk, &arena, 2, 2);
    }
}

/// One part of a store's life, one kind of operation, and how many of these there are in it.
type Row = (usize, FaultPoint, u64);

const MAKING: usize = 0;
const REOPENED: usize = 1;

/// All operations of [`live`].
const ROWS: [Row; 16] = [
    (MAKING, LoadDocument, 1),
    (MAKING, Allocate, 1),
    (MAKING, Write, 6),
    (MAKING, Read, 6),
    (MAKING, Sync, 4),
    (MAKING, SaveDocument, 2),
    (MAKING, Rename, 2),
    (MAKING, SyncDirectory, 2),
    (REOPENED, LoadDocument, 1),
    (REOPENED, Open, 1),
    (REOPENED, Write, 3),
    (REOPENED, Read, 6),
    (REOPENED, Sync, 2),
    (REOPENED, SaveDocument, 1),
    (REOPENED, Rename, 1),
    (REOPENED, SyncDirectory, 1),
];

/// A store is made and commits rounds 1 and 2; it is opened again and commits round 3. Ends at the first error.
/// `committed` counts the commits that were answered with success.
fn live(disk: &Disk, arena: &Arena, plans: [&FaultPlan; 2], committed: &mut u64) -> Result<(), Error> {
    let write_read_commit = |store: &Store, round: u64, committed: &mut u64| {
        for piece in pieces(store) {
            write(store, arena, piece, round)?;
        }
        read_all(store, arena, round)?;
        *committed = store.commit(json!({ "round": round }))?;
        Ok(())
    };
    let specs = state("h.0/master", 3 * PIECE_BYTES as u64);
    let store = Store::create_on(disk.io(plans[MAKING]), specs, &of_pieces(PIECE_BYTES))?;
    write_read_commit(&store, 1, committed)?;
    write_read_commit(&store, 2, committed)?;
    drop(store);
    let store = Store::open_on(disk.io(plans[REOPENED]))?;
    read_all(&store, arena, 2)?;
    write_read_commit(&store, 3, committed)
}

/// Errors are for the caller; wrong bytes without an error are a failed test.
fn read_all(store: &Store, arena: &Arena, round: u64) -> Result<(), Error> {
    for piece in pieces(store) {
        let lease = read(store, arena, piece)?;
        let mut expected = vec![0; lease.len()];
        pattern(piece.0, piece.1, round, &mut expected);
        assert!(lease[..] == expected, "{piece:?} came back wrong and nobody said so");
    }
    Ok(())
}

/// Lives once with one fault. Answers the error, after checking that the last commit is still there.
fn error_of(disk: &Disk, (part, point, _): Row, nth: u64, kind: FaultKind) -> Option<(Error, u64)> {
    let (arena, none) = (arena(1 << 20), FaultPlan::default());
    let plan = plan(point, nth, kind);
    let plans = if part == MAKING { [&plan, &none] } else { [&none, &plan] };
    let mut committed = 0;
    let error = live(disk, &arena, plans, &mut committed).err();
    // When the directory could not be synced the new manifest is there all the same.
    let expected = committed + u64::from(error.is_some() && point == SyncDirectory);
    match expected {
        0 => assert!(matches!(Store::open_on(disk.io(&none)), Err(Error::NoCommit { .. }))),
        round => expect_last_commit(disk, &arena, round, round),
    }
    assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    error.map(|error| (error, committed))
}

#[test]
fn every_lasting_failure_at_every_operation_is_named_and_spares_the_last_commit() {
    for row @ (_, point, count) in ROWS {
        for kind in [FaultKind::InputOutput, FaultKind::NoSpace, FaultKind::NoPermission] {
            for nth in 0..count {
                for disk in quick_disks() {
                    let (error, committed) = error_of(&disk, row, nth, kind).expect("the fault was told");
                    let case = format!("{row:?} {nth} {kind:?}: {error}");
                    match (&error, point) {
                        (Error::Piece { extent, generation, source, .. }, Read | Write) => {
                            assert_eq!((extent.as_str(), *generation), ("h.0/master", committed), "{case}");
                            assert!(matches!(**source, Error::Transfer { .. }), "{case}");
                            assert!(error.to_string().contains("state-"), "{case}");
                        }
                        (Error::File { path, .. }, _) => {
                            let in_directory =
                                disk.path().is_none_or(|directory| path.starts_with(directory));
                            assert!(in_directory && !matches!(point, Read | Write), "{case}");
                        }
                        _ => panic!("{case}"),
                    }
                }
            }
        }
        // The table has all operations of its kind: there is none after the last.
        for disk in quick_disks() {
            assert!(error_of(&disk, row, count, FaultKind::InputOutput).is_none(), "{row:?} has more");
        }
    }
}

#[test]
fn every_silent_damage_at_every_transfer_is_found_before_it_is_committed() {
    let kinds = [FaultKind::BitFlip { bit: 65_432 }, FaultKind::Stale, FaultKind::Misplaced];
    for row @ (_, _, count) in ROWS.into_iter().filter(|row| matches!(row.1, Read | Write)) {
        for (kind, nth) in kinds.iter().flat_map(|&kind| (0..count).map(move |nth| (kind, nth))) {
            for disk in quick_disks() {
                let found = error_of(&disk, row, nth, kind).map(|(error, _)| error);
                let Some(Error::Checksum { extent, path, .. }) = &found else {
                    panic!("{row:?} {nth} {kind:?}: {found:?}")
                };
                assert!(extent == "h.0/master" && path.to_string_lossy().contains("state-"));
            }
        }
    }
}

#[test]
fn every_passing_failure_at_every_system_call_is_ridden_out() {
    let passing = [FaultKind::Interrupted, FaultKind::Again];
    let short = [1, 4095, 4096, 4097, 8191].map(|bytes| FaultKind::Short { bytes });
    let cases = ROWS.iter().flat_map(|&(part, point, _)| {
        let moves_bytes = matches!(point, Read | Write | SaveDocument | LoadDocument);
        let kinds = passing.iter().chain(short.iter().filter(move |_| moves_bytes));
        kinds.map(move |&kind| (part, point, kind))
    });
    for (part, point, kind) in cases {
        // Every other call fails, so that each one does and each repetition does not.
        let plan = FaultPlan((0..64).map(|nth| Fault { point, nth: 2 * nth, kind }).collect());
        let lasting = FaultPlan((0..4096).map(|nth| Fault { point, nth, kind }).collect());
        let none = FaultPlan::default();
        for disk in quick_disks() {
            let plans = |plan| if part == MAKING { [plan, &none] } else { [&none, plan] };
            let is_memory = disk.path().is_none();
            if is_memory && (part == REOPENED || !matches!(point, Read | Write)) {
                // Memory makes no system calls but transfers, and keeps the script that it was made with.
                continue;
            }
            let of = |plan: &FaultPlan| Disk::Mem(Mem::new(plan).unwrap().into());
            let (disk, never) = if is_memory { (of(&plan), of(&lasting)) } else { (disk, fresh_disk()) };
            let (arena, mut committed) = (arena(1 << 20), 0);
            let lived = live(&disk, &arena, plans(&plan), &mut committed);
            assert!(lived.is_ok() && committed == 3, "{part} {point:?} {kind:?}: {lived:?}");
            expect_last_commit(&disk, &arena, 3, 3);
            // What never passes is told in the end, which also shows that the fault is where it should be. A call
            // that goes on page by page never fails.
            if !matches!(kind, FaultKind::Short { .. }) {
                let mut committed = 0;
                let error = live(&never, &arena, plans(&lasting), &mut committed).unwrap_err();
                assert!(matches!(error, Error::File { .. } | Error::Piece { .. }), "{point:?}: {error}");
            }
        }
    }
}

/// A disk that nothing was done to, for the pool.
fn fresh_disk() -> Disk {
    Disk::Pool(tempfile::tempdir_in(quick_folder()).unwrap())
}
