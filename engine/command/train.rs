//! `ferrozero train`.

use super::settings::{TrainArguments, TrainSettings};
use super::{CommandResult, configuration};
use crate::data::{Corpus, Dataset, TokenFile, Tokenizer};
use crate::generate::{Sampling, generate};
use crate::learning_rate::LearningRate;
use crate::models::gpt::{Block, Gpt};
use crate::plan::Bytes;
use crate::simulator::{Forecast, measure};
use crate::trace::ChromeTrace;
use crate::{AdamW, Config, Engine, Plan, Segment, StepReport, Trainer};
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{self, AtomicBool};
use std::time::{Duration, Instant};

const VALIDATION_BATCHES: usize = 8;
/// Where no progress bar can be drawn, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

const SECONDS_PER_DAY: f64 = 86_400.0;

/// How fast a run wears its drive out: drives are rated in bytes that can be written.
struct Wear {
    bytes_per_step: f64,
    bytes_per_day: f64,
}

/// The step of a process whose trace is measured for the prediction: the first one makes what later ones reuse.
const MEASURED_STEP: u64 = 2;

/// The time of steps, predicted from one of them and measured over those after it.
#[derive(Default)]
struct Pace {
    steps: u64,
    forecast: Option<Forecast>,
    step_s: Vec<f64>,
}

impl Pace {
    fn note(&mut self, report: &StepReport, plan: &Plan) {
        self.steps += 1;
        match self.steps.cmp(&MEASURED_STEP) {
            Ordering::Less => {}
            Ordering::Equal => {
                self.forecast =
                    measure(&report.trace, plan).map(|(machine, compute)| plan.forecast(&machine, &compute));
            }
            Ordering::Greater => self.step_s.push(report.step_s),
        }
    }

    /// Median seconds of the steps after the one that the prediction is made of.
    fn median_step_s(&mut self) -> Option<f64> {
        self.step_s.sort_by(f64::total_cmp);
        self.step_s.get(self.step_s.len() / 2).copied()
    }
}

/// Where people read: standard output, or standard error if programs read standard output.
struct Output {
    json: bool,
    bar: ProgressBar,
    last_line: Option<Instant>,
}

impl Output {
    fn new(json: bool) -> Self {
        Self { json, bar: ProgressBar::hidden(), last_line: None }
    }

    fn say(&self, text: impl std::fmt::Display) {
        self.bar.suspend(|| if self.json { eprintln!("{text}") } else { println!("{text}") });
    }

    fn object(&self, object: &Value) -> CommandResult {
        if self.json {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{object}")
                .and_then(|()| stdout.flush())
                .map_err(|error| configuration(format!("standard output does not take more: {error}")))?;
        }
        Ok(())
    }

    fn start(&mut self, done: u64, steps: u64) -> CommandResult {
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg} [{elapsed} + {eta}]")?;
            self.bar = ProgressBar::new(steps).with_position(done).with_style(style);
            self.bar.reset_eta();
        }
        Ok(())
    }

    fn step(&mut self, report: &StepReport, tokens: usize, steps: u64) {
        let text = format!(
            "loss {:.4}  {:.0} tokens/s  {:.2} s/step  stall {:.0} %",
            report.loss,
            tokens as f64 / report.step_s,
            report.step_s,
            100.0 * report.exposed_stall
        );
        self.bar.set_position(report.step);
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) || report.step == steps;
        if self.bar.is_hidden() && due {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{steps}  {text}", report.step);
        }
    }
}

/// The parts of a run.
struct Run {
    settings: TrainSettings,
    tokenizer: Tokenizer,
    data: Dataset,
    model: Gpt<Segment<Block>>,
    trainer: Trainer,
    output: Output,
    timeline: Option<ChromeTrace>,
    pace: Pace,
    fingerprint: String,
    /// Bytes written and steps made when the first step of this process began, and that moment.
    began: (u64, u64, Instant),
}

/// Trains as the arguments say.
pub fn run(arguments: TrainArguments) -> CommandResult {
    let mut output = Output::new(arguments.json);
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
    let timeline =
        arguments.trace.as_deref().map(|path| ChromeTrace::create(path, trainer.plan())).transpose()?;
    output.start(trainer.steps(), settings.steps)?;
    let began = (trainer.usage().written_bytes, trainer.steps(), Instant::now());
    let mut run = Run {
        settings,
        tokenizer,
        data,
        model,
        trainer,
        output,
        timeline,
        pace: Pace::default(),
        fingerprint,
        began,
    };
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
    let engine = Engine::new(Config {
        device: crate::open_device(&settings.device)?,
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
    for notice in trainer.notices() {
        output.say(format_args!("notice: {}", notice.text));
    }
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
        let tokens = settings.accumulate * settings.batch * settings.seq;
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
            self.pace.note(&report, self.trainer.plan());
            if let Some(timeline) = &mut self.timeline {
                timeline.append(&report.trace)?;
            }
            let is_due = |every: u64| every > 0 && report.step.is_multiple_of(every) && report.step < steps;
            let mut object = json!({
                "step": report.step,
                "loss": report.loss,
                "tokens_per_s": tokens as f64 / report.step_s,
                "step_s": report.step_s,
                "exposed_stall": report.exposed_stall,
                "lr": report.learning_rate,
                "grad_norm": report.gradient_norm,
                "skipped": report.skipped,
            });
            if is_due(self.settings.eval_every) {
                let loss = self.validate()?;
                object["validation_loss"] = json!(loss);
                self.output.say(format_args!("step {}: validation loss {loss:.4}", report.step));
            }
            self.output.object(&object)?;
            if is_due(self.settings.commit_every) {
                let document = self.document()?;
                self.trainer.commit_behind(document)?;
            }
            last = Some(report.loss);
        }
        let document = self.document()?;
        self.trainer.commit(document)?;
        if let Some(timeline) = &mut self.timeline {
            timeline.append(&self.trainer.take_trace()?)?;
        }
        self.output.bar.finish_and_clear();
        let wear = self.wear();
        self.summarize(last, wear)
    }

    /// What the steps of this process wrote to disk.
    fn wear(&self) -> Wear {
        let (written_bytes, steps, at) = self.began;
        let written_bytes = (self.trainer.usage().written_bytes - written_bytes) as f64;
        Wear {
            bytes_per_step: written_bytes / (self.trainer.steps() - steps).max(1) as f64,
            bytes_per_day: written_bytes / at.elapsed().as_secs_f64() * SECONDS_PER_DAY,
        }
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

    fn summarize(&mut self, train_loss: Option<f32>, wear: Wear) -> CommandResult {
        let validation_loss = self.validate()?;
        let text = if self.settings.sample > 0 { self.sample()? } else { String::new() };
        let digest = self.trainer.weights_digest()?;
        let usage = self.trainer.usage();
        let steps = self.trainer.steps();
        let measured_step_s = self.pace.median_step_s();
        let predicted_step_s = self.pace.forecast.as_ref().map(|forecast| forecast.step_s);
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
        let skipped = self.trainer.skipped_steps();
        if skipped > 0 {
            say(format_args!("  skipped, f16 had overflowed   {skipped} steps"));
        }
        let tiers = [
            ("device", usage.peak_device_bytes, usage.planned_device_bytes),
            ("host", usage.peak_host_bytes, usage.planned_host_bytes),
        ];
        for (tier, peak, planned) in tiers {
            say(format_args!(
                "  peak {tier:<6} memory            {} of {} planned",
                Bytes(peak),
                Bytes(planned)
            ));
        }
        say(format_args!("  files                         {}", Bytes(usage.disk_bytes)));
        if let (Some(predicted), Some(measured)) = (predicted_step_s, measured_step_s) {
            let off = 100.0 * (predicted / measured - 1.0);
            say(format_args!(
                "  step time predicted {predicted:.3} s, measured {measured:.3} s ({off:+.1} % off)"
            ));
        }
        if wear.bytes_per_step > 0.0 {
            say(format_args!(
                "  written to disk               {} a step; {:.2} TB a day at this pace",
                Bytes(wear.bytes_per_step as u64),
                wear.bytes_per_day / 1e12
            ));
        }
        say(format_args!("  checkpoint                    {}", self.settings.dir.display()));
        say(format_args!("  digest of the weights         {digest}"));
        if !text.is_empty() {
            say(format_args!("  sample: {text}"));
        }
        self.output.object(&json!({
            "summary": true,
            "step": steps,
            "skipped_steps": self.trainer.skipped_steps(),
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "peak_host_bytes": usage.peak_host_bytes,
            "planned_host_bytes": usage.planned_host_bytes,
            "peak_device_bytes": usage.peak_device_bytes,
            "planned_device_bytes": usage.planned_device_bytes,
            "disk_bytes": usage.disk_bytes,
            "predicted_step_s": predicted_step_s,
            "measured_step_s": measured_step_s,
            "written_bytes_per_step": wear.bytes_per_step,
            "written_bytes_per_day": wear.bytes_per_day,
            "weights_digest": digest,
            "checkpoint": self.settings.dir,
            "sample": text,
        }))
    }
}
