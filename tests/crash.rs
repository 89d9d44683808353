//! A kill at any instant costs at most the steps since the last commit, and resuming gives the bits of a run that was
//! never killed. A child process trains; it ends at an operation of its disk tier, or is killed at any moment; another
//! one goes on, until the run is complete.
//!
//! The long form: `scripts/crash_soak`.

mod support;

use ferrozero::{BackendChoice, Config, Engine, Fault, FaultKind, FaultPlan, FaultPoint, Placement, Tier};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use support::{tokens, train, trainer};

const BLOCKS: usize = 2;
const STEPS: u64 = 8;

/// Set in a child, to the number of its way to train and the operation at which it ends.
const CHILD: &str = "FERROZERO_CRASH_CHILD";
/// Folder of the run.
const FOLDER: &str = "FERROZERO_CRASH_FOLDER";
/// Signal by which a child ends at an operation.
const ABORTED: i32 = 6;
/// Kills of the soak.
const KILLS: &str = "FERROZERO_CRASH_KILLS";

const POINTS: [FaultPoint; 6] = [
    FaultPoint::Allocate,
    FaultPoint::Read,
    FaultPoint::Write,
    FaultPoint::Sync,
    FaultPoint::SaveDocument,
    // The new manifest is in place, and nobody was told.
    FaultPoint::SyncDirectory,
];

/// A way to train: what differs must not matter.
fn config(way: usize) -> Config {
    Config {
        backend: [BackendChoice::Auto, BackendChoice::Pool][way % 2],
        clip: [None, Some(0.05)][way / 2 % 2],
        placement: [Placement::All(Tier::Disk), Placement::All(Tier::Host)][way / 4 % 2].clone(),
        piece_bytes: Some(8192),
        ..Config::default()
    }
}

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
    let directory = std::path::PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let resume = directory.join("manifest.json").exists();
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
            match way % 3 {
                0 => trainer.commit(serde_json::Value::Null).map(drop).unwrap(),
                _ => trainer.commit_behind(serde_json::Value::Null).unwrap(),
            }
        }
    }
    trainer.commit(serde_json::Value::Null).unwrap();
    println!("\ndigest {}", trainer.weights_digest().unwrap());
}

fn spawn(folder: &Path, way: usize, point: usize, nth: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env(CHILD, format!("{way} {point} {nth}"))
        .env(FOLDER, folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
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
    let (success, digest) = outcome(spawn(folder, way, POINTS.len(), 0));
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
    let mut kills = 0;
    let indices: [&[u64]; POINTS.len()] = [&[0], &[0, 30], &[1, 30, 90], &[0, 3], &[0, 1, 3], &[0, 1]];
    for way in 0..8 {
        let expected = expected(way);
        for (point, nth) in
            (0..POINTS.len()).flat_map(|point| indices[point].iter().map(move |&nth| (point, nth)))
        {
            let folder = folder();
            let what = format!("way {way}, killed at {:?} {nth}", POINTS[point]);
            let (success, digest) = outcome(spawn(folder.path(), way, point, nth));
            if success {
                // This way has fewer operations of the kind.
                assert_eq!(digest.as_ref(), Some(&expected), "{what}");
            } else {
                kills += 1;
                complete(folder.path(), way, &expected, &what);
            }
        }
    }
    println!("{kills} kills");
    assert!(kills >= 40, "only {kills} kills");
}

/// Kills with SIGKILL right after a step was told, whatever the other threads do at that moment.
#[test]
fn a_kill_at_any_moment_costs_no_bit() {
    for number in 0..16 {
        let way = number % 8;
        let folder = folder();
        let mut child = spawn(folder.path(), way, POINTS.len(), 0);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let step = format!("step {}", number as u64 % STEPS);
        assert!(lines.any(|line| line.unwrap() == step), "the child did not come to {step}");
        child.kill().unwrap();
        child.wait().unwrap();
        complete(folder.path(), way, &expected(way), &format!("way {way}, killed after {step}"));
    }
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
            if draw(2) == 0 {
                let point = 1 + draw(POINTS.len() as u64 - 1) as usize;
                let nth = draw([1, 400, 800, 8, 4, 4][point]);
                kills += u64::from(!outcome(spawn(folder.path(), way, point, nth)).0);
            } else {
                let mut child = spawn(folder.path(), way, POINTS.len(), 0);
                let delay = std::time::Duration::from_micros(draw(150_000));
                let (sender, receiver) = std::sync::mpsc::channel::<()>();
                // Nothing is ever sent: a wait that ends by itself.
                let _ = receiver.recv_timeout(delay);
                drop(sender);
                kills += u64::from(child.try_wait().unwrap().is_none());
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

/// What a child finds when it was killed before its first commit: no checkpoint, and it can start anew.
#[test]
fn without_a_commit_there_is_nothing_to_resume_and_a_new_start_works() {
    let folder = folder();
    let killed = outcome(spawn(folder.path(), 0, 2, 3));
    assert!(!killed.0);
    let config = Config { directory: Some(folder.path().to_owned()), resume: true, ..config(0) };
    let error = Engine::new(config).map(drop).unwrap_err().to_string();
    assert!(error.contains("commit"), "{error}");
    complete(folder.path(), 0, &expected(0), "a new start");
}
