//! Whose turn it is of several threads of which one runs at a time, in an order that is known before.

use std::sync::PoisonError;

// The same code under the real and the modelled locks: see tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

use std::time::Duration;

/// Why a thread is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// Another thread failed.
    #[error("another thread of the same race failed")]
    Failed,
    /// The thread that had the baton did not come to its next turn in time.
    #[error("runner {runner} had the baton and did not come to its next turn for {seconds} s")]
    Late {
        /// Its number.
        runner: usize,
        /// Seconds that the others waited.
        seconds: u64,
    },
}

/// A wait is counted in these, so that time in which the process did not run is not.
const TICK: Duration = Duration::from_secs(1);

/// Passed from thread to thread: only the one that has it goes on. A runner is a thread, by its number.
#[derive(Debug)]
pub struct Baton {
    race: Mutex<Race>,
    passed: Condvar,
    /// The longest that a runner may take between two turns while others wait.
    limit: Duration,
}

#[derive(Debug, Default)]
struct Race {
    /// The runner of each turn, in order.
    turns: Vec<usize>,
    /// How many of them are over.
    over: usize,
    /// The runner that has the baton.
    holder: usize,
    /// Whether the holder is within its turn, and not on its way to it.
    within: bool,
    /// How often a turn began or ended.
    events: u64,
    /// Set when a runner has failed: the others end too.
    stopped: Option<Stopped>,
}

impl Race {
    /// Gives the baton to the runner whose turn comes next. Behind the last one nobody waits for it.
    fn pass_on(&mut self) {
        self.holder = self.turns.get(self.over).copied().unwrap_or(self.holder);
        self.events += 1;
    }
}

impl Baton {
    /// For turns of these runners, one after another, of which none may take longer than `limit` from one
    /// turn of its own to the next while others wait: it may be waiting for what one of those holds.
    pub fn new(turns: Vec<usize>, limit: Duration) -> Self {
        let mut race = Race { turns, ..Race::default() };
        race.pass_on();
        Self { race: Mutex::new(race), passed: Condvar::new(), limit }
    }

    fn race(&self) -> MutexGuard<'_, Race> {
        self.race.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The runner that has the baton: the one that asks, because no other runs.
    pub fn holder(&self) -> usize {
        self.race().holder
    }

    /// Waits until a runner has the baton.
    ///
    /// # Errors
    /// [`Stopped`] where another runner failed, or has not come to its turn in time.
    pub fn take(&self, runner: usize) -> Result<(), Stopped> {
        let mut race = self.race();
        let (mut waited, mut seen) = (Duration::ZERO, race.events);
        let tick = TICK.min(self.limit);
        while race.holder != runner && race.stopped.is_none() {
            let (now, ended) = self.passed.wait_timeout(race, tick).unwrap_or_else(PoisonError::into_inner);
            race = now;
            if race.within || race.events != seen {
                (waited, seen) = (Duration::ZERO, race.events);
            } else if ended.timed_out() {
                waited += tick;
            }
            if waited >= self.limit && race.holder != runner && race.stopped.is_none() {
                race.stopped = Some(Stopped::Late { runner: race.holder, seconds: waited.as_secs() });
                self.passed.notify_all();
            }
        }
        race.stopped.map_or(Ok(()), Err)
    }

    /// The holder has come to its next turn: waits until that is the next of all.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn await_turn(&self) -> Result<(), Stopped> {
        let runner = self.holder();
        self.leave();
        self.take(runner)?;
        self.race().within = true;
        Ok(())
    }

    /// The holder's turn is over. It goes on until it comes to its next one.
    pub fn end_turn(&self) {
        let mut race = self.race();
        race.over += 1;
        race.events += 1;
        race.within = false;
    }

    /// The holder does nothing more for now: the runner whose turn comes next may go on.
    pub fn leave(&self) {
        self.race().pass_on();
        self.passed.notify_all();
    }

    /// A runner has failed: all that wait, or come to wait, are told so.
    pub fn stop(&self) {
        self.race().stopped.get_or_insert(Stopped::Failed);
        self.passed.notify_all();
    }
}
