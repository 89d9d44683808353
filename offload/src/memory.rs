//! A global allocator that counts, and that keeps large freed blocks for the next step.
//!
//! The tensors of a training step have the same sizes in every step. A plain allocator either returns their
//! memory to the system and has every page cleared anew in each step, or keeps it for ever. This one counts
//! what is in use, keeps the pages of large freed blocks, and never lets the two together pass a limit.
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
//! | any other | mappings of 1 GiB or more | its size in whole pages | its pages are kept while in use + kept ≤ limit, else given back |
//!
//! A large block is put where pages are kept: into the smallest range of them that holds it, or else where
//! most of it is kept, and only the rest of it needs new ones. A step whose blocks fit into the limit finds
//! its pages where the step before had them, of whatever sizes its blocks are.
//!
//! Without a limit the pages of every large block are given back and cleared anew, which costs more than the
//! system's allocator: a program that installs this one should set a limit.
//!
//! Which row a block is in depends on its layout alone, so that freeing needs no look-up. All state is in
//! atomics and in one table of fixed size under a spin lock: an allocator cannot allocate for itself, nor
//! wait for a thread that does.

mod ranges;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::UnsafeCell,
    ptr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use crate::{PAGE_BYTES, padded_bytes};
use ranges::{Place, Ranges};

/// The smallest block whose pages can be kept.
pub const LARGE_BYTES: usize = 64 << 10;

/// Addresses that are mapped at once, for many blocks. They take no memory until a block is written to.
const MAPPING_BYTES: usize = 1 << 30;

/// As much is given back at once, if that much is kept: to give back a huge page in parts saves nothing.
const GIVEN_BACK_BYTES: usize = 2 << 20;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static CACHED_BYTES: AtomicUsize = AtomicUsize::new(0);
static LIMIT_BYTES: AtomicUsize = AtomicUsize::new(0);
static FREE: Free = Free::new();

/// Bytes in use by the process, as far as they were allocated in Rust. 0 when [`CountingAllocator`] is not
/// installed.
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

/// Bytes of freed blocks whose pages are kept.
pub fn cached_bytes() -> u64 {
    CACHED_BYTES.load(SeqCst) as u64
}

/// Lets freed blocks be kept while they and what is in use are at most `limit_bytes` together. The default is
/// 0: keep nothing. What is in use alone may pass the limit; it then only keeps the cache empty.
pub fn set_cache_limit_bytes(limit_bytes: u64) {
    LIMIT_BYTES.store(usize::try_from(limit_bytes).unwrap_or(usize::MAX), SeqCst);
    trim();
}

/// The system's allocator for small blocks, maps for large ones; see the [module](self). All instances are
/// the same one.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

// SAFETY: small blocks are the system allocator's, with the very layout that it gave them out for. Large
// blocks are `padded_bytes(size)` bytes of mappings that stay, aligned to pages, which become free ranges
// once, when they are freed; a free range is given out to one caller only, because it leaves the table under
// its lock. Nothing here unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return large_block(layout.size()).map_or(ptr::null_mut(), |block| block.start);
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
            // SAFETY: the block is at least that long and belongs to nobody yet. Where it has no pages it is
            // zero already.
            unsafe { block.start.write_bytes(0, layout.size()) };
        }
        block.start
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if !is_large(layout) {
            // SAFETY: the caller's own promises.
            unsafe { System.dealloc(block, layout) };
            LIVE_BYTES.fetch_sub(layout.size(), SeqCst);
            return;
        }
        let bytes = padded_bytes(layout.size());
        let in_all_bytes = LIVE_BYTES.load(SeqCst).saturating_add(CACHED_BYTES.load(SeqCst));
        if in_all_bytes <= LIMIT_BYTES.load(SeqCst) {
            // Counted as kept before it is, and as in use a little longer: the sum is never seen too small.
            CACHED_BYTES.fetch_add(bytes, SeqCst);
            if FREE.with(|free| free.give(block.expose_provenance(), bytes, true)) {
                LIVE_BYTES.fetch_sub(bytes, SeqCst);
                return trim();
            }
            CACHED_BYTES.fetch_sub(bytes, SeqCst);
        }
        give_back(block.expose_provenance(), bytes);
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
    start: *mut u8,
    /// Has no pages yet, and so is all zero.
    is_fresh: bool,
}

/// A block of whole pages.
fn large_block(size: usize) -> Option<Block> {
    // A layout's size is at most isize::MAX, so this does not overflow.
    let bytes = padded_bytes(size);
    let Place { start, kept_bytes } = loop {
        match FREE.with(|free| free.take(bytes)) {
            Some(place) => break place,
            // Another thread may be faster in taking what was mapped here: then once more.
            None => map(bytes)?,
        }
    };
    // In this order, so that room for this block is not made a second time.
    CACHED_BYTES.fetch_sub(kept_bytes, SeqCst);
    count_in(bytes);
    Some(Block { start: ptr::with_exposed_provenance_mut(start), is_fresh: kept_bytes == 0 })
}

/// Returns kept pages to the system until the limit holds again.
fn trim() {
    loop {
        let in_all_bytes = LIVE_BYTES.load(SeqCst).saturating_add(CACHED_BYTES.load(SeqCst));
        let too_many_bytes = in_all_bytes.saturating_sub(LIMIT_BYTES.load(SeqCst));
        if too_many_bytes == 0 {
            return;
        }
        let bytes = padded_bytes(too_many_bytes).max(GIVEN_BACK_BYTES);
        let Some((start, bytes)) = FREE.with(|free| free.take_kept(bytes)) else { return };
        give_back(start, bytes);
        CACHED_BYTES.fetch_sub(bytes, SeqCst);
    }
}

/// Maps addresses for blocks of `bytes`, for many of them if the system has so many addresses for this
/// process.
fn map(bytes: usize) -> Option<()> {
    let (start, bytes) = [bytes.max(MAPPING_BYTES), bytes]
        .into_iter()
        .find_map(|bytes| anonymous(bytes).map(|start| (start, bytes)))?;
    // SAFETY: the range is the mapping just made; the advice changes no byte of it and may be refused.
    unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
    let is_given = FREE.with(|free| free.give(start.expose_provenance(), bytes, false));
    if !is_given {
        unmap(start.expose_provenance(), bytes);
    }
    is_given.then_some(())
}

fn anonymous(bytes: usize) -> Option<*mut libc::c_void> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    (mapped != libc::MAP_FAILED).then_some(mapped)
}

/// Returns the pages of a range that is nobody's to the system. Its addresses stay, unless the system or the
/// table refuses.
fn give_back(start: usize, bytes: usize) {
    // SAFETY: whoever calls this is the only owner of the range, which lies in mappings made by `map`. It
    // reads as zero afterwards.
    let advised =
        unsafe { libc::madvise(ptr::with_exposed_provenance_mut(start), bytes, libc::MADV_DONTNEED) };
    if advised != 0 || !FREE.with(|free| free.give(start, bytes, false)) {
        unmap(start, bytes);
    }
}

fn unmap(start: usize, bytes: usize) {
    // SAFETY: whoever calls this is the only owner of the range, which lies in mappings made by `map`, and
    // nobody finds it again.
    unsafe { libc::munmap(ptr::with_exposed_provenance_mut(start), bytes) };
}

/// The free ranges of all mappings, under a lock.
struct Free {
    is_locked: AtomicBool,
    ranges: UnsafeCell<Ranges>,
}

// SAFETY: the ranges are only reached through `with`, which holds the lock.
unsafe impl Sync for Free {}

impl Free {
    const fn new() -> Self {
        Self { is_locked: AtomicBool::new(false), ranges: UnsafeCell::new(Ranges::new()) }
    }

    /// Runs `work`, which must neither allocate nor panic, on the ranges.
    fn with<R>(&self, work: impl FnOnce(&mut Ranges) -> R) -> R {
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
        let result = work(unsafe { &mut *self.ranges.get() });
        self.is_locked.store(false, SeqCst);
        result
    }
}
