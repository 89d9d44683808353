//! Promises on a CUDA device: where never changes what, the numbers are those of the CPU device, a run
//! resumes on either, and a failing driver leaves the last commit. Runs on a GPU, or on a software driver
//! that reorders streams.
#![cfg(feature = "cuda")]

mod faults;
mod homes;
mod orders;
mod overlap;
mod steady;
#[allow(dead_code, reason = "most of it at this file's sizes")]
#[path = "../support/mod.rs"]
mod support;

use candle_core::{DType, Device, Tensor};
use ferrozero::internals::models::gpt::{Block, Gpt, GptConfig};
use ferrozero::internals::schedule::buffer_plan::GroupPlacement;
use ferrozero::{AdamW, BackendChoice, Config, Engine, Placement, Segment, Tier, Trainer};
use support::Model;

const BLOCKS: usize = 3;
/// Half of what other tests have, and half of their tokens: a software driver interprets every instruction of
/// every thread.
const WIDTH: usize = 24;

fn tokens(step: u64, micro_batch: usize) -> Tensor {
    support::tokens(step, micro_batch).narrow(0, 0, 17).unwrap()
}

fn trainer(config: Config, blocks: usize) -> ferrozero::Result<(Trainer, Model<Segment<support::Block>>)> {
    let engine = Engine::new(config)?;
    let vb = engine.var_builder();
    let block = |i| engine.segment(vb.pp(format!("h.{i}")), |vb| support::Block::new(vb, WIDTH));
    let model = Model::new(&vb, WIDTH, (0..blocks).map(block).collect::<ferrozero::Result<_>>()?)?;
    let adamw = AdamW { learning_rate: 3e-3, ..AdamW::default() };
    let plan = engine.plan(adamw, |_| model.loss(&tokens(0, 0)))?;
    Ok((engine.trainer_from(plan)?, model))
}

/// Losses of some steps, and the digest of the weights after them.
fn train(config: Config, blocks: usize, steps: u64) -> ferrozero::Result<(Vec<f32>, String)> {
    let (mut trainer, model) = trainer(config, blocks)?;
    let step = |step| Ok(trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch)))?.loss);
    let losses = (0..steps).map(step).collect::<ferrozero::Result<_>>()?;
    Ok((losses, trainer.weights_digest()?))
}

/// Whether the driver runs each operation when it is enqueued, or is no software driver.
fn runs_at_once() -> bool {
    std::env::var("SIMCUDA_MODE").map_or(true, |mode| mode == "eager")
}

/// A configuration for the device; none, with the reason printed, where there is no device.
fn on_cuda() -> Option<Config> {
    match ferrozero::open_device("cuda:0") {
        Ok(device) => Some(Config { device, ..homes(Tier::Host) }),
        Err(error) if error.to_string().contains("CUDA_ERROR_NO_DEVICE") => {
            println!("skipped: this machine has no CUDA device");
            None
        }
        Err(error) => panic!("{error}"),
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
    // The plan's own depths, and others. The type that is computed in changes what is moved, not when.
    let depths = [None, Some((1, 1)), Some((1, 5)), Some((3, 2))];
    let depths = if base.dtype == DType::F32 { &depths[..] } else { &depths[..2] };
    let base = |tier| Config { device: base.device.clone(), dtype: base.dtype, ..homes(tier) };
    let mut ways = vec![];
    for tier in [Tier::Host, Tier::Disk, Tier::Device] {
        for depth in depths {
            let (slots, look_ahead) = depth.unzip();
            let name = format!("on {tier}, slots {slots:?}, pieces ahead {look_ahead:?}");
            ways.push((name, Config { slots, look_ahead, ..base(tier) }));
        }
    }
    for boundaries in [Tier::Host, Tier::Disk] {
        let config = Config { boundaries: Some(boundaries), ..base(Tier::Disk) };
        ways.push((format!("boundaries on {boundaries}"), config));
    }
    for (kept, boundaries) in [(1, Tier::Host), (BLOCKS, Tier::Disk)] {
        let config = Config { kept: Some(kept), boundaries: Some(boundaries), ..base(Tier::Disk) };
        ways.push((format!("{kept} graphs kept, boundaries on {boundaries}"), config));
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
        for vertical in 1..=accumulate {
            let config = Config { clip, accumulate, vertical: Some(vertical), ..config.clone() };
            let found = train(config, BLOCKS, 2);
            let found = found.unwrap_or_else(|error| panic!("{name}, {vertical} vertical: {error}"));
            assert_eq!(&found, expected.get_or_insert(found.clone()), "{name}, {vertical} vertical");
        }
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
    // The same tokens each time, which so few steps suffice for.
    let losses = |config| {
        let (mut trainer, model) = trainer(config, 2).unwrap();
        let step = |_| trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap().loss;
        (0..10).map(step).collect::<Vec<f32>>()
    };
    let expected = losses(Config::default());
    assert!(expected[9] < expected[0] - 0.1, "{expected:?}");
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        let found = losses(Config { device: base.device.clone(), dtype, ..homes(Tier::Disk) });
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() <= tolerance * expected.abs(), "{dtype:?}: {found}, {expected}");
        }
    }
}

/// Losses of ten steps of a GPT of two layers, with the fused operations.
fn losses_of_a_gpt(config: Config) -> ferrozero::Result<Vec<f32>> {
    let engine = Engine::new(config)?;
    let sizes = GptConfig { vocabulary: 32, hidden: 32, layers: 2, heads: 2, sequence: 8 };
    let model =
        Gpt::new(&sizes, engine.var_builder(), |vb, _| engine.segment(vb, |vb| Block::new(&sizes, vb)))?;
    let of = |first: u32| Tensor::arange(first, first + 16, &Device::Cpu)?.reshape((2, 8));
    let (inputs, targets) = (of(0)?, of(1)?);
    let adamw = AdamW { learning_rate: 3e-3, ..AdamW::default() };
    let plan = engine.plan(adamw, |_| model.loss(&inputs, &targets))?;
    let mut trainer = engine.trainer_from(plan)?;
    (0..10).map(|_| Ok(trainer.step(|_| model.loss(&inputs, &targets))?.loss)).collect()
}

#[test]
fn ten_steps_of_a_gpt_have_the_losses_of_the_cpu_device() {
    let Some(base) = on_cuda() else { return };
    let expected = losses_of_a_gpt(Config::default()).unwrap();
    assert!(expected[9] < 0.95 * expected[0]);
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 2e-2)] {
        let found =
            losses_of_a_gpt(Config { device: base.device.clone(), dtype, ..homes(Tier::Host) }).unwrap();
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() <= tolerance * expected.abs(), "{dtype:?}: {found}, {expected}");
        }
    }
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

#[test]
fn parameters_of_another_device_than_the_engines_are_refused() {
    let Some(base) = on_cuda() else { return };
    let engine = Engine::new(base).unwrap();
    support::engine_model(&engine, 1).unwrap();
    let elsewhere = engine.var_builder().set_device(Device::Cpu);
    let error = elsewhere.get(3, "elsewhere").unwrap_err().to_string();
    assert!(error.contains("elsewhere") && error.contains("Cpu"), "{error}");
}
