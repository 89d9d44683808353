//! A model that was written for candle alone, trained by candle alone and then by the engine: from the same
//! initial values, on the same images, within a memory budget, with its states on disk.
//!
//! ```sh
//! cargo run --release --example wrap_candle_model
//! ```
//!
//! The model is an MLP-Mixer (Tolstikhin et al., arXiv 2105.01601). What the engine changes is marked with
//! "changed".
//!
//! B: images of a batch, T: patches of an image, C: channels of a patch.

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Init, Linear, Optimizer, VarBuilder, VarMap, linear};
use ferrozero::{AdamW, Engine, import_safetensors};
use ferrozero_offload::memory;
use std::path::Path;
use std::sync::Arc;

// Lets the plan count what candle's tensors take on the heap. Optional: without it the plan leaves them out.
ferrozero::global_allocator!();

// ----------------------------------------------------------------------------------- the model: plain candle

const PATCHES: usize = 16; // T
const CHANNELS: usize = 256; // C
const PATCH_VALUES: usize = 48; // 4 × 4 pixels of three colours
const CLASSES: usize = 4;
const BLOCKS: usize = 12;

/// A layer norm of candle's elementary operations. The fused one of candle-nn has no backward.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(CHANNELS, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(CHANNELS, "bias", Init::Const(0.0))?,
        })
    }
}

impl Module for Norm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let centered = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?; // [B, T, C]
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?; // [B, T, 1]
        let normal = centered.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
        normal.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

struct Perceptron {
    up: Linear,
    down: Linear,
}

impl Perceptron {
    fn new(width: usize, hidden: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { up: linear(width, hidden, vb.pp("up"))?, down: linear(hidden, width, vb.pp("down"))? })
    }
}

impl Module for Perceptron {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.down.forward(&self.up.forward(xs)?.gelu()?)
    }
}

/// Mixes patches, then channels.
struct Block {
    norm_1: Norm,
    of_patches: Perceptron,
    norm_2: Norm,
    of_channels: Perceptron,
}

impl Block {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm_1: Norm::new(vb.pp("norm_1"))?,
            of_patches: Perceptron::new(PATCHES, 2 * PATCHES, vb.pp("of_patches"))?,
            norm_2: Norm::new(vb.pp("norm_2"))?,
            of_channels: Perceptron::new(CHANNELS, 4 * CHANNELS, vb.pp("of_channels"))?,
        })
    }
}

impl Module for Block {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let transposed = self.norm_1.forward(xs)?.transpose(1, 2)?.contiguous()?; // [B, C, T]
        let mixed = self.of_patches.forward(&transposed)?.transpose(1, 2)?; // [B, T, C]
        let xs = (xs + mixed)?;
        &xs + self.of_channels.forward(&self.norm_2.forward(&xs)?)? // [B, T, C]
    }
}

/// The whole model. It is generic over what holds a block, so that this program can have it both ways.
struct Mixer<B> {
    embedding: Linear,
    blocks: Vec<B>,
    norm: Norm,
    head: Linear,
}

impl<B: Module> Mixer<B> {
    fn new(vb: VarBuilder, blocks: Vec<B>) -> Result<Self> {
        Ok(Self {
            embedding: linear(PATCH_VALUES, CHANNELS, vb.pp("embedding"))?,
            blocks,
            norm: Norm::new(vb.pp("norm"))?,
            head: linear(CHANNELS, CLASSES, vb.pp("head"))?,
        })
    }

    /// Mean cross-entropy of the classes [B] of images [B, T, 48].
    fn loss(&self, images: &Tensor, classes: &Tensor) -> Result<Tensor> {
        let mut xs = self.embedding.forward(images)?; // [B, T, C]
        for block in &self.blocks {
            xs = block.forward(&xs)?;
        }
        let logits = self.head.forward(&self.norm.forward(&xs)?.mean(1)?)?; // [B, 4]
        candle_nn::loss::cross_entropy(&logits, classes)
    }
}

// -------------------------------------------------------------------------------------------------- the data

const BATCH: usize = 4; // B
const STEPS: u64 = 8;
const LEARNING_RATE: f64 = 5e-4;

/// Images [B, T, 48] of waves whose length tells their class [B], with noise from a congruential generator.
fn batch(step: u64) -> Result<(Tensor, Tensor)> {
    let mut state = step + 1;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut classes = vec![];
    let mut values = vec![];
    for _ in 0..BATCH {
        let class = (uniform() * CLASSES as f32) as u32;
        classes.push(class);
        for value in 0..PATCHES * PATCH_VALUES {
            let phase = value as f32 * (class + 1) as f32 / 40.0;
            values.push(phase.sin() + 0.2 * (uniform() - 0.5));
        }
    }
    let images = Tensor::from_vec(values, (BATCH, PATCHES, PATCH_VALUES), &Device::Cpu)?;
    Ok((images, Tensor::from_vec(classes, BATCH, &Device::Cpu)?))
}

// ----------------------------------------------------------------------------------- trained by candle alone

/// Trains with everything in memory, writes the initial values to `initial`, and answers the losses.
fn train_with_candle(initial: &Path) -> Result<Vec<f32>> {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let blocks = (0..BLOCKS).map(|i| Block::new(vb.pp(format!("blocks.{i}")))).collect::<Result<_>>()?;
    let model = Mixer::new(vb, blocks)?;
    variables.save(initial)?;
    let mut optimizer = candle_nn::AdamW::new_lr(variables.all_vars(), LEARNING_RATE)?;
    let mut losses = vec![];
    for step in 0..STEPS {
        let (images, classes) = batch(step)?;
        let loss = model.loss(&images, &classes)?;
        optimizer.backward_step(&loss)?;
        losses.push(loss.to_scalar()?);
    }
    Ok(losses)
}

// ------------------------------------------------------------------------------------- trained by the engine

const MEMORY_BYTES: u64 = 32 << 20;

/// Trains within [`MEMORY_BYTES`] from the values in `initial`, with states in `directory`, and answers the
/// losses.
fn train_with_engine(initial: &Path, directory: &Path) -> ferrozero::Result<Vec<f32>> {
    // Only because candle went first, and the CPU's random numbers of candle have no seed. A run of its own
    // leaves out this line and `resume`: then the engine makes the initial values.
    import_safetensors(initial, directory)?;
    let engine = Engine::builder().memory_bytes(MEMORY_BYTES).directory(directory).resume(true).build()?;
    let blocks = engine.segments("blocks", BLOCKS, |_, vb| Block::new(vb))?; // changed: instead of Block::new
    let model = Mixer::new(engine.var_builder(), blocks)?; // changed: instead of a VarMap
    // candle's AdamW lets every parameter decay; the engine's default spares norms and biases.
    let adamw = AdamW { learning_rate: LEARNING_RATE, decays: Arc::new(|_, _| true), ..AdamW::default() };
    let (images, classes) = batch(0)?;
    let mut trainer = engine.trainer(adamw, |_| model.loss(&images, &classes))?;
    println!("{}\n", trainer.plan());
    let mut losses = vec![];
    for step in 0..STEPS {
        let (images, classes) = batch(step)?;
        let report = trainer.step(|_| model.loss(&images, &classes))?; // changed: instead of backward_step
        losses.push(report.loss);
    }
    Ok(losses)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let initial = folder.path().join("initial.safetensors");
    let of_candle = train_with_candle(&initial)?;
    let candle_peak_bytes = memory::peak_bytes();
    let of_engine = train_with_engine(&initial, &folder.path().join("run"))?;

    println!("step     candle     engine");
    let mut largest = 0.0f32;
    for (step, (candle, engine)) in of_candle.iter().zip(&of_engine).enumerate() {
        println!("{:>4} {candle:>10.6} {engine:>10.6}", step + 1);
        largest = largest.max((candle - engine).abs());
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "peak of candle: {:.0} MiB; budget of the engine: {:.0} MiB",
        mib(candle_peak_bytes),
        mib(MEMORY_BYTES)
    );
    println!("largest difference of two losses: {largest:.1e}");
    Ok(())
}
