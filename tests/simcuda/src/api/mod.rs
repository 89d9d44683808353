//! The C interface: as much of the driver's, of cuBLAS's and of cuRAND's as programs of candle and cudarc
//! call.
//!
//! Functions have CUDA's names and arguments, so their documentation is CUDA's. They are `unsafe` as all of
//! them are: callers promise that pointers are valid for what the function reads or writes there.
#![allow(non_snake_case, reason = "CUDA's names")]
#![allow(clippy::missing_safety_doc, reason = "see above: the same for all")]
#![allow(missing_docs, reason = "CUDA documents them")]

pub mod cublas;
pub mod curand;
pub mod device;
pub mod memory;
pub mod modules;
pub mod streams;

use std::ffi::c_int;

use crate::driver::{Driver, State};
use crate::fault::Code;

/// Runs a function of the interface on the device of this thread, counts it, and answers its code.
fn call(name: &'static str, run: impl FnOnce(&mut State) -> Result<(), Code>) -> c_int {
    let driver = Driver::current();
    let mut state = driver.lock();
    *state.calls.entry(name).or_default() += 1;
    run(&mut state).map_or_else(Code::number, |()| 0)
}

/// Writes a result where the caller wants it, if anywhere.
///
/// # Safety
/// `to` is null or valid for a write.
unsafe fn give<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: the caller says so.
        unsafe { to.write(value) };
    }
}
