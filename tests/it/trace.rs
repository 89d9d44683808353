//! The timeline of a run: valid JSON after every step, a named track a queue, every operation of the schedule
//! once, and what each tier held within what the plan has for it.

use ferrozero::internals::observe::chrome::ChromeTrace;
use ferrozero::internals::schedule::operation::Queue;
use ferrozero::{BackendChoice, Config, Placement, Tier};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const STEPS: u64 = 3;

/// The objects of the file. It must be valid at any time between two steps.
fn objects(path: &Path) -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Name, group and piece of an operation, and how often they occur.
type Counts = BTreeMap<(String, Option<String>, Option<u64>), usize>;

fn trace_of_a_run(placement: Placement, clip: Option<f64>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let config = Config {
        placement: placement.clone(),
        clip,
        backend: BackendChoice::Memory,
        boundaries: Some(Tier::Disk),
        piece_bytes: Some(4096),
        ..Config::default()
    };
    let (mut trainer, model) = crate::support::trainer(config, 3).unwrap();
    let mut chrome = ChromeTrace::create(&path, trainer.plan()).unwrap();
    trainer.take_trace().unwrap();
    let tracks_at_first = objects(&path);
    for step in 0..STEPS {
        let report =
            trainer.step(|micro_batch| model.loss(&crate::support::tokens(step, micro_batch))).unwrap();
        chrome.append(&report.trace).unwrap();
        assert!(objects(&path).len() > tracks_at_first.len());
    }
    // Waits for whatever goes on behind the last step.
    trainer.weights_digest().unwrap();
    chrome.append(&trainer.take_trace().unwrap()).unwrap();

    let objects = objects(&path);
    let names: HashMap<u64, String> = objects
        .iter()
        .filter(|object| object["name"] == "thread_name")
        .map(|object| (object["tid"].as_u64().unwrap(), object["args"]["name"].as_str().unwrap().to_owned()))
        .collect();
    for queue in Queue::ALL {
        assert!(names.values().any(|name| name == queue.name()), "{}", queue.name());
    }

    let plan = trainer.plan();
    let expected_of = |step: u64| -> Counts {
        let mut counts = Counts::new();
        // Nothing is pending before the first step, which then has fewer operations; the others are alike.
        assert!(step > 1);
        for operation in plan.train_schedule() {
            let group = operation.group(plan.layout(), plan.calls());
            let group = group.map(|group| plan.layout().groups[group].name.clone());
            *counts
                .entry((operation.name(), group, operation.piece().map(|piece| piece as u64)))
                .or_default() += 1;
        }
        counts
    };
    let mut found: BTreeMap<u64, Counts> = BTreeMap::new();
    let mut ends: HashMap<u64, f64> = HashMap::new();
    for event in objects.iter().filter(|object| object["ph"] == "X") {
        let (args, track) = (&event["args"], event["tid"].as_u64().unwrap());
        let key = (
            event["name"].as_str().unwrap().to_owned(),
            args["group"].as_str().map(str::to_owned),
            args["piece"].as_u64(),
        );
        *found.entry(args["step"].as_u64().unwrap()).or_default().entry(key).or_default() += 1;
        assert!(names[&track].starts_with(event["cat"].as_str().unwrap()), "an event on its queue's track");
        let start = event["ts"].as_f64().unwrap();
        // A nanosecond for the rounding of sums.
        assert!(start >= ends.get(&track).copied().unwrap_or(0.0) - 1e-3, "overlap on {}", names[&track]);
        ends.insert(track, start + event["dur"].as_f64().unwrap());
    }
    let on_disk = placement == Placement::All(Tier::Disk);
    let limits = [
        ("device memory in use", plan.device_bytes()),
        ("host memory in use", plan.host_bytes()),
        // Boundaries have their home there too, beside the states.
        ("disk in use", trainer.usage().disk_bytes),
    ];
    for (name, limit) in limits {
        let counter = objects.iter().filter(|object| object["ph"] == "C" && object["name"] == name);
        let points = counter.map(|object| (object["ts"].as_f64(), object["args"]["bytes"].as_u64()));
        let points: Vec<_> = points.map(|(at, bytes)| (at.unwrap(), bytes.unwrap())).collect();
        assert!(points.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{name} goes back in time");
        assert!(
            points.iter().all(|(_, bytes)| *bytes <= limit),
            "{name} is above the {limit} bytes of the plan"
        );
        let most = points.iter().map(|(_, bytes)| *bytes).max().unwrap();
        let least = points.iter().map(|(_, bytes)| *bytes).min().unwrap();
        assert!(most > least, "boundaries come and go through every tier: {name}");
        if on_disk && name == "disk in use" {
            assert!(least >= plan.disk_home_bytes());
        }
    }
    for step in 2..=STEPS {
        assert_eq!(found[&step], expected_of(step), "step {step}");
    }
}

#[test]
fn every_operation_of_a_step_is_an_event_on_the_track_of_its_queue() {
    for tier in [Tier::Device, Tier::Disk] {
        for clip in [None, Some(0.5)] {
            trace_of_a_run(Placement::All(tier), clip);
        }
    }
}

#[test]
fn a_file_that_cannot_be_made_is_named() {
    let (trainer, _) = crate::support::trainer(Config::default(), 1).unwrap();
    let error = ChromeTrace::create(Path::new("/nowhere/trace.json"), trainer.plan()).err().unwrap();
    assert!(error.to_string().contains("/nowhere/trace.json"), "{error}");
}
