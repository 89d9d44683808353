//! The plan: placements, slots, buffers, schedule and predicted bytes, made and printed before anything large is
//! allocated. What cannot fit is refused here, with the culprit and the least budget that works.

use crate::arrangement::{Arrangement, BufferUse, Call, Depths, DeviceKind, GroupPlacement, Needs};
use crate::builder::{Builder, gradient_passes_through};
use crate::engine::AdamW;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::pass::Observed;
use crate::schedule::{Operation, Stream};
use crate::simulator::{Compute, Forecast, Machine, Simulator};
use ferrozero_offload::Tier;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// What the executor itself, the queues and the disk store need beside buffers and tensors.
const BOOKKEEPING_BYTES: u64 = 4 << 20;

/// Which homes the user wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// As much in memory as the budget allows: gradients first, then parameters, then moments, the rest on disk.
    Auto,
    /// Every stream of every group in one tier.
    All(Tier),
    /// Every group with these homes.
    Each(GroupPlacement),
}

/// What the user grants and fixes. Everything that is none is the planner's choice.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of host memory that the engine may use: on the CPU device, host and device share it.
    pub memory_bytes: Option<u64>,
    /// Bytes of device memory that it may use.
    pub device_bytes: Option<u64>,
    /// Homes of the state streams.
    pub placement: Placement,
    /// Home of boundary activations.
    pub boundaries: Option<Tier>,
    /// Slots of each class.
    pub slots: Option<usize>,
    /// Pieces read ahead.
    pub look_ahead: Option<usize>,
    /// What computes.
    pub device: DeviceKind,
}

/// A plan.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) layout: Arc<Layout>,
    pub(crate) calls: Vec<Call>,
    pub(crate) arrangement: Arc<Arrangement>,
    pub(crate) accumulate: usize,
    pub(crate) clip: Option<f64>,
    pub(crate) adamw: AdamW,
    limits: Limits,
    working_bytes: Option<u64>,
    gradient_passes_through: bool,
}

impl Plan {
    /// Finds the placements that move least within the limits.
    ///
    /// # Errors
    /// [`Error::BudgetTooSmall`] if nothing fits, and [`Error::Configuration`] for homes that cannot be.
    pub(crate) fn make(
        layout: Arc<Layout>,
        observed: Observed,
        limits: Limits,
        adamw: AdamW,
        (accumulate, clip): (usize, Option<f64>),
        boundary_home: Tier,
    ) -> Result<Self> {
        let make = |placements: Vec<GroupPlacement>, depths: Depths| {
            let homes = (placements, boundary_home, depths);
            Self::with(&layout, &observed, &limits, &adamw, (accumulate, clip), homes)
        };
        let all = |placement: GroupPlacement| {
            let mut placements = vec![placement; layout.groups.len()];
            // The resident group is always on the device, and its masters too if that can be.
            if limits.device.holds_masters() {
                placements[layout.resident()].master = Tier::Device;
            }
            placements
        };
        let start = match &limits.placement {
            Placement::Auto => GroupPlacement::all(Tier::Disk),
            Placement::All(tier) => GroupPlacement::all(*tier),
            Placement::Each(placement) => *placement,
        };
        let on_device = Stream::ALL.iter().filter(|&&stream| start.home(stream) == Tier::Device).count();
        let whole = limits.device.apart && on_device == Stream::ALL.len();
        if on_device > 0 && !limits.device.holds_masters() && !whole {
            return Err(Error::Configuration(
                "some state streams have their home on the device, which cannot be alone: on a CUDA device all streams of \
                 a group are at home or none, and on the CPU device they are apart from parameters in another type than f32"
                    .into(),
            ));
        }
        let comfortable = Depths {
            slots: limits.slots.unwrap_or(2),
            look_ahead: limits.look_ahead.unwrap_or(4),
            state_pieces: 16,
            gradient_sets: 2,
        };
        let least = Depths {
            slots: limits.slots.unwrap_or(1),
            look_ahead: limits.look_ahead.unwrap_or(1),
            state_pieces: 4,
            gradient_sets: 1,
        };
        let mut plan = make(all(start), comfortable);
        let mut depths = comfortable;
        if !plan.fits() {
            plan = make(all(start), least);
            depths = least;
        }
        if !plan.fits() {
            return Err(plan.too_small());
        }
        if limits.placement == Placement::Auto {
            plan = plan.bring_closer(&make, depths);
        }
        Ok(plan)
    }

    /// The plan with these homes, home of boundaries and depths, whether it fits or not.
    pub(crate) fn with(
        layout: &Arc<Layout>,
        observed: &Observed,
        limits: &Limits,
        adamw: &AdamW,
        (accumulate, clip): (usize, Option<f64>),
        (placements, boundary_home, depths): (Vec<GroupPlacement>, Tier, Depths),
    ) -> Self {
        let passes = gradient_passes_through(&observed.calls, accumulate, clip.is_some());
        let needs =
            Needs { layout, calls: &observed.calls, gradient_passes_through: passes, device: limits.device };
        Self {
            arrangement: Arc::new(Arrangement::new(&needs, placements, boundary_home, depths)),
            layout: layout.clone(),
            calls: observed.calls.clone(),
            accumulate,
            clip,
            adamw: adamw.clone(),
            limits: limits.clone(),
            working_bytes: observed.working_bytes,
            gradient_passes_through: passes,
        }
    }

    /// Brings as many streams as fit from disk into memory, those first whose bytes cross most often.
    fn bring_closer(self, make: &dyn Fn(Vec<GroupPlacement>, Depths) -> Self, depths: Depths) -> Self {
        let mut best = self;
        best = best.admit_groups(make, depths);
        for stream in [Stream::Gradient, Stream::Master, Stream::FirstMoment, Stream::SecondMoment] {
            if stream == Stream::Gradient && best.gradient_passes_through {
                continue;
            }
            // On the CPU device, memory is memory: parameters that stay on the device need no slot to pass through.
            let in_slots = stream == Stream::Master && best.limits.device.holds_masters();
            let tier = if in_slots { Tier::Device } else { Tier::Host };
            let resident = best.layout.resident();
            for group in std::iter::once(resident).chain(0..resident) {
                let mut placements = best.arrangement.placements.clone();
                if placements[group].home(stream) != Tier::Disk {
                    continue;
                }
                placements[group].set_home(stream, tier);
                let candidate = make(placements, depths);
                if candidate.fits() {
                    best = candidate;
                }
            }
        }
        best
    }

    /// Brings as many groups as fit to a device that has memory of its own, with all of their states: it updates them itself,
    /// and nothing of them crosses.
    fn admit_groups(self, make: &dyn Fn(Vec<GroupPlacement>, Depths) -> Self, depths: Depths) -> Self {
        let mut best = self;
        // What the model's own tensors take must be known to say what fits beside them.
        if !best.limits.device.apart || best.working_bytes.is_none() || best.limits.device_bytes.is_none() {
            return best;
        }
        let resident = best.layout.resident();
        for group in std::iter::once(resident).chain(0..resident) {
            let mut placements = best.arrangement.placements.clone();
            placements[group] = GroupPlacement::all(Tier::Device);
            let candidate = make(placements, depths);
            if candidate.fits() {
                best = candidate;
            }
        }
        best
    }

    /// Whether it keeps to its limits of memory.
    pub(crate) fn fits(&self) -> bool {
        let fits = |bytes: u64, limit: Option<u64>| limit.is_none_or(|limit| bytes <= limit);
        fits(self.memory_bytes(), self.limits.memory_bytes)
            && fits(self.device_bytes(), self.limits.device_bytes)
    }

    /// Why it does not fit, and what would.
    pub(crate) fn too_small(&self) -> Error {
        let (tier, needed_bytes, budget) = match self.limits.device_bytes {
            Some(limit) if self.device_bytes() > limit => (Tier::Device, self.device_bytes(), limit),
            _ => (Tier::Host, self.memory_bytes(), self.limits.memory_bytes.unwrap_or(0)),
        };
        let largest = self.layout.groups.iter().rev().max_by_key(|group| group.elements);
        let culprit = largest.map_or(String::new(), |group| {
            format!(
                "The largest group is {} with {} of parameters, and the model's own tensors take {}",
                group.name,
                Bytes(group.device_elements() * self.limits.device.element_bytes()),
                self.working_bytes.map_or("an unknown amount".into(), |bytes| Bytes(bytes).to_string()),
            )
        });
        Error::BudgetTooSmall {
            tier,
            needed_bytes,
            budget_bytes: budget,
            least_bytes: needed_bytes.next_multiple_of(1 << 20),
            culprit,
        }
    }

    /// Peak bytes of the host's memory. The CPU device's memory is the host's.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.host_bytes() + if self.limits.device.apart { 0 } else { self.device_bytes() }
    }

    /// Bytes of host memory that the engine leases.
    pub fn host_bytes(&self) -> u64 {
        self.arrangement.buffer_bytes(Tier::Host)
    }

    /// Peak bytes of device memory: slots, device-homed buffers, and the model's own tensors.
    pub fn device_bytes(&self) -> u64 {
        self.device_buffer_bytes() + self.heap_bytes()
    }

    /// Bytes of device memory that the engine leases.
    pub(crate) fn device_buffer_bytes(&self) -> u64 {
        self.arrangement.buffer_bytes(Tier::Device)
    }

    /// Bytes of all slots.
    fn slot_bytes(&self) -> u64 {
        self.arrangement.slot_elements() * self.limits.device.element_bytes()
    }

    /// Peak bytes of device memory that is not leased: on the CPU device that is the heap.
    pub(crate) fn heap_bytes(&self) -> u64 {
        let boundary = self.calls.iter().map(|call| 4 * call.boundary_elements as u64).max().unwrap_or(0);
        // A device with memory of its own keeps the storage of a boundary that was saved for one that is loaded.
        let boundaries = self.arrangement.passages as u64 * if self.limits.device.apart { 2 } else { 1 };
        self.slot_bytes()
            + self.gradient_bytes()
            + boundaries * boundary
            + self.working_bytes.unwrap_or(0)
            + if self.limits.device.apart { 0 } else { BOOKKEEPING_BYTES }
    }

    fn gradient_bytes(&self) -> u64 {
        let largest = self.layout.groups.iter().map(|group| group.gradient_elements()).max().unwrap_or(0);
        self.arrangement.gradient_sets as u64 * largest * self.limits.device.element_bytes()
    }

    /// Device bytes that grow with the groups: slots, and gradients on their way.
    pub(crate) fn slot_and_gradient_bytes(&self) -> u64 {
        self.slot_bytes() + self.gradient_bytes()
    }

    /// Bytes on disk of what no commit keeps: gradients and boundary activations.
    pub(crate) fn scratch_disk_bytes(&self) -> u64 {
        let boundaries = match self.arrangement.boundary_home {
            Tier::Disk => self.calls.iter().map(|call| 4 * call.boundary_elements as u64).sum(),
            _ => 0,
        };
        self.stream_bytes(Stream::Gradient, Tier::Disk) + boundaries
    }

    /// Bytes of state that live on disk, once; a store with commits takes twice that.
    pub fn disk_home_bytes(&self) -> u64 {
        Stream::ALL.iter().map(|&stream| self.stream_bytes(stream, Tier::Disk)).sum()
    }

    /// Bytes of a stream that have their home in a tier.
    fn stream_bytes(&self, stream: Stream, tier: Tier) -> u64 {
        if stream == Stream::Gradient && self.gradient_passes_through {
            return 0;
        }
        let groups = self.arrangement.placements.iter().enumerate();
        let of_tier = groups.filter(|(_, placement)| placement.home(stream) == tier);
        of_tier.map(|(group, _)| 4 * stream.elements(&self.layout, group) as u64).sum()
    }

    fn builder(&self) -> Builder<'_> {
        Builder {
            layout: &self.layout,
            calls: &self.calls,
            arrangement: &self.arrangement,
            accumulate: self.accumulate,
            clip: self.clip.is_some(),
        }
    }

    /// Makes a schedule.
    pub(crate) fn schedule(&self, make: impl FnOnce(&Builder) -> Vec<Operation>) -> Vec<Operation> {
        make(&self.builder())
    }

    /// The operations of a training step after another one.
    pub fn train_schedule(&self) -> Vec<Operation> {
        self.builder().train(self.clip.is_some())
    }

    /// What a step by this plan will take on a machine.
    pub fn forecast(&self, machine: &Machine, compute: &Compute) -> Forecast {
        let simulator = Simulator { layout: &self.layout, calls: &self.calls, machine, compute };
        simulator.forecast(&self.train_schedule())
    }

    /// Groups of the model.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Segments in the order in which they run in a step.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Home of each group's streams.
    pub fn placements(&self) -> &[GroupPlacement] {
        &self.arrangement.placements
    }

    /// Whether any state has its home on disk.
    pub fn uses_disk(&self) -> bool {
        self.disk_home_bytes() > 0
            || (self.arrangement.boundary_home == Tier::Disk && self.arrangement.passages > 0)
    }
}

/// Bytes for people.
pub(crate) struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let text = match self.0 {
            0 => "-".to_owned(),
            bytes if bytes >= 1 << 30 => format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64),
            bytes if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64),
            bytes => format!("{:.1} KiB", bytes as f64 / 1024.0),
        };
        f.pad(&text)
    }
}

/// What some of the memory is for, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanRow {
    /// What it is for.
    pub name: String,
    /// Of the device; none where the device does not count.
    pub device_bytes: Option<u64>,
    /// Of the host.
    pub host_bytes: u64,
    /// Of the disk, once.
    pub disk_bytes: u64,
}

impl Plan {
    /// What all memory is for.
    pub fn table(&self) -> Vec<PlanRow> {
        let mut rows = vec![];
        let mut row = |name: &str, device_bytes: Option<u64>, host_bytes: u64, disk_bytes: u64| {
            rows.push(PlanRow { name: name.to_owned(), device_bytes, host_bytes, disk_bytes });
        };
        for stream in Stream::ALL {
            let home = |tier| self.stream_bytes(stream, tier);
            let in_slots = if stream == Stream::Master { 0 } else { home(Tier::Device) };
            if stream == Stream::Gradient && self.gradient_passes_through {
                continue;
            }
            row(stream.name(), Some(in_slots), home(Tier::Host), home(Tier::Disk));
        }
        row(&format!("slots ({})", self.arrangement.slots.len()), Some(self.slot_bytes()), 0, 0);
        let of_use = |uses: &[BufferUse]| -> u64 {
            let of_use = self.arrangement.buffers.iter().filter(|buffer| uses.contains(&buffer.use_));
            of_use.map(|buffer| buffer.bytes as u64).sum()
        };
        let boundaries: u64 = self.calls.iter().map(|call| 4 * call.boundary_elements as u64).sum();
        match self.arrangement.boundary_home {
            Tier::Disk => {
                row("boundary activations", Some(0), of_use(&[BufferUse::BoundaryPieces]), boundaries)
            }
            Tier::Host => row("boundary activations", Some(0), of_use(&[BufferUse::BoundaryHome]), 0),
            Tier::Device => {}
        }
        row("pieces on their way: parameters", Some(0), of_use(&[BufferUse::FetchPieces]), 0);
        row("pieces on their way: states", Some(0), of_use(&[BufferUse::StatePieces]), 0);
        let staging = of_use(&[BufferUse::Staging]);
        if staging > 0 {
            row("pieces in the device's type", Some(0), staging, 0);
        }
        row("gradients on their way", Some(self.gradient_bytes()), of_use(&[BufferUse::GradientPieces]), 0);
        row("activations and other tensors", self.working_bytes, 0, 0);
        rows
    }

    /// What the user granted.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let row = |f: &mut fmt::Formatter, name: &str, device: u64, host: u64, disk: u64| {
            writeln!(f, "  {name:<34}{:>12}{:>12}{:>12}", Bytes(device), Bytes(host), Bytes(disk))
        };
        let parameters = self.layout.parameter_elements() as f64 / 1e6;
        let segments = self.layout.groups.len() - 1;
        writeln!(f, "plan: {parameters:.1} M parameters in {segments} segments and a resident group")?;
        writeln!(f, "  {:<34}{:>12}{:>12}{:>12}", "", "device", "host", "disk")?;
        for PlanRow { name, device_bytes, host_bytes, disk_bytes } in self.table() {
            match device_bytes {
                Some(device_bytes) => row(f, &name, device_bytes, host_bytes, disk_bytes)?,
                None => writeln!(f, "  {name:<34}{:>12}", "not counted")?,
            }
        }
        row(f, "in all", self.device_bytes(), self.host_bytes(), self.disk_home_bytes())?;
        let limit = |limit: Option<u64>| match limit {
            Some(limit) => format!("of {} granted", Bytes(limit)),
            None => "no limit granted".into(),
        };
        if self.limits.device.apart {
            let (host, device) = (limit(self.limits.memory_bytes), limit(self.limits.device_bytes));
            return write!(
                f,
                "  host memory {}, {host}; device memory {}, {device}",
                Bytes(self.host_bytes()),
                Bytes(self.device_bytes())
            );
        }
        let total = Bytes(self.memory_bytes());
        match self.limits.memory_bytes {
            Some(limit) => write!(f, "  memory in all {total} of {} granted", Bytes(limit)),
            None => write!(f, "  memory in all {total}, no limit granted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{ALIGNMENT_ELEMENTS, Group};
    use candle_core::DType;

    const GROUPS: usize = 4;
    /// Bytes of one group's parameters in f32.
    const GROUP_BYTES: u64 = 4 * 8 * ALIGNMENT_ELEMENTS as u64;

    /// A plan for a device with memory of its own, of which `device_bytes` are granted.
    fn plan(working_bytes: Option<u64>, device_bytes: Option<u64>, clip: Option<f64>) -> Result<Plan> {
        let group = |index: usize| {
            let table = vec![(index, format!("p.{index}"), vec![8 * ALIGNMENT_ELEMENTS], true, true)];
            Group::new(format!("h.{index}"), index == GROUPS, table)
        };
        let groups = (0..=GROUPS).map(group).collect();
        let layout = Arc::new(Layout { groups, piece_elements: 4 * ALIGNMENT_ELEMENTS });
        let call = |group| Call { group, boundary_elements: 0, boundary_moves: false };
        let observed = Observed { calls: (0..GROUPS).map(call).collect(), working_bytes };
        let limits = Limits {
            memory_bytes: None,
            device_bytes,
            placement: Placement::Auto,
            boundaries: None,
            slots: None,
            look_ahead: None,
            device: DeviceKind { dtype: DType::BF16, apart: true },
        };
        Plan::make(layout, observed, limits, AdamW::default(), (1, clip), Tier::Device)
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
}
