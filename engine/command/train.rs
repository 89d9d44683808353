//! `ferrozero train`.

use super::CommandResult;
use super::journal::{About, Journal};
use super::output::{Output, quoted};
use super::settings::{TrainArguments, TrainSettings};
use crate::data::{Corpus, Dataset, TokenFile};
use crate::generate::{Sampling, generate};
use crate::learning_rate::LearningRate;
use crate::models::gpt::{Block, Gpt};
use crate::plan::Bytes;
use crate::run_log::Summary;
use crate::simulator::Machine;
use crate::tokenizer::Tokenizer;
use crate::{AdamW, Config, Engine, Segment, Trainer};
use candle_core::DType;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{self, AtomicBool};

const VALIDATION_BATCHES: usize = 8;

/// The parts of a run.
struct Run {
    settings: TrainSettings,
    tokenizer: Tokenizer,
    data: Dataset,
    model: Gpt<Segment<Block>>,
    trainer: Trainer,
    output: Output,
    journal: Journal,
    fingerprint: String,
}

/// Trains as the arguments say.
pub fn run(arguments: TrainArguments) -> CommandResult {
    let mut output = Output::new(&arguments.reporting);
    let resumed = match arguments.resume {
        true => Some(Engine::committed(&TrainSettings::folder(&arguments)?)?),
        false => None,
    };
    let stored = |key: &str| resumed.as_ref().and_then(|user| user.get(key)).cloned();
    let settings = TrainSettings::resolve(&arguments, stored("settings"))?;
    let tokenizer = match &settings.tokenizer {
        Some(path) => Tokenizer::from_file(path)?,
        None => Tokenizer::Bytes,
    };
    let corpus = match &settings.data {
        Some(path) => Corpus::from_path(path)?,
        None => Corpus::of_cargo_registry()?,
    };
    let tokens = TokenFile::encode(&corpus, &tokenizer, &settings.dir)?;
    let data = Dataset::new(tokens, settings.seed, settings.batch, settings.seq)?;
    output.say(format_args!("data: {} tokens from {}", data.len(), corpus.source));
    let fingerprint = data.fingerprint().to_owned();
    if stored("data").is_some_and(|stored| stored != *fingerprint) {
        output.say("notice: the data is not the data of the run that is resumed");
    }
    let stop = stop_flag()?;
    let (model, trainer) = prepare(&settings, &arguments, &tokenizer, &data, &output)?;
    let about = About {
        model: format!("GPT, {} blocks of width {}", settings.layers, settings.hidden),
        steps: settings.steps,
        tokens: (settings.accumulate * settings.batch * settings.seq) as u64,
        settings: serde_json::to_value(&settings)?,
        reporting: &arguments.reporting,
    };
    let journal = Journal::begin(&trainer, about, &output)?;
    output.start(trainer.steps(), settings.steps)?;
    let mut run = Run { settings, tokenizer, data, model, trainer, output, journal, fingerprint };
    run.train(&stop)
}

/// Becomes true at Ctrl-C or a termination signal; the second one ends the process.
pub(super) fn stop_flag() -> CommandResult<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, atomic::Ordering::SeqCst) {
            std::process::exit(130);
        }
    })?;
    Ok(stop)
}

fn prepare(
    settings: &TrainSettings,
    arguments: &TrainArguments,
    tokenizer: &Tokenizer,
    data: &Dataset,
    output: &Output,
) -> CommandResult<(Gpt<Segment<Block>>, Trainer)> {
    let device = crate::open_device(&settings.device)?;
    let engine = Engine::new(Config {
        machine: Machine::probed(&settings.dir, &device),
        device,
        dtype: settings.dtype.on(&settings.device)?,
        memory_bytes: Some(settings.memory.0),
        device_memory_bytes: settings.device_memory.map(|size| size.0),
        directory: Some(settings.dir.clone()),
        stripes: settings.stripe.clone(),
        in_place: settings.in_place,
        resume: arguments.resume,
        accumulate: settings.accumulate,
        clip: (settings.clip > 0.0).then_some(settings.clip),
        seed: settings.seed,
        threads: settings.threads,
        ..Config::default()
    })?;
    let config = settings.model(tokenizer.vocabulary());
    let model =
        Gpt::new(&config, engine.var_builder(), |vb, _| engine.segment(vb, |vb| Block::new(&config, vb)))?;
    let adamw = AdamW {
        weight_decay: settings.weight_decay,
        beta1: settings.beta1,
        beta2: settings.beta2,
        epsilon: settings.epsilon,
        ..AdamW::default()
    };
    let plan = engine.plan(adamw, || {
        let batch = data.train_batch(0, 0, 1)?;
        model.loss(&batch.inputs, &batch.targets)
    })?;
    output.say(&plan);
    let trainer = engine.trainer(plan)?;
    output.say_notices(&trainer);
    Ok((model, trainer))
}

impl Run {
    fn train(&mut self, stop: &AtomicBool) -> CommandResult {
        let Self { settings, .. } = self;
        let steps = settings.steps;
        let rate = LearningRate::WarmupCosine {
            peak: settings.lr,
            warmup: settings.warmup,
            steps,
            floor: settings.lr_floor * settings.lr,
        };
        let tokens = (settings.accumulate * settings.batch * settings.seq) as u64;
        let mut last = None;
        while self.trainer.steps() < steps && !stop.load(atomic::Ordering::SeqCst) {
            let step = self.trainer.steps();
            self.trainer.set_learning_rate(rate.at(step));
            let Self { data, model, settings, .. } = self;
            let report = self.trainer.step(|micro_batch| {
                let batch = data.train_batch(step, micro_batch, settings.accumulate)?;
                model.loss(&batch.inputs, &batch.targets)
            })?;
            self.output.step(&report, tokens, steps);
            let is_due = |every: u64| every > 0 && report.step.is_multiple_of(every) && report.step < steps;
            let mut validation_loss = None;
            if is_due(self.settings.eval_every) {
                let loss = self.validate()?;
                self.output.say(format_args!("step {}: validation loss {loss:.4}", report.step));
                validation_loss = Some(loss);
            }
            self.journal.step(&report, validation_loss, &self.trainer, &self.output)?;
            if is_due(self.settings.commit_every) {
                let document = self.document()?;
                self.trainer.commit_behind(document)?;
            }
            last = Some(report.loss);
        }
        let document = self.document()?;
        self.trainer.commit(document)?;
        self.output.finish();
        self.summarize(last)
    }

    /// What a commit says of the run.
    fn document(&self) -> CommandResult<Value> {
        Ok(json!({ "settings": serde_json::to_value(&self.settings)?, "data": self.fingerprint }))
    }

    fn validate(&mut self) -> CommandResult<f32> {
        let Self { data, model, trainer, .. } = self;
        let mut sum = 0.0;
        for number in 0..VALIDATION_BATCHES {
            sum += trainer.evaluate(|| {
                let batch = data.validation_batch(number, VALIDATION_BATCHES)?;
                model.loss(&batch.inputs, &batch.targets)?.to_dtype(DType::F32)?.to_scalar::<f32>()
            })?;
        }
        Ok(sum / VALIDATION_BATCHES as f32)
    }

    fn sample(&mut self) -> CommandResult<String> {
        let prompt = self.tokenizer.encode(b"fn main() {\n")?;
        let sampling = Sampling { temperature: 0.7, seed: self.settings.seed };
        let Self { model, trainer, settings, .. } = self;
        let tokens = generate(&prompt, settings.sample, settings.seq, sampling, |tokens| {
            let logits = trainer.evaluate(|| model.next_logits(tokens));
            logits.map_err(candle_core::Error::wrap)
        })?;
        Ok(self.tokenizer.decode(&tokens))
    }

    fn summarize(&mut self, train_loss: Option<f32>) -> CommandResult {
        let measured = self.journal.summary(&self.trainer)?;
        let validation_loss = self.validate()?;
        let is_sampled = self.settings.sample > 0 && self.output.is_read();
        let text = if is_sampled { self.sample()? } else { String::new() };
        let digest = self.trainer.weights_digest()?;
        let steps = measured.step;
        let say = |text: std::fmt::Arguments| self.output.say(text);
        match steps < self.settings.steps {
            true => say(format_args!(
                "stopped after step {steps} of {}: go on with --resume",
                self.settings.steps
            )),
            false => say(format_args!("done: {steps} steps")),
        }
        if let Some(loss) = train_loss {
            say(format_args!("  train loss of the last step   {loss:.4}"));
        }
        say(format_args!("  validation loss               {validation_loss:.4}"));
        if measured.skipped_steps > 0 {
            say(format_args!("  skipped, f16 had overflowed   {} steps", measured.skipped_steps));
        }
        let tiers = [
            ("device", measured.peak_device_bytes, measured.planned_device_bytes),
            ("host", measured.peak_host_bytes, measured.planned_host_bytes),
        ];
        for (tier, peak, planned) in tiers {
            say(format_args!(
                "  peak {tier:<6} memory            {} of {} planned",
                Bytes(peak),
                Bytes(planned)
            ));
        }
        say(format_args!("  files                         {}", Bytes(measured.disk_bytes)));
        if let (Some(predicted_s), Some(step_s)) = (measured.predicted_step_s, measured.measured_step_s) {
            let off = 100.0 * (predicted_s / step_s - 1.0);
            say(format_args!(
                "  step time predicted {predicted_s:.3} s, measured {step_s:.3} s ({off:+.1} % off)"
            ));
        }
        if measured.written_bytes_per_step > 0.0 {
            say(format_args!(
                "  written to disk               {} a step; {:.2} TB a day at this pace",
                Bytes(measured.written_bytes_per_step as u64),
                measured.written_bytes_per_day / 1e12
            ));
        }
        say(format_args!("  checkpoint                    {}", self.settings.dir.display()));
        say(format_args!("  digest of the weights         {digest}"));
        if !text.is_empty() {
            say(format_args!("  sample: {text}"));
        }
        let summary = Summary {
            train_loss,
            validation_loss: Some(validation_loss).filter(|loss| loss.is_finite()),
            weights_digest: digest,
            sample: text,
            ..measured
        };
        self.journal.finish(summary, &self.output)?;
        let dir = quoted(self.settings.dir.display());
        match steps < self.settings.steps {
            true => self.output.next(format_args!("ferrozero train --resume --dir {dir}")),
            false => self.output.next(format_args!("ferrozero report {dir} -o report.html")),
        }
        Ok(())
    }
}
