//! Fused multiply-add by the processor's own instruction, which is the same number many times faster than without.

use super::{Compute, Mask, Step};
use crate::interpreter::Registers;
use crate::program::float::Float;

/// The function of an fma of f32 or f64; none on processors without the instruction.
pub fn fused<T: Float>() -> Option<Compute> {
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return Some(|registers, step, mask| {
            // SAFETY: the processor has both, which was found out when the function was chosen.
            unsafe { map::<T>(registers, step, mask) }
        });
    }
    None
}

#[target_feature(enable = "avx2,fma")]
fn map<T: Float>(registers: &mut Registers, step: &Step, mask: Mask) {
    registers.map(step, mask, |[a, b, c]| T::of(a).fused(T::of(b), T::of(c)).lane());
}
