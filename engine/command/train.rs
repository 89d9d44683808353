//! `ferrozero train`.

mod settings;

pub use settings::{TrainArguments, TrainSettings};

use super::CommandResult;
use super::journal::{About, Journal};
use super::output::{Output, quoted};
use super::settings::{Resolved, resolve_run};
use crate::data::corpus::{Corpus, Dataset, TokenFile};
use crate::data::sampling::{Sampling, generate};
use crate::data::tokenizer::Tokenizer;
use crate::models::gpt::{Gpt, StreamedBlock};
use crate::models::linear::Adapting;
use crate::observe::run_log::Summary;
use crate::planner::plan::Bytes;
use crate::{Engine, Trainer};
use candle_core::DType;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{self, AtomicBool};

const VALIDATION_BATCHES: usize = 8;

/// The parts of a run.
struct Training {
    settings: TrainSettings,
    tokenizer: Tokenizer,
    data: Dataset,
    model: Gpt<StreamedBlock>,
    trainer: Trainer,
    output: Output,
    journal: Journal,
    fingerprint: String,
}

/// Trains as the arguments say.
pub fn run(arguments: TrainArguments) -> CommandResult {
    let mut output = Output::new(&arguments.run.reporting);
    let Resolved { settings, committed, resumes } =
        resolve_run::<TrainSettings>(&arguments, &arguments.run, &output)?;
    let tokenizer = match &settings.tokenizer {
        Some(path) => Tokenizer::from_file(path)?,
        None => Tokenizer::Bytes,
    };
    let corpus = match &settings.data {
        Some(path) => Corpus::from_path(path)?,
        None => Corpus::from_cargo_registry()?,
    };
    let tokens = TokenFile::encode(&corpus, &tokenizer, &settings.run.dir)?;
    let data = Dataset::new(tokens, settings.run.seed, settings.run.batch, settings.run.seq)?;
    output.say(format_args!("data: {} tokens from {}", data.len(), corpus.source));
    let fingerprint = data.fingerprint().to_owned();
    if committed.get("data").is_some_and(|stored| *stored != fingerprint) {
        output.say("notice: the data is not the data of the run that is resumed");
    }
    let stop = stop_flag()?;
    let (model, trainer) = prepare(&settings, resumes, &tokenizer, &data, &output)?;
    let about = About {
        model: format!("GPT, {} blocks of width {}", settings.layers, settings.hidden),
        steps: settings.steps,
        tokens: settings.run.tokens(),
        settings: serde_json::to_value(&settings)?,
        reporting: &arguments.run.reporting,
    };
    let journal = Journal::begin(&trainer, about, &output)?;
    output.start(trainer.steps(), settings.steps)?;
    let mut run = Training { settings, tokenizer, data, model, trainer, output, journal, fingerprint };
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
    resume: bool,
    tokenizer: &Tokenizer,
    data: &Dataset,
    output: &Output,
) -> CommandResult<(Gpt<StreamedBlock>, Trainer)> {
    let engine = Engine::new(settings.run.config(resume)?)?;
    let config = settings.model(tokenizer.vocabulary());
    let (none, tiles) = (Adapting::default(), config.perceptron_tiles());
    let block = |vb, _| StreamedBlock::from_config(&engine, &config, &none, tiles, vb);
    let model = Gpt::new(&config, engine.var_builder(), block)?;
    let plan = engine.plan(settings.run.adamw(), |_| {
        let batch = data.train_batch(0, 0, 1)?;
        model.loss(&batch.inputs, &batch.targets)
    })?;
    settings.run.check_pieces(&plan)?;
    output.say(&plan);
    let trainer = engine.trainer_from(plan)?;
    output.say_notices(&trainer);
    Ok((model, trainer))
}

impl Training {
    fn train(&mut self, stop: &AtomicBool) -> CommandResult {
        let Self { settings, .. } = self;
        let steps = settings.steps;
        let rate = settings.run.rate(settings.warmup, steps)?;
        let tokens = settings.run.tokens();
        let mut last = None;
        while self.trainer.steps() < steps && !stop.load(atomic::Ordering::SeqCst) {
            let step = self.trainer.steps();
            self.trainer.set_learning_rate(rate.at(step))?;
            let Self { data, model, settings, .. } = self;
            let report = self.trainer.step(|micro_batch| {
                let batch = data.train_batch(step, micro_batch, settings.run.accumulate)?;
                model.loss(&batch.inputs, &batch.targets)
            })?;
            self.output.step(&report, tokens, steps);
            let is_due = |every: u64| every > 0 && report.step.is_multiple_of(every) && report.step < steps;
            let mut validation_loss = None;
            if is_due(self.settings.run.eval_every) {
                let loss = self.validate()?;
                self.output.say(format_args!("step {}: validation loss {loss:.4}", report.step));
                validation_loss = Some(loss);
            }
            self.journal.step(&report, validation_loss, &self.trainer, &self.output)?;
            if is_due(self.settings.run.commit_every) {
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
        let sampling = Sampling { temperature: 0.7, seed: self.settings.run.seed };
        let Self { model, trainer, settings, .. } = self;
        let tokens = generate(&prompt, settings.sample, settings.run.seq, sampling, |tokens| {
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
        if measured.written_bytes_per_step > 0.0 {
            say(format_args!(
                "  written to disk               {} a step; {:.2} TB a day at this pace",
                Bytes(measured.written_bytes_per_step as u64),
                measured.written_bytes_per_day / 1e12
            ));
        }
        say(format_args!("  checkpoint                    {}", self.settings.run.dir.display()));
        say(format_args!("  digest of the weights         {digest}"));
        let sample = (!text.is_empty()).then(|| format!("sample: {text}"));
        let summary = Summary {
            train_loss,
            validation_loss: Some(validation_loss).filter(|loss| loss.is_finite()),
            weights_digest: digest,
            sample: text,
            ..measured
        };
        self.journal.finish(summary, &self.output)?;
        sample.into_iter().for_each(|sample| self.output.say(sample));
        let dir = quoted(self.settings.run.dir.display());
        match steps < self.settings.steps {
            true => self.output.next(format_args!("ferrozero train --resume --dir {dir}")),
            false => self.output.next(format_args!("ferrozero report {dir} -o report.html")),
        }
        Ok(())
    }
}
