//! The device that computes, as the queues see it: what crosses between its memory and the host's, and what
//! has to be waited for. On the CPU device a crossing is a copy, done when it returns. On a CUDA device every
//! queue has a stream, and what one queue leaves for another comes with a [`Done`].

mod counts;
#[cfg(feature = "cuda")]
mod cuda;

use crate::device::tensor_storage::{self, TensorStorage};
use crate::error::{Error, Result, internal};
use crate::schedule::layout::{Group, Run};
use crate::schedule::operation::Queue;
use candle_core::{CpuStorage, DType, Device, Tensor};
use ferrozero_kernels::adamw::AdamWStep;
use ferrozero_kernels::gradient::{Accumulate, GradientStatistics};
use ferrozero_kernels::ops::{Products, with_products};
use ferrozero_kernels::{Pool, convert};
use ferrozero_offload::{Arena, Budget, Lease, memory};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use std::ops::Range;

#[cfg(feature = "cuda")]
pub use ferrozero_offload::cuda::{Call as CudaCall, CudaFailure, CudaFault, Done, Lane as CudaLane};

pub use counts::{DeviceCounter, DeviceCounts, Moved};

/// A moment on a queue of a CUDA device. Without such devices there is none.
#[cfg(not(feature = "cuda"))]
#[derive(Debug, Clone)]
pub struct Done(());

#[cfg(not(feature = "cuda"))]
impl Done {
    /// No moment, no time.
    pub fn seconds_until(&self, _later: &Self) -> Option<f64> {
        None
    }

    /// No moment, no wait.
    pub fn wait(&self) {}
}

/// A failing call of the CUDA driver's, for tests. Without CUDA there is none.
#[cfg(not(feature = "cuda"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaFault {}

/// Opens a device by its name: `cpu`, or `cuda:0` and the like.
///
/// # Errors
/// [`Error::Configuration`] for an unknown name and for CUDA in a program that was built without it;
/// [`Error::Candle`] where there is no such device.
pub fn open(name: &str) -> Result<Device> {
    let number = match name.strip_prefix("cuda") {
        None if name == "cpu" => return Ok(Device::Cpu),
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|number| number.parse().ok()),
        None => None,
    };
    let Some(number) = number else {
        return Err(Error::Configuration(format!(
            "device {name:?} is unknown: use cpu, cuda or cuda:NUMBER"
        )));
    };
    if !candle_core::utils::cuda_is_available() {
        return Err(Error::Configuration(
            "this program was built without CUDA: build it with `cargo build --release --features cuda` on a \
             machine with the CUDA toolkit"
                .into(),
        ));
    }
    // A stream of its own: the default stream is another one in every thread, and no other runs beside it.
    Ok(Device::new_cuda_with_stream(number)?)
}

/// Memory of one buffer.
pub enum BufferMemory {
    /// Of the host.
    Host(Lease),
    /// Of a device with memory of its own, in f32.
    Device(TensorStorage),
}

impl BufferMemory {
    /// The host's memory.
    pub fn host(&self) -> Result<&Lease> {
        match self {
            Self::Host(lease) => Ok(lease),
            Self::Device(_) => Err(internal("a buffer of the device in place of one of the host")),
        }
    }

    /// The host's memory.
    pub fn host_mut(&mut self) -> Result<&mut Lease> {
        match self {
            Self::Host(lease) => Ok(lease),
            Self::Device(_) => Err(internal("a buffer of the device in place of one of the host")),
        }
    }

    /// Whether it is memory of a device that has its own.
    pub fn is_on_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }
}

/// Refuses products that are not made there, or would not be faster.
fn check_products(device: &Device, dtype: DType, products: Products) -> Result<()> {
    if products == Products::F32 {
        return Ok(());
    }
    if !device.is_cpu() || dtype != DType::F32 {
        return Err(Error::Configuration(
            "products of bf16 are for f32 on the CPU device: with another dtype, as on a CUDA device with \
             bf16, matrices are multiplied in that type anyway; use products of f32"
                .into(),
        ));
    }
    if !products.is_native() {
        return Err(Error::Configuration(
            "this processor has no matrix tiles for bf16 (Intel's AMX), or the system does not grant them: \
             products of bf16 would be slower than those of f32; use products of f32"
                .into(),
        ));
    }
    Ok(())
}

/// The device of a run, and the type that it computes with.
#[derive(Debug)]
pub struct ComputeDevice {
    device: Device,
    dtype: DType,
    products: Products,
    #[cfg(feature = "cuda")]
    cuda: Option<cuda::Parts>,
}

impl ComputeDevice {
    /// Around candle's device; `dtype` is f32, bf16 or f16, and `products` are what it multiplies matrices of
    /// f32 by.
    ///
    /// # Errors
    /// [`Error::Configuration`] for other devices and types, and errors of the driver.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "there are no faults without CUDA"))]
    pub fn new(device: &Device, dtype: DType, products: Products, fault: Option<CudaFault>) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(Error::Configuration(format!(
                "dtype {dtype:?} cannot be trained: use f32, bf16 or f16"
            )));
        }
        check_products(device, dtype, products)?;
        #[cfg(feature = "cuda")]
        let cuda = match device {
            Device::Cuda(device) => Some(cuda::Parts::new(device, fault)?),
            _ => None,
        };
        if !device.is_cpu() && !device.is_cuda() {
            let location = device.location();
            return Err(Error::Configuration(format!(
                "{location:?} cannot be trained on: use the CPU or CUDA"
            )));
        }
        Ok(Self {
            device: device.clone(),
            dtype,
            products,
            #[cfg(feature = "cuda")]
            cuda,
        })
    }

    /// Runs what computes on this device in this thread: a forward, a backward.
    pub fn computing<T>(&self, run: impl FnOnce() -> T) -> T {
        with_products(self.products, run)
    }

    /// Candle's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of parameters, gradients and boundary activations on the device.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether the device's memory is not the host's, so that what crosses is copied by the device.
    pub fn is_apart(&self) -> bool {
        self.device.is_cuda()
    }

    /// Makes a thread one that may use the device.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn bind_thread(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            cuda.streams.bind_thread()?;
        }
        Ok(())
    }

    /// Parameters of zero for a group, tensor by tensor.
    ///
    /// # Errors
    /// [`Error::Candle`] where the device has no memory for them.
    pub fn zeros(&self, group: &Group) -> Result<Vec<TensorStorage>> {
        let elements = group.table.iter().map(|entry| entry.elements);
        elements.map(|elements| self.allocate(elements, self.dtype)).collect()
    }

    /// `elements` zeros of a type. A device that has no memory left is asked twice.
    ///
    /// # Errors
    /// [`Error::Candle`] where it has none all the same; errors of the driver.
    pub fn allocate(&self, elements: usize, dtype: DType) -> Result<TensorStorage> {
        let allocate = || Ok(TensorStorage::zeros(elements, dtype, &self.device)?);
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.streams.allocate(allocate);
        }
        allocate()
    }

    /// Zeros on the device in f32, whatever it computes with.
    ///
    /// # Errors
    /// As [`Self::zeros`].
    pub fn f32_zeros(&self, elements: usize) -> Result<TensorStorage> {
        self.allocate(elements, DType::F32)
    }

    /// Host memory that transfers of the device use.
    pub fn host_arena(&self, budget: &Budget, bytes: usize) -> Result<Arena> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return Ok(Arena::pinned_for_cuda(budget, bytes, &cuda.streams)?);
        }
        Ok(Arena::new(budget, bytes)?)
    }

    /// Bytes that are in use of the memory in which the model's tensors lie. 0 where nobody counts.
    pub fn used_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.streams.pool().map_or(0, |pool| pool.used_bytes());
        }
        memory::current_bytes()
    }

    /// The most of them at once since the last [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.streams.pool().map_or(0, |pool| pool.peak_bytes());
        }
        memory::peak_bytes()
    }

    /// Starts a new measurement of [`Self::peak_bytes`].
    pub fn reset_peak(&self) {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            if let Some(pool) = cuda.streams.pool() {
                pool.reset_peak();
            }
            return;
        }
        memory::reset_peak();
    }

    /// Keeps freed tensors for later ones while they and what is in use are at most `limit_bytes`; 0 keeps
    /// none. A device with memory of its own keeps them anyway.
    pub fn keep_freed(&self, limit_bytes: u64) {
        if !self.is_apart() {
            memory::set_cache_limit_bytes(limit_bytes);
        }
    }

    /// The error of a device that has no memory left, with what the plan counts beside what is used.
    pub fn explain(&self, error: Error, planned_bytes: u64) -> Error {
        let reason = error.to_string();
        if !(self.is_apart() && error.can_be_of_device() && reason.contains("OUT_OF_MEMORY")) {
            return error;
        }
        // Where not even that is known, there is nothing to be told.
        let (free_bytes, total_bytes) = self.free_and_total_bytes().ok().flatten().unwrap_or_default();
        let used_bytes = total_bytes.saturating_sub(free_bytes);
        Error::DeviceMemory { planned_bytes, used_bytes, free_bytes, reason }
    }

    /// Bytes of the memory of a device that has its own: those that nobody uses, and all.
    fn free_and_total_bytes(&self) -> Result<Option<(u64, u64)>> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return Ok(Some(cuda.streams.free_and_total_bytes()?));
        }
        Ok(None)
    }

    /// Bytes that a run may use of the memory of a device that has its own, if nobody says how many: what is
    /// free, less a tenth for the driver's own and for what lies between blocks.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn default_limit_bytes(&self) -> Result<Option<u64>> {
        Ok(self.free_and_total_bytes()?.map(|(free, _)| free / 10 * 9))
    }

    /// What the device was asked for so far.
    pub fn counts(&self) -> DeviceCounts {
        let placeholders = tensor_storage::placeholders_made(&self.device);
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return DeviceCounts { placeholders, ..cuda.counts() };
        }
        DeviceCounts { placeholders, ..DeviceCounts::default() }
    }

    /// The number that a tensor of one f32 holds. Waits for what computes it.
    pub fn number(&self, tensor: &Tensor) -> candle_core::Result<f32> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = self.cuda.as_ref().filter(|_| tensor.device().is_cuda()) {
            return cuda.number(tensor);
        }
        tensor.to_scalar()
    }

    /// What `queue` does on the device from now on comes after all of `earlier`.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "there is nothing to wait for without CUDA")
    )]
    pub fn wait(&self, queue: Queue, earlier: &[Done]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Some(cuda), Some(lane)) = (&self.cuda, cuda::lane(queue)) {
            cuda.streams.wait(lane, earlier)?;
        }
        Ok(())
    }

    /// What `queue` has done on the device until now; none if there is nothing to wait for.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "there is nothing to wait for without CUDA")
    )]
    pub fn record(&self, queue: Queue) -> Result<Option<Done>> {
        #[cfg(feature = "cuda")]
        if let (Some(cuda), Some(lane)) = (&self.cuda, cuda::lane(queue)) {
            return Ok(Some(cuda.streams.record(lane)?));
        }
        Ok(None)
    }

    /// Waits until the device has nothing to do, so that its memory can go.
    pub fn synchronize(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            cuda.streams.synchronize_all()?;
        }
        Ok(())
    }

    /// Parameters in f32 go up into their tensors' storage, in the device's type. `staging` holds them in
    /// that type where it is another one and the device is apart.
    pub fn upload(
        &self,
        pool: &Pool,
        values: &Lease,
        staging: Option<&mut Lease>,
        slot: &mut [TensorStorage],
        runs: &[Run],
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            let staged = match staging {
                Some(staging) => {
                    let elements = runs.last().map_or(0, |run| run.piece_start + run.elements);
                    cuda::narrow_into(pool, &values.as_f32()[..elements], self.dtype, staging)?;
                    &*staging
                }
                None => values,
            };
            let size = self.dtype.size_in_bytes();
            return Ok(cuda.streams.upload(staged, cuda::copies_into(slot, runs, size)?)?);
        }
        let _ = staging;
        let values = values.as_f32();
        for run in runs {
            let from = &values[run.piece_start..run.piece_start + run.elements];
            let within = run.entry_start..run.entry_start + run.elements;
            match slot[run.entry].as_cpu_mut() {
                Some(CpuStorage::F32(to)) => to[within].copy_from_slice(from),
                Some(CpuStorage::BF16(to)) => {
                    convert::narrow(pool, from, &mut to[within]).map_err(Error::Kernel)?
                }
                Some(CpuStorage::F16(to)) => {
                    convert::narrow(pool, from, &mut to[within]).map_err(Error::Kernel)?
                }
                _ => return Err(internal("a slot of another type")),
            }
        }
        Ok(())
    }

    /// Brings gradients of a piece to `staging`, in the device's type, each at the place that it has in the
    /// piece. On the CPU device they are there already.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "gradients are copied on CUDA devices only")
    )]
    pub fn download_gradients(
        &self,
        gradients: &mut [TensorStorage],
        runs: &[Run],
        staging: Option<&mut Lease>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            let staging = staging.ok_or_else(|| internal("gradients without staging"))?;
            let size = self.dtype.size_in_bytes();
            cuda.streams.download(cuda::copies_into(gradients, runs, size)?, staging)?;
        }
        Ok(())
    }

    /// Gradients of one run of a piece, after [`Self::download_gradients`].
    pub fn gradient<'a>(
        &self,
        gradients: &'a [TensorStorage],
        run: &Run,
        staging: Option<&'a Lease>,
    ) -> Result<Gradient<'a>> {
        if let Some(staging) = staging {
            let range = run.piece_start..run.piece_start + run.elements;
            return Ok(match self.dtype {
                DType::BF16 => Gradient::BF16(staging.as_u16()[range].reinterpret_cast()),
                DType::F16 => Gradient::F16(staging.as_u16()[range].reinterpret_cast()),
                _ => Gradient::F32(&staging.as_f32()[range]),
            });
        }
        let range = run.entry_start..run.entry_start + run.elements;
        match gradients[run.entry].as_cpu() {
            Some(CpuStorage::F32(values)) => Ok(Gradient::F32(&values[range])),
            Some(CpuStorage::BF16(values)) => Ok(Gradient::BF16(&values[range])),
            Some(CpuStorage::F16(values)) => Ok(Gradient::F16(&values[range])),
            _ => Err(internal("a gradient of another type")),
        }
    }

    /// Storage that `queue` is going to fill. It belongs to the compute queue, which may be using that memory
    /// for something that is over for candle, so `queue` waits for what is enqueued there.
    pub fn storage_for(&self, queue: Queue, elements: usize) -> Result<TensorStorage> {
        let storage = self.allocate(elements, self.dtype)?;
        let made = self.record(Queue::Compute)?;
        self.wait(queue, made.as_slice())?;
        Ok(storage)
    }

    /// `elements` of a piece go from the host to their home on the device, or back: the home is of the
    /// device.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only CUDA devices are apart"))]
    pub fn copy_up(&self, lease: &Lease, home: &mut BufferMemory, elements: usize) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Some(cuda), BufferMemory::Device(home)) = (&self.cuda, home) {
            let run = Run { entry: 0, entry_start: 0, piece_start: 0, elements };
            return Ok(cuda
                .streams
                .upload(lease, cuda::copies_into(std::slice::from_mut(home), &[run], 4)?)?);
        }
        Err(internal("a copy to a home that is not on the device"))
    }

    /// As [`Self::copy_up`], the other way.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only CUDA devices are apart"))]
    pub fn copy_down(&self, home: &mut BufferMemory, lease: &mut Lease, elements: usize) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Some(cuda), BufferMemory::Device(home)) = (&self.cuda, home) {
            let run = Run { entry: 0, entry_start: 0, piece_start: 0, elements };
            let copies = cuda::copies_into(std::slice::from_mut(home), &[run], 4)?;
            return Ok(cuda.streams.download(copies, lease)?);
        }
        Err(internal("a copy from a home that is not on the device"))
    }

    /// Masters at home on the device enter their tensors' storage, in the device's type.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only CUDA devices are apart"))]
    pub fn enter(&self, masters: &TensorStorage, slot: &mut [TensorStorage], runs: &[Run]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return runs.iter().try_for_each(|run| cuda.enter(masters, &mut slot[run.entry], run));
        }
        Err(internal("masters at home on a device that has no memory of its own"))
    }

    /// Gradients of a piece are scaled and put into, or added to, a buffer of the device. Answers what they
    /// measure, continuing from the piece before unless this is the `first`.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only CUDA devices are apart"))]
    pub fn accumulate(
        &self,
        gradients: &[TensorStorage],
        runs: &[Run],
        target: &mut TensorStorage,
        (scale, how, first): (f32, Accumulate, bool),
        piece_elements: usize,
    ) -> Result<GradientStatistics> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.accumulate(gradients, runs, target, (scale, how, first), piece_elements);
        }
        Err(internal("gradients on a device that has no memory of its own"))
    }

    /// The device updates one run of a piece of which all states are at home there.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only CUDA devices are apart"))]
    pub fn update(
        &self,
        step: &AdamWStep,
        states: [&mut TensorStorage; 4],
        range: Range<usize>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            return cuda.update(step, states, range);
        }
        Err(internal("states on a device that has no memory of its own"))
    }

    /// Elements `range` of a boundary leave the device, in its type.
    pub fn save_boundary(
        &self,
        boundary: &mut TensorStorage,
        range: Range<usize>,
        buffer: &mut Lease,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            let run = Run { entry: 0, entry_start: range.start, piece_start: 0, elements: range.len() };
            let size = self.dtype.size_in_bytes();
            let copies = cuda::copies_into(std::slice::from_mut(boundary), &[run], size)?;
            return Ok(cuda.streams.download(copies, buffer)?);
        }
        let elements = range.len();
        match boundary.as_cpu() {
            Some(CpuStorage::F32(from)) => buffer.as_f32_mut()[..elements].copy_from_slice(&from[range]),
            Some(CpuStorage::BF16(from)) => {
                buffer.as_u16_mut()[..elements].copy_from_slice(from[range].reinterpret_cast());
            }
            Some(CpuStorage::F16(from)) => {
                buffer.as_u16_mut()[..elements].copy_from_slice(from[range].reinterpret_cast());
            }
            _ => return Err(internal("a boundary of another type")),
        }
        Ok(())
    }

    /// Elements `range` of a boundary return to the device.
    pub fn load_boundary(
        &self,
        buffer: &Lease,
        boundary: &mut TensorStorage,
        range: Range<usize>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &self.cuda {
            let run = Run { entry: 0, entry_start: range.start, piece_start: 0, elements: range.len() };
            let size = self.dtype.size_in_bytes();
            let copies = cuda::copies_into(std::slice::from_mut(boundary), &[run], size)?;
            return Ok(cuda.streams.upload(buffer, copies)?);
        }
        let elements = range.len();
        match boundary.as_cpu_mut() {
            Some(CpuStorage::F32(to)) => to[range].copy_from_slice(&buffer.as_f32()[..elements]),
            Some(CpuStorage::BF16(to)) => {
                to[range].copy_from_slice(buffer.as_u16()[..elements].reinterpret_cast::<bf16>());
            }
            Some(CpuStorage::F16(to)) => {
                to[range].copy_from_slice(buffer.as_u16()[..elements].reinterpret_cast::<f16>());
            }
            _ => return Err(internal("a boundary of another type")),
        }
        Ok(())
    }
}

/// Gradients of one run, in the device's type.
pub enum Gradient<'a> {
    /// Of type f32.
    F32(&'a [f32]),
    /// Of type bf16.
    BF16(&'a [bf16]),
    /// Of type f16.
    F16(&'a [f16]),
}
