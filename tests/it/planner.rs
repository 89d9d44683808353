//! Plans of models that do not exist: they keep to every limit, they are as published systems found, and what
//! is better makes nothing slower.

use ferrozero::internals::estimate::model_shape::ModelShape;
use ferrozero::internals::estimate::question::{Answer, Question};
use ferrozero::internals::planner::catalog::{DRIVES, Description, GPUS};
use ferrozero::internals::planner::machine::Machine;
use ferrozero::internals::schedule::buffer_plan::Depths;
use ferrozero::{Choices, Error, Placement, Products, Tier, Updates};

const GIB: u64 = 1 << 30;

/// A step of one micro-batch of `batch` sequences of `sequence` tokens, with clipping, on a described
/// machine.
fn question(shape: ModelShape, batch: usize, sequence: usize, machine: Machine) -> Question {
    let choices = Choices::default();
    Question {
        shape,
        batch,
        sequence,
        accumulate: 1,
        clip: true,
        in_place: false,
        ranks: 1,
        machine,
        products: Products::F32,
        choices,
    }
}

fn described(device: &str, host_gib: u64, drive: Option<&str>) -> Machine {
    let description = Description {
        device: device.into(),
        host_memory_bytes: Some(host_gib * GIB),
        drive: drive.map(str::to_owned),
        ..Description::default()
    };
    description.machine().unwrap()
}

/// A small machine without a GPU.
fn processor(memory_bytes: u64) -> Machine {
    Machine {
        host_memory_bytes: Some(memory_bytes),
        disk_read_bytes_per_s: 2e9,
        disk_write_bytes_per_s: 2e9,
        upload_bytes_per_s: 8e9,
        download_bytes_per_s: 8e9,
        optimizer_bytes_per_s: 20e9,
        matmul_f32_flop_per_s: Some(1e11),
        ..Machine::default()
    }
}

fn keeps_to_limits(answer: &Answer, machine: &Machine) {
    let device_bytes = answer.plan.device_bytes();
    let host_bytes = answer.plan.host_bytes();
    match machine.device_memory_bytes {
        Some(limit) => assert!(device_bytes <= limit && host_bytes <= machine.host_memory_bytes.unwrap()),
        None => assert!(device_bytes + host_bytes <= machine.host_memory_bytes.unwrap()),
    }
    if let Some(limit) = machine.disk_bytes {
        assert!(answer.disk_bytes <= limit);
    }
}

/// ZeRO-Offload trains 13 billion parameters on one V100 of 32 GB (arXiv 2101.06840, abstract: measured on a
/// DGX-2, of which one GPU is used, with 1.5 TB of host memory; table 3: 40 layers of width 5120... at 1024
/// tokens).
#[test]
fn zero_offload_13b_on_one_v100_fits_and_does_not_without_the_host() {
    let shape = ModelShape::named("gpt3-13b", 1024).unwrap();
    let machine = described("v100-32g", 1500, None);
    let answer = question(shape.clone(), 1, 1024, machine.clone()).answer().unwrap();
    keeps_to_limits(&answer, &machine);
    assert!(answer.plan.host_bytes() > 150 * GIB, "states are in host memory");
    // 16 bytes a parameter are 208 GB: neither the GPU nor a workstation of 128 GiB without a disk holds
    // them.
    let workstation = described("v100-32g", 128, None);
    let refused = question(shape.clone(), 1, 1024, workstation).answer().unwrap_err();
    assert!(matches!(refused, Error::BudgetTooSmall { tier: Tier::Host, .. }), "{refused}");
    let with_disk = described("v100-32g", 128, Some("nvme-gen3"));
    keeps_to_limits(&question(shape, 1, 1024, with_disk.clone()).answer().unwrap(), &with_disk);
}

/// ZeRO-Infinity trains a trillion parameters on one DGX-2 (arXiv 2104.07857, abstract and table 1: 128
/// layers, width 25600): 16 V100 of 32 GB, 1.5 TB of host memory, 8 NVMe drives of 3.84 TB (NVIDIA's DGX-2
/// data sheet). One of its 16 ranks has a sixteenth of memory, drives and their bandwidth, which the paper
/// gives as 25 GB/s. It gathers parameters by the matrix, so blocks are split here too.
#[test]
fn zero_infinity_1t_on_one_node_fits_with_its_drives_and_not_without() {
    let mut shape = ModelShape::named("gpt-1t", 1024).unwrap();
    shape.segments_per_block = 4;
    let share = |drive| {
        let mut machine = described("v100-32g", 1500 / 16, drive);
        machine.disk_bytes = machine.disk_bytes.or(Some(8 * 3_840_000_000_000 / 16));
        machine
    };
    let rank = |machine: &Machine| {
        let question = question(shape.clone(), 1, 1024, machine.clone());
        Question { ranks: 16, ..question }
    };
    let with_drives = share(Some("1562MB/s"));
    keeps_to_limits(&rank(&with_drives).answer().unwrap(), &with_drives);
    let without = rank(&share(None)).answer().unwrap_err();
    assert!(matches!(without, Error::BudgetTooSmall { tier: Tier::Host, .. }), "{without}");
    // One GPU with all the memory of the node, but 24 TB of states twice and gradients on 30 TB of drives.
    let alone = described("v100-32g", 1500, Some("25GB/s"));
    let alone = Machine { disk_bytes: Some(8 * 3_840_000_000_000), ..alone };
    let answer = question(shape, 1, 1024, alone.clone()).answer().unwrap();
    keeps_to_limits(&answer, &alone);
    assert!(answer.disk_bytes > 27_000_000_000_000);
}

/// Fuyou, later LoHan, fine-tunes 175 billion parameters on one RTX 4090 of 24 GB with 256 GB of host memory
/// and drives (arXiv 2403.06504, abstract), and says that host memory of that size is too small without them.
#[test]
fn fine_tuning_175b_on_a_24_gb_card_with_256_gb_fits_with_drives_and_not_without() {
    let shape = ModelShape::named("gpt3-175b", 1024).unwrap();
    let with_drives = described("rtx4090-24g", 256, Some("nvme-gen4"));
    let answer = question(shape.clone(), 1, 1024, with_drives.clone()).answer().unwrap();
    keeps_to_limits(&answer, &with_drives);
    assert!(answer.plan.uses_disk() && answer.forecast.written_bytes > 0);
    let without = question(shape, 1, 1024, described("rtx4090-24g", 256, None)).answer().unwrap_err();
    assert!(matches!(without, Error::BudgetTooSmall { tier: Tier::Host, .. }), "{without}");
}

#[test]
fn more_memory_and_faster_parts_make_nothing_slower() {
    let shape = ModelShape::gpt(256, 6, 256, 4, 64);
    let step_s = |machine: Machine| question(shape.clone(), 2, 64, machine).answer().unwrap().forecast.step_s;
    let small = processor(64 << 20);
    let base = step_s(small.clone());
    // Plans that are equal within half a percent are chosen among by their bytes.
    let most = 1.01 * base;
    assert!(step_s(processor(96 << 20)) <= most);
    assert!(step_s(processor(1 << 30)) < base, "everything in memory is faster than the disk");
    let faster_disk = Machine { disk_read_bytes_per_s: 4e9, disk_write_bytes_per_s: 4e9, ..small.clone() };
    assert!(step_s(faster_disk) <= most);
    assert!(step_s(Machine { matmul_f32_flop_per_s: Some(2e11), ..small.clone() }) <= most);
    // Attention has a speed of its own where it was measured.
    let attention =
        |flop_per_s| step_s(Machine { attention_f32_flop_per_s: Some(flop_per_s), ..small.clone() });
    assert!((attention(1e11) - base).abs() <= 0.01 * base, "as fast as matrix products");
    assert!(attention(1e9) > 1.5 * base);
}

#[test]
fn what_is_fixed_is_kept() {
    let shape = ModelShape::gpt(256, 4, 128, 4, 64);
    let choices = Choices {
        placement: Placement::All(Tier::Disk),
        boundaries: Some(Tier::Host),
        slots: Some(3),
        look_ahead: Some(2),
        state_pieces: Some(8),
        gradient_sets: Some(1),
        vertical: Some(2),
        kept: Some(1),
        updates: Some(Updates::AtOnce),
        piece_bytes: Some(64 << 10),
    };
    let question = |updates| {
        let choices = Choices { updates: Some(updates), ..choices.clone() };
        Question { choices, accumulate: 4, ..question(shape.clone(), 2, 64, processor(1 << 30)) }
    };
    let answer = question(Updates::AtOnce).answer().unwrap();
    assert_eq!((answer.depths.slots, answer.depths.look_ahead, answer.boundaries), (3, 2, Tier::Host));
    let Depths { state_pieces, gradient_sets, vertical, kept, .. } = answer.depths;
    assert_eq!((state_pieces, gradient_sets, vertical, kept), (8, 1, 2, 1));
    assert_eq!(answer.plan.layout().piece_elements, 16 << 10);
    assert!(answer.plan.to_string().contains("updates are made at once"));
    let deferred = question(Updates::NextForward).answer().unwrap();
    assert!(deferred.plan.to_string().contains("updates are made with the next forward"));
    let homes = &answer.plan.placements()[..4];
    assert!(homes.iter().all(|home| home.master == Tier::Disk && home.first_moment == Tier::Disk));
}

#[test]
fn what_is_fixed_and_cannot_be_is_refused_with_what_would_fit() {
    let with = |choices: Choices, memory_bytes| {
        let shape = ModelShape::gpt(256, 4, 256, 4, 64);
        Question { choices, ..question(shape, 2, 64, processor(memory_bytes)) }
    };
    let refused = |choices: Choices| with(choices, 1 << 30).answer().unwrap_err().to_string();
    let zero = refused(Choices { slots: Some(0), ..Choices::default() });
    assert!(zero.contains("slots is 0"), "{zero}");
    let pieces = refused(Choices { state_pieces: Some(6), ..Choices::default() });
    assert!(pieces.contains("state_pieces is 6") && pieces.contains("multiple of 4"), "{pieces}");
    let piece = refused(Choices { piece_bytes: Some(1000), ..Choices::default() });
    assert!(piece.contains("1000") && piece.contains("4096"), "{piece}");
    let updates = Choices { updates: Some(Updates::AtOnce), ..Choices::default() };
    let unclipped = Question { clip: false, ..with(updates, 1 << 30) }.answer().unwrap_err().to_string();
    assert!(unclipped.contains("leave updates out"), "{unclipped}");
    // Half of the states fit, which is enough for some plan and not for the one that is asked for.
    let half = 8 * ModelShape::gpt(256, 4, 256, 4, 64).parameters() + (64 << 20);
    assert!(with(Choices::default(), half).fits());
    let homes = Choices { placement: Placement::All(Tier::Host), look_ahead: Some(64), ..Choices::default() };
    let error = with(homes, half).answer().unwrap_err();
    assert!(matches!(error, Error::BudgetTooSmall { .. }), "{error}");
    assert!(error.to_string().contains("Without what was fixed it fits, as with slots"), "{error}");
    let nothing = with(Choices { slots: Some(1), ..Choices::default() }, 1 << 20).answer().unwrap_err();
    assert!(!nothing.to_string().contains("Without what was fixed"), "{nothing}");
}

/// Micro-batches share what is fetched where the disk is slow, and only as many as there is memory for.
#[test]
fn micro_batches_run_vertically_where_the_disk_is_slow_and_their_activations_fit() {
    let slow = |memory_bytes| Machine {
        disk_read_bytes_per_s: 1e8,
        disk_write_bytes_per_s: 1e8,
        ..processor(memory_bytes)
    };
    let choices = Choices {
        placement: Placement::All(Tier::Disk),
        boundaries: Some(Tier::Device),
        ..Choices::default()
    };
    let question = |memory_bytes| Question {
        accumulate: 4,
        choices: choices.clone(),
        ..question(ModelShape::gpt(256, 12, 256, 4, 256), 1, 256, slow(memory_bytes))
    };
    let answer = question(4 * GIB).answer().unwrap();
    assert_eq!(answer.depths.vertical, 4);
    let one = Choices { vertical: Some(1), ..choices.clone() };
    let one = Question { choices: one, ..question(4 * GIB) }.answer().unwrap();
    println!("{:.2} s vertically, {:.2} s one after another", answer.forecast.step_s, one.forecast.step_s);
    assert!(1.5 * answer.forecast.step_s < one.forecast.step_s);
    assert!(answer.forecast.read_bytes < one.forecast.read_bytes);
    // As much as one micro-batch needs at least.
    let Error::BudgetTooSmall { needed_bytes, .. } = question(1 << 20).answer().unwrap_err() else {
        panic!("a MiB is too little")
    };
    let least = question(needed_bytes);
    let answer = least.answer().unwrap();
    keeps_to_limits(&answer, &least.machine);
    assert_eq!(answer.depths.vertical, 1);
    // Boundaries and what else a micro-batch holds while it waits are counted once for each.
    let kept = 12 * 4 * 256 * 256;
    assert_eq!(question(needed_bytes + kept).answer().unwrap().depths.vertical, 1);
}

#[test]
fn the_largest_model_fits_and_the_next_does_not() {
    let question = question(ModelShape::gpt(256, 1, 128, 1, 64), 1, 64, processor(256 << 20));
    let largest = question.largest().unwrap();
    let fits = |layers| Question { shape: question.shape.grown(layers), ..question.clone() }.fits();
    assert!(fits(largest.layers));
    assert!(!fits(largest.layers + 1));
}

#[test]
fn a_disk_that_is_too_small_is_said_and_in_place_needs_half() {
    let shape = ModelShape::gpt(256, 4, 256, 4, 64);
    let states = 12 * shape.parameters();
    let machine = Machine { disk_bytes: Some(2 * states - (1 << 20)), ..processor(1 << 30) };
    let twice = question(shape, 1, 64, machine);
    let refused = twice.answer().unwrap_err().to_string();
    assert!(refused.contains("the disk must hold"), "{refused}");
    assert!(Question { in_place: true, ..twice }.answer().unwrap().disk_bytes >= states);
}

#[test]
fn every_described_machine_names_its_source_and_unknown_names_are_answered_with_the_known() {
    for gpu in GPUS {
        assert!(gpu.source.contains("https://"), "{}", gpu.name);
    }
    for drive in DRIVES {
        assert!(drive.source.contains("https://"), "{}", drive.name);
    }
    let unknown = |device: &str, drive: &str| {
        let description =
            Description { device: device.into(), drive: Some(drive.into()), ..Description::default() };
        description.machine().unwrap_err().to_string()
    };
    assert!(unknown("h1000", "7GB/s").contains("h100-80g"));
    for drive in ["fast", "7GB", "0GB/s", "/s"] {
        assert!(unknown("h100-80g", drive).contains("nvme-gen4"), "{drive}");
    }
}

#[test]
fn hugging_face_configurations_of_both_families_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let shape = |text: &str| {
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        ModelShape::from_hugging_face(&path, 512)
    };
    // The sizes of GPT-2 small and of Llama 2 7B, whose numbers of parameters are known.
    let gpt2 = r#"{ "model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12,
        "n_positions": 1024, "n_inner": null, "activation_function": "gelu_new" }"#;
    assert_eq!(shape(gpt2).unwrap().parameters(), 124_439_808);
    let llama = r#"{ "model_type": "llama", "vocab_size": 32000, "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "tie_word_embeddings": false }"#;
    assert_eq!(shape(llama).unwrap().parameters(), 6_738_415_616);
    assert!(shape(r#"{ "model_type": "t5" }"#).unwrap_err().to_string().contains("config.json"));
    let other = llama.replace("\"llama\"", "\"bert\"");
    assert!(shape(&other).unwrap_err().to_string().contains("bert"));
    let zero = llama.replace("\"hidden_size\": 4096", "\"hidden_size\": 0");
    assert!(shape(&zero).unwrap_err().to_string().contains("hidden_size is 0"));
    let huge = llama.replace("\"vocab_size\": 32000", "\"vocab_size\": 4000000000");
    assert!(shape(&huge).unwrap_err().to_string().contains("every size"));
    let short = llama.replace("\"max_position_embeddings\": 4096", "\"max_position_embeddings\": 256");
    assert!(shape(&short).unwrap_err().to_string().contains("choose shorter sequences"));
    // Qwen2.5 0.5B has biases, Qwen3 0.6B heads that are wider together than the model, and norms of them.
    let qwen2 = r#"{ "model_type": "qwen2", "vocab_size": 151936, "num_hidden_layers": 24, "hidden_size": 896,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "tie_word_embeddings": true, "use_sliding_window": false }"#;
    assert_eq!(shape(qwen2).unwrap().parameters(), 494_032_768);
    let qwen3 = r#"{ "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "tie_word_embeddings": true }"#;
    assert_eq!(shape(qwen3).unwrap().parameters(), 596_049_920);
}

/// What lies outside of a window takes no time on the CPU device, and is computed and masked on a device of
/// its own.
#[test]
fn a_sliding_window_is_spared_where_the_engine_spares_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let step_s = |window: &str, machine: Machine| {
        let text = r#"{ "model_type": "mistral", "vocab_size": 256, "num_hidden_layers": 2, "hidden_size": 64,
            "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 4096,
            "sliding_window": WINDOW }"#;
        std::fs::write(&path, text.replace("WINDOW", window)).unwrap();
        let shape = ModelShape::from_hugging_face(&path, 4096).unwrap();
        question(shape, 1, 4096, machine).answer().unwrap().forecast.step_s
    };
    let here = || processor(4 * GIB);
    assert!(step_s("64", here()) < 0.5 * step_s("null", here()));
    let there = || described("rtx4090-24g", 16, None);
    assert_eq!(step_s("64", there()), step_s("null", there()));
}

/// Numbers that no machine has: a plan made with them would have no end.
#[test]
fn machines_that_cannot_be_are_refused_by_the_name_of_the_number() {
    type Spoil = fn(&mut Machine);
    let spoil: [(&str, Spoil); 5] = [
        ("disk_read_bytes_per_s", |machine| machine.disk_read_bytes_per_s = 0.0),
        ("upload_bytes_per_s", |machine| machine.upload_bytes_per_s = 1e-300),
        ("optimizer_bytes_per_s", |machine| machine.optimizer_bytes_per_s = f64::NAN),
        ("matmul_f32_flop_per_s", |machine| machine.matmul_f32_flop_per_s = Some(f64::INFINITY)),
        ("processors", |machine| machine.processors = Some(0)),
    ];
    for (name, spoil) in spoil {
        let mut machine = processor(8 * GIB);
        spoil(&mut machine);
        let shape = ModelShape::named("gpt2", 1024).unwrap();
        let error = question(shape, 1, 1024, machine).answer().map(drop).unwrap_err();
        assert!(matches!(&error, Error::Configuration(text) if text.contains(name)), "{name}: {error}");
    }
}
