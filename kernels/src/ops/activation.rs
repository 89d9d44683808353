//! Activations: GELU, SiLU and SwiGLU, one pass forward and one pass backward.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::error::{OpError, shapes_error};
use super::input::{Elements, Input};
use super::output::{cpu_tensor, in_chunks, in_chunks_beside};
use super::vector::{chunk_elements, sigmoid, vectorized};

/// `x·Φ(x)` in the form with tanh: `x/2·(1 + tanh u)`, `u = √(2/π)·(x + 0.044715·x³)`.
///
/// Any shape. The formula is that of Hendrycks and Gimpel, *Gaussian Error Linear Units* (arXiv 1606.08415),
/// as in GPT-2 and [`Tensor::gelu`]. It is computed as `x·s` with `s = sigmoid(2u)`, which is the same, and
/// loses no digits for negative `x`. Backward: `dx = dy·(s + x·s·(1 − s)·2u')`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in.
pub fn gelu(xs: &Tensor) -> Result<Tensor> {
    xs.contiguous()?.apply_op1(GELU)
}

/// `x·sigmoid(x)` (Elfwing et al., arXiv 1702.03118), as [`candle_nn::ops::silu`]. Any shape.
///
/// Backward: `dx = dy·s·(1 + x·(1 − s))` with `s = sigmoid(x)`.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    xs.contiguous()?.apply_op1(SILU)
}

/// `silu(gate)·up` for `xs = [gate, up]`, halves of the last dimension: `[.., 2·C] → [.., C]`, as
/// [`candle_nn::ops::swiglu`] (Shazeer, arXiv 2002.05202).
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in;
/// [`OpError::Shapes`](super::OpError::Shapes) unless the last dimension is even.
pub fn swiglu(xs: &Tensor) -> Result<Tensor> {
    if xs.rank() == 0 || !xs.dim(D::Minus1)?.is_multiple_of(2) {
        return Err(shapes_error(SwiGlu::NAME, "the last dimension must be even", &[xs.shape()]));
    }
    xs.contiguous()?.apply_op1(SwiGlu)
}

/// `silu(gate)·up` for two tensors of one shape, as [`swiglu`] for halves of one.
///
/// # Errors
/// As [`swiglu`]; the shapes must be equal.
pub fn gated_silu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        return Err(shapes_error(GatedSilu::NAME, "expected equal shapes", &[gate.shape(), up.shape()]));
    }
    if gate.device().is_cuda() {
        OpError::check_dtypes(GatedSilu::NAME, gate, &[up])?;
        return silu(gate)? * up;
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, GatedSilu)
}

/// A function of one element, over slices.
struct Elementwise {
    name: &'static str,
    /// `out = f(x)`.
    forward: fn(&mut [f32], &[f32]),
    /// `out = dy·f'(x)`, arguments `out`, `x`, `dy`.
    backward: fn(&mut [f32], &[f32], &[f32]),
}

const GELU: Elementwise = Elementwise { name: "gelu", forward: gelu_forward, backward: gelu_backward };
const SILU: Elementwise = Elementwise { name: "silu", forward: silu_forward, backward: silu_backward };

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = Elements::of(self.name, storage, layout)?;
        let out =
            in_chunks(xs, xs.len(), chunk_elements(1), |range, out| (self.forward)(out, &xs.wide(range)));
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::activation::forward(self.name, storage, layout)
    }

    fn bwd(&self, xs: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            return cuda::activation::backward(self.name, xs, grad).map(Some);
        }
        let grad = grad.contiguous()?;
        let (x, dy) = (Input::new(self.name, xs), Input::new(self.name, &grad));
        let (x, dy) = (x.real()?, dy.real()?);
        let dx = in_chunks(x, x.len(), chunk_elements(1), |range, dx| {
            (self.backward)(dx, &x.wide(range.clone()), &dy.wide(range));
        });
        Ok(Some(cpu_tensor(dx, xs)))
    }
}

/// Half the last dimension, and the shape with it.
fn halved(layout: &Layout) -> (usize, Shape) {
    let mut dims = layout.dims().to_vec();
    let width = dims.last().map_or(0, |&last| last / 2);
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    (width, Shape::from(dims))
}

struct SwiGlu;

impl SwiGlu {
    const NAME: &'static str = "swiglu";
}

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = Elements::of(Self::NAME, storage, layout)?;
        let (width, shape) = halved(layout);
        let out = in_chunks(xs, xs.len() / 2, chunk_elements(width), |range, out| {
            swiglu_forward(out, &xs.wide(2 * range.start..2 * range.end), width);
        });
        Ok((out, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (width, shape) = halved(layout);
        cuda::activation::swiglu_forward(storage, layout, width, shape)
    }

    fn bwd(&self, xs: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = xs.dim(D::Minus1)? / 2;
        #[cfg(feature = "cuda")]
        if xs.device().is_cuda() {
            return cuda::activation::swiglu_backward(xs, grad, width).map(Some);
        }
        let grad = grad.contiguous()?;
        let (x, dy) = (Input::new(Self::NAME, xs), Input::new(Self::NAME, &grad));
        let (x, dy) = (x.real()?, dy.real()?);
        let dx = in_chunks(x, x.len(), 2 * chunk_elements(width), |range, dx| {
            swiglu_backward(dx, &x.wide(range.clone()), &dy.wide(range.start / 2..range.end / 2), width);
        });
        Ok(Some(cpu_tensor(dx, xs)))
    }
}

struct GatedSilu;

impl GatedSilu {
    const NAME: &'static str = "gated_silu";
}

impl CustomOp2 for GatedSilu {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [gate, up] = Elements::of_all(Self::NAME, [(gate, gate_layout), (up, up_layout)])?;
        let out = in_chunks(gate, gate.len(), chunk_elements(1), |range, out| {
            gated_forward(out, &gate.wide(range.clone()), &up.wide(range));
        });
        Ok((out, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let [g, u, dy] = [gate, up, &grad].map(|tensor| Input::new(Self::NAME, tensor));
        let (g, u, dy) = (g.real()?, u.real()?, dy.real()?);
        let chunk = chunk_elements(1);
        let nothing = rayon::iter::repeat_n((), g.len().div_ceil(chunk));
        let [d_gate, d_up] = in_chunks_beside(g, g.len(), chunk, nothing, |range, [d_gate, d_up], ()| {
            let (gate, up) = (g.wide(range.clone()), u.wide(range.clone()));
            gated_backward(d_gate, d_up, &gate, &up, &dy.wide(range));
        });
        Ok((Some(cpu_tensor(d_gate, gate)), Some(cpu_tensor(d_up, up))))
    }
}

/// `2·√(2/π)`: GELU needs twice `u`.
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

vectorized! {
    fn gelu_forward(out: &mut [f32], xs: &[f32]) {
        for (out, &x) in out.iter_mut().zip(xs) {
            *out = x * sigmoid(TWO_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
        }
    }

    fn gelu_backward(dx: &mut [f32], xs: &[f32], dy: &[f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(xs).zip(dy) {
            let s = sigmoid(TWO_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
            let slope = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
            *dx = dy * (s + x * s * (1.0 - s) * slope);
        }
    }

    fn silu_forward(out: &mut [f32], xs: &[f32]) {
        for (out, &x) in out.iter_mut().zip(xs) {
            *out = x * sigmoid(x);
        }
    }

    fn silu_backward(dx: &mut [f32], xs: &[f32], dy: &[f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(xs).zip(dy) {
            let s = sigmoid(x);
            *dx = dy * s * (1.0 + x * (1.0 - s));
        }
    }

    /// Rows of `width` from rows of twice that.
    fn swiglu_forward(out: &mut [f32], xs: &[f32], width: usize) {
        for (out, xs) in out.chunks_exact_mut(width).zip(xs.chunks_exact(2 * width)) {
            let (gate, up) = xs.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(gate) * up;
            }
        }
    }

    fn gated_forward(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(gate) * up;
        }
    }

    fn gated_backward(d_gate: &mut [f32], d_up: &mut [f32], gate: &[f32], up: &[f32], dy: &[f32]) {
        let inputs = gate.iter().zip(up).zip(dy);
        for ((d_gate, d_up), ((&gate, &up), &dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
            let s = sigmoid(gate);
            *d_gate = dy * up * s * (1.0 + gate * (1.0 - s));
            *d_up = dy * gate * s;
        }
    }

    fn swiglu_backward(dx: &mut [f32], xs: &[f32], dy: &[f32], width: usize) {
        let rows = dx.chunks_exact_mut(2 * width).zip(xs.chunks_exact(2 * width)).zip(dy.chunks_exact(width));
        for ((dx, xs), dy) in rows {
            let (gate, up) = xs.split_at(width);
            let (d_gate, d_up) = dx.split_at_mut(width);
            let inputs = gate.iter().zip(up).zip(dy);
            for ((d_gate, d_up), ((&gate, &up), &dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
                let s = sigmoid(gate);
                *d_gate = dy * up * s * (1.0 + gate * (1.0 - s));
                *d_up = dy * gate * s;
            }
        }
    }
}
