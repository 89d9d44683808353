//! One run of host memory for everything that is in transit, given out in aligned leases.
//!
//! The memory is mapped once, pinned when the system allows it, and never moved, so that a disk or a device
//! can read and write it directly. The step loop therefore allocates nothing.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::PoisonError,
};

// The same code under the real and the modelled locks: see tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Arc, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Arc, Mutex, MutexGuard};

use memmap2::{Advice, MmapMut};

use crate::{Budget, Error, Notice, Reservation};

/// Alignment of leases, extents and pieces: what `O_DIRECT` and the memory management ask for.
pub const PAGE_BYTES: usize = 4096;

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// `bytes` rounded up to whole pages of [`PAGE_BYTES`].
pub const fn padded_bytes(bytes: usize) -> usize {
    bytes.div_ceil(PAGE_BYTES) * PAGE_BYTES
}

/// A fixed run of pinned host memory. Clones share it; it lives until the last clone and the last lease are
/// gone.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mapping: Mapping,
    free: Mutex<FreeRuns>,
    notices: Vec<Notice>,
    _reservation: Reservation,
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, FreeRuns> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arena {
    /// Maps `capacity_bytes`, rounded up to [`PAGE_BYTES`], drawn from `budget`.
    ///
    /// Memory that cannot be pinned works too and leaves the notice `arena-not-pinned`.
    ///
    /// # Errors
    /// [`Error::OverBudget`], or [`Error::ArenaMap`] when the system has no such run of memory.
    pub fn new(budget: &Budget, capacity_bytes: usize) -> Result<Self, Error> {
        let padded = padded_capacity(capacity_bytes)?;
        let reservation = budget.reserve(padded as u64)?;
        let mapping = Mapping::new(padded).map_err(|source| Error::ArenaMap { capacity_bytes, source })?;
        let mut notices = Vec::new();
        if let Err(refusal) = mapping.pin() {
            let text = format!(
                "{padded} bytes of host memory could not be pinned ({refusal}), so they may be swapped out; \
                 raise the limit on locked memory (ulimit -l) to pin them"
            );
            notices.push(Notice::new("arena-not-pinned", text));
        }
        Ok(Self::over(mapping, notices, reservation))
    }

    /// As [`Self::new`], of page-locked memory that a CUDA device copies from and to while the host goes on.
    ///
    /// # Errors
    /// [`Error::OverBudget`] and [`Error::Cuda`].
    #[cfg(feature = "cuda")]
    pub fn pinned_for_cuda(
        budget: &Budget,
        capacity_bytes: usize,
        cuda: &crate::cuda::Cuda,
    ) -> Result<Self, Error> {
        let padded = padded_capacity(capacity_bytes)?;
        let reservation = budget.reserve(padded as u64)?;
        let memory = crate::cuda::PinnedMemory::new(cuda.context(), padded)?;
        let mapping =
            Mapping { base: memory.base(), bytes: padded, owner: Owner::PinnedForCuda { _memory: memory } };
        Ok(Self::over(mapping, vec![], reservation))
    }

    fn over(mapping: Mapping, notices: Vec<Notice>, reservation: Reservation) -> Self {
        let free = Mutex::new(FreeRuns::new(mapping.bytes));
        Self { shared: Arc::new(Shared { mapping, free, notices, _reservation: reservation }) }
    }

    /// Gives out `bytes` zeroed bytes, aligned to [`PAGE_BYTES`] and backed by whole pages.
    ///
    /// # Errors
    /// [`Error::ArenaExhausted`] when no free run is long enough.
    pub fn lease(&self, bytes: usize) -> Result<Lease, Error> {
        let capacity_bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).unwrap_or(usize::MAX);
        let offset = {
            let mut free = self.shared.free();
            free.take(capacity_bytes).ok_or_else(|| Error::ArenaExhausted {
                requested_bytes: bytes,
                free_bytes: free.free_bytes(),
                largest_free_bytes: free.largest_bytes(),
            })?
        };
        let mut lease = Lease { arena: self.shared.clone(), offset, bytes, capacity_bytes };
        lease.padded_mut().fill(0);
        Ok(lease)
    }

    /// Bytes of the whole arena.
    pub fn capacity_bytes(&self) -> usize {
        self.shared.mapping.bytes
    }

    /// Bytes that are not leased now, in whatever runs.
    pub fn free_bytes(&self) -> usize {
        self.shared.free().free_bytes()
    }

    /// What could not be had, such as pinning.
    pub fn notices(&self) -> &[Notice] {
        &self.shared.notices
    }
}

fn padded_capacity(capacity_bytes: usize) -> Result<usize, Error> {
    let too_long = || Error::ArenaMap { capacity_bytes, source: io::ErrorKind::InvalidInput.into() };
    capacity_bytes.max(1).checked_next_multiple_of(PAGE_BYTES).ok_or_else(too_long)
}

/// An owned, aligned range of an [`Arena`]. It moves into a transfer and comes back with its completion.
pub struct Lease {
    arena: Arc<Shared>,
    offset: usize,
    bytes: usize,
    capacity_bytes: usize,
}

impl Lease {
    /// Bytes behind the lease: its length rounded up to whole pages. Transfers move whole pages.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// The lease as `f32`, as many as fit its length.
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: the start is page aligned, the range is initialised and borrowed with `self`, and every
        // pattern of four bytes is an f32.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.bytes / size_of::<f32>()) }
    }

    /// The lease as `f32`, as many as fit its length.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_f32`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.bytes / size_of::<f32>()) }
    }

    /// The lease as numbers of two bytes, as many as fit its length: what bf16 and f16 are made of.
    pub fn as_u16(&self) -> &[u16] {
        // SAFETY: as in `as_f32`; every pattern of two bytes is a u16.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.bytes / size_of::<u16>()) }
    }

    /// The lease as numbers of two bytes, as many as fit its length.
    pub fn as_u16_mut(&mut self) -> &mut [u16] {
        // SAFETY: as in `as_u16`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.bytes / size_of::<u16>()) }
    }

    /// All pages of the lease, also those bytes past its length that pad it.
    pub fn padded(&self) -> &[u8] {
        // SAFETY: the free list gave `offset..offset + capacity_bytes` to this lease alone, the arena keeps
        // the mapping alive, and mapped anonymous memory is initialised (to zero).
        unsafe { std::slice::from_raw_parts(self.start(), self.capacity_bytes) }
    }

    /// All pages of the lease, also those bytes past its length that pad it.
    pub fn padded_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `padded`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.capacity_bytes) }
    }

    fn start(&self) -> *mut u8 {
        self.arena.mapping.base.as_ptr().wrapping_add(self.offset)
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.padded()[..self.bytes]
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        &mut self.padded_mut()[..bytes]
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Lease").field("offset", &self.offset).field("bytes", &self.bytes).finish()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.arena.free().give_back(self.offset, self.capacity_bytes);
    }
}

/// Memory that leases are parts of.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

/// What gives the memory back when it is dropped.
#[derive(Debug)]
enum Owner {
    Mapped(MmapMut),
    #[cfg(feature = "cuda")]
    PinnedForCuda {
        _memory: crate::cuda::PinnedMemory,
    },
}

// SAFETY: a mapping is memory of the whole process; who may touch which part is the free list's business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`; a large mapping asks for huge pages.
    fn new(bytes: usize) -> io::Result<Self> {
        let mut mapped = MmapMut::map_anon(bytes)?;
        if bytes >= HUGE_PAGE_BYTES {
            // Without them it is as good, and slower.
            let _ = mapped.advise(Advice::HugePage);
        }
        let base = NonNull::new(mapped.as_mut_ptr()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes, owner: Owner::Mapped(mapped) })
    }

    fn pin(&self) -> io::Result<()> {
        match &self.owner {
            Owner::Mapped(mapped) => mapped.lock(),
            #[cfg(feature = "cuda")]
            Owner::PinnedForCuda { .. } => Ok(()),
        }
    }
}

/// Free runs by offset. Neighbours are always joined, so a run ends where leased bytes begin.
#[derive(Debug)]
struct FreeRuns {
    bytes_by_offset: BTreeMap<usize, usize>,
}

impl FreeRuns {
    fn new(bytes: usize) -> Self {
        Self { bytes_by_offset: BTreeMap::from([(0, bytes)]) }
    }

    /// Takes the first run that is long enough, from its start.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&offset, &run_bytes) =
            self.bytes_by_offset.iter().find(|(_, run_bytes)| **run_bytes >= bytes)?;
        self.bytes_by_offset.remove(&offset);
        if run_bytes > bytes {
            self.bytes_by_offset.insert(offset + bytes, run_bytes - bytes);
        }
        Some(offset)
    }

    fn give_back(&mut self, mut offset: usize, mut bytes: usize) {
        if let Some(next_bytes) = self.bytes_by_offset.remove(&(offset + bytes)) {
            bytes += next_bytes;
        }
        if let Some((&before, &before_bytes)) = self.bytes_by_offset.range(..offset).next_back()
            && before + before_bytes == offset
        {
            offset = before;
            bytes += before_bytes;
        }
        self.bytes_by_offset.insert(offset, bytes);
    }

    fn free_bytes(&self) -> usize {
        self.bytes_by_offset.values().sum()
    }

    fn largest_bytes(&self) -> usize {
        self.bytes_by_offset.values().copied().max().unwrap_or(0)
    }
}
