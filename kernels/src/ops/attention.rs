//! Causal self-attention.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input};
use super::matrix::{Matrix, MatrixMut, Threads, multiply};
use super::output::{cpu_tensor, storage};
use super::softmax::{Rows, softmax_rows, softmax_rows_backward};

/// `softmax(q·kᵀ/√D, causal)·v` for every head: `qkv` `[B, T, 3·C]` → `[B, T, C]`.
///
/// The last dimension of `qkv` holds `q`, `k` and `v` of `C` elements each; head `h` takes columns
/// `h·D..(h+1)·D` of each, `D = C/heads`. The heads' results lie in the same order in the output.
///
/// Only a block of rows of one head's probabilities exists at a time, and none is kept: the backward
/// recomputes them, an idea of FlashAttention (Dao et al., arXiv 2205.14135). With `p` the probabilities, `s`
/// the scores and `o` the result: `dv = pᵀ·do`, `dp = do·vᵀ`, `ds = p·(dp − Σ dp·p)/√D`, `dq = ds·k`,
/// `dk = dsᵀ·q`.
///
/// With a `window` a position sees itself and the `window − 1` before it, as in Mistral 7B (Jiang et al.,
/// arXiv 2310.06825). On the CPU the work then grows with `T·window`: what no row of a block sees is not
/// computed.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in;
/// [`OpError::Shapes`](super::OpError::Shapes) unless `qkv` has three dimensions and the last one is a
/// multiple of `3·heads`; [`OpError::EmptyWindow`](super::OpError::EmptyWindow) for a window of 0.
pub fn causal_attention(qkv: &Tensor, heads: usize, window: Option<usize>) -> Result<Tensor> {
    OpError::check_window(NAME, window)?;
    match *qkv.dims() {
        [_, _, width] if heads > 0 && width > 0 && width.is_multiple_of(3 * heads) => {
            qkv.contiguous()?.apply_op1(CausalAttention { heads, window })
        }
        _ => Err(shapes_error(NAME, "expected [B, T, 3·C] with C a multiple of the heads", &[qkv.shape()])),
    }
}

/// [`causal_attention`] where several query heads share a key and value head (Ainslie et al., arXiv
/// 2305.13245).
///
/// `query` `[B, T, heads·D]`, `key` and `value` `[B, T, key_value_heads·D]` → `[B, T, heads·D]`; query head
/// `h` takes key and value head `h·key_value_heads/heads`.
///
/// # Errors
/// As [`causal_attention`]; shapes must be as above, and `heads` a multiple of `key_value_heads`.
pub fn grouped_causal_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: usize,
    key_value_heads: usize,
    window: Option<usize>,
) -> Result<Tensor> {
    let operation = GroupedAttention { heads, key_value_heads, window };
    OpError::check_window(GroupedAttention::NAME, window)?;
    let sizes = GroupedSizes::new(query.shape(), &operation);
    let sizes = sizes.filter(|sizes| [key, value].iter().all(|tensor| *tensor.dims() == sizes.key_dims()));
    let Some(sizes) = sizes else {
        let shapes = [query.shape(), key.shape(), value.shape()];
        let expected = "expected [B, T, H·D] and twice [B, T, K·D] with H a multiple of K";
        return Err(shapes_error(GroupedAttention::NAME, expected, &shapes));
    };
    if query.device().is_cuda() {
        OpError::check_dtypes(GroupedAttention::NAME, query, &[key, value])?;
        let packed = [query.clone(), sizes.repeat(key)?, sizes.repeat(value)?];
        return causal_attention(&Tensor::cat(&packed, 2)?, heads, window);
    }
    query.contiguous()?.apply_op3(&key.contiguous()?, &value.contiguous()?, operation)
}

pub(super) const NAME: &str = "causal_attention";

/// Query rows whose probabilities exist together. Fewer skip more of the masked half; more make larger
/// products.
const BLOCK_ROWS: usize = 64;

struct CausalAttention {
    heads: usize,
    window: Option<usize>,
}

impl CausalAttention {
    fn sizes(&self, qkv: &Shape) -> Result<Sizes> {
        let (batch, positions, width) = qkv.dims3()?;
        let channels = width / 3;
        let Self { heads, window } = *self;
        Ok(Sizes { batch, positions, channels, heads, head_width: channels / heads, window })
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let input = Elements::of(NAME, qkv, layout)?;
        let qkv = &input.wide(0..input.len());
        let sizes = self.sizes(layout.shape())?;
        let mut out = vec![0f32; sizes.batch * sizes.positions * sizes.channels];
        let outputs = sizes.column_blocks(&mut out, sizes.channels);
        outputs.into_par_iter().enumerate().for_each_init(Vec::new, |scratch, (index, out)| {
            sizes.head(qkv, index).forward(out, scratch);
        });
        Ok((storage(out, input), (sizes.batch, sizes.positions, sizes.channels).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::attention::forward(self.sizes(layout.shape())?, storage, layout)
    }

    fn bwd(&self, qkv: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if qkv.device().is_cuda() {
            return cuda::attention::backward(self.sizes(qkv.shape())?, qkv, grad).map(Some);
        }
        let grad = grad.contiguous()?;
        let (input, d_out) = (Input::new(NAME, qkv), Input::new(NAME, &grad));
        let (input, d_out) = (input.real()?, d_out.real()?);
        let (wide, d_out) = (&input.wide(0..input.len()), &d_out.wide(0..d_out.len()));
        let sizes = self.sizes(qkv.shape())?;
        let mut d_qkv = vec![0f32; input.len()];
        let blocks = sizes.column_blocks(&mut d_qkv, 3 * sizes.channels);
        let gradients = head_gradients(blocks, self.heads);
        gradients.into_par_iter().enumerate().for_each_init(
            Default::default,
            |scratch, (index, gradient)| {
                let d_out = sizes.head_columns(d_out, index, sizes.channels, 0);
                sizes.head(wide, index).backward(gradient, d_out, scratch);
            },
        );
        Ok(Some(cpu_tensor(storage(d_qkv, input), qkv)))
    }
}

struct GroupedAttention {
    heads: usize,
    key_value_heads: usize,
    window: Option<usize>,
}

impl GroupedAttention {
    const NAME: &'static str = "grouped_causal_attention";

    fn sizes(&self, query: &Shape) -> Result<GroupedSizes> {
        GroupedSizes::new(query, self)
            .ok_or_else(|| shapes_error(Self::NAME, "expected [B, T, H·D]", &[query]))
    }
}

impl CustomOp3 for GroupedAttention {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        query_layout: &Layout,
        key: &CpuStorage,
        key_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(query, query_layout), (key, key_layout), (value, value_layout)];
        let inputs = Elements::of_all(Self::NAME, inputs)?;
        let [query, key, value] = &inputs.map(|input| input.wide(0..input.len()));
        let sizes = self.sizes(query_layout.shape())?;
        let mut out = vec![0f32; query.len()];
        let outputs = sizes.query.column_blocks(&mut out, sizes.query.channels);
        outputs.into_par_iter().enumerate().for_each_init(Vec::new, |scratch, (index, out)| {
            sizes.head(query, key, value, index).forward(out, scratch);
        });
        Ok((storage(out, inputs[0]), query_layout.shape().clone()))
    }

    fn bwd(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let sizes = self.sizes(query.shape())?;
        let [q, k, v, dy] = [query, key, value, &grad].map(|tensor| Input::new(Self::NAME, tensor));
        let like = q.real()?;
        let wide = [like, k.real()?, v.real()?, dy.real()?].map(|input| input.wide(0..input.len()));
        let [q, k, v, d_out] = wide.each_ref().map(|input| &**input);
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|input| vec![0f32; input.len()]);
        let mut d_queries = sizes.query.column_blocks(&mut dq, sizes.query.channels).into_iter();
        let d_keys = sizes.key.column_blocks(&mut dk, sizes.key.channels);
        let d_values = sizes.key.column_blocks(&mut dv, sizes.key.channels);
        let queries = sizes.queries();
        // A task a key head: its gradient is the sum over its queries, in their order.
        let tasks: Vec<_> = d_keys
            .into_iter()
            .zip(d_values)
            .map(|(d_key, d_value)| (d_queries.by_ref().take(queries).collect::<Vec<_>>(), d_key, d_value))
            .collect();
        let positions = sizes.query.positions;
        tasks.into_par_iter().enumerate().for_each_init(
            Default::default,
            |scratch, (task, (d_queries, mut d_key, mut d_value))| {
                for (number, query) in d_queries.into_iter().enumerate() {
                    let index = task * queries + number;
                    let d_out = sizes.query.head_columns(d_out, index, sizes.query.channels, 0);
                    let (key, value) = (d_key.rows(0, positions), d_value.rows(0, positions));
                    sizes.head(q, k, v, index).backward(HeadGradient { query, key, value }, d_out, scratch);
                }
            },
        );
        let gradient = |elements, input| Some(cpu_tensor(storage(elements, like), input));
        Ok((gradient(dq, query), gradient(dk, key), gradient(dv, value)))
    }
}

/// Sizes of the queries, and of the keys and values.
#[derive(Clone, Copy)]
struct GroupedSizes {
    query: Sizes,
    key: Sizes,
}

impl GroupedSizes {
    fn new(query: &Shape, operation: &GroupedAttention) -> Option<Self> {
        let GroupedAttention { heads, key_value_heads, window } = *operation;
        let &[batch, positions, channels] = query.dims() else { return None };
        if key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) || heads == 0 {
            return None;
        }
        if channels == 0 || !channels.is_multiple_of(heads) {
            return None;
        }
        let head_width = channels / heads;
        let sizes =
            |heads| Sizes { batch, positions, channels: heads * head_width, heads, head_width, window };
        Some(Self { query: sizes(heads), key: sizes(key_value_heads) })
    }

    fn key_dims(&self) -> [usize; 3] {
        [self.key.batch, self.key.positions, self.key.channels]
    }

    /// Query heads that share a key head.
    fn queries(&self) -> usize {
        self.query.heads / self.key.heads
    }

    /// Query head `index`, counted over all sequences, with its keys and values.
    fn head<'a>(&self, query: &'a [f32], key: &'a [f32], value: &'a [f32], index: usize) -> Head<'a> {
        let key_index = index / self.queries();
        Head {
            sizes: self.query,
            query: self.query.head_columns(query, index, self.query.channels, 0),
            key: self.key.head_columns(key, key_index, self.key.channels, 0),
            value: self.key.head_columns(value, key_index, self.key.channels, 0),
        }
    }

    /// Keys or values with each head as often as there are queries for it: `[B, T, H·D]`.
    fn repeat(&self, xs: &Tensor) -> Result<Tensor> {
        let Sizes { batch, positions, heads, head_width, .. } = self.key;
        if self.queries() == 1 {
            return Ok(xs.clone());
        }
        xs.reshape((batch, positions, heads, 1, head_width))?
            .broadcast_as((batch, positions, heads, self.queries(), head_width))?
            .reshape((batch, positions, self.query.channels))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) positions: usize,
    /// Elements of one of q, k and v at one position: heads × head width.
    pub(super) channels: usize,
    pub(super) heads: usize,
    pub(super) head_width: usize,
    /// Positions that one sees at most, which end with itself.
    pub(super) window: Option<usize>,
}

impl Sizes {
    /// The first position that the one at `position` sees.
    pub(super) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// A matrix for each block of `head_width` columns, sequence by sequence; a position holds `row_width`
    /// elements.
    fn column_blocks<'a>(&self, elements: &'a mut [f32], row_width: usize) -> Vec<MatrixMut<'a>> {
        let sequence_elements = (self.positions * row_width).max(1);
        let sequences = elements.chunks_mut(sequence_elements);
        sequences
            .flat_map(|sequence| MatrixMut::column_blocks(sequence, row_width, self.head_width))
            .collect()
    }

    /// The columns of head `index`, counted over all sequences, of a `[B, T, row_width]` tensor, from
    /// `first_column`.
    fn head_columns<'a>(
        &self,
        elements: &'a [f32],
        index: usize,
        row_width: usize,
        first_column: usize,
    ) -> Matrix<'a> {
        let (sequence, head) = (index / self.heads, index % self.heads);
        let start = sequence * self.positions * row_width + first_column + head * self.head_width;
        Matrix::strided(&elements[start..], self.positions, self.head_width, row_width)
    }

    fn head<'a>(&self, qkv: &'a [f32], index: usize) -> Head<'a> {
        let part = |part: usize| self.head_columns(qkv, index, 3 * self.channels, part * self.channels);
        Head { sizes: *self, query: part(0), key: part(1), value: part(2) }
    }
}

/// The gradients of one head's query, key and value.
struct HeadGradient<'a> {
    query: MatrixMut<'a>,
    key: MatrixMut<'a>,
    value: MatrixMut<'a>,
}

/// Groups the column blocks of a packed `[B, T, 3·C]` gradient by head.
fn head_gradients(blocks: Vec<MatrixMut<'_>>, heads: usize) -> Vec<HeadGradient<'_>> {
    let mut gradients = Vec::with_capacity(blocks.len() / 3);
    let mut blocks = blocks.into_iter();
    loop {
        let mut part = || blocks.by_ref().take(heads).collect::<Vec<_>>();
        let (queries, keys, values) = (part(), part(), part());
        if values.is_empty() {
            return gradients;
        }
        let parts = queries.into_iter().zip(keys).zip(values);
        gradients.extend(parts.map(|((query, key), value)| HeadGradient { query, key, value }));
    }
}

/// One head of one sequence; each matrix is `[positions, head width]`.
struct Head<'a> {
    sizes: Sizes,
    query: Matrix<'a>,
    key: Matrix<'a>,
    value: Matrix<'a>,
}

impl Head<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.query.columns() as f32).sqrt()
    }

    fn forward(&self, mut out: MatrixMut<'_>, scratch: &mut Vec<f32>) {
        for block in self.blocks() {
            self.probabilities(&block, scratch);
            let probabilities = Matrix::new(&scratch[..], block.rows, block.keys);
            let value = self.value.rows(block.first_key, block.keys);
            multiply(out.rows(block.first, block.rows), false, probabilities, value, Threads::One);
        }
    }

    fn backward(&self, mut gradient: HeadGradient<'_>, d_out: Matrix<'_>, scratch: &mut [Vec<f32>; 2]) {
        let [probabilities, d_scores] = scratch;
        for block in self.blocks() {
            let Block { first, rows, first_key, keys } = block;
            self.probabilities(&block, probabilities);
            let d_out = d_out.rows(first, rows);
            let p = Matrix::new(&probabilities[..], rows, keys);
            multiply(gradient.value.rows(first_key, keys), true, p.transposed(), d_out, Threads::One);

            d_scores.resize(rows * keys, 0.0);
            let destination = MatrixMut::new(d_scores, rows, keys);
            let value = self.value.rows(first_key, keys).transposed();
            multiply(destination, false, d_out, value, Threads::One);
            softmax_rows_backward(d_scores, probabilities, 0, self.visibility(&block), self.scale());
            let d_scores = Matrix::new(&d_scores[..], rows, keys);
            let (query, key) = (self.query.rows(first, rows), self.key.rows(first_key, keys));
            multiply(gradient.query.rows(first, rows), false, d_scores, key, Threads::One);
            multiply(gradient.key.rows(first_key, keys), true, d_scores.transposed(), query, Threads::One);
        }
    }

    /// The probabilities of one block of query rows over the keys that any of them sees: `[rows, keys]`.
    fn probabilities(&self, block: &Block, out: &mut Vec<f32>) {
        out.resize(block.rows * block.keys, 0.0);
        let query = self.query.rows(block.first, block.rows);
        let key = self.key.rows(block.first_key, block.keys).transposed();
        multiply(MatrixMut::new(out, block.rows, block.keys), false, query, key, Threads::One);
        softmax_rows(out, 0, self.visibility(block), self.scale());
    }

    fn visibility(&self, block: &Block) -> Rows {
        Rows::new(block.keys, block.rows, self.sizes.window)
    }

    fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let sizes = self.sizes;
        (0..sizes.positions).step_by(BLOCK_ROWS).map(move |first| {
            let rows = BLOCK_ROWS.min(sizes.positions - first);
            let first_key = sizes.first_seen(first);
            Block { first, rows, first_key, keys: first + rows - first_key }
        })
    }
}

/// Some query rows, and the keys from the first that the first row sees to the last that the last row sees.
struct Block {
    first: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
}
