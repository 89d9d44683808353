//! The device and its context.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint};

use super::{call, give};
use crate::driver::DEVICE_BYTES;
use crate::fault::Code;

/// The only context there is.
const CONTEXT: usize = 0xc0;
const NAME: &CStr = c"simcuda (software)";
/// CUDA 13.0.
const VERSION: c_int = 13000;

thread_local! {
    static CONTEXT_OF_THREAD: Cell<usize> = const { Cell::new(0) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    call("cuInit", |state| state.check())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(version, VERSION) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(count, 1) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if ordinal != 0 {
        return Code::InvalidDevice.number();
    }
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(device, 0) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> c_int {
    let bytes = NAME.to_bytes_with_nul();
    let Some(length) = usize::try_from(length).ok().filter(|length| *length >= bytes.len()) else {
        return Code::InvalidValue.number();
    };
    // SAFETY: the caller has `length` bytes, which are not fewer.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), name, bytes.len().min(length)) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(bytes, DEVICE_BYTES) };
    0
}

/// An attribute of the device, by CUDA's number: those of an A100 where the driver has no reason for another
/// one.
fn attribute(number: c_int) -> c_int {
    match number {
        // Threads of a block, and along each axis.
        1..=3 => 1024,
        4 => 64,
        // Blocks along each axis.
        5 => i32::MAX,
        6 | 7 => 65535,
        // Shared memory of a block, threads of a warp, registers of a block.
        8 => 49152,
        10 => 32,
        12 => 65536,
        // Multiprocessors, and threads of each.
        16 => 108,
        39 => 2048,
        // Copy engines; addresses shared with the host.
        40 | 41 => 1,
        // Compute capability 8.0.
        75 => 8,
        76 => 0,
        // Shared memory of a multiprocessor, and of a block that asks for it.
        81 => 167_936,
        97 => 166_912,
        // Memory pools.
        115 => 1,
        _ => 0,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, number: c_int, _device: c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(value, attribute(number)) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(context, CONTEXT) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDestroy_v2(_context: usize) -> c_int {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(context, CONTEXT_OF_THREAD.get()) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: usize) -> c_int {
    CONTEXT_OF_THREAD.set(context);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize() -> c_int {
    call("cuCtxSynchronize", |state| state.synchronize_all())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> c_int {
    // SAFETY: the caller's pointers, see the module.
    unsafe {
        give(least, 0);
        give(greatest, -5);
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int {
    let found = match code {
        1 => c"invalid value (simcuda)",
        2 => c"out of memory (simcuda)",
        218 => c"invalid PTX (simcuda)",
        500 => c"named symbol not found (simcuda)",
        600 => c"not ready (simcuda)",
        700 => c"an illegal memory access was encountered (simcuda)",
        710 => c"an assertion failed on the device (simcuda)",
        719 => c"a kernel failed (simcuda)",
        _ => c"error (simcuda)",
    };
    // SAFETY: the caller's pointer, see the module; the text lives as long as the program.
    unsafe { give(text, found.as_ptr()) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(_code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: the caller's pointer, see the module; the text lives as long as the program.
    unsafe { give(text, c"CUDA_ERROR".as_ptr()) };
    0
}
