//! Linear layers in tiles: the numbers of the whole layer in less memory, and one tensor in every file.

use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::pretrained::Pretrained;
use ferrozero::{
    AdamW, BackendChoice, Checkpoint, Config, Engine, Error, Placement, Result, Segment, Tier, TiledLinear,
    Trainer,
};
use ferrozero_kernels::ops;
use std::path::Path;

const WIDTH: usize = 512;
const OUTPUTS: usize = 8000;
const INIT: Init = Init::Randn { mean: 0.0, stdev: 0.03 };

enum Layer {
    Whole(Segment<[Tensor; 2]>),
    Tiled(TiledLinear),
}

/// A layer that is much larger than the rest of the model, whose outputs are an activation and as logits of
/// 8000 tokens.
struct Model {
    input: Tensor,
    wide: Layer,
    head: Layer,
}

impl Model {
    fn new(engine: &Engine, tiles: Option<usize>) -> Result<Self> {
        let vb = engine.var_builder();
        let layer = |name: &str, bias: bool| match tiles {
            Some(tiles) => {
                let sizes = (WIDTH, OUTPUTS);
                TiledLinear::new(engine, sizes, tiles, bias, INIT, vb.pp(name)).map(Layer::Tiled)
            }
            None => engine
                .segment(vb.pp(name), |vb: VarBuilder| {
                    let weight = vb.get_with_hints((OUTPUTS, WIDTH), "weight", INIT)?;
                    let bias = match bias {
                        true => vb.get_with_hints(OUTPUTS, "bias", Init::Const(0.0))?,
                        false => Tensor::zeros(OUTPUTS, weight.dtype(), weight.device())?,
                    };
                    Ok([weight, bias])
                })
                .map(Layer::Whole),
        };
        Ok(Self {
            input: vb.get_with_hints((40, WIDTH), "input", INIT)?,
            wide: layer("wide", true)?,
            head: layer("head", false)?,
        })
    }

    fn loss(&self) -> candle_core::Result<Tensor> {
        let targets: Vec<u32> = (0..40).map(|row| row * 200).collect();
        let targets = Tensor::new(targets, &Device::Cpu)?;
        let wide = match &self.wide {
            Layer::Whole(layer) => layer.call(&[&(&self.input * 1.0)?], |[weight, bias], inputs| {
                ops::linear(&inputs[0], weight, Some(bias))
            })?,
            Layer::Tiled(layer) => layer.forward(&self.input)?,
        };
        let head = match &self.head {
            Layer::Whole(layer) => layer.call(&[&(&self.input * 1.0)?], move |[weight, _], inputs| {
                ops::linear_cross_entropy(&inputs[0], weight, &targets)
            })?,
            Layer::Tiled(layer) => layer.cross_entropy(&self.input, &targets)?,
        };
        wide.sqr()?.mean_all()? * 0.1 + head
    }
}

fn trainer(config: Config, tiles: Option<usize>) -> Result<(Trainer, Model)> {
    let engine = Engine::new(config)?;
    let model = Model::new(&engine, tiles)?;
    let plan = engine.plan(AdamW::default(), |_| model.loss())?;
    Ok((engine.trainer_from(plan)?, model))
}

#[test]
fn tiles_have_the_loss_and_the_gradients_of_the_whole_layer_under_the_names_of_one() {
    let train = |tiles| {
        let (mut trainer, model) = trainer(Config::default(), tiles).unwrap();
        // The first step of AdamW shows signs of gradients alone; their norm shows sizes.
        let steps: Vec<_> = (0..4).map(|_| trainer.step(|_| model.loss()).unwrap()).collect();
        let numbers: Vec<f64> =
            steps.iter().flat_map(|step| [f64::from(step.loss), step.gradient_norm]).collect();
        let names = trainer.parameters();
        let weights: Vec<Vec<f32>> = names.iter().map(|(name, _)| trainer.parameter(name).unwrap()).collect();
        (numbers, names, weights)
    };
    let whole = train(None);
    assert_eq!(whole.1[0], ("head.weight".to_owned(), vec![OUTPUTS, WIDTH]));
    for tiles in [1, 7] {
        let tiled = train(Some(tiles));
        assert_eq!(tiled.1, whole.1);
        for (a, b) in tiled.0.iter().zip(&whole.0) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b} with {tiles} tiles");
        }
        for (a, b) in tiled.2.iter().flatten().zip(whole.2.iter().flatten()) {
            assert!((a - b).abs() <= 1e-5, "{a} {b} with {tiles} tiles");
        }
    }
}

#[test]
fn tiles_train_in_memory_that_the_whole_layer_does_not_fit_and_placement_changes_no_bit() {
    let config = |memory_bytes| Config {
        memory_bytes,
        // This program does not count what tensors take.
        working_bytes: Some(0),
        backend: BackendChoice::Memory,
        piece_bytes: Some(512 << 10),
        ..Config::default()
    };
    let least = |tiles| match trainer(config(Some(1)), tiles).err() {
        Some(Error::BudgetTooSmall { least_bytes, .. }) => least_bytes,
        other => panic!("{other:?}"),
    };
    let slot_bytes = (4 * OUTPUTS * WIDTH) as u64;
    let small = least(Some(32));
    assert!(small < slot_bytes && slot_bytes < least(None), "{small} {slot_bytes} {}", least(None));
    let small = Some(small);
    let digest = |config: Config| {
        let (mut trainer, model) = trainer(config, Some(32)).unwrap();
        let losses: Vec<f32> = (0..2).map(|_| trainer.step(|_| model.loss()).unwrap().loss).collect();
        (losses, trainer.weights_digest().unwrap())
    };
    assert_eq!(digest(config(small)), digest(config(None)));
}

#[test]
fn the_head_of_a_pretrained_model_runs_in_tiles() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pretrained/llama");
    let tokens: Vec<u32> = (0..33).map(|i| i * 29 % 96).collect();
    let row = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (inputs, targets) = (row(&tokens[..32]), row(&tokens[1..]));
    let train = |head_tiles| {
        let mut pretrained = Pretrained::open(&folder, 32).unwrap();
        assert_eq!(pretrained.head_tiles, 1, "the head is smaller than a layer");
        pretrained.head_tiles = head_tiles;
        let run = tempfile::tempdir().unwrap();
        let config = Config {
            initial_values: Some(pretrained.weights.clone()),
            directory: Some(run.path().to_owned()),
            placement: Placement::All(Tier::Disk),
            ..Config::default()
        };
        let engine = Engine::new(config).unwrap();
        let model = pretrained.build(&engine, &Adapting::default()).unwrap();
        let loss = || model.loss(&inputs, &targets, None);
        let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
        let mut trainer = engine.trainer_from(plan).unwrap();
        let before = trainer.parameter("lm_head.weight").unwrap();
        let names = trainer.parameters();
        let steps = [0; 3].map(|_| trainer.step(|_| loss()).unwrap());
        let logits = trainer.evaluate(|| model.next_logits(&inputs)).unwrap();
        // What a checkpoint exports without its model is what the run exports.
        trainer.commit(serde_json::json!({})).unwrap();
        let [exported, again] = ["exported", "again"].map(|name| run.path().join(name));
        trainer.export_safetensors(&exported).unwrap();
        drop(trainer);
        Checkpoint::open(run.path()).unwrap().export_safetensors(&again).unwrap();
        assert_eq!(std::fs::read(exported).unwrap(), std::fs::read(again).unwrap());
        let numbers = steps.map(|step| [f64::from(step.loss), step.gradient_norm]);
        (before, numbers, names, logits.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let (whole, tiled) = (train(1), train(5));
    assert_eq!((&tiled.0, &tiled.2), (&whole.0, &whole.2));
    for (a, b) in tiled.1.iter().flatten().zip(whole.1.iter().flatten()) {
        assert!((a - b).abs() <= 1e-6 * b, "{a} {b}");
    }
    for (a, b) in tiled.3.iter().zip(&whole.3) {
        assert!((a - b).abs() <= 1e-4, "{a} {b}");
    }
}

#[test]
fn a_layer_that_cannot_be_and_a_target_that_is_no_output_are_errors() {
    let engine = Engine::new(Config::default()).unwrap();
    for (outputs, tiles) in [(8, 0), (0, 2)] {
        let error = TiledLinear::new(&engine, (4, outputs), tiles, false, INIT, engine.var_builder().pp("x"));
        assert!(matches!(error.err(), Some(Error::Configuration(_))));
    }
    let layer = TiledLinear::new(&engine, (4, 8), 3, false, INIT, engine.var_builder().pp("layer")).unwrap();
    let hidden = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    let targets = Tensor::new(&[8u32], &Device::Cpu).unwrap();
    let error = engine.plan(AdamW::default(), |_| layer.cross_entropy(&hidden, &targets)).unwrap_err();
    assert!(error.to_string().contains("target 8"), "{error}");
}
