//! The trainer: steps, evaluations, commits and exports, each by running a schedule.

use crate::autograd::dropout::Dropping;
use crate::autograd::gradient::{Gradient, GradientObserver, GradientSink};
use crate::autograd::registry::{GroupTensors, Parameter};
use crate::autograd::segment_call::{Mode, Passes, ScheduledPass};
use crate::config::Config;
use crate::device::compute::{BufferMemory, ComputeDevice, DeviceCounter};
use crate::disk::safetensors::export_safetensors;
use crate::disk::stores::{Progress, Stores};
use crate::error::{Error, Result, internal};
use crate::execution::executor::{Executor, Memory};
use crate::execution::loss_scale::LossScale;
use crate::execution::perform::{Performer, StateCommit, StepContext};
use crate::planner::optimizer::check_learning_rate;
use crate::planner::plan::Plan;
use crate::schedule::layout::{Layout, Put};
use crate::schedule::operation::{Call, Operation, Queue};
use crate::schedule::trace::Trace;
use crate::sync::lock;
use crate::train::vertical::abreast;
use candle_core::{DType, Tensor};
use crossbeam::channel::unbounded;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::AdamWStep;
use ferrozero_kernels::ops;
use ferrozero_offload::{Baton, Budget, Notice, Reservation, Store, Tier};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::train::report::{StepReport, Usage};

/// Pieces that are fetched at a time where a parameter is looked at: enough to keep the disk busy, and little memory.
const PIECES_COLLECTED: usize = 8;

/// Trains a model by a plan.
pub struct Trainer {
    config: Config,
    plan: Plan,
    passes: Passes,
    tensors: Arc<GroupTensors>,
    executor: Arc<Executor>,
    compute: Arc<ComputeDevice>,
    stores: Stores,
    host: Budget,
    device: Budget,
    /// Of the device's own memory, as long as the run has it.
    _device_reservations: Vec<Reservation>,
    notices: Vec<Notice>,
    base_heap_bytes: u64,
    peak_heap_bytes: u64,
    learning_rate: f64,
    step: u64,
    committed: bool,
    /// In f16.
    loss_scale: Option<LossScale>,
    /// Numbers of the updates that the last step left pending.
    pending: Mutex<Option<AdamWStep>>,
    observer: Option<GradientObserver>,
    /// Schedules of a training step, without and with pending updates.
    train_schedules: [Vec<Operation>; 2],
    /// The micro-batch of each compute operation of a training step.
    turns: Vec<usize>,
    /// What the rehearsal saw of each call.
    calls: Arc<[Call]>,
    /// Schedules of an evaluation, without and with pending updates.
    evaluate_schedules: [Vec<Operation>; 2],
}

/// The user's loss of a micro-batch.
type Loss<'a> = dyn Fn(usize) -> candle_core::Result<Tensor> + Sync + 'a;

impl Trainer {
    pub(crate) fn start(
        config: Config,
        plan: Plan,
        parameters: Vec<Parameter>,
        passes: Passes,
        stores: Stores,
        compute: Arc<ComputeDevice>,
    ) -> Result<Self> {
        compute.reset_peak();
        let base_heap_bytes = compute.used_bytes();
        // Freed tensors are kept for the next step, within what the plan grants.
        compute.keep_freed(base_heap_bytes + plan.heap_bytes());
        let threads =
            config.threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
        let pool = Pool::new(threads).map_err(Error::Kernel)?;
        let tensors = Arc::new(GroupTensors::new(&plan.layout, &parameters));
        let host = Budget::new(Tier::Host, plan.host_bytes());
        let device = Budget::new(Tier::Device, plan.device_buffer_bytes());
        let arenas = [(Tier::Host, &host), (Tier::Device, &device)].map(|(tier, budget)| {
            let bytes = budget.limit_bytes() as usize;
            // A device with memory of its own gives its buffers itself.
            let leased = bytes > 0 && !(compute.is_apart() && tier == Tier::Device);
            leased.then(|| compute.host_arena(budget, bytes).map(|arena| (tier, arena))).transpose()
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
        let mut reservations = vec![];
        for buffer in plan.buffer_plan.buffers() {
            if compute.is_apart() && buffer.tier == Tier::Device {
                reservations.push(device.reserve(buffer.bytes as u64)?);
                buffers.push(BufferMemory::Device(compute.f32_zeros(buffer.bytes / 4)?));
                continue;
            }
            let arena = by_tier.get(&buffer.tier).ok_or_else(|| internal("a buffer outside the arenas"))?;
            buffers.push(BufferMemory::Host(arena.lease(buffer.bytes)?));
        }
        for store in stores.state.iter().chain(&stores.scratch) {
            notices.extend(store.notices().iter().cloned());
        }
        // States and scratch say the same of the same disk.
        let mut told = HashSet::new();
        notices.retain(|notice| told.insert((notice.code, notice.text.clone())));
        let performer = Performer {
            layout: (*plan.layout).clone(),
            calls: plan.calls.clone(),
            inits: parameters.into_iter().map(|parameter| parameter.init).collect(),
            initial_values: config.initial_values.clone(),
            seed: config.seed,
            pool,
            device: compute.clone(),
        };
        let memory = Memory { buffers, extents: stores.extents.clone() };
        let executor = Arc::new(Executor::start(Arc::new(performer), &plan.buffer_plan, memory)?);
        // Only clipping leaves updates pending.
        let train_schedules =
            [false, plan.clip.is_some()].map(|pending| plan.schedule(|builder| builder.train(pending)));
        let of_compute = train_schedules[0].iter().filter(|operation| operation.queue() == Queue::Compute);
        let turns = of_compute.map(|operation| operation.micro_batch().unwrap_or(0)).collect();
        let this = Self {
            learning_rate: plan.adamw.learning_rate,
            step: stores.resumed.as_ref().map_or(0, |progress| progress.step),
            committed: stores.resumed.is_some(),
            loss_scale: (config.dtype == DType::F16).then(|| {
                stores
                    .resumed
                    .as_ref()
                    .and_then(|progress| progress.loss_scale)
                    .unwrap_or_else(LossScale::new)
            }),
            pending: Mutex::new(None),
            observer: None,
            train_schedules,
            turns,
            calls: plan.calls.clone().into(),
            evaluate_schedules: [false, plan.clip.is_some()]
                .map(|pending| plan.schedule(|builder| builder.evaluate(pending))),
            config,
            plan,
            passes,
            tensors,
            executor,
            compute,
            stores,
            host,
            device,
            _device_reservations: reservations,
            notices,
            base_heap_bytes,
            peak_heap_bytes: 0,
        };
        let bring_home = match this.committed {
            true => this.plan.schedule(|builder| builder.restore()),
            false => this.plan.schedule(|builder| builder.initialize()),
        };
        this.executor.run(bring_home, Arc::new(this.context()))?;
        this.executor.drain()?;
        Ok(this)
    }

    /// The context of the next schedule, which makes the updates that are pending.
    fn context(&self) -> StepContext {
        let adamw = &self.plan.adamw;
        StepContext {
            adamw: AdamWStep {
                learning_rate: self.learning_rate,
                beta1: adamw.beta1,
                beta2: adamw.beta2,
                epsilon: adamw.epsilon,
                weight_decay: adamw.weight_decay,
                step: self.step + 1,
                gradient_scale: 1.0,
            },
            deferred: lock(&self.pending).take(),
            gradient_scale: 1.0
                / (self.plan.accumulate as f32 * self.loss_scale.map_or(1.0, |scale| scale.scale)),
            loss_scale: self.loss_scale.map(|scale| scale.scale),
            clip: self.plan.clip,
            norm: OnceLock::new(),
            collector: None,
            commit: None,
        }
    }

    /// Starts the schedule for whether updates are pending.
    fn run(&self, schedules: &[Vec<Operation>; 2]) -> Result<Arc<StepContext>> {
        let context = Arc::new(self.context());
        let schedule = schedules[usize::from(context.deferred.is_some())].clone();
        self.executor.run(schedule, context.clone())?;
        Ok(context)
    }

    /// Starts the updates that the last step left pending.
    fn settle(&self) -> Result<()> {
        let context = self.context();
        if context.deferred.is_none() {
            return Ok(());
        }
        self.executor.run(self.plan.schedule(|builder| builder.settle()), Arc::new(context))
    }

    /// The plan that is followed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What could not be had as wished, such as pinned memory, with one sentence each.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// The run's folder, as it was opened.
    #[cfg(feature = "cli")]
    pub(crate) fn folder(&self) -> Option<&ferrozero_offload::Folder> {
        self.stores.state.as_ref()?.folder().map(Arc::as_ref)
    }

    /// Operations that finished since the last step's report. After a commit, everything that was begun is among them.
    ///
    /// # Errors
    /// [`Error::Stopped`] after an error of the executor's.
    pub fn take_trace(&self) -> Result<Trace> {
        self.executor.take_trace()
    }

    /// Optimizer steps made so far, those before a resume included.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Steps so far that were skipped because gradients of f16 had overflowed, those before a resume included.
    pub fn skipped_steps(&self) -> u64 {
        self.loss_scale.map_or(0, |scale| scale.skipped)
    }

    /// Sets the learning rate of the steps to come.
    ///
    /// # Errors
    /// [`Error::Configuration`] if it is negative or not finite; the one before stays.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        check_learning_rate(learning_rate)?;
        self.learning_rate = learning_rate;
        Ok(())
    }

    /// Shows the gradients of the steps to come to `observer`, each parameter's once a micro-batch, in the order of the backward pass
    /// and before it leaves the device; that of a segment that runs twice in a micro-batch is shown in two parts. Takes the
    /// place of an observer that was there before.
    ///
    /// An observer changes no bit of the training. What it allocates is not in the plan. An error of its own ends the step.
    pub fn observe_gradients(
        &mut self,
        observer: impl Fn(Gradient) -> candle_core::Result<()> + Send + Sync + 'static,
    ) {
        self.observer = Some(Arc::new(observer));
    }

    /// One optimizer step. `loss` computes the loss of the micro-batch whose number, from 0, it is given. Where the plan has
    /// micro-batches run vertically, each is computed in a thread of its own, of which one runs at a time.
    ///
    /// Returns when the gradients of all parameters are known. With clipping their updates are made when the next step asks
    /// for the parameters, or whatever else comes next.
    ///
    /// # Errors
    /// Whatever `loss` returns, [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`], [`Error::MissingGradient`],
    /// [`Error::OrderChanged`], and errors of the tiers. After an error the trainer is stopped: the last commit
    /// is where to go on.
    ///
    /// # Panics
    /// Where `loss` panics. The trainer is stopped then too.
    pub fn step(&mut self, loss: impl Fn(usize) -> candle_core::Result<Tensor> + Sync) -> Result<StepReport> {
        self.guarded(|this| this.try_step(loss))
    }

    /// Runs a pass; after an error or a panic, which leave operations behind that nobody will ask for, the trainer is stopped.
    fn guarded<T>(&mut self, pass: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = catch_unwind(AssertUnwindSafe(|| pass(self))).unwrap_or_else(|panic| {
            let _ = self.executor.stop("the user's code panicked");
            resume_unwind(panic)
        });
        let result = result.map_err(|error| self.explain(error));
        if let Err(error) = &result {
            self.executor.stop(&error.to_string())?;
        }
        result
    }

    fn explain(&self, error: Error) -> Error {
        self.compute.explain(error, self.plan.device_bytes())
    }

    fn try_step(&mut self, loss: impl Fn(usize) -> candle_core::Result<Tensor> + Sync) -> Result<StepReport> {
        let _span = tracing::debug_span!("step", step = self.step + 1).entered();
        let started = Instant::now();
        let context = self.run(&self.train_schedules)?;
        let pass = self.pass(true);
        let sum = self.micro_batches(&pass, &loss)?;
        let (norm, trace) = self.executor.await_norm()?;
        if self.plan.clip.is_some() && !norm.overflow {
            // A step that was skipped was none for the optimizer.
            let step = context.adamw.step - self.skipped_steps();
            let numbers = AdamWStep { gradient_scale: norm.factor, step, ..context.adamw.clone() };
            *lock(&self.pending) = Some(numbers);
        }
        self.loss_scale = self.loss_scale.map(|scale| scale.after(norm.overflow));
        self.step += 1;
        if self.plan.updates_at_once {
            self.settle()?;
        }
        self.note_heap();
        let step_s = started.elapsed().as_secs_f64();
        let report = StepReport {
            step: self.step,
            loss: (sum / self.plan.accumulate as f64) as f32,
            gradient_norm: norm.norm,
            skipped: norm.overflow,
            learning_rate: self.learning_rate,
            step_s,
            exposed_stall: lock(&pass.stall).seconds() / step_s,
            trace,
        };
        let StepReport { loss, gradient_norm, exposed_stall, .. } = report;
        tracing::debug!(loss, gradient_norm, step_s, exposed_stall, "done");
        Ok(report)
    }

    fn pass(&self, train: bool) -> Arc<ScheduledPass> {
        let places = if train { self.plan.buffer_plan.vertical } else { 1 };
        let turns = if train { self.turns.clone() } else { vec![] };
        Arc::new(ScheduledPass {
            executor: self.executor.clone(),
            device: self.compute.clone(),
            layout: self.plan.layout.clone(),
            tensors: self.tensors.clone(),
            calls: self.calls.clone(),
            train,
            seed_and_step: (self.config.seed, self.step + 1),
            stall: Mutex::default(),
            baton: Baton::new(turns, self.config.turn_limit),
            bounds_inputs: self.plan.is_limited(),
            resident_gradients: (0..places).map(|_| Mutex::default()).collect(),
            observer: self.observer.clone(),
            loss_scale: self.loss_scale.map_or(1.0, |scale| scale.scale),
        })
    }

    /// Runs all micro-batches of a step, and answers the sum of their losses.
    fn micro_batches(&self, pass: &Arc<ScheduledPass>, loss: &Loss) -> Result<f64> {
        pass.attach()?;
        let mut losses = vec![];
        for micro_batches in self.plan.abreast() {
            let mode = Mode::Scheduled(pass.clone());
            losses.extend(self.passes.within(mode, || self.abreast(pass, loss, micro_batches))?);
        }
        // In their order, however many ran at once.
        Ok(losses.into_iter().fold(0.0, |sum, loss| sum + f64::from(loss)))
    }

    /// Runs micro-batches vertically, and answers their losses. One alone runs in this thread.
    fn abreast(
        &self,
        pass: &Arc<ScheduledPass>,
        loss: &Loss,
        micro_batches: Range<usize>,
    ) -> Result<Vec<f32>> {
        if micro_batches.len() == 1 {
            return micro_batches
                .map(|micro_batch| {
                    let value = self.micro_batch(pass, loss, micro_batch)?;
                    pass.baton.leave();
                    Ok(value)
                })
                .collect();
        }
        let span = tracing::Span::current();
        abreast(&pass.baton, micro_batches, |micro_batch| {
            let _span = span.enter();
            self.compute.bind_thread()?;
            self.micro_batch(pass, loss, micro_batch)
        })
    }

    /// Computes a micro-batch's loss, forward and backward.
    fn micro_batch(&self, pass: &Arc<ScheduledPass>, loss: &Loss, micro_batch: usize) -> Result<f32> {
        let step = self.step + 1;
        let compute = || {
            let dropping = pass.dropping(micro_batch, None);
            let loss = dropping.during(|| ops::before_backward(|| loss(micro_batch)))?;
            let value = self.compute.number(&loss.to_dtype(DType::F32)?)?;
            if !value.is_finite() {
                return self.passes.report(Err(Error::NonFiniteLoss { step, loss: value }));
            }
            match self.loss_scale {
                Some(scale) => {
                    let scaled = (loss.to_dtype(DType::F32)? * f64::from(scale.scale))?;
                    Ok((value, ops::backward(&scaled)?))
                }
                None => Ok((value, ops::backward(&loss)?)),
            }
        };
        let (loss, mut store) = self.passes.explain(self.compute.computing(compute))?;
        let layout = &self.plan.layout;
        let mut sink = GradientSink::new(layout, &self.tensors, layout.resident(), pass.resident_gradients())
            .observed(pass.observation(micro_batch));
        let gradients = sink.collect(&mut store)?;
        drop(store);
        match sink.missing() {
            missing if missing.is_empty() => {}
            names => return Err(Error::MissingGradient { names }),
        }
        pass.detach(Some(gradients))?;
        Ok(loss)
    }

    /// Runs `pass` once through all segments without gradients, and gives back what it returns.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn evaluate<T>(&mut self, pass: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
        self.guarded(|this| this.try_evaluate(pass))
    }

    fn try_evaluate<T>(&mut self, run: impl FnOnce() -> candle_core::Result<T>) -> Result<T> {
        let _span = tracing::debug_span!("evaluation", after_step = self.step).entered();
        self.run(&self.evaluate_schedules)?;
        let pass = self.pass(false);
        pass.attach()?;
        let run = || Dropping::Off.during(|| self.compute.computing(run));
        let result = self.passes.explain(self.passes.within(Mode::Scheduled(pass.clone()), run))?;
        pass.detach(None)?;
        self.note_heap();
        Ok(result)
    }

    /// Makes the state durable, together with a value of the caller's, and answers the number of the commit. A run that
    /// resumes goes on from here, and finds the value in [`Engine::resumed`](crate::Engine::resumed).
    ///
    /// # Errors
    /// [`Error::Configuration`] without a folder, and errors of the disk tier.
    pub fn commit(&mut self, user: serde_json::Value) -> Result<u64> {
        let store = self.begin_commit(user)?;
        self.executor.drain()?;
        Ok(store.committed().map_or(0, |commit| commit.generation))
    }

    /// As [`Self::commit`], without waiting: the state is made durable while the next step computes, whose updates wait for
    /// it. If that fails, a later call says so, and the commit before is where to go on. Dropping the trainer waits for it.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn commit_behind(&mut self, user: serde_json::Value) -> Result<()> {
        self.begin_commit(user).map(drop)
    }

    fn begin_commit(&mut self, user: serde_json::Value) -> Result<Arc<Store>> {
        let Some(store) = self.stores.state.clone() else {
            return Err(Error::Configuration("a commit needs a folder: set Config::directory".into()));
        };
        tracing::debug!(step = self.step, "commit");
        self.settle()?;
        let progress = Progress::new(self.step, &self.plan, self.loss_scale);
        let document = serde_json::json!({ "engine": progress, "user": user });
        let commit = Some(StateCommit { store: store.clone(), document });
        let schedule = self.plan.schedule(|builder| builder.commit(!self.committed));
        self.executor.run(schedule, Arc::new(StepContext { commit, ..self.context() }))?;
        self.committed = true;
        Ok(store)
    }

    /// Values of a parameter, brought from wherever they are.
    ///
    /// # Errors
    /// [`Error::Misuse`] for an unknown name, and errors of the tiers.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.plan.layout.elements_of(name)?];
        self.show(name, &mut |first, values| {
            all[first..first + values.len()].copy_from_slice(values);
            Ok(())
        })?;
        Ok(all)
    }

    /// Puts the values of a parameter, some pieces at a time: in order, or part by part where the model has it in parts.
    pub(crate) fn show(&self, name: &str, put: &mut Put) -> Result<()> {
        let layout = &self.plan.layout;
        self.settle()?;
        for (group, index) in layout.find(name)? {
            let pieces = layout.pieces_of(group, index);
            for first in pieces.clone().step_by(PIECES_COLLECTED) {
                let (sender, received) = unbounded();
                let some = first..(first + PIECES_COLLECTED).min(pieces.end);
                let schedule = self.plan.schedule(|builder| builder.collect(group, some));
                self.executor
                    .run(schedule, Arc::new(StepContext { collector: Some(sender), ..self.context() }))?;
                self.executor.drain()?;
                let mut parts: Vec<_> = received.try_iter().filter(|part| part.entry == index).collect();
                parts.sort_by_key(|part| part.entry_start);
                let entry = &layout.groups[group].table[index];
                parts.iter().try_for_each(|part| Layout::put(entry, part.entry_start, &part.values, put))?;
            }
        }
        Ok(())
    }

    /// Names and shapes of all parameters, in the order of their names.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        self.plan.layout.parameters()
    }

    /// SHA-256 of all master parameters in the order of their names, as little-endian bytes, those of one that the model has in
    /// parts part by part. Equal digests of a model mean weights that are equal to the bit.
    ///
    /// # Errors
    /// Errors of the tiers.
    pub fn weights_digest(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for (name, _) in self.parameters() {
            hasher.update(name.as_bytes());
            self.show(&name, &mut |_, values| {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                hasher.update(bytes);
                Ok(())
            })?;
        }
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Writes all parameters to a safetensors file, some pieces at a time.
    ///
    /// # Errors
    /// [`Error::File`] and errors of the tiers.
    pub fn export_safetensors(&self, path: &Path) -> Result<()> {
        export_safetensors(path, &self.parameters(), &|name, put| self.show(name, put))
    }

    /// Counts what a CUDA device is asked for.
    pub fn device_counter(&self) -> DeviceCounter {
        DeviceCounter::new(self.compute.clone())
    }

    fn note_heap(&mut self) {
        self.peak_heap_bytes =
            self.peak_heap_bytes.max(self.compute.peak_bytes().saturating_sub(self.base_heap_bytes));
    }

    /// Peak bytes so far against those of the plan.
    pub fn usage(&self) -> Usage {
        let (read_bytes, written_bytes) = self.stores.moved_bytes();
        Usage {
            peak_host_bytes: self.host.peak_bytes(),
            planned_host_bytes: self.plan.host_bytes(),
            // A device with memory of its own counts what is leased with all else.
            peak_device_bytes: self.peak_heap_bytes
                + if self.compute.is_apart() { 0 } else { self.device.peak_bytes() },
            planned_device_bytes: self.plan.device_bytes(),
            disk_bytes: self.stores.disk_bytes(),
            written_bytes,
            read_bytes,
        }
    }

    /// Settings of the run.
    pub fn config(&self) -> &Config {
        &self.config
    }
}
