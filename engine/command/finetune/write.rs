//! What a fine-tune writes: a folder that transformers loads, or adapters that PEFT loads.

use super::super::CommandResult;
use crate::Trainer;
use crate::error::Error;
use crate::export::{Take, export_safetensors};
use crate::models::linear::Adapting;
use crate::models::pretrained::Pretrained;
use crate::tokenizer::Tokenizer;
use crate::work::internal;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Files beside the weights that transformers reads, if they are there.
const COPIED: [&str; 7] = [
    "generation_config.json",
    "tokenizer_config.json",
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
    // By their names in the file. Adapters of layers that lie as [in, out] are [rank, in] and [out, rank] too.
    let adapters: BTreeMap<_, _> = adapters
        .map(|(name, shape)| {
            let (stored, _) = pretrained.stored_name(&name);
            (format!("base_model.model.{stored}"), (name, shape))
        })
        .collect();
    let shapes: Vec<_> =
        adapters.iter().map(|(stored, (_, shape))| (stored.clone(), shape.clone())).collect();
    export_safetensors(&out.join("adapter_model.safetensors"), &shapes, &|stored, take| {
        let found = adapters.get(stored);
        let (name, _) = found.ok_or_else(|| internal("an adapter without its name in the file"))?;
        trainer.show(name, take)
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

/// Values of a parameter with those of its adapter; none if it has no adapter.
fn merged(
    trainer: &Trainer,
    adapting: &Adapting,
    name: &str,
    shape: &[usize],
) -> crate::Result<Option<Vec<f32>>> {
    let Some([a, b]) = Adapting::adapter_of(name) else { return Ok(None) };
    if adapting.rank == 0 || !trainer.parameters().iter().any(|(name, _)| *name == a) {
        return Ok(None);
    }
    let mut values = trainer.parameter(name)?;
    let a = Tensor::from_vec(trainer.parameter(&a)?, (adapting.rank, shape[1]), &Device::Cpu)?;
    let b = Tensor::from_vec(trainer.parameter(&b)?, (shape[0], adapting.rank), &Device::Cpu)?;
    let product = (b.matmul(&a)? * adapting.scale())?.flatten_all()?.to_vec1::<f32>()?;
    values.iter_mut().zip(product).for_each(|(value, change)| *value += change);
    Ok(Some(values))
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
    } else {
        write_json("tokenizer_config.json", &pretrained.tokenizer_configuration()?)?;
    }
    let mut configuration: Value = pretrained.configuration.clone();
    configuration["dtype"] = json!("float32");
    write_json("config.json", &configuration)?;
    let weights = trainer.parameters().into_iter().filter(|(name, _)| !Adapting::is_adapter(name));
    let stored = weights.map(|(name, shape)| {
        let (stored, transposed) = pretrained.stored_name(&name);
        let shape_stored = if transposed { shape.iter().rev().copied().collect() } else { shape.clone() };
        (stored, shape_stored, name, shape, transposed)
    });
    let stored: Vec<_> = stored.collect();
    let names: Vec<_> = stored.iter().map(|(name, shape, ..)| (name.clone(), shape.clone())).collect();
    let show = |wanted: &str, take: &mut Take| {
        let found = stored.iter().find(|(name, ..)| name == wanted);
        let (_, _, name, shape, transposed) =
            found.ok_or_else(|| internal("a parameter without its name in the file"))?;
        let merged = merged(trainer, adapting, name, shape)?;
        if *transposed {
            let (values, columns) = (merged.map_or_else(|| trainer.parameter(name), Ok)?, shape[1]);
            let mut turned = (0..columns).map(|column| values.iter().skip(column).step_by(columns));
            return turned.try_for_each(|column| take(&column.copied().collect::<Vec<f32>>()));
        }
        match merged {
            Some(values) => take(&values),
            None => trainer.show(name, take),
        }
    };
    export_safetensors(&out.join("model.safetensors"), &names, &show)?;
    Ok(())
}
