//! While a segment computes, the next one's parameters arrive, and while it goes back, the gradients of the
//! one before leave and the host updates. Each segment waits until that has happened beside it, so a run that
//! did one thing after another would not end.

use super::support::{Block, Model};
use super::{WIDTH, homes, on_cuda, runs_at_once, tokens};
use candle_core::{Module, Tensor, bail};
use ferrozero::internals::device::compute::{DeviceCounter, DeviceCounts};
use ferrozero::internals::schedule::operation::Operation;
use ferrozero::internals::schedule::trace::TraceEvent;
use ferrozero::{AdamW, Config, Engine, Plan, Segment, Tier};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LAYERS: usize = 4;
/// Nothing takes as long: a wait that never ends becomes a failure.
const NEVER: Duration = Duration::from_secs(300);

/// What a block waits for when it runs: forward first, then back.
#[derive(Default)]
struct Expected {
    counter: Option<DeviceCounter>,
    /// Bytes that have gone up when the next block's parameters are there, by block, for its next forward.
    arrived: Vec<Option<u64>>,
    /// Bytes that have come down when the gradients of the block after it have left, by block, for its next
    /// backward.
    left: Vec<Option<u64>>,
}

/// A block that waits.
struct Waiting {
    block: Block,
    layer: usize,
    expected: Arc<Mutex<Expected>>,
}

impl Module for Waiting {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let (counter, arrived, left) = {
            let mut expected = self.expected.lock().unwrap();
            let Some(counter) = expected.counter.clone() else { return self.block.forward(xs) };
            let arrived = expected.arrived[self.layer].take();
            let left = if arrived.is_none() { expected.left[self.layer].take() } else { None };
            (counter, arrived, left)
        };
        let until = |what: &str, bytes: Option<u64>, now: fn(DeviceCounts) -> u64| {
            let began = Instant::now();
            while bytes.is_some_and(|bytes| now(counter.read()) < bytes) {
                if began.elapsed() > NEVER {
                    bail!("layer {}: {what} beside it", self.layer)
                }
                std::thread::yield_now();
            }
            Ok(())
        };
        until("the next parameters did not arrive", arrived, |counts| counts.uploads.bytes)?;
        until("the last gradients did not leave", left, |counts| counts.downloads.bytes)?;
        self.block.forward(xs)
    }
}

/// Bytes that a queue has moved when it has moved all of each layer for the first time, beyond `before`.
fn sums(plan: &Plan, before: u64, group_of: impl Fn(&Operation) -> Option<(usize, usize)>) -> Vec<u64> {
    let mut sums = vec![0; LAYERS];
    let mut bytes = before;
    for operation in plan.train_schedule() {
        let Some((group, piece)) = group_of(&operation) else { continue };
        if piece == 0 {
            bytes +=
                plan.layout().groups[group].table.iter().map(|entry| 4 * entry.elements as u64).sum::<u64>();
            if group < LAYERS && sums[group] == 0 {
                sums[group] = bytes;
            }
        }
    }
    sums
}

#[test]
fn parameters_arrive_gradients_leave_and_the_host_updates_beside_computing() {
    let Some(base) = on_cuda() else { return };
    // With one slot nothing could arrive beside what computes; of plans for so small a model that would be
    // the smallest.
    let config = Config {
        device: base.device,
        piece_bytes: Some(4096),
        slots: Some(2),
        look_ahead: Some(4),
        ..homes(Tier::Disk)
    };
    let engine = Engine::new(config).unwrap();
    let expected = Arc::new(Mutex::new(Expected::default()));
    let vb = engine.var_builder();
    let blocks: Vec<Segment<Waiting>> = (0..LAYERS)
        .map(|layer| {
            let make = |vb| {
                let block = Block::new(vb, WIDTH)?;
                Ok(Waiting { block, layer, expected: expected.clone() })
            };
            engine.segment(vb.pp(format!("h.{layer}")), make).unwrap()
        })
        .collect();
    let model = Model::new(&vb, WIDTH, blocks).unwrap();
    let plan = engine.plan(AdamW::default(), |_| model.loss(&tokens(0, 0))).unwrap();
    let mut trainer = engine.trainer_from(plan).unwrap();
    for step in 0..2 {
        trainer.step(|_| model.loss(&tokens(step, 0))).unwrap();
    }
    // Everything behind the last step is over, so that what is counted from here on is of the next one.
    trainer.weights_digest().unwrap();
    trainer.take_trace().unwrap();
    let before = trainer.device_counter().read();
    let arrived = sums(trainer.plan(), before.uploads.bytes, |operation| match *operation {
        Operation::Upload { group, piece, .. } => Some((group, piece)),
        _ => None,
    });
    let left = sums(trainer.plan(), before.downloads.bytes, |operation| match *operation {
        Operation::Accumulate { group, piece, .. } => Some((group, piece)),
        _ => None,
    });
    *expected.lock().unwrap() = Expected {
        counter: Some(trainer.device_counter()),
        arrived: (0..LAYERS).map(|layer| arrived.get(layer + 1).copied()).collect(),
        left: (0..LAYERS).map(|layer| left.get(layer + 1).copied()).collect(),
    };
    let report = trainer.step(|_| model.loss(&tokens(2, 0))).unwrap();
    let waited = expected.lock().unwrap();
    assert!(waited.arrived.iter().chain(&waited.left).all(Option::is_none), "every block has waited");

    // Where nothing is put off, the device's times show the same.
    if !runs_at_once() {
        return;
    }
    let events = &report.trace.events;
    let end_s = |wanted: &dyn Fn(&Operation) -> bool| -> f64 {
        let of = |event: &&TraceEvent| wanted(&event.operation);
        events.iter().filter(of).map(|event| event.end_s).fold(f64::NEG_INFINITY, f64::max)
    };
    for layer in 0..LAYERS - 1 {
        let forward = end_s(&|o| matches!(*o, Operation::Forward { call, .. } if call == layer));
        let mut uploads = events
            .iter()
            .filter(|e| matches!(e.operation, Operation::Upload { group, .. } if group == layer + 1));
        assert!(uploads.next().unwrap().end_s <= forward, "parameters of layer {}", layer + 1);
        let backward = end_s(&|o| matches!(*o, Operation::Backward { call, .. } if call == layer));
        let gone = end_s(&|o| matches!(*o, Operation::Accumulate { group, .. } if group == layer + 1));
        assert!(gone <= backward, "gradients of layer {}", layer + 1);
    }
    // There are fewer buffers than pieces of gradients, so the host had to update while the device went back.
    let first = events.iter().find(|e| matches!(e.operation, Operation::Backward { .. })).unwrap().start_s;
    let last = end_s(&|o| matches!(o, Operation::Backward { .. }));
    let beside = |e: &&TraceEvent| {
        matches!(e.operation, Operation::Update { .. }) && e.start_s >= first && e.end_s <= last
    };
    assert!(events.iter().filter(beside).count() > 0, "updates beside the backward");
}
