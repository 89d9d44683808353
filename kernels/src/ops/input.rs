//! Access to the elements of candle tensors on the CPU.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Range;

use super::error::OpError;
use crate::convert::widen_chunk;
use crate::simd::Path;

/// Elements of a type that operations compute with.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Elements<'a> {
    /// Those of a contiguous CPU storage, as the forward of an operation receives it.
    pub(super) fn of(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        match storage {
            CpuStorage::BF16(_) => elements(op, storage, layout).map(Self::BF16),
            CpuStorage::F16(_) => elements(op, storage, layout).map(Self::F16),
            _ => elements(op, storage, layout).map(Self::F32),
        }
    }

    /// Those of several storages, of one type.
    pub(super) fn of_all<const INPUTS: usize>(
        op: &'static str,
        inputs: [(&'a CpuStorage, &Layout); INPUTS],
    ) -> Result<[Self; INPUTS]> {
        let mut all = [Self::F32(&[]); INPUTS];
        for (elements, (storage, layout)) in all.iter_mut().zip(inputs) {
            *elements = Self::of(op, storage, layout)?;
        }
        let expected = all.first().map_or(DType::F32, |elements| elements.dtype());
        match all.iter().map(|elements| elements.dtype()).find(|&dtype| dtype != expected) {
            Some(dtype) => Err(OpError::DType { op, dtype, expected }.into()),
            None => Ok(all),
        }
    }

    /// How many they are.
    pub(super) fn len(self) -> usize {
        match self {
            Self::F32(elements) => elements.len(),
            Self::BF16(elements) => elements.len(),
            Self::F16(elements) => elements.len(),
        }
    }

    /// Their type.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::BF16(_) => DType::BF16,
            Self::F16(_) => DType::F16,
        }
    }

    /// Those from `first` on; none where that is beyond the last.
    pub(super) fn after(self, first: usize) -> Self {
        let first = first.min(self.len());
        match self {
            Self::F32(elements) => Self::F32(&elements[first..]),
            Self::BF16(elements) => Self::BF16(&elements[first..]),
            Self::F16(elements) => Self::F16(&elements[first..]),
        }
    }

    /// Some of them in f32: as they lie, or widened.
    pub(super) fn wide(self, range: Range<usize>) -> Cow<'a, [f32]> {
        if let Self::F32(elements) = self {
            return Cow::Borrowed(&elements[range]);
        }
        let mut wide = vec![0f32; range.len()];
        self.widen(range, &mut wide);
        Cow::Owned(wide)
    }

    /// Widens some of them, exactly.
    pub(super) fn widen(self, range: Range<usize>, to: &mut [f32]) {
        match self {
            Self::F32(elements) => to.copy_from_slice(&elements[range]),
            Self::BF16(elements) => widen_chunk(Path::best(), &elements[range], to),
            Self::F16(elements) => widen_chunk(Path::best(), &elements[range], to),
        }
    }
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(elements: &'a [f32]) -> Self {
        Self::F32(elements)
    }
}

/// The elements of a contiguous CPU storage, as the forward of an operation receives it.
pub(super) fn elements<'a, T: WithDType>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let dtype = storage.dtype();
    if dtype != T::DTYPE {
        let expected = T::DTYPE;
        return Err(OpError::DType { op, dtype, expected }.into());
    }
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op }),
    }
}

/// A tensor that a backward reads: holds the lock of its storage.
pub(super) struct Input<'a> {
    op: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Input<'a> {
    /// Locks the storage of a contiguous tensor for reading.
    pub(super) fn new(op: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Input { op, storage, layout }
    }

    /// The operation that asked.
    #[cfg(feature = "cuda")]
    pub(super) fn op(&self) -> &'static str {
        self.op
    }

    /// The storage on a CUDA device, and where the elements lie in it.
    #[cfg(feature = "cuda")]
    pub(super) fn cuda_storage(&self) -> Result<(&candle_core::CudaStorage, &Layout)> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok((storage, self.layout)),
            other => Err(OpError::Device { op: self.op, device: other.device().location() }.into()),
        }
    }

    /// The elements, row-major, of a type that operations compute with.
    pub(super) fn real(&self) -> Result<Elements<'_>> {
        match &*self.storage {
            Storage::Cpu(storage) => Elements::of(self.op, storage, self.layout),
            other => Err(OpError::Device { op: self.op, device: other.device().location() }.into()),
        }
    }

    /// The elements, row-major.
    pub(super) fn elements<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => elements(self.op, storage, self.layout),
            other => Err(OpError::Device { op: self.op, device: other.device().location() }.into()),
        }
    }
}
