//! A driver that fails leaves the last commit, and memory that runs out is tried for once more.

use super::{folder, homes, on_cuda, runs_at_once, tokens, train, trainer};
use candle_core::DType;
use ferrozero::testing::{CudaCall, CudaFailure, CudaFault, CudaLane};
use ferrozero::{BackendChoice, Config, Error, Tier, Trainer};
use std::path::Path;

const BLOCKS: usize = 1;
/// Where every number would take long, in the modes that run nothing at once: these are in all parts of a
/// run.
const SOME: [u64; 4] = [0, 5, 23, 47];

/// Two steps, the first committed.
fn two_steps(config: Config) -> ferrozero::Result<Trainer> {
    let (mut trainer, model) = trainer(config, BLOCKS)?;
    trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch)))?;
    trainer.commit(serde_json::Value::Null)?;
    trainer.step(|micro_batch| model.loss(&tokens(1, micro_batch)))?;
    Ok(trainer)
}

/// Resumes, makes the second step, and answers the digest; none where nothing was committed.
fn resumed(config: Config) -> Option<String> {
    match trainer(Config { resume: true, ..config }, BLOCKS) {
        Ok((mut trainer, model)) => {
            assert_eq!(trainer.steps(), 1);
            trainer.step(|micro_batch| model.loss(&tokens(1, micro_batch))).unwrap();
            Some(trainer.weights_digest().unwrap())
        }
        Err(error) => {
            assert!(error.to_string().contains("holds no commit"), "{error}");
            None
        }
    }
}

/// A run in which every call is made.
fn config(base: &Config, directory: &Path, call: CudaCall) -> Config {
    let of_device = matches!(call, CudaCall::Launch | CudaCall::Fetch | CudaCall::Wait(CudaLane::Optimizer));
    Config {
        directory: Some(directory.to_owned()),
        backend: BackendChoice::Auto,
        boundaries: Some(Tier::Host),
        clip: Some(0.05),
        piece_bytes: Some(16384),
        ..Config { device: base.device.clone(), ..homes(if of_device { Tier::Device } else { Tier::Disk }) }
    }
}

#[test]
fn every_call_of_the_driver_may_fail_and_the_last_commit_goes_on() {
    let Some(base) = on_cuda() else { return };
    let folder = folder();
    for call in CudaCall::ALL {
        let of = |name: &str| config(&base, &folder.path().join(format!("{call:?} {name}")), call);
        let expected = two_steps(of("expected")).unwrap().weights_digest().unwrap();
        let (mut failures, mut resumes, mut unharmed) = (0, 0, 0);
        let indices: Vec<u64> = if runs_at_once() { (0..10_000).collect() } else { SOME.to_vec() };
        for index in indices {
            let fault = CudaFault { call, index, how: CudaFailure::Error };
            let config = of(&index.to_string());
            match two_steps(Config { cuda_fault: Some(fault), ..config.clone() }) {
                // The run has fewer calls. One alone may be of its end, where nothing can be done about it.
                Ok(_) => {
                    unharmed += 1;
                    if unharmed > 2 {
                        break;
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("a fault that a test asked for"), "{call:?} {index}: {error}");
                    failures += 1;
                }
            }
            if let Some(found) = resumed(config.clone()) {
                resumes += 1;
                assert_eq!(found, expected, "{call:?} {index}");
            }
            let _ = std::fs::remove_dir_all(config.directory.unwrap());
        }
        println!("{call:?}: {failures} failed, {resumes} of them after the commit");
        assert!(failures > 0, "no {call:?} failed");
    }
}

#[test]
fn a_device_out_of_memory_is_asked_once_more_after_the_pool_gave_back_what_it_keeps() {
    let Some(base) = on_cuda() else { return };
    let config =
        || Config { device: base.device.clone(), boundaries: Some(Tier::Host), ..homes(Tier::Device) };
    let expected = train(config(), BLOCKS, 2).unwrap();
    let run = |index: u64, times: u64| {
        let how = CudaFailure::OutOfMemory { times };
        let cuda_fault = Some(CudaFault { call: CudaCall::Allocate, index, how });
        let config = Config { cuda_fault, ..config() };
        let (mut trainer, model) = trainer(config, BLOCKS)?;
        let mut losses = vec![];
        for step in 0..2 {
            losses.push(trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch)))?.loss);
        }
        let trims = trainer.device_counter().read().trims;
        Ok::<_, Error>((trims, (losses, trainer.weights_digest()?)))
    };
    let (mut index, mut tried) = (0, 0);
    loop {
        let (trims, found) = run(index, 1).unwrap();
        assert_eq!(found, expected, "allocation {index}");
        if trims == 0 {
            break;
        }
        assert_eq!(trims, 1, "allocation {index}");
        match run(index, 2) {
            Err(Error::DeviceMemory { free_bytes, reason, .. }) => {
                assert!(free_bytes > 0 && reason.contains("OUT_OF_MEMORY"), "allocation {index}: {reason}");
            }
            other => panic!("allocation {index}: {:?}", other.map(|_| ())),
        }
        // In the modes that run nothing at once, some.
        index += if runs_at_once() { 1 } else { 5 };
        tried += 1;
    }
    assert!(tried > 1, "slots, homes and statistics are allocated");
}

#[test]
fn a_model_that_takes_more_than_the_device_has_is_told_what_the_plan_counts() {
    let Some(base) = on_cuda() else { return };
    let device = base.device.clone();
    let (mut trainer, model) = trainer(base, 1).unwrap();
    trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
    // More than any device has.
    let large = |_| candle_core::Tensor::zeros(1 << 46, DType::F32, &device);
    match trainer.step(large) {
        Err(Error::DeviceMemory { planned_bytes, used_bytes, free_bytes, .. }) => {
            assert_eq!(planned_bytes, trainer.plan().device_bytes());
            assert!(used_bytes > 0 && free_bytes > 0);
        }
        other => panic!("{:?}", other.map(|report| report.loss)),
    }
}
