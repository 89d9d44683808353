//! The number types of gradients and of low-precision parameters, converted without branches so that loops
//! vectorise.

use half::{bf16, f16};

/// A type that gradients may have.
pub trait Element: Copy + Send + Sync {
    /// The exact value in f32.
    fn widen(self) -> f32;
    /// The nearest value, ties to even; what is too large becomes infinite, NaN stays NaN.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN keeps its sign and upper bits, and is made quiet.
        let nan = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { nan } else { rounded } as u16)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        // Multiplying by 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
        let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
        // A NaN becomes quiet, as conversion instructions make it.
        let quiet = if bits & 0x3ff == 0 { 0 } else { 0x0040_0000 };
        let special = f32::from_bits(magnitude | 0x7f80_0000 | quiet);
        let unsigned = if bits & 0x7c00 == 0x7c00 { special } else { finite };
        f32::from_bits(unsigned.to_bits() | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        // Normal results: move the bias from 127 to 15 and round at bit 13, ties to even.
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
        // Subnormal results: adding one half puts the result's last bit at the sum's last bit, rounded by the
        // addition.
        let half = f32::from_bits(126 << 23);
        let subnormal = (f32::from_bits(magnitude) + half).to_bits().wrapping_sub(half.to_bits());
        let nan = 0x7e00 | (magnitude >> 13) & 0x3ff;
        let finite = if magnitude < 113 << 23 { subnormal } else { normal };
        // 65520 and above round to infinity.
        let large = if magnitude > 0x7f80_0000 { nan } else { 0x7c00 };
        Self::from_bits((sign | if magnitude >= 0x477f_f000 { large } else { finite }) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_half_widens_as_the_half_crate_says_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert_eq!(b.widen().to_bits(), u32::from(bits) << 16);
            assert_eq!(h.widen().to_bits(), h.to_f32().to_bits(), "{bits:#x}");
            if !b.is_nan() {
                assert_eq!(bf16::narrow(b.widen()), b);
            }
            if !h.is_nan() {
                assert_eq!(f16::narrow(h.widen()), h);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn narrowing_is_that_of_the_half_crate(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(bf16::narrow(value).to_bits(), bf16::from_f32(value).to_bits());
            prop_assert_eq!(f16::narrow(value).to_bits(), f16::from_f32(value).to_bits());
        }

        #[test]
        fn narrowing_to_f16_rounds_its_whole_range_to_even(value in -70_000f32..70_000.0, shift in 0i32..40) {
            let value = value * 0.5f32.powi(shift);
            prop_assert_eq!(f16::narrow(value).to_bits(), f16::from_f32(value).to_bits());
        }
    }
}
