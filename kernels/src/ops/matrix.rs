//! Matrix products over borrowed, strided matrices: the one place that calls the `gemm` crate.

mod halves;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

use candle_core::CpuStorage;
use half::{bf16, f16};
use std::marker::PhantomData;

use super::input::Elements;
use super::products::{Products, products};
use crate::Element;

/// Whether the processor multiplies bf16 by tiles.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) fn has_tiles() -> bool {
    tiles::Tiles::find().is_some()
}

/// Whether a product may use rayon's threads. Each element is summed in the same order either way.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    /// The calling thread alone: for products inside a threaded loop.
    One,
    /// The threads of the current rayon pool.
    All,
}

/// A matrix to read. Element (i, j) lies at `i·row_stride + j·column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    elements: Elements<'a>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows follow each other without gaps.
    pub(crate) fn new(elements: impl Into<Elements<'a>>, rows: usize, columns: usize) -> Self {
        Self::strided(elements, rows, columns, columns)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub(super) fn strided(
        elements: impl Into<Elements<'a>>,
        rows: usize,
        columns: usize,
        row_stride: usize,
    ) -> Self {
        let elements = elements.into();
        let last = last_element(rows, columns, row_stride);
        assert!(last < elements.len() || rows * columns == 0, "matrix larger than its elements");
        Matrix { elements, rows, columns, row_stride, column_stride: 1 }
    }

    /// The elements, in which those of the matrix lie.
    pub(super) fn elements(self) -> Elements<'a> {
        self.elements
    }

    /// Rows.
    pub(super) fn row_count(self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub(crate) fn columns(self) -> usize {
        self.columns
    }

    /// `rows` rows from `first` on.
    pub(crate) fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows outside the matrix");
        Matrix { elements: self.elements.after(first * self.row_stride), rows, ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The same in f32, without gaps, and with what followed in memory still following.
    fn widened(self, scratch: &mut Vec<f32>) -> Matrix<'_> {
        if self.column_stride != 1 {
            return self.transposed().widened(scratch).transposed();
        }
        scratch.resize(self.rows * self.columns, 0.0);
        for (row, to) in scratch.chunks_exact_mut(self.columns.max(1)).enumerate() {
            let start = row * self.row_stride;
            self.elements.widen(start..start + self.columns, to);
        }
        Matrix::new(&scratch[..], self.rows, self.columns)
    }
}

/// A row-major matrix to write, which may be a block of a larger one.
pub(crate) struct MatrixMut<'a, E = f32> {
    start: *mut E,
    rows: usize,
    columns: usize,
    row_stride: usize,
    elements: PhantomData<&'a mut [E]>,
}

// SAFETY: a `MatrixMut` is the only way to its elements while it lives, like the `&mut [E]` that it was made
// from.
unsafe impl<E: Send> Send for MatrixMut<'_, E> {}

impl<'a, E> MatrixMut<'a, E> {
    /// A row-major matrix whose rows follow each other without gaps.
    pub(crate) fn new(elements: &'a mut [E], rows: usize, columns: usize) -> Self {
        assert!(rows * columns <= elements.len(), "matrix larger than its elements");
        let start = elements.as_mut_ptr();
        MatrixMut { start, rows, columns, row_stride: columns, elements: PhantomData }
    }

    /// Splits a row-major matrix into blocks of `width` columns; `columns` is a multiple of it.
    pub(super) fn column_blocks(elements: &'a mut [E], columns: usize, width: usize) -> Vec<Self> {
        assert!(width > 0 && columns.is_multiple_of(width) && elements.len().is_multiple_of(columns));
        let rows = elements.len() / columns;
        MatrixMut::new(elements, rows, columns).blocks(rows.max(1), width)
    }

    /// Splits the matrix into blocks of at most `rows` and `columns`, both above 0, row by row.
    fn blocks(self, rows: usize, columns: usize) -> Vec<Self> {
        let corners = (0..self.rows.max(1))
            .step_by(rows)
            .flat_map(|row| (0..self.columns).step_by(columns).map(move |column| (row, column)));
        corners.map(|(row, column)| self.block(row, rows, column, columns)).collect()
    }

    /// Up to `rows` and `columns` from a corner within the matrix on. No two that exist together may overlap.
    fn block(&self, row: usize, rows: usize, column: usize, columns: usize) -> Self {
        MatrixMut {
            // `wrapping_add` so that a matrix without rows needs no element to point at.
            start: self.start.wrapping_add(row * self.row_stride + column),
            rows: rows.min(self.rows - row),
            columns: columns.min(self.columns - column),
            row_stride: self.row_stride,
            elements: PhantomData,
        }
    }

    /// `rows` rows from `first` on.
    pub(super) fn rows(&mut self, first: usize, rows: usize) -> MatrixMut<'_, E> {
        assert!(first + rows <= self.rows, "rows outside the matrix");
        self.part(first, rows, 0, self.columns)
    }

    /// Up to `rows` and `columns` from a corner within the matrix on.
    fn part(&mut self, row: usize, rows: usize, column: usize, columns: usize) -> MatrixMut<'_, E> {
        assert!(row <= self.rows && column <= self.columns, "a part outside the matrix");
        self.block(row, rows, column, columns)
    }

    /// The elements of a row.
    fn row(&mut self, row: usize) -> &mut [E] {
        assert!(row < self.rows, "a row outside the matrix");
        // SAFETY: the row lies within the elements that this matrix borrows, and nothing else reaches them.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.columns) }
    }
}

fn last_element(rows: usize, columns: usize, row_stride: usize) -> usize {
    rows.saturating_sub(1) * row_stride + columns.saturating_sub(1)
}

/// `a · b`, row-major, in the type of both.
pub(super) fn product(a: Matrix<'_>, b: Matrix<'_>, threads: Threads) -> CpuStorage {
    match a.elements {
        Elements::F32(_) => CpuStorage::F32(written(a.rows, b.columns, a.columns, |destination| {
            multiply(destination, false, a, b, threads);
        })),
        Elements::BF16(_) => CpuStorage::BF16(written(a.rows, b.columns, a.columns, |destination| {
            halves::multiply::<bf16>(destination, false, a, b);
        })),
        Elements::F16(_) => CpuStorage::F16(written(a.rows, b.columns, a.columns, |destination| {
            halves::multiply::<f16>(destination, false, a, b);
        })),
    }
}

/// `a · b + bias`, with the bias added to each row, in the type of all.
pub(super) fn product_and_bias(a: Matrix<'_>, b: Matrix<'_>, bias: Elements<'_>) -> CpuStorage {
    // The product is added to rows that start as the bias: no pass of its own.
    match bias {
        Elements::F32(bias) => {
            let mut out = bias.repeat(a.rows);
            multiply(MatrixMut::new(&mut out, a.rows, b.columns), true, a, b, Threads::All);
            CpuStorage::F32(out)
        }
        Elements::BF16(bias) => {
            let mut out = bias.repeat(a.rows);
            halves::multiply(MatrixMut::new(&mut out, a.rows, b.columns), true, a, b);
            CpuStorage::BF16(out)
        }
        Elements::F16(bias) => {
            let mut out = bias.repeat(a.rows);
            halves::multiply(MatrixMut::new(&mut out, a.rows, b.columns), true, a, b);
            CpuStorage::F16(out)
        }
    }
}

/// The elements of a row-major matrix, of which `write` writes each if they are sums of at least one term.
fn written<E: Element>(
    rows: usize,
    columns: usize,
    terms: usize,
    write: impl FnOnce(MatrixMut<'_, E>),
) -> Vec<E> {
    let elements = rows * columns;
    if terms == 0 {
        return vec![E::narrow(0.0); elements];
    }
    // Zeros would be a pass over memory that is written anyway.
    let mut out = Vec::with_capacity(elements);
    let start = out.as_mut_ptr();
    write(MatrixMut { start, rows, columns, row_stride: columns, elements: PhantomData });
    // SAFETY: the capacity is `elements`, and a product of at least one term that is not added to anything
    // has written each.
    unsafe { out.set_len(elements) };
    out
}

/// `destination = a · b`, or `destination += a · b` when `accumulate`. Factors in 16 bits take all threads;
/// for those in f32 on all threads, it is as [`products`] says.
pub(crate) fn multiply(
    destination: MatrixMut<'_>,
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    assert!(
        destination.rows == a.rows && a.columns == b.rows && b.columns == destination.columns,
        "shapes of a product do not fit"
    );
    let (Elements::F32(x), Elements::F32(y)) = (a.elements, b.elements) else {
        return halves::multiply(destination, accumulate, a, b);
    };
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        // A single row is multiplied as fast as memory is read, and packing would be one pass more.
        Threads::All
            if destination.rows > 1 && products() == Products::Bf16 && Products::Bf16.is_native() =>
        {
            return halves::multiply(destination, accumulate, a, b);
        }
        // Zero stands for the size of the current pool.
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the strides and shapes of the three matrices were checked against their elements when they were
    // made, the shapes fit each other, and `destination` overlaps neither `a` nor `b` because it is borrowed
    // mutably.
    unsafe {
        gemm::gemm(
            destination.rows,
            destination.columns,
            a.columns,
            destination.start,
            1,
            destination.row_stride as isize,
            accumulate,
            x.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            y.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        )
    }
}
