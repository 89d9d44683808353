//! Whose turn it is of several micro-batches that run vertically. Each runs the user's code in a thread of its own, and only
//! the one with the baton goes on, so what the device is asked for comes in one order: that of the schedule.

use crate::error::{Error, Result};
use std::sync::PoisonError;

// The same code under the real and the modelled locks: see offload/tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

/// Passed from micro-batch to micro-batch.
#[derive(Debug)]
pub struct Baton {
    race: Mutex<Race>,
    passed: Condvar,
}

#[derive(Debug, Default)]
struct Race {
    /// The micro-batch of each compute operation, in the order of the schedule.
    turns: Vec<usize>,
    /// How many of them are over.
    over: usize,
    /// The micro-batch that has the baton.
    holder: usize,
    /// Set when a micro-batch has failed: the others end too.
    stopped: bool,
}

impl Race {
    /// Gives the baton to the micro-batch whose operation comes next. Behind the last one nobody waits for it.
    fn pass_on(&mut self) {
        self.holder = self.turns.get(self.over).copied().unwrap_or(self.holder);
    }
}

impl Baton {
    /// For a schedule whose compute operations are those of these micro-batches, one after another.
    pub fn new(turns: Vec<usize>) -> Self {
        let mut race = Race { turns, ..Race::default() };
        race.pass_on();
        Self { race: Mutex::new(race), passed: Condvar::new() }
    }

    fn race(&self) -> MutexGuard<'_, Race> {
        self.race.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The micro-batch that has the baton: the one that asks, because no other runs.
    pub fn holder(&self) -> usize {
        self.race().holder
    }

    /// Waits until a micro-batch has the baton.
    ///
    /// # Errors
    /// [`Error::Stopped`] where another micro-batch failed.
    pub fn take(&self, micro_batch: usize) -> Result<()> {
        let mut race = self.race();
        while race.holder != micro_batch && !race.stopped {
            race = self.passed.wait(race).unwrap_or_else(PoisonError::into_inner);
        }
        match race.stopped {
            true => Err(Error::Stopped("another micro-batch of the step failed".into())),
            false => Ok(()),
        }
    }

    /// The holder has come to its next compute operation: waits until that is the next one of the schedule.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn await_turn(&self) -> Result<()> {
        let micro_batch = self.holder();
        self.leave();
        self.take(micro_batch)
    }

    /// The holder's compute operation is over. It goes on until it comes to the next one.
    pub fn end_turn(&self) {
        self.race().over += 1;
    }

    /// The holder does nothing more for now: the micro-batch whose operation comes next may go on.
    pub fn leave(&self) {
        self.race().pass_on();
        self.passed.notify_all();
    }

    /// A micro-batch has failed: all that wait, or come to wait, are told so.
    pub fn stop(&self) {
        self.race().stopped = true;
        self.passed.notify_all();
    }
}
