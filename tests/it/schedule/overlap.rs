//! On a device with memory of its own, the schedule of a step lets transfers and the host's update run beside
//! computing: a step waits for the bus only when the bus cannot keep up. Costed by the simulator, so nothing
//! here depends on how busy a machine is. The software CUDA driver has no clock of its own with which a bus
//! could be set, so these numbers are predictions.

use super::layout;
use candle_core::DType;
use ferrozero::Tier;
use ferrozero::internals::planner::machine::Machine;
use ferrozero::internals::planner::simulator::{Compute, ComputeTime, Forecast, Simulator};
use ferrozero::internals::schedule::buffer_plan::{BufferPlan, Depths, DeviceKind, GroupPlacement, Needs};
use ferrozero::internals::schedule::builder::{Builder, gradient_passes_through};
use ferrozero::internals::schedule::layout::{ALIGNMENT_ELEMENTS, Layout};
use ferrozero::internals::schedule::operation::{Call, Operation, Queue};
use ferrozero::internals::schedule::trace::{Trace, TraceEvent};

const LAYERS: usize = 12;
const LAYER_ELEMENTS: usize = 4 * ALIGNMENT_ELEMENTS;
/// Seconds of a layer.
const FORWARD_S: f64 = 1.0;
const BACKWARD_S: f64 = 3.0;

/// A step of a model in bf16 with its states on the host, where a layer takes `bus_s` to cross in either
/// direction.
fn step(clip: bool, bus_s: f64) -> (Forecast, Trace) {
    costed(clip, (1, 1), Tier::Device, [bus_s; 2])
}

/// The same of some micro-batches, of which some run vertically, where a layer takes other times up and down.
fn costed(
    clip: bool,
    (accumulate, vertical): (usize, usize),
    boundaries: Tier,
    [up_s, down_s]: [f64; 2],
) -> (Forecast, Trace) {
    let kinds = vec![vec![(LAYER_ELEMENTS, true)]; LAYERS];
    let layout: Layout = layout(&kinds, &[(10, true)], ALIGNMENT_ELEMENTS);
    let calls: Vec<Call> = (0..LAYERS).map(|group| Call::new(group, 1, true)).collect();
    let device = DeviceKind { dtype: DType::BF16, apart: true };
    let passes = gradient_passes_through(&calls, accumulate, vertical, clip);
    let needs = Needs { layout: &layout, calls: &calls, gradient_passes_through: passes, device };
    let placements = vec![GroupPlacement::all(Tier::Host); LAYERS + 1];
    let depths = Depths { slots: 2, look_ahead: 4, state_pieces: 16, gradient_sets: 2, vertical, kept: 0 };
    let buffer_plan = BufferPlan::new(&needs, placements, boundaries, depths);
    let builder = Builder { layout: &layout, calls: &calls, buffer_plan: &buffer_plan, accumulate, clip };
    let layer_bytes = 4.0 * LAYER_ELEMENTS as f64;
    let machine = Machine {
        // Half of f32 crosses.
        upload_bytes_per_s: layer_bytes / 2.0 / up_s,
        download_bytes_per_s: layer_bytes / 2.0 / down_s,
        // The update of a layer moves seven times its bytes, here in half of its forward.
        optimizer_bytes_per_s: 7.0 * layer_bytes / (0.5 * FORWARD_S),
        ..Machine::default()
    };
    let times = |within_s| vec![ComputeTime { before_s: 0.0, within_s }; LAYERS];
    let compute = Compute { forward: times(FORWARD_S), backward: times(BACKWARD_S), ..Compute::none(LAYERS) };
    let (layout, calls, machine, compute) = (&layout, &calls[..], &machine, &compute);
    let simulator = Simulator { layout, calls, buffer_plan: &buffer_plan, machine, compute };
    let schedule = builder.train(clip);
    (simulator.forecast(&schedule), simulator.run(&[&schedule, &schedule]))
}

#[test]
fn a_step_waits_for_the_bus_only_where_the_bus_is_too_slow() {
    for clip in [false, true] {
        println!("clip {clip}: a layer's crossing / its forward, exposed stall, seconds a step");
        let mut before = 0.0;
        for bus_s in [0.125, 0.25, 0.5, 1.0, 2.0, 4.0] {
            let (forecast, _) = step(clip, bus_s * FORWARD_S);
            println!("  {bus_s:>5} {:>6.1} % {:>6.1}", 100.0 * forecast.exposed_stall, forecast.step_s);
            assert!(forecast.exposed_stall >= before - 1e-9, "a slower bus, and less is waited for");
            before = forecast.exposed_stall;
            if bus_s <= 0.5 {
                assert!(forecast.exposed_stall <= 0.1, "{bus_s}: {}", forecast.exposed_stall);
            }
        }
        assert!(before > 0.3, "at a quarter of what is needed, computing waits");
    }
}

#[test]
fn parameters_arrive_gradients_leave_and_the_host_updates_while_the_device_computes() {
    for clip in [false, true] {
        let (_, trace) = step(clip, 0.5 * FORWARD_S);
        let of_step = trace.events.iter().filter(|event| event.step == 2);
        let events: Vec<&TraceEvent> = of_step.collect();
        let beside =
            |one: &TraceEvent, other: &TraceEvent| one.start_s < other.end_s && other.start_s < one.end_s;
        let computing =
            |wanted: &dyn Fn(&Operation) -> bool| events.iter().find(|event| wanted(&event.operation));
        for layer in 1..LAYERS {
            let before =
                computing(&|o| matches!(o, Operation::Forward { call, .. } if *call == layer - 1)).unwrap();
            let arrives = |event: &&&TraceEvent| {
                matches!(event.operation, Operation::Upload { group, .. } if group == layer)
                    && beside(event, before)
            };
            assert!(
                events.iter().any(|event| arrives(&event)),
                "layer {layer} arrives while its neighbour computes"
            );
            let after =
                computing(&|o| matches!(o, Operation::Backward { call, .. } if *call == layer - 1)).unwrap();
            let leaves = |event: &&&TraceEvent| {
                matches!(event.operation, Operation::Accumulate { group, .. } if group == layer)
                    && beside(event, after)
            };
            assert!(
                events.iter().any(|event| leaves(&event)),
                "gradients of layer {layer} leave beside the next backward"
            );
        }
        let compute: Vec<_> =
            events.iter().filter(|event| event.operation.queue() == Queue::Compute).collect();
        let updates: Vec<_> =
            events.iter().filter(|event| event.operation.queue() == Queue::Optimizer).collect();
        let hidden =
            updates.iter().filter(|update| compute.iter().any(|other| beside(update, other))).count();
        // The first ones of a step come before its first layer.
        assert!(4 * hidden >= 3 * updates.len(), "clip {clip}: {hidden} of {} updates", updates.len());
    }
}

/// Micro-batches that run vertically hide a layer's crossing behind all of them, also where each has a
/// boundary to fetch back.
#[test]
fn a_bus_that_is_too_slow_for_one_micro_batch_is_fast_enough_for_several_that_run_vertically() {
    const MICRO_BATCHES: usize = 4;
    for boundaries in [Tier::Device, Tier::Host] {
        // As long as the forward of all of them.
        let up_s = MICRO_BATCHES as f64 * FORWARD_S;
        let stall = |vertical| {
            let (forecast, trace) = costed(true, (MICRO_BATCHES, vertical), boundaries, [up_s, 0.1]);
            let waits = trace.events.iter().filter(|event| event.step == 2).filter_map(|event| {
                match event.operation {
                    // The first one waits for a layer that the forward's last ones have pushed out.
                    Operation::Backward { call, .. } if call + 2 < LAYERS => Some(event.waited_s),
                    _ => None,
                }
            });
            (forecast.exposed_stall, waits.sum::<f64>())
        };
        let ((alone, alone_s), (vertical, vertical_s)) = (stall(1), stall(MICRO_BATCHES));
        println!(
            "boundaries on {boundaries}: {alone:.2} ({alone_s:.2} s back), vertically {vertical:.2} \
             ({vertical_s:.2} s)"
        );
        assert!(alone > 0.3 && vertical < 0.1, "{boundaries}: {alone} and {vertical}");
        assert!(alone_s > 10.0 && vertical_s < 0.5, "{boundaries}: {alone_s} and {vertical_s}");
    }
}
