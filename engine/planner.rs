//! Chooses a plan for a model that need not exist, on a machine that need not be here: searches over homes, slots, depths
//! and homes of boundaries, and costs each candidate's schedule with the simulator.
//!
//! Bytes are those of the engine's own arrangement. Two things are estimated that a run measures: the model's own tensors
//! and its computing time, see [`ModelShape`]. Schedules are costed in pieces that are as much larger as keeps their number
//! bounded, so that a trillion parameters take seconds to plan.

use crate::arrangement::{Depths, DeviceKind, GroupPlacement, STAGGER_BYTES};
use crate::builder::gradient_passes_through;
use crate::engine::AdamW;
use crate::error::{Error, Result};
use crate::layout::{ALIGNMENT_ELEMENTS, Layout};
use crate::pass::Observed;
use crate::plan::{Bytes, Limits, Placement, Plan};
use crate::schedule::Stream;
use crate::shape::ModelShape;
use crate::simulator::{Forecast, Machine};
use candle_core::DType;
use ferrozero_offload::Tier;
use std::sync::Arc;

/// Pieces of a run, as `train` cuts them.
const PIECE_ELEMENTS: usize = 1 << 20;
/// Pieces of all groups together that a schedule is costed in.
const COSTED_PIECES: usize = 1500;
/// Memory of a device that its driver and libraries take: CUDA's context and the workspace of its matrix products.
const DEVICE_RESERVE_BYTES: u64 = 1 << 30;
/// Plans whose steps differ by less than this share are equal, and the one with fewer bytes is better.
const SAME_TIME: f64 = 0.005;

/// What is fixed by the user. Everything that is none is chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choices {
    /// Home of all state streams.
    pub placement: Option<Tier>,
    /// Home of boundary activations.
    pub boundaries: Option<Tier>,
    /// Slots of each class of groups.
    pub slots: Option<usize>,
    /// Pieces read ahead.
    pub look_ahead: Option<usize>,
}

/// A model, a step and a machine.
#[derive(Debug, Clone)]
pub struct Question {
    /// The model.
    pub shape: ModelShape,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Whether the norm of all gradients is clipped, so that it is needed before any update.
    pub clip: bool,
    /// Whether states are on disk once and not twice.
    pub in_place: bool,
    /// Ranks that share the states. The answer is for one of them, and the machine is what one of them has.
    pub ranks: usize,
    /// The machine.
    pub machine: Machine,
    /// What is fixed.
    pub choices: Choices,
}

/// The best plan that was found.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Homes, buffers and bytes.
    pub plan: Plan,
    /// Time.
    pub forecast: Forecast,
    /// Home of boundary activations.
    pub boundaries: Tier,
    /// Slots and pieces.
    pub depths: Depths,
    /// Bytes of files.
    pub disk_bytes: u64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Plans that were costed.
    pub costed: usize,
}

impl Question {
    fn device(&self) -> DeviceKind {
        let apart = self.machine.is_apart();
        DeviceKind { dtype: if apart { DType::BF16 } else { DType::F32 }, apart }
    }

    fn limits(&self) -> Limits {
        let reserve = if self.machine.is_apart() { DEVICE_RESERVE_BYTES } else { 0 };
        Limits {
            memory_bytes: self.machine.host_memory_bytes,
            device_bytes: self.machine.device_memory_bytes.map(|bytes| bytes.saturating_sub(reserve)),
            placement: Placement::Auto,
            boundaries: self.choices.boundaries,
            slots: self.choices.slots,
            look_ahead: self.choices.look_ahead,
            device: self.device(),
        }
    }

    fn tokens(&self) -> usize {
        self.batch * self.sequence
    }

    fn has_disk(&self) -> bool {
        self.machine.disk_bytes != Some(0)
    }

    fn clip_norm(&self) -> Option<f64> {
        self.clip.then_some(1.0)
    }

    /// What a rehearsal would find out.
    fn observed(&self, boundaries: Tier) -> Observed {
        let element_bytes = self.device().element_bytes() as usize;
        let calls = self.shape.calls(self.tokens(), element_bytes);
        let kept: u64 = calls.iter().map(|call| 4 * call.boundary_elements as u64).sum();
        let kept = if boundaries == Tier::Device { kept } else { 0 };
        // On a device of its own the cross-entropy is composed of candle's operations, which have all logits.
        let own = self.shape.working_bytes(self.tokens(), element_bytes, self.machine.is_apart());
        Observed { calls, working_bytes: Some(kept + own) }
    }

    fn depths(&self) -> Vec<Depths> {
        let depths = |slots: usize, look_ahead: usize, state_pieces, gradient_sets| Depths {
            slots: self.choices.slots.unwrap_or(slots),
            look_ahead: self.choices.look_ahead.unwrap_or(look_ahead),
            state_pieces,
            gradient_sets,
        };
        let mut all = vec![depths(2, 4, 16, 2), depths(1, 1, 4, 1), depths(2, 4, 16, 1), depths(3, 8, 32, 2)];
        all.dedup();
        all
    }

    fn boundary_homes(&self) -> Vec<Tier> {
        match self.choices.boundaries {
            Some(tier) => vec![tier],
            None if self.has_disk() => vec![Tier::Device, Tier::Host, Tier::Disk],
            None => vec![Tier::Device, Tier::Host],
        }
    }

    /// The plan that takes the least time of those that fit.
    ///
    /// # Errors
    /// [`Error::BudgetTooSmall`] with what is missing, and [`Error::Configuration`] for a disk that is too small or a machine
    /// whose speed of computing is not known.
    pub fn answer(&self) -> Result<Answer> {
        let flop_per_s = match self.machine.is_apart() {
            true => self.machine.matmul_bf16_flop_per_s,
            false => self.machine.matmul_f32_flop_per_s,
        };
        let flop_per_s = flop_per_s.ok_or_else(|| {
            Error::Configuration(
                "the machine's file does not say how fast matrix products are: make one with ferrozero probe"
                    .into(),
            )
        })?;
        let compute = self.shape.compute(self.batch, self.sequence, flop_per_s);
        let fitting = self.fitting(false)?;
        let costed = fitting.len();
        let mut best: Option<Answer> = None;
        for Candidate { plan, boundaries, depths } in fitting {
            let forecast = self.costed(&plan, boundaries, depths).forecast(&self.machine, &compute);
            let disk_bytes = self.disk_bytes(&plan);
            let tokens_per_s = (self.tokens() * self.accumulate) as f64 / forecast.step_s;
            let answer = Answer { plan, forecast, boundaries, depths, disk_bytes, tokens_per_s, costed };
            let is_better = best.as_ref().is_none_or(|best| {
                let ratio = answer.forecast.step_s / best.forecast.step_s;
                // Of plans that are equally fast, the one that wears the disk least, and of those the smallest.
                let wear = |answer: &Answer| {
                    let bytes = answer.plan.device_bytes() + answer.plan.host_bytes();
                    (answer.forecast.written_bytes, bytes)
                };
                ratio < 1.0 - SAME_TIME || (ratio < 1.0 + SAME_TIME && wear(&answer) < wear(best))
            });
            if is_better {
                best = Some(answer);
            }
        }
        best.ok_or_else(|| Error::Configuration("there is no plan to choose from".into()))
    }

    /// Whether any plan fits.
    pub fn fits(&self) -> bool {
        self.fitting(true).is_ok()
    }

    /// Plans that fit; at least one.
    fn fitting(&self, one_is_enough: bool) -> Result<Vec<Candidate>> {
        let layout = Arc::new(self.shape.layout(PIECE_ELEMENTS, self.ranks));
        let mut found: Vec<Candidate> = vec![];
        let mut refusal: Option<Error> = None;
        for boundaries in self.boundary_homes() {
            for depths in self.depths() {
                for priority in PRIORITIES {
                    match self.place(&layout, boundaries, depths, priority) {
                        Ok(plan) => {
                            let is_new = found.iter().all(|other| {
                                other.plan.placements() != plan.placements()
                                    || other.depths != depths
                                    || other.boundaries != boundaries
                            });
                            if is_new {
                                found.push(Candidate { plan, boundaries, depths });
                            }
                            if one_is_enough {
                                return Ok(found);
                            }
                        }
                        Err(error) => refusal = Some(least(refusal, error)),
                    }
                }
            }
        }
        match refusal {
            Some(refusal) if found.is_empty() => Err(refusal),
            _ => Ok(found),
        }
    }

    /// Everything in the farthest tier, and then as much as fits brought closer in the order of `priority`.
    fn place(
        &self,
        layout: &Arc<Layout>,
        boundaries: Tier,
        depths: Depths,
        priority: [Stream; 4],
    ) -> Result<Plan> {
        let limits = self.limits();
        let make = |placements: Vec<GroupPlacement>| {
            self.plan_with(layout, &limits, (placements, boundaries, depths))
        };
        let far = self.choices.placement.unwrap_or(if self.has_disk() { Tier::Disk } else { Tier::Host });
        let mut placements = vec![GroupPlacement::all(far); layout.groups.len()];
        if limits.device.holds_masters() {
            placements[layout.resident()].master = Tier::Device;
        }
        let start = make(placements.clone());
        if !start.fits() {
            return Err(start.too_small());
        }
        self.check_disk(&start)?;
        if self.choices.placement.is_some() || far != Tier::Disk {
            return Ok(start);
        }
        // What is left is given out by arithmetic; the plan that comes of it is counted in full.
        let mut left = limits.memory_bytes.map_or(u64::MAX, |limit| limit - start.memory_bytes());
        let mut moved = vec![];
        let passes = gradient_passes_through(start.calls(), self.accumulate, self.clip);
        let resident = layout.resident();
        for stream in priority.into_iter().filter(|&stream| stream != Stream::Gradient || !passes) {
            for group in std::iter::once(resident).chain(0..resident) {
                let bytes = home_bytes(layout, stream.elements(layout, group));
                if placements[group].home(stream) == Tier::Disk && bytes <= left {
                    left -= bytes;
                    let in_slot = stream == Stream::Master && limits.device.holds_masters();
                    placements[group].set_home(stream, if in_slot { Tier::Device } else { Tier::Host });
                    moved.push((group, stream));
                }
            }
        }
        loop {
            let plan = make(placements.clone());
            if plan.fits() {
                return Ok(plan);
            }
            let Some((group, stream)) = moved.pop() else { return Ok(start) };
            placements[group].set_home(stream, Tier::Disk);
        }
    }

    fn plan_with(
        &self,
        layout: &Arc<Layout>,
        limits: &Limits,
        (placements, boundaries, depths): (Vec<GroupPlacement>, Tier, Depths),
    ) -> Plan {
        let make = |observed: &Observed| {
            let homes = (placements.clone(), boundaries, depths);
            let step = (self.accumulate, self.clip_norm());
            Plan::with(layout, observed, limits, &AdamW::default(), step, homes)
        };
        let mut observed = self.observed(boundaries);
        let plan = make(&observed);
        if self.ranks == 1 {
            return plan;
        }
        // A rank holds its share of a group's states, and in slots and gradients the whole group.
        let whole = (self.ranks as u64 - 1) * plan.slot_and_gradient_bytes();
        observed.working_bytes = observed.working_bytes.map(|bytes| bytes + whole);
        make(&observed)
    }

    /// The plan in the pieces that it is costed in.
    fn costed(&self, plan: &Plan, boundaries: Tier, depths: Depths) -> Plan {
        let elements: usize = plan.layout().groups.iter().map(|group| group.elements).sum();
        let piece = (elements / COSTED_PIECES).next_multiple_of(ALIGNMENT_ELEMENTS).max(PIECE_ELEMENTS);
        let layout = Arc::new(Layout { piece_elements: piece, ..plan.layout().clone() });
        self.plan_with(&layout, &self.limits(), (plan.placements().to_vec(), boundaries, depths))
    }

    /// Bytes of files: with a disk all states are on it, twice unless in place, and what has its home there alone.
    fn disk_bytes(&self, plan: &Plan) -> u64 {
        if !self.has_disk() {
            return 0;
        }
        let states = Stream::STATE.into_iter().flat_map(|stream| {
            let layout = plan.layout();
            (0..layout.groups.len()).map(move |group| 4 * stream.elements(layout, group) as u64)
        });
        let copies = if self.in_place { 1 } else { 2 };
        copies * states.sum::<u64>() + plan.scratch_disk_bytes()
    }

    fn check_disk(&self, plan: &Plan) -> Result<()> {
        let needed = self.disk_bytes(plan);
        match self.machine.disk_bytes {
            Some(limit) if needed > limit => Err(Error::Configuration(format!(
                "the disk must hold {} and may hold {}: states are kept twice so that a kill loses nothing (--in-place keeps \
                 them once), or make the model smaller",
                Bytes(needed),
                Bytes(limit)
            ))),
            _ => Ok(()),
        }
    }

    /// The largest model of the family that has a plan, by the number of its blocks.
    pub fn largest(&self) -> Option<ModelShape> {
        let fits = |layers: usize| Self { shape: self.shape.grown(layers), ..self.clone() }.fits();
        let mut fitting = 1;
        if !fits(fitting) {
            return None;
        }
        let mut too_large = 2;
        while too_large < LAYERS_MAX && fits(too_large) {
            fitting = too_large;
            too_large *= 2;
        }
        while too_large - fitting > 1 {
            let middle = fitting.midpoint(too_large);
            match fits(middle) {
                true => fitting = middle,
                false => too_large = middle,
            }
        }
        Some(self.shape.grown(fitting))
    }

    /// What a better machine would make of it: the change, and how many times as fast, the most first.
    pub fn advice(&self, answer: &Answer) -> Vec<(String, f64)> {
        let mut changes: Vec<(String, Self)> = vec![];
        let mut add = |text: String, change: &dyn Fn(&mut Self)| {
            let mut changed = self.clone();
            change(&mut changed);
            changes.push((text, changed));
        };
        if let Some(bytes) = self.machine.host_memory_bytes {
            let more = (bytes / 4).max(64 << 20).next_power_of_two();
            add(format!("{} more host memory", Bytes(more)), &|changed| {
                changed.machine.host_memory_bytes = Some(bytes + more);
            });
        }
        if self.has_disk() {
            add("a disk twice as fast".into(), &|changed| {
                changed.machine.disk_read_bytes_per_s *= 2.0;
                changed.machine.disk_write_bytes_per_s *= 2.0;
                changed.machine.disk_mixed_bytes_per_s =
                    changed.machine.disk_mixed_bytes_per_s.map(|mixed| 2.0 * mixed);
            });
        }
        add("host memory twice as fast".into(), &|changed| changed.machine.optimizer_bytes_per_s *= 2.0);
        add("a bus twice as fast".into(), &|changed| {
            changed.machine.upload_bytes_per_s *= 2.0;
            changed.machine.download_bytes_per_s *= 2.0;
        });
        add("computing twice as fast".into(), &|changed| {
            for flop_per_s in
                [&mut changed.machine.matmul_f32_flop_per_s, &mut changed.machine.matmul_bf16_flop_per_s]
            {
                *flop_per_s = flop_per_s.map(|flop_per_s| 2.0 * flop_per_s);
            }
        });
        add(format!("a batch of {}", 2 * self.batch), &|changed| changed.batch *= 2);
        let mut faster: Vec<(String, f64)> = changes
            .into_iter()
            .filter_map(|(text, changed)| {
                let changed = changed.answer().ok()?;
                Some((text, changed.tokens_per_s / answer.tokens_per_s))
            })
            .collect();
        faster.sort_by(|a, b| b.1.total_cmp(&a.1));
        faster
    }
}

/// More blocks than any model has.
const LAYERS_MAX: usize = 4096;

/// Which streams come into memory first. Gradients and parameters cross most often, moments twice a step.
const PRIORITIES: [[Stream; 4]; 2] = [
    [Stream::Gradient, Stream::Master, Stream::FirstMoment, Stream::SecondMoment],
    [Stream::Master, Stream::FirstMoment, Stream::SecondMoment, Stream::Gradient],
];

struct Candidate {
    plan: Plan,
    boundaries: Tier,
    depths: Depths,
}

/// Of two refusals, the one that less is missing for. One for the host's memory came of a plan that the device has room
/// for, so it goes before one for the device's; a disk that is too small is said where memory would be enough.
fn least(one: Option<Error>, other: Error) -> Error {
    let rank = |error: &Error| match error {
        Error::BudgetTooSmall { tier: Tier::Device, needed_bytes, .. } => (2, *needed_bytes),
        Error::BudgetTooSmall { needed_bytes, .. } => (1, *needed_bytes),
        _ => (0, 0),
    };
    match one {
        Some(one) if rank(&one) <= rank(&other) => one,
        _ => other,
    }
}

/// Bytes of the buffers that are home to a stream of `elements`.
fn home_bytes(layout: &Layout, elements: usize) -> u64 {
    let page = |elements: usize| (4 * elements + STAGGER_BYTES).next_multiple_of(4096) as u64;
    let whole = elements / layout.piece_elements;
    let rest = elements % layout.piece_elements;
    whole as u64 * page(layout.piece_elements) + if rest > 0 { page(rest) } else { 0 }
}
