//! A machine that runs operations on what buffers, slots and disk *mean*, and refuses an operation that is
//! given something else than it should have.

use ferrozero::internals::schedule::buffer_plan::BufferPlan;
use ferrozero::internals::schedule::layout::Layout;
use ferrozero::internals::schedule::operation::{Buffer, Call, Extent, MasterPlace, Operation, Stream};
use std::collections::{BTreeSet, HashMap};

/// The moment that an operation belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Optimizer step, 1-based; that of the last one in what is no training step.
    pub step: u64,
    /// Micro-batch of the step whose activations it is about, if it is one.
    pub micro_batch: Option<usize>,
    /// Updates that parameters must have seen when they are computed with.
    pub updates: u64,
}

/// What the bytes of a buffer or of a piece on disk mean.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Nothing,
    State {
        group: usize,
        stream: Stream,
        piece: usize,
        updates: u64,
    },
    /// The sum of the gradients of some calls in some micro-batches; no call for the resident group.
    Gradient {
        group: usize,
        piece: usize,
        step: u64,
        parts: BTreeSet<(usize, Option<usize>)>,
    },
    Boundary {
        call: usize,
        piece: usize,
        moment: Moment,
    },
}

/// Parameters in a slot: of which group, and the updates that each piece has seen.
type SlotContent = Option<(usize, Vec<Option<u64>>)>;

/// Gradients as autograd left them.
#[derive(Debug, Clone, PartialEq)]
struct Set {
    group: usize,
    call: Option<usize>,
    moment: Moment,
}

/// A boundary in passing, with the pieces of it that are there.
#[derive(Debug, Clone, PartialEq)]
struct Passing {
    call: usize,
    moment: Moment,
    pieces: BTreeSet<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    layout: Groups,
    accumulate: usize,
    vertical: usize,
    clip: bool,
    buffers: Vec<Content>,
    slots: Vec<SlotContent>,
    sets: Vec<Option<Set>>,
    passages: Vec<Option<Passing>>,
    /// Graphs of calls that are kept, each with the moment of its forward.
    graphs: Vec<(usize, Moment)>,
    disk: HashMap<(Extent, usize), Content>,
    /// What survives a restart.
    committed: HashMap<(Extent, usize), Content>,
    /// Step and number of pieces that were measured, by group.
    measured: Vec<(u64, usize)>,
    normed_step: u64,
    /// Updates that each collected piece had seen.
    collected: HashMap<(usize, usize), u64>,
}

/// The numbers of pieces of a layout and its calls.
#[derive(Debug, Clone, PartialEq)]
struct Groups {
    pieces: Vec<usize>,
    trainable_pieces: Vec<usize>,
    calls: Vec<(usize, usize, bool)>,
}

impl Groups {
    /// The updates that a piece has seen when its trainable neighbours have seen `updates`.
    fn updates(&self, group: usize, piece: usize, updates: u64) -> u64 {
        if piece < self.trainable_pieces[group] { updates } else { 0 }
    }

    fn resident(&self) -> usize {
        self.pieces.len() - 1
    }
}

type Checked = Result<(), String>;

fn ensure(holds: bool, text: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(text()) }
}

impl Machine {
    pub fn new(
        layout: &Layout,
        calls: &[Call],
        buffer_plan: &BufferPlan,
        accumulate: usize,
        clip: bool,
    ) -> Self {
        let moves = |index: usize, call: &Call| {
            let away = buffer_plan.boundary_home != ferrozero::Tier::Device;
            call.boundary_moves && away && !buffer_plan.keeps(index)
        };
        let groups = Groups {
            pieces: layout.groups.iter().map(|group| layout.piece_count(group.elements)).collect(),
            trainable_pieces: layout
                .groups
                .iter()
                .map(|group| layout.piece_count(group.trainable_elements))
                .collect(),
            calls: calls
                .iter()
                .enumerate()
                .map(|(index, call)| {
                    (call.group, layout.piece_count(call.boundary_elements), moves(index, call))
                })
                .collect(),
        };
        Self {
            measured: vec![(0, 0); groups.pieces.len()],
            layout: groups,
            accumulate,
            vertical: buffer_plan.vertical,
            clip,
            buffers: vec![Content::Nothing; buffer_plan.buffers().count()],
            slots: vec![None; buffer_plan.slots.len()],
            sets: vec![None; buffer_plan.gradient_sets],
            passages: vec![None; buffer_plan.passages],
            graphs: vec![],
            disk: HashMap::new(),
            committed: HashMap::new(),
            normed_step: 0,
            collected: HashMap::new(),
        }
    }

    /// All calls of a group in all micro-batches: what a whole gradient is the sum of.
    fn whole(&self, group: usize) -> BTreeSet<(usize, Option<usize>)> {
        let calls: Vec<Option<usize>> = if group == self.layout.resident() {
            vec![None]
        } else {
            let of_group = self.layout.calls.iter().enumerate().filter(|(_, call)| call.0 == group);
            of_group.map(|(index, _)| Some(index)).collect()
        };
        (0..self.accumulate).flat_map(|micro| calls.iter().map(move |&call| (micro, call))).collect()
    }

    fn expect_parameters(&self, slot: usize, group: usize, moment: Moment) -> Checked {
        let expected: Vec<_> = (0..self.layout.pieces[group])
            .map(|piece| Some(self.layout.updates(group, piece, moment.updates)))
            .collect();
        let found = self.slots[slot].as_ref();
        // A group without parameters needs nothing in its slot.
        let is_there = expected.is_empty() || found == Some(&(group, expected.clone()));
        ensure(is_there, || format!("slot {slot} has {found:?} and not group {group} at {expected:?}"))
    }

    /// Does what the operation says, if it is given what it needs.
    pub fn execute(&mut self, operation: &Operation, moment: Moment) -> Checked {
        match *operation {
            Operation::Initialize { group, stream, piece, buffer } => {
                self.buffers[buffer.0] = Content::State { group, stream, piece, updates: 0 };
                Ok(())
            }
            Operation::Read { extent, piece, buffer, .. } => {
                let content = self.disk.get(&(extent, piece)).ok_or("read before it was written")?;
                self.buffers[buffer.0] = content.clone();
                Ok(())
            }
            Operation::Write { extent, piece, buffer } => {
                let content = &self.buffers[buffer.0];
                let is_its = match (extent, content) {
                    (Extent::State(g, s), Content::State { group, stream, piece: p, .. }) => {
                        (g, s, piece) == (*group, *stream, *p)
                    }
                    (Extent::State(g, Stream::Gradient), Content::Gradient { group, piece: p, .. }) => {
                        (g, piece) == (*group, *p)
                    }
                    (Extent::Boundary { call: c, place }, Content::Boundary { call, piece: p, moment }) => {
                        let its_place = moment.micro_batch.map(|micro_batch| micro_batch % self.vertical);
                        (c, Some(place), piece) == (*call, its_place, *p)
                    }
                    _ => false,
                };
                ensure(is_its, || format!("{content:?} would be written"))?;
                self.disk.insert((extent, piece), content.clone());
                Ok(())
            }
            Operation::Upload { group, piece, buffer, slot, staging } => {
                self.pass_through(staging);
                let updates = self.state(buffer.0, group, Stream::Master, piece)?;
                let slot = &mut self.slots[slot.0];
                if slot.as_ref().is_none_or(|(held, _)| *held != group) {
                    *slot = Some((group, vec![None; self.layout.pieces[group]]));
                }
                if let Some((_, pieces)) = slot {
                    pieces[piece] = Some(updates);
                }
                Ok(())
            }
            Operation::Download { group, piece, slot, buffer } => {
                let updates = self.in_slot(slot.0, group, piece)?;
                self.buffers[buffer.0] = Content::State { group, stream: Stream::Master, piece, updates };
                Ok(())
            }
            Operation::CopyUp { group, stream, piece, buffer, home } => {
                let updates = self.state(buffer.0, group, stream, piece)?;
                self.buffers[home.0] = Content::State { group, stream, piece, updates };
                Ok(())
            }
            Operation::CopyDown { group, stream, piece, home, buffer } => {
                let updates = self.state(home.0, group, stream, piece)?;
                self.buffers[buffer.0] = Content::State { group, stream, piece, updates };
                Ok(())
            }
            Operation::Attach { slot } => self.expect_parameters(slot.0, self.layout.resident(), moment),
            Operation::Forward { call, slot, passage, keeps, .. } => {
                let (group, pieces, _) = self.layout.calls[call];
                self.expect_parameters(slot.0, group, moment)?;
                if keeps {
                    self.graphs.push((call, moment));
                }
                if let Some(passage) = passage {
                    let pieces = (0..pieces).collect();
                    self.passages[passage.0] = Some(Passing { call, moment, pieces });
                }
                Ok(())
            }
            Operation::Backward { call, slot, passage, kept, gradients, .. } => {
                let (group, pieces, moves) = self.layout.calls[call];
                self.expect_parameters(slot.0, group, moment)?;
                let graph = self.graphs.iter().position(|graph| *graph == (call, moment));
                ensure(graph.is_some() == kept, || format!("a graph of call {call} in {:?}", self.graphs))?;
                graph.map(|graph| self.graphs.remove(graph));
                let passing = passage.and_then(|passage| self.passages[passage.0].take());
                let expected = moves.then(|| Passing { call, moment, pieces: (0..pieces).collect() });
                ensure(passing == expected, || format!("boundary {passing:?} and not {expected:?}"))?;
                self.sets[gradients.0] = Some(Set { group, call: Some(call), moment });
                Ok(())
            }
            Operation::Detach { slot, gradients, .. } => {
                let group = self.layout.resident();
                if let Some(slot) = slot {
                    self.expect_parameters(slot.0, group, moment)?;
                }
                if let Some(gradients) = gradients {
                    self.sets[gradients.0] = Some(Set { group, call: None, moment });
                }
                Ok(())
            }
            Operation::SaveBoundary { call, piece, passage, buffer, .. } => {
                let passing = &mut self.passages[passage.0];
                let is_its =
                    passing.as_ref().is_some_and(|passing| (passing.call, passing.moment) == (call, moment));
                ensure(is_its, || format!("boundary {passing:?} would be saved"))?;
                if piece + 1 == self.layout.calls[call].1 {
                    *passing = None;
                }
                self.buffers[buffer.0] = Content::Boundary { call, piece, moment };
                Ok(())
            }
            Operation::LoadBoundary { call, piece, passage, buffer, .. } => {
                let content = &self.buffers[buffer.0];
                let is_its = *content == Content::Boundary { call, piece, moment };
                ensure(is_its, || format!("{content:?} would be loaded"))?;
                let passing = &mut self.passages[passage.0];
                let same = |passing: &Passing| (passing.call, passing.moment) == (call, moment);
                if !passing.as_ref().is_some_and(same) {
                    *passing = Some(Passing { call, moment, pieces: BTreeSet::new() });
                }
                if let Some(passing) = passing {
                    passing.pieces.insert(piece);
                }
                Ok(())
            }
            Operation::Accumulate { group, piece, gradients, buffer, staging, add, measure } => {
                self.pass_through(staging);
                self.accumulate((group, piece), gradients.0, buffer.0, (add, measure), moment)
            }
            Operation::Norm => {
                let measured = self.layout.trainable_pieces.iter().zip(&self.measured);
                let all = measured
                    .clone()
                    .all(|(&pieces, &measured)| pieces == 0 || measured == (moment.step, pieces));
                ensure(all, || format!("the norm of {:?}", self.measured))?;
                self.normed_step = moment.step;
                Ok(())
            }
            Operation::Update { group, piece, master, first_moment, second_moment, gradient, .. } => {
                self.update((group, piece), master, [first_moment.0, second_moment.0], gradient.0)
            }
            Operation::Collect { group, piece, master } => {
                let updates = match master {
                    MasterPlace::Slot(slot) => self.in_slot(slot.0, group, piece)?,
                    MasterPlace::Buffer(buffer) => self.state(buffer.0, group, Stream::Master, piece)?,
                };
                self.collected.insert((group, piece), updates);
                Ok(())
            }
            Operation::Commit => {
                self.expect_committable(moment.updates)?;
                let is_state = |extent: &Extent| match extent {
                    Extent::State(_, stream) => Stream::STATE.contains(stream),
                    Extent::Boundary { .. } => false,
                };
                let states = self.disk.iter().filter(|((extent, _), _)| is_state(extent));
                self.committed = states.map(|(&place, content)| (place, content.clone())).collect();
                Ok(())
            }
        }
    }

    fn state(&self, buffer: usize, group: usize, stream: Stream, piece: usize) -> Result<u64, String> {
        match &self.buffers[buffer] {
            Content::State { group: g, stream: s, piece: p, updates }
                if (*g, *s, *p) == (group, stream, piece) =>
            {
                Ok(*updates)
            }
            other => Err(format!("buffer {buffer} has {other:?}")),
        }
    }

    fn in_slot(&self, slot: usize, group: usize, piece: usize) -> Result<u64, String> {
        match &self.slots[slot] {
            Some((held, pieces)) if *held == group => {
                pieces[piece].ok_or_else(|| format!("slot {slot} lacks piece {piece}"))
            }
            other => Err(format!("slot {slot} has {other:?}")),
        }
    }

    /// What was in a buffer of staging is gone.
    fn pass_through(&mut self, staging: Option<Buffer>) {
        if let Some(Buffer(staging)) = staging {
            self.buffers[staging] = Content::Nothing;
        }
    }

    fn accumulate(
        &mut self,
        (group, piece): (usize, usize),
        set: usize,
        buffer: usize,
        (add, measure): (bool, bool),
        moment: Moment,
    ) -> Checked {
        let (micro_batch, call) = match &self.sets[set] {
            Some(Set { group: of, call, moment: Moment { step, micro_batch: Some(micro_batch), .. } })
                if (*of, *step) == (group, moment.step) =>
            {
                (*micro_batch, *call)
            }
            other => return Err(format!("gradient set {set} has {other:?}")),
        };
        let step = moment.step;
        let mut parts = match (&self.buffers[buffer], add) {
            (_, false) => BTreeSet::new(),
            (Content::Gradient { group: g, piece: p, step: s, parts }, true)
                if (*g, *p, *s) == (group, piece, step) =>
            {
                parts.clone()
            }
            (other, true) => return Err(format!("a gradient would be added to {other:?}")),
        };
        // Sums have their parts in the order of the micro-batches, whatever ran beside whatever.
        let before = parts.iter().filter(|(_, of)| *of == call).count();
        ensure(micro_batch == before, || {
            format!("micro-batch {micro_batch} as number {before} of its call")
        })?;
        ensure(parts.insert((micro_batch, call)), || "the same gradient twice".into())?;
        if measure {
            ensure(parts == self.whole(group), || format!("{parts:?} would be measured"))?;
            let so_far = if piece == 0 { (step, 0) } else { self.measured[group] };
            ensure(so_far == (step, piece), || format!("measured after {so_far:?}"))?;
            self.measured[group] = (step, piece + 1);
        }
        if piece + 1 == self.layout.trainable_pieces[group] {
            self.sets[set] = None;
        }
        self.buffers[buffer] = Content::Gradient { group, piece, step, parts };
        Ok(())
    }

    /// An update takes the whole gradient of a step to states that have seen all updates before it and not
    /// this one.
    fn update(
        &mut self,
        (group, piece): (usize, usize),
        master: MasterPlace,
        moments: [usize; 2],
        gradient: usize,
    ) -> Checked {
        let step = match &self.buffers[gradient] {
            Content::Gradient { group: g, piece: p, step, parts }
                if (*g, *p) == (group, piece) && *parts == self.whole(group) =>
            {
                *step
            }
            other => return Err(format!("an update by {other:?}")),
        };
        ensure(!self.clip || self.normed_step >= step, || format!("no norm for the update of step {step}"))?;
        let streams = [Stream::FirstMoment, Stream::SecondMoment];
        let mut found = vec![match master {
            MasterPlace::Slot(slot) => self.in_slot(slot.0, group, piece)?,
            MasterPlace::Buffer(buffer) => self.state(buffer.0, group, Stream::Master, piece)?,
        }];
        for (stream, buffer) in streams.into_iter().zip(moments) {
            found.push(self.state(buffer, group, stream, piece)?);
        }
        ensure(found == [step - 1; 3], || {
            format!("update of step {step} to states after {found:?} updates")
        })?;
        match master {
            MasterPlace::Slot(slot) => {
                if let Some((_, pieces)) = &mut self.slots[slot.0] {
                    pieces[piece] = Some(step);
                }
            }
            MasterPlace::Buffer(buffer) => {
                let stream = Stream::Master;
                self.buffers[buffer.0] = Content::State { group, stream, piece, updates: step };
            }
        }
        for (stream, buffer) in streams.into_iter().zip(moments) {
            self.buffers[buffer] = Content::State { group, stream, piece, updates: step };
        }
        Ok(())
    }

    /// The machine of another process, which finds what was committed. Answers also whether that is the state
    /// after `updates` updates.
    pub fn restarted(&self, fresh: &Self, updates: u64) -> Result<Self, String> {
        let restarted =
            Self { disk: self.committed.clone(), committed: self.committed.clone(), ..fresh.clone() };
        restarted.expect_committable(updates)?;
        Ok(restarted)
    }

    /// Whether the states on disk are those after `updates` updates: what a commit makes durable.
    fn expect_committable(&self, updates: u64) -> Checked {
        for group in 0..self.layout.pieces.len() {
            for stream in Stream::STATE {
                let pieces = match stream {
                    Stream::Master => self.layout.pieces[group],
                    _ => self.layout.trainable_pieces[group],
                };
                for piece in 0..pieces {
                    let updates = self.layout.updates(group, piece, updates);
                    let found = self.disk.get(&(Extent::State(group, stream), piece));
                    let expected = Content::State { group, stream, piece, updates };
                    ensure(found == Some(&expected), || format!("on disk {found:?} and not {expected:?}"))?;
                }
            }
        }
        Ok(())
    }

    /// Whether all pieces were collected after `updates` updates.
    pub fn expect_collected(&self, updates: u64) -> Checked {
        for group in 0..self.layout.pieces.len() {
            for piece in 0..self.layout.pieces[group] {
                let found = self.collected.get(&(group, piece));
                let expected = self.layout.updates(group, piece, updates);
                ensure(found == Some(&expected), || format!("collected {found:?} and not {expected}"))?;
            }
        }
        Ok(())
    }
}
