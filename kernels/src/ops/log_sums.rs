//! What a part of the vocabulary adds to a cross-entropy over all of it.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cross_entropy::{Head, RowSum, add_logits};
use super::error::shapes_error;
use super::input::{Elements, Input, elements};
use super::linear::linear;
use super::matrix::Matrix;
use super::output::{cpu_tensor, storage};
use super::recompute::hand_over;
use super::vector::{chunk_elements, share, vectorized};

const NAME: &str = "linear_log_sums";

/// Log-sums and target logits of the logits `hidden·weightᵀ` of a part of the vocabulary, of which only those
/// of some rows exist at a time.
///
/// `hidden` `[N, C]`, `weight` `[V, C]`, `targets` `[N]` of `u32`, result `[2, N]` in `f32`:
/// `log Σ e^logits`, and the target's logit, zero for a target of `V` or more, which is in another part. With
/// `s` the log-sums of the parts and `t` their target logits, the cross-entropy of a row is
/// `log Σ e^s − Σ t`. Backward: `d logits = ds·e^(logits − s) + dt·one_hot(targets)`, made of recomputed
/// logits.
///
/// On a CUDA device it is composed of candle's operations, and the logits exist as a whole.
///
/// # Errors
/// [`OpError::DType`](super::OpError::DType) for a dtype that the device does not compute in, or targets that
/// are not `u32`; [`OpError::Shapes`](super::OpError::Shapes) unless the shapes are as above with `N > 0`.
pub fn linear_log_sums(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let fits = match (hidden.dims(), weight.dims(), targets.dims()) {
        ([rows, width], [vocabulary_size, weight_width], [targets]) => {
            rows == targets && width == weight_width && *rows > 0 && *vocabulary_size > 0
        }
        _ => false,
    };
    if !fits {
        let shapes = [hidden.shape(), weight.shape(), targets.shape()];
        return Err(shapes_error(NAME, "expected [N, C], [V, C], [N] with N and V above 0", &shapes));
    }
    let (hidden, weight, targets) = (hidden.contiguous()?, weight.contiguous()?, targets.contiguous()?);
    match hidden.device().is_cpu() {
        true => hidden.apply_op3(&weight, &targets, LinearLogSums),
        false => composed(&hidden, &weight, &targets),
    }
}

/// The same of candle's operations.
fn composed(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocabulary_size = weight.dim(0)? as u32;
    let logits = linear(hidden, weight, None)?.to_dtype(DType::F32)?; // [N, V]
    let largest = logits.detach().max_keepdim(D::Minus1)?; // [N, 1]
    let sums = logits.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?;
    let log_sums = (sums.log()? + largest)?.squeeze(D::Minus1)?; // [N]
    let inside = targets.lt(vocabulary_size)?;
    let columns = inside.where_cond(targets, &targets.zeros_like()?)?.unsqueeze(1)?; // [N, 1]
    let target_logits = logits.gather(&columns, 1)?.squeeze(1)?; // [N]
    Tensor::stack(&[log_sums, (target_logits * inside.to_dtype(DType::F32)?)?], 0)
}

struct LinearLogSums;

impl CustomOp3 for LinearLogSums {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = hidden_layout.shape().dims2()?;
        let (vocabulary_size, _) = weight_layout.shape().dims2()?;
        let inputs = [(hidden, hidden_layout), (weight, weight_layout)];
        let [hidden, weight] = Elements::of_all(NAME, inputs)?;
        let head = Head {
            hidden: Matrix::new(hidden, rows, width),
            weight: Matrix::new(weight, vocabulary_size, width),
            targets: elements::<u32>(NAME, targets, targets_layout)?,
        };
        let mut sums = vec![RowSum::EMPTY; rows];
        let mut logits = Vec::new();
        for block in head.blocks() {
            head.logits(&block, &mut logits);
            let targets = &head.targets[block.clone()];
            add_logits(&mut sums[block], Elements::F32(&logits), targets, vocabulary_size);
        }
        let target_logits = sums
            .iter()
            .zip(head.targets)
            .map(|(sum, &target)| if (target as usize) < vocabulary_size { sum.target_logit } else { 0.0 });
        let out: Vec<f32> = sums.iter().map(RowSum::log_sum).chain(target_logits).collect();
        Ok((CpuStorage::F32(out), (2, rows).into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, width) = hidden.dims2()?;
        let vocabulary_size = weight.dim(0)?;
        let grad = grad.contiguous()?;
        let [h, w, targets, res, grad] =
            [hidden, weight, targets, res, &grad].map(|tensor| Input::new(NAME, tensor));
        let like = h.real()?;
        let head = Head {
            hidden: Matrix::new(like, rows, width),
            weight: Matrix::new(w.real()?, vocabulary_size, width),
            targets: targets.elements::<u32>()?,
        };
        let log_sums = &res.elements::<f32>()?[..rows];
        let (of_sums, of_targets) = grad.elements::<f32>()?.split_at(rows);

        let mut gradients = head.zeros([hidden.track_op(), weight.track_op()]);
        let mut logits = Vec::new();
        let chunk = chunk_elements(vocabulary_size);
        let chunk_rows = chunk / vocabulary_size;
        for block in head.blocks() {
            head.logits(&block, &mut logits);
            let [log_sums, of_sums, of_targets] =
                [log_sums, of_sums, of_targets].map(|of_all| &of_all[block.clone()]);
            let upstream = log_sums.par_chunks(chunk_rows).zip(of_sums.par_chunks(chunk_rows));
            let upstream = upstream.zip(of_targets.par_chunks(chunk_rows));
            logits
                .par_chunks_mut(chunk)
                .zip(head.targets[block.clone()].par_chunks(chunk_rows))
                .zip(upstream)
                .for_each(|((logits, targets), ((log_sums, of_sums), of_targets))| {
                    row_gradients(logits, targets, log_sums, of_sums, of_targets, vocabulary_size);
                });
            head.add_products(&block, &logits, &mut gradients);
        }
        let [d_hidden, d_weight] = gradients.map(|gradient| gradient.map(|gradient| storage(gradient, like)));
        let d_hidden = d_hidden.map(|gradient| cpu_tensor(gradient, hidden));
        let d_weight = d_weight.map(|gradient| cpu_tensor(gradient, weight));
        Ok((d_hidden, hand_over(weight, d_weight)?, None))
    }
}

vectorized! {
    /// Turns some rows of logits into their gradient in place.
    fn row_gradients(
        logits: &mut [f32],
        targets: &[u32],
        log_sums: &[f32],
        of_sums: &[f32],
        of_targets: &[f32],
        vocabulary_size: usize,
    ) {
        let upstream = log_sums.iter().zip(of_sums).zip(of_targets);
        let rows = logits.chunks_exact_mut(vocabulary_size).zip(targets).zip(upstream);
        for ((logits, &target), ((&log_sum, &of_sum), &of_target)) in rows {
            for logit in logits.iter_mut() {
                *logit = of_sum * share(*logit - log_sum);
            }
            if let Some(gradient) = logits.get_mut(target as usize) {
                *gradient += of_target;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn both_ways_agree() {
        let tensor = |rows: usize, width: usize, factor: f32| {
            let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * factor).sin()).collect();
            Var::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        let (hidden, weight) = (tensor(5, 7, 0.7), tensor(11, 7, 1.3));
        // One target in another part.
        let targets = Tensor::new(&[0u32, 10, 11, 4, 4], &Device::Cpu).unwrap();
        let upstream = Tensor::new(&[[1f32, 2.0, 3.0, -1.0, 0.5], [0.3, -0.2, 9.0, 1.0, 2.0]], &Device::Cpu);
        let upstream = upstream.unwrap();
        let of = |function: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
            let out = function(&hidden, &weight, &targets).unwrap();
            let gradients = (&out * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
            [&out, gradients.get(&hidden).unwrap(), gradients.get(&weight).unwrap()]
                .map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        for (ours, theirs) in of(linear_log_sums).iter().zip(&of(composed)) {
            for (a, b) in ours.iter().zip(theirs) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
