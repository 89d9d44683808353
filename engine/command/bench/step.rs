//! `ferrozero bench step`: each placement trains in a process of its own, so that peak memory is its own, and
//! the processes take turns step by step, so that both see the same machine.

use super::super::{CommandResult, configuration};
use super::{Spread, spread};
use crate::command::settings::{ComputeType, ProductType};
use crate::models::gpt::{self, Gpt, GptConfig};
use crate::models::linear::Adapting;
use crate::models::llama::{self, Llama};
use crate::models::llama_config::LlamaConfig;
use crate::schedule::operation::Queue;
use crate::{AdamW, Config, Engine, Placement, Tier};
use candle_core::{Device, Module, Tensor};
use ferrozero_kernels::philox::Stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Sizes and placements to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct StepArguments {
    /// Transformer blocks
    #[arg(long, default_value_t = 12)]
    layers: usize,
    /// Width of the model
    #[arg(long, default_value_t = 768)]
    hidden: usize,
    /// Attention heads
    #[arg(long, default_value_t = 12)]
    heads: usize,
    /// Different tokens
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Sequences of a step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Hugging Face's config.json of a Llama-like model, in place of the GPT's sizes; its weights are random
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Largest gradient norm that is not scaled down [default: no clipping]
    #[arg(long)]
    clip: Option<f64>,
    /// Home of all states
    #[arg(long, value_enum, default_value_t = Home::Disk)]
    placement: Home,
    /// Placement to compare with, in turns
    #[arg(long, value_enum)]
    against: Option<Home>,
    /// Segments that keep what their backward needs, from the last one on, and are not computed again; in the
    /// placement that is compared with all are
    #[arg(long, default_value_t = 0)]
    kept: usize,
    /// Type of parameters, gradients and activations; in the placement that is compared with f32
    #[arg(long, value_enum, default_value_t)]
    dtype: ComputeType,
    /// What matrices are multiplied as; in the placement that is compared with f32
    #[arg(long, value_enum, default_value_t)]
    products: ProductType,
    /// Measured steps of each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Folder for the state on disk; it is removed afterwards
    #[arg(long, default_value = "ferrozero-bench")]
    dir: PathBuf,
    /// Write the result as JSON
    #[arg(long)]
    json: bool,
    /// Make one step for each line of standard input, and write its figures
    #[arg(long, hide = true)]
    serve: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Home {
    Device,
    Host,
    Disk,
}

impl Home {
    fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

/// What a process measures.
#[derive(Debug, Clone, Copy)]
struct Variant {
    home: Home,
    kept: usize,
    dtype: ComputeType,
    products: ProductType,
}

/// What a placement's process says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Footprint {
    peak_host_bytes: u64,
    planned_host_bytes: u64,
    peak_device_bytes: u64,
    planned_device_bytes: u64,
    disk_bytes: u64,
    peak_resident_bytes: Option<u64>,
}

/// One placement, measured.
#[derive(Debug, Serialize)]
struct Measured {
    placement: &'static str,
    kept: usize,
    dtype: ComputeType,
    products: ProductType,
    step_s: Spread,
    tokens_per_s: f64,
    exposed_stall: f64,
    #[serde(flatten)]
    footprint: Footprint,
}

/// Runs the bench, or one of its processes.
pub fn run(arguments: StepArguments) -> CommandResult {
    if arguments.serve {
        return serve(&arguments);
    }
    let StepArguments { placement: home, kept, dtype, products, .. } = arguments;
    let first = Variant { home, kept, dtype, products };
    let plain = |home| Variant { home, kept: 0, dtype: ComputeType::F32, products: ProductType::F32 };
    let variants: Vec<_> = std::iter::once(first).chain(arguments.against.map(plain)).collect();
    let mut servers = variants
        .iter()
        .map(|&variant| Server::start(&arguments, variant))
        .collect::<CommandResult<Vec<_>>>()?;
    // The first step of each makes what later ones reuse.
    for server in &mut servers {
        server.step()?;
    }
    let mut steps = vec![vec![]; servers.len()];
    for round in 0..arguments.rounds {
        for (server, steps) in servers.iter_mut().zip(&mut steps) {
            steps.push(server.step()?);
        }
        eprintln!("round {}/{}", round + 1, arguments.rounds);
    }
    let tokens = (arguments.batch * arguments.seq) as f64;
    let mut measured = vec![];
    for ((server, steps), &variant) in servers.into_iter().zip(&steps).zip(&variants) {
        let Variant { home, kept, dtype, products } = variant;
        let step_s = figure(steps, "step_s");
        measured.push(Measured {
            placement: home.name(),
            kept,
            dtype,
            products,
            step_s,
            tokens_per_s: tokens / step_s.median,
            exposed_stall: figure(steps, "exposed_stall").median,
            footprint: server.finish()?,
        });
    }
    report(&arguments, &measured)
}

/// The values of a figure over all steps.
fn figure(steps: &[Value], name: &str) -> Spread {
    spread(steps.iter().filter_map(|step| step[name].as_f64()).collect())
}

fn report(arguments: &StepArguments, measured: &[Measured]) -> CommandResult {
    // Above 1: faster than what it is compared with.
    let speed = measured.get(1).map(|other| other.step_s.median / measured[0].step_s.median);
    if arguments.json {
        println!("{}", json!({ "measured": measured, "speed": speed }));
        return Ok(());
    }
    println!(
        "| placement | graphs kept | dtype | products | median step | tokens/s | exposed stall | peak \
         resident | planned |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    for row in measured {
        println!(
            "| {} | {} | {} | {} | {:.2} s ({:.2} to {:.2}) | {:.0} | {:.1} % | {} | {} |",
            row.placement,
            row.kept,
            row.dtype,
            row.products,
            row.step_s.median,
            row.step_s.least,
            row.step_s.most,
            row.tokens_per_s,
            100.0 * row.exposed_stall,
            row.footprint.peak_resident_bytes.map_or("unknown".into(), mib),
            mib(row.footprint.planned_host_bytes + row.footprint.planned_device_bytes),
        );
    }
    if let Some(speed) = speed {
        println!("\n{} runs at {speed:.2} of the speed of {}.", measured[0].placement, measured[1].placement);
    }
    Ok(())
}

/// A process that trains under one placement.
struct Server {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    fn start(
        arguments: &StepArguments,
        Variant { home, kept, dtype, products }: Variant,
    ) -> CommandResult<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "step", "--serve", "--placement", home.name()]);
        let sizes = [
            ("--layers", arguments.layers),
            ("--hidden", arguments.hidden),
            ("--heads", arguments.heads),
            ("--vocab", arguments.vocab),
            ("--seq", arguments.seq),
            ("--batch", arguments.batch),
            ("--kept", kept),
        ];
        for (option, size) in sizes {
            command.arg(option).arg(size.to_string());
        }
        command.arg("--dtype").arg(dtype.to_string()).arg("--products").arg(products.to_string());
        if let Some(config) = &arguments.config {
            command.arg("--config").arg(config);
        }
        if let Some(clip) = arguments.clip {
            command.arg("--clip").arg(clip.to_string());
        }
        command.arg("--dir").arg(&arguments.dir);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (requests, answers) = (child.stdin.take(), child.stdout.take());
        let answers = answers.ok_or_else(|| configuration("a child process has no output".into()))?;
        Ok(Self { child, requests, answers: BufReader::new(answers) })
    }

    fn answer(&mut self) -> CommandResult<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            return Err(configuration("a measured process ended early; its message is above".into()).into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn step(&mut self) -> CommandResult<Value> {
        if let Some(requests) = &mut self.requests {
            requests.write_all(b"step\n")?;
        }
        self.answer()
    }

    fn finish(mut self) -> CommandResult<Footprint> {
        self.requests = None;
        let footprint = serde_json::from_value(self.answer()?)?;
        self.child.wait()?;
        Ok(footprint)
    }
}

fn serve(arguments: &StepArguments) -> CommandResult {
    let StepArguments { placement, kept, dtype, products, .. } = arguments;
    let name = format!("{}-{kept}-{dtype}-{products}", placement.name());
    let folder = arguments.dir.join(name);
    let _ = std::fs::remove_dir_all(&folder);
    let footprint = serve_in(arguments, folder.clone());
    let _ = std::fs::remove_dir_all(&folder);
    // Only when the other placement's folder is gone too.
    let _ = std::fs::remove_dir(&arguments.dir);
    // Last of all, because a reader that has gone away ends this process.
    println!("{}", serde_json::to_string(&footprint?)?);
    Ok(())
}

/// Makes a step for each line until the input ends.
fn serve_in(arguments: &StepArguments, folder: PathBuf) -> CommandResult<Footprint> {
    let (tier, directory) = match arguments.placement {
        Home::Device => (Tier::Device, None),
        Home::Host => (Tier::Host, None),
        Home::Disk => (Tier::Disk, Some(folder)),
    };
    let placement = Placement::All(tier);
    let engine = Engine::new(Config {
        directory,
        placement,
        clip: arguments.clip,
        kept: Some(arguments.kept),
        dtype: arguments.dtype.into(),
        products: arguments.products.into(),
        ..Config::default()
    })?;
    let model = Model::new(arguments, &engine)?;
    let random = Stream::new(1, "tokens");
    let tokens = |first: u64| {
        let count = (arguments.batch * arguments.seq) as u64;
        let tokens =
            (0..count).map(|i| (random.integer(first + i) % model.vocabulary() as u64) as u32).collect();
        Tensor::from_vec(tokens, (arguments.batch, arguments.seq), &Device::Cpu)
    };
    let loss = |step: u64| model.loss(&tokens((2 * step) << 32)?, &tokens((2 * step + 1) << 32)?);
    let plan = engine.plan(AdamW::default(), |_| loss(0))?;
    let mut trainer = engine.trainer_from(plan)?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let step = trainer.steps();
        let report = trainer.step(|_| loss(step))?;
        let busy: serde_json::Map<_, _> = Queue::ALL
            .iter()
            .map(|&queue| (queue.name().to_owned(), json!(report.trace.busy_s(queue))))
            .collect();
        println!(
            "{}",
            json!({ "step_s": report.step_s, "exposed_stall": report.exposed_stall, "busy_s": busy })
        );
    }
    let usage = trainer.usage();
    Ok(Footprint {
        peak_host_bytes: usage.peak_host_bytes,
        planned_host_bytes: usage.planned_host_bytes,
        peak_device_bytes: usage.peak_device_bytes,
        planned_device_bytes: usage.planned_device_bytes,
        disk_bytes: usage.disk_bytes,
        peak_resident_bytes: peak_resident_bytes(),
    })
}

/// What trains.
enum Model {
    Gpt(Gpt<gpt::StreamedBlock>),
    Llama(Llama<llama::StreamedBlock>),
}

impl Model {
    fn new(arguments: &StepArguments, engine: &Engine) -> CommandResult<Self> {
        let none = Adapting::default();
        let Some(path) = &arguments.config else {
            let config = GptConfig {
                vocabulary: arguments.vocab,
                layers: arguments.layers,
                hidden: arguments.hidden,
                heads: arguments.heads,
                sequence: arguments.seq,
            };
            let tiles = config.perceptron_tiles();
            let block = |vb, _| gpt::StreamedBlock::from_config(engine, &config, &none, tiles, vb);
            return Ok(Self::Gpt(Gpt::new(&config, engine.var_builder(), block)?));
        };
        let source = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|error| configuration(format!("{source}: {error}")))?;
        let config = LlamaConfig::from_json(&serde_json::from_str(&text)?, &source, arguments.seq)?;
        let tiles = config.perceptron_tiles();
        let block = |vb, layer| llama::StreamedBlock::from_config(engine, &config, layer, &none, tiles, vb);
        Ok(Self::Llama(Llama::new(&config, engine.var_builder(), block, |_| Ok(None))?))
    }

    fn vocabulary(&self) -> usize {
        match self {
            Self::Gpt(model) => model.head().dims()[0],
            Self::Llama(model) => model.vocabulary(),
        }
    }

    /// Mean cross-entropy of `targets` [B, T] after `tokens` [B, T].
    fn loss(&self, tokens: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Gpt(model) => model.loss(tokens, targets),
            Self::Llama(model) => {
                let hidden = model.hidden(tokens, |_, layer, xs| layer.forward(xs))?;
                model.cross_entropy(&hidden.flatten(0, 1)?, &targets.flatten_all()?)
            }
        }
    }
}

/// The most memory that this process had at once, as the kernel counts it.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
