//! What really happened, recorded against the schedule.

use crate::schedule::operation::{Operation, Queue};

/// One operation as it ran. Times of what a CUDA device does are by its own clock.
#[derive(Debug, Clone, Copy)]
pub struct TraceEvent {
    /// The operation.
    pub operation: Operation,
    /// The step that its schedule is of, from 1; for other schedules, the step that comes next.
    pub step: u64,
    /// When it was started, in seconds since the executor was.
    pub start_s: f64,
    /// When it was done, in seconds since the executor was started.
    pub end_s: f64,
    /// Seconds that the training thread had waited for it when it was started, and on a CUDA device, that the
    /// device had nothing to compute before it: 0 for all but compute.
    pub waited_s: f64,
}

/// The operations that finished since the last report, on a CUDA device too.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Those of a queue in the order in which they finished.
    pub events: Vec<TraceEvent>,
}

impl Trace {
    /// Seconds in which `queue` had at least one operation under way.
    pub fn busy_s(&self, queue: Queue) -> f64 {
        self.busy_within_s(&[queue], f64::NEG_INFINITY, f64::INFINITY)
    }

    /// Seconds between two moments in which at least one of `queues` had an operation under way.
    pub fn busy_within_s(&self, queues: &[Queue], from_s: f64, until_s: f64) -> f64 {
        let spans = self
            .events
            .iter()
            .filter(|event| queues.contains(&event.operation.queue()))
            .map(|event| (event.start_s.max(from_s), event.end_s.min(until_s)));
        covered_s(spans.collect())
    }
}

/// Seconds in which at least one of the spans, each a start and an end, was under way.
pub(crate) fn covered_s(mut spans: Vec<(f64, f64)>) -> f64 {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut covered_s = 0.0;
    let mut covered_until = f64::NEG_INFINITY;
    for (start, end) in spans {
        covered_s += (end - start.max(covered_until)).max(0.0);
        covered_until = covered_until.max(end);
    }
    covered_s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_operations_of_a_queue_count_once() {
        let event = |start_s, end_s| TraceEvent {
            operation: Operation::Norm,
            step: 1,
            start_s,
            end_s,
            waited_s: 0.0,
        };
        let trace =
            Trace { events: vec![event(0.0, 2.0), event(1.0, 3.0), event(5.0, 6.0), event(5.2, 5.4)] };
        assert_eq!(trace.busy_s(Queue::Control), 4.0);
        assert_eq!(trace.busy_s(Queue::Upload), 0.0);
        assert_eq!(trace.busy_within_s(&[Queue::Control, Queue::Upload], 1.5, 5.5), 2.0);
    }
}
