//! `ferrozero finetune`: trains a model further that others have trained, and writes a folder that transformers loads.

use super::journal::{About, Journal};
use super::output::{Output, quoted};
use super::pretrained::{chat_template, ends};
use super::settings::{ComputeType, Reporting};
use super::train::stop_flag;
use super::{CommandResult, configuration};
use crate::byte_size::ByteSize;
use crate::error::Error;
use crate::examples::Examples;
use crate::export::{Take, export_safetensors};
use crate::learning_rate::LearningRate;
use crate::models::linear::Adapting;
use crate::models::pretrained::Pretrained;
use crate::run_log::Summary;
use crate::simulator::Machine;
use crate::tokenizer::Tokenizer;
use crate::{AdamW, Config, Engine, Trainer};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Options of `ferrozero finetune`.
#[derive(Debug, clap::Args, serde::Serialize)]
pub struct FinetuneArguments {
    /// Hugging Face folder, or GGUF file
    model: PathBuf,
    /// Text, or FILE.jsonl with {"prompt": …, "completion": …}, {"text": …} or {"messages": […]} a line; prompts, and what the
    /// assistant does not say, are not learnt
    #[arg(long)]
    data: PathBuf,
    /// Folder for the result, which transformers loads
    #[arg(long)]
    out: PathBuf,
    /// Hugging Face tokenizer [default: the model's own]
    #[arg(long, value_name = "tokenizer.json")]
    tokenizer: Option<PathBuf>,
    /// Folder of the run: states and checkpoint
    #[arg(long, default_value = "ferrozero-finetune")]
    dir: PathBuf,
    /// Go on from the last commit in --dir
    #[arg(long)]
    resume: bool,
    /// Device that computes: cpu, cuda or cuda:NUMBER
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Type of parameters and activations on a CUDA device
    #[arg(long, value_enum, default_value_t)]
    dtype: ComputeType,
    /// Memory of the host for everything, on the CPU device in all, as 600MiB
    #[arg(long, default_value = "2GiB")]
    memory: ByteSize,
    /// Memory that the device may use [default: on a CUDA device nine tenths of what is free]
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<ByteSize>,
    /// Passes over the data
    #[arg(long, default_value_t = 1.0)]
    epochs: f64,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Micro-batches of a step
    #[arg(long, default_value_t = 4)]
    accumulate: usize,
    /// Highest learning rate; it rises over a tenth of the steps and falls along a cosine
    #[arg(long, default_value_t = 2e-5)]
    lr: f64,
    /// Largest gradient norm that is not scaled down; 0: never
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Steps between two evaluations and commits
    #[arg(long, default_value_t = 50)]
    eval_every: u64,
    /// Stop after so many evaluations without a better one, 0 for never
    #[arg(long, default_value_t = 0)]
    patience: u32,
    /// Seed of the data's order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    #[serde(skip)]
    reporting: Reporting,
    /// Train adapters of this rank beside frozen weights (LoRA); 0 trains all weights
    #[arg(long, default_value_t = 0)]
    lora_rank: usize,
    /// The adapters' outputs are multiplied with this over the rank
    #[arg(long, default_value_t = 16.0)]
    lora_alpha: f64,
    /// Layers that get an adapter, by the last part of their names
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    )]
    lora_targets: Vec<String>,
    /// Write the whole model with its adapters in its weights, and not the adapters in the format of PEFT
    #[arg(long)]
    lora_merge: bool,
}

/// Fine-tunes as the arguments say.
pub fn run(arguments: FinetuneArguments) -> CommandResult {
    let FinetuneArguments { model: path, seq, batch, accumulate, epochs, .. } = &arguments;
    if [*seq, *batch, *accumulate].contains(&0)
        || !(*epochs > 0.0 && epochs.is_finite())
        || arguments.eval_every == 0
    {
        let text = "--seq, --batch, --accumulate, --epochs and --eval-every must be above 0";
        return Err(configuration(text.into()).into());
    }
    let output = Output::new(&arguments.reporting);
    let pretrained = Pretrained::open(path, *seq)?;
    let tokenizer = pretrained.tokenizer(arguments.tokenizer.as_deref())?;
    let end = ends(&pretrained.configuration).first().copied();
    let chat = chat_template(&pretrained)?;
    let data = Examples::read(
        &arguments.data,
        &tokenizer,
        (end, chat.as_ref()),
        &arguments.dir,
        (arguments.seed, *batch, *seq),
    )?;
    let steps = (epochs * data.training() as f64 / (batch * accumulate) as f64).ceil() as u64;
    output.say(format_args!("data: {} sequences for training, {steps} steps", data.training()));
    let device = crate::open_device(&arguments.device)?;
    let engine = Engine::new(Config {
        machine: Machine::probed(&arguments.dir, &device),
        device,
        dtype: arguments.dtype.on(&arguments.device)?,
        memory_bytes: Some(arguments.memory.0),
        device_memory_bytes: arguments.device_memory.map(|size| size.0),
        directory: Some(arguments.dir.clone()),
        resume: arguments.resume,
        accumulate: *accumulate,
        clip: (arguments.clip > 0.0).then_some(arguments.clip),
        seed: arguments.seed,
        initial_values: Some(pretrained.weights.clone()),
        ..Config::default()
    })?;
    if engine.resumed().is_some_and(|user| user["data"] != data.fingerprint()) {
        output.say("notice: the data is not the data of the run that is resumed");
    }
    let adapting = Adapting {
        rank: arguments.lora_rank,
        alpha: arguments.lora_alpha,
        targets: arguments.lora_targets.clone(),
    };
    if adapting.rank > 0 {
        engine.freeze(|name, _| !Adapting::is_adapter(name))?;
    }
    let model = pretrained.build(&engine, &adapting)?;
    let plan = engine.plan(AdamW { weight_decay: 0.0, ..AdamW::default() }, || {
        // All targets counted: no batch needs more memory.
        let batch = data.train_batch(0)?;
        let all = Tensor::arange(0u32, batch.targets.elem_count() as u32, batch.targets.device())?;
        model.loss(&batch.inputs, &batch.targets, Some(&all))
    })?;
    output.say(&plan);
    if adapting.rank > 0 && !plan.layout().parameters().iter().any(|(name, _)| Adapting::is_adapter(name)) {
        let targets = adapting.targets.join(", ");
        return Err(configuration(format!(
            "no layer of this model has an adapter: --lora-targets {targets}"
        ))
        .into());
    }
    let mut trainer = engine.trainer(plan)?;
    output.say_notices(&trainer);
    let stop = stop_flag()?;
    let rate = LearningRate::WarmupCosine {
        peak: arguments.lr,
        warmup: steps / 10,
        steps,
        floor: 0.1 * arguments.lr,
    };
    let evaluate = |trainer: &mut Trainer| -> CommandResult<f32> {
        let batches = data.validation_batches();
        let mut sum = 0.0;
        for number in 0..batches {
            sum += trainer.evaluate(|| {
                let batch = data.validation_batch(number)?;
                let loss = model.loss(&batch.inputs, &batch.targets, Some(&batch.counted))?;
                loss.to_dtype(DType::F32)?.to_scalar::<f32>()
            })?;
        }
        Ok(sum / batches as f32)
    };
    let document = || json!({ "data": data.fingerprint() });
    let about = About {
        model: path.display().to_string(),
        steps,
        tokens: (seq * batch * accumulate) as u64,
        settings: serde_json::to_value(&arguments)?,
        reporting: &arguments.reporting,
    };
    let mut journal = Journal::begin(&trainer, about, &output)?;
    let mut train_loss = None;
    let (mut best, mut worse) = (evaluate(&mut trainer)?, 0);
    output.say(format_args!("validation loss at first {best:.4}"));
    while trainer.steps() < steps && !stop.load(Ordering::SeqCst) {
        let step = trainer.steps();
        trainer.set_learning_rate(rate.at(step));
        let report = trainer.step(|micro_batch| {
            let batch = data.train_batch(step * *accumulate as u64 + micro_batch as u64)?;
            model.loss(&batch.inputs, &batch.targets, Some(&batch.counted))
        })?;
        output.say(format_args!(
            "step {}/{steps}  loss {:.4}  {:.2} s  stall {:.0} %",
            report.step,
            report.loss,
            report.step_s,
            100.0 * report.exposed_stall
        ));
        train_loss = Some(report.loss);
        let validation_loss = match report.step % arguments.eval_every == 0 && report.step < steps {
            true => Some(evaluate(&mut trainer)?),
            false => None,
        };
        journal.step(&report, validation_loss, &trainer, &output)?;
        if let Some(loss) = validation_loss {
            output.say(format_args!("step {}: validation loss {loss:.4}", report.step));
            trainer.commit_behind(document())?;
            worse = if loss < best { 0 } else { worse + 1 };
            best = best.min(loss);
            if arguments.patience > 0 && worse >= arguments.patience {
                output.say(format_args!("stopped: {worse} evaluations without a better one"));
                break;
            }
        }
    }
    let validation_loss = evaluate(&mut trainer)?;
    output.say(format_args!("validation loss at last {validation_loss:.4}"));
    trainer.commit(document())?;
    let measured = journal.summary(&trainer)?;
    if adapting.rank > 0 && !arguments.lora_merge {
        write_adapters(path, &adapting, &trainer, &arguments.out)?;
    } else {
        write_model(&pretrained, &adapting, &trainer, &tokenizer, &arguments.out)?;
    }
    let summary = Summary {
        train_loss,
        validation_loss: Some(validation_loss).filter(|loss| loss.is_finite()),
        weights_digest: trainer.weights_digest()?,
        ..measured
    };
    output.say(format_args!("digest of the weights {}", summary.weights_digest));
    output.say(format_args!("the result is in {}", arguments.out.display()));
    journal.finish(summary, &output)?;
    let (out, dir) = (quoted(arguments.out.display()), quoted(arguments.dir.display()));
    match arguments.lora_rank > 0 && !arguments.lora_merge {
        // Adapters alone are not a model to generate with.
        true => output.next(format_args!("ferrozero report {dir} -o report.html")),
        false => output.next(format_args!("ferrozero generate {out} --prompt TEXT; ferrozero report {dir}")),
    }
    Ok(())
}

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
fn write_adapters(model: &Path, adapting: &Adapting, trainer: &Trainer, out: &Path) -> CommandResult {
    const PREFIX: &str = "base_model.model.";
    std::fs::create_dir_all(out).map_err(failed(out))?;
    let adapters = trainer.parameters().into_iter().filter(|(name, _)| Adapting::is_adapter(name));
    let adapters: Vec<_> = adapters.map(|(name, shape)| (format!("{PREFIX}{name}"), shape)).collect();
    export_safetensors(&out.join("adapter_model.safetensors"), &adapters, &|name, take| {
        trainer.show(name.strip_prefix(PREFIX).unwrap_or(name), take)
    })?;
    let configuration = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": adapting.rank,
        "lora_alpha": adapting.alpha,
        "lora_dropout": 0.0,
        "target_modules": adapting.targets,
        "bias": "none",
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
fn write_model(
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
            found.ok_or_else(|| crate::work::internal("a parameter without its name in the file"))?;
        if *transposed {
            let (values, columns) = (trainer.parameter(name)?, shape[1]);
            let mut turned = (0..columns).map(|column| values.iter().skip(column).step_by(columns));
            return turned.try_for_each(|column| take(&column.copied().collect::<Vec<f32>>()));
        }
        match merged(trainer, adapting, name, shape)? {
            Some(values) => take(&values),
            None => trainer.show(name, take),
        }
    };
    export_safetensors(&out.join("model.safetensors"), &names, &show)?;
    Ok(())
}
