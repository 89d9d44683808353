//! A machine's numbers from what really happened.

use super::{Compute, ComputeTime, F32_BYTES, Machine, crossing_bytes, optimizer_bytes};
use crate::plan::Plan;
use crate::schedule::{Operation, Queue};
use crate::trace::{Trace, TraceEvent};

/// How fast the machine was, and how long computing took, in the training step whose report has this trace. None where
/// the trace does not hold every compute operation of a step.
pub fn measure(trace: &Trace, plan: &Plan) -> Option<(Machine, Compute)> {
    let machine = Machine {
        disk_read_bytes_per_s: rate(trace, plan, &[Queue::FetchRead, Queue::StateRead]),
        disk_write_bytes_per_s: rate(trace, plan, &[Queue::DiskWrite]),
        // What each got while the other was under way is in these numbers already.
        disk_mixed_bytes_per_s: None,
        upload_bytes_per_s: rate(trace, plan, &[Queue::Upload]),
        download_bytes_per_s: rate(trace, plan, &[Queue::Download]),
        optimizer_bytes_per_s: rate(trace, plan, &[Queue::Optimizer]),
        ..Machine::default()
    };
    Some((machine, compute(trace, plan)?))
}

/// Bytes a second that queues moved while they were busy; without limit where they moved none.
fn rate(trace: &Trace, plan: &Plan, queues: &[Queue]) -> f64 {
    let moved = trace.events.iter().filter(|event| queues.contains(&event.operation.queue())).map(|event| {
        let bytes = F32_BYTES * event.operation.elements(plan.layout(), plan.calls()) as f64;
        match (&event.operation, event.operation.queue()) {
            (_, Queue::Optimizer) => optimizer_bytes(&event.operation, bytes),
            (Operation::SaveBoundary { .. } | Operation::LoadBoundary { .. }, _) => bytes,
            (_, Queue::Upload | Queue::Download) => crossing_bytes(&plan.arrangement, bytes),
            _ => bytes,
        }
    });
    let moved: f64 = moved.sum();
    let busy_s = trace.busy_within_s(queues, f64::NEG_INFINITY, f64::INFINITY);
    if moved > 0.0 && busy_s > 0.0 { moved / busy_s } else { f64::INFINITY }
}

fn compute(trace: &Trace, plan: &Plan) -> Option<Compute> {
    let of_compute = |event: &&TraceEvent| event.operation.queue() == Queue::Compute;
    let events: Vec<&TraceEvent> = trace.events.iter().filter(of_compute).collect();
    // Evaluations may lie before the step in the trace.
    let starts = events.iter().enumerate().rev();
    let mut starts = starts.filter(|(_, event)| matches!(event.operation, Operation::Attach { .. }));
    let (first, _) = starts.next()?;
    let mut sums = Compute::none(plan.calls().len());
    let mut seen = 0;
    let mut previous_end_s = None;
    for event in &events[first..] {
        let time = match event.operation {
            Operation::Attach { .. } => &mut sums.attach,
            Operation::Forward { call, .. } => sums.forward.get_mut(call)?,
            Operation::Backward { call, .. } => sums.backward.get_mut(call)?,
            _ => &mut sums.detach,
        };
        let share = match event.operation {
            Operation::Attach { .. } => 1.0,
            _ => 1.0 / plan.accumulate as f64,
        };
        let asked_s = event.start_s - event.waited_s;
        *time = ComputeTime {
            before_s: time.before_s
                + share * previous_end_s.map_or(0.0, |end_s: f64| (asked_s - end_s).max(0.0)),
            within_s: time.within_s + share * (event.end_s - event.start_s),
        };
        previous_end_s = Some(event.end_s);
        seen += 1;
    }
    let expected = plan.accumulate * (2 * plan.calls().len() + 1) + 1;
    (seen == expected).then_some(sums)
}
