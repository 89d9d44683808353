//! Reads and writes of memory by the lanes of a warp.

use half::{bf16, f16};

use super::Machine;
use super::registers::{LANES, Row, lanes};
use super::warp::Warp;
use crate::fault::{Fault, Result};
use crate::memory::Place;
use crate::program::low_bits;
use crate::program::{Access, Mask, Step};
use crate::ptx::types::{Combine, Space, Type};

/// Where the lanes of a warp access memory, if all do within one stretch of it.
pub struct Offsets {
    region: Region,
    /// The address of each lane; those that do not take part have that of one that does.
    addresses: Row,
    /// The address of the region's first byte.
    start: u64,
    /// Whether all lanes have the same address.
    is_same: bool,
}

impl Default for Offsets {
    fn default() -> Self {
        Self { region: Region::Parameters, addresses: [0; LANES], start: 0, is_same: false }
    }
}

impl Offsets {
    /// The first byte of a lane within the region.
    #[inline(always)]
    fn of(&self, lane: usize) -> usize {
        (self.addresses[lane] - self.start) as usize
    }
}

#[derive(Clone, Copy)]
enum Region {
    Global(Place),
    Shared,
    Local,
    Parameters,
}

/// Reads a number of `N` bytes for each active lane.
#[inline(always)]
fn gather<const N: usize>(bytes: &[u8], offsets: &Offsets, skip: usize, active: Mask, row: &mut Row) {
    let read = |lane: usize| {
        let start = offsets.of(lane) + skip;
        let mut value = [0; 8];
        value[..N].copy_from_slice(&bytes[start..start + N]);
        u64::from_le_bytes(value)
    };
    if active != Mask::MAX {
        lanes(active).for_each(|lane| row[lane] = read(lane));
    } else if offsets.is_same {
        row.fill(read(0));
    } else {
        (0..LANES).for_each(|lane| row[lane] = read(lane));
    }
}

/// Writes a number of `N` bytes for each active lane, one lane after another.
#[inline(always)]
fn scatter<const N: usize>(bytes: &mut [u8], offsets: &Offsets, skip: usize, active: Mask, row: &Row) {
    let mut write = |lane: usize| {
        let start = offsets.of(lane) + skip;
        bytes[start..start + N].copy_from_slice(&row[lane].to_le_bytes()[..N]);
    };
    if active == Mask::MAX {
        (0..LANES).for_each(&mut write);
    } else {
        lanes(active).for_each(&mut write);
    }
}

/// A number of this type with its sign in all higher bits.
fn extended(value: u64, kind: Type) -> u64 {
    match kind {
        Type::S8 => i64::from(value as i8) as u64,
        Type::S16 => i64::from(value as i16) as u64,
        Type::S32 => i64::from(value as i32) as u64,
        _ => value,
    }
}

impl Machine<'_> {
    /// Checks the addresses of the active lanes and sets `Machine::offsets`. Whether all are in one allocation; if not,
    /// each lane is on its own.
    fn locate(
        &mut self,
        warp: &Warp,
        step: &Step,
        access: Access,
        active: Mask,
        is_write: bool,
    ) -> Result<bool> {
        let row = &warp.registers.rows[step.sources[0] as usize];
        let bytes = access.bytes * access.elements;
        let first = row[active.trailing_zeros() as usize].wrapping_add(access.offset);
        let (mut least, mut most, mut bits) = (u64::MAX, 0, 0);
        for (lane, place) in self.offsets.addresses.iter_mut().enumerate() {
            let is_active = (active >> lane) & 1 == 1;
            let address = if is_active { row[lane].wrapping_add(access.offset) } else { first };
            *place = address;
            least = least.min(address);
            most = most.max(address);
            bits |= address;
        }
        let what = if is_write { "write" } else { "read" };
        if bits & (bytes as u64 - 1) != 0 && matches!(access.space, Space::Global | Space::Shared) {
            return Err(Fault::address(format!(
                "{what} of {bytes} bytes at {least:#x} to {most:#x}: not a multiple of its size"
            )));
        }
        self.offsets.is_same = least == most && access.space != Space::Local;
        self.offsets.start = 0;
        let (region, size) = match access.space {
            Space::Global => {
                let length = (most - least).checked_add(bytes as u64).and_then(|n| usize::try_from(n).ok());
                let place = length.map(|length| self.memory.place(least, length, what));
                let Some(Ok(place)) = place else { return Ok(false) };
                self.accesses.note(place, is_write);
                self.offsets.start = least;
                self.offsets.region = Region::Global(place);
                return Ok(true);
            }
            Space::Shared => (Region::Shared, self.shared.len()),
            Space::Parameter => (Region::Parameters, self.launch.parameters.len()),
            Space::Local => (Region::Local, self.launch.program.local_bytes),
        };
        if most.checked_add(bytes as u64).is_none_or(|end| end > size as u64) {
            let space = access.space;
            return Err(Fault::address(format!(
                "illegal {what} of {bytes} bytes at {most:#x} of {size} bytes of {space:?} memory"
            )));
        }
        self.offsets.region = region;
        if access.space == Space::Local {
            for (lane, address) in self.offsets.addresses.iter_mut().enumerate() {
                *address += (lane * size) as u64;
            }
        }
        Ok(true)
    }

    /// Reads memory into the step's results.
    pub fn load(&mut self, warp: &mut Warp, step: &Step, access: Access, active: Mask) -> Result<()> {
        if !self.locate(warp, step, access, active, false)? {
            return self.load_one_by_one(warp, step, access, active);
        }
        let offsets = &self.offsets;
        let bytes = match offsets.region {
            Region::Global(place) => self.memory.bytes(place),
            Region::Shared => &self.shared,
            Region::Local => &warp.local,
            Region::Parameters => self.launch.parameters,
        };
        for element in 0..access.elements {
            let row = &mut warp.registers.rows[step.results[element] as usize];
            let skip = element * access.bytes;
            match access.bytes {
                1 => gather::<1>(bytes, offsets, skip, active, row),
                2 => gather::<2>(bytes, offsets, skip, active, row),
                4 => gather::<4>(bytes, offsets, skip, active, row),
                _ => gather::<8>(bytes, offsets, skip, active, row),
            }
            if access.kind.is_signed() {
                lanes(active).for_each(|lane| row[lane] = extended(row[lane], access.kind));
            }
        }
        Ok(())
    }

    /// Writes the step's operands to memory.
    pub fn store(&mut self, warp: &mut Warp, step: &Step, access: Access, active: Mask) -> Result<()> {
        if !self.locate(warp, step, access, active, true)? {
            return self.store_one_by_one(warp, step, access, active);
        }
        let offsets = &self.offsets;
        let bytes = match offsets.region {
            Region::Global(place) => self.memory.bytes_mut(place),
            Region::Shared => &mut self.shared,
            Region::Local => &mut warp.local,
            Region::Parameters => return Err(Fault::address("parameters cannot be written")),
        };
        for element in 0..access.elements {
            let row = &warp.registers.rows[step.sources[1 + element] as usize];
            let skip = element * access.bytes;
            match access.bytes {
                1 => scatter::<1>(bytes, offsets, skip, active, row),
                2 => scatter::<2>(bytes, offsets, skip, active, row),
                4 => scatter::<4>(bytes, offsets, skip, active, row),
                _ => scatter::<8>(bytes, offsets, skip, active, row),
            }
        }
        Ok(())
    }

    fn load_one_by_one(&mut self, warp: &mut Warp, step: &Step, access: Access, active: Mask) -> Result<()> {
        for lane in lanes(active) {
            let address = warp.registers.rows[step.sources[0] as usize][lane].wrapping_add(access.offset);
            for element in 0..access.elements {
                let address = address.wrapping_add((element * access.bytes) as u64);
                let value = self.read(warp, lane, access.space, address, access.bytes)?;
                warp.registers.rows[step.results[element] as usize][lane] = extended(value, access.kind);
            }
        }
        Ok(())
    }

    fn store_one_by_one(&mut self, warp: &mut Warp, step: &Step, access: Access, active: Mask) -> Result<()> {
        for lane in lanes(active) {
            let address = warp.registers.rows[step.sources[0] as usize][lane].wrapping_add(access.offset);
            for element in 0..access.elements {
                let address = address.wrapping_add((element * access.bytes) as u64);
                let value = warp.registers.rows[step.sources[1 + element] as usize][lane];
                self.write(access.space, address, access.bytes, value)?;
            }
        }
        Ok(())
    }

    /// Reads a number for one lane.
    pub fn read(
        &mut self,
        warp: &Warp,
        lane: usize,
        space: Space,
        address: u64,
        length: usize,
    ) -> Result<u64> {
        let bytes = match space {
            Space::Global => self.memory.read(address, length, self.accesses)?,
            Space::Shared => within(&self.shared, address, length)?,
            Space::Parameter => within(self.launch.parameters, address, length)?,
            Space::Local => {
                let own = self.launch.program.local_bytes;
                within(&warp.local[lane * own..(lane + 1) * own], address, length)?
            }
        };
        let mut value = [0; 8];
        value[..length].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(value))
    }

    /// Writes a number to memory that lanes share.
    fn write(&mut self, space: Space, address: u64, length: usize, value: u64) -> Result<()> {
        let bytes = match space {
            Space::Global => self.memory.write(address, length, self.accesses)?,
            Space::Shared => {
                within(&self.shared, address, length)?;
                &mut self.shared[address as usize..address as usize + length]
            }
            Space::Local | Space::Parameter => {
                return Err(Fault::address("an atomic instruction needs global or shared memory"));
            }
        };
        bytes.copy_from_slice(&value.to_le_bytes()[..length]);
        Ok(())
    }

    /// Reads memory, combines it with the second operand and writes it, one lane after another.
    pub fn atomic(
        &mut self,
        warp: &mut Warp,
        step: &Step,
        access: Access,
        combine: Combine,
        active: Mask,
    ) -> Result<()> {
        for lane in lanes(active) {
            let operand = |n: usize| warp.registers.rows[step.sources[n] as usize][lane];
            let address = operand(0).wrapping_add(access.offset);
            let old = self.read(warp, lane, access.space, address, access.bytes)?;
            let new = combined(combine, access.kind, old, operand(1), operand(2));
            let new = new.ok_or_else(|| {
                let kind = access.kind;
                Self::stuck(format!("the interpreter does not know the atomic {combine:?} of {kind:?}"))
            })?;
            self.write(access.space, address, access.bytes, new)?;
            warp.registers.rows[step.results[0] as usize][lane] = old;
        }
        Ok(())
    }
}

/// Bytes of a memory that exist.
fn within(bytes: &[u8], address: u64, length: usize) -> Result<&[u8]> {
    let end = address.checked_add(length as u64).and_then(|end| usize::try_from(end).ok());
    end.and_then(|end| bytes.get(end - length..end)).ok_or_else(|| {
        let size = bytes.len();
        Fault::address(format!("illegal access to {length} bytes at {address:#x} of {size} bytes"))
    })
}

/// What an atomic instruction leaves in memory. None where it does not exist.
fn combined(combine: Combine, kind: Type, old: u64, operand: u64, other: u64) -> Option<u64> {
    let keep = low_bits(kind);
    let (a, b) = (old & keep, operand & keep);
    let signed = |value: u64| extended(value, kind) as i64;
    Some(match (combine, kind) {
        (Combine::Cas, _) => {
            if a == b {
                other
            } else {
                old
            }
        }
        (Combine::Exch, _) => operand,
        (Combine::Add, Type::F32) => {
            let sum = f32::from_bits(old as u32) + f32::from_bits(operand as u32);
            u64::from(sum.to_bits())
        }
        (Combine::Add, Type::F64) => (f64::from_bits(old) + f64::from_bits(operand)).to_bits(),
        (Combine::Add, Type::F16) => {
            u64::from((f16::from_bits(old as u16) + f16::from_bits(operand as u16)).to_bits())
        }
        (Combine::Add, Type::BF16) => {
            u64::from((bf16::from_bits(old as u16) + bf16::from_bits(operand as u16)).to_bits())
        }
        (_, kind) if kind.is_float() || matches!(kind, Type::F16x2 | Type::BF16x2) => return None,
        (Combine::Add, _) => a.wrapping_add(b) & keep,
        (Combine::And, _) => a & b,
        (Combine::Or, _) => a | b,
        (Combine::Xor, _) => a ^ b,
        (Combine::Max, kind) if kind.is_signed() => signed(a).max(signed(b)) as u64,
        (Combine::Min, kind) if kind.is_signed() => signed(a).min(signed(b)) as u64,
        (Combine::Max, _) => a.max(b),
        (Combine::Min, _) => a.min(b),
    })
}
