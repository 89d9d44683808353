//! The CUDA device's side: its kernels, its streams, and what is copied between a lease and its storage.

use super::{CudaFault, DeviceCounts, Moved};
use crate::device::tensor_storage::TensorStorage;
use crate::error::{Error, Result, internal};
use crate::schedule::layout::Run;
use crate::schedule::operation::Queue;
use crate::sync::lock;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{CudaDevice, DType, Storage, Tensor};
use ferrozero_kernels::adamw::AdamWStep;
use ferrozero_kernels::cuda::{
    CudaError, DeviceStatistics, HalfElement, Kernels, Pinned, RunState, pinned_copies,
};
use ferrozero_kernels::gradient::{Accumulate, GradientStatistics};
use ferrozero_kernels::{Pool, convert};
use ferrozero_offload::Lease;
use ferrozero_offload::cuda::{Cuda, CudaCopy, DeviceRange, Lane};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Mutex;

pub(super) fn narrow_into(pool: &Pool, from: &[f32], dtype: DType, staging: &mut Lease) -> Result<()> {
    let to = &mut staging.as_u16_mut()[..from.len()];
    match dtype {
        DType::BF16 => convert::narrow(pool, from, to.reinterpret_cast_mut::<bf16>()),
        _ => convert::narrow(pool, from, to.reinterpret_cast_mut::<f16>()),
    }
    .map_err(Error::Kernel)
}

/// The stream that a queue uses.
pub(super) fn lane(queue: Queue) -> Option<Lane> {
    match queue {
        Queue::Compute => Some(Lane::Compute),
        Queue::Upload => Some(Lane::Upload),
        Queue::Download => Some(Lane::Download),
        Queue::Optimizer => Some(Lane::Optimizer),
        _ => None,
    }
}

/// What a CUDA device needs beside candle.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) streams: Cuda,
    kernels: Kernels,
    /// What the gradients of the group that is being accumulated measure.
    statistics: Mutex<Option<DeviceStatistics>>,
    /// Where a number of the device is read.
    number: Mutex<Pinned<f32>>,
}

impl Parts {
    pub(super) fn new(device: &CudaDevice, fault: Option<CudaFault>) -> Result<Self> {
        let streams = Cuda::new(device.cuda_stream(), fault)?;
        let kernels = Kernels::load(streams.context()).map_err(Error::CudaKernel)?;
        let number = Mutex::new(Pinned::new(streams.context(), 1).map_err(Error::CudaKernel)?);
        Ok(Self { streams, kernels, statistics: Mutex::new(None), number })
    }

    pub(super) fn counts(&self) -> DeviceCounts {
        let counts = self.streams.counts();
        let (small_uploads, small_downloads) = pinned_copies();
        let moved = |moved: ferrozero_offload::cuda::Moved| Moved {
            copies: moved.copies,
            bytes: moved.bytes,
            seconds: moved.seconds,
        };
        DeviceCounts {
            allocations: counts.allocations,
            placeholders: 0,
            trims: counts.trims,
            pageable_copies: counts.pageable_copies,
            small_uploads,
            small_downloads,
            uploads: moved(counts.uploads),
            downloads: moved(counts.downloads),
        }
    }

    pub(super) fn number(&self, tensor: &Tensor) -> candle_core::Result<f32> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            candle_core::bail!("a number that is not on the device")
        };
        let start = layout.start_offset();
        let values = storage.as_cuda_slice::<f32>()?.slice(start..start + 1);
        let stream = self.streams.stream(Lane::Compute);
        let fetch = || Ok(lock(&self.number).fetch(stream, &values).map_err(Error::CudaKernel)?[0]);
        self.streams.fetch::<f32, Error>(fetch).map_err(candle_core::Error::wrap)
    }

    pub(super) fn enter(&self, masters: &TensorStorage, slot: &mut TensorStorage, run: &Run) -> Result<()> {
        let from = f32_of(masters)?.slice(run.piece_start..run.piece_start + run.elements);
        let within = run.entry_start..run.entry_start + run.elements;
        let stream = self.streams.stream(Lane::Upload);
        self.streams.launch(|| match slot.as_cuda_mut().map(|slot| &mut slot.slice) {
            Some(CudaStorageSlice::F32(to)) => {
                stream.memcpy_dtod(&from, &mut to.slice_mut(within)).map_err(|source| {
                    CudaError::Driver { doing: "copying masters on the device", source }.into()
                })
            }
            Some(CudaStorageSlice::BF16(to)) => self.narrow(&from, to, within),
            Some(CudaStorageSlice::F16(to)) => self.narrow(&from, to, within),
            _ => Err(internal("a slot of another type")),
        })
    }

    fn narrow<E: HalfElement>(
        &self,
        from: &CudaView<f32>,
        to: &mut CudaSlice<E>,
        within: Range<usize>,
    ) -> Result<()> {
        let stream = self.streams.stream(Lane::Upload);
        self.kernels.narrow(stream, from, &mut to.slice_mut(within)).map_err(Error::CudaKernel)
    }

    pub(super) fn accumulate(
        &self,
        gradients: &[TensorStorage],
        runs: &[Run],
        target: &mut TensorStorage,
        (scale, how, first): (f32, Accumulate, bool),
        piece_elements: usize,
    ) -> Result<GradientStatistics> {
        let stream = self.streams.stream(Lane::Download);
        let mut statistics = lock(&self.statistics);
        let of_group = match &mut *statistics {
            Some(of_group) => of_group,
            none => {
                let new = || DeviceStatistics::new(stream, piece_elements).map_err(Error::CudaKernel);
                none.insert(self.streams.allocate(new)?)
            }
        };
        if first {
            self.streams.launch(|| of_group.reset(stream).map_err(Error::CudaKernel))?;
        }
        let target = f32_of_mut(target)?;
        for run in runs {
            let within = run.entry_start..run.entry_start + run.elements;
            let mut to = target.slice_mut(run.piece_start..run.piece_start + run.elements);
            self.streams.launch(|| match gradients[run.entry].as_cuda().map(|gradient| &gradient.slice) {
                Some(CudaStorageSlice::F32(from)) => {
                    let from = from.slice(within);
                    self.kernels
                        .accumulate(stream, &mut to, &from, scale, how, of_group)
                        .map_err(Error::CudaKernel)
                }
                Some(CudaStorageSlice::BF16(from)) => {
                    let from = from.slice(within);
                    self.kernels
                        .accumulate(stream, &mut to, &from, scale, how, of_group)
                        .map_err(Error::CudaKernel)
                }
                Some(CudaStorageSlice::F16(from)) => {
                    let from = from.slice(within);
                    self.kernels
                        .accumulate(stream, &mut to, &from, scale, how, of_group)
                        .map_err(Error::CudaKernel)
                }
                _ => Err(internal("a gradient of another type")),
            })?;
        }
        // The gradients may be freed after this, so it waits.
        self.streams.fetch(|| of_group.read(stream).map_err(Error::CudaKernel))
    }

    pub(super) fn update(
        &self,
        step: &AdamWStep,
        [master, first_moment, second_moment, gradient]: [&mut TensorStorage; 4],
        range: Range<usize>,
    ) -> Result<()> {
        let state = RunState {
            master: f32_of_mut(master)?.slice_mut(range.clone()),
            first_moment: f32_of_mut(first_moment)?.slice_mut(range.clone()),
            second_moment: f32_of_mut(second_moment)?.slice_mut(range.clone()),
        };
        let gradient = f32_of(gradient)?.slice(range);
        let stream = self.streams.stream(Lane::Optimizer);
        self.streams
            .launch(|| self.kernels.adamw(stream, step, state, &gradient, None).map_err(Error::CudaKernel))
    }
}

fn f32_of(run: &TensorStorage) -> Result<&CudaSlice<f32>> {
    match run.as_cuda().map(|storage| &storage.slice) {
        Some(CudaStorageSlice::F32(values)) => Ok(values),
        _ => Err(internal("a state on the device that is not f32")),
    }
}

fn f32_of_mut(run: &mut TensorStorage) -> Result<&mut CudaSlice<f32>> {
    match run.as_cuda_mut().map(|storage| &mut storage.slice) {
        Some(CudaStorageSlice::F32(values)) => Ok(values),
        _ => Err(internal("a state on the device that is not f32")),
    }
}

/// What is copied between a lease, which holds a piece in elements of `size` bytes, and storage of the
/// device.
pub(super) fn copies_into<'a>(
    storage: &'a mut [TensorStorage],
    runs: &[Run],
    size: usize,
) -> Result<Vec<CudaCopy<'a>>> {
    let mut storage: Vec<Option<&mut TensorStorage>> = storage.iter_mut().map(Some).collect();
    let copies = runs.iter().map(|run| {
        let device = storage.get_mut(run.entry).and_then(Option::take).and_then(TensorStorage::as_cuda_mut);
        let within = run.entry_start..run.entry_start + run.elements;
        let device = match device.map(|storage| &mut storage.slice) {
            Some(CudaStorageSlice::F32(values)) => DeviceRange::of(values, within),
            Some(CudaStorageSlice::BF16(values)) => DeviceRange::of(values, within),
            Some(CudaStorageSlice::F16(values)) => DeviceRange::of(values, within),
            _ => return Err(internal("device storage of another type, or twice in one piece")),
        };
        let host = run.piece_start * size..(run.piece_start + run.elements) * size;
        Ok(CudaCopy { host, device })
    });
    copies.collect()
}
