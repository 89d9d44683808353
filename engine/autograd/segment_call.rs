//! What a segment does at the moment it is called: nothing outside of a step, a measured trial in the
//! rehearsal, and what the schedule says in a training step or an evaluation.

use crate::autograd::dropout::{Dropping, Place};
use crate::autograd::gradient::{GradientObserver, GradientSink, Observation, ResidentGradients};
use crate::autograd::output::Output;
use crate::autograd::registry::GroupTensors;
use crate::autograd::rehearsal::{Rehearsal, Trial};
use crate::device::compute::{ComputeDevice, Done};
use crate::device::tensor_storage::{self, Leaves, TensorStorage};
use crate::error::{Error, Result, internal};
use crate::execution::executor::{ComputeRequest, Executor, Grant};
use crate::schedule::layout::Layout;
use crate::schedule::operation::{Call, Operation, Queue};
use crate::sync::lock;
use candle_core::{Tensor, TensorId};
use ferrozero_offload::Baton;
use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// The kind of pass that is under way.
#[derive(Clone)]
pub enum Mode {
    /// None.
    Idle,
    /// The rehearsal that finds order, shapes and working memory.
    Rehearsal(Arc<Rehearsal>),
    /// A training step or an evaluation.
    Scheduled(Arc<ScheduledPass>),
}

/// A pass that follows a schedule.
pub struct ScheduledPass {
    /// Runs the schedule.
    pub executor: Arc<Executor>,
    /// What computes.
    pub device: Arc<ComputeDevice>,
    /// Groups.
    pub layout: Arc<Layout>,
    /// The tensors of the model.
    pub tensors: Arc<GroupTensors>,
    /// What the rehearsal saw of each call.
    pub calls: Arc<[Call]>,
    /// Whether memory is planned for inputs of their size in the rehearsal.
    pub bounds_inputs: bool,
    /// Whether gradients are wanted.
    pub train: bool,
    /// Seed of the run, and number of the step.
    pub seed_and_step: (u64, u64),
    /// What computing waited for.
    pub stall: Mutex<Stall>,
    /// Whose turn it is of the micro-batches that run vertically.
    pub baton: Baton,
    /// Gradients of resident parameters that segments use, of each of those micro-batches.
    pub resident_gradients: Vec<Mutex<ResidentGradients>>,
    /// Who looks at gradients.
    pub observer: Option<GradientObserver>,
    /// What losses are multiplied with.
    pub loss_scale: f32,
}

impl ScheduledPass {
    /// Those of the micro-batch that runs.
    pub fn resident_gradients(&self) -> &Mutex<ResidentGradients> {
        &self.resident_gradients[self.baton.holder() % self.resident_gradients.len()]
    }

    /// Who looks at the gradients of a micro-batch.
    pub fn observation(&self, micro_batch: usize) -> Option<Observation> {
        let observer = self.observer.clone()?;
        Some(Observation { observer, micro_batch, loss_scale: self.loss_scale })
    }

    /// Whether the inputs of a call are of sizes that memory is planned for.
    fn check_inputs(&self, call: usize, moves: bool, inputs: &[&Tensor]) -> Result<()> {
        let Call { group, inputs: planned, .. } = &self.calls[call];
        for (at, (input, planned)) in inputs.iter().zip(planned).enumerate() {
            let (elements, planned_elements) = (input.elem_count(), planned.iter().product::<usize>());
            // What a step keeps may grow faster than its inputs, as attention does. A forward alone keeps
            // nothing, and texts of other lengths and numbers are what it is asked for.
            let is_within = match self.train {
                true => {
                    let mut sizes = input.dims().iter().zip(planned);
                    input.rank() == planned.len() && sizes.all(|(size, planned)| size <= planned)
                }
                false => elements <= planned_elements,
            };
            // A boundary that leaves the device has a place of its size.
            let has_place = !(moves && at == 0) || elements == planned_elements;
            if self.bounds_inputs && !is_within || !has_place {
                let segment = self.layout.groups[*group].name.clone();
                let found = input.dims().to_vec();
                return Err(Error::LargerThanPlanned { segment, found, planned: planned.clone() });
            }
        }
        Ok(())
    }

    /// What dropouts do in a micro-batch, within a call or outside of segments.
    pub fn dropping(&self, micro_batch: usize, call: Option<usize>) -> Dropping {
        let (seed, step) = self.seed_and_step;
        match self.train {
            true => Dropping::at(Place { seed, step, micro_batch, call }),
            false => Dropping::Off,
        }
    }

    /// Gives the resident parameters to their tensors.
    pub fn attach(self: &Arc<Self>) -> Result<()> {
        let mut granted = Granted::begin(self, ComputeRequest::Attach)?;
        let slot = granted.grant()?.held.slot.replace(vec![]);
        self.tensors.fill(self.layout.resident(), slot.unwrap_or_default())?;
        granted.finish()
    }

    /// Ends a micro-batch with the gradients of the resident parameters. The last one takes the parameters
    /// back.
    pub fn detach(self: &Arc<Self>, gradients: Option<Vec<TensorStorage>>) -> Result<()> {
        let mut granted = Granted::begin(self, ComputeRequest::Detach)?;
        let held = &mut granted.grant()?.held;
        if held.slot.is_some() {
            held.slot = Some(self.tensors.take(self.layout.resident())?);
        }
        if gradients.is_some() {
            held.gradients = gradients;
        }
        granted.finish()
    }
}

/// Waits for memory of compute operations.
#[derive(Default)]
pub struct Stall {
    /// Seconds that the training thread waited.
    host_s: f64,
    /// From when to when a CUDA device had nothing to compute for it.
    device: Vec<(Done, Done)>,
}

impl Stall {
    /// Seconds: those of a device that works while the host goes on, where its driver tells, and otherwise
    /// the host's.
    pub fn seconds(&self) -> f64 {
        let of_device = self.device.iter().map(|(asked, started)| asked.seconds_until(started));
        match of_device.sum::<Option<f64>>() {
            Some(seconds) if !self.device.is_empty() => seconds,
            _ => self.host_s,
        }
    }
}

/// The state that the engine shares with its segments.
#[derive(Clone)]
pub struct Passes(Arc<PassState>);

struct PassState {
    mode: Mutex<Mode>,
    /// The engine's own error behind the candle error that went through the user's code.
    error: Mutex<Option<Error>>,
    names: Mutex<Arc<Vec<String>>>,
    /// Leaves of segments' own graphs.
    leaves: Leaves,
    /// Vacant tensors whose storage the output of a segment has, by the output's number.
    lenders: Mutex<HashMap<TensorId, Tensor>>,
}

impl Passes {
    /// No pass under way.
    pub fn new() -> Self {
        let names = Mutex::new(Arc::new(vec![]));
        Self(Arc::new(PassState {
            mode: Mutex::new(Mode::Idle),
            error: Mutex::new(None),
            names,
            leaves: Leaves::default(),
            lenders: Mutex::default(),
        }))
    }

    /// Makes the names of segments known for errors.
    pub fn set_segment_names(&self, names: Vec<String>) {
        *lock(&self.0.names) = Arc::new(names);
    }

    /// Runs `pass` with segments in the given mode.
    pub fn within<T>(&self, mode: Mode, pass: impl FnOnce() -> T) -> T {
        *lock(&self.0.error) = None;
        *lock(&self.0.mode) = mode;
        let result = pass();
        *lock(&self.0.mode) = Mode::Idle;
        lock(&self.0.lenders).clear();
        result
    }

    /// The engine's own error behind a candle error that came through the user's code, where there is one.
    pub fn explain<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        result.map_err(|error| lock(&self.0.error).take().unwrap_or(Error::Candle(error)))
    }

    /// Remembers an engine error while a candle error with its text goes through the user's code.
    pub fn report<T>(&self, result: Result<T>) -> candle_core::Result<T> {
        result.map_err(|error| match error {
            Error::Candle(error) => error,
            error => {
                let text = error.to_string();
                lock(&self.0.error).get_or_insert(error);
                candle_core::Error::Msg(text)
            }
        })
    }

    /// Leaves of segments' own graphs.
    pub fn leaves(&self) -> &Leaves {
        &self.0.leaves
    }

    /// Notes that the output of a segment has the storage of `lender`, a tensor that is nobody else's.
    pub fn note_output(&self, output: &Tensor, lender: Tensor) {
        lock(&self.0.lenders).insert(output.id(), lender);
    }

    /// Takes the storage out of the output of a segment, or of another tensor.
    pub fn take_output(&self, output: &Tensor) -> candle_core::Result<TensorStorage> {
        let mut run = tensor_storage::take(output)?;
        run.set_lender(lock(&self.0.lenders).remove(&output.id()));
        Ok(run)
    }

    fn mode(&self) -> Mode {
        lock(&self.0.mode).clone()
    }

    fn outside(&self, group: usize) -> Error {
        Error::OutsideStep { segment: self.name(group) }
    }

    /// The error of a segment whose recompute gave something else.
    pub fn not_repeatable(&self, group: usize) -> Error {
        Error::NotRepeatable { segment: self.name(group) }
    }

    fn name(&self, group: usize) -> String {
        let names = lock(&self.0.names).clone();
        names.get(group).cloned().unwrap_or_else(|| format!("number {group}"))
    }

    /// A segment's forward begins.
    pub fn begin_forward(&self, group: usize, kind: TypeId, inputs: &[&Tensor]) -> Result<Forward> {
        match self.mode() {
            Mode::Idle => Err(self.outside(group)),
            Mode::Rehearsal(rehearsal) => Ok(Forward::Trial(rehearsal.begin_forward(group, kind, inputs)?)),
            Mode::Scheduled(pass) => {
                let mut granted = Granted::begin(&pass, ComputeRequest::Forward(group))?;
                let Grant { operation, held, .. } = granted.grant()?;
                if let Operation::Forward { call, .. } = *operation {
                    pass.check_inputs(call, held.passage.is_some(), inputs)?;
                }
                Ok(Forward::Scheduled { pass, group, granted })
            }
        }
    }

    /// A segment's backward begins.
    pub fn begin_backward(&self, group: usize, call: usize, inputs: &[Tensor]) -> Result<Backward> {
        match self.mode() {
            Mode::Idle => Err(self.outside(group)),
            Mode::Rehearsal(rehearsal) => Ok(Backward::Trial(rehearsal.begin_backward(call, inputs)?)),
            Mode::Scheduled(pass) => {
                let granted = Granted::begin(&pass, ComputeRequest::Backward(call))?;
                Ok(Backward::Scheduled { pass, group, granted })
            }
        }
    }
}

/// A compute operation in the training thread's hands. Dropped unfinished, it stops the run.
pub struct Granted {
    pass: Arc<ScheduledPass>,
    grant: Option<Grant>,
}

impl Granted {
    /// Waits for the turn of the micro-batch that asks, and then for a compute operation, which counts as a
    /// wait.
    pub fn begin(pass: &Arc<ScheduledPass>, request: ComputeRequest) -> Result<Self> {
        let ScheduledPass { executor, device, stall, baton, .. } = &**pass;
        baton.await_turn()?;
        let asked = device.record(Queue::Compute)?;
        let asked_at = Instant::now();
        let grant = executor.begin(request)?;
        lock(stall).host_s += asked_at.elapsed().as_secs_f64();
        let mut granted = Self { pass: pass.clone(), grant: Some(grant) };
        let held = &mut granted.grant()?.held;
        device.wait(Queue::Compute, &held.earlier)?;
        held.started = device.record(Queue::Compute)?;
        lock(stall).device.extend(asked.clone().zip(held.started.clone()));
        held.asked = asked;
        Ok(granted)
    }

    /// The grant, to take from and put back into.
    pub fn grant(&mut self) -> Result<&mut Grant> {
        self.grant.as_mut().ok_or_else(|| internal("a compute operation was finished twice"))
    }

    /// Hands the memory back.
    pub fn finish(mut self) -> Result<()> {
        let done = self.pass.device.record(Queue::Compute)?;
        if let Some(mut grant) = self.grant.take() {
            grant.held.done = done;
            self.pass.executor.finish(grant)?;
            self.pass.baton.end_turn();
        }
        Ok(())
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            let _ = self.pass.executor.stop("a segment did not finish");
            let _ = self.pass.executor.finish(grant);
        }
    }
}

/// A segment's forward under way.
pub enum Forward {
    /// In the rehearsal.
    Trial(Trial),
    /// As scheduled.
    Scheduled {
        /// The pass.
        pass: Arc<ScheduledPass>,
        /// The group.
        group: usize,
        /// Its memory.
        granted: Granted,
    },
}

impl Forward {
    /// Runs the module with its parameters in place; `run` is told whether its graph is kept.
    pub fn compute(&mut self, run: impl Fn(bool) -> candle_core::Result<Output>) -> Result<Output> {
        match self {
            Self::Trial(trial) => trial.forward(run),
            Self::Scheduled { pass, group, granted } => {
                let keeps = matches!(granted.grant()?.operation, Operation::Forward { keeps: true, .. });
                with_parameters(pass, *group, granted, || run(keeps))
            }
        }
    }

    /// The call that this is in the graph; none where no graph is kept.
    pub fn graph_call(&mut self) -> Option<usize> {
        match self {
            Self::Trial(trial) => trial.goes_back().then(|| trial.call()),
            Self::Scheduled { pass, granted, .. } => match granted.grant().ok()?.operation {
                Operation::Forward { call, .. } if pass.train && pass.calls[call].backward.is_some() => {
                    Some(call)
                }
                _ => None,
            },
        }
    }

    /// Whether the segment's input leaves the device now.
    pub fn moves_boundary(&mut self) -> bool {
        match self {
            Self::Trial(trial) => trial.moves_boundary(),
            Self::Scheduled { granted, .. } => {
                granted.grant().is_ok_and(|grant| grant.held.passage.is_some())
            }
        }
    }

    /// Ends it, with the boundary if that leaves the device.
    pub fn finish(self, boundary: Option<TensorStorage>) -> Result<()> {
        match self {
            Self::Trial(trial) => trial.finish(),
            Self::Scheduled { mut granted, .. } => {
                if let Some(boundary) = boundary {
                    granted.grant()?.held.passage.get_or_insert_default().boundary = boundary;
                }
                granted.finish()
            }
        }
    }
}

/// A segment's backward under way.
pub enum Backward {
    /// In the rehearsal.
    Trial(Trial),
    /// As scheduled.
    Scheduled {
        /// The pass.
        pass: Arc<ScheduledPass>,
        /// The group.
        group: usize,
        /// Its memory.
        granted: Granted,
    },
}

/// Gradients of the inputs and of the group's parameters.
pub type Gradients = (Vec<Option<Tensor>>, Vec<TensorStorage>);

impl Backward {
    /// Whether the rehearsal has seen a segment like this one, so that it need not run again.
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Trial(trial) if trial.is_known())
    }

    /// Whether the inputs are those of the forward: in a rehearsal a boundary that left the device is
    /// replaced.
    pub fn has_inputs(&self) -> bool {
        !matches!(self, Self::Trial(trial) if trial.moves_boundary())
    }

    /// The boundary, if it had left the device.
    pub fn take_boundary(&mut self) -> Result<Option<TensorStorage>> {
        match self {
            Self::Trial(trial) => trial.boundary(),
            Self::Scheduled { granted, .. } => {
                let passage = granted.grant()?.held.passage.as_mut();
                Ok(passage.map(|passage| std::mem::take(&mut passage.boundary)))
            }
        }
    }

    /// The boundary is used up. A device with memory of its own keeps the storage for the next one.
    pub fn return_boundary(&mut self, boundary: TensorStorage) -> Result<()> {
        let Self::Scheduled { pass, granted, .. } = self else { return Ok(()) };
        if let Some(passage) = granted.grant()?.held.passage.as_mut()
            && pass.device.is_apart()
        {
            passage.spare = boundary;
        }
        Ok(())
    }

    /// Runs the module and its backward with the parameters in place.
    pub fn compute(
        &mut self,
        run: impl FnOnce(&mut GradientSink) -> candle_core::Result<Gradients>,
    ) -> Result<Gradients> {
        match self {
            Self::Trial(trial) => trial.backward(run),
            Self::Scheduled { pass, group, granted } => {
                let resident = pass.resident_gradients();
                let micro_batch = granted.grant()?.operation.micro_batch().unwrap_or(0);
                let mut sink = GradientSink::new(&pass.layout, &pass.tensors, *group, resident)
                    .observed(pass.observation(micro_batch));
                let gradients = with_parameters(pass, *group, granted, || run(&mut sink))?;
                match sink.missing() {
                    missing if missing.is_empty() => Ok(gradients),
                    names => Err(Error::MissingGradient { names }),
                }
            }
        }
    }

    /// Ends it, with the gradients of the parameters.
    pub fn finish(self, gradients: Option<Vec<TensorStorage>>) -> Result<()> {
        match self {
            Self::Trial(trial) => trial.finish(),
            Self::Scheduled { mut granted, .. } => match gradients {
                Some(gradients) => {
                    granted.grant()?.held.gradients = Some(gradients);
                    granted.finish()
                }
                // Dropped unfinished: a backward pass that failed stops the run.
                None => Ok(()),
            },
        }
    }
}

fn with_parameters<T>(
    pass: &ScheduledPass,
    group: usize,
    granted: &mut Granted,
    run: impl FnOnce() -> candle_core::Result<T>,
) -> Result<T> {
    let Grant { operation, held, .. } = granted.grant()?;
    let dropping = match *operation {
        Operation::Forward { call, micro_batch, .. } | Operation::Backward { call, micro_batch, .. } => {
            pass.dropping(micro_batch, Some(call))
        }
        _ => Dropping::Off,
    };
    let slot = held.slot.take().ok_or_else(|| internal("a grant without its slot"))?;
    pass.tensors.fill(group, slot)?;
    let result = dropping.during(run);
    granted.grant()?.held.slot = Some(pass.tensors.take(group)?);
    Ok(result?)
}
