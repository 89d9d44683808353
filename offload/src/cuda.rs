//! A CUDA device beside the host: one stream a direction, pinned memory, and the events that order streams.
//!
//! Candle computes on its own stream. Copies run beside it on two more, so whatever passes from one stream to
//! another passes with a [`Done`]: what was enqueued on a [`Lane`] until then. Whoever uses it next, on
//! whichever lane, waits for that first. cudarc's own tracking of events is off: it never sees what candle's
//! kernels write.

mod fault;
mod pinned;
mod pool;

use crate::{Error, Lease, locked};
use cudarc::driver::sys::{CUdeviceptr, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError, result};
use fault::Faults;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex};

pub use fault::{Call, CudaFailure, CudaFault};
pub(crate) use pinned::PinnedMemory;
pub use pool::Pool;

/// The driver's name of the error of a device that has no memory left, which is in the text of every error
/// that tells of it.
pub const OUT_OF_MEMORY: &str = "CUDA_ERROR_OUT_OF_MEMORY";

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

/// A moment on a lane: everything that was enqueued there until then is done.
#[derive(Clone, Debug)]
pub struct Done(Arc<CudaEvent>);

impl Done {
    /// Waits until it is over. A failure of the driver's shows in what comes next.
    pub fn wait(&self) {
        let _ = self.0.synchronize();
    }

    /// Seconds by the device's clock from this moment to a `later` one. None before both are over, and where
    /// the driver does not tell. Nobody waits.
    pub fn seconds_until(&self, later: &Self) -> Option<f64> {
        self.0.context().bind_to_thread().ok()?;
        // SAFETY: both events live, and belong to the same context.
        let elapsed = unsafe { result::event::elapsed(self.0.cu_event(), later.0.cu_event()) };
        elapsed.ok().map(|milliseconds| 1e-3 * f64::from(milliseconds))
    }
}

/// What a device has been asked for so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Times that the engine allocated memory of the device.
    pub allocations: u64,
    /// Times that there was none left, so that the driver's pool was made to give back what nobody used.
    pub trims: u64,
    /// Copies from or to memory of the host that was not page-locked: each of them made the host wait, and
    /// nothing ran beside it.
    pub pageable_copies: u64,
    /// Between the tiers, to the device.
    pub uploads: Moved,
    /// Between the tiers, to the host.
    pub downloads: Moved,
}

/// Copies, and how long they took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// How many.
    pub copies: u64,
    /// Bytes.
    pub bytes: u64,
    /// Seconds by the device's clock; 0 where the driver does not tell.
    pub seconds: f64,
}

/// A range of device memory that one copy reads or writes.
#[derive(Debug)]
pub struct DeviceRange<'a> {
    pointer: CUdeviceptr,
    bytes: usize,
    memory: PhantomData<&'a mut ()>,
}

impl<'a> DeviceRange<'a> {
    /// Elements `range` of `memory`, to be read or written: which of both is the copy's to say, so nobody
    /// else may use them.
    pub fn of<T>(memory: &'a mut CudaSlice<T>, range: Range<usize>) -> Self {
        let stream = memory.stream().clone();
        let elements = memory.len();
        let (start, _) = memory.device_ptr_mut(&stream);
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
    faults: Faults,
    counts: Mutex<Counts>,
}

impl Cuda {
    /// Puts more streams beside the one that computes.
    ///
    /// # Errors
    /// [`Error::Cuda`]; also when `compute` is a default stream, which other streams cannot run beside in
    /// order.
    pub fn new(compute: Arc<CudaStream>, fault: Option<CudaFault>) -> Result<Self, Error> {
        let action = "streams for copies and for the optimizer";
        if (compute.cu_stream() as usize) < 3 {
            return Err(Error::Cuda {
                action,
                reason:
                    "the device computes on a default stream, which is another one in every thread: make \
                         it with Device::new_cuda_with_stream"
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
            faults: Faults::new(fault),
            counts: Mutex::default(),
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

    /// Makes the device the one of the thread that calls.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn bind_thread(&self) -> Result<(), Error> {
        self.context().bind_to_thread().map_err(failed("use the device from this thread"))
    }

    /// Runs `allocate`, which allocates memory of the device. If the device has none left, waits for what it
    /// is doing, lets the driver's pool give back what nobody uses, and tries once more.
    ///
    /// # Errors
    /// What `allocate` says.
    pub fn allocate<T, E: From<Error> + fmt::Display>(
        &self,
        mut allocate: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut attempt = || {
            self.faults.happens(Call::Allocate)?;
            allocate().inspect(|_| locked(&self.counts).allocations += 1)
        };
        match attempt() {
            Err(error) if error.to_string().contains(OUT_OF_MEMORY) => {
                self.trim()?;
                attempt()
            }
            done => done,
        }
    }

    fn trim(&self) -> Result<(), Error> {
        // Memory that was freed is the pool's only when the work before that is done.
        self.synchronize_all()?;
        if let Some(pool) = &self.pool {
            pool.trim();
        }
        locked(&self.counts).trims += 1;
        Ok(())
    }

    /// Runs `launch`, which launches kernels of the engine's.
    ///
    /// # Errors
    /// What `launch` says.
    pub fn launch<E: From<Error>>(&self, launch: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if self.faults.happens(Call::Launch)? { launch() } else { Ok(()) }
    }

    /// Runs `fetch`, which fetches a few numbers of the device's and waits for them.
    ///
    /// # Errors
    /// What `fetch` says.
    pub fn fetch<T, E: From<Error>>(&self, fetch: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        // A failure comes after the wait, as with `synchronize`: memory may be freed after this.
        let fetched = fetch()?;
        self.faults.happens(Call::Fetch)?;
        Ok(fetched)
    }

    /// What is enqueued on a lane until now.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn record(&self, lane: Lane) -> Result<Done, Error> {
        self.faults.happens(Call::Record)?;
        // Events that keep the time are what the timeline is made of.
        let with_time = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.stream(lane).record_event(with_time).map_err(failed("record an event"))?;
        Ok(Done(Arc::new(event)))
    }

    /// Whatever is enqueued on a lane from now on comes after all of `done`. The host does not wait.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn wait(&self, lane: Lane, done: &[Done]) -> Result<(), Error> {
        for done in done {
            if self.faults.happens(Call::Wait(lane))? {
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
        self.faults.happens(Call::Synchronize).map(drop)
    }

    /// Waits until the device has nothing to do.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    pub fn synchronize_all(&self) -> Result<(), Error> {
        // All of them are waited for, whatever one of them says: memory may be freed after this.
        Lane::ALL.map(|lane| self.synchronize(lane)).into_iter().collect()
    }

    /// Copies from host to device, and waits until the lease may change again.
    ///
    /// # Errors
    /// [`Error::Cuda`], and [`Error::CopyLength`]. No copy is under way any more then, too.
    pub fn upload(&self, lease: &Lease, copies: Vec<CudaCopy>) -> Result<(), Error> {
        self.all(Lane::Upload, copies, |copy| {
            let bytes = self.host_bytes(lease, &copy)?;
            let from = &lease[bytes];
            // SAFETY: the range of the device is borrowed until this function returns, as is the lease, and
            // all copies are done when it does.
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
        if !pinned::is_page_locked(&lease[copy.host.clone()]) {
            locked(&self.counts).pageable_copies += 1;
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
        self.bind_thread()?;
        let began = self.record(lane)?;
        let mut moved = Moved::default();
        let mut copies = copies.into_iter().filter(|copy| !copy.host.is_empty());
        let enqueued = copies.try_for_each(|copy| {
            self.faults.happens(Call::Copy)?;
            moved.copies += 1;
            moved.bytes += copy.host.len() as u64;
            enqueue(copy)
        });
        let ended = self.record(lane);
        let done = self.synchronize(lane);
        moved.seconds = ended.as_ref().ok().and_then(|ended| began.seconds_until(ended)).unwrap_or(0.0);
        self.note(lane, moved);
        enqueued.and(ended.map(drop)).and(done)
    }

    fn note(&self, lane: Lane, moved: Moved) {
        let mut counts = locked(&self.counts);
        let sum = if lane == Lane::Upload { &mut counts.uploads } else { &mut counts.downloads };
        sum.copies += moved.copies;
        sum.bytes += moved.bytes;
        sum.seconds += moved.seconds;
    }

    /// Bytes of the device's memory: those that nobody uses, and all.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn free_and_total_bytes(&self) -> Result<(u64, u64), Error> {
        let action = "ask for free memory";
        self.context().bind_to_thread().map_err(failed(action))?;
        let (free, total) = result::mem_get_info().map_err(failed(action))?;
        Ok((free as u64, total as u64))
    }

    /// What the driver counts of the memory that this process has taken from the device; none where it does
    /// not count.
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }

    /// What was asked for so far.
    pub fn counts(&self) -> Counts {
        *locked(&self.counts)
    }
}

fn failed(action: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Cuda { action, reason: error.to_string() }
}
