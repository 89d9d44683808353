//! What a fine-tune writes: a folder that transformers loads, or adapters that PEFT loads.

use super::super::CommandResult;
use crate::Trainer;
use crate::error::Error;
use crate::export::{Put, export_safetensors, in_order};
use crate::models::linear::Adapting;
use crate::models::pretrained::Pretrained;
use crate::tokenizer::Tokenizer;
use crate::work::internal;
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
    // By their names in the file. Adapters of layers that lie as [in, out] are [rank, in] and [out, rank] too.
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
        trainer.show(name, &mut in_order(put))
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

/// What an adapter adds to a matrix [outputs, inputs].
struct Merge {
    /// [rank, inputs].
    a: Vec<f32>,
    /// [outputs, rank].
    b: Vec<f32>,
    inputs: usize,
    rank: usize,
    scale: f32,
}

impl Merge {
    /// That of the parameter of a name, if it has an adapter.
    fn of(
        trainer: &Trainer,
        adapting: &Adapting,
        name: &str,
        shape: &[usize],
    ) -> crate::Result<Option<Self>> {
        let (Some([a, b]), [_, inputs]) = (Adapting::adapter_of(name), shape) else { return Ok(None) };
        if adapting.rank == 0 || !trainer.parameters().iter().any(|(name, _)| *name == a) {
            return Ok(None);
        }
        let (a, b) = (trainer.parameter(&a)?, trainer.parameter(&b)?);
        Ok(Some(Self { a, b, inputs: *inputs, rank: adapting.rank, scale: adapting.scale() as f32 }))
    }

    /// Adds it to values from the element `first` on. The sums do not depend on how many values come at a time.
    fn add(&self, first: usize, values: &mut [f32]) {
        let (mut place, mut rest) = (first, values);
        while !rest.is_empty() {
            let (row, column) = (place / self.inputs, place % self.inputs);
            let (part, behind) = rest.split_at_mut((self.inputs - column).min(rest.len()));
            let mut sums = vec![0.0; part.len()];
            for (b, a) in self.b[row * self.rank..][..self.rank].iter().zip(self.a.chunks_exact(self.inputs))
            {
                sums.iter_mut().zip(&a[column..]).for_each(|(sum, a)| *sum += b * a);
            }
            part.iter_mut().zip(sums).for_each(|(value, sum)| *value += self.scale * sum);
            place += part.len();
            rest = behind;
        }
    }
}

/// Elements of a matrix that are in memory while it is transposed.
const STRIP_ELEMENTS: usize = 1 << 20;

/// A matrix [rows, columns] that comes row by row and is put as its transpose, some rows at a time: a column of them is a run there.
struct Transposing {
    rows: usize,
    columns: usize,
    first_row: usize,
    strip: Vec<f32>,
}

impl Transposing {
    fn new(shape: &[usize]) -> Option<Self> {
        let [rows, columns] = *shape else { return None };
        Some(Self { rows, columns, first_row: 0, strip: vec![] })
    }

    fn take(&mut self, mut values: &[f32], put: &mut Put) -> crate::Result<()> {
        let whole = (STRIP_ELEMENTS / self.columns).max(1) * self.columns;
        while !values.is_empty() {
            let (some, rest) = values.split_at((whole - self.strip.len()).min(values.len()));
            self.strip.extend_from_slice(some);
            values = rest;
            if self.strip.len() == whole {
                self.put(put)?;
            }
        }
        Ok(())
    }

    /// Puts the rows that were taken.
    fn put(&mut self, put: &mut Put) -> crate::Result<()> {
        let mut run = vec![];
        for column in 0..self.columns {
            run.clear();
            run.extend(self.strip.iter().skip(column).step_by(self.columns));
            put(column * self.rows + self.first_row, &run)?;
        }
        self.first_row += self.strip.len() / self.columns;
        self.strip.clear();
        Ok(())
    }
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
        // Without the file transformers takes the class of the model's family, which cuts text its own way and not as
        // tokenizer.json says.
        if !pretrained.path.join(TOKENIZER_CONFIGURATION).exists() {
            write_json(TOKENIZER_CONFIGURATION, &json!({ "tokenizer_class": "PreTrainedTokenizerFast" }))?;
        }
    } else {
        write_json(TOKENIZER_CONFIGURATION, &pretrained.tokenizer_configuration()?)?;
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
    let put_all = |wanted: &str, put: &mut Put| {
        let found = stored.iter().find(|(name, ..)| name == wanted);
        let (_, _, name, shape, transposed) =
            found.ok_or_else(|| internal("a parameter without its name in the file"))?;
        let merge = Merge::of(trainer, adapting, name, shape)?;
        let mut transposing = Transposing::new(shape).filter(|_| *transposed);
        let mut first = 0;
        let mut changed = vec![];
        trainer.show(name, &mut |values| {
            let values = match &merge {
                Some(merge) => {
                    changed.clear();
                    changed.extend_from_slice(values);
                    merge.add(first, &mut changed);
                    &changed
                }
                None => values,
            };
            match &mut transposing {
                Some(transposing) => transposing.take(values, put)?,
                None => put(first, values)?,
            }
            first += values.len();
            Ok(())
        })?;
        transposing.map_or(Ok(()), |mut transposing| transposing.put(put))
    };
    export_safetensors(&out.join("model.safetensors"), &names, &put_all)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever comes at a time, also parts of rows.
    #[test]
    fn a_matrix_is_transposed_and_merged_in_parts_as_it_is_at_once() {
        // The strips of the second matrix are one row each, those of the third two.
        for (rows, columns) in [(5, 7), (3, STRIP_ELEMENTS + 1), (5, STRIP_ELEMENTS / 2)] {
            let matrix: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin()).collect();
            let merge = Merge {
                a: wave(2 * columns, 0.7),
                b: wave(2 * rows, 1.3),
                inputs: columns,
                rank: 2,
                scale: 2.0,
            };
            let mut merged = matrix.clone();
            merge.add(0, &mut merged);
            let place = columns + 3;
            let product: f32 = (0..2).map(|k| merge.b[2 + k] * merge.a[k * columns + 3]).sum();
            assert_eq!(merged[place], matrix[place] + 2.0 * product);

            let mut transposing = Transposing::new(&[rows, columns]).unwrap();
            let mut found = vec![f32::NAN; matrix.len()];
            let mut put = |first: usize, values: &[f32]| {
                found[first..first + values.len()].copy_from_slice(values);
                Ok(())
            };
            let mut first = 0;
            for part in matrix.chunks(columns / 2 + 1) {
                let mut part = part.to_vec();
                merge.add(first, &mut part);
                first += part.len();
                transposing.take(&part, &mut put).unwrap();
                assert!(transposing.strip.len() <= STRIP_ELEMENTS.max(columns));
            }
            transposing.put(&mut put).unwrap();
            let expected = |place: usize| merged[place % rows * columns + place / rows];
            assert!((0..found.len()).all(|place| found[place] == expected(place)), "{rows} × {columns}");
        }
    }
}
