//! Whose turn it is of several threads of which one runs at a time, in an order that is known before.

use std::sync::PoisonError;

// The same code under the real and the modelled locks: see tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

/// Another thread failed, and this one is to end too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another thread of the same race failed")]
pub struct Stopped;

/// Passed from thread to thread: only the one that has it goes on. A runner is a thread, by its number.
#[derive(Debug)]
pub struct Baton {
    race: Mutex<Race>,
    passed: Condvar,
}

#[derive(Debug, Default)]
struct Race {
    /// The runner of each turn, in order.
    turns: Vec<usize>,
    /// How many of them are over.
    over: usize,
    /// The runner that has the baton.
    holder: usize,
    /// Set when a runner has failed: the others end too.
    stopped: bool,
}

impl Race {
    /// Gives the baton to the runner whose turn comes next. Behind the last one nobody waits for it.
    fn pass_on(&mut self) {
        self.holder = self.turns.get(self.over).copied().unwrap_or(self.holder);
    }
}

impl Baton {
    /// For turns of these runners, one after another.
    pub fn new(turns: Vec<usize>) -> Self {
        let mut race = Race { turns, ..Race::default() };
        race.pass_on();
        Self { race: Mutex::new(race), passed: Condvar::new() }
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
    /// [`Stopped`] where another runner failed.
    pub fn take(&self, runner: usize) -> Result<(), Stopped> {
        let mut race = self.race();
        while race.holder != runner && !race.stopped {
            race = self.passed.wait(race).unwrap_or_else(PoisonError::into_inner);
        }
        if race.stopped { Err(Stopped) } else { Ok(()) }
    }

    /// The holder has come to its next turn: waits until that is the next of all.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn await_turn(&self) -> Result<(), Stopped> {
        let runner = self.holder();
        self.leave();
        self.take(runner)
    }

    /// The holder's turn is over. It goes on until it comes to its next one.
    pub fn end_turn(&self) {
        self.race().over += 1;
    }

    /// The holder does nothing more for now: the runner whose turn comes next may go on.
    pub fn leave(&self) {
        self.race().pass_on();
        self.passed.notify_all();
    }

    /// A runner has failed: all that wait, or come to wait, are told so.
    pub fn stop(&self) {
        self.race().stopped = true;
        self.passed.notify_all();
    }
}
