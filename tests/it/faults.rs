//! Each failure of the disk at each moment of a short run: told with file, extent and step, or ridden out. No
//! run hangs, panics or trains on damage, and the last commit resumes with the bits of a run that met no
//! fault.

use crate::support::{tokens, train, trainer};
use ferrozero::testing::{Fault, FaultKind, FaultPlan, FaultPoint};
use ferrozero::{BackendChoice, Config, Error, Placement, Tier};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const BLOCKS: usize = 1;
const STEPS: u64 = 3;

/// Longer than any run takes. Only a run that hangs waits for it.
const WATCHDOG: Duration = Duration::from_secs(300);

/// How states lie on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Form {
    /// In one directory, with a second place for each piece.
    Whole,
    /// The same over two directories.
    Striped,
    /// In one directory and with one place, which gives the last commit up as soon as the next step writes.
    InPlace,
}

const FORMS: [Form; 3] = [Form::Whole, Form::Striped, Form::InPlace];

/// Everything that can be on disk is: parameters, moments, gradients (clipping keeps them), boundaries.
fn config(folder: &Path, form: Form) -> Config {
    Config {
        directory: Some(folder.join("run")),
        stripes: if form == Form::Striped { vec![folder.join("stripe")] } else { vec![] },
        in_place: form == Form::InPlace,
        placement: Placement::All(Tier::Disk),
        boundaries: Some(Tier::Disk),
        clip: Some(1.0),
        backend: BackendChoice::Pool,
        piece_bytes: Some(32 << 10),
        threads: Some(1),
        ..Config::default()
    }
}

/// In memory where the system has such a folder: walks would wait for the disk thousands of times, and their
/// faults come from a script.
fn quick_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| folder())
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// How far a run came.
#[derive(Default, Clone, Debug)]
struct Progress {
    /// Commits that were answered with success.
    commits: u64,
}

/// Trains to the last step from wherever the configuration starts, with a commit after the first step, and
/// answers the digest of the weights.
fn live(config: Config, progress: &mut Progress) -> ferrozero::Result<String> {
    let (mut trainer, model) = trainer(config, BLOCKS)?;
    for step in trainer.steps()..STEPS {
        trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch)))?;
        if step == 0 {
            trainer.commit(serde_json::json!({ "step": 1 }))?;
            progress.commits += 1;
        }
    }
    trainer.weights_digest()
}

/// As [`live`], in a thread of its own, so that a run that hangs or panics is known by its case.
fn live_watched(config: Config, case: &str) -> (Progress, ferrozero::Result<String>) {
    let (sender, ended) = channel();
    let thread = std::thread::spawn(move || {
        let mut progress = Progress::default();
        let result = live(config, &mut progress);
        let _ = sender.send((progress, result));
    });
    match ended.recv_timeout(WATCHDOG) {
        Ok(end) => {
            thread.join().unwrap();
            end
        }
        Err(RecvTimeoutError::Disconnected) => panic!("{case}: the run panicked"),
        Err(RecvTimeoutError::Timeout) => panic!("{case}: the run hangs"),
    }
}

fn with_fault(config: Config, point: FaultPoint, nth: u64, kind: FaultKind) -> Config {
    Config { faults: Some(FaultPlan(vec![Fault { point, nth, kind }])), ..config }
}

/// The bits of a run that has no disk and so meets no fault.
fn expected() -> String {
    train(Config { clip: Some(1.0), ..Config::default() }, BLOCKS, STEPS).unwrap().1
}

/// What was found after a run that met a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Found {
    /// Nothing was committed.
    Nothing,
    /// The last commit, whole.
    Commit,
    /// In place only: the last commit was being overwritten, and is refused.
    Overwritten,
}

/// Opens the last commit without faults and trains to the end; starts anew where nothing was committed, and
/// in a new folder where what was committed is gone, as the error says.
fn go_on(folder: &Path, form: Form, case: &str) -> (Found, ferrozero::Result<String>) {
    use ferrozero_offload::Error::{NoCommit, Overwritten};
    let resumed = live_watched(Config { resume: true, ..config(folder, form) }, case).1;
    match resumed {
        Err(Error::Offload(NoCommit { .. })) => (Found::Nothing, live_watched(config(folder, form), case).1),
        Err(Error::Offload(Overwritten { generation: 1, .. })) if form == Form::InPlace => {
            (Found::Overwritten, live_watched(config(&folder.join("anew"), form), case).1)
        }
        other => (Found::Commit, other),
    }
}

/// The parameters that have elements in a piece of 32 KiB of a group's states; a boundary has none.
fn parameters_in(extent: &str, piece: usize) -> &'static [&'static str] {
    match (extent.split('/').next(), piece) {
        (Some("h.0"), 0) => &["h.0.up", "h.0.bias"],
        (Some("h.0"), 1) => &["h.0.down"],
        (Some("resident"), 0) => &["embedding"],
        _ => &[],
    }
}

/// An error of a transfer names file, extent, piece, generation, step, and the parameters whose states are
/// there.
fn expect_transfer_named(error: &Error, progress: &Progress, folder: &Path, case: &str) {
    let text = error.to_string();
    let Error::Disk { step: 1..=4, parameters, source } = error else { panic!("{case}: {error:?}") };
    let (extent, piece, generation) = match source {
        ferrozero_offload::Error::Piece { extent, piece, generation, .. }
        | ferrozero_offload::Error::Checksum { extent, piece, generation, .. } => {
            (extent, *piece, *generation)
        }
        other => panic!("{case}: {other:?}"),
    };
    assert_eq!(parameters, parameters_in(extent, piece), "{case}: {text}");
    assert!(parameters.is_empty() == extent.starts_with("boundary "), "{case}: {text}");
    assert!(parameters.iter().all(|name| text.contains(name)), "{case}: {text}");
    let parts = ["h.0/", "resident/", "boundary "];
    assert!(parts.iter().any(|part| extent.starts_with(part)), "{case}: {text}");
    // Scratch is never committed, so that its generation is always 0.
    assert!(generation == 0 || generation == progress.commits, "{case}: {text}");
    for word in ["step ", "generation ", "piece ", extent, &folder.display().to_string()] {
        assert!(text.contains(word), "{case}: {word} is missing in: {text}");
    }
}

/// The file or directory that an error of the disk is about.
fn file_of<'a>(error: &'a Error, case: &str) -> &'a Path {
    use ferrozero_offload::Error::{Checksum, DiskFull, File, Piece, Transfer};
    let (Error::Offload(source) | Error::Disk { source, .. }) = error else { panic!("{case}: {error:?}") };
    let source = if let Piece { source, .. } = source { source } else { source };
    match source {
        File { path, .. } | Transfer { path, .. } | Checksum { path, .. } | DiskFull { path, .. } => path,
        other => panic!("{case}: {other:?}"),
    }
}

/// A walk over all operations meets all directories, and all that may be found afterwards.
fn expect_all_met(form: Form, point: FaultPoint, directories: &HashSet<PathBuf>, found: &HashSet<Found>) {
    let moves_states = matches!(point, FaultPoint::Read | FaultPoint::Write | FaultPoint::Sync);
    if form == Form::Striped && moves_states {
        let all = ["run", "stripe"].map(Path::new);
        assert!(all.iter().all(|&each| directories.contains(each)), "{point:?}: {directories:?}");
    }
    if point == FaultPoint::Write {
        let after_the_commit = if form == Form::InPlace { Found::Overwritten } else { Found::Commit };
        assert!(found.contains(&Found::Nothing) && found.contains(&after_the_commit), "{form:?}: {found:?}");
    }
}

/// Injects `kind` at each operation of `point` until there is none left to fail. Answers how many there are,
/// and how many of them come before the first commit.
fn walk_lasting(
    form: Form,
    point: FaultPoint,
    kind: FaultKind,
    backend: BackendChoice,
    expected: &str,
) -> (u64, u64) {
    let mut before_commit = 0;
    let (mut directories, mut found) = (HashSet::new(), HashSet::new());
    for nth in 0.. {
        let folder = quick_folder();
        let case = format!("{form:?} {point:?} {nth} {kind:?} {backend:?}");
        let faulty = with_fault(Config { backend, ..config(folder.path(), form) }, point, nth, kind);
        let (progress, result) = live_watched(faulty, &case);
        let error = match result {
            Ok(digest) => {
                assert_eq!(digest, expected, "{case}");
                expect_all_met(form, point, &directories, &found);
                return (nth, before_commit);
            }
            Err(error) => error,
        };
        before_commit += u64::from(progress.commits == 0);
        if matches!(point, FaultPoint::Read | FaultPoint::Write) {
            expect_transfer_named(&error, &progress, folder.path(), &case);
        }
        let file = file_of(&error, &case);
        let within = file.strip_prefix(folder.path()).unwrap_or_else(|_| panic!("{case}: {error}"));
        directories.extend(within.parent().map(Path::to_owned));
        let (met, digest) = go_on(folder.path(), form, &case);
        assert_eq!(digest.unwrap(), expected, "{case}: {error}");
        let as_promised = match met {
            Found::Nothing => progress.commits == 0,
            // The new manifest is in place when its directory could not be synced.
            Found::Commit => progress.commits == 1 || point == FaultPoint::SyncDirectory,
            Found::Overwritten => progress.commits == 1,
        };
        assert!(as_promised, "{case}: {met:?} after {progress:?} and {error}");
        found.insert(met);
    }
    unreachable!("there is an end to the operations of a run")
}

#[test]
fn every_lasting_failure_at_every_operation_of_a_run_is_named_and_the_last_commit_resumes() {
    let expected = expected();
    for (form, kind) in [
        (Form::Whole, FaultKind::InputOutput),
        (Form::Whole, FaultKind::NoSpace),
        (Form::Striped, FaultKind::InputOutput),
        (Form::InPlace, FaultKind::NoSpace),
    ] {
        for (point, at_least) in [
            (FaultPoint::Allocate, 1),
            (FaultPoint::Write, 20),
            (FaultPoint::Read, 20),
            // In place there is one file of states.
            (FaultPoint::Sync, if form == Form::InPlace { 1 } else { 2 }),
            (FaultPoint::SaveDocument, 1),
            (FaultPoint::Rename, 1),
            (FaultPoint::SyncDirectory, 1),
            (FaultPoint::LoadDocument, 1),
        ] {
            // Only transfers differ between the backends, so that one kind suffices for the other one.
            let backend = match kind {
                FaultKind::InputOutput => BackendChoice::Auto,
                _ => BackendChoice::Pool,
            };
            let (count, _) = walk_lasting(form, point, kind, backend, &expected);
            assert!(count >= at_least, "{form:?} {point:?}: {count}");
        }
    }
}

/// Micro-batches that run vertically are threads: what one of them meets ends all, and none hangs.
#[test]
fn a_failed_transfer_ends_micro_batches_that_run_vertically() {
    let several = |folder: &Path| Config { accumulate: 3, vertical: Some(3), ..config(folder, Form::Whole) };
    let reference = Config { clip: Some(1.0), accumulate: 3, vertical: Some(1), ..Config::default() };
    let expected = train(reference, BLOCKS, STEPS).unwrap().1;
    for point in [FaultPoint::Read, FaultPoint::Write] {
        let mut failed = 0;
        for nth in (0..).step_by(3) {
            let folder = quick_folder();
            let case = format!("{point:?} {nth}, vertical");
            let faulty = with_fault(several(folder.path()), point, nth, FaultKind::InputOutput);
            let (progress, result) = live_watched(faulty, &case);
            match result {
                Ok(digest) => {
                    assert_eq!(digest, expected, "{case}");
                    break;
                }
                Err(error) => expect_transfer_named(&error, &progress, folder.path(), &case),
            }
            failed += 1;
        }
        assert!(failed >= 10, "{point:?}: {failed}");
    }
}

#[test]
fn no_run_goes_on_from_silent_damage() {
    let expected = expected();
    for (form, point) in
        FORMS.iter().flat_map(|&form| [FaultPoint::Read, FaultPoint::Write].map(|point| (form, point)))
    {
        let (count, before_commit) =
            walk_lasting(form, point, FaultKind::NoPermission, BackendChoice::Pool, &expected);
        let mut found = 0;
        for kind in [FaultKind::BitFlip { bit: 4321 }, FaultKind::Stale, FaultKind::Misplaced] {
            for nth in 0..count {
                let folder = quick_folder();
                let case = format!("{form:?} {point:?} {nth} {kind:?}");
                let faulty = with_fault(config(folder.path(), form), point, nth, kind);
                let (progress, result) = live_watched(faulty, &case);
                match &result {
                    // Bytes that nobody read again, or a read that hit the padding of a piece.
                    Ok(digest) => assert_eq!(*digest, expected, "{case}"),
                    Err(error) => {
                        found += 1;
                        expect_transfer_named(error, &progress, folder.path(), &case);
                    }
                }
                match go_on(folder.path(), form, &case).1 {
                    Ok(digest) => assert_eq!(digest, expected, "{case}"),
                    // What a disk loses or damages and commits without a word is gone. It is told, not
                    // trained on.
                    Err(Error::Disk { source: ferrozero_offload::Error::Checksum { .. }, .. })
                        if point == FaultPoint::Write && nth < before_commit => {}
                    Err(other) => panic!("{case}: {other}"),
                }
            }
        }
        assert!(found >= 2 * count, "of three times {count} damages in {point:?} {found} were found");
    }
}

#[test]
fn failures_while_a_commit_is_opened_leave_it_as_it_is() {
    let expected = expected();
    for form in FORMS {
        let folder = folder();
        let (mut first, model) = trainer(config(folder.path(), form), BLOCKS).unwrap();
        first.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
        first.commit(serde_json::Value::Null).unwrap();
        drop((first, model));
        for kind in [FaultKind::InputOutput, FaultKind::NoPermission, FaultKind::BitFlip { bit: 100 }] {
            for point in [FaultPoint::LoadDocument, FaultPoint::Open, FaultPoint::Read] {
                if point == FaultPoint::Open && matches!(kind, FaultKind::BitFlip { .. }) {
                    continue;
                }
                let case = format!("{form:?} {point:?} {kind:?}");
                let faulty = with_fault(config(folder.path(), form), point, 0, kind);
                let error = live_watched(Config { resume: true, ..faulty }, &case).1.unwrap_err();
                assert!(matches!(error, Error::Offload(_) | Error::Disk { .. }), "{case}: {error:?}");
                assert!(error.to_string().contains(&folder.path().display().to_string()), "{case}: {error}");
            }
        }
        let (found, digest) = go_on(folder.path(), form, "afterwards");
        assert_eq!((found, digest.unwrap()), (Found::Commit, expected.clone()), "{form:?}");
    }
}

#[test]
fn passing_failures_at_every_system_call_change_nothing() {
    use FaultPoint::*;
    let expected = expected();
    let points = [Allocate, Open, Read, Write, Sync, LoadDocument, SaveDocument, Rename, SyncDirectory];
    let short = |bytes| FaultKind::Short { bytes };
    for kind in [FaultKind::Interrupted, FaultKind::Again, short(1), short(4096), short(5000)] {
        let faults = |kind: FaultKind| {
            // Every other call fails, so that each one does and its repetition does not.
            let nths = (0..2000).map(|nth| 2 * nth);
            FaultPlan(nths.flat_map(|nth| points.map(|point| Fault { point, nth, kind })).collect())
        };
        let backends = [BackendChoice::Pool, BackendChoice::Auto];
        for (form, backend) in FORMS.iter().flat_map(|&form| backends.map(|backend| (form, backend))) {
            let folder = folder();
            let faulty = Config { backend, faults: Some(faults(kind)), ..config(folder.path(), form) };
            let case = format!("{form:?} {kind:?} {backend:?}");
            assert_eq!(live_watched(faulty.clone(), &case).1.unwrap(), expected, "{case}");
            let resumed = live_watched(Config { resume: true, ..faulty }, &case).1;
            match resumed {
                // The steps after the commit were written over it.
                Err(Error::Offload(ferrozero_offload::Error::Overwritten { .. })) => {
                    assert_eq!(form, Form::InPlace, "{case}");
                }
                other => assert!(form != Form::InPlace && other.unwrap() == expected, "{case}, resumed"),
            }
        }
    }
}
