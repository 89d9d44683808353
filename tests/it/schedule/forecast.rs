//! Forecasts of every schedule are between what a step cannot be shorter and what it cannot be longer than.

use super::{Case, case};
use ferrozero::internals::planner::machine::Machine;
use ferrozero::internals::planner::simulator::{Compute, ComputeTime, Simulator};
use ferrozero::internals::schedule::buffer_plan::{BufferPlan, Needs};
use ferrozero::internals::schedule::builder::{Builder, gradient_passes_through};
use proptest::prelude::*;

fn machine() -> impl Strategy<Value = Machine> {
    let rate = || 1e3..1e6_f64;
    let processors = prop::option::of(1..5_usize);
    let rates = (rate(), rate(), prop::option::of(rate()), rate(), rate(), rate(), processors);
    rates.prop_map(|(read, write, mixed, upload, download, optimizer, processors)| Machine {
        processors,
        disk_read_bytes_per_s: read,
        disk_write_bytes_per_s: write,
        disk_mixed_bytes_per_s: mixed,
        upload_bytes_per_s: upload,
        download_bytes_per_s: download,
        optimizer_bytes_per_s: optimizer,
        ..Machine::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn a_step_takes_its_busiest_queue_at_least_and_all_queues_one_after_another_at_most(
        case in case(),
        machine in machine(),
        (before_s, within_s) in (0.0..0.1_f64, 0.0..1.0_f64),
    ) {
        let Case { layout, calls, placements, boundary_home, depths, accumulate, clip, device } = case;
        let passes = gradient_passes_through(&calls, accumulate, depths.vertical, clip);
        let needs = Needs { layout: &layout, calls: &calls, gradient_passes_through: passes, device };
        let buffer_plan = BufferPlan::new(&needs, placements, boundary_home, depths);
        let builder = Builder { layout: &layout, calls: &calls, buffer_plan: &buffer_plan, accumulate, clip };
        let time = ComputeTime { before_s, within_s };
        let each = vec![time; calls.len()];
        let again_s = vec![within_s / 3.0; calls.len()];
        let compute = Compute { attach: time, forward: each.clone(), backward: each, again_s, detach: time };
        let schedule = builder.train(clip);
        let simulator = Simulator {
            layout: &layout,
            calls: &calls,
            buffer_plan: &buffer_plan,
            machine: &machine,
            compute: &compute,
        };

        let trace = simulator.run(&[&schedule, &schedule]);
        prop_assert_eq!(trace.events.len(), 2 * schedule.len(), "every operation ran");

        let forecast = simulator.forecast(&schedule);
        let rounding = 1e-6 * (1.0 + forecast.step_s);
        for (queue, busy_s) in &forecast.busy_s {
            prop_assert!(*busy_s <= forecast.step_s + rounding, "{queue:?}: {busy_s} in {}", forecast.step_s);
        }
        let busy_s: f64 = forecast.busy_s.iter().map(|(_, busy_s)| busy_s).sum();
        prop_assert!(forecast.step_s <= busy_s + rounding, "nobody works for a while: {forecast:?}");
        prop_assert!((0.0..=1.0).contains(&forecast.exposed_stall));
    }
}
