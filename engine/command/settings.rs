//! What commands that train have in common: their options and settings.

mod layers;

pub(super) use layers::{Resolved, resolve, resolve_run, schema, with_defaults};
pub use layers::{Settings, read_document};

use super::configuration;
use super::overrides::Overrides;
use crate::byte_size::ByteSize;
use crate::error::Result;
use crate::planner::machine::Machine;
use crate::planner::plan::Plan;
use crate::train::learning_rate::LearningRate;
use crate::{AdamW, Config, Products};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Options of every command that trains. What none is given for is [`RunSettings`]'s.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct RunArguments {
    /// JSON or TOML file with settings: the names of these options, with _ for -; or a ds_config.json of DeepSpeed's
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Tokens of a sequence
    #[arg(long)]
    pub seq: Option<usize>,
    /// Sequences of a micro-batch
    #[arg(long)]
    pub batch: Option<usize>,
    /// Micro-batches of a step
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Device that computes: cpu, cuda or cuda:NUMBER
    #[arg(long)]
    pub device: Option<String>,
    /// Type of parameters, gradients and activations on the device; masters and moments stay f32
    #[arg(long)]
    pub dtype: Option<ComputeType>,
    /// What matrices are multiplied as on the CPU device; bf16 is faster where the processor has matrix tiles (AMX), and less exact
    #[arg(long)]
    pub products: Option<ProductType>,
    /// Memory of the host that the run may use, on the CPU device in all, as 512MiB or 16GiB
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Memory that the device may use [default: on the CPU device no limit but --memory, on a CUDA device nine tenths of what is free]
    #[arg(long, value_name = "SIZE")]
    pub device_memory: Option<ByteSize>,
    /// Folder of the run, whose state is the checkpoint
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// One more folder, on another disk, for a part of the states; may be given several times
    #[arg(long, value_name = "DIR")]
    pub stripe: Vec<PathBuf>,
    /// Keep states once and not twice on disk: a kill between two commits then loses the run
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub in_place: Option<bool>,
    /// Seed of initial values and of the data's order
    #[arg(long)]
    pub seed: Option<u64>,
    /// Highest learning rate; it rises at first and falls along a cosine
    #[arg(long)]
    pub lr: Option<f64>,
    /// Learning rate at the end, as a share of the highest; 1 for a rate that does not fall
    #[arg(long)]
    pub lr_floor: Option<f64>,
    /// Largest gradient norm that is not scaled down, 0 for no clipping
    #[arg(long)]
    pub clip: Option<f64>,
    /// Weight decay of matrices
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Decay of AdamW's first moment
    #[arg(long)]
    pub beta1: Option<f64>,
    /// Decay of its second moment
    #[arg(long)]
    pub beta2: Option<f64>,
    /// What is added to the root of the second moment
    #[arg(long)]
    pub epsilon: Option<f64>,
    /// Steps between two evaluations, 0 for one at the end only
    #[arg(long)]
    pub eval_every: Option<u64>,
    /// Steps between two commits, 0 for one at the end only
    #[arg(long)]
    pub commit_every: Option<u64>,
    /// Threads of the optimizer [default: one a processor]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Go on from the last commit in --dir, with its settings where no others are given
    #[arg(long)]
    #[serde(skip)]
    pub resume: bool,
    /// What is written down of the run.
    #[command(flatten)]
    #[serde(skip)]
    pub reporting: Reporting,
    /// What the planner otherwise chooses.
    #[command(flatten)]
    pub overrides: Overrides,
}

/// Options of commands that train: what they write down, and where.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Reporting {
    /// Write one JSON object a step and a last one with the summary on standard output
    #[arg(long)]
    pub json: bool,
    /// Write a timeline of all operations, for chrome://tracing or Perfetto
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Write loss, learning rate, gradient norm, tokens a second and exposed stall as events for TensorBoard
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// Say nothing but errors, and with --json the objects: no plan, progress, sample or summary
    #[arg(long, short)]
    pub quiet: bool,
}

/// The type that a device computes with.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// 32 bits, as the masters.
    #[default]
    F32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits with a small range: the loss is scaled.
    F16,
}

impl From<ComputeType> for DType {
    fn from(dtype: ComputeType) -> Self {
        match dtype {
            ComputeType::F32 => Self::F32,
            ComputeType::Bf16 => Self::BF16,
            ComputeType::F16 => Self::F16,
        }
    }
}

impl fmt::Display for ComputeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// What matrices of f32 are multiplied as on the CPU device.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ProductType {
    /// F32.
    #[default]
    F32,
    /// Bf16, summed in f32, by the processor's matrix tiles; everything else stays f32.
    Bf16,
}

impl fmt::Display for ProductType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl From<ProductType> for Products {
    fn from(products: ProductType) -> Self {
        match products {
            ProductType::F32 => Self::F32,
            ProductType::Bf16 => Self::Bf16,
        }
    }
}

/// Settings of every run that trains, all of them known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[expect(missing_docs, reason = "each field is the option of the same name, documented at RunArguments")]
pub struct RunSettings {
    pub seq: usize,
    pub batch: usize,
    pub accumulate: usize,
    pub device: String,
    pub dtype: ComputeType,
    pub products: ProductType,
    pub memory: ByteSize,
    pub device_memory: Option<ByteSize>,
    pub dir: PathBuf,
    pub stripe: Vec<PathBuf>,
    pub in_place: bool,
    pub seed: u64,
    pub lr: f64,
    pub lr_floor: f64,
    pub clip: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub eval_every: u64,
    pub commit_every: u64,
    pub threads: Option<usize>,
    /// What the planner otherwise chooses.
    pub overrides: Overrides,
}

impl Default for RunSettings {
    fn default() -> Self {
        Self {
            seq: 128,
            batch: 4,
            accumulate: 1,
            device: "cpu".into(),
            dtype: ComputeType::F32,
            products: ProductType::F32,
            memory: ByteSize(384 << 20),
            device_memory: None,
            dir: PathBuf::from("ferrozero-run"),
            stripe: vec![],
            in_place: false,
            seed: 1,
            lr: 1e-3,
            lr_floor: 0.1,
            clip: 1.0,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            eval_every: 0,
            commit_every: 20,
            threads: None,
            overrides: Overrides::default(),
        }
    }
}

/// Refuses a size that is none, or too large to compute with.
///
/// # Errors
/// [`Error::Configuration`](crate::Error::Configuration) naming the size.
pub(super) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return Err(configuration(format!("{name} must be at least 1")));
    }
    if let Some((name, size)) = sizes.iter().find(|(_, size)| *size > SIZE_MAX) {
        return Err(configuration(format!("{name} is {size} and must be at most {SIZE_MAX}")));
    }
    Ok(())
}

impl RunSettings {
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) naming what cannot be.
    pub(super) fn check(&self) -> Result<()> {
        check_sizes(&[
            ("seq", self.seq),
            ("batch", self.batch),
            ("accumulate", self.accumulate),
            ("threads", self.threads.unwrap_or(1)),
        ])?;
        if self.threads.is_some_and(|threads| threads > THREADS_MAX) {
            return Err(configuration(format!("threads must be at most {THREADS_MAX}")));
        }
        let shares = [
            ("lr_floor", self.lr_floor, 1.0),
            ("beta1", self.beta1, 1.0 - f64::EPSILON),
            ("beta2", self.beta2, 1.0 - f64::EPSILON),
        ];
        if let Some((name, value, _)) = shares.iter().find(|(_, value, most)| !(0.0..=*most).contains(value))
        {
            return Err(configuration(format!(
                "{name} is {value} and must be from 0 to 1; a beta must be below 1"
            )));
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return Err(configuration(format!("epsilon is {} and must be above 0", self.epsilon)));
        }
        let numbers = [("lr", self.lr), ("clip", self.clip), ("weight_decay", self.weight_decay)];
        if let Some((name, value)) = numbers.iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
            return Err(configuration(format!("{name} is {value} and must be 0 or more")));
        }
        Ok(())
    }

    /// What the engine is told. The device is opened.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) for a device that is not there.
    pub(super) fn config(&self, resume: bool) -> Result<Config> {
        let device = crate::open_device(&self.device)?;
        let choices = self.overrides.choices();
        Ok(Config {
            machine: Machine::probed(&self.dir, &device),
            device,
            dtype: self.dtype.into(),
            products: self.products.into(),
            memory_bytes: Some(self.memory.0),
            device_memory_bytes: self.device_memory.map(|size| size.0),
            directory: Some(self.dir.clone()),
            stripes: self.stripe.clone(),
            in_place: self.in_place,
            resume,
            accumulate: self.accumulate,
            clip: (self.clip > 0.0).then_some(self.clip),
            seed: self.seed,
            threads: self.threads,
            placement: choices.placement,
            boundaries: choices.boundaries,
            slots: choices.slots,
            look_ahead: choices.look_ahead,
            state_pieces: choices.state_pieces,
            gradient_sets: choices.gradient_sets,
            vertical: choices.vertical,
            kept: choices.kept,
            updates: choices.updates,
            piece_bytes: choices.piece_bytes,
            ..Config::default()
        })
    }

    /// Refuses pieces that the plan does not have.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) for a run that resumes: it has the pieces of its checkpoint.
    pub(super) fn check_pieces(&self, plan: &Plan) -> Result<()> {
        let piece_bytes = 4 * plan.layout().piece_elements;
        match self.overrides.choices().piece_bytes {
            Some(bytes) if bytes != piece_bytes => Err(configuration(format!(
                "the checkpoint is in pieces of {piece_bytes} bytes, and a run that resumes keeps them: leave --piece out"
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn adamw(&self) -> AdamW {
        AdamW {
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            ..AdamW::default()
        }
    }

    /// The learning rate of a run of so many steps, which rises over the first `warmup` of them.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) for a rise that is longer than the run.
    pub(super) fn rate(&self, warmup: u64, steps: u64) -> Result<LearningRate> {
        check_warmup(warmup, steps)?;
        let floor = self.lr_floor * self.lr;
        Ok(LearningRate { peak: self.lr, warmup, steps, floor })
    }

    /// Tokens of a step.
    pub(super) fn tokens(&self) -> u64 {
        (self.accumulate * self.batch * self.seq) as u64
    }
}

/// # Errors
/// [`Error::Configuration`](crate::Error::Configuration) for a learning rate that rises for longer than the run.
pub(super) fn check_warmup(warmup: u64, steps: u64) -> Result<()> {
    match warmup > steps {
        true => Err(configuration(format!("warmup ({warmup}) must not be more than steps ({steps})"))),
        false => Ok(()),
    }
}

/// Largest size of any kind: their products are still numbers of bytes.
const SIZE_MAX: usize = 1 << 20;
const THREADS_MAX: usize = 4096;
