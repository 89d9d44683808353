//! `ferrozero finetune` from outside: what it writes is what transformers and PEFT read, and adapters leave
//! the weights as they were.

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A tiny model with a tokenizer of 90 words, and a text of which every word follows from the one before.
fn model_and_text(folder: &Path) {
    model_of("llama", folder);
}

fn model_of(family: &str, folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pretrained").join(family);
    let model = folder.join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), model.join(name)).unwrap();
    }
    let words: BTreeMap<String, usize> = (0..90).map(|word| (format!("w{word}"), word)).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" },
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let text: Vec<String> = (0..3000).map(|position| format!("w{}", position % 90)).collect();
    std::fs::write(folder.join("text.txt"), text.join(" ")).unwrap();
}

const FIXED: &str =
    "finetune model --data text.txt --memory 64MiB --seq 16 --batch 2 --accumulate 1 --lr 0.01";

fn finetune(folder: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder).args(FIXED.split(' ')).args(options).output().unwrap()
}

fn expect_success(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

/// Tensors of a file in f32, by name, with their shapes.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |view: &safetensors::tensor::TensorView| match view.dtype() {
        safetensors::Dtype::F32 => {
            view.data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
        }
        _ => view
            .data()
            .chunks_exact(2)
            .map(|pair| half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32())
            .collect(),
    };
    file.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), numbers(&view)))).collect()
}

fn losses(output: &str) -> Vec<f32> {
    let found =
        output.lines().filter_map(|line| line.split_once("loss ")?.1.split_whitespace().next()?.parse().ok());
    found.collect()
}

#[test]
fn adapters_are_trained_beside_frozen_weights_and_written_as_peft_reads_them() {
    adapters_of("llama", "q_proj,down_proj", false);
}

/// Its matrices lie as the transposes of what is trained; of two layers of one name, one has an adapter.
#[test]
fn adapters_of_gpt2_are_those_of_layers_that_lie_transposed() {
    adapters_of("gpt2", "c_attn,mlp.c_proj", true);
}

/// Two layers of each of two blocks have adapters.
fn adapters_of(family: &str, targets: &str, transposed: bool) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_of(family, folder.path());
    let lora = ["--lora-rank", "4", "--lora-alpha", "8", "--lora-targets", targets];
    let run = |options: &[&str]| expect_success(&finetune(folder.path(), &[&lora, options].concat()));
    let output = run(&["--out", "adapters", "--dir", "run"]);
    let steps = losses(&output);
    assert!(steps[steps.len() - 2] < steps[1], "{output}");
    run(&["--out", "merged", "--dir", "run-merged", "--lora-merge"]);

    let adapters = tensors(&folder.path().join("adapters/adapter_model.safetensors"));
    let before = tensors(&folder.path().join("model/model.safetensors"));
    let after = tensors(&folder.path().join("merged/model.safetensors"));
    assert_eq!(adapters.len(), 2 * 2 * 2, "two matrices for two layers of two blocks");
    assert!(before.keys().eq(after.keys()));
    let mut changed = 0;
    for (name, (shape, old)) in &before {
        let adapter = |part: &str| {
            let layer = name.strip_suffix("weight")?;
            adapters.get(&format!("base_model.model.{layer}lora_{part}.weight"))
        };
        let (Some((a_shape, a)), Some((b_shape, b))) = (adapter("A"), adapter("B")) else {
            assert_eq!(&after[name].1, old, "{name} is frozen");
            continue;
        };
        changed += 1;
        let (outputs, inputs) = if transposed { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
        assert_eq!(
            (a_shape.as_slice(), b_shape.as_slice()),
            ([4, inputs].as_slice(), [outputs, 4].as_slice())
        );
        for (index, (old, new)) in old.iter().zip(&after[name].1).enumerate() {
            let (row, column) = (index / shape[1], index % shape[1]);
            let (output, input) = if transposed { (column, row) } else { (row, column) };
            let product: f32 = (0..4).map(|rank| b[4 * output + rank] * a[rank * inputs + input]).sum();
            assert!((old + 2.0 * product - new).abs() < 1e-6, "{name}[{row}, {column}]");
        }
        assert!(b.iter().any(|&value| value != 0.0), "{name} was not trained");
    }
    assert_eq!(changed, 4);
    let configuration = std::fs::read_to_string(folder.path().join("adapters/adapter_config.json")).unwrap();
    let configuration: Value = serde_json::from_str(&configuration).unwrap();
    assert_eq!((&configuration["r"], &configuration["peft_type"]), (&4.into(), &"LORA".into()));
    assert_eq!(configuration["fan_in_fan_out"], transposed);
    assert_eq!(configuration["target_modules"], serde_json::json!(targets.split(',').collect::<Vec<_>>()));
}

#[test]
fn a_target_that_is_misspelled_is_named_with_those_that_there_are() {
    for (family, layers) in
        [("llama", ["self_attn.q_proj", "mlp.down_proj"]), ("gpt2", ["attn.c_attn", "mlp.c_proj"])]
    {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        model_of(family, folder.path());
        let [right, other] = layers;
        let refused = |targets: &str| {
            let output =
                finetune(folder.path(), &["--out", "out", "--lora-rank", "4", "--lora-targets", targets]);
            assert!(!output.status.success(), "{targets}");
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        // Neither hidden by one that is right, nor found within a name.
        for wrong in ["v_porj", "proj"] {
            let error = refused(&format!("{right},{wrong}"));
            assert!(error.contains(&format!("ends with {wrong};")) && error.contains(other), "{error}");
        }
        assert!(!folder.path().join("out").exists());
    }
}

/// Also GPT-2's matrices, which lie there as the transposes of what is trained.
#[test]
fn a_model_that_learnt_nothing_is_written_as_it_was() {
    for family in ["llama", "gpt2"] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        model_of(family, folder.path());
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        let arguments = FIXED.replace("--lr 0.01", "--lr 0 --epochs 0.05 --out out");
        expect_success(&command.current_dir(folder.path()).args(arguments.split(' ')).output().unwrap());
        let [before, after] =
            ["model", "out"].map(|name| tensors(&folder.path().join(name).join("model.safetensors")));
        assert!(before == after, "{family}");
        // Else transformers takes GPT-2's own class, which finds no tokens in a vocabulary of words.
        let written = std::fs::read_to_string(folder.path().join("out/tokenizer_config.json")).unwrap();
        let written: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(written["tokenizer_class"], "PreTrainedTokenizerFast", "{family}");
    }
}

/// The objects that a run wrote, the last of which is the summary.
fn objects(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_step_is_an_object_the_last_one_is_the_summary_and_a_timeline_has_every_operation() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_and_text(folder.path());
    let options = ["--out", "out", "--epochs", "0.1", "--eval-every", "3", "--json", "--trace", "trace.json"];
    let output = finetune(folder.path(), &options);
    let objects = objects(&expect_success(&output));
    let (summary, steps) = objects.split_last().unwrap();
    assert!(steps.len() > 4);
    for (step, number) in steps.iter().zip(1..) {
        assert_eq!((&step["record"], &step["step"]), (&"step".into(), &number.into()));
        for key in ["loss", "tokens_per_s", "step_s", "exposed_stall", "lr", "grad_norm"] {
            assert!(step[key].as_f64().unwrap() >= 0.0, "{key}: {step}");
        }
        let evaluated = number % 3 == 0 && number < steps.len();
        assert_eq!(step["validation_loss"].is_number(), evaluated, "{step}");
    }
    assert_eq!((&summary["record"], &summary["step"]), (&"summary".into(), &steps.len().into()));
    assert!(summary["validation_loss"].is_number());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("master parameter") && said.contains("validation loss at last"), "{said}");
    let trace = std::fs::read_to_string(folder.path().join("trace.json")).unwrap();
    let events: Vec<Value> = serde_json::from_str(&trace).unwrap();
    let count = |operation: &str| events.iter().filter(|event| event["name"] == operation).count();
    assert!(
        count("update") >= steps.len() && count("commit") > 0,
        "{}, {}",
        count("update"),
        count("commit")
    );
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_weights_of_one_that_was_not() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_and_text(folder.path());
    // The objects of so many steps are more than a pipe holds: a run whose output is not read cannot end
    // before it is stopped.
    let long = ["--json", "--epochs", "4"];
    let run =
        |options: &[&str]| objects(&expect_success(&finetune(folder.path(), &[&long, options].concat())));
    let whole = run(&["--out", "whole", "--dir", "run-whole"]);
    let whole = whole.last().unwrap();

    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
    command.current_dir(folder.path()).args(FIXED.split(' ')).args(long);
    command.args(["--out", "part", "--dir", "run"]).stderr(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    // As Ctrl-C does.
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let last = lines.map(Result::unwrap).last().unwrap();
    assert!(child.wait().unwrap().success(), "{last}");
    let stopped: Value = serde_json::from_str(&last).unwrap();
    assert!(stopped["step"].as_u64() < whole["step"].as_u64(), "{stopped}");

    let resumed = run(&["--out", "part", "--dir", "run", "--resume"]);
    assert_eq!(resumed[0]["step"], stopped["step"].as_u64().unwrap() + 1);
    assert_eq!(resumed.last().unwrap()["weights_digest"], whole["weights_digest"]);
    let [part, whole] = ["part", "whole"].map(|out| folder.path().join(out).join("model.safetensors"));
    let bytes = std::fs::read(&part).unwrap();
    assert_eq!(bytes, std::fs::read(whole).unwrap());
    // Without it, transformers does not load a file.
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

/// Options of `train` that have nothing to do with its own model, its own data or its sample.
#[test]
fn the_options_of_train_are_there_and_a_file_has_them_too() {
    let help = |command: &str| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        String::from_utf8(program.args([command, "--help"]).output().unwrap().stdout).unwrap()
    };
    let (train, finetune) = (help("train"), help("finetune"));
    let options = |help: &str| -> Vec<String> {
        let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
        let names = lines.filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")));
        names.map(str::to_owned).collect()
    };
    let of_finetune = options(&finetune);
    let missing: Vec<_> =
        options(&train).into_iter().filter(|option| !of_finetune.contains(option)).collect();
    assert_eq!(missing, ["--layers", "--hidden", "--heads", "--sample"]);
    assert!(train.contains("[default: 384MiB]") && finetune.contains("[default: 2GiB]"), "{finetune}");

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_and_text(folder.path());
    let config = "data = 'text.txt'\nout = 'out'\nseq = 16\nsteps = 9\nlr = 0.01\nmemory = '64MiB'\n\
                  dir = 'run'\nstripe = ['other']\nthreads = 1\naccumulate = 1\nwarmup = 2\n";
    std::fs::write(folder.path().join("finetune.toml"), config).unwrap();
    let run = |options: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        let options = format!("finetune model --config finetune.toml --json {options}");
        command.current_dir(folder.path()).args(options.split(' ')).output().unwrap()
    };
    let steps = objects(&expect_success(&run("--steps 4")));
    assert_eq!(steps.len(), 5, "the command line is over the file");
    // The second of two steps of warming up has the highest rate.
    assert_eq!((&steps[0]["lr"], &steps[1]["lr"]), (&0.005.into(), &0.01.into()));
    assert!(folder.path().join("other/stripe.json").exists(), "states are on both disks");
    // Of a run that goes on, its own settings are under those of the file.
    std::fs::write(folder.path().join("finetune.toml"), "dir = 'run'\n").unwrap();
    assert_eq!(objects(&expect_success(&run("--resume --steps 6")))[0]["step"], 5);
    std::fs::write(folder.path().join("finetune.toml"), "layers = 2\n").unwrap();
    let error = String::from_utf8(run("--data text.txt --out out").stderr).unwrap();
    assert!(error.contains("finetune.toml") && error.contains("unknown field `layers`"), "{error}");
}

#[test]
fn evaluations_without_a_better_one_are_counted_over_a_resume() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_and_text(folder.path());
    // Without learning no evaluation is better than the first.
    let run = |options: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        let fixed = FIXED.replace("--lr 0.01", "--lr 0 --eval-every 2 --patience 3 --json --out out");
        let arguments = format!("{fixed} {options}");
        let output = command.current_dir(folder.path()).args(arguments.split(' ')).output().unwrap();
        objects(&expect_success(&output))
    };
    let last = |objects: Vec<Value>| objects.last().unwrap()["step"].as_u64().unwrap();
    assert_eq!(last(run("--dir whole --steps 20")), 6);
    assert_eq!(last(run("--dir parts --steps 5")), 5, "two evaluations");
    assert_eq!(last(run("--dir parts --steps 20 --resume")), 6, "the third");
    assert_eq!(last(run("--dir parts --steps 20 --resume")), 6, "nothing is left to do");
    assert_eq!(last(run("--dir parts --steps 20 --resume --patience 4")), 8);
}

#[test]
fn chats_need_a_template_and_the_line_that_is_wrong_is_named() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    model_and_text(folder.path());
    let refused = |line: &str| {
        std::fs::write(folder.path().join("text.jsonl"), format!("{{\"text\": \"w1\"}}\n{line}\n")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrozero"));
        let arguments = FIXED.replace("text.txt", "text.jsonl");
        let output =
            command.current_dir(folder.path()).args(arguments.split(' ')).args(["--out", "out"]).output();
        let output = output.unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let chat = r#"{"messages": [{"role": "user", "content": "w1"}]}"#;
    let error = refused(chat);
    assert!(error.contains("line 2") && error.contains("template"), "{error}");
    std::fs::write(
        folder.path().join("model/chat_template.jinja"),
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    .unwrap();
    let error = refused(chat);
    assert!(error.contains("line 2") && error.contains("assistant"), "{error}");
    let error = refused("{\"text\": ");
    assert!(error.contains("line 2"), "{error}");
}
