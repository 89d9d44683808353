//! cuRAND: random numbers.

use std::ffi::c_int;

use super::{call, give};
use crate::driver::State;
use crate::driver::work::Work;
use crate::fault::Code;
use crate::random::{Distribution, Draw};

/// What cuRAND answers, as in `curand.h`.
const LENGTH_NOT_MULTIPLE: c_int = 105;
const LAUNCH_FAILURE: c_int = 201;

/// A generator: the stream that it draws on, and what its next numbers are made from.
pub struct Generator {
    stream: usize,
    seed: u64,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandCreateGenerator(generator: *mut *mut Generator, _kind: c_int) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(generator, Box::into_raw(Box::new(Generator { stream: 0, seed: 0 }))) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandDestroyGenerator(generator: *mut Generator) -> c_int {
    // SAFETY: the caller has it from `curandCreateGenerator` and does not use it again.
    drop(unsafe { Box::from_raw(generator) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandSetStream(generator: *mut Generator, stream: usize) -> c_int {
    // SAFETY: the caller has it from `curandCreateGenerator`, and no other thread uses it meanwhile.
    unsafe { (*generator).stream = stream };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandSetPseudoRandomGeneratorSeed(generator: *mut Generator, seed: u64) -> c_int {
    // SAFETY: the caller has it from `curandCreateGenerator`, and no other thread uses it meanwhile.
    unsafe { (*generator).seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
    0
}

/// Draws numbers.
///
/// # Safety
/// `generator` is from `curandCreateGenerator`, and no other thread uses it meanwhile.
unsafe fn draw(
    name: &'static str,
    generator: *mut Generator,
    address: u64,
    count: usize,
    is_double: bool,
    distribution: Distribution,
) -> c_int {
    // SAFETY: the caller says so.
    let generator = unsafe { &mut *generator };
    // Each draw has numbers of its own.
    generator.seed = generator.seed.wrapping_add(0xd1b5_4a32_d192_ed03);
    let (handle, seed) = (generator.stream, generator.seed);
    let draw = Draw { address, count, is_double, distribution, seed };
    let enqueue = |state: &mut State| -> Result<(), Code> {
        let stream = state.stream(handle)?;
        state.enqueue(stream, Work::Draw(draw))
    };
    if call(name, enqueue) == 0 { 0 } else { LAUNCH_FAILURE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandGenerateUniform(generator: *mut Generator, to: u64, count: usize) -> c_int {
    // SAFETY: the caller's generator, see the module.
    unsafe { draw("curandGenerateUniform", generator, to, count, false, Distribution::Uniform) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandGenerateUniformDouble(
    generator: *mut Generator,
    to: u64,
    count: usize,
) -> c_int {
    // SAFETY: the caller's generator, see the module.
    unsafe { draw("curandGenerateUniformDouble", generator, to, count, true, Distribution::Uniform) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandGenerateNormal(
    generator: *mut Generator,
    to: u64,
    count: usize,
    mean: f32,
    deviation: f32,
) -> c_int {
    if count % 2 == 1 {
        return LENGTH_NOT_MULTIPLE;
    }
    let normal = Distribution::Normal(f64::from(mean), f64::from(deviation));
    // SAFETY: the caller's generator, see the module.
    unsafe { draw("curandGenerateNormal", generator, to, count, false, normal) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandGenerateNormalDouble(
    generator: *mut Generator,
    to: u64,
    count: usize,
    mean: f64,
    deviation: f64,
) -> c_int {
    if count % 2 == 1 {
        return LENGTH_NOT_MULTIPLE;
    }
    // SAFETY: the caller's generator, see the module.
    unsafe {
        draw("curandGenerateNormalDouble", generator, to, count, true, Distribution::Normal(mean, deviation))
    }
}
