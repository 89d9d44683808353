//! Blocks whose perceptron runs in tiles: the numbers of the whole block, one tensor in every file, and less
//! memory.

use candle_core::{Device, Tensor};
use ferrozero::internals::estimate::model_shape::ModelShape;
use ferrozero::internals::models::gpt::{Gpt, GptConfig, StreamedBlock};
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::pretrained::{Pretrained, StreamedModel};
use ferrozero::internals::schedule::layout::Layout;
use ferrozero::{AdamW, BackendChoice, Checkpoint, Config, Engine, Error, Placement, Result, Tier, Trainer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Perceptrons of 48 and 128 units in tiles of 10 and of 26, of which the last ones have fewer.
const TILES: usize = 5;

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pretrained").join(family)
}

fn batch() -> (Tensor, Tensor) {
    let tokens: Vec<u32> = (0..33).map(|i| i * 29 % 96).collect();
    let row = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    (row(&tokens[..32]), row(&tokens[1..]))
}

fn trainer(pretrained: &Pretrained, adapting: &Adapting, config: Config) -> Result<(Trainer, StreamedModel)> {
    let engine = Engine::new(Config { initial_values: Some(pretrained.weights.clone()), ..config })?;
    if adapting.rank > 0 {
        engine.freeze(|name, _| !Adapting::is_adapter(name))?;
    }
    let model = pretrained.build(&engine, adapting)?;
    let (inputs, targets) = batch();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets, None))?;
    Ok((engine.trainer_from(plan)?, model))
}

/// The whole parameter's gradient of those of its parts: rows, and columns of so many.
fn place(gradients: &mut BTreeMap<String, Vec<f32>>, name: &str, shape: &[usize], values: &[f32]) {
    let numbers = |text: &str| -> Vec<usize> { text.split('_').filter_map(|n| n.parse().ok()).collect() };
    let part = name.split('.').find(|part| part.starts_with("rows_") || part.starts_with("columns_"));
    let whole = part.map_or(name.to_owned(), |part| name.replace(&format!(".{part}"), ""));
    let all = gradients.entry(whole).or_default();
    let width = shape.get(1).copied().unwrap_or(1);
    let (first_row, first_column, all_columns) = match part.map(|part| (part, numbers(part))) {
        Some((part, numbers)) if part.starts_with("rows_") => (numbers[0], 0, width),
        Some((_, numbers)) => (0, numbers[0], numbers[2]),
        None => (0, 0, width),
    };
    for (row, values) in values.chunks(width).enumerate() {
        let start = (first_row + row) * all_columns + first_column;
        all.resize(all.len().max(start + width), 0.0);
        all[start..start + width].copy_from_slice(values);
    }
}

struct Trained {
    names: Vec<(String, Vec<usize>)>,
    before: Vec<Vec<f32>>,
    /// Loss and norm of the gradient of each step.
    numbers: Vec<[f64; 2]>,
    /// Of the first step.
    gradients: BTreeMap<String, Vec<f32>>,
    logits: Vec<f32>,
    exported: Vec<u8>,
}

fn train(family: &str, tiles: usize, adapting: &Adapting) -> Trained {
    let mut pretrained = Pretrained::open(&folder(family), 32).unwrap();
    assert_eq!(pretrained.perceptron_tiles, 1, "it is small");
    pretrained.perceptron_tiles = tiles;
    let run = tempfile::tempdir().unwrap();
    let config = Config {
        directory: Some(run.path().to_owned()),
        placement: Placement::All(Tier::Disk),
        boundaries: Some(Tier::Disk),
        ..Config::default()
    };
    let (mut trainer, model) = trainer(&pretrained, adapting, config).unwrap();
    let names = trainer.parameters();
    let before = names.iter().map(|(name, _)| trainer.parameter(name).unwrap()).collect();
    let found = Arc::new(Mutex::new(BTreeMap::new()));
    let gradients = found.clone();
    trainer.observe_gradients(move |gradient| {
        let values = gradient.values.flatten_all()?.to_vec1::<f32>()?;
        place(&mut gradients.lock().unwrap(), gradient.name, gradient.values.dims(), &values);
        Ok(())
    });
    let (inputs, targets) = batch();
    let mut step = || {
        let step = trainer.step(|_| model.loss(&inputs, &targets, None)).unwrap();
        [f64::from(step.loss), step.gradient_norm]
    };
    let first = step();
    let gradients = found.lock().unwrap().clone();
    let numbers = vec![first, step(), step()];
    let logits = trainer.evaluate(|| model.next_logits(&inputs)).unwrap();
    // What a checkpoint exports without its model is what the run exports.
    trainer.commit(serde_json::json!({})).unwrap();
    let [exported, again] = ["exported", "again"].map(|name| run.path().join(name));
    trainer.export_safetensors(&exported).unwrap();
    drop(trainer);
    Checkpoint::open(run.path()).unwrap().export_safetensors(&again).unwrap();
    let exported = std::fs::read(exported).unwrap();
    assert!(exported == std::fs::read(again).unwrap());
    let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    Trained { names, before, numbers, gradients, logits, exported }
}

/// Full training of three families: a gated perceptron, one without, and another with norms of heads; the
/// matrices of the second lie transposed in its file.
#[test]
fn tiles_have_the_loss_and_the_gradients_of_the_whole_block_under_the_names_of_one() {
    for family in ["llama", "gpt2", "qwen3"] {
        let none = Adapting::default();
        compare(family, &none);
    }
}

#[test]
fn tiles_have_the_adapters_of_the_whole_block() {
    for (family, targets) in [("llama", ["gate_proj", "down_proj"]), ("gpt2", ["c_fc", "mlp.c_proj"])] {
        let targets = targets.map(str::to_owned);
        let adapting = Pretrained::open(&folder(family), 32).unwrap().adapting(4, 8.0, &targets).unwrap();
        compare(family, &adapting);
    }
}

fn compare(family: &str, adapting: &Adapting) {
    let (whole, tiled) = (train(family, 1, adapting), train(family, TILES, adapting));
    assert_eq!(tiled.names, whole.names);
    assert!(tiled.before == whole.before, "{family}: they start as they lie in the file");
    assert!(tiled.numbers[2][0] < tiled.numbers[0][0], "{family} learns");
    for (a, b) in tiled.numbers.iter().flatten().zip(whole.numbers.iter().flatten()) {
        assert!((a - b).abs() <= 1e-6 * b, "{family}: {a} {b}");
    }
    assert!(tiled.gradients.keys().eq(whole.gradients.keys()), "{family}");
    for ((name, a), b) in tiled.gradients.iter().zip(whole.gradients.values()) {
        assert_eq!(a.len(), b.len(), "{name}");
        let largest = b.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= 1e-6 * largest.max(1.0), "{family}, {name}: {a} {b}");
        }
    }
    for (a, b) in tiled.logits.iter().zip(&whole.logits) {
        assert!((a - b).abs() <= 1e-4, "{family}: {a} {b}");
    }
}

/// Under one name a matrix, so that the model is the same whole and in tiles.
#[test]
fn what_tiles_learnt_is_loaded_as_one_tensor_a_matrix() {
    let trained = train("llama", TILES, &Adapting::default());
    let target = tempfile::tempdir().unwrap();
    std::fs::copy(folder("llama").join("config.json"), target.path().join("config.json")).unwrap();
    std::fs::write(target.path().join("model.safetensors"), &trained.exported).unwrap();
    let (inputs, _) = batch();
    for tiles in [1, 2, TILES] {
        let mut pretrained = Pretrained::open(target.path(), 32).unwrap();
        pretrained.perceptron_tiles = tiles;
        let (mut trainer, model) = trainer(&pretrained, &Adapting::default(), Config::default()).unwrap();
        let logits = trainer.evaluate(|| model.next_logits(&inputs)).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in logits.iter().zip(&trained.logits) {
            assert!((a - b).abs() <= 1e-5, "{tiles} tiles: {a} {b}");
        }
        if tiles == TILES {
            assert!(logits == trained.logits, "the same tiles have the same bits");
        }
    }
}

const WIDE: GptConfig = GptConfig { vocabulary: 64, layers: 3, hidden: 256, heads: 4, sequence: 16 };

fn wide(config: Config, tiles: usize) -> Result<(Trainer, Gpt<StreamedBlock>)> {
    let engine = Engine::new(config)?;
    let none = Adapting::default();
    let block = |vb, _| StreamedBlock::from_config(&engine, &WIDE, &none, tiles, vb);
    let model = Gpt::new(&WIDE, engine.var_builder(), block)?;
    let plan = engine.plan(AdamW::default(), |_| wide_loss(&model))?;
    Ok((engine.trainer_from(plan)?, model))
}

fn wide_loss(model: &Gpt<StreamedBlock>) -> candle_core::Result<Tensor> {
    let tokens: Vec<u32> = (0..17).map(|i| i * 29 % 64).collect();
    let row = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0);
    model.loss(&row(&tokens[..16])?, &row(&tokens[1..])?)
}

#[test]
fn tiles_train_in_memory_that_the_whole_block_does_not_fit_and_placement_changes_no_bit() {
    let config = |memory_bytes| Config {
        memory_bytes,
        // This program does not count what tensors take.
        working_bytes: Some(0),
        backend: BackendChoice::Memory,
        piece_bytes: Some(256 << 10),
        ..Config::default()
    };
    let least = |tiles| match wide(config(Some(1)), tiles).err() {
        Some(Error::BudgetTooSmall { least_bytes, .. }) => least_bytes,
        other => panic!("{other:?}"),
    };
    let (small, whole) = (least(4), least(1));
    // A slot and a set of gradients, each of a block or of its attention, which is a third.
    let block_bytes = (4 * 12 * WIDE.hidden * WIDE.hidden) as u64;
    assert!(small + block_bytes < whole, "{small} and {whole} bytes");
    let digest = |config: Config| {
        let (mut trainer, model) = wide(config, 4).unwrap();
        let losses: Vec<f32> = (0..2).map(|_| trainer.step(|_| wide_loss(&model)).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    let in_memory = digest(config(None));
    assert_eq!(digest(config(Some(small))), in_memory);
    let on_disk = Config { boundaries: Some(Tier::Disk), ..config(None) };
    assert_eq!(digest(Config { placement: Placement::All(Tier::Disk), ..on_disk }), in_memory);
}

/// By their shapes alone.
#[test]
fn models_of_moderate_size_have_no_tiles_and_large_ones_do() {
    let gpt = |hidden| GptConfig { hidden, ..WIDE }.perceptron_tiles();
    assert_eq!([768, 1600, 2048, 4096, 5120].map(gpt), [1; 5]);
    assert_eq!(gpt(12288), 2, "of the size of GPT-3 175B: no larger than its attention");
    let llama = |hidden: usize, perceptron: usize, heads: usize| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(self::folder("llama").join("config.json")).unwrap();
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (key, size) in [
            ("hidden_size", hidden),
            ("intermediate_size", perceptron),
            ("num_attention_heads", heads),
            ("num_key_value_heads", 8),
            ("head_dim", 128),
        ] {
            value[key] = size.into();
        }
        std::fs::write(&path, value.to_string()).unwrap();
        ModelShape::from_hugging_face(&path, 32).unwrap()
    };
    assert_eq!(llama(2048, 8192, 16).perceptron_tiles, 1, "of the size of Llama 3.2 1B");
    assert_eq!(llama(4096, 14336, 32).perceptron_tiles, 1, "of the size of Llama 3 8B");
    let large = llama(8192, 28672, 64);
    assert_eq!(large.perceptron_tiles, 3, "of the size of Llama 3 70B");
    let largest = |shape: &ModelShape| {
        let groups = shape.layout(1 << 20, 1).groups;
        groups.iter().filter(|group| !group.resident).map(|group| group.elements).max().unwrap()
    };
    let whole = ModelShape { perceptron_tiles: 1, ..large.clone() };
    assert_eq!(whole.parameters(), large.parameters());
    assert!(3 * largest(&large) < largest(&whole));
}

/// Segment by segment: attention and four tiles, a block.
#[test]
fn the_shape_has_the_groups_of_the_model() {
    let (trainer, _) = wide(Config::default(), 4).unwrap();
    let mut shape = ModelShape::gpt(WIDE.vocabulary, WIDE.layers, WIDE.hidden, WIDE.heads, WIDE.sequence);
    shape.perceptron_tiles = 4;
    let layout = trainer.plan().layout();
    let predicted = shape.layout(layout.piece_elements, 1);
    let elements =
        |layout: &Layout| -> Vec<u64> { layout.groups.iter().map(|group| group.device_elements()).collect() };
    assert_eq!(elements(&predicted), elements(layout));
    assert_eq!(predicted.groups.len(), WIDE.layers * 5 + 1);
}
