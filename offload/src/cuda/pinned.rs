//! The host's page-locked memory.

use super::failed;
use crate::{Error, PAGE_BYTES, locked};
use cudarc::driver::{CudaContext, result};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Where page-locked memory of this process begins, and how many bytes it has.
static PAGE_LOCKED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Whether a copy from or to these bytes goes on beside the host. It is told by their address, whoever owns
/// them.
pub(super) fn is_page_locked(bytes: &[u8]) -> bool {
    let first = bytes.as_ptr().addr();
    let page_locked = locked(&PAGE_LOCKED);
    page_locked.range(..=first).next_back().is_some_and(|(base, len)| first + bytes.len() <= base + len)
}

/// Page-locked memory that the device copies from and to while the host goes on. Disks read and write it too.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    /// What the driver gave.
    allocation: NonNull<u8>,
    /// The first page in it.
    base: NonNull<u8>,
    context: Arc<CudaContext>,
}

impl PinnedMemory {
    /// Allocates `bytes` zeroed bytes.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, Error> {
        // Known to every context, and cached: the host reads gradients and states from it.
        const PORTABLE: u32 = 1;
        let action = "page-locked host memory";
        context.bind_to_thread().map_err(failed(action))?;
        // Direct I/O needs whole pages, and the driver promises none.
        // SAFETY: the memory is unset until it is set below.
        let given = unsafe { result::malloc_host(bytes + PAGE_BYTES, PORTABLE) }
            .map_err(failed(action))?
            .cast::<u8>();
        let none = || Error::Cuda { action, reason: "none was given".into() };
        let allocation = NonNull::new(given).ok_or_else(none)?;
        let base = NonNull::new(given.wrapping_add(given.align_offset(PAGE_BYTES))).ok_or_else(none)?;
        // SAFETY: `bytes` from the first page on are within the range that the driver has just given.
        unsafe { base.as_ptr().write_bytes(0, bytes) };
        locked(&PAGE_LOCKED).insert(base.addr().get(), bytes);
        Ok(Self { allocation, base, context: context.clone() })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        locked(&PAGE_LOCKED).remove(&self.base.addr().get());
        // A failure leaves the memory to the end of the process.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the memory came from `malloc_host`, and no lease of it is left: each holds the arena
            // alive.
            let _ = unsafe { result::free_host(self.allocation.as_ptr().cast::<c_void>()) };
        }
    }
}
