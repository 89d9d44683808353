//! Models of others: loss, gradients and continuation are those of transformers, weights come home piece by
//! piece, and what is wrong with a file is named. The reference is made by scripts/transformers_reference.py.

use candle_core::quantized::gguf_file::{self, Value as Metadata};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use ferrozero::internals::data::sampling::choose;
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::pretrained::{Cache, Continued, Pretrained};
use ferrozero::{AdamW, Config, Engine, Error, InitialValues, Placement, Tier};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const FAMILIES: [&str; 7] = ["llama", "llama_yarn", "mistral", "qwen2", "qwen2_window", "qwen3", "gpt2"];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pretrained").join(family)
}

fn reference(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("reference.json")).unwrap()).unwrap()
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

/// Gradients of transformers', whole tensors by the names of its checkpoints.
fn reference_gradients(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(folder.join("gradients.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers =
        |data: &[u8]| data.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect();
    file.iter().map(|(name, view)| (name.to_owned(), numbers(view.data()))).collect()
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let pairs = || found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let difference: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    (difference / pairs().map(|(_, b)| b * b).sum::<f64>()).sqrt()
}

/// Checks tokens, loss and gradients of a model against what transformers found.
fn check(path: &Path, folder: &Path) {
    let reference = reference(folder);
    let text = tokens(&reference["tokens"]);
    let pretrained = Pretrained::open(path, text.len()).unwrap();
    if let Some(words) = reference["text"].as_str() {
        let tokenizer = pretrained.tokenizer(None).unwrap();
        assert_eq!(tokenizer.encode(words.as_bytes()).unwrap(), text);
        assert_eq!(tokenizer.decode(&text), words);
    }
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
    let reference = reference_gradients(folder);
    let mut compared = 0;
    for (name, variable) in variables.iter() {
        let (stored, transposed) = pretrained.stored_name(name);
        let Some(expected) = reference.get(&stored) else { continue };
        let mut gradient = gradients.get(variable).unwrap().clone();
        if transposed {
            gradient = gradient.t().unwrap();
        }
        let gradient = gradient.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let third = gradient.len() / 3;
        // Without positions in them, the bias of the keys changes no probability: its gradient is rounding
        // alone.
        let skipped = if name.ends_with("attn.c_attn.bias") { third..2 * third } else { 0..0 };
        for part in
            [0..skipped.start, skipped.end..gradient.len()].into_iter().filter(|part| !part.is_empty())
        {
            let error = relative_error(&gradient[part.clone()], &expected[part.clone()]);
            eprintln!("  gradient of {name}, {} elements: relative error {error:.1e}", part.len());
            assert!(error < 1e-3, "{name}: {error}");
        }
        compared += 1;
    }
    assert_eq!(compared, reference.len());
    assert!(compared >= 10, "{compared} gradients");
}

/// Checks the greedy continuation by the engine, with states on disk, against that of transformers.
fn check_continuation(path: &Path, folder: &Path) {
    let reference = reference(folder);
    let expected = tokens(&reference["continuation"]);
    let prompt = reference["prompt"].as_u64().unwrap() as usize;
    assert_eq!(expected.len() - prompt, 50);
    let pretrained = Pretrained::open(path, expected.len()).unwrap();
    let run = tempfile::tempdir().unwrap();
    let config = Config {
        initial_values: Some(pretrained.weights.clone()),
        directory: Some(run.path().into()),
        placement: Placement::All(Tier::Disk),
        ..Config::default()
    };
    let engine = Engine::new(config).unwrap();
    let model = pretrained.build(&engine, &Adapting::default()).unwrap();
    let (inputs, targets) = batch(&expected[..prompt]);
    let plan = engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets, None)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    let cache = Cache::default();
    let mut tokens = expected[..prompt].to_vec();
    while tokens.len() < expected.len() {
        let text = [Continued { tokens: &tokens, cache: &cache }];
        let logits = trainer.evaluate(|| model.next_logits_of(&text)).unwrap();
        tokens.push(logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0]);
        assert_eq!(cache.tokens(), tokens.len() - 1, "every token is computed once");
    }
    assert_eq!(tokens, expected, "{}", path.display());
}

#[test]
fn loss_and_gradients_are_those_of_transformers() {
    for family in FAMILIES {
        check(&folder(family), &folder(family));
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers_with_weights_that_stream() {
    for family in FAMILIES {
        check_continuation(&folder(family), &folder(family));
    }
}

/// Writes the tiny GPT-2 as a GGUF file, whose matrices are the transposes of those in the folder.
fn write_gpt2_gguf(path: &Path) {
    let names = [
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
        ("transformer.h.", "blk."),
        (".ln_1", ".attn_norm"),
        (".attn.c_attn", ".attn_qkv"),
        (".attn.c_proj", ".attn_output"),
        (".ln_2", ".ffn_norm"),
        (".mlp.c_fc", ".ffn_up"),
        (".mlp.c_proj", ".ffn_down"),
    ];
    let file = folder("gpt2").join("model.safetensors");
    let mut tensors = vec![];
    for (name, tensor) in candle_core::safetensors::load(file, &Device::Cpu).unwrap() {
        let transposed = name.contains(".c_") && tensor.rank() == 2;
        let tensor = if transposed { tensor.t().unwrap().contiguous().unwrap() } else { tensor };
        let tensor = QTensor::quantize(&tensor.to_dtype(DType::F32).unwrap(), GgmlDType::F32).unwrap();
        let name = names.iter().fold(name, |name, (from, to)| name.replace(from, to));
        if name == "token_embd.weight" {
            // As older converters do.
            let again = QTensor::quantize(&tensor.dequantize(&Device::Cpu).unwrap(), GgmlDType::F16);
            tensors.push(("output.weight".to_owned(), again.unwrap()));
        }
        tensors.push((name, tensor));
    }
    let metadata = [
        ("general.architecture", Metadata::String("gpt2".into())),
        ("gpt2.block_count", Metadata::U32(2)),
        ("gpt2.context_length", Metadata::U32(64)),
        ("gpt2.embedding_length", Metadata::U32(32)),
        ("gpt2.feed_forward_length", Metadata::U32(128)),
        ("gpt2.attention.head_count", Metadata::U32(4)),
        ("gpt2.attention.layer_norm_epsilon", Metadata::F32(1e-5)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn gpt2_from_a_gguf_file_is_that_of_its_folder() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("gpt2.gguf");
    write_gpt2_gguf(&path);
    check(&path, &folder("gpt2"));
    check_continuation(&path, &folder("gpt2"));
    let [of_file, of_folder] = [path, folder("gpt2")].map(|path| Pretrained::open(&path, 64).unwrap());
    let configured = of_file.configuration.as_object().unwrap();
    for key in
        ["architectures", "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon"]
    {
        assert_eq!(configured[key], of_folder.configuration[key], "{key}");
    }
    let tokens = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6]], &Device::Cpu).unwrap();
    let [of_file, of_folder] = [of_file, of_folder].map(|pretrained| {
        let variables = Variables(pretrained.weights.clone(), Arc::default());
        let vb = VarBuilder::from_backend(Box::new(variables), DType::F32, Device::Cpu);
        let logits = pretrained.build_plain(vb).unwrap().next_logits(&tokens).unwrap();
        logits.to_vec2::<f32>().unwrap().remove(0).into_iter().map(f32::to_bits).collect::<Vec<_>>()
    });
    assert_eq!(of_file, of_folder);
    assert!(Pretrained::open(&target.path().join("gpt2.gguf"), 65).is_err(), "it has 64 positions");
}

#[test]
fn texts_that_are_continued_together_have_the_bits_that_they_have_alone() {
    for (family, tiles) in [("llama", 1), ("llama", 5), ("mistral", 1), ("gpt2", 1), ("gpt2", 3)] {
        let mut pretrained = Pretrained::open(&folder(family), 32).unwrap();
        pretrained.head_tiles = tiles;
        pretrained.perceptron_tiles = tiles;
        let config = Config { initial_values: Some(pretrained.weights.clone()), ..Config::default() };
        let engine = Engine::new(config).unwrap();
        let model = pretrained.build(&engine, &Adapting::default()).unwrap();
        let (inputs, targets) = batch(&[1, 2, 3]);
        let plan = engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets, None)).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let mut continued = |prompts: &[&[u32]]| {
            let mut texts: Vec<(Vec<u32>, Cache)> =
                prompts.iter().map(|prompt| (prompt.to_vec(), Cache::default())).collect();
            let mut all = vec![vec![]; prompts.len()];
            for _ in 0..5 {
                let borrowed: Vec<_> =
                    texts.iter().map(|(tokens, cache)| Continued { tokens, cache }).collect();
                let logits = trainer.evaluate(|| model.next_logits_of(&borrowed)).unwrap();
                for ((row, (tokens, _)), all) in
                    logits.to_vec2::<f32>().unwrap().iter().zip(&mut texts).zip(&mut all)
                {
                    tokens.push(choose(row, 0.0, 1.0, 0.0));
                    all.extend(row.iter().map(|logit| logit.to_bits()));
                }
            }
            all
        };
        let prompts: [&[u32]; 3] = [&[5, 6, 7, 8, 9, 10, 11], &[90], &[40, 41, 42]];
        let together = continued(&prompts);
        for (prompt, expected) in prompts.iter().zip(together) {
            assert!(continued(&[prompt])[0] == expected, "{family}, {tiles} tiles");
        }
    }
}

/// Windows are shorter than the prompt and than what follows it.
#[test]
fn keys_and_values_within_a_window_continue_as_the_whole_text_does() {
    for (family, window) in [("mistral", 9), ("qwen2_window", 5)] {
        let pretrained = Pretrained::open(&folder(family), 40).unwrap();
        assert_eq!(pretrained.configuration["sliding_window"], window);
        let config = Config { initial_values: Some(pretrained.weights.clone()), ..Config::default() };
        let engine = Engine::new(config).unwrap();
        let model = pretrained.build(&engine, &Adapting::default()).unwrap();
        let mut tokens = tokens(&reference(&folder(family))["tokens"])[..12].to_vec();
        let (inputs, targets) = batch(&tokens);
        let plan = engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets, None)).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let cache = Cache::default();
        // The prompt, then some tokens together, then one after the other.
        for known in [0, 12, 15, 18, 19, 20, 21, 22, 23, 24] {
            assert_eq!(cache.tokens(), known);
            let text = [Continued { tokens: &tokens, cache: &cache }];
            let cached = trainer.evaluate(|| model.next_logits_of(&text)).unwrap().to_vec2::<f32>().unwrap();
            let mut next = vec![];
            for _ in 0..if known < 15 { 3 } else { 1 } {
                let inputs = Tensor::new(tokens.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let whole = trainer.evaluate(|| model.next_logits(&inputs)).unwrap();
                let whole = whole.to_vec2::<f32>().unwrap();
                if next.is_empty() {
                    let error = relative_error(&cached[0], &whole[0]);
                    assert!(error < 1e-5, "{family} after {known} tokens: {error}");
                }
                next.push(choose(&whole[0], 0.0, 1.0, 0.0));
                tokens.push(next[next.len() - 1]);
            }
            assert_eq!(choose(&cached[0], 0.0, 1.0, 0.0), next[0], "{family} after {known} tokens");
        }
    }
}

/// A real model on a real text; `scripts/check_smollm2` fetches it and runs this.
#[test]
fn a_real_model_is_that_of_transformers() {
    let paths = ["FERROZERO_GGUF", "FERROZERO_REFERENCE"].map(std::env::var_os);
    let [Some(model), Some(reference)] = paths.map(|path| path.map(PathBuf::from)) else {
        eprintln!("skipped: scripts/check_smollm2 fetches a model for it");
        return;
    };
    check(&model, &reference);
    check_continuation(&model, &reference);
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
            engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets, None)).map(drop)
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
    let truncated = truncated.to_string();
    assert!(truncated.contains("model.safetensors") && truncated.contains("for model."), "{truncated}");
    let shape = configure("\"intermediate_size\": 48", "\"intermediate_size\": 40");
    assert!(matches!(&shape, Error::Weights { reason, .. } if reason.contains("mlp.")), "{shape}");
    let missing = configure("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(missing.to_string().contains("it has no model.layers.2."), "{missing}");
    let extra = configure("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    assert!(extra.to_string().contains("it has model.layers.1."), "{extra}");
    let unknown = configure("\"llama3\"", "\"proportional\"");
    assert!(matches!(unknown, Error::Unsupported(_)), "{unknown}");
}

/// Deals the tensors of a model out to two files with an index.
fn in_two_files(target: &Path) {
    let bytes = std::fs::read(folder("llama").join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<_> = file.names().into_iter().map(str::to_owned).collect();
    names.sort();
    let mut map = serde_json::Map::new();
    for part in [0, 1] {
        let name = format!("model-{}-of-2.safetensors", part + 1);
        let views =
            names.iter().skip(part).step_by(2).map(|tensor| (tensor.clone(), file.tensor(tensor).unwrap()));
        let views: Vec<_> = views.collect();
        map.extend(views.iter().map(|(tensor, _)| (tensor.clone(), Value::from(name.clone()))));
        safetensors::serialize_to_file(views, None, &target.join(name)).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(target.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::copy(folder("llama").join("config.json"), target.join("config.json")).unwrap();
}

#[test]
fn weights_in_several_files_are_those_of_one() {
    let target = tempfile::tempdir().unwrap();
    in_two_files(target.path());
    let several = Pretrained::open(target.path(), 16).unwrap().weights;
    let one = Pretrained::open(&folder("llama"), 16).unwrap().weights;
    for name in ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"] {
        let shape = one.shape(name).unwrap();
        assert_eq!(several.shape(name), Some(shape.clone()));
        let values = |weights: &dyn InitialValues| {
            let mut values = vec![0.0; shape.iter().product()];
            assert!(weights.fill(name, 0, &mut values).unwrap());
            values
        };
        assert_eq!(values(&*several), values(&*one), "{name}");
    }
    let index = target.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let refused = |text: String| {
        std::fs::write(&index, text).unwrap();
        Pretrained::open(target.path(), 16).unwrap_err().to_string()
    };
    let elsewhere = refused(text.replace("model-1-of-2", "../model-1-of-2"));
    assert!(elsewhere.contains("../model-1-of-2"), "{elsewhere}");
    let absent = refused(text.replace("model-1-of-2", "model-3-of-2"));
    assert!(absent.contains("model-3-of-2"), "{absent}");
    assert!(refused("{}".into()).contains("weight_map"));
}

#[test]
fn freezing_what_was_already_made_is_an_error() {
    let engine = Engine::new(Config::default()).unwrap();
    engine.var_builder().get(3, "weight").unwrap();
    let error = engine.freeze(|name, _| name == "weight").unwrap_err();
    assert!(error.to_string().contains("weight"), "{error}");
}
