//! CUDA's C interface with Rust's types, on a device of the test's own.

use std::ffi::CString;

use simcuda::api::cublas::{
    cublasCreate_v2, cublasDestroy_v2, cublasGemmStridedBatchedEx, cublasSetStream_v2,
};
use simcuda::api::memory::{
    cuMemAllocAsync, cuMemFreeAsync, cuMemFreeHost, cuMemHostAlloc, cuMemcpyDtoHAsync_v2,
    cuMemcpyHtoDAsync_v2, cuMemsetD8Async,
};
use simcuda::api::modules::{cuLaunchKernel, cuModuleGetFunction, cuModuleLoadData};
use simcuda::api::streams::{
    cuEventCreate, cuEventRecord, cuStreamCreate, cuStreamSynchronize, cuStreamWaitEvent,
};
use simcuda::{Configuration, Driver};

const KERNELS: &str = include_str!("kernels.ptx");
pub const FLOAT_BYTES: usize = size_of::<f32>();

/// A call answered this code.
pub type Result<T> = std::result::Result<T, i32>;

fn ok(code: i32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(code) }
}

/// Page-locked memory of the host.
pub struct Pinned {
    address: usize,
    floats: usize,
}

impl Pinned {
    pub fn set(&mut self, value: f32) {
        for index in 0..self.floats {
            // SAFETY: `Device::pinned` allocated so many, and one thread at a time uses the device.
            unsafe { (self.address as *mut f32).add(index).write(value) };
        }
    }

    pub fn get(&self) -> Vec<f32> {
        // SAFETY: the same. `Device::pinned` has filled them.
        (0..self.floats).map(|index| unsafe { (self.address as *const f32).add(index).read() }).collect()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it is from `cuMemHostAlloc`, and nobody has it after this.
        unsafe { cuMemFreeHost(self.address) };
    }
}

/// A device. Its functions are for the thread that [`on_device`] gives it to.
pub struct Device {
    module: usize,
}

/// Runs a program on a new device; answers its result, and what the driver found.
pub fn on_device<T>(
    configuration: Configuration,
    program: impl FnOnce(&Device) -> Result<T>,
) -> (Result<T>, Vec<String>) {
    let driver = Driver::new(configuration);
    let result = driver.within(|| {
        let text = CString::new(KERNELS).unwrap();
        let mut module = 0;
        // SAFETY: both live through the call.
        ok(unsafe { cuModuleLoadData(&mut module, text.as_ptr()) })?;
        program(&Device { module })
    });
    (result, driver.reports())
}

impl Device {
    pub fn stream(&self) -> Result<usize> {
        let mut stream = 0;
        // SAFETY: the pointer lives through the call.
        ok(unsafe { cuStreamCreate(&mut stream, 0) })?;
        Ok(stream)
    }

    pub fn allocate(&self, floats: usize, stream: usize) -> Result<u64> {
        let mut address = 0;
        // SAFETY: the pointer lives through the call.
        ok(unsafe { cuMemAllocAsync(&mut address, floats * FLOAT_BYTES, stream) })?;
        Ok(address)
    }

    pub fn free(&self, address: u64, stream: usize) -> Result<()> {
        // SAFETY: no pointer of the host is involved.
        ok(unsafe { cuMemFreeAsync(address, stream) })
    }

    pub fn zero(&self, address: u64, floats: usize, stream: usize) -> Result<()> {
        // SAFETY: no pointer of the host is involved.
        ok(unsafe { cuMemsetD8Async(address, 0, floats * FLOAT_BYTES, stream) })
    }

    pub fn pinned(&self, floats: usize) -> Result<Pinned> {
        let mut address = 0;
        // SAFETY: the pointer lives through the call.
        ok(unsafe { cuMemHostAlloc(&mut address, floats * FLOAT_BYTES, 0) })?;
        Ok(Pinned { address, floats })
    }

    pub fn upload(&self, to: u64, from: &Pinned, stream: usize) -> Result<()> {
        // SAFETY: the memory is page-locked and lives until all work is done: see `Pinned::drop`.
        ok(unsafe { cuMemcpyHtoDAsync_v2(to, from.address, from.floats * FLOAT_BYTES, stream) })
    }

    pub fn download(&self, to: &mut Pinned, from: u64, stream: usize) -> Result<()> {
        // SAFETY: the memory is page-locked and lives until all work is done: see `Pinned::drop`.
        ok(unsafe { cuMemcpyDtoHAsync_v2(to.address, from, to.floats * FLOAT_BYTES, stream) })
    }

    pub fn wait(&self, stream: usize) -> Result<()> {
        // SAFETY: no pointer of the host is involved.
        ok(unsafe { cuStreamSynchronize(stream) })
    }

    /// An event of what a stream has been given so far.
    pub fn record(&self, stream: usize) -> Result<usize> {
        let mut event = 0;
        // SAFETY: the pointer lives through the call.
        ok(unsafe { cuEventCreate(&mut event, 0) })?;
        // SAFETY: no pointer of the host is involved.
        ok(unsafe { cuEventRecord(event, stream) })?;
        Ok(event)
    }

    pub fn wait_for(&self, event: usize, stream: usize) -> Result<()> {
        // SAFETY: no pointer of the host is involved.
        ok(unsafe { cuStreamWaitEvent(stream, event, 0) })
    }

    /// What one stream is given from here on comes after what the other has been given so far.
    pub fn join(&self, later: usize, earlier: usize) -> Result<()> {
        self.wait_for(self.record(earlier)?, later)
    }

    fn launch(
        &self,
        name: &str,
        grid: u32,
        block: u32,
        arguments: &[*const u8],
        stream: usize,
    ) -> Result<()> {
        let name = CString::new(name).unwrap();
        let mut function = 0;
        // SAFETY: both pointers live through the call.
        ok(unsafe { cuModuleGetFunction(&mut function, self.module, name.as_ptr()) })?;
        // SAFETY: callers give a pointer for each parameter of the kernel.
        ok(unsafe { cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, arguments.as_ptr(), 0) })
    }

    /// `to[i] = from[i] + 1`.
    pub fn add_one(&self, to: u64, from: u64, count: u32, stream: usize) -> Result<()> {
        let arguments = [(&raw const to).cast(), (&raw const from).cast(), (&raw const count).cast()];
        self.launch("add_one", count.div_ceil(64), 64, &arguments, stream)
    }

    /// A kernel whose only parameter is where its results go.
    pub fn fill(&self, name: &str, to: u64, grid: u32, block: u32, stream: usize) -> Result<()> {
        self.launch(name, grid, block, &[(&raw const to).cast()], stream)
    }

    /// `c = a * b`, square and column by column.
    pub fn multiply(&self, c: u64, a: u64, b: u64, size: i32, stream: usize) -> Result<()> {
        let mut handle = std::ptr::null_mut();
        let (one, zero) = (1f32, 0f32);
        let (one, zero) = ((&raw const one).cast(), (&raw const zero).cast());
        // SAFETY: all pointers live through the calls, and the handle is destroyed once.
        unsafe {
            ok(cublasCreate_v2(&mut handle))?;
            ok(cublasSetStream_v2(handle, stream))?;
            let multiplied = cublasGemmStridedBatchedEx(
                handle, 0, 0, size, size, size, one, a, 0, size, 0, b, 0, size, 0, zero, c, 0, size, 0, 1,
                68, 0,
            );
            ok(cublasDestroy_v2(handle))?;
            ok(multiplied)
        }
    }
}
