//! Everything that runs on a CUDA device, beside its twin on the CPU. Where there is no device, the tests say
//! so and end.
#![cfg(feature = "cuda")]

#[path = "../ops/cases.rs"]
mod cases;
mod operations;
mod runs;
mod training;

use candle_core::Device;

/// The first CUDA device, or nothing where the machine has none. Any other failure is one of the test.
fn device() -> Option<Device> {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => Some(device),
        Err(error) if error.to_string().contains("CUDA_ERROR_NO_DEVICE") => {
            eprintln!("skipped: this machine has no CUDA device");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
