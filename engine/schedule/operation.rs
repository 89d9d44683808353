//! A step is data: the operations of which schedules are made.
//!
//! Every operation names what it uses: buffers (host or device memory of one piece), slots, gradient sets,
//! boundaries in passing, pieces on disk. An operation may start when the last earlier one that used any of
//! these is done. One resource, the states on disk as a whole, is shared by writes and a commit has it for
//! itself. The list is in an order in which it could run one by one, and each queue takes its own operations
//! in that order, so the earliest unfinished operation can always start: a schedule cannot deadlock.
//!
//! [`Builder`](crate::schedule::builder::Builder) makes schedules; the planner counts their bytes, the
//! executor runs them, the [`simulator`](crate::planner::simulator) costs them and the trace is recorded
//! against them.

use crate::schedule::layout::{Group, Layout};
use serde::{Deserialize, Serialize};

/// Index of a group in the [`Layout`].
pub type GroupIndex = usize;

/// One kind of data of a group. In f32 training the parameter that the device computes with and the master
/// parameter that the optimizer updates are one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// The parameter in f32.
    Master,
    /// First moment of the optimizer, f32.
    FirstMoment,
    /// Second moment of the optimizer, f32.
    SecondMoment,
    /// Accumulated gradient, f32.
    Gradient,
}

impl Stream {
    /// All streams.
    pub const ALL: [Self; 4] = [Self::Master, Self::FirstMoment, Self::SecondMoment, Self::Gradient];
    /// The streams that a checkpoint holds.
    pub const STATE: [Self; 3] = [Self::Master, Self::FirstMoment, Self::SecondMoment];

    /// Name in tables and of extents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Master => "master parameter",
            Self::FirstMoment => "first moment",
            Self::SecondMoment => "second moment",
            Self::Gradient => "gradient",
        }
    }

    /// Name of the extent of this stream of a group.
    pub fn extent_name(self, group: &Group) -> String {
        format!("{}/{}", group.name, self.name())
    }

    /// Elements that group `group` has of this stream, alignment included.
    pub fn elements(self, layout: &Layout, group: GroupIndex) -> usize {
        match self {
            Self::Master => layout.groups[group].elements,
            _ => layout.groups[group].trainable_elements,
        }
    }
}

/// Host or device memory that holds one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buffer(pub usize);

/// Device storage for the parameters of one group at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub usize);

/// Room for the gradients of one group as autograd left them, on their way off the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GradientSet(pub usize);

/// Room for one boundary activation on its way between device and home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Passage(pub usize);

/// One run of a segment within a step, as the rehearsal saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The group of the segment.
    pub group: GroupIndex,
    /// Size of the first input, which is the boundary activation, in elements of f32: half as many as it has
    /// where it is of a type of two bytes.
    pub boundary_elements: usize,
    /// Whether the boundary can leave the device: plain storage that only this call reads.
    pub boundary_moves: bool,
    /// Where its backward comes among those of a micro-batch; those of equal places run in the reverse order
    /// of their forwards. None where candle does not come back to it.
    pub backward: Option<usize>,
    /// Shapes of its inputs, where the memory that it computes in is planned for them.
    pub inputs: Vec<Vec<usize>>,
}

impl Call {
    /// One of a chain, whose calls go back in the reverse of their order.
    pub fn new(group: GroupIndex, boundary_elements: usize, boundary_moves: bool) -> Self {
        Self { group, boundary_elements, boundary_moves, backward: Some(0), inputs: vec![] }
    }

    /// The calls of a micro-batch in the order in which candle goes back through them.
    pub fn backward_order(calls: &[Self]) -> Vec<usize> {
        let back = (0..calls.len()).rev().filter_map(|call| Some((calls[call].backward?, call)));
        let mut order: Vec<_> = back.collect();
        order.sort_by_key(|(place, _)| *place);
        order.into_iter().map(|(_, call)| call).collect()
    }
}

/// A run of bytes on disk that pieces are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Extent {
    /// A state stream of a group.
    State(GroupIndex, Stream),
    /// The boundary activation that goes into a call, of the micro-batch in this place of those that run
    /// vertically.
    Boundary {
        /// The call.
        call: usize,
        /// Number of the micro-batch among those that run vertically.
        place: usize,
    },
}

impl Extent {
    /// Name in timelines.
    pub fn name(self) -> &'static str {
        match self {
            Self::State(_, stream) => stream.name(),
            Self::Boundary { .. } => "boundary activation",
        }
    }

    fn group(self, calls: &[Call]) -> GroupIndex {
        match self {
            Self::State(group, _) => group,
            Self::Boundary { call, .. } => calls[call].group,
        }
    }

    fn elements(self, layout: &Layout, calls: &[Call]) -> usize {
        match self {
            Self::State(group, stream) => stream.elements(layout, group),
            Self::Boundary { call, .. } => calls[call].boundary_elements,
        }
    }
}

/// Where the optimizer finds the master parameters of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MasterPlace {
    /// In a buffer, as one run.
    Buffer(Buffer),
    /// In a device slot, tensor by tensor.
    Slot(Slot),
}

/// One operation. `piece` counts within the run of its group or boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are the words defined above: group, stream, piece, buffer, slot, call, micro-batch"
)]
pub enum Operation {
    /// Makes the initial values of a piece.
    Initialize { group: GroupIndex, stream: Stream, piece: usize, buffer: Buffer },
    /// Disk to buffer. With `fetch` it is the device that waits for it, otherwise the optimizer.
    Read { extent: Extent, piece: usize, buffer: Buffer, fetch: bool },
    /// Buffer to disk.
    Write { extent: Extent, piece: usize, buffer: Buffer },
    /// Buffer to slot, by way of `staging` where the device computes in another type.
    Upload { group: GroupIndex, piece: usize, buffer: Buffer, slot: Slot, staging: Option<Buffer> },
    /// Slot to buffer.
    Download { group: GroupIndex, piece: usize, slot: Slot, buffer: Buffer },
    /// A piece of a stream goes from the host to its home on a device with memory of its own.
    CopyUp { group: GroupIndex, stream: Stream, piece: usize, buffer: Buffer, home: Buffer },
    /// A piece of a stream is copied to the host from its home on such a device.
    CopyDown { group: GroupIndex, stream: Stream, piece: usize, home: Buffer, buffer: Buffer },
    /// The resident parameters enter their tensors, for all micro-batches.
    Attach { slot: Slot },
    /// A segment runs; with `passage` its input leaves the device afterwards, and where it `keeps` its graph
    /// that stays for the backward.
    Forward { call: usize, micro_batch: usize, slot: Slot, passage: Option<Passage>, keeps: bool },
    /// A segment propagates back, by the graph that was `kept` or by that of running again; its gradients
    /// leave in `gradients`.
    Backward {
        call: usize,
        micro_batch: usize,
        slot: Slot,
        passage: Option<Passage>,
        kept: bool,
        gradients: GradientSet,
    },
    /// A micro-batch ends: the gradients of resident parameters leave, if it was a training pass, and after
    /// the last one the parameters leave their tensors for `slot`.
    Detach { micro_batch: usize, slot: Option<Slot>, gradients: Option<GradientSet> },
    /// A piece of a boundary leaves the device.
    SaveBoundary { call: usize, micro_batch: usize, piece: usize, passage: Passage, buffer: Buffer },
    /// A piece of a boundary returns to the device.
    LoadBoundary { call: usize, micro_batch: usize, piece: usize, passage: Passage, buffer: Buffer },
    /// Gradients of a piece are scaled and put into, or added to, a buffer; the last time they are measured.
    /// Those of a device with memory of its own come by way of `staging`.
    Accumulate {
        group: GroupIndex,
        piece: usize,
        gradients: GradientSet,
        buffer: Buffer,
        staging: Option<Buffer>,
        add: bool,
        measure: bool,
    },
    /// The gradient norm over all groups is known; with clipping, so is the factor.
    Norm,
    /// The optimizer updates a piece: by the numbers of this step or, `deferred`, by those of the last one.
    Update {
        group: GroupIndex,
        piece: usize,
        master: MasterPlace,
        first_moment: Buffer,
        second_moment: Buffer,
        gradient: Buffer,
        deferred: bool,
    },
    /// A piece of master parameters is handed to the caller, for export and digests.
    Collect { group: GroupIndex, piece: usize, master: MasterPlace },
    /// What was written of states until here becomes the commit. Later writes of states wait for it, and
    /// nothing else.
    Commit,
}

/// What runs one operation after another and beside the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Queue {
    /// Disk reads that the device waits for: parameters and boundaries.
    FetchRead,
    /// Disk reads that the optimizer waits for.
    StateRead,
    /// Disk writes.
    DiskWrite,
    /// Host to device copies.
    Upload,
    /// Device to host copies, with accumulation of gradients.
    Download,
    /// Candle, on the training thread.
    Compute,
    /// The optimizer's arithmetic on the host.
    Optimizer,
    /// Commits: data and manifest are made durable.
    Commit,
    /// The executor itself.
    Control,
}

impl Queue {
    /// All queues.
    pub const ALL: [Self; 9] = [
        Self::FetchRead,
        Self::StateRead,
        Self::DiskWrite,
        Self::Upload,
        Self::Download,
        Self::Compute,
        Self::Optimizer,
        Self::Commit,
        Self::Control,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::FetchRead => "disk read (fetch)",
            Self::StateRead => "disk read (state)",
            Self::DiskWrite => "disk write",
            Self::Upload => "upload",
            Self::Download => "download",
            Self::Compute => "compute",
            Self::Optimizer => "optimizer",
            Self::Commit => "commit",
            Self::Control => "control",
        }
    }
}

/// Something that only one operation uses at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resource {
    /// A buffer.
    Buffer(Buffer),
    /// A slot.
    Slot(Slot),
    /// A gradient set.
    Gradients(GradientSet),
    /// A passage.
    Passage(Passage),
    /// A piece on disk.
    Piece(Extent, usize),
    /// The gradient statistics of the step.
    Statistics,
    /// The states on disk as a whole.
    StatesOnDisk,
}

impl MasterPlace {
    fn resource(self) -> Resource {
        match self {
            Self::Buffer(buffer) => Resource::Buffer(buffer),
            Self::Slot(slot) => Resource::Slot(slot),
        }
    }
}

impl Operation {
    /// Everything that the operation uses. Its dependencies follow from this alone.
    pub fn resources(&self) -> Vec<Resource> {
        use Resource as R;
        match *self {
            Self::Initialize { buffer, .. } => vec![R::Buffer(buffer)],
            Self::Read { extent, piece, buffer, .. } | Self::Write { extent, piece, buffer } => {
                vec![R::Piece(extent, piece), R::Buffer(buffer)]
            }
            Self::Upload { buffer, slot, staging, .. } => {
                let mut used = vec![R::Buffer(buffer), R::Slot(slot)];
                used.extend(staging.map(R::Buffer));
                used
            }
            Self::Download { buffer, slot, .. } => vec![R::Buffer(buffer), R::Slot(slot)],
            Self::CopyUp { buffer, home, .. } | Self::CopyDown { home, buffer, .. } => {
                vec![R::Buffer(buffer), R::Buffer(home)]
            }
            Self::Attach { slot } => vec![R::Slot(slot)],
            Self::Forward { slot, passage, .. } => {
                let mut used = vec![R::Slot(slot)];
                used.extend(passage.map(R::Passage));
                used
            }
            Self::Backward { slot, passage, gradients, .. } => {
                let mut used = vec![R::Slot(slot), R::Gradients(gradients)];
                used.extend(passage.map(R::Passage));
                used
            }
            Self::Detach { slot, gradients, .. } => {
                slot.map(R::Slot).into_iter().chain(gradients.map(R::Gradients)).collect()
            }
            Self::SaveBoundary { passage, buffer, .. } | Self::LoadBoundary { passage, buffer, .. } => {
                vec![R::Passage(passage), R::Buffer(buffer)]
            }
            Self::Accumulate { gradients, buffer, staging, measure, .. } => {
                let mut used = vec![R::Gradients(gradients), R::Buffer(buffer)];
                used.extend(staging.map(R::Buffer));
                if measure {
                    used.push(R::Statistics);
                }
                used
            }
            Self::Norm => vec![R::Statistics],
            Self::Update { master, first_moment, second_moment, gradient, .. } => vec![
                master.resource(),
                R::Buffer(first_moment),
                R::Buffer(second_moment),
                R::Buffer(gradient),
            ],
            Self::Collect { master, .. } => vec![master.resource()],
            Self::Commit => vec![R::StatesOnDisk],
        }
    }

    /// What the operation uses together with others that share it, but not while an operation has it for
    /// itself.
    pub fn shared_resource(&self) -> Option<Resource> {
        // No commit keeps gradients.
        let writes_state = matches!(
            self,
            Self::Write { extent: Extent::State(_, stream), .. } if *stream != Stream::Gradient
        );
        writes_state.then_some(Resource::StatesOnDisk)
    }

    /// Name in timelines.
    pub fn name(&self) -> String {
        let name = match self {
            Self::Initialize { stream, .. } => return format!("initialize {}", stream.name()),
            Self::Read { extent, .. } => return format!("read {}", extent.name()),
            Self::Write { extent, .. } => return format!("write {}", extent.name()),
            Self::CopyUp { stream, .. } => return format!("copy up {}", stream.name()),
            Self::CopyDown { stream, .. } => return format!("copy down {}", stream.name()),
            Self::Upload { .. } => "upload",
            Self::Download { .. } => "download",
            Self::Attach { .. } => "attach",
            Self::Forward { .. } => "forward",
            Self::Backward { .. } => "backward",
            Self::Detach { .. } => "detach",
            Self::SaveBoundary { .. } => "save boundary",
            Self::LoadBoundary { .. } => "load boundary",
            Self::Accumulate { .. } => "accumulate",
            Self::Norm => "norm",
            Self::Update { .. } => "update",
            Self::Collect { .. } => "collect",
            Self::Commit => "commit",
        };
        name.to_owned()
    }

    /// The group that it works on, if it is one.
    pub fn group(&self, layout: &Layout, calls: &[Call]) -> Option<GroupIndex> {
        match *self {
            Self::Read { extent, .. } | Self::Write { extent, .. } => Some(extent.group(calls)),
            Self::Initialize { group, .. }
            | Self::Upload { group, .. }
            | Self::Download { group, .. }
            | Self::CopyUp { group, .. }
            | Self::CopyDown { group, .. }
            | Self::Accumulate { group, .. }
            | Self::Update { group, .. }
            | Self::Collect { group, .. } => Some(group),
            Self::Forward { call, .. }
            | Self::Backward { call, .. }
            | Self::SaveBoundary { call, .. }
            | Self::LoadBoundary { call, .. } => Some(calls[call].group),
            Self::Attach { .. } | Self::Detach { .. } => Some(layout.resident()),
            Self::Norm | Self::Commit => None,
        }
    }

    /// The micro-batch whose activations it works on, if it is one.
    pub fn micro_batch(&self) -> Option<usize> {
        match *self {
            Self::Forward { micro_batch, .. }
            | Self::Backward { micro_batch, .. }
            | Self::Detach { micro_batch, .. }
            | Self::SaveBoundary { micro_batch, .. }
            | Self::LoadBoundary { micro_batch, .. } => Some(micro_batch),
            _ => None,
        }
    }

    /// The piece that it works on, if it is one.
    pub fn piece(&self) -> Option<usize> {
        match *self {
            Self::Initialize { piece, .. }
            | Self::Read { piece, .. }
            | Self::Write { piece, .. }
            | Self::Upload { piece, .. }
            | Self::Download { piece, .. }
            | Self::CopyUp { piece, .. }
            | Self::CopyDown { piece, .. }
            | Self::SaveBoundary { piece, .. }
            | Self::LoadBoundary { piece, .. }
            | Self::Accumulate { piece, .. }
            | Self::Update { piece, .. }
            | Self::Collect { piece, .. } => Some(piece),
            _ => None,
        }
    }

    /// Elements of the piece that it works on; none for those that work on no piece.
    pub fn elements(&self, layout: &Layout, calls: &[Call]) -> usize {
        let (extent, piece) = match *self {
            Self::Read { extent, piece, .. } | Self::Write { extent, piece, .. } => (extent, piece),
            Self::Initialize { group, stream, piece, .. }
            | Self::CopyUp { group, stream, piece, .. }
            | Self::CopyDown { group, stream, piece, .. } => (Extent::State(group, stream), piece),
            Self::Upload { group, piece, .. }
            | Self::Download { group, piece, .. }
            | Self::Collect { group, piece, .. } => (Extent::State(group, Stream::Master), piece),
            Self::SaveBoundary { call, piece, .. } | Self::LoadBoundary { call, piece, .. } => {
                (Extent::Boundary { call, place: 0 }, piece)
            }
            Self::Accumulate { group, piece, .. } | Self::Update { group, piece, .. } => {
                (Extent::State(group, Stream::Gradient), piece)
            }
            _ => return 0,
        };
        layout.piece_range(extent.elements(layout, calls), piece).len()
    }

    /// The queue that runs it.
    pub fn queue(&self) -> Queue {
        match self {
            Self::Read { fetch: true, .. } => Queue::FetchRead,
            Self::Read { fetch: false, .. } => Queue::StateRead,
            Self::Write { .. } => Queue::DiskWrite,
            Self::Upload { .. } | Self::LoadBoundary { .. } | Self::CopyUp { .. } => Queue::Upload,
            Self::Download { .. }
            | Self::CopyDown { .. }
            | Self::SaveBoundary { .. }
            | Self::Accumulate { .. }
            | Self::Collect { .. } => Queue::Download,
            Self::Attach { .. } | Self::Forward { .. } | Self::Backward { .. } | Self::Detach { .. } => {
                Queue::Compute
            }
            Self::Initialize { .. } | Self::Update { .. } => Queue::Optimizer,
            Self::Commit => Queue::Commit,
            Self::Norm => Queue::Control,
        }
    }
}
