//! Tickets and slots under every order of their threads, as far as a bounded number of preemptions makes them:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p ferrozero-offload --test loom --release
//! ```
//!
//! Without that flag there is nothing in here.
#![cfg(loom)]

use std::sync::{Arc as StdArc, OnceLock};

use ferrozero_offload::*;
use loom::{
    sync::{Arc, Condvar, Mutex},
    thread,
};

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

/// A slot with what tells its users that it changed.
type Shared = Arc<(Mutex<Slot<u8>>, Condvar)>;

/// Waits for a state in which `take` finds what it needs.
fn take(slot: &Shared, take: impl Fn(&mut Slot<u8>) -> Result<u8, Error>) -> u8 {
    let mut guard = slot.0.lock().unwrap();
    loop {
        match take(&mut guard) {
            Ok(storage) => return storage,
            Err(Error::SlotOrder { .. }) => guard = slot.1.wait(guard).unwrap(),
            Err(other) => panic!("{other}"),
        }
    }
}

fn give(slot: &Shared, give: impl FnOnce(&mut Slot<u8>) -> Result<(), Error>) {
    give(&mut slot.0.lock().unwrap()).unwrap();
    slot.1.notify_all();
}

/// Fills the slot with two groups in turn. The transfer of `failing` fails once; the slot is then empty again, and the
/// transfer is made again.
fn fill(slot: &Shared, failing: Option<usize>) {
    let mut failing = failing;
    for group in [1, 2] {
        loop {
            let storage = take(slot, Slot::begin_fill);
            let (ticket, on_done) = Ticket::new();
            let mut lease = arena().lease(1).unwrap();
            let fails = failing.take_if(|failing| *failing == group).is_some();
            let transfer = thread::spawn(move || {
                lease[0] = group as u8;
                on_done(Completion { lease, result: if fails { Err(failure()) } else { Ok(()) } });
            });
            let done = ticket.wait();
            transfer.join().unwrap();
            match done.result {
                Ok(()) => {
                    give(slot, |slot| slot.finish_fill(done.lease[0], group));
                    break;
                }
                Err(_) => give(slot, |slot| slot.cancel_fill(storage)),
            }
        }
    }
}

#[test]
fn a_slot_passes_from_filling_to_use_to_draining_whatever_the_order_and_after_errors() {
    for failing in [None, Some(1), Some(2)] {
        explore(move || {
            let slot: Shared = Arc::new((Mutex::new(Slot::new("slot 0", 0)), Condvar::new()));
            let filled = slot.clone();
            let filler = thread::spawn(move || fill(&filled, failing));
            for group in [1, 2] {
                let storage = take(&slot, |slot| slot.acquire(group));
                assert_eq!(storage, group as u8, "computed with what another group left");
                give(&slot, |slot| slot.release(storage + 10));
                let storage = take(&slot, Slot::begin_drain);
                assert_eq!(storage, group as u8 + 10, "drained what was not computed");
                give(&slot, |slot| {
                    slot.finish_drain(storage)?;
                    assert_eq!(slot.evict()?, group);
                    Ok(())
                });
            }
            filler.join().unwrap();
            assert_eq!(slot.0.lock().unwrap().state(), SlotState::Empty);
        });
    }
}
