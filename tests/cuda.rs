//! Promises on a CUDA device: where never changes what, the numbers are those of the CPU device, a run resumes on either,
//! and a failing driver leaves the last commit. Runs on a GPU, or on a software driver that reorders streams.
#![cfg(feature = "cuda")]

mod support;

use candle_core::{DType, Device};
use ferrozero::arrangement::GroupPlacement;
use ferrozero::{BackendChoice, Config, CudaCall, CudaFault, CudaLane, Placement, Tier, Trainer};
use support::{engine_model, tokens, train, trainer};

const BLOCKS: usize = 3;

/// A configuration for the device; none, with the reason printed, where there is no device.
fn on_cuda() -> Option<Config> {
    match ferrozero::open_device("cuda:0") {
        Ok(device) => Some(Config { device, ..homes(Tier::Host) }),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn homes(tier: Tier) -> Config {
    Config {
        placement: Placement::All(tier),
        piece_bytes: Some(8192),
        backend: BackendChoice::Memory,
        ..Config::default()
    }
}

/// Every way to place and move the state that a device with memory of its own has.
fn ways(base: &Config) -> Vec<(String, Config)> {
    let base = |tier| Config { device: base.device.clone(), dtype: base.dtype, ..homes(tier) };
    let mut ways: Vec<_> =
        [Tier::Host, Tier::Disk, Tier::Device].map(|tier| (tier.to_string(), base(tier))).to_vec();
    ways.push(("device, 1 slot".into(), Config { slots: Some(1), ..base(Tier::Device) }));
    for (slots, look_ahead) in [(1, 1), (1, 5), (3, 2)] {
        let config = Config { slots: Some(slots), look_ahead: Some(look_ahead), ..base(Tier::Disk) };
        ways.push((format!("{slots} slots, {look_ahead} pieces ahead"), config));
    }
    for boundaries in [Tier::Host, Tier::Disk] {
        let config = Config { boundaries: Some(boundaries), ..base(Tier::Disk) };
        ways.push((format!("boundaries on {boundaries}"), config));
    }
    for piece_bytes in [4096, 1 << 20] {
        let config = Config { piece_bytes: Some(piece_bytes), ..base(Tier::Disk) };
        ways.push((format!("pieces of {piece_bytes}"), config));
    }
    let mixed = GroupPlacement {
        master: Tier::Host,
        first_moment: Tier::Disk,
        second_moment: Tier::Host,
        gradient: Tier::Disk,
    };
    ways.push(("mixed".to_owned(), Config { placement: Placement::Each(mixed), ..base(Tier::Host) }));
    ways
}

fn one_digest(dtype: DType, clip: Option<f64>, accumulate: usize) {
    let Some(base) = on_cuda() else { return };
    let mut expected = None;
    for (name, config) in ways(&Config { dtype, ..base }) {
        let found = train(Config { clip, accumulate, ..config }, BLOCKS, 2);
        let found = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(&found, expected.get_or_insert(found.clone()), "{name}");
    }
}

#[test]
fn one_digest_without_clipping() {
    one_digest(DType::F32, None, 1);
}

#[test]
fn one_digest_with_clipping_over_two_micro_batches() {
    one_digest(DType::F32, Some(0.05), 2);
}

#[test]
fn one_digest_in_f16() {
    one_digest(DType::F16, None, 1);
}

#[test]
fn one_digest_in_bf16() {
    one_digest(DType::BF16, Some(0.05), 1);
}

#[test]
fn ten_steps_have_the_losses_of_the_cpu_device() {
    let Some(base) = on_cuda() else { return };
    let (expected, _) = train(Config::default(), 2, 10).unwrap();
    assert!(expected[9] < expected[0]);
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        let config = Config { device: base.device.clone(), dtype, ..homes(Tier::Disk) };
        let (found, _) = train(config, 2, 10).unwrap();
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() <= tolerance * expected.abs(), "{dtype:?}: {found}, {expected}");
        }
    }
}

#[test]
fn no_copy_of_the_engine_makes_the_host_wait_for_memory_that_is_not_pinned() {
    let Some(base) = on_cuda() else { return };
    let config = Config { device: base.device, boundaries: Some(Tier::Host), ..homes(Tier::Disk) };
    let (mut trainer, model) = trainer(config, BLOCKS).unwrap();
    for step in 0..2 {
        trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
    }
    assert_eq!(trainer.pageable_copies(), 0);
}

/// Steps `from..to` in a folder, committed at the end.
fn run(config: &Config, from: u64, to: u64) -> ferrozero::Result<String> {
    let (mut trainer, model) = trainer(Config { resume: from > 0, ..config.clone() }, BLOCKS)?;
    assert_eq!(trainer.steps(), from);
    for step in from..to {
        trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch)))?;
    }
    trainer.commit(serde_json::Value::Null)?;
    trainer.weights_digest()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_run_resumes_with_the_same_bits_and_on_the_other_device_too() {
    let Some(base) = on_cuda() else { return };
    let folder = folder();
    let config = |device: &Device, tier, name: &str| Config {
        device: device.clone(),
        directory: Some(folder.path().join(name)),
        backend: BackendChoice::Auto,
        clip: Some(0.05),
        ..homes(tier)
    };
    let whole = run(&config(&base.device, Tier::Disk, "whole"), 0, 4).unwrap();
    run(&config(&base.device, Tier::Disk, "parts"), 0, 2).unwrap();
    assert_eq!(run(&config(&base.device, Tier::Host, "parts"), 2, 4).unwrap(), whole);
    run(&config(&base.device, Tier::Device, "on the device"), 0, 2).unwrap();
    assert_eq!(run(&config(&base.device, Tier::Device, "on the device"), 2, 4).unwrap(), whole);

    let (cpu, cuda) = (Device::Cpu, &base.device);
    for (first, second) in [(&cpu, cuda), (cuda, &cpu)] {
        let name = format!("{:?}", first.location());
        let stored = run(&config(first, Tier::Disk, &name), 0, 2).unwrap();
        let resumed = Config { resume: true, ..config(second, Tier::Disk, &name) };
        assert_eq!(trainer(resumed.clone(), BLOCKS).unwrap().0.weights_digest().unwrap(), stored);
        run(&resumed, 2, 3).unwrap();
    }
}

/// Two steps, the first committed.
fn two_steps(config: Config) -> ferrozero::Result<Trainer> {
    let (mut trainer, model) = trainer(config, BLOCKS)?;
    trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch)))?;
    trainer.commit(serde_json::Value::Null)?;
    trainer.step(|micro_batch| model.loss(&tokens(1, micro_batch)))?;
    Ok(trainer)
}

#[test]
fn a_failing_driver_is_an_error_and_leaves_the_last_commit() {
    let Some(base) = on_cuda() else { return };
    let folder = folder();
    let config = |name: &str, tier| Config {
        device: base.device.clone(),
        directory: Some(folder.path().join(name)),
        backend: BackendChoice::Auto,
        boundaries: Some(Tier::Host),
        clip: Some(0.05),
        ..homes(tier)
    };
    let expected = run(&config("expected", Tier::Disk), 0, 1).unwrap();
    for call in CudaCall::ALL {
        let tier = if call == CudaCall::Wait(CudaLane::Optimizer) { Tier::Device } else { Tier::Disk };
        let config = |name: &str| config(name, tier);
        let mut failures = 0;
        // Every call would take long; these are in all parts of a run.
        for index in [0, 1, 2, 5, 11, 23, 47, 95] {
            let name = format!("{call:?} {index}");
            let fault = Some(CudaFault { call, index, forgotten: false });
            let ended = two_steps(Config { cuda_fault: fault, ..config(&name) });
            let Err(error) = ended else { continue };
            failures += 1;
            assert!(error.to_string().contains("a fault that a test asked for"), "{name}: {error}");
            // Whatever is committed is whole: nothing, or the first step.
            match trainer(Config { resume: true, ..config(&name) }, BLOCKS) {
                Ok((trainer, _)) => assert_eq!(trainer.weights_digest().unwrap(), expected, "{name}"),
                Err(error) => assert!(error.to_string().contains("holds no commit"), "{name}: {error}"),
            }
        }
        assert!(failures > 0, "no {call:?} failed");
    }
}

#[test]
fn parameters_of_another_device_than_the_engines_are_refused() {
    let Some(base) = on_cuda() else { return };
    let engine = ferrozero::Engine::new(base).unwrap();
    engine_model(&engine, 1).unwrap();
    let elsewhere = engine.var_builder().set_device(Device::Cpu);
    let error = elsewhere.get(3, "elsewhere").unwrap_err().to_string();
    assert!(error.contains("elsewhere") && error.contains("Cpu"), "{error}");
}

/// What the software driver says of the runs below is read from a file of theirs, named like this.
const RACES: &str = "SIMCUDA_RACE_FILE";
const FORGOTTEN: &str = "FERROZERO_TEST_FORGOTTEN_WAIT";

fn lane(name: &str) -> CudaLane {
    match name {
        "upload" => CudaLane::Upload,
        "download" => CudaLane::Download,
        "optimizer" => CudaLane::Optimizer,
        _ => CudaLane::Compute,
    }
}

/// Runs in a process of its own, which [`a_wait_that_is_forgotten_is_seen`] starts.
#[test]
#[ignore = "part of another test"]
fn forgets_a_wait() {
    let Some(base) = on_cuda() else { return };
    let forgotten = std::env::var(FORGOTTEN).unwrap_or_default();
    let fault = forgotten.split_once(' ').map(|(name, index)| CudaFault {
        call: CudaCall::Wait(lane(name)),
        index: index.parse().unwrap(),
        forgotten: true,
    });
    let boundaries = Some(Tier::Host);
    let tier = if forgotten.starts_with("optimizer") { Tier::Device } else { Tier::Disk };
    let config = Config { device: base.device, slots: Some(1), boundaries, cuda_fault: fault, ..homes(tier) };
    // Wrong numbers may stop it.
    let _ = train(config, BLOCKS, 1);
}

/// The proof that the runs above would have found a missing order between streams: the same engine without one wait.
#[test]
fn a_wait_that_is_forgotten_is_seen() {
    if std::env::var(RACES).is_err() {
        println!("skipped: only the software driver sees which accesses are not ordered");
        return;
    }
    let folder = folder();
    let sees = |forgotten: &str| {
        let races = folder.path().join(forgotten);
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "forgets_a_wait", "--ignored"])
            .env(FORGOTTEN, forgotten)
            .env(RACES, &races)
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        std::fs::metadata(races).is_ok_and(|file| file.len() > 0)
    };
    assert!(!sees("none"), "no wait is forgotten");
    for name in ["compute", "upload", "download", "optimizer"] {
        let seen: Vec<usize> = (0..12).filter(|index| sees(&format!("{name} {index}"))).collect();
        println!("forgotten waits of the {name} stream that were seen: {seen:?} of 12");
        assert!(!seen.is_empty(), "{name}");
    }
}
