//! Products of matrices, as cuBLAS makes them.
//!
//! Sums are made in f32, those of f64 in f64, in an order that depends on the shapes alone: one thread makes
//! each product.

use gemm::Parallelism;
use half::{bf16, f16};

use crate::fault::Result;
use crate::memory::{Accesses, Memory};

/// The type of the matrices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Element {
    F32,
    F16,
    BF16,
    F64,
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A matrix of a batch, column by column.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Address of the first one.
    pub address: u64,
    /// Elements from one column to the next.
    pub column_stride: usize,
    /// Elements from one matrix of the batch to the next.
    pub batch_stride: i64,
    /// Whether its rows are what the product takes for columns.
    pub is_transposed: bool,
}

/// `c = alpha * a * b + beta * c`, for each of a batch. Where beta is zero, `c` is not read.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub batch: usize,
    pub alpha: f64,
    pub beta: f64,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub element: Element,
}

/// What the arithmetic is made in.
trait Number: Copy + 'static {
    const ZERO: Self;
    const ONE: Self;
    fn read(bytes: &[u8], element: Element) -> Self;
    fn wide(self) -> f64;
}

impl Number for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn read(bytes: &[u8], element: Element) -> Self {
        match element {
            Element::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Element::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Element::F32 | Element::F64 => Self::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    fn read(bytes: &[u8], _: Element) -> Self {
        let mut number = [0; 8];
        number.copy_from_slice(bytes);
        Self::from_le_bytes(number)
    }
    fn wide(self) -> f64 {
        self
    }
}

fn write(bytes: &mut [u8], value: f64, element: Element) {
    match element {
        Element::F32 => bytes.copy_from_slice(&(value as f32).to_le_bytes()),
        Element::F16 => bytes.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        Element::BF16 => bytes.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        Element::F64 => bytes.copy_from_slice(&value.to_le_bytes()),
    }
}

impl Gemm {
    /// Makes the products.
    pub fn run(&self, memory: &mut Memory, accesses: &mut Accesses) -> Result<()> {
        for index in 0..self.batch {
            match self.element {
                Element::F64 => self.one::<f64>(index, memory, accesses)?,
                Element::F32 | Element::F16 | Element::BF16 => self.one::<f32>(index, memory, accesses)?,
            }
        }
        Ok(())
    }

    /// The address of a matrix of the batch and the bytes that it spans.
    fn span(&self, matrix: &Matrix, rows: usize, columns: usize, index: usize) -> (u64, usize) {
        let (rows, columns) = if matrix.is_transposed { (columns, rows) } else { (rows, columns) };
        let bytes = self.element.bytes();
        let elements =
            if rows == 0 { 0 } else { columns.checked_sub(1).map_or(0, |n| n * matrix.column_stride + rows) };
        let skip = matrix.batch_stride.wrapping_mul((index * bytes) as i64);
        (matrix.address.wrapping_add_signed(skip), elements * bytes)
    }

    fn read<T: Number>(
        &self,
        span: (u64, usize),
        memory: &Memory,
        accesses: &mut Accesses,
    ) -> Result<Vec<T>> {
        let bytes = memory.read(span.0, span.1, accesses)?;
        Ok(bytes.chunks_exact(self.element.bytes()).map(|bytes| T::read(bytes, self.element)).collect())
    }

    fn one<T: Number>(&self, index: usize, memory: &mut Memory, accesses: &mut Accesses) -> Result<()> {
        let Self { rows, columns, depth, element, .. } = *self;
        let a: Vec<T> = self.read(self.span(&self.a, rows, depth, index), memory, accesses)?;
        let b: Vec<T> = self.read(self.span(&self.b, depth, columns, index), memory, accesses)?;
        let (address, length) = self.span(&self.c, rows, columns, index);
        if self.beta != 0.0 {
            memory.read(address, length, accesses)?;
        }
        let product = self.product(&a, &b);
        let bytes = memory.write(address, length, accesses)?;
        for column in 0..columns {
            for row in 0..rows {
                let start = (column * self.c.column_stride + row) * element.bytes();
                let bytes = &mut bytes[start..start + element.bytes()];
                let sum = self.alpha * product[column * rows + row].wide();
                let before = if self.beta == 0.0 { 0.0 } else { self.beta * T::read(bytes, element).wide() };
                write(bytes, sum + before, element);
            }
        }
        Ok(())
    }

    /// `a * b`, column by column.
    fn product<T: Number>(&self, a: &[T], b: &[T]) -> Vec<T> {
        let Self { rows, columns, depth, .. } = *self;
        let mut product = vec![T::ZERO; rows * columns];
        if product.is_empty() || depth == 0 {
            return product;
        }
        // Steps from one column to the next, and from one row to the next.
        let strides = |matrix: &Matrix| {
            let stride = matrix.column_stride as isize;
            if matrix.is_transposed { (1, stride) } else { (stride, 1) }
        };
        let ((a_column, a_row), (b_column, b_row)) = (strides(&self.a), strides(&self.b));
        // SAFETY: `a` and `b` have all elements of their matrices by these strides, which `span` counts, and
        // `product` has `rows` times `columns`; nothing else refers to it.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                depth,
                product.as_mut_ptr(),
                rows as isize,
                1,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                T::ZERO,
                T::ONE,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        product
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::FRESH;

    /// The product of two matrices of integers, which are exact in every type.
    fn multiply(is_transposed: [bool; 2], beta: f64) -> Vec<f32> {
        let mut memory = Memory::default();
        let mut accesses = Accesses::default();
        let mut upload = |values: &[f32]| {
            let address = memory.allocate(4 * values.len(), FRESH);
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            memory.write(address, bytes.len(), &mut Accesses::default()).unwrap().copy_from_slice(&bytes);
            address
        };
        // Column by column: 2 x 3 and 3 x 2, or the same transposed.
        let a = if is_transposed[0] { [1., 2., 3., 4., 5., 6.] } else { [1., 4., 2., 5., 3., 6.] };
        let b = if is_transposed[1] { [7., 8., 9., 10., 11., 12.] } else { [7., 9., 11., 8., 10., 12.] };
        let (a, b, c) = (upload(&a), upload(&b), upload(&[1.0; 4]));
        let matrix = |address, rows: [usize; 2], is_transposed: bool| Matrix {
            address,
            column_stride: rows[usize::from(is_transposed)],
            batch_stride: 0,
            is_transposed,
        };
        let gemm = Gemm {
            rows: 2,
            columns: 2,
            depth: 3,
            batch: 1,
            alpha: 2.0,
            beta,
            a: matrix(a, [2, 3], is_transposed[0]),
            b: matrix(b, [3, 2], is_transposed[1]),
            c: matrix(c, [2, 2], false),
            element: Element::F32,
        };
        gemm.run(&mut memory, &mut accesses).unwrap();
        let bytes = memory.read(c, 16, &mut accesses).unwrap();
        bytes.chunks_exact(4).map(|bytes| f32::read(bytes, Element::F32)).collect()
    }

    #[test]
    fn products_in_every_layout() {
        for is_transposed in [[false, false], [true, false], [false, true], [true, true]] {
            assert_eq!(multiply(is_transposed, 0.0), [116., 278., 128., 308.]);
            assert_eq!(multiply(is_transposed, 3.0), [119., 281., 131., 311.]);
        }
    }
}
