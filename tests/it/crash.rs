//! A kill at any instant costs at most the steps since the last commit, and resuming gives the bits of a run that was
//! never killed. A child process trains; it ends at a system call of its disk tier, or is killed at any moment, and the
//! power may go with it; another one goes on, until the run is complete.
//!
//! The long form: `scripts/crash_soak`.

use crate::support::{machine, tokens, train, trainer};
use ferrozero::testing::{Fault, FaultKind, FaultPlan, FaultPoint};
use ferrozero::{BackendChoice, Config, Engine, Placement, Tier};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const BLOCKS: usize = 2;
const STEPS: u64 = 8;

/// Set in a child, to the number of its way to train and the operation at which it ends.
const CHILD: &str = "FERROZERO_CRASH_CHILD";
/// Folder of the run.
const FOLDER: &str = "FERROZERO_CRASH_FOLDER";
/// Signal by which a child ends at an operation.
const ABORTED: i32 = 6;
/// Where the child copies its folder after each commit, if it is there: what is durable then.
const DURABLE: &str = "FERROZERO_CRASH_DURABLE";
/// What a disk keeps or loses as one.
const PAGE_BYTES: usize = 4096;
/// Kills of the soak.
const KILLS: &str = "FERROZERO_CRASH_KILLS";

const POINTS: [FaultPoint; 9] = [
    FaultPoint::Allocate,
    FaultPoint::Read,
    FaultPoint::Write,
    FaultPoint::Sync,
    FaultPoint::SaveDocument,
    // The new manifest is whole, and not in place.
    FaultPoint::Rename,
    // The new manifest is in place, and nobody was told.
    FaultPoint::SyncDirectory,
    FaultPoint::LoadDocument,
    FaultPoint::Open,
];

/// A child without a kill.
const NOWHERE: usize = POINTS.len();

/// The number of a kind of operation.
fn number_of(point: FaultPoint) -> usize {
    POINTS.iter().position(|&each| each == point).unwrap()
}

/// A way to train: what differs must not matter.
fn config(way: usize) -> Config {
    Config {
        backend: [BackendChoice::Auto, BackendChoice::Pool][way % 2],
        clip: [None, Some(0.05)][way / 2 % 2],
        placement: [Placement::All(Tier::Disk), Placement::All(Tier::Host)][way / 4 % 2].clone(),
        piece_bytes: Some(8192),
        // A described machine: each child would measure its own.
        machine: Some(machine()),
        ..Config::default()
    }
}

/// Ways among which any two settings of [`config`] meet in each of their combinations.
const PAIRS_OF_SETTINGS: [usize; 4] = [0, 3, 5, 6];

fn commit_every(way: usize) -> u64 {
    1 + way as u64 % 5
}

/// The child: trains from the last commit, or from the start, to the end, and says so step by step.
#[test]
#[ignore = "the other tests run it"]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let task: Vec<u64> = task.split(' ').map(|number| number.parse().unwrap()).collect();
    let (way, point, nth) = (task[0] as usize, task[1] as usize, task[2]);
    let directory = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let resume = directory.join("manifest.json").exists();
    let durable = std::env::var_os(DURABLE).map(|copy| (directory.clone(), PathBuf::from(copy)));
    let kill = POINTS.get(point).map(|&point| Fault { point, nth, kind: FaultKind::Kill });
    let faults = kill.map(|kill| FaultPlan(vec![kill]));
    let config = Config { directory: Some(directory), resume, faults, ..config(way) };
    let (mut trainer, model) = trainer(config, BLOCKS).unwrap();
    while trainer.steps() < STEPS {
        let step = trainer.steps();
        trainer.step(|_| model.loss(&tokens(step, 0))).unwrap();
        println!("\nstep {step}");
        if trainer.steps().is_multiple_of(commit_every(way)) {
            // Both kinds of commit, so that kills find both under way.
            match (way % 3, &durable) {
                (_, Some((directory, copy))) => {
                    trainer.commit(serde_json::Value::Null).unwrap();
                    copy_files(directory, copy);
                }
                (0, None) => trainer.commit(serde_json::Value::Null).map(drop).unwrap(),
                _ => trainer.commit_behind(serde_json::Value::Null).unwrap(),
            }
        }
    }
    trainer.commit(serde_json::Value::Null).unwrap();
    println!("\ndigest {}", trainer.weights_digest().unwrap());
}

fn spawn(folder: &Path, way: usize, point: usize, nth: u64) -> Child {
    command(folder, way, point, nth).spawn().unwrap()
}

fn command(folder: &Path, way: usize, point: usize, nth: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["crash::child", "--exact", "--ignored", "--nocapture"])
        .env(CHILD, format!("{way} {point} {nth}"))
        .env(FOLDER, folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Whether the child ended by itself, and the digest that it told.
fn outcome(child: Child) -> (bool, Option<String>) {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let digest = text.lines().find_map(|line| line.strip_prefix("digest ")).map(str::to_owned);
    // A child that fails in another way than by the kill has found a fault of the engine's.
    let is_killed = output.status.signal() == Some(ABORTED);
    assert!(output.status.success() || is_killed, "the child ended with {}", output.status);
    (output.status.success(), digest)
}

/// Resumes until the end; it must be that of a run that was never killed, and every commit on the way is whole.
fn complete(folder: &Path, way: usize, expected: &str, what: &str) {
    if folder.join("manifest.json").exists() {
        let damage = ferrozero::Checkpoint::open(folder).unwrap().verify(|_| {}).unwrap();
        assert!(damage.is_empty(), "{what}: {damage:?}");
    }
    let (success, digest) = outcome(spawn(folder, way, NOWHERE, 0));
    assert!(success, "{what}: the run could not be resumed");
    assert_eq!(digest.as_deref(), Some(expected), "{what}");
}

fn expected(way: usize) -> String {
    train(Config { clip: config(way).clip, ..Config::default() }, BLOCKS, STEPS).unwrap().1
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_kill_at_an_operation_of_the_disk_costs_no_bit() {
    use FaultPoint::*;
    let rows: [(FaultPoint, &[u64]); 8] = [
        (Allocate, &[0, 5]),
        (Read, &[0, 30]),
        (Write, &[1, 30, 90]),
        (Sync, &[0, 3, 5, 9]),
        (SaveDocument, &[0, 1, 3]),
        (Rename, &[0, 1, 3]),
        (SyncDirectory, &[0, 1, 2, 4]),
        (LoadDocument, &[0]),
    ];
    for way in PAIRS_OF_SETTINGS {
        let expected = expected(way);
        for (point, indices) in rows {
            let mut kills = 0;
            for &nth in indices {
                let folder = folder();
                let what = format!("way {way}, killed at {point:?} {nth}");
                let (success, digest) = outcome(spawn(folder.path(), way, number_of(point), nth));
                if success {
                    // This way has fewer operations of the kind.
                    assert_eq!(digest.as_ref(), Some(&expected), "{what}");
                } else {
                    kills += 1;
                    complete(folder.path(), way, &expected, &what);
                }
            }
            // Without anything on disk, nothing is read from it.
            let at_least =
                if point == Read && config(way).placement == Placement::All(Tier::Host) { 0 } else { 1 };
            assert!(kills >= at_least, "way {way} was never killed at {point:?}");
        }
    }
}

#[test]
fn a_kill_while_a_commit_is_opened_costs_no_bit() {
    use FaultPoint::*;
    for way in 0..8 {
        let folder = folder();
        // In the last of these the second commit is in place, and nobody was told.
        assert!(!outcome(spawn(folder.path(), way, number_of(SyncDirectory), 2)).0, "way {way}");
        for (point, nth) in [(LoadDocument, 0), (Open, 0), (Open, 1), (Open, 3), (Allocate, 0), (Read, 0)] {
            let (success, _) = outcome(spawn(folder.path(), way, number_of(point), nth));
            // A way that makes no more files when it goes on is completed by this.
            assert!(!success || matches!(point, Allocate | Read), "way {way}: no kill at {point:?} {nth}");
        }
        complete(folder.path(), way, &expected(way), &format!("way {way}, killed while it was opened"));
    }
}

/// Kills with SIGKILL right after a step was told, whatever the other threads do at that moment.
#[test]
fn a_kill_at_any_moment_costs_no_bit() {
    for number in 0..16 {
        let way = number % 8;
        let folder = folder();
        let mut child = spawn(folder.path(), way, NOWHERE, 0);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let step = format!("step {}", number as u64 % STEPS);
        assert!(lines.any(|line| line.unwrap() == step), "the child did not come to {step}");
        child.kill().unwrap();
        child.wait().unwrap();
        complete(folder.path(), way, &expected(way), &format!("way {way}, killed after {step}"));
    }
}

/// The files of a folder, not those of folders in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_file()).collect()
}

fn copy_files(from: &Path, into: &Path) {
    for file in files(from) {
        std::fs::copy(&file, into.join(file.file_name().unwrap())).unwrap();
    }
}

/// Pages that the power took back, and those that were there all the same.
#[derive(Default, Debug)]
struct Pages {
    lost: usize,
    kept: usize,
}

/// The power goes: each page of states that was written since `durable` was copied is there or is as it was, as luck has it.
fn lose_pages(folder: &Path, durable: &Path, luck: &mut impl FnMut(u64) -> u64) -> Pages {
    let mut pages = Pages::default();
    for name in ["state-a.bin", "state-b.bin"] {
        let (path, before) = (folder.join(name), std::fs::read(durable.join(name)).unwrap());
        let mut now = std::fs::read(&path).unwrap();
        for (page, before) in now.chunks_mut(PAGE_BYTES).zip(before.chunks(PAGE_BYTES)) {
            match page == before {
                true => {}
                false if luck(2) == 0 => pages.kept += 1,
                false => {
                    page.copy_from_slice(before);
                    pages.lost += 1;
                }
            }
        }
        std::fs::write(&path, now).unwrap();
    }
    pages
}

/// Children that commit, and whose power goes with the process: what was not yet durable is there, or not, or in part.
#[test]
fn a_power_loss_costs_no_bit() {
    use FaultPoint::*;
    let mut draws = 0;
    let random = ferrozero_kernels::philox::Stream::new(7, "power");
    let mut luck = |below: u64| {
        draws += 1;
        random.integer(draws) % below
    };
    let mut all = Pages::default();
    // In the middle of the writes between two commits, the first of which comes later where there are fewer.
    for (way, writes) in [(0, [120, 180]), (3, [270, 330]), (5, [60, 80])] {
        let expected = expected(way);
        // And at each step of the second commit.
        let commit = [(Sync, 6), (SaveDocument, 3), (Rename, 1), (SyncDirectory, 2)];
        for (point, nth) in writes.map(|nth| (Write, nth)).into_iter().chain(commit) {
            let (folder, durable) = (folder(), folder());
            let what = format!("way {way}, power lost at {point:?} {nth}");
            let child =
                command(folder.path(), way, number_of(point), nth).env(DURABLE, durable.path()).spawn();
            assert!(!outcome(child.unwrap()).0, "{what}: it came to its end");
            assert!(durable.path().join("manifest.json").exists(), "{what}: before the first commit");
            match point {
                Write | Sync => {
                    let Pages { lost, kept } = lose_pages(folder.path(), durable.path(), &mut luck);
                    (all.lost, all.kept) = (all.lost + lost, all.kept + kept);
                }
                // The data is durable, the new manifest is not.
                SaveDocument | Rename => {
                    let new =
                        std::fs::OpenOptions::new().write(true).open(folder.path().join("manifest.json.new"));
                    let new = new.unwrap();
                    new.set_len(luck(new.metadata().unwrap().len() + 1)).unwrap();
                }
                // The new manifest is in place, or is not: the rename is not yet durable.
                _ if luck(2) == 0 => {
                    let [from, into] = [&durable, &folder].map(|each| each.path().join("manifest.json"));
                    std::fs::copy(from, into).unwrap();
                }
                _ => {}
            }
            complete(folder.path(), way, &expected, &what);
        }
    }
    println!("{all:?}");
    assert!(all.lost > 100 && all.kept > 100, "{all:?}");
}

/// So that the test above would see a commit that names what is not yet durable.
#[test]
fn a_disk_that_loses_what_a_commit_names_is_found() {
    let (folder, durable) = (folder(), folder());
    let child = command(folder.path(), 0, number_of(FaultPoint::SyncDirectory), 2)
        .env(DURABLE, durable.path())
        .spawn();
    assert!(!outcome(child.unwrap()).0);
    let lost = lose_pages(folder.path(), durable.path(), &mut |_| 1).lost;
    let damage = ferrozero::Checkpoint::open(folder.path()).unwrap().verify(|_| {}).unwrap();
    assert!(lost > 0 && !damage.is_empty(), "{lost} pages were lost and nobody said so");
}

/// Many kills in one run, at operations and moments by chance; then the next run.
#[test]
#[ignore = "long: scripts/crash_soak"]
fn soak() {
    let kills_wanted: u64 = std::env::var(KILLS).map_or(500, |kills| kills.parse().unwrap());
    let random = ferrozero_kernels::philox::Stream::new(std::process::id().into(), "kills");
    let mut draws = 0;
    let mut draw = |below: u64| {
        draws += 1;
        random.integer(draws) % below
    };
    let (mut kills, mut runs) = (0, 0);
    while kills < kills_wanted {
        let way = draw(40) as usize;
        let folder = folder();
        for _ in 0..1 + draw(6) {
            let chance = draw(3);
            if chance == 0 {
                let point = 1 + draw(POINTS.len() as u64 - 1) as usize;
                let nth = draw([1, 400, 800, 24, 16, 8, 8, 4, 8][point]);
                kills += u64::from(!outcome(spawn(folder.path(), way, point, nth)).0);
            } else {
                let mut child = spawn(folder.path(), way, NOWHERE, 0);
                let delay = std::time::Duration::from_micros(draw(150_000));
                let (sender, receiver) = std::sync::mpsc::channel::<()>();
                // Nothing is ever sent: a wait that ends by itself.
                let _ = receiver.recv_timeout(delay);
                drop(sender);
                kills += u64::from(child.try_wait().unwrap().is_none());
                if chance == 1 {
                    rename_under(child, folder.path());
                    continue;
                }
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
        complete(folder.path(), way, &expected(way), &format!("soak, run {runs}, way {way}"));
        runs += 1;
        if runs % 10 == 0 {
            println!("{kills} kills in {runs} runs");
        }
    }
    println!("{kills} kills in {runs} runs: every run ended with the bits of one that was never killed");
}

/// Renames the folder of a child, which ends at its next commit, and gives it its name back.
fn rename_under(child: Child, folder: &Path) {
    let aside = folder.with_extension("aside");
    std::fs::rename(folder, &aside).unwrap();
    let status = child.wait_with_output().unwrap().status;
    assert_eq!(status.signal(), None);
    // A child that had not opened its folder yet has begun another run under its name.
    let _ = std::fs::remove_dir_all(folder);
    std::fs::rename(&aside, folder).unwrap();
}

/// What a child finds when it was killed before its first commit: no checkpoint, and it can start anew.
#[test]
fn without_a_commit_there_is_nothing_to_resume_and_a_new_start_works() {
    let folder = folder();
    let killed = outcome(spawn(folder.path(), 0, number_of(FaultPoint::Write), 3));
    assert!(!killed.0);
    let config = Config { directory: Some(folder.path().to_owned()), resume: true, ..config(0) };
    let error = Engine::new(config).map(drop).unwrap_err().to_string();
    assert!(error.contains("commit"), "{error}");
    complete(folder.path(), 0, &expected(0), "a new start");
}
