//! The allocator, installed for this whole program, so that the test harness uses it too.

use std::{
    alloc::{GlobalAlloc, Layout},
    sync::{Mutex, MutexGuard, PoisonError},
};

use ferrozero_offload::memory::{
    CountingAllocator, LARGE_BYTES, cached_bytes, current_bytes, peak_bytes, reset_peak,
    set_cache_limit_bytes,
};
use proptest::prelude::*;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// The counters are of the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const MIB: usize = 1 << 20;

/// Other threads of the harness may allocate a little while a test counts.
const NOISE_BYTES: u64 = 1 << 20;

#[track_caller]
fn expect_about(actual: u64, expected: u64) {
    assert!(actual.abs_diff(expected) < NOISE_BYTES, "{actual} is not about {expected}");
}

/// Resident bytes of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn counts_follow_what_is_in_use() {
    let _alone = alone();
    set_cache_limit_bytes(0);
    let before = current_bytes();
    reset_peak();
    let block = vec![1_u8; 64 * MIB];
    expect_about(current_bytes(), before + 64 * MIB as u64);
    drop(block);
    expect_about(current_bytes(), before);
    expect_about(peak_bytes(), before + 64 * MIB as u64);
    reset_peak();
    expect_about(peak_bytes(), before);
}

#[test]
fn a_freed_block_leaves_the_process_unless_it_is_kept() {
    let _alone = alone();
    for limit_bytes in [0, 1 << 40] {
        set_cache_limit_bytes(limit_bytes);
        let before = resident_bytes();
        drop(std::hint::black_box(vec![1_u8; 256 * MIB]));
        let left = resident_bytes().saturating_sub(before);
        match limit_bytes {
            0 => assert!(left < 64 * MIB as u64, "{left} bytes stayed"),
            _ => assert!(left > 192 * MIB as u64, "only {left} bytes were kept"),
        }
    }
    set_cache_limit_bytes(0);
    assert_eq!(cached_bytes(), 0, "a lower limit returns what was kept");
}

#[test]
fn a_kept_block_is_given_out_again_and_zeroed_when_asked() {
    let _alone = alone();
    set_cache_limit_bytes(1 << 30);
    let layout = Layout::from_size_align(3 * MIB + 5, 64).unwrap();
    // SAFETY: the layout has a size; each block is used inside its size and freed once, with its own layout.
    unsafe {
        let first = ALLOCATOR.alloc(layout);
        first.write_bytes(0xaa, layout.size());
        ALLOCATOR.dealloc(first, layout);
        assert!(cached_bytes() >= 3 * MIB as u64);
        let second = ALLOCATOR.alloc_zeroed(layout);
        assert_eq!(second, first, "the kept block");
        let bytes = std::slice::from_raw_parts(second, layout.size());
        assert!(bytes.iter().all(|&byte| byte == 0));
        ALLOCATOR.dealloc(second, layout);
    }
    set_cache_limit_bytes(0);
}

#[test]
fn what_is_kept_makes_room_for_what_is_used() {
    let _alone = alone();
    let limit_bytes = current_bytes() + 40 * MIB as u64;
    set_cache_limit_bytes(limit_bytes);
    drop((0..4).map(|_| vec![1_u8; 8 * MIB]).collect::<Vec<_>>());
    assert!(cached_bytes() >= 32 * MIB as u64);
    let other_size = vec![1_u8; 30 * MIB];
    assert!(current_bytes() + cached_bytes() <= limit_bytes);
    // Past the limit, memory is still given; only nothing is kept.
    let past = vec![1_u8; 30 * MIB];
    assert_eq!(cached_bytes(), 0);
    drop((other_size, past));
    assert!(current_bytes() + cached_bytes() <= limit_bytes);
    set_cache_limit_bytes(0);
}

/// A block that remembers what it was filled with.
struct Filled {
    start: *mut u8,
    layout: Layout,
    value: u8,
}

impl Filled {
    fn new(layout: Layout, value: u8, is_zeroed: bool) -> Self {
        // SAFETY: no layout here has size 0.
        let start =
            unsafe { if is_zeroed { ALLOCATOR.alloc_zeroed(layout) } else { ALLOCATOR.alloc(layout) } };
        assert!(!start.is_null() && start.addr().is_multiple_of(layout.align()));
        let mut block = Self { start, layout, value };
        if is_zeroed {
            assert!(block.bytes().iter().all(|&byte| byte == 0), "not zeroed");
        }
        block.bytes().fill(value);
        block
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the block is this value's own, initialised by `fill` or zeroed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }

    fn resize(&mut self, size: usize) {
        let kept = size.min(self.layout.size());
        // SAFETY: the block has this layout, and the new size is not 0.
        self.start = unsafe { ALLOCATOR.realloc(self.start, self.layout, size) };
        assert!(!self.start.is_null() && self.start.addr().is_multiple_of(self.layout.align()));
        self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
        let value = self.value;
        assert!(self.bytes()[..kept].iter().all(|&byte| byte == value), "lost in moving");
        self.bytes().fill(value);
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let value = self.value;
        let is_whole = self.bytes().iter().all(|&byte| byte == value);
        // SAFETY: the block has this layout and is freed once.
        unsafe { ALLOCATOR.dealloc(self.start, self.layout) };
        assert!(is_whole || std::thread::panicking(), "somebody else wrote to this block");
    }
}

/// One action of a random program over blocks.
#[derive(Clone, Debug)]
enum Action {
    Allocate { size: usize, align: usize, is_zeroed: bool },
    Resize { which: usize, size: usize },
    Free { which: usize },
}

fn size() -> impl Strategy<Value = usize> {
    let near_limit = LARGE_BYTES - 2..LARGE_BYTES + 2;
    // Few large sizes, so that kept blocks are found again.
    let large = prop::sample::select(vec![LARGE_BYTES, 100_000, 102_400, 131_072, 300_000]);
    prop_oneof![1_usize..5000, near_limit, large]
}

fn action() -> impl Strategy<Value = Action> {
    let align = (0_u32..15).prop_map(|power| 1_usize << power);
    prop_oneof![
        3 => (size(), align, any::<bool>())
            .prop_map(|(size, align, is_zeroed)| Action::Allocate { size, align, is_zeroed }),
        1 => (any::<usize>(), size()).prop_map(|(which, size)| Action::Resize { which, size }),
        2 => any::<usize>().prop_map(|which| Action::Free { which }),
    ]
}

fn play(actions: &[Action], first_value: u8) {
    let mut blocks: Vec<Filled> = Vec::new();
    for (index, action) in actions.iter().enumerate() {
        let count = blocks.len().max(1);
        match *action {
            Action::Allocate { size, align, is_zeroed } => {
                let value = first_value.wrapping_add(index as u8) | 1;
                blocks.push(Filled::new(Layout::from_size_align(size, align).unwrap(), value, is_zeroed));
            }
            Action::Resize { which, size } => {
                if let Some(block) = blocks.get_mut(which % count) {
                    block.resize(size);
                }
            }
            Action::Free { which } if !blocks.is_empty() => drop(blocks.swap_remove(which % count)),
            Action::Free { .. } => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_aligned_zeroed_and_nobody_elses(
        programs in prop::collection::vec(prop::collection::vec(action(), 1..120), 1..5),
        slack_bytes in prop_oneof![Just(0_u64), Just(500_000), Just(1 << 40)],
    ) {
        let _alone = alone();
        set_cache_limit_bytes(if slack_bytes == 0 { 0 } else { current_bytes() + slack_bytes });
        let before = current_bytes();
        std::thread::scope(|scope| {
            for (index, program) in programs.iter().enumerate() {
                scope.spawn(move || play(program, index as u8 * 50));
            }
        });
        expect_about(current_bytes(), before);
        set_cache_limit_bytes(0);
        // A thread of another test that was freeing a block as the limit fell gives it back itself, right
        // afterwards.
        prop_assert!((0..1_000_000).any(|_| cached_bytes() == 0), "{} bytes are kept", cached_bytes());
    }
}

#[test]
fn many_sizes_from_many_threads_stay_within_the_limit_at_rest() {
    let _alone = alone();
    let limit_bytes = current_bytes() + 8 * MIB as u64;
    set_cache_limit_bytes(limit_bytes);
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            scope.spawn(move || {
                for round in 0..1000_usize {
                    let pages = 16 + (round * 7 + thread) % 150;
                    let layout = Layout::from_size_align(pages * 4096, 4096).unwrap();
                    drop(Filled::new(layout, thread as u8 + 1, round % 8 == 0));
                }
            });
        }
    });
    assert!(current_bytes() + cached_bytes() <= limit_bytes);
    set_cache_limit_bytes(0);
}
