//! An f32 in two halves of 16 bits: the value rounded to bf16, and what its bits differ by.
//!
//! Ties are rounded away from zero and not to even. Otherwise 65,537 values would be rounded to the same even
//! number, both of its ties among them, and the 65,536 remainders could not tell them apart.

use crate::simd::on_paths;

#[inline(always)]
fn halves(value: f32) -> (u16, u16) {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x8000) >> 16;
    // A NaN is made quiet, so that rounding cannot make a number of it.
    let (rounded, rest) = if value.is_nan() { ((bits >> 16) | 0x40, 0) } else { (rounded, bits) };
    (rounded as u16, rest as u16)
}

#[inline(always)]
fn whole(rounded: u16, remainder: u16) -> f32 {
    // As a number with a sign the remainder is the difference of the bits.
    f32::from_bits((u32::from(rounded) << 16).wrapping_add(i32::from(remainder as i16) as u32))
}

on_paths! {
    /// Splits every value, exactly but for the payload of a NaN.
    fn split(values: &[f32], rounded: &mut [u16], remainder: &mut [u16]) {
        for ((&value, rounded), remainder) in values.iter().zip(rounded).zip(remainder) {
            (*rounded, *remainder) = halves(value);
        }
    }

    /// The values of two halves.
    fn join(rounded: &[u16], remainder: &[u16], values: &mut [f32]) {
        for ((&rounded, &remainder), value) in rounded.iter().zip(remainder).zip(values) {
            *value = whole(rounded, remainder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn check(bits: u32) {
        let value = f32::from_bits(bits);
        let (rounded, remainder) = halves(value);
        let back = whole(rounded, remainder);
        if value.is_nan() {
            assert!(back.is_nan() && bf16::from_bits(rounded).is_nan(), "{bits:#x}");
            return;
        }
        assert_eq!(back.to_bits(), bits, "{bits:#x}");
        // Apart from ties the half is what rounding to nearest even gives.
        if bits & 0xffff != 0x8000 {
            assert_eq!(rounded, bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn every_remainder_of_every_kind_of_number_comes_back() {
        // Zero, the least and the largest subnormal, the step to normal numbers, carries into the exponent,
        // the largest, infinity, NaN.
        let uppers =
            [0, 1, 2, 0x7e, 0x7f, 0x80, 0x81, 0x3f7f, 0x3f80, 0x40ff, 0x7f7e, 0x7f7f, 0x7f80, 0x7fff];
        for upper in uppers {
            for lower in 0..=0xffff {
                check(upper << 16 | lower);
                check((0x8000 | upper) << 16 | lower);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn any_number_comes_back(bits: u32) {
            check(bits);
        }
    }
}
