//! The static part of a plan: which tier is home to each piece, and every buffer, slot, gradient set and
//! passage that a schedule may use. Nothing else is allocated while steps run, so the bytes of an buffer plan
//! are the bytes of a run.

use crate::schedule::layout::{Group, Layout};
use crate::schedule::operation::{Buffer, Call, GroupIndex, Slot, Stream};
use candle_core::DType;
use ferrozero_offload::{Tier, padded_bytes};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Home of each state stream of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPlacement {
    /// Home of the master parameters. `Device` means a slot of its own.
    pub master: Tier,
    /// Home of the first moment.
    pub first_moment: Tier,
    /// Home of the second moment.
    pub second_moment: Tier,
    /// Home of the gradient, where it must be kept beyond its group's backward.
    pub gradient: Tier,
}

impl GroupPlacement {
    /// All streams in one tier.
    pub fn all(tier: Tier) -> Self {
        Self { master: tier, first_moment: tier, second_moment: tier, gradient: tier }
    }

    /// Home of `stream`.
    pub fn home(&self, stream: Stream) -> Tier {
        match stream {
            Stream::Master => self.master,
            Stream::FirstMoment => self.first_moment,
            Stream::SecondMoment => self.second_moment,
            Stream::Gradient => self.gradient,
        }
    }

    /// Sets the home of `stream`.
    pub fn set_home(&mut self, stream: Stream, tier: Tier) {
        match stream {
            Stream::Master => self.master = tier,
            Stream::FirstMoment => self.first_moment = tier,
            Stream::SecondMoment => self.second_moment = tier,
            Stream::Gradient => self.gradient = tier,
        }
    }
}

/// What the device that computes is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceKind {
    /// The type that it computes with.
    pub dtype: DType,
    /// Whether its memory is not the host's.
    pub apart: bool,
}

impl DeviceKind {
    /// Whether the parameters that it computes with can be the masters that the optimizer updates. If not,
    /// the masters are a stream of their own, in another tier, and slots hold what they are rounded to.
    pub fn holds_masters(self) -> bool {
        !self.apart && self.dtype == DType::F32
    }

    /// Bytes of an element of parameters, gradients and boundaries.
    pub fn element_bytes(self) -> u64 {
        self.dtype.size_in_bytes() as u64
    }
}

/// How much of everything that is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depths {
    /// Slots of each class of equally laid out groups.
    pub slots: usize,
    /// Pieces that may be read ahead of their upload.
    pub look_ahead: usize,
    /// Pieces that the optimizer's pipeline has in flight, a multiple of four.
    pub state_pieces: usize,
    /// Groups whose gradients may be on the device at once.
    pub gradient_sets: usize,
    /// Micro-batches that run vertically: all of them through a segment before the next one, so that its
    /// parameters cross once for all. With 1 each goes through all segments by itself.
    pub vertical: usize,
    /// Calls that keep the graph of their forward, from the last on. The others compute it again in their
    /// backward.
    pub kept: usize,
}

/// Every buffer is longer by this than what it holds. Buffers lie one after another and most hold a power of
/// two: without it the runs that the optimizer reads together would start at the same place of the memory's
/// banks, and wait for each other.
pub const STAGGER_BYTES: usize = 4096;

/// One buffer of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferSpec {
    /// Tier whose budget it is drawn from.
    pub tier: Tier,
    /// Size.
    pub bytes: usize,
    /// What it is for.
    pub use_: BufferUse,
}

/// Buffers with one use after another, for the pieces of something: the last may be smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffers {
    first: usize,
    count: usize,
}

impl Buffers {
    /// The buffer of a piece.
    pub fn of_piece(self, piece: usize) -> Option<Buffer> {
        (piece < self.count).then_some(Buffer(self.first + piece))
    }

    fn all(self) -> impl Iterator<Item = Buffer> {
        (self.first..self.first + self.count).map(Buffer)
    }
}

/// What [`Buffers`] are like. A large model has millions of pieces, and a search makes hundreds of buffer
/// plans, so buffers are counted and not listed.
#[derive(Debug, Clone, Copy)]
struct BufferRun {
    buffers: Buffers,
    each: BufferSpec,
    last_bytes: usize,
}

impl BufferRun {
    fn spec(&self, buffer: usize) -> BufferSpec {
        let is_last = buffer + 1 == self.buffers.first + self.buffers.count;
        BufferSpec { bytes: if is_last { self.last_bytes } else { self.each.bytes }, ..self.each }
    }

    /// Bytes, with `size` of those of a buffer.
    fn bytes(&self, size: impl Fn(usize) -> u64) -> u64 {
        let BufferRun { buffers: Buffers { count, .. }, each, last_bytes } = *self;
        count.saturating_sub(1) as u64 * size(each.bytes) + if count > 0 { size(last_bytes) } else { 0 }
    }
}

/// What a buffer is for: the rows of the plan's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BufferUse {
    /// Home of a state stream.
    Home(Stream),
    /// Home of boundary activations.
    BoundaryHome,
    /// Parameters between disk and slot.
    FetchPieces,
    /// State streams between disk and optimizer.
    StatePieces,
    /// Gradients between device and optimizer or disk.
    GradientPieces,
    /// Boundary activations between device and disk.
    BoundaryPieces,
    /// Parameters and gradients in the device's type, between device and host.
    Staging,
}

/// One slot of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSpec {
    /// Elements of each tensor, in the order of the groups' tables.
    pub tensor_elements: Vec<usize>,
}

/// Everything that schedules of one run may use.
#[derive(Debug, Clone)]
pub struct BufferPlan {
    /// Home of each group's streams.
    pub placements: Vec<GroupPlacement>,
    /// Home of boundary activations.
    pub boundary_home: Tier,
    /// All buffers, in the order of their numbers.
    runs: Vec<BufferRun>,
    /// All slots.
    pub slots: Vec<SlotSpec>,
    /// Slots that each group may use: one of its own where the device is home, else those of its class.
    pub slots_of: Vec<Vec<Slot>>,
    /// Buffers that are home to the pieces of a stream.
    homes: HashMap<(GroupIndex, Stream), Buffers>,
    /// Buffers that are home to the pieces of a boundary, by call and place of its micro-batch.
    boundary_homes: HashMap<(usize, usize), Buffers>,
    /// Pieces between disk and slot.
    pub fetch_pool: Vec<Buffer>,
    /// Pieces between disk and optimizer.
    pub state_pool: Vec<Buffer>,
    /// Pieces between device and optimizer.
    pub gradient_pool: Vec<Buffer>,
    /// Pieces between backward and optimizer where both are on a device with memory of its own.
    pub device_gradient_pool: Vec<Buffer>,
    /// What computes.
    pub device: DeviceKind,
    /// Pieces between device and boundaries on disk.
    pub boundary_pool: Vec<Buffer>,
    /// Where parameters are rounded to the device's type on their way up.
    pub upload_staging: Option<Buffer>,
    /// Where gradients in the device's type arrive on their way down.
    pub gradient_staging: Option<Buffer>,
    /// Number of gradient sets.
    pub gradient_sets: usize,
    /// Micro-batches that run vertically.
    pub vertical: usize,
    /// Number of passages.
    pub passages: usize,
    /// The first call that keeps the graph of its forward.
    first_kept: usize,
}

/// What decides an buffer plan.
#[derive(Debug, Clone)]
pub struct Needs<'a> {
    /// Groups.
    pub layout: &'a Layout,
    /// Segments in the order in which they run.
    pub calls: &'a [Call],
    /// Whether a group's gradient is consumed within its own backward.
    pub gradient_passes_through: bool,
    /// What computes.
    pub device: DeviceKind,
}

impl BufferPlan {
    /// Lays out everything for the given placements and depths.
    pub fn new(needs: &Needs, placements: Vec<GroupPlacement>, boundary_home: Tier, depths: Depths) -> Self {
        let mut this = Self {
            placements,
            boundary_home,
            runs: vec![],
            slots: vec![],
            slots_of: vec![],
            homes: HashMap::new(),
            boundary_homes: HashMap::new(),
            fetch_pool: vec![],
            state_pool: vec![],
            gradient_pool: vec![],
            device_gradient_pool: vec![],
            device: needs.device,
            boundary_pool: vec![],
            upload_staging: None,
            gradient_staging: None,
            gradient_sets: depths.gradient_sets,
            vertical: depths.vertical,
            passages: 0,
            first_kept: needs.calls.len().saturating_sub(depths.kept),
        };
        this.add_slots(needs.layout, depths.slots);
        this.add_homes(needs);
        this.add_pools(needs, depths);
        this.add_boundaries(needs);
        this.add_staging(needs);
        this
    }

    /// Whether a group's masters are the parameters in its slot.
    pub fn master_in_slot(&self, group: GroupIndex) -> bool {
        self.placements[group].master == Tier::Device && self.device.holds_masters()
    }

    /// Whether a group's states are on a device with memory of its own, which then updates them.
    pub fn updated_on_device(&self, group: GroupIndex) -> bool {
        self.device.apart && self.placements[group].master == Tier::Device
    }

    /// Whether a buffer is memory of a device that has its own.
    pub fn is_on_device(&self, buffer: Buffer) -> bool {
        self.device.apart && self.buffer(buffer).is_some_and(|buffer| buffer.tier == Tier::Device)
    }

    /// All buffers, in the order of their numbers.
    pub fn buffers(&self) -> impl Iterator<Item = BufferSpec> + '_ {
        self.runs.iter().flat_map(|run| run.buffers.all().map(|buffer| run.spec(buffer.0)))
    }

    /// What a buffer is like.
    pub fn buffer(&self, buffer: Buffer) -> Option<BufferSpec> {
        let after = self.runs.partition_point(|run| run.buffers.first <= buffer.0);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (buffer.0 < run.buffers.first + run.buffers.count).then(|| run.spec(buffer.0))
    }

    /// The buffer that is home to a piece of a stream; none where it has another home.
    pub fn home_of(&self, group: GroupIndex, stream: Stream, piece: usize) -> Option<Buffer> {
        self.homes.get(&(group, stream))?.of_piece(piece)
    }

    /// Whether a call keeps the graph of its forward until its backward; its boundary then stays on the
    /// device.
    pub fn keeps(&self, call: usize) -> bool {
        call >= self.first_kept
    }

    /// The number of a micro-batch among those that run vertically with it.
    pub fn place(&self, micro_batch: usize) -> usize {
        micro_batch % self.vertical
    }

    /// The buffer that is home to a piece of a micro-batch's boundary; none where it has another home.
    pub fn boundary_home_of(&self, call: usize, micro_batch: usize, piece: usize) -> Option<Buffer> {
        self.boundary_homes.get(&(call, self.place(micro_batch)))?.of_piece(piece)
    }

    fn add_slots(&mut self, layout: &Layout, slots: usize) {
        let elements = |group: &Group| group.table.iter().map(|entry| entry.elements).collect::<Vec<_>>();
        let in_slot = |place: &GroupPlacement| place.master == Tier::Device && self.device.holds_masters();
        let has_own = |group: &Group, placement: &GroupPlacement| in_slot(placement) || group.resident;
        let mut members: HashMap<Vec<usize>, usize> = HashMap::new();
        for (group, placement) in layout.groups.iter().zip(&self.placements) {
            if !has_own(group, placement) {
                *members.entry(elements(group)).or_default() += 1;
            }
        }
        let mut classes: HashMap<Vec<usize>, Vec<Slot>> = HashMap::new();
        for (group, placement) in layout.groups.iter().zip(&self.placements) {
            let tensor_elements = elements(group);
            // The resident group is in its slot throughout a pass, so it shares it with nobody.
            if has_own(group, placement) {
                self.slots_of.push(vec![Slot(self.slots.len())]);
                self.slots.push(SlotSpec { tensor_elements });
                continue;
            }
            let members = members.get(&tensor_elements).copied().unwrap_or(0);
            let class = classes.entry(tensor_elements.clone()).or_insert_with(|| {
                let first = self.slots.len();
                let count = slots.min(members);
                self.slots.extend((0..count).map(|_| SlotSpec { tensor_elements: tensor_elements.clone() }));
                (first..first + count).map(Slot).collect()
            });
            self.slots_of.push(class.clone());
        }
    }

    /// `count` buffers of `elements`, the last one of `last_elements`.
    fn add_buffers(
        &mut self,
        (tier, use_): (Tier, BufferUse),
        (count, elements, last_elements): (usize, usize, usize),
    ) -> Buffers {
        let first = self.runs.last().map_or(0, |run| run.buffers.first + run.buffers.count);
        let buffers = Buffers { first, count };
        let bytes = |elements| 4 * elements + STAGGER_BYTES;
        let each = BufferSpec { tier, bytes: bytes(elements), use_ };
        if count > 0 {
            self.runs.push(BufferRun { buffers, each, last_bytes: bytes(last_elements) });
        }
        buffers
    }

    fn add_buffer(&mut self, tier: Tier, elements: usize, use_: BufferUse) -> Option<Buffer> {
        self.add_buffers((tier, use_), (1, elements, elements)).of_piece(0)
    }

    /// Buffers for all pieces of `elements`.
    fn add_pieces(&mut self, tier: Tier, (layout, elements): (&Layout, usize), use_: BufferUse) -> Buffers {
        let count = layout.piece_count(elements);
        let last = count.checked_sub(1).map_or(0, |last| layout.piece_range(elements, last).len());
        self.add_buffers((tier, use_), (count, layout.piece_elements, last))
    }

    fn add_homes(&mut self, needs: &Needs) {
        for group in 0..needs.layout.groups.len() {
            for stream in Stream::ALL {
                let tier = self.placements[group].home(stream);
                let passes = stream == Stream::Gradient && needs.gradient_passes_through;
                let in_slot = stream == Stream::Master && self.master_in_slot(group);
                if tier == Tier::Disk || passes || in_slot {
                    continue;
                }
                let elements = stream.elements(needs.layout, group);
                let pieces = self.add_pieces(tier, (needs.layout, elements), BufferUse::Home(stream));
                self.homes.insert((group, stream), pieces);
            }
        }
    }

    /// Elements of the largest piece of any group.
    fn largest_piece(layout: &Layout) -> usize {
        let largest = layout.groups.iter().map(|group| group.elements).max().unwrap_or(0);
        largest.min(layout.piece_elements)
    }

    fn add_pools(&mut self, needs: &Needs, depths: Depths) {
        let layout = needs.layout;
        let elements = Self::largest_piece(layout);
        let pool = |this: &mut Self, count: usize, use_| -> Vec<Buffer> {
            this.add_buffers((Tier::Host, use_), (count, elements, elements)).all().collect()
        };
        let updated_here = |this: &Self, group: usize| this.updated_on_device(group);
        let most_pieces = |keep: &dyn Fn(&Self, usize) -> bool, this: &Self| {
            (0..layout.groups.len())
                .filter(|&group| keep(this, group))
                .map(|group| layout.piece_count(layout.groups[group].trainable_elements))
                .max()
                .unwrap_or(0)
        };
        // Initial values pass through the fetch pool on their way to a slot or to disk, so there is always
        // one.
        self.fetch_pool = pool(self, depths.look_ahead.max(1), BufferUse::FetchPieces);
        let any_on_disk = self.placements.iter().any(|place| {
            [place.master, place.first_moment, place.second_moment].contains(&Tier::Disk)
                || (place.gradient == Tier::Disk && !needs.gradient_passes_through)
        });
        if any_on_disk {
            self.state_pool = pool(self, depths.state_pieces, BufferUse::StatePieces);
        }
        let gradient_pieces = if needs.gradient_passes_through {
            most_pieces(&|this, group| !updated_here(this, group), self) * depths.gradient_sets
        } else {
            let on_disk = most_pieces(&|this, group| this.placements[group].gradient == Tier::Disk, self);
            match depths.vertical {
                1 => on_disk.min(depths.state_pieces),
                // The sum of a whole group stays here from the first micro-batch to the last.
                _ => on_disk * depths.gradient_sets,
            }
        };
        self.gradient_pool = pool(self, gradient_pieces, BufferUse::GradientPieces);
        if needs.gradient_passes_through {
            let pieces = most_pieces(&updated_here, self) * depths.gradient_sets;
            let of_device = (Tier::Device, BufferUse::GradientPieces);
            self.device_gradient_pool =
                self.add_buffers(of_device, (pieces, elements, elements)).all().collect();
        }
    }

    fn add_boundaries(&mut self, needs: &Needs) {
        let calls = needs.calls.iter().enumerate();
        let moving: Vec<(usize, &Call)> =
            calls.filter(|&(index, call)| call.boundary_moves && !self.keeps(index)).collect();
        if self.boundary_home == Tier::Device || moving.is_empty() {
            return;
        }
        self.passages = 2;
        match self.boundary_home {
            Tier::Host => {
                let each = moving.into_iter().flat_map(|(index, call)| {
                    (0..self.vertical).map(move |place| (index, place, call.boundary_elements))
                });
                for (index, place, elements) in each.collect::<Vec<_>>() {
                    let pieces =
                        self.add_pieces(Tier::Host, (needs.layout, elements), BufferUse::BoundaryHome);
                    self.boundary_homes.insert((index, place), pieces);
                }
            }
            _ => {
                let largest = moving.iter().map(|(_, call)| call.boundary_elements).max().unwrap_or(0);
                let pieces = needs.layout.piece_count(largest);
                let elements = largest.min(needs.layout.piece_elements);
                let passing = (Tier::Host, BufferUse::BoundaryPieces);
                self.boundary_pool =
                    self.add_buffers(passing, (2 * pieces, elements, elements)).all().collect();
            }
        }
    }

    fn add_staging(&mut self, needs: &Needs) {
        if !needs.device.apart {
            return;
        }
        let elements = Self::largest_piece(needs.layout);
        self.gradient_staging = self.add_buffer(Tier::Host, elements, BufferUse::Staging);
        if needs.device.dtype != DType::F32 {
            self.upload_staging = self.add_buffer(Tier::Host, elements, BufferUse::Staging);
        }
    }

    /// Bytes of all buffers of a tier, each rounded up to a page as the arena does.
    pub fn buffer_bytes(&self, tier: Tier) -> u64 {
        let of_tier = self.runs.iter().filter(|run| run.each.tier == tier);
        of_tier.map(|run| run.bytes(|bytes| padded_bytes(bytes) as u64)).sum()
    }

    /// Bytes of all buffers of some uses.
    pub fn bytes_of_uses(&self, uses: &[BufferUse]) -> u64 {
        let of_uses = self.runs.iter().filter(|run| uses.contains(&run.each.use_));
        of_uses.map(|run| run.bytes(|bytes| bytes as u64)).sum()
    }

    /// Elements of all slots.
    pub fn slot_elements(&self) -> u64 {
        self.slots.iter().flat_map(|slot| &slot.tensor_elements).map(|&elements| elements as u64).sum()
    }
}
