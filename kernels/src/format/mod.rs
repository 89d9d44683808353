//! The formats that a training state is stored in: f32, bf16 with stochastic rounding, 8-bit blocks, and an
//! f32 split in two halves.
//!
//! A stream of a state is a run of bytes. Its elements are stored in units of [`UNIT_ELEMENTS`], so the bytes
//! from element `e` to element `f` of a run, both multiples of that, are those from `bytes(e)` to `bytes(f)`,
//! however the run is cut into pieces. Each tensor starts a unit of its own. A stream that is all zero bytes
//! holds zeros, in every format.

mod eight_bit;
mod split;
mod stochastic;

pub use stochastic::Noise;

use crate::convert::widen_chunk;
use crate::simd::Path;
use half::bf16;

/// Elements of a unit of storage. It is the block that gradient norms are summed over,
/// [`crate::gradient::BLOCK_ELEMENTS`].
pub const UNIT_ELEMENTS: usize = crate::gradient::BLOCK_ELEMENTS;

/// Elements that share a scale in the 8-bit formats.
pub const EIGHT_BIT_BLOCK_ELEMENTS: usize = 256;

/// How a stream is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Four bytes an element, exact.
    F32,
    /// Two bytes an element, rounded up or down at random so that the mean is exact. The random bits are
    /// [`Noise`].
    Bf16,
    /// The upper half of a split f32: the value rounded to bf16, ties away from zero. Computing reads this
    /// half alone.
    Rounded,
    /// The lower half of a split f32: its bits less those of the upper half, as a signed number of 16 bits.
    Remainder,
    /// One byte an element and a scale for each 256: the signed dynamic code of bitsandbytes.
    Signed8,
    /// The same for values that are not negative, with its unsigned dynamic code.
    Unsigned8,
}

impl Format {
    /// Bytes of a run of `elements` elements that starts a unit.
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => 4 * elements,
            Self::Bf16 | Self::Rounded | Self::Remainder => 2 * elements,
            Self::Signed8 | Self::Unsigned8 => elements.div_ceil(UNIT_ELEMENTS) * eight_bit::UNIT_BYTES,
        }
    }

    /// The name in plans, manifests and options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Rounded => "bf16 half",
            Self::Remainder => "16-bit rest",
            Self::Signed8 | Self::Unsigned8 => "8-bit",
        }
    }

    /// Address that a run must be a multiple of, in bytes.
    pub(crate) const fn alignment(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::Rounded | Self::Remainder => 2,
            Self::Signed8 | Self::Unsigned8 => 1,
        }
    }

    /// The values of a run. The lengths fit and `bytes` is aligned. Halves of a split f32 are read by
    /// [`join`].
    pub(crate) fn decode(self, path: Path, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::F32 => values.copy_from_slice(bytemuck::cast_slice(bytes)),
            Self::Bf16 | Self::Rounded | Self::Remainder => {
                let stored: &[u16] = bytemuck::cast_slice(bytes);
                widen_chunk(path, half::slice::HalfBitsSliceExt::reinterpret_cast::<bf16>(stored), values);
            }
            Self::Signed8 => eight_bit::decode_run(path, eight_bit::signed(), bytes, values),
            Self::Unsigned8 => eight_bit::decode_run(path, eight_bit::unsigned(), bytes, values),
        }
    }

    /// Stores a run that starts with unit `unit` of its stream. The lengths fit and `bytes` is aligned.
    pub(crate) fn encode(self, path: Path, values: &[f32], bytes: &mut [u8], unit: u64, noise: &Noise) {
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 | Self::Rounded | Self::Remainder => {
                stochastic::encode_run(path, values, bytemuck::cast_slice_mut(bytes), unit, noise);
            }
            Self::Signed8 => eight_bit::encode_run(path, eight_bit::signed(), values, bytes),
            Self::Unsigned8 => eight_bit::encode_run(path, eight_bit::unsigned(), values, bytes),
        }
    }
}

pub(crate) use split::{join, split};
