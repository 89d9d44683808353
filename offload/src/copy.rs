//! Moving bytes between host and device.

use std::sync::Mutex;

use crate::{Error, clock::Clock, locked};

/// How bytes cross between host memory and a device's memory, in full when the call returns.
pub trait DeviceCopy: Send + Sync {
    /// Host to device. Both have the same length.
    fn upload(&self, host: &[u8], device: &mut [u8]) -> Result<(), Error>;

    /// Device to host. Both have the same length.
    fn download(&self, device: &[u8], host: &mut [u8]) -> Result<(), Error>;
}

/// The CPU as a device: its memory is host memory, and a crossing is one copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuCopy;

impl DeviceCopy for CpuCopy {
    fn upload(&self, host: &[u8], device: &mut [u8]) -> Result<(), Error> {
        copy(host, device)
    }

    fn download(&self, device: &[u8], host: &mut [u8]) -> Result<(), Error> {
        copy(device, host)
    }
}

fn copy(source: &[u8], target: &mut [u8]) -> Result<(), Error> {
    if source.len() != target.len() {
        return Err(Error::CopyLength { from_bytes: source.len(), into_bytes: target.len() });
    }
    target.copy_from_slice(source);
    Ok(())
}

/// A slower bus: each direction takes at least the time that its bandwidth asks for.
#[derive(Debug)]
pub struct ThrottledCopy<C> {
    inner: C,
    upload: Mutex<Clock>,
    download: Mutex<Clock>,
}

impl<C: DeviceCopy> ThrottledCopy<C> {
    /// Slows `inner` down to these bandwidths, in bytes a second.
    pub fn new(inner: C, upload_bytes_per_s: f64, download_bytes_per_s: f64) -> Self {
        let clock = |bytes_per_s| Mutex::new(Clock::new(bytes_per_s));
        Self { inner, upload: clock(upload_bytes_per_s), download: clock(download_bytes_per_s) }
    }
}

impl<C: DeviceCopy> DeviceCopy for ThrottledCopy<C> {
    fn upload(&self, host: &[u8], device: &mut [u8]) -> Result<(), Error> {
        // The lock is held while waiting: a direction of a bus carries one copy at a time.
        let mut clock = locked(&self.upload);
        self.inner.upload(host, device)?;
        clock.wait_for(host.len());
        Ok(())
    }

    fn download(&self, device: &[u8], host: &mut [u8]) -> Result<(), Error> {
        let mut clock = locked(&self.download);
        self.inner.download(device, host)?;
        clock.wait_for(device.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_moves_all_bytes_and_refuses_unequal_ends() {
        let copies: [Box<dyn DeviceCopy>; 2] =
            [Box::new(CpuCopy), Box::new(ThrottledCopy::new(CpuCopy, 1e12, 1e12))];
        for copy in copies {
            let (host, mut device, mut back) = ([1_u8, 2, 3], [0_u8; 3], [0_u8; 3]);
            copy.upload(&host, &mut device).unwrap();
            copy.download(&device, &mut back).unwrap();
            assert_eq!(host, back);
            let refused = copy.upload(&host, &mut [0; 2]).unwrap_err();
            assert!(matches!(refused, Error::CopyLength { from_bytes: 3, into_bytes: 2 }));
        }
    }
}
