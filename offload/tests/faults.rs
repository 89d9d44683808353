//! Each failure of a disk, on every backend: reported by name or ridden out, and never at the cost of the last commit.

mod common;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

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

/// Pieces of the store that [`live`] makes: each of two directories has a piece and its neighbour.
const PIECES: u64 = 4;

/// How a store is made: over how many directories beside its own, and whether with one place for each piece.
#[derive(Clone, Copy, Debug)]
struct Form {
    stripes: usize,
    in_place: bool,
}

const FORMS: [Form; 4] = [
    Form { stripes: 0, in_place: false },
    Form { stripes: 1, in_place: false },
    Form { stripes: 0, in_place: true },
    Form { stripes: 1, in_place: true },
];

impl Form {
    fn directories(self) -> usize {
        1 + self.stripes
    }

    /// Documents that come before the first manifest: a note in each of several directories.
    fn notes(self) -> u64 {
        if self.stripes == 0 { 0 } else { self.directories() as u64 }
    }

    /// How the names of the files begin that hold a piece.
    fn place_of(self, disk: &Disk, piece: usize) -> String {
        let directory = match piece % self.directories() {
            0 => PathBuf::new(),
            stripe => disk.stripes(self.stripes)[stripe - 1].clone(),
        };
        let name = directory.join("state-");
        disk.path().map_or(format!("memory:{}", name.display()), |own| own.join(name).display().to_string())
    }

    /// Files that commits make durable.
    fn state_files(self) -> usize {
        if self.in_place { self.directories() } else { 2 * self.directories() }
    }

    /// All operations of [`live`].
    fn rows(self) -> Vec<Row> {
        let (directories, synced) = (self.directories() as u64, self.state_files() as u64);
        // In place, each round but the first notes that it overwrites the commit before it.
        let marks = u64::from(self.in_place);
        let (made, reopened) = (self.notes() + 2 + marks, 1 + marks);
        vec![
            (MAKING, LoadDocument, 2 * directories),
            (MAKING, Allocate, 1),
            (MAKING, Write, 2 * PIECES),
            (MAKING, Read, 2 * PIECES),
            (MAKING, Sync, 2 * synced),
            (MAKING, SaveDocument, made),
            (MAKING, Rename, made),
            (MAKING, SyncDirectory, made),
            (REOPENED, LoadDocument, 1),
            (REOPENED, Open, 1),
            (REOPENED, Write, PIECES),
            (REOPENED, Read, 2 * PIECES),
            (REOPENED, Sync, synced),
            (REOPENED, SaveDocument, reopened),
            (REOPENED, Rename, reopened),
            (REOPENED, SyncDirectory, reopened),
        ]
    }

    /// What there must be after a life that ended as it did.
    fn left(self, (part, point, _): Row, nth: u64, lived: &Lived) -> Left {
        // When the directory of a document could not be synced, the new document is there all the same.
        let is_document = matches!(point, SaveDocument | Rename | SyncDirectory);
        let replaced = point == SyncDirectory && lived.error.is_some();
        let is_note = is_document && part == MAKING && nth < self.notes();
        let is_mark = is_document && matches!(lived.error, Some(Error::Piece { .. }));
        match lived.committed {
            _ if replaced && !is_note && !is_mark => Left::Commit(lived.committed + 1),
            0 => Left::Nothing,
            // Nothing is overwritten before that is noted.
            generation if self.in_place && lived.has_begun && (replaced || !is_mark) => {
                Left::Overwritten(generation)
            }
            generation => Left::Commit(generation),
        }
    }
}

/// What a store finds that is opened on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Left {
    Nothing,
    Commit(u64),
    /// In place only: the last commit and what was written since are both gone, and the store says so.
    Overwritten(u64),
}

#[track_caller]
fn expect_left(disk: &Disk, arena: &Arena, left: Left, case: &str) {
    let opened = Store::open_on(disk.io(&FaultPlan::default()));
    match (left, opened.map(drop)) {
        (Left::Nothing, Err(Error::NoCommit { .. })) => {}
        (Left::Overwritten(expected), Err(Error::Overwritten { generation, .. })) => {
            assert_eq!(generation, expected, "{case}");
        }
        (Left::Commit(generation), Ok(())) => expect_last_commit(disk, arena, generation, generation),
        (_, opened) => panic!("{case}: {left:?} and not {opened:?}"),
    }
}

/// One part of a store's life, one kind of operation, and how many of these there are in it.
type Row = (usize, FaultPoint, u64);

const MAKING: usize = 0;
const REOPENED: usize = 1;

/// How far a store came.
#[derive(Default)]
struct Lived {
    /// Commits that were answered with success.
    committed: u64,
    /// Whether a write was tried since the last of them.
    has_begun: bool,
    error: Option<Error>,
}

/// A store is made and commits rounds 1 and 2; it is opened again and commits round 3. Ends at the first error.
fn live(disk: &Disk, form: Form, arena: &Arena, plans: [&FaultPlan; 2]) -> Lived {
    let mut lived = Lived::default();
    let mut write_read_commit = |store: &Store, round: u64| -> Result<(), Error> {
        for piece in pieces(store) {
            lived.has_begun = true;
            write(store, arena, piece, round)?;
        }
        read_all(store, arena, round)?;
        lived.committed = store.commit(json!({ "round": round }))?;
        lived.has_begun = false;
        Ok(())
    };
    let mut all = || -> Result<(), Error> {
        let Form { stripes, in_place } = form;
        let options = StoreOptions { stripes: disk.stripes(stripes), in_place, ..of_pieces(PIECE_BYTES) };
        let specs = state("h.0/master", PIECES * PIECE_BYTES as u64);
        let store = Store::create_on(disk.io(plans[MAKING]), specs, &options)?;
        write_read_commit(&store, 1)?;
        write_read_commit(&store, 2)?;
        drop(store);
        let store = Store::open_on(disk.io(plans[REOPENED]))?;
        read_all(&store, arena, 2)?;
        write_read_commit(&store, 3)
    };
    let error = all().err();
    Lived { error, ..lived }
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

/// Lives once with one fault and checks what is left: a whole commit, or a store that says that it has none.
fn live_with(disk: &Disk, form: Form, row: Row, nth: u64, kind: FaultKind) -> (Lived, Left) {
    let (arena, none) = (arena(1 << 20), FaultPlan::default());
    let plan = plan(row.1, nth, kind);
    let plans = if row.0 == MAKING { [&plan, &none] } else { [&none, &plan] };
    let lived = live(disk, form, &arena, plans);
    let left = form.left(row, nth, &lived);
    expect_left(disk, &arena, left, &format!("{form:?} {row:?} {nth} {kind:?}: {:?}", lived.error));
    assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    (lived, left)
}

/// The file that a failure is about.
fn file_of(error: &Error) -> &Path {
    match error {
        Error::Piece { source, .. } => file_of(source),
        Error::Transfer { path, .. } | Error::File { path, .. } | Error::Checksum { path, .. } => path,
        other => panic!("{other}"),
    }
}

/// A lasting failure names the piece, where there is one, and the file, in the right directory.
fn expect_named(disk: &Disk, form: Form, point: FaultPoint, lived: &Lived, case: &str) {
    let error = lived.error.as_ref().expect("the fault was told");
    let case = format!("{case}: {error}");
    match (error, point) {
        (Error::Piece { extent, piece, generation, source }, _) => {
            assert_eq!((extent.as_str(), *generation), ("h.0/master", lived.committed), "{case}");
            match (&**source, point) {
                (Error::Transfer { path, .. }, Read | Write) => {
                    let place = form.place_of(disk, *piece);
                    assert!(path.display().to_string().starts_with(&place), "{case}: {place}");
                }
                // The write of a piece came before it, which could not note that it overwrites the last commit.
                (Error::File { .. }, SaveDocument | Rename | SyncDirectory) if form.in_place => {}
                _ => panic!("{case}"),
            }
        }
        (Error::File { path, .. }, point) if !matches!(point, Read | Write) => {
            assert!(disk.path().is_none_or(|directory| path.starts_with(directory)), "{case}");
        }
        _ => panic!("{case}"),
    }
}

fn rows() -> impl Iterator<Item = (Form, Row)> {
    FORMS.into_iter().flat_map(|form| form.rows().into_iter().map(move |row| (form, row)))
}

#[test]
fn every_lasting_failure_at_every_operation_is_named_and_spares_the_last_commit() {
    for (form, row @ (_, point, count)) in rows() {
        for kind in [FaultKind::InputOutput, FaultKind::NoSpace, FaultKind::NoPermission] {
            let mut named = HashSet::new();
            for nth in 0..count {
                for disk in quick_disks() {
                    let lived = live_with(&disk, form, row, nth, kind).0;
                    expect_named(&disk, form, point, &lived, &format!("{form:?} {row:?} {nth} {kind:?}"));
                    let file = lived.error.as_ref().map(file_of);
                    named.extend(disk.path().and_then(|own| Some(file?.strip_prefix(own).ok()?.to_owned())));
                }
            }
            if point == Sync {
                assert_eq!(named.len(), form.state_files(), "each file is named in its turn: {named:?}");
            }
        }
        // The table has all operations of its kind: there is none after the last.
        for disk in quick_disks() {
            let (lived, left) = live_with(&disk, form, row, count, FaultKind::InputOutput);
            assert!(lived.error.is_none() && left == Left::Commit(3), "{form:?} {row:?} has more");
        }
    }
}

#[test]
fn every_silent_damage_at_every_transfer_is_found_before_it_is_committed() {
    let kinds = [FaultKind::BitFlip { bit: 65_432 }, FaultKind::Stale, FaultKind::Misplaced];
    for (form, row @ (_, _, count)) in rows().filter(|(_, row)| matches!(row.1, Read | Write)) {
        for (kind, nth) in kinds.iter().flat_map(|&kind| (0..count).map(move |nth| (kind, nth))) {
            for disk in quick_disks() {
                let found = live_with(&disk, form, row, nth, kind).0.error;
                let Some(Error::Checksum { extent, path, piece, .. }) = &found else {
                    panic!("{form:?} {row:?} {nth} {kind:?}: {found:?}")
                };
                assert_eq!(extent, "h.0/master");
                assert!(path.display().to_string().starts_with(&form.place_of(&disk, *piece)));
            }
        }
    }
}

/// So that none of the walks above checks less than it says.
#[test]
fn all_that_faults_may_leave_is_met_in_place_a_store_that_is_refused_too() {
    for form in FORMS {
        let mut met = HashSet::new();
        for row in form.rows() {
            for nth in 0..row.2 {
                let disk = Disk::Mem(Mem::new(&FaultPlan::default()).unwrap().into());
                met.insert(live_with(&disk, form, row, nth, FaultKind::InputOutput).1);
            }
        }
        let commits = [Left::Nothing, Left::Commit(1), Left::Commit(2), Left::Commit(3)];
        let overwritten = [Left::Overwritten(1), Left::Overwritten(2)];
        let all = commits.into_iter().chain(overwritten.into_iter().filter(|_| form.in_place));
        assert_eq!(met, all.collect(), "{form:?}");
    }
}

#[test]
fn every_passing_failure_at_every_system_call_is_ridden_out() {
    let passing = [FaultKind::Interrupted, FaultKind::Again];
    let short = [1, 4095, 4096, 4097, 8191].map(|bytes| FaultKind::Short { bytes });
    let cases = rows().flat_map(|(form, (part, point, _))| {
        let moves_bytes = matches!(point, Read | Write | SaveDocument | LoadDocument);
        let kinds = passing.into_iter().chain(short.into_iter().filter(move |_| moves_bytes));
        kinds.map(move |kind| (form, part, point, kind))
    });
    for (form, part, point, kind) in cases {
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
            let arena = arena(1 << 20);
            let lived = live(&disk, form, &arena, plans(&plan));
            let case = format!("{form:?} {part} {point:?} {kind:?}");
            assert!(lived.error.is_none() && lived.committed == 3, "{case}: {:?}", lived.error);
            expect_last_commit(&disk, &arena, 3, 3);
            // What never passes is told in the end, which also shows that the fault is where it should be. A call
            // that goes on page by page never fails.
            if !matches!(kind, FaultKind::Short { .. }) {
                let error = live(&never, form, &arena, plans(&lasting)).error.expect("it is told in the end");
                assert!(matches!(error, Error::File { .. } | Error::Piece { .. }), "{case}: {error}");
            }
        }
    }
}

/// A disk that nothing was done to, for the pool.
fn fresh_disk() -> Disk {
    Disk::Pool(tempfile::tempdir_in(quick_folder()).unwrap())
}
