//! A segment runs the user's module with parameters that are only there while it runs, inside candle's own
//! autograd.
//!
//! Going forward, a segment waits for its group, lets the module compute, and makes the parameters vacant
//! again: what stays in candle's graph is one operation with the segment's input. Going back, that operation
//! fetches the group again, computes the segment once more with a graph, feeds the upstream gradient into it,
//! and hands every parameter's gradient to the executor (recomputation as in Chen et al., "Training deep nets
//! with sublinear memory cost", arXiv 1604.06174). Where the schedule says that the forward keeps its graph,
//! the operation holds it until then, and nothing is computed again.

use crate::autograd::output::{Graph, Output, RunModule, fingerprint_of, leaf_of};
use crate::autograd::segment_call::{Backward, Gradients, Passes};
use crate::device::tensor_storage::{self, TensorStorage};
use crate::error::{Error, Result};
use crate::sync::lock;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Module, Shape, Tensor, bail,
};
use ferrozero_kernels::ops;
use std::any::TypeId;
use std::sync::{Arc, Mutex};

/// A part of the user's model that is fetched, run and released as one. Made by
/// [`Engine::segment`](crate::Engine::segment).
///
/// It is a [`Module`] if the user's part is one; [`Segment::call`] runs parts with more inputs than one.
pub struct Segment<M> {
    inner: Arc<Inner<M>>,
}

struct Inner<M> {
    module: M,
    group: usize,
    passes: Passes,
}

impl<M> Clone for Segment<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: Module + Send + Sync + 'static> Module for Segment<M> {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.call(&[xs], |module, inputs| module.forward(&inputs[0]))
    }
}

impl<M: Send + Sync + 'static> Segment<M> {
    pub(crate) fn new(module: M, group: usize, passes: Passes) -> Self {
        Self { inner: Arc::new(Inner { module, group, passes }) }
    }

    /// Runs `run` on the segment's module and its inputs, of which up to three may need gradients. It may run
    /// again in the backward pass, and must then compute the same; what it captures gets no gradient unless
    /// it is a parameter.
    ///
    /// The first input is the segment's boundary activation. Where the plan keeps boundaries off the device,
    /// the tensor passed as the first input has no storage any more after the call.
    ///
    /// # Errors
    /// Whatever `run` returns; [`Error::OutsideStep`], [`Error::OrderChanged`], and errors of the tiers.
    pub fn call<F>(&self, inputs: &[&Tensor], run: F) -> candle_core::Result<Tensor>
    where
        F: Fn(&M, &[Tensor]) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    {
        let inner = self.inner.clone();
        let kind = TypeId::of::<F>();
        let run: Arc<RunModule> = Arc::new(move |inputs| run(&inner.module, inputs));
        let passes = &self.inner.passes;
        passes.report(call(passes, self.inner.group, kind, run, inputs))
    }
}

fn call(
    passes: &Passes,
    group: usize,
    kind: TypeId,
    run: Arc<RunModule>,
    inputs: &[&Tensor],
) -> Result<Tensor> {
    if inputs.is_empty() {
        return Err(Error::Misuse("a segment needs an input".into()));
    }
    if tensor_storage::is_vacant(inputs[0]) {
        return Err(Error::Misuse(
            "the input of this segment has left the device as the boundary of an earlier one: a tensor that \
             two segments read needs boundaries on the device"
                .into(),
        ));
    }
    let mut forward = passes.begin_forward(group, kind, inputs)?;
    let output = forward.compute(|keeps| match keeps {
        true => Output::with_graph(&*run, inputs),
        false => Output::alone(&*run, inputs),
    });
    let Output { mut values, shape, graph, fingerprint } = match output {
        Ok(output) => output,
        Err(error) => {
            forward.finish(None)?;
            return Err(error);
        }
    };
    let Some(call) = forward.graph_call() else {
        forward.finish(None)?;
        return Ok(values.into_tensor(&shape, false));
    };
    // The node of the graph gets the storage for good.
    let lender = values.take_lender();
    let output = Mutex::new(Some((values, shape)));
    let inputs: Vec<Tensor> = inputs.iter().map(|&input| input.clone()).collect();
    let tracked: Vec<Tensor> = inputs.iter().filter(|input| input.track_op()).cloned().collect();
    let first = inputs[0].clone();
    let graph = Mutex::new(graph);
    let passes_of = passes.clone();
    let operation =
        SegmentOperation { passes: passes_of, group, call, run, inputs, output, fingerprint, graph };
    let node = match tracked.as_slice() {
        // The parameters are not in the graph, so without a tracked input candle would not come back to this
        // segment.
        [] => {
            let leaf = TensorStorage::zeros(1, DType::F32, first.device())?;
            leaf.into_tensor(&Shape::from(()), true).apply_op1(operation)
        }
        [first] => first.apply_op1(operation),
        [first, second] => first.apply_op2(second, operation),
        [first, second, third] => first.apply_op3(second, third, operation),
        _ => Err(candle_core::Error::Msg("a segment takes at most three inputs that need gradients".into())),
    };
    let boundary = match node.is_ok() && forward.moves_boundary() {
        true => Some(passes.take_output(&first)?),
        false => None,
    };
    forward.finish(boundary)?;
    let node = node?;
    if let Some(lender) = lender {
        passes.note_output(&node, lender);
    }
    Ok(node)
}

/// The segment as candle's graph knows it.
struct SegmentOperation {
    passes: Passes,
    group: usize,
    call: usize,
    run: Arc<RunModule>,
    inputs: Vec<Tensor>,
    /// What the module computed, until the graph's node takes it.
    output: Mutex<Option<(TensorStorage, Shape)>>,
    /// Of that, to know whether the recompute gives the same.
    fingerprint: Option<u64>,
    /// The graph of the forward, where that is kept.
    graph: Mutex<Option<Graph>>,
}

impl SegmentOperation {
    fn output(&self) -> candle_core::Result<(TensorStorage, Shape)> {
        match self.output.lock().ok().and_then(|mut output| output.take()) {
            Some(output) => Ok(output),
            None => bail!("a segment's operation ran twice"),
        }
    }

    fn cpu_output(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        let (values, shape) = self.output()?;
        Ok((values.into_cpu()?, shape))
    }

    fn cuda_output(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        let (values, shape) = self.output()?;
        Ok((values.into_cuda()?, shape))
    }

    /// Gradients of the tracked inputs, in order.
    fn backward(&self, upstream: &Tensor) -> candle_core::Result<std::vec::IntoIter<Tensor>> {
        self.passes.report(self.try_backward(upstream)).map(Vec::into_iter)
    }

    fn try_backward(&self, upstream: &Tensor) -> Result<Vec<Tensor>> {
        let mut backward = self.passes.begin_backward(self.group, self.call, &self.inputs)?;
        let tracked = || self.inputs.iter().filter(|input| input.track_op());
        if backward.is_known() {
            backward.finish(None)?;
            return Ok(tracked().map(|input| input.zeros_like()).collect::<candle_core::Result<_>>()?);
        }
        if let Some(graph) = lock(&self.graph).take() {
            return self.backward_of(graph, backward, upstream);
        }
        let boundary = backward.take_boundary()?;
        let moved = boundary.is_some();
        let (first, others) = (&self.inputs[0], &self.inputs[1..]);
        // Nobody looks at the input meanwhile, so that it need not be copied.
        let restores = !moved
            && first.track_op()
            && tensor_storage::owns_plain_storage(first)
            && !others.iter().any(|other| tensor_storage::share_storage(first, other));
        let leaf = match boundary {
            Some(values) => self.passes.leaves().fill(values, first.shape())?,
            None if restores => self.passes.leaves().fill(tensor_storage::take(first)?, first.shape())?,
            None => leaf_of(first)?,
        };
        let mut gradients = self.recompute(&mut backward, leaf.clone(), upstream);
        if restores {
            tensor_storage::fill(first, self.passes.leaves().take(&leaf)?)?;
            // The closure has captured a view of the input.
            if gradients.as_ref().is_err_and(tensor_storage::is_of_vacant) {
                gradients = self.recompute(&mut backward, leaf_of(first)?, upstream);
            }
        }
        if moved {
            backward.return_boundary(self.passes.leaves().take(&leaf)?)?;
        }
        self.finish(backward, gradients)
    }

    /// Computes the segment again from its first input, and goes back through it.
    fn recompute(&self, backward: &mut Backward, first: Tensor, upstream: &Tensor) -> Result<Gradients> {
        let mut leaves = vec![first];
        for input in &self.inputs[1..] {
            leaves.push(leaf_of(input)?);
        }
        let fingerprint = self.fingerprint.filter(|_| backward.has_inputs());
        let mut differs = false;
        let gradients = backward.compute(|sink| {
            let mut store = ops::recompute(|| {
                let output = (self.run)(&leaves)?;
                sink.note_recomputed()?;
                if output.shape() != upstream.shape() {
                    bail!("a segment gave {:?} and, run again, {:?}", upstream.shape(), output.shape())
                }
                // The value of a closing layer is not computed again.
                let again = fingerprint_of(&output);
                differs = fingerprint.zip(again).is_some_and(|(once, again)| once != again);
                if differs {
                    bail!("a segment gave two outputs")
                }
                output.apply_op1(Inject(upstream.clone()))?.backward()
            })?;
            let of_inputs: Vec<Option<Tensor>> = leaves.iter().map(|leaf| store.remove(leaf)).collect();
            if of_inputs[0].is_none() && self.inputs[0].track_op() {
                sink.note_cut_input();
            }
            Ok((of_inputs, sink.collect(&mut store)?))
        });
        match differs {
            true => Err(self.passes.not_repeatable(self.group)),
            false => gradients,
        }
    }

    /// The backward of a graph that was kept.
    fn backward_of(&self, graph: Graph, mut backward: Backward, upstream: &Tensor) -> Result<Vec<Tensor>> {
        let Graph { leaves, end } = graph;
        let gradients = backward.compute(|sink| {
            let mut store = ops::backward(&end.apply_op1(Inject(upstream.clone()))?)?;
            let of_inputs = leaves.iter().map(|leaf| store.remove(leaf)).collect();
            Ok((of_inputs, sink.collect(&mut store)?))
        });
        drop((leaves, end));
        self.finish(backward, gradients)
    }

    /// Hands over the gradients of the parameters, and answers those of the tracked inputs.
    fn finish(&self, backward: Backward, gradients: Result<Gradients>) -> Result<Vec<Tensor>> {
        let (of_inputs, of_parameters) = match gradients {
            Ok(gradients) => gradients,
            Err(error) => {
                backward.finish(None)?;
                return Err(error);
            }
        };
        backward.finish(Some(of_parameters))?;
        let of_tracked = self.inputs.iter().zip(of_inputs).filter(|(input, _)| input.track_op());
        // Candle expects a gradient for every input that it tracks; a mask or the like may have none.
        let complete =
            |(input, gradient): (&Tensor, Option<Tensor>)| gradient.map_or_else(|| input.zeros_like(), Ok);
        Ok(of_tracked.map(complete).collect::<candle_core::Result<_>>()?)
    }
}

const NAME: &str = "segment";

impl CustomOp1 for SegmentOperation {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu_output()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda_output()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.backward(upstream)?.next())
    }
}

impl CustomOp2 for SegmentOperation {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu_output()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda_output()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.backward(upstream)?;
        Ok((gradients.next(), gradients.next()))
    }
}

impl CustomOp3 for SegmentOperation {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu_output()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda_output()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.backward(upstream)?;
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

/// Starts a backward pass from a given upstream gradient: no arithmetic of its own.
struct Inject(Tensor);

impl Inject {
    /// A number that nobody looks at.
    fn result(&self) -> candle_core::Result<TensorStorage> {
        TensorStorage::zeros(1, self.0.dtype(), self.0.device())
    }
}

impl CustomOp1 for Inject {
    fn name(&self) -> &'static str {
        "upstream gradient"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((self.result()?.into_cpu()?, Shape::from(())))
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((self.result()?.into_cuda()?, Shape::from(())))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
