//! Sums in an order that depends on lengths alone.

use super::Tools;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::on_paths;

/// Partial sums: as many as vector registers hide the latency of.
const LANES: usize = 16;

on_paths! {
    /// The sum of products of two runs of one length, in f64.
    fn dot(a: &[f32], b: &[f32]) -> f64 {
        let mut sums = [0f64; LANES];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a.iter().zip(b) {
            for i in 0..LANES {
                sums[i] += f64::from(a[i]) * f64::from(b[i]);
            }
        }
        for (i, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
            sums[i] += f64::from(a) * f64::from(b);
        }
        sums.iter().sum()
    }
}

/// The sum of squares of a run, by all threads.
pub(super) fn squares(tools: Tools<'_>, values: &[f32]) -> f64 {
    let chunks = values.chunks(CHUNK_ELEMENTS).collect();
    tools.pool.map(chunks, |chunk| dot(tools.path, chunk, chunk)).into_iter().sum()
}
