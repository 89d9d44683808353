//! Products of bf16 by the matrix tiles of a processor.

mod instructions;

use half::bf16;
use rayon::prelude::*;

use super::halves::{STRIP, put};
use super::{Matrix, MatrixMut};
use crate::Element;
use crate::simd::Path;
pub(super) use instructions::Tiles;
use instructions::{Order, PANEL, Sums};

/// `destination = a · b`, or `destination += a · b` when `accumulate`, of matrices with their elements. The
/// larger factor is cut into strips, each packed by the task that multiplies it by all of the smaller one,
/// which is packed before.
pub(super) fn multiply<E: Element, T: Factor>(
    tiles: Tiles,
    destination: MatrixMut<'_, E>,
    accumulate: bool,
    (a, a_elements): (Matrix<'_>, &[T]),
    (b, b_elements): (Matrix<'_>, &[T]),
) {
    let (a, b) = (Vectors::rows(a_elements, a), Vectors::rows(b_elements, b.transposed()));
    let by_rows = a.count >= b.count;
    let (rows, columns) = if by_rows { (STRIP, b.count) } else { (a.count, STRIP) };
    let (large, order, small, small_order) = match by_rows {
        true => (a, Order::Vectors, b, Order::Pairs),
        false => (b, Order::Pairs, a, Order::Vectors),
    };
    let panel = tiles.panel_elements(a.depth);
    let mut whole = vec![0u16; small.count.div_ceil(PANEL) * panel];
    whole.par_chunks_mut(panel).enumerate().for_each(|(number, panel)| {
        tiles.pack(small.part(number * PANEL, PANEL), small_order, panel);
    });
    let path = Path::best();
    let blocks = destination.blocks(rows, columns).into_par_iter().enumerate();
    blocks.for_each_init(
        || (vec![0u16; STRIP / PANEL * panel], Sums::new()),
        |(strip, sums), (number, mut block)| {
            let vectors = large.part(number * STRIP, STRIP);
            let strip = &mut strip[..vectors.count.div_ceil(PANEL) * panel];
            for (number, panel) in strip.chunks_exact_mut(panel).enumerate() {
                tiles.pack(vectors.part(number * PANEL, PANEL), order, panel);
            }
            for (of_whole, whole) in whole.chunks_exact(panel).enumerate() {
                for (of_strip, strip) in strip.chunks_exact(panel).enumerate() {
                    let (row, column) = if by_rows { (of_strip, of_whole) } else { (of_whole, of_strip) };
                    let (a, b) = if by_rows { (strip, whole) } else { (whole, strip) };
                    tiles.multiply(a, b, sums);
                    let part = block.part(row * PANEL, PANEL, column * PANEL, PANEL);
                    put(path, part, sums.as_slice(), PANEL, accumulate);
                }
            }
        },
    );
}

/// Elements that are multiplied as bf16.
pub(super) trait Factor: Copy + Send + Sync {
    /// The bits of the nearest number in bf16.
    fn bits(self) -> u16;
}

impl Factor for bf16 {
    #[inline(always)]
    fn bits(self) -> u16 {
        self.to_bits()
    }
}

impl Factor for f32 {
    #[inline(always)]
    fn bits(self) -> u16 {
        bf16::narrow(self).to_bits()
    }
}

/// Rows or columns of a matrix that are multiplied by others, element by element.
#[derive(Clone, Copy)]
pub(super) struct Vectors<'a, T> {
    elements: &'a [T],
    count: usize,
    depth: usize,
    /// Elements from one vector to the next.
    stride: usize,
    /// Elements from one element of a vector to the next. One of the strides is 1.
    step: usize,
}

impl<'a, T: Factor> Vectors<'a, T> {
    /// The rows of a matrix of these elements.
    fn rows(elements: &'a [T], matrix: Matrix<'_>) -> Self {
        let Matrix { rows: count, columns: depth, row_stride: stride, column_stride: step, .. } = matrix;
        Vectors { elements, count, depth, stride, step }
    }

    /// How many they are.
    pub(super) fn count(self) -> usize {
        self.count
    }

    /// Elements of each.
    pub(super) fn depth(self) -> usize {
        self.depth
    }

    /// Whether each vector lies in one piece, and not elements of all of them.
    pub(super) fn lie_whole(self) -> bool {
        self.step == 1
    }

    /// What lies in one piece: a vector, or an element of all of them.
    pub(super) fn run(self, number: usize) -> &'a [T] {
        match self.lie_whole() {
            true => &self.elements[number * self.stride..][..self.depth],
            false => &self.elements[number * self.step..][..self.count],
        }
    }

    /// Up to `count` vectors from `first` on.
    pub(super) fn part(self, first: usize, count: usize) -> Self {
        let first = first.min(self.count);
        Vectors { elements: self.after(first * self.stride), count: count.min(self.count - first), ..self }
    }

    /// Up to `depth` elements of each, from `first` on.
    pub(super) fn slice(self, first: usize, depth: usize) -> Self {
        let first = first.min(self.depth);
        Vectors { elements: self.after(first * self.step), depth: depth.min(self.depth - first), ..self }
    }

    /// The elements from one on, none where that is beyond the last.
    fn after(self, start: usize) -> &'a [T] {
        &self.elements[start.min(self.elements.len())..]
    }
}
