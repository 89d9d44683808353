//! What a fine-tune writes: a folder that transformers loads, or adapters that PEFT loads.

use super::super::CommandResult;
use crate::Trainer;
use crate::data::tokenizer::Tokenizer;
use crate::disk::safetensors::export_safetensors;
use crate::error::{Error, internal};
use crate::models::linear::Adapting;
use crate::models::pretrained::Pretrained;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What tells transformers of which class a tokenizer is.
const TOKENIZER_CONFIGURATION: &str = "tokenizer_config.json";

/// Files beside the weights that transformers reads, if they are there.
const COPIED: [&str; 7] = [
    "generation_config.json",
    TOKENIZER_CONFIGURATION,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
];

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

/// Writes a folder that PEFT loads: the adapters, and what they belong to.
pub fn write_adapters(
    pretrained: &Pretrained,
    adapting: &Adapting,
    trainer: &Trainer,
    out: &Path,
) -> CommandResult {
    std::fs::create_dir_all(out).map_err(failed(out))?;
    let adapters = trainer.parameters().into_iter().filter(|(name, _)| Adapting::is_adapter(name));
    // By their names in the file. Adapters of layers that lie as [in, out] are [rank, in] and [out, rank]
    // too.
    let adapters: BTreeMap<_, _> = adapters
        .map(|(name, shape)| {
            let (stored, _) = pretrained.stored_name(&name);
            (format!("base_model.model.{stored}"), (name, shape))
        })
        .collect();
    let shapes: Vec<_> =
        adapters.iter().map(|(stored, (_, shape))| (stored.clone(), shape.clone())).collect();
    export_safetensors(&out.join("adapter_model.safetensors"), &shapes, &|stored, put| {
        let found = adapters.get(stored);
        let (name, _) = found.ok_or_else(|| internal("an adapter without its name in the file"))?;
        trainer.show(name, put)
    })?;
    let configuration = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": pretrained.path,
        "r": adapting.rank,
        "lora_alpha": adapting.alpha,
        "lora_dropout": 0.0,
        "target_modules": adapting.targets,
        "bias": "none",
        "fan_in_fan_out": pretrained.is_transposed(),
        "inference_mode": true,
    });
    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{configuration:#}\n")).map_err(failed(&path))?;
    Ok(())
}

/// Writes a folder that transformers loads.
pub fn write_model(
    pretrained: &Pretrained,
    adapting: &Adapting,
    trainer: &Trainer,
    tokenizer: &Tokenizer,
    out: &Path,
) -> CommandResult {
    std::fs::create_dir_all(out).map_err(failed(out))?;
    let write_json = |name: &str, value: &Value| {
        let path = out.join(name);
        std::fs::write(&path, format!("{value:#}\n")).map_err(failed(&path))
    };
    tokenizer.save(&out.join("tokenizer.json"))?;
    if pretrained.path.is_dir() {
        for name in COPIED {
            let from = pretrained.path.join(name);
            if from.exists() {
                std::fs::copy(&from, out.join(name)).map_err(failed(&from))?;
            }
        }
        // Without the file transformers takes the class of the model's family, which cuts text its own way
        // and not as tokenizer.json says.
        if !pretrained.path.join(TOKENIZER_CONFIGURATION).exists() {
            write_json(TOKENIZER_CONFIGURATION, &json!({ "tokenizer_class": "PreTrainedTokenizerFast" }))?;
        }
    } else {
        write_json(TOKENIZER_CONFIGURATION, &pretrained.tokenizer_configuration()?)?;
    }
    let mut configuration: Value = pretrained.configuration.clone();
    configuration["dtype"] = json!("float32");
    write_json("config.json", &configuration)?;
    pretrained.export_safetensors(trainer, adapting, &out.join("model.safetensors"))?;
    Ok(())
}
