//! Which operation may start: the rules of schedules in one place, for the executor that runs them and for
//! the simulator that costs them.
//!
//! An operation waits for the last earlier one that used any of its resources. Each queue starts its
//! operations in the order of the list, and has no more of them under way than it is deep.

use crate::schedule::operation::{Operation, Queue, Resource};
use std::collections::{HashMap, HashSet, VecDeque};

/// Transfers that one disk queue keeps in flight.
const DISK_DEPTH: usize = 8;

/// Operations that a queue may have under way at once.
fn depth(queue: Queue) -> usize {
    match queue {
        Queue::FetchRead | Queue::StateRead | Queue::DiskWrite => DISK_DEPTH,
        _ => 1,
    }
}

/// An operation that is not done yet, and what its reader keeps with it.
struct Entry<T> {
    operation: Operation,
    note: T,
    /// Earlier operations that must be done first.
    waiting_for: usize,
    /// Later operations that wait for this one.
    dependents: Vec<u64>,
}

/// The operations that are not done yet, each with a note of the reader's.
pub struct Order<T> {
    /// By number, from [`Self::first_id`] on; none for those that are done.
    entries: VecDeque<Option<Entry<T>>>,
    first_id: u64,
    last_user: HashMap<Resource, u64>,
    /// Operations, not done yet, that use a resource together.
    sharers: HashMap<Resource, HashSet<u64>>,
    /// Operations that have not started.
    queues: [VecDeque<u64>; Queue::ALL.len()],
    /// How many have started and are not done.
    in_flight: [usize; Queue::ALL.len()],
}

impl<T> Order<T> {
    /// Without operations.
    pub fn new() -> Self {
        Self {
            entries: VecDeque::new(),
            first_id: 0,
            last_user: HashMap::new(),
            sharers: HashMap::new(),
            queues: Queue::ALL.map(|_| VecDeque::new()),
            in_flight: Queue::ALL.map(|_| 0),
        }
    }

    /// Appends an operation.
    pub fn admit(&mut self, operation: Operation, note: T) {
        let id = self.first_id + self.entries.len() as u64;
        let mut waiting_for = 0;
        for earlier in self.awaited(&operation, id) {
            if let Some(earlier) = self.entry_mut(earlier) {
                earlier.dependents.push(id);
                waiting_for += 1;
            }
        }
        self.queues[operation.queue() as usize].push_back(id);
        self.entries.push_back(Some(Entry { operation, note, waiting_for, dependents: vec![] }));
    }

    /// The earlier operations, perhaps done, that a new one waits for.
    fn awaited(&mut self, operation: &Operation, id: u64) -> Vec<u64> {
        let mut awaited = vec![];
        for resource in operation.resources() {
            awaited.extend(self.last_user.insert(resource, id));
            awaited.extend(self.sharers.get(&resource).into_iter().flatten());
        }
        if let Some(shared) = operation.shared_resource() {
            awaited.extend(self.last_user.get(&shared));
            self.sharers.entry(shared).or_default().insert(id);
        }
        awaited
    }

    fn place(&self, id: u64) -> Option<usize> {
        id.checked_sub(self.first_id).map(|place| place as usize)
    }

    fn entry(&self, id: u64) -> Option<&Entry<T>> {
        self.entries.get(self.place(id)?)?.as_ref()
    }

    fn entry_mut(&mut self, id: u64) -> Option<&mut Entry<T>> {
        let place = self.place(id)?;
        self.entries.get_mut(place)?.as_mut()
    }

    fn remove(&mut self, id: u64) -> Option<Entry<T>> {
        let place = self.place(id)?;
        let entry = self.entries.get_mut(place)?.take();
        while self.entries.front().is_some_and(Option::is_none) {
            self.entries.pop_front();
            self.first_id += 1;
        }
        entry
    }

    /// The next operation of a queue, whether it may start or not.
    pub fn next(&self, queue: Queue) -> Option<Operation> {
        let id = self.queues[queue as usize].front()?;
        self.entry(*id).map(|entry| entry.operation)
    }

    /// The next operation of a queue, if it may start now.
    pub fn startable(&self, queue: Queue) -> Option<(u64, Operation)> {
        let id = *self.queues[queue as usize].front()?;
        let entry = self.entry(id)?;
        let free = self.in_flight[queue as usize] < depth(queue);
        (free && entry.waiting_for == 0).then_some((id, entry.operation))
    }

    /// Starts the operation that [`Self::startable`] answered for its queue.
    pub fn start(&mut self, id: u64) -> Option<&mut T> {
        let queue = self.entry(id)?.operation.queue() as usize;
        self.queues[queue].pop_front();
        self.in_flight[queue] += 1;
        self.entry_mut(id).map(|entry| &mut entry.note)
    }

    /// An operation that was started is done: those that waited for it wait no more.
    pub fn finish(&mut self, id: u64) -> Option<(Operation, T)> {
        let entry = self.remove(id)?;
        self.in_flight[entry.operation.queue() as usize] -= 1;
        if let Some(sharers) = entry.operation.shared_resource().and_then(|r| self.sharers.get_mut(&r)) {
            sharers.remove(&id);
        }
        for dependent in entry.dependents {
            if let Some(dependent) = self.entry_mut(dependent) {
                dependent.waiting_for -= 1;
            }
        }
        Some((entry.operation, entry.note))
    }

    /// Forgets everything that has not started.
    pub fn cancel_waiting(&mut self) {
        let waiting: Vec<u64> = self.queues.iter_mut().flat_map(|queue| queue.drain(..)).collect();
        for id in waiting {
            self.remove(id);
        }
    }

    /// Whether everything is done.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether `operation` is not done yet.
    pub fn contains(&self, operation: Operation) -> bool {
        self.entries.iter().flatten().any(|entry| entry.operation == operation)
    }

    /// Whether a queue has nothing more to do.
    pub fn is_idle(&self, queue: Queue) -> bool {
        self.queues[queue as usize].is_empty() && self.in_flight(queue) == 0
    }

    /// Operations of a queue that have started and are not done.
    pub fn in_flight(&self, queue: Queue) -> usize {
        self.in_flight[queue as usize]
    }
}
