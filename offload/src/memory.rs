//! A global allocator that counts, and that keeps large freed blocks for the next step.
//!
//! The tensors of a training step have the same sizes in every step. A plain allocator either returns their memory to
//! the system and has every page cleared anew in each step, or keeps it for ever. This one counts what is
//! in use, keeps large freed blocks by their exact size, and never lets the two together pass a limit.
//!
//! ```no_run
//! use ferrozero_offload::memory::{CountingAllocator, peak_bytes, set_cache_limit_bytes};
//!
//! #[global_allocator]
//! static ALLOCATOR: CountingAllocator = CountingAllocator;
//!
//! set_cache_limit_bytes(8 << 30);
//! println!("{} bytes at most", peak_bytes());
//! ```
//!
//! | block | comes from | counts as | after it is freed |
//! |---|---|---|---|
//! | below [`LARGE_BYTES`], or aligned to more than a page | the system's allocator | its size | goes back to it |
//! | any other | `mmap` | its size in whole pages | is kept while in use + kept ≤ limit, else unmapped |
//!
//! Without a limit every large block is mapped and unmapped anew, which costs more than the system's allocator: a
//! program that installs this one should set a limit.
//!
//! Which row a block is in depends on its layout alone, so that freeing needs no look-up. All state is in atomics and
//! in one table of fixed size under a spin lock: an allocator cannot allocate for itself, nor wait for a thread
//! that does.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::UnsafeCell,
    ptr::{self, NonNull},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use crate::{PAGE_BYTES, padded_bytes};

/// The smallest block that is mapped on its own.
pub const LARGE_BYTES: usize = 64 << 10;

/// The smallest block for which huge pages are asked.
const HUGE_BLOCK_BYTES: usize = 4 << 20;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static CACHED_BYTES: AtomicUsize = AtomicUsize::new(0);
static LIMIT_BYTES: AtomicUsize = AtomicUsize::new(0);
static CACHE: Cache = Cache::new();

/// Bytes in use by the process, as far as they were allocated in Rust. 0 when [`CountingAllocator`] is not installed.
pub fn current_bytes() -> u64 {
    LIVE_BYTES.load(SeqCst) as u64
}

/// The most bytes in use at once since the start or the last [`reset_peak`].
pub fn peak_bytes() -> u64 {
    PEAK_BYTES.load(SeqCst) as u64
}

/// Starts a new measurement of [`peak_bytes`] from what is in use now.
pub fn reset_peak() {
    PEAK_BYTES.store(LIVE_BYTES.load(SeqCst), SeqCst);
}

/// Bytes of freed blocks that are kept.
pub fn cached_bytes() -> u64 {
    CACHED_BYTES.load(SeqCst) as u64
}

/// Lets freed blocks be kept while they and what is in use are at most `limit_bytes` together. The default is 0: keep
/// nothing. What is in use alone may pass the limit; it then only keeps the cache empty.
pub fn set_cache_limit_bytes(limit_bytes: u64) {
    LIMIT_BYTES.store(usize::try_from(limit_bytes).unwrap_or(usize::MAX), SeqCst);
    trim();
}

/// The system's allocator for small blocks, maps for large ones; see the [module](self). All instances are the same one.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

// SAFETY: small blocks are the system allocator's, with the very layout that it gave them out for. Large blocks are
// mappings of `padded_bytes(size)` bytes, aligned to pages, which are unmapped or cached once, when they are freed; a
// cached block is given out to one caller only, because it leaves the cache under its lock. Nothing here unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return large_block(layout.size()).map_or(ptr::null_mut(), |block| block.start.as_ptr());
        }
        count_in(layout.size());
        // SAFETY: the caller's own promises.
        counted_out_if_null(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !is_large(layout) {
            count_in(layout.size());
            // SAFETY: the caller's own promises.
            return counted_out_if_null(unsafe { System.alloc_zeroed(layout) }, layout.size());
        }
        let Some(block) = large_block(layout.size()) else { return ptr::null_mut() };
        if !block.is_fresh {
            // SAFETY: the block is at least that long and belongs to nobody yet. A fresh mapping is zero already.
            unsafe { block.start.as_ptr().write_bytes(0, layout.size()) };
        }
        block.start.as_ptr()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !is_large(layout) {
            // SAFETY: the caller's own promises.
            unsafe { System.dealloc(block, layout) };
            LIVE_BYTES.fetch_sub(layout.size(), SeqCst);
            return;
        }
        let bytes = padded_bytes(layout.size());
        let Some(block) = NonNull::new(block) else { return };
        let in_all_bytes = LIVE_BYTES.load(SeqCst).saturating_add(CACHED_BYTES.load(SeqCst));
        if in_all_bytes <= LIMIT_BYTES.load(SeqCst) {
            // Counted as kept before it is, and as in use a little longer: the sum is never seen too small.
            CACHED_BYTES.fetch_add(bytes, SeqCst);
            if CACHE.put(block, bytes) {
                LIVE_BYTES.fetch_sub(bytes, SeqCst);
                return trim();
            }
            CACHED_BYTES.fetch_sub(bytes, SeqCst);
        }
        unmap(block, bytes);
        LIVE_BYTES.fetch_sub(bytes, SeqCst);
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size, rounded up to the alignment, fits an isize.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (is_large(layout), is_large(new_layout)) {
            (false, false) => {
                count_in(new_size);
                // SAFETY: the caller's own promises.
                let moved = unsafe { System.realloc(block, layout, new_size) };
                LIVE_BYTES.fetch_sub(if moved.is_null() { new_size } else { layout.size() }, SeqCst);
                moved
            }
            (true, true) if padded_bytes(layout.size()) == padded_bytes(new_size) => block,
            _ => {
                // SAFETY: the new layout is valid, as above.
                let moved = unsafe { self.alloc(new_layout) };
                if !moved.is_null() {
                    // SAFETY: both blocks are at least that long, and the new one is nobody else's.
                    unsafe {
                        ptr::copy_nonoverlapping(block, moved, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                }
                moved
            }
        }
    }
}

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE_BYTES && layout.align() <= PAGE_BYTES
}

/// Counts bytes before they are allocated, and makes room for them.
fn count_in(bytes: usize) {
    let live_bytes = LIVE_BYTES.fetch_add(bytes, SeqCst).saturating_add(bytes);
    if live_bytes > PEAK_BYTES.load(SeqCst) {
        PEAK_BYTES.fetch_max(live_bytes, SeqCst);
    }
    if CACHED_BYTES.load(SeqCst) > 0 {
        trim();
    }
}

fn counted_out_if_null(block: *mut u8, bytes: usize) -> *mut u8 {
    if block.is_null() {
        LIVE_BYTES.fetch_sub(bytes, SeqCst);
    }
    block
}

struct Block {
    start: NonNull<u8>,
    /// Just mapped, and so all zero.
    is_fresh: bool,
}

/// A block of whole pages: a kept one of the same size, else a new mapping.
fn large_block(size: usize) -> Option<Block> {
    // A layout's size is at most isize::MAX, so this does not overflow.
    let bytes = padded_bytes(size);
    if let Some(start) = CACHE.take(bytes) {
        // In this order, so that room for this block is not made a second time.
        CACHED_BYTES.fetch_sub(bytes, SeqCst);
        count_in(bytes);
        return Some(Block { start, is_fresh: false });
    }
    count_in(bytes);
    let start = map(bytes).or_else(|| {
        trim_to(0);
        map(bytes)
    });
    if start.is_none() {
        LIVE_BYTES.fetch_sub(bytes, SeqCst);
    }
    start.map(|start| Block { start, is_fresh: true })
}

/// Returns kept blocks to the system until the limit holds again.
fn trim() {
    trim_to(LIMIT_BYTES.load(SeqCst));
}

/// Returns kept blocks to the system until they and what is in use are at most `limit_bytes`, or none is left.
fn trim_to(limit_bytes: usize) {
    while LIVE_BYTES.load(SeqCst).saturating_add(CACHED_BYTES.load(SeqCst)) > limit_bytes {
        let Some((block, bytes)) = CACHE.take_largest() else { return };
        unmap(block, bytes);
        CACHED_BYTES.fetch_sub(bytes, SeqCst);
    }
}

fn map(bytes: usize) -> Option<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return None;
    }
    if bytes >= HUGE_BLOCK_BYTES {
        // SAFETY: the range is the mapping just made; the advice changes no byte of it and may be refused.
        unsafe { libc::madvise(mapped, bytes, libc::MADV_HUGEPAGE) };
    }
    NonNull::new(mapped.cast())
}

fn unmap(block: NonNull<u8>, bytes: usize) {
    // SAFETY: `map` made the block with this length, and who calls this is its only owner.
    unsafe { libc::munmap(block.as_ptr().cast(), bytes) };
}

/// Different sizes that can be kept at once.
const BINS: usize = 512;

/// Bins that are searched for a size, from where its hash points.
const PROBES: usize = 16;

/// Freed blocks by their exact size: a hash table of lists, each block holding the pointer to the next one.
struct Cache {
    is_locked: AtomicBool,
    bins: UnsafeCell<[Bin; BINS]>,
}

/// The kept blocks of one size. A bin without blocks can take on another size.
#[derive(Clone, Copy)]
struct Bin {
    bytes: usize,
    first: Option<NonNull<u8>>,
}

// SAFETY: the bins are only reached through `with_bins`, which holds the lock.
unsafe impl Sync for Cache {}

impl Cache {
    const fn new() -> Self {
        let empty = Bin { bytes: 0, first: None };
        Self { is_locked: AtomicBool::new(false), bins: UnsafeCell::new([empty; BINS]) }
    }

    /// Runs `work`, which must neither allocate nor panic, on the bins.
    fn with_bins<R>(&self, work: impl FnOnce(&mut [Bin; BINS]) -> R) -> R {
        let mut tries = 0_u32;
        while self.is_locked.swap(true, SeqCst) {
            tries += 1;
            match tries % 64 {
                // The holder may have lost its processor. Giving up ours allocates nothing.
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
        // SAFETY: the lock is held, so this is the only reference.
        let result = work(unsafe { &mut *self.bins.get() });
        self.is_locked.store(false, SeqCst);
        result
    }

    /// Keeps a block of `bytes`, unless all bins where its size may be are taken by others.
    fn put(&self, block: NonNull<u8>, bytes: usize) -> bool {
        self.with_bins(|bins| {
            let mut places = probes(bytes);
            let same =
                places.clone().find(|&place| bins[place].first.is_some() && bins[place].bytes == bytes);
            let Some(place) = same.or_else(|| places.find(|&place| bins[place].first.is_none())) else {
                return false;
            };
            // SAFETY: the block has room for a pointer, is aligned to pages, and belongs to the cache from here on.
            unsafe { block.cast::<Option<NonNull<u8>>>().write(bins[place].first) };
            bins[place] = Bin { bytes, first: Some(block) };
            true
        })
    }

    /// Gives out a kept block of exactly `bytes`.
    fn take(&self, bytes: usize) -> Option<NonNull<u8>> {
        if CACHED_BYTES.load(SeqCst) == 0 {
            return None;
        }
        self.with_bins(|bins| probes(bytes).find_map(|place| bins[place].pop_if(bytes)))
    }

    /// Gives out a kept block of the largest size, so that few are unmapped where many bytes are wanted.
    fn take_largest(&self) -> Option<(NonNull<u8>, usize)> {
        self.with_bins(|bins| {
            let bin = bins.iter_mut().filter(|bin| bin.first.is_some()).max_by_key(|bin| bin.bytes)?;
            bin.pop_if(bin.bytes).map(|block| (block, bin.bytes))
        })
    }
}

impl Bin {
    fn pop_if(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let block = self.first.filter(|_| self.bytes == bytes)?;
        // SAFETY: `put` wrote this pointer, and nobody has touched the block since.
        self.first = unsafe { block.cast::<Option<NonNull<u8>>>().read() };
        Some(block)
    }
}

/// Where a size may be.
fn probes(bytes: usize) -> impl Iterator<Item = usize> + Clone {
    // Fibonacci hashing: sizes are often multiples of each other, and their product's high bits differ all the same.
    let hash = (bytes / PAGE_BYTES).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (0..PROBES).map(move |probe| (hash + probe) % BINS)
}
