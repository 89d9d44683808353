//! The plan is a promise: peaks are never above it, and what cannot fit is refused before anything large is allocated.

mod support;

use candle_core::Tensor;
use candle_nn::Init;
use ferrozero::internals::models::cache::{LayerCache, scores_bytes};
use ferrozero::internals::models::linear::Adapting;
use ferrozero::internals::models::pretrained::Pretrained;
use ferrozero::{
    AdamW, BackendChoice, Checkpoint, Config, CountingAllocator, Engine, Error, Placement, Tier,
};
use ferrozero_offload::memory;
use safetensors::SafeTensors;
use std::path::Path;
use std::process::Command;
use support::{engine_model, machine, tokens, train, trainer};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const BLOCKS: usize = 24;

/// One test, because the allocator counts for the whole process.
#[test]
fn peaks_stay_within_the_plan_and_less_is_refused() {
    for placement in [Placement::Auto, Placement::All(Tier::Host), Placement::All(Tier::Device)] {
        for (clip, accumulate, boundaries) in [(None, 1, None), (Some(1.0), 2, Some(Tier::Disk))] {
            within_the_plan(placement.clone(), clip, accumulate, boundaries);
        }
    }
    for boundaries in [Tier::Device, Tier::Host, Tier::Disk] {
        for (clip, vertical, kept) in [
            (None, 1, 0),
            (None, 4, 0),
            (Some(1.0), 3, 0),
            (None, 1, 1),
            (Some(1.0), 1, 5),
            (None, 4, 1),
            (None, 3, 8),
        ] {
            activations_within_the_plan(clip, (vertical, kept), boundaries);
        }
    }
    too_little_is_refused();
    more_memory_brings_more_home();
    an_export_has_no_parameter_in_memory_as_a_whole();
    what_a_fine_tune_writes_has_no_matrix_in_memory_as_a_whole();
    an_import_has_a_piece_in_memory();
    a_long_prompt_has_the_scores_of_some_rows_in_memory();
}

fn config(memory_bytes: Option<u64>) -> Config {
    let backend = BackendChoice::Pool;
    let directory = Some(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap().keep());
    // A described machine, so that what other programs do meanwhile chooses no plan.
    let machine = Some(machine());
    Config { memory_bytes, piece_bytes: Some(16384), backend, directory, machine, ..Config::default() }
}

fn clean(config: &Config) {
    std::fs::remove_dir_all(config.directory.as_ref().unwrap()).unwrap();
}

fn within_the_plan(placement: Placement, clip: Option<f64>, accumulate: usize, boundaries: Option<Tier>) {
    let memory_bytes = Some(32 << 20);
    let config = Config { placement, clip, accumulate, boundaries, ..config(memory_bytes) };
    let (mut trainer, model) = trainer(config.clone(), BLOCKS).unwrap();
    for step in 0..4 {
        trainer.step(|micro_batch| model.loss(&tokens(step, micro_batch))).unwrap();
        trainer.evaluate(|| model.loss(&tokens(9, 0))).unwrap();
    }
    let usage = trainer.usage();
    assert!(usage.peak_device_bytes > 0 && usage.peak_host_bytes > 0);
    assert!(usage.peak_device_bytes <= usage.planned_device_bytes, "{config:?}: {usage:?}");
    assert!(usage.peak_host_bytes <= usage.planned_host_bytes, "{config:?}: {usage:?}");
    assert!(usage.planned_host_bytes + usage.planned_device_bytes <= 32 << 20, "{config:?}: {usage:?}");
    drop(trainer);
    clean(&config);
}

/// Activations that are most of what is planned, of micro-batches that run vertically and segments whose graphs are kept.
fn activations_within_the_plan(clip: Option<f64>, (vertical, kept): (usize, usize), boundaries: Tier) {
    let config = Config {
        placement: Placement::All(Tier::Disk),
        clip,
        accumulate: 4,
        vertical: Some(vertical),
        kept: Some(kept),
        boundaries: Some(boundaries),
        piece_bytes: Some(64 << 10),
        ..config(None)
    };
    let engine = Engine::new(config.clone()).unwrap();
    let model = engine_model(&engine, 8).unwrap();
    let long = Tensor::cat(&(0..16).map(|part| tokens(part, 0)).collect::<Vec<_>>(), 0).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&long)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    for _ in 0..2 {
        trainer.step(|_| model.loss(&long)).unwrap();
    }
    let usage = trainer.usage();
    println!("{clip:?}, {vertical} vertical, {kept} kept, boundaries on {boundaries}: {usage:?}");
    assert!(usage.peak_device_bytes <= usage.planned_device_bytes, "{config:?}: {usage:?}");
    assert!(usage.peak_host_bytes <= usage.planned_host_bytes, "{config:?}: {usage:?}");
    assert!(2 * usage.peak_device_bytes > usage.planned_device_bytes, "{config:?}: {usage:?}");
    drop(trainer);
    clean(&config);
}

fn too_little_is_refused() {
    let small = config(Some(1 << 20));
    let error = trainer(small.clone(), BLOCKS).map(drop).unwrap_err();
    let Error::BudgetTooSmall { least_bytes, ref culprit, .. } = error else { panic!("{error}") };
    assert!(culprit.contains("h.0"), "{culprit}");
    assert_eq!(std::fs::read_dir(small.directory.as_ref().unwrap()).unwrap().count(), 0, "nothing was made");
    clean(&small);
    let least = config(Some(least_bytes));
    train(least.clone(), BLOCKS, 1).unwrap();
    clean(&least);
    let device = Config { device_memory_bytes: Some(1 << 20), ..config(None) };
    let error = trainer(device.clone(), BLOCKS).map(drop).unwrap_err();
    assert!(matches!(error, Error::BudgetTooSmall { tier: Tier::Device, .. }), "{error}");
    clean(&device);
}

fn more_memory_brings_more_home() {
    let small = config(Some(1 << 20));
    let error = trainer(small.clone(), BLOCKS).map(drop).unwrap_err();
    let Error::BudgetTooSmall { least_bytes, .. } = error else { panic!("{error}") };
    clean(&small);
    let on_disk = [least_bytes, least_bytes + (2 << 20), 32 << 20].map(|memory_bytes| {
        let config = config(Some(memory_bytes));
        let (trainer, _) = trainer(config.clone(), BLOCKS).unwrap();
        clean(&config);
        trainer.plan().disk_home_bytes()
    });
    assert!(on_disk[0] > on_disk[1] && on_disk[1] > on_disk[2], "{on_disk:?}");
    assert_eq!(on_disk[2], 0);
}

/// From a run and from its checkpoint, which write the same file.
fn an_export_has_no_parameter_in_memory_as_a_whole() {
    const SIDE: usize = 1024;
    let config = config(None);
    let engine = Engine::new(config.clone()).unwrap();
    let init = Init::Randn { mean: 0.0, stdev: 1.0 };
    let weight = engine.var_builder().get_with_hints((SIDE, SIDE), "weight", init).unwrap();
    let plan = engine.plan(AdamW::default(), |_| weight.sqr()?.mean_all()).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    trainer.commit(serde_json::Value::Null).unwrap();
    let directory = config.directory.as_ref().unwrap();
    let exported = |name: &str, export: &dyn Fn(&Path) -> ferrozero::Result<()>| {
        let path = directory.join(name);
        let (written, taken) = taken_bytes(|| export(&path));
        written.unwrap();
        assert!(taken < (4 * SIDE * SIDE / 2) as u64, "{name}: {taken} bytes");
        std::fs::read(path).unwrap()
    };
    let of_run = exported("run.safetensors", &|path| trainer.export_safetensors(path));
    drop(trainer);
    let checkpoint = Checkpoint::open(directory).unwrap();
    let of_checkpoint = exported("checkpoint.safetensors", &|path| checkpoint.export_safetensors(path));
    assert!(of_run == of_checkpoint);
    let file = SafeTensors::deserialize(&of_run).unwrap();
    let values = checkpoint.parameter("weight").unwrap();
    assert_eq!(file.tensor("weight").unwrap().shape(), [SIDE, SIDE]);
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    assert!(file.tensor("weight").unwrap().data().iter().copied().eq(bytes));
    clean(&config);
}

/// What a call takes at most beside what was there.
fn taken_bytes<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let before = memory::current_bytes();
    memory::reset_peak();
    let result = run();
    (result, memory::peak_bytes() - before)
}

/// Merged, and of GPT-2, whose matrices lie in the file as transposes.
fn what_a_fine_tune_writes_has_no_matrix_in_memory_as_a_whole() {
    const WIDTH: usize = 1024;
    let matrix_bytes = (4 * WIDTH * 4 * WIDTH) as u64;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let configuration = serde_json::json!({
        "model_type": "gpt2", "vocab_size": 64, "n_layer": 1, "n_embd": WIDTH, "n_head": 8, "n_positions": 16
    });
    std::fs::write(folder.path().join("config.json"), configuration.to_string()).unwrap();
    write_gpt2(WIDTH, &folder.path().join("model.safetensors"));

    let pretrained = Pretrained::open(folder.path(), 16).unwrap();
    let adapting = pretrained.adapting(4, 8.0, &[]).unwrap();
    let config = Config {
        initial_values: Some(pretrained.weights.clone()),
        placement: Placement::All(Tier::Disk),
        piece_bytes: Some(128 << 10),
        ..config(None)
    };
    let engine = Engine::new(config.clone()).unwrap();
    engine.freeze(|name, _| !Adapting::is_adapter(name)).unwrap();
    let model = pretrained.build(&engine, &adapting).unwrap();
    let tokens = Tensor::arange(0u32, 16, &candle_core::Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let loss = || model.loss(&tokens, &tokens, None);
    let plan = engine.plan(AdamW::default(), |_| loss()).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    trainer.step(|_| loss()).unwrap();
    // Beside the plan are a strip of a matrix, in rows and as it is put, and what adapters have.
    for (name, adapting) in [("merged", &adapting), ("plain", &Adapting::default())] {
        let path = folder.path().join(name);
        let (written, taken) = taken_bytes(|| pretrained.export_safetensors(&trainer, adapting, &path));
        written.unwrap();
        println!("{name}: {taken} bytes beside the plan");
        assert!(taken < matrix_bytes / 2, "{name}: {taken} bytes of a matrix of {matrix_bytes}");
    }
    let [before, merged, plain] = ["model.safetensors", "merged", "plain"].map(|name| {
        let bytes = std::fs::read(folder.path().join(name)).unwrap();
        let tensor = "transformer.h.0.mlp.c_fc.weight";
        let (shape, data) = {
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let view = file.tensor(tensor).unwrap();
            (view.shape().to_vec(), view.data().to_vec())
        };
        assert_eq!(shape, [WIDTH, 4 * WIDTH]);
        data
    });
    assert!(plain == before && merged != before, "adapters are in the merged one alone");
    let usage = trainer.usage();
    assert!(usage.peak_host_bytes <= usage.planned_host_bytes, "{usage:?}");
    drop(trainer);
    clean(&config);
}

/// A model of one block, each of whose numbers tells its place.
fn write_gpt2(width: usize, path: &Path) {
    let norm = |name: &str| [(format!("{name}.weight"), vec![width]), (format!("{name}.bias"), vec![width])];
    let linear = |name: &str, inputs: usize, outputs: usize| {
        [(format!("{name}.weight"), vec![inputs, outputs]), (format!("{name}.bias"), vec![outputs])]
    };
    let all = [
        [("wte.weight".to_owned(), vec![64, width]), ("wpe.weight".to_owned(), vec![16, width])],
        norm("h.0.ln_1"),
        linear("h.0.attn.c_attn", width, 3 * width),
        linear("h.0.attn.c_proj", width, width),
        norm("h.0.ln_2"),
        linear("h.0.mlp.c_fc", width, 4 * width),
        linear("h.0.mlp.c_proj", 4 * width, width),
        norm("ln_f"),
    ];
    let tensors = all.into_iter().flatten().map(|(name, shape)| {
        let count = shape.iter().product::<usize>();
        let values = (0..count).flat_map(|i| (((i * 31) % 1009) as f32 * 1e-5).to_le_bytes());
        (format!("transformer.{name}"), shape, values.collect::<Vec<u8>>())
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn an_import_has_a_piece_in_memory() {
    const SIDE: usize = 4096;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes: Vec<u8> = (0..SIDE * SIDE).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![SIDE, SIDE], &bytes).unwrap();
    safetensors::serialize_to_file([("weight", view)], None, &path).unwrap();
    let run = folder.path().join("run");
    let (imported, taken) = taken_bytes(|| ferrozero::import_safetensors(&path, &run));
    imported.unwrap();
    assert!(taken < (bytes.len() / 4) as u64, "{taken} bytes");
    let values = Checkpoint::open(&run).unwrap().parameter("weight").unwrap();
    assert!(values.iter().enumerate().all(|(i, value)| *value == i as f32));
}

fn a_long_prompt_has_the_scores_of_some_rows_in_memory() {
    let (heads, tokens, width) = (8, 2048, 8);
    let xs =
        Tensor::ones((1, heads, tokens, width), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let xs_bytes = (4 * heads * tokens * width) as u64;
    let granted = scores_bytes(heads, tokens) + 4 * xs_bytes;
    assert!(granted < (4 * heads * tokens * tokens) as u64 / 4, "less than whole scores");
    let mut cache = LayerCache::default();
    let (attended, taken) = taken_bytes(|| cache.attend(&xs, &xs, &xs, None));
    assert_eq!(attended.unwrap().dims(), [1, tokens, heads * width]);
    assert!(taken <= granted, "{taken} bytes of {granted}");
}

/// The most that a process had at once, as the kernel counts it, for each home of the states.
#[test]
fn a_process_takes_its_plan_and_at_most_5_percent_and_64_mib_more() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for homes in [["disk", "device"], ["host", "disk"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_ferrozero"))
            .args(["bench", "step", "--rounds", "1", "--layers", "4", "--hidden", "512", "--heads", "8"])
            .args(["--vocab", "2048", "--seq", "64", "--batch", "1", "--clip", "1", "--json"])
            .args(["--placement", homes[0], "--against", homes[1], "--dir"])
            .arg(folder.path().join("bench"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        for measured in answer["measured"].as_array().unwrap() {
            let bytes = |name: &str| measured[name].as_u64().unwrap();
            let planned = bytes("planned_host_bytes") + bytes("planned_device_bytes");
            let peak = bytes("peak_resident_bytes");
            println!("{}: {} MiB planned, {} MiB at most", measured["placement"], planned >> 20, peak >> 20);
            assert!(peak <= planned + planned / 20 + (64 << 20), "{measured}");
        }
    }
}

/// The process as a whole, as the kernel counts it: code, stacks, queues and page cache included.
#[test]
fn a_process_stays_within_its_memory_and_64_mib() {
    const MEMORY: u64 = 256 << 20;
    let group = format!("/sys/fs/cgroup/memory/ferrozero-test-{}", std::process::id());
    if std::fs::create_dir(&group).is_err() {
        println!("skipped: no memory cgroup can be made here (it needs root and cgroup v1)");
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let data = folder.path().join("data.txt");
    std::fs::write(&data, "All work and no play makes Jack a dull boy.\n".repeat(5000)).unwrap();
    std::fs::write(format!("{group}/memory.limit_in_bytes"), (MEMORY + (64 << 20)).to_string()).unwrap();
    let run = folder.path().join("run");
    let train = format!(
        "echo $$ > {group}/cgroup.procs && exec {} train --memory 256MiB --steps 2 --layers 8 --warmup 1 --sample 0 \
         --seq 64 --batch 2 --accumulate 4 --data {} --dir {} --json",
        env!("CARGO_BIN_EXE_ferrozero"),
        data.display(),
        run.display()
    );
    let output = Command::new("sh").args(["-c", &train]).output().unwrap();
    let failures = std::fs::read_to_string(format!("{group}/memory.failcnt")).unwrap();
    let oom = std::fs::read_to_string(format!("{group}/memory.oom_control")).unwrap();
    std::fs::remove_dir(&group).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{oom}");
    assert!(errors.contains("master parameter"), "the plan was printed");
    // Reclaiming clean page cache counts as failures to charge; being killed would have failed above.
    println!("charges that had to reclaim first: {}", failures.trim());
    let last = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    let summary: serde_json::Value = serde_json::from_str(&last).unwrap();
    let bytes = |name: &str| summary[name].as_u64().unwrap();
    assert!(bytes("peak_host_bytes") <= bytes("planned_host_bytes"));
    assert!(bytes("peak_device_bytes") <= bytes("planned_device_bytes"));
    assert!(bytes("planned_host_bytes") + bytes("planned_device_bytes") <= MEMORY);
}
