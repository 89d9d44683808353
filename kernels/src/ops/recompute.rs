//! What can be spared where the gradients of a loss, or of a part of a model, are made.
//!
//! Candle makes the gradient of a variable in two more passes than it needs: as zeros, and as the sum of
//! those and what an operation computed. Within [`backward`] and [`recompute`] the operations hand the
//! gradients of variables over instead.
//!
//! Checkpointing (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174) runs a part
//! of a model a second time before its backward. The part's value is known by then: within [`recompute`] its
//! last layer, if that is a [`closing_linear`], is not computed. Of the products of a transformer block that
//! is a third of the forward's. Where the graph of a part is kept instead, [`keep`] leaves the value of that
//! layer out of it.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp3, InplaceOp1, Layout, Result, Shape, Tensor, TensorId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

#[cfg(feature = "cuda")]
use super::cuda;
use super::input::Elements;
use super::linear::{self, linear};
use super::output::storage;

/// Gradients that were handed over, each summed in the order of its parts.
type HandedOver = HashMap<TensorId, Tensor>;

/// What becomes of the value of a [`closing_linear`].
enum Closing {
    /// It is part of the graph, as any other.
    Plain,
    /// Nobody needs it.
    Spared,
    /// It is put here, with the number of the tensor that stands for it in the graph.
    Apart(Option<(TensorId, Tensor)>),
}

thread_local! {
    static SCOPES: RefCell<Vec<HandedOver>> = const { RefCell::new(vec![]) };
    static CLOSING: RefCell<Closing> = const { RefCell::new(Closing::Plain) };
    static BACKWARD_FOLLOWS: Cell<bool> = const { Cell::new(false) };
}

/// `loss.backward()` with the gradients of variables handed over.
///
/// # Errors
/// What candle says.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    collecting(|| loss.backward())
}

/// Runs a part of a model whose value is known, and its backward. Where the value is that of a
/// [`closing_linear`], it is not computed again, and using it is an error.
///
/// # Errors
/// What `run` says.
pub fn recompute(run: impl FnOnce() -> Result<GradStore>) -> Result<GradStore> {
    collecting(|| with_closing(Closing::Spared, run).0)
}

/// Runs a part of a model whose graph is kept for its backward, and answers the end of that graph and its
/// value. Where the value is that of a [`closing_linear`], the graph does not hold it, and using it within
/// the part is an error. Gradients have the bits of [`recompute`], so none are made at once.
///
/// # Errors
/// What `run` says.
pub fn keep(run: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let (end, closing) = with_closing(Closing::Apart(None), || with_following(false, run));
    let end = end?;
    let value = match closing {
        Closing::Apart(Some((id, value))) if id == end.id() => value,
        _ => end.clone(),
    };
    Ok((end, value))
}

/// Runs a part of a model whose graph is let go, so that gradients would be made at once for nothing.
///
/// # Errors
/// What `run` says.
pub fn without_graph<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    with_following(false, run)
}

/// Runs `run` with something done about values of closing layers, and answers what came of them.
fn with_closing<T>(closing: Closing, run: impl FnOnce() -> T) -> (T, Closing) {
    /// Puts back what was before, also where `run` panics.
    struct Before(Closing);
    impl Before {
        fn exchange(&mut self) {
            CLOSING.with_borrow_mut(|now| std::mem::swap(now, &mut self.0));
        }
    }
    impl Drop for Before {
        fn drop(&mut self) {
            self.exchange();
        }
    }
    let mut before = Before(closing);
    before.exchange();
    let result = run();
    let closing = CLOSING.with_borrow_mut(|now| std::mem::replace(now, Closing::Plain));
    (result, closing)
}

fn collecting(run: impl FnOnce() -> Result<GradStore>) -> Result<GradStore> {
    /// Leaves the scope, also where `run` panics.
    struct Entered;
    impl Drop for Entered {
        fn drop(&mut self) {
            SCOPES.with_borrow_mut(Vec::pop);
        }
    }
    SCOPES.with_borrow_mut(|scopes| scopes.push(HandedOver::new()));
    let entered = Entered;
    let mut gradients = run()?;
    let handed_over = SCOPES.with_borrow_mut(|scopes| scopes.last_mut().map(std::mem::take));
    drop(entered);
    for (id, gradient) in handed_over.unwrap_or_default() {
        let sum = match gradients.get_id(id) {
            Some(earlier) => (earlier + gradient)?,
            None => gradient,
        };
        gradients.insert_id(id, sum);
    }
    Ok(gradients)
}

/// Runs the forward of a loss whose backward follows: operations may make gradients at once where what they
/// need for them is large and at hand.
///
/// # Errors
/// What `run` says.
pub fn before_backward<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    with_following(true, run)
}

fn with_following<T>(follows: bool, run: impl FnOnce() -> Result<T>) -> Result<T> {
    /// Puts back what was before, also where `run` panics.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            BACKWARD_FOLLOWS.set(self.0);
        }
    }
    let _before = Before(BACKWARD_FOLLOWS.replace(follows));
    run()
}

/// Whether the forward that runs is one that a backward follows.
pub(super) fn backward_follows() -> bool {
    BACKWARD_FOLLOWS.get()
}

/// Hands the gradient of a variable over, where that is possible; answers what is left for candle's store.
pub(super) fn hand_over(tensor: &Tensor, gradient: Option<Tensor>) -> Result<Option<Tensor>> {
    let Some(gradient) = gradient else { return Ok(None) };
    SCOPES.with_borrow_mut(|scopes| match scopes.last_mut() {
        Some(handed_over) if tensor.is_variable() => {
            let sum = match handed_over.remove(&tensor.id()) {
                Some(earlier) => (earlier + gradient)?,
                None => gradient,
            };
            handed_over.insert(tensor.id(), sum);
            Ok(None)
        }
        _ => Ok(Some(gradient)),
    })
}

/// `residual + linear(xs, weight, bias)` as the last operation of a part of a model: within [`recompute`] and
/// [`keep`] it has no value in the graph.
///
/// `residual` `[.., out]`; the others as in [`linear`].
///
/// # Errors
/// As [`linear`], and [`OpError::Shapes`](super::OpError::Shapes) for a residual of another shape than the
/// result.
pub fn closing_linear(
    residual: &Tensor,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let is_plain = CLOSING.with_borrow(|closing| matches!(closing, Closing::Plain));
    // The gradient of the bias does not pass through candle's graph, which has no operation with four inputs.
    if is_plain || bias.is_some_and(|bias| bias.track_op() && !bias.is_variable()) {
        return residual + linear(xs, weight, bias)?;
    }
    linear::check(xs, weight, bias)?;
    let is_apart = CLOSING.with_borrow(|closing| matches!(closing, Closing::Apart(_)));
    let value = match is_apart {
        true => {
            let bias = bias.map(Tensor::detach);
            Some((residual.detach() + linear(&xs.detach(), &weight.detach(), bias.as_ref())?)?)
        }
        false => None,
    };
    let operation = ClosingLinear { bias: bias.cloned() };
    let closing = residual.apply_op3(&xs.contiguous()?, &weight.contiguous()?, operation)?;
    closing.inplace_op1(&Vacate)?;
    if let Some(value) = value {
        CLOSING.replace(Closing::Apart(Some((closing.id(), value))));
    }
    Ok(closing)
}

struct ClosingLinear {
    bias: Option<Tensor>,
}

impl CustomOp3 for ClosingLinear {
    fn name(&self) -> &'static str {
        "closing_linear"
    }

    fn cpu_fwd(
        &self,
        residual: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let like = Elements::of("closing_linear", residual, layout)?;
        Ok((storage(vec![], like), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        residual: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((cuda::recompute::no_value(residual)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        xs: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (d_xs, d_weight, d_bias) = linear::backward(xs, weight, self.bias.as_ref(), grad)?;
        if let Some(bias) = &self.bias {
            hand_over(bias, d_bias)?;
        }
        Ok((Some(grad.clone()), d_xs, hand_over(weight, d_weight)?))
    }
}

/// Takes the storage of a tensor away: it keeps its shape and type, and every operation refuses it.
struct Vacate;

impl InplaceOp1 for Vacate {
    fn name(&self) -> &'static str {
        "vacate"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        *storage = CpuStorage::F6E2M3(vec![]);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        cuda::recompute::vacate(storage)
    }
}
