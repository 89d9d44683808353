//! The schedule's third reader: costs it with a machine's numbers, and tells how long a step will take and
//! which queue is the busiest.
//!
//! The simulator starts operations by the rules of the executor, which are in one place. The disk makes the
//! transfers of a direction in the order in which they were given to it, and where computing, copies and the
//! optimizer run on the same processors, those are shared.

mod clockwork;

use crate::planner::machine::Machine;
use crate::schedule::buffer_plan::BufferPlan;
use crate::schedule::layout::Layout;
use crate::schedule::operation::{Call, Operation, Queue};
use crate::schedule::trace::{Trace, TraceEvent};
use clockwork::Clockwork;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes that the optimizer reads and writes a parameter: four runs of f32 are read, three are written.
const UPDATE_BYTES_PER_ELEMENT: f64 = 28.0;
const F32_BYTES: f64 = 4.0;
/// Steps that are costed. The first finds all queues empty, and the second leaves more under way than it
/// found where updates go on into the next step; from the third on, a step leaves what it finds.
const STEPS: u64 = 3;

/// Time that one compute operation takes the training thread.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ComputeTime {
    /// Seconds of the user's own code between the compute operation before and this one.
    pub before_s: f64,
    /// Seconds within the operation.
    pub within_s: f64,
}

/// Compute times of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Compute {
    /// Start of a pass.
    pub attach: ComputeTime,
    /// Forward of each call.
    pub forward: Vec<ComputeTime>,
    /// Backward of each call, recomputation included.
    pub backward: Vec<ComputeTime>,
    /// Seconds of each call's backward in which it computes its forward again.
    pub again_s: Vec<f64>,
    /// End of a pass.
    pub detach: ComputeTime,
}

impl Compute {
    /// Of a step of `calls` calls that takes no time.
    pub fn none(calls: usize) -> Self {
        let zero = ComputeTime::default();
        Self {
            attach: zero,
            forward: vec![zero; calls],
            backward: vec![zero; calls],
            again_s: vec![0.0; calls],
            detach: zero,
        }
    }

    fn time(&self, operation: &Operation) -> ComputeTime {
        match *operation {
            Operation::Attach { .. } => self.attach,
            Operation::Forward { call, .. } => self.forward.get(call).copied().unwrap_or_default(),
            Operation::Backward { call, kept, .. } => {
                let ComputeTime { before_s, within_s } = self.backward.get(call).copied().unwrap_or_default();
                let spared_s = if kept { self.again_s.get(call).copied().unwrap_or(0.0) } else { 0.0 };
                ComputeTime { before_s, within_s: (within_s - spared_s).max(0.0) }
            }
            Operation::Detach { .. } => self.detach,
            _ => ComputeTime::default(),
        }
    }
}

/// What a step will take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Seconds of a step in a long run.
    pub step_s: f64,
    /// Seconds of it in which each queue has something under way.
    pub busy_s: Vec<(Queue, f64)>,
    /// Share of the step in which the training thread waits for a tier, 0 to 1.
    pub exposed_stall: f64,
    /// The queue that is busy longest: only a faster one makes steps much shorter.
    pub busiest: Queue,
    /// Bytes that a step reads from disk.
    pub read_bytes: u64,
    /// Bytes that it writes.
    pub written_bytes: u64,
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            f,
            "forecast: {:.3} s a step, exposed stall {:.1} %",
            self.step_s,
            100.0 * self.exposed_stall
        )?;
        for &(queue, busy_s) in self.busy_s.iter().filter(|(_, busy_s)| *busy_s > 0.0) {
            let mark = if queue == self.busiest { "  the bottleneck" } else { "" };
            let share = 100.0 * busy_s / self.step_s;
            writeln!(f, "  {:<20}{busy_s:>9.3} s busy {share:>5.1} %{mark}", queue.name())?;
        }
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let (read, written) = (gigabytes(self.read_bytes), gigabytes(self.written_bytes));
        write!(f, "  disk, a step: {read:.3} GB read, {written:.3} GB written")
    }
}

/// Costs schedules of one model on one machine.
#[derive(Debug, Clone, Copy)]
pub struct Simulator<'a> {
    /// Groups.
    pub layout: &'a Layout,
    /// Segments in the order in which they run.
    pub calls: &'a [Call],
    /// Homes and buffers that the schedules use.
    pub buffer_plan: &'a BufferPlan,
    /// How fast the machine is.
    pub machine: &'a Machine,
    /// How long computing takes.
    pub compute: &'a Compute,
}

/// What an operation takes.
enum Cost {
    /// Seconds of its queue, on this many processors of those that are shared.
    Seconds { seconds: f64, processors: f64 },
    /// Bytes of the disk, which has one transfer a direction at a time.
    Transfer { write: bool, bytes: f64 },
}

impl Simulator<'_> {
    /// The steady state of steps that run `schedule` one after another: the last of [`STEPS`].
    pub fn forecast(&self, schedule: &[Operation]) -> Forecast {
        let trace = self.run(&[schedule; STEPS as usize]);
        // A step returns when its norm is known and the training thread has gone through it.
        let end_s = |step: u64| {
            let of_step = |event: &&TraceEvent| {
                let queue = event.operation.queue();
                event.step == step && matches!(queue, Queue::Control | Queue::Compute)
            };
            trace.events.iter().filter(of_step).map(|event| event.end_s).fold(0.0, f64::max)
        };
        let (from_s, until_s) = (end_s(STEPS - 1), end_s(STEPS));
        let step_s = until_s - from_s;
        let busy_s: Vec<(Queue, f64)> = Queue::ALL
            .into_iter()
            .map(|queue| match queue {
                Queue::Compute => (queue, computing_s(&trace, from_s)),
                _ => (queue, trace.busy_within_s(&[queue], from_s, until_s)),
            })
            .collect();
        let busiest = busy_s.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let waited_s: f64 =
            trace.events.iter().filter(|event| event.step == STEPS).map(|event| event.waited_s).sum();
        Forecast {
            step_s,
            exposed_stall: if step_s > 0.0 { waited_s / step_s } else { 0.0 },
            busiest: busiest.map_or(Queue::Compute, |&(queue, _)| queue),
            busy_s,
            read_bytes: self.moved_bytes(schedule, false),
            written_bytes: self.moved_bytes(schedule, true),
        }
    }

    /// Bytes that a schedule reads from disk, or writes.
    pub fn moved_bytes(&self, schedule: &[Operation], writes: bool) -> u64 {
        let moves = schedule.iter().filter_map(|operation| match self.cost(operation) {
            Cost::Transfer { write, bytes } if write == writes => Some(bytes as u64),
            _ => None,
        });
        moves.sum()
    }

    /// Seconds that a step cannot take less than: what its busiest queue has to do, or the processors where
    /// they are shared.
    pub fn least_s(&self, schedule: &[Operation]) -> f64 {
        let mut of_queues = [0.0; Queue::ALL.len()];
        let mut shared_s = 0.0;
        let all = self.machine.processors.unwrap_or(0) as f64;
        for operation in schedule {
            let before_s = self.compute.time(operation).before_s;
            of_queues[operation.queue() as usize] += self.alone_s(operation) + before_s;
            if let Cost::Seconds { seconds, processors } = self.cost(operation)
                && all > 0.0
            {
                shared_s += before_s + seconds * processors / all;
            }
        }
        // All reads are made by one disk.
        let reads_s = of_queues[Queue::FetchRead as usize] + of_queues[Queue::StateRead as usize];
        of_queues.into_iter().chain([shared_s, reads_s]).fold(0.0, f64::max)
    }

    /// When each operation runs. A schedule is submitted when the norm of the one before is known and its
    /// computing is done.
    pub fn run(&self, schedules: &[&[Operation]]) -> Trace {
        Clockwork::new(*self).run(schedules)
    }

    /// Seconds that an operation takes when it has the machine for itself, without the user's own code before
    /// it.
    pub fn alone_s(&self, operation: &Operation) -> f64 {
        match self.cost(operation) {
            Cost::Seconds { seconds, .. } => seconds,
            Cost::Transfer { write, bytes } => bytes / self.disk_bytes_per_s(write),
        }
    }

    fn disk_bytes_per_s(&self, write: bool) -> f64 {
        match write {
            true => self.machine.disk_write_bytes_per_s,
            false => self.machine.disk_read_bytes_per_s,
        }
    }

    fn cost(&self, operation: &Operation) -> Cost {
        let machine = self.machine;
        let bytes = F32_BYTES * operation.elements(self.layout, self.calls) as f64;
        let all = machine.processors.unwrap_or(0) as f64;
        let seconds = |bytes: f64, bytes_per_s: f64, processors| Cost::Seconds {
            seconds: bytes / bytes_per_s,
            processors,
        };
        let device_bytes_per_s = machine.device_memory_bytes_per_s.unwrap_or(f64::INFINITY);
        match *operation {
            Operation::Read { .. } => Cost::Transfer { write: false, bytes },
            Operation::Write { .. } => Cost::Transfer { write: true, bytes },
            Operation::Norm | Operation::Commit => Cost::Seconds { seconds: 0.0, processors: 0.0 },
            // States at home on a device cross in f32 where they do, and boundaries as they are.
            Operation::CopyUp { .. } => seconds(bytes, machine.upload_bytes_per_s, 1.0),
            Operation::CopyDown { .. } => seconds(bytes, machine.download_bytes_per_s, 1.0),
            Operation::SaveBoundary { .. } => seconds(bytes, machine.download_bytes_per_s, 1.0),
            Operation::LoadBoundary { .. } => seconds(bytes, machine.upload_bytes_per_s, 1.0),
            // What is at home on a device with memory of its own stays there.
            Operation::Accumulate { group, .. } if self.buffer_plan.updated_on_device(group) => {
                seconds(2.0 * bytes, device_bytes_per_s, 0.0)
            }
            Operation::Update { group, .. } if self.buffer_plan.updated_on_device(group) => {
                seconds(optimizer_bytes(operation, bytes), device_bytes_per_s, 0.0)
            }
            Operation::Upload { group, .. } if self.buffer_plan.updated_on_device(group) => {
                seconds(2.0 * bytes, device_bytes_per_s, 0.0)
            }
            Operation::Accumulate { .. } => Cost::Seconds {
                seconds: self.crossing_s(bytes, machine.download_bytes_per_s),
                processors: all,
            },
            _ => match operation.queue() {
                Queue::Upload => Cost::Seconds {
                    seconds: self.crossing_s(bytes, machine.upload_bytes_per_s),
                    processors: 1.0,
                },
                Queue::Download => Cost::Seconds {
                    seconds: self.crossing_s(bytes, machine.download_bytes_per_s),
                    processors: 1.0,
                },
                Queue::Optimizer => {
                    seconds(optimizer_bytes(operation, bytes), machine.optimizer_bytes_per_s, all)
                }
                _ => Cost::Seconds { seconds: self.compute.time(operation).within_s, processors: all },
            },
        }
    }

    /// Seconds in which `bytes` of f32 state cross. A device with memory of its own gets and gives them in
    /// its type, from and to the host's memory, which is read and written for that.
    fn crossing_s(&self, bytes: f64, bytes_per_s: f64) -> f64 {
        let crossing_s = crossing_bytes(self.buffer_plan, bytes) / bytes_per_s;
        match self.machine.memory_bytes_per_s {
            Some(memory) if self.buffer_plan.device.apart => crossing_s.max(2.0 * bytes / memory),
            _ => crossing_s,
        }
    }
}

/// Bytes that cross between host and device for `bytes` of f32 state.
fn crossing_bytes(buffer_plan: &BufferPlan, bytes: f64) -> f64 {
    let device = buffer_plan.device;
    if device.apart { bytes * device.element_bytes() as f64 / F32_BYTES } else { bytes }
}

/// Seconds of the last step in which the training thread works: in operations, and in the user's own code
/// between them.
fn computing_s(trace: &Trace, from_s: f64) -> f64 {
    let of_step = trace.events.iter().filter(|event| event.step == STEPS);
    let computing = of_step.filter(|event| event.operation.queue() == Queue::Compute);
    let mut previous_end_s = from_s;
    let mut working_s = 0.0;
    for event in computing {
        working_s += event.end_s - event.waited_s - previous_end_s;
        previous_end_s = event.end_s;
    }
    working_s
}

/// Bytes of memory that an operation of the optimizer moves for a piece of `bytes`.
fn optimizer_bytes(operation: &Operation, bytes: f64) -> f64 {
    match operation {
        Operation::Update { .. } => bytes * (UPDATE_BYTES_PER_ELEMENT / F32_BYTES),
        _ => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::buffer_plan::{Depths, DeviceKind, GroupPlacement, Needs};
    use crate::schedule::layout::{ALIGNMENT_ELEMENTS, Group};
    use crate::schedule::operation::{Buffer, Extent, GradientSet, Slot, Stream};
    use candle_core::DType;
    use ferrozero_offload::Tier;

    /// One group of `pieces` pieces, and the resident one.
    fn layout(pieces: usize) -> Layout {
        let group = |name: &str, elements| {
            let table = vec![(0, name.to_owned(), vec![elements], true, true)];
            Group::new(name.into(), name == "resident", table)
        };
        let groups = vec![group("h.0", pieces * ALIGNMENT_ELEMENTS), group("resident", 1)];
        Layout { groups, piece_elements: ALIGNMENT_ELEMENTS }
    }

    /// A piece takes 1 s to read, 2 s to write, 0.5 s to upload, 4 s to download, and 7 s to update.
    fn machine() -> Machine {
        let piece_bytes = F32_BYTES * ALIGNMENT_ELEMENTS as f64;
        Machine {
            disk_read_bytes_per_s: piece_bytes,
            disk_write_bytes_per_s: piece_bytes / 2.0,
            disk_mixed_bytes_per_s: None,
            upload_bytes_per_s: 2.0 * piece_bytes,
            download_bytes_per_s: piece_bytes / 4.0,
            optimizer_bytes_per_s: piece_bytes,
            ..Machine::default()
        }
    }

    fn calls() -> Vec<Call> {
        vec![Call::new(0, 1, false)]
    }

    /// States on disk, or on a device that has memory of its own and computes in 16 bits.
    fn buffer_plan(layout: &Layout, calls: &[Call], apart: bool, home: Tier) -> BufferPlan {
        let dtype = if apart { DType::BF16 } else { DType::F32 };
        let device = DeviceKind { dtype, apart };
        let needs = Needs { layout, calls, gradient_passes_through: true, device };
        let depths =
            Depths { slots: 1, look_ahead: 1, state_pieces: 4, gradient_sets: 1, vertical: 1, kept: 0 };
        BufferPlan::new(&needs, vec![GroupPlacement::all(home); layout.groups.len()], Tier::Device, depths)
    }

    /// The forward takes 3 s, and 1 s of the user's code comes before it.
    fn compute() -> Compute {
        Compute { forward: vec![ComputeTime { before_s: 1.0, within_s: 3.0 }], ..Compute::none(1) }
    }

    const SLOT: Slot = Slot(0);
    const EXTENT: Extent = Extent::State(0, Stream::Master);

    fn read(piece: usize, buffer: usize) -> Operation {
        Operation::Read { extent: EXTENT, piece, buffer: Buffer(buffer), fetch: true }
    }

    fn write(piece: usize, buffer: usize) -> Operation {
        Operation::Write { extent: EXTENT, piece, buffer: Buffer(buffer) }
    }

    fn upload(piece: usize, buffer: usize) -> Operation {
        Operation::Upload { group: 0, piece, buffer: Buffer(buffer), slot: SLOT, staging: None }
    }

    const FORWARD: Operation = forward(SLOT);

    const fn forward(slot: Slot) -> Operation {
        Operation::Forward { call: 0, micro_batch: 0, slot, passage: None, keeps: false }
    }

    /// Begin and end of each operation of the schedules, in seconds.
    fn times(machine: &Machine, schedules: &[&[Operation]]) -> Vec<Vec<(f64, f64)>> {
        let (layout, calls, compute) = (layout(9), calls(), compute());
        let buffer_plan = buffer_plan(&layout, &calls, false, Tier::Disk);
        let simulator = Simulator {
            layout: &layout,
            calls: &calls,
            buffer_plan: &buffer_plan,
            machine,
            compute: &compute,
        };
        let trace = simulator.run(schedules);
        let of = |step: u64, operation: &Operation| {
            let event = trace.events.iter().find(|event| event.step == step && event.operation == *operation);
            let event = event.unwrap();
            // Transfers that end within a nanosecond end together.
            let rounded = |seconds: f64| (seconds * 1e6).round() / 1e6;
            (rounded(event.start_s), rounded(event.end_s))
        };
        let schedules = schedules.iter().zip(1..);
        schedules.map(|(schedule, step)| schedule.iter().map(|op| of(step, op)).collect()).collect()
    }

    fn times_of(schedule: &[Operation]) -> Vec<(f64, f64)> {
        times(&machine(), &[schedule]).remove(0)
    }

    #[test]
    fn what_shares_a_buffer_or_a_slot_comes_one_after_another() {
        let schedule = [read(0, 0), upload(0, 0), read(1, 0), upload(1, 0), FORWARD];
        let expected = [(0.0, 1.0), (1.0, 1.5), (1.5, 2.5), (2.5, 3.0), (3.0, 6.0)];
        assert_eq!(times_of(&schedule), expected);
    }

    #[test]
    fn transfers_under_way_wait_in_the_queue_of_the_disk() {
        // Two reads, one after the other; the forward waits for the user's code only.
        assert_eq!(times_of(&[read(0, 0), read(1, 1), FORWARD]), [(0.0, 1.0), (0.0, 2.0), (1.0, 4.0)]);
        // Eight are under way at a time: the ninth is given to the disk when the first is done.
        let nine: Vec<_> = (0..9).map(|piece| read(piece, piece)).collect();
        let times = times_of(&nine);
        assert_eq!(times[7], (0.0, 8.0));
        assert_eq!(times[8], (1.0, 9.0));
    }

    #[test]
    fn reads_and_writes_take_from_each_other_where_the_machine_says_so() {
        let schedule = [read(0, 0), write(1, 1)];
        assert_eq!(times_of(&schedule), [(0.0, 1.0), (0.0, 2.0)]);
        // Half of both together: the read takes 2 s, in which half of the write is made; the rest takes 1 s.
        let alone = machine().disk_read_bytes_per_s + machine().disk_write_bytes_per_s;
        let mixed = Machine { disk_mixed_bytes_per_s: Some(alone / 2.0), ..machine() };
        assert_eq!(times(&mixed, &[&schedule]), [[(0.0, 2.0), (0.0, 3.0)]]);
    }

    #[test]
    fn a_commit_waits_for_writes_and_later_writes_for_it_and_reads_for_neither() {
        let schedule = [write(0, 0), Operation::Commit, write(1, 1), read(2, 2)];
        assert_eq!(times_of(&schedule), [(0.0, 2.0), (2.0, 2.0), (2.0, 4.0), (0.0, 1.0)]);
    }

    #[test]
    fn the_next_schedule_begins_when_the_norm_is_known_and_finds_the_queues_as_they_are() {
        let gradients = GradientSet(0);
        let accumulate = |measure| Operation::Accumulate {
            group: 0,
            piece: 0,
            gradients,
            buffer: Buffer(0),
            staging: None,
            add: false,
            measure,
        };
        let schedule = [FORWARD, accumulate(true), Operation::Norm, write(0, 0)];
        let [first, second] = <[_; 2]>::try_from(times(&machine(), &[&schedule, &schedule])).unwrap();
        // The gradient does not wait for the forward here: no resource is common to both.
        assert_eq!(first, [(1.0, 4.0), (0.0, 4.0), (4.0, 4.0), (4.0, 6.0)]);
        // The buffer is free when it has been written.
        assert_eq!(second, [(5.0, 8.0), (6.0, 10.0), (10.0, 10.0), (10.0, 12.0)]);
        let (layout, calls, machine, compute) = (layout(9), calls(), machine(), compute());
        let buffer_plan = buffer_plan(&layout, &calls, false, Tier::Disk);
        let simulator = Simulator {
            layout: &layout,
            calls: &calls,
            buffer_plan: &buffer_plan,
            machine: &machine,
            compute: &compute,
        };
        let forecast = simulator.forecast(&schedule);
        assert_eq!((forecast.step_s, forecast.exposed_stall), (6.0, 0.0));
        assert_eq!((forecast.read_bytes, forecast.written_bytes), (0, 4096));
    }

    #[test]
    fn computing_copies_and_the_optimizer_share_the_processors_where_they_are_the_same() {
        // Two processors: the forward wants both from 1 s on, the user's code before it too, and the copy of
        // 2 s one of them: all have two thirds of their speed.
        let machine = Machine {
            processors: Some(2),
            upload_bytes_per_s: F32_BYTES * ALIGNMENT_ELEMENTS as f64 / 2.0,
            ..machine()
        };
        let times = times(&machine, &[&[upload(0, 0), forward(Slot(1))]]).remove(0);
        // When the copy is done 2 of the 4 s of computing are, and the other 2 have the processors for
        // themselves.
        assert_eq!(times, [(0.0, 3.0), (1.5, 5.0)]);
    }

    #[test]
    fn state_crosses_in_the_type_of_the_device_and_boundaries_as_they_are_and_homes_on_the_device_do_not() {
        let (layout, calls, machine, compute) = (layout(9), calls(), machine(), compute());
        let alone_s = |(apart, home): (bool, Tier), operation: &Operation| {
            let buffer_plan = buffer_plan(&layout, &calls, apart, home);
            let (layout, calls, machine, compute) = (&layout, &calls[..], &machine, &compute);
            let simulator = Simulator { layout, calls, buffer_plan: &buffer_plan, machine, compute };
            simulator.alone_s(operation)
        };
        let passage = crate::schedule::operation::Passage(0);
        let load = Operation::LoadBoundary { call: 0, micro_batch: 0, piece: 0, passage, buffer: Buffer(0) };
        let (cpu, host, device) = ((false, Tier::Host), (true, Tier::Host), (true, Tier::Device));
        assert_eq!([cpu, host, device].map(|of| alone_s(of, &load)), [alone_s(cpu, &load); 3]);
        assert_eq!([cpu, host, device].map(|of| alone_s(of, &upload(0, 0))), [0.5, 0.25, 0.0]);
    }
}
