//! The log of a run: one JSON object a line, in the run's folder. A run appends to it, `ferrozero report` reads it, also
//! while the run goes on.
//!
//! A process that trains begins with a [`Start`], and writes a [`Step`] after each step, a [`StepTimeline`] after one of them, and a
//! [`Summary`] at its end. One that resumes appends to the same file: its [`Start`] says after which step it goes on, and steps beyond that, which no commit
//! kept, count no more. A line that a kill or a full disk cut short is ignored by readers and cut off by the next writer.

use crate::error::{Error, Result};
use crate::observe::occupancy::{Occupancy, highest};
use crate::observe::timeline::Span;
use crate::planner::plan::{Plan, PlanRow};
use crate::planner::simulator::Forecast;
use crate::schedule::operation::Queue;
use crate::train::report::{StepReport, Usage};
use ferrozero_offload::{Access, Folder};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Name of the file in the run's folder.
pub const FILE: &str = "log.jsonl";
/// Version of the records.
pub const VERSION: u32 = 2;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A process began.
    Start(Box<Start>),
    /// A step was made.
    Step(Step),
    /// What the queues did in one of the steps.
    Timeline(StepTimeline),
    /// A process ended as it should.
    Summary(Box<Summary>),
}

/// What a process sets out to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// [`VERSION`].
    pub version: u32,
    /// Version of ferrozero.
    pub ferrozero: String,
    /// When, in seconds since 1970.
    pub unix_s: f64,
    /// The commit that it goes on from is after this step; 0 for a new run.
    pub after_step: u64,
    /// Steps that the run should have at its end.
    pub steps: u64,
    /// Tokens of a step.
    pub tokens: u64,
    /// The model, in a few words.
    pub model: String,
    /// Elements of all parameters.
    pub parameters: u64,
    /// Settings of the command.
    pub settings: Value,
    /// What memory is for, tier by tier.
    pub plan: Vec<PlanRow>,
    /// What the plan predicts of a step, before any was made.
    pub prediction: Option<Forecast>,
    /// Device bytes of the plan in all.
    pub planned_device_bytes: u64,
    /// Host bytes of the plan in all.
    pub planned_host_bytes: u64,
    /// Bytes of state whose home is the disk.
    pub planned_disk_bytes: u64,
    /// Granted bytes of host memory; where the device has none of its own, of both together.
    pub granted_bytes: Option<u64>,
    /// Granted bytes of device memory.
    pub granted_device_bytes: Option<u64>,
    /// Whether the device has memory of its own.
    pub device_is_apart: bool,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss over the micro-batches.
    pub loss: f32,
    /// Tokens that it learnt from.
    pub tokens: u64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Seconds from the call of the step to its return.
    pub step_s: f64,
    /// Share of that in which the training thread waited for a tier, 0 to 1.
    pub exposed_stall: f64,
    /// Learning rate.
    #[serde(rename = "lr")]
    pub learning_rate: f64,
    /// Norm of all gradients before clipping; none where it is not finite.
    #[serde(rename = "grad_norm")]
    pub gradient_norm: Option<f64>,
    /// Whether nothing was updated, because gradients of f16 had overflowed.
    pub skipped: bool,
    /// Seconds of the step in which each queue had something under way. Queues that had nothing are left out.
    pub busy_s: BTreeMap<Queue, f64>,
    /// Peak bytes of host memory so far.
    pub peak_host_bytes: u64,
    /// Peak bytes of device memory so far.
    pub peak_device_bytes: u64,
    /// Bytes read from disk since the step before.
    pub read_bytes: u64,
    /// Bytes written to disk since the step before.
    pub written_bytes: u64,
    /// Seconds since the process began to train.
    pub elapsed_s: f64,
    /// Loss on what is not trained on, where it was measured after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f32>,
}

impl Step {
    /// Of a step's report. `before` is what the run had used after the step before, `usage` what it has used now.
    pub fn new(report: &StepReport, tokens: u64, before: &Usage, usage: &Usage) -> Self {
        let (from_s, until_s) = window(report);
        let busy = Queue::ALL.into_iter().map(|queue| {
            let busy_s = report.trace.busy_within_s(&[queue], from_s, until_s);
            (queue, busy_s)
        });
        Self {
            step: report.step,
            loss: report.loss,
            tokens,
            tokens_per_s: tokens as f64 / report.step_s,
            step_s: report.step_s,
            exposed_stall: report.exposed_stall,
            learning_rate: report.learning_rate,
            gradient_norm: Some(report.gradient_norm).filter(|norm| norm.is_finite()),
            skipped: report.skipped,
            busy_s: busy.filter(|(_, busy_s)| *busy_s > 0.0).collect(),
            peak_host_bytes: usage.peak_host_bytes,
            peak_device_bytes: usage.peak_device_bytes,
            read_bytes: usage.read_bytes - before.read_bytes,
            written_bytes: usage.written_bytes - before.written_bytes,
            elapsed_s: 0.0,
            validation_loss: None,
        }
    }
}

/// Parts of a step of which a picture shows the most memory.
const PARTS: usize = 250;

/// One step as a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTimeline {
    /// Number of the step.
    pub step: u64,
    /// Seconds that it took.
    pub step_s: f64,
    /// What the queues did in it.
    pub spans: Vec<Span>,
    /// What the tiers held in it, the most of each of equal parts.
    pub occupancy: Vec<Occupancy>,
}

impl StepTimeline {
    /// Of a step's report.
    pub fn new(report: &StepReport, plan: &Plan) -> Self {
        let (from_s, until_s) = window(report);
        let spans = report.trace.timeline(plan, from_s, until_s);
        let levels = report.trace.occupancy(plan, from_s, until_s);
        let occupancy = highest(&levels, (from_s, until_s), PARTS);
        Self { step: report.step, step_s: report.step_s, spans, occupancy }
    }
}

/// What a process did in all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Always true: marks the last object of `--json`.
    pub summary: bool,
    /// Steps of the run so far.
    pub step: u64,
    /// Steps that were skipped because gradients of f16 had overflowed.
    pub skipped_steps: u64,
    /// Loss of the last step of the process.
    pub train_loss: Option<f32>,
    /// Loss on what is not trained on; none where it is not finite.
    pub validation_loss: Option<f32>,
    /// Peak bytes of host memory.
    pub peak_host_bytes: u64,
    /// Host bytes of the plan.
    pub planned_host_bytes: u64,
    /// Peak bytes of device memory.
    pub peak_device_bytes: u64,
    /// Device bytes of the plan.
    pub planned_device_bytes: u64,
    /// Bytes of all files.
    pub disk_bytes: u64,
    /// Bytes that went up to a CUDA device.
    #[serde(default)]
    pub uploaded_bytes: u64,
    /// Seconds of that, by the device's clock.
    #[serde(default)]
    pub upload_s: f64,
    /// Bytes that came down from it.
    #[serde(default)]
    pub downloaded_bytes: u64,
    /// Seconds of that.
    #[serde(default)]
    pub download_s: f64,
    /// Seconds of a step that the plan predicted, before any was made.
    pub predicted_step_s: Option<f64>,
    /// Median seconds of the steps after the first one of the process, which makes what later ones use again.
    pub measured_step_s: Option<f64>,
    /// Bytes written to disk a step.
    pub written_bytes_per_step: f64,
    /// Bytes that would be written in a day of this.
    pub written_bytes_per_day: f64,
    /// SHA-256 of all master parameters.
    pub weights_digest: String,
    /// Folder of the run.
    pub checkpoint: PathBuf,
    /// What the model writes.
    pub sample: String,
}

/// The moments of a report's trace between which its step was made. Evaluations may lie before it, and what goes on behind
/// the step before reaches into it.
fn window(report: &StepReport) -> (f64, f64) {
    let in_step = |queue| matches!(queue, Queue::Compute | Queue::Control);
    let events = report.trace.events.iter();
    let ends = events.filter(|event| event.step == report.step && in_step(event.operation.queue()));
    let until_s = ends.map(|event| event.end_s).fold(0.0, f64::max);
    (until_s - report.step_s, until_s)
}

/// Writes the log.
#[derive(Debug)]
pub struct RunLog {
    path: PathBuf,
    file: File,
}

impl RunLog {
    /// The log in the folder of a new run; one that is there is replaced.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn create(folder: &Folder) -> Result<Self> {
        Self::open(folder, |file| file.set_len(0))
    }

    /// The log in the folder of a run that goes on, without a last line that was cut short.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn append(folder: &Folder) -> Result<Self> {
        Self::open(folder, |file| file.set_len(whole_bytes(file)?))
    }

    fn open(folder: &Folder, prepare: impl Fn(&File) -> std::io::Result<()>) -> Result<Self> {
        let path = folder.path().join(FILE);
        let opened = folder.open_file(FILE, Access::Make).and_then(|mut file| {
            prepare(&file)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        });
        match opened {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Error::File { path, source }),
        }
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).map_err(std::io::Error::from);
        // In one piece, so that a kill leaves whole lines.
        let written = line.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()));
        written.map_err(Error::file(&self.path))
    }
}

/// Longest line that is read, in bytes: a file of another kind in the log's place must not take all memory.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// Bytes until the end of the last line that has one.
fn whole_bytes(file: &File) -> std::io::Result<u64> {
    let mut block = [0; 1 << 16];
    let mut end = file.metadata()?.len();
    while end > 0 {
        let start = (end - 1) / block.len() as u64 * block.len() as u64;
        let bytes = &mut block[..(end - start) as usize];
        file.read_exact_at(bytes, start)?;
        if let Some(last) = bytes.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// A run as its log tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// Of the last process.
    pub start: Start,
    /// Processes that trained.
    pub processes: u64,
    /// Each step once, in order, as the process made it whose step counts.
    pub steps: Vec<Step>,
    /// Of the last process that came so far.
    pub timeline: Option<StepTimeline>,
    /// Of the last process, if it ended as it should.
    pub summary: Option<Summary>,
}

impl History {
    /// Reads the log in a run's folder.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::RunLog`] with the line that cannot be read.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let failed = Error::file(&path);
        let opened = Folder::open(directory).and_then(|folder| folder.open_file(FILE, Access::Read));
        let mut file = BufReader::new(opened.map_err(failed)?);
        let mut history: Option<Self> = None;
        let mut line = vec![];
        for number in 1.. {
            let wrong = |reason: String| Error::RunLog { path: path.clone(), line: number, reason };
            line.clear();
            let read = (&mut file).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(failed)?;
            if read as u64 == LINE_BYTES_MAX {
                return Err(wrong(format!("it has more than {LINE_BYTES_MAX} bytes")));
            }
            if !line.ends_with(b"\n") {
                break;
            }
            let record = serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
            match (record, &mut history) {
                (Record::Start(start), None) => {
                    let (start, steps) = (*start, vec![]);
                    history = Some(Self { start, processes: 1, steps, timeline: None, summary: None });
                }
                (Record::Start(start), Some(history)) => {
                    history.steps.retain(|step| step.step <= start.after_step);
                    history.start = *start;
                    history.processes += 1;
                    history.summary = None;
                }
                (Record::Step(step), Some(history)) => history.steps.push(step),
                (Record::Timeline(timeline), Some(history)) => history.timeline = Some(timeline),
                (Record::Summary(summary), Some(history)) => history.summary = Some(*summary),
                (_, None) => return Err(wrong("the log does not begin with the start of a run".into())),
            }
        }
        history.ok_or_else(|| Error::RunLog { path, line: 1, reason: "no run has begun yet".into() })
    }
}
