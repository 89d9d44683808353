//! Elements that operations compute on the CPU: in f32, and rounded once to the type of the inputs.

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Storage, Tensor};
use rayon::prelude::*;
use std::array;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::input::Elements;
use super::vector::chunk_elements;
use crate::Element;
use crate::convert::narrow_chunk;
use crate::simd::Path;

/// `elements` elements of the type of `like`, of which a task makes each `chunk`: `make` is given their
/// range, and zeros in f32 to write what they are.
pub(super) fn in_chunks(
    like: Elements<'_>,
    elements: usize,
    chunk: usize,
    make: impl Fn(Range<usize>, &mut [f32]) + Sync,
) -> CpuStorage {
    let beside = rayon::iter::repeat_n((), elements.div_ceil(chunk));
    let [out] = in_chunks_beside(like, elements, chunk, beside, |range, [out], ()| make(range, out));
    out
}

/// The same for several results of one size, where a task also takes an item of `beside`.
pub(super) fn in_chunks_beside<const RESULTS: usize, B: Send>(
    like: Elements<'_>,
    elements: usize,
    chunk: usize,
    beside: impl IndexedParallelIterator<Item = B>,
    make: impl Fn(Range<usize>, [&mut [f32]; RESULTS], B) + Sync,
) -> [CpuStorage; RESULTS] {
    match like {
        Elements::F32(_) => written(elements, chunk, beside, &make).map(CpuStorage::F32),
        Elements::BF16(_) => written(elements, chunk, beside, rounded(&make)).map(CpuStorage::BF16),
        Elements::F16(_) => written(elements, chunk, beside, rounded(&make)).map(CpuStorage::F16),
    }
}

/// Elements of which each task writes those of a chunk, which are zeros before: zeros in the cache cost
/// little, while a pass over all of them, by one thread, would cost as much as the result.
fn written<E: Element, const RESULTS: usize, B: Send>(
    elements: usize,
    chunk: usize,
    beside: impl IndexedParallelIterator<Item = B>,
    write: impl Fn(Range<usize>, [&mut [E]; RESULTS], B) + Sync,
) -> [Vec<E>; RESULTS] {
    let mut results: [Vec<E>; RESULTS] = array::from_fn(|_| Vec::with_capacity(elements));
    let mut chunks =
        results.each_mut().map(|result| result.spare_capacity_mut()[..elements].chunks_mut(chunk));
    let starts = (0..elements).step_by(chunk);
    let tasks: Vec<_> = starts
        .map(|start| (start, chunks.each_mut().map(|chunks| chunks.next().unwrap_or_default())))
        .collect();
    tasks.into_par_iter().zip(beside).for_each(|((start, chunks), beside)| {
        let end = (start + chunk).min(elements);
        write(start..end, chunks.map(zeros), beside);
    });
    // SAFETY: the capacity is `elements`, and each element was a zero at least.
    results.iter_mut().for_each(|result| unsafe { result.set_len(elements) });
    results
}

fn zeros<E: Element>(chunk: &mut [MaybeUninit<E>]) -> &mut [E] {
    for element in chunk.iter_mut() {
        element.write(E::narrow(0.0));
    }
    // SAFETY: each was just written.
    unsafe { chunk.assume_init_mut() }
}

/// Makes elements in f32, and rounds them.
fn rounded<E: Element, const RESULTS: usize, B>(
    make: impl Fn(Range<usize>, [&mut [f32]; RESULTS], B) + Sync,
) -> impl Fn(Range<usize>, [&mut [E]; RESULTS], B) + Sync {
    move |range, results, beside| {
        let mut wide: [Vec<f32>; RESULTS] = array::from_fn(|_| vec![0f32; range.len()]);
        make(range, wide.each_mut().map(Vec::as_mut_slice), beside);
        for (wide, result) in wide.iter().zip(results) {
            narrow_chunk(Path::best(), wide, result);
        }
    }
}

/// Elements in the type of `like`.
pub(super) fn storage(elements: Vec<f32>, like: Elements<'_>) -> CpuStorage {
    match like {
        Elements::F32(_) => CpuStorage::F32(elements),
        Elements::BF16(_) => CpuStorage::BF16(narrowed(&elements)),
        Elements::F16(_) => CpuStorage::F16(narrowed(&elements)),
    }
}

/// Runs `run` on elements in the type of `like`.
pub(super) fn rounded_like<R>(
    like: Elements<'_>,
    elements: &[f32],
    run: impl FnOnce(Elements<'_>) -> R,
) -> R {
    match like {
        Elements::F32(_) => run(Elements::F32(elements)),
        Elements::BF16(_) => run(Elements::BF16(&narrowed(elements))),
        Elements::F16(_) => run(Elements::F16(&narrowed(elements))),
    }
}

fn narrowed<E: Element>(elements: &[f32]) -> Vec<E> {
    let chunk = chunk_elements(1);
    let [narrow] = written(elements.len(), chunk, elements.par_chunks(chunk), |_, [to], from| {
        narrow_chunk(Path::best(), from, to);
    });
    narrow
}

/// A tensor of elements that an operation computed on the CPU, of the shape of `like`.
pub(super) fn cpu_tensor(elements: CpuStorage, like: &Tensor) -> Tensor {
    Tensor::from_storage(Storage::Cpu(elements), like.shape().clone(), BackpropOp::none(), false)
}
