//! Models as anyone may write them. One that cannot be trained ends with an error that says why: it never
//! hangs, and it never trains on wrong gradients in silence.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero::{AdamW, Config, Engine, Error, Placement, Segment, Tier, Trainer};
use std::path::Path;

const WIDTH: usize = 8;

/// A matrix.
struct Layer {
    weight: Tensor,
}

impl Layer {
    fn new(vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.3 };
        Ok(Self { weight: vb.get_with_hints((WIDTH, WIDTH), "weight", init)? })
    }

    fn of(&self, xs: &Tensor) -> Result<Tensor> {
        xs.matmul(&self.weight)?.tanh()
    }
}

fn segment(engine: &Engine, name: &str) -> Segment<Layer> {
    engine.segment(engine.var_builder().pp(name), Layer::new).unwrap()
}

fn inputs() -> Tensor {
    let values: Vec<f32> = (0..4 * WIDTH).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_vec(values, (4, WIDTH), &Device::Cpu).unwrap()
}

fn forward(segment: &Segment<Layer>, xs: &Tensor) -> Result<Tensor> {
    segment.call(&[xs], |layer, inputs| layer.of(&inputs[0]))
}

/// A trainer of a chain of two segments, whose loss is their output's mean times `factor`.
fn chain(config: Config, factor: f64) -> ferrozero::Result<(Trainer, impl Fn() -> Result<Tensor>)> {
    let engine = Engine::new(config)?;
    let (first, second) = (segment(&engine, "first"), segment(&engine, "second"));
    let loss = move || forward(&second, &forward(&first, &inputs())?)?.sqr()?.mean_all()? * factor;
    let plan = engine.plan(AdamW::default(), |_| loss())?;
    Ok((engine.trainer_from(plan)?, loss))
}

fn in_folder(folder: &Path) -> Config {
    Config { directory: Some(folder.join("run")), piece_bytes: Some(8192), ..Config::default() }
}

#[test]
fn settings_of_the_optimizer_that_are_no_numbers_are_refused() {
    type Setting = fn(&mut AdamW) -> &mut f64;
    let settings: [(&str, Setting); 5] = [
        ("learning_rate", |adamw| &mut adamw.learning_rate),
        ("beta1", |adamw| &mut adamw.beta1),
        ("beta2", |adamw| &mut adamw.beta2),
        ("epsilon", |adamw| &mut adamw.epsilon),
        ("weight_decay", |adamw| &mut adamw.weight_decay),
    ];
    let engine = Engine::new(Config::default()).unwrap();
    let first = segment(&engine, "first");
    for (name, setting) in settings {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-3, 1e300] {
            let mut adamw = AdamW::default();
            *setting(&mut adamw) = value;
            let error = engine.plan(adamw, |_| forward(&first, &inputs())?.sum_all()).map(drop).unwrap_err();
            assert!(matches!(&error, Error::Configuration(text) if text.contains(name)), "{error}");
        }
    }
    let (mut trainer, loss) = chain(Config::default(), 1.0).unwrap();
    for value in [f64::NAN, f64::INFINITY, -1e-3, 1e300] {
        let error = trainer.set_learning_rate(value).unwrap_err();
        assert!(matches!(&error, Error::Configuration(text) if text.contains("learning_rate")), "{error}");
    }
    assert_eq!(trainer.step(|_| loss()).unwrap().learning_rate, AdamW::default().learning_rate);
}

#[test]
fn a_state_that_is_not_finite_is_never_committed() {
    for (home, clip) in [
        (Tier::Device, None),
        (Tier::Host, None),
        (Tier::Disk, None),
        (Tier::Disk, Some(1e30)),
        (Tier::Device, Some(1e30)),
    ] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = Config { placement: Placement::All(home), clip, ..in_folder(folder.path()) };
        let (mut trainer, loss) = chain(config.clone(), 1.0).unwrap();
        trainer.step(|_| loss()).unwrap();
        trainer.commit(serde_json::Value::Null).unwrap();
        let good = trainer.weights_digest().unwrap();
        // Gradients are finite, and their squares are not.
        let failed = trainer.step(|_| loss()? * 1e25).map(drop);
        let error = failed.and_then(|()| trainer.commit(serde_json::Value::Null).map(drop)).unwrap_err();
        let Error::NonFiniteState { group, step, .. } = &error else { panic!("{home:?} {clip:?}: {error}") };
        assert!(["first", "second"].contains(&group.as_str()) && *step == 2, "{home:?}: {error}");
        trainer.commit(serde_json::Value::Null).unwrap_err();
        drop(trainer);
        let (resumed, _) = chain(Config { resume: true, ..config }, 1.0).unwrap();
        assert_eq!((resumed.steps(), resumed.weights_digest().unwrap()), (1, good));
    }
}
