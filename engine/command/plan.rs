//! `ferrozero plan`: what fits and how fast it will be, without running the model.

use super::output::{quoted, say_next};
use super::overrides::Overrides;
use super::{CommandResult, configuration};
use crate::byte_size::ByteSize;
use crate::plan::Bytes;
use crate::planner::{Answer, Question};
use crate::shape::ModelShape;
use crate::simulator::Machine;
use crate::simulator::catalog::Description;
use ferrozero_offload::Tier;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Changes of the machine that make less than this are not worth a line.
const WORTH_SAYING: f64 = 1.02;
const SECONDS_PER_DAY: f64 = 86_400.0;

/// A model, a machine, and what is fixed.
#[derive(Debug, Clone, clap::Args)]
pub struct PlanArguments {
    /// Model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-6.7b, gpt3-13b, gpt-100b, gpt3-175b, gpt-1t, or the path of a
    /// Hugging Face config.json of the GPT-2 or Llama family [default: a GPT of the sizes below]
    #[arg(long, value_name = "NAME or config.json", conflicts_with_all = ["layers", "hidden", "heads", "vocabulary"])]
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
    sequences: Option<u16>,
    /// Do not clip the gradient's norm: groups are then updated within the backward
    #[arg(long)]
    no_clip: bool,
    /// What ferrozero probe wrote
    #[arg(long, value_name = "FILE.json", conflicts_with = "device", default_value = "machine.json")]
    machine: PathBuf,
    /// Describe the machine instead: v100-32g, a100-40g, a100-80g, h100-80g, h200-141g, rtx3090-24g or rtx4090-24g
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Host memory of the described machine
    #[arg(long, value_name = "SIZE", requires = "device")]
    host: Option<ByteSize>,
    /// Speed of its host memory [default: 60GB/s]
    #[arg(long, value_name = "SIZE/s", requires = "device")]
    host_speed: Option<String>,
    /// Its drive: a speed such as 7GB/s, or sata-ssd, nvme-gen3 or nvme-gen4 [default: no drive]
    #[arg(long, value_name = "SPEED or NAME", requires = "device")]
    nvme: Option<String>,
    /// Host memory that a run may use [default: all that the machine has]
    #[arg(long, value_name = "SIZE")]
    pub(in crate::command) memory: Option<ByteSize>,
    /// Device memory that a run may use [default: all that the machine has]
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<ByteSize>,
    /// Disk that a run may use [default: not limited]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Keep states once and not twice on disk
    #[arg(long)]
    in_place: bool,
    /// Plan for one of so many ranks that share the states, with this machine each. What a run does with ranks is not built
    /// yet; this tells whether they would help
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Segments that a block is made of
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    segments_per_block: u16,
    /// The largest model of the family that trains here, instead of this one
    #[arg(long)]
    pub(in crate::command) max_model: bool,
    /// Write the answer as JSON
    #[arg(long)]
    pub(in crate::command) json: bool,
    /// Do not say what to do next
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    overrides: Overrides,
}

/// The command that comes after this answer.
fn next(arguments: &PlanArguments, question: &Question, answer: &Answer) -> String {
    if arguments.device.is_some() {
        return "on that machine, ferrozero probe, and ferrozero plan without --device".into();
    }
    let memory = ByteSize(answer.plan.memory_bytes().next_multiple_of(1 << 20));
    let memory = arguments.memory.unwrap_or(memory);
    let sizes = format!(
        "--seq {} --batch {} --accumulate {} --memory {memory}",
        question.sequence, question.batch, question.accumulate
    );
    if let Some(path) = arguments.model.as_ref().filter(|name| name.ends_with(".json")) {
        let folder = Path::new(path).parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = quoted(folder.unwrap_or(Path::new(".")).display());
        return format!("ferrozero finetune {folder} --data FILE --out DIR {sizes}");
    }
    let ModelShape { layers, hidden, heads, .. } = question.shape;
    format!("ferrozero train --layers {layers} --hidden {hidden} --heads {heads} {sizes}")
}

/// Plans.
pub fn run(arguments: PlanArguments) -> CommandResult {
    let json = arguments.json;
    let max_model = arguments.max_model;
    let mut question = question(&arguments)?;
    if max_model {
        question.shape = question.largest().ok_or_else(|| {
            configuration(
                "no model of this family has a plan here: grant more memory, or a shorter --seq".into(),
            )
        })?;
    }
    let (question, answer) = match arguments.sequences {
        Some(sequences) => {
            let one_batch = Question { batch: sequences.into(), accumulate: 1, ..question };
            one_batch.best_split()?
        }
        None => {
            let answer = question.answer()?;
            (question, answer)
        }
    };
    let advice = question.advice(&answer);
    if json {
        println!("{}", object(&question, &answer, &advice));
        return Ok(());
    }
    print(&question, &answer, &advice);
    if !arguments.quiet {
        say_next(next(&arguments, &question, &answer));
    }
    Ok(())
}

/// What the arguments ask.
pub(in crate::command) fn question(arguments: &PlanArguments) -> CommandResult<Question> {
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
        Some(name) if name.ends_with(".json") => ModelShape::from_hugging_face(Path::new(name))?,
        Some(name) => ModelShape::named(name, arguments.seq)?,
    };
    shape.segments_per_block = arguments.segments_per_block.into();
    let mut machine = match &arguments.device {
        Some(device) => described(arguments, device)?,
        None if !arguments.machine.exists() => {
            return Err(configuration(format!(
                "{} is not there: make it with ferrozero probe, or describe a machine with --device",
                arguments.machine.display()
            ))
            .into());
        }
        None => Machine::from_file(&arguments.machine)?,
    };
    if let Some(memory) = arguments.memory {
        machine.host_memory_bytes = Some(memory.0);
    }
    if let (Some(memory), true) = (arguments.device_memory, machine.is_apart()) {
        machine.device_memory_bytes = Some(memory.0);
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
        choices: arguments.overrides.choices(),
    })
}

fn described(arguments: &PlanArguments, device: &str) -> CommandResult<Machine> {
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
    Ok(description.machine()?)
}

fn print(question: &Question, answer: &Answer, advice: &[(String, f64)]) {
    let Question { shape, batch, sequence, accumulate, machine, .. } = question;
    let parameters = shape.parameters() as f64 / 1e9;
    println!(
        "model: {parameters:.3} G parameters, {} blocks of width {}; a step is {accumulate} × {batch} × {sequence} tokens",
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
        "forecast": answer.forecast,
        "tokens_per_s": answer.tokens_per_s,
        "advice": advice.iter().map(|(text, times)| json!({ "with": text, "times": times })).collect::<Vec<_>>(),
    })
}
