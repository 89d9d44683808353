//! A steady step allocates nothing of the device's memory, and copies by way of page-locked memory alone.

use super::{homes, on_cuda, tokens, trainer};
use candle_core::{DType, Device, Tensor};
use ferrozero::internals::models::gpt::{Block, Gpt, GptConfig};
use ferrozero::{AdamW, Config, Engine, Tier};
use ferrozero_offload::cuda::{Cuda, CudaCopy, DeviceRange};
use ferrozero_offload::{Arena, Budget};

const BLOCKS: usize = 2;
const ACCUMULATE: usize = 2;
const STEADY_STEPS: u64 = 12;
/// Tensors of gradients that may be vacant at once beyond those that were in the first steps, as queues
/// happen to run. Fewer than steps, so that one more a step is seen.
const MORE_AT_ONCE: u64 = 8;

#[test]
fn a_steady_step_allocates_no_memory_of_the_device() {
    let Some(base) = on_cuda() else { return };
    let cases = [
        (Tier::Disk, Tier::Host, DType::F32),
        (Tier::Host, Tier::Disk, DType::BF16),
        (Tier::Disk, Tier::Device, DType::F32),
        (Tier::Device, Tier::Host, DType::BF16),
    ];
    for (home, boundaries, dtype) in cases {
        let name = format!("states on {home}, boundaries on {boundaries}, {dtype:?}");
        let config = Config {
            device: base.device.clone(),
            dtype,
            boundaries: Some(boundaries),
            accumulate: ACCUMULATE,
            ..homes(home)
        };
        let (mut trainer, model) = trainer(config, BLOCKS).unwrap();
        let counter = trainer.device_counter();
        let mut step = |number: u64| {
            trainer.step(|micro_batch| model.loss(&tokens(number, micro_batch))).unwrap();
            counter.read()
        };
        step(0);
        let before = step(1);
        assert!(before.allocations > 0, "{name}");
        let mut after = before;
        for number in 2..2 + STEADY_STEPS {
            after = step(number);
            assert_eq!(after.allocations, before.allocations, "{name}, step {number}");
            assert_eq!(after.pageable_copies, 0, "{name}, step {number}");
        }
        // A tensor frees what it holds. Each segment makes one of candle's graph and leaves that which it is
        // made from vacant; the first boundary that leaves is of the model's own. Nothing else is let go
        // vacant.
        let tensors = ACCUMULATE * (BLOCKS + usize::from(boundaries != Tier::Device));
        let placeholders = after.placeholders - before.placeholders;
        let most = STEADY_STEPS * tensors as u64 + MORE_AT_ONCE;
        assert!(placeholders < most, "{name}: {placeholders}");
    }
}

#[test]
fn a_copy_from_or_to_memory_that_is_not_page_locked_is_counted() {
    let Some(base) = on_cuda() else { return };
    let Device::Cuda(device) = &base.device else { panic!("not the device that was asked for") };
    let budget = Budget::new(Tier::Host, 1 << 20);
    let cuda = Cuda::new(device.cuda_stream(), None).unwrap();
    let page_locked = Arena::pinned_for_cuda(&budget, 4096, &cuda).unwrap();
    let mut memory = device.alloc_zeros::<f32>(4).unwrap();
    cuda.synchronize_all().unwrap();
    let mut copies = |arena: &Arena| {
        let mut lease = arena.lease(16).unwrap();
        let before = cuda.counts().pageable_copies;
        let copy = CudaCopy { host: 0..16, device: DeviceRange::of(&mut memory, 0..4) };
        cuda.upload(&lease, vec![copy]).unwrap();
        let copy = CudaCopy { host: 0..16, device: DeviceRange::of(&mut memory, 0..4) };
        cuda.download(vec![copy], &mut lease).unwrap();
        cuda.counts().pageable_copies - before
    };
    assert_eq!(copies(&page_locked), 0);
    // This may be locked in memory, but the driver does not know of it.
    assert_eq!(copies(&Arena::new(&budget, 4096).unwrap()), 2);
}

/// Candle's own operations on strided tensors copy shapes and strides, a hundred bytes that nobody waits for:
/// here to add the positions, and for their gradient.
const CANDLES_SHAPES: u64 = 2;
const STEPS: &str = "FERROZERO_TEST_STEPS";

/// Runs in a process of its own, which [`every_copy_of_a_step_is_by_way_of_page_locked_memory`] starts.
#[test]
#[ignore = "part of another test"]
fn trains_so_many_steps() {
    let Some(base) = on_cuda() else { return };
    let steps: usize = std::env::var(STEPS).unwrap().parse().unwrap();
    let config = Config {
        device: base.device,
        dtype: DType::BF16,
        boundaries: Some(Tier::Host),
        clip: Some(1.0),
        ..homes(Tier::Device)
    };
    let engine = Engine::new(config).unwrap();
    let config = GptConfig { vocabulary: 64, hidden: 32, layers: 2, heads: 2, sequence: 8 };
    let model =
        Gpt::new(&config, engine.var_builder(), |vb, _| engine.segment(vb, |vb| Block::new(&config, vb)))
            .unwrap();
    let inputs = Tensor::arange(0u32, 16, &Device::Cpu).unwrap().reshape((2, 8)).unwrap();
    let targets = Tensor::arange(1u32, 17, &Device::Cpu).unwrap().reshape((2, 8)).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&inputs, &targets)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    for _ in 0..steps {
        trainer.step(|_| model.loss(&inputs, &targets)).unwrap();
    }
    let counts = trainer.device_counter().read();
    println!("copies up: {}", counts.uploads.copies + counts.small_uploads);
    println!("copies down: {}", counts.downloads.copies + counts.small_downloads);
    assert_eq!(counts.pageable_copies, 0);
}

/// Counts of a run of so many steps: copies to the device that the engine knows of and that the driver was
/// asked for, and both of copies to the host.
fn counted(steps: usize) -> [u64; 4] {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "steady::trains_so_many_steps", "--ignored", "--nocapture"])
        .env(STEPS, steps.to_string())
        .env("SIMCUDA_STATS", "1")
        .output()
        .unwrap();
    let [out, err] = [&child.stdout, &child.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(child.status.success(), "{out}{err}");
    let number = |text: &str, key: &str| -> u64 {
        let rest = &text[text.find(key).unwrap_or_else(|| panic!("no {key} in {text}")) + key.len()..];
        rest.trim_start_matches(|c: char| !c.is_ascii_digit())
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .and_then(|digits| digits.parse().ok())
            .unwrap()
    };
    [
        number(&out, "copies up:"),
        number(&err, "cuMemcpyHtoDAsync_v2"),
        number(&out, "copies down:"),
        number(&err, "cuMemcpyDtoHAsync_v2"),
    ]
}

#[test]
fn every_copy_of_a_step_is_by_way_of_page_locked_memory() {
    if on_cuda().is_none() || std::env::var("SIMCUDA_MODE").is_err() {
        println!("skipped: only the software driver counts its calls");
        return;
    }
    let (two, four) = (counted(2), counted(4));
    let [up, all_up, down, all_down] = [0, 1, 2, 3].map(|index| (four[index] - two[index]) / 2);
    println!("a step, by way of page-locked memory: {up} of {all_up} copies up, {down} of {all_down} down");
    assert_eq!(down, all_down);
    assert_eq!(up + CANDLES_SHAPES, all_up);
}
