//! Each failure of a disk, on every backend: reported by name or ridden out, and never at the cost of the last commit.

mod common;

use common::*;
use ferrozero_offload::{
    io::{Fault, FaultKind, FaultPlan, FaultPoint, Mem},
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
fn interruptions_and_short_transfers_are_ridden_out() {
    for kind in [FaultKind::Interrupted, FaultKind::Again, FaultKind::Short { bytes: 4096 }] {
        let faults = [FaultPoint::Read, FaultPoint::Write]
            .iter()
            .flat_map(|&point| [0, 1, 2, 4].map(|nth| Fault { point, nth, kind }));
        let plan = FaultPlan(faults.collect());
        for disk in disks() {
            let arena = arena(1 << 20);
            // Memory keeps its script, so that one is made anew.
            let disk = match disk {
                Disk::Mem(_) => Disk::Mem(Mem::new(&plan).unwrap().into()),
                other => other,
            };
            let specs = state("h.0/master", 3 * PIECE_BYTES as u64);
            let store = Store::create_on(disk.io(&plan), specs, PIECE_BYTES).unwrap();
            write_all(&store, &arena, 1);
            for piece in pieces(&store) {
                expect_round(&store, &arena, piece, 1);
            }
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

#[test]
fn files_that_cannot_be_made_are_an_error() {
    for disk in disks() {
        let io = disk.io(&plan(FaultPoint::Allocate, 0, FaultKind::NoSpace));
        let refused = Store::create_on(io, state("h.0/master", 4096), 4096).map(drop);
        assert!(matches!(refused, Err(Error::File { operation: "allocate", .. })));
    }
}
