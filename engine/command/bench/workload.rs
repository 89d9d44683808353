//! A GPT on random tokens, to measure steps with.

use super::super::CommandResult;
use crate::models::gpt::{Gpt, GptConfig, StreamedBlock};
use crate::models::linear::Adapting;
use crate::{AdamW, Engine, Plan};
use candle_core::{Device, Tensor};
use ferrozero_kernels::philox::Stream;

/// Sizes of the model and of a micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub vocabulary: usize,
    pub sequence: usize,
    pub batch: usize,
}

/// The model and its data.
pub struct Workload {
    model: Gpt<StreamedBlock>,
    sizes: Sizes,
    random: Stream,
}

impl Sizes {
    /// The model in an engine, and its plan.
    pub fn plan(self, engine: &Engine) -> CommandResult<(Plan, Workload)> {
        let config = GptConfig {
            vocabulary: self.vocabulary,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            sequence: self.sequence,
        };
        let (none, tiles) = (Adapting::default(), config.perceptron_tiles());
        let block = |vb, _| StreamedBlock::of(engine, &config, &none, tiles, vb);
        let model = Gpt::new(&config, engine.var_builder(), block)?;
        let workload = Workload { model, sizes: self, random: Stream::new(1, "tokens") };
        let plan = engine.plan(AdamW::default(), || workload.loss(0, 0))?;
        Ok((plan, workload))
    }
}

impl Workload {
    /// The loss of a micro-batch.
    pub fn loss(&self, step: u64, micro_batch: usize) -> candle_core::Result<Tensor> {
        let Sizes { vocabulary, sequence, batch, .. } = self.sizes;
        let tokens = |first: u64| {
            let count = (batch * sequence) as u64;
            let token = |i| (self.random.integer(first + i) % vocabulary as u64) as u32;
            Tensor::from_vec((0..count).map(token).collect(), (batch, sequence), &Device::Cpu)
        };
        // Inputs and targets of every micro-batch have numbers of their own.
        let place = 2 * ((step << 12) + micro_batch as u64);
        self.model.loss(&tokens(place << 24)?, &tokens((place + 1) << 24)?)
    }
}
