//! Device memory.
//!
//! Each allocation has a range of addresses of its own, which no address of the host is in and which is never
//! used again: so an access out of bounds, after the end of an allocation's life, or with a host's pointer is
//! found at once.

use crate::fault::{Fault, Result};
use crate::races::History;

/// The bit that every device address has, and no address of the host.
const DEVICE: u64 = 1 << 62;
/// Bits of an address within its allocation.
const OFFSET_BITS: u32 = 36;

/// What fresh memory is filled with: NaN in every floating-point type.
pub const FRESH: u8 = 0xff;

struct Allocation {
    bytes: Vec<u8>,
    /// Size of the allocation, also after its end.
    length: usize,
    is_freed: bool,
    history: History,
}

/// The memory of the device.
#[derive(Default)]
pub struct Memory {
    allocations: Vec<Allocation>,
    live_bytes: usize,
}

/// What an operation read and wrote of an allocation: from the first byte to the last.
#[derive(Clone, Copy, Debug)]
pub struct Touched {
    /// Number of the allocation.
    pub allocation: usize,
    /// First and end of the bytes that were read; empty where none was.
    pub read: (usize, usize),
    /// First and end of the bytes that were written; empty where none was.
    pub written: (usize, usize),
}

/// What an operation read and wrote.
#[derive(Default)]
pub struct Accesses {
    touched: Vec<Touched>,
    /// Where the allocation is that was touched last.
    last: usize,
}

impl Accesses {
    /// Adds an access.
    pub fn note(&mut self, place: Place, is_write: bool) {
        let is_last = self.touched.get(self.last).is_some_and(|found| found.allocation == place.allocation);
        if !is_last {
            let found = self.touched.iter().position(|found| found.allocation == place.allocation);
            self.last = found.unwrap_or_else(|| {
                let none = (usize::MAX, 0);
                self.touched.push(Touched { allocation: place.allocation, read: none, written: none });
                self.touched.len() - 1
            });
        }
        let touched = &mut self.touched[self.last];
        let range = if is_write { &mut touched.written } else { &mut touched.read };
        range.0 = range.0.min(place.start);
        range.1 = range.1.max(place.start + place.length);
    }

    /// Each allocation that was touched.
    pub fn touched(&self) -> &[Touched] {
        &self.touched
    }
}

/// Bytes of an allocation that exist.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Number of the allocation.
    pub allocation: usize,
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub length: usize,
}

impl Memory {
    /// The address of a new allocation, filled with a byte.
    pub fn allocate(&mut self, length: usize, fill: u8) -> u64 {
        let number = self.allocations.len() as u64;
        let bytes = vec![fill; length];
        self.allocations.push(Allocation { bytes, length, is_freed: false, history: History::default() });
        self.live_bytes += length;
        DEVICE | (number << OFFSET_BITS)
    }

    /// Bytes that are allocated.
    pub fn live_bytes(&self) -> usize {
        self.live_bytes
    }

    /// Checks that bytes at an address exist.
    pub fn place(&self, address: u64, length: usize, what: &str) -> Result<Place> {
        let fault = |reason: String| {
            Err(Fault::address(format!("illegal {what} of {length} bytes at {address:#x}: {reason}")))
        };
        if address >> 62 != 1 {
            return fault("this is no address of the device".to_owned());
        }
        let number = ((address & !DEVICE) >> OFFSET_BITS) as usize;
        let start = (address & ((1 << OFFSET_BITS) - 1)) as usize;
        match self.allocations.get(number) {
            None => fault("nothing was ever allocated there".to_owned()),
            Some(found) if found.is_freed => {
                fault(format!("allocation {number} of {} bytes was freed", found.length))
            }
            Some(found) if start + length > found.length => {
                fault(format!("it is {start} bytes into allocation {number} of {} bytes", found.length))
            }
            Some(_) => Ok(Place { allocation: number, start, length }),
        }
    }

    /// The whole allocation that begins at an address.
    pub fn whole(&self, address: u64, what: &str) -> Result<Place> {
        let place = self.place(address, 0, what)?;
        if place.start != 0 {
            return Err(Fault::address(format!(
                "illegal {what} at {address:#x}: no allocation begins there"
            )));
        }
        Ok(Place { length: self.allocations[place.allocation].length, ..place })
    }

    /// Bytes that [`Memory::place`] has found.
    pub fn bytes(&self, place: Place) -> &[u8] {
        &self.allocations[place.allocation].bytes[place.start..place.start + place.length]
    }

    /// Bytes that [`Memory::place`] has found, to be changed.
    pub fn bytes_mut(&mut self, place: Place) -> &mut [u8] {
        &mut self.allocations[place.allocation].bytes[place.start..place.start + place.length]
    }

    /// Reads bytes; none are nowhere.
    pub fn read(&self, address: u64, length: usize, accesses: &mut Accesses) -> Result<&[u8]> {
        if length == 0 {
            return Ok(&[]);
        }
        let place = self.place(address, length, "read")?;
        accesses.note(place, false);
        Ok(self.bytes(place))
    }

    /// Gives bytes to write to; none are nowhere.
    pub fn write(&mut self, address: u64, length: usize, accesses: &mut Accesses) -> Result<&mut [u8]> {
        if length == 0 {
            return Ok(&mut []);
        }
        let place = self.place(address, length, "write")?;
        accesses.note(place, true);
        Ok(self.bytes_mut(place))
    }

    /// Ends an allocation.
    pub fn free(&mut self, address: u64) -> Result<()> {
        let place = self.whole(address, "free")?;
        let allocation = &mut self.allocations[place.allocation];
        allocation.is_freed = true;
        allocation.bytes = vec![];
        allocation.history = History::default();
        self.live_bytes -= allocation.length;
        Ok(())
    }

    /// What was done to an allocation, in which order.
    pub fn history(&mut self, allocation: usize) -> &mut History {
        &mut self.allocations[allocation].history
    }

    /// The text at an address, up to its zero byte.
    pub fn text(&self, address: u64) -> String {
        let Ok(place) = self.place(address, 1, "read") else { return String::new() };
        let bytes = &self.allocations[place.allocation].bytes[place.start..];
        let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_nothing_is_at_are_refused() {
        let mut memory = Memory::default();
        let address = memory.allocate(16, FRESH);
        assert!(memory.place(address, 16, "read").is_ok());
        let host = &raw const memory as u64;
        for (address, length) in [(address, 17), (address + 16, 1), (host, 1), (address + (1 << 36), 1)] {
            assert!(memory.place(address, length, "read").is_err(), "{address:#x}");
        }
        assert!(memory.free(address + 4).is_err());
        memory.free(address).unwrap();
        assert!(memory.place(address, 1, "read").is_err());
        assert!(memory.free(address).is_err());
        assert_eq!(memory.live_bytes(), 0);
    }

    #[test]
    fn fresh_memory_is_not_a_number() {
        assert!(f32::from_ne_bytes([FRESH; 4]).is_nan());
        assert!(f64::from_ne_bytes([FRESH; 8]).is_nan());
        assert!(
            half::f16::from_ne_bytes([FRESH; 2]).is_nan() && half::bf16::from_ne_bytes([FRESH; 2]).is_nan()
        );
    }
}
