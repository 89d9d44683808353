//! Dropout whose mask is a function of a counter, so that a forward that runs again drops the same elements.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;

use super::input::{Elements, Input};
use super::output::{cpu_tensor, in_chunks};
use super::vector::chunk_elements;
use crate::philox::philox4x32;

/// Which mask a dropout draws: equal ones draw the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    key: [u32; 2],
    counter: [u32; 2],
}

impl Draw {
    /// The mask number `number` of micro-batch `micro_batch` in step `step`, within the part `part` of the
    /// model.
    pub fn new(seed: u64, step: u64, [micro_batch, part, number]: [u32; 3]) -> Self {
        let words = philox4x32(
            [step as u32, (step >> 32) as u32, micro_batch, part],
            [seed as u32, (seed >> 32) as u32],
        );
        Self { key: [words[0], words[1]], counter: [words[2], words[3].wrapping_add(number)] }
    }
}

/// Sets each element to zero with a probability, and divides the others by what is left of one (Srivastava et
/// al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014, scaled in
/// training).
///
/// Any shape. Element *i* is decided by Philox4x32 of *i* and `draw` alone. Backward: the same for the
/// gradient.
///
/// # Errors
/// A probability that is not from 0 to below 1; [`OpError::DType`](super::OpError::DType) for a dtype that
/// the device does not compute in.
pub fn dropout(xs: &Tensor, probability: f32, draw: Draw) -> Result<Tensor> {
    if !(0.0..1.0).contains(&probability) {
        bail!("dropout: a probability of {probability} is not from 0 to below 1")
    }
    let dropout = Dropout { probability, draw };
    if xs.device().is_cpu() {
        return xs.contiguous()?.apply_op1(dropout);
    }
    // The mask of the host, so that devices drop the same elements.
    let ones = vec![1f32; xs.elem_count()];
    let mut mask = vec![0f32; xs.elem_count()];
    dropout.apply(0..ones.len(), &mut mask, &ones);
    xs * Tensor::from_vec(mask, xs.shape(), xs.device())?.to_dtype(xs.dtype())?
}

#[derive(Clone, Copy)]
struct Dropout {
    probability: f32,
    draw: Draw,
}

impl Dropout {
    const NAME: &str = "dropout";

    /// Elements `range` of the result, from theirs of the input.
    fn apply(self, range: Range<usize>, out: &mut [f32], xs: &[f32]) {
        let Draw { key, counter: [low, high] } = self.draw;
        let scale = 1.0 / (1.0 - self.probability);
        let dropped_below = (f64::from(self.probability) * 2f64.powi(32)) as u32;
        let mut words = [0; 4];
        for (at, (out, &value)) in range.clone().zip(out.iter_mut().zip(xs)) {
            if at.is_multiple_of(4) || at == range.start {
                let block = (at / 4) as u64;
                words = philox4x32([block as u32, (block >> 32) as u32, low, high], key);
            }
            *out = if words[at % 4] < dropped_below { 0.0 } else { value * scale };
        }
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let xs = Elements::of(Self::NAME, storage, layout)?;
        let apply = |range: Range<usize>, out: &mut [f32]| self.apply(range.clone(), out, &xs.wide(range));
        Ok((in_chunks(xs, xs.len(), chunk_elements(1), apply), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let input = Input::new(Self::NAME, &grad);
        let dy = input.real()?;
        let apply = |range: Range<usize>, out: &mut [f32]| self.apply(range.clone(), out, &dy.wide(range));
        Ok(Some(cpu_tensor(in_chunks(dy, dy.len(), chunk_elements(1), apply), &grad)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    fn ones(elements: usize, dtype: DType) -> Var {
        Var::ones(elements, dtype, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_pass_where_values_did_and_equal_draws_are_equal() {
        let draw = Draw::new(7, 3, [1, 2, 0]);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let xs = ones(100_003, dtype);
            let out = dropout(&xs, 0.25, draw).unwrap();
            assert_eq!(values(&out), values(&dropout(&xs, 0.25, draw).unwrap()));
            let gradients = out.sum_all().unwrap().backward().unwrap();
            assert_eq!(values(gradients.get(&xs).unwrap()), values(&out));
            let kept = values(&out).iter().filter(|value| **value > 1.3).count();
            assert!((kept as f64 / 100_003.0 - 0.75).abs() < 0.01, "{kept}");
        }
    }

    #[test]
    fn what_differs_in_one_number_draws_another_mask() {
        let xs = ones(1000, DType::F32);
        let mask = |draw| values(&dropout(&xs, 0.5, draw).unwrap());
        let first = mask(Draw::new(7, 3, [1, 2, 0]));
        for other in [
            Draw::new(8, 3, [1, 2, 0]),
            Draw::new(7, 4, [1, 2, 0]),
            Draw::new(7, 3, [0, 2, 0]),
            Draw::new(7, 3, [1, 3, 0]),
            Draw::new(7, 3, [1, 2, 1]),
        ] {
            let same = mask(other).iter().zip(&first).filter(|(one, other)| one == other).count();
            assert!((400..600).contains(&same), "{same} of 1000");
        }
        assert_eq!(values(&dropout(&xs, 0.0, Draw::new(7, 3, [1, 2, 0])).unwrap()), values(&xs));
        dropout(&xs, 1.0, Draw::new(7, 3, [1, 2, 0])).unwrap_err();
    }
}
