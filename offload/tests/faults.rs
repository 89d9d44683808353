//! Each failure of a disk, on every backend: reported by name or ridden out, and never at the cost of the
//! last commit.

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
    for disk in directories() {
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
    for disk in directories() {
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

    /// What there must be after a life that ended as it did.
    fn left(self, disk: &Disk, point: FaultPoint, lived: &Lived) -> Left {
        let Some(error) = &lived.error else { return Left::Commit(3) };
        // When the directory of a manifest could not be synced, the new manifest is there all the same. A
        // store of several directories notes whose they are before its first one.
        let is_there = |directory: &Path| directory.join("manifest.json").exists();
        let is_replaced = point == SyncDirectory && lived.is_committing && disk.path().is_some_and(is_there);
        // Nothing is overwritten before that is noted, and where it could not be, the commit is as it was.
        let is_mark = matches!(error, Error::Piece { source, .. } if matches!(**source, Error::File { .. }));
        match lived.committed {
            generation if is_replaced => Left::Commit(generation + 1),
            0 => Left::Nothing,
            generation if self.in_place && lived.has_begun && !is_mark => Left::Overwritten(generation),
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

/// One part of a store's life, and one kind of operation in it.
type Row = (usize, FaultPoint);

const MAKING: usize = 0;
const REOPENED: usize = 1;

/// All operations of [`live`].
const ROWS: [Row; 16] = [
    (MAKING, LoadDocument),
    (MAKING, Allocate),
    (MAKING, Write),
    (MAKING, Read),
    (MAKING, Sync),
    (MAKING, SaveDocument),
    (MAKING, Rename),
    (MAKING, SyncDirectory),
    (REOPENED, LoadDocument),
    (REOPENED, Open),
    (REOPENED, Write),
    (REOPENED, Read),
    (REOPENED, Sync),
    (REOPENED, SaveDocument),
    (REOPENED, Rename),
    (REOPENED, SyncDirectory),
];

/// How far a store came.
#[derive(Default)]
struct Lived {
    /// Commits that were answered with success.
    committed: u64,
    /// Whether a write was tried since the last of them.
    has_begun: bool,
    /// Whether a commit was asked for and not answered with success.
    is_committing: bool,
    error: Option<Error>,
}

/// A store is made and commits rounds 1 and 2; it is opened again and commits round 3. Ends at the first
/// error.
fn live(disk: &Disk, form: Form, arena: &Arena, plans: [&FaultPlan; 2]) -> Lived {
    let mut lived = Lived::default();
    let mut write_read_commit = |store: &Store, round: u64| -> Result<(), Error> {
        for piece in pieces(store) {
            lived.has_begun = true;
            write(store, arena, piece, round)?;
        }
        read_all(store, arena, round)?;
        lived.is_committing = true;
        lived.committed = store.commit(json!({ "round": round }))?;
        (lived.is_committing, lived.has_begun) = (false, false);
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
fn live_with(disk: &Disk, form: Form, (part, point): Row, nth: u64, kind: FaultKind) -> (Lived, Left) {
    let (arena, none) = (arena(1 << 20), FaultPlan::default());
    let plan = plan(point, nth, kind);
    let plans = if part == MAKING { [&plan, &none] } else { [&none, &plan] };
    let lived = live(disk, form, &arena, plans);
    let left = form.left(disk, point, &lived);
    expect_left(disk, &arena, left, &format!("{form:?} {part} {point:?} {nth} {kind:?}: {:?}", lived.error));
    assert_eq!(arena.free_bytes(), arena.capacity_bytes(), "every lease came back");
    (lived, left)
}

/// Injects `kind` at each operation of a kind on new disks until there is none left to fail, and shows what
/// came of each. Answers how many there are.
fn walk(
    new_disk: impl Fn() -> Disk,
    form: Form,
    row: Row,
    kind: FaultKind,
    mut see: impl FnMut(&Disk, u64, Lived, Left),
) -> u64 {
    for nth in 0.. {
        let disk = new_disk();
        let (lived, left) = live_with(&disk, form, row, nth, kind);
        if lived.error.is_none() {
            return nth;
        }
        see(&disk, nth, lived, left);
    }
    unreachable!("there is an end to the operations of a store's life")
}

/// The file that a failure is about.
fn file_of(error: &Error) -> &Path {
    match error {
        Error::Piece { source, .. } => file_of(source),
        Error::Transfer { path, .. } | Error::File { path, .. } | Error::Checksum { path, .. } => path,
        // The directory.
        Error::DiskFull { path, .. } => path,
        other => panic!("{other}"),
    }
}

/// A lasting failure names the piece, where there is one, and the file, in the right directory.
fn expect_named(disk: &Disk, form: Form, point: FaultPoint, kind: FaultKind, lived: &Lived, case: &str) {
    let error = lived.error.as_ref().expect("the fault was told");
    let case = format!("{case}: {error}");
    if point == Allocate {
        let is_left = |directory: &Path| directory.join("state-a.bin").exists();
        assert!(disk.path().is_none_or(|directory| !is_left(directory)), "{case}: something was left behind");
    }
    match (error, point) {
        (Error::Piece { extent, piece, generation, source }, _) => {
            assert_eq!((extent.as_str(), *generation), ("h.0/master", lived.committed), "{case}");
            match (&**source, point) {
                (Error::Transfer { path, .. }, Read | Write) => {
                    let place = form.place_of(disk, *piece);
                    assert!(path.display().to_string().starts_with(&place), "{case}: {place}");
                }
                // The write of a piece came before it, which could not note that it overwrites the last
                // commit.
                (Error::File { .. }, SaveDocument | Sync | Rename | SyncDirectory) if form.in_place => {}
                _ => panic!("{case}"),
            }
        }
        // Only while the files are made is it known how many bytes there should be room for.
        (Error::DiskFull { path, needed_bytes, .. }, Allocate | Sync | SyncDirectory) => {
            assert!(kind == FaultKind::NoSpace && lived.committed == 0 && *needed_bytes > 0, "{case}");
            assert!(disk.path().is_some_and(|directory| path.starts_with(directory)), "{case}");
        }
        (Error::File { path, .. }, point) if !matches!(point, Read | Write) => {
            assert!(kind != FaultKind::NoSpace || point != Allocate, "{case}");
            assert!(disk.path().is_none_or(|directory| path.starts_with(directory)), "{case}");
        }
        _ => panic!("{case}"),
    }
}

/// What makes new disks of each backend that can fail in this way.
fn makers(point: FaultPoint) -> Vec<fn() -> Disk> {
    let mut makers: Vec<fn() -> Disk> = vec![new_pool];
    if matches!(point, Read | Write) {
        makers.push(|| Disk::Mem(Mem::new(&FaultPlan::default()).unwrap().into()));
    }
    let is_uring = |disk: &Disk| matches!(disk, Disk::Uring(_));
    if quick_disks().iter().any(is_uring) {
        makers.push(|| Disk::Uring(tempfile::tempdir_in(quick_folder()).unwrap()));
    }
    makers
}

/// A disk that nothing was done to, for the pool.
fn new_pool() -> Disk {
    Disk::Pool(tempfile::tempdir_in(quick_folder()).unwrap())
}

fn rows() -> impl Iterator<Item = (Form, Row)> {
    FORMS.into_iter().flat_map(|form| ROWS.map(|row| (form, row)))
}

#[test]
fn every_lasting_failure_at_every_operation_is_named_and_spares_the_last_commit() {
    for (form, row @ (part, point)) in rows() {
        for kind in [FaultKind::InputOutput, FaultKind::NoSpace, FaultKind::NoPermission] {
            let mut named = HashSet::new();
            for new_disk in makers(point) {
                let count = walk(new_disk, form, row, kind, |disk, nth, lived, _| {
                    let case = format!("{form:?} {part} {point:?} {nth} {kind:?}");
                    expect_named(disk, form, point, kind, &lived, &case);
                    let file = lived.error.as_ref().filter(|_| lived.is_committing).map(file_of);
                    named.extend(disk.path().and_then(|own| Some(file?.strip_prefix(own).ok()?.to_owned())));
                });
                assert!(count > 0, "{form:?} {part} has no {point:?}");
            }
            let is_state = |file: &&PathBuf| {
                file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("state-"))
            };
            if point == Sync {
                let states = named.iter().filter(is_state).count();
                assert_eq!(states, form.state_files(), "each file of states is named in its turn: {named:?}");
            }
        }
    }
}

#[test]
fn every_silent_damage_at_every_transfer_is_found_before_it_is_committed() {
    let kinds = [FaultKind::BitFlip { bit: 65_432 }, FaultKind::Stale, FaultKind::Misplaced];
    for (form, row @ (_, point)) in rows().filter(|(_, row)| matches!(row.1, Read | Write)) {
        for kind in kinds {
            for new_disk in makers(point) {
                let count = walk(new_disk, form, row, kind, |disk, nth, lived, _| {
                    let Some(Error::Checksum { extent, path, piece, .. }) = &lived.error else {
                        panic!("{form:?} {row:?} {nth} {kind:?}: {:?}", lived.error)
                    };
                    assert_eq!(extent, "h.0/master");
                    assert!(path.display().to_string().starts_with(&form.place_of(disk, *piece)));
                });
                let rounds = if row.0 == MAKING || point == Read { 2 } else { 1 };
                assert_eq!(count, rounds * PIECES, "{form:?} {row:?} {kind:?}");
            }
        }
    }
}

/// So that none of the walks above checks less than it says.
#[test]
fn all_that_faults_may_leave_is_met_in_place_a_store_that_is_refused_too() {
    for form in FORMS {
        let mut met = HashSet::new();
        for row in ROWS {
            walk(new_pool, form, row, FaultKind::InputOutput, |_, _, _, left| {
                met.insert(left);
            });
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
    let cases = rows().flat_map(|(form, (part, point))| {
        let moves_bytes = matches!(point, Read | Write | SaveDocument | LoadDocument);
        let kinds = passing.into_iter().chain(short.into_iter().filter(move |_| moves_bytes));
        kinds.map(move |kind| (form, part, point, kind))
    });
    for (form, part, point, kind) in cases {
        // Every other call fails, so that each one does and each repetition does not.
        let plan = FaultPlan((0..64).map(|nth| Fault { point, nth: 2 * nth, kind }).collect());
        let lasting = FaultPlan((0..4096).map(|nth| Fault { point, nth, kind }).collect());
        let none = FaultPlan::default();
        for new_disk in makers(point) {
            let plans = |plan| if part == MAKING { [plan, &none] } else { [&none, plan] };
            let (disk, never) = (new_disk(), new_disk());
            let arena = arena(1 << 20);
            let lived = live(&disk, form, &arena, plans(&plan));
            let case = format!("{form:?} {part} {point:?} {kind:?}");
            assert!(lived.error.is_none() && lived.committed == 3, "{case}: {:?}", lived.error);
            expect_last_commit(&disk, &arena, 3, 3);
            // What never passes is told in the end, which also shows that the fault is where it should be. A
            // call that goes on page by page never fails.
            if !matches!(kind, FaultKind::Short { .. }) {
                let error = live(&never, form, &arena, plans(&lasting)).error.expect("it is told in the end");
                assert!(matches!(error, Error::File { .. } | Error::Piece { .. }), "{case}: {error}");
            }
        }
    }
}
