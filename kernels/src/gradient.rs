//! Gradients on their way off the device: scaled, accumulated, and measured in the same pass.

use crate::error::same_length;
use crate::pool::CHUNK_ELEMENTS;
use crate::simd::{Path, on_paths};
use crate::{Element, Error, Pool};

/// Elements whose squares are summed on their own before they join the rest.
pub const BLOCK_ELEMENTS: usize = 1024;

/// Partial sums of a block: as many as vector registers hide the latency of.
const LANES: usize = 16;

/// Whether gradients replace what the accumulator holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// They replace it.
    Overwrite,
    /// They are added to it.
    Add,
}

/// What is known of the gradients that were seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GradientStatistics {
    /// Sum of squares. It depends on the elements and their order alone: not on threads, paths, or on how a
    /// run is cut into pieces at multiples of [`BLOCK_ELEMENTS`].
    pub squared_norm: f64,
    /// Elements that are infinite or NaN.
    pub non_finite: u64,
}

on_paths! {
    /// One block of at most [`BLOCK_ELEMENTS`]: sum of squares and number of elements that are not finite.
    fn accumulate_block[G: Element](
        accumulator: &mut [f32], gradient: &[G], scale: f32, add: bool
    ) -> (f64, u64) {
        if add {
            for (sum, &gradient) in accumulator.iter_mut().zip(gradient) {
                *sum += gradient.widen() * scale;
            }
        } else {
            for (sum, &gradient) in accumulator.iter_mut().zip(gradient) {
                *sum = gradient.widen() * scale;
            }
        }
        let mut squares = [0f64; LANES];
        let mut non_finite = [0u32; LANES];
        let (lanes, rest) = accumulator.as_chunks::<LANES>();
        for lane in lanes {
            for i in 0..LANES {
                squares[i] += f64::from(lane[i]) * f64::from(lane[i]);
                non_finite[i] += u32::from(!lane[i].is_finite());
            }
        }
        for (i, &value) in rest.iter().enumerate() {
            squares[i] += f64::from(value) * f64::from(value);
            non_finite[i] += u32::from(!value.is_finite());
        }
        (squares.iter().sum(), non_finite.iter().map(|&count| u64::from(count)).sum())
    }
}

/// Puts `gradient · scale` into `accumulator`, or adds it, and adds what the accumulator then holds to
/// `statistics`.
///
/// # Errors
/// [`Error::Length`] if the lengths differ.
pub fn accumulate<G: Element>(
    pool: &Pool,
    accumulator: &mut [f32],
    gradient: &[G],
    scale: f32,
    how: Accumulate,
    statistics: &mut GradientStatistics,
) -> Result<(), Error> {
    accumulate_on(Path::best(), pool, accumulator, gradient, scale, how, statistics)
}

/// As [`accumulate`], on a given path.
///
/// # Errors
/// As [`accumulate`].
pub fn accumulate_on<G: Element>(
    path: Path,
    pool: &Pool,
    accumulator: &mut [f32],
    gradient: &[G],
    scale: f32,
    how: Accumulate,
    statistics: &mut GradientStatistics,
) -> Result<(), Error> {
    same_length("the gradient", gradient.len(), accumulator.len())?;
    let chunks = accumulator.chunks_mut(CHUNK_ELEMENTS).zip(gradient.chunks(CHUNK_ELEMENTS)).collect();
    let add = how == Accumulate::Add;
    let measured = pool.map(chunks, |(accumulator, gradient): (&mut [f32], &[G])| {
        let blocks = accumulator.chunks_mut(BLOCK_ELEMENTS).zip(gradient.chunks(BLOCK_ELEMENTS));
        blocks.map(|(sum, gradient)| accumulate_block(path, sum, gradient, scale, add)).collect::<Vec<_>>()
    });
    for (squares, non_finite) in measured.into_iter().flatten() {
        statistics.squared_norm += squares;
        statistics.non_finite += non_finite;
    }
    Ok(())
}
