//! What every operation's loops are made of: dispatch to the CPU's vector instructions, reductions in a fixed
//! order, chunks of work of a fixed size, and elementary functions that vectorise.
//!
//! The loops are plain Rust, compiled several times for different instruction sets; no contraction to fused
//! multiply-add happens, so every path gives the same bits.

/// Partial sums that a reduction keeps: enough for four 8-wide registers' latency to hide, the same on every
/// CPU.
const LANES: usize = 32;

/// Elements that one task of a threaded loop handles: large against the cost of a task, small against a
/// cache.
const CHUNK_ELEMENTS: usize = 16 * 1024;

/// The elements of one task's whole rows, at least one row; at least 1, so that it can divide a slice.
pub(super) fn chunk_elements(row_elements: usize) -> usize {
    let rows = (CHUNK_ELEMENTS / row_elements.max(1)).max(1);
    (rows * row_elements).max(1)
}

/// Defines functions whose body is compiled for AVX-512, AVX2 and the baseline of the target; a call takes
/// the best one that the CPU has.
macro_rules! vectorized {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block
    )*) => {$(
        $(#[$attribute])*
        $visibility fn $name($($argument: $kind),*) {
            #[inline(always)]
            fn body($($argument: $kind),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx2,fma")]
                fn avx512($($argument: $kind),*) {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $kind),*) {
                    body($($argument),*)
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    if is_x86_feature_detected!("avx512f") {
                        // SAFETY: the CPU has AVX-512F, AVX2 and FMA, which were just detected.
                        return unsafe { avx512($($argument),*) };
                    }
                    // SAFETY: the CPU has AVX2 and FMA, which were just detected.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    )*};
}
pub(super) use vectorized;

/// Sums `term(x)` over a row: lane by lane, then the lanes pairwise.
#[inline(always)]
pub(super) fn sum_by(xs: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (blocks, tail) = xs.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] += term(block[lane]);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(tail) {
        *sum += term(x);
    }
    combine(sums, |a, b| a + b)
}

/// Sums `term(x, y)` over two rows of one length.
#[inline(always)]
pub(super) fn sum_by2(xs: &[f32], ys: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let (x_blocks, x_tail) = xs.as_chunks::<LANES>();
    let (y_blocks, y_tail) = ys.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for lane in 0..LANES {
            sums[lane] += term(x[lane], y[lane]);
        }
    }
    for ((sum, &x), &y) in sums.iter_mut().zip(x_tail).zip(y_tail) {
        *sum += term(x, y);
    }
    combine(sums, |a, b| a + b)
}

/// Sums `term(x, y, z)` over three rows of one length.
#[inline(always)]
pub(super) fn sum_by3(xs: &[f32], ys: &[f32], zs: &[f32], term: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let (x_blocks, x_tail) = xs.as_chunks::<LANES>();
    let (y_blocks, y_tail) = ys.as_chunks::<LANES>();
    let (z_blocks, z_tail) = zs.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for ((x, y), z) in x_blocks.iter().zip(y_blocks).zip(z_blocks) {
        for lane in 0..LANES {
            sums[lane] += term(x[lane], y[lane], z[lane]);
        }
    }
    for (((sum, &x), &y), &z) in sums.iter_mut().zip(x_tail).zip(y_tail).zip(z_tail) {
        *sum += term(x, y, z);
    }
    combine(sums, |a, b| a + b)
}

/// The largest element, −∞ for none. A NaN may or may not be seen: the sum of exponentials that follows
/// carries it.
#[inline(always)]
pub(super) fn maximum(xs: &[f32]) -> f32 {
    let (blocks, tail) = xs.as_chunks::<LANES>();
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for lane in 0..LANES {
            maxima[lane] = larger(maxima[lane], block[lane]);
        }
    }
    for (maximum, &x) in maxima.iter_mut().zip(tail) {
        *maximum = larger(*maximum, x);
    }
    combine(maxima, larger)
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Folds the lanes by halves: always the same tree.
#[inline(always)]
fn combine(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` with a relative error below 2e-7.
///
/// `x = n·ln 2 + r` with integer `n` and `|r| ≤ ln 2 / 2`; `ln 2` is split in two so that `r` loses nothing
/// (Cody and Waite, *Software Manual for the Elementary Functions*, 1980); `e^r` is the Taylor polynomial of
/// degree 7 (truncation 5e-9) and `2^n` is put together from its bits. Below the smallest normal number the
/// result is 0, above 2^127 it stays at the largest reachable value, and NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.336;
    const HIGHEST: f32 = 88.376;
    // Adding this moves the integer part of a small number into the low bits of the mantissa, rounded to
    // nearest.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    let clamped = if x > HIGHEST { HIGHEST } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut power = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        power = power * r + coefficient;
    }
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOWEST { 0.0 } else { power * scale }
}

/// `e^x`, see [`exp`], as a share of a sum that is 1 or more: 0 below 1e-30, which adds nothing to it.
/// Products of such numbers would be subnormal, which some processors multiply much more slowly.
#[inline(always)]
pub(super) fn share(x: f32) -> f32 {
    let share = exp(x);
    if share < 1e-30 { 0.0 } else { share }
}

/// `1 / (1 + e^−x)`, see [`exp`].
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorized! {
        /// Exponentials of a slice.
        fn exponentials(xs: &[f32], out: &mut [f32]) {
            for (out, &x) in out.iter_mut().zip(xs) {
                *out = exp(x);
            }
        }
    }

    #[test]
    fn exp_is_within_its_stated_error_of_f64() {
        let xs: Vec<f32> = (0..2_000_000).map(|i| -87.3 + i as f32 * (175.6 / 2e6)).collect();
        let mut ours = vec![0f32; xs.len()];
        exponentials(&xs, &mut ours);
        let worst = xs.iter().zip(&ours).map(|(&x, &y)| {
            let exact = f64::from(x).exp();
            ((f64::from(y) - exact) / exact).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 2e-7, "largest relative error {worst:e}");
    }

    #[test]
    fn exp_at_the_ends_of_its_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert!(exp(1000.0) > 2e38 && exp(f32::INFINITY) > 2e38);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(sigmoid(-1000.0), 0.0f32.max(sigmoid(-1000.0)));
        assert!(sigmoid(-1000.0) < 1e-38);
        assert_eq!(sigmoid(1000.0), 1.0);
    }

    #[test]
    fn dispatched_loops_give_the_bits_of_the_baseline() {
        let xs: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.17).collect();
        let mut dispatched = vec![0f32; xs.len()];
        exponentials(&xs, &mut dispatched);
        let baseline: Vec<f32> = xs.iter().map(|&x| exp(x)).collect();
        assert_eq!(dispatched, baseline);
    }

    #[test]
    fn reductions_take_every_element_once() {
        for length in [0, 1, 3, 31, 32, 33, 64, 100] {
            let xs: Vec<f32> = (1..=length).map(|i| i as f32).collect();
            let expected = (length * (length + 1) / 2) as f32;
            assert_eq!(sum_by(&xs, |x| x), expected);
            assert_eq!(sum_by2(&xs, &xs, |x, y| 2.0 * x - y), expected);
            assert_eq!(sum_by3(&xs, &xs, &xs, |x, y, z| x + y - z), expected);
            let largest = if length == 0 { f32::NEG_INFINITY } else { length as f32 };
            assert_eq!(maximum(&xs), largest);
        }
    }
}
