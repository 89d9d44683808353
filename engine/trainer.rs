//! The trainer: steps, evaluations, commits and exports, each by running a schedule.

use crate::checkpoint::{Progress, Stores, parameter_rows};
use crate::engine::Config;
use crate::error::{Error, Result};
use crate::executor::{ComputeRequest, Executor, Memory};
use crate::layout::TableEntry;
use crate::pass::{GradientSink, Granted, Mode, Passes, ScheduledPass, lock};
use crate::plan::Plan;
use crate::registry::{GroupTensors, Parameter};
use crate::schedule::Operation;
use crate::trace::Trace;
use crate::work::{Shared, StepContext};
use candle_core::Tensor;
use crossbeam::channel::{Sender, unbounded};
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::AdamWStep;
use ferrozero_offload::{Arena, Budget, Notice, Tier, memory};
use safetensors::tensor::{Dtype, View};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// What one optimizer step did.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss over the micro-batches.
    pub loss: f32,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Seconds from call to return. Updates may go on behind it.
    pub step_s: f64,
    /// Share of that in which the training thread waited for a tier, 0 to 1.
    pub exposed_stall: f64,
    /// Operations that finished since the last step's report.
    pub trace: Trace,
}

/// What a run uses, against what its plan said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Peak bytes leased of the host arena.
    pub peak_host_bytes: u64,
    /// Host bytes of the plan.
    pub planned_host_bytes: u64,
    /// Peak bytes of device memory: leased, and on the CPU device what the heap held beyond its level at the plan.
    /// Without the counting allocator only what is leased.
    pub peak_device_bytes: u64,
    /// Device bytes of the plan.
    pub planned_device_bytes: u64,
    /// Bytes of all files of the disk tier.
    pub disk_bytes: u64,
}

/// Trains a model by a plan.
pub struct Trainer {
    config: Config,
    plan: Plan,
    passes: Passes,
    tensors: Arc<GroupTensors>,
    executor: Arc<Executor>,
    stores: Stores,
    host: Budget,
    device: Budget,
    notices: Vec<Notice>,
    base_heap_bytes: u64,
    peak_heap_bytes: u64,
    learning_rate: f64,
    step: u64,
    committed: bool,
    train_schedule: Vec<Operation>,
    evaluate_schedule: Vec<Operation>,
}

impl Trainer {
    pub(crate) fn start(
        config: Config,
        plan: Plan,
        parameters: Vec<Parameter>,
        passes: Passes,
        stores: Stores,
    ) -> Result<Self> {
        memory::reset_peak();
        let base_heap_bytes = memory::current_bytes();
        // Freed tensors are kept for the next step, within what the plan grants.
        memory::set_cache_limit_bytes(base_heap_bytes + plan.heap_bytes());
        let threads =
            config.threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
        let pool = Pool::new(threads).map_err(|error| Error::Kernel(error.to_string()))?;
        let tensors = Arc::new(GroupTensors::new(&plan.layout, &parameters));
        let host = Budget::new(Tier::Host, plan.host_bytes());
        let device = Budget::new(Tier::Device, plan.device_buffer_bytes());
        let arenas = [(Tier::Host, &host), (Tier::Device, &device)].map(|(tier, budget)| {
            let bytes = budget.limit_bytes() as usize;
            (bytes > 0).then(|| Arena::new(budget, bytes).map(|arena| (tier, arena))).transpose()
        });
        let mut by_tier = HashMap::new();
        let mut notices = vec![];
        for arena in arenas {
            if let Some((tier, arena)) = arena? {
                notices.extend(arena.notices().iter().cloned());
                by_tier.insert(tier, arena);
            }
        }
        let mut buffers = vec![];
        for buffer in &plan.arrangement.buffers {
            let arena = by_tier
                .get(&buffer.tier)
                .ok_or_else(|| crate::work::internal("a buffer outside the arenas"))?;
            buffers.push(arena.lease(buffer.bytes)?);
        }
        for store in stores.state.iter().chain(&stores.scratch) {
            notices.extend(store.notices().iter().cloned());
        }
        notices.dedup();
        let shared = Shared {
            layout: (*plan.layout).clone(),
            calls: plan.calls.clone(),
            parameters,
            seed: config.seed,
            pool,
        };
        let memory = Memory { buffers, extents: stores.extents.clone() };
        let executor = Arc::new(Executor::start(Arc::new(shared), &plan.arrangement, memory)?);
        let this = Self {
            learning_rate: plan.adamw.learning_rate,
            step: stores.resumed.as_ref().map_or(0, |progress| progress.step),
            committed: stores.resumed.is_some(),
            train_schedule: plan.schedule(|builder| builder.train()),
            evaluate_schedule: plan.schedule(|builder| builder.evaluate()),
            config,
            plan,
            passes,
            tensors,
            executor,
            stores,
            host,
            device,
            notices,
            base_heap_bytes,
            peak_heap_bytes: 0,
        };
        let bring_home = match this.committed {
            true => this.plan.schedule(|builder| builder.restore()),
            false => this.plan.schedule(|builder| builder.initialize()),
        };
        let context = this.context(None);
        this.executor.run(bring_home, context)?;
        this.executor.drain()?;
        Ok(this)
    }

    fn context(&self, collector: Option<Sender<crate::work::Collected>>) -> Arc<StepContext> {
        let adamw = &self.plan.adamw;
        Arc::new(StepContext {
            adamw: AdamWStep {
                learning_rate: self.learning_rate,
                beta1: adamw.beta1,
                beta2: adamw.beta2,
                epsilon: adamw.epsilon,
                weight_decay: adamw.weight_decay,
                step: self.step + 1,
                gradient_scale: 1.0,
            },
            gradient_scale: 1.0 / self.plan.accumulate as f32,
            clip: self.plan.clip,
            norm: OnceLock::new(),
            collector,
        })
    }

    /// The plan that is followed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What could not be had as wished, such as pinned memory, with one sentence each.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Optimizer steps made so far, those before a resume included.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Sets the learning rate of the steps to come.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        self.learning_rate = learning_rate;
    }

    /// One optimizer step. `loss` computes the loss of the micro-batch whose number, from 0, it is given.
    ///
    /// Returns when the gradients of all parameters are known. Updates that the next step does not need at once go on behind.
    ///
    /// # Errors
    /// Whatever `loss` returns, [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`], [`Error::MissingGradient`],
    /// [`Error::OrderChanged`], and errors of the tiers. After an error the trainer is stopped: the last commit
    /// is where to go on.
    pub fn step(&mut self, loss: impl FnMut(usize) -> candle_core::Result<Tensor>) -> Result<StepReport> {
        let result = self.try_step(loss);
        if let Err(error) = &result {
            self.executor.stop(&error.to_string())?;
        }
        result
    }

    fn try_step(&mut self, mut loss: impl FnMut(usize) -> candle_core::Result<Tensor>) -> Result<StepReport> {
        let started = Instant::now();
        self.executor.run(self.train_schedule.clone(), self.context(None))?;
        let pass = self.pass(true);
        let mut sum = 0.0;
        for micro_batch in 0..self.plan.accumulate {
            sum += f64::from(self.micro_batch(&pass, || loss(micro_batch))?);
        }
        let (norm, trace) = self.executor.await_norm()?;
        self.step += 1;
        self.note_heap();
        let step_s = started.elapsed().as_secs_f64();
        Ok(StepReport {
            step: self.step,
            loss: (sum / self.plan.accumulate as f64) as f32,
            gradient_norm: norm.norm,
            learning_rate: self.learning_rate,
            step_s,
            exposed_stall: *lock(&pass.stall_s) / step_s,
            trace,
        })
    }

    fn pass(&self, train: bool) -> Arc<ScheduledPass> {
        Arc::new(ScheduledPass {
            executor: self.executor.clone(),
            layout: self.plan.layout.clone(),
            tensors: self.tensors.clone(),
            train,
            stall_s: Mutex::new(0.0),
            resident_gradients: Mutex::default(),
        })
    }

    fn micro_batch(
        &self,
        pass: &Arc<ScheduledPass>,
        loss: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> Result<f32> {
        self.attach(pass)?;
        let step = self.step + 1;
        let (loss, mut store) = self.passes.within(Mode::Scheduled(pass.clone()), || {
            let loss = loss()?;
            let value = loss.to_scalar::<f32>()?;
            if !value.is_finite() {
                return self.passes.report(Err(Error::NonFiniteLoss { step, loss: value }));
            }
            Ok((value, loss.backward()?))
        })?;
        let layout = &self.plan.layout;
        let mut sink = GradientSink::new(layout, &self.tensors, layout.resident(), &pass.resident_gradients);
        let gradients = sink.collect(&mut store)?;
        drop(store);
        match sink.missing() {
            missing if missing.is_empty() => {}
            names => return Err(Error::MissingGradient { names }),
        }
        self.detach(pass, Some(gradients))?;
        Ok(loss)
    }

    fn attach(&self, pass: &ScheduledPass) -> Result<()> {
        let mut granted = Granted::begin(&self.executor, &pass.stall_s, ComputeRequest::Attach)?;
        let slot = granted.grant()?.held.slot.replace(vec![]);
        self.tensors.fill(self.plan.layout.resident(), slot.unwrap_or_default())?;
        granted.finish()
    }

    fn detach(&self, pass: &ScheduledPass, gradients: Option<Vec<crate::vacancy::DeviceRun>>) -> Result<()> {
        let mut granted = Granted::begin(&self.executor, &pass.stall_s, ComputeRequest::Detach)?;
        let held = &mut granted.grant()?.held;
        held.slot = Some(self.tensors.take(self.plan.layout.resident())?);
        if gradients.is_some() {
            held.gradients = gradients;
        }
        granted.finish()
    }

    /// Runs `pass` once through all segments without gradients, and gives back what it returns.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn evaluate<T>(&mut self, pass: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
        let result = self.try_evaluate(pass);
        if let Err(error) = &result {
            self.executor.stop(&error.to_string())?;
        }
        result
    }

    fn try_evaluate<T>(&mut self, run: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
        self.executor.run(self.evaluate_schedule.clone(), self.context(None))?;
        let pass = self.pass(false);
        self.attach(&pass)?;
        let result = self.passes.within(Mode::Scheduled(pass.clone()), run)?;
        self.detach(&pass, None)?;
        self.note_heap();
        Ok(result)
    }

    /// Makes the state durable, together with a value of the caller's, and answers the number of the commit. A run that
    /// resumes goes on from here, and finds the value in [`Engine::resumed`](crate::Engine::resumed).
    ///
    /// # Errors
    /// [`Error::Configuration`] without a folder, and errors of the disk tier.
    pub fn commit(&mut self, user: serde_json::Value) -> Result<u64> {
        let Some(store) = self.stores.state.clone() else {
            return Err(Error::Configuration("a commit needs a folder: set directory (--dir)".into()));
        };
        let first = !self.committed;
        self.executor.run(self.plan.schedule(|builder| builder.commit(first)), self.context(None))?;
        self.executor.drain()?;
        let progress = Progress { step: self.step, parameters: parameter_rows(&self.plan.layout) };
        let generation = store
            .commit(serde_json::json!({ "engine": progress, "user": user }))
            .map_err(|source| Error::Disk { step: self.step + 1, source })?;
        self.committed = true;
        Ok(generation)
    }

    /// Values of a parameter, brought from wherever they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an unknown name, and errors of the tiers.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>> {
        let (group, index, entry) = self
            .entries()
            .find(|(_, _, entry)| entry.name == name)
            .ok_or_else(|| Error::Unsupported(format!("the model has no parameter {name}")))?;
        let piece_elements = self.plan.layout.piece_elements;
        let first = entry.offset_elements / piece_elements;
        let last = (entry.offset_elements + entry.elements.max(1) - 1) / piece_elements;
        let mut values = vec![0.0; entry.elements];
        let (sender, received) = unbounded();
        let schedule = self.plan.schedule(|builder| builder.collect(group, first..last + 1));
        self.executor.run(schedule, self.context(Some(sender)))?;
        self.executor.drain()?;
        for piece in received.try_iter().filter(|piece| piece.entry == index) {
            values[piece.entry_start..piece.entry_start + piece.values.len()].copy_from_slice(&piece.values);
        }
        Ok(values)
    }

    /// Names and shapes of all parameters, in the order of their names.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut all: Vec<_> =
            self.entries().map(|(_, _, entry)| (entry.name.clone(), entry.shape.clone())).collect();
        all.sort();
        all
    }

    fn entries(&self) -> impl Iterator<Item = (usize, usize, &TableEntry)> {
        let groups = self.plan.layout.groups.iter().enumerate();
        groups.flat_map(|(group, of)| {
            of.table.iter().enumerate().map(move |(index, entry)| (group, index, entry))
        })
    }

    /// SHA-256 of all master parameters in the order of their names, as little-endian bytes. Equal digests mean weights
    /// that are equal to the bit.
    ///
    /// # Errors
    /// Errors of the tiers.
    pub fn weights_digest(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for (name, _) in self.parameters() {
            hasher.update(name.as_bytes());
            for value in self.parameter(&name)? {
                hasher.update(value.to_le_bytes());
            }
        }
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Writes all parameters to a safetensors file, one after another: the memory of one parameter suffices.
    ///
    /// # Errors
    /// [`Error::File`] and errors of the tiers.
    pub fn export_safetensors(&self, path: &Path) -> Result<()> {
        let failure = Mutex::new(None);
        let parameters = self.parameters();
        let views = parameters.iter().map(|(name, shape)| {
            (name.clone(), ParameterView { trainer: self, name, shape, failure: &failure })
        });
        let partial = path.with_extension("safetensors.partial");
        let written = safetensors::serialize_to_file(views, None, &partial);
        let failed = |source| Error::File { path: path.to_owned(), source };
        if let Some(error) = lock(&failure).take() {
            let _ = std::fs::remove_file(&partial);
            return Err(error);
        }
        written.map_err(|error| failed(std::io::Error::other(error)))?;
        std::fs::rename(&partial, path).map_err(failed)
    }

    fn note_heap(&mut self) {
        self.peak_heap_bytes =
            self.peak_heap_bytes.max(memory::peak_bytes().saturating_sub(self.base_heap_bytes));
    }

    /// Peak bytes so far against those of the plan.
    pub fn usage(&self) -> Usage {
        Usage {
            peak_host_bytes: self.host.peak_bytes(),
            planned_host_bytes: self.plan.host_bytes(),
            peak_device_bytes: self.device.peak_bytes() + self.peak_heap_bytes,
            planned_device_bytes: self.plan.device_bytes(),
            disk_bytes: self.stores.disk_bytes(),
        }
    }

    /// Settings of the run.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

/// A parameter that is fetched at the moment at which it is written to a file.
struct ParameterView<'a> {
    trainer: &'a Trainer,
    name: &'a str,
    shape: &'a [usize],
    failure: &'a Mutex<Option<Error>>,
}

impl View for ParameterView<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // The trait has no room for an error: it is remembered, and the file thrown away.
        let values = self.trainer.parameter(self.name).unwrap_or_else(|error| {
            lock(self.failure).get_or_insert(error);
            vec![0.0; self.shape.iter().product()]
        });
        Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}
