//! cuBLAS: products of matrices.

use std::ffi::{c_int, c_void};

use super::{call, give};
use crate::driver::State;
use crate::driver::work::Work;
use crate::fault::Code;
use crate::gemm::{Element, Gemm, Matrix};

/// What cuBLAS answers, as in `cublas_api.h`.
const EXECUTION_FAILED: c_int = 13;
const NOT_SUPPORTED: c_int = 15;

/// A handle: the stream that products run on.
pub struct Handle {
    stream: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasCreate_v2(handle: *mut *mut Handle) -> c_int {
    // SAFETY: the caller's pointer, see the module.
    unsafe { give(handle, Box::into_raw(Box::new(Handle { stream: 0 }))) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasDestroy_v2(handle: *mut Handle) -> c_int {
    // SAFETY: the caller has it from `cublasCreate_v2` and does not use it again.
    drop(unsafe { Box::from_raw(handle) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasSetStream_v2(handle: *mut Handle, stream: usize) -> c_int {
    // SAFETY: the caller has it from `cublasCreate_v2`, and no other thread uses it meanwhile.
    unsafe { (*handle).stream = stream };
    0
}

fn enqueue(name: &'static str, handle: *const Handle, gemm: Gemm) -> c_int {
    let multiply = |state: &mut State| -> Result<(), Code> {
        // SAFETY: the caller has it from `cublasCreate_v2`, and no other thread changes it meanwhile.
        let stream = state.stream(unsafe { (*handle).stream })?;
        state.enqueue(stream, Work::Multiply(gemm))
    };
    if call(name, multiply) == 0 { 0 } else { EXECUTION_FAILED }
}

/// The type of a matrix, by CUDA's number (`cudaDataType`).
fn element(number: c_int) -> Option<Element> {
    match number {
        0 => Some(Element::F32),
        1 => Some(Element::F64),
        2 => Some(Element::F16),
        14 => Some(Element::BF16),
        _ => None,
    }
}

/// A factor of the product, in the type of the arithmetic (`cublasComputeType_t`).
///
/// # Safety
/// `from` is valid for a read of that type.
unsafe fn scale(from: *const c_void, arithmetic: c_int) -> f64 {
    // SAFETY: the caller says so.
    unsafe {
        match arithmetic {
            64 | 65 => (*from.cast::<half::f16>()).to_f64(),
            70 | 71 => *from.cast::<f64>(),
            _ => f64::from(*from.cast::<f32>()),
        }
    }
}

fn matrix(address: u64, column_stride: c_int, batch_stride: i64, transposition: c_int) -> Matrix {
    let is_transposed = transposition != 0;
    Matrix { address, column_stride: column_stride as usize, batch_stride, is_transposed }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: *const Handle,
    transposition_a: c_int,
    transposition_b: c_int,
    rows: c_int,
    columns: c_int,
    depth: c_int,
    alpha: *const c_void,
    a: u64,
    type_a: c_int,
    column_stride_a: c_int,
    batch_stride_a: i64,
    b: u64,
    type_b: c_int,
    column_stride_b: c_int,
    batch_stride_b: i64,
    beta: *const c_void,
    c: u64,
    type_c: c_int,
    column_stride_c: c_int,
    batch_stride_c: i64,
    batch: c_int,
    arithmetic: c_int,
    _algorithm: c_int,
) -> c_int {
    let element = element(type_a).filter(|_| type_a == type_b && type_a == type_c);
    let Some(element) = element else { return NOT_SUPPORTED };
    // SAFETY: the caller's pointers, see the module.
    let (alpha, beta) = unsafe { (scale(alpha, arithmetic), scale(beta, arithmetic)) };
    let gemm = Gemm {
        rows: rows as usize,
        columns: columns as usize,
        depth: depth as usize,
        batch: batch as usize,
        alpha,
        beta,
        a: matrix(a, column_stride_a, batch_stride_a, transposition_a),
        b: matrix(b, column_stride_b, batch_stride_b, transposition_b),
        c: matrix(c, column_stride_c, batch_stride_c, 0),
        element,
    };
    enqueue("cublasGemmStridedBatchedEx", handle, gemm)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: *const Handle,
    transposition_a: c_int,
    transposition_b: c_int,
    rows: c_int,
    columns: c_int,
    depth: c_int,
    alpha: *const f64,
    a: u64,
    column_stride_a: c_int,
    batch_stride_a: i64,
    b: u64,
    column_stride_b: c_int,
    batch_stride_b: i64,
    beta: *const f64,
    c: u64,
    column_stride_c: c_int,
    batch_stride_c: i64,
    batch: c_int,
) -> c_int {
    let gemm = Gemm {
        rows: rows as usize,
        columns: columns as usize,
        depth: depth as usize,
        batch: batch as usize,
        // SAFETY: the caller's pointers, see the module.
        alpha: unsafe { *alpha },
        // SAFETY: the same.
        beta: unsafe { *beta },
        a: matrix(a, column_stride_a, batch_stride_a, transposition_a),
        b: matrix(b, column_stride_b, batch_stride_b, transposition_b),
        c: matrix(c, column_stride_c, batch_stride_c, 0),
        element: Element::F64,
    };
    enqueue("cublasDgemmStridedBatched", handle, gemm)
}
