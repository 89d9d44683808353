//! What the queues did in one step: a row a queue, time from left to right.

use super::chart::ticks;
use super::{escaped, seconds};
use crate::observe::run_log::StepTimeline;
use crate::observe::timeline::Span;
use crate::schedule::operation::Queue;

/// Width of a row in units of its own; the page stretches it.
const WIDTH: f64 = 1000.0;
/// What is shorter is drawn so wide, to be seen.
const NARROWEST: f64 = 1.0;
const LANE_HEIGHT: u32 = 10;

/// The rows of the step that was kept.
pub fn timeline(timeline: Option<&StepTimeline>) -> String {
    let Some(timeline) = timeline else {
        return "<p>Of the second step of a process; this one made fewer.</p>".into();
    };
    let whole_s = timeline.step_s;
    let mut rows = String::new();
    for queue in Queue::ALL.into_iter().filter(|&queue| queue != Queue::Control) {
        let spans: Vec<&Span> = timeline.spans.iter().filter(|span| span.queue == queue).collect();
        if !spans.is_empty() {
            rows += &row(queue, &spans, whole_s);
        }
    }
    let axis = ticks(0.0, whole_s).into_iter().filter(|tick| *tick <= whole_s);
    let axis: String = axis
        .map(|tick| format!(r#"<span style="left:{:.1}%">{}</span>"#, 100.0 * tick / whole_s, seconds(tick)))
        .collect();
    format!(
        r#"<p>Step {}, which took {}. Operations of a queue that run at once lie below one another;
pieces of one group are joined.
Point at a bar to see what it is.</p>
<div class="timeline">{rows}<div class="axis"><div class="x">{axis}</div></div></div>
<ul class="legend"><li class="forward">forward</li><li class="backward">backward</li>
<li class="transfer">between memory and device</li>
<li class="disk">disk</li><li class="optimizer">optimizer</li><li class="other">other</li></ul>
"#,
        timeline.step,
        seconds(whole_s),
    )
}

fn row(queue: Queue, spans: &[&Span], whole_s: f64) -> String {
    let mut lanes: Vec<f64> = vec![];
    let mut shapes = String::new();
    let mut placed = vec![];
    for span in spans {
        let lane = lanes.iter().position(|&end_s| end_s <= span.start_s).unwrap_or(lanes.len());
        lanes.resize(lanes.len().max(lane + 1), 0.0);
        lanes[lane] = span.end_s;
        placed.push((lane, span));
    }
    for (lane, span) in placed {
        let (x, y) = (WIDTH * span.start_s / whole_s, lane as u32 * LANE_HEIGHT);
        let width = (WIDTH * (span.end_s - span.start_s) / whole_s).max(NARROWEST);
        shapes += &format!(
            r#"<rect class="{}" x="{x:.1}" y="{y}" width="{width:.1}" height="{LANE_HEIGHT}">
<title>{}</title></rect>"#,
            class(span),
            escaped(&told(span))
        );
    }
    let height = lanes.len() as u32 * LANE_HEIGHT;
    let name = queue.name();
    format!(
        r#"<div class="row"><div class="name">{name}</div><svg role="img" aria-label="{name}: {}"
viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" style="height:{}px">{shapes}</svg></div>
"#,
        told_all(spans),
        (12 * lanes.len()).clamp(20, 72)
    )
}

/// A queue in words, for those who do not see it.
fn told_all(spans: &[&Span]) -> String {
    let operations: u64 = spans.iter().map(|span| span.operations).sum();
    let first_s = spans.iter().map(|span| span.start_s).fold(f64::INFINITY, f64::min);
    let last_s = spans.iter().map(|span| span.end_s).fold(0.0, f64::max);
    format!("{operations} operations between {} and {}", seconds(first_s), seconds(last_s))
}

fn told(span: &Span) -> String {
    let group = span.group.as_ref().map_or(String::new(), |group| format!(", {group}"));
    let several = match span.operations {
        1 => String::new(),
        operations => format!(", {operations} operations"),
    };
    format!("{}{group}: {} to {}{several}", span.name, seconds(span.start_s), seconds(span.end_s))
}

fn class(span: &Span) -> &'static str {
    match (span.queue, span.name.as_str()) {
        (_, "forward") => "forward",
        (_, "backward") => "backward",
        (Queue::FetchRead | Queue::StateRead | Queue::DiskWrite, _) => "disk",
        (Queue::Upload | Queue::Download, _) => "transfer",
        (Queue::Optimizer, _) => "optimizer",
        _ => "other",
    }
}
