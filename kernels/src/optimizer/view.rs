//! A part of a stored stream in f32: where it lies if it is stored so, else in scratch memory.

use crate::format::{Format, Noise, UNIT_ELEMENTS, join, split};
use crate::simd::Path;

/// A part of one stream, or of the two of split masters.
#[derive(Default)]
pub(super) enum View<'a> {
    /// No such stream.
    #[default]
    None,
    Stored(&'a mut [f32]),
    Decoded {
        values: &'a mut [f32],
        bytes: &'a mut [u8],
        format: Format,
    },
    Split {
        values: &'a mut [f32],
        rounded: &'a mut [u16],
        remainder: &'a mut [u16],
    },
}

impl<'a> View<'a> {
    /// A view of a stream. `scratch` answers memory of as many elements; it is asked only if there is need.
    pub(super) fn new(
        format: Format,
        bytes: &'a mut [u8],
        elements: usize,
        scratch: impl FnOnce(usize) -> &'a mut [f32],
    ) -> Self {
        match format {
            Format::F32 => Self::Stored(bytemuck::cast_slice_mut(bytes)),
            _ => Self::Decoded { values: scratch(elements), bytes, format },
        }
    }

    /// A view of split masters.
    pub(super) fn split(rounded: &'a mut [u8], remainder: &'a mut [u8], values: &'a mut [f32]) -> Self {
        let (rounded, remainder) = (bytemuck::cast_slice_mut(rounded), bytemuck::cast_slice_mut(remainder));
        Self::Split { values, rounded, remainder }
    }

    /// The values, which are there once it was decoded.
    pub(super) fn values(&mut self) -> &mut [f32] {
        match self {
            Self::None => &mut [],
            Self::Stored(values) | Self::Decoded { values, .. } | Self::Split { values, .. } => values,
        }
    }

    /// Reads the stored values.
    pub(super) fn decode(&mut self, path: Path) {
        match self {
            Self::None | Self::Stored(_) => {}
            Self::Decoded { values, bytes, format } => format.decode(path, bytes, values),
            Self::Split { values, rounded, remainder } => join(path, rounded, remainder, values),
        }
    }

    /// Stores the values, which start with unit `unit` of their stream.
    pub(super) fn encode(&mut self, path: Path, unit: u64, noise: &Noise) {
        match self {
            Self::None | Self::Stored(_) => {}
            Self::Decoded { values, bytes, format } => format.encode(path, values, bytes, unit, noise),
            Self::Split { values, rounded, remainder } => split(path, values, rounded, remainder),
        }
    }

    /// Views of `elements` elements each, a multiple of a unit, and of what remains.
    pub(super) fn pieces(&mut self, elements: usize) -> Vec<View<'_>> {
        debug_assert!(elements.is_multiple_of(UNIT_ELEMENTS));
        match self {
            Self::None | Self::Stored(_) => vec![],
            Self::Decoded { values, bytes, format } => {
                let bytes = bytes.chunks_mut(format.bytes(elements));
                let pieces = values.chunks_mut(elements).zip(bytes);
                pieces.map(|(values, bytes)| View::Decoded { values, bytes, format: *format }).collect()
            }
            Self::Split { values, rounded, remainder } => {
                let halves = rounded.chunks_mut(elements).zip(remainder.chunks_mut(elements));
                let pieces = values.chunks_mut(elements).zip(halves);
                pieces
                    .map(|(values, (rounded, remainder))| View::Split { values, rounded, remainder })
                    .collect()
            }
        }
    }
}
