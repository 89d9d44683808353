//! Where states live in a plan: everything as far away as it can be, and then as much as fits brought closer.

use super::{Graphs, Policy, Search};
use crate::error::Result;
use crate::planner::observed::Observed;
use crate::planner::plan::{Limits, Placement, Plan};
use crate::schedule::buffer_plan::{Depths, GroupPlacement, STAGGER_BYTES};
use crate::schedule::builder::gradient_passes_through;
use crate::schedule::layout::Layout;
use crate::schedule::operation::Stream;
use ferrozero_offload::{Tier, padded_bytes};

impl Search<'_> {
    /// Homes where a run can find everything when nothing is brought closer.
    pub(super) fn start(&self) -> GroupPlacement {
        match &self.limits.choices.placement {
            Placement::Each(placement) => *placement,
            Placement::All(tier) => GroupPlacement::all(*tier),
            Placement::Auto if self.has_disk => GroupPlacement::all(Tier::Disk),
            // What computes in the host's memory has the masters where it computes.
            Placement::Auto if self.limits.device.holds_masters() => GroupPlacement::all(Tier::Device),
            Placement::Auto => GroupPlacement::all(Tier::Host),
        }
    }

    /// A plan by `policy`.
    pub(super) fn place(
        &self,
        observed: &Observed,
        (boundaries, depths): (Tier, Depths),
        policy: Policy,
    ) -> Result<Plan> {
        let with = |kept| (boundaries, Depths { kept, ..depths });
        let as_many_as_fit = |placements: &[GroupPlacement]| {
            let fits = |kept| self.plan_with(&self.layout, observed, placements.to_vec(), with(kept)).fits();
            let (mut fitting, mut too_many) = (0, observed.calls.len() + 1);
            while too_many - fitting > 1 {
                let kept = fitting.midpoint(too_many);
                *if fits(kept) { &mut fitting } else { &mut too_many } = kept;
            }
            with(fitting)
        };
        match policy.graphs {
            Graphs::AsFixed => self.place_states(observed, with(depths.kept), policy),
            Graphs::BeforeStates => self.place_states(observed, as_many_as_fit(&self.farthest()), policy),
            Graphs::AfterStates => {
                let plan = self.place_states(observed, with(0), policy)?;
                let at = as_many_as_fit(plan.placements());
                Ok(self.plan_with(&self.layout, observed, plan.placements().to_vec(), at))
            }
        }
    }

    /// Everything as far away as it can be.
    fn farthest(&self) -> Vec<GroupPlacement> {
        let mut placements = vec![self.start(); self.layout.groups.len()];
        // The resident group is always on the device, and its masters too if that can be.
        if self.limits.device.holds_masters() {
            placements[self.layout.resident()].master = Tier::Device;
        }
        placements
    }

    /// Everything in the farthest tier, and then as much as fits brought closer by `policy`.
    fn place_states(&self, observed: &Observed, at: (Tier, Depths), policy: Policy) -> Result<Plan> {
        let make = |placements: Vec<GroupPlacement>| self.plan_with(&self.layout, observed, placements, at);
        let placements = self.farthest();
        let mut plan = make(placements.clone());
        if policy.admit {
            plan = self.admit_groups(&make, plan, placements);
        }
        let can_move = self.limits.choices.placement == Placement::Auto && self.has_disk;
        if can_move && let Some(whole) = self.whole_streams(&make, &plan, policy.order) {
            plan = whole;
        }
        if !plan.fits() {
            return Err(plan.too_small());
        }
        (self.check)(&plan)?;
        if !can_move {
            return Ok(plan);
        }
        // What brings all masters to the device frees the slots that they passed through, so there may be
        // room again.
        loop {
            let closer = self.bring_closer(&make, &plan, policy.order);
            if closer.has_same_choices(&plan) {
                return Ok(plan);
            }
            plan = closer;
        }
    }

    /// The streams of `order` that have no home when gradients pass through from the backward to the update
    /// are left out.
    fn moving(&self, plan: &Plan, order: [Stream; 4]) -> impl Iterator<Item = Stream> {
        let vertical = plan.depths().vertical;
        let passes = gradient_passes_through(plan.calls(), self.accumulate, vertical, self.clip.is_some());
        order.into_iter().filter(move |&stream| stream != Stream::Gradient || !passes)
    }

    /// The tier in memory that a stream is brought to.
    fn near(&self, stream: Stream) -> Tier {
        // On the CPU device, memory is memory: parameters that stay on the device need no slot to pass
        // through.
        match stream == Stream::Master && self.limits.device.holds_masters() {
            true => Tier::Device,
            false => Tier::Host,
        }
    }

    /// As many whole streams in memory as fit. The buffers that a stream passes through on its way to disk
    /// are gone only when all of it is in memory, so the room for its last groups may be these buffers',
    /// which no group alone would find.
    fn whole_streams(
        &self,
        make: &dyn Fn(Vec<GroupPlacement>) -> Plan,
        plan: &Plan,
        order: [Stream; 4],
    ) -> Option<Plan> {
        let mut placements = plan.placements().to_vec();
        let mut found = None;
        for stream in self.moving(plan, order) {
            for placement in placements.iter_mut().filter(|placement| placement.home(stream) == Tier::Disk) {
                placement.set_home(stream, self.near(stream));
            }
            // Not the first that does not fit is the last: with a later stream, more buffers are gone.
            found = Some(make(placements.clone())).filter(Plan::fits).or(found);
        }
        found
    }

    /// Gives out what `plan` leaves of the limits by arithmetic; the plan that comes of it is counted in
    /// full.
    fn bring_closer(
        &self,
        make: &dyn Fn(Vec<GroupPlacement>) -> Plan,
        plan: &Plan,
        order: [Stream; 4],
    ) -> Plan {
        let layout = &self.layout;
        let resident = layout.resident();
        let mut placements = plan.placements().to_vec();
        let mut left = Room::new(&self.limits, plan);
        let mut moved = vec![];
        for stream in self.moving(plan, order) {
            for group in std::iter::once(resident).chain(0..resident) {
                let bytes = home_bytes(layout, stream.elements(layout, group));
                let tier = self.near(stream);
                if placements[group].home(stream) == Tier::Disk && left.take(tier, bytes) {
                    placements[group].set_home(stream, tier);
                    moved.push((group, stream));
                }
            }
        }
        loop {
            let closer = make(placements.clone());
            // Without what was moved it is the plan that fitted.
            let Some((group, stream)) = moved.pop().filter(|_| !closer.fits()) else { return closer };
            placements[group].set_home(stream, Tier::Disk);
        }
    }

    /// Brings as many groups as fit to a device that has memory of its own, with all of their states: it
    /// updates them itself, and nothing of them crosses.
    fn admit_groups(
        &self,
        make: &dyn Fn(Vec<GroupPlacement>) -> Plan,
        plan: Plan,
        placements: Vec<GroupPlacement>,
    ) -> Plan {
        let resident = self.layout.resident();
        let with = |count: usize| {
            let mut placements = placements.clone();
            for group in std::iter::once(resident).chain(0..resident).take(count) {
                placements[group] = GroupPlacement::all(Tier::Device);
            }
            make(placements)
        };
        let mut best = plan;
        let (mut fitting, mut too_many) = (0, placements.len() + 1);
        while too_many - fitting > 1 {
            let count = fitting.midpoint(too_many);
            let candidate = with(count);
            // The host may be what is too small, and be less so with fewer groups left to it.
            match candidate.device_fits() {
                true => (fitting, best) = (count, candidate),
                false => too_many = count,
            }
        }
        best
    }
}

/// What the limits leave.
struct Room {
    memory_bytes: u64,
    device_bytes: u64,
    /// Whether the device's memory is the host's.
    shared: bool,
}

impl Room {
    fn new(limits: &Limits, plan: &Plan) -> Self {
        let left = |limit: Option<u64>, used: u64| limit.map_or(u64::MAX, |limit| limit.saturating_sub(used));
        Self {
            memory_bytes: left(limits.memory_bytes, plan.memory_bytes()),
            device_bytes: left(limits.device_bytes, plan.device_bytes()),
            shared: !limits.device.apart,
        }
    }

    /// Takes room in a tier if there is so much.
    fn take(&mut self, tier: Tier, bytes: u64) -> bool {
        let on_device = tier == Tier::Device;
        let in_memory = !on_device || self.shared;
        if (on_device && bytes > self.device_bytes) || (in_memory && bytes > self.memory_bytes) {
            return false;
        }
        if on_device {
            self.device_bytes -= bytes;
        }
        if in_memory {
            self.memory_bytes -= bytes;
        }
        true
    }
}

/// Bytes of the buffers that are home to a stream of `elements`.
fn home_bytes(layout: &Layout, elements: usize) -> u64 {
    let page = |elements: usize| padded_bytes(4 * elements + STAGGER_BYTES) as u64;
    let whole = elements / layout.piece_elements;
    let rest = elements % layout.piece_elements;
    whole as u64 * page(layout.piece_elements) + if rest > 0 { page(rest) } else { 0 }
}
