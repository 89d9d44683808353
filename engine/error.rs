//! The one error type of the engine: what happened, where, and what to do about it.

use ferrozero_offload::{Stopped, Tier};
use std::any::Any;
use std::path::{Path, PathBuf};

/// Result of engine calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a user's model and its state in tiers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of candle's, raised in the user's model or in a tensor operation of the engine.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An error of the memory or disk tiers.
    #[error(transparent)]
    Offload(#[from] ferrozero_offload::Error),
    /// An error of the disk tier while steps were run.
    #[error("before the end of step {step}{}: {source}", in_parameters(.parameters))]
    Disk {
        /// Optimizer step, 1-based.
        step: u64,
        /// Names of the parameters whose states are in the piece that it is about; none where it is about no
        /// piece of states.
        parameters: Vec<String>,
        /// What failed, with file, extent and generation.
        source: ferrozero_offload::Error,
    },
    /// An error of the numeric kernels.
    #[error("numeric kernel: {0}")]
    Kernel(#[from] ferrozero_kernels::Error),
    /// An error of the numeric kernels on a CUDA device.
    #[cfg(feature = "cuda")]
    #[error("numeric kernel: {0}")]
    CudaKernel(#[from] ferrozero_kernels::cuda::CudaError),
    /// A setting that cannot be used.
    #[error("configuration: {0}")]
    Configuration(String),
    /// The plan does not fit the budget.
    #[error(
        "the plan needs {needed_bytes} bytes of {tier} memory and the budget is {budget_bytes} bytes. \
         {culprit}. The least that works is {least_bytes} bytes ({least_mib} MiB): raise {} to that, \
         or make the model, the batch or the sequence smaller",
        limit_of(*.tier),
        least_mib = .least_bytes.div_ceil(1 << 20)
    )]
    BudgetTooSmall {
        /// Tier whose budget is too small.
        tier: ferrozero_offload::Tier,
        /// Bytes that the smallest plan needs in that tier.
        needed_bytes: u64,
        /// Bytes that the budget grants.
        budget_bytes: u64,
        /// The least total budget with which the same run is accepted.
        least_bytes: u64,
        /// What takes the most memory, by name.
        culprit: String,
    },
    /// A device with memory of its own has none left.
    #[error(
        "the device is out of memory ({reason}): the plan counts {planned_bytes} bytes there; {used_bytes} \
         are in use, by this process and others, and {free_bytes} are free. The last commit is intact: go on \
         from it with a smaller batch or sequence, with boundaries on host or disk, or with a lower \
         Config::device_memory_bytes, which leaves more to the model's own tensors"
    )]
    DeviceMemory {
        /// Bytes of the device that the plan counts; 0 where there is none yet.
        planned_bytes: u64,
        /// Bytes that were in use when it happened, by all processes.
        used_bytes: u64,
        /// Bytes that were free then.
        free_bytes: u64,
        /// What the driver said.
        reason: String,
    },
    /// Trainable parameters that received no gradient in a backward pass.
    #[error(
        "no gradient reached {}: usual culprits are fast candle-nn layers without a backward (LayerNorm, \
         RmsNorm, softmax_last_dim, rope, sdpa: use those of ferrozero::ops), a detach(), or a \
         part of the model that the loss does not use (freeze it with Engine::freeze)",
        list_names(.names)
    )]
    MissingGradient {
        /// Names of the parameters.
        names: Vec<String>,
    },
    /// Segments ran in another order than the rehearsal recorded.
    #[error(
        "the schedule expects {expected}, and the model asked for {found}: segments must run in the same \
         order in every step as in the rehearsal that made the plan"
    )]
    OrderChanged {
        /// What the schedule expects next.
        expected: String,
        /// What the model did.
        found: String,
    },
    /// A segment ran outside of `Trainer::step` and `Trainer::evaluate`.
    #[error(
        "segment {segment} ran outside of Trainer::step and Trainer::evaluate, where its parameters are in \
         their tiers"
    )]
    OutsideStep {
        /// Name of the segment.
        segment: String,
    },
    /// A segment within a segment.
    #[error(
        "segment {inner} ran within segment {outer}: the closure of a segment must not call another one, nor \
         capture its output. Call them one after the other, and give {outer} that output among the inputs of \
         Segment::call"
    )]
    NestedSegment {
        /// The segment that was running.
        outer: String,
        /// The one that was called, or whose output was captured.
        inner: String,
    },
    /// A segment that computed something else in the backward pass than in the forward pass.
    #[error(
        "segment {segment} gave another output when it was computed again in the backward pass, so its \
         gradients would be wrong: it draws random numbers (dropout, rand), counts its calls, or reads what has \
         changed. Draw with ferrozero::dropout, or give the segment what varies as an input"
    )]
    NotRepeatable {
        /// Name of the segment.
        segment: String,
    },
    /// An input that is larger than the one that the memory was planned for.
    #[error(
        "segment {segment} was given an input of shape {found:?}, and the memory is planned for {planned:?}: \
         make the plan with the largest batch there will be"
    )]
    LargerThanPlanned {
        /// Name of the segment.
        segment: String,
        /// Shape of the input.
        found: Vec<usize>,
        /// Its shape in the rehearsal.
        planned: Vec<usize>,
    },
    /// A micro-batch that kept others waiting.
    #[error(
        "micro-batch {micro_batch} did not come to its next segment for {seconds} s while the others of its \
         step waited for it: it may wait for a lock that one of those holds. Let go of locks before a segment \
         runs, or set vertical = 1; if its own code takes that long, raise turn_limit"
    )]
    Stuck {
        /// Its number within the step, from 0.
        micro_batch: usize,
        /// Seconds that the others waited.
        seconds: u64,
    },
    /// A gradient that is infinite or not a number.
    #[error(
        "step {step}: {count} gradient values of {group} are infinite or NaN; nothing of that group was \
         updated and the last commit is intact. A lower learning rate, a warm-up or clipping usually helps"
    )]
    NonFiniteGradient {
        /// Group whose gradients are not finite.
        group: String,
        /// Optimizer step, 1-based.
        step: u64,
        /// How many values.
        count: u64,
    },
    /// An update made values that are infinite or not a number.
    #[error(
        "step {step}: {count} values of the state of {group} became infinite or NaN; nothing of that is \
         committed, and the last commit is intact. A lower learning rate, a warm-up or clipping usually helps"
    )]
    NonFiniteState {
        /// Group whose parameters or moments are not finite.
        group: String,
        /// Optimizer step, 1-based.
        step: u64,
        /// How many values of the piece that was updated.
        count: u64,
    },
    /// The loss is infinite or not a number.
    #[error("step {step}: the loss is {loss}; the last commit is intact")]
    NonFiniteLoss {
        /// Optimizer step, 1-based.
        step: u64,
        /// The value.
        loss: f32,
    },
    /// A checkpoint that belongs to another model or run.
    #[error("{path}: the checkpoint does not match this run: {mismatch}")]
    CheckpointMismatch {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// What differs, stored against asked.
        mismatch: String,
    },
    /// A folder that already holds a checkpoint.
    #[error(
        "{path} already holds a checkpoint: go on from it with Config::resume, or choose another Config::directory"
    )]
    CheckpointExists {
        /// Folder of the checkpoint.
        path: PathBuf,
    },
    /// A safetensors file that cannot be used.
    #[error("{path}: {reason}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Weights of a model that cannot be used.
    #[error("weights {path}: {reason}")]
    Weights {
        /// Their file or folder.
        path: PathBuf,
        /// What is wrong with them, with the tensor.
        reason: String,
    },
    /// A model, a file or a machine that the engine cannot work with.
    #[error("{0}")]
    Unsupported(String),
    /// Calls that contradict each other, such as two segments of one name or a parameter that nobody has.
    #[error("{0}")]
    Misuse(String),
    /// The system gave no thread.
    #[error("the {name} thread could not be started: {source}; check the limit on threads")]
    Thread {
        /// What it was to do.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A state that no user, file or device should be able to cause. The last commit is as it was.
    #[error("internal error: {0}; please report it")]
    Internal(String),
    /// Code of the user's that a queue runs, such as initial values, or of the engine's, panicked.
    #[error("the {queue} thread panicked: {text}; the last commit is as it was")]
    Panicked {
        /// The queue.
        queue: &'static str,
        /// What the panic said.
        text: String,
    },
    /// An earlier failure has stopped this trainer.
    #[error("the trainer was stopped by an earlier error ({0}): open the last commit with a new trainer")]
    Stopped(String),
    /// A run's log that cannot be read.
    #[error(
        "{path}, line {line}: {reason}; the run itself does not need the file: where it is damaged, move it \
         away"
    )]
    RunLog {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

impl From<Stopped> for Error {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Failed => Self::Stopped("another micro-batch of the step failed".into()),
            Stopped::Late { runner, seconds } => Self::Stuck { micro_batch: runner, seconds },
        }
    }
}

/// The setting that limits a tier.
fn limit_of(tier: Tier) -> &'static str {
    if tier == Tier::Device { "Config::device_memory_bytes" } else { "Config::memory_bytes" }
}

fn in_parameters(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(", in {}", list_names(names)) }
}

fn list_names(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

/// A state that no user can cause: reported as an error all the same, so that the last commit stays
/// reachable.
pub fn internal(what: &str) -> Error {
    Error::Internal(what.to_owned())
}

impl Error {
    /// What makes the system's error with a file the engine's.
    pub(crate) fn file(path: &Path) -> impl Fn(std::io::Error) -> Self + Copy + '_ {
        |source| Self::File { path: path.to_owned(), source }
    }

    /// Whether the driver of a device may have caused it.
    pub(crate) fn can_be_of_device(&self) -> bool {
        match self {
            Self::Candle(_) | Self::Offload(_) => true,
            #[cfg(feature = "cuda")]
            Self::CudaKernel(_) => true,
            _ => false,
        }
    }

    /// A panic of a queue's thread.
    pub(crate) fn panicked(queue: &'static str, panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Self::Panicked { queue, text: text.unwrap_or("without a text").to_owned() }
    }
}
