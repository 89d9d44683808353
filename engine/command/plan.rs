//! `ferrozero plan`: what fits and how fast it will be, without running the model.

use super::output::{quoted, say_next};
use super::overrides::Overrides;
use super::settings::ProductType;
use super::{CommandResult, configuration};
use crate::byte_size::ByteSize;
use crate::estimate::model_shape::ModelShape;
use crate::estimate::question::{Answer, Question};
use crate::planner::catalog::{Description, GPUS};
use crate::planner::machine::Machine;
use crate::planner::plan::Bytes;
use crate::statistics::SECONDS_PER_DAY;
use ferrozero_offload::Tier;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Changes of the machine that make less than this are not worth a line.
const WORTH_SAYING: f64 = 1.02;
/// Host memory to device memory of a machine of which nothing is said: as workstations with one card often
/// have it, and less than servers do.
const HOST_TO_DEVICE: u64 = 2;
/// Tokens without a tokenizer.
const BYTES: usize = 256;

/// What to plan, and how to tell it.
#[derive(Debug, Clone, clap::Args)]
pub struct PlanArguments {
    #[command(flatten)]
    question: QuestionArguments,
    /// Host memory that a run may use [default: all that the machine has]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// The largest model of the family that trains here, instead of this one
    #[arg(long)]
    max_model: bool,
    /// Write the answer as JSON
    #[arg(long)]
    json: bool,
    /// Do not say what to do next
    #[arg(long, short)]
    quiet: bool,
}

/// A model, a machine, and what is fixed.
#[derive(Debug, Clone, clap::Args)]
pub struct QuestionArguments {
    /// Model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-6.7b, gpt3-13b, gpt-100b, gpt3-175b, gpt-1t, or
    /// the path of a Hugging Face config.json of GPT-2's or Llama's family, as Mistral and Qwen [default: a
    /// GPT of the sizes below]
    #[arg(long, value_name = "NAME or \
                              config.json", conflicts_with_all = ["layers", "hidden", "heads", "vocabulary"])]
    model: Option<String>,
    /// Transformer blocks
    #[arg(long, default_value_t = 12)]
    layers: usize,
    /// Width of the model
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// Attention heads
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Different tokens
    #[arg(long, default_value_t = 256)]
    vocabulary: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Micro-batches of a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Sequences of a step, in the micro-batches that are fastest, instead of --batch and --accumulate
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["batch", "accumulate"])]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub(in crate::command) sequences: Option<u16>,
    /// Do not clip the gradient's norm: groups are then updated within the backward
    #[arg(long)]
    no_clip: bool,
    /// What ferrozero probe wrote; or a name as for --device
    #[arg(long, value_name = "FILE.json", conflicts_with = "device", default_value = "machine.json")]
    machine: PathBuf,
    /// Describe the machine instead: v100-32g, a100-40g, a100-80g, h100-80g, h200-141g, rtx3090-24g or
    /// rtx4090-24g
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Host memory of the described machine [default: twice the device's]
    #[arg(long, value_name = "SIZE")]
    host: Option<ByteSize>,
    /// Speed of its host memory [default: 60GB/s]
    #[arg(long, value_name = "SIZE/s")]
    host_speed: Option<String>,
    /// Its drive: a speed such as 7GB/s, or sata-ssd, nvme-gen3 or nvme-gen4 [default: no drive]
    #[arg(long, value_name = "SPEED or NAME")]
    nvme: Option<String>,
    /// Device memory that a run may use, where the device has its own [default: all that the machine has]
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<ByteSize>,
    /// Disk that a run may use [default: not limited]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Keep states once and not twice on disk
    #[arg(long)]
    in_place: bool,
    /// Plan for one of so many ranks that share the states, with this machine each. What a run does with
    /// ranks is not built yet; this tells whether they would help
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Segments of one size that a block is made of; 1: as the models here, which have a wide perceptron in
    /// tiles
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    segments_per_block: u16,
    /// What matrices are multiplied as on a machine without a GPU; one with a GPU multiplies bf16
    #[arg(long, value_enum, default_value_t, conflicts_with = "device")]
    products: ProductType,
    #[command(flatten)]
    overrides: Overrides,
}

impl QuestionArguments {
    /// The name of the device that is described instead of measured, if it is.
    fn described(&self) -> Option<&str> {
        let named = || self.machine.to_str().filter(|name| GPUS.iter().any(|gpu| gpu.name == *name));
        // A file may be called as a device is.
        self.device.as_deref().or_else(|| named().filter(|_| !self.machine.exists()))
    }
}

/// The command that comes after this answer.
fn next(arguments: &PlanArguments, question: &Question, answer: &Answer) -> CommandResult<String> {
    let PlanArguments { question: asked, memory, .. } = arguments;
    if asked.described().is_some() {
        return Ok("on that machine, ferrozero probe, and ferrozero plan without --device".into());
    }
    let memory = memory.unwrap_or_else(|| ByteSize(answer.plan.memory_bytes().next_multiple_of(1 << 20)));
    let mut options = format!(
        "--seq {} --batch {} --accumulate {} --memory {memory}",
        question.sequence, question.batch, question.accumulate
    );
    if question.machine.is_apart() {
        options += " --device cuda --dtype bf16";
    }
    if let Some(memory) = asked.device_memory {
        options += &format!(" --device-memory {memory}");
    }
    if asked.products == ProductType::Bf16 {
        options += " --products bf16";
    }
    if asked.no_clip {
        options += " --clip 0";
    }
    if let Some(path) = asked.model.as_ref().filter(|name| name.ends_with(".json")) {
        let folder = Path::new(path).parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = quoted(folder.unwrap_or(Path::new(".")).display());
        return Ok(format!("ferrozero finetune {folder} --data FILE --out DIR {options}"));
    }
    if asked.in_place {
        options += " --in-place";
    }
    options += &asked.overrides.as_options()?;
    // Without a tokenizer there are as many tokens as bytes.
    if question.shape.vocabulary != BYTES {
        options += " --tokenizer FILE";
    }
    let ModelShape { layers, hidden, heads, .. } = question.shape;
    Ok(format!("ferrozero train --layers {layers} --hidden {hidden} --heads {heads} {options}"))
}

/// Plans.
pub fn run(arguments: PlanArguments) -> CommandResult {
    let sequences = arguments.question.sequences;
    let mut question = question(&arguments.question, arguments.memory)?;
    if arguments.max_model {
        question.shape = largest(&question, sequences).ok_or_else(|| {
            configuration(
                "no model of this family has a plan here: grant more memory, or a shorter --seq".into(),
            )
        })?;
    }
    let (question, answer) = answer(question, sequences)?;
    let advice = question.advice(&answer);
    if arguments.json {
        println!("{}", object(&question, &answer, &advice));
        return Ok(());
    }
    print(&question, &answer, &advice);
    if !arguments.quiet {
        say_next(next(&arguments, &question, &answer)?);
    }
    Ok(())
}

/// The question as it was answered, and the answer; with a number of sequences, for the split of them that is
/// fastest.
pub(in crate::command) fn answer(
    question: Question,
    sequences: Option<u16>,
) -> CommandResult<(Question, Answer)> {
    if let Some(sequences) = sequences {
        let one_batch = Question { batch: sequences.into(), accumulate: 1, ..question };
        return Ok(one_batch.best_split()?);
    }
    let answer = question.answer()?;
    Ok((question, answer))
}

/// The largest model that has a plan; with a number of sequences, in the smallest micro-batches.
pub(in crate::command) fn largest(question: &Question, sequences: Option<u16>) -> Option<ModelShape> {
    match sequences {
        Some(sequences) => Question { batch: 1, accumulate: sequences.into(), ..question.clone() }.largest(),
        None => question.largest(),
    }
}

/// What the arguments ask, of a machine whose host may use `memory`, if that is not all that it has.
pub(in crate::command) fn question(
    arguments: &QuestionArguments,
    memory: Option<ByteSize>,
) -> CommandResult<Question> {
    let sizes = [
        ("layers", arguments.layers),
        ("hidden", arguments.hidden),
        ("heads", arguments.heads),
        ("vocabulary", arguments.vocabulary),
        ("seq", arguments.seq),
        ("batch", arguments.batch),
        ("accumulate", arguments.accumulate),
    ];
    if let Some((name, size)) = sizes.iter().find(|(_, size)| *size == 0 || *size > 1 << 20) {
        return Err(configuration(format!("{name} is {size} and must be from 1 to {}", 1 << 20)).into());
    }
    let mut shape = match &arguments.model {
        None => ModelShape::gpt(
            arguments.vocabulary,
            arguments.layers,
            arguments.hidden,
            arguments.heads,
            arguments.seq,
        ),
        Some(name) if name.ends_with(".json") => {
            ModelShape::from_hugging_face(Path::new(name), arguments.seq)?
        }
        Some(name) => ModelShape::named(name, arguments.seq)?,
    };
    shape.segments_per_block = arguments.segments_per_block.into();
    let describes = arguments.host.is_some() || arguments.host_speed.is_some() || arguments.nvme.is_some();
    let mut machine = match arguments.described() {
        Some(device) => described(arguments, device, memory)?,
        None if describes => {
            let text = "--host, --host-speed and --nvme describe a machine: name its device with --device";
            return Err(configuration(text.into()).into());
        }
        None if !arguments.machine.exists() => {
            let known: Vec<_> = GPUS.iter().map(|gpu| gpu.name).collect();
            return Err(configuration(format!(
                "{} is not there: make it with ferrozero probe, or describe a machine with --device, which \
                 is one of {}",
                arguments.machine.display(),
                known.join(", ")
            ))
            .into());
        }
        None => Machine::from_file(&arguments.machine)?,
    };
    if let Some(memory) = memory {
        machine.host_memory_bytes = Some(memory.0);
    }
    if let Some(memory) = arguments.device_memory {
        if !machine.is_apart() {
            let text = "--device-memory is for a device that has memory of its own, and on this machine the \
                        processor computes: leave it out, and say --memory";
            return Err(configuration(text.into()).into());
        }
        machine.device_memory_bytes = Some(memory.0);
    }
    if arguments.products != ProductType::F32 && machine.is_apart() {
        let text = "--products is for a machine without a GPU: one with a GPU multiplies bf16; leave it out";
        return Err(configuration(text.into()).into());
    }
    if let Some(disk) = arguments.disk {
        machine.disk_bytes = Some(disk.0);
    }
    Ok(Question {
        shape,
        batch: arguments.batch,
        sequence: arguments.seq,
        accumulate: arguments.accumulate,
        clip: !arguments.no_clip,
        in_place: arguments.in_place,
        ranks: arguments.ranks.into(),
        machine,
        products: arguments.products.into(),
        choices: arguments.overrides.choices(),
    })
}

fn described(
    arguments: &QuestionArguments,
    device: &str,
    memory: Option<ByteSize>,
) -> CommandResult<Machine> {
    let host_speed = arguments.host_speed.as_deref().map(|text| {
        let size = text.strip_suffix("/s").and_then(|size| size.parse::<ByteSize>().ok());
        let wrong = || configuration(format!("--host-speed {text:?}: write it as 60GB/s"));
        size.filter(|size| size.0 > 0).map(|size| size.0 as f64).ok_or_else(wrong)
    });
    let description = Description {
        device: device.to_owned(),
        host_memory_bytes: arguments.host.map(|size| size.0),
        host_bytes_per_s: host_speed.transpose()?,
        drive: arguments.nvme.clone(),
        disk_bytes: None,
    };
    let mut machine = description.machine()?;
    if arguments.host.is_none() && memory.is_none() {
        let bytes = machine.device_memory_bytes.map(|bytes| HOST_TO_DEVICE * bytes);
        machine.host_memory_bytes = bytes;
        let bytes = Bytes(bytes.unwrap_or(0));
        machine.name += &format!(", with {bytes} of host memory, which is assumed: say --host");
    }
    if arguments.nvme.is_none() {
        machine.name += ", without a drive (--nvme)";
    }
    Ok(machine)
}

fn print(question: &Question, answer: &Answer, advice: &[(String, f64)]) {
    let Question { shape, batch, sequence, accumulate, machine, .. } = question;
    let parameters = shape.parameters() as f64 / 1e9;
    println!(
        "model: {parameters:.3} G parameters, {} blocks of width {}; a step is {accumulate} × {batch} × \
         {sequence} tokens",
        shape.layers, shape.hidden
    );
    println!("machine: {}", machine.name);
    if question.ranks > 1 {
        println!("one of {} ranks, each with such a machine and its own tokens", question.ranks);
    }
    println!("{}", answer.plan);
    println!("  files on disk {}", Bytes(answer.disk_bytes));
    if let Some(limit) = machine.device_memory_bytes {
        println!("  device memory {} of {}", Bytes(answer.plan.device_bytes()), Bytes(limit));
    }
    println!(
        "  slots {}, look-ahead {}, state pieces {}, gradient sets {}, boundaries on {}",
        answer.depths.slots,
        answer.depths.look_ahead,
        answer.depths.state_pieces,
        answer.depths.gradient_sets,
        answer.boundaries
    );
    if machine.is_apart() {
        let homes = answer.plan.placements();
        let on_device = homes.iter().filter(|home| home.master == Tier::Device).count();
        println!("  {on_device} of {} groups at home on the device, which updates them", homes.len());
    }
    println!("{}", answer.forecast);
    println!("  {:.1} tokens/s", answer.tokens_per_s);
    let written = answer.forecast.written_bytes as f64;
    if written > 0.0 {
        let a_day = written / answer.forecast.step_s * SECONDS_PER_DAY / 1e12;
        println!("  drive wear {a_day:.2} TB written a day");
    }
    let worth: Vec<_> = advice.iter().filter(|(_, times)| *times >= WORTH_SAYING).collect();
    match worth.is_empty() {
        true => println!("nothing alone makes it faster: several queues are busy all the time"),
        false => println!("what to change first, in tokens/s:"),
    }
    for (text, times) in worth {
        println!("  with {text}: {times:.2}x");
    }
}

fn object(question: &Question, answer: &Answer, advice: &[(String, f64)]) -> serde_json::Value {
    json!({
        "model": question.shape,
        "parameters": question.shape.parameters(),
        "machine": question.machine,
        "ranks": question.ranks,
        "batch": question.batch,
        "accumulate": question.accumulate,
        "device_bytes": answer.plan.device_bytes(),
        "host_bytes": answer.plan.host_bytes(),
        "disk_bytes": answer.disk_bytes,
        "placements": answer.plan.placements(),
        "boundaries": answer.boundaries.to_string(),
        "slots": answer.depths.slots,
        "look_ahead": answer.depths.look_ahead,
        "state_pieces": answer.depths.state_pieces,
        "gradient_sets": answer.depths.gradient_sets,
        "vertical": answer.depths.vertical,
        "kept": answer.depths.kept,
        "forecast": answer.forecast,
        "tokens_per_s": answer.tokens_per_s,
        "advice": advice
            .iter()
            .map(|(text, times)| json!({ "with": text, "times": times }))
            .collect::<Vec<_>>(),
    })
}
