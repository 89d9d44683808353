//! How the end of a transfer reaches the one who waits for it.

use std::fmt;
use std::sync::PoisonError;

// The same code under the real and the modelled locks: see tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::Completion;

/// The handle of a transfer under way.
#[must_use = "wait for the ticket, or give the transfer a callback of its own"]
pub struct Ticket {
    shared: Arc<Shared>,
}

struct Shared {
    outcome: Mutex<Outcome>,
    ended: Condvar,
}

enum Outcome {
    UnderWay,
    Ended(Completion),
    /// The callback is gone, or the completion was taken.
    Gone,
}

impl Shared {
    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The callback's end: whoever waits is woken also when the callback is dropped without being called.
struct Sender(Arc<Shared>);

impl Sender {
    fn send(self, completion: Completion) {
        *self.0.outcome() = Outcome::Ended(completion);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut outcome = self.0.outcome();
        if matches!(*outcome, Outcome::UnderWay) {
            *outcome = Outcome::Gone;
        }
        drop(outcome);
        self.0.ended.notify_one();
    }
}

impl Ticket {
    /// A ticket, and the callback that redeems it.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> (Self, impl FnOnce(Completion) + Send + 'static) {
        let shared = Arc::new(Shared { outcome: Mutex::new(Outcome::UnderWay), ended: Condvar::new() });
        let sender = Sender(shared.clone());
        // Nobody may be waiting any more; the lease then goes home with the last owner of `shared`.
        (Self { shared }, move |done| sender.send(done))
    }

    /// Blocks until the transfer has ended.
    ///
    /// # Panics
    /// When the callback was dropped without being called, which no backend does.
    pub fn wait(self) -> Completion {
        let mut outcome = self.shared.outcome();
        while matches!(*outcome, Outcome::UnderWay) {
            outcome = self.shared.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        let ended = match std::mem::replace(&mut *outcome, Outcome::Gone) {
            Outcome::Ended(completion) => Some(completion),
            _ => None,
        };
        // INVARIANT: a backend calls every callback, also when it ends, and this uses up the ticket.
        ended.expect("every transfer calls its callback")
    }

    /// The completion, if the transfer has ended.
    pub fn try_wait(self) -> Result<Completion, Self> {
        let has_ended = matches!(*self.shared.outcome(), Outcome::Ended(_));
        if has_ended { Ok(self.wait()) } else { Err(self) }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Ticket")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, Budget, Tier};

    #[test]
    fn a_callback_that_is_lost_wakes_the_one_who_waits() {
        let (ticket, on_done) = Ticket::new();
        let waiting = std::thread::spawn(move || drop(ticket.wait()));
        drop(on_done);
        assert!(waiting.join().is_err(), "a hang would be worse than a panic");
    }

    #[test]
    fn a_lease_that_nobody_waits_for_goes_home() {
        let arena = Arena::new(&Budget::new(Tier::Host, 4096), 4096).unwrap();
        let (ticket, on_done) = Ticket::new();
        drop(ticket);
        on_done(Completion { lease: arena.lease(1).unwrap(), result: Ok(()) });
        assert_eq!(arena.free_bytes(), 4096);
    }
}
