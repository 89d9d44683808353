//! The times of a device that works while the host goes on: by its own clock, from the events between its
//! work.

use crate::device::compute::Done;
use crate::schedule::operation::Queue;
use crate::schedule::trace::{Trace, TraceEvent};
use std::collections::VecDeque;

/// The moments of an operation on its queue's stream.
#[derive(Debug)]
pub struct Moments {
    /// The device had done what came before, and waited for this operation from then on. For compute only.
    pub asked: Option<Done>,
    /// It began.
    pub started: Done,
    /// It was done.
    pub done: Done,
}

/// Events that are measured again from a later moment after so many seconds: the driver tells 24 bits of a
/// time.
const ORIGIN_AGES_S: f64 = 60.0;
/// So many operations may be pending before it is looked whether they are done.
const PENDING: usize = 256;

/// Puts operations into a trace once the device has done them.
pub struct DeviceClock {
    /// A moment, and when it was in seconds since the executor was started. None without a device of that
    /// kind.
    origin: Option<(Done, f64)>,
    /// When the last operation of each queue ended.
    last_s: [f64; Queue::ALL.len()],
    pending: VecDeque<(TraceEvent, Option<Moments>)>,
}

impl DeviceClock {
    /// A clock that was 0 at `origin`, a moment that is over.
    pub fn new(origin: Option<Done>) -> Self {
        Self {
            origin: origin.map(|origin| (origin, 0.0)),
            last_s: [0.0; Queue::ALL.len()],
            pending: VecDeque::new(),
        }
    }

    /// Notes an operation that is done for the host.
    pub fn note(&mut self, event: TraceEvent, moments: Option<Moments>, trace: &mut Trace) {
        if self.origin.is_none() {
            trace.events.push(event);
            return;
        }
        self.pending.push_back((event, moments));
        if self.pending.len() > PENDING {
            self.settle(trace);
        }
    }

    /// Waits for what was computed, and puts what the device has done into `trace`.
    pub fn settle_compute(&mut self, trace: &mut Trace) {
        let computed = self.pending.iter().rev().find(|(event, _)| event.operation.queue() == Queue::Compute);
        if let Some((_, Some(moments))) = computed {
            moments.done.wait();
        }
        self.settle(trace);
    }

    /// Puts everything into `trace`. Where the device has not told its times by now, they are the host's.
    pub fn settle_all(&mut self, trace: &mut Trace) {
        self.settle(trace);
        trace.events.extend(self.pending.drain(..).map(|(event, _)| event));
    }

    /// Puts what the device has done into `trace`, each queue's operations in their order.
    fn settle(&mut self, trace: &mut Trace) {
        let mut held_up = [false; Queue::ALL.len()];
        for (event, moments) in std::mem::take(&mut self.pending) {
            let queue = event.operation.queue() as usize;
            let timed = match &moments {
                _ if held_up[queue] => None,
                Some(moments) => self.timed(event, moments),
                None => Some(event),
            };
            match timed {
                Some(event) => trace.events.push(event),
                None => {
                    held_up[queue] = true;
                    self.pending.push_back((event, moments));
                }
            }
        }
    }

    /// The operation with the device's times; none as long as it is not done.
    fn timed(&mut self, event: TraceEvent, moments: &Moments) -> Option<TraceEvent> {
        let (origin, origin_s) = self.origin.as_ref()?;
        let at = |moment: &Done| origin.seconds_until(moment).map(|seconds| origin_s + seconds);
        let queue = event.operation.queue() as usize;
        // Times are rounded; operations of a stream come one after another.
        let end_s = at(&moments.done)?.max(self.last_s[queue]);
        let start_s = at(&moments.started)?.max(self.last_s[queue]).min(end_s);
        let waited_s = match &moments.asked {
            Some(asked) => asked.seconds_until(&moments.started)?,
            None => event.waited_s,
        };
        if end_s - origin_s > ORIGIN_AGES_S {
            self.origin = Some((moments.done.clone(), end_s));
        }
        self.last_s[queue] = end_s;
        Some(TraceEvent { start_s, end_s, waited_s, ..event })
    }
}
