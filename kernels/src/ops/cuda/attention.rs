//! Causal self-attention on packed queries, keys and values.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::launch::{Float, allocate, by_dtype, result, tensor, view};
use super::matrix::{self, multiply};
use super::softmax::{backward_in_place, forward_in_place};
use crate::cuda::scratch_elements;
use crate::ops::attention::{NAME, Sizes};
use crate::ops::input::Input;
use crate::ops::softmax::Rows;

/// `softmax(q·kᵀ/√D, causal)·v` for every head.
pub(in crate::ops) fn forward(
    sizes: Sizes,
    qkv: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    by_dtype!(NAME, qkv.dtype(), T => {
        let input = view::<T>(NAME, qkv, layout)?;
        let attention = Attention { device: &qkv.device, sizes, qkv: &input, together: scratch_elements() };
        let shape = (sizes.batch, sizes.positions, sizes.channels);
        Ok(result(&qkv.device, attention.forward()?, shape))
    })
}

/// The gradient of `qkv`; probabilities are made again.
///
/// In a 16-bit type the gradients of keys and values are rounded after each block of rows; there is one block
/// unless the probabilities of a head are more than may exist together.
pub(in crate::ops) fn backward(sizes: Sizes, qkv: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let grad = grad.contiguous()?;
    let (input, upstream) = (Input::new(NAME, qkv), Input::new(NAME, &grad));
    let device = input.cuda_device()?;
    by_dtype!(NAME, qkv.dtype(), T => {
        let (input, d_out) = (input.view::<T>()?, upstream.view::<T>()?);
        let attention = Attention { device, sizes, qkv: &input, together: scratch_elements() };
        Ok(tensor(device, attention.backward(&d_out)?, qkv.shape()))
    })
}

struct Attention<'a, T> {
    device: &'a CudaDevice,
    sizes: Sizes,
    qkv: &'a CudaView<'a, T>,
    /// Probabilities that may exist together, but at least one row's.
    together: usize,
}

/// Some heads of one sequence, and some of their query rows with the keys from the first that the first of
/// them sees to the last that the last of them sees.
#[derive(Clone, Copy)]
struct Block {
    sequence: usize,
    first_head: usize,
    heads: usize,
    first: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
}

impl Block {
    /// Rows of probabilities.
    fn row_count(&self) -> usize {
        self.heads * self.rows
    }

    /// `[rows, keys]` for each head.
    fn scores(&self) -> matrix::Shape {
        matrix::Shape::new(self.rows, self.keys)
    }
}

impl<T: Float> Attention<'_, T> {
    /// As many heads together as `together` allows, and if it does not allow one, as many rows of one head.
    fn blocks(&self) -> Vec<Block> {
        let Sizes { batch, positions, heads, .. } = self.sizes;
        let heads_together = (self.together / (positions * positions).max(1)).clamp(1, heads);
        let rows_together = (self.together / positions.max(1)).clamp(1, positions.max(1));
        let mut blocks = Vec::new();
        for sequence in 0..batch {
            for first_head in (0..heads).step_by(heads_together) {
                for first in (0..positions).step_by(rows_together) {
                    let rows = rows_together.min(positions - first);
                    let heads = heads_together.min(heads - first_head);
                    let first_key = self.sizes.first_seen(first);
                    let keys = first + rows - first_key;
                    blocks.push(Block { sequence, first_head, heads, first, rows, first_key, keys });
                }
            }
        }
        blocks
    }

    /// Memory for the probabilities of the largest block.
    fn allocate_scores(&self, blocks: &[Block]) -> Result<CudaSlice<T>> {
        let largest = blocks.iter().map(|block| block.row_count() * block.keys).max();
        allocate(self.device, largest.unwrap_or(0))
    }

    fn visibility(&self, block: &Block) -> Rows {
        Rows::new(block.keys, block.rows, self.sizes.window)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.sizes.head_width as f32).sqrt()
    }

    /// `rows` rows from `first` on of a block's heads in a `[B, T, row_width]` tensor, from `first_column`.
    fn head_columns(
        &self,
        block: &Block,
        (first, rows): (usize, usize),
        row_width: usize,
        first_column: usize,
    ) -> matrix::Shape {
        let Sizes { positions, head_width, .. } = self.sizes;
        let row = block.sequence * positions + first;
        let start = row * row_width + first_column + block.first_head * head_width;
        matrix::Shape::new(rows, head_width).strided(start, row_width, head_width)
    }

    fn query(&self, block: &Block) -> matrix::Shape {
        self.head_columns(block, (block.first, block.rows), 3 * self.sizes.channels, 0)
    }

    fn key(&self, block: &Block) -> matrix::Shape {
        self.head_columns(block, (block.first_key, block.keys), 3 * self.sizes.channels, self.sizes.channels)
    }

    fn value(&self, block: &Block) -> matrix::Shape {
        self.head_columns(
            block,
            (block.first_key, block.keys),
            3 * self.sizes.channels,
            2 * self.sizes.channels,
        )
    }

    fn out(&self, block: &Block) -> matrix::Shape {
        self.head_columns(block, (block.first, block.rows), self.sizes.channels, 0)
    }

    /// `destination = a · b` for every head of a block, or `destination += a · b` when `accumulate`.
    fn multiply(
        &self,
        block: &Block,
        accumulate: bool,
        destination: (&mut CudaSlice<T>, matrix::Shape),
        a: (&CudaView<'_, T>, matrix::Shape),
        b: (&CudaView<'_, T>, matrix::Shape),
    ) -> Result<()> {
        multiply(NAME, self.device, block.heads, accumulate, destination, a, b)
    }

    fn probabilities(&self, block: &Block, out: &mut CudaSlice<T>) -> Result<()> {
        let (query, key) = (self.query(block), self.key(block).transposed());
        self.multiply(block, false, (&mut *out, block.scores()), (self.qkv, query), (self.qkv, key))?;
        forward_in_place(NAME, self.device, out, block.row_count(), self.visibility(block), self.scale())
    }

    /// `[B, T, C]`.
    fn forward(&self) -> Result<CudaSlice<T>> {
        let blocks = self.blocks();
        let mut scores = self.allocate_scores(&blocks)?;
        let mut out = allocate(self.device, self.sizes.batch * self.sizes.positions * self.sizes.channels)?;
        for block in &blocks {
            self.probabilities(block, &mut scores)?;
            let probabilities = (&scores.as_view(), block.scores());
            let value = (self.qkv, self.value(block));
            self.multiply(block, false, (&mut out, self.out(block)), probabilities, value)?;
        }
        Ok(out)
    }

    /// `[B, T, 3·C]`.
    fn backward(&self, d_out: &CudaView<'_, T>) -> Result<CudaSlice<T>> {
        let blocks = self.blocks();
        let mut probabilities = self.allocate_scores(&blocks)?;
        let mut d_scores = self.allocate_scores(&blocks)?;
        // Zeros, because later blocks of rows add to the keys and values that earlier ones have not seen.
        let mut gradient = self.device.alloc_zeros::<T>(self.qkv.len().max(1))?;
        for block in &blocks {
            let d_out = (d_out, self.out(block));
            self.probabilities(block, &mut probabilities)?;
            let p = (&probabilities.as_view(), block.scores().transposed());
            self.multiply(block, true, (&mut gradient, self.value(block)), p, d_out)?;

            let value = (self.qkv, self.value(block).transposed());
            self.multiply(block, false, (&mut d_scores, block.scores()), d_out, value)?;
            let (rows, visibility) = (block.row_count(), self.visibility(block));
            backward_in_place(
                NAME,
                self.device,
                &mut d_scores,
                &probabilities,
                rows,
                visibility,
                self.scale(),
            )?;

            let (query, key) = (self.query(block), self.key(block));
            let d_scores = d_scores.as_view();
            let (ds, ds_transposed) = (block.scores(), block.scores().transposed());
            self.multiply(block, false, (&mut gradient, query), (&d_scores, ds), (self.qkv, key))?;
            self.multiply(block, true, (&mut gradient, key), (&d_scores, ds_transposed), (self.qkv, query))?;
        }
        Ok(gradient)
    }
}
