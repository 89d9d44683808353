//! The driver's pool of device memory: what it counts, and what it gives back.

use cudarc::driver::{CudaContext, sys};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// The pool that a device's memory is allocated from, and what the driver counts of it.
#[derive(Debug)]
pub struct Pool {
    handle: sys::CUmemoryPool,
    attribute: GetAttribute,
    set_attribute: GetAttribute,
    trim_to: TrimTo,
}

// SAFETY: the handle is the device's default pool, which lives as long as the driver, and which every thread
// may ask.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// `cuMemPoolGetAttribute`, and `cuMemPoolSetAttribute` too.
type GetAttribute =
    unsafe extern "C" fn(sys::CUmemoryPool, sys::CUmemPool_attribute, *mut c_void) -> sys::CUresult;
/// `cuMemPoolTrimTo`.
type TrimTo = unsafe extern "C" fn(sys::CUmemoryPool, usize) -> sys::CUresult;
/// `cuDeviceGetDefaultMemPool`.
type DefaultPool = unsafe extern "C" fn(*mut sys::CUmemoryPool, sys::CUdevice) -> sys::CUresult;

impl Pool {
    /// The device's pool. Looked up by name, so that a driver that counts nothing will do.
    pub(super) fn of(context: &Arc<CudaContext>) -> Option<Self> {
        let symbol = |name: &CStr| {
            // SAFETY: a look-up in what is loaded, of a name that ends with a zero byte.
            let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        let default_pool = symbol(c"cuDeviceGetDefaultMemPool")?;
        let (get, set) = (symbol(c"cuMemPoolGetAttribute")?, symbol(c"cuMemPoolSetAttribute")?);
        let trim_to = symbol(c"cuMemPoolTrimTo")?;
        // SAFETY: these are the driver's functions of these names, whose types are those of cuda.h.
        let (default_pool, attribute, set_attribute, trim_to) = unsafe {
            (
                std::mem::transmute::<*mut c_void, DefaultPool>(default_pool),
                std::mem::transmute::<*mut c_void, GetAttribute>(get),
                std::mem::transmute::<*mut c_void, GetAttribute>(set),
                std::mem::transmute::<*mut c_void, TrimTo>(trim_to),
            )
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written to, and the device is the context's.
        let result = unsafe { default_pool(&mut handle, context.cu_device()) };
        (result == sys::CUresult::CUDA_SUCCESS).then_some(Self { handle, attribute, set_attribute, trim_to })
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

    /// Gives the device what the pool keeps of it and nobody uses.
    pub(super) fn trim(&self) {
        // SAFETY: the handle is that of the device's pool. Where it fails the pool keeps what it has, and the
        // next allocation says so.
        let _ = unsafe { (self.trim_to)(self.handle, 0) };
    }

    /// Starts a new measurement of [`Self::peak_bytes`] from what is in use now.
    pub fn reset_peak(&self) {
        let mut zero = 0_u64;
        let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a number of 64 bits, and zero is the only value that it can be set to.
        // Where that fails the peak stays, which is on the safe side.
        let _ = unsafe { (self.set_attribute)(self.handle, high, (&raw mut zero).cast()) };
    }
}
