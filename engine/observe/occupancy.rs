//! How many bytes of each tier hold something, moment by moment.
//!
//! A buffer, slot, gradient set, passage or boundary on disk holds something from the operation that fills it
//! to the last one that uses it before the next that fills it; a home always does. A plan has room for all of
//! them at once, so none of these numbers is above the plan's. The model's own tensors are not the engine's
//! and not counted.

use crate::planner::plan::Plan;
use crate::schedule::buffer_plan::BufferUse;
use crate::schedule::operation::{Extent, Operation, Resource};
use crate::schedule::trace::Trace;
use ferrozero_offload::{Tier, padded_bytes};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Bytes of the engine's that hold something, from a moment on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Occupancy {
    /// The moment, in seconds.
    pub at_s: f64,
    /// Bytes of device memory.
    pub device_bytes: u64,
    /// Bytes of host memory.
    pub host_bytes: u64,
    /// Bytes on disk, of states once.
    pub disk_bytes: u64,
}

impl Occupancy {
    fn of_tier(&mut self, tier: Tier) -> &mut u64 {
        match tier {
            Tier::Device => &mut self.device_bytes,
            Tier::Host => &mut self.host_bytes,
            Tier::Disk => &mut self.disk_bytes,
        }
    }
}

/// One use of a resource.
#[derive(Debug, Clone, Copy)]
struct Use {
    fills: bool,
    start_s: f64,
    end_s: f64,
}

/// Bytes that come or go at a moment.
struct Change {
    at_s: f64,
    tier: Tier,
    comes: bool,
    bytes: u64,
}

impl Trace {
    /// What the tiers held between two moments of the trace: the first one, and each at which that changed.
    pub fn occupancy(&self, plan: &Plan, from_s: f64, until_s: f64) -> Vec<Occupancy> {
        let mut level = always(plan, from_s);
        let mut levels = vec![level];
        for Change { at_s, tier, comes, bytes } in self.changes(plan) {
            if at_s >= until_s {
                break;
            }
            let held = level.of_tier(tier);
            *held = if comes { *held + bytes } else { held.saturating_sub(bytes) };
            level.at_s = at_s.max(from_s);
            match levels.last_mut() {
                Some(last) if last.at_s >= level.at_s => *last = level,
                _ => levels.push(level),
            }
        }
        levels
    }

    /// In the order of their moments. What goes does so before anything comes at the same moment, because the
    /// memory is the same.
    fn changes(&self, plan: &Plan) -> Vec<Change> {
        let mut events: Vec<_> = self.events.iter().collect();
        events.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        let mut uses: HashMap<Resource, Vec<Use>> = HashMap::new();
        for event in events {
            for resource in event.operation.resources() {
                let fills = fills(&event.operation, resource);
                let this = Use { fills, start_s: event.start_s, end_s: event.end_s };
                uses.entry(resource).or_default().push(this);
            }
        }
        let mut changes = vec![];
        for (resource, uses) in uses {
            let Some((tier, bytes)) = memory_of(plan, resource) else { continue };
            for (since_s, until_s) in lives(&uses) {
                changes.push(Change { at_s: since_s, tier, comes: true, bytes });
                changes.push(Change { at_s: until_s, tier, comes: false, bytes });
            }
        }
        changes.sort_by(|a, b| a.at_s.total_cmp(&b.at_s).then(a.comes.cmp(&b.comes)));
        changes
    }
}

/// From when to when a resource holds something, of its uses in their order. What is used before it was
/// filled was there from before; then steps are alike, and what is in it at the end is there until the next
/// one.
fn lives(uses: &[Use]) -> Vec<(f64, f64)> {
    let mut lives: Vec<(f64, f64)> = vec![];
    for this in uses {
        match lives.last_mut() {
            Some((_, until_s)) if !this.fills => *until_s = until_s.max(this.end_s),
            before => {
                let since_s = if this.fills { this.start_s } else { f64::NEG_INFINITY };
                if let Some((_, until_s)) = before {
                    *until_s = until_s.min(since_s);
                }
                lives.push((since_s, this.end_s));
            }
        }
    }
    if let (Some(first), Some((_, until_s))) = (uses.first(), lives.last_mut())
        && !first.fills
    {
        *until_s = f64::INFINITY;
    }
    lives
}

/// What holds something always: homes of states, and slots that are the home of their masters.
fn always(plan: &Plan, at_s: f64) -> Occupancy {
    let buffer_plan = &plan.buffer_plan;
    let mut always = Occupancy { at_s, device_bytes: 0, host_bytes: 0, disk_bytes: plan.disk_home_bytes() };
    for buffer in buffer_plan.buffers().filter(|buffer| matches!(buffer.use_, BufferUse::Home(_))) {
        *always.of_tier(buffer.tier) += page(buffer.bytes);
    }
    for slot in masters(plan) {
        always.device_bytes += plan.bytes_of_slot(slot);
    }
    always
}

/// Slots that are the home of their masters.
fn masters(plan: &Plan) -> impl Iterator<Item = usize> {
    let buffer_plan = &plan.buffer_plan;
    let groups = 0..buffer_plan.slots_of.len();
    let homes = groups.filter(|&group| buffer_plan.master_in_slot(group));
    homes.filter_map(|group| buffer_plan.slots_of[group].first().map(|slot| slot.0))
}

/// Tier and bytes of a resource that does not hold something always; none for those that do, and for those
/// without memory.
fn memory_of(plan: &Plan, resource: Resource) -> Option<(Tier, u64)> {
    let boundary = |call: usize| plan.calls().get(call).map_or(0, |call| call.boundary_elements);
    match resource {
        Resource::Buffer(buffer) => {
            let buffer = plan.buffer_plan.buffer(buffer)?;
            (!matches!(buffer.use_, BufferUse::Home(_))).then(|| (buffer.tier, page(buffer.bytes)))
        }
        Resource::Slot(slot) if masters(plan).any(|home| home == slot.0) => None,
        Resource::Slot(slot) => Some((Tier::Device, plan.bytes_of_slot(slot.0))),
        Resource::Gradients(_) => Some((Tier::Device, plan.bytes_of_gradient_set())),
        Resource::Passage(_) => Some((Tier::Device, plan.bytes_of_passage())),
        Resource::Piece(Extent::Boundary { call, .. }, piece) => {
            Some((Tier::Disk, 4 * plan.layout().piece_range(boundary(call), piece).len() as u64))
        }
        Resource::Piece(Extent::State(..), _) | Resource::Statistics | Resource::StatesOnDisk => None,
    }
}

/// Bytes of a buffer as the arena gives them.
fn page(bytes: usize) -> u64 {
    padded_bytes(bytes) as u64
}

/// Whether an operation puts something new into a resource that it uses, and does not add to what is there or
/// take it.
fn fills(operation: &Operation, resource: Resource) -> bool {
    match (*operation, resource) {
        (
            Operation::Initialize { buffer, .. }
            | Operation::Read { buffer, .. }
            | Operation::Download { buffer, .. }
            | Operation::CopyDown { buffer, .. }
            | Operation::SaveBoundary { buffer, .. },
            Resource::Buffer(used),
        ) => used == buffer,
        (Operation::Accumulate { buffer, add, .. }, Resource::Buffer(used)) => used != buffer || !add,
        (Operation::Upload { buffer, .. }, Resource::Buffer(used)) => used != buffer,
        // A group and a boundary come piece by piece.
        (Operation::Upload { piece, .. }, Resource::Slot(_))
        | (Operation::LoadBoundary { piece, .. }, Resource::Passage(_)) => piece == 0,
        (Operation::Write { extent: Extent::Boundary { .. }, .. }, Resource::Piece(..))
        | (Operation::Forward { .. }, Resource::Passage(_))
        | (Operation::Backward { .. } | Operation::Detach { .. }, Resource::Gradients(_)) => true,
        _ => false,
    }
}

/// The most that each tier holds in each of `parts` equal parts of the time from `from_s` to `until_s`, which
/// is counted from its start then: small enough for a picture.
pub fn highest(levels: &[Occupancy], (from_s, until_s): (f64, f64), parts: usize) -> Vec<Occupancy> {
    let part_s = (until_s - from_s) / parts as f64;
    let mut highest = vec![];
    for part in 0..parts {
        let (start_s, end_s) = (from_s + part as f64 * part_s, from_s + (part + 1) as f64 * part_s);
        // What is held when the part begins, and all that comes until it ends.
        let first = levels.partition_point(|level| level.at_s <= start_s).saturating_sub(1);
        let of_part = levels[first..].iter().take_while(|level| level.at_s < end_s);
        let most = |of: fn(&Occupancy) -> u64| of_part.clone().map(of).max().unwrap_or(0);
        highest.push(Occupancy {
            at_s: start_s - from_s,
            device_bytes: most(|level| level.device_bytes),
            host_bytes: most(|level| level.host_bytes),
            disk_bytes: most(|level| level.disk_bytes),
        });
    }
    highest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(uses: &[(bool, f64, f64)]) -> Vec<(f64, f64)> {
        let each = uses.iter().map(|&(fills, start_s, end_s)| Use { fills, start_s, end_s });
        lives(&each.collect::<Vec<_>>())
    }

    #[test]
    fn a_resource_holds_something_from_its_filling_to_its_last_use() {
        let (fill, take) = (true, false);
        assert_eq!(uses(&[(fill, 1.0, 2.0), (take, 3.0, 4.0), (fill, 6.0, 7.0)]), [(1.0, 4.0), (6.0, 7.0)]);
        // What is used first was there before, and what is filled last is there until the next step.
        let carried = uses(&[(take, 1.0, 2.0), (fill, 5.0, 6.0)]);
        assert_eq!(carried, [(f64::NEG_INFINITY, 2.0), (5.0, f64::INFINITY)]);
        assert_eq!(uses(&[(take, 1.0, 2.0)]), [(f64::NEG_INFINITY, f64::INFINITY)]);
        // Two clocks may disagree a little; the memory is the same.
        assert_eq!(uses(&[(fill, 1.0, 3.0), (fill, 2.5, 4.0)]), [(1.0, 2.5), (2.5, 4.0)]);
    }

    #[test]
    fn a_picture_keeps_the_highest_of_each_part() {
        let level = |at_s, host_bytes| Occupancy { at_s, device_bytes: 1, host_bytes, disk_bytes: 0 };
        let levels = [level(2.0, 5), level(2.4, 9), level(2.5, 3), level(3.9, 4)];
        let parts = highest(&levels, (2.0, 4.0), 4);
        let host: Vec<_> = parts.iter().map(|level| (level.at_s, level.host_bytes)).collect();
        assert_eq!(host, [(0.0, 9), (0.5, 3), (1.0, 3), (1.5, 4)]);
    }
}
