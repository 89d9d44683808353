//! `ferrozero finetune`: trains a model further that others have trained, and writes a folder that transformers loads.

mod settings;
mod write;

pub use settings::{FinetuneArguments, FinetuneSettings};

use super::journal::{About, Journal};
use super::output::{Output, quoted};
use super::pretrained::{chat_template, ends};
use super::settings::{Resolved, resolve_run};
use super::train::stop_flag;
use super::{CommandResult, configuration};
use crate::data::examples::Examples;
use crate::data::tokenizer::Tokenizer;
use crate::models::linear::Adapting;
use crate::models::pretrained::{Pretrained, StreamedModel};
use crate::observe::run_log::Summary;
use crate::{Config, Engine, Trainer};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// The parts of a run.
struct Finetuning {
    settings: FinetuneSettings,
    pretrained: Pretrained,
    tokenizer: Tokenizer,
    data: Examples,
    adapting: Adapting,
    model: StreamedModel,
    trainer: Trainer,
    steps: u64,
    progress: Progress,
    output: Output,
    journal: Journal,
    out: PathBuf,
}

/// How evaluations have gone, which a commit keeps.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Progress {
    /// Least validation loss so far.
    best: Option<f32>,
    /// Evaluations since then.
    worse: u32,
}

impl Progress {
    fn evaluated(&mut self, loss: f32) {
        let is_better = self.best.is_none_or(|best| loss < best);
        self.worse = if is_better { 0 } else { self.worse + 1 };
        if is_better {
            self.best = Some(loss).filter(|loss| loss.is_finite());
        }
    }

    fn is_over(&self, patience: u32) -> bool {
        patience > 0 && self.worse >= patience
    }
}

/// Fine-tunes as the arguments say.
pub fn run(arguments: FinetuneArguments) -> CommandResult {
    let FinetuneArguments { model: path, run, .. } = &arguments;
    let output = Output::new(&run.reporting);
    let Resolved { settings, committed, resumes } =
        resolve_run::<FinetuneSettings>(&arguments, run, &output)?;
    let missing = |what: &str| configuration(format!("{what}, or the same in the file of --config"));
    let text = settings.data.clone().ok_or_else(|| missing("say what to learn from with --data FILE"))?;
    let out = settings.out.clone().ok_or_else(|| missing("say where the result goes with --out DIR"))?;
    let pretrained = Pretrained::open(path, settings.run.seq)?;
    let adapting = settings.adapting(&pretrained)?;
    let tokenizer = pretrained.tokenizer(settings.tokenizer.as_deref())?;
    let end = ends(&pretrained.configuration).first().copied();
    let chat = chat_template(&pretrained)?;
    let sizes = (settings.run.seed, settings.run.batch, settings.run.seq);
    let data = Examples::read(&text, &tokenizer, (end, chat.as_ref()), &settings.run.dir, sizes)?;
    let steps = settings.steps(data.training());
    output.say(format_args!("data: {} sequences for training, {steps} steps", data.training()));
    if committed.get("data").is_some_and(|stored| stored != data.fingerprint()) {
        output.say("notice: the data is not the data of the run that is resumed");
    }
    let (model, trainer) = prepare(&settings, resumes, &pretrained, &adapting, &data, &output)?;
    let stop = stop_flag()?;
    let about = About {
        model: path.display().to_string(),
        steps,
        tokens: settings.run.tokens(),
        settings: serde_json::to_value(&settings)?,
        reporting: &run.reporting,
    };
    let journal = Journal::begin(&trainer, about, &output)?;
    // Commits of before there were any have none.
    let progress = serde_json::from_value(committed["progress"].clone()).unwrap_or_default();
    let mut run = Finetuning {
        settings,
        pretrained,
        tokenizer,
        data,
        adapting,
        model,
        trainer,
        steps,
        progress,
        output,
        journal,
        out,
    };
    run.train(&stop)
}

fn prepare(
    settings: &FinetuneSettings,
    resume: bool,
    pretrained: &Pretrained,
    adapting: &Adapting,
    data: &Examples,
    output: &Output,
) -> CommandResult<(StreamedModel, Trainer)> {
    let config = Config { initial_values: Some(pretrained.weights.clone()), ..settings.run.config(resume)? };
    let engine = Engine::new(config)?;
    if adapting.rank > 0 {
        engine.freeze(|name, _| !Adapting::is_adapter(name))?;
    }
    let model = pretrained.build(&engine, adapting)?;
    let plan = engine.plan(settings.run.adamw(), |_| {
        // All targets counted: no batch needs more memory.
        let batch = data.train_batch(0)?;
        let all = Tensor::arange(0u32, batch.targets.elem_count() as u32, batch.targets.device())?;
        model.loss(&batch.inputs, &batch.targets, Some(&all))
    })?;
    settings.run.check_pieces(&plan)?;
    output.say(&plan);
    let trainer = engine.trainer_from(plan)?;
    output.say_notices(&trainer);
    Ok((model, trainer))
}

impl Finetuning {
    fn train(&mut self, stop: &AtomicBool) -> CommandResult {
        let steps = self.steps;
        let rate = self.settings.run.rate(self.settings.warmup.unwrap_or(steps / 10), steps)?;
        let first = self.evaluate()?;
        self.output.say(format_args!("validation loss at first {first:.4}"));
        if self.progress.best.is_none() {
            self.progress.evaluated(first);
        }
        let mut last = None;
        let patience = self.settings.patience;
        while self.trainer.steps() < steps && !stop.load(Ordering::SeqCst) && !self.progress.is_over(patience)
        {
            let step = self.trainer.steps();
            self.trainer.set_learning_rate(rate.at(step))?;
            let Self { data, model, settings, .. } = self;
            let report = self.trainer.step(|micro_batch| {
                let batch = data.train_batch(step * settings.run.accumulate as u64 + micro_batch as u64)?;
                model.loss(&batch.inputs, &batch.targets, Some(&batch.counted))
            })?;
            self.output.say(format_args!(
                "step {}/{steps}  loss {:.4}  {:.2} s  stall {:.0} %",
                report.step,
                report.loss,
                report.step_s,
                100.0 * report.exposed_stall
            ));
            last = Some(report.loss);
            let is_due = |every: u64| every > 0 && report.step.is_multiple_of(every) && report.step < steps;
            let mut validation_loss = None;
            if is_due(self.settings.run.eval_every) {
                let loss = self.evaluate()?;
                self.output.say(format_args!("step {}: validation loss {loss:.4}", report.step));
                self.progress.evaluated(loss);
                validation_loss = Some(loss);
            }
            self.journal.step(&report, validation_loss, &self.trainer, &self.output)?;
            if is_due(self.settings.run.commit_every) {
                let document = self.document()?;
                self.trainer.commit_behind(document)?;
            }
        }
        if self.progress.is_over(patience) {
            let worse = self.progress.worse;
            self.output.say(format_args!("stopped: {worse} evaluations without a better one"));
        }
        let validation_loss = self.evaluate()?;
        self.output.say(format_args!("validation loss at last {validation_loss:.4}"));
        let document = self.document()?;
        self.trainer.commit(document)?;
        self.finish(last, validation_loss)
    }

    /// What a commit says of the run.
    fn document(&self) -> CommandResult<Value> {
        Ok(json!({ "settings": self.settings, "data": self.data.fingerprint(), "progress": self.progress }))
    }

    /// The mean loss of what is not trained on.
    fn evaluate(&mut self) -> CommandResult<f32> {
        let Self { data, model, trainer, .. } = self;
        let batches = data.validation_batches();
        let mut sum = 0.0;
        for number in 0..batches {
            sum += trainer.evaluate(|| {
                let batch = data.validation_batch(number)?;
                let loss = model.loss(&batch.inputs, &batch.targets, Some(&batch.counted))?;
                loss.to_dtype(DType::F32)?.to_scalar::<f32>()
            })?;
        }
        Ok(sum / batches as f32)
    }

    /// Writes the result and tells how it went.
    fn finish(&mut self, train_loss: Option<f32>, validation_loss: f32) -> CommandResult {
        let measured = self.journal.summary(&self.trainer)?;
        let Self { settings, pretrained, tokenizer, adapting, trainer, output, out, .. } = self;
        match settings.writes_adapters() {
            true => write::write_adapters(pretrained, adapting, trainer, out)?,
            false => write::write_model(pretrained, adapting, trainer, tokenizer, out)?,
        }
        let summary = Summary {
            train_loss,
            validation_loss: Some(validation_loss).filter(|loss| loss.is_finite()),
            weights_digest: trainer.weights_digest()?,
            ..measured
        };
        output.say(format_args!("digest of the weights {}", summary.weights_digest));
        output.say(format_args!("the result is in {}", out.display()));
        self.journal.finish(summary, output)?;
        let (out, dir) = (quoted(out.display()), quoted(settings.run.dir.display()));
        match settings.writes_adapters() {
            // Adapters alone are not a model to generate with.
            true => output.next(format_args!("ferrozero report {dir} -o report.html")),
            false => {
                output.next(format_args!("ferrozero generate {out} --prompt TEXT; ferrozero report {dir}"))
            }
        }
        Ok(())
    }
}
