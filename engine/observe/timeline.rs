//! One step of a trace, small enough for a picture.

use crate::planner::plan::Plan;
use crate::schedule::operation::Queue;
use crate::schedule::trace::Trace;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Spans that are closer than this share of the step are one: no picture is finer.
const RESOLUTION: f64 = 1.0 / 2000.0;

/// Operations of one queue that do the same to one group, one after another or at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What they do.
    pub name: String,
    /// The group that they work on, if it is one.
    pub group: Option<String>,
    /// Their queue.
    pub queue: Queue,
    /// When the first one started, in seconds since the step did.
    pub start_s: f64,
    /// When the last one was done.
    pub end_s: f64,
    /// How many they are.
    pub operations: u64,
}

impl Trace {
    /// What the queues did between two moments of the trace, in the order of their starts. Pieces of a group
    /// are joined, so the length grows with the groups of a model and not with its bytes.
    pub fn timeline(&self, plan: &Plan, from_s: f64, until_s: f64) -> Vec<Span> {
        let layout = plan.layout();
        let gap_s = RESOLUTION * (until_s - from_s);
        let mut events: Vec<_> =
            self.events.iter().filter(|event| event.end_s > from_s && event.start_s < until_s).collect();
        events.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        let mut spans: Vec<Span> = vec![];
        let mut latest: HashMap<(Queue, String, Option<usize>), usize> = HashMap::new();
        for event in events {
            let (start_s, end_s) = (event.start_s.max(from_s) - from_s, event.end_s.min(until_s) - from_s);
            let (queue, name) = (event.operation.queue(), event.operation.name());
            let group = event.operation.group(layout, plan.calls());
            let key = (queue, name.clone(), group);
            if let Some(span) = latest.get(&key).and_then(|&index| spans.get_mut(index))
                && start_s <= span.end_s + gap_s
            {
                span.end_s = span.end_s.max(end_s);
                span.operations += 1;
                continue;
            }
            latest.insert(key, spans.len());
            let group = group.map(|group| layout.groups[group].name.clone());
            spans.push(Span { name, group, queue, start_s, end_s, operations: 1 });
        }
        spans
    }
}
