//! The schedule's third reader: costs it with a machine's numbers, and tells how long a step will take and which queue is
//! the busiest.
//!
//! The simulator starts operations by the rules of the executor, which are in one place. Transfers of the disk that are
//! under way share its bandwidth; whatever else has begun takes its time.

mod measurement;

use crate::arrangement::Call;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::order::Order;
use crate::schedule::{Operation, Queue};
use crate::trace::{Trace, TraceEvent};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

pub use measurement::measure;

/// Bytes that the optimizer reads and writes a parameter: four runs of f32 are read, three are written.
const UPDATE_BYTES_PER_ELEMENT: f64 = 28.0;
const F32_BYTES: f64 = 4.0;
/// Transfers that end within this time of each other, in seconds, end together.
const SAME_MOMENT_S: f64 = 1e-9;

/// How fast a machine is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Bytes a second that are read from disk while nothing is written.
    pub disk_read_bytes_per_s: f64,
    /// Bytes a second that are written to disk while nothing is read.
    pub disk_write_bytes_per_s: f64,
    /// Bytes a second of both while both are under way; none: neither takes from the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mixed_bytes_per_s: Option<f64>,
    /// Bytes a second that are copied from host to device.
    pub upload_bytes_per_s: f64,
    /// Bytes a second that are copied or accumulated from device to host.
    pub download_bytes_per_s: f64,
    /// Bytes a second that the optimizer reads and writes: 28 a parameter.
    pub optimizer_bytes_per_s: f64,
    /// Floating-point operations a second of matrix products, where compute times are not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_flop_per_s: Option<f64>,
}

impl Machine {
    /// Reads a machine's numbers.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::Configuration`] where a number is missing, unknown or not above zero.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
        let wrong = |what: String| Error::Configuration(format!("{}: {what}", path.display()));
        let machine: Self = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let numbers = [
            ("disk_read_bytes_per_s", Some(machine.disk_read_bytes_per_s)),
            ("disk_write_bytes_per_s", Some(machine.disk_write_bytes_per_s)),
            ("disk_mixed_bytes_per_s", machine.disk_mixed_bytes_per_s),
            ("upload_bytes_per_s", Some(machine.upload_bytes_per_s)),
            ("download_bytes_per_s", Some(machine.download_bytes_per_s)),
            ("optimizer_bytes_per_s", Some(machine.optimizer_bytes_per_s)),
            ("compute_flop_per_s", machine.compute_flop_per_s),
        ];
        match numbers.iter().find(|(_, number)| number.is_some_and(|number| number <= 0.0)) {
            Some((name, _)) => Err(wrong(format!("{name} must be above 0"))),
            None => Ok(machine),
        }
    }
}

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
#[derive(Debug, Clone, PartialEq, Serialize)]
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
        let norm_s = |step: u64| {
            let norm = |event: &&TraceEvent| event.step == step && event.operation == Operation::Norm;
            trace.events.iter().find(norm).map_or(0.0, |event| event.end_s)
        };
        let (from_s, until_s) = (norm_s(1), norm_s(2));
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

    /// When each operation runs. A schedule is submitted when the norm that ends the one before is known.
    pub fn run(&self, schedules: &[&[Operation]]) -> Trace {
        let mut clockwork = Clockwork {
            simulator: *self,
            order: Order::new(),
            now_s: 0.0,
            running: vec![],
            training_thread_s: 0.0,
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

    /// Goes on to a moment and ends what ends there. Answers whether a norm is known now.
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
        let mut norm = false;
        for (operation, note) in ended.into_iter().filter_map(|id| self.order.finish(id)) {
            if operation.queue() == Queue::Compute {
                self.training_thread_s = next_s;
            }
            norm |= operation == Operation::Norm;
            let Note { step, started_s: start_s, waited_s } = note;
            self.trace.events.push(TraceEvent { operation, step, start_s, end_s: next_s, waited_s });
        }
        norm
    }
}
