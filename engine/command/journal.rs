//! What is written down of a run while it trains: its log, the objects of `--json` and the events of `--tensorboard`, all made
//! of the same records, and the timeline of `--trace`.

use super::CommandResult;
use super::output::Output;
use super::settings::Reporting;
use crate::observe::chrome::ChromeTrace;
use crate::observe::run_log::{Record, RunLog, Start, Step, StepTimeline, Summary, VERSION};
use crate::observe::tensorboard::EventFile;
use crate::statistics::SECONDS_PER_DAY;
use crate::train::report::Usage;
use crate::{StepReport, Trainer};
use serde_json::Value;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The step of a process that is kept as a picture: the first one makes what later ones use again.
const PICTURED_STEP: u64 = 2;

/// What a run is, beside its plan.
pub struct About<'a> {
    /// The model, in a few words.
    pub model: String,
    /// Steps that the run should have at its end.
    pub steps: u64,
    /// Tokens of a step.
    pub tokens: u64,
    /// Settings of the command.
    pub settings: Value,
    /// What is written beside the log.
    pub reporting: &'a Reporting,
}

/// Writes down what a run does.
pub struct Journal {
    /// None after it could not be written.
    log: Option<RunLog>,
    tensorboard: Option<EventFile>,
    timeline: Option<ChromeTrace>,
    tokens: u64,
    /// Steps of the run when the process began, what it had used, and that moment.
    began: (u64, Usage, Instant),
    /// What the run had used at the last step.
    before: Usage,
    /// Steps of this process.
    steps: u64,
    /// Seconds of each step after the first one.
    step_s: Vec<f64>,
}

impl Journal {
    /// Begins where the trainer is.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a folder of `--tensorboard` or a file of `--trace` that cannot be written.
    pub fn begin(trainer: &Trainer, about: About, output: &Output) -> CommandResult<Self> {
        let log = trainer.folder().map(|folder| match trainer.steps() {
            0 => RunLog::create(folder),
            _ => RunLog::append(folder),
        });
        let Reporting { tensorboard, trace, .. } = about.reporting;
        let tensorboard = tensorboard.as_ref().map(|folder| EventFile::create(folder, trainer.steps()));
        let timeline = trace.as_ref().map(|path| ChromeTrace::create(path, trainer.plan()));
        let usage = trainer.usage();
        let mut this = Self {
            log: None,
            tensorboard: tensorboard.transpose()?,
            timeline: timeline.transpose()?,
            tokens: about.tokens,
            began: (trainer.steps(), usage, Instant::now()),
            before: usage,
            steps: 0,
            step_s: vec![],
        };
        match log.transpose() {
            Ok(log) => this.log = log,
            Err(error) => output.say(format_args!("notice: the run has no log: {error}")),
        }
        let plan = trainer.plan();
        let limits = plan.limits();
        let start = Start {
            version: VERSION,
            ferrozero: env!("CARGO_PKG_VERSION").into(),
            unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
            after_step: trainer.steps(),
            steps: about.steps,
            tokens: about.tokens,
            model: about.model,
            parameters: plan.layout().parameter_elements(),
            settings: about.settings,
            plan: plan.table(),
            prediction: plan.prediction().map(|prediction| prediction.forecast.clone()),
            planned_device_bytes: plan.device_bytes(),
            planned_host_bytes: plan.host_bytes(),
            planned_disk_bytes: plan.disk_home_bytes(),
            granted_bytes: limits.memory_bytes,
            granted_device_bytes: limits.device_bytes,
            device_is_apart: limits.device.apart,
        };
        this.log(&Record::Start(Box::new(start)), output);
        Ok(this)
    }

    /// Appends to the log. Training does not end because the log cannot be written, and that is said.
    fn log(&mut self, record: &Record, output: &Output) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.write(record)
        {
            output.say(format_args!("notice: the run's log is not written any more: {error}"));
            self.log = None;
        }
    }

    /// Writes a step down, with the loss on what is not trained on if that was measured after it.
    ///
    /// # Errors
    /// Those of standard output and of the file of `--tensorboard`.
    pub fn step(
        &mut self,
        report: &StepReport,
        validation_loss: Option<f32>,
        trainer: &Trainer,
        output: &Output,
    ) -> CommandResult {
        if let Some(timeline) = &mut self.timeline {
            timeline.append(&report.trace)?;
        }
        let usage = trainer.usage();
        let (_, _, began) = self.began;
        let step = Step {
            elapsed_s: began.elapsed().as_secs_f64(),
            validation_loss: validation_loss.filter(|loss| loss.is_finite()),
            ..Step::new(report, self.tokens, &self.before, &usage)
        };
        self.before = usage;
        if let Some(events) = &mut self.tensorboard {
            let mut scalars = vec![
                ("loss", f64::from(step.loss)),
                ("learning_rate", step.learning_rate),
                ("tokens_per_s", step.tokens_per_s),
                ("exposed_stall", step.exposed_stall),
            ];
            scalars.extend(step.gradient_norm.map(|norm| ("gradient_norm", norm)));
            scalars.extend(step.validation_loss.map(|loss| ("validation_loss", f64::from(loss))));
            events.scalars(step.step, &scalars)?;
        }
        let record = Record::Step(step);
        output.object(&record)?;
        self.log(&record, output);
        self.steps += 1;
        if self.steps >= PICTURED_STEP {
            self.step_s.push(report.step_s);
        }
        if self.steps == PICTURED_STEP {
            self.log(&Record::Timeline(StepTimeline::new(report, trainer.plan())), output);
        }
        Ok(())
    }

    /// What the process did until now, without what only its command knows: losses, digest and sample. The timeline ends with what
    /// was done since the last step, such as the commit.
    ///
    /// # Errors
    /// Those of the file of `--trace`.
    pub fn summary(&mut self, trainer: &Trainer) -> CommandResult<Summary> {
        if let Some(timeline) = &mut self.timeline {
            timeline.append(&trainer.take_trace()?)?;
        }
        let (first_step, before, began) = &self.began;
        let usage = trainer.usage();
        let moved = trainer.device_counter().read();
        let written_bytes = (usage.written_bytes - before.written_bytes) as f64;
        self.step_s.sort_by(f64::total_cmp);
        Ok(Summary {
            summary: true,
            step: trainer.steps(),
            skipped_steps: trainer.skipped_steps(),
            peak_host_bytes: usage.peak_host_bytes,
            planned_host_bytes: usage.planned_host_bytes,
            peak_device_bytes: usage.peak_device_bytes,
            planned_device_bytes: usage.planned_device_bytes,
            disk_bytes: usage.disk_bytes,
            uploaded_bytes: moved.uploads.bytes,
            upload_s: moved.uploads.seconds,
            downloaded_bytes: moved.downloads.bytes,
            download_s: moved.downloads.seconds,
            predicted_step_s: trainer.plan().prediction().map(|prediction| prediction.forecast.step_s),
            measured_step_s: self.step_s.get(self.step_s.len() / 2).copied(),
            written_bytes_per_step: written_bytes / (trainer.steps() - first_step).max(1) as f64,
            written_bytes_per_day: written_bytes / began.elapsed().as_secs_f64() * SECONDS_PER_DAY,
            checkpoint: trainer.config().directory.clone().unwrap_or_default(),
            ..Summary::default()
        })
    }

    /// Writes down what the process did in all, and tells people what a step took against what the plan had predicted.
    ///
    /// # Errors
    /// Those of standard output and of the file of `--tensorboard`.
    pub fn finish(&mut self, summary: Summary, output: &Output) -> CommandResult {
        if let (Some(events), Some(loss)) = (&mut self.tensorboard, summary.validation_loss) {
            events.scalars(summary.step, &[("validation_loss", f64::from(loss))])?;
        }
        if let (Some(predicted_s), Some(step_s)) = (summary.predicted_step_s, summary.measured_step_s) {
            let off = 100.0 * (predicted_s / step_s - 1.0);
            output.say(format_args!(
                "a step took {step_s:.3} s (median), and the plan had predicted {predicted_s:.3} s ({off:+.1} % off)"
            ));
        }
        let record = Record::Summary(Box::new(summary));
        output.object(&record)?;
        self.log(&record, output);
        Ok(())
    }
}
