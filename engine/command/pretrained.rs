//! `ferrozero generate`: text from a model that others have trained, whose weights stream by the schedule of
//! an evaluation.

use super::settings::{ComputeType, ProductType};
use super::{CommandResult, configuration};
use crate::byte_size::ByteSize;
use crate::data::chat::ChatTemplate;
use crate::data::error::DataError;
use crate::data::sampling::choose;
use crate::data::tokenizer::Tokenizer;
use crate::models::linear::Adapting;
use crate::models::pretrained::{Cache, Continued, Pretrained};
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
    /// Text that is continued, or with --chat answered; several are continued together, each as it would be
    /// alone
    #[arg(long, required = true)]
    prompt: Vec<String>,
    /// Take the prompt as a user's message and write the answer: by the model's own chat template, until its
    /// turn ends
    #[arg(long)]
    chat: bool,
    /// What is said to the model before the message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
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
    /// Type of parameters and activations on the device
    #[arg(long, value_enum, default_value_t)]
    dtype: ComputeType,
    /// What matrices are multiplied as on the CPU device; bf16 is faster where the processor has matrix tiles
    /// (AMX), and less exact
    #[arg(long, value_enum, default_value_t)]
    products: ProductType,
    /// Memory of the host for everything, on the CPU device in all, as 600MiB
    #[arg(long, default_value = "2GiB")]
    memory: ByteSize,
    /// Memory that the device may use [default: on a CUDA device nine tenths of what is free]
    #[arg(long, value_name = "SIZE")]
    device_memory: Option<ByteSize>,
    /// Folder in which the weights that do not fit into memory lie meanwhile [default: the system's for
    /// temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// Tokens that end a text, as the configuration says.
pub(super) fn ends(configuration: &Value) -> Vec<u32> {
    let found = &configuration["eos_token_id"];
    let all = found.as_array().cloned().unwrap_or_else(|| vec![found.clone()]);
    all.iter().filter_map(|token| u32::try_from(token.as_u64()?).ok()).collect()
}

/// The model's template for chats, if it has one.
pub(super) fn chat_template(pretrained: &Pretrained) -> CommandResult<Option<ChatTemplate>> {
    let template = ChatTemplate::from_configuration(&pretrained.tokenizer_configuration()?);
    Ok(template.map_err(|reason| DataError::ChatTemplate { path: pretrained.path.clone(), reason })?)
}

/// Generates as the arguments say.
pub fn generate(arguments: GenerateArguments) -> CommandResult {
    let GenerateArguments { model: path, prompt: prompts, tokens: count, temperature, top_p, seed, .. } =
        arguments;
    let usable = top_p > 0.0 && top_p <= 1.0 && temperature >= 0.0 && temperature.is_finite();
    if !usable {
        return Err(
            configuration("--top-p must be above 0 and at most 1, --temperature 0 or more".into()).into()
        );
    }
    // The length of the prompt is known only with the tokenizer.
    let pretrained = Pretrained::open(&path, 1)?;
    let tokenizer = pretrained.tokenizer(arguments.tokenizer.as_deref())?;
    let mut ends = ends(&pretrained.configuration);
    let mut texts: Vec<Text> = if arguments.chat {
        let wrong = |reason: String| DataError::ChatTemplate { path: path.clone(), reason };
        let template = chat_template(&pretrained)?.ok_or_else(|| {
            wrong("the model has none: leave --chat out, or choose a model that was trained on chats".into())
        })?;
        ends.extend(template.end_of_turn(&tokenizer).map_err(wrong)?);
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let system = arguments.system.as_ref().map(|text| message("system", text));
        let chat = |prompt: &String| -> CommandResult<Text> {
            let messages: Vec<Value> = system.iter().cloned().chain([message("user", prompt)]).collect();
            let text = template.render(&messages, true).map_err(wrong)?;
            Ok(Text::answer(tokenizer.encode(text.as_bytes())?))
        };
        prompts.iter().map(chat).collect::<CommandResult<_>>()?
    } else {
        let prefix = tokenizer.prefix()?;
        let text = |prompt: &String| -> CommandResult<Text> {
            Ok(Text::whole([prefix.clone(), tokenizer.encode(prompt.as_bytes())?].concat()))
        };
        prompts.iter().map(text).collect::<CommandResult<_>>()?
    };
    let longest = texts.iter().map(|text| text.tokens.len()).max().unwrap_or(0);
    if texts.iter().any(|text| text.tokens.is_empty()) || count == 0 {
        return Err(
            configuration("--prompt must have a token, and --tokens must be at least 1".into()).into()
        );
    }
    let sequence = longest + count;
    let pretrained = Pretrained::open(&path, sequence)?;
    // Keys and values grow beside what the plan counts, and once more while they are copied to grow. Texts
    // are attended to one by one.
    let cache_bytes =
        2 * texts.len() as u64 * pretrained.cache_bytes(sequence) + pretrained.scores_bytes(sequence);
    let scratch = match &arguments.scratch {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let engine = Engine::new(Config {
        device: crate::open_device(&arguments.device)?,
        dtype: arguments.dtype.into(),
        products: arguments.products.into(),
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
    let rehearsed = Tensor::zeros((texts.len(), longest), DType::U32, &Device::Cpu)?;
    let plan = engine.plan(AdamW::default(), |_| model.loss(&rehearsed, &rehearsed, None))?;
    eprintln!("{plan}");
    let mut trainer = engine.trainer_from(plan)?;
    let stream = Stream::new(seed, "sampling");
    let prompt_tokens: usize = texts.iter().map(|text| text.tokens.len()).sum();
    let (began, mut first_s) = (Instant::now(), 0.0);
    let alone = texts.len() == 1;
    for position in 0..count as u64 {
        let continued: Vec<Continued> =
            texts.iter().filter(|text| !text.ended).map(Text::continued).collect();
        if continued.is_empty() {
            break;
        }
        let logits = trainer.evaluate(|| model.next_logits_of(&continued))?;
        let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for (text, logits) in texts.iter_mut().filter(|text| !text.ended).zip(&logits) {
            let token = choose(logits, temperature, top_p, stream.uniform(position));
            text.ended = ends.contains(&token);
            if !text.ended {
                text.tokens.push(token);
            }
            if alone {
                text.write(&tokenizer)?;
            }
        }
        if position == 0 {
            first_s = began.elapsed().as_secs_f64();
        }
    }
    let rest_s = began.elapsed().as_secs_f64() - first_s;
    for (number, text) in texts.iter_mut().enumerate() {
        if !alone {
            println!("prompt {}:", number + 1);
        }
        text.write(&tokenizer)?;
        println!();
    }
    let generated = texts.iter().map(|text| text.tokens.len()).sum::<usize>() - prompt_tokens;
    let usage = trainer.usage();
    eprintln!(
        "{}",
        json!({
            "prompts": prompts.len(),
            "prompt_tokens": prompt_tokens,
            "generated_tokens": generated,
            "first_token_s": first_s,
            "tokens_per_s": generated.saturating_sub(prompts.len()) as f64 / rest_s.max(f64::MIN_POSITIVE),
            "peak_host_bytes": usage.peak_host_bytes,
            "peak_device_bytes": usage.peak_device_bytes,
        })
    );
    Ok(())
}

/// A prompt and what follows it.
struct Text {
    tokens: Vec<u32>,
    /// First token that is printed.
    first: usize,
    cache: Cache,
    /// What was printed.
    written: String,
    ended: bool,
}

impl Text {
    /// A prompt that is printed too.
    fn whole(tokens: Vec<u32>) -> Self {
        Self { tokens, first: 0, cache: Cache::default(), written: String::new(), ended: false }
    }

    /// A prompt of which only what follows it is printed.
    fn answer(tokens: Vec<u32>) -> Self {
        Self { first: tokens.len(), ..Self::whole(tokens) }
    }

    fn continued(&self) -> Continued<'_> {
        Continued { tokens: &self.tokens, cache: &self.cache }
    }

    /// Prints what is new.
    fn write(&mut self, tokenizer: &Tokenizer) -> CommandResult {
        let text = tokenizer.decode(&self.tokens[self.first..]);
        // A character can be made of several tokens: only what stays is written.
        if let Some(new) = text.strip_prefix(self.written.as_str()).filter(|new| !new.ends_with('\u{fffd}')) {
            print!("{new}");
            std::io::stdout().flush()?;
            self.written = text;
        }
        Ok(())
    }
}
