//! Memory of the device, page-locked memory of the host, and copies.

use std::ffi::{c_int, c_uint};

use super::{call, give};
use crate::driver::work::Work;
use crate::driver::{DEVICE_BYTES, State};
use crate::fault::Code;
use crate::memory::FRESH;

impl State {
    fn allocate(&mut self, bytes: usize) -> Result<u64, Code> {
        self.check()?;
        let fits = self.memory.live_bytes().checked_add(bytes).is_some_and(|all| all <= DEVICE_BYTES);
        if fits { Ok(self.memory.allocate(bytes, FRESH)) } else { Err(Code::OutOfMemory) }
    }

    /// Whether the whole range is page-locked.
    fn is_pinned(&self, start: usize, bytes: usize) -> bool {
        self.pinned
            .range(..=start)
            .next_back()
            .is_some_and(|(address, memory)| start + bytes <= address + memory.len())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    call("cuMemGetInfo_v2", |state| {
        // SAFETY: the caller's pointers, see the module.
        unsafe {
            give(free, DEVICE_BYTES.saturating_sub(state.memory.live_bytes()));
            give(total, DEVICE_BYTES);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    call("cuMemAlloc_v2", |state| {
        let found = state.allocate(bytes)?;
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(address, found) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize) -> c_int {
    call("cuMemAllocAsync", |state| {
        let stream = state.stream(stream)?;
        let found = state.allocate(bytes)?;
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(address, found) };
        state.enqueue(stream, Work::Allocate { address: found })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    call("cuMemFree_v2", |state| {
        state.synchronize_all()?;
        state.memory.free(address).map_err(|fault| state.fail(fault))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(address: u64, stream: usize) -> c_int {
    call("cuMemFreeAsync", |state| {
        let stream = state.stream(stream)?;
        if let Err(fault) = state.memory.whole(address, "free") {
            state.report(&fault.message);
            return Err(Code::InvalidValue);
        }
        state.enqueue(stream, Work::Free { address })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut usize, bytes: usize, _flags: c_uint) -> c_int {
    call("cuMemHostAlloc", |state| {
        let mut memory = vec![FRESH; bytes.max(1)].into_boxed_slice();
        let start = memory.as_mut_ptr() as usize;
        state.pinned.insert(start, memory);
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(address, start) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: usize) -> c_int {
    call("cuMemFreeHost", |state| {
        // Copies from or to it may be on their way. Where one of them fails, the memory goes all the same.
        let synchronized = state.synchronize_all();
        state.pinned.remove(&address).ok_or(Code::InvalidValue)?;
        synchronized
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, length: usize, stream: usize) -> c_int {
    call("cuMemcpyHtoDAsync_v2", |state| {
        let stream = state.stream(stream)?;
        if state.is_pinned(from, length) {
            return state.enqueue(stream, Work::UploadPinned { to, from, length });
        }
        // SAFETY: the caller's memory, see the module. Other than page-locked memory it may be given up when
        // this returns.
        let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, length) }.to_vec();
        state.enqueue(stream, Work::Upload { to, bytes })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, length: usize, stream: usize) -> c_int {
    call("cuMemcpyDtoHAsync_v2", |state| {
        let stream = state.stream(stream)?;
        let is_pinned = state.is_pinned(to, length);
        state.enqueue(stream, Work::Download { to, from, length })?;
        if is_pinned { Ok(()) } else { state.synchronize(stream) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, length: usize, stream: usize) -> c_int {
    call("cuMemcpyDtoDAsync_v2", |state| {
        let stream = state.stream(stream)?;
        state.enqueue(stream, Work::Copy { to, from, length })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    _to_context: usize,
    from: u64,
    _from_context: usize,
    length: usize,
    stream: usize,
) -> c_int {
    call("cuMemcpyPeerAsync", |state| {
        let stream = state.stream(stream)?;
        state.enqueue(stream, Work::Copy { to, from, length })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, length: usize, stream: usize) -> c_int {
    call("cuMemsetD8Async", |state| {
        let stream = state.stream(stream)?;
        state.enqueue(stream, Work::Fill { to, value, length })
    })
}
