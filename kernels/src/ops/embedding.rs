//! Rows of a table by index.

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input, elements};
use super::output::{cpu_tensor, storage};
use super::recompute::hand_over;

/// Row `tokens[..]` of `weight` for every token: `weight` `[V, C]`, `tokens` of any shape and of `u32`,
/// result `[.., C]`.
///
/// As [`Tensor::index_select`] with the gradient of a row summed in `f32` in the order of the tokens, and not
/// read back and written for each of them.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a weight in a dtype that the device does not compute in, or
/// tokens that are not `u32`; [`OpError::Shapes`](super::OpError::Shapes) unless the weight has two
/// dimensions; [`OpError::TokenOutOfRange`](super::OpError::TokenOutOfRange) for a token of `V` or more.
pub fn embedding(weight: &Tensor, tokens: &Tensor) -> Result<Tensor> {
    if weight.rank() != 2 {
        return Err(shapes_error(NAME, "expected [V, C], [..]", &[weight.shape(), tokens.shape()]));
    }
    weight.contiguous()?.apply_op2(&tokens.contiguous()?, Embedding)
}

/// Tokens on a device, as [`Tensor::to_device`]: from the host to a CUDA device by way of page-locked memory,
/// so that the copy does not hold up what comes after it.
///
/// # Errors
/// What candle and the driver say.
pub fn to_device(tokens: &Tensor, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(device), Device::Cpu, DType::U32) = (device, tokens.device(), tokens.dtype()) {
        let tokens = tokens.contiguous()?;
        return cuda::staging::send(device, Input::new("to_device", &tokens).elements()?, tokens.shape());
    }
    tokens.to_device(device)
}

pub(super) const NAME: &str = "embedding";

struct Embedding;

/// The shape of the result.
fn out_shape(weight: &Layout, tokens: &Layout) -> Result<Shape> {
    let (_, width) = weight.shape().dims2()?;
    Ok(Shape::from([tokens.dims(), &[width]].concat()))
}

impl CustomOp2 for Embedding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        weight: &CpuStorage,
        weight_layout: &Layout,
        tokens: &CpuStorage,
        tokens_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (vocabulary_size, width) = weight_layout.shape().dims2()?;
        let weight = Elements::of(NAME, weight, weight_layout)?;
        let tokens = elements::<u32>(NAME, tokens, tokens_layout)?;
        OpError::check_tokens(NAME, tokens, vocabulary_size)?;
        let out = match weight {
            Elements::F32(weight) => CpuStorage::F32(rows(weight, tokens, width)),
            Elements::BF16(weight) => CpuStorage::BF16(rows(weight, tokens, width)),
            Elements::F16(weight) => CpuStorage::F16(rows(weight, tokens, width)),
        };
        Ok((out, out_shape(weight_layout, tokens_layout)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        weight: &CudaStorage,
        weight_layout: &Layout,
        tokens: &CudaStorage,
        tokens_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let shape = out_shape(weight_layout, tokens_layout)?;
        cuda::embedding::forward((weight, weight_layout), (tokens, tokens_layout), shape)
    }

    fn bwd(
        &self,
        weight: &Tensor,
        tokens: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            let gradient = cuda::embedding::backward(weight, tokens, &grad)?;
            return Ok((hand_over(weight, Some(gradient))?, None));
        }
        let width = weight.dim(1)?;
        let (tokens, dy) = (Input::new(NAME, tokens), Input::new(NAME, &grad));
        let (tokens, dy) = (tokens.elements::<u32>()?, dy.real()?);
        let wide = dy.wide(0..dy.len());
        let mut gradient = vec![0f32; weight.elem_count()];
        if !gradient.is_empty() {
            let chunk_rows = (weight.dim(0)?.div_ceil(TASKS)).max(1);
            gradient.par_chunks_mut(chunk_rows * width).enumerate().for_each(|(chunk, gradient)| {
                add_rows(gradient, tokens, &wide, chunk * chunk_rows, width);
            });
        }
        Ok((hand_over(weight, Some(cpu_tensor(storage(gradient, dy), weight)))?, None))
    }
}

/// The rows of a table that the tokens name, all of which are in it.
fn rows<T: Copy>(table: &[T], tokens: &[u32], width: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(tokens.len() * width);
    for &token in tokens {
        let start = token as usize * width;
        out.extend_from_slice(&table[start..start + width]);
    }
    out
}

/// Parts of the vocabulary that are summed at once. Each looks at all tokens.
const TASKS: usize = 16;

/// Adds the gradients of the tokens whose rows a part of the table has, in the order of the tokens.
fn add_rows(gradient: &mut [f32], tokens: &[u32], dy: &[f32], first_row: usize, width: usize) {
    for (&token, dy) in tokens.iter().zip(dy.chunks_exact(width)) {
        let row = (token as usize).checked_sub(first_row);
        let sums = row.and_then(|row| gradient.get_mut(row * width..(row + 1) * width));
        for (sum, &dy) in sums.into_iter().flatten().zip(dy) {
            *sum += dy;
        }
    }
}
