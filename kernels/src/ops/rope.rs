//! Rotary position embedding.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda::rope::Rotation;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input};
use super::output::{cpu_tensor, in_chunks};
use super::vector::{chunk_elements, vectorized};

/// Rotates the pairs (element `i`, element `i + D/2`) of each head by an angle of its position (Su et al.,
/// arXiv 2104.09864, in the layout of Llama checkpoints).
///
/// `xs` `[B, H, T, D]`; `cos` and `sin` `[T', D/2]` or `[B, T', D/2]` with `T' ≥ T`, constants whose first
/// `T` rows are used; result like `xs`. Arguments as [`candle_nn::rotary_emb::rope`]. The backward rotates by
/// the opposite angle.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or more than
/// one; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above;
/// [`OpError::TrackedConstant`](super::OpError::TrackedConstant) if `cos` or `sin` is tracked for gradients.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotate_checked(xs, cos, sin, Rope { name: "rope", interleaved: false, by_position: false })
}

/// [`rope`] on the pairs (element `2·i`, element `2·i + 1`), as [`candle_nn::rotary_emb::rope_i`].
///
/// # Errors
/// As [`rope`].
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rotate_checked(xs, cos, sin, Rope { name: "rope_i", interleaved: true, by_position: false })
}

/// [`rope`] on heads that lie side by side at each position: `xs` `[B, T, heads·D]`, as a projection gives
/// them.
///
/// # Errors
/// As [`rope`].
pub fn rope_by_position(xs: &Tensor, cos: &Tensor, sin: &Tensor, heads: usize) -> Result<Tensor> {
    let op = Rope { name: "rope_by_position", interleaved: false, by_position: true };
    let &[batch, positions, width] = xs.dims() else {
        return Err(shapes_error(op.name, BY_POSITION, &[xs.shape(), cos.shape(), sin.shape()]));
    };
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(shapes_error(op.name, BY_POSITION, &[xs.shape(), cos.shape(), sin.shape()]));
    }
    let split = xs.reshape((batch, positions, heads, width / heads))?;
    let rotated = match xs.device().is_cuda() {
        true => rope(&split.transpose(1, 2)?, cos, sin)?.transpose(1, 2)?,
        false => rotate_checked(&split, cos, sin, op)?,
    };
    rotated.reshape((batch, positions, width))
}

fn rotate_checked(xs: &Tensor, cos: &Tensor, sin: &Tensor, op: Rope) -> Result<Tensor> {
    for (table, input) in [(cos, "cos"), (sin, "sin")] {
        if table.track_op() {
            return Err(OpError::TrackedConstant { op: op.name, input }.into());
        }
    }
    if op.sizes(xs.shape(), cos.shape()).is_none() || cos.shape() != sin.shape() {
        return Err(shapes_error(op.name, SHAPES, &[xs.shape(), cos.shape(), sin.shape()]));
    }
    xs.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, op)
}

const SHAPES: &str = "expected [B, H, T, D] with D even, and cos and sin [T' ≥ T, D/2] or [B, T' ≥ T, D/2]";

const BY_POSITION: &str =
    "expected [B, T, heads·D] with D even, and cos and sin [T' ≥ T, D/2] or [B, T' ≥ T, D/2]";

struct Rope {
    name: &'static str,
    interleaved: bool,
    /// Whether `xs` is `[B, T, H, D]` and not `[B, H, T, D]`.
    by_position: bool,
}

/// How the rows of `xs` find their row of `cos` and `sin`.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) heads: usize,
    pub(super) positions: usize,
    pub(super) head_width: usize,
    /// Rows of a table between one sequence and the next: 0 if all share one.
    pub(super) table_rows: usize,
    /// Rows that follow each other at one position: 1 where positions follow each other within a head.
    rows_a_position: usize,
}

impl Sizes {
    fn new(xs: &Shape, table: &Shape, by_position: bool) -> Option<Self> {
        let &[batch, second, third, head_width] = xs.dims() else { return None };
        let (heads, positions) = if by_position { (third, second) } else { (second, third) };
        let rows_a_position = if by_position { heads } else { 1 };
        let (table_positions, table_width, table_rows) = match *table.dims() {
            [rows, width] => (rows, width, 0),
            [sequences, rows, width] if sequences == batch => (rows, width, rows),
            _ => return None,
        };
        let fits = 2 * table_width == head_width && positions <= table_positions;
        fits.then_some(Sizes { heads, positions, head_width, table_rows, rows_a_position })
    }

    /// Where the table's row for a row of `xs` starts, in elements.
    #[inline(always)]
    fn table_start(self, row: usize) -> usize {
        let sequence = row / (self.heads * self.positions);
        let position = row / self.rows_a_position % self.positions;
        (sequence * self.table_rows + position) * (self.head_width / 2)
    }
}

impl Rope {
    fn sizes(&self, xs: &Shape, table: &Shape) -> Option<Sizes> {
        Sizes::new(xs, table, self.by_position)
    }

    /// The same on a CUDA device.
    #[cfg(feature = "cuda")]
    fn rotation(&self, xs: &Shape, table: &Shape, direction: f32) -> Result<Rotation> {
        let Rope { name: op, interleaved, .. } = *self;
        let sizes = self.sizes(xs, table).ok_or_else(|| shapes_error(op, SHAPES, &[xs, table]))?;
        Ok(Rotation { op, interleaved, sizes, direction })
    }

    /// Rotates every row of `xs` by its angle, or its opposite when `direction` is −1.
    fn rotate(&self, [xs, cos, sin]: [Elements<'_>; 3], sizes: Sizes, direction: f32) -> CpuStorage {
        let [cos, sin] = [cos, sin].map(|table| table.wide(0..table.len()));
        let rotate_rows = if self.interleaved { rotate_neighbours } else { rotate_halves };
        in_chunks(xs, xs.len(), chunk_elements(sizes.head_width), |range, out| {
            let first_row = range.start / sizes.head_width;
            rotate_rows(out, &xs.wide(range), &cos, &sin, sizes, first_row, direction);
        })
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = xs_layout.shape();
        let inputs = Elements::of_all(self.name, [(xs, xs_layout), (cos, cos_layout), (sin, sin_layout)])?;
        let table = cos_layout.shape();
        let sizes =
            self.sizes(shape, table).ok_or_else(|| shapes_error(self.name, SHAPES, &[shape, table]))?;
        Ok((self.rotate(inputs, sizes, 1.0), shape.clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        cos: &CudaStorage,
        cos_layout: &Layout,
        sin: &CudaStorage,
        sin_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let rotation = self.rotation(xs_layout.shape(), cos_layout.shape(), 1.0)?;
        rotation.forward((xs, xs_layout), (cos, cos_layout), (sin, sin_layout))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let rotation = self.rotation(xs.shape(), cos.shape(), -1.0)?;
            return Ok((Some(rotation.backward(&grad, cos, sin)?), None, None));
        }
        let [dy, c, s] = [&grad, cos, sin].map(|tensor| Input::new(self.name, tensor));
        let shapes = [xs.shape(), cos.shape()];
        let sizes =
            self.sizes(shapes[0], shapes[1]).ok_or_else(|| shapes_error(self.name, SHAPES, &shapes))?;
        let dx = self.rotate([dy.real()?, c.real()?, s.real()?], sizes, -1.0);
        Ok((Some(cpu_tensor(dx, xs)), None, None))
    }
}

vectorized! {
    fn rotate_halves(
        out: &mut [f32],
        xs: &[f32],
        cos: &[f32],
        sin: &[f32],
        sizes: Sizes,
        first_row: usize,
        direction: f32,
    ) {
        let (width, half) = (sizes.head_width, sizes.head_width / 2);
        for (row, (out, xs)) in out.chunks_exact_mut(width).zip(xs.chunks_exact(width)).enumerate() {
            let start = sizes.table_start(first_row + row);
            let angles = cos[start..start + half].iter().zip(&sin[start..start + half]);
            let (out_a, out_b) = out.split_at_mut(half);
            let (a, b) = xs.split_at(half);
            let outputs = out_a.iter_mut().zip(out_b);
            for (((out_a, out_b), (&a, &b)), (&cos, &sin)) in outputs.zip(a.iter().zip(b)).zip(angles) {
                *out_a = a * cos - b * (direction * sin);
                *out_b = a * (direction * sin) + b * cos;
            }
        }
    }

    fn rotate_neighbours(
        out: &mut [f32],
        xs: &[f32],
        cos: &[f32],
        sin: &[f32],
        sizes: Sizes,
        first_row: usize,
        direction: f32,
    ) {
        let (width, half) = (sizes.head_width, sizes.head_width / 2);
        for (row, (out, xs)) in out.chunks_exact_mut(width).zip(xs.chunks_exact(width)).enumerate() {
            let start = sizes.table_start(first_row + row);
            let angles = cos[start..start + half].iter().zip(&sin[start..start + half]);
            let (outputs, inputs) = (out.as_chunks_mut::<2>().0, xs.as_chunks::<2>().0);
            for ((out, &[a, b]), (&cos, &sin)) in outputs.iter_mut().zip(inputs).zip(angles) {
                *out = [a * cos - b * (direction * sin), a * (direction * sin) + b * cos];
            }
        }
    }
}
