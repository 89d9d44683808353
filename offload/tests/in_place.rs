//! One place for each piece: half the disk, and a kill between commits is found and said, never trained on.

mod common;

use common::*;
use ferrozero_offload::{
    io::{Fault, FaultKind, FaultPlan, FaultPoint},
    *,
};
use serde_json::json;

fn in_place() -> StoreOptions {
    StoreOptions { in_place: true, ..of_pieces(8192) }
}

fn specs() -> Vec<ExtentSpec> {
    vec![spec("weights", 30_000, ExtentKind::State), spec("gradients", 5000, ExtentKind::Scratch)]
}

#[test]
fn one_place_takes_half_the_disk_and_keeps_what_was_committed() {
    for disk in disks() {
        let arena = arena(1 << 20);
        let twice = disk.create(specs(), 8192).disk_bytes();
        let store = disk.create_with(specs(), &in_place());
        assert_eq!((store.disk_bytes(), twice), (32_768 + 8192, 2 * 32_768 + 8192));
        assert!(store.notices().iter().any(|notice| notice.code == "in-place"));
        for generation in 1..4 {
            for round in [10 * generation, 10 * generation + 1] {
                write_all(&store, &arena, round);
            }
            assert_eq!(store.commit(json!({ "step": generation })).unwrap(), generation);
        }
        // Neither reads nor writes of scratch touch the commit.
        let (weights, gradients) = (store.extent("weights").unwrap(), store.extent("gradients").unwrap());
        expect_round(&store, &arena, (weights, 0), 31);
        write(&store, &arena, (gradients, 0), 99).unwrap();
        drop(store);

        let store = disk.open();
        assert_eq!(store.committed().unwrap().application, json!({ "step": 3 }));
        assert!(store.notices().iter().any(|notice| notice.code == "in-place"), "it stays as it was made");
        for piece in 0..store.piece_count(weights).unwrap() {
            expect_round(&store, &arena, (weights, piece), 31);
        }
    }
}

#[test]
fn a_store_left_between_commits_is_refused_with_what_can_be_done() {
    for disk in disks() {
        let arena = arena(1 << 20);
        let store = disk.create_with(specs(), &in_place());
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        write(&store, &arena, (store.extent("weights").unwrap(), 2), 2).unwrap();
        drop(store);
        match Store::open_on(disk.io(&FaultPlan::default())).map(drop) {
            Err(error @ Error::Overwritten { generation: 1, .. }) => {
                let text = error.to_string();
                for words in ["manifest.json", "generation 1", "restore", "start anew"] {
                    assert!(text.contains(words), "{words} is missing in: {text}");
                }
            }
            other => panic!("{other:?}"),
        }
        let anew = Store::create_on(disk.io(&FaultPlan::default()), specs(), &in_place()).map(drop);
        assert!(matches!(anew, Err(Error::AlreadyCommitted { .. })), "deleting is left to the user");
    }
}

#[test]
fn nothing_is_overwritten_while_that_cannot_be_noted() {
    for disk in directories() {
        let arena = arena(1 << 20);
        let store = disk.create_with(specs(), &in_place());
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let fault = Fault { point: FaultPoint::SaveDocument, nth: 0, kind: FaultKind::NoSpace };
        let store = Store::open_on(disk.io(&FaultPlan(vec![fault]))).unwrap();
        let piece = (store.extent("weights").unwrap(), 1);
        match write(&store, &arena, piece, 2).unwrap_err() {
            Error::Piece { extent, piece: 1, generation: 1, source } => {
                assert_eq!(extent, "weights");
                assert!(source.to_string().contains("manifest.json"), "{source}");
            }
            other => panic!("{other}"),
        }
        expect_round(&store, &arena, piece, 1);
        assert_eq!(store.traffic().state_written_bytes, 0);
        write(&store, &arena, piece, 2).unwrap();
        expect_round(&store, &arena, piece, 2);
        assert_eq!(store.commit(json!(null)).unwrap(), 2);
        drop(store);
        expect_round(&disk.open(), &arena, piece, 2);
        assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    }
}

/// The note is in place, but may not be durable: it is taken back, since nothing was overwritten.
#[test]
fn a_note_that_may_not_be_durable_is_taken_back() {
    for disk in directories() {
        let arena = arena(1 << 20);
        let store = disk.create_with(specs(), &in_place());
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let fault = Fault { point: FaultPoint::SyncDirectory, nth: 0, kind: FaultKind::InputOutput };
        let store = Store::open_on(disk.io(&FaultPlan(vec![fault]))).unwrap();
        let piece = (store.extent("weights").unwrap(), 1);
        let error = write(&store, &arena, piece, 2).unwrap_err();
        assert!(matches!(error, Error::Piece { generation: 1, .. }), "{error}");
        drop(store);
        expect_round(&disk.open(), &arena, piece, 1);
        // What comes to the disk's files is noted again.
        let store = disk.open();
        write(&store, &arena, piece, 2).unwrap();
        drop(store);
        let opened = Store::open_on(disk.io(&FaultPlan::default())).map(drop);
        assert!(matches!(opened, Err(Error::Overwritten { generation: 1, .. })), "{opened:?}");
    }
}

#[test]
fn a_failed_write_in_place_does_not_promise_a_commit_to_come_back_to() {
    for disk in disks() {
        let arena = arena(1 << 20);
        let store = disk.create_with(specs(), &in_place());
        write_all(&store, &arena, 1);
        store.commit(json!(null)).unwrap();
        drop(store);
        let fault = Fault { point: FaultPoint::Write, nth: 0, kind: FaultKind::InputOutput };
        let store = Store::open_on(disk.io(&FaultPlan(vec![fault]))).unwrap();
        let piece = (store.extent("weights").unwrap(), 0);
        write(&store, &arena, piece, 2).unwrap_err();
        let error = read(&store, &arena, piece).map(drop).unwrap_err();
        assert!(matches!(error, Error::FailedWrite { generation: 0, .. }));
        assert!(error.to_string().contains("no commit to come back to"), "{error}");
    }
}
