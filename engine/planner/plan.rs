//! The plan: placements, slots, buffers, schedule and predicted bytes, made and printed before anything large
//! is allocated. What cannot fit is refused here, with the culprit and the least budget that works.

use crate::error::Error;
use crate::planner::machine::Machine;
use crate::planner::observed::{KeptGraph, Observed};
use crate::planner::optimizer::AdamW;
use crate::planner::simulator::{Compute, Forecast, Simulator};
use crate::schedule::buffer_plan::{BufferPlan, BufferUse, Depths, DeviceKind, GroupPlacement, Needs};
use crate::schedule::builder::{Builder, gradient_passes_through};
use crate::schedule::layout::Layout;
use crate::schedule::operation::{Call, Operation, Stream};
use ferrozero_offload::Tier;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// What the executor itself, the queues and the disk store need beside buffers and tensors.
const BOOKKEEPING_BYTES: u64 = 4 << 20;
/// What a thread that computes for a while needs on the CPU device: matrix products pack their operands into
/// a block as large as a processor's second cache, which every thread has for itself.
const THREAD_BYTES: u64 = 2 << 20;

/// Which homes the user wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Placement {
    /// What makes steps shortest within the limits, as the simulator costs them.
    #[default]
    Auto,
    /// Every stream of every group in one tier.
    All(Tier),
    /// Every group with these homes.
    Each(GroupPlacement),
}

/// When updates are made, where clipping makes them wait for the norm of all gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Updates {
    /// As soon as the norm is known.
    AtOnce,
    /// Each when the next forward asks for its group.
    NextForward,
}

/// What the user fixes. Everything that is none is the planner's choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choices {
    /// Homes of the state streams.
    pub placement: Placement,
    /// Home of boundary activations.
    pub boundaries: Option<Tier>,
    /// Slots of each class of groups.
    pub slots: Option<usize>,
    /// Pieces read ahead of their upload.
    pub look_ahead: Option<usize>,
    /// Pieces that are between disk and optimizer at once, a multiple of four.
    pub state_pieces: Option<usize>,
    /// Groups whose gradients may be on the device at once.
    pub gradient_sets: Option<usize>,
    /// Micro-batches that run vertically.
    pub vertical: Option<usize>,
    /// Calls that keep the graph of their forward, from the last on.
    pub kept: Option<usize>,
    /// When updates are made, where there is a choice: with clipping.
    pub updates: Option<Updates>,
    /// Bytes of a piece, a multiple of 4 KiB; none: 4 MiB, which no plan chooses otherwise.
    pub piece_bytes: Option<usize>,
}

impl Choices {
    /// These with slots, pieces, gradient sets and micro-batches as in `depths`.
    #[cfg(feature = "models")]
    pub(crate) fn with_depths(&self, depths: Depths) -> Self {
        let Depths { slots, look_ahead, state_pieces, gradient_sets, vertical, kept: _ } = depths;
        Self {
            slots: Some(slots),
            look_ahead: Some(look_ahead),
            state_pieces: Some(state_pieces),
            gradient_sets: Some(gradient_sets),
            vertical: Some(vertical),
            ..self.clone()
        }
    }
}

/// What the user grants and fixes. Everything that is none is the planner's choice.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of host memory that the engine may use: on the CPU device, host and device share it.
    pub memory_bytes: Option<u64>,
    /// Bytes of device memory that it may use.
    pub device_bytes: Option<u64>,
    /// What is fixed.
    pub choices: Choices,
    /// What computes.
    pub device: DeviceKind,
}

/// A plan.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(crate) layout: Arc<Layout>,
    pub(crate) calls: Vec<Call>,
    pub(crate) buffer_plan: Arc<BufferPlan>,
    pub(crate) accumulate: usize,
    pub(crate) clip: Option<f64>,
    pub(crate) adamw: AdamW,
    /// Whether updates follow the norm, where there is one, and are not taken into the next forward.
    pub(crate) updates_at_once: bool,
    pub(crate) prediction: Option<Prediction>,
    limits: Limits,
    depths: Depths,
    working_bytes: Option<u64>,
    parked_bytes: u64,
    /// What the graphs that are kept take beside the model's other tensors.
    kept_bytes: u64,
    gradient_passes_through: bool,
}

/// Why a plan was chosen.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// What a step is to take.
    pub forecast: Forecast,
    /// Plans that were costed.
    pub costed: usize,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { forecast, costed } = self;
        let stall = 100.0 * forecast.exposed_stall;
        let plans =
            if *costed == 1 { "the only plan".into() } else { format!("the fastest of {costed} plans") };
        write!(f, "{plans}: {:.3} s a step predicted, ", forecast.step_s)?;
        write!(f, "{stall:.0} % of it waiting; the bottleneck is {}", forecast.busiest.name())
    }
}

impl Plan {
    /// The plan with these homes, home of boundaries and depths, whether it fits or not.
    pub(crate) fn with(
        layout: &Arc<Layout>,
        observed: &Observed,
        limits: &Limits,
        adamw: &AdamW,
        (accumulate, clip): (usize, Option<f64>),
        (placements, boundary_home, depths): (Vec<GroupPlacement>, Tier, Depths),
    ) -> Self {
        let passes = gradient_passes_through(&observed.calls, accumulate, depths.vertical, clip.is_some());
        let needs =
            Needs { layout, calls: &observed.calls, gradient_passes_through: passes, device: limits.device };
        let buffer_plan = BufferPlan::new(&needs, placements, boundary_home, depths);
        Self {
            kept_bytes: kept_bytes(observed, &buffer_plan),
            buffer_plan: Arc::new(buffer_plan),
            depths,
            updates_at_once: false,
            prediction: None,
            layout: layout.clone(),
            calls: observed.calls.clone(),
            accumulate,
            clip,
            adamw: adamw.clone(),
            limits: limits.clone(),
            working_bytes: observed.working_bytes,
            parked_bytes: observed.parked_bytes,
            gradient_passes_through: passes,
        }
    }

    /// Whether it keeps to its limits of memory.
    pub(crate) fn fits(&self) -> bool {
        self.limits.memory_bytes.is_none_or(|limit| self.memory_bytes() <= limit) && self.device_fits()
    }

    /// Whether it keeps to its limit of device memory.
    pub(crate) fn device_fits(&self) -> bool {
        self.limits.device_bytes.is_none_or(|limit| self.device_bytes() <= limit)
    }

    /// Whether another plan has the same homes and depths.
    pub(crate) fn has_same_choices(&self, other: &Self) -> bool {
        (self.depths, self.boundaries()) == (other.depths, other.boundaries())
            && self.placements() == other.placements()
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
                self.activation_bytes().map_or("an unknown amount".into(), |bytes| Bytes(bytes).to_string()),
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
        self.buffer_plan.buffer_bytes(Tier::Host)
    }

    /// Peak bytes of device memory: slots, device-homed buffers, and the model's own tensors.
    pub fn device_bytes(&self) -> u64 {
        self.device_buffer_bytes() + self.heap_bytes()
    }

    /// Bytes of device memory that the engine leases.
    pub fn device_buffer_bytes(&self) -> u64 {
        self.buffer_plan.buffer_bytes(Tier::Device)
    }

    /// Bytes of one slot.
    pub(crate) fn bytes_of_slot(&self, slot: usize) -> u64 {
        let elements = self.buffer_plan.slots.get(slot).map_or(0, |slot| slot.tensor_elements.iter().sum());
        elements as u64 * self.limits.device.element_bytes()
    }

    /// Bytes of all slots.
    fn slot_bytes(&self) -> u64 {
        self.buffer_plan.slot_elements() * self.limits.device.element_bytes()
    }

    /// Peak bytes of device memory that is not leased: on the CPU device that is the heap.
    pub(crate) fn heap_bytes(&self) -> u64 {
        // A device with memory of its own keeps the storage of a boundary that was saved for one that is
        // loaded.
        let boundaries = self.buffer_plan.passages as u64 * if self.limits.device.apart { 2 } else { 1 };
        self.slot_bytes()
            + self.gradient_bytes()
            + boundaries * self.bytes_of_passage()
            + self.activation_bytes().unwrap_or(0)
            + self.kept_bytes
            + if self.limits.device.apart { 0 } else { BOOKKEEPING_BYTES + self.thread_bytes() }
    }

    /// Bytes of the threads that micro-batches have for themselves where they run vertically.
    fn thread_bytes(&self) -> u64 {
        match self.depths.vertical {
            1 => 0,
            vertical => vertical as u64 * THREAD_BYTES,
        }
    }

    /// Peak bytes of what the model's own tensors take: while one micro-batch computes, the others that run
    /// vertically with it hold theirs between two segments.
    fn activation_bytes(&self) -> Option<u64> {
        let parked = (self.depths.vertical as u64 - 1) * self.parked_bytes;
        self.working_bytes.map(|bytes| bytes + parked)
    }

    /// Bytes of a boundary activation in passing: of the largest.
    pub(crate) fn bytes_of_passage(&self) -> u64 {
        self.calls.iter().map(|call| 4 * call.boundary_elements as u64).max().unwrap_or(0)
    }

    /// Bytes of a gradient set: of the largest group's.
    pub(crate) fn bytes_of_gradient_set(&self) -> u64 {
        let largest = self.layout.groups.iter().map(|group| group.gradient_elements()).max().unwrap_or(0);
        largest * self.limits.device.element_bytes()
    }

    fn gradient_bytes(&self) -> u64 {
        self.buffer_plan.gradient_sets as u64 * self.bytes_of_gradient_set()
    }

    /// Device bytes that grow with the groups: slots, and gradients on their way.
    pub(crate) fn slot_and_gradient_bytes(&self) -> u64 {
        self.slot_bytes() + self.gradient_bytes()
    }

    /// Bytes of all boundary activations that are kept at once.
    fn boundary_bytes(&self) -> u64 {
        let calls = self.calls.iter().enumerate().filter(|(index, _)| !self.buffer_plan.keeps(*index));
        let of_one: u64 = calls.map(|(_, call)| 4 * call.boundary_elements as u64).sum();
        self.depths.vertical as u64 * of_one
    }

    /// Bytes on disk of what no commit keeps: gradients and boundary activations.
    #[cfg(feature = "models")]
    pub(crate) fn scratch_disk_bytes(&self) -> u64 {
        let boundaries = match self.buffer_plan.boundary_home {
            Tier::Disk => self.boundary_bytes(),
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
        let groups = self.buffer_plan.placements.iter().enumerate();
        let of_tier = groups.filter(|(_, placement)| placement.home(stream) == tier);
        of_tier.map(|(group, _)| 4 * stream.elements(&self.layout, group) as u64).sum()
    }

    fn builder(&self) -> Builder<'_> {
        Builder {
            layout: &self.layout,
            calls: &self.calls,
            buffer_plan: &self.buffer_plan,
            accumulate: self.accumulate,
            clip: self.clip.is_some(),
        }
    }

    /// The micro-batches of a step, in runs of those that go vertically.
    pub(crate) fn abreast(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.builder().abreast()
    }

    /// Makes a schedule.
    pub(crate) fn schedule(&self, make: impl FnOnce(&Builder) -> Vec<Operation>) -> Vec<Operation> {
        make(&self.builder())
    }

    /// The operations of a training step after another one.
    pub fn train_schedule(&self) -> Vec<Operation> {
        match (self.clip.is_some(), self.updates_at_once) {
            (true, true) => [self.builder().train(false), self.builder().settle()].concat(),
            (clip, _) => self.builder().train(clip),
        }
    }

    /// What a step by this plan will take on a machine.
    pub fn forecast(&self, machine: &Machine, compute: &Compute) -> Forecast {
        self.simulator(machine, compute).forecast(&self.train_schedule())
    }

    /// Seconds that a step by this plan cannot take less than, and the bytes that it writes to disk.
    pub(crate) fn least(&self, machine: &Machine, compute: &Compute) -> (f64, u64) {
        let (simulator, schedule) = (self.simulator(machine, compute), self.train_schedule());
        (simulator.least_s(&schedule), simulator.moved_bytes(&schedule, true))
    }

    fn simulator<'a>(&'a self, machine: &'a Machine, compute: &'a Compute) -> Simulator<'a> {
        let (layout, calls, buffer_plan) = (&self.layout, &self.calls, &self.buffer_plan);
        Simulator { layout, calls, buffer_plan, machine, compute }
    }

    /// Why it was chosen: what a step is to take, by the machine's numbers and the computing time of the
    /// rehearsal.
    pub fn prediction(&self) -> Option<&Prediction> {
        self.prediction.as_ref()
    }

    /// Slots, pieces, micro-batches that run vertically, and graphs that are kept.
    pub fn depths(&self) -> Depths {
        self.depths
    }

    /// Home of boundary activations.
    pub fn boundaries(&self) -> Tier {
        self.buffer_plan.boundary_home
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
        &self.buffer_plan.placements
    }

    /// Whether a limit of memory was granted.
    pub(crate) fn is_limited(&self) -> bool {
        self.limits.memory_bytes.is_some() || self.limits.device_bytes.is_some()
    }

    /// Whether any state has its home on disk.
    pub fn uses_disk(&self) -> bool {
        self.disk_home_bytes() > 0
            || (self.buffer_plan.boundary_home == Tier::Disk && self.buffer_plan.passages > 0)
    }
}

/// Most bytes of graphs that are kept, beyond a step in which all is computed again: a call's own is among
/// the working bytes then.
fn kept_bytes(observed: &Observed, buffer_plan: &BufferPlan) -> u64 {
    let calls = observed.calls.iter().zip(&observed.kept).enumerate();
    let kept: Vec<_> = calls.filter(|(index, _)| buffer_plan.keeps(*index)).map(|(_, kept)| kept).collect();
    let stays = |call: &Call| buffer_plan.boundary_home != Tier::Device && call.boundary_moves;
    let bytes_of = |&(call, graph): &(&Call, &KeptGraph)| {
        graph.bytes + if stays(call) { 4 * call.boundary_elements as u64 } else { 0 }
    };
    let all: u64 = buffer_plan.vertical as u64 * kept.iter().map(bytes_of).sum::<u64>();
    // The one that goes back first, where that is known to be the last.
    let in_reverse = observed.calls.iter().all(|call| call.backward == Some(0));
    let last = kept.last().filter(|_| in_reverse).map_or(0, bytes_of);
    all - last + kept.iter().map(|(_, graph)| graph.beyond_bytes).max().unwrap_or(0)
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
        row(&format!("slots ({})", self.buffer_plan.slots.len()), Some(self.slot_bytes()), 0, 0);
        let of_use = |uses: &[BufferUse]| self.buffer_plan.bytes_of_uses(uses);
        match self.buffer_plan.boundary_home {
            Tier::Disk => {
                let buffers = of_use(&[BufferUse::BoundaryPieces]);
                row("boundary activations", Some(0), buffers, self.boundary_bytes());
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
        row("activations and other tensors", self.activation_bytes(), 0, 0);
        if self.depths.kept > 0 {
            row(&format!("graphs that are kept ({})", self.depths.kept), Some(self.kept_bytes), 0, 0);
        }
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
        if let Some(prediction) = &self.prediction {
            writeln!(f, "  {prediction}")?;
            if self.clip.is_some() {
                let when = if self.updates_at_once { "at once" } else { "with the next forward" };
                writeln!(f, "  updates are made {when}")?;
            }
        }
        if self.depths.kept > 0 {
            let (kept, calls) = (self.depths.kept, self.calls.len());
            writeln!(f, "  the last {kept} of {calls} segments are not computed again in the backward")?;
        }
        match (self.accumulate, self.depths.vertical) {
            (1, _) => {}
            (count, 1) => writeln!(f, "  {count} micro-batches run one after another")?,
            (count, vertical) if vertical >= count => writeln!(f, "  {count} micro-batches run vertically")?,
            (count, vertical) => {
                writeln!(f, "  {count} micro-batches run vertically, {vertical} at a time")?;
            }
        }
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
