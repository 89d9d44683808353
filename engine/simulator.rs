//! The schedule's third reader: costs it with a machine's numbers, and tells how long a step will take and which queue is
//! the busiest.
//!
//! The simulator starts operations by the rules of the executor, which are in one place. Transfers of the disk that are
//! under way share its bandwidth; whatever else has begun takes its time.

pub mod catalog;
mod machine;
mod measurement;

use crate::arrangement::Call;
use crate::layout::Layout;
use crate::order::Order;
use crate::schedule::{Operation, Queue};
use crate::trace::{Trace, TraceEvent};
use serde::{Deserialize, Serialize};
use std::fmt;

pub use machine::Machine;
pub use measurement::measure;

/// Bytes that the optimizer reads and writes a parameter: four runs of f32 are read, three are written.
const UPDATE_BYTES_PER_ELEMENT: f64 = 28.0;
const F32_BYTES: f64 = 4.0;
/// Transfers that end within this time of each other, in seconds, end together.
const SAME_MOMENT_S: f64 = 1e-9;

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
    /// End of a pass.
    pub detach: ComputeTime,
}

impl Compute {
    /// Of a step of `calls` calls that takes no time.
    pub fn none(calls: usize) -> Self {
        let zero = ComputeTime::default();
        Self { attach: zero, forward: vec![zero; calls], backward: vec![zero; calls], detach: zero }
    }

    fn time(&self, operation: &Operation) -> ComputeTime {
        match *operation {
            Operation::Attach { .. } => self.attach,
            Operation::Forward { call, .. } => self.forward.get(call).copied().unwrap_or_default(),
            Operation::Backward { call, .. } => self.backward.get(call).copied().unwrap_or_default(),
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
    /// How fast the machine is.
    pub machine: &'a Machine,
    /// How long computing takes.
    pub compute: &'a Compute,
}

/// What an operation takes.
enum Cost {
    /// Seconds of its queue.
    Seconds(f64),
    /// Bytes of the disk, which is shared.
    Transfer { write: bool, bytes: f64 },
}

/// What is left of an operation under way.
enum Left {
    Until(f64),
    Transfer { write: bool, bytes: f64 },
}

struct Running {
    id: u64,
    left: Left,
}

/// What is kept of an operation until it is done.
struct Note {
    step: u64,
    started_s: f64,
    waited_s: f64,
}

impl Simulator<'_> {
    /// The steady state of steps that run `schedule` one after another: the second of two.
    pub fn forecast(&self, schedule: &[Operation]) -> Forecast {
        let trace = self.run(&[schedule, schedule]);
        // A step returns when its norm is known and the training thread has gone through it.
        let end_s = |step: u64| {
            let of_step = |event: &&TraceEvent| {
                let queue = event.operation.queue();
                event.step == step && matches!(queue, Queue::Control | Queue::Compute)
            };
            trace.events.iter().filter(of_step).map(|event| event.end_s).fold(0.0, f64::max)
        };
        let (from_s, until_s) = (end_s(1), end_s(2));
        let step_s = until_s - from_s;
        let compute_s: f64 = schedule
            .iter()
            .map(|operation| self.compute.time(operation))
            .map(|time| time.before_s + time.within_s)
            .sum();
        let busy_s: Vec<(Queue, f64)> = Queue::ALL
            .into_iter()
            .map(|queue| match queue {
                Queue::Compute => (queue, compute_s),
                _ => (queue, trace.busy_within_s(&[queue], from_s, until_s)),
            })
            .collect();
        let busiest = busy_s.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let waited_s: f64 =
            trace.events.iter().filter(|event| event.step == 2).map(|event| event.waited_s).sum();
        let moved = |writes: bool| -> u64 {
            let moves = schedule.iter().filter_map(|operation| match self.cost(operation) {
                Cost::Transfer { write, bytes } if write == writes => Some(bytes as u64),
                _ => None,
            });
            moves.sum()
        };
        Forecast {
            step_s,
            exposed_stall: if step_s > 0.0 { waited_s / step_s } else { 0.0 },
            busiest: busiest.map_or(Queue::Compute, |&(queue, _)| queue),
            busy_s,
            read_bytes: moved(false),
            written_bytes: moved(true),
        }
    }

    /// When each operation runs. A schedule is submitted when the norm of the one before is known and its computing is done.
    pub fn run(&self, schedules: &[&[Operation]]) -> Trace {
        let mut clockwork = Clockwork {
            simulator: *self,
            order: Order::new(),
            now_s: 0.0,
            running: vec![],
            training_thread_s: 0.0,
            norm_is_known: false,
            trace: Trace::default(),
        };
        let mut schedules = schedules.iter().zip(1..);
        let mut submit_next = true;
        loop {
            if std::mem::take(&mut submit_next)
                && let Some((schedule, step)) = schedules.next()
            {
                for &operation in *schedule {
                    clockwork.order.admit(operation, Note { step, started_s: 0.0, waited_s: 0.0 });
                }
                clockwork.training_thread_s = clockwork.now_s;
            }
            let asked_s = clockwork.advance();
            let Some(next_s) = clockwork.next_s(asked_s) else { break };
            submit_next = clockwork.go_to(next_s);
        }
        clockwork.trace
    }

    /// Seconds that an operation takes when it has the machine for itself, without the user's own code before it.
    pub fn alone_s(&self, operation: &Operation) -> f64 {
        match self.cost(operation) {
            Cost::Seconds(seconds) => seconds,
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
        let bytes = F32_BYTES * operation.elements(self.layout, self.calls) as f64;
        match operation {
            Operation::Read { .. } => Cost::Transfer { write: false, bytes },
            Operation::Write { .. } => Cost::Transfer { write: true, bytes },
            Operation::Norm | Operation::Commit => Cost::Seconds(0.0),
            _ => match operation.queue() {
                Queue::Upload => Cost::Seconds(bytes / self.machine.upload_bytes_per_s),
                Queue::Download => Cost::Seconds(bytes / self.machine.download_bytes_per_s),
                Queue::Optimizer => {
                    Cost::Seconds(optimizer_bytes(operation, bytes) / self.machine.optimizer_bytes_per_s)
                }
                _ => Cost::Seconds(self.compute.time(operation).within_s),
            },
        }
    }
}

/// Bytes of memory that an operation of the optimizer moves for a piece of `bytes`.
fn optimizer_bytes(operation: &Operation, bytes: f64) -> f64 {
    match operation {
        Operation::Update { .. } => bytes * (UPDATE_BYTES_PER_ELEMENT / F32_BYTES),
        _ => bytes,
    }
}

/// A simulation under way.
struct Clockwork<'a> {
    simulator: Simulator<'a>,
    order: Order<Note>,
    now_s: f64,
    running: Vec<Running>,
    /// When the training thread ended its last compute operation.
    training_thread_s: f64,
    norm_is_known: bool,
    trace: Trace,
}

impl Clockwork<'_> {
    /// Starts all operations that may start. Answers when the training thread will come to the one that could run then.
    fn advance(&mut self) -> Option<f64> {
        let mut asked_s = None;
        for queue in Queue::ALL {
            while let Some((id, operation)) = self.order.startable(queue) {
                let mut waited_s = 0.0;
                if queue == Queue::Compute {
                    let asks_s = self.training_thread_s + self.simulator.compute.time(&operation).before_s;
                    if asks_s > self.now_s {
                        asked_s = Some(asks_s);
                        break;
                    }
                    waited_s = self.now_s - asks_s;
                }
                let left = match self.simulator.cost(&operation) {
                    Cost::Seconds(seconds) => Left::Until(self.now_s + seconds),
                    Cost::Transfer { write, bytes } => Left::Transfer { write, bytes },
                };
                if let Some(note) = self.order.start(id) {
                    (note.started_s, note.waited_s) = (self.now_s, waited_s);
                }
                self.running.push(Running { id, left });
            }
        }
        asked_s
    }

    /// Bytes a second of one read and of one write, of those under way.
    fn rates(&self) -> [f64; 2] {
        let count = |writes: bool| {
            let of_kind =
                |running: &&Running| matches!(running.left, Left::Transfer { write, .. } if write == writes);
            self.running.iter().filter(of_kind).count() as f64
        };
        let (reads, writes) = (count(false), count(true));
        let machine = self.simulator.machine;
        let alone = machine.disk_read_bytes_per_s + machine.disk_write_bytes_per_s;
        let share = match machine.disk_mixed_bytes_per_s {
            Some(mixed) if reads > 0.0 && writes > 0.0 => (mixed / alone).min(1.0),
            _ => 1.0,
        };
        [machine.disk_read_bytes_per_s * share / reads, machine.disk_write_bytes_per_s * share / writes]
    }

    /// When something happens next; none if nothing will.
    fn next_s(&self, asked_s: Option<f64>) -> Option<f64> {
        let rates = self.rates();
        let ends = self.running.iter().map(|running| match running.left {
            Left::Until(end_s) => end_s,
            Left::Transfer { write, bytes } => self.now_s + bytes / rates[usize::from(write)],
        });
        ends.chain(asked_s).min_by(f64::total_cmp)
    }

    /// Goes on to a moment and ends what ends there. Answers whether a step has returned.
    fn go_to(&mut self, next_s: f64) -> bool {
        let rates = self.rates();
        let elapsed_s = next_s - self.now_s;
        self.now_s = next_s;
        let mut ended = vec![];
        self.running.retain_mut(|running| {
            let ends = match &mut running.left {
                Left::Until(end_s) => *end_s <= next_s,
                Left::Transfer { write, bytes } => {
                    let rate = rates[usize::from(*write)];
                    let ends = *bytes / rate <= elapsed_s + SAME_MOMENT_S;
                    if !ends {
                        *bytes -= rate * elapsed_s;
                    }
                    ends
                }
            };
            if ends {
                ended.push(running.id);
            }
            !ends
        });
        for (operation, note) in ended.into_iter().filter_map(|id| self.order.finish(id)) {
            if operation.queue() == Queue::Compute {
                self.training_thread_s = next_s;
            }
            self.norm_is_known |= operation == Operation::Norm;
            let Note { step, started_s: start_s, waited_s } = note;
            self.trace.events.push(TraceEvent { operation, step, start_s, end_s: next_s, waited_s });
        }
        let returned = self.norm_is_known && self.order.is_idle(Queue::Compute);
        self.norm_is_known &= !returned;
        returned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{ALIGNMENT_ELEMENTS, Group};
    use crate::schedule::{Buffer, Extent, GradientSet, Slot, Stream};

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
        vec![Call { group: 0, boundary_elements: 1, boundary_moves: false }]
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

    const FORWARD: Operation = Operation::Forward { call: 0, slot: SLOT, passage: None };

    /// Begin and end of each operation of the schedules, in seconds.
    fn times(machine: &Machine, schedules: &[&[Operation]]) -> Vec<Vec<(f64, f64)>> {
        let (layout, calls, compute) = (layout(9), calls(), compute());
        let simulator = Simulator { layout: &layout, calls: &calls, machine, compute: &compute };
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
    fn transfers_under_way_share_the_disk() {
        // Two reads at half the speed each; the forward waits for the user's code only.
        assert_eq!(times_of(&[read(0, 0), read(1, 1), FORWARD]), [(0.0, 2.0), (0.0, 2.0), (1.0, 4.0)]);
        // Eight at a time; the ninth has the disk for itself.
        let nine: Vec<_> = (0..9).map(|piece| read(piece, piece)).collect();
        let times = times_of(&nine);
        assert_eq!(times[..8], [(0.0, 8.0); 8]);
        assert_eq!(times[8], (8.0, 9.0));
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
        let simulator = Simulator { layout: &layout, calls: &calls, machine: &machine, compute: &compute };
        let forecast = simulator.forecast(&schedule);
        assert_eq!((forecast.step_s, forecast.exposed_stall), (6.0, 0.0));
        assert_eq!((forecast.read_bytes, forecast.written_bytes), (0, 4096));
    }
}
