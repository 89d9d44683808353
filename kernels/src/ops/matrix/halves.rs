//! Products of matrices in 16 bits, or of f32 that is rounded to bf16 for them: summed in f32, and rounded
//! once where the result is in 16 bits too.
//!
//! Where the processor multiplies bf16 by tiles it does; elsewhere elements are widened, some rows or columns
//! at a time, and multiplied in f32. The order of sums depends on shapes alone, for any number of threads,
//! but is not the same on both ways.

use rayon::prelude::*;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::tiles::{self, Tiles};
use super::{Matrix, MatrixMut, Threads};
use crate::Element;
use crate::ops::input::Elements;
use crate::simd::{Path, on_paths};

/// Elements of the sums that are taken at once. Longer ones are added up in f32, so that what both factors
/// give to a product fits a cache.
const DEPTH: usize = 4096;
/// Vectors of the larger factor that one task takes.
pub(super) const STRIP: usize = 128;

/// `destination = a · b`, or `destination += a · b` when `accumulate`, on the threads of the current rayon
/// pool.
pub(super) fn multiply<E: Element>(
    destination: MatrixMut<'_, E>,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    let (rows, columns, depth) = (a.row_count(), b.columns(), a.columns());
    if rows * columns == 0 {
        return;
    }
    if (1..=DEPTH).contains(&depth) {
        return multiply_once(destination, accumulate, a, b);
    }
    let mut sums = vec![0f32; rows * columns];
    for first in (0..depth).step_by(DEPTH) {
        let length = DEPTH.min(depth - first);
        let part = MatrixMut::new(&mut sums, rows, columns);
        let a = a.transposed().rows(first, length).transposed();
        multiply_once(part, first > 0, a, b.rows(first, length));
    }
    let strips = destination.blocks(STRIP, columns).into_par_iter().zip(sums.par_chunks(STRIP * columns));
    strips.for_each(|(strip, sums)| put(Path::best(), strip, sums, columns, accumulate));
}

/// The same for sums of one to [`DEPTH`] elements.
fn multiply_once<E: Element>(destination: MatrixMut<'_, E>, accumulate: bool, a: Matrix<'_>, b: Matrix<'_>) {
    // A single row, as of the next token, by columns that lie whole.
    if a.row_count() == 1 && b.row_stride == 1 && b.column_stride >= b.rows {
        match b.elements {
            Elements::BF16(columns) => return multiply_row(destination, accumulate, a, (b, columns)),
            Elements::F16(columns) => return multiply_row(destination, accumulate, a, (b, columns)),
            Elements::F32(_) => {}
        }
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(tiles) = Tiles::find() {
        match (a.elements, b.elements) {
            (Elements::BF16(x), Elements::BF16(y)) => {
                return tiles::multiply(tiles, destination, accumulate, (a, x), (b, y));
            }
            (Elements::F32(x), Elements::F32(y)) => {
                return tiles::multiply(tiles, destination, accumulate, (a, x), (b, y));
            }
            _ => {}
        }
    }
    multiply_widened(destination, accumulate, a, b);
}

/// The larger factor is cut into strips, each widened by the task that multiplies it by all of the smaller
/// one, which is widened before.
fn multiply_widened<E: Element>(
    destination: MatrixMut<'_, E>,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    let by_rows = a.row_count() >= b.columns();
    let (rows, columns) = if by_rows { (STRIP, b.columns()) } else { (a.row_count(), STRIP) };
    let mut whole = vec![];
    let whole = if by_rows { b.widened(&mut whole) } else { a.widened(&mut whole) };
    let path = Path::best();
    let blocks = destination.blocks(rows, columns).into_par_iter().enumerate();
    blocks.for_each_init(
        || (vec![], vec![]),
        |(strip, sums), (number, block)| {
            let (rows, columns) = (block.rows, block.columns);
            let (a, b) = match by_rows {
                true => (a.rows(number * STRIP, rows).widened(strip), whole),
                false => (whole, b.transposed().rows(number * STRIP, columns).widened(strip).transposed()),
            };
            sums.resize(rows * columns, 0.0);
            super::multiply(MatrixMut::new(sums, rows, columns), false, a, b, Threads::One);
            put(path, block, sums, columns, accumulate);
        },
    );
}

/// A row by columns that each lie whole: memory is what it waits for, so nothing is copied.
fn multiply_row<E: Element, T: Element>(
    destination: MatrixMut<'_, E>,
    accumulate: bool,
    a: Matrix<'_>,
    (b, columns): (Matrix<'_>, &[T]),
) {
    let path = Path::best();
    let mut scratch = vec![];
    let row = a.widened(&mut scratch);
    let Elements::F32(row) = row.elements else { return };
    let mut sums = vec![0f32; b.columns];
    sums.par_chunks_mut(STRIP).enumerate().for_each(|(number, sums)| {
        dots(path, sums, row, &columns[number * STRIP * b.column_stride..], b.column_stride);
    });
    put(path, destination, &sums, b.columns, accumulate);
}

/// Sums that a dot product keeps, of every so many-th product.
const LANES: usize = 64;

on_paths! {
    /// The sums of the products of a row and each of some columns, of which each starts `stride` elements
    /// after the one before.
    fn dots[T: Element](sums: &mut [f32], row: &[f32], columns: &[T], stride: usize) {
        let (row_blocks, row_tail) = row.as_chunks::<LANES>();
        for (sum, column) in sums.iter_mut().zip(columns.chunks(stride)) {
            let (blocks, tail) = column[..row.len()].as_chunks::<LANES>();
            let mut lanes = [0f32; LANES];
            for (xs, ys) in row_blocks.iter().zip(blocks) {
                for lane in 0..LANES {
                    lanes[lane] += xs[lane] * ys[lane].widen();
                }
            }
            for (lane, (&x, &y)) in lanes.iter_mut().zip(row_tail.iter().zip(tail)) {
                *lane += x * y.widen();
            }
            *sum = lanes.iter().sum();
        }
    }
    /// Rounds rows of sums, of which each starts `stride` elements after the one before, into a matrix, or
    /// adds them to it.
    fn put[E: Element](destination: MatrixMut<'_, E>, sums: &[f32], stride: usize, accumulate: bool) {
        let mut destination = destination;
        for (row, sums) in sums.chunks(stride).enumerate().take(destination.rows) {
            let elements = destination.row(row).iter_mut().zip(sums);
            match accumulate {
                true => elements.for_each(|(to, &sum)| *to = E::narrow(to.widen() + sum)),
                false => elements.for_each(|(to, &sum)| *to = E::narrow(sum)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// Numbers of a few bits, of both signs: products are exact, and sums nearly.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let number =
            |i: u32| (i.wrapping_mul(0x9e37_79b9).wrapping_add(seed.wrapping_mul(0x85eb_ca6b)) >> 25) as f32;
        (0..count as u32).map(|i| (number(i) - 64.0) / 64.0).collect()
    }

    fn narrow<E: Element>(elements: &[f32]) -> Vec<E> {
        elements.iter().map(|&element| E::narrow(element)).collect()
    }

    /// Shapes that fill tiles, panels and strips, and that leave some over.
    const SHAPES: [(usize, usize, usize); 11] = [
        (1, 1, 1),
        (32, 32, 32),
        (33, 31, 65),
        (16, 300, 2),
        (130, 5, 97),
        (1, 257, 40),
        (1, 300, 200),
        (1, 1, 70),
        (257, 1, 33),
        (129, 140, 128),
        (3, 5, DEPTH + 17),
    ];

    /// Every element of the product, by f64.
    fn exact((rows, columns, depth): (usize, usize, usize), a: &[f32], b: &[f32]) -> Vec<f64> {
        let element = |row: usize, column: usize| -> f64 {
            (0..depth).map(|k| f64::from(a[row * depth + k]) * f64::from(b[k * columns + column])).sum()
        };
        (0..rows * columns).map(|at| element(at / columns, at % columns)).collect()
    }

    fn transposed<T: Copy>(rows: usize, columns: usize, elements: &[T]) -> Vec<T> {
        (0..rows * columns).map(|at| elements[at % rows * columns + at / rows]).collect()
    }

    /// Checks a way to multiply in every layout of both factors, with and without something to add to.
    fn assert_exact<E: Element>(
        wrap: fn(&[E]) -> Elements<'_>,
        multiply: fn(MatrixMut<'_, f32>, bool, Matrix<'_>, Matrix<'_>),
    ) {
        for shape in SHAPES {
            let (rows, columns, depth) = shape;
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let expected = exact(shape, &a, &b);
            let (a, b): (Vec<E>, Vec<E>) = (narrow(&a), narrow(&b));
            let (a_turned, b_turned) = (transposed(rows, depth, &a), transposed(depth, columns, &b));
            let a_layouts =
                [Matrix::new(wrap(&a), rows, depth), Matrix::new(wrap(&a_turned), depth, rows).transposed()];
            let b_layouts = [
                Matrix::new(wrap(&b), depth, columns),
                Matrix::new(wrap(&b_turned), columns, depth).transposed(),
            ];
            for (a, b) in a_layouts.iter().flat_map(|&a| b_layouts.iter().map(move |&b| (a, b))) {
                for accumulate in [false, true] {
                    let mut out = vec![0.5f32; rows * columns];
                    multiply(MatrixMut::new(&mut out, rows, columns), accumulate, a, b);
                    for (at, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
                        let expected = expected + if accumulate { 0.5 } else { 0.0 };
                        let difference = (f64::from(found) - expected).abs();
                        assert!(difference < 1e-5 * depth as f64, "{shape:?} at {at}: {found}, {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_layout_and_shape_gives_the_product() {
        assert_exact::<bf16>(|elements| Elements::BF16(elements), multiply);
        assert_exact::<f16>(|elements| Elements::F16(elements), multiply);
        assert_exact::<f32>(|elements| Elements::F32(elements), multiply);
    }

    #[test]
    fn so_it_does_where_there_are_no_tiles() {
        assert_exact::<bf16>(|elements| Elements::BF16(elements), multiply_widened);
    }

    #[test]
    fn a_result_in_16_bits_is_the_rounded_sum() {
        let (rows, columns, depth) = (40, 33, 50);
        let (a, b) =
            (narrow::<bf16>(&numbers(rows * depth, 1)), narrow::<bf16>(&numbers(depth * columns, 2)));
        let a = Matrix::new(Elements::BF16(&a), rows, depth);
        let b = Matrix::new(Elements::BF16(&b), depth, columns);
        let mut sums = vec![0f32; rows * columns];
        multiply(MatrixMut::new(&mut sums, rows, columns), false, a, b);
        let mut rounded = vec![bf16::ZERO; rows * columns];
        multiply(MatrixMut::new(&mut rounded, rows, columns), false, a, b);
        assert_eq!(rounded, narrow::<bf16>(&sums));
        let mut added = vec![bf16::ONE; rows * columns];
        multiply(MatrixMut::new(&mut added, rows, columns), true, a, b);
        let expected: Vec<f32> = sums.iter().map(|sum| 1.0 + sum).collect();
        assert_eq!(added, narrow::<bf16>(&expected));
    }

    #[test]
    fn nothing_is_written_outside_of_a_block() {
        let (a, b) = (vec![bf16::ONE; 3 * 4], vec![bf16::ONE; 4 * 2]);
        let mut out = vec![9f32; 3 * 6];
        let block = MatrixMut::column_blocks(&mut out, 6, 2).remove(1);
        multiply(block, false, Matrix::new(Elements::BF16(&a), 3, 4), Matrix::new(Elements::BF16(&b), 4, 2));
        for row in out.chunks(6) {
            assert_eq!(row, [9.0, 9.0, 4.0, 4.0, 9.0, 9.0]);
        }
    }
}
