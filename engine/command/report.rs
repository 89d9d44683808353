//! `ferrozero report`: a run's log as one HTML page that needs nothing else, no network either.

mod chart;
mod sections;
mod timeline;

use super::output::{quoted, say_next};
use super::{CommandResult, configuration};
use crate::error::Error;
use crate::observe::run_log::History;
use std::fmt::Display;
use std::path::PathBuf;

const PAGE: &str = include_str!("report/page.html");

/// A run, and where to tell of it.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportArguments {
    /// Folder of a run
    dir: PathBuf,
    /// File to write
    #[arg(long, short, value_name = "FILE.html", default_value = "report.html")]
    out: PathBuf,
    /// Say nothing but errors
    #[arg(long, short)]
    quiet: bool,
}

/// Writes the page.
pub fn run(arguments: ReportArguments) -> CommandResult {
    let ReportArguments { dir, out, quiet } = arguments;
    let history = History::read(&dir).map_err(|error| explain(error, &dir.display()))?;
    std::fs::write(&out, page(&history, &dir.display()))
        .map_err(|source| Error::File { path: out.clone(), source })?;
    if !quiet {
        println!("{} steps of {} are in {}", history.steps.len(), dir.display(), out.display());
        say_next(format_args!("open {} in a browser", quoted(out.display())));
    }
    Ok(())
}

fn explain(error: Error, dir: &dyn Display) -> Error {
    match error {
        Error::File { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            configuration(format!(
                "{} is not there: ferrozero train and finetune write it into the folder of a run, and {dir} \
                 is none or has not been trained in",
                path.display()
            ))
        }
        other => other,
    }
}

/// The page of a run. Every text of the run is escaped where it is put into the page.
fn page(history: &History, dir: &dyn Display) -> String {
    let values = [
        ("title", escaped(&format!("{} in {dir}", history.start.model))),
        ("subtitle", sections::subtitle(history, dir)),
        ("tiles", sections::tiles(history)),
        ("learning", sections::learning(history)),
        ("time", sections::time(history)),
        ("timeline", timeline::timeline(history.timeline.as_ref())),
        ("memory", sections::memory(history)),
        ("wear", sections::wear(history)),
        ("settings", sections::settings(history)),
    ];
    // Piece by piece, so that nothing of a run is taken for a place in the page.
    let mut page = String::new();
    let mut rest = PAGE;
    while let Some((before, after)) = rest.split_once("{{") {
        page.push_str(before);
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        page.extend(values.iter().find(|(found, _)| *found == name).map(|(_, value)| value.as_str()));
        rest = after;
    }
    page + rest
}

/// Text as HTML shows it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Seconds for people.
fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", 1e3 * s),
        s if s >= 1e-3 => format!("{:.1} ms", 1e3 * s),
        s if s > 0.0 => format!("{:.0} µs", 1e6 * s),
        _ => "0 s".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::occupancy::Occupancy;
    use crate::observe::run_log::{Start, Step, StepTimeline};
    use crate::observe::timeline::Span;
    use crate::planner::plan::PlanRow;
    use crate::planner::simulator::Forecast;
    use crate::schedule::operation::Queue;

    fn history(steps: u64) -> History {
        let row = PlanRow { name: "slots (2)".into(), device_bytes: None, host_bytes: 4096, disk_bytes: 0 };
        let start = Start {
            version: 2,
            ferrozero: "0.1.0".into(),
            unix_s: 0.0,
            after_step: 0,
            steps: 7,
            tokens: 64,
            model: "<script>alert(\"{{tiles}}\")</script>".into(),
            parameters: 1000,
            settings: serde_json::json!({ "data": "a & b" }),
            plan: vec![row],
            prediction: None,
            planned_device_bytes: 0,
            planned_host_bytes: 4096,
            planned_disk_bytes: 0,
            granted_bytes: None,
            granted_device_bytes: None,
            device_is_apart: false,
        };
        let step = |step| Step {
            step,
            loss: 1.0,
            tokens: 64,
            tokens_per_s: 640.0,
            step_s: 0.1,
            exposed_stall: 0.5,
            learning_rate: 0.0,
            gradient_norm: None,
            skipped: false,
            busy_s: [(Queue::Compute, 0.05)].into(),
            peak_host_bytes: 4096,
            peak_device_bytes: 0,
            read_bytes: 0,
            written_bytes: 0,
            elapsed_s: 0.1 * step as f64,
            validation_loss: None,
        };
        let steps = (1..=steps).map(step).collect();
        History { start, processes: 1, steps, timeline: None, summary: None }
    }

    #[test]
    fn a_page_stands_alone_and_takes_no_text_of_a_run_for_its_own() {
        let page = page(&history(5), &"a run");
        assert!(!page.contains("<script>alert") && page.contains("&lt;script&gt;alert"), "{page}");
        assert!(page.contains("{{tiles}}"), "the text of a run stays as it is");
        assert!(page.contains("a &amp; b"));
        let without_names = page.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!without_names.contains(outside), "{outside}");
        }
    }

    #[test]
    fn a_run_of_any_length_has_a_page() {
        for steps in [0, 1, 2, 5000] {
            let page = page(&history(steps), &"run");
            assert!(!page.contains("NaN") && !page.contains("inf"), "{steps}: {page}");
            assert!(page.len() < 400_000, "{steps} steps make {} bytes", page.len());
        }
    }

    #[test]
    fn what_the_plan_predicted_is_set_against_the_steps_and_one_of_them_is_drawn() {
        let mut history = history(6);
        let span = Span {
            name: "forward".into(),
            group: Some("h.0".into()),
            queue: Queue::Compute,
            start_s: 0.01,
            end_s: 0.05,
            operations: 1,
        };
        let forecast = Forecast {
            step_s: 0.09,
            busy_s: vec![(Queue::Compute, 0.06)],
            exposed_stall: 0.4,
            busiest: Queue::Compute,
            read_bytes: 0,
            written_bytes: 0,
        };
        let held = Occupancy { at_s: 0.0, device_bytes: 0, host_bytes: 4096, disk_bytes: 0 };
        history.start.prediction = Some(forecast);
        history.timeline =
            Some(StepTimeline { step: 2, step_s: 0.1, spans: vec![span], occupancy: vec![held] });
        let page = page(&history, &"run");
        assert!(page.contains("forward, h.0"), "{page}");
        assert!(
            page.contains("in use: 4.0 KiB at 0 s") && page.contains("planned: 4.0 KiB at 0 s"),
            "{page}"
        );
        assert!(page.contains("90.0 ms") && page.contains("100 ms") && page.contains("-10.0 %"), "{page}");
    }
}
