//! The one builder of schedules. A new policy is a change here: the executor only runs what it is given.

use crate::schedule::buffer_plan::BufferPlan;
use crate::schedule::layout::Layout;
use crate::schedule::operation::{
    Buffer, Call, Extent, GradientSet, GroupIndex, MasterPlace, Operation, Passage, Slot, Stream,
};
use ferrozero_offload::Tier;
use std::ops::Range;

/// What a schedule is for and what it may use.
#[derive(Debug, Clone, Copy)]
pub struct Builder<'a> {
    /// Groups.
    pub layout: &'a Layout,
    /// Segments in the order in which they run.
    pub calls: &'a [Call],
    /// Homes, buffers and slots.
    pub buffer_plan: &'a BufferPlan,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Whether the norm of all gradients is needed before any update.
    pub clip: bool,
}

/// Hands out the members of a pool in turn.
struct Rotation<'a, T>(&'a [T], usize);

impl<T: Copy> Rotation<'_, T> {
    fn next(&mut self) -> T {
        let item = self.0[self.1 % self.0.len()];
        self.1 += 1;
        item
    }
}

/// A schedule in the making.
struct Draft<'a> {
    builder: Builder<'a>,
    operations: Vec<Operation>,
    fetch_pool: Rotation<'a, Buffer>,
    state_pool: Rotation<'a, Buffer>,
    gradient_pool: Rotation<'a, Buffer>,
    device_gradient_pool: Rotation<'a, Buffer>,
    boundary_pool: Rotation<'a, Buffer>,
    /// Which group's current values each slot holds, and when it was last used.
    slot_contents: Vec<(Option<GroupIndex>, usize)>,
    gradient_sets: usize,
    passages: usize,
    /// How often each group's gradient is still to be accumulated in this step, and how often it has been.
    accumulations: Vec<(usize, usize)>,
    /// Groups whose update of the last step is still to be made.
    pending: Vec<bool>,
    /// Gradient buffers of the group that was accumulated last, by piece.
    gradients: Vec<Buffer>,
}

impl<'a> Builder<'a> {
    /// One training step. With clipping it ends at the norm of its gradients, and its updates are left
    /// `pending`: they are made by the next schedule, each when that one asks for the group, whose new values
    /// then go up from the update without being read again.
    pub fn train(&self, pending: bool) -> Vec<Operation> {
        let mut draft = self.draft();
        draft.pending.fill(pending);
        let resident = self.layout.resident();
        for call in self.calls.iter().filter(|call| call.backward.is_some()) {
            draft.accumulations[call.group].0 += self.accumulate;
        }
        draft.accumulations[resident].0 = self.accumulate;
        draft.attach();
        let backward_order = Call::backward_order(self.calls);
        for micro_batches in self.abreast() {
            for call in 0..self.calls.len() {
                for micro_batch in micro_batches.clone() {
                    draft.forward(call, micro_batch, true);
                }
            }
            for (at, &call) in backward_order.iter().enumerate() {
                draft.backward(call, backward_order.get(at + 1).copied(), micro_batches.clone());
            }
            for micro_batch in micro_batches.clone() {
                let gradients = draft.next_gradient_set();
                let is_last = micro_batch + 1 == self.accumulate;
                let slot = is_last.then(|| draft.own_slot(resident));
                draft.operations.push(Operation::Detach { micro_batch, slot, gradients: Some(gradients) });
                draft.accumulate(resident, gradients, (micro_batch, &micro_batches));
            }
        }
        draft.operations.push(Operation::Norm);
        draft.operations
    }

    /// The micro-batches of a step, in runs of those that go vertically: each segment runs them all before
    /// the next one.
    pub fn abreast(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (count, vertical) = (self.accumulate, self.buffer_plan.vertical);
        (0..count).step_by(vertical).map(move |first| first..(first + vertical).min(count))
    }

    /// The updates that the last step left pending.
    pub fn settle(&self) -> Vec<Operation> {
        let mut draft = self.draft();
        let resident = self.layout.resident();
        for group in std::iter::once(resident).chain(0..resident) {
            draft.update(group);
        }
        draft.operations
    }

    /// One pass without gradients, with the updates that the last step left `pending`.
    pub fn evaluate(&self, pending: bool) -> Vec<Operation> {
        let mut draft = self.draft();
        draft.pending.fill(pending);
        draft.attach();
        for call in 0..self.calls.len() {
            draft.forward(call, 0, false);
        }
        let slot = Some(draft.own_slot(self.layout.resident()));
        draft.operations.push(Operation::Detach { micro_batch: 0, slot, gradients: None });
        draft.operations
    }

    /// Initial values of every state stream, brought home.
    pub fn initialize(&self) -> Vec<Operation> {
        self.bring_home(|draft, group, stream, piece, buffer, on_disk| {
            draft.operations.push(Operation::Initialize { group, stream, piece, buffer });
            if on_disk {
                draft.operations.push(Operation::Write {
                    extent: Extent::State(group, stream),
                    piece,
                    buffer,
                });
            }
        })
    }

    /// What the last commit holds, brought to those homes that are not on disk.
    pub fn restore(&self) -> Vec<Operation> {
        self.bring_home(|draft, group, stream, piece, buffer, on_disk| {
            if !on_disk {
                let extent = Extent::State(group, stream);
                draft.operations.push(Operation::Read { extent, piece, buffer, fetch: true });
            }
        })
    }

    fn bring_home(
        &self,
        mut make: impl FnMut(&mut Draft<'a>, GroupIndex, Stream, usize, Buffer, bool),
    ) -> Vec<Operation> {
        let mut draft = self.draft();
        for group in 0..self.layout.groups.len() {
            for stream in Stream::STATE {
                let home = self.buffer_plan.placements[group].home(stream);
                for piece in 0..self.layout.piece_count(stream.elements(self.layout, group)) {
                    let of_piece = self.buffer_plan.home_of(group, stream, piece);
                    let on_device = of_piece.filter(|&home| self.buffer_plan.is_on_device(home));
                    let buffer = match of_piece {
                        Some(home) if on_device.is_none() => home,
                        _ => draft.fetch_pool.next(),
                    };
                    make(&mut draft, group, stream, piece, buffer, home == Tier::Disk);
                    if let Some(home) = on_device {
                        draft.operations.push(Operation::CopyUp { group, stream, piece, buffer, home });
                    }
                    if stream == Stream::Master && self.buffer_plan.master_in_slot(group) {
                        let slot = draft.own_slot(group);
                        let staging = None;
                        draft.operations.push(Operation::Upload { group, piece, buffer, slot, staging });
                    }
                }
            }
        }
        draft.operations
    }

    /// Writes to disk what a commit needs and has another home, and commits. Frozen parameters change in the
    /// first commit only.
    pub fn commit(&self, first: bool) -> Vec<Operation> {
        let mut draft = self.draft();
        for (group, placement) in self.buffer_plan.placements.iter().enumerate() {
            let changes = if first { usize::MAX } else { self.layout.groups[group].trainable_elements };
            for stream in Stream::STATE.into_iter().filter(|&stream| placement.home(stream) != Tier::Disk) {
                let elements = stream.elements(self.layout, group).min(changes);
                for piece in 0..self.layout.piece_count(elements) {
                    let buffer = match self.buffer_plan.home_of(group, stream, piece) {
                        Some(home) => draft.copied_down(group, stream, piece, home),
                        None => {
                            let buffer = draft.fetch_pool.next();
                            let slot = draft.own_slot(group);
                            draft.operations.push(Operation::Download { group, piece, slot, buffer });
                            buffer
                        }
                    };
                    draft.operations.push(Operation::Write {
                        extent: Extent::State(group, stream),
                        piece,
                        buffer,
                    });
                }
            }
        }
        draft.operations.push(Operation::Commit);
        draft.operations
    }

    /// Hands pieces `pieces` of a group's master parameters to the caller.
    pub fn collect(&self, group: GroupIndex, pieces: std::ops::Range<usize>) -> Vec<Operation> {
        let mut draft = self.draft();
        for piece in pieces {
            let master = if self.buffer_plan.master_in_slot(group) {
                MasterPlace::Slot(draft.own_slot(group))
            } else {
                let buffer = draft.fetched_master(group, piece);
                MasterPlace::Buffer(draft.copied_down(group, Stream::Master, piece, buffer))
            };
            draft.operations.push(Operation::Collect { group, piece, master });
        }
        draft.operations
    }

    fn draft(&self) -> Draft<'a> {
        let buffer_plan = self.buffer_plan;
        Draft {
            builder: *self,
            operations: vec![],
            fetch_pool: Rotation(&buffer_plan.fetch_pool, 0),
            state_pool: Rotation(&buffer_plan.state_pool, 0),
            gradient_pool: Rotation(&buffer_plan.gradient_pool, 0),
            device_gradient_pool: Rotation(&buffer_plan.device_gradient_pool, 0),
            boundary_pool: Rotation(&buffer_plan.boundary_pool, 0),
            slot_contents: vec![(None, 0); buffer_plan.slots.len()],
            gradient_sets: 0,
            passages: 0,
            accumulations: vec![(0, 0); self.layout.groups.len()],
            pending: vec![false; self.layout.groups.len()],
            gradients: vec![],
        }
    }
}

impl Draft<'_> {
    /// The slot of a group whose home is the device.
    fn own_slot(&self, group: GroupIndex) -> Slot {
        self.builder.buffer_plan.slots_of[group][0]
    }

    fn attach(&mut self) {
        let slot = self.fetch(self.builder.layout.resident());
        self.operations.push(Operation::Attach { slot });
    }

    fn next_gradient_set(&mut self) -> GradientSet {
        self.gradient_sets += 1;
        GradientSet(self.gradient_sets % self.builder.buffer_plan.gradient_sets)
    }

    fn next_passage(&mut self) -> Passage {
        self.passages += 1;
        Passage(self.passages % self.builder.buffer_plan.passages)
    }

    fn moves(&self, call: usize) -> bool {
        let Builder { buffer_plan, calls, .. } = self.builder;
        buffer_plan.boundary_home != Tier::Device && calls[call].boundary_moves && !buffer_plan.keeps(call)
    }

    /// Sees to it that the parameters of a group are in a slot, with the update that was left pending.
    fn fetch(&mut self, group: GroupIndex) -> Slot {
        let buffer_plan = self.builder.buffer_plan;
        let pending = std::mem::take(&mut self.pending[group]);
        let candidates = &buffer_plan.slots_of[group];
        if buffer_plan.master_in_slot(group) {
            if pending {
                self.update(group);
            }
            return candidates[0];
        }
        let now = self.operations.len();
        if let Some(&slot) = candidates.iter().find(|slot| self.slot_contents[slot.0].0 == Some(group)) {
            self.slot_contents[slot.0].1 = now;
            return slot;
        }
        let slot = *candidates
            .iter()
            .min_by_key(|slot| (self.slot_contents[slot.0].0.is_some(), self.slot_contents[slot.0].1))
            .unwrap_or(&candidates[0]);
        self.slot_contents[slot.0] = (Some(group), now);
        let layout = self.builder.layout;
        let updated = if pending { layout.piece_count(layout.groups[group].trainable_elements) } else { 0 };
        let staging = buffer_plan.upload_staging.filter(|_| !buffer_plan.updated_on_device(group));
        for piece in 0..layout.piece_count(layout.groups[group].elements) {
            let buffer = self.fetched_master(group, piece);
            if piece < updated {
                self.update_piece(group, piece, MasterPlace::Buffer(buffer));
            }
            self.operations.push(Operation::Upload { group, piece, buffer, slot, staging });
            if piece < updated {
                self.write_home(group, Stream::Master, piece, buffer);
            }
        }
        slot
    }

    /// A buffer of the host that holds what `home` holds.
    fn copied_down(&mut self, group: GroupIndex, stream: Stream, piece: usize, home: Buffer) -> Buffer {
        if !self.builder.buffer_plan.is_on_device(home) {
            return home;
        }
        let buffer = self.fetch_pool.next();
        self.operations.push(Operation::CopyDown { group, stream, piece, home, buffer });
        buffer
    }

    /// The buffer that holds a piece of master parameters for the device, read from disk if that is its home.
    fn fetched_master(&mut self, group: GroupIndex, piece: usize) -> Buffer {
        if let Some(home) = self.builder.buffer_plan.home_of(group, Stream::Master, piece) {
            return home;
        }
        let buffer = self.fetch_pool.next();
        let extent = Extent::State(group, Stream::Master);
        self.operations.push(Operation::Read { extent, piece, buffer, fetch: true });
        buffer
    }

    fn forward(&mut self, call: usize, micro_batch: usize, train: bool) {
        let slot = self.fetch(self.builder.calls[call].group);
        let passage = (train && self.moves(call)).then(|| self.next_passage());
        let goes_back = self.builder.calls[call].backward.is_some();
        let keeps = train && goes_back && self.builder.buffer_plan.keeps(call);
        self.operations.push(Operation::Forward { call, micro_batch, slot, passage, keeps });
        let Some(passage) = passage else { return };
        for piece in 0..self.boundary_pieces(call) {
            let buffer = self.boundary_buffer(call, micro_batch, piece);
            self.operations.push(Operation::SaveBoundary { call, micro_batch, piece, passage, buffer });
            if let Some(extent) = self.boundary_extent(call, micro_batch) {
                self.operations.push(Operation::Write { extent, piece, buffer });
            }
        }
    }

    fn boundary_pieces(&self, call: usize) -> usize {
        self.builder.layout.piece_count(self.builder.calls[call].boundary_elements)
    }

    fn boundary_buffer(&mut self, call: usize, micro_batch: usize, piece: usize) -> Buffer {
        let home = self.builder.buffer_plan.boundary_home_of(call, micro_batch, piece);
        home.unwrap_or_else(|| self.boundary_pool.next())
    }

    /// Where on disk a boundary is, if that is its home.
    fn boundary_extent(&self, call: usize, micro_batch: usize) -> Option<Extent> {
        let buffer_plan = self.builder.buffer_plan;
        let place = buffer_plan.place(micro_batch);
        (buffer_plan.boundary_home == Tier::Disk).then_some(Extent::Boundary { call, place })
    }

    fn load_boundary(&mut self, call: usize, micro_batch: usize) -> Option<Passage> {
        if !self.moves(call) {
            return None;
        }
        let passage = self.next_passage();
        for piece in 0..self.boundary_pieces(call) {
            let buffer = self.boundary_buffer(call, micro_batch, piece);
            if let Some(extent) = self.boundary_extent(call, micro_batch) {
                self.operations.push(Operation::Read { extent, piece, buffer, fetch: true });
            }
            self.operations.push(Operation::LoadBoundary { call, micro_batch, piece, passage, buffer });
        }
        Some(passage)
    }

    /// The backward of a call, behind which that of `next` comes.
    fn backward(&mut self, call: usize, next: Option<usize>, micro_batches: Range<usize>) {
        let group = self.builder.calls[call].group;
        for micro_batch in micro_batches.clone() {
            let passage = self.load_boundary(call, micro_batch);
            let slot = self.fetch(group);
            if let Some(next) = next.filter(|_| micro_batch > micro_batches.start) {
                self.fetch_beside(self.builder.calls[next].group, slot);
            }
            let gradients = self.next_gradient_set();
            let kept = self.builder.buffer_plan.keeps(call);
            self.operations.push(Operation::Backward { call, micro_batch, slot, passage, kept, gradients });
            self.accumulate(group, gradients, (micro_batch, &micro_batches));
        }
    }

    /// Asks for a group while micro-batches still run in `slot`. Each of their boundaries waits for one
    /// before it to be used up, so behind the last of them its parameters would come too late. Where there is
    /// no other slot they have to.
    fn fetch_beside(&mut self, group: GroupIndex, slot: Slot) {
        if self.builder.buffer_plan.slots_of[group].iter().any(|&other| other != slot) {
            self.fetch(group);
        }
    }

    /// Takes a group's gradients of one of several micro-batches off the device, and updates the group where
    /// nothing global is awaited. Between the micro-batches a sum whose home is the disk stays in its
    /// buffers.
    fn accumulate(
        &mut self,
        group: GroupIndex,
        gradients: GradientSet,
        (micro_batch, abreast): (usize, &Range<usize>),
    ) {
        let buffer_plan = self.builder.buffer_plan;
        let (left, so_far) = self.accumulations[group];
        self.accumulations[group] = (left - 1, so_far + 1);
        let (add, measure) = (so_far > 0, left == 1);
        let (is_first, is_last) = (micro_batch == abreast.start, micro_batch + 1 == abreast.end);
        let on_disk = self.gradient_on_disk(group);
        let staging = buffer_plan.gradient_staging.filter(|_| !buffer_plan.updated_on_device(group));
        let extent = Extent::State(group, Stream::Gradient);
        if is_first {
            self.gradients = self.gradient_buffers(group);
        }
        for piece in 0..self.gradients.len() {
            let buffer = self.gradients[piece];
            if on_disk && add && is_first {
                self.operations.push(Operation::Read { extent, piece, buffer, fetch: false });
            }
            self.operations.push(Operation::Accumulate {
                group,
                piece,
                gradients,
                buffer,
                staging,
                add,
                measure,
            });
            if on_disk && is_last {
                self.operations.push(Operation::Write { extent, piece, buffer });
            }
        }
        if measure && !self.builder.clip {
            self.update(group);
        }
    }

    /// The buffers that a group's gradient is summed in, by piece.
    fn gradient_buffers(&mut self, group: GroupIndex) -> Vec<Buffer> {
        let Builder { layout, buffer_plan, .. } = self.builder;
        let pieces = 0..layout.piece_count(layout.groups[group].trainable_elements);
        let home = |piece| buffer_plan.home_of(group, Stream::Gradient, piece);
        let buffers = pieces.map(|piece| match home(piece) {
            Some(home) => home,
            None if buffer_plan.updated_on_device(group) => self.device_gradient_pool.next(),
            None => self.gradient_pool.next(),
        });
        buffers.collect()
    }

    /// Whether a group's gradient has to be kept, and is kept on disk.
    fn gradient_on_disk(&self, group: GroupIndex) -> bool {
        !self.builder.gradient_passes_through()
            && self.builder.buffer_plan.placements[group].gradient == Tier::Disk
    }

    /// The buffer that holds a piece of a state stream, read from disk if that is its home.
    fn state_buffer(&mut self, group: GroupIndex, stream: Stream, piece: usize) -> Buffer {
        if let Some(home) = self.builder.buffer_plan.home_of(group, stream, piece) {
            return home;
        }
        let buffer = self.state_pool.next();
        let extent = Extent::State(group, stream);
        self.operations.push(Operation::Read { extent, piece, buffer, fetch: false });
        buffer
    }

    fn update(&mut self, group: GroupIndex) {
        let layout = self.builder.layout;
        for piece in 0..layout.piece_count(layout.groups[group].trainable_elements) {
            if self.builder.buffer_plan.master_in_slot(group) {
                self.update_piece(group, piece, MasterPlace::Slot(self.own_slot(group)));
            } else {
                let buffer = self.state_buffer(group, Stream::Master, piece);
                self.update_piece(group, piece, MasterPlace::Buffer(buffer));
                self.write_home(group, Stream::Master, piece, buffer);
            }
        }
        for contents in &mut self.slot_contents {
            if contents.0 == Some(group) && layout.groups[group].trainable_elements > 0 {
                contents.0 = None;
            }
        }
    }

    /// Updates a piece of which the master parameters are in `master`, and brings its moments home.
    fn update_piece(&mut self, group: GroupIndex, piece: usize, master: MasterPlace) {
        let gradient = if self.builder.gradient_passes_through() {
            self.gradients[piece]
        } else {
            self.state_buffer(group, Stream::Gradient, piece)
        };
        let first_moment = self.state_buffer(group, Stream::FirstMoment, piece);
        let second_moment = self.state_buffer(group, Stream::SecondMoment, piece);
        let deferred = self.builder.clip;
        self.operations.push(Operation::Update {
            group,
            piece,
            master,
            first_moment,
            second_moment,
            gradient,
            deferred,
        });
        self.write_home(group, Stream::FirstMoment, piece, first_moment);
        self.write_home(group, Stream::SecondMoment, piece, second_moment);
    }

    /// Writes a piece to disk if that is its home.
    fn write_home(&mut self, group: GroupIndex, stream: Stream, piece: usize, buffer: Buffer) {
        if self.builder.buffer_plan.placements[group].home(stream) == Tier::Disk {
            self.operations.push(Operation::Write { extent: Extent::State(group, stream), piece, buffer });
        }
    }
}

impl Builder<'_> {
    /// Whether each group's gradient is used up within its own backward, so that it needs no home.
    pub fn gradient_passes_through(&self) -> bool {
        gradient_passes_through(self.calls, self.accumulate, self.buffer_plan.vertical, self.clip)
    }
}

/// Whether each group's gradient is used up within its own backward: all micro-batches run vertically, or
/// there is one, no clipping, and no segment that runs twice.
pub fn gradient_passes_through(calls: &[Call], accumulate: usize, vertical: usize, clip: bool) -> bool {
    vertical >= accumulate && !clip && runs_each_once(calls)
}

/// Whether no segment runs twice. One that does has gradients of each run, which would be summed in another
/// order if micro-batches ran vertically.
pub fn runs_each_once(calls: &[Call]) -> bool {
    let mut groups: Vec<_> = calls.iter().map(|call| call.group).collect();
    groups.sort_unstable();
    groups.windows(2).all(|pair| pair[0] != pair[1])
}
