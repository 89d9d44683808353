//! Every schedule of the builder is right: whatever the layout, the placement, the depths and the kind of
//! step, and in whatever order the queues come to run it, each operation is given what it should have, and
//! each trainable piece is updated once a step.

mod forecast;
mod machine;
mod overlap;

use candle_core::DType;
use ferrozero::Tier;
use ferrozero::internals::schedule::buffer_plan::{BufferPlan, Depths, DeviceKind, GroupPlacement, Needs};
use ferrozero::internals::schedule::builder::{Builder, gradient_passes_through};
use ferrozero::internals::schedule::layout::{ALIGNMENT_ELEMENTS, Group, Layout};
use ferrozero::internals::schedule::operation::{Call, Operation, Queue, Resource};
use machine::{Machine, Moment};
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

/// A model, a plan and a kind of step.
#[derive(Debug, Clone)]
struct Case {
    layout: Layout,
    calls: Vec<Call>,
    placements: Vec<GroupPlacement>,
    boundary_home: Tier,
    depths: Depths,
    accumulate: usize,
    clip: bool,
    device: DeviceKind,
}

fn device() -> impl Strategy<Value = DeviceKind> {
    (any::<bool>(), prop_oneof![Just(DType::F32), Just(DType::BF16)])
        .prop_map(|(apart, dtype)| DeviceKind { dtype, apart })
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![Just(Tier::Device), Just(Tier::Host), Just(Tier::Disk)]
}

fn placement() -> impl Strategy<Value = GroupPlacement> {
    let each =
        (tier(), tier(), tier(), tier()).prop_map(|(master, first_moment, second_moment, gradient)| {
            GroupPlacement { master, first_moment, second_moment, gradient }
        });
    prop_oneof![each, tier().prop_map(GroupPlacement::all)]
}

/// Parameters of a group: elements, and whether they are trained.
fn parameters() -> impl Strategy<Value = Vec<(usize, bool)>> {
    prop::collection::vec((1..5000_usize, prop::bool::weighted(0.8)), 0..4)
}

fn layout(kinds: &[Vec<(usize, bool)>], resident: &[(usize, bool)], piece_elements: usize) -> Layout {
    let group = |name: String, is_resident: bool, parameters: &[(usize, bool)]| {
        let named = parameters.iter().enumerate().map(|(index, &(elements, trainable))| {
            (index, format!("{name}.{index}"), vec![elements], trainable, true)
        });
        Group::new(name.clone(), is_resident, named.collect())
    };
    let mut groups: Vec<_> =
        kinds.iter().enumerate().map(|(index, kind)| group(format!("h.{index}"), false, kind)).collect();
    groups.push(group("resident".into(), true, resident));
    Layout { groups, piece_elements }
}

fn case() -> impl Strategy<Value = Case> {
    // Groups are of one of two kinds, so that they share slots.
    let groups = (parameters(), parameters(), prop::collection::vec(any::<bool>(), 1..5));
    let groups = groups.prop_map(|(kind, other, which)| {
        which.iter().map(|&first| if first { kind.clone() } else { other.clone() }).collect::<Vec<_>>()
    });
    let depths = (1..4_usize, 1..6_usize, 1..4_usize, 1..3_usize, 1..4_usize, 0..4_usize).prop_map(
        |(slots, look_ahead, quads, gradient_sets, vertical, kept)| Depths {
            slots,
            look_ahead,
            state_pieces: 4 * quads,
            gradient_sets,
            vertical,
            kept,
        },
    );
    let model = (groups, parameters(), 1..4_usize);
    (model, depths, tier(), 1..5_usize, any::<bool>(), device()).prop_flat_map(
        |((kinds, resident, pages), depths, boundary_home, accumulate, clip, device)| {
            let groups = kinds.len();
            let layout = layout(&kinds, &resident, pages * ALIGNMENT_ELEMENTS);
            // Every segment runs, and some run again.
            let order = prop::collection::vec(0..groups, 0..3)
                .prop_map(move |again| (0..groups).chain(again).collect::<Vec<_>>())
                .prop_shuffle();
            let boundaries = prop::collection::vec((1..5000_usize, any::<bool>()), groups + 3);
            let placements = prop::collection::vec(placement(), groups + 1);
            (order, boundaries, placements).prop_map(move |(order, boundaries, mut placements)| {
                if device.holds_masters() {
                    placements[groups].master = Tier::Device;
                } else {
                    for placement in placements.iter_mut().filter(|place| place.master == Tier::Device) {
                        placement.master = Tier::Host;
                    }
                }
                let calls = order.iter().zip(boundaries);
                let calls = calls.map(|(&group, (elements, moves))| Call::new(group, elements, moves));
                Case {
                    layout: layout.clone(),
                    calls: calls.collect(),
                    placements,
                    boundary_home,
                    depths,
                    accumulate,
                    clip,
                    device,
                }
            })
        },
    )
}

/// A run in the making: schedules one after another, as a trainer submits them.
struct Run<'a> {
    builder: Builder<'a>,
    operations: Vec<(Operation, Moment)>,
    /// Optimizer steps so far.
    step: u64,
    /// Whether the last step left its updates to the next schedule.
    pending: bool,
}

impl<'a> Run<'a> {
    fn new(builder: Builder<'a>, step: u64) -> Self {
        Self { builder, operations: vec![], step, pending: false }
    }

    fn append(&mut self, schedule: Vec<Operation>, step: u64, updates: u64) {
        for operation in schedule {
            let micro_batch = operation.micro_batch();
            self.operations.push((operation, Moment { step, micro_batch, updates }));
        }
    }

    fn train(&mut self) {
        self.step += 1;
        self.append(self.builder.train(self.pending), self.step, self.step - 1);
        self.pending = self.builder.clip;
    }

    fn evaluate(&mut self) {
        self.append(self.builder.evaluate(self.pending), self.step, self.step);
        self.pending = false;
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.pending) {
            self.append(self.builder.settle(), self.step, self.step);
        }
    }

    fn commit(&mut self, first: bool) {
        self.settle();
        self.append(self.builder.commit(first), self.step, self.step);
    }

    fn collect_all(&mut self) {
        self.settle();
        for (index, group) in self.builder.layout.groups.iter().enumerate() {
            let pieces = 0..self.builder.layout.piece_count(group.elements);
            self.append(self.builder.collect(index, pieces), self.step, self.step);
        }
    }
}

/// The order of execution.
enum Order {
    AsListed,
    /// Any that resources and queues permit, by a seed.
    Random(u64),
}

/// Executes everything. An operation may go when the last earlier ones that used its resources are done and
/// it is the first of its queue.
fn execute(
    machine: &mut Machine,
    operations: &[(Operation, Moment)],
    order: Order,
) -> Result<(), TestCaseError> {
    let mut execute = |index: usize| {
        let (operation, moment) = &operations[index];
        let done = machine.execute(operation, *moment);
        done.map_err(|text| TestCaseError::fail(format!("{index}: {operation:?} {moment:?}: {text}")))
    };
    let Order::Random(mut seed) = order else {
        return (0..operations.len()).try_for_each(execute);
    };
    let mut last_user: HashMap<Resource, usize> = HashMap::new();
    let mut sharers: HashMap<Resource, Vec<usize>> = HashMap::new();
    let mut waits_for = vec![vec![]; operations.len()];
    let mut queues: HashMap<Queue, VecDeque<usize>> = HashMap::new();
    // A trainer submits nothing more before the norm of the last step is known, which ends that step's
    // schedule.
    let mut norm = None;
    for (index, (operation, _)) in operations.iter().enumerate() {
        for resource in operation.resources() {
            waits_for[index].extend(last_user.insert(resource, index));
            waits_for[index].extend(sharers.remove(&resource).unwrap_or_default());
        }
        if let Some(shared) = operation.shared_resource() {
            waits_for[index].extend(last_user.get(&shared));
            sharers.entry(shared).or_default().push(index);
        }
        waits_for[index].extend(norm);
        if matches!(operation, Operation::Norm) {
            norm = Some(index);
        }
        queues.entry(operation.queue()).or_default().push_back(index);
    }
    let mut done = vec![false; operations.len()];
    for _ in 0..operations.len() {
        let may_go = |queue: &Queue| {
            let first = queues.get(queue).and_then(VecDeque::front);
            first.is_some_and(|&index| waits_for[index].iter().all(|&earlier| done[earlier]))
        };
        let ready: Vec<Queue> = Queue::ALL.into_iter().filter(may_go).collect();
        prop_assert!(!ready.is_empty(), "the queues wait for each other");
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let queue = ready[(seed >> 33) as usize % ready.len()];
        if let Some(index) = queues.get_mut(&queue).and_then(VecDeque::pop_front) {
            execute(index)?;
            done[index] = true;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn every_permitted_order_of_every_schedule_gives_each_operation_what_it_needs(
        case in case(),
        seeds in prop::collection::vec(any::<u64>(), 3),
    ) {
        let Case { layout, calls, placements, boundary_home, depths, accumulate, clip, device } = case;
        let passes = gradient_passes_through(&calls, accumulate, depths.vertical, clip);
        let needs = Needs { layout: &layout, calls: &calls, gradient_passes_through: passes, device };
        let buffer_plan = BufferPlan::new(&needs, placements, boundary_home, depths);
        let builder = Builder { layout: &layout, calls: &calls, buffer_plan: &buffer_plan, accumulate, clip };
        let fresh = Machine::new(&layout, &calls, &buffer_plan, accumulate, clip);

        let mut run = Run::new(builder, 0);
        run.append(builder.initialize(), 0, 0);
        run.train();
        run.train();
        run.evaluate();
        run.train();
        run.commit(true);
        // Behind the commit, which makes the state before these durable.
        run.train();
        run.train();
        let mut listed = fresh.clone();
        execute(&mut listed, &run.operations, Order::AsListed)?;
        for &seed in &seeds {
            let mut random = fresh.clone();
            execute(&mut random, &run.operations, Order::Random(seed))?;
            prop_assert!(random == listed, "another order, another end");
        }

        // The process ends; another one goes on from what is on disk.
        let restarted = listed.restarted(&fresh, 3).map_err(TestCaseError::fail)?;
        let mut run = Run::new(builder, 3);
        run.append(builder.restore(), 3, 3);
        run.evaluate();
        run.train();
        run.collect_all();
        run.train();
        run.commit(false);
        run.collect_all();
        let mut listed = restarted.clone();
        execute(&mut listed, &run.operations, Order::AsListed)?;
        let collected = listed.expect_collected(5).and_then(|()| listed.restarted(&fresh, 5));
        collected.map_err(TestCaseError::fail)?;
        for &seed in &seeds {
            let mut random = restarted.clone();
            execute(&mut random, &run.operations, Order::Random(seed))?;
            prop_assert!(random == listed, "another order, another end");
        }
    }
}

/// The machine notices what is missing: without any one of these operations a run is refused.
#[test]
fn no_operation_of_a_step_is_superfluous() {
    let parameters = [(3000, true), (100, true)];
    let layout = layout(&[parameters.to_vec(), parameters.to_vec()], &parameters, ALIGNMENT_ELEMENTS);
    let calls = [0, 1, 0].map(|group| Call::new(group, 2500, true));
    let steps = [
        (Tier::Disk, 2, 1, true, 0),
        (Tier::Host, 1, 1, false, 2),
        (Tier::Device, 2, 1, false, 0),
        (Tier::Disk, 3, 3, true, 1),
        (Tier::Host, 2, 2, false, 3),
    ];
    for (tier, accumulate, vertical, clip, kept) in steps {
        let mut placements = vec![GroupPlacement::all(tier); 3];
        placements[2].master = Tier::Device;
        let passes = gradient_passes_through(&calls, accumulate, vertical, clip);
        let device = DeviceKind { dtype: DType::F32, apart: false };
        let needs = Needs { layout: &layout, calls: &calls, gradient_passes_through: passes, device };
        let depths = Depths { slots: 1, look_ahead: 2, state_pieces: 4, gradient_sets: 1, vertical, kept };
        let buffer_plan = BufferPlan::new(&needs, placements, tier, depths);
        let builder = Builder { layout: &layout, calls: &calls, buffer_plan: &buffer_plan, accumulate, clip };
        let mut run = Run::new(builder, 0);
        run.append(builder.initialize(), 0, 0);
        run.train();
        run.train();
        run.commit(true);
        run.collect_all();
        let lives = |operations: &[(Operation, Moment)]| {
            let fresh = Machine::new(&layout, &calls, &buffer_plan, accumulate, clip);
            let mut machine = fresh.clone();
            execute(&mut machine, operations, Order::AsListed).is_ok()
                && machine.restarted(&fresh, 2).is_ok()
                && machine.expect_collected(2).is_ok()
        };
        assert!(lives(&run.operations));
        for index in 0..run.operations.len() {
            let (operation, _) = run.operations[index];
            // These only look, at least where nobody waits for the norm.
            let looks = match operation {
                Operation::Attach { .. } => true,
                Operation::Forward { passage, keeps, .. } => passage.is_none() && !keeps,
                Operation::Norm => !clip,
                _ => false,
            };
            let mut rest = run.operations.clone();
            rest.remove(index);
            assert!(looks || !lives(&rest), "{tier}: nobody misses {operation:?}");
        }
    }
}
