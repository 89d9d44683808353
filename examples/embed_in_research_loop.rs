//! The engine inside an experiment that has a loss, a loop, data and a schedule of its own.
//!
//! ```sh
//! cargo run --release --example embed_in_research_loop
//! ```
//!
//! A model learns a function of the plane from noisy samples, and how noisy they are: its loss is the
//! negative log-likelihood of a normal distribution, whose standard deviation is a parameter too. The points
//! pass through frozen random features (Rahimi and Recht, "Random features for large-scale kernel machines",
//! 2007). An observer looks at gradients before they leave the device, and a parameter is read in
//! mid-training. In the middle, the run commits with the state of its own loop; it ends, is resumed from
//! there, and must end with the same bits.
//!
//! B: points of a batch, F: features, C: width.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder, linear};
use ferrozero::{AdamW, Config, Engine, Segment, Trainer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

// Lets the plan count what candle's tensors take on the heap.
ferrozero::global_allocator!();

type AnyResult<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const FEATURES: usize = 128; // F
const WIDTH: usize = 256; // C
const BLOCKS: usize = 6;
const BATCH: usize = 64; // B
const STEPS: u64 = 120;
const COMMIT_AT: u64 = 60;
const NOISE: f32 = 0.1;
const SCALE: f32 = 40.0;

// ------------------------------------------------------------------------------------------------- the model

struct Block {
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(vb: VarBuilder) -> Result<Self> {
        // Small, so that all blocks together are close to the identity at first.
        let small = Init::Randn { mean: 0.0, stdev: 0.01 };
        let down = vb.get_with_hints((WIDTH, WIDTH), "down.weight", small)?;
        Ok(Self { up: linear(WIDTH, WIDTH, vb.pp("up"))?, down: Linear::new(down, None) })
    }
}

impl Module for Block {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        xs + self.down.forward(&self.up.forward(xs)?.gelu()?)? // [B, C]
    }
}

struct Regressor {
    waves: Tensor,
    entrance: Linear,
    blocks: Vec<Segment<Block>>,
    head: Linear,
    /// The logarithm of the standard deviation over [`SCALE`]: AdamW moves every parameter about as far, and
    /// this one has far to go.
    log_deviation: Tensor,
}

impl Regressor {
    fn new(engine: &Engine) -> ferrozero::Result<Self> {
        let vb = engine.var_builder();
        let blocks = engine.segments("blocks", BLOCKS, |_, vb| Block::new(vb))?;
        Ok(Self {
            waves: vb.get_with_hints((2, FEATURES), "waves", Init::Randn { mean: 0.0, stdev: 1.5 })?,
            entrance: linear(2 * FEATURES, WIDTH, vb.pp("entrance"))?,
            blocks,
            head: linear(WIDTH, 1, vb.pp("head"))?,
            log_deviation: vb.get_with_hints(1, "log_deviation", Init::Const(0.0))?,
        })
    }

    /// Predictions [B, 1] at points [B, 2].
    fn forward(&self, points: &Tensor) -> Result<Tensor> {
        let phases = points.matmul(&self.waves)?; // [B, F]
        let features = Tensor::cat(&[phases.sin()?, phases.cos()?], 1)?; // [B, 2F]
        let mut xs = self.entrance.forward(&features)?; // [B, C]
        for block in &self.blocks {
            xs = block.forward(&xs)?;
        }
        self.head.forward(&xs) // [B, 1]
    }

    /// Negative log-likelihood of values [B, 1] at points [B, 2], without its constant.
    fn loss(&self, points: &Tensor, values: &Tensor) -> Result<Tensor> {
        let errors = (self.forward(points)? - values)?;
        let log_deviation = (&self.log_deviation * f64::from(SCALE))?; // [1]
        let scaled = errors.broadcast_div(&log_deviation.exp()?)?; // [B, 1]
        (scaled.sqr()?.mean_all()? * 0.5)? + log_deviation.mean_all()?
    }
}

// -------------------------------------------------------------------------------------------------- the data

/// Random numbers that a commit can hold (Steele et al., "Fast splittable pseudorandom number generators",
/// 2014).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f32 {
        ((self.bits() >> 40) + 1) as f32 / (1 << 24) as f32
    }

    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

/// Points [B, 2] in the square from -1 to 1 and noisy values [B, 1] there.
fn samples(count: usize, random: &mut Random) -> Result<(Tensor, Tensor)> {
    let (mut points, mut values) = (vec![], vec![]);
    for _ in 0..count {
        let (x, y) = (2.0 * random.uniform() - 1.0, 2.0 * random.uniform() - 1.0);
        points.extend([x, y]);
        values.push((3.0 * x).sin() * (2.0 * y).cos() + NOISE * random.normal());
    }
    let points = Tensor::from_vec(points, (count, 2), &Device::Cpu)?;
    Ok((points, Tensor::from_vec(values, (count, 1), &Device::Cpu)?))
}

// -------------------------------------------------------------------------------------------------- the loop

/// What the loop must know to go on: it travels in the commit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Progress {
    random: Random,
    best_error: f32,
}

/// Rises for ten steps, then falls along a cosine.
fn learning_rate(step: u64) -> f64 {
    let (rise, highest) = (10, 2e-3);
    if step < rise {
        return highest * (step + 1) as f64 / rise as f64;
    }
    let share = (step - rise) as f64 / (STEPS - rise) as f64;
    highest * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
}

/// Starts in `directory`, or goes on from the last commit there.
fn open(directory: &Path, resume: bool) -> AnyResult<(Trainer, Regressor, Progress)> {
    let engine = Engine::new(Config {
        memory_bytes: Some(16 << 20),
        directory: Some(directory.to_owned()),
        piece_bytes: Some(64 << 10),
        clip: Some(1.0),
        resume,
        ..Config::default()
    })?;
    let progress = match engine.resumed() {
        Some(committed) => serde_json::from_value(committed.clone())?,
        None => Progress { random: Random(7), best_error: f32::INFINITY },
    };
    engine.freeze(|name, _| name == "waves")?; // before the parameters are asked for
    let model = Regressor::new(&engine)?;
    // The rehearsal asks for the loss once, to see shapes and the order of segments: any batch of the right size
    // will do.
    let points = Tensor::zeros((BATCH, 2), DType::F32, &Device::Cpu)?;
    let values = Tensor::zeros((BATCH, 1), DType::F32, &Device::Cpu)?;
    let trainer = engine.trainer(AdamW::default(), |_| model.loss(&points, &values))?;
    if !resume {
        println!("{}\n", trainer.plan());
    }
    Ok((trainer, model, progress))
}

/// Norms of the gradients of the last step, by parameter.
type Norms = Arc<Mutex<BTreeMap<String, f32>>>;

/// Looks at every gradient that autograd makes, before it leaves the device. What is kept is a number: the
/// tensor's storage goes.
fn observe(trainer: &mut Trainer) -> Norms {
    let norms = Norms::default();
    let kept = norms.clone();
    trainer.observe_gradients(move |gradient| {
        let norm = gradient.values.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        let mut kept = kept.lock().map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        kept.insert(gradient.name.to_owned(), norm);
        Ok(())
    });
    norms
}

/// Trains to the last step, commits on the way, and answers the digest of the weights.
fn run(trainer: &mut Trainer, model: &Regressor, mut progress: Progress) -> AnyResult<String> {
    let norms = observe(trainer);
    let (test_points, test_values) = samples(BATCH, &mut Random(1))?;
    while trainer.steps() < STEPS {
        trainer.set_learning_rate(learning_rate(trainer.steps()))?;
        let (points, values) = samples(BATCH, &mut progress.random)?;
        let report = trainer.step(|_| model.loss(&points, &values))?;
        if report.step % 20 == 0 {
            // No graph is kept, and what the closure answers need not be a loss.
            let error = trainer.evaluate(|| {
                let errors = (model.forward(&test_points)? - &test_values)?;
                errors.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()
            })?;
            progress.best_error = progress.best_error.min(error);
            // A parameter in mid-training, brought from wherever it is.
            let deviation = (SCALE * trainer.parameter("log_deviation")?[0]).exp();
            let norms = norms.lock().map_err(|error| error.to_string())?;
            let steepest = norms.iter().max_by(|a, b| a.1.total_cmp(b.1));
            let steepest = steepest.map_or("nothing", |(name, _)| name);
            println!(
                "step {:>3}: loss {:>7.4}, gradient norm {:>6.3}, most of it of {steepest}, learning rate \
                 {:.1e}, test error {error:.3}, noise estimated at {deviation:.3}",
                report.step, report.loss, report.gradient_norm, report.learning_rate
            );
        }
        if report.step == COMMIT_AT {
            let generation = trainer.commit(serde_json::to_value(&progress)?)?;
            println!("commit {generation} holds step {COMMIT_AT} and {progress:?}");
        }
    }
    println!("best test error {:.3}; the noise is {NOISE}\n", progress.best_error);
    Ok(trainer.weights_digest()?)
}

fn main() -> AnyResult<()> {
    let folder = tempfile::tempdir()?;
    let directory = folder.path().join("run");

    let (mut trainer, model, progress) = open(&directory, false)?;
    let waves = trainer.parameter("waves")?;
    let without_stop = run(&mut trainer, &model, progress)?;
    if trainer.parameter("waves")? != waves {
        return Err("a frozen parameter changed".into());
    }
    drop(trainer); // One trainer a folder. What it did after its commit is gone now.

    let (mut trainer, model, progress) = open(&directory, true)?;
    println!("resumed at step {} with {progress:?}", trainer.steps());
    let resumed = run(&mut trainer, &model, progress)?;
    println!("never stopped: {without_stop}");
    println!("resumed:       {resumed}");
    if resumed != without_stop {
        return Err("the resumed run ended with other weights".into());
    }
    println!("the digests are equal");
    Ok(())
}
