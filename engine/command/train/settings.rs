//! Settings of `ferrozero train`.

use super::super::configuration;
use super::super::settings::{RunArguments, RunSettings, Settings, check_sizes, check_warmup, resolve};
use crate::error::Result;
use crate::models::gpt::GptConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// Options of `ferrozero train`.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct TrainArguments {
    /// Text file, or folder with text files [default: the sources and documents of cargo's packages]
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Hugging Face tokenizer [default: every byte is a token]
    #[arg(long, value_name = "tokenizer.json")]
    pub tokenizer: Option<PathBuf>,
    /// Optimizer steps in all
    #[arg(long)]
    pub steps: Option<u64>,
    /// Transformer blocks
    #[arg(long)]
    pub layers: Option<usize>,
    /// Width of the model
    #[arg(long)]
    pub hidden: Option<usize>,
    /// Attention heads
    #[arg(long)]
    pub heads: Option<usize>,
    /// Steps in which the learning rate rises
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Tokens of the text that is generated at the end, 0 for none
    #[arg(long)]
    pub sample: Option<usize>,
    /// What it has in common with other commands.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArguments,
}

/// Settings that a run of `ferrozero train` goes by, all of them known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
#[expect(missing_docs, reason = "each field is the option of the same name, documented at TrainArguments")]
pub struct TrainSettings {
    pub data: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub steps: u64,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub warmup: u64,
    pub sample: usize,
    #[serde(flatten)]
    pub run: RunSettings,
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
            warmup: 10,
            sample: 80,
            run: RunSettings::default(),
        }
    }
}

/// A petabyte of state.
const PARAMETERS_MAX: u128 = 1 << 46;

impl Settings for TrainSettings {
    type Arguments = TrainArguments;

    fn run(&self) -> &RunSettings {
        &self.run
    }

    fn check(&self) -> Result<()> {
        if self.steps == 0 {
            return Err(configuration("steps must be at least 1".into()));
        }
        check_sizes(&[("layers", self.layers), ("hidden", self.hidden), ("heads", self.heads)])?;
        self.run.check()?;
        let [layers, hidden, seq] = [self.layers, self.hidden, self.run.seq].map(|size| size as u128);
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
        check_warmup(self.warmup, self.steps)
    }
}

impl TrainSettings {
    /// Brings the layers together. `resumed` are the settings of the run that is resumed.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) and [`Error::File`](crate::Error::File).
    pub fn resolve(arguments: &TrainArguments, resumed: Option<Value>) -> Result<Self> {
        resolve(arguments, arguments.run.config.as_deref(), resumed)
    }

    /// Sizes of the model.
    pub fn model(&self, vocabulary: usize) -> GptConfig {
        GptConfig {
            vocabulary,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            sequence: self.run.seq,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::byte_size::ByteSize;
    use crate::command::Overrides;

    fn resolve_file(text: &str, arguments: TrainArguments) -> Result<TrainSettings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.json");
        std::fs::write(&path, text).unwrap();
        let run = RunArguments { config: Some(path), ..arguments.run };
        TrainSettings::resolve(&TrainArguments { run, ..arguments }, None)
    }

    #[test]
    fn the_command_line_is_over_the_file_which_is_over_the_resumed_run() {
        let resumed = serde_json::json!({ "layers": 3, "hidden": 64, "seed": 9 });
        let folder = tempfile::tempdir().unwrap();
        let config = Some(folder.path().join("train.json"));
        std::fs::write(config.as_ref().unwrap(), r#"{ "hidden": 96, "seq": 32, "memory": "1GiB" }"#).unwrap();
        let run = RunArguments { config, seq: Some(48), ..Default::default() };
        let arguments = TrainArguments { run, ..Default::default() };
        let settings = TrainSettings::resolve(&arguments, Some(resumed)).unwrap();
        let expected = TrainSettings {
            layers: 3,
            hidden: 96,
            run: RunSettings { seed: 9, memory: ByteSize(1 << 30), seq: 48, ..RunSettings::default() },
            ..TrainSettings::default()
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn what_the_planner_chooses_is_overridden_one_by_one() {
        let overrides = |text: &str| serde_json::from_str::<Overrides>(text).unwrap();
        let resumed = serde_json::json!({ "overrides": { "slots": 3, "placement": "disk" } });
        let folder = tempfile::tempdir().unwrap();
        let config = Some(folder.path().join("train.toml"));
        let file =
            "[overrides]\nplacement = \"device,disk,disk,host\"\nupdates = \"at-once\"\npiece = \"64KiB\"\n";
        std::fs::write(config.as_ref().unwrap(), file).unwrap();
        let run =
            RunArguments { config, overrides: overrides(r#"{ "look_ahead": 2 }"#), ..Default::default() };
        let arguments = TrainArguments { run, ..Default::default() };
        let settings = TrainSettings::resolve(&arguments, Some(resumed)).unwrap();
        let expected = r#"{ "slots": 3, "placement": "device,disk,disk,host", "updates": "at-once",
            "piece": "64KiB",
            "look_ahead": 2 }"#;
        assert_eq!(settings.run.overrides, overrides(expected));
        // What a run keeps of its settings is what it reads.
        let kept = serde_json::to_value(&settings).unwrap();
        assert_eq!(serde_json::from_value::<TrainSettings>(kept).unwrap(), settings);
    }

    #[test]
    fn what_a_file_turns_on_the_command_line_turns_off() {
        let in_place = |options: &str| {
            let command = <TrainArguments as clap::Args>::augment_args(clap::Command::new("train"));
            let matches = command.try_get_matches_from(format!("train{options}").split(' ')).unwrap();
            let arguments = <TrainArguments as clap::FromArgMatches>::from_arg_matches(&matches).unwrap();
            resolve_file(r#"{ "in_place": true }"#, arguments).unwrap().run.in_place
        };
        assert!(in_place(""), "what is not given leaves the file's");
        assert!(in_place(" --in-place") && in_place(" --in-place=true"));
        assert!(!in_place(" --in-place=false"));
    }

    #[test]
    fn a_file_is_json_or_toml_or_deepspeeds() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            TrainSettings::from_file(&path)
        };
        let run = RunSettings { batch: 2, lr: 0.5, ..RunSettings::default() };
        let expected = TrainSettings { run: run.clone(), ..TrainSettings::default() };
        assert_eq!(of("a.json", r#"{ "batch": 2, "lr": 0.5 }"#).unwrap(), expected);
        assert_eq!(of("a.toml", "batch = 2\nlr = 0.5\n").unwrap(), expected);
        let deepspeed = r#"{ "train_micro_batch_size_per_gpu": 2,
            "optimizer": { "type": "AdamW", "params": { "lr": 0.5 } } }"#;
        let run = RunSettings { beta2: 0.999, lr_floor: 1.0, clip: 0.0, weight_decay: 0.0, ..run };
        let expected = TrainSettings { warmup: 0, run, ..expected };
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
        wrong("{ \"overrides\": { \"slot\": 1 } }", "unknown field `slot`");
        wrong("{ \"overrides\": { \"placement\": \"tape\" } }", "disk,disk,disk,host");
        let run = RunArguments { config: Some("nowhere.json".into()), ..Default::default() };
        let missing = TrainArguments { run, ..Default::default() };
        assert!(TrainSettings::resolve(&missing, None).unwrap_err().to_string().contains("nowhere.json"));
    }
}
