//! A steady step takes the memory of the step before it: it does not have pages cleared anew for its tensors.

use candle_core::{Device, Tensor};
use ferrozero::internals::models::gpt::{Block, Gpt, GptConfig};
use ferrozero::{AdamW, Config, CountingAllocator, Engine, Placement, Tier};
use ferrozero_offload::memory;
use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const PAGE_BYTES: u64 = 4096;
const STEPS: u64 = 8;

/// Bytes that were ever allocated.
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);

/// The engine's allocator, and a count of what is asked of it.
struct Asked;

// SAFETY: everything is the counting allocator's, with the same arguments.
unsafe impl GlobalAlloc for Asked {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED_BYTES.fetch_add(layout.size() as u64, SeqCst);
        // SAFETY: the caller's own promises.
        unsafe { CountingAllocator.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATED_BYTES.fetch_add(layout.size() as u64, SeqCst);
        // SAFETY: the caller's own promises.
        unsafe { CountingAllocator.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's own promises.
        unsafe { CountingAllocator.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATED_BYTES.fetch_add(new_size.saturating_sub(layout.size()) as u64, SeqCst);
        // SAFETY: the caller's own promises.
        unsafe { CountingAllocator.realloc(block, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Asked = Asked;

/// Pages that the kernel has given to the process, cleared, without reading a disk: its count of minor
/// faults, as getrusage has it.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The name of the program, in parentheses, may have spaces. Behind it are state, five numbers, flags, and
    // the faults.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().nth(7).unwrap().parse().unwrap()
}

/// Has this process's memory cleared in small pages, which are counted one by one.
fn without_huge_pages() {
    // SAFETY: the call reads its numbers and sets a flag of this process.
    let refused = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
    assert_eq!(refused, 0, "{}", std::io::Error::last_os_error());
}

/// One test, because faults are those of the whole process.
#[test]
fn a_steady_step_has_few_pages_cleared_and_without_kept_memory_it_has_many() {
    without_huge_pages();
    // What the count is worth: touching memory that was never touched raises it by a page at a time.
    let before = faults();
    let fresh = vec![1_u8; 2 << 20];
    assert!(faults() - before >= fresh.len() as u64 / PAGE_BYTES / 2, "pages are counted");
    drop(fresh);

    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let engine = Engine::new(Config {
        memory_bytes: Some(192 << 20),
        directory: Some(folder.path().join("run")),
        placement: Placement::All(Tier::Disk),
        ..Config::default()
    })
    .unwrap();
    let config = GptConfig { vocabulary: 512, layers: 3, hidden: 128, heads: 4, sequence: 128 };
    let model =
        Gpt::new(&config, engine.var_builder(), |vb, _| engine.segment(vb, |vb| Block::new(&config, vb)))
            .unwrap();
    let tokens: Vec<u32> = (0..256).map(|i| i * 7 % 512).collect();
    let tokens = Tensor::from_vec(tokens, (2, 128), &Device::Cpu).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&tokens, &tokens)).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    let mut cleared_and_allocated = || {
        // The first ones make what later ones reuse.
        let mut run = |steps: u64| {
            (0..steps).for_each(|_| drop(trainer.step(|_| model.loss(&tokens, &tokens)).unwrap()))
        };
        run(3);
        let before = (faults(), ALLOCATED_BYTES.load(SeqCst));
        run(STEPS);
        ((faults() - before.0) * PAGE_BYTES, ALLOCATED_BYTES.load(SeqCst) - before.1)
    };
    let (cleared, allocated) = cleared_and_allocated();
    eprintln!("{cleared} bytes cleared of {allocated} allocated in {STEPS} steps");
    assert!(allocated > STEPS << 20, "{allocated} bytes: a step allocates tensors");
    assert!(cleared <= allocated / 200, "{cleared} bytes of {allocated} are pages that were cleared");

    memory::set_cache_limit_bytes(0);
    let (cleared, allocated) = cleared_and_allocated();
    eprintln!("{cleared} bytes cleared of {allocated} allocated, where nothing is kept");
    assert!(cleared >= allocated / 4, "{cleared} bytes of {allocated}: the count sees what is not kept");
}
