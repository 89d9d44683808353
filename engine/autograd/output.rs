//! What a segment's module computes, and the graph by which it came to it where that is kept.

use crate::device::tensor_storage::{self, TensorStorage};
use candle_core::{DType, Shape, Tensor, bail};
use ferrozero_kernels::ops;

/// Runs the user's part on given inputs.
pub type RunModule = dyn Fn(&[Tensor]) -> candle_core::Result<Tensor> + Send + Sync;

/// What a segment's module computed.
pub struct Output {
    /// The output.
    pub values: TensorStorage,
    /// Its shape.
    pub shape: Shape,
    /// How, if that is kept.
    pub graph: Option<Graph>,
}

/// How a segment's module came to its output, until its backward.
pub struct Graph {
    /// The inputs.
    pub leaves: Vec<Tensor>,
    /// The output.
    pub end: Tensor,
}

impl Output {
    /// Without a graph.
    pub fn alone(run: &RunModule, inputs: &[&Tensor]) -> candle_core::Result<Self> {
        let inputs: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
        let value = ops::without_graph(|| run(&inputs))?;
        // An output that is a view of an input must not take the input's storage with it.
        let shared = inputs.iter().any(|input| tensor_storage::share_storage(input, &value));
        Self::new(value, shared, None)
    }

    /// With its graph. The inputs are copied, because candle's graph must not go on beyond them and their
    /// storage is others'.
    pub fn with_graph(run: &RunModule, inputs: &[&Tensor]) -> candle_core::Result<Self> {
        let leaves = inputs.iter().map(|input| leaf_of(input)).collect::<candle_core::Result<Vec<_>>>()?;
        let (end, value) = ops::keep(|| run(&leaves))?;
        // A value that is in the graph too may be what its operation needs in the backward.
        let shared = value.id() == end.id();
        Self::new(value, shared, Some(Graph { leaves, end }))
    }

    /// Values alone.
    pub fn from_values(values: TensorStorage, shape: Shape) -> Self {
        Self { values, shape, graph: None }
    }

    fn new(value: Tensor, shared: bool, graph: Option<Graph>) -> candle_core::Result<Self> {
        if !matches!(value.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            bail!("a segment's output must be F32, BF16 or F16, not {:?}", value.dtype())
        }
        let shape = value.shape().clone();
        let values = if shared { tensor_storage::copy(&value)? } else { tensor_storage::into_run(value)? };
        Ok(Self { values, shape, graph })
    }
}

/// An input as a leaf of the segment's own graph: a copy that gets a gradient, if candle tracks it outside.
pub fn leaf_of(input: &Tensor) -> candle_core::Result<Tensor> {
    if input.track_op() && input.dtype().is_float() {
        Ok(tensor_storage::copy(input)?.into_tensor(input.shape(), true))
    } else {
        Ok(input.detach())
    }
}
