//! A simulation under way: what runs now, how fast, and what happens next.

use super::{Cost, Simulator};
use crate::schedule::operation::{Operation, Queue};
use crate::schedule::order::Order;
use crate::schedule::trace::{Trace, TraceEvent};

/// What ends within this time of each other, in seconds, ends together.
const SAME_MOMENT_S: f64 = 1e-9;

/// An operation under way, and what is left of it: seconds if it had the processors for itself, or bytes of
/// the disk.
struct Running {
    id: u64,
    left: Cost,
}

/// What is kept of an operation until it is done.
struct Note {
    step: u64,
    started_s: f64,
    waited_s: f64,
}

/// The training thread between two compute operations.
#[derive(Clone, Copy)]
enum TrainingThread {
    /// In the user's own code, of which so many seconds are left.
    Working(f64),
    /// Waiting since this moment for the next operation.
    WaitingSince(f64),
}

/// How fast everything goes at a moment.
struct Rates {
    /// Share of its speed that whatever uses processors has.
    processors: f64,
    /// The read and the write that the disk is making, by number, and its bytes a second.
    disk: [Option<(u64, f64)>; 2],
}

impl Rates {
    /// Bytes a second of a transfer; none while others come before it.
    fn of_transfer(&self, id: u64, write: bool) -> f64 {
        self.disk[usize::from(write)].filter(|(first, _)| *first == id).map_or(0.0, |(_, speed)| speed)
    }

    /// Seconds to the end at these rates.
    fn left_s(&self, running: &Running) -> f64 {
        match running.left {
            Cost::Seconds { seconds, processors } if processors > 0.0 => seconds / self.processors,
            Cost::Seconds { seconds, .. } => seconds,
            Cost::Transfer { write, bytes } => bytes / self.of_transfer(running.id, write),
        }
    }

    /// Takes off what is done in `elapsed_s`.
    fn advance(&self, running: &mut Running, elapsed_s: f64) {
        let id = running.id;
        match &mut running.left {
            Cost::Seconds { seconds, processors } if *processors > 0.0 => {
                *seconds -= elapsed_s * self.processors;
            }
            Cost::Seconds { seconds, .. } => *seconds -= elapsed_s,
            Cost::Transfer { write, bytes } => *bytes -= elapsed_s * self.of_transfer(id, *write),
        }
    }
}

pub(super) struct Clockwork<'a> {
    simulator: Simulator<'a>,
    order: Order<Note>,
    now_s: f64,
    running: Vec<Running>,
    training_thread: TrainingThread,
    norm_is_known: bool,
    trace: Trace,
}

impl<'a> Clockwork<'a> {
    pub fn new(simulator: Simulator<'a>) -> Self {
        Self {
            simulator,
            order: Order::new(),
            now_s: 0.0,
            running: vec![],
            training_thread: TrainingThread::WaitingSince(0.0),
            norm_is_known: false,
            trace: Trace::default(),
        }
    }

    /// Runs schedules one after another, each submitted when the step before has returned.
    pub fn run(mut self, schedules: &[&[Operation]]) -> Trace {
        let mut schedules = schedules.iter().zip(1..);
        let mut submit_next = true;
        loop {
            if std::mem::take(&mut submit_next)
                && let Some((schedule, step)) = schedules.next()
            {
                for &operation in *schedule {
                    self.order.admit(operation, Note { step, started_s: 0.0, waited_s: 0.0 });
                }
                self.go_on();
            }
            self.advance();
            let Some(elapsed_s) = self.until_next_s() else { break };
            submit_next = self.go_on_for(elapsed_s);
        }
        self.trace
    }

    /// The training thread goes on to its next compute operation.
    fn go_on(&mut self) {
        let next = self.order.next(Queue::Compute);
        let before_s = next.map_or(0.0, |operation| self.simulator.compute.time(&operation).before_s);
        self.training_thread = match before_s > 0.0 {
            true => TrainingThread::Working(before_s),
            false => TrainingThread::WaitingSince(self.now_s),
        };
    }

    /// Starts all operations that may start.
    fn advance(&mut self) {
        for queue in Queue::ALL {
            while let Some((id, operation)) = self.order.startable(queue) {
                let waited_s = match (queue, self.training_thread) {
                    (Queue::Compute, TrainingThread::Working(_)) => break,
                    (Queue::Compute, TrainingThread::WaitingSince(asked_s)) => self.now_s - asked_s,
                    _ => 0.0,
                };
                if let Some(note) = self.order.start(id) {
                    (note.started_s, note.waited_s) = (self.now_s, waited_s);
                }
                self.running.push(Running { id, left: self.simulator.cost(&operation) });
            }
        }
    }

    fn is_working(&self) -> bool {
        matches!(self.training_thread, TrainingThread::Working(_))
            && self.order.in_flight(Queue::Compute) == 0
    }

    fn rates(&self) -> Rates {
        let machine = self.simulator.machine;
        let mut wanted = 0.0;
        // A disk makes the transfers of a direction one after another: those under way wait in its queue.
        let mut first = [None; 2];
        for running in &self.running {
            match running.left {
                Cost::Transfer { write, .. } => {
                    first[usize::from(write)].get_or_insert(running.id);
                }
                Cost::Seconds { processors, .. } => wanted += processors,
            }
        }
        let alone = machine.disk_read_bytes_per_s + machine.disk_write_bytes_per_s;
        let share = match (machine.disk_mixed_bytes_per_s, first) {
            (Some(mixed), [Some(_), Some(_)]) => (mixed / alone).min(1.0),
            _ => 1.0,
        };
        let processors = match machine.processors {
            Some(processors) => {
                let processors = processors as f64;
                let wanted = wanted + if self.is_working() { processors } else { 0.0 };
                if wanted > processors { processors / wanted } else { 1.0 }
            }
            None => 1.0,
        };
        let [read, write] = first;
        let disk = [
            read.map(|id| (id, machine.disk_read_bytes_per_s * share)),
            write.map(|id| (id, machine.disk_write_bytes_per_s * share)),
        ];
        Rates { processors, disk }
    }

    /// Seconds until something happens next; none if nothing will. Not a difference of moments: late in a long
    /// step that would round to nothing, and nothing would ever end.
    fn until_next_s(&self) -> Option<f64> {
        let rates = self.rates();
        let ends = self.running.iter().map(|running| rates.left_s(running));
        let asks = match self.training_thread {
            TrainingThread::Working(left_s) if self.is_working() => Some(left_s / rates.processors),
            _ => None,
        };
        ends.chain(asks).min_by(f64::total_cmp)
    }

    /// Goes on for some time and ends what ends then. Answers whether a step has returned.
    fn go_on_for(&mut self, elapsed_s: f64) -> bool {
        let rates = self.rates();
        let next_s = self.now_s + elapsed_s;
        if let TrainingThread::Working(left_s) = self.training_thread
            && self.is_working()
        {
            let left_s = left_s - elapsed_s * rates.processors;
            self.training_thread = match left_s > SAME_MOMENT_S {
                true => TrainingThread::Working(left_s),
                false => TrainingThread::WaitingSince(next_s),
            };
        }
        self.now_s = next_s;
        let mut ended = vec![];
        self.running.retain_mut(|running| {
            let ends = rates.left_s(running) <= elapsed_s + SAME_MOMENT_S;
            match ends {
                true => ended.push(running.id),
                false => rates.advance(running, elapsed_s),
            }
            !ends
        });
        let mut computed = false;
        for (operation, note) in ended.into_iter().filter_map(|id| self.order.finish(id)) {
            computed |= operation.queue() == Queue::Compute;
            self.norm_is_known |= operation == Operation::Norm;
            let Note { step, started_s: start_s, waited_s } = note;
            self.trace.events.push(TraceEvent { operation, step, start_s, end_s: next_s, waited_s });
        }
        if computed {
            self.go_on();
        }
        let returned = self.norm_is_known && self.order.is_idle(Queue::Compute);
        self.norm_is_known &= !returned;
        returned
    }
}
