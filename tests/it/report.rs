//! What a run leaves to be read: its log, the page that is made of it, and TensorBoard's events; and that a
//! command which is asked to be quiet is.

use ferrozero::internals::observe::run_log::{FILE, History, Record};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn ferrozero(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferrozero")).current_dir(folder).args(arguments).output().unwrap()
}

/// What it wrote on standard output and standard error.
fn success(output: &Output) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8(bytes.clone()).unwrap());
    assert!(output.status.success(), "{out}{err}");
    (out, err)
}

/// Trains a small model.
fn train(folder: &Path, options: &[&str]) -> (String, String) {
    let text: String = (0..3000).map(|i| format!("{i} squared is {}.\n", i * i)).collect();
    std::fs::write(folder.join("data.txt"), text).unwrap();
    let fixed =
        "train --layers 2 --hidden 32 --heads 2 --seq 16 --batch 2 --warmup 1 --sample 8 --memory 40MiB";
    let arguments = fixed.split(' ').chain(["--data", "data.txt", "--dir", "run"]);
    success(&ferrozero(folder, &arguments.chain(options.iter().copied()).collect::<Vec<_>>()))
}

fn steps(history: &History) -> Vec<u64> {
    history.steps.iter().map(|step| step.step).collect()
}

#[test]
fn a_log_has_every_step_once_also_after_a_kill_and_a_resume() {
    let folder = folder();
    let run = folder.path().join("run");
    train(folder.path(), &["--steps", "4"]);
    let whole = History::read(&run).unwrap();
    assert_eq!(steps(&whole), [1, 2, 3, 4]);
    assert!(whole.summary.is_some());
    // What a kill leaves: a step that no commit keeps, and a line cut short.
    let lines = std::fs::read_to_string(run.join(FILE)).unwrap();
    let fourth = lines.lines().find(|line| line.contains("\"step\":4,")).unwrap();
    let lost = fourth.replace("\"step\":4,", "\"step\":5,");
    let mut file = std::fs::OpenOptions::new().append(true).open(run.join(FILE)).unwrap();
    write!(file, "{lost}\n{}", &lost[..lost.len() / 2]).unwrap();
    assert_eq!(steps(&History::read(&run).unwrap()), [1, 2, 3, 4, 5]);
    train(folder.path(), &["--steps", "6", "--resume"]);
    let resumed = History::read(&run).unwrap();
    assert_eq!(steps(&resumed), [1, 2, 3, 4, 5, 6]);
    assert_eq!(resumed.steps[..4], whole.steps[..]);
    assert_ne!(resumed.steps[4].loss, whole.steps[3].loss, "the step that was lost was made again");
    assert_eq!((resumed.processes, resumed.start.after_step), (2, 4));
}

#[test]
fn a_log_says_what_was_planned_predicted_and_used() {
    let folder = folder();
    let (out, said) = train(folder.path(), &["--steps", "4", "--eval-every", "2", "--json"]);
    let history = History::read(&folder.path().join("run")).unwrap();
    let objects: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 5);
    for (step, object) in history.steps.iter().zip(&objects) {
        let object: Record = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(object, Record::Step(step.clone()), "the log and --json tell the same");
        assert!(step.busy_s.values().all(|&busy_s| busy_s <= step.step_s * 1.000001), "{step:?}");
        assert!(step.peak_host_bytes <= history.start.planned_host_bytes);
    }
    assert!(history.steps[1].validation_loss.is_some());
    let host: u64 = history.start.plan.iter().map(|row| row.host_bytes).sum();
    assert!(0 < host && host <= history.start.planned_host_bytes);
    let predicted_s = history.start.prediction.unwrap().step_s;
    assert_eq!(history.summary.unwrap().predicted_step_s, Some(predicted_s), "what the plan predicted");
    for part in
        [format!("{predicted_s:.3} s a step predicted"), format!("the plan had predicted {predicted_s:.3} s")]
    {
        assert!(said.contains(&part), "{part}: {said}");
    }
    let timeline = history.timeline.unwrap();
    assert_eq!(timeline.step, 2);
    let held = |of: fn(&ferrozero::internals::observe::occupancy::Occupancy) -> u64| {
        timeline.occupancy.iter().map(of).max().unwrap()
    };
    assert!(held(|level| level.device_bytes) <= history.start.planned_device_bytes);
    let host = held(|level| level.host_bytes);
    assert!(0 < host && host <= history.start.planned_host_bytes);
    let within = |s: f64| (0.0..=timeline.step_s * 1.000001).contains(&s);
    assert!(timeline.spans.iter().all(|span| within(span.start_s) && within(span.end_s)));
    for name in ["forward", "backward"] {
        let groups: Vec<_> = timeline.spans.iter().filter(|span| span.name == name).collect();
        assert_eq!(groups.len(), 2, "{name} of each segment");
    }
}

#[test]
fn a_page_is_made_of_the_log_and_what_is_no_run_is_refused_with_what_to_do() {
    let folder = folder();
    train(folder.path(), &["--steps", "3", "--quiet"]);
    let (out, err) = success(&ferrozero(folder.path(), &["report", "run", "-o", "page.html"]));
    assert!(out.contains("3 steps of run are in page.html"), "{out}");
    assert_eq!(err, "next: open page.html in a browser\n", "and no colours where there is no terminal");
    let page = std::fs::read_to_string(folder.path().join("page.html")).unwrap();
    for part in [
        "<!DOCTYPE html>",
        "GPT, 2 blocks of width 32",
        "backward, h.1",
        "Over step 2",
        "slots (",
        "prefers-color-scheme",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let refused = |arguments: &[&str]| {
        let output = ferrozero(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["report", "nowhere"]).contains("ferrozero train"));
    assert!(refused(&["report", "run", "-o", "missing/page.html"]).contains("missing/page.html"));
    std::fs::write(folder.path().join("run").join(FILE), "{\"record\":\"step\"}\n").unwrap();
    assert!(refused(&["report", "run"]).contains("run/log.jsonl, line 1"));
}

#[test]
fn a_quiet_run_says_nothing_and_writes_all_it_should() {
    let folder = folder();
    let quiet = train(folder.path(), &["--steps", "3", "--quiet", "--tensorboard", "events"]);
    assert_eq!(quiet, (String::new(), String::new()));
    assert_eq!(steps(&History::read(&folder.path().join("run")).unwrap()), [1, 2, 3]);
    let events = std::fs::read_dir(folder.path().join("events")).unwrap().next().unwrap().unwrap().path();
    let events = std::fs::read(events).unwrap();
    for scalar in
        ["loss", "learning_rate", "gradient_norm", "tokens_per_s", "exposed_stall", "validation_loss"]
    {
        assert!(events.windows(scalar.len()).any(|window| window == scalar.as_bytes()), "{scalar}");
    }
    let (_, err) = success(&ferrozero(folder.path(), &["report", "run", "--quiet"]));
    assert_eq!(err, "");
}

#[test]
fn the_engine_tells_what_it_does_where_the_environment_asks_for_it() {
    let folder = folder();
    train(folder.path(), &["--steps", "2"]);
    let resume = |filter: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        let options = "train --dir run --resume --steps 3 --warmup 1 --quiet --sample 0";
        command
            .current_dir(folder.path())
            .env("FERROZERO_LOG", filter)
            .args(options.split(' '))
            .output()
            .unwrap()
    };
    let wrong = resume("loud=very");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("FERROZERO_LOG"));
    let (out, err) = success(&resume("ferrozero=trace"));
    assert_eq!(out, "");
    for part in ["step{step=3}", "operation=\"backward\"", "queue=\"optimizer\"", "commit"] {
        assert!(err.contains(part), "{part}: {err}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_a_command_without_a_panic() {
    let script = "\"$0\" completions bash | head -n 1; echo \"${PIPESTATUS[0]}\"";
    let output = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_ferrozero")]).output().unwrap();
    let (out, err) = success(&output);
    // As all programs that SIGPIPE ends; or it was done before the reader went.
    assert!(["141", "0"].contains(&out.lines().last().unwrap()), "{out}{err}");
    assert_eq!(err, "");
}

#[test]
fn a_run_says_what_to_do_next() {
    let folder = folder();
    let (_, err) = train(folder.path(), &["--steps", "2"]);
    assert!(err.ends_with("next: ferrozero report run -o report.html\n"), "{err}");
    let described = [
        "plan",
        "--layers",
        "2",
        "--hidden",
        "64",
        "--heads",
        "2",
        "--device",
        "rtx4090-24g",
        "--host",
        "16GiB",
    ];
    let (_, err) = success(&ferrozero(folder.path(), &described));
    assert!(err.contains("next: ") && err.contains("ferrozero probe"), "{err}");
    let (_, err) = success(&ferrozero(folder.path(), &[&described[..], &["--quiet"]].concat()));
    assert_eq!(err, "");
}
