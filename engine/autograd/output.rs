//! What a segment's module computes, and the graph by which it came to it where that is kept.

use crate::device::tensor_storage::{self, TensorStorage};
use candle_core::{CpuStorage, DType, Shape, Tensor, bail};
use ferrozero_kernels::ops;

/// Runs the user's part on given inputs.
pub type RunModule = dyn Fn(&[Tensor]) -> candle_core::Result<Tensor> + Send + Sync;

/// What a segment's module computed.
pub struct Output {
    /// The output.
    pub values: TensorStorage,
    /// Its shape.
    pub shape: Shape,
    /// How, if that is kept.
    pub graph: Option<Graph>,
    /// A checksum of the values, where the segment computed them.
    pub fingerprint: Option<u64>,
}

/// How a segment's module came to its output, until its backward.
pub struct Graph {
    /// The inputs.
    pub leaves: Vec<Tensor>,
    /// The output.
    pub end: Tensor,
}

impl Output {
    /// Without a graph.
    pub fn alone(run: &RunModule, inputs: &[&Tensor]) -> candle_core::Result<Self> {
        let inputs: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
        let value = ops::without_graph(|| run(&inputs))?;
        // An output that is a view of an input must not take the input's storage with it.
        let shared = inputs.iter().any(|input| tensor_storage::share_storage(input, &value));
        Self::new(value, shared, None)
    }

    /// With its graph. The inputs are copied, because candle's graph must not go on beyond them and their
    /// storage is others'.
    pub fn with_graph(run: &RunModule, inputs: &[&Tensor]) -> candle_core::Result<Self> {
        let leaves = inputs.iter().map(|input| leaf_of(input)).collect::<candle_core::Result<Vec<_>>>()?;
        let (end, value) = ops::keep(|| run(&leaves))?;
        // A value that is in the graph too may be what its operation needs in the backward.
        let shared = value.id() == end.id();
        Self::new(value, shared, Some(Graph { leaves, end }))
    }

    /// Values alone.
    pub fn from_values(values: TensorStorage, shape: Shape) -> Self {
        Self { values, shape, graph: None, fingerprint: None }
    }

    fn new(value: Tensor, shared: bool, graph: Option<Graph>) -> candle_core::Result<Self> {
        if !matches!(value.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            bail!("a segment's output must be F32, BF16 or F16, not {:?}", value.dtype())
        }
        let shape = value.shape().clone();
        let values = if shared { tensor_storage::copy(&value)? } else { tensor_storage::into_run(value)? };
        let fingerprint = values.as_cpu().and_then(fingerprint);
        Ok(Self { values, shape, graph, fingerprint })
    }
}

/// An input as a leaf of the segment's own graph: a copy that gets a gradient, if candle tracks it outside.
pub fn leaf_of(input: &Tensor) -> candle_core::Result<Tensor> {
    if input.track_op() && input.dtype().is_float() {
        Ok(tensor_storage::copy(input)?.into_tensor(input.shape(), true))
    } else {
        Ok(input.detach())
    }
}

/// A checksum of the bits of a tensor on the CPU device: equal ones have equal bits, as far as chance goes.
pub fn fingerprint_of(tensor: &Tensor) -> Option<u64> {
    tensor_storage::with_cpu(tensor, fingerprint).flatten()
}

fn fingerprint(values: &CpuStorage) -> Option<u64> {
    match values {
        CpuStorage::F32(values) => Some(checksum(values, |value| value.to_bits())),
        CpuStorage::BF16(values) => Some(checksum(values, |value| value.to_bits().into())),
        CpuStorage::F16(values) => Some(checksum(values, |value| value.to_bits().into())),
        _ => None,
    }
}

/// Each lane is the value of a polynomial with an odd base, and so is their sum over the lanes.
fn checksum<T: Copy>(values: &[T], bits: impl Fn(T) -> u32) -> u64 {
    const LANES: usize = 16;
    const BASE: u32 = 0x9E37_79B1;
    let mut sums = [0u32; LANES];
    let (lanes, rest) = values.as_chunks::<LANES>();
    for lane in lanes {
        for (sum, &value) in sums.iter_mut().zip(lane) {
            *sum = sum.wrapping_mul(BASE).wrapping_add(bits(value));
        }
    }
    let all = sums.into_iter().chain(rest.iter().map(|&value| bits(value)));
    all.fold(0u64, |sum, part| sum.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(part.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_tells_numbers_apart_that_differ_in_one_or_in_their_order() {
        let values: Vec<f32> = (0..67).map(|i| (i as f32).sin()).collect();
        let of = |values: &[f32]| checksum(values, f32::to_bits);
        for at in 0..values.len() {
            let mut other = values.clone();
            other[at] = f32::from_bits(other[at].to_bits() ^ 1);
            assert_ne!(of(&values), of(&other), "{at}");
            let mut other = values.clone();
            other.swap(at, (at + 16) % 67);
            assert_ne!(of(&values), of(&other), "{at}");
        }
    }
}
