//! Settings of `ferrozero finetune`.

use super::super::configuration;
use super::super::settings::{RunArguments, RunSettings, Settings, check_sizes};
use crate::byte_size::ByteSize;
use crate::error::Result;
use crate::models::linear::Adapting;
use crate::models::pretrained::Pretrained;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Options of `ferrozero finetune`.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct FinetuneArguments {
    /// Hugging Face folder, or GGUF file
    #[serde(skip)]
    pub model: PathBuf,
    /// Text, or FILE.jsonl with {"prompt": …, "completion": …}, {"text": …} or {"messages": […]} a line;
    /// prompts, and what the assistant does not say, are not learnt
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Folder for the result, which transformers loads
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Hugging Face tokenizer [default: the model's own]
    #[arg(long, value_name = "tokenizer.json")]
    pub tokenizer: Option<PathBuf>,
    /// Passes over the data
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Optimizer steps in all [default: those of --epochs]
    #[arg(long)]
    pub steps: Option<u64>,
    /// Steps in which the learning rate rises [default: a tenth of all]
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Stop after so many evaluations without a better one, 0 for never
    #[arg(long)]
    pub patience: Option<u32>,
    /// Train adapters of this rank beside frozen weights (LoRA); 0 trains all weights
    #[arg(long)]
    pub lora_rank: Option<usize>,
    /// The adapters' outputs are multiplied with this over the rank
    #[arg(long)]
    pub lora_alpha: Option<f64>,
    /// Layers that get an adapter, by the ends of their names, as q_proj,v_proj [default: all linear layers
    /// of the blocks]
    #[arg(long, value_delimiter = ',')]
    pub lora_targets: Vec<String>,
    /// Write the whole model with its adapters in its weights, and not the adapters in the format of PEFT
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub lora_merge: Option<bool>,
    /// What it has in common with other commands.
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArguments,
}

/// Settings that a run of `ferrozero finetune` goes by, all of them known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct FinetuneSettings {
    pub data: Option<PathBuf>,
    pub out: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub epochs: f64,
    pub steps: Option<u64>,
    pub warmup: Option<u64>,
    pub patience: u32,
    pub lora_rank: usize,
    pub lora_alpha: f64,
    pub lora_targets: Vec<String>,
    pub lora_merge: bool,
    #[serde(flatten)]
    pub run: RunSettings,
}

impl Default for FinetuneSettings {
    fn default() -> Self {
        Self {
            data: None,
            out: None,
            tokenizer: None,
            epochs: 1.0,
            steps: None,
            warmup: None,
            patience: 0,
            lora_rank: 0,
            lora_alpha: 16.0,
            lora_targets: vec![],
            lora_merge: false,
            run: RunSettings {
                seq: 256,
                batch: 1,
                accumulate: 4,
                memory: ByteSize(2 << 30),
                dir: PathBuf::from("ferrozero-finetune"),
                lr: 2e-5,
                weight_decay: 0.0,
                beta2: 0.999,
                eval_every: 50,
                commit_every: 50,
                ..RunSettings::default()
            },
        }
    }
}

impl Settings for FinetuneSettings {
    type Arguments = FinetuneArguments;

    fn run(&self) -> &RunSettings {
        &self.run
    }

    fn check(&self) -> Result<()> {
        self.run.check()?;
        if !(self.epochs > 0.0 && self.epochs.is_finite()) || self.steps == Some(0) {
            return Err(configuration("epochs and steps must be above 0".into()));
        }
        if self.lora_rank > 0 {
            check_sizes(&[("lora_rank", self.lora_rank)])?;
        }
        match self.lora_alpha.is_finite() {
            true => Ok(()),
            false => Err(configuration(format!("lora_alpha is {} and must be a number", self.lora_alpha))),
        }
    }
}

impl FinetuneSettings {
    /// Steps of the run over so many sequences.
    pub fn steps(&self, sequences: usize) -> u64 {
        let of_epochs =
            || (self.epochs * sequences as f64 / (self.run.batch * self.run.accumulate) as f64).ceil() as u64;
        self.steps.unwrap_or_else(of_epochs)
    }

    /// Which layers of a model get adapters.
    ///
    /// # Errors
    /// [`Error::Configuration`](crate::Error::Configuration) for a target that the model has not.
    pub fn adapting(&self, model: &Pretrained) -> Result<Adapting> {
        model.adapting(self.lora_rank, self.lora_alpha, &self.lora_targets)
    }

    /// Whether the result is adapters alone.
    pub fn writes_adapters(&self) -> bool {
        self.lora_rank > 0 && !self.lora_merge
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The settings of a file for one command are those of the other, but for what only one of them has.
    #[test]
    fn a_file_has_the_settings_of_train_and_those_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("finetune.json");
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            FinetuneSettings::from_file(&path)
        };
        let found = of(r#"{ "epochs": 2, "memory": "1GiB", "beta1": 0.8, "stripe": ["a"] }"#).unwrap();
        let run = RunSettings {
            memory: ByteSize(1 << 30),
            beta1: 0.8,
            stripe: vec!["a".into()],
            ..FinetuneSettings::default().run
        };
        assert_eq!(found, FinetuneSettings { epochs: 2.0, run, ..FinetuneSettings::default() });
        let deepspeed = of(r#"{ "train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.5 }"#).unwrap();
        assert_eq!((deepspeed.run.batch, deepspeed.run.clip, deepspeed.warmup), (3, 0.5, Some(0)));
        for (text, part) in [
            (r#"{ "layers": 2 }"#, "unknown field `layers`"),
            (r#"{ "epochs": 0 }"#, "epochs"),
            (r#"{ "lr": -1 }"#, "lr is -1"),
            (r#"{ "lora_rank": 1048577 }"#, "lora_rank"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn steps_are_those_of_the_epochs_unless_they_are_given() {
        let settings = FinetuneSettings { epochs: 1.5, ..FinetuneSettings::default() };
        assert_eq!(settings.steps(10), 4, "fifteen sequences, four a step");
        assert_eq!(FinetuneSettings { steps: Some(7), ..settings }.steps(10), 7);
    }
}
