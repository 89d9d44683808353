//! The search for a plan: homes, slots, look-ahead, homes of boundaries, graphs that are kept, how many
//! micro-batches run vertically, and the moment of updates, within the limits, each candidate's schedule
//! costed by the simulator. Runs and `ferrozero plan` use it alike; what differs is where the numbers come
//! from.
//!
//! Bytes are those of the engine's own buffer plan. Schedules are costed in pieces that are as much larger as
//! keeps their number bounded, so that a trillion parameters take seconds to plan.

mod homes;

use crate::error::{Error, Result};
use crate::planner::machine::Machine;
use crate::planner::observed::Observed;
use crate::planner::optimizer::AdamW;
use crate::planner::plan::{Choices, Limits, Placement, Plan, Prediction, Updates};
use crate::planner::simulator::Forecast;
use crate::schedule::buffer_plan::{Depths, GroupPlacement};
use crate::schedule::builder::runs_each_once;
use crate::schedule::layout::{ALIGNMENT_ELEMENTS, Layout};
use crate::schedule::operation::Stream;
use ferrozero_offload::Tier;
use std::sync::Arc;

/// Pieces of all groups together that a schedule is costed in.
const COSTED_PIECES: usize = 600;
/// Plans whose steps differ by less than this share are equal, and the one with fewer bytes is better.
const SAME_TIME: f64 = 0.005;

/// Which streams come into memory first. Gradients and parameters cross most often, moments twice a step.
const ORDERS: [[Stream; 4]; 4] = [
    [Stream::Gradient, Stream::Master, Stream::FirstMoment, Stream::SecondMoment],
    [Stream::Master, Stream::Gradient, Stream::FirstMoment, Stream::SecondMoment],
    [Stream::Master, Stream::FirstMoment, Stream::Gradient, Stream::SecondMoment],
    [Stream::Master, Stream::FirstMoment, Stream::SecondMoment, Stream::Gradient],
];

/// Slots, pieces read ahead, pieces of the optimizer's pipeline and gradient sets that are tried.
const DEPTHS: [(usize, usize, usize, usize); 4] = [(2, 4, 16, 2), (1, 1, 4, 1), (2, 4, 16, 1), (3, 8, 32, 2)];

/// Streams of state that the optimizer reads together.
const STREAMS: usize = Stream::ALL.len();

/// What is searched for.
#[derive(Clone)]
pub(crate) struct Search<'a> {
    /// Groups, in the pieces of the run.
    pub layout: Arc<Layout>,
    /// What the user grants and fixes.
    pub limits: Limits,
    /// The optimizer.
    pub adamw: AdamW,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Whether, and to what, the norm of all gradients is clipped.
    pub clip: Option<f64>,
    /// Whether states can be left on disk.
    pub has_disk: bool,
    /// Ranks that share the states.
    pub ranks: usize,
    /// The model as it was rehearsed, or estimated, with each home of boundaries that is tried.
    pub observed: Vec<(Tier, Observed)>,
    /// Refuses plans for other reasons than memory.
    pub check: &'a dyn Fn(&Plan) -> Result<()>,
}

/// How what the limits leave is given out.
#[derive(Clone, Copy)]
struct Policy {
    /// Streams that come into memory first.
    order: [Stream; 4],
    /// Whether whole groups are at home on a device with memory of its own, as many as fit.
    admit: bool,
    /// Whether graphs are kept.
    graphs: Graphs,
}

/// Which graphs of forwards are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Graphs {
    /// As many as the depths say.
    AsFixed,
    /// As many as there is room for when all states are as far away as they can be.
    BeforeStates,
    /// As many as there is room for when states are as near as they can be.
    AfterStates,
}

impl Search<'_> {
    /// The plan that takes the least time on `machine`, of those that fit.
    ///
    /// # Errors
    /// [`Error::BudgetTooSmall`] with what is missing, [`Error::Configuration`] for homes and machines that
    /// cannot be, and what `check` says.
    pub fn best(&self, machine: &Machine) -> Result<Plan> {
        machine.check()?;
        let fitting = self.fitting(false).map_err(|error| self.with_what_would_fit(error))?;
        let moments: &[bool] = match self.limits.choices.updates {
            // Only where the norm comes first there is a choice of when updates are made.
            None if self.clip.is_some() => &[false, true],
            Some(Updates::AtOnce) => &[true],
            _ => &[false],
        };
        let costed = fitting.len() * moments.len();
        let mut candidates = vec![];
        for (plan, observed) in fitting {
            let coarse = self.costed(&plan, observed);
            let (least_s, written_bytes) = coarse.least(machine, &observed.compute);
            candidates.push((least_s, wear(&plan, written_bytes), plan, coarse, observed));
        }
        candidates.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
        let mut best: Option<(Plan, Prediction)> = None;
        for (least_s, wear_of_it, mut plan, mut coarse, observed) in candidates {
            // What is at its best slower, or as fast and no better otherwise, is not worth costing.
            let is_worse = |(best, prediction): &(Plan, Prediction)| {
                let Forecast { step_s, written_bytes, .. } = prediction.forecast;
                let is_heavier = wear_of_it >= wear(best, written_bytes);
                least_s > step_s * if is_heavier { 1.0 - SAME_TIME } else { 1.0 + SAME_TIME }
            };
            if best.as_ref().is_some_and(is_worse) {
                continue;
            }
            for &at_once in moments {
                (plan.updates_at_once, coarse.updates_at_once) = (at_once, at_once);
                let forecast = coarse.forecast(machine, &observed.compute);
                let found = (plan.clone(), Prediction { forecast, costed });
                if best.as_ref().is_none_or(|best| is_better(&found, best)) {
                    best = Some(found);
                }
            }
        }
        let (mut plan, prediction) =
            best.ok_or_else(|| Error::Configuration("there is no plan to choose from".into()))?;
        plan.prediction = Some(prediction);
        Ok(plan)
    }

    /// Plans that fit; at least one.
    ///
    /// # Errors
    /// As [`Self::best`].
    pub fn fitting(&self, one_is_enough: bool) -> Result<Vec<(Plan, &Observed)>> {
        self.check_homes()?;
        self.check_vertical()?;
        self.check_depths()?;
        let mut found: Vec<(Plan, &Observed)> = vec![];
        let mut refusal: Option<Error> = None;
        for (boundaries, observed) in &self.observed {
            for depths in self.depths(observed) {
                for policy in self.policies(observed) {
                    match self.place(observed, (*boundaries, depths), policy) {
                        Ok(plan) => {
                            if !found.iter().any(|(other, _)| other.has_same_choices(&plan)) {
                                found.push((plan, observed));
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

    fn check_homes(&self) -> Result<()> {
        let (start, device) = (self.start(), self.limits.device);
        let on_device = Stream::ALL.iter().filter(|&&stream| start.home(stream) == Tier::Device).count();
        let whole = device.apart && on_device == Stream::ALL.len();
        if on_device > 0 && !device.holds_masters() && !whole {
            return Err(Error::Configuration(
                "some state streams have their home on the device, which cannot be alone: on a CUDA device \
                 all streams of a group are at home or none, and on the CPU device they are apart from \
                 parameters in another type than f32"
                    .into(),
            ));
        }
        Ok(())
    }

    fn check_vertical(&self) -> Result<()> {
        let Some(vertical) = self.limits.choices.vertical else { return Ok(()) };
        if !(1..=self.accumulate).contains(&vertical) {
            return Err(Error::Configuration(format!(
                "vertical is {vertical}, and a step has {} micro-batches: use from 1 to as many",
                self.accumulate
            )));
        }
        if vertical > 1 && self.observed.iter().any(|(_, observed)| !runs_each_once(&observed.calls)) {
            return Err(Error::Configuration(
                "micro-batches cannot run vertically through a segment that runs twice, because its \
                 gradients would be summed in another order: leave vertical out"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Whether what is fixed can be, however much memory there is.
    fn check_depths(&self) -> Result<()> {
        let Choices { slots, look_ahead, state_pieces, gradient_sets, kept, updates, .. } =
            self.limits.choices;
        let wrong = |text: String| Err(Error::Configuration(text));
        let depths = [("slots", slots), ("look_ahead", look_ahead), ("gradient_sets", gradient_sets)];
        if let Some((name, _)) = depths.iter().find(|(_, depth)| *depth == Some(0)) {
            return wrong(format!("{name} is 0: use 1 or more, or leave it out"));
        }
        if let Some(pieces) = state_pieces.filter(|&pieces| pieces == 0 || pieces % STREAMS != 0) {
            return wrong(format!(
                "state_pieces is {pieces}: an update has a piece of each of {STREAMS} streams, so use a \
                 multiple of {STREAMS}"
            ));
        }
        let calls = self.observed.iter().map(|(_, observed)| observed.calls.len()).min().unwrap_or(0);
        if let Some(kept) = kept.filter(|&kept| kept > calls) {
            return wrong(format!("kept is {kept}, and a step runs {calls} segments: use from 0 to as many"));
        }
        if updates.is_some() && self.clip.is_none() {
            return wrong(
                "updates is set, but without clipping a group is updated within its own backward: leave \
                 updates out, or clip"
                    .into(),
            );
        }
        Ok(())
    }

    /// A refusal that says what would fit if the planner had the choice, if anything would.
    fn with_what_would_fit(&self, error: Error) -> Error {
        let Error::BudgetTooSmall { tier, needed_bytes, budget_bytes, least_bytes, culprit } = error else {
            return error;
        };
        // The model is known with the homes of boundaries that were tried, so those stay.
        let Choices { boundaries, updates, piece_bytes, .. } = self.limits.choices;
        let choices = Choices { boundaries, updates, piece_bytes, ..Choices::default() };
        let is_free = choices == self.limits.choices;
        let free = Self { limits: Limits { choices, ..self.limits.clone() }, ..self.clone() };
        let culprit =
            match free.fitting(true).ok().filter(|_| !is_free).as_ref().and_then(|found| found.first()) {
                Some((plan, _)) => {
                    let Depths { slots, look_ahead, state_pieces, gradient_sets, vertical, kept } =
                        plan.depths();
                    format!(
                        "{culprit}. Without what was fixed it fits, as with slots {slots}, look_ahead \
                     {look_ahead}, state_pieces {state_pieces}, gradient_sets {gradient_sets}, vertical \
                     {vertical}, kept {kept} and homes that are chosen"
                    )
                }
                None => culprit,
            };
        Error::BudgetTooSmall { tier, needed_bytes, budget_bytes, least_bytes, culprit }
    }

    fn depths(&self, observed: &Observed) -> Vec<Depths> {
        let mut all: Vec<Depths> = vec![];
        for vertical in self.verticals(observed) {
            for (slots, look_ahead, state_pieces, gradient_sets) in DEPTHS {
                let choices = &self.limits.choices;
                all.push(Depths {
                    slots: choices.slots.unwrap_or(slots),
                    look_ahead: choices.look_ahead.unwrap_or(look_ahead),
                    state_pieces: choices.state_pieces.unwrap_or(state_pieces),
                    gradient_sets: choices.gradient_sets.unwrap_or(gradient_sets),
                    vertical,
                    kept: choices.kept.unwrap_or(0),
                });
            }
        }
        all.dedup();
        all
    }

    /// How many micro-batches may run vertically: one, and by doubling up to all.
    fn verticals(&self, observed: &Observed) -> Vec<usize> {
        if let Some(vertical) = self.limits.choices.vertical {
            return vec![vertical];
        }
        // What a micro-batch's own tensors take must be known to say how many fit. A segment that runs twice
        // has its gradients summed in the order of the micro-batches.
        if observed.working_bytes.is_none() || !runs_each_once(&observed.calls) {
            return vec![1];
        }
        let halves = std::iter::successors(Some(self.accumulate), |&n| (n > 1).then(|| n.div_ceil(2)));
        let mut verticals: Vec<usize> = halves.collect();
        verticals.reverse();
        verticals
    }

    fn policies(&self, observed: &Observed) -> Vec<Policy> {
        let graphs: &[Graphs] = match self.limits.choices.kept {
            None if self.has_limit() && !observed.kept.is_empty() => {
                &[Graphs::AsFixed, Graphs::AfterStates, Graphs::BeforeStates]
            }
            _ => &[Graphs::AsFixed],
        };
        let with_graphs = |(order, admit)| graphs.iter().map(move |&graphs| Policy { order, admit, graphs });
        if self.limits.choices.placement != Placement::Auto {
            return with_graphs((ORDERS[0], false)).collect();
        }
        // What the model's own tensors take must be known to say what fits beside them.
        let can_admit = self.limits.device.apart
            && observed.working_bytes.is_some()
            && self.limits.device_bytes.is_some();
        let admissions: &[bool] = if can_admit { &[true, false] } else { &[false] };
        let orders: &[[Stream; 4]] = if self.has_disk { &ORDERS } else { &ORDERS[..1] };
        let each = orders.iter().flat_map(|&order| admissions.iter().map(move |&admit| (order, admit)));
        each.flat_map(with_graphs).collect()
    }

    /// Whether there is a limit to the memory that graphs would take: without one nobody knows how many fit.
    fn has_limit(&self) -> bool {
        let Limits { memory_bytes, device_bytes, device, .. } = &self.limits;
        device_bytes.or(if device.apart { None } else { *memory_bytes }).is_some()
    }

    /// The plan with these homes and depths, whether it fits or not.
    pub fn plan_with(
        &self,
        layout: &Arc<Layout>,
        observed: &Observed,
        placements: Vec<GroupPlacement>,
        (boundaries, depths): (Tier, Depths),
    ) -> Plan {
        let make = |observed: &Observed| {
            let homes = (placements.clone(), boundaries, depths);
            Plan::with(layout, observed, &self.limits, &self.adamw, (self.accumulate, self.clip), homes)
        };
        let plan = make(observed);
        if self.ranks == 1 {
            return plan;
        }
        // A rank holds its share of a group's states, and in slots and gradients the whole group.
        let whole = (self.ranks as u64 - 1) * plan.slot_and_gradient_bytes();
        let working_bytes = observed.working_bytes.map(|bytes| bytes + whole);
        make(&Observed { working_bytes, ..observed.clone() })
    }

    /// The plan in the pieces that it is costed in.
    fn costed(&self, plan: &Plan, observed: &Observed) -> Plan {
        let elements: usize = self.layout.groups.iter().map(|group| group.elements).sum();
        let piece = (elements / COSTED_PIECES).next_multiple_of(ALIGNMENT_ELEMENTS);
        let piece_elements = piece.max(self.layout.piece_elements);
        let layout = Arc::new(Layout { piece_elements, ..(*self.layout).clone() });
        self.plan_with(&layout, observed, plan.placements().to_vec(), (plan.boundaries(), plan.depths()))
    }
}

/// Of plans that are equally fast, the one that wears the disk least is better, and of those the smallest.
fn is_better(found: &(Plan, Prediction), best: &(Plan, Prediction)) -> bool {
    let ratio = found.1.forecast.step_s / best.1.forecast.step_s;
    // Steps that take no time at all are equal.
    let is_same = ratio.is_nan() || (ratio - 1.0).abs() <= SAME_TIME;
    let wear_of = |(plan, prediction): &(Plan, Prediction)| wear(plan, prediction.forecast.written_bytes);
    if is_same { wear_of(found) < wear_of(best) } else { ratio < 1.0 }
}

/// What a plan takes beside time: bytes written to disk, and bytes of memory.
fn wear(plan: &Plan, written_bytes: u64) -> (u64, u64) {
    (written_bytes, plan.device_bytes() + plan.host_bytes())
}

/// Of two refusals, the one that less is missing for. One for the host's memory came of a plan that the
/// device has room for, so it goes before one for the device's; a disk that is too small is said where memory
/// would be enough.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::observed::KeptGraph;
    use crate::planner::simulator::{Compute, ComputeTime};
    use crate::schedule::buffer_plan::DeviceKind;
    use crate::schedule::layout::Group;
    use crate::schedule::operation::Call;
    use candle_core::DType;

    const GROUPS: usize = 4;
    /// Bytes of one group's parameters in f32.
    const GROUP_BYTES: u64 = 4 * 8 * ALIGNMENT_ELEMENTS as u64;

    /// Searches with `change` to a search whose limits are none, on a machine whose bus, host and disk are
    /// what is slow.
    fn search(working_bytes: Option<u64>, change: impl FnOnce(&mut Search)) -> Result<Plan> {
        let group = |index: usize| {
            let table = vec![(index, format!("p.{index}"), vec![8 * ALIGNMENT_ELEMENTS], true, true)];
            Group::new(format!("h.{index}"), index == GROUPS, table)
        };
        let groups = (0..=GROUPS).map(group).collect();
        let layout = Arc::new(Layout { groups, piece_elements: 4 * ALIGNMENT_ELEMENTS });
        let call = |group| Call::new(group, 0, false);
        let limits = Limits {
            memory_bytes: None,
            device_bytes: None,
            choices: Choices::default(),
            device: DeviceKind { dtype: DType::BF16, apart: true },
        };
        let calls = (0..GROUPS).map(call).collect();
        let observed =
            Observed { calls, working_bytes, parked_bytes: 0, kept: vec![], compute: Compute::none(GROUPS) };
        let mut search = Search {
            layout,
            limits,
            adamw: AdamW::default(),
            accumulate: 1,
            clip: Some(1.0),
            has_disk: false,
            ranks: 1,
            observed: vec![(Tier::Device, observed)],
            check: &|_| Ok(()),
        };
        change(&mut search);
        let slow = 1e9;
        let machine = Machine {
            disk_read_bytes_per_s: slow,
            disk_write_bytes_per_s: slow,
            upload_bytes_per_s: slow,
            download_bytes_per_s: slow,
            optimizer_bytes_per_s: slow,
            device_memory_bytes_per_s: Some(1e12),
            ..Machine::default()
        };
        search.best(&machine)
    }

    /// A plan for a device with memory of its own, of which `device_bytes` are granted.
    fn plan(working_bytes: Option<u64>, device_bytes: Option<u64>, clip: Option<f64>) -> Result<Plan> {
        search(working_bytes, |search| {
            search.clip = clip;
            search.limits.device_bytes = device_bytes;
        })
    }

    fn on_device(plan: &Plan) -> usize {
        let whole = GroupPlacement::all(Tier::Device);
        plan.placements().iter().filter(|&&placement| placement == whole).count()
    }

    #[test]
    fn a_device_of_its_own_takes_as_many_whole_groups_as_fit_and_the_host_has_the_others() {
        let none = on_device(&plan(Some(0), Some(4 * GROUP_BYTES), Some(1.0)).unwrap());
        assert_eq!(none, 0);
        let mut before = 0;
        for groups in 4..40 {
            let limit = groups * GROUP_BYTES;
            let plan = plan(Some(0), Some(limit), Some(1.0)).unwrap();
            assert!(plan.device_bytes() <= limit);
            assert!(on_device(&plan) >= before, "{groups}");
            before = on_device(&plan);
            let host = GroupPlacement::all(Tier::Host);
            assert!(plan.placements().iter().all(|&p| p == host || p == GroupPlacement::all(Tier::Device)));
        }
        assert_eq!(before, GROUPS + 1);
    }

    #[test]
    fn where_the_models_own_tensors_are_not_counted_nothing_is_put_beside_them() {
        assert_eq!(on_device(&plan(None, Some(1 << 40), None).unwrap()), 0);
        assert_eq!(on_device(&plan(Some(0), None, None).unwrap()), 0);
    }

    #[test]
    fn a_device_that_is_too_small_is_told_apart_from_a_host_that_is() {
        let error = plan(Some(0), Some(GROUP_BYTES), None).unwrap_err();
        assert!(matches!(error, Error::BudgetTooSmall { tier: Tier::Device, .. }), "{error}");
    }

    #[test]
    fn graphs_are_kept_as_many_as_a_limit_leaves_room_for() {
        let kept = |memory_bytes, kept| {
            let plan = search(Some(0), |search| {
                search.has_disk = true;
                search.limits.device = DeviceKind { dtype: DType::F32, apart: false };
                (search.limits.choices.kept, search.limits.memory_bytes) = (kept, memory_bytes);
                let (_, observed) = &mut search.observed[0];
                observed.kept = vec![KeptGraph { bytes: 1 << 20, beyond_bytes: 0 }; GROUPS];
                observed.compute.backward = vec![ComputeTime { before_s: 0.0, within_s: 3.0 }; GROUPS];
                observed.compute.again_s = vec![1.0; GROUPS];
            });
            plan.map(|plan| (plan.depths().kept, plan.memory_bytes()))
        };
        let (all, bytes) = kept(Some(1 << 30), None).unwrap();
        assert_eq!(all, GROUPS);
        for fewer in 1..=GROUPS {
            let limit = bytes - ((fewer as u64 - 1) << 20) - 1;
            let (found, bytes) = kept(Some(limit), None).unwrap();
            assert!(found >= GROUPS - fewer && bytes <= limit, "{found} of {limit}");
        }
        let (none, least) = kept(None, Some(0)).unwrap();
        assert_eq!(
            (none, kept(Some(least), None).unwrap().0),
            (0, 1),
            "the last graph is among the working bytes"
        );
        assert_eq!(kept(None, None).unwrap().0, 0, "without a limit nobody knows how many fit");
        let error = kept(None, Some(GROUPS + 1)).unwrap_err().to_string();
        assert!(error.contains("kept is 5, and a step runs 4 segments"), "{error}");
    }

    #[test]
    fn what_just_fits_into_memory_stays_there_though_the_way_to_disk_would_take_more() {
        let on_cpu = |placement, memory_bytes| {
            search(Some(0), |search| {
                search.has_disk = true;
                search.limits.device = DeviceKind { dtype: DType::F32, apart: false };
                (search.limits.choices.placement, search.limits.memory_bytes) = (placement, memory_bytes);
            })
            .unwrap()
        };
        let near = GroupPlacement { master: Tier::Device, ..GroupPlacement::all(Tier::Host) };
        let bytes = on_cpu(Placement::Each(near), None).memory_bytes();
        assert_eq!(on_cpu(Placement::Auto, Some(bytes)).placements(), [near; GROUPS + 1]);
        assert_ne!(on_cpu(Placement::Auto, Some(bytes - 4096)).placements(), [near; GROUPS + 1]);
    }
}
