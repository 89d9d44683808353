//! Computing in bf16 and f16 over masters in f32, and products of f32 made of bf16: where still never changes
//! what, the losses stay near those of f32, and a step whose gradients overflow in f16 changes nothing.

use crate::support::{tokens, train, trainer};
use candle_core::{DType, Device, Module, Tensor};
use ferrozero::internals::models::gpt::{self, Gpt, GptConfig};
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::llama::{self, Llama};
use ferrozero::internals::models::llama_config::LlamaConfig;
use ferrozero::{AdamW, BackendChoice, Config, Engine, Placement, Products, Tier, Trainer};
use serde_json::json;

const BLOCKS: usize = 3;

fn config(dtype: DType, tier: Tier) -> Config {
    Config {
        dtype,
        placement: Placement::All(tier),
        piece_bytes: Some(8192),
        backend: BackendChoice::Memory,
        ..Config::default()
    }
}

#[test]
fn every_placement_gives_the_same_bits() {
    for dtype in [DType::BF16, DType::F16] {
        for (clip, accumulate) in [(None, 1), (Some(0.05), 2)] {
            let with = |config: Config| Config { clip, accumulate, ..config };
            let expected = train(with(config(dtype, Tier::Host)), BLOCKS, 3).unwrap();
            let slots = Config { slots: Some(1), look_ahead: Some(1), ..config(dtype, Tier::Disk) };
            let boundaries = Config { boundaries: Some(Tier::Disk), ..config(dtype, Tier::Disk) };
            for (name, config) in [("slots", slots), ("boundaries", boundaries)] {
                let found = train(with(config), BLOCKS, 3).unwrap();
                assert_eq!(found, expected, "{dtype:?}, {name}, clip {clip:?}, {accumulate} micro-batches");
            }
        }
    }
}

#[test]
fn losses_stay_near_those_of_f32() {
    let (expected, _) = train(Config::default(), BLOCKS, 20).unwrap();
    assert!(expected[19] < expected[0]);
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        let (found, _) = train(config(dtype, Tier::Host), BLOCKS, 20).unwrap();
        for (expected, found) in expected.iter().zip(&found) {
            assert!((expected - found).abs() <= tolerance * expected.abs(), "{dtype:?}: {found}, {expected}");
        }
    }
}

#[test]
fn states_on_the_device_are_refused_where_it_computes_in_another_type() {
    let error = train(config(DType::BF16, Tier::Device), 1, 1).unwrap_err().to_string();
    assert!(error.contains("on the device") && error.contains("f32"), "{error}");
    let error = train(config(DType::F64, Tier::Host), 1, 1).unwrap_err().to_string();
    assert!(error.contains("F64") && error.contains("bf16"), "{error}");
}

#[test]
fn a_step_that_overflows_in_f16_is_skipped_and_changes_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let config = Config {
        directory: Some(folder.path().join("run")),
        backend: BackendChoice::Auto,
        ..config(DType::F16, Tier::Disk)
    };
    let (mut trained, model) = trainer(config.clone(), BLOCKS).unwrap();
    let first = trained.step(|micro_batch| model.loss(&tokens(0, micro_batch))).unwrap();
    assert!(!first.skipped && first.gradient_norm.is_finite());
    let before = trained.weights_digest().unwrap();

    // Gradients that the scale of the loss, 2^15 at first, puts beyond the largest number of f16.
    let large = |micro_batch| model.loss(&tokens(1, micro_batch))? * 1000.0;
    let mut skipped = 0;
    while trained.step(large).unwrap().skipped {
        skipped += 1;
        assert_eq!(trained.weights_digest().unwrap(), before, "skipped {skipped}");
        assert_eq!(trained.skipped_steps(), skipped);
        assert!(skipped < 16, "the scale is not halved");
    }
    assert!(skipped > 0);
    assert_ne!(trained.weights_digest().unwrap(), before);

    // The scale is part of the commit: the run that resumes does not have to find it again.
    trained.commit(serde_json::Value::Null).unwrap();
    drop((trained, model));
    let (mut resumed, model) = trainer(Config { resume: true, ..config }, BLOCKS).unwrap();
    assert_eq!(resumed.skipped_steps(), skipped);
    let next = resumed.step(|micro_batch| model.loss(&tokens(2, micro_batch))? * 1000.0).unwrap();
    assert!(!next.skipped);
}

#[test]
fn what_overflows_at_every_scale_is_an_error() {
    let (mut trainer, model) = trainer(config(DType::F16, Tier::Host), 1).unwrap();
    // The gradient of the largest finite loss.
    let error = (0..40).find_map(|_| {
        let step =
            trainer.step(|micro_batch| model.loss(&tokens(0, micro_batch))?.to_dtype(DType::F32)? * 1e8);
        step.err()
    });
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("infinite or NaN"), "{error}");
}

const VOCABULARY: usize = 50;

/// The families that the engine itself brings, of its own operations.
enum Model {
    Gpt(Gpt<gpt::StreamedBlock>),
    Llama(Llama<llama::StreamedBlock>),
}

impl Model {
    fn loss(&self, micro_batch: usize) -> candle_core::Result<Tensor> {
        let tokens = |first: usize| {
            let tokens = (0..2 * 33).map(|i| ((i * i + 7 * (i + first + micro_batch)) % VOCABULARY) as u32);
            Tensor::from_vec(tokens.collect::<Vec<_>>(), (2, 33), &Device::Cpu)
        };
        let (inputs, targets) = (tokens(0)?, tokens(1)?);
        match self {
            Self::Gpt(model) => model.loss(&inputs, &targets),
            Self::Llama(model) => {
                let hidden = model.hidden(&inputs, |_, layer, xs| layer.forward(xs))?;
                model.cross_entropy(&hidden.flatten(0, 1)?, &targets.flatten_all()?)
            }
        }
    }
}

/// A trainer of one of them: three blocks of width 64.
fn family(is_llama: bool, config: Config) -> ferrozero::Result<(Trainer, Model)> {
    let engine = Engine::new(config)?;
    let none = Adapting::default();
    let model = if is_llama {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 33, "tie_word_embeddings": true,
        });
        let config = LlamaConfig::from_json(&config, "the test", 33)?;
        let block = |vb, layer| llama::StreamedBlock::from_config(&engine, &config, layer, &none, 1, vb);
        Model::Llama(Llama::new(&config, engine.var_builder(), block, |_| Ok(None))?)
    } else {
        let config = GptConfig { vocabulary: VOCABULARY, layers: 3, hidden: 64, heads: 4, sequence: 33 };
        let block = |vb, _| gpt::StreamedBlock::from_config(&engine, &config, &none, 1, vb);
        Model::Gpt(Gpt::new(&config, engine.var_builder(), block)?)
    };
    let adamw = AdamW { learning_rate: 5e-4, ..AdamW::default() };
    let plan = engine.plan(adamw, |_| model.loss(0))?;
    Ok((engine.trainer_from(plan)?, model))
}

/// The losses of some steps, and the digest of the weights after them.
fn train_family(is_llama: bool, config: Config) -> ferrozero::Result<(Vec<f32>, String)> {
    let (mut trainer, model) = family(is_llama, config)?;
    let mut losses = vec![];
    for _ in 0..6 {
        losses.push(trainer.step(|micro_batch| model.loss(micro_batch))?.loss);
    }
    Ok((losses, trainer.weights_digest()?))
}

/// Trains both families in other numbers than f32, with states, boundaries and graphs in every place.
fn assert_near_f32_and_the_same_everywhere(other: &Config, tolerance: f32) {
    for is_llama in [false, true] {
        let in_f32 = Config { accumulate: 2, ..config(DType::F32, Tier::Host) };
        let (in_f32, f32_digest) = train_family(is_llama, in_f32).unwrap();
        let with = |config: Config| {
            let Config { dtype, products, .. } = *other;
            train_family(is_llama, Config { dtype, products, accumulate: 2, ..config }).unwrap()
        };
        let expected = with(config(DType::F32, Tier::Host));
        assert_ne!(expected.1, f32_digest, "nothing was computed in other numbers");
        for (expected, found) in in_f32.iter().zip(&expected.0) {
            assert!(
                (expected - found).abs() <= tolerance * expected,
                "llama {is_llama}: {found}, {expected}"
            );
        }
        let disk = config(DType::F32, Tier::Disk);
        let slots = Config { slots: Some(1), look_ahead: Some(1), clip: Some(1e3), ..disk.clone() };
        let boundaries = Config { boundaries: Some(Tier::Disk), kept: Some(0), ..disk.clone() };
        let vertical = Config { vertical: Some(2), ..disk.clone() };
        let kept = Config { kept: Some(3), ..disk };
        let all = [("slots", slots), ("boundaries", boundaries), ("vertical", vertical), ("kept", kept)];
        for (name, config) in all {
            assert_eq!(with(config), expected, "{name}, llama {is_llama}, {:?}", other.dtype);
        }
    }
}

#[test]
fn the_models_train_in_16_bits_wherever_their_states_are() {
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        assert_near_f32_and_the_same_everywhere(&Config { dtype, ..Config::default() }, tolerance);
    }
}

/// Whether the processor makes them; says so if not.
fn has_products_of_bf16() -> bool {
    let native = Products::Bf16.is_native();
    if !native {
        eprintln!("skipped: this processor has no matrix tiles for bf16, or the system does not grant them");
    }
    native
}

#[test]
fn the_models_train_with_products_of_bf16_wherever_their_states_are() {
    if has_products_of_bf16() {
        assert_near_f32_and_the_same_everywhere(
            &Config { products: Products::Bf16, ..Config::default() },
            2e-2,
        );
    }
}

#[test]
fn an_evaluation_makes_the_products_of_a_step() {
    if !has_products_of_bf16() {
        return;
    }
    let (mut trainer, model) =
        family(false, Config { products: Products::Bf16, ..config(DType::F32, Tier::Host) }).unwrap();
    let evaluated = trainer.evaluate(|| model.loss(0)?.to_scalar::<f32>()).unwrap();
    assert_eq!(trainer.step(|_| model.loss(0)).unwrap().loss, evaluated);
}

#[test]
fn products_of_bf16_are_refused_where_they_are_not_made() {
    let refused = |dtype| {
        let config = Config { products: Products::Bf16, dtype, ..Config::default() };
        Engine::new(config).map(drop).unwrap_err().to_string()
    };
    assert!(refused(DType::BF16).contains("with another dtype"));
    if !Products::Bf16.is_native() {
        assert!(refused(DType::F32).contains("no matrix tiles"));
    }
}
