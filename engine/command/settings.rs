//! Settings of a training run: defaults, then a resumed run's, then a file's, then the command line's.

use super::{configuration, deepspeed};
use crate::byte_size::ByteSize;
use crate::error::{Error, Result};
use crate::models::gpt::GptConfig;
use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Options of `ferrozero train`.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct TrainArguments {
    /// JSON or TOML file with settings: the names of these options, with _ for -; or a ds_config.json of DeepSpeed's
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Text file, or folder with text files [default: the sources and documents of cargo's packages]
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Hugging Face tokenizer [default: every byte is a token]
    #[arg(long, value_name = "tokenizer.json")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Optimizer steps in all [default: 100]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Transformer blocks [default: 12]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Width of the model [default: 512]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Attention heads [default: 8]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Tokens of a sequence [default: 128]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<usize>,
    /// Sequences of a micro-batch [default: 4]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Micro-batches of a step [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,
    /// Device that computes: cpu, cuda or cuda:NUMBER [default: cpu]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Type of parameters, gradients and activations on a CUDA device; masters and moments stay f32 [default: f32]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<ComputeType>,
    /// Memory of the host that the run may use, on the CPU device in all, as 512MiB or 16GiB [default: 384MiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Memory that the device may use: on the CPU device a part of --memory [default: not limited]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<ByteSize>,
    /// Folder of the run, whose state is the checkpoint [default: ferrozero-run]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// One more folder, on another disk, for a part of the states; may be given several times
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stripe: Vec<PathBuf>,
    /// Keep states once and not twice on disk: a kill between two commits then loses the run
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
    /// Seed of initial values and of the data's order [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Highest learning rate; it falls along a cosine [default: 0.001]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Learning rate at the end, as a share of the highest; 1 for a rate that does not fall [default: 0.1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_floor: Option<f64>,
    /// Steps in which the learning rate rises [default: 10]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// Largest gradient norm that is not scaled down, 0 for no clipping [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Weight decay of matrices [default: 0.1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Decay of AdamW's first moment [default: 0.9]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// Decay of its second moment [default: 0.99]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// What is added to the root of the second moment [default: 0.00000001]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// Steps between two evaluations, 0 for one at the end only [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u64>,
    /// Steps between two commits, 0 for one at the end only [default: 20]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_every: Option<u64>,
    /// Threads of the optimizer [default: one a processor]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Go on from the last commit in --dir, with its settings where no others are given
    #[arg(long)]
    #[serde(skip)]
    pub resume: bool,
    /// What is written down of the run.
    #[command(flatten)]
    #[serde(skip)]
    pub reporting: Reporting,
    /// Tokens of the text that is generated at the end, 0 for none [default: 80]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<usize>,
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

impl ComputeType {
    /// Candle's name of it, for a device of the command line's.
    ///
    /// # Errors
    /// [`Error::Configuration`] for a type that commands do not compute with there.
    pub fn on(self, device: &str) -> Result<DType> {
        if device == "cpu" && self != Self::F32 {
            return Err(configuration(
                "the CPU device computes in f32, which is faster there than f32 made of other types: leave dtype out, or \
                 choose a CUDA device"
                    .into(),
            ));
        }
        Ok(self.dtype())
    }

    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// Settings that a run goes by, all of them known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "each field is the option of the same name, documented at TrainArguments")]
pub struct TrainSettings {
    pub data: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub steps: u64,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub seq: usize,
    pub batch: usize,
    pub accumulate: usize,
    pub device: String,
    pub dtype: ComputeType,
    pub memory: ByteSize,
    pub device_memory: Option<ByteSize>,
    pub dir: PathBuf,
    pub stripe: Vec<PathBuf>,
    pub in_place: bool,
    pub seed: u64,
    pub lr: f64,
    pub lr_floor: f64,
    pub warmup: u64,
    pub clip: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub eval_every: u64,
    pub commit_every: u64,
    pub threads: Option<usize>,
    pub sample: usize,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            data: None,
            tokenizer: None,
            steps: 100,
            layers: 12,
            hidden: 512,
            heads: 8,
            seq: 128,
            batch: 4,
            accumulate: 1,
            device: "cpu".into(),
            dtype: ComputeType::F32,
            memory: ByteSize(384 << 20),
            device_memory: None,
            dir: PathBuf::from("ferrozero-run"),
            stripe: vec![],
            in_place: false,
            seed: 1,
            lr: 1e-3,
            lr_floor: 0.1,
            warmup: 10,
            clip: 1.0,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            eval_every: 0,
            commit_every: 20,
            threads: None,
            sample: 80,
        }
    }
}

/// Largest size of any kind: their products are still numbers of bytes.
const SIZE_MAX: usize = 1 << 20;
const THREADS_MAX: usize = 4096;
/// A petabyte of state.
const PARAMETERS_MAX: u128 = 1 << 46;

/// Puts the members of `upper` over those of `lower`.
fn overlay(lower: &mut Value, upper: Value) {
    if let (Value::Object(lower), Value::Object(upper)) = (lower, upper) {
        lower.extend(upper);
    }
}

/// A file as it is, JSON or, by its name, TOML.
///
/// # Errors
/// [`Error::File`], and [`Error::Configuration`] with line and column of what cannot be read.
pub fn read_document(path: &Path) -> Result<Value> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    let wrong =
        |kind: &str, error: String| configuration(format!("{} is not valid {kind}: {error}", path.display()));
    match path.extension().is_some_and(|extension| extension == "toml") {
        true => toml::from_str(&text).map_err(|error| wrong("TOML", error.to_string())),
        false => serde_json::from_str(&text).map_err(|error| wrong("JSON", error.to_string())),
    }
}

/// The settings in a file, which may be a configuration of DeepSpeed's.
fn read_file(path: &Path) -> Result<Value> {
    let mut value = read_document(path)?;
    if deepspeed::is_deepspeed(&value) {
        let mapping =
            deepspeed::map(&value).map_err(|error| configuration(format!("{}: {error}", path.display())))?;
        value = Value::Object(mapping.settings);
    }
    // Checked on its own, so that an error is known to be the file's.
    serde_json::from_value::<TrainSettings>(value.clone())
        .map_err(|error| configuration(format!("{}: {error}", path.display())))?;
    Ok(value)
}

impl TrainSettings {
    /// Brings the layers together. `resumed` are the settings of the run that is resumed.
    ///
    /// # Errors
    /// [`Error::Configuration`] and [`Error::File`].
    pub fn resolve(arguments: &TrainArguments, resumed: Option<Value>) -> Result<Self> {
        let json = |error: serde_json::Error| configuration(error.to_string());
        let mut value = serde_json::to_value(Self::default()).map_err(json)?;
        overlay(&mut value, resumed.unwrap_or_default());
        if let Some(path) = &arguments.config {
            overlay(&mut value, read_file(path)?);
        }
        overlay(&mut value, serde_json::to_value(arguments).map_err(json)?);
        let settings: Self = serde_json::from_value(value).map_err(json)?;
        settings.check()?;
        Ok(settings)
    }

    /// The settings of a file, over the defaults.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn of_file(path: &Path) -> Result<Self> {
        Self::resolve(&TrainArguments { config: Some(path.to_owned()), ..Default::default() }, None)
    }

    /// Folder of the run, before a checkpoint in it is known.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn folder(arguments: &TrainArguments) -> Result<PathBuf> {
        if let Some(dir) = &arguments.dir {
            return Ok(dir.clone());
        }
        let from_file = arguments.config.as_deref().map(read_file).transpose()?;
        let from_file = from_file.as_ref().and_then(|value| value.get("dir")?.as_str());
        Ok(from_file.map_or(Self::default().dir, PathBuf::from))
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("steps", self.steps as usize),
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("seq", self.seq),
            ("batch", self.batch),
            ("accumulate", self.accumulate),
            ("threads", self.threads.unwrap_or(1)),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(configuration(format!("{name} must be at least 1")));
        }
        if let Some((name, size)) = sizes[1..].iter().find(|(_, size)| *size > SIZE_MAX) {
            return Err(configuration(format!("{name} is {size} and must be at most {SIZE_MAX}")));
        }
        if self.threads.is_some_and(|threads| threads > THREADS_MAX) {
            return Err(configuration(format!("threads must be at most {THREADS_MAX}")));
        }
        let [layers, hidden, seq] = [self.layers, self.hidden, self.seq].map(|size| size as u128);
        if 12 * layers * hidden * hidden + seq * hidden > PARAMETERS_MAX {
            let (layers, hidden) = (self.layers, self.hidden);
            return Err(configuration(format!(
                "a model of layers = {layers} and hidden = {hidden} has more parameters than any disk holds"
            )));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let (hidden, heads) = (self.hidden, self.heads);
            return Err(configuration(format!("hidden ({hidden}) must be a multiple of heads ({heads})")));
        }
        self.dtype.on(&self.device)?;
        if self.warmup > self.steps {
            let (warmup, steps) = (self.warmup, self.steps);
            return Err(configuration(format!("warmup ({warmup}) must not be more than steps ({steps})")));
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

    /// Sizes of the model.
    pub fn model(&self, vocabulary: usize) -> GptConfig {
        GptConfig {
            vocabulary,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            sequence: self.seq,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve_file(text: &str, arguments: TrainArguments) -> Result<TrainSettings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.json");
        std::fs::write(&path, text).unwrap();
        TrainSettings::resolve(&TrainArguments { config: Some(path), ..arguments }, None)
    }

    #[test]
    fn the_command_line_is_over_the_file_which_is_over_the_resumed_run() {
        let resumed = serde_json::json!({ "layers": 3, "hidden": 64, "seed": 9 });
        let folder = tempfile::tempdir().unwrap();
        let config = Some(folder.path().join("train.json"));
        std::fs::write(config.as_ref().unwrap(), r#"{ "hidden": 96, "seq": 32, "memory": "1GiB" }"#).unwrap();
        let arguments = TrainArguments { config, seq: Some(48), ..Default::default() };
        let settings = TrainSettings::resolve(&arguments, Some(resumed)).unwrap();
        let expected = TrainSettings {
            layers: 3,
            seed: 9,
            hidden: 96,
            memory: ByteSize(1 << 30),
            seq: 48,
            ..TrainSettings::default()
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn a_file_is_json_or_toml_or_deepspeeds() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            TrainSettings::of_file(&path)
        };
        let expected = TrainSettings { batch: 2, lr: 0.5, ..TrainSettings::default() };
        assert_eq!(of("a.json", r#"{ "batch": 2, "lr": 0.5 }"#).unwrap(), expected);
        assert_eq!(of("a.toml", "batch = 2\nlr = 0.5\n").unwrap(), expected);
        let deepspeed =
            r#"{ "train_micro_batch_size_per_gpu": 2, "optimizer": { "params": { "lr": 0.5 } } }"#;
        let expected = TrainSettings {
            beta2: 0.999,
            lr_floor: 1.0,
            warmup: 0,
            clip: 0.0,
            weight_decay: 0.0,
            ..expected
        };
        assert_eq!(of("ds_config.json", deepspeed).unwrap(), expected);
        let error =
            of("b.json", r#"{ "zero_optimization": { "stage": 3, "mics_shard_size": 4 } }"#).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("b.json") && error.contains("zero_optimization.mics_shard_size"), "{error}");
        assert!(of("b.toml", "batch = ").unwrap_err().to_string().contains("not valid TOML"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text, part: &str| {
            let error = resolve_file(text, TrainArguments::default()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        };
        wrong("{ \"layer\": 3 }", "unknown field `layer`");
        wrong("{ \"layer\": 3 }", "train.json");
        wrong("{ \"layers\": \"three\" }", "three");
        wrong("{ \"memory\": \"lots\" }", "512MiB");
        wrong("{ \"layers\": 3", "not valid JSON");
        wrong("{ \"heads\": 7 }", "multiple of heads (7)");
        wrong("{ \"steps\": 0 }", "steps");
        wrong("{ \"lr\": -1 }", "lr");
        wrong("{ \"batch\": 18446744073709551615 }", "batch");
        wrong("{ \"threads\": 1000000 }", "threads");
        wrong("{ \"layers\": 1000000, \"hidden\": 1000000 }", "more parameters than any disk holds");
        wrong("{ \"beta2\": 1.0 }", "beta2");
        wrong("{ \"lr_floor\": 2 }", "lr_floor");
        wrong("{ \"epsilon\": 0 }", "epsilon");
        wrong("{ \"warmup\": 1000 }", "warmup (1000)");
        let missing = TrainArguments { config: Some("nowhere.json".into()), ..Default::default() };
        assert!(TrainSettings::resolve(&missing, None).unwrap_err().to_string().contains("nowhere.json"));
    }
}
