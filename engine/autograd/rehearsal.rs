//! The rehearsal: the user's loss is computed and propagated back a few times before the plan is made, first
//! to warm up and then to be timed. Each kind of segment runs a few times, with parameters of zero; its likes
//! are skipped. That gives the order of the segments, the shapes of boundaries, the parameters that no
//! gradient reaches, the working memory of the model's own tensors, and the time of computing.

mod measured;

use crate::autograd::dropout::{Dropping, Place};
use crate::autograd::gradient::{GradientSink, ResidentGradients};
use crate::autograd::output::Output;
use crate::autograd::registry::GroupTensors;
use crate::device::compute::ComputeDevice;
use crate::device::tensor_storage::{self, TensorStorage};
use crate::error::{Error, Result, internal};
use crate::planner::observed::{KeptGraph, Observed};
use crate::planner::simulator::{Compute, ComputeTime};
use crate::schedule::layout::Layout;
use crate::schedule::operation::Call;
use crate::sync::lock;
use candle_core::{DType, Shape, Tensor};
use measured::{Measured, Pass};
use std::any::TypeId;
use std::cell::Cell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Timed passes at most: a model of few short segments is timed more than once.
const MOST_TIMED_PASSES: usize = 3;

/// Runs as long as a group's parameters that a trial makes beside its tensors: parameters, gradients, and
/// what both were before.
const OF_A_TRIAL: u64 = 4;

/// What makes two segments alike: code, parameters and inputs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    code: TypeId,
    parameters: Vec<(Vec<usize>, bool)>,
    inputs: Vec<(Vec<usize>, DType)>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    output: Option<(Shape, DType)>,
    forward: Measured,
    backward: Measured,
    /// The part of the backward that is the forward again.
    again: Measured,
    /// Whether its output comes from something that gets a gradient.
    is_tracked: bool,
    /// Of the parameters that it shares with other segments, in their order, whether a gradient came.
    shared: Vec<bool>,
    /// A forward whose graph is kept: its peak, and what stays of it beside its output.
    kept_peak_bytes: u64,
    kept_bytes: u64,
}

impl Known {
    fn kept(&self) -> KeptGraph {
        let forward = self.kept_peak_bytes.saturating_sub(self.backward.bytes);
        let backward = self.kept_bytes.saturating_sub(self.again.bytes);
        KeptGraph { bytes: self.kept_bytes, beyond_bytes: forward.max(backward) }
    }
}

/// What was measured of something that ran.
struct Tried<T> {
    result: T,
    /// The most that it had beyond the parameters.
    bytes: u64,
    /// The most that the whole rehearsal had meanwhile, parameters apart.
    needed_bytes: u64,
    seconds: f64,
}

/// One turn of a segment: a number of a call.
#[derive(Debug, Clone, Copy)]
enum Turn {
    Forward(usize),
    Backward(usize),
}

#[derive(Default)]
struct Findings {
    pass: Pass,
    calls: Vec<(Call, Kind)>,
    known: HashMap<Kind, Known>,
    peak_bytes: u64,
    parked_bytes: u64,
    missing: BTreeSet<String>,
    /// Each turn, and the seconds of the user's own code before it.
    turns: Vec<(Turn, f64)>,
    /// Seconds of the user's own code after the last turn.
    after_s: f64,
}

impl Findings {
    /// Calls, with the order in which candle went back through them.
    fn calls(&self) -> Vec<Call> {
        let back = self.turns.iter().filter_map(|(turn, _)| match turn {
            Turn::Backward(call) => Some(*call),
            Turn::Forward(_) => None,
        });
        let back: Vec<usize> = back.collect();
        let in_reverse = back.iter().copied().eq((0..self.calls.len()).rev());
        let places: HashMap<_, _> = back.into_iter().zip(0..).collect();
        let call = |(index, (call, _)): (usize, &(Call, Kind))| {
            let backward = if in_reverse { Some(0) } else { places.get(&index).copied() };
            let boundary_moves = call.boundary_moves && backward.is_some();
            Call { backward, boundary_moves, ..call.clone() }
        };
        self.calls.iter().enumerate().map(call).collect()
    }

    /// By call.
    fn kept(&self) -> Vec<KeptGraph> {
        let known = |kind: &Kind| self.known.get(kind).map(Known::kept).unwrap_or_default();
        self.calls.iter().map(|(_, kind)| known(kind)).collect()
    }

    fn compute(&self) -> Compute {
        let mut compute = Compute::none(self.calls.len());
        for &(turn, before_s) in &self.turns {
            let (Turn::Forward(call) | Turn::Backward(call)) = turn;
            let known = self.calls.get(call).and_then(|(_, kind)| self.known.get(kind));
            let (of_turn, measured) = match turn {
                Turn::Forward(call) => (compute.forward.get_mut(call), known.map(|known| &known.forward)),
                Turn::Backward(call) => (compute.backward.get_mut(call), known.map(|known| &known.backward)),
            };
            if let (Some(of_turn), Some(measured)) = (of_turn, measured) {
                *of_turn = ComputeTime { before_s, within_s: measured.typical_s() };
            }
            if let (Some(again_s), Some(known)) = (compute.again_s.get_mut(call), known) {
                *again_s = known.again.typical_s();
            }
        }
        compute.detach.before_s = self.after_s;
        compute
    }
}

/// A rehearsal under way.
pub struct Rehearsal {
    layout: Arc<Layout>,
    tensors: Arc<GroupTensors>,
    device: Arc<ComputeDevice>,
    /// Whether boundaries leave the device, so that the rehearsal does not hold them either.
    moves_boundaries: bool,
    base_bytes: u64,
    findings: Mutex<Findings>,
    /// The group of the segment that runs.
    active: Mutex<Option<usize>>,
    /// When the last turn ended, or the rehearsal began.
    user_code_since: Mutex<Instant>,
    resident_gradients: Mutex<ResidentGradients>,
}

/// One segment's turn in the rehearsal.
pub struct Trial {
    rehearsal: Arc<Rehearsal>,
    call: usize,
    kind: Kind,
    group: usize,
    boundary_elements: usize,
    moves: bool,
    known: bool,
    /// Whether it has an input or a parameter that wants a gradient.
    wants_gradients: bool,
    _active: Active,
}

/// As long as a segment runs.
struct Active(Arc<Rehearsal>);

impl Drop for Active {
    fn drop(&mut self) {
        *lock(&self.0.active) = None;
    }
}

impl Rehearsal {
    /// Runs the loss, forward and backward: `within` does so once.
    pub fn run(
        layout: Arc<Layout>,
        tensors: Arc<GroupTensors>,
        device: Arc<ComputeDevice>,
        moves_boundaries: bool,
        within: impl Fn(Arc<Self>, &dyn Fn(&Self, &Tensor) -> Result<()>) -> Result<()>,
    ) -> Result<Observed> {
        let resident = layout.resident();
        tensors.fill(resident, device.zeros(&layout.groups[resident])?)?;
        device.reset_peak();
        let this = Arc::new(Self {
            layout: layout.clone(),
            tensors: tensors.clone(),
            device: device.clone(),
            moves_boundaries,
            base_bytes: device.used_bytes(),
            findings: Mutex::default(),
            active: Mutex::default(),
            user_code_since: Mutex::new(Instant::now()),
            resident_gradients: Mutex::default(),
        });
        let pass = |pass| {
            this.begin(pass);
            within(this.clone(), &|this, loss| this.finish(loss))
        };
        let mut result = pass(Pass::WarmUp);
        let mut timed = 0;
        while result.is_ok() && timed < MOST_TIMED_PASSES && !this.is_timed() {
            result = pass(Pass::Timed);
            timed += 1;
        }
        device.keep_freed(0);
        tensors.take(resident)?;
        result?;
        let findings = lock(&this.findings);
        if !findings.missing.is_empty() {
            return Err(Error::MissingGradient { names: findings.missing.iter().cloned().collect() });
        }
        Ok(Observed {
            calls: findings.calls(),
            working_bytes: (findings.peak_bytes > 0).then_some(findings.peak_bytes),
            parked_bytes: findings.parked_bytes,
            kept: if findings.peak_bytes > 0 { findings.kept() } else { vec![] },
            compute: findings.compute(),
        })
    }

    /// Calls and times are those of the last pass.
    fn begin(&self, pass: Pass) {
        let mut findings = lock(&self.findings);
        if findings.pass != pass {
            // In a run parameters and gradients on their way have memory of their own; here they come and go
            // with each trial.
            let elements = self.layout.groups.iter().map(|group| group.elements).max().unwrap_or(0);
            let parameter_bytes = (elements * self.device.dtype().size_in_bytes()) as u64;
            self.device.keep_freed(self.base_bytes + findings.peak_bytes + OF_A_TRIAL * parameter_bytes);
            for known in findings.known.values_mut() {
                known.forward.seconds.clear();
                known.backward.seconds.clear();
                known.again.seconds.clear();
            }
            findings.pass = pass;
        }
        findings.calls.clear();
        findings.turns.clear();
        lock(&self.resident_gradients).clear();
        *lock(&self.user_code_since) = Instant::now();
    }

    /// Whether every kind of segment has run long enough to know its time.
    fn is_timed(&self) -> bool {
        let findings = lock(&self.findings);
        findings.pass == Pass::Timed
            && findings.known.values().all(|known| {
                // Nothing comes back to a segment that leads to no trained parameter.
                known.forward.is_enough() && (known.backward.seconds.is_empty() || known.backward.is_enough())
            })
    }

    /// Propagates the loss back.
    fn finish(&self, loss: &Tensor) -> Result<()> {
        let mut store = ferrozero_kernels::ops::backward(loss)?;
        let resident = self.layout.resident();
        let mut sink = GradientSink::new(&self.layout, &self.tensors, resident, &self.resident_gradients);
        let gradients = sink.collect(&mut store)?;
        let missing = sink.missing();
        self.note_peak();
        drop(store);
        self.note_parked();
        drop(gradients);
        let after_s = self.user_code_s()?;
        let mut findings = lock(&self.findings);
        findings.after_s = after_s;
        findings.missing.extend(missing);
        // A segment without a backward: nothing reached its parameters.
        let calls = findings.calls();
        let reached = calls.iter().filter(|call| call.backward.is_some()).map(|call| call.group);
        let reached: BTreeSet<usize> = reached.collect();
        for (index, group) in self.layout.groups.iter().enumerate() {
            if index != resident && !reached.contains(&index) {
                let names =
                    group.table.iter().filter(|entry| entry.trainable).map(|entry| entry.name.clone());
                findings.missing.extend(names);
            }
        }
        Ok(())
    }

    /// Notes the memory that was needed since the last segment.
    fn note_peak(&self) {
        let needed = self.device.peak_bytes().saturating_sub(self.base_bytes);
        let mut findings = lock(&self.findings);
        findings.peak_bytes = findings.peak_bytes.max(needed);
    }

    /// Notes the memory that is held where a micro-batch may have to wait for others.
    fn note_parked(&self) {
        let held = self.device.used_bytes().saturating_sub(self.base_bytes);
        let mut findings = lock(&self.findings);
        findings.parked_bytes = findings.parked_bytes.max(held);
    }

    /// Seconds since the last turn ended, with all that the device was given to do since.
    fn user_code_s(&self) -> Result<f64> {
        self.device.synchronize()?;
        Ok(lock(&self.user_code_since).elapsed().as_secs_f64())
    }

    /// A segment's forward begins.
    pub fn begin_forward(self: &Arc<Self>, group: usize, code: TypeId, inputs: &[&Tensor]) -> Result<Trial> {
        let active = self.activate(group)?;
        let before_s = self.user_code_s()?;
        self.note_peak();
        self.note_parked();
        let first = inputs[0];
        let bytes = first.elem_count() * first.dtype().size_in_bytes();
        let moves = first.track_op()
            && first.dtype() == self.device.dtype()
            && bytes.is_multiple_of(4)
            && tensor_storage::owns_plain_storage(first)
            && !inputs[1..].iter().any(|other| tensor_storage::share_storage(first, other));
        let boundary_elements = if moves { bytes / 4 } else { 0 };
        let kind = self.kind(group, code, inputs);
        let shapes = inputs.iter().map(|input| input.dims().to_vec()).collect();
        let call = Call { inputs: shapes, ..Call::new(group, boundary_elements, moves) };
        let mut findings = lock(&self.findings);
        let known = findings.known.get(&kind).is_some_and(|known| known.forward.is_known(findings.pass));
        findings.calls.push((call, kind.clone()));
        let call = findings.calls.len() - 1;
        findings.turns.push((Turn::Forward(call), before_s));
        drop(findings);
        let moves = moves && self.moves_boundaries;
        let elements = first.elem_count();
        Ok(Trial {
            rehearsal: self.clone(),
            call,
            kind,
            group,
            boundary_elements: elements,
            moves,
            known,
            wants_gradients: self.trains(group) || inputs.iter().any(|input| input.track_op()),
            _active: active,
        })
    }

    /// A segment's backward begins.
    pub fn begin_backward(self: &Arc<Self>, call: usize, inputs: &[Tensor]) -> Result<Trial> {
        let group = lock(&self.findings).calls[call].0.group;
        let active = self.activate(group)?;
        let before_s = self.user_code_s()?;
        self.note_peak();
        self.note_parked();
        let mut findings = lock(&self.findings);
        findings.turns.push((Turn::Backward(call), before_s));
        let (Call { boundary_moves, .. }, kind) = findings.calls[call].clone();
        let known = findings.known.get(&kind).filter(|known| known.backward.is_known(findings.pass));
        let shared = known.map_or(vec![], |known| known.shared.clone());
        let known = known.is_some();
        drop(findings);
        self.give_shared(group, &shared)?;
        let moves = boundary_moves && self.moves_boundaries && tensor_storage::is_vacant(&inputs[0]);
        let boundary_elements = inputs[0].elem_count();
        Ok(Trial {
            rehearsal: self.clone(),
            call,
            kind,
            group,
            boundary_elements,
            moves,
            known,
            wants_gradients: true,
            _active: active,
        })
    }

    /// Whether a segment has a parameter that is trained, of its own or shared with others.
    fn trains(&self, group: usize) -> bool {
        let resident = &self.layout.groups[self.layout.resident()].table;
        let shared = self.tensors.shared(group).iter().map(|&entry| &resident[entry]);
        self.layout.groups[group].table.iter().chain(shared).any(|entry| entry.trainable)
    }

    /// A segment's turn begins. None is within another's.
    fn activate(self: &Arc<Self>, group: usize) -> Result<Active> {
        let mut active = lock(&self.active);
        if let Some(outer) = *active {
            let name = |group: usize| self.layout.groups[group].name.clone();
            return Err(Error::NestedSegment { outer: name(outer), inner: name(group) });
        }
        *active = Some(group);
        Ok(Active(self.clone()))
    }

    /// Gradients of zero for the parameters that a segment which is skipped shares with others, where those
    /// like it gave some.
    fn give_shared(&self, group: usize, reached: &[bool]) -> Result<()> {
        let resident = self.tensors.of(self.layout.resident());
        let mut sums = lock(&self.resident_gradients);
        for (&entry, _) in self.tensors.shared(group).iter().zip(reached).filter(|(_, reached)| **reached) {
            if let Entry::Vacant(sum) = sums.entry(entry) {
                sum.insert(resident[entry].zeros_like()?);
            }
        }
        Ok(())
    }

    fn kind(&self, group: usize, code: TypeId, inputs: &[&Tensor]) -> Kind {
        let resident = &self.layout.groups[self.layout.resident()].table;
        let shared = self.tensors.shared(group).iter().map(|&entry| &resident[entry]);
        let parameters = self.layout.groups[group].table.iter().chain(shared);
        Kind {
            code,
            parameters: parameters.map(|entry| (entry.shape.clone(), entry.trainable)).collect(),
            inputs: inputs.iter().map(|input| (input.dims().to_vec(), input.dtype())).collect(),
        }
    }
}

impl Trial {
    /// Number of the call.
    pub fn call(&self) -> usize {
        self.call
    }

    /// Whether gradients may come back to it.
    pub fn goes_back(&self) -> bool {
        let is_tracked = |known: &Known| known.is_tracked;
        self.wants_gradients || lock(&self.rehearsal.findings).known.get(&self.kind).is_some_and(is_tracked)
    }

    /// Whether a segment of this kind has been run.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// Whether the input leaves the device.
    pub fn moves_boundary(&self) -> bool {
        self.moves
    }

    /// A boundary in place of the one that left.
    pub fn boundary(&self) -> Result<Option<TensorStorage>> {
        let device = &self.rehearsal.device;
        let zeros = || TensorStorage::zeros(self.boundary_elements, device.dtype(), device.device());
        Ok(self.moves.then(zeros).transpose()?)
    }

    /// Runs the first ones of its kind, the very first with its graph kept too; for the others the output's
    /// shape is known.
    pub fn forward(&mut self, run: impl Fn(bool) -> candle_core::Result<Output>) -> Result<Output> {
        if self.known {
            let output =
                lock(&self.rehearsal.findings).known.get(&self.kind).and_then(|known| known.output.clone());
            let (shape, dtype) = output.ok_or_else(|| internal("a known segment without an output"))?;
            self.count(|known| known.forward.bytes);
            let device = self.rehearsal.device.device();
            return Ok(Output::from_values(TensorStorage::zeros(shape.elem_count(), dtype, device)?, shape));
        }
        if !lock(&self.rehearsal.findings).known.contains_key(&self.kind) {
            self.try_with_graph(&run)?;
        }
        let (output, bytes, seconds) = self.measured(|| run(false))?;
        let mut findings = lock(&self.rehearsal.findings);
        let known = findings.known.entry(self.kind.clone()).or_default();
        known.output = Some((output.shape.clone(), output.values.dtype()));
        known.forward.add(bytes, seconds);
        drop(findings);
        Ok(output)
    }

    /// Measures what a forward takes whose graph is kept.
    fn try_with_graph(&self, run: impl Fn(bool) -> candle_core::Result<Output>) -> Result<()> {
        let device = &self.rehearsal.device;
        let before_bytes = device.used_bytes();
        let Tried { result: output, bytes, .. } = self.tried(|| run(true))?;
        let value_bytes = (output.shape.elem_count() * output.values.dtype().size_in_bytes()) as u64;
        let held_bytes = device.used_bytes().saturating_sub(before_bytes);
        let mut findings = lock(&self.rehearsal.findings);
        let known = findings.known.entry(self.kind.clone()).or_default();
        known.is_tracked = output.graph.is_some_and(|graph| graph.end.track_op());
        known.kept_peak_bytes = bytes;
        known.kept_bytes = held_bytes.saturating_sub(value_bytes);
        Ok(())
    }

    /// Runs the first ones of its kind.
    pub fn backward<T>(
        &mut self,
        run: impl FnOnce(&mut GradientSink) -> candle_core::Result<T>,
    ) -> Result<T> {
        let rehearsal = self.rehearsal.clone();
        let Rehearsal { layout, tensors, device, resident_gradients, .. } = &*rehearsal;
        let parameters_in_place: Cell<Option<(Instant, u64)>> = Cell::new(None);
        let again = Cell::new(None);
        let note_again = || {
            if let Some((started, with_parameters_bytes)) = parameters_in_place.get() {
                device.synchronize().map_err(candle_core::Error::wrap)?;
                let held = device.used_bytes().saturating_sub(with_parameters_bytes);
                again.set(Some((held, started.elapsed().as_secs_f64())));
            }
            Ok(())
        };
        let mut sink = GradientSink::new(layout, tensors, self.group, resident_gradients).noting(&note_again);
        let (gradients, bytes, seconds) = self.measured(|| {
            parameters_in_place.set(Some((Instant::now(), device.used_bytes())));
            run(&mut sink)
        })?;
        let missing = sink.missing();
        let shared = tensors.shared(self.group).iter().map(|entry| sink.reached().contains(entry)).collect();
        let mut findings = lock(&rehearsal.findings);
        findings.missing.extend(missing);
        if let Some(known) = findings.known.get_mut(&self.kind) {
            known.shared = shared;
            known.backward.add(bytes, seconds);
            if let Some((bytes, seconds)) = again.get() {
                known.again.add(bytes, seconds);
            }
        }
        Ok(gradients)
    }

    /// Runs something with parameters of zero in place, and measures the bytes that it needs beyond them and
    /// its seconds.
    fn measured<T>(&self, run: impl FnOnce() -> candle_core::Result<T>) -> Result<(T, u64, f64)> {
        let trial = self.tried(run)?;
        let mut findings = lock(&self.rehearsal.findings);
        findings.peak_bytes = findings.peak_bytes.max(trial.needed_bytes);
        Ok((trial.result, trial.bytes, trial.seconds))
    }

    /// As [`Self::measured`], of something that no plan has to have room for.
    fn tried<T>(&self, run: impl FnOnce() -> candle_core::Result<T>) -> Result<Tried<T>> {
        let Rehearsal { layout, tensors, device, base_bytes, .. } = &*self.rehearsal;
        let before_bytes = device.used_bytes();
        tensors.fill(self.group, device.zeros(&layout.groups[self.group])?)?;
        let with_parameters_bytes = device.used_bytes();
        device.reset_peak();
        device.synchronize()?;
        let started = Instant::now();
        let place = Place { seed: 0, step: 0, micro_batch: 0, call: Some(self.call) };
        let result = Dropping::at(place).during(run);
        device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        let bytes = device.peak_bytes().saturating_sub(with_parameters_bytes);
        drop(tensors.take(self.group)?);
        let needed_bytes = before_bytes.saturating_sub(*base_bytes) + bytes;
        Ok(Tried { result: result?, bytes, needed_bytes, seconds })
    }

    /// Counts a segment that is skipped as if it had run now.
    fn count(&self, bytes: impl FnOnce(&Known) -> u64) {
        let now = self.rehearsal.device.used_bytes().saturating_sub(self.rehearsal.base_bytes);
        let mut findings = lock(&self.rehearsal.findings);
        let needed = now + findings.known.get(&self.kind).map_or(0, bytes);
        findings.peak_bytes = findings.peak_bytes.max(needed);
    }

    /// Ends the turn.
    pub fn finish(self) -> Result<()> {
        if self.known {
            self.count(|known| match known.backward.seconds.is_empty() {
                true => known.forward.bytes,
                false => known.backward.bytes,
            });
        }
        self.rehearsal.device.reset_peak();
        *lock(&self.rehearsal.user_code_since) = Instant::now();
        Ok(())
    }
}
