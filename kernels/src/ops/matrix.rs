//! Matrix products over borrowed, strided `f32` matrices: the one place that calls the `gemm` crate.

use std::marker::PhantomData;

/// Whether a product may use rayon's threads. Each element is summed in the same order either way.
#[derive(Clone, Copy)]
pub(super) enum Threads {
    /// The calling thread alone: for products inside a threaded loop.
    One,
    /// The threads of the current rayon pool.
    All,
}

/// A matrix to read. Element (i, j) lies at `i·row_stride + j·column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    elements: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows follow each other without gaps.
    pub(super) fn new(elements: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(elements, rows, columns, columns)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub(super) fn strided(elements: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let last = last_element(rows, columns, row_stride);
        assert!(last < elements.len() || rows * columns == 0, "matrix larger than its elements");
        Matrix { elements, rows, columns, row_stride, column_stride: 1 }
    }

    /// Rows.
    pub(super) fn row_count(self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub(super) fn columns(self) -> usize {
        self.columns
    }

    /// `rows` rows from `first` on.
    pub(super) fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows outside the matrix");
        let start = (first * self.row_stride).min(self.elements.len());
        Matrix { elements: &self.elements[start..], rows, ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write, which may be a block of columns of a wider one.
pub(super) struct MatrixMut<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    elements: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatrixMut` is the only way to its elements while it lives, like the `&mut [f32]` that it was made from.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// A row-major matrix whose rows follow each other without gaps.
    pub(super) fn new(elements: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert!(rows * columns <= elements.len(), "matrix larger than its elements");
        let start = elements.as_mut_ptr();
        MatrixMut { start, rows, columns, row_stride: columns, elements: PhantomData }
    }

    /// Splits a row-major matrix into blocks of `width` columns; `columns` is a multiple of it.
    pub(super) fn column_blocks(elements: &'a mut [f32], columns: usize, width: usize) -> Vec<Self> {
        assert!(width > 0 && columns.is_multiple_of(width) && elements.len().is_multiple_of(columns));
        let rows = elements.len() / columns;
        let start = elements.as_mut_ptr();
        let block = |first_column| MatrixMut {
            // `wrapping_add` so that a matrix without rows needs no element to point at.
            start: start.wrapping_add(first_column),
            rows,
            columns: width,
            row_stride: columns,
            elements: PhantomData,
        };
        (0..columns).step_by(width).map(block).collect()
    }

    /// `rows` rows from `first` on.
    pub(super) fn rows(&mut self, first: usize, rows: usize) -> MatrixMut<'_> {
        assert!(first + rows <= self.rows, "rows outside the matrix");
        let start = self.start.wrapping_add(first * self.row_stride);
        MatrixMut { start, rows, elements: PhantomData, ..*self }
    }
}

fn last_element(rows: usize, columns: usize, row_stride: usize) -> usize {
    rows.saturating_sub(1) * row_stride + columns.saturating_sub(1)
}

/// `a · b`, row-major.
pub(super) fn product(a: Matrix<'_>, b: Matrix<'_>, threads: Threads) -> Vec<f32> {
    let elements = a.rows * b.columns;
    if a.columns == 0 {
        return vec![0.0; elements];
    }
    // Zeros would be a pass over memory that the product writes anyway.
    let mut out = Vec::with_capacity(elements);
    let destination = MatrixMut {
        start: out.as_mut_ptr(),
        rows: a.rows,
        columns: b.columns,
        row_stride: b.columns,
        elements: PhantomData,
    };
    multiply(destination, false, a, b, threads);
    // SAFETY: the capacity is `elements`, and a product of at least one term that is not added to anything has written each.
    unsafe { out.set_len(elements) };
    out
}

/// `destination = a · b`, or `destination += a · b` when `accumulate`.
pub(super) fn multiply(
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
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        // Zero stands for the size of the current pool.
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: the strides and shapes of the three matrices were checked against their elements when they were made,
    // the shapes fit each other, and `destination` overlaps neither `a` nor `b` because it is borrowed mutably.
    unsafe {
        gemm::gemm(
            destination.rows,
            destination.columns,
            a.columns,
            destination.start,
            1,
            destination.row_stride as isize,
            accumulate,
            a.elements.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.elements.as_ptr(),
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
