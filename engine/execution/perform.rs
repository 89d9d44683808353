//! What each operation does to the memory that it holds. One function, run on the thread of the operation's
//! queue.

use crate::device::compute::{BufferMemory, ComputeDevice, Done, Gradient};
use crate::device::tensor_storage::TensorStorage;
use crate::error::{Error, Result, internal};
use crate::execution::initial_values::InitialValues;
use crate::schedule::layout::{Layout, Run};
use crate::schedule::operation::{Call, GroupIndex, MasterPlace, Operation, Queue, Stream};
use crate::schedule::tile::{Cut, Tile};
use candle_nn::Init;
use crossbeam::channel::Sender;
use ferrozero_kernels::Pool;
use ferrozero_kernels::adamw::{AdamWState, AdamWStep, adamw};
use ferrozero_kernels::finite::count_non_finite;
use ferrozero_kernels::gradient::{Accumulate, GradientStatistics, accumulate};
use ferrozero_kernels::initialize::initialize;
use ferrozero_offload::{Lease, Store};
use std::sync::{Arc, OnceLock};

/// The memory that one operation uses, in its hands from its start to its end.
#[derive(Default)]
pub struct Held {
    /// Its buffers, in the order of [`Operation::resources`].
    pub buffers: Vec<BufferMemory>,
    /// Parameters in a slot, tensor by tensor.
    pub slot: Option<Vec<TensorStorage>>,
    /// Gradients as autograd left them; frozen parameters have an empty run.
    pub gradients: Option<Vec<TensorStorage>>,
    /// A boundary activation.
    pub passage: Option<Passing>,
    /// Gradient statistics of each group.
    pub statistics: Option<Vec<GradientStatistics>>,
    /// What other queues have enqueued on the device with this memory, and must be waited for.
    pub earlier: Vec<Done>,
    /// What the device had to compute before this operation was asked for.
    pub asked: Option<Done>,
    /// What its queue had enqueued on the device before this operation.
    pub started: Option<Done>,
    /// What this operation has enqueued there.
    pub done: Option<Done>,
}

impl Held {
    /// Whether there is memory of the device in it.
    fn uses_device(&self) -> bool {
        self.slot.is_some()
            || self.gradients.is_some()
            || self.passage.is_some()
            || self.buffers.iter().any(BufferMemory::is_on_device)
    }
}

/// Room for a boundary activation on its way.
#[derive(Default)]
pub struct Passing {
    /// The boundary.
    pub boundary: TensorStorage,
    /// Storage of the size of a boundary, for the next one that returns to a device with memory of its own.
    pub spare: TensorStorage,
}

/// The gradient norm of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Square root of the sum of squares over all trainable parameters, after averaging over micro-batches.
    pub norm: f64,
    /// What gradients are multiplied with: below one where clipping was needed.
    pub factor: f32,
    /// Whether gradients of a scaled loss have overflowed, so that the step is skipped.
    pub overflow: bool,
}

/// A piece of master parameters on its way to the caller.
pub struct Collected {
    /// Index into the table of the group.
    pub entry: usize,
    /// First element within the parameter.
    pub entry_start: usize,
    /// The values.
    pub values: Vec<f32>,
}

/// What one run of a schedule is given.
pub struct StepContext {
    /// The optimizer's numbers; `weight_decay` is that of parameters that decay.
    pub adamw: AdamWStep,
    /// Those of the last step, if it left updates pending.
    pub deferred: Option<AdamWStep>,
    /// Factor on every gradient, one over the number of micro-batches.
    pub gradient_scale: f32,
    /// What the loss was multiplied with, if gradients may overflow for that.
    pub loss_scale: Option<f32>,
    /// Largest gradient norm that is not scaled down.
    pub clip: Option<f64>,
    /// Filled in by [`Operation::Norm`].
    pub norm: OnceLock<Norm>,
    /// Receives what [`Operation::Collect`] reads.
    pub collector: Option<Sender<Collected>>,
    /// What [`Operation::Commit`] makes durable.
    pub commit: Option<StateCommit>,
}

/// A commit to be made.
pub struct StateCommit {
    /// Where.
    pub store: Arc<Store>,
    /// What it says.
    pub document: serde_json::Value,
}

/// What stays the same for all operations of a run.
pub struct Performer {
    /// Groups and pieces.
    pub layout: Layout,
    /// Segments in the order in which they run.
    pub calls: Vec<Call>,
    /// How the random initial values of each parameter are made, by registry index.
    pub inits: Vec<Init>,
    /// Where initial values come from; none: random numbers.
    pub initial_values: Option<Arc<dyn InitialValues>>,
    /// Seed of initial values.
    pub seed: u64,
    /// Threads of the host's arithmetic.
    pub pool: Pool,
    /// What computes.
    pub device: Arc<ComputeDevice>,
}

impl Performer {
    /// An error of the disk tier in a step, with the parameters in the piece that it is about.
    pub fn disk_error(&self, step: u64, source: ferrozero_offload::Error) -> Error {
        use ferrozero_offload::Error::{Checksum, FailedWrite, Piece};
        let mut parameters = vec![];
        if let Piece { extent, piece, .. }
        | Checksum { extent, piece, .. }
        | FailedWrite { extent, piece, .. } = &source
        {
            let streams = (0..self.layout.groups.len())
                .flat_map(|group| Stream::ALL.map(|stream| (group, stream)))
                .filter(|&(group, stream)| stream.extent_name(&self.layout.groups[group]) == *extent);
            for (group, stream) in streams {
                let elements = stream.elements(&self.layout, group);
                parameters.extend(self.layout.parameters_in(group, elements, *piece));
            }
        }
        Error::Disk { step, parameters, source }
    }

    fn commit(&self, context: &StepContext) -> Result<()> {
        let commit = context.commit.as_ref().ok_or_else(|| internal("a commit without its store"))?;
        let committed = commit.store.commit(commit.document.clone());
        committed.map(drop).map_err(|source| self.disk_error(context.adamw.step, source))
    }

    /// Does what `operation` says.
    pub fn perform(&self, operation: &Operation, held: &mut Held, context: &StepContext) -> Result<()> {
        match *operation {
            Operation::Initialize { group, stream, piece, .. } => self.initialize(group, stream, piece, held),
            Operation::Upload { group, piece, .. } => self.upload(group, piece, held),
            Operation::Download { group, piece, .. } => self.download(group, piece, held),
            Operation::CopyUp { .. } => self.copy(operation, held),
            Operation::CopyDown { group, .. } => {
                self.copy(operation, held)?;
                // Updates on the device do not look at what they write; what a commit keeps goes by way of
                // the host.
                let elements = operation.elements(&self.layout, &self.calls);
                let values = &held.buffers[0].host()?.as_f32()[..elements];
                self.check_finite(group, context.adamw.step, &[values])
            }
            Operation::SaveBoundary { piece, .. } => self.save_boundary(piece, held),
            Operation::LoadBoundary { call, piece, .. } => self.load_boundary(call, piece, held),
            Operation::Accumulate { group, piece, add, measure, .. } => {
                self.accumulate(group, piece, add, measure, held, context)
            }
            Operation::Norm => norm(held, context),
            Operation::Update { group, piece, master, deferred, .. } => {
                let numbers = if deferred { context.deferred.as_ref() } else { Some(&context.adamw) };
                let numbers = numbers.ok_or_else(|| internal("a pending update without its numbers"))?;
                self.update(group, piece, master, numbers, held)
            }
            Operation::Commit => self.commit(context),
            Operation::Collect { group, piece, master } => self.collect(group, piece, master, held, context),
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Attach { .. }
            | Operation::Forward { .. }
            | Operation::Backward { .. }
            | Operation::Detach { .. } => Err(internal("this operation runs on another queue")),
        }
    }

    /// Does an operation on the thread of its queue: after what others have enqueued on the device with its
    /// memory, and noting what it has enqueued itself.
    pub fn perform_on(
        &self,
        queue: Queue,
        operation: &Operation,
        held: &mut Held,
        context: &StepContext,
    ) -> Result<()> {
        self.device.wait(queue, &held.earlier)?;
        if held.uses_device() {
            held.started = self.device.record(queue)?;
        }
        self.perform(operation, held, context)?;
        if held.uses_device() {
            held.done = self.device.record(queue)?;
        }
        Ok(())
    }

    fn runs(&self, group: GroupIndex, stream: Stream, piece: usize) -> Vec<Run> {
        let elements = stream.elements(&self.layout, group);
        self.layout.groups[group].runs(self.layout.piece_range(elements, piece)).collect()
    }

    fn initialize(&self, group: GroupIndex, stream: Stream, piece: usize, held: &mut Held) -> Result<()> {
        let values = first_buffer(held)?.as_f32_mut();
        values.fill(0.0);
        if stream != Stream::Master {
            return Ok(());
        }
        for run in self.runs(group, stream, piece) {
            let entry = &self.layout.groups[group].table[run.entry];
            let init = &self.inits[entry.parameter];
            let target = &mut values[run.piece_start..run.piece_start + run.elements];
            // A tile has the values that the whole has there.
            let tile = Tile::from_name(&entry.name);
            let runs = || tile.runs(&entry.shape, run.entry_start, run.elements);
            let filled = match (&self.initial_values, &tile.cut) {
                (Some(initial), Some(Cut::Columns(columns, all))) => {
                    initial.fill_columns(&tile.whole, columns.clone(), *all, run.entry_start, target)?
                }
                (Some(initial), _) => {
                    let first = runs().next().map_or(0, |(first, _)| first);
                    initial.fill(&tile.whole, first, target)?
                }
                (None, _) => false,
            };
            if filled {
                let count = count_non_finite(&self.pool, target);
                if count > 0 {
                    let text =
                        format!("initial values of {}: {count} of a piece are infinite or NaN", entry.name);
                    return Err(Error::Configuration(text));
                }
                continue;
            }
            let shape = tile.whole_shape(&entry.shape);
            for (first, within) in runs() {
                initialize(init, &shape, self.seed, &tile.whole, first, &mut target[within]);
            }
        }
        Ok(())
    }

    fn upload(&self, group: GroupIndex, piece: usize, held: &mut Held) -> Result<()> {
        let Held { buffers, slot: Some(slot), .. } = held else {
            return Err(internal("upload without a slot"));
        };
        let runs = self.runs(group, Stream::Master, piece);
        let (values, staging) = buffers.split_at_mut(1);
        let staging = staging.first_mut().map(BufferMemory::host_mut).transpose()?;
        match &values[0] {
            BufferMemory::Host(values) => self.device.upload(&self.pool, values, staging, slot, &runs),
            BufferMemory::Device(masters) => self.device.enter(masters, slot, &runs),
        }
    }

    /// Between the host and a home on the device.
    fn copy(&self, operation: &Operation, held: &mut Held) -> Result<()> {
        let [buffer, home] = held.buffers.as_mut_slice() else {
            return Err(internal("a copy without its two buffers"));
        };
        let elements = operation.elements(&self.layout, &self.calls);
        match operation {
            Operation::CopyUp { .. } => self.device.copy_up(buffer.host()?, home, elements),
            _ => self.device.copy_down(home, buffer.host_mut()?, elements),
        }
    }

    fn download(&self, group: GroupIndex, piece: usize, held: &mut Held) -> Result<()> {
        let Held { buffers, slot: Some(slot), .. } = held else {
            return Err(internal("download without a slot"));
        };
        let values = buffers[0].host_mut()?.as_f32_mut();
        values.fill(0.0);
        for run in self.runs(group, Stream::Master, piece) {
            values[run.piece_start..run.piece_start + run.elements]
                .copy_from_slice(&slot[run.entry].as_f32()?[run.entry_start..run.entry_start + run.elements]);
        }
        Ok(())
    }

    fn save_boundary(&self, piece: usize, held: &mut Held) -> Result<()> {
        let Held { buffers, passage: Some(Passing { boundary, spare }), .. } = held else {
            return Err(internal("boundary without a passage"));
        };
        let elements = boundary.elements();
        let range = self.boundary_range(elements, piece);
        self.device.save_boundary(boundary, range.clone(), buffers[0].host_mut()?)?;
        if range.end == elements {
            let saved = std::mem::take(boundary);
            if self.device.is_apart() && spare.is_none() {
                *spare = saved;
            }
        }
        Ok(())
    }

    fn load_boundary(&self, call: usize, piece: usize, held: &mut Held) -> Result<()> {
        let Held { buffers, passage: Some(Passing { boundary, spare }), .. } = held else {
            return Err(internal("boundary without a passage"));
        };
        let elements = 4 * self.calls[call].boundary_elements / self.device.dtype().size_in_bytes();
        if piece == 0 {
            *boundary = match std::mem::take(spare) {
                spare if spare.elements() == elements => spare,
                _ => self.device.storage_for(Queue::Upload, elements)?,
            };
        }
        let range = self.boundary_range(elements, piece);
        self.device.load_boundary(buffers[0].host()?, boundary, range)
    }

    /// Elements of a piece of a boundary, in the device's type: a piece holds as many bytes as one of f32.
    fn boundary_range(&self, elements: usize, piece: usize) -> std::ops::Range<usize> {
        let piece_elements = 4 * self.layout.piece_elements / self.device.dtype().size_in_bytes();
        let start = piece * piece_elements;
        start..(start + piece_elements).min(elements)
    }

    fn accumulate(
        &self,
        group: GroupIndex,
        piece: usize,
        add: bool,
        measure: bool,
        held: &mut Held,
        context: &StepContext,
    ) -> Result<()> {
        let Held { buffers, gradients: Some(gradients), statistics, .. } = held else {
            return Err(internal("accumulation without gradients"));
        };
        let runs = self.runs(group, Stream::Gradient, piece);
        let how = if add { Accumulate::Add } else { Accumulate::Overwrite };
        let mut measured = GradientStatistics::default();
        if let (Some(statistics), true) = (&statistics, piece > 0) {
            measured = statistics[group];
        }
        let (target, staging) = buffers.split_at_mut(1);
        let mut staging = staging.first_mut().map(BufferMemory::host_mut).transpose()?;
        match &mut target[0] {
            BufferMemory::Device(target) => {
                let scale = (context.gradient_scale, how, piece == 0);
                measured =
                    self.device.accumulate(gradients, &runs, target, scale, self.layout.piece_elements)?;
            }
            BufferMemory::Host(target) => {
                self.device.download_gradients(gradients, &runs, staging.as_deref_mut())?;
                let target = target.as_f32_mut();
                for run in &runs {
                    let target = &mut target[run.piece_start..run.piece_start + run.elements];
                    let scale = context.gradient_scale;
                    match self.device.gradient(gradients, run, staging.as_deref())? {
                        Gradient::F32(values) => {
                            accumulate(&self.pool, target, values, scale, how, &mut measured)
                        }
                        Gradient::BF16(values) => {
                            accumulate(&self.pool, target, values, scale, how, &mut measured)
                        }
                        Gradient::F16(values) => {
                            accumulate(&self.pool, target, values, scale, how, &mut measured)
                        }
                    }
                    .map_err(Error::Kernel)?;
                }
            }
        }
        let elements = self.layout.groups[group].trainable_elements;
        if piece + 1 == self.layout.piece_count(elements) {
            gradients.clear();
        }
        let Some(statistics) = statistics.as_mut().filter(|_| measure) else { return Ok(()) };
        statistics[group] = measured;
        // The least scale cannot be halved.
        if measured.non_finite > 0 && context.loss_scale.is_none_or(|scale| scale <= 1.0) {
            return Err(Error::NonFiniteGradient {
                group: self.layout.groups[group].name.clone(),
                step: context.adamw.step,
                count: measured.non_finite,
            });
        }
        Ok(())
    }

    fn update(
        &self,
        group: GroupIndex,
        piece: usize,
        master: MasterPlace,
        numbers: &AdamWStep,
        held: &mut Held,
    ) -> Result<()> {
        let Held { buffers, slot, .. } = held;
        if let [
            BufferMemory::Device(master),
            BufferMemory::Device(first_moment),
            BufferMemory::Device(second_moment),
            BufferMemory::Device(gradient),
        ] = buffers.as_mut_slice()
        {
            for run in self.runs(group, Stream::FirstMoment, piece) {
                let step = self.step_of(group, &run, numbers);
                let states = [&mut *master, &mut *first_moment, &mut *second_moment, &mut *gradient];
                self.device.update(&step, states, run.piece_start..run.piece_start + run.elements)?;
            }
            return Ok(());
        }
        let (master_buffer, rest) = match master {
            MasterPlace::Buffer(_) => buffers.split_at_mut(1),
            MasterPlace::Slot(_) => buffers.split_at_mut(0),
        };
        let [first_moment, second_moment, gradient] = rest else {
            return Err(internal("update without states"));
        };
        let (first_moment, second_moment) =
            (first_moment.host_mut()?.as_f32_mut(), second_moment.host_mut()?.as_f32_mut());
        let gradient = gradient.host()?.as_f32();
        for run in self.runs(group, Stream::FirstMoment, piece) {
            let within_piece = run.piece_start..run.piece_start + run.elements;
            let master = match (&mut *master_buffer, slot.as_mut()) {
                ([buffer], _) => &mut buffer.host_mut()?.as_f32_mut()[within_piece.clone()],
                (_, Some(slot)) => {
                    &mut slot[run.entry].as_f32_mut()?[run.entry_start..run.entry_start + run.elements]
                }
                _ => return Err(internal("update without parameters")),
            };
            let step = self.step_of(group, &run, numbers);
            let first_moment = &mut first_moment[within_piece.clone()];
            let second_moment = &mut second_moment[within_piece.clone()];
            let state = AdamWState {
                master: &mut *master,
                first_moment: &mut *first_moment,
                second_moment: &mut *second_moment,
            };
            adamw(&self.pool, &step, state, &gradient[within_piece], None).map_err(Error::Kernel)?;
            self.check_finite(group, numbers.step, &[master, first_moment, second_moment])?;
        }
        Ok(())
    }

    /// Whether a state can be kept.
    fn check_finite(&self, group: GroupIndex, step: u64, state: &[&[f32]]) -> Result<()> {
        match state.iter().map(|values| count_non_finite(&self.pool, values)).sum() {
            0 => Ok(()),
            count => {
                Err(Error::NonFiniteState { group: self.layout.groups[group].name.clone(), step, count })
            }
        }
    }

    /// The optimizer's numbers for a run of one parameter.
    fn step_of(&self, group: GroupIndex, run: &Run, numbers: &AdamWStep) -> AdamWStep {
        let decays = self.layout.groups[group].table[run.entry].decays;
        AdamWStep { weight_decay: if decays { numbers.weight_decay } else { 0.0 }, ..numbers.clone() }
    }

    fn collect(
        &self,
        group: GroupIndex,
        piece: usize,
        master: MasterPlace,
        held: &mut Held,
        context: &StepContext,
    ) -> Result<()> {
        let collector = context.collector.as_ref().ok_or_else(|| internal("collect without a collector"))?;
        for run in self.runs(group, Stream::Master, piece) {
            let values = match (master, &held.slot) {
                (MasterPlace::Slot(_), Some(slot)) => {
                    &slot[run.entry].as_f32()?[run.entry_start..][..run.elements]
                }
                _ => &first_buffer(held)?.as_f32()[run.piece_start..run.piece_start + run.elements],
            };
            let collected =
                Collected { entry: run.entry, entry_start: run.entry_start, values: values.to_vec() };
            collector.send(collected).map_err(|_| internal("the collector went away"))?;
        }
        Ok(())
    }
}

fn norm(held: &mut Held, context: &StepContext) -> Result<()> {
    let statistics = held.statistics.as_ref().ok_or_else(|| internal("norm without statistics"))?;
    let norm = statistics.iter().map(|group| group.squared_norm).sum::<f64>().sqrt();
    // As torch.nn.utils.clip_grad_norm_ does: the small term keeps a zero norm from dividing by zero.
    let factor = context.clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0)) as f32;
    let overflow = statistics.iter().any(|group| group.non_finite > 0);
    context.norm.set(Norm { norm, factor, overflow }).map_err(|_| internal("the norm was computed twice"))
}

fn first_buffer(held: &mut Held) -> Result<&mut Lease> {
    held.buffers.first_mut().ok_or_else(|| internal("operation without its buffer"))?.host_mut()
}
