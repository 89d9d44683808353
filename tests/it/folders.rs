//! The folder of a run, as commands meet it: it is the one that was opened, it may be a stranger's, and what
//! is read is not written. The store's own side is in `offload/tests/folders.rs`.

use ferrozero_offload::{
    Arena, BackendChoice, Budget, ExtentKind, ExtentSpec, Store, StoreOptions, Ticket, Tier,
};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// `ferrozero train` of a small model on a small text, in `folder`.
fn training(folder: &Path, options: &[&str]) -> Command {
    let text: String = (0..3000).map(|i| format!("{i} squared is {}.\n", i * i)).collect();
    fs::write(folder.join("data.txt"), text).unwrap();
    let fixed =
        "train --layers 2 --hidden 32 --heads 2 --seq 16 --batch 2 --warmup 1 --sample 0 --memory 40MiB";
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder).args(fixed.split(' ')).args(["--data", "data.txt"]).args(options);
    command
}

fn train(folder: &Path, options: &[&str]) -> Output {
    training(folder, options).output().unwrap()
}

fn ferrozero(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferrozero")).current_dir(folder).args(arguments).output().unwrap()
}

/// What it wrote on standard output and standard error.
#[track_caller]
fn success(output: &Output) -> String {
    let text =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    assert!(output.status.success(), "{:?}: {text}", output.status);
    text
}

/// The message of a command that ended with an error of its own.
#[track_caller]
fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: ") && !text.contains("panicked"), "{text}");
    text
}

/// Names, sizes and times of change of everything below a folder.
fn listing(path: &Path) -> Vec<(PathBuf, u64, i64, i64)> {
    let mut found = vec![];
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        if metadata.is_dir() {
            found.extend(listing(&path));
        }
        found.push((path, metadata.len(), metadata.ctime(), metadata.ctime_nsec()));
    }
    found.sort();
    found
}

#[test]
fn resume_works_from_the_first_start_on_and_refuses_a_folder_of_another_kind() {
    let folder = folder();
    let begins = "holds no commit yet: the run starts from the beginning";
    let text = success(&train(folder.path(), &["--steps", "2", "--resume", "--dir", "run"]));
    assert!(text.contains(begins), "{text}");
    let text = success(&train(folder.path(), &["--steps", "3", "--resume", "--dir", "run"]));
    assert!(!text.contains(begins), "{text}");
    // What is left of a run that was killed before its first commit.
    let killed = folder.path().join("killed");
    let specs = vec![ExtentSpec { name: "h.0/master".into(), bytes: 10_000, kind: ExtentKind::State }];
    drop(Store::create(&killed, specs, StoreOptions::default()).unwrap());
    let text = success(&train(folder.path(), &["--steps", "2", "--resume", "--dir", "killed"]));
    assert!(text.contains(begins), "{text}");
    success(&ferrozero(folder.path(), &["verify", "killed"]));
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "mine").unwrap();
    let before = listing(&other);
    let text = refusal(&train(folder.path(), &["--steps", "2", "--resume", "--dir", "other"]));
    assert!(text.contains("other") && text.contains("thesis.tex"), "{text}");
    assert_eq!(listing(&other), before);
}

#[test]
fn a_run_and_its_planning_touch_nothing_else_in_their_folder() {
    let folder = folder();
    // Runs under the names that a run, or its planning, may once have taken for its own.
    let runs = ["run/probe", "run/scratch"];
    for run in runs {
        success(&train(folder.path(), &["--steps", "2", "--dir", run]));
    }
    let listings = || runs.map(|run| listing(&folder.path().join(run)));
    let before = listings();
    success(&train(folder.path(), &["--steps", "2", "--dir", "run", "--placement", "disk"]));
    assert_eq!(listings(), before);
    let names: Vec<_> =
        fs::read_dir(folder.path().join("run")).unwrap().map(|e| e.unwrap().file_name()).collect();
    let own = [
        ".lock",
        "log.jsonl",
        "manifest.json",
        "state-a.bin",
        "state-b.bin",
        "scratch.bin",
        "probe",
        "scratch",
    ];
    assert!(names.iter().all(|name| own.iter().any(|own| name == *own)), "{names:?}");
}

/// Renamed after its second step, a run ends with an error that says where it is now, and everything is
/// there.
#[test]
fn a_folder_that_is_renamed_in_mid_run_ends_the_run_with_its_new_place() {
    let folder = folder();
    let options = ["--steps", "100000", "--json", "--commit-every", "1", "--dir", "run"];
    let mut child =
        training(folder.path(), &options).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        lines.next().unwrap().unwrap();
    }
    let moved = folder.path().join("moved");
    fs::rename(folder.path().join("run"), &moved).unwrap();
    let last = lines.map(Result::unwrap).last();
    let output = child.wait_with_output().unwrap();
    let text = refusal(&output);
    assert!(text.contains(moved.canonicalize().unwrap().to_str().unwrap()), "{text}");
    assert!(!folder.path().join("run").exists(), "nothing is made where the folder was");
    success(&ferrozero(folder.path(), &["verify", "moved"]));
    // The steps that were told of, but for the last one or two, are committed.
    let told = last.map_or(2, |line| serde_json::from_str::<Value>(&line).unwrap()["step"].as_u64().unwrap());
    let inspected = success(&ferrozero(folder.path(), &["inspect", "--json", "moved"]));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert!(inspected["step"].as_u64().unwrap() + 2 >= told, "{told}: {inspected}");
}

/// The commit says that its folder is another run's. It is trained on in the folder where it was found.
#[test]
fn a_resume_stays_in_the_folder_whose_commit_it_found() {
    let folder = folder();
    let victim = folder.path().join("victim");
    success(&train(folder.path(), &["--steps", "2", "--dir", victim.to_str().unwrap()]));
    let found = folder.path().join("ferrozero-run");
    fs::create_dir(&found).unwrap();
    for entry in fs::read_dir(&victim).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), found.join(entry.file_name())).unwrap();
    }
    let before = listing(&victim);
    success(&ferrozero(folder.path(), &["train", "--resume", "--steps", "4"]));
    assert_eq!(listing(&victim), before);
    let text = success(&ferrozero(folder.path(), &["inspect", "ferrozero-run"]));
    assert!(text.contains("after step 4"), "{text}");
}

#[test]
fn a_log_that_is_a_link_or_a_fifo_leads_nowhere_and_hangs_nothing() {
    let folder = folder();
    let (run, victim) = (folder.path().join("run"), folder.path().join("victim"));
    let log = run.join("log.jsonl");
    fs::write(&victim, "mine").unwrap();
    let fifo = || assert!(Command::new("mkfifo").arg(&log).status().unwrap().success());
    fs::create_dir(&run).unwrap();
    for (number, put) in
        [&|| symlink(&victim, &log).unwrap() as (), &fifo as &dyn Fn()].into_iter().enumerate()
    {
        let _ = fs::remove_file(&log);
        put();
        let steps = (number + 1).to_string();
        let text = success(&train(folder.path(), &["--steps", &steps, "--resume", "--dir", "run"]));
        assert!(text.contains("notice: the run has no log") && text.contains("log.jsonl"), "{text}");
        let text = refusal(&ferrozero(folder.path(), &["report", "run"]));
        assert!(text.contains("log.jsonl") && text.contains("regular file"), "{text}");
    }
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
}

/// What a terminal would obey is shown as an escape, whoever chose the name.
#[test]
fn names_are_printed_so_that_a_terminal_does_not_obey_them() {
    let folder = folder();
    let name = "run\u{1b}[2J";
    for arguments in [["inspect", name], ["verify", name], ["report", name]] {
        let text = refusal(&ferrozero(folder.path(), &arguments));
        assert!(text.contains(r"\u{1b}[2J") && !text.contains('\u{1b}'), "{text:?}");
    }
    // Names of groups are those of the commit.
    success(&train(folder.path(), &["--steps", "1", "--dir", "run"]));
    rewrite(&folder.path().join("run"), &folder.path().join("odd"), 4 << 20, |text| {
        text.replace("h.0\"", "h\\u001b[31m.0\"").replace("h.0/", "h\\u001b[31m.0/")
    });
    let text = success(&ferrozero(folder.path(), &["inspect", "odd"]));
    assert!(text.contains(r"h\u{1b}[31m.0") && !text.contains('\u{1b}'), "{text:?}");
}

/// Makes a store of the last commit in another: with pieces of another size, and other words in what is said
/// of it.
fn rewrite(from: &Path, into: &Path, piece_bytes: usize, change: impl Fn(String) -> String) {
    let options = || StoreOptions { piece_bytes, backend: BackendChoice::Pool, ..StoreOptions::default() };
    let source = Store::open_to_read(from, options()).unwrap();
    // What JSON writes as an escape is one character of a name.
    let changed = |text: &str| change(format!("{text}/")).trim_end_matches('/').replace("\\u001b", "\u{1b}");
    let specs = source.extents().iter().map(|extent| {
        let spec = extent.spec.clone();
        ExtentSpec { name: changed(&spec.name), ..spec }
    });
    let target = Store::create(into, specs.collect(), options()).unwrap();
    let arena = Arena::new(&Budget::new(Tier::Host, 64 << 20), 64 << 20).unwrap();
    for extent in source.extents() {
        let (id, new_id) =
            (source.extent(&extent.spec.name).unwrap(), target.extent(&changed(&extent.spec.name)).unwrap());
        assert_eq!(source.piece_count(id).unwrap(), 1, "the model is small");
        let (ticket, on_done) = Ticket::new();
        source.read(id, 0, arena.lease(extent.spec.bytes as usize).unwrap(), on_done);
        let read = ticket.wait();
        read.result.unwrap();
        let (ticket, on_done) = Ticket::new();
        target.write(new_id, 0, read.lease, on_done);
        ticket.wait().result.unwrap();
    }
    let said = change(source.committed().unwrap().application.to_string());
    target.commit(serde_json::from_str(&said).unwrap()).unwrap();
}

/// Pieces of 1 GiB, by a manifest: what is read takes memory for what is there. The address space is what the
/// shell limits.
#[test]
fn long_pieces_take_no_more_memory_than_their_files_hold() {
    let folder = folder();
    success(&train(folder.path(), &["--steps", "1", "--dir", "run"]));
    rewrite(&folder.path().join("run"), &folder.path().join("long"), 1 << 30, |text| text);
    for arguments in ["verify long", "export long long.safetensors", "copy long copied"] {
        let line = format!("ulimit -v 3000000; exec '{}' {arguments}", env!("CARGO_BIN_EXE_ferrozero"));
        let output = Command::new("sh").current_dir(folder.path()).args(["-c", &line]).output().unwrap();
        success(&output);
    }
    success(&ferrozero(folder.path(), &["verify", "copied"]));
}

/// A commit whose parameters are larger than its files: refused, and neither a panic nor memory for them.
#[test]
fn a_commit_that_names_more_than_its_files_hold_is_refused() {
    let folder = folder();
    success(&train(folder.path(), &["--steps", "1", "--dir", "run"]));
    for (number, shape) in ["[4294967296,4294967296]", "[1048576,65536]", "[33]"].into_iter().enumerate() {
        let name = format!("odd-{number}");
        rewrite(&folder.path().join("run"), &folder.path().join(&name), 4 << 20, |text| {
            text.replacen("\"shape\":[32]", &format!("\"shape\":{shape}"), 1)
        });
        for command in ["inspect", "verify"] {
            // A shape that has room in the padding of its run is no more than its files hold.
            let output = ferrozero(folder.path(), &[command, &name]);
            if number < 2 {
                let text = refusal(&output);
                assert!(text.contains(&name) && text.contains("more than its files hold"), "{text}");
            } else {
                success(&output);
            }
        }
    }
}

#[test]
fn what_only_reads_works_on_a_read_only_folder_and_writes_nothing() {
    let folder = folder();
    success(&train(folder.path(), &["--steps", "2", "--dir", "run"]));
    let (run, seen) = (folder.path().join("run"), folder.path().join("seen"));
    fs::remove_file(run.join(".lock")).unwrap();
    fs::create_dir(&seen).unwrap();
    let mount = |arguments: &[&str]| {
        Command::new("mount").args(arguments).arg(&seen).output().is_ok_and(|output| output.status.success())
    };
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
        }
    }
    let is_mounted = mount(&["--bind", run.to_str().unwrap()]);
    let _mounted = is_mounted.then(|| Mounted(seen.clone()));
    let dir = if is_mounted && mount(&["-o", "remount,bind,ro"]) {
        "seen"
    } else {
        println!("nothing can be mounted here: the folder itself is read, and must stay as it is");
        "run"
    };
    let before = listing(&run);
    for arguments in [
        vec!["inspect", dir],
        vec!["verify", dir],
        vec!["export", dir, "out.safetensors"],
        vec!["copy", dir, "copied"],
        vec!["report", dir, "-o", "report.html"],
    ] {
        success(&ferrozero(folder.path(), &arguments));
    }
    assert_eq!(listing(&run), before);
}

/// The limit on the size of files ends a run with the file and its bytes, and not with a signal without a
/// word.
#[test]
fn a_limit_on_the_size_of_files_is_told() {
    let folder = folder();
    success(&train(folder.path(), &["--steps", "1", "--dir", "run"]));
    for (arguments, file) in [
        (
            "train --layers 1 --hidden 32 --heads 2 --seq 16 --steps 1 --warmup 1 --memory 40MiB --data data.txt --dir new",
            "the data's tokens",
        ),
        ("export run out.safetensors", "out.safetensors"),
    ] {
        let line = format!("ulimit -f 60; exec '{}' {arguments}", env!("CARGO_BIN_EXE_ferrozero"));
        let output = Command::new("sh").current_dir(folder.path()).args(["-c", &line]).output().unwrap();
        let text = refusal(&output);
        assert!(text.contains(file), "{text}");
    }
    assert!(!folder.path().join("out.safetensors").exists());
}
