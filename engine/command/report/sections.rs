//! The parts of a report, from what the log says.

use super::chart::{Along, Series, chart};
use super::{escaped, seconds};
use crate::observe::occupancy::Occupancy;
use crate::observe::run_log::{History, Step, StepTimeline};
use crate::planner::plan::Bytes;
use crate::schedule::operation::Queue;
use crate::statistics::SECONDS_PER_DAY;
use crate::statistics::median;
use serde_json::Value;
use std::fmt::Display;

const DAYS_PER_YEAR: f64 = 365.25;
/// Queues that are busy for a smaller share of the step are left out.
const WORTH_A_ROW: f64 = 1e-3;
/// What many drives of 1 TB are rated for.
const RATED_BYTES: f64 = 600e12;

/// The run in a sentence.
pub fn subtitle(history: &History, dir: &dyn Display) -> String {
    let start = &history.start;
    let done = history.steps.last().map_or(start.after_step, |step| step.step);
    let state = match &history.summary {
        Some(_) if done >= start.steps => "done",
        Some(_) => "stopped, to be resumed",
        None => "its log has no end: it goes on, or was killed",
    };
    let processes = match history.processes {
        1 => String::new(),
        several => format!(", in {several} processes"),
    };
    format!(
        "{:.1} M parameters, {} tokens a step. {done} of {} steps{processes}; {state}. Folder {}, ferrozero \
         {}.",
        start.parameters as f64 / 1e6,
        start.tokens,
        start.steps,
        escaped(&dir.to_string()),
        escaped(&start.ferrozero),
    )
}

/// The steps that a prediction is compared with: those of the last process, which its plan is of, after the
/// first one, which makes what later ones use again; or all.
fn measured(history: &History) -> &[Step] {
    let first = history.steps.partition_point(|step| step.step <= history.start.after_step + 1);
    if first < history.steps.len() { &history.steps[first..] } else { &history.steps }
}

fn median_of(history: &History, value: impl Fn(&Step) -> f64) -> Option<f64> {
    let values: Vec<f64> = measured(history).iter().map(value).collect();
    (!values.is_empty()).then(|| median(values))
}

/// The figures that matter most.
pub fn tiles(history: &History) -> String {
    let mut tiles = String::new();
    let mut tile = |name: &str, value: Option<String>, note: Option<String>| {
        if let Some(value) = value {
            let note = note.map_or(String::new(), |note| format!("<small>{note}</small>"));
            tiles += &format!("<div><dt>{name}</dt><dd>{value}{note}</dd></div>\n");
        }
    };
    let first = history.steps.first();
    let last = history.steps.last();
    let from = first.map(|step| format!("{:.3} at step {}", step.loss, step.step));
    tile("loss of the last step", last.map(|step| format!("{:.3}", step.loss)), from);
    let validation_step = history.steps.iter().rev().find_map(|step| step.validation_loss);
    let validation = history.summary.as_ref().and_then(|summary| summary.validation_loss).or(validation_step);
    tile("validation loss", validation.map(|loss| format!("{loss:.3}")), None);
    let predicted = history.start.prediction.as_ref().map(|forecast| forecast.step_s);
    let step_s = median_of(history, |step| step.step_s);
    let predicted = predicted.map(|predicted| format!("{} predicted", seconds(predicted)));
    tile("a step", step_s.map(seconds), predicted);
    let tokens_per_s = median_of(history, |step| step.tokens_per_s);
    tile("tokens a second", tokens_per_s.map(|tokens| format!("{tokens:.0}")), None);
    let stall = median_of(history, |step| step.exposed_stall);
    let note = "of a step, training waited for memory, bus or disk";
    tile("exposed stall", stall.map(|stall| format!("{:.1} %", 100.0 * stall)), Some(note.into()));
    let skipped = history.steps.iter().filter(|step| step.skipped).count();
    if skipped > 0 {
        tile("steps skipped", Some(skipped.to_string()), Some("gradients of f16 had overflowed".into()));
    }
    tiles
}

fn series(
    history: &History,
    name: &'static str,
    class: &'static str,
    value: impl Fn(&Step) -> Option<f64>,
) -> Series {
    let points = history.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?)));
    Series { name, class, points: points.collect() }
}

/// Loss, learning rate and gradient norm over the steps.
pub fn learning(history: &History) -> String {
    let number = |value: f64| format!("{value}");
    let mut losses = vec![series(history, "loss", "a", |step| Some(f64::from(step.loss)))];
    let validation = series(history, "validation loss", "b", |step| step.validation_loss.map(f64::from));
    if !validation.points.is_empty() {
        losses.push(validation);
    }
    let rates = [series(history, "learning rate", "a", |step| Some(step.learning_rate))];
    let norms = [series(history, "gradient norm", "a", |step| step.gradient_norm)];
    let small = |value: f64| if value == 0.0 { "0".into() } else { format!("{value:e}") };
    format!(
        r#"{}<div class="pair">{}{}</div>{}"#,
        chart("Loss", Along::Steps, &losses, number, false),
        chart("Learning rate", Along::Steps, &rates, small, true),
        chart("Norm of the gradients, before clipping", Along::Steps, &norms, number, true),
        learning_table(history),
    )
}

/// Some of the steps as a table, for those who cannot read the drawings or want numbers.
fn learning_table(history: &History) -> String {
    const ROWS: usize = 20;
    let steps = &history.steps;
    let each = steps.len().div_ceil(ROWS).max(1);
    let is_shown = |index: usize| index.is_multiple_of(each) || index + 1 == steps.len();
    let shown = steps.iter().enumerate().filter(|(index, _)| is_shown(*index));
    let rows: String = shown
        .map(|(_, step)| {
            let norm = step.gradient_norm.map_or("not finite".into(), |norm| format!("{norm:.3}"));
            format!(
                "<tr><th scope=\"row\">{}</th><td>{:.4}</td><td>{:.2e}</td><td>{norm}</td><td>{}</td></tr>\n",
                step.step,
                step.loss,
                step.learning_rate,
                seconds(step.step_s)
            )
        })
        .collect();
    format!(
        "<details><summary>Steps as a table</summary><table><thead><tr><th scope=\"col\">step</th>\
         <th scope=\"col\">loss</th><th scope=\"col\">learning rate</th><th scope=\"col\">norm</th>\
         <th scope=\"col\">time</th></tr></thead><tbody>\n{rows}</tbody></table></details>\n"
    )
}

/// What a step takes, queue by queue, measured and predicted.
pub fn time(history: &History) -> String {
    let Some(step_s) = median_of(history, |step| step.step_s) else {
        return "<p>No step was made yet.</p>".into();
    };
    let forecast = history.start.prediction.as_ref();
    let text = match forecast {
        Some(forecast) => format!(
            "<p>Before the first step the plan predicted {} a step. The {} steps measured for it took {} \
             (median): the prediction is {:+.1} % off.</p>\n",
            seconds(forecast.step_s),
            measured(history).len(),
            seconds(step_s),
            100.0 * (forecast.step_s / step_s - 1.0)
        ),
        None => format!("<p>A step takes {} (median).</p>\n", seconds(step_s)),
    };
    let predicted_of = |queue: Queue| {
        let busy_s = &forecast?.busy_s;
        busy_s.iter().find(|(found, _)| *found == queue).map(|(_, busy_s)| *busy_s)
    };
    let mut rows: Vec<(&str, f64, Option<f64>, &str)> =
        vec![("the step", step_s, forecast.map(|forecast| forecast.step_s), "whole")];
    for queue in Queue::ALL {
        let busy_s = median_of(history, |step| step.busy_s.get(&queue).copied().unwrap_or(0.0));
        let (busy_s, predicted) = (busy_s.unwrap_or(0.0), predicted_of(queue));
        if busy_s.max(predicted.unwrap_or(0.0)) > WORTH_A_ROW * step_s {
            let busiest = forecast.is_some_and(|forecast| forecast.busiest == queue);
            rows.push((queue.name(), busy_s, predicted, if busiest { "busiest" } else { "" }));
        }
    }
    let stall_s = median_of(history, |step| step.exposed_stall * step.step_s).unwrap_or(0.0);
    let predicted = forecast.map(|forecast| forecast.exposed_stall * forecast.step_s);
    rows.push(("waiting: exposed stall", stall_s, predicted, "stall"));
    let longest = rows.iter().map(|row| row.1.max(row.2.unwrap_or(0.0))).fold(f64::MIN_POSITIVE, f64::max);
    let row = |&(name, busy_s, predicted, class): &(&str, f64, Option<f64>, &str)| {
        let mark = if class == "busiest" { " <small>the bottleneck</small>" } else { "" };
        format!(
            "<tr class=\"{class}\"><th scope=\"row\">{name}{mark}</th><td>{}</td><td>{}</td><td \
             class=\"bars\">{}</td></tr>\n",
            seconds(busy_s),
            predicted.map_or("-".into(), seconds),
            bar(busy_s / longest, predicted.map(|predicted| predicted / longest)),
        )
    };
    let rows: String = rows.iter().map(row).collect();
    let mut lines = vec![series(history, "measured", "a", |step| Some(step.step_s))];
    if let (Some(forecast), Some(first), Some(last)) = (forecast, history.steps.first(), history.steps.last())
    {
        let points = [first, last].map(|step| (step.step as f64, forecast.step_s)).to_vec();
        lines.push(Series { name: "predicted", class: "b dashed", points });
    }
    format!(
        "{text}<table class=\"queues\"><thead><tr><th scope=\"col\">busy in a step</th><th \
         scope=\"col\">measured</th>\
         <th scope=\"col\">predicted</th><th scope=\"col\"><span class=\"hidden\">as a bar; the mark is the \
         prediction</span></th>\
         </tr></thead><tbody>\n{rows}</tbody></table>\n{}",
        chart("Time of a step", Along::Steps, &lines, seconds, true)
    )
}

/// A bar of a share from 0 to 1, with a mark.
fn bar(share: f64, mark: Option<f64>) -> String {
    let percent = |share: f64| 100.0 * share.clamp(0.0, 1.0);
    let mark = mark.map_or(String::new(), |mark| format!(r#"<b style="left:{:.1}%"></b>"#, percent(mark)));
    format!(r#"<div class="bar" aria-hidden="true"><i style="width:{:.1}%"></i>{mark}</div>"#, percent(share))
}

/// Steps of the last process: a plan and a clock are of one process.
fn of_last_process(history: &History) -> impl Iterator<Item = &Step> {
    history.steps.iter().filter(|step| step.step > history.start.after_step)
}

/// What each tier held at most, against the plan and what was granted.
pub fn memory(history: &History) -> String {
    let start = &history.start;
    let peak = |of: fn(&Step) -> u64| of_last_process(history).map(of).max().unwrap_or(0);
    let (device, host) = (peak(|step| step.peak_device_bytes), peak(|step| step.peak_host_bytes));
    let limit = |granted: Option<u64>| granted.map_or("no limit".into(), |bytes| Bytes(bytes).to_string());
    let granted_device = match (start.granted_device_bytes, start.device_is_apart) {
        (None, false) => "-".into(),
        (granted, _) => limit(granted),
    };
    let granted_host = if start.device_is_apart { limit(start.granted_bytes) } else { "-".into() };
    let mut rows = vec![
        ("device", device, start.planned_device_bytes, granted_device),
        ("host", host, start.planned_host_bytes, granted_host),
    ];
    if !start.device_is_apart {
        // Peaks of the two may be of different moments, so this is the most that it can have been.
        let planned = start.planned_device_bytes + start.planned_host_bytes;
        rows.push(("both", device + host, planned, limit(start.granted_bytes)));
    }
    let row = |(tier, peak, planned, granted): (&str, u64, u64, String)| {
        let whole = planned.max(peak).max(1) as f64;
        format!(
            "<tr><th scope=\"row\">{tier}</th><td>{}</td><td>{}</td><td>{granted}</td><td \
             class=\"bars\">{}</td></tr>\n",
            Bytes(peak),
            Bytes(planned),
            bar(peak as f64 / whole, Some(planned as f64 / whole)),
        )
    };
    let tiers: String = rows.into_iter().map(row).collect();
    let uses: String = start
        .plan
        .iter()
        .map(|row| {
            let device = row.device_bytes.map_or("not counted".into(), |bytes| Bytes(bytes).to_string());
            let (name, host, disk) = (escaped(&row.name), Bytes(row.host_bytes), Bytes(row.disk_bytes));
            format!("<tr><th scope=\"row\">{name}</th><td>{device}</td><td>{host}</td><td>{disk}</td></tr>\n")
        })
        .collect();
    let curves = history.timeline.as_ref().map_or(String::new(), |timeline| occupancy(history, timeline));
    format!(
        "<table class=\"queues\"><thead><tr><th scope=\"col\">tier</th><th scope=\"col\">peak</th><th \
         scope=\"col\">planned</th>\
         <th scope=\"col\">granted</th><th scope=\"col\"><span class=\"hidden\">as a bar; the mark is the \
         plan</span></th></tr></thead>\
         <tbody>\n{tiers}</tbody></table>\n{curves}<h3>What the plan uses it for</h3>\n<table><thead><tr><th \
         scope=\"col\">use</th>\
         <th scope=\"col\">device</th><th scope=\"col\">host</th><th \
         scope=\"col\">disk</th></tr></thead><tbody>\n{uses}</tbody>\
         <tfoot><tr><th scope=\"row\">in all</th><td>{}</td><td>{}</td><td>{}</td></tr></tfoot></table>\n",
        Bytes(start.planned_device_bytes),
        Bytes(start.planned_host_bytes),
        Bytes(start.planned_disk_bytes),
    )
}

/// What each tier held over one step.
fn occupancy(history: &History, timeline: &StepTimeline) -> String {
    let tier = |title: &str, of: fn(&Occupancy) -> u64, planned: u64| {
        let held: Vec<_> = timeline.occupancy.iter().map(|level| (level.at_s, of(level) as f64)).collect();
        let ends = [0.0, timeline.step_s].map(|at_s| (at_s, planned as f64)).to_vec();
        let series = [
            Series { name: "in use", class: "a", points: held },
            Series { name: "planned", class: "b dashed", points: ends },
        ];
        chart(title, Along::Seconds, &series, |bytes| Bytes(bytes as u64).to_string(), true)
    };
    format!(
        "<h3>Over step {}</h3>\n<p>What the engine's own memory held. On the device the model's own tensors \
         come on top of it, which the plan counts too.</p>\n<div class=\"pair\">{}{}</div>\n",
        timeline.step,
        tier("Device", |level| level.device_bytes, history.start.planned_device_bytes),
        tier("Host", |level| level.host_bytes, history.start.planned_host_bytes),
    )
}

/// What the run reads and writes, and how long a drive bears it.
pub fn wear(history: &History) -> String {
    let mean = |of: fn(&Step) -> u64| {
        let bytes: u64 = history.steps.iter().map(of).sum();
        bytes / history.steps.len().max(1) as u64
    };
    let (read, written) = (mean(|step| step.read_bytes), mean(|step| step.written_bytes));
    if read + written == 0 {
        return "<p>The steps neither read nor wrote the disk.</p>".into();
    }
    let (bytes, elapsed_s) = of_last_process(history)
        .fold((0, 0.0), |(bytes, _), step| (bytes + step.written_bytes, step.elapsed_s));
    let mut rows =
        vec![("read, a step", Bytes(read).to_string()), ("written, a step", Bytes(written).to_string())];
    if bytes > 0 && elapsed_s > 0.0 {
        let a_day = bytes as f64 / elapsed_s * SECONDS_PER_DAY;
        let years = RATED_BYTES / a_day / DAYS_PER_YEAR;
        let life = if years >= 1.0 {
            format!("{years:.1} years")
        } else {
            format!("{:.0} days", years * DAYS_PER_YEAR)
        };
        rows.push(("written in a day at this pace", format!("{:.2} TB", a_day / 1e12)));
        rows.push(("a drive rated for 600 TB bears it for", life));
    }
    let row =
        |(name, value): (&str, String)| format!("<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>\n");
    format!("<table><tbody>\n{}</tbody></table>\n", rows.into_iter().map(row).collect::<String>())
}

/// The settings of the last process.
pub fn settings(history: &History) -> String {
    let empty = serde_json::Map::new();
    let settings = history.start.settings.as_object().unwrap_or(&empty);
    let value = |value: &Value| match value {
        Value::String(text) => escaped(text),
        other => escaped(&other.to_string()),
    };
    let set = settings.iter().filter(|(_, value)| !value.is_null());
    let rows = set.map(|(name, found)| {
        format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escaped(name), value(found))
    });
    format!("<table><tbody>\n{}</tbody></table>\n", rows.collect::<String>())
}
