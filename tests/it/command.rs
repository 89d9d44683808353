//! The command as a user meets it: what it prints, what it refuses, and how it goes on.

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// `ferrozero train` of a small model on a small text.
fn train(folder: &Path, options: &[&str]) -> Output {
    let data = folder.join("data.txt");
    if !data.exists() {
        let text: String = (0..3000).map(|i| format!("{i} squared is {}.\n", i * i)).collect();
        std::fs::write(&data, text).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder).args(["train", "--json", "--layers", "2", "--hidden", "32", "--heads", "2"]);
    command.args(["--seq", "16", "--batch", "2", "--warmup", "2", "--sample", "8", "--memory", "96MiB"]);
    if !options.contains(&"--data") {
        command.args(["--data", "data.txt"]);
    }
    command.args(options).output().unwrap()
}

fn objects(output: &Output) -> Vec<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let lines = String::from_utf8(output.stdout.clone()).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The message of a run that must fail.
fn refusal(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it was not refused");
    assert!(errors.contains("error: "), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

#[test]
fn a_step_is_an_object_and_the_last_one_is_the_summary() {
    let folder = folder();
    let objects = objects(&train(folder.path(), &["--steps", "6", "--eval-every", "3"]));
    assert_eq!(objects.len(), 7);
    for (index, object) in objects[..6].iter().enumerate() {
        assert_eq!(object["step"], index + 1);
        for key in ["loss", "tokens_per_s", "step_s", "exposed_stall", "lr", "grad_norm"] {
            assert!(object[key].as_f64().unwrap() >= 0.0, "{key}");
        }
    }
    assert!(objects[2]["validation_loss"].is_number());
    let summary = &objects[6];
    assert_eq!(summary["summary"], true);
    for key in
        ["peak_host_bytes", "planned_host_bytes", "peak_device_bytes", "planned_device_bytes", "disk_bytes"]
    {
        assert!(summary[key].as_u64().unwrap() > 0, "{key}");
    }
    for key in ["predicted_step_s", "measured_step_s"] {
        assert!(summary[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(summary["weights_digest"].as_str().unwrap().len(), 64);
    assert!(summary["sample"].as_str().unwrap().starts_with("fn main()"));
    assert!(objects[5]["loss"].as_f64() < objects[0]["loss"].as_f64());
}

#[test]
fn resuming_goes_on_with_the_settings_and_the_bits_of_the_run() {
    let whole = folder();
    let expected = objects(&train(whole.path(), &["--steps", "6", "--seed", "5", "--lr", "0.01"]));
    let halves = folder();
    // The learning rate's schedule is over the steps of the whole run, so the first half is a run that is
    // stopped.
    let first = ["--steps", "6", "--seed", "5", "--lr", "0.01", "--commit-every", "3"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    objects(&train(halves.path(), &first));
    // The whole run is there; taking its last commit away is what the crash tests are for. Going on changes
    // nothing:
    let again = objects(&train(halves.path(), &["--resume"]));
    assert_eq!(again.len(), 1, "all steps were made");
    assert_eq!(again[0]["weights_digest"], expected[6]["weights_digest"]);
    child.args(["train", "--resume", "--dir", "ferrozero-run", "--steps", "9", "--json", "--sample", "0"]);
    let longer = objects(&child.current_dir(halves.path()).output().unwrap());
    assert_eq!(longer[0]["step"], 7, "layers, width, data and seed come from the checkpoint");
    assert_eq!(longer.len(), 4);
}

#[test]
fn a_signal_commits_and_stops_and_the_rest_gives_the_bits_of_an_unbroken_run() {
    let whole = folder();
    let expected = objects(&train(whole.path(), &["--steps", "40"]));
    let folder = folder();
    train(folder.path(), &["--steps", "1", "--warmup", "1", "--dir", "other"]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferrozero"))
        .current_dir(folder.path())
        .args([
            "train", "--json", "--layers", "2", "--hidden", "32", "--heads", "2", "--seq", "16", "--batch",
            "2",
        ])
        .args(["--warmup", "2", "--sample", "8", "--memory", "96MiB", "--data", "data.txt", "--steps", "40"])
        .args(["--trace", "trace.json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // After the first step it is training, and the handler is in place.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    lines.next().unwrap().unwrap();
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let last = lines.map(Result::unwrap).last().unwrap();
    assert!(child.wait().unwrap().success());
    let summary: Value = serde_json::from_str(&last).unwrap();
    assert_eq!(summary["summary"], true);
    let trace = std::fs::read_to_string(folder.path().join("trace.json")).unwrap();
    let events: Vec<Value> = serde_json::from_str(&trace).unwrap();
    assert!(events.iter().any(|event| event["name"] == "commit"), "the last operation is there");
    let resumed = objects(&train(folder.path(), &["--resume"]));
    assert_eq!(resumed.last().unwrap()["weights_digest"], expected.last().unwrap()["weights_digest"]);
}

#[test]
fn memory_and_files_do_not_change_the_weights() {
    let folder = folder();
    let digest = |options: &[&str]| {
        let objects = objects(&train(folder.path(), options));
        (objects.last().unwrap()["weights_digest"].clone(), objects[0]["loss"].clone())
    };
    let roomy = digest(&["--steps", "3", "--memory", "4GiB", "--dir", "roomy"]);
    assert_eq!(digest(&["--steps", "3", "--memory", "40MiB", "--dir", "narrow"]), roomy);
    assert_eq!(digest(&["--steps", "3", "--threads", "1", "--dir", "one"]), roomy);
}

#[test]
fn what_is_overridden_changes_no_bit_and_is_what_the_plan_says() {
    let folder = folder();
    let run = |options: &[&str]| {
        let output = train(folder.path(), &[&["--steps", "3"], options].concat());
        let digest = objects(&output).last().unwrap()["weights_digest"].clone();
        (digest, String::from_utf8(output.stderr).unwrap())
    };
    let (expected, _) = run(&["--dir", "chosen"]);
    let overrides = [
        "--dir",
        "fixed",
        "--placement",
        "disk,disk,disk,host",
        "--boundaries",
        "disk",
        "--slots",
        "1",
        "--look-ahead",
        "2",
        "--state-pieces",
        "4",
        "--gradient-sets",
        "1",
        "--updates",
        "at-once",
        "--piece",
        "8KiB",
    ];
    let (digest, said) = run(&overrides);
    assert_eq!(digest, expected);
    for part in ["slots (2)", "updates are made at once", "boundary activations"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let refused = refusal(&train(folder.path(), &["--dir", "other", "--clip", "0", "--updates", "at-once"]));
    assert!(refused.contains("leave updates out"), "{refused}");
    let resumed = refusal(&train(folder.path(), &["--dir", "fixed", "--resume", "--piece", "16KiB"]));
    assert!(resumed.contains("pieces of 8192 bytes") && resumed.contains("--piece"), "{resumed}");
}

#[test]
fn bad_input_is_refused_with_what_to_do() {
    let folder = folder();
    let refused = |options: &[&str], parts: &[&str]| {
        let message = refusal(&train(folder.path(), options));
        for part in parts {
            assert!(message.contains(part), "{options:?}: {message}");
        }
    };
    std::fs::write(folder.path().join("empty.txt"), "").unwrap();
    std::fs::write(folder.path().join("short.txt"), "short").unwrap();
    std::fs::write(folder.path().join("broken.json"), "{ \"layers\": ").unwrap();
    std::fs::write(folder.path().join("unknown.json"), "{ \"layer\": 2 }").unwrap();
    refused(&["--data", "missing.txt"], &["missing.txt", "No such file"]);
    refused(&["--data", "empty.txt"], &["no text in empty.txt", "--data"]);
    refused(&["--data", "short.txt"], &["5 tokens", "--seq"]);
    refused(&["--config", "broken.json"], &["broken.json", "not valid JSON"]);
    refused(&["--config", "unknown.json"], &["unknown.json", "unknown field `layer`", "layers"]);
    refused(&["--tokenizer", "missing.json"], &["missing.json"]);
    refused(&["--memory", "2MiB"], &["The least that works is", "h.0", "--memory"]);
    refused(&["--dir", "/proc/ferrozero"], &["/proc/ferrozero"]);
    refused(&["--hidden", "33"], &["multiple of heads"]);
}

#[test]
fn a_vocabulary_that_differs_on_resume_is_refused_and_the_checkpoint_stays() {
    let folder = folder();
    let first = objects(&train(folder.path(), &["--steps", "3"]));
    // A tokenizer of three words.
    let tokenizer = r#"{ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": { "[UNK]": 0, "squared": 1, "is": 2 },
            "unk_token": "[UNK]" } }"#;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    let message = refusal(&train(folder.path(), &["--resume", "--tokenizer", "tokenizer.json"]));
    assert!(
        message.contains("wte.weight") && message.contains("[256, 32]") && message.contains("[3, 32]"),
        "{message}"
    );
    let fresh = refusal(&train(folder.path(), &[]));
    assert!(fresh.contains("already holds a checkpoint") && fresh.contains("--resume"), "{fresh}");
    let again = objects(&train(folder.path(), &["--resume"]));
    assert_eq!(again[0]["weights_digest"], first[3]["weights_digest"]);
    // And with the tokenizer from the start, it trains.
    let words =
        objects(&train(folder.path(), &["--tokenizer", "tokenizer.json", "--steps", "2", "--dir", "words"]));
    assert_eq!(words.len(), 3);
}

#[test]
fn a_runs_folder_is_inspected_verified_copied_exported_and_imported() {
    let folder = folder();
    let trained = objects(&train(
        folder.path(),
        &["--steps", "2", "--warmup", "1", "--dir", "run", "--stripe", "disk-2", "--stripe", "disk-3"],
    ));
    let run = |arguments: &[&str]| {
        let binary = env!("CARGO_BIN_EXE_ferrozero");
        let output = Command::new(binary).current_dir(folder.path()).args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert!(folder.path().join("disk-3").join("state-a.bin").exists(), "both stripes are used");
    let (success, text) = run(&["inspect", "run", "--json"]);
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert!(success && summary["step"] == 2, "{text}");
    assert!(run(&["verify", "run"]).1.contains("are as the commit says"));
    assert!(run(&["copy", "run", "copy"]).1.contains("after step 2"));
    assert!(run(&["export", "copy", "copy.safetensors"]).0);
    assert!(run(&["import", "copy.safetensors", "imported"]).1.contains("--resume --dir imported"));
    let resumed = |dir: &str| objects(&train(folder.path(), &["--resume", "--dir", dir, "--steps", "2"]));
    for dir in ["run", "copy"] {
        assert_eq!(resumed(dir)[0]["weights_digest"], trained[2]["weights_digest"], "{dir}");
    }
    for place in ["state-a.bin", "state-b.bin"] {
        let path = folder.path().join("copy").join(place);
        let damaged: Vec<u8> = std::fs::read(&path).unwrap().iter().map(|byte| byte ^ 1).collect();
        std::fs::write(path, damaged).unwrap();
    }
    let (success, text) = run(&["verify", "copy"]);
    assert!(!success && text.contains("damaged: ") && text.contains("h.0."), "{text}");
}

#[test]
fn a_full_disk_is_told_before_the_first_step() {
    let folder = folder();
    let mount = folder.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "none"]).arg(&mount).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: no file system can be mounted here");
        return;
    }
    let output = train(folder.path(), &["--dir", "small/run", "--steps", "2", "--warmup", "1"]);
    let left = std::fs::read_dir(&mount).unwrap().count();
    assert!(Command::new("umount").arg(&mount).status().unwrap().success());
    let message = refusal(&output);
    assert!(message.contains("small/run") && message.contains("bytes"), "{message}");
    assert_eq!(left, 0, "nothing half made is left");
}

#[test]
fn help_names_every_option_and_gives_examples() {
    let output = Command::new(env!("CARGO_BIN_EXE_ferrozero")).args(["train", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    for option in [
        "config",
        "data",
        "tokenizer",
        "steps",
        "layers",
        "hidden",
        "heads",
        "seq",
        "batch",
        "accumulate",
        "memory",
        "device-memory",
        "dir",
        "seed",
        "lr",
        "warmup",
        "clip",
        "eval-every",
        "resume",
        "json",
    ] {
        assert!(help.contains(&format!("--{option}")), "{option}");
    }
    assert!(help.contains("Examples:"));
}

#[test]
fn the_disk_is_measured_without_fio_and_nothing_is_left_behind() {
    let folder = folder();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder.path()).env("PATH", "");
    command.args(["bench", "io", "--json", "--rounds", "2", "--bytes", "1MiB", "--bytes", "13MiB"]);
    let objects = objects(&command.output().unwrap());
    let [result] = &objects[..] else { panic!("{objects:?}") };
    assert!(result["fio_missing"].as_str().unwrap().contains("fio cannot be started"), "{result}");
    let rows = result["rows"].as_array().unwrap();
    let sweeps: Vec<_> = rows.iter().map(|row| row["sweep"].as_str().unwrap()).collect();
    assert_eq!(sweeps, ["read", "write", "update", "read", "write", "update"]);
    for row in rows {
        assert!(row["store_bytes_per_s"]["median"].as_f64().unwrap() > 0.0 && row["fio"].is_null(), "{row}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_measured_process_ends_when_nobody_asks_it_for_steps_any_more() {
    let folder = folder();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder.path()).args(["bench", "step", "--serve", "--placement", "disk"]);
    command.args(["--layers", "2", "--hidden", "32", "--heads", "2", "--vocab", "64", "--seq", "8"]);
    let footprint = objects(&command.stdin(Stdio::null()).output().unwrap());
    assert_eq!(footprint.len(), 1, "no step was asked for");
    assert!(footprint[0]["disk_bytes"].as_u64().unwrap() > 0, "{footprint:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    // Nor does it go on when nobody reads what it writes.
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut requests = child.stdin.take().unwrap();
    while requests.write_all(b"step\n").is_ok() {}
    assert!(!child.wait().unwrap().success());
}

/// The program with these arguments.
fn ferrozero(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferrozero")).current_dir(folder).args(arguments).output().unwrap()
}

#[test]
fn a_plan_for_a_described_machine_is_an_object_and_one_that_cannot_be_says_what_would() {
    let folder = folder();
    let described = ["plan", "--model", "gpt2", "--device", "rtx4090-24g", "--json", "--host"];
    let plan = |host: &'static str| ferrozero(folder.path(), &[&described[..], &[host]].concat());
    let answer = objects(&plan("16GiB")).remove(0);
    assert_eq!(answer["parameters"], 123_751_680, "positions are those of --seq");
    assert!(answer["tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(answer["host_bytes"].as_u64().unwrap() <= 16 << 30);
    assert!(refusal(&plan("4MiB")).contains("The least that works is"));
    let without_machine = refusal(&ferrozero(folder.path(), &["plan"]));
    assert!(without_machine.contains("ferrozero probe"), "{without_machine}");
}

#[test]
fn a_plan_takes_the_name_of_a_device_for_a_machine_and_says_what_it_assumes() {
    let folder = folder();
    let plan = |options: &[&str]| {
        let output = ferrozero(folder.path(), &[&["plan", "--model", "gpt2"], options].concat());
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said)
    };
    let (success, named) = plan(&["--machine", "h100-80g"]);
    assert!(success && named.contains("160.00 GiB of host memory, which is assumed: say --host"), "{named}");
    assert!(named.contains("without a drive"), "{named}");
    assert_eq!(plan(&["--device", "h100-80g"]).1, named);
    let (success, said) = plan(&["--machine", "h100-80g", "--host", "64GiB", "--nvme", "nvme-gen4"]);
    assert!(success && !said.contains("assumed") && !said.contains("without a drive"), "{said}");
    let (success, unknown) = plan(&["--machine", "h1000"]);
    assert!(!success && unknown.contains("ferrozero probe") && unknown.contains("h100-80g"), "{unknown}");
    let (success, lost) = plan(&["--host", "64GiB"]);
    assert!(!success && lost.contains("--device"), "{lost}");
}

/// A machine without a GPU, as `ferrozero probe` would write it.
fn write_machine(folder: &Path) {
    let machine = serde_json::json!({
        "host_memory_bytes": 8_u64 << 30,
        "disk_read_bytes_per_s": 1e9,
        "disk_write_bytes_per_s": 1e9,
        "upload_bytes_per_s": 6e9,
        "download_bytes_per_s": 6e9,
        "optimizer_bytes_per_s": 2e10,
        "matmul_f32_flop_per_s": 1e11,
    });
    std::fs::write(folder.join("machine.json"), machine.to_string()).unwrap();
}

#[test]
fn what_a_plan_says_to_do_next_has_what_was_asked_for() {
    let folder = folder();
    write_machine(folder.path());
    let asked = "plan --layers 2 --hidden 64 --heads 2 --seq 32 --batch 2 --memory 64MiB --no-clip \
                 --in-place --slots 1 --placement disk";
    let plan = |more: &[&str]| {
        let arguments: Vec<&str> = asked.split_whitespace().chain(more.iter().copied()).collect();
        ferrozero(folder.path(), &arguments)
    };
    let output = plan(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let next = said.strip_prefix("next: ferrozero ").unwrap_or_else(|| panic!("{said}"));
    for part in ["--memory 64MiB", "--clip 0", "--in-place", "--slots 1", "--placement disk"] {
        assert!(next.contains(part), "{part}: {next}");
    }
    // It is a command that runs.
    let options: Vec<&str> = next.split_whitespace().skip(1).collect();
    assert_eq!(objects(&train(folder.path(), &[&options[..], &["--steps", "2"]].concat())).len(), 3);
    let words = String::from_utf8_lossy(&plan(&["--vocabulary", "5000"]).stderr).into_owned();
    assert!(words.contains("--tokenizer FILE"), "{words}");
    let refused = refusal(&plan(&["--device-memory", "1GiB"]));
    assert!(refused.contains("--device-memory") && refused.contains("--memory"), "{refused}");
}

#[test]
fn the_largest_model_for_some_sequences_is_that_of_their_smallest_micro_batch() {
    let folder = folder();
    write_machine(folder.path());
    let scale = |options: &str| {
        let fixed = "bench scale --json --grants 64MiB --hidden 64 --heads 2 --seq 256";
        let arguments: Vec<&str> = fixed.split(' ').chain(options.split(' ')).collect();
        let answer = objects(&ferrozero(folder.path(), &arguments)).remove(0);
        answer["rows"][0]["parameters"].as_u64().unwrap()
    };
    assert!(scale("--sequences 4") > scale("--batch 4"));
    assert_eq!(scale("--sequences 4"), scale("--batch 1 --accumulate 4"));
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let folder = folder();
    let output = ferrozero(folder.path(), &["man"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for page in ["ferrozero", "ferrozero-train", "ferrozero-bench-predict", "ferrozero-config-explain"] {
        assert!(text.contains(&format!(".TH {page} 1 ")), "{page}");
    }
    assert!(
        text.contains("look\\-ahead") && !text.contains(".TH ferrozero-help"),
        "options have their place"
    );
}

#[test]
fn a_configuration_of_deepspeeds_is_explained_and_an_unknown_key_of_it_refused_by_its_path() {
    let folder = folder();
    let file = folder.path().join("ds_config.json");
    let explain = |text: &str| {
        std::fs::write(&file, text).unwrap();
        ferrozero(folder.path(), &["config", "explain", "ds_config.json"])
    };
    let explained = explain(r#"{ "gradient_clipping": 0.5, "zero_optimization": { "stage": 3 } }"#);
    let text = String::from_utf8_lossy(&explained.stdout).into_owned();
    assert!(
        explained.status.success() && text.contains("clip = 0.5") && text.contains("not needed, because")
    );
    let refused = refusal(&explain(r#"{ "zero_optimization": { "stage": 3, "unheard_of": 1 } }"#));
    assert!(refused.contains("zero_optimization.unheard_of"), "{refused}");
    for (text, part) in [
        (r#"{ "zero_optimization": { "stage": 3 }, "train_micro_batch_size_per_gpu": -2 }"#, "-2"),
        (
            r#"{ "gradient_clipping": 1.0, "optimizer": { "type": "AdamW", "params": { "lr": -1.0 } } }"#,
            "lr is -1",
        ),
    ] {
        let output = explain(text);
        assert!(refusal(&output).contains(part), "{text}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("as settings of ferrozero"), "told first");
    }
}

#[test]
fn a_run_is_planned_with_the_machine_that_was_probed_for_its_folder() {
    let folder = folder();
    let seconds = |options: &[&str]| {
        let output = train(folder.path(), &[&["--steps", "2"], options].concat());
        objects(&output);
        let said = String::from_utf8(output.stderr).unwrap();
        let line = said.lines().find(|line| line.contains("predicted, ")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let seconds = words.iter().position(|word| *word == "s").unwrap();
        words[seconds - 1].parse::<f64>().unwrap()
    };
    assert!(seconds(&["--dir", "one"]) < 100.0);
    // A machine that takes days for an update.
    let probed = std::fs::canonicalize(folder.path()).unwrap().join("two");
    let machine = serde_json::json!({
        "directory": probed,
        "disk_read_bytes_per_s": 1e9,
        "disk_write_bytes_per_s": 1e9,
        "upload_bytes_per_s": 1e9,
        "download_bytes_per_s": 1e9,
        "optimizer_bytes_per_s": 1.0,
    });
    std::fs::write(folder.path().join("machine.json"), machine.to_string()).unwrap();
    assert!(seconds(&["--dir", "two"]) > 1000.0);
    assert!(seconds(&["--dir", "three"]) < 100.0, "another folder may be another disk");
}
