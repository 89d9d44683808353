//! Streams: queues of operations that wait for each other and for the host.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;

use super::State;
use super::work::{Recorded, Work};
use crate::configuration::Mode;
use crate::fault::{Code, Fault};
use crate::memory::Accesses;
use crate::races::{Clock, Doing};

/// An operation, and what the host knew to be done when it was enqueued.
struct Queued {
    work: Work,
    host: Arc<Clock>,
}

/// A stream.
#[derive(Default)]
pub struct Stream {
    queue: VecDeque<Queued>,
    /// Operations that were enqueued.
    pub enqueued: u64,
    /// Operations that are done.
    pub done: u64,
    /// What is done for certain when its last operation is.
    clock: Clock,
    /// What the host knew that is already part of the clock.
    host: Option<Arc<Clock>>,
    /// Whether its handle was destroyed.
    is_destroyed: bool,
}

/// An event: what it recorded last, and where.
#[derive(Clone)]
pub struct Event {
    /// What it records.
    pub recorded: Arc<Recorded>,
    /// The stream.
    pub stream: usize,
    /// Number of the record among the stream's operations.
    pub number: u64,
}

/// The stream of handle 0, which is there from the start.
pub const DEFAULT: usize = 0;
/// Streams advance by fewer operations than this at a time.
const STIR: u64 = 4;

impl State {
    /// What this thread of the host knows to be done.
    fn host(&mut self) -> &mut Arc<Clock> {
        self.hosts.entry(thread::current().id()).or_default()
    }

    /// Adds what a thread has waited for.
    pub fn host_waited_for(&mut self, clock: &Clock) {
        let host = self.host();
        let mut joined = Clock::clone(host);
        joined.join(clock);
        if joined != **host {
            *host = Arc::new(joined);
        }
    }

    /// A stream that has nothing to do. It takes the place of one that was destroyed, if the host knows that
    /// all of its operations are done, so that clocks stay short.
    pub fn new_stream(&mut self) -> usize {
        let host = self.host().clone();
        let known = |(number, stream): (usize, &Stream)| {
            (stream.is_destroyed && host.of(number) >= stream.done).then_some(number)
        };
        let Some(number) = self.streams.iter().enumerate().find_map(known) else {
            self.streams.push(Stream::default());
            return self.streams.len() - 1;
        };
        let Stream { enqueued, done, .. } = self.streams[number];
        self.streams[number] = Stream { enqueued, done, ..Stream::default() };
        number
    }

    /// Runs what a stream has left to do and ends it.
    pub fn destroy_stream(&mut self, stream: usize) -> Result<(), Code> {
        self.streams[stream].is_destroyed = true;
        self.synchronize(stream)
    }

    /// Adds an operation to a stream; in which mode it runs, the configuration says.
    pub fn enqueue(&mut self, stream: usize, work: Work) -> Result<(), Code> {
        self.check()?;
        let host = self.host().clone();
        let queue = &mut self.streams[stream];
        queue.enqueued += 1;
        queue.queue.push_back(Queued { work, host });
        match self.configuration.mode {
            Mode::Eager => self.run_until(stream, self.streams[stream].enqueued),
            Mode::Late => Ok(()),
            Mode::Random { .. } => self.stir(),
        }
    }

    /// A random number below a limit (a linear congruential generator with D. Knuth's constants for MMIX).
    fn random(&mut self, limit: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % limit
    }

    /// Lets random streams run some of their operations.
    fn stir(&mut self) -> Result<(), Code> {
        for _ in 0..self.random(STIR) {
            let stream = self.random(self.streams.len() as u64) as usize;
            let Stream { done, enqueued, .. } = self.streams[stream];
            self.run_until(stream, (done + 1).min(enqueued))?;
        }
        Ok(())
    }

    /// Runs a stream until so many of its operations are done. Waits pull in what they wait for, and nothing
    /// else.
    pub fn run_until(&mut self, stream: usize, done: u64) -> Result<(), Code> {
        while self.streams[stream].done < done {
            if let Some(Work::Wait { stream: other, number, .. }) =
                self.streams[stream].queue.front().map(|queued| &queued.work)
            {
                let (other, number) = (*other, *number);
                self.run_until(other, number)?;
            }
            if let Err(fault) = self.run_next(stream) {
                return Err(self.fail(fault));
            }
        }
        Ok(())
    }

    fn run_next(&mut self, stream: usize) -> Result<(), Fault> {
        let queue = &mut self.streams[stream];
        let Some(Queued { work, host }) = queue.queue.pop_front() else { return Ok(()) };
        queue.done += 1;
        let number = queue.done;
        let mut clock = std::mem::take(&mut queue.clock);
        if !queue.host.as_ref().is_some_and(|known| Arc::ptr_eq(known, &host)) {
            clock.join(&host);
            queue.host = Some(host);
        }
        clock.set(stream, number);
        let what = work.name();
        let mut accesses = Accesses::default();
        if let Work::Free { address } = work {
            // Whoever frees memory ends all accesses to it.
            accesses.note(self.memory.whole(address, "free")?, true);
            self.look_for_races(&Doing { stream, number, before: &clock, what: &what }, &accesses);
            accesses = Accesses::default();
        }
        let result = self.perform(&work, &mut accesses, &mut clock);
        self.look_for_races(&Doing { stream, number, before: &clock, what: &what }, &accesses);
        self.streams[stream].clock = clock;
        result.map_err(|fault| fault.at(what))
    }

    fn look_for_races(&mut self, doing: &Doing<'_>, accesses: &Accesses) {
        for touched in accesses.touched() {
            let races = self.memory.history(touched.allocation).add(doing, touched);
            for race in races {
                self.report_race(race);
            }
        }
    }

    /// The host waits for all operations of a stream.
    pub fn synchronize(&mut self, stream: usize) -> Result<(), Code> {
        if let Mode::Random { .. } = self.configuration.mode {
            self.stir()?;
        }
        self.run_until(stream, self.streams[stream].enqueued)?;
        let clock = self.streams[stream].clock.clone();
        self.host_waited_for(&clock);
        self.check()
    }

    /// The host waits for all operations of all streams.
    pub fn synchronize_all(&mut self) -> Result<(), Code> {
        let count = self.streams.len();
        for turn in 0..count {
            let is_eager = self.configuration.mode == Mode::Eager;
            self.synchronize(if is_eager { turn } else { count - 1 - turn })?;
        }
        self.check()
    }

    /// Runs one more operation of a stream, up to this one. Whether that is done without it.
    pub fn poll(&mut self, stream: usize, number: u64) -> Result<bool, Code> {
        let done = self.streams[stream].done;
        if done >= number {
            return Ok(true);
        }
        self.run_until(stream, done + 1)?;
        Ok(false)
    }
}
