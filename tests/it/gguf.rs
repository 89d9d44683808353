//! GGUF files carry their own tokenizer and chat template, and are fine-tuned without anything beside them.

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use ferrozero::internals::data::tokenizer::Tokenizer;
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::pretrained::Pretrained;
use ferrozero::{AdamW, Config, Engine};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MERGES: [&str; 3] = ["t h", "th e", "Ġ the"];
const WIDTH: usize = 16;

/// Tokens: two that no text is made of, all bytes as GPT-2 writes them, and what the merges make.
fn tokens() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 0x100..;
    let bytes = (0..256).map(|byte| if printable(byte) { byte } else { others.next().unwrap() });
    let bytes = bytes.map(|code| char::from_u32(code).unwrap().to_string());
    let special = ["<|endoftext|>", "<|im_end|>"].map(str::to_owned);
    special.into_iter().chain(bytes).chain(MERGES.map(|merge| merge.replace(' ', ""))).collect()
}

/// Writes a model of one layer with weights of no meaning. `changes` replace metadata.
fn write_model(path: &Path, changes: &[(&str, Value)]) {
    write_model_with(path, changes, &|_| None);
}

/// As [`write_model`], with the values of some tensors by their names.
fn write_model_with(path: &Path, changes: &[(&str, Value)], given: &dyn Fn(&str) -> Option<Vec<f32>>) {
    let strings = |all: &[String]| Value::Array(all.iter().map(|text| Value::String(text.clone())).collect());
    let text = |text: &str| Value::String(text.to_owned());
    let tokens = tokens();
    let vocabulary = tokens.len();
    let kinds = (0..tokens.len()).map(|token| Value::I32(if token < 2 { 3 } else { 1 })).collect();
    let mut metadata = vec![
        ("general.architecture", text("llama")),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(WIDTH as u32)),
        ("llama.feed_forward_length", Value::U32(24)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", strings(&MERGES.map(str::to_owned))),
        ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        (
            "tokenizer.chat_template",
            text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"),
        ),
    ];
    for (key, value) in changes {
        metadata.retain(|(known, _)| known != key);
        metadata.push((key, value.clone()));
    }
    let matrix = |name: &str, shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values =
            given(name).unwrap_or_else(|| (0..count).map(|i| (i as f32 * 0.7).sin() * 0.1).collect());
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (name.to_owned(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
    };
    let layer = |name: &str, shape: &[usize]| matrix(&format!("blk.0.{name}.weight"), shape);
    let mut tensors = vec![
        matrix("token_embd.weight", &[vocabulary, WIDTH]),
        matrix("output_norm.weight", &[WIDTH]),
        layer("attn_norm", &[WIDTH]),
        layer("ffn_norm", &[WIDTH]),
        layer("attn_q", &[WIDTH, WIDTH]),
        layer("attn_k", &[WIDTH / 2, WIDTH]),
        layer("attn_v", &[WIDTH / 2, WIDTH]),
        layer("attn_output", &[WIDTH, WIDTH]),
        layer("ffn_gate", &[24, WIDTH]),
        layer("ffn_up", &[24, WIDTH]),
        layer("ffn_down", &[WIDTH, 24]),
    ];
    if given("output.weight").is_some() {
        tensors.push(matrix("output.weight", &[vocabulary, WIDTH]));
    }
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn the_tokenizer_that_a_file_carries_cuts_text_as_its_name_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_model(&path, &[]);
    let tokenizer = Pretrained::open(&path, 16).unwrap().tokenizer(None).unwrap();
    let all = tokens();
    let token = |text: &str| all.iter().position(|token| token == text).unwrap() as u32;
    let expected = ["the", "Ġthe", "Ġ", "1", "2", "Ã", "©", "<|im_end|>"].map(token);
    let text = "the the 12é<|im_end|>";
    assert_eq!(tokenizer.encode(text.as_bytes()).unwrap(), expected);
    assert_eq!(tokenizer.decode(&expected), text.replace("<|im_end|>", ""), "a special token is no text");
    // Digits are not single words where the name says nothing of the kind.
    write_model(
        &path,
        &[
            ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
            ("tokenizer.ggml.merges", Value::Array(vec![Value::String("Ġ t".into())])),
        ],
    );
    let error = Pretrained::open(&path, 16).unwrap().tokenizer(None).err().unwrap().to_string();
    assert!(error.contains("model.gguf"), "a merge whose token is missing: {error}");
}

/// Metadata of a vocabulary of SentencePiece's, which scripts/sentencepiece_reference.py has written.
fn sentence_piece(reference: &serde_json::Value) -> Vec<(&'static str, Value)> {
    let list = |key: &str, read: fn(&serde_json::Value) -> Value| {
        Value::Array(reference[key].as_array().unwrap().iter().map(read).collect())
    };
    vec![
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.pre", Value::String("default".into())),
        ("tokenizer.ggml.tokens", list("tokens", |token| Value::String(token.as_str().unwrap().into()))),
        ("tokenizer.ggml.scores", list("scores", |score| Value::F32(score.as_f64().unwrap() as f32))),
        ("tokenizer.ggml.token_type", list("kinds", |kind| Value::I32(kind.as_i64().unwrap() as i32))),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ]
}

#[test]
fn pieces_are_those_that_sentencepiece_finds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentencepiece.json");
    let reference: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let metadata = sentence_piece(&reference);
    let read = |changes: &[(&'static str, Value)]| {
        write_model(&path, &[&metadata, changes].concat());
        Pretrained::open(&path, 16).unwrap().tokenizer(None)
    };
    let tokenizer = read(&[]).unwrap();
    let saved = folder.path().join("tokenizer.json");
    tokenizer.save(&saved).unwrap();
    let texts = reference["texts"].as_array().unwrap();
    assert!(texts.len() > 9);
    for tokenizer in [&tokenizer, &Tokenizer::from_file(&saved).unwrap()] {
        for text in texts {
            let (text, expected) = (text["text"].as_str().unwrap(), text["tokens"].as_array().unwrap());
            let found = tokenizer.encode(text.as_bytes()).unwrap();
            assert!(found.iter().eq(expected), "{text:?}: {found:?}, and {expected:?}");
            assert_eq!(tokenizer.decode(&found), text.replace('▁', " "), "{text:?}");
        }
        assert_eq!(tokenizer.prefix().unwrap(), [1], "the beginning of a text");
    }
    let token = |text: &str| {
        let tokens = reference["tokens"].as_array().unwrap();
        tokens.iter().position(|token| token == text).unwrap() as u32
    };
    assert_eq!(tokenizer.encode(b"<s>a</s>").unwrap(), [1, token("▁a"), 2]);
    assert_eq!(tokenizer.decode(&[1, token("▁a"), token("▁the"), 2]), "a the");
    let flag = |key, flag: bool| (key, Value::Bool(flag));
    let plain = read(&[
        flag("tokenizer.ggml.add_space_prefix", false),
        flag("tokenizer.ggml.add_bos_token", false),
        flag("tokenizer.ggml.add_eos_token", true),
    ]);
    let plain = plain.unwrap();
    assert_eq!(plain.encode(b"a the").unwrap(), [token("a"), token("▁the")]);
    assert_eq!(plain.decode(&[token("▁the")]), " the");
    assert_eq!(plain.prefix().unwrap(), [0u32; 0]);
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        for damaged in [Value::Array(vec![]), Value::Array(vec![Value::Bool(true)]), Value::U32(1)] {
            let error = read(&[(key, damaged)]).err().unwrap().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}

#[test]
fn a_tokenizer_that_is_not_known_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let text = |text: &str| Value::String(text.into());
    for (key, value) in [
        ("tokenizer.ggml.model", text("t5")),
        ("tokenizer.ggml.pre", text("viking")),
        ("tokenizer.ggml.tokens", text("none")),
        ("tokenizer.ggml.merges", Value::U32(3)),
    ] {
        write_model(&path, &[(key, value)]);
        let error = Pretrained::open(&path, 16).unwrap().tokenizer(None).err().unwrap().to_string();
        assert!(error.contains(key) && error.contains("give another tokenizer"), "{error}");
    }
    write_model(&path, &[("general.architecture", text("mamba"))]);
    let error = Pretrained::open(&path, 16).unwrap_err().to_string();
    assert!(error.contains("mamba") && error.contains("llama"), "{error}");
}

fn ferrozero(folder: &Path, options: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder).args(options.split(' ')).output().unwrap()
}

/// What was written on standard output and on standard error.
fn expect_success(output: &Output) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{err}");
    (out, err)
}

/// Writes a model that says "ok" after a colon, then the mark that ends a turn, and then exclamation marks
/// without end.
fn write_talker(path: &Path, changes: &[(&str, Value)]) {
    let tokens = tokens();
    let token = |text: &str| tokens.iter().position(|token| token == text).unwrap();
    // No layer changes anything, so the logits are products of the last token's embedding and the rows of the
    // head: a row that is an embedding makes its token follow.
    let embedding = |token: usize| -> Vec<f32> {
        let row: Vec<f32> =
            (0..WIDTH).map(|column| ((token * WIDTH + column) as f32).powi(2).sin()).collect();
        let norm = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        row.iter().map(|value| value / norm).collect()
    };
    let follows = [(":", "o"), ("o", "k"), ("k", "<|im_end|>"), ("<|im_end|>", "!"), ("!", "!")];
    let head = |next: usize| match follows.iter().find(|(_, follower)| token(follower) == next) {
        Some((before, _)) if tokens[next] != "!" => embedding(token(before)),
        Some(_) => {
            let [a, b] = ["<|im_end|>", "!"].map(|before| embedding(token(before)));
            a.iter().zip(b).map(|(a, b)| a + b).collect()
        }
        None => vec![0.0; WIDTH],
    };
    write_model_with(path, changes, &|name| match name {
        "token_embd.weight" => Some((0..tokens.len()).flat_map(embedding).collect()),
        "output.weight" => Some((0..tokens.len()).flat_map(head).collect()),
        "output_norm.weight" => Some(vec![1.0; WIDTH]),
        "blk.0.attn_output.weight" => Some(vec![0.0; WIDTH * WIDTH]),
        "blk.0.ffn_down.weight" => Some(vec![0.0; WIDTH * 24]),
        _ => None,
    });
}

#[test]
fn a_chat_is_written_by_the_models_template_and_ends_with_its_turn() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = folder.path().join("model.gguf");
    let template = "{% for m in messages %}{{ m.role }}={{ m.content }}<|im_end|>{% endfor %}{% if \
                    add_generation_prompt %}assistant:{% endif %}";
    let template = ("tokenizer.chat_template", Value::String(template.into()));
    // The end of a text is another token than that of a turn, which only the template tells.
    let end = ("tokenizer.ggml.eos_token_id", Value::U32(0));
    let begin = ("tokenizer.ggml.bos_token_id", Value::U32(0));
    let always = ("tokenizer.ggml.add_bos_token", Value::Bool(true));
    write_talker(&model, &[template, end.clone(), begin, always]);
    let generate =
        |options: &str| ferrozero(folder.path(), &format!("generate model.gguf --tokens 8 {options}"));
    let answered = |options: &str, prompt_tokens: usize| {
        let (text, figures) = expect_success(&generate(options));
        let figures: serde_json::Value = serde_json::from_str(figures.lines().last().unwrap()).unwrap();
        assert_eq!(figures["prompt_tokens"], prompt_tokens, "{options}");
        text
    };
    assert_eq!(
        answered("--prompt a:", 3),
        "a:ok!!!!!\n",
        "without --chat a text goes on, after its beginning"
    );
    // user=hi<|im_end|>assistant:, and nothing before it that the template has not.
    assert_eq!(answered("--chat --prompt hi", 18), "ok\n");
    assert_eq!(answered("--chat --system be --prompt hi", 28), "ok\n");
    assert_eq!(answered("--chat --prompt hi --prompt you", 37), "prompt 1:\nok\nprompt 2:\nok\n");

    let refused = |options: &str| {
        let output = generate(options);
        assert!(!output.status.success(), "{options}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused("--system be --prompt hi").contains("--chat"));
    write_talker(&model, &[("tokenizer.chat_template", Value::U32(0)), end]);
    let error = refused("--chat --prompt hi");
    assert!(
        error.contains("model.gguf") && error.contains("has none") && error.contains("--chat"),
        "{error}"
    );
}

#[test]
fn a_file_alone_is_fine_tuned_on_chats_and_its_folder_goes_on() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    write_model(&folder.path().join("model.gguf"), &[]);
    let chat = serde_json::json!({ "messages": [
        { "role": "user", "content": "one two three" },
        { "role": "assistant", "content": "four five six seven" },
    ]});
    std::fs::write(folder.path().join("chats.jsonl"), format!("{chat}\n").repeat(60)).unwrap();
    let run = |options: &str| expect_success(&ferrozero(folder.path(), options));
    let train = "--data chats.jsonl --memory 64MiB --seq 16 --accumulate 1 --lr 0.01";
    let (output, _) = run(&format!("finetune model.gguf {train} --dir run --out out"));
    let loss = |when: &str| -> f32 {
        let (_, rest) = output.split_once(&format!("validation loss at {when} ")).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(loss("last") < loss("first"), "{output}");
    let configuration = std::fs::read_to_string(folder.path().join("out/tokenizer_config.json")).unwrap();
    assert!(configuration.contains("chat_template") && configuration.contains("<|im_end|>"));
    // The folder has all that the file had.
    run(&format!("finetune out {train} --dir again --out out-again"));
    let prompts = "--prompt one --prompt two --tokens 4 --memory 64MiB";
    let (text, figures) = run(&format!("generate out {prompts}"));
    assert!(text.starts_with("prompt 1:\none") && text.contains("prompt 2:\ntwo"), "{text}");
    let figures = figures.lines().last().unwrap();
    let figures: serde_json::Value = serde_json::from_str(figures).unwrap();
    assert_eq!(figures["prompts"], 2);
    assert!(figures["tokens_per_s"].as_f64().unwrap() > 0.0);
}

/// A copy of a file whose tensors were changed.
fn with_tensors(path: &Path, change: impl Fn(&mut Vec<(String, QTensor)>)) -> PathBuf {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut tensors: Vec<_> = content
        .tensor_infos
        .keys()
        .map(|name| (name.clone(), content.tensor(&mut file, name, &Device::Cpu).unwrap()))
        .collect();
    change(&mut tensors);
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let target = path.with_file_name("changed.gguf");
    gguf_file::write(&mut File::create(&target).unwrap(), &metadata, &tensors).unwrap();
    target
}

fn vector(values: &[f32]) -> QTensor {
    QTensor::quantize(&Tensor::new(values, &Device::Cpu).unwrap(), GgmlDType::F32).unwrap()
}

/// A copy of a file with `factors` for the frequencies of a head's pairs.
fn with_factors(path: &Path, factors: &[f32]) -> PathBuf {
    with_tensors(path, |tensors| tensors.push(("rope_freqs.weight".into(), vector(factors))))
}

/// What is said of a file that is no model.
fn refusal(path: &Path) -> String {
    let opened = Pretrained::open(path, 16).and_then(|pretrained| {
        let config = Config { initial_values: Some(pretrained.weights.clone()), ..Config::default() };
        let engine = Engine::new(config)?;
        let model = pretrained.build(&engine, &Adapting::default())?;
        let tokens = Tensor::new(&[[5u32, 80]], &Device::Cpu)?;
        engine.plan(AdamW::default(), |_| model.loss(&tokens, &tokens, None)).map(drop)
    });
    opened.unwrap_err().to_string()
}

#[test]
fn a_file_that_was_cut_short_is_refused_with_the_first_tensor_that_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (path, cut) = (folder.path().join("model.gguf"), folder.path().join("cut.gguf"));
    write_model(&path, &[]);
    let bytes = std::fs::read(&path).unwrap();
    let refused = |length: usize| {
        std::fs::write(&cut, &bytes[..length]).unwrap();
        let error = Pretrained::open(&cut, 16).unwrap_err().to_string();
        assert!(error.contains("cut.gguf"), "{length} bytes: {error}");
        error
    };
    let content = gguf_file::Content::read(&mut File::open(&path).unwrap()).unwrap();
    let data = content.tensor_data_offset as usize;
    let mut ends: Vec<_> = content
        .tensor_infos
        .iter()
        .map(|(name, info)| {
            (data + info.offset as usize, data + info.offset as usize + 4 * info.shape.elem_count(), name)
        })
        .collect();
    ends.sort();
    assert_eq!(ends.len(), 11);
    for (start, end, name) in ends {
        for length in [start, start + 1, end - 1] {
            let error = refused(length);
            assert!(error.contains(&format!("needed for {name}:")), "{length} of {start} to {end}: {error}");
        }
    }
    for length in (0..data).step_by(61) {
        refused(length);
    }
}

#[test]
fn tensors_that_are_missing_left_over_or_of_another_shape_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_model(&path, &[]);
    let missing =
        refusal(&with_tensors(&path, |tensors| tensors.retain(|(name, _)| name != "blk.0.ffn_up.weight")));
    let both = "it has no model.layers.0.mlp.up_proj.weight (in the file blk.0.ffn_up.weight), which";
    assert!(missing.contains(both), "{missing}");
    let embedding =
        refusal(&with_tensors(&path, |tensors| tensors.retain(|(name, _)| name != "token_embd.weight")));
    assert!(embedding.contains("it has no token_embd.weight"), "{embedding}");
    for name in ["blk.0.attn_gate.weight", "blk.1.attn_q.weight", "adapter"] {
        let left = refusal(&with_tensors(&path, |tensors| tensors.push((name.into(), vector(&[1.0; 32])))));
        let known = match name {
            "blk.1.attn_q.weight" => {
                "model.layers.1.self_attn.q_proj.weight (in the file blk.1.attn_q.weight)"
            }
            name => name,
        };
        assert!(left.contains(&format!("it has {known}, which")), "{left}");
    }
    let shape = refusal(&with_tensors(&path, |tensors| {
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name == "output_norm.weight") {
            *tensor = vector(&[1.0; WIDTH / 2]);
        }
    }));
    assert!(
        shape.contains("model.norm.weight (in the file output_norm.weight) has the shape [8]"),
        "{shape}"
    );
}

#[test]
fn windows_are_those_that_the_metadata_tell_of() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let window = |tokens: u32| ("llama.attention.sliding_window", Value::U32(tokens));
    write_model(&path, &[]);
    let plain = logits(&path);
    // A window that holds the text is none.
    for (tokens, is_plain) in [(0, true), (16, true), (3, false)] {
        write_model(&path, &[window(tokens)]);
        assert_eq!(logits(&path) == plain, is_plain, "{tokens}");
    }
    let configuration = Pretrained::open(&path, 16).unwrap().configuration;
    assert_eq!(
        (&configuration["model_type"], &configuration["sliding_window"]),
        (&"mistral".into(), &3.into())
    );

    let pattern = |kind: &str, layers: &[bool]| {
        let layers = Value::Array(layers.iter().map(|slides| Value::Bool(*slides)).collect());
        let own = |key: &str, value: Value| (format!("{kind}.{key}"), value);
        let changes = [
            ("general.architecture".to_owned(), Value::String(kind.into())),
            own("block_count", Value::U32(2)),
            own("context_length", Value::U32(64)),
            own("embedding_length", Value::U32(WIDTH as u32)),
            own("feed_forward_length", Value::U32(24)),
            own("attention.head_count", Value::U32(2)),
            own("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            own("attention.sliding_window", Value::U32(3)),
            own("attention.sliding_window_pattern", layers),
        ];
        let changes: Vec<_> = changes.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        write_model(&path, &changes);
        Pretrained::open(&path, 16).map(|pretrained| pretrained.configuration)
    };
    let some = pattern("qwen2", &[true, false]).unwrap();
    assert_eq!(some["layer_types"], serde_json::json!(["sliding_attention", "full_attention"]));
    assert_eq!((&some["use_sliding_window"], &some["sliding_window"]), (&true.into(), &3.into()));
    assert!(pattern("qwen3", &[false, false]).unwrap()["sliding_window"].is_null());
    assert_eq!(pattern("llama", &[true, true]).unwrap()["sliding_window"], 3);
    let error = pattern("llama", &[true, false]).unwrap_err().to_string();
    assert!(
        error.contains("model.gguf") && error.contains("llama.attention.sliding_window_pattern"),
        "{error}"
    );
}

/// Logits of the token after a text.
fn logits(path: &Path) -> Vec<f32> {
    let pretrained = Pretrained::open(path, 16).unwrap();
    let config = Config { initial_values: Some(pretrained.weights.clone()), ..Config::default() };
    let engine = Engine::new(config).unwrap();
    let model = pretrained.build(&engine, &Adapting::default()).unwrap();
    let tokens = Tensor::new(&[[5u32, 80, 81, 7, 9, 33, 12, 60]], &Device::Cpu).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&tokens, &tokens, None)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    let logits = trainer.evaluate(|| model.next_logits(&tokens)).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn frequencies_are_divided_by_the_factors_that_a_file_carries() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let linear = ("llama.rope.scaling.type", Value::String("linear".into()));
    write_model(&path, &[linear.clone(), ("llama.rope.scaling.factor", Value::F32(4.0))]);
    let stretched = logits(&path);
    let error = Pretrained::open(&with_factors(&path, &[4.0; 4]), 16).unwrap_err().to_string();
    assert!(error.contains("changed.gguf") && error.contains("rope.scaling.type"), "{error}");

    write_model(&path, &[]);
    let plain = logits(&path);
    assert_ne!(plain, stretched);
    assert_eq!(logits(&with_factors(&path, &[1.0; 4])), plain);
    assert_eq!(logits(&with_factors(&path, &[4.0; 4])), stretched);
    let in_part = logits(&with_factors(&path, &[1.0, 1.0, 2.0, 4.0]));
    assert!(in_part != plain && in_part != stretched);

    let refused =
        |factors: &[f32]| Pretrained::open(&with_factors(&path, factors), 16).unwrap_err().to_string();
    assert!(refused(&[1.0; 3]).contains("3 factors of angles for the 4 pairs"));
    assert!(refused(&[1.0, 0.0, 1.0, 1.0]).contains("must be a list of numbers above 0"));
}
