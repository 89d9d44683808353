//! A small model that tests train in every way.

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use ferrozero::internals::planner::machine::Machine;
use ferrozero::{AdamW, Config, Engine, Segment, Trainer};

/// A residual block of two layers, of plain candle operations.
pub struct Block {
    up: Tensor,
    bias: Tensor,
    down: Tensor,
}

impl Block {
    pub fn new(vb: VarBuilder, width: usize) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.05 };
        Ok(Self {
            up: vb.get_with_hints((width, 3 * width), "up", init)?,
            bias: vb.get_with_hints(3 * width, "bias", Init::Const(0.01))?,
            down: vb.get_with_hints((3 * width, width), "down", init)?,
        })
    }
}

impl Module for Block {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        xs + xs.matmul(&self.up)?.broadcast_add(&self.bias)?.gelu()?.matmul(&self.down)?
    }
}

/// Embedding, blocks and a head tied to the embedding. Generic over the block, so that plain candle can run
/// it too.
pub struct Model<B> {
    embedding: Tensor,
    blocks: Vec<B>,
}

pub const WIDTH: usize = 48;
pub const VOCABULARY: usize = 40;

impl<B: Module> Model<B> {
    pub fn new(vb: &VarBuilder, width: usize, blocks: Vec<B>) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.1 };
        Ok(Self { embedding: vb.get_with_hints((VOCABULARY, width), "embedding", init)?, blocks })
    }

    pub fn loss(&self, tokens: &Tensor) -> Result<Tensor> {
        let tokens = tokens.to_device(self.embedding.device())?;
        let inputs = tokens.narrow(0, 0, tokens.dim(0)? - 1)?;
        let targets = tokens.narrow(0, 1, tokens.dim(0)? - 1)?.contiguous()?;
        let mut xs = self.embedding.index_select(&inputs.contiguous()?, 0)?;
        for block in &self.blocks {
            xs = block.forward(&xs)?;
        }
        candle_nn::loss::cross_entropy(&xs.matmul(&self.embedding.t()?)?, &targets)
    }
}

/// A described machine. Tests that plan often, or whose plans must not depend on what else runs meanwhile, do
/// not measure their own.
pub fn machine() -> Machine {
    Machine {
        disk_read_bytes_per_s: 2e9,
        disk_write_bytes_per_s: 2e9,
        upload_bytes_per_s: 8e9,
        download_bytes_per_s: 8e9,
        optimizer_bytes_per_s: 2e10,
        ..Machine::default()
    }
}

/// Tokens of a step and micro-batch.
pub fn tokens(step: u64, micro_batch: usize) -> Tensor {
    let mut state = step * 1000 + micro_batch as u64 + 1;
    let tokens: Vec<u32> = (0..33)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % VOCABULARY as u64) as u32
        })
        .collect();
    Tensor::new(tokens, &Device::Cpu).unwrap()
}

/// The model in an engine.
pub fn engine_model(engine: &Engine, blocks: usize) -> ferrozero::Result<Model<Segment<Block>>> {
    let vb = engine.var_builder();
    let blocks = (0..blocks)
        .map(|i| engine.segment(vb.pp(format!("h.{i}")), |vb| Block::new(vb, WIDTH)))
        .collect::<ferrozero::Result<_>>()?;
    Ok(Model::new(&vb, WIDTH, blocks)?)
}

/// A trainer of the model.
pub fn trainer(config: Config, blocks: usize) -> ferrozero::Result<(Trainer, Model<Segment<Block>>)> {
    let engine = Engine::new(config)?;
    let model = engine_model(&engine, blocks)?;
    let adamw = AdamW { learning_rate: 3e-3, ..AdamW::default() };
    let plan = engine.plan(adamw, |_| model.loss(&tokens(0, 0)))?;
    Ok((engine.trainer_from(plan)?, model))
}

/// Trains some steps and answers the losses and the digest of the weights.
pub fn train(config: Config, blocks: usize, steps: u64) -> ferrozero::Result<(Vec<f32>, String)> {
    let (mut trainer, model) = trainer(config, blocks)?;
    let mut losses = vec![];
    for step in 0..steps {
        losses.push(trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch)))?.loss);
    }
    Ok((losses, trainer.weights_digest()?))
}
