//! What the operations refuse.

use candle_core::{DType, DeviceLocation, Shape, Tensor};

/// Why an operation refused its inputs. It reaches the caller inside [`candle_core::Error`].
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The elements have a dtype that the device's code does not compute in.
    #[error(
        "{op}: dtype {dtype:?} does not fit the device or the other inputs: cast the tensor to {expected:?}"
    )]
    DType {
        /// The operation that refused.
        op: &'static str,
        /// The dtype that it was given.
        dtype: DType,
        /// The dtype that it needs.
        expected: DType,
    },
    /// A dimension is larger than kernels count.
    #[error("{op}: {elements} elements in one dimension are more than the device's code counts")]
    TooLarge {
        /// The operation that refused.
        op: &'static str,
        /// The size of the dimension.
        elements: usize,
    },
    /// A tensor lives on a device that the operation has no code for.
    #[error("{op}: no code for device {device:?}: move the tensor to the CPU or to a CUDA device")]
    Device {
        /// The operation that refused.
        op: &'static str,
        /// Where the tensor lives.
        device: DeviceLocation,
    },
    /// The shapes do not fit together.
    #[error("{op}: {expected}, got {shapes:?}")]
    Shapes {
        /// The operation that refused.
        op: &'static str,
        /// The rule that the shapes break.
        expected: &'static str,
        /// The shapes, in the order of the arguments.
        shapes: Vec<Shape>,
    },
    /// A target names no entry of the vocabulary.
    #[error(
        "{op}: target {target} at row {row} is out of range for a vocabulary of {vocabulary_size}: check the \
         tokenizer against the model's vocabulary size"
    )]
    TargetOutOfRange {
        /// The operation that refused.
        op: &'static str,
        /// The row of the first such target.
        row: usize,
        /// The target found there.
        target: u32,
        /// The number of entries.
        vocabulary_size: usize,
    },
    /// A token names no row of the table.
    #[error(
        "{op}: token {token} at position {position} is out of range for a vocabulary of {vocabulary_size}: \
         check the tokenizer against the model's vocabulary size"
    )]
    TokenOutOfRange {
        /// The operation that refused.
        op: &'static str,
        /// The position of the first such token, counting over all dimensions.
        position: usize,
        /// The token found there.
        token: u32,
        /// The number of rows.
        vocabulary_size: usize,
    },
    /// A window in which a position does not even see itself.
    #[error("{op}: a window of 0 positions sees nothing: give it at least 1, or none for no window")]
    EmptyWindow {
        /// The operation that refused.
        op: &'static str,
    },
    /// An input that the operation treats as a constant is tracked for gradients.
    #[error("{op}: {input} receives no gradient from this operation: detach it, or compose the operation")]
    TrackedConstant {
        /// The operation that refused.
        op: &'static str,
        /// The input's name.
        input: &'static str,
    },
}

impl OpError {
    /// Refuses the first tensor that has another dtype than `first`.
    pub(super) fn check_dtypes(op: &'static str, first: &Tensor, others: &[&Tensor]) -> Result<(), Self> {
        let expected = first.dtype();
        match others.iter().map(|tensor| tensor.dtype()).find(|&dtype| dtype != expected) {
            Some(dtype) => Err(Self::DType { op, dtype, expected }),
            None => Ok(()),
        }
    }

    /// Refuses a window in which nothing is seen.
    pub(super) fn check_window(op: &'static str, window: Option<usize>) -> Result<(), Self> {
        if window == Some(0) { Err(Self::EmptyWindow { op }) } else { Ok(()) }
    }

    /// Refuses the first token that names no row.
    pub(super) fn check_tokens(op: &'static str, tokens: &[u32], vocabulary_size: usize) -> Result<(), Self> {
        match tokens.iter().position(|&token| token as usize >= vocabulary_size) {
            Some(position) => {
                Err(Self::TokenOutOfRange { op, position, token: tokens[position], vocabulary_size })
            }
            None => Ok(()),
        }
    }

    /// Refuses the first target that names no entry.
    pub(super) fn check_targets(
        op: &'static str,
        targets: &[u32],
        vocabulary_size: usize,
    ) -> Result<(), Self> {
        match targets.iter().position(|&target| target as usize >= vocabulary_size) {
            Some(row) => Err(Self::TargetOutOfRange { op, row, target: targets[row], vocabulary_size }),
            None => Ok(()),
        }
    }
}

impl From<OpError> for candle_core::Error {
    fn from(error: OpError) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// The error for shapes that break the rule `expected`.
pub(super) fn shapes_error(
    op: &'static str,
    expected: &'static str,
    shapes: &[&Shape],
) -> candle_core::Error {
    let shapes = shapes.iter().map(|&shape| shape.clone()).collect();
    OpError::Shapes { op, expected, shapes }.into()
}
