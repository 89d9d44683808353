//! Modules, kernels and launches.

use std::ffi::{CStr, c_char, c_int, c_uint};

use super::{call, give};
use crate::driver::work::Work;
use crate::fault::Code;

/// Threads of a block at most.
const MOST_THREADS: u64 = 1024;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoad(_module: *mut usize, _file: *const c_char) -> c_int {
    Code::NotSupported.number()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_char) -> c_int {
    call("cuModuleLoadData", |state| {
        // SAFETY: the caller's text ends with a zero byte, see the module.
        let text = unsafe { CStr::from_ptr(image) }.to_string_lossy();
        let handle = state.load_module(&text).map_err(|fault| {
            state.report(&fault.message);
            fault.code
        })?;
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(module, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: usize) -> c_int {
    call("cuModuleUnload", |state| state.modules.remove(&module).map(drop).ok_or(Code::InvalidHandle))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut usize,
    module: usize,
    name: *const c_char,
) -> c_int {
    call("cuModuleGetFunction", |state| {
        // SAFETY: the caller's text ends with a zero byte, see the module.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let handle = state.function(module, &name).map_err(|fault| {
            state.report(&fault.message);
            fault.code
        })?;
        // SAFETY: the caller's pointer, see the module.
        unsafe { give(function, handle) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: usize,
    arguments: *const *const u8,
    _extra: usize,
) -> c_int {
    call("cuLaunchKernel", |state| {
        let stream = state.stream(stream)?;
        let function = state.functions.get(&function).cloned().ok_or(Code::InvalidHandle)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads: u64 = block.iter().map(|axis| u64::from(*axis)).product();
        if grid.contains(&0) || threads == 0 || threads > MOST_THREADS {
            state.report(&format!("{}: the grid {grid:?} of blocks {block:?} cannot be", function.label));
            return Err(Code::InvalidValue);
        }
        let program = &function.program;
        let mut parameters = vec![0; program.parameter_bytes];
        for (index, (start, length)) in program.parameters.iter().enumerate() {
            // SAFETY: the caller gives an address for each parameter of the kernel, of as many bytes as it
            // has.
            let argument = unsafe { std::slice::from_raw_parts(*arguments.add(index), *length) };
            parameters[*start..start + length].copy_from_slice(argument);
        }
        let shared_bytes = shared_bytes as usize;
        state.enqueue(stream, Work::Launch { function, grid, block, shared_bytes, parameters })
    })
}
