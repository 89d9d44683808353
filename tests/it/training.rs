//! What a user may do with a model, and what is refused: tied, frozen and unused parameters, several inputs,
//! evaluation, resuming, exporting, and calls that the schedule does not expect.

use crate::support::{Block, Model, VOCABULARY, WIDTH, engine_model, tokens, train, trainer};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero::{AdamW, BackendChoice, Config, Engine, Error, InitialValues, Placement, Tier};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn on_disk(folder: &Path) -> Config {
    Config {
        directory: Some(folder.join("run")),
        placement: Placement::All(Tier::Disk),
        piece_bytes: Some(8192),
        ..Config::default()
    }
}

#[test]
fn resuming_gives_the_bits_of_a_run_that_never_stopped() {
    let (_, expected) = train(Config::default(), 3, 6).unwrap();
    for placement in [Placement::All(Tier::Disk), Placement::All(Tier::Host), Placement::All(Tier::Device)] {
        let folder = folder();
        let config = Config { placement, ..on_disk(folder.path()) };
        let (mut first, model) = trainer(config.clone(), 3).unwrap();
        for step in 0..3 {
            first.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
        }
        assert_eq!(first.commit(serde_json::json!({ "position": 3 })).unwrap(), 1);
        // Steps after the commit are lost, as they are after a kill.
        first.step(|_| model.loss(&tokens(77, 0))).unwrap();
        drop(first);
        // Another placement than before: a checkpoint does not care.
        let config = Config { placement: Placement::All(Tier::Disk), resume: true, ..config };
        let engine = Engine::new(config).unwrap();
        assert_eq!(engine.resumed(), Some(&serde_json::json!({ "position": 3 })));
        let model = engine_model(&engine, 3).unwrap();
        let adamw = AdamW { learning_rate: 3e-3, ..AdamW::default() };
        let plan = engine.plan(adamw, |_| model.loss(&tokens(0, 0))).unwrap();
        let mut second = engine.trainer_from(plan).unwrap();
        assert_eq!(second.steps(), 3);
        for step in 3..6 {
            second.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
        }
        assert_eq!(second.weights_digest().unwrap(), expected);
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_parameter() {
    let folder = folder();
    let (mut first, _) = trainer(on_disk(folder.path()), 2).unwrap();
    first.commit(serde_json::Value::Null).unwrap();
    drop(first);
    let resumed = trainer(Config { resume: true, ..on_disk(folder.path()) }, 3);
    let error = resumed.map(drop).unwrap_err();
    assert!(matches!(error, Error::CheckpointMismatch { .. }), "{error}");
    assert!(error.to_string().contains("h.2.up"), "{error}");
    let fresh = trainer(on_disk(folder.path()), 2).map(drop).unwrap_err();
    assert!(matches!(fresh, Error::CheckpointExists { .. }), "{fresh}");
}

#[test]
fn evaluation_keeps_no_graph_and_changes_nothing() {
    let config = || Config {
        placement: Placement::All(Tier::Disk),
        backend: BackendChoice::Memory,
        piece_bytes: Some(8192),
        ..Config::default()
    };
    let (_, expected) = train(config(), 2, 2).unwrap();
    let (mut trainer, model) = trainer(config(), 2).unwrap();
    let before = trainer.evaluate(|| model.loss(&tokens(5, 0))?.to_scalar::<f32>()).unwrap();
    assert_eq!(trainer.evaluate(|| model.loss(&tokens(5, 0))?.to_scalar::<f32>()).unwrap(), before);
    for step in 0..2 {
        trainer.step(|_| model.loss(&tokens(step, 0))).unwrap();
    }
    assert_eq!(trainer.weights_digest().unwrap(), expected);
    assert_ne!(trainer.evaluate(|| model.loss(&tokens(5, 0))?.to_scalar::<f32>()).unwrap(), before);
}

#[test]
fn an_observer_of_gradients_changes_nothing_and_its_error_ends_the_step() {
    let config = || Config {
        placement: Placement::All(Tier::Disk),
        backend: BackendChoice::Memory,
        piece_bytes: Some(8192),
        clip: Some(0.1),
        ..Config::default()
    };
    let (_, expected) = train(config(), 2, 2).unwrap();
    let (mut trainer, model) = trainer(config(), 2).unwrap();
    let squares = Arc::new(Mutex::new(0.0));
    let sum = squares.clone();
    trainer.observe_gradients(move |gradient| {
        *sum.lock().unwrap() += f64::from(gradient.values.sqr()?.sum_all()?.to_scalar::<f32>()?);
        Ok(())
    });
    for step in 0..2 {
        *squares.lock().unwrap() = 0.0;
        let report = trainer.step(|_| model.loss(&tokens(step, 0))).unwrap();
        let norm = squares.lock().unwrap().sqrt();
        assert!((norm / report.gradient_norm - 1.0).abs() < 1e-4, "{norm} and {}", report.gradient_norm);
    }
    assert_eq!(trainer.weights_digest().unwrap(), expected);
    trainer.observe_gradients(|gradient| candle_core::bail!("I do not like {}", gradient.name));
    let error = trainer.step(|_| model.loss(&tokens(2, 0))).unwrap_err();
    assert!(error.to_string().contains("I do not like h.1."), "{error}");
}

#[test]
fn an_exported_file_holds_every_parameter_as_it_is() {
    let (mut trainer, model) = trainer(Config::default(), 2).unwrap();
    trainer.step(|_| model.loss(&tokens(0, 0))).unwrap();
    let folder = folder();
    let path = folder.path().join("model.safetensors");
    trainer.export_safetensors(&path).unwrap();
    let file = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    assert_eq!(file.len(), 2 * 3 + 1);
    for (name, shape) in trainer.parameters() {
        assert_eq!(file[&name].dims(), shape);
        assert_eq!(
            file[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            trainer.parameter(&name).unwrap()
        );
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half written is left");
    let nowhere = trainer.export_safetensors(&folder.path().join("missing/model.safetensors"));
    assert!(matches!(nowhere, Err(Error::File { .. })));
}

#[test]
fn frozen_parameters_stay_as_they_are() {
    let config =
        Config { placement: Placement::All(Tier::Host), piece_bytes: Some(4096), ..Config::default() };
    let engine = Engine::new(config).unwrap();
    engine.freeze(|name, _| name.ends_with("bias") || name.starts_with("h.1.")).unwrap();
    let model = engine_model(&engine, 2).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&tokens(0, 0))).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    let before: Vec<_> =
        trainer.parameters().iter().map(|(name, _)| trainer.parameter(name).unwrap()).collect();
    trainer.step(|_| model.loss(&tokens(0, 0))).unwrap();
    for ((name, _), before) in trainer.parameters().iter().zip(before) {
        let frozen = name.ends_with("bias") || name.starts_with("h.1.");
        assert_eq!(trainer.parameter(name).unwrap() == before, frozen, "{name}");
    }
}

#[test]
fn a_parameter_without_a_gradient_is_named_before_training_starts() {
    let engine = Engine::new(Config::default()).unwrap();
    let vb = engine.var_builder();
    let used = vb.get((4, 4), "used").unwrap();
    vb.get(3, "unused").unwrap();
    // candle-nn's fast layer norm has no backward.
    let cut = |vb: VarBuilder<'static>| candle_nn::layer_norm(4, 1e-5, vb);
    let norm = engine.segment(vb.pp("norm"), cut).unwrap();
    let xs = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
    let loss = || norm.forward(&xs.matmul(&used)?)?.sum_all();
    let error = engine.plan(AdamW::default(), |_| loss()).unwrap_err();
    let Error::MissingGradient { names } = &error else { panic!("{error}") };
    assert_eq!(names, &["norm.bias", "norm.weight", "the input of norm", "unused"]);
    assert!(error.to_string().contains("LayerNorm"), "{error}");
}

/// A segment with a mask and a scale beside its hidden state.
#[test]
fn segments_take_several_inputs_and_captures() {
    let run = |placement: Placement, boundaries: Option<Tier>, kept: usize| {
        let backend = BackendChoice::Memory;
        let engine = Engine::new(Config {
            placement,
            boundaries,
            kept: Some(kept),
            backend,
            piece_bytes: Some(4096),
            ..Config::default()
        })
        .unwrap();
        let vb = engine.var_builder();
        let blocks: Vec<_> =
            (0..2).map(|i| engine.segment(vb.pp(i), |vb| Block::new(vb, WIDTH)).unwrap()).collect();
        let context =
            vb.get_with_hints((8, WIDTH), "context", Init::Randn { mean: 0.0, stdev: 1.0 }).unwrap();
        let shift = vb.get_with_hints(WIDTH, "shift", Init::Const(0.5)).unwrap();
        let mask = Tensor::new(vec![1u32; 8], &Device::Cpu).unwrap();
        let loss = || {
            let mut xs = (&context * 2.0)?;
            let doubled = (&context * 3.0)?;
            for block in &blocks {
                let shift = shift.clone();
                xs = block.call(&[&xs, &doubled, &mask], move |block, inputs| {
                    let mask = inputs[2].to_dtype(DType::F32)?.unsqueeze(1)?;
                    block.forward(&(&inputs[0] + inputs[1].broadcast_mul(&mask)?.broadcast_add(&shift)?)?)
                })?;
            }
            xs.sqr()?.mean_all()
        };
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(|_| loss()).unwrap().loss).collect();
        assert!(losses[2] < losses[0]);
        (losses, trainer.weights_digest().unwrap())
    };
    let expected = run(Placement::All(Tier::Device), None, 0);
    assert_eq!(run(Placement::All(Tier::Disk), None, 0), expected);
    assert_eq!(run(Placement::All(Tier::Disk), Some(Tier::Disk), 0), expected);
    assert_eq!(run(Placement::All(Tier::Disk), Some(Tier::Disk), 1), expected);
    assert_eq!(run(Placement::All(Tier::Disk), None, 2), expected);
}

/// Operations that need their own result for the gradient, results that are inputs, and outputs that others
/// read too.
#[test]
fn a_graph_that_is_kept_has_all_that_its_backward_reads() {
    let run = |kept: usize, boundaries: Tier| {
        let engine = Engine::new(Config {
            placement: Placement::All(Tier::Disk),
            backend: BackendChoice::Memory,
            boundaries: Some(boundaries),
            kept: Some(kept),
            ..Config::default()
        })
        .unwrap();
        let vb = engine.var_builder();
        let weight = |name: &str| {
            engine
                .segment(vb.pp(name), |vb| {
                    vb.get_with_hints((4, 4), "weight", Init::Randn { mean: 0.0, stdev: 0.5 })
                })
                .unwrap()
        };
        let segments = ["a", "b", "c"].map(weight);
        let start = vb.get_with_hints((2, 4), "start", Init::Randn { mean: 0.0, stdev: 1.0 }).unwrap();
        let loss = || {
            let first = segments[0].call(&[&(&start * 2.0)?], |w, inputs| inputs[0].matmul(w)?.tanh())?;
            let beside = first.sqr()?.sum_all()?;
            let second = segments[1].call(&[&first], |w, inputs| {
                let product = inputs[0].matmul(w)?;
                Tensor::cat(&[&product, &inputs[0]], 0)?.narrow(0, 0, 2)
            })?;
            let third = segments[2]
                .call(&[&second], |w, inputs| candle_nn::ops::softmax(&inputs[0].matmul(w)?, 1))?;
            third.sqr()?.sum_all()? + beside
        };
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(|_| loss()).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    let expected = run(0, Tier::Device);
    for kept in 1..=3 {
        assert_eq!(run(kept, Tier::Device), expected, "{kept}");
    }
}

#[test]
fn a_parameter_tied_across_segments_is_resident_and_trained_once() {
    let run = |placement: Placement, kept: usize| {
        let kept = Some(kept);
        let engine =
            Engine::new(Config { placement, kept, backend: BackendChoice::Memory, ..Config::default() })
                .unwrap();
        let vb = engine.var_builder();
        let root = vb.clone();
        let make = |vb: VarBuilder<'static>| {
            let init = Init::Randn { mean: 0.0, stdev: 0.1 };
            let shared = root.get_with_hints((4, 4), "shared", init)?;
            Ok((vb.get_with_hints((4, 4), "own", init)?, shared))
        };
        let segments: Vec<_> = (0..2).map(|i| engine.segment(vb.pp(i), make).unwrap()).collect();
        let xs = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let loss = || {
            let mut ys = xs.clone();
            for segment in &segments {
                ys = segment.call(&[&ys], |(own, shared), inputs| inputs[0].matmul(own)?.matmul(shared))?;
            }
            (ys - 1.0)?.sqr()?.mean_all()
        };
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        assert_eq!(plan.layout().groups[plan.layout().resident()].table[0].name, "shared");
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(|_| loss()).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    let expected = run(Placement::All(Tier::Device), 0);
    for kept in 0..=2 {
        assert_eq!(run(Placement::All(Tier::Disk), kept), expected);
    }
}

#[test]
fn a_segment_that_runs_twice_is_updated_once_with_both_gradients() {
    let run = |placement: Placement, kept: usize| {
        let kept = Some(kept);
        let engine =
            Engine::new(Config { placement, kept, backend: BackendChoice::Memory, ..Config::default() })
                .unwrap();
        let block = engine.segment(engine.var_builder().pp("shared"), |vb| Block::new(vb, 8)).unwrap();
        let xs = Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap();
        let loss = || block.forward(&block.forward(&xs)?)?.sqr()?.mean_all();
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let losses: Vec<f32> = (0..3).map(|_| trainer.step(|_| loss()).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    let expected = run(Placement::All(Tier::Device), 0);
    for kept in 0..=2 {
        assert_eq!(run(Placement::All(Tier::Disk), kept), expected);
    }
}

#[test]
fn another_order_of_segments_is_an_error_that_names_both() {
    let engine = Engine::new(Config::default()).unwrap();
    let vb = engine.var_builder();
    let blocks: Vec<_> = (0..2).map(|i| engine.segment(vb.pp(i), |vb| Block::new(vb, 8)).unwrap()).collect();
    let xs = Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap();
    let loss = |first: usize| blocks[1 - first].forward(&blocks[first].forward(&xs)?)?.sqr()?.mean_all();
    let outside = blocks[0].forward(&xs).unwrap_err().to_string();
    assert!(outside.contains("outside"), "{outside}");
    let plan = engine.plan(AdamW::default(), |_| loss(0)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    trainer.step(|_| loss(0)).unwrap();
    let error = trainer.step(|_| loss(1)).unwrap_err();
    assert!(matches!(error, Error::OrderChanged { .. }), "{error}");
    assert!(matches!(trainer.step(|_| loss(0)), Err(Error::Stopped(_))));
}

#[test]
fn a_nan_stops_the_run_and_names_the_step() {
    let engine = Engine::new(Config::default()).unwrap();
    let vb = engine.var_builder();
    let block = engine.segment(vb.pp("block"), |vb| Block::new(vb, 8)).unwrap();
    let loss = |value: f32| {
        let xs = Tensor::full(value, (2, 8), &Device::Cpu)?;
        block.forward(&xs)?.sqr()?.mean_all()
    };
    let plan = engine.plan(AdamW::default(), |_| loss(1.0)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    trainer.step(|_| loss(1.0)).unwrap();
    let error = trainer.step(|_| loss(f32::NAN)).unwrap_err();
    assert!(matches!(error, Error::NonFiniteLoss { step: 2, .. }), "{error}");
}

#[test]
fn an_error_in_the_users_loss_comes_back_as_it_is() {
    let (mut trainer, model) = trainer(Config::default(), 1).unwrap();
    let wrong = Tensor::ones(5, DType::F32, &Device::Cpu).unwrap();
    let error = trainer.step(|_| model.loss(&wrong)).unwrap_err();
    assert!(matches!(error, Error::Candle(_)), "{error}");
}

#[test]
fn the_model_is_the_one_that_plain_candle_has() {
    let (trainer, _) = trainer(Config::default(), 2).unwrap();
    let variables = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let blocks = (0..2).map(|i| Block::new(vb.pp(format!("h.{i}")), WIDTH).unwrap()).collect();
    let plain = Model::new(&vb, WIDTH, blocks).unwrap();
    for (name, variable) in variables.data().lock().unwrap().iter() {
        let values = Tensor::new(trainer.parameter(name).unwrap(), &Device::Cpu).unwrap();
        variable.set(&values.reshape(variable.shape()).unwrap()).unwrap();
    }
    let expected = plain.loss(&tokens(0, 0)).unwrap().to_scalar::<f32>().unwrap();
    let uniform = (VOCABULARY as f32).ln();
    assert!((expected - uniform).abs() < 0.5, "{expected}");
    let (losses, _) = train(Config::default(), 2, 1).unwrap();
    assert!((losses[0] - expected).abs() < 1e-5 * expected);
}

/// Values that are none.
#[derive(Debug)]
struct Panicking;

impl InitialValues for Panicking {
    fn check(&self, _parameters: &[(String, Vec<usize>)]) -> ferrozero::Result<()> {
        Ok(())
    }

    fn fill(&self, _name: &str, _first_element: usize, _out: &mut [f32]) -> ferrozero::Result<bool> {
        panic!("the user's own panic")
    }
}

#[test]
fn a_panic_in_initial_values_is_an_error() {
    for placement in [Placement::All(Tier::Disk), Placement::All(Tier::Device)] {
        let folder = folder();
        let initial_values: Option<Arc<dyn InitialValues>> = Some(Arc::new(Panicking));
        let error = trainer(Config { placement, initial_values, ..on_disk(folder.path()) }, 2).err().unwrap();
        assert!(matches!(&error, Error::Panicked { text, .. } if text == "the user's own panic"), "{error}");
    }
}

#[test]
fn a_panic_in_an_evaluation_comes_through_and_stops_the_trainer() {
    let folder = folder();
    let (mut trainer, model) = trainer(on_disk(folder.path()), 2).unwrap();
    trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
    let panics = |trainer: &mut ferrozero::Trainer| {
        trainer.evaluate(|| -> candle_core::Result<()> {
            model.loss(&tokens(1, 0))?;
            panic!("the user's own panic")
        })
    };
    let panic = catch_unwind(AssertUnwindSafe(|| panics(&mut trainer))).unwrap_err();
    assert_eq!(*panic.downcast::<&str>().unwrap(), "the user's own panic");
    let error = trainer.commit(serde_json::Value::Null).unwrap_err();
    assert!(matches!(error, Error::Stopped(_)), "{error}");
}

/// This program has no allocator that counts.
#[test]
fn a_limit_of_memory_that_nobody_counts_is_refused() {
    let config = || Config { memory_bytes: Some(16 << 20), ..Config::default() };
    let error = Engine::new(config()).map(drop).unwrap_err();
    assert!(matches!(&error, Error::Configuration(text) if text.contains("CountingAllocator")), "{error}");
    Engine::new(Config { working_bytes: Some(1 << 20), ..config() }).unwrap();
}
