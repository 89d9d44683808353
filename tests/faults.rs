//! Each failure of the disk at each moment of a short run: told with file, extent and step, or ridden out. No run hangs,
//! panics or trains on damage, and the last commit resumes with the bits of a run that met no fault.

mod support;

use ferrozero::{BackendChoice, Config, Error, Fault, FaultKind, FaultPlan, FaultPoint, Placement, Tier};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use support::{tokens, train, trainer};

const BLOCKS: usize = 1;
const STEPS: u64 = 3;

/// Longer than any run takes. Only a run that hangs waits for it.
const WATCHDOG: Duration = Duration::from_secs(300);

/// Everything that can be on disk is: parameters, moments, gradients (clipping keeps them), boundaries.
fn config(folder: &Path) -> Config {
    Config {
        directory: Some(folder.join("run")),
        placement: Placement::All(Tier::Disk),
        boundaries: Some(Tier::Disk),
        clip: Some(1.0),
        backend: BackendChoice::Pool,
        piece_bytes: Some(32 << 10),
        threads: Some(1),
        ..Config::default()
    }
}

/// In memory where the system has such a folder: walks would wait for the disk thousands of times, and their faults come
/// from a script.
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

/// Trains to the last step from wherever the configuration starts, with a commit after the first step, and answers the
/// digest of the weights.
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

/// Opens the last commit without faults and trains to the end; starts anew where nothing was committed.
fn go_on(folder: &Path, case: &str) -> ferrozero::Result<String> {
    let resumed = live_watched(Config { resume: true, ..config(folder) }, case).1;
    match resumed {
        Err(Error::Offload(ferrozero_offload::Error::NoCommit { .. })) => {
            live_watched(config(folder), case).1
        }
        other => other,
    }
}

/// An error of a transfer names file, extent, piece, generation and step.
fn expect_transfer_named(error: &Error, progress: &Progress, folder: &Path, case: &str) {
    let text = error.to_string();
    let Error::Disk { step: 1..=4, source } = error else { panic!("{case}: {error:?}") };
    let (extent, generation) = match source {
        ferrozero_offload::Error::Piece { extent, generation, .. }
        | ferrozero_offload::Error::Checksum { extent, generation, .. } => (extent, *generation),
        other => panic!("{case}: {other:?}"),
    };
    let parts = ["h.0/", "resident/", "boundary "];
    assert!(parts.iter().any(|part| extent.starts_with(part)), "{case}: {text}");
    // Scratch is never committed, so that its generation is always 0.
    assert!(generation == 0 || generation == progress.commits, "{case}: {text}");
    for word in ["step ", "generation ", "piece ", extent, &folder.display().to_string()] {
        assert!(text.contains(word), "{case}: {word} is missing in: {text}");
    }
}

/// Injects `kind` at each operation of `point` until there is none left to fail. Answers how many there are, and how many
/// of them come before the first commit.
fn walk_lasting(point: FaultPoint, kind: FaultKind, backend: BackendChoice, expected: &str) -> (u64, u64) {
    let mut before_commit = 0;
    for nth in 0.. {
        let folder = quick_folder();
        let case = format!("{point:?} {nth} {kind:?} {backend:?}");
        let faulty = with_fault(Config { backend, ..config(folder.path()) }, point, nth, kind);
        let (progress, result) = live_watched(faulty, &case);
        let error = match result {
            Ok(digest) => {
                assert_eq!(digest, expected, "{case}");
                return (nth, before_commit);
            }
            Err(error) => error,
        };
        before_commit += u64::from(progress.commits == 0);
        match (point, &error) {
            (FaultPoint::Read | FaultPoint::Write, _) => {
                expect_transfer_named(&error, &progress, folder.path(), &case);
            }
            (_, Error::Offload(source) | Error::Disk { source, .. }) => {
                assert!(matches!(source, ferrozero_offload::Error::File { .. }), "{case}: {error}");
                assert!(error.to_string().contains(&folder.path().display().to_string()), "{case}: {error}");
            }
            _ => panic!("{case}: {error:?}"),
        }
        assert_eq!(go_on(folder.path(), &case).unwrap(), expected, "{case}: {error}");
    }
    unreachable!("there is an end to the operations of a run")
}

#[test]
fn every_lasting_failure_at_every_operation_of_a_run_is_named_and_the_last_commit_resumes() {
    let expected = expected();
    for kind in [FaultKind::InputOutput, FaultKind::NoSpace] {
        for (point, at_least) in [
            (FaultPoint::Allocate, 1),
            (FaultPoint::Write, 20),
            (FaultPoint::Read, 20),
            (FaultPoint::Sync, 2),
            (FaultPoint::SaveDocument, 1),
            (FaultPoint::Rename, 1),
            (FaultPoint::SyncDirectory, 1),
            (FaultPoint::LoadDocument, 1),
        ] {
            // The backends differ below the place of these faults, so that one kind suffices for the other one.
            let backend = match kind {
                FaultKind::InputOutput => BackendChoice::Auto,
                _ => BackendChoice::Pool,
            };
            let (count, _) = walk_lasting(point, kind, backend, &expected);
            assert!(count >= at_least, "{point:?}: {count}");
        }
    }
}

#[test]
fn no_run_goes_on_from_silent_damage() {
    let expected = expected();
    for point in [FaultPoint::Read, FaultPoint::Write] {
        let (count, before_commit) =
            walk_lasting(point, FaultKind::NoPermission, BackendChoice::Pool, &expected);
        let mut found = 0;
        for kind in [FaultKind::BitFlip { bit: 4321 }, FaultKind::Stale] {
            for nth in 0..count {
                let folder = quick_folder();
                let case = format!("{point:?} {nth} {kind:?}");
                let faulty = with_fault(config(folder.path()), point, nth, kind);
                let (progress, result) = live_watched(faulty, &case);
                match &result {
                    // Bytes that nobody read again, or a read that hit the padding of a piece.
                    Ok(digest) => assert_eq!(*digest, expected, "{case}"),
                    Err(error) => {
                        found += 1;
                        expect_transfer_named(error, &progress, folder.path(), &case);
                    }
                }
                match go_on(folder.path(), &case) {
                    Ok(digest) => assert_eq!(digest, expected, "{case}"),
                    // What a disk loses or damages and commits without a word is gone. It is told, not trained on.
                    Err(Error::Disk { source: ferrozero_offload::Error::Checksum { .. }, .. })
                        if point == FaultPoint::Write && nth < before_commit => {}
                    Err(other) => panic!("{case}: {other}"),
                }
            }
        }
        assert!(found >= count, "of twice {count} damages in {point:?} {found} were found");
    }
}

#[test]
fn failures_while_a_commit_is_opened_leave_it_as_it_is() {
    let expected = expected();
    let folder = folder();
    let (mut first, model) = trainer(config(folder.path()), BLOCKS).unwrap();
    first.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
    first.commit(serde_json::Value::Null).unwrap();
    drop((first, model));
    for kind in [FaultKind::InputOutput, FaultKind::NoPermission, FaultKind::BitFlip { bit: 100 }] {
        for (point, nth) in [(FaultPoint::LoadDocument, 0), (FaultPoint::Open, 0), (FaultPoint::Read, 0)] {
            if point == FaultPoint::Open && matches!(kind, FaultKind::BitFlip { .. }) {
                continue;
            }
            let case = format!("{point:?} {nth} {kind:?}");
            let faulty = with_fault(config(folder.path()), point, nth, kind);
            let error = live_watched(Config { resume: true, ..faulty }, &case).1.unwrap_err();
            assert!(matches!(error, Error::Offload(_) | Error::Disk { .. }), "{case}: {error:?}");
            assert!(error.to_string().contains(&folder.path().display().to_string()), "{case}: {error}");
        }
    }
    assert_eq!(go_on(folder.path(), "afterwards").unwrap(), expected);
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
        for backend in [BackendChoice::Pool, BackendChoice::Auto] {
            let folder = folder();
            let faulty = Config { backend, faults: Some(faults(kind)), ..config(folder.path()) };
            let case = format!("{kind:?} {backend:?}");
            assert_eq!(live_watched(faulty.clone(), &case).1.unwrap(), expected, "{case}");
            let resumed = live_watched(Config { resume: true, ..faulty }, &case).1;
            assert_eq!(resumed.unwrap(), expected, "{case}, resumed");
        }
    }
}
