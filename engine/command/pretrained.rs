//! `ferrozero generate`: text from a model that others have trained, whose weights stream by the schedule of an evaluation.

use super::settings::ComputeType;
use super::{CommandResult, configuration};
use crate::byte_size::ByteSize;
use crate::generate::{Sampling, choose};
use crate::models::linear::Adapting;
use crate::models::pretrained::{Cache, Pretrained};
use crate::{AdamW, Config, Engine};
use candle_core::{DType, Device, Tensor};
use ferrozero_kernels::philox::Stream;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Options of `ferrozero generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArguments {
    /// Hugging Face folder, or GGUF file
    model: PathBuf,
    /// Text that is continued
    #[arg(long)]
    prompt: String,
    /// Most tokens that are generated
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Hugging Face tokenizer [default: the model's own]
    #[arg(long, value_name = "tokenizer.json")]
    tokenizer: Option<PathBuf>,
    /// Divides the logits; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the most likely tokens that have this probability together are chosen from
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the choice
    #[arg(long, default_value_t = 1)]
    seed: u64,
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
    /// Folder in which the weights that do not fit into memory lie meanwhile [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// Tokens that end a text, as the configuration says.
pub(super) fn ends(configuration: &Value) -> Vec<u32> {
    let found = &configuration["eos_token_id"];
    let all = found.as_array().cloned().unwrap_or_else(|| vec![found.clone()]);
    all.iter().filter_map(|token| u32::try_from(token.as_u64()?).ok()).collect()
}

/// Generates as the arguments say.
pub fn generate(arguments: GenerateArguments) -> CommandResult {
    let GenerateArguments { model: path, prompt, tokens: count, temperature, top_p, seed, .. } = arguments;
    let usable = top_p > 0.0 && top_p <= 1.0 && temperature >= 0.0 && temperature.is_finite();
    if !usable {
        return Err(
            configuration("--top-p must be above 0 and at most 1, --temperature 0 or more".into()).into()
        );
    }
    // The length of the prompt is known only with the tokenizer.
    let tokenizer = Pretrained::open(&path, 1)?.tokenizer(arguments.tokenizer.as_deref())?;
    let mut tokens = tokenizer.encode(prompt.as_bytes())?;
    if tokens.is_empty() || count == 0 {
        return Err(
            configuration("--prompt must have a token, and --tokens must be at least 1".into()).into()
        );
    }
    let sequence = tokens.len() + count;
    let pretrained = Pretrained::open(&path, sequence)?;
    // Keys and values grow beside what the plan counts, and once more while they are copied to grow.
    let cache_bytes = 2 * pretrained.cache_bytes(sequence);
    let scratch = match &arguments.scratch {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let engine = Engine::new(Config {
        device: crate::open_device(&arguments.device)?,
        dtype: arguments.dtype.on(&arguments.device)?,
        memory_bytes: Some(arguments.memory.0.saturating_sub(cache_bytes)),
        device_memory_bytes: arguments.device_memory.map(|size| size.0),
        directory: Some(scratch.path().to_owned()),
        in_place: true,
        initial_values: Some(pretrained.weights.clone()),
        ..Config::default()
    })?;
    // Neither gradients nor moments.
    engine.freeze(|_, _| true)?;
    let model = pretrained.build(&engine, &Adapting::default())?;
    let rehearsed = Tensor::new(tokens.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let plan = engine.plan(AdamW::default(), || model.loss(&rehearsed, &rehearsed, None))?;
    eprintln!("{plan}");
    let mut trainer = engine.trainer(plan)?;
    let (cache, stream, ends) =
        (Cache::default(), Stream::new(seed, "sampling"), ends(&pretrained.configuration));
    let sampling = Sampling { temperature, seed };
    let prompt_tokens = tokens.len();
    let (began, mut first_s) = (Instant::now(), 0.0);
    let mut written = tokenizer.decode(&tokens);
    print!("{written}");
    for position in 0..count as u64 {
        let all = Tensor::new(tokens.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = trainer.evaluate(|| model.next_logits_cached(&all, &cache))?;
        let logits = logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let token = choose(&logits, sampling.temperature, top_p, stream.uniform(position));
        if position == 0 {
            first_s = began.elapsed().as_secs_f64();
        }
        if ends.contains(&token) {
            break;
        }
        tokens.push(token);
        // A character can be made of several tokens: only what stays is written.
        let text = tokenizer.decode(&tokens);
        if let Some(new) = text.strip_prefix(written.as_str()).filter(|new| !new.ends_with('\u{fffd}')) {
            print!("{new}");
            std::io::stdout().flush()?;
            written = text;
        }
    }
    println!();
    let generated = tokens.len() - prompt_tokens;
    let rest_s = began.elapsed().as_secs_f64() - first_s;
    let usage = trainer.usage();
    eprintln!(
        "{}",
        json!({
            "prompt_tokens": prompt_tokens,
            "generated_tokens": generated,
            "first_token_s": first_s,
            "tokens_per_s": generated.saturating_sub(1) as f64 / rest_s.max(f64::MIN_POSITIVE),
            "peak_host_bytes": usage.peak_host_bytes,
            "peak_device_bytes": usage.peak_device_bytes,
        })
    );
    Ok(())
}
