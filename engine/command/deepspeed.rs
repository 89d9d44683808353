//! A DeepSpeed configuration read as settings of a run: each key sets something here, is not needed for a
//! reason that is told, or is refused by its path. Keys after <https://www.deepspeed.ai/docs/config-json/>,
//! schedulers after <https://deepspeed.readthedocs.io/en/latest/schedulers.html>.

use super::configuration;
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// What became of one key.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// Path of the key, with dots.
    pub path: String,
    /// What it is here, or why it is not needed.
    pub meaning: String,
}

/// A configuration of DeepSpeed's, as settings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mapping {
    /// Settings, by the names that a file of settings has.
    pub settings: Map<String, Value>,
    /// One note a key, in the order of the file's keys.
    pub notes: Vec<Note>,
}

/// What becomes of a key.
enum Treatment {
    Sets(&'static str, Value),
    NotNeeded(&'static str),
    /// A key that is read together with others.
    Noted(&'static str),
    Refused(String),
    /// A key that ferrozero does not know, whatever its value is.
    Unknown,
}

/// Keys that only a file of DeepSpeed's has.
const SIGNS: [&str; 5] = [
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
];

const PLANNED: &str = "not needed, because the plan chooses homes within --memory";
const SIZED: &str = "not needed, because the plan sizes every buffer and counts it";
const ONE_RANK: &str = "not needed, because there is one rank and nothing is communicated";
const REPORTED: &str = "not needed, because every step and the summary report it";
const MEASURED: &str = "not needed, because size and depth of requests are measured on the disk";

const SCALED: &str = "not needed, because the loss scale adapts by itself";
const PINNED: &str = "not needed, because host memory for a GPU is always pinned";
const PIPELINED: &str = "not needed, because reading, updating and writing always overlap";
const ADAMW: &str = "not needed, because AdamW is the engine's own";
const RECOMPUTED: &str =
    "not needed, because the plan says which segments are computed again and finds their inputs a home";

/// Keys that need nothing here.
const NOT_NEEDED: &[(&str, &str)] = &[
    (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "not needed, because export reads the f32 masters",
    ),
    ("zero_optimization.stage3_prefetch_bucket_size", SIZED),
    ("zero_optimization.stage3_max_live_parameters", SIZED),
    ("zero_optimization.stage3_max_reuse_distance", SIZED),
    ("zero_optimization.stage3_param_persistence_threshold", PLANNED),
    ("zero_optimization.sub_group_size", SIZED),
    ("zero_optimization.allgather_partitions", ONE_RANK),
    ("zero_optimization.allgather_bucket_size", ONE_RANK),
    ("zero_optimization.reduce_scatter", ONE_RANK),
    ("zero_optimization.reduce_bucket_size", ONE_RANK),
    ("zero_optimization.overlap_comm", ONE_RANK),
    ("zero_optimization.round_robin_gradients", ONE_RANK),
    (
        "zero_optimization.contiguous_gradients",
        "not needed, because gradients leave the device as they are made",
    ),
    ("zero_optimization.offload_optimizer.device", PLANNED),
    ("zero_optimization.offload_param.device", PLANNED),
    ("zero_optimization.offload_optimizer.pin_memory", PINNED),
    ("zero_optimization.offload_param.pin_memory", PINNED),
    ("zero_optimization.offload_optimizer.buffer_count", SIZED),
    ("zero_optimization.offload_param.buffer_count", SIZED),
    ("zero_optimization.offload_param.buffer_size", SIZED),
    ("zero_optimization.offload_param.max_in_cpu", PLANNED),
    ("zero_optimization.offload_optimizer.pipeline", PIPELINED),
    ("zero_optimization.offload_optimizer.pipeline_read", PIPELINED),
    ("zero_optimization.offload_optimizer.pipeline_write", PIPELINED),
    (
        "zero_optimization.offload_optimizer.fast_init",
        "not needed, because initial values are made group by group",
    ),
    ("aio.block_size", MEASURED),
    ("aio.queue_depth", MEASURED),
    ("aio.thread_count", MEASURED),
    ("aio.intra_op_parallelism", MEASURED),
    ("aio.single_submit", MEASURED),
    ("aio.overlap_events", MEASURED),
    ("steps_per_print", REPORTED),
    ("wall_clock_breakdown", REPORTED),
    ("memory_breakdown", REPORTED),
    ("dump_state", REPORTED),
    ("communication_data_type", ONE_RANK),
    ("prescale_gradients", ONE_RANK),
    ("zero_allow_untested_optimizer", ADAMW),
    ("zero_force_ds_cpu_optimizer", ADAMW),
    ("optimizer.params.torch_adam", ADAMW),
    ("optimizer.params.adam_w_mode", "AdamW, with its decay apart from the gradient"),
    ("fp16.initial_scale_power", SCALED),
    ("fp16.loss_scale_window", SCALED),
    ("fp16.hysteresis", SCALED),
    ("fp16.consecutive_hysteresis", SCALED),
    ("fp16.min_loss_scale", SCALED),
    ("activation_checkpointing.partition_activations", RECOMPUTED),
    ("activation_checkpointing.cpu_checkpointing", RECOMPUTED),
    ("activation_checkpointing.contiguous_memory_optimization", RECOMPUTED),
    ("activation_checkpointing.number_checkpoints", RECOMPUTED),
    ("activation_checkpointing.synchronize_checkpoint_boundary", RECOMPUTED),
    ("activation_checkpointing.profile", RECOMPUTED),
];

/// Whether a file is one of DeepSpeed's.
pub fn is_deepspeed(value: &Value) -> bool {
    SIGNS.iter().any(|key| value.get(key).is_some())
}

/// Reads a configuration of DeepSpeed's.
///
/// # Errors
/// [`Error::Configuration`](crate::Error::Configuration) with the path of a key that has no equivalent.
pub fn map(config: &Value) -> Result<Mapping> {
    let mut mapping = Mapping::default();
    let mut leaves = vec![];
    flatten("", config, &mut leaves)?;
    let mut set_by: HashMap<&str, &str> = HashMap::new();
    for (path, value) in &leaves {
        let meaning = match treatment(path, value) {
            Treatment::Unknown => {
                return Err(configuration(format!(
                    "{path}: ferrozero has no equivalent of this key: leave it out if training does not \
                     depend on it"
                )));
            }
            _ if *value == "auto" => "auto: left to the default, or to the command line".to_owned(),
            Treatment::NotNeeded(reason) | Treatment::Noted(reason) => reason.to_owned(),
            Treatment::Refused(reason) => return Err(configuration(format!("{path}: {reason}"))),
            Treatment::Sets(key, value) => {
                let meaning = format!("{key} = {value}");
                if let Some(other) = set_by.insert(key, path)
                    && mapping.settings.get(key) != Some(&value)
                {
                    return Err(configuration(format!(
                        "{path}: {other} says something else, and both are {key} here: leave one of them out"
                    )));
                }
                mapping.settings.insert(key.to_owned(), value);
                meaning
            }
        };
        mapping.notes.push(Note { path: path.clone(), meaning });
    }
    named(config)?;
    schedule(config, &mut mapping)?;
    batch(config, &mut mapping)?;
    Ok(mapping)
}

fn flatten(path: &str, value: &Value, leaves: &mut Vec<(String, Value)>) -> Result<()> {
    match value {
        // An empty section is a key like any other.
        Value::Object(members) if path.is_empty() || !members.is_empty() => {
            for (key, value) in members {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                if key.contains('.') {
                    return Err(configuration(format!(
                        "{path}: a dot within a key makes no section, and DeepSpeed does not read it: nest \
                         the key"
                    )));
                }
                flatten(&path, value, leaves)?;
            }
        }
        value => leaves.push((path.to_owned(), value.clone())),
    }
    Ok(())
}

/// Whether sections that DeepSpeed leaves alone without a type have one.
fn named(config: &Value) -> Result<()> {
    match ["optimizer", "scheduler"].iter().find(|section| {
        config.get(section).is_some_and(|value| value.get("params").is_some() && value.get("type").is_none())
    }) {
        Some(section) => Err(configuration(format!(
            "{section}.type: not there, and without it DeepSpeed does not read {section}.params: name the \
             {section}, or leave the section out"
        ))),
        None => Ok(()),
    }
}

fn treatment(path: &str, value: &Value) -> Treatment {
    use Treatment::{NotNeeded, Noted, Refused, Sets, Unknown};
    let only = |wanted: Value, refusal: &str| match *value == wanted {
        true => NotNeeded("as here"),
        false => Refused(refusal.to_owned()),
    };
    match path {
        "train_micro_batch_size_per_gpu" => Sets("batch", value.clone()),
        "gradient_accumulation_steps" => Sets("accumulate", value.clone()),
        "train_batch_size" => Noted("the product of the micro-batch and the accumulation, with one rank"),
        "gradient_clipping" => Sets("clip", value.clone()),
        "seed" => Sets("seed", value.clone()),
        "bf16.enabled" | "bfloat16.enabled" => half(value, "bf16"),
        "fp16.enabled" => half(value, "f16"),
        "fp16.auto_cast" => only(json!(false), "inputs are tokens, which are not cast: set it to false"),
        "fp16.loss_scale" => only(json!(0), "the loss is scaled dynamically: set it to 0"),
        "zero_optimization.stage" => match value.as_u64() {
            Some(0..=3) => NotNeeded(PLANNED),
            _ => Refused(format!("{value} is no stage: use 0, 1, 2 or 3")),
        },
        "optimizer.type" => match value.as_str() {
            Some("AdamW" | "Adam") => Noted("AdamW"),
            _ => Refused(format!("{value} is not here: use AdamW")),
        },
        "optimizer.params.adam_w_mode" if *value == json!(false) => {
            Refused("weight decay within the gradient is not here: use AdamW".to_owned())
        }
        "optimizer.params.lr" => Sets("lr", value.clone()),
        "optimizer.params.weight_decay" => Sets("weight_decay", value.clone()),
        "optimizer.params.eps" => Sets("epsilon", value.clone()),
        "optimizer.params.betas" => Noted("beta1 and beta2"),
        "scheduler.type" => match value.as_str() {
            Some("WarmupLR") => Noted("a warm-up, then a constant rate"),
            Some("WarmupCosineLR") => Noted("a warm-up, then a cosine"),
            _ => Refused(format!("{value} is not here: use WarmupCosineLR or WarmupLR")),
        },
        "scheduler.params.warmup_num_steps" => Sets("warmup", value.clone()),
        "scheduler.params.total_num_steps" => Sets("steps", value.clone()),
        "scheduler.params.warmup_max_lr" => Sets("lr", value.clone()),
        "scheduler.params.cos_min_ratio" => Sets("lr_floor", value.clone()),
        "scheduler.params.warmup_type" => only(json!("linear"), "the rate rises linearly: set it to linear"),
        "scheduler.params.warmup_min_lr" | "scheduler.params.warmup_min_ratio" => match value.as_f64() {
            Some(0.0) => NotNeeded("as here"),
            _ => Refused("the rate rises from 0: set it to 0".to_owned()),
        },
        "zero_optimization.offload_optimizer.nvme_path" | "zero_optimization.offload_param.nvme_path" => {
            match value.as_str() {
                Some(folder) => Sets("dir", json!(format!("{}/ferrozero-run", folder.trim_end_matches('/')))),
                None => Noted("no folder"),
            }
        }
        _ => match NOT_NEEDED.iter().find(|(key, _)| *key == path) {
            Some((_, reason)) => NotNeeded(reason),
            None => Unknown,
        },
    }
}

fn half(value: &Value, dtype: &str) -> Treatment {
    match value.as_bool() {
        Some(true) => Treatment::Sets("dtype", json!(dtype)),
        Some(false) => Treatment::NotNeeded("off"),
        None => Treatment::Refused("must be true or false".to_owned()),
    }
}

/// What several keys of the optimizer and the scheduler say together.
fn schedule(config: &Value, mapping: &mut Mapping) -> Result<()> {
    if let Some(betas) = config.pointer("/optimizer/params/betas").filter(|betas| **betas != "auto") {
        let numbers = betas.as_array().map(Vec::as_slice);
        let Some([beta1, beta2]) = numbers else {
            return Err(configuration("optimizer.params.betas: must be two numbers".into()));
        };
        mapping.settings.insert("beta1".into(), beta1.clone());
        mapping.settings.insert("beta2".into(), beta2.clone());
    }
    let scheduler = config.pointer("/scheduler/type").and_then(Value::as_str);
    // What DeepSpeed takes where the file is silent.
    let defaults = [
        (true, "gradient_clipping", "clip", json!(0.0)),
        (config.get("optimizer").is_some(), "optimizer.params.betas", "beta1", json!(0.9)),
        (config.get("optimizer").is_some(), "optimizer.params.betas", "beta2", json!(0.999)),
        (config.get("optimizer").is_some(), "optimizer.params.eps", "epsilon", json!(1e-8)),
        (config.get("optimizer").is_some(), "optimizer.params.weight_decay", "weight_decay", json!(0.0)),
        (scheduler == Some("WarmupCosineLR"), "scheduler.params.cos_min_ratio", "lr_floor", json!(0.0001)),
        (scheduler != Some("WarmupCosineLR"), "scheduler.params.cos_min_ratio", "lr_floor", json!(1.0)),
        (scheduler.is_none(), "scheduler", "warmup", json!(0)),
        (scheduler.is_some(), "scheduler.params.warmup_num_steps", "warmup", json!(1000)),
    ];
    for (applies, path, key, value) in defaults {
        let is_silent = config.pointer(&format!("/{}", path.replace('.', "/"))).is_none();
        if applies && is_silent && !mapping.settings.contains_key(key) {
            let meaning = format!("not there: {key} = {value}, as DeepSpeed takes it");
            mapping.notes.push(Note { path: path.to_owned(), meaning });
            mapping.settings.insert(key.to_owned(), value);
        }
    }
    if scheduler.is_some() && config.pointer("/scheduler/params/warmup_type").is_none() {
        return Err(configuration(
            "scheduler.params.warmup_type: without it DeepSpeed raises the rate along a logarithm; here it \
             rises linearly: set it to linear"
                .into(),
        ));
    }
    Ok(())
}

/// Whether the three sizes of batches agree, with one rank.
fn batch(config: &Value, mapping: &mut Mapping) -> Result<()> {
    let size = |key: &str| config.get(key).and_then(Value::as_u64);
    let whole = match config.get("train_batch_size") {
        None => return Ok(()),
        Some(value) if *value == "auto" => return Ok(()),
        Some(value) => value
            .as_u64()
            .ok_or_else(|| configuration(format!("train_batch_size: {value} is no number of sequences")))?,
    };
    let (micro, accumulate) = (size("train_micro_batch_size_per_gpu"), size("gradient_accumulation_steps"));
    let agree = match (micro, accumulate) {
        (Some(micro), Some(accumulate)) => micro.checked_mul(accumulate) == Some(whole),
        (Some(known), None) | (None, Some(known)) => known > 0 && whole % known == 0,
        (None, None) => true,
    };
    if !agree {
        return Err(configuration(format!(
            "train_batch_size: {whole} is not the micro-batch times gradient_accumulation_steps of one rank"
        )));
    }
    let micro = micro.unwrap_or_else(|| whole / accumulate.unwrap_or(1));
    mapping.settings.insert("batch".into(), json!(micro));
    mapping.settings.insert("accumulate".into(), json!(whole / micro.max(1)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_mapped_or_told_why_not() {
        let config = json!({
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 0.5,
            "bf16": { "enabled": true },
            "fp16": { "enabled": false },
            "optimizer": {
                "type": "AdamW",
                "params": { "lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.05 }
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": { "warmup_num_steps": 5, "total_num_steps": 50, "warmup_type": "linear" }
            },
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": { "device": "nvme", "nvme_path": "/mnt/fast/", "buffer_count": 4 },
                "overlap_comm": true,
            },
            "aio": { "block_size": 1048576, "queue_depth": 8 },
        });
        assert!(is_deepspeed(&config));
        let Mapping { settings, notes } = map(&config).unwrap();
        let expected = json!({
            "batch": 2, "accumulate": 8, "clip": 0.5, "dtype": "bf16", "lr": 3e-4,
            "beta1": 0.9, "beta2": 0.95,
            "epsilon": 1e-8, "weight_decay": 0.05, "warmup": 5, "steps": 50, "lr_floor": 0.0001,
            "dir": "/mnt/fast/ferrozero-run",
        });
        assert_eq!(Value::Object(settings), expected);
        let mut leaves = vec![];
        flatten("", &config, &mut leaves).unwrap();
        // Only the epsilon and the ratio of the cosine are not in the file.
        assert_eq!(notes.len(), leaves.len() + 2);
        let stage = notes.iter().find(|note| note.path == "zero_optimization.stage").unwrap();
        assert!(stage.meaning.contains("not needed, because"));
    }

    #[test]
    fn what_has_no_equivalent_is_refused_by_its_path() {
        let refused = |config: Value, path: &str| {
            let error = map(&config).unwrap_err().to_string();
            assert!(error.contains(path), "{config}: {error}");
        };
        refused(json!({ "optimizer": { "type": "Lamb" } }), "optimizer.type");
        refused(json!({ "scheduler": { "type": "OneCycle" } }), "scheduler.type");
        refused(json!({ "scheduler": { "type": "WarmupLR" } }), "scheduler.params.warmup_type");
        refused(
            json!({ "zero_optimization": { "zero_quantized_weights": true } }),
            "zero_optimization.zero_quantized_weights",
        );
        refused(json!({ "curriculum_learning": { "enabled": true } }), "curriculum_learning.enabled");
        refused(
            json!({ "optimizer": { "type": "AdamW", "params": { "betas": [0.9] } } }),
            "optimizer.params.betas",
        );
        refused(json!({ "optimizer": { "params": { "lr": 1e-4 } } }), "optimizer.type");
        refused(json!({ "scheduler": { "params": { "warmup_num_steps": 4 } } }), "scheduler.type");
        refused(json!({ "zero_optimization.stage": 3 }), "zero_optimization.stage: a dot");
        refused(json!({ "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2 }), "train_batch_size");
        refused(json!({ "train_batch_size": "16" }), "train_batch_size");
        refused(json!({ "fp16": { "enabled": true, "loss_scale": 128 } }), "fp16.loss_scale");
        refused(json!({ "fp16": { "loss_scale_windw": 10 } }), "fp16.loss_scale_windw");
        refused(json!({ "aio": { "unheard_of": 1 } }), "aio.unheard_of");
        refused(json!({ "unheard_of": "auto" }), "unheard_of");
        refused(json!({ "unheard_of": {} }), "unheard_of");
        refused(json!({ "zero_optimization": { "stage": 4 } }), "zero_optimization.stage");
        refused(
            json!({ "zero_optimization": { "stage3_unheard_of": 1 } }),
            "zero_optimization.stage3_unheard_of",
        );
    }

    #[test]
    fn keys_that_set_the_same_thing_agree_or_are_refused() {
        let with_rates = |optimizer: Value, scheduler: Value| {
            map(&json!({
                "optimizer": { "type": "AdamW", "params": { "lr": optimizer } },
                "scheduler": {
                    "type": "WarmupLR",
                    "params": { "warmup_max_lr": scheduler, "warmup_type": "linear", "warmup_num_steps": 3 }
                },
            }))
        };
        for (optimizer, scheduler) in [(json!(1e-4), json!(1e-4)), (json!("auto"), json!(1e-4))] {
            assert_eq!(with_rates(optimizer, scheduler).unwrap().settings["lr"], json!(1e-4));
        }
        let error = with_rates(json!(1e-3), json!(1e-4)).unwrap_err().to_string();
        assert!(
            error.contains("scheduler.params.warmup_max_lr: optimizer.params.lr says something else"),
            "{error}"
        );
        let both = json!({ "bf16": { "enabled": true }, "fp16": { "enabled": true } });
        assert!(map(&both).unwrap_err().to_string().contains("fp16.enabled: bf16.enabled"));
    }

    #[test]
    fn where_the_file_is_silent_training_is_as_deepspeeds() {
        let config = json!({
            "train_batch_size": 8,
            "optimizer": { "type": "AdamW", "params": { "lr": 1e-4 } },
            "scheduler": { "type": "WarmupLR", "params": { "warmup_type": "linear" } },
        });
        let Mapping { settings, notes } = map(&config).unwrap();
        for (key, value) in [("clip", 0.0), ("weight_decay", 0.0), ("lr_floor", 1.0), ("beta2", 0.999)] {
            assert_eq!(settings[key], json!(value), "{key}");
        }
        assert_eq!(settings["warmup"], json!(1000));
        assert!(
            notes.iter().any(|note| note.path == "gradient_clipping" && note.meaning.contains("clip = 0"))
        );
        // What is left to the command line is ferrozero's own.
        let auto = map(&json!({ "train_batch_size": 8, "gradient_clipping": "auto" })).unwrap();
        assert!(!auto.settings.contains_key("clip"));
    }

    #[test]
    fn the_engines_own_settings_are_not_taken_for_deepspeeds() {
        assert!(!is_deepspeed(&json!({ "batch": 4, "steps": 3 })));
    }
}
