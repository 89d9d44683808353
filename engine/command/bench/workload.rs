//! A GPT on random tokens, to measure steps with.

use super::super::CommandResult;
use crate::models::gpt::{Gpt, GptConfig, StreamedBlock};
use crate::models::linear::Adapting;
use crate::statistics::median;
use crate::testing::Throttle;
use crate::{AdamW, Config, Engine, Plan};
use candle_core::{Device, Tensor};
use ferrozero_kernels::philox::Stream;
use std::path::Path;

/// Steps that are made before steps are measured: the first ones make what later ones reuse.
const WARM_UP_STEPS: usize = 2;

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
        let block = |vb, _| StreamedBlock::from_config(engine, &config, &none, tiles, vb);
        let model = Gpt::new(&config, engine.var_builder(), block)?;
        let workload = Workload { model, sizes: self, random: Stream::new(1, "tokens") };
        let plan = engine.plan(AdamW::default(), |_| workload.loss(0, 0))?;
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

/// A disk that reads and writes so many bytes a second.
pub fn slow_disk(bytes_per_s: f64) -> CommandResult<Option<Throttle>> {
    Ok(Some(Throttle::new(bytes_per_s, bytes_per_s)?))
}

/// Plans a configuration, and runs it if the plan is wanted; answers the seconds of a step that the plan
/// predicts, and the median of those measured.
pub fn measure(
    sizes: Sizes,
    config: Config,
    directory: &Path,
    steps: usize,
    wanted: &mut dyn FnMut(&Plan) -> bool,
) -> CommandResult<Option<(f64, f64)>> {
    let folder = directory.join("predict");
    let _ = std::fs::remove_dir_all(&folder);
    let result = measure_in(sizes, Config { directory: Some(folder.clone()), ..config }, steps, wanted);
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn measure_in(
    sizes: Sizes,
    config: Config,
    steps: usize,
    wanted: &mut dyn FnMut(&Plan) -> bool,
) -> CommandResult<Option<(f64, f64)>> {
    let engine = Engine::new(config)?;
    let (plan, workload) = sizes.plan(&engine)?;
    if !wanted(&plan) {
        return Ok(None);
    }
    let predicted_s = plan.prediction().map_or(f64::NAN, |prediction| prediction.forecast.step_s);
    let mut trainer = engine.trainer_from(plan)?;
    let mut measured = vec![];
    for number in 0..WARM_UP_STEPS + steps {
        let step = trainer.steps();
        let report = trainer.step(|micro_batch| workload.loss(step, micro_batch))?;
        if number >= WARM_UP_STEPS {
            measured.push(report.step_s);
        }
    }
    Ok(Some((predicted_s, median(measured))))
}
