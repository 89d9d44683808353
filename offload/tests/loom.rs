//! Tickets under every order of their threads, as far as a bounded number of preemptions makes them:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p ferrozero-offload --test loom --release
//! ```
//!
//! Without that flag there is nothing in here.
#![cfg(loom)]

use std::sync::{Arc as StdArc, OnceLock};

use ferrozero_offload::*;
use loom::thread;

/// Preemptions of a thread that are tried in one run; published bugs need two.
const PREEMPTIONS: usize = 3;

fn explore(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(run);
}

/// One arena for all orders: whatever happens in one of them, its leases must have come back at the end.
fn arena() -> StdArc<Arena> {
    static ARENA: OnceLock<StdArc<Arena>> = OnceLock::new();
    let make = || Arena::new(&Budget::new(Tier::Host, 1 << 20), 1 << 20).unwrap();
    ARENA.get_or_init(|| StdArc::new(make())).clone()
}

fn failure() -> Error {
    Error::BadLayout { reason: "on purpose".into() }
}

#[test]
fn a_ticket_gives_result_and_lease_to_whoever_waits_for_it() {
    for fails in [false, true] {
        explore(move || {
            let mut lease = arena().lease(8).unwrap();
            let (ticket, on_done) = Ticket::new();
            let transfer = thread::spawn(move || {
                lease[0] = 7;
                on_done(Completion { lease, result: if fails { Err(failure()) } else { Ok(()) } });
            });
            // Asking first takes nothing away from waiting.
            let done = match ticket.try_wait() {
                Ok(done) => done,
                Err(ticket) => ticket.wait(),
            };
            assert_eq!((done.lease[0], done.result.is_err()), (7, fails));
            transfer.join().unwrap();
        });
    }
}

#[test]
fn the_lease_of_a_ticket_that_nobody_waits_for_goes_home() {
    // The only test with an arena of its own in each order, so that the count is exact.
    explore(|| {
        let arena = Arena::new(&Budget::new(Tier::Host, 1 << 16), 1 << 16).unwrap();
        let lease = arena.lease(8).unwrap();
        let (ticket, on_done) = Ticket::new();
        let transfer = thread::spawn(move || on_done(Completion { lease, result: Ok(()) }));
        drop(ticket);
        transfer.join().unwrap();
        assert_eq!(arena.free_bytes(), arena.capacity_bytes());
    });
}
