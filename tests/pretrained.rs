//! Models of others: loss, gradients and continuation are those of transformers, weights come home piece by piece, and what is
//! wrong with a file is named. The reference is made by scripts/transformers_reference.py.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use ferrozero::models::linear::Adapting;
use ferrozero::models::pretrained::{Cache, Pretrained};
use ferrozero::{AdamW, Config, Engine, Error, InitialValues, Placement, Tier};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const FAMILIES: [&str; 4] = ["llama", "qwen2", "qwen3", "gpt2"];
const SEQUENCE: usize = 64;

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pretrained").join(family)
}

fn reference(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

/// Inputs and targets [1, T] of a text.
fn batch(tokens: &[u32]) -> (Tensor, Tensor) {
    let tensor = |part: &[u32]| Tensor::new(part, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    (tensor(&tokens[..tokens.len() - 1]), tensor(&tokens[1..]))
}

/// Plain candle variables with the values of a checkpoint.
#[derive(Clone)]
struct Variables(Arc<dyn InitialValues>, Arc<Mutex<BTreeMap<String, Var>>>);

impl SimpleBackend for Variables {
    fn get(
        &self,
        shape: candle_core::Shape,
        name: &str,
        _: Init,
        _: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut values = vec![0.0; shape.elem_count()];
        assert!(self.0.fill(name, 0, &mut values)?, "{name}");
        let variable = Var::from_tensor(&Tensor::from_vec(values, shape, device)?)?;
        let variable = self.1.lock().unwrap().entry(name.to_owned()).or_insert(variable).clone();
        Ok(variable.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b * b).sum::<f64>().max(1e-16)).sqrt()
}

/// Checks a model against what transformers found.
fn check(path: &Path, reference: &Value) {
    let pretrained = Pretrained::open(path, SEQUENCE).unwrap();
    let text = tokens(&reference["tokens"]);
    let (inputs, targets) = batch(&text);
    let variables = Variables(pretrained.weights.clone(), Arc::default());
    let vb = VarBuilder::from_backend(Box::new(variables.clone()), DType::F32, Device::Cpu);
    let model = pretrained.build_plain(vb).unwrap();
    let loss = model.loss(&inputs, &targets, None).unwrap();
    let found = f64::from(loss.to_scalar::<f32>().unwrap());
    let expected = reference["loss"].as_f64().unwrap();
    eprintln!("{}: loss {found}, transformers {expected}", path.display());
    assert!((found - expected).abs() < 1e-3, "loss {found}, transformers {expected}");
    let gradients = loss.backward().unwrap();
    let variables = variables.1.lock().unwrap();
    let mut compared = 0;
    for (name, variable) in variables.iter() {
        let (stored, transposed) = pretrained.stored_name(name);
        let Some(expected) = reference["gradients"].get(&stored) else { continue };
        let mut gradient = gradients.get(variable).unwrap().clone();
        if transposed {
            gradient = gradient.t().unwrap();
        }
        let gradient = gradient.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let error = relative_error(&gradient[..expected.len()], &expected);
        // A bias of the keys changes no probability: its gradient is rounding alone.
        assert!(
            error < 1e-3 || name.ends_with("k_proj.bias") || name.ends_with("c_attn.bias"),
            "{name}: {error}"
        );
        compared += 1;
    }
    assert!(compared >= 10, "{compared} gradients");
}

/// Greedy continuation by the engine, with states on disk.
fn continuation(path: &Path, prompt: &[u32], count: usize) -> Vec<u32> {
    let pretrained =
        Pretrained::open(path, SEQUENCE * 2).or_else(|_| Pretrained::open(path, SEQUENCE)).unwrap();
    let run = tempfile::tempdir().unwrap();
    let config = Config {
        initial_values: Some(pretrained.weights.clone()),
        directory: Some(run.path().into()),
        placement: Placement::All(Tier::Disk),
        ..Config::default()
    };
    let engine = Engine::new(config).unwrap();
    let model = pretrained.build(&engine, &Adapting::default()).unwrap();
    let (inputs, targets) = batch(prompt);
    let plan = engine.plan(AdamW::default(), || model.loss(&inputs, &targets, None)).unwrap();
    let mut trainer = engine.trainer(plan).unwrap();
    let cache = Cache::default();
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let all = Tensor::new(tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = trainer.evaluate(|| model.next_logits_cached(&all, &cache)).unwrap();
        tokens.push(logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0]);
    }
    tokens
}

#[test]
fn loss_and_gradients_are_those_of_transformers() {
    for family in FAMILIES {
        check(&folder(family), &reference(&folder(family).join("reference.json")));
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers_with_weights_that_stream() {
    for family in FAMILIES {
        let reference = reference(&folder(family).join("reference.json"));
        let expected = tokens(&reference["continuation"]);
        let prompt = reference["tokens"].as_array().unwrap().len() / 2;
        let found = continuation(&folder(family), &expected[..prompt], expected.len() - prompt);
        assert_eq!(found, expected, "{family}");
    }
}

/// A real model: give its GGUF file and what the script says of it.
#[test]
fn a_real_model_is_that_of_transformers() {
    let paths = ["FERROZERO_GGUF", "FERROZERO_GGUF_REFERENCE"].map(std::env::var_os);
    let [Some(model), Some(expected)] = paths.map(|path| path.map(PathBuf::from)) else {
        eprintln!(
            "skipped: set FERROZERO_GGUF and FERROZERO_GGUF_REFERENCE, see scripts/transformers_reference.py"
        );
        return;
    };
    let expected = reference(&expected);
    check(&model, &expected);
    let continued = tokens(&expected["continuation"]);
    let prompt = expected["tokens"].as_array().unwrap().len() / 2;
    assert_eq!(continuation(&model, &continued[..prompt], continued.len() - prompt), continued);
}

#[test]
fn what_is_wrong_with_weights_is_named() {
    let copy = |change: &dyn Fn(&Path)| {
        let target = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(folder("llama").join(name), target.path().join(name)).unwrap();
        }
        change(target.path());
        let error = Pretrained::open(target.path(), 16).and_then(|pretrained| {
            let config = Config { initial_values: Some(pretrained.weights.clone()), ..Config::default() };
            let engine = Engine::new(config)?;
            let model = pretrained.build(&engine, &Adapting::default())?;
            let (inputs, targets) = batch(&[1, 2, 3]);
            engine.plan(AdamW::default(), || model.loss(&inputs, &targets, None)).map(drop)
        });
        error.unwrap_err()
    };
    let configure = |from: &'static str, to: &'static str| {
        copy(&move |folder| {
            let path = folder.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            std::fs::write(path, text.replace(from, to)).unwrap();
        })
    };
    let truncated = copy(&|folder| {
        let path = folder.join("model.safetensors");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(std::fs::metadata(path).unwrap().len() - 1).unwrap();
    });
    assert!(truncated.to_string().contains("model.safetensors"), "{truncated}");
    let shape = configure("\"intermediate_size\": 48", "\"intermediate_size\": 40");
    assert!(matches!(&shape, Error::Weights { reason, .. } if reason.contains("mlp.")), "{shape}");
    let missing = configure("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(missing.to_string().contains("it has no model.layers.2."), "{missing}");
    let extra = configure("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert!(extra.to_string().contains("it has model.layers.1."), "{extra}");
    let unknown = configure("\"llama3\"", "\"yarn\"");
    assert!(matches!(unknown, Error::Unsupported(_)), "{unknown}");
}

#[test]
fn freezing_what_was_already_made_is_an_error() {
    let engine = Engine::new(Config::default()).unwrap();
    engine.var_builder().get(3, "weight").unwrap();
    let error = engine.freeze(|name, _| name == "weight").unwrap_err();
    assert!(error.to_string().contains("weight"), "{error}");
}
