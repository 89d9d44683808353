//! A CUDA device beside the host: one stream a direction, pinned memory, and the events that order streams.
//!
//! Candle computes on its own stream. Copies run beside it on two more, so whatever passes from one stream to another
//! passes with a [`Done`]: what was enqueued on a [`Lane`] until then. Whoever uses it next, on whichever lane, waits for that first.
//! cudarc's own tracking of events is off: it never sees what candle's kernels write.

use crate::{Error, Lease, PAGE_BYTES, locked};
use cudarc::driver::sys::{self, CUdeviceptr};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, result,
};
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A stream of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Candle's.
    Compute,
    /// Host to device.
    Upload,
    /// Device to host.
    Download,
    /// The optimizer's.
    Optimizer,
}

impl Lane {
    /// All lanes.
    pub const ALL: [Self; 4] = [Self::Compute, Self::Upload, Self::Download, Self::Optimizer];
}

/// A kind of call of the driver's, for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A copy between host and device.
    Copy,
    /// An event is recorded.
    Record,
    /// A stream is told to wait for an event.
    Wait(Lane),
    /// The host waits for a stream.
    Synchronize,
}

impl Call {
    /// All calls that can be made to fail.
    pub const ALL: [Self; 7] = [
        Self::Copy,
        Self::Record,
        Self::Wait(Lane::Compute),
        Self::Wait(Lane::Upload),
        Self::Wait(Lane::Download),
        Self::Wait(Lane::Optimizer),
        Self::Synchronize,
    ];
}

/// A failure to be acted out, for tests: what happens to the call of this kind with this number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaFault {
    /// Kind of call.
    pub call: Call,
    /// Its number.
    pub index: u64,
    /// Says nothing and does not happen, as if somebody had forgotten it. Otherwise it is an error.
    pub forgotten: bool,
}

/// A moment on a lane: everything that was enqueued there until then is done.
#[derive(Clone, Debug)]
pub struct Done(Arc<CudaEvent>);

/// A range of device memory that one copy reads or writes.
#[derive(Debug)]
pub struct DeviceRange<'a> {
    pointer: CUdeviceptr,
    bytes: usize,
    memory: PhantomData<&'a mut ()>,
}

impl<'a> DeviceRange<'a> {
    /// Elements `range` of `memory`, to be read.
    pub fn of<T>(memory: &'a CudaSlice<T>, range: Range<usize>) -> Self {
        let (start, _) = memory.device_ptr(memory.stream());
        Self::within::<T>(start, memory.len(), range)
    }

    /// Elements `range` of `memory`, to be written.
    pub fn of_mut<T>(memory: &'a mut CudaSlice<T>, range: Range<usize>) -> Self {
        let stream = memory.stream().clone();
        let elements = memory.len();
        let (start, _) = memory.device_ptr_mut(&stream);
        Self::within::<T>(start, elements, range)
    }

    fn within<T>(start: CUdeviceptr, elements: usize, range: Range<usize>) -> Self {
        // Slicing as the host does it: a range out of bounds is empty and its copy refused for its length.
        let inside = range.start <= range.end && range.end <= elements;
        let bytes = if inside { range.len() * size_of::<T>() } else { 0 };
        Self { pointer: start + (range.start * size_of::<T>()) as CUdeviceptr, bytes, memory: PhantomData }
    }
}

/// Bytes of a lease, and the device memory that they are copied from or to.
#[derive(Debug)]
pub struct CudaCopy<'a> {
    /// Bytes within the lease.
    pub host: Range<usize>,
    /// As many bytes of the device.
    pub device: DeviceRange<'a>,
}

/// A CUDA device with its streams.
#[derive(Debug)]
pub struct Cuda {
    compute: Arc<CudaStream>,
    upload: Arc<CudaStream>,
    download: Arc<CudaStream>,
    optimizer: Arc<CudaStream>,
    pool: Option<Pool>,
    fault: Mutex<Option<CudaFault>>,
    pageable_copies: AtomicU64,
}

impl Cuda {
    /// Puts more streams beside the one that computes.
    ///
    /// # Errors
    /// [`Error::Cuda`]; also when `compute` is a default stream, which other streams cannot run beside in order.
    pub fn new(compute: Arc<CudaStream>, fault: Option<CudaFault>) -> Result<Self, Error> {
        let action = "streams for copies and for the optimizer";
        if (compute.cu_stream() as usize) < 3 {
            return Err(Error::Cuda {
                action,
                reason: "the device computes on a default stream, which is another one in every thread: make it with \
                         Device::new_cuda_with_stream"
                    .into(),
            });
        }
        // SAFETY: every access of another stream is ordered by hand, with `Done`.
        unsafe { compute.context().disable_event_tracking() };
        let stream = || compute.context().new_stream().map_err(failed(action));
        let (upload, download, optimizer) = (stream()?, stream()?, stream()?);
        Ok(Self {
            pool: Pool::of(compute.context()),
            compute,
            upload,
            download,
            optimizer,
            fault: Mutex::new(fault),
            pageable_copies: AtomicU64::new(0),
        })
    }

    /// The stream of a lane.
    pub fn stream(&self, lane: Lane) -> &Arc<CudaStream> {
        match lane {
            Lane::Compute => &self.compute,
            Lane::Upload => &self.upload,
            Lane::Download => &self.download,
            Lane::Optimizer => &self.optimizer,
        }
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<CudaContext> {
        self.compute.context()
    }

    /// What is enqueued on a lane until now.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn record(&self, lane: Lane) -> Result<Done, Error> {
        self.happens(Call::Record)?;
        let event = self.stream(lane).record_event(None).map_err(failed("record an event"))?;
        Ok(Done(Arc::new(event)))
    }

    /// Whatever is enqueued on a lane from now on comes after all of `done`. The host does not wait.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn wait(&self, lane: Lane, done: &[Done]) -> Result<(), Error> {
        for done in done {
            if self.happens(Call::Wait(lane))? {
                self.stream(lane).wait(&done.0).map_err(failed("wait for an event"))?;
            }
        }
        Ok(())
    }

    /// Waits until everything on a lane is done.
    ///
    /// # Errors
    /// [`Error::Cuda`], also of whatever went wrong on the lane.
    pub fn synchronize(&self, lane: Lane) -> Result<(), Error> {
        self.stream(lane).synchronize().map_err(failed("wait for a stream"))?;
        self.happens(Call::Synchronize).map(drop)
    }

    /// Waits until the device has nothing to do.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    pub fn synchronize_all(&self) -> Result<(), Error> {
        Lane::ALL.into_iter().try_for_each(|lane| self.synchronize(lane))
    }

    /// Copies from host to device, and waits until the lease may change again.
    ///
    /// # Errors
    /// [`Error::Cuda`], and [`Error::CopyLength`]. No copy is under way any more then, too.
    pub fn upload(&self, lease: &Lease, copies: Vec<CudaCopy>) -> Result<(), Error> {
        self.all(Lane::Upload, copies, |copy| {
            let bytes = self.host_bytes(lease, &copy)?;
            let from = &lease[bytes];
            // SAFETY: the range of the device is borrowed until this function returns, as is the lease, and all copies
            // are done when it does.
            unsafe { result::memcpy_htod_async(copy.device.pointer, from, self.upload.cu_stream()) }
                .map_err(failed("copy to the device"))
        })
    }

    /// Copies from device to host, and waits until the lease holds the bytes.
    ///
    /// # Errors
    /// As [`Self::upload`].
    pub fn download(&self, copies: Vec<CudaCopy>, lease: &mut Lease) -> Result<(), Error> {
        self.all(Lane::Download, copies, |copy| {
            let bytes = self.host_bytes(lease, &copy)?;
            let to = &mut lease[bytes];
            // SAFETY: as in `upload`.
            unsafe { result::memcpy_dtoh_async(to, copy.device.pointer, self.download.cu_stream()) }
                .map_err(failed("copy from the device"))
        })
    }

    fn host_bytes(&self, lease: &Lease, copy: &CudaCopy) -> Result<Range<usize>, Error> {
        if copy.host.len() != copy.device.bytes || copy.host.end > lease.len() {
            return Err(Error::CopyLength {
                from_bytes: copy.host.len().min(lease.len()),
                into_bytes: copy.device.bytes,
            });
        }
        if !lease.is_pinned_for_cuda() {
            self.pageable_copies.fetch_add(1, Ordering::Relaxed);
        }
        Ok(copy.host.clone())
    }

    /// Enqueues copies, and waits for those that were enqueued whatever happened.
    fn all(
        &self,
        lane: Lane,
        copies: Vec<CudaCopy>,
        mut enqueue: impl FnMut(CudaCopy) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.context().bind_to_thread().map_err(failed("use the device from this thread"))?;
        let mut copies = copies.into_iter().filter(|copy| !copy.host.is_empty());
        let enqueued = copies.try_for_each(|copy| self.happens(Call::Copy).and_then(|_| enqueue(copy)));
        let done = self.synchronize(lane);
        enqueued.and(done)
    }

    /// Bytes of the device's memory that nobody uses.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn free_bytes(&self) -> Result<u64, Error> {
        let action = "ask for free memory";
        self.context().bind_to_thread().map_err(failed(action))?;
        let (free, _) = result::mem_get_info().map_err(failed(action))?;
        Ok(free as u64)
    }

    /// What the driver counts of the memory that this process has taken from the device; none where it does not count.
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }

    /// Copies so far from or to memory that was not pinned: each of them made the host wait, and nothing ran beside it.
    pub fn pageable_copies(&self) -> u64 {
        self.pageable_copies.load(Ordering::Relaxed)
    }

    /// Whether a call is to be made, unless a test wants it to fail.
    fn happens(&self, call: Call) -> Result<bool, Error> {
        let mut fault = locked(&self.fault);
        match &mut *fault {
            Some(planned) if planned.call == call && planned.index == 0 => {
                let forgotten = planned.forgotten;
                *fault = None;
                match forgotten {
                    true => Ok(false),
                    false => {
                        let reason = format!("{call:?}");
                        Err(Error::Cuda { action: "a fault that a test asked for", reason })
                    }
                }
            }
            Some(planned) if planned.call == call => {
                planned.index -= 1;
                Ok(true)
            }
            _ => Ok(true),
        }
    }
}

fn failed(action: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Cuda { action, reason: error.to_string() }
}

/// The pool that a device's memory is allocated from, and what the driver counts of it.
#[derive(Debug)]
pub struct Pool {
    handle: sys::CUmemoryPool,
    attribute: GetAttribute,
    set_attribute: GetAttribute,
}

// SAFETY: the handle is the device's default pool, which lives as long as the driver, and which every thread may ask.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// `cuMemPoolGetAttribute`, and `cuMemPoolSetAttribute` too.
type GetAttribute =
    unsafe extern "C" fn(sys::CUmemoryPool, sys::CUmemPool_attribute, *mut c_void) -> sys::CUresult;
/// `cuDeviceGetDefaultMemPool`.
type DefaultPool = unsafe extern "C" fn(*mut sys::CUmemoryPool, sys::CUdevice) -> sys::CUresult;

impl Pool {
    /// The device's pool. Looked up by name, so that a driver that counts nothing will do.
    fn of(context: &Arc<CudaContext>) -> Option<Self> {
        let symbol = |name: &CStr| {
            // SAFETY: a look-up in what is loaded, of a name that ends with a zero byte.
            let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        let default_pool = symbol(c"cuDeviceGetDefaultMemPool")?;
        let (get, set) = (symbol(c"cuMemPoolGetAttribute")?, symbol(c"cuMemPoolSetAttribute")?);
        // SAFETY: these are the driver's functions of these names, whose types are those of cuda.h.
        let (default_pool, attribute, set_attribute) = unsafe {
            (
                std::mem::transmute::<*mut c_void, DefaultPool>(default_pool),
                std::mem::transmute::<*mut c_void, GetAttribute>(get),
                std::mem::transmute::<*mut c_void, GetAttribute>(set),
            )
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written to, and the device is the context's.
        let result = unsafe { default_pool(&mut handle, context.cu_device()) };
        (result == sys::CUresult::CUDA_SUCCESS).then_some(Self { handle, attribute, set_attribute })
    }

    fn bytes(&self, attribute: sys::CUmemPool_attribute) -> u64 {
        let mut bytes = 0_u64;
        // SAFETY: both attributes that are asked for are numbers of 64 bits.
        let result = unsafe { (self.attribute)(self.handle, attribute, (&raw mut bytes).cast()) };
        if result == sys::CUresult::CUDA_SUCCESS { bytes } else { 0 }
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    /// The most bytes in use at once since the last [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> u64 {
        self.bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Starts a new measurement of [`Self::peak_bytes`] from what is in use now.
    pub fn reset_peak(&self) {
        let mut zero = 0_u64;
        let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a number of 64 bits, and zero is the only value that it can be set to. Where that fails the
        // peak stays, which is on the safe side.
        let _ = unsafe { (self.set_attribute)(self.handle, high, (&raw mut zero).cast()) };
    }
}

/// Page-locked memory that the device copies from and to while the host goes on. Disks read and write it too.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    /// What the driver gave.
    allocation: NonNull<u8>,
    /// The first page in it.
    base: NonNull<u8>,
    context: Arc<CudaContext>,
}

impl PinnedMemory {
    /// Allocates `bytes` zeroed bytes.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self, Error> {
        // Known to every context, and cached: the host reads gradients and states from it.
        const PORTABLE: u32 = 1;
        let action = "page-locked host memory";
        context.bind_to_thread().map_err(failed(action))?;
        // Direct I/O needs whole pages, and the driver promises none.
        // SAFETY: the memory is unset until it is set below.
        let given = unsafe { result::malloc_host(bytes + PAGE_BYTES, PORTABLE) }
            .map_err(failed(action))?
            .cast::<u8>();
        let none = || Error::Cuda { action, reason: "none was given".into() };
        let allocation = NonNull::new(given).ok_or_else(none)?;
        let base = NonNull::new(given.wrapping_add(given.align_offset(PAGE_BYTES))).ok_or_else(none)?;
        // SAFETY: `bytes` from the first page on are within the range that the driver has just given.
        unsafe { base.as_ptr().write_bytes(0, bytes) };
        Ok(Self { allocation, base, context: context.clone() })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // A failure leaves the memory to the end of the process.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the memory came from `malloc_host`, and no lease of it is left: each holds the arena alive.
            let _ = unsafe { result::free_host(self.allocation.as_ptr().cast::<c_void>()) };
        }
    }
}
