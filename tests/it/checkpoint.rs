//! The state on disk is the checkpoint: it can be looked at, checked, exported and made without the model,
//! and it is committed behind the next step.

use crate::support::{tokens, train, trainer};
use ferrozero::{Checkpoint, Config, Error, Placement, Tier, import_safetensors};
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCKS: usize = 3;
const PIECE_BYTES: usize = 8192;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn config(directory: &Path) -> Config {
    Config {
        directory: Some(directory.to_owned()),
        placement: Placement::All(Tier::Disk),
        piece_bytes: Some(PIECE_BYTES),
        ..Config::default()
    }
}

/// Trains and commits in `directory`.
fn committed(directory: &Path, steps: u64) {
    let (mut trainer, model) = trainer(config(directory), BLOCKS).unwrap();
    for step in 0..steps {
        trainer.step(|_| model.loss(&tokens(step, 0))).unwrap();
    }
    trainer.commit(serde_json::json!({ "position": steps })).unwrap();
}

#[test]
fn a_summary_tells_groups_step_and_homes() {
    let folder = folder();
    committed(folder.path(), 2);
    let summary = Checkpoint::open(folder.path()).unwrap().summary();
    assert_eq!((summary.generation, summary.step), (1, 2));
    assert_eq!(summary.user, serde_json::json!({ "position": 2 }));
    let names: Vec<_> = summary.groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["h.0", "h.1", "h.2", "resident"]);
    assert_eq!(summary.groups[0].homes.unwrap().master, Tier::Disk);
    assert_eq!(
        summary.groups[3].homes.unwrap().master,
        Tier::Device,
        "resident parameters stay on the device"
    );
    assert_eq!(summary.parameters, summary.groups.iter().map(|group| group.parameters).sum::<u64>());
}

#[test]
fn verifying_finds_a_flipped_bit_and_names_its_parameter() {
    let folder = folder();
    committed(folder.path(), 1);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mut read_bytes = 0;
    assert!(checkpoint.verify(|bytes| read_bytes += bytes).unwrap().is_empty());
    assert_eq!(read_bytes, checkpoint.state_bytes());
    drop(checkpoint);
    // The first bytes of both places belong to the first extent, the parameters of h.0.
    for place in ["state-a.bin", "state-b.bin"] {
        let file =
            std::fs::OpenOptions::new().read(true).write(true).open(folder.path().join(place)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 100).unwrap();
        file.write_all_at(&[byte[0] ^ 4], 100).unwrap();
    }
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let damage = checkpoint.verify(|_| {}).unwrap();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert_eq!((damage[0].extent.as_str(), damage[0].piece), ("h.0/master parameter", 0));
    assert_eq!(damage[0].parameters, ["h.0.up"]);
    assert!(checkpoint.parameter("h.0.up").is_err());
    assert!(checkpoint.parameter("h.1.up").is_ok());
    let exported = checkpoint.export_safetensors(&folder.path().join("out.safetensors"));
    assert!(exported.unwrap_err().to_string().contains("h.0/master parameter"));
    assert!(!folder.path().join("out.safetensors").exists());
}

#[test]
fn what_is_exported_and_imported_again_has_the_same_bits_and_trains() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    committed(&path("run"), 2);
    Checkpoint::open(&path("run")).unwrap().export_safetensors(&path("run.safetensors")).unwrap();
    import_safetensors(&path("run.safetensors"), &path("imported")).unwrap();
    let resumed = |name: &str| {
        let config = Config { resume: true, ..config(&path(name)) };
        trainer(config, BLOCKS).unwrap()
    };
    let (original, _) = resumed("run");
    let (mut imported, model) = resumed("imported");
    assert_eq!((original.steps(), imported.steps()), (2, 0));
    assert_eq!(original.weights_digest().unwrap(), imported.weights_digest().unwrap());
    imported.step(|_| model.loss(&tokens(2, 0))).unwrap();
    assert_ne!(original.weights_digest().unwrap(), imported.weights_digest().unwrap());
    drop(imported);
    let again = import_safetensors(&path("run.safetensors"), &path("imported")).unwrap_err();
    assert!(matches!(again, Error::CheckpointExists { .. }), "{again}");
}

/// Striped, in place, copied from one to the other: the same bits.
#[test]
fn states_over_several_folders_and_in_place_change_nothing_and_can_be_copied() {
    let expected = train(Config::default(), BLOCKS, 4).unwrap().1;
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let stripes = vec![path("disk-2"), path("disk-3")];
    let striped = Config {
        stripes: stripes.clone(),
        boundaries: Some(Tier::Disk),
        clip: Some(1e9),
        ..config(&path("striped"))
    };
    let in_place = Config { in_place: true, ..config(&path("in-place")) };
    for (config, other_stripes, other_in_place) in [(striped, vec![], true), (in_place, stripes, false)] {
        let directory = config.directory.clone().unwrap();
        let (mut first, model) = trainer(config, BLOCKS).unwrap();
        for step in 0..2 {
            first.step(|_| model.loss(&tokens(step, 0))).unwrap();
        }
        first.commit(serde_json::Value::Null).unwrap();
        drop(first);
        let copy = directory.with_extension("copy");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let other_stripes = other_stripes.iter().map(|stripe| stripe.with_extension("copy")).collect();
        checkpoint.copy_to(&copy, other_stripes, other_in_place).unwrap();
        drop(checkpoint);
        for directory in [directory, copy] {
            let config = Config { resume: true, ..self::config(&directory) };
            let (mut second, model) = trainer(config, BLOCKS).unwrap();
            for step in 2..4 {
                second.step(|_| model.loss(&tokens(step, 0))).unwrap();
            }
            assert_eq!(second.weights_digest().unwrap(), expected, "{}", directory.display());
        }
    }
}

#[test]
fn files_that_cannot_be_imported_are_refused_by_name() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    committed(&path("run"), 1);
    Checkpoint::open(&path("run")).unwrap().export_safetensors(&path("whole.safetensors")).unwrap();
    let whole = std::fs::read(path("whole.safetensors")).unwrap();
    std::fs::write(path("cut.safetensors"), &whole[..whole.len() - 1]).unwrap();
    std::fs::write(path("head.safetensors"), &whole[..20]).unwrap();
    std::fs::write(path("empty.safetensors"), "").unwrap();
    std::fs::write(path("text.safetensors"), "All work and no play makes Jack a dull boy.").unwrap();
    for (name, expected) in [
        ("cut", "bytes"),
        ("head", "table of contents"),
        ("empty", "shorter"),
        ("text", "table of contents"),
        ("missing", "No such file"),
    ] {
        let file = path(&format!("{name}.safetensors"));
        let error = import_safetensors(&file, &path("imported")).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(name), "{name}: {error}");
        assert!(!path("imported").exists(), "{name}: nothing is left behind");
    }
}

#[test]
fn a_commit_behind_the_next_step_holds_the_step_at_which_it_was_asked_for() {
    for clip in [None, Some(0.05)] {
        let config = |directory: &Path| Config { clip, ..config(directory) };
        let expected = train(Config { clip, ..Config::default() }, BLOCKS, 6).unwrap().1;
        let folder = folder();
        let (mut first, model) = trainer(config(folder.path()), BLOCKS).unwrap();
        for step in 0..3 {
            first.step(|_| model.loss(&tokens(step, 0))).unwrap();
            first.commit_behind(serde_json::json!({ "position": step + 1 })).unwrap();
        }
        // What was committed stays, and what followed is lost, as it is after a kill.
        first.step(|_| model.loss(&tokens(99, 0))).unwrap();
        drop(first);
        let config = Config { resume: true, ..config(folder.path()) };
        let (mut second, model) = trainer(config, BLOCKS).unwrap();
        assert_eq!(second.steps(), 3);
        for step in 3..6 {
            second.step(|_| model.loss(&tokens(step, 0))).unwrap();
        }
        assert_eq!(second.weights_digest().unwrap(), expected, "clip {clip:?}");
    }
}
