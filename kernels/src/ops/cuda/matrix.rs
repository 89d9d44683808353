//! Batched products of strided matrices on a CUDA device: the one place that calls cuBLAS.

use std::ffi::c_void;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::{CudaDevice, WrapErr, gemm_reduced_precision_f32};

use super::launch::{Float, size};

/// Where the elements of a batch of matrices lie: (i, j) of matrix k at
/// `start + k·batch_stride + i·row_stride + j`, or with rows and columns exchanged if `transposed`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    start: usize,
    rows: usize,
    columns: usize,
    row_stride: usize,
    batch_stride: usize,
    transposed: bool,
}

impl Shape {
    /// Row-major matrices, each right after the one before.
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        let batch_stride = rows * columns;
        Self { start: 0, rows, columns, row_stride: columns, batch_stride, transposed: false }
    }

    /// The same from element `start` on, with rows and matrices so many elements apart.
    pub(super) fn strided(self, start: usize, row_stride: usize, batch_stride: usize) -> Self {
        Self { start, row_stride, batch_stride, ..self }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { rows: self.columns, columns: self.rows, transposed: !self.transposed, ..self }
    }

    /// Whether `batches` matrices lie within so many elements.
    fn fits(&self, batches: usize, elements: usize) -> bool {
        let (rows, columns) =
            if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) };
        if batches * rows * columns == 0 {
            return true;
        }
        let last = (batches - 1) * self.batch_stride + (rows - 1) * self.row_stride + columns - 1;
        columns <= self.row_stride && self.start + last < elements
    }

    fn operation(&self) -> sys::cublasOperation_t {
        match self.transposed {
            false => sys::cublasOperation_t::CUBLAS_OP_N,
            true => sys::cublasOperation_t::CUBLAS_OP_T,
        }
    }
}

/// `destination = a · b` for each of `batches`, or `destination += a · b` when `accumulate`. Sums are f32,
/// and rounded to the type of the elements. f32 products use TF32 if candle's
/// `set_gemm_reduced_precision_f32` says so.
///
/// # Panics
/// If the shapes do not fit each other or the elements: the operations check theirs.
pub(super) fn multiply<T: Float>(
    op: &'static str,
    device: &CudaDevice,
    batches: usize,
    accumulate: bool,
    destination: (&mut CudaSlice<T>, Shape),
    a: (&CudaView<'_, T>, Shape),
    b: (&CudaView<'_, T>, Shape),
) -> Result<()> {
    let ((c, c_shape), (a, a_shape), (b, b_shape)) = (destination, a, b);
    let fit = c_shape.rows == a_shape.rows
        && a_shape.columns == b_shape.rows
        && b_shape.columns == c_shape.columns
        && !c_shape.transposed;
    assert!(fit, "shapes of a product do not fit");
    let inside =
        c_shape.fits(batches, c.len()) && a_shape.fits(batches, a.len()) && b_shape.fits(batches, b.len());
    assert!(inside, "matrix larger than its elements");
    if batches * c_shape.rows * c_shape.columns == 0 {
        return Ok(());
    }
    let one = 1f32;
    let keep = if accumulate { 1f32 } else { 0f32 };
    let compute_type = match T::CUBLAS == sys::cudaDataType::CUDA_R_32F && gemm_reduced_precision_f32() {
        true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let stream = device.cuda_stream();
    let cublas = device.cublas_handle();
    let (a, _a_read) = a.device_ptr(&stream);
    let (b, _b_read) = b.device_ptr(&stream);
    let (c, _c_written) = c.device_ptr_mut(&stream);
    let address = |start: u64, shape: Shape| start + (shape.start * size_of::<T>()) as u64;
    // cuBLAS is column-major, and a row-major matrix is its transpose there: cᵀ = bᵀ · aᵀ.
    //
    // SAFETY: the shapes fit each other and their elements, which was checked above; the pointers are those
    // of live device memory of elements of the type that is named; alpha and beta are f32, as the compute
    // type asks for.
    unsafe {
        result::gemm_strided_batched_ex(
            *cublas.handle(),
            b_shape.operation(),
            a_shape.operation(),
            size(op, c_shape.columns)?,
            size(op, c_shape.rows)?,
            size(op, a_shape.columns)?,
            (&raw const one).cast::<c_void>(),
            address(b, b_shape) as *const c_void,
            T::CUBLAS,
            size(op, b_shape.row_stride.max(1))?,
            b_shape.batch_stride as i64,
            address(a, a_shape) as *const c_void,
            T::CUBLAS,
            size(op, a_shape.row_stride.max(1))?,
            a_shape.batch_stride as i64,
            (&raw const keep).cast::<c_void>(),
            address(c, c_shape) as *mut c_void,
            T::CUBLAS,
            size(op, c_shape.row_stride)?,
            c_shape.batch_stride as i64,
            size(op, batches)?,
            compute_type,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
