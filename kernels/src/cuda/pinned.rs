//! A little page-locked memory of the host. A copy from or to any other memory goes by way of the driver's
//! own, and nothing runs beside it.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    ValidAsZeroBits, result,
};

use super::error::{CudaError, Doing};
use crate::error::same_length;

static SENT: AtomicU64 = AtomicU64::new(0);
static FETCHED: AtomicU64 = AtomicU64::new(0);

/// Copies of this process so far by way of [`Pinned`] memory: to devices, and from them.
pub fn pinned_copies() -> (u64, u64) {
    (SENT.load(Ordering::Relaxed), FETCHED.load(Ordering::Relaxed))
}

/// Page-locked memory for one copy at a time.
#[derive(Debug)]
pub struct Pinned<T> {
    base: NonNull<T>,
    elements: usize,
    /// The end of the last copy to the device, which reads the memory until then.
    sent: Option<CudaEvent>,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is the value's own, and the driver's functions may be called from any thread.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: DeviceRepr + ValidAsZeroBits> Pinned<T> {
    /// Memory for copies of up to `elements`.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if there is none.
    pub fn new(context: &Arc<CudaContext>, elements: usize) -> Result<Self, CudaError> {
        let doing = "allocating page-locked memory";
        let bytes = elements.max(1) * size_of::<T>();
        context.bind_to_thread().doing(doing)?;
        // SAFETY: the memory is set before anything reads it. No flags: the host reads it, so it is cached.
        let base = unsafe { result::malloc_host(bytes, 0) }.doing(doing)?.cast::<T>();
        let out_of_memory =
            candle_core::cuda_backend::cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let base = NonNull::new(base).ok_or(result::DriverError(out_of_memory)).doing(doing)?;
        // SAFETY: the driver has just given so many bytes.
        unsafe { base.as_ptr().cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { base, elements, sent: None, context: context.clone() })
    }

    /// Elements that a copy may have.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Copies from the device and waits for what `stream` has to do until then.
    ///
    /// # Errors
    /// [`CudaError::Run`] for more elements than there is memory for; [`CudaError::Driver`], also of earlier
    /// work.
    pub fn fetch(&mut self, stream: &Arc<CudaStream>, from: &CudaView<'_, T>) -> Result<&[T], CudaError> {
        let doing = "copying results to the host";
        self.wait()?;
        let to = self.first(from.len())?;
        let (from, _read) = from.device_ptr(stream);
        // SAFETY: `from` is borrowed and has as many elements, and the copy is over before this returns.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) };
        stream.synchronize().doing(doing)?;
        copied.doing(doing)?;
        FETCHED.fetch_add(1, Ordering::Relaxed);
        Ok(to)
    }

    /// Copies to the device, behind what `stream` has to do until then. Waits only for an earlier copy from
    /// here.
    ///
    /// # Errors
    /// [`CudaError::Run`] for other lengths than that of `to`; [`CudaError::Driver`].
    pub fn send(
        &mut self,
        stream: &Arc<CudaStream>,
        values: &[T],
        to: &mut CudaViewMut<'_, T>,
    ) -> Result<(), CudaError>
    where
        T: Copy,
    {
        let doing = "copying values to the device";
        same_length("the target", to.len(), values.len())?;
        self.wait()?;
        let event = self.context.new_event(None).doing(doing)?;
        let from = self.first(values.len())?;
        from.copy_from_slice(values);
        let (to, _written) = to.device_ptr_mut(stream);
        // SAFETY: `to` has as many elements and its memory is freed behind this on `stream`; the host's
        // memory does not change before `sent`, which every other use waits for.
        unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) }.doing(doing)?;
        let recorded = event.record(stream);
        if recorded.is_err() {
            stream.synchronize().doing(doing)?;
        }
        recorded.doing(doing)?;
        self.sent = Some(event);
        SENT.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn first(&mut self, elements: usize) -> Result<&mut [T], CudaError> {
        if elements > self.elements {
            let name = "page-locked memory";
            return Err(crate::Error::Length { name, found: self.elements, expected: elements }.into());
        }
        // SAFETY: the memory has `elements` elements, is set, and is borrowed with `self`; no copy is under
        // way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), elements) })
    }
}

impl<T> Pinned<T> {
    /// Until the last copy to the device is over.
    fn wait(&mut self) -> Result<(), CudaError> {
        let Some(sent) = &self.sent else { return Ok(()) };
        sent.synchronize().doing("waiting for a copy to the device")?;
        self.sent = None;
        Ok(())
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // Where the driver fails, the memory is left to the end of the process.
        if self.wait().is_ok() && self.context.bind_to_thread().is_ok() {
            // SAFETY: the memory came from `malloc_host`, and no copy is under way.
            let _ = unsafe { result::free_host(self.base.as_ptr().cast::<c_void>()) };
        }
    }
}
