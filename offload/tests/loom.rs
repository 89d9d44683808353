//! Tickets, leases, budgets and the baton under every order of their threads, as far as a bounded number of
//! preemptions makes them. Slots and buffers of a run are not among these: they belong to the engine's
//! dispatcher, one thread, and are passed on by value (`tests/schedule`).
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p ferrozero-offload --test loom --release
//! ```
//!
//! Without that flag there is nothing in here.
#![cfg(loom)]

use ferrozero_offload::*;
use loom::sync::Arc;
use loom::thread;
use std::time::Duration;

/// Preemptions of threads that are tried in one run of two threads; published bugs need two.
const PREEMPTIONS: usize = 3;

fn explore(run: impl Fn() + Sync + Send + 'static) {
    explore_with(PREEMPTIONS, run);
}

fn explore_with(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(run);
}

/// Made anew in each order of threads.
fn arena(pages: usize) -> Arena {
    Arena::new(&Budget::new(Tier::Host, 1 << 20), pages * PAGE_BYTES).unwrap()
}

fn failure() -> Error {
    Error::BadLayout { reason: "on purpose".into() }
}

#[test]
fn a_ticket_gives_result_and_lease_to_whoever_waits_for_it() {
    for fails in [false, true] {
        explore(move || {
            let arena = arena(1);
            let mut lease = arena.lease(8).unwrap();
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
    explore(|| {
        let arena = arena(1);
        let lease = arena.lease(8).unwrap();
        let (ticket, on_done) = Ticket::new();
        let transfer = thread::spawn(move || on_done(Completion { lease, result: Ok(()) }));
        drop(ticket);
        transfer.join().unwrap();
        assert_eq!(arena.free_bytes(), arena.capacity_bytes());
    });
}

#[test]
fn threads_that_lease_and_give_back_never_share_bytes_and_leave_all_of_them() {
    explore(|| {
        let arena = arena(3);
        let take = |mark: u8| {
            let arena = arena.clone();
            move || {
                for pages in [2, 1] {
                    // Two leases of two pages do not fit at once, so that one may be refused; one page always
                    // fits.
                    match arena.lease(pages * PAGE_BYTES) {
                        Ok(mut lease) => {
                            assert!(lease.iter().all(|&byte| byte == 0), "bytes of another lease");
                            lease.fill(mark);
                            thread::yield_now();
                            assert!(lease.iter().all(|&byte| byte == mark), "another lease wrote here");
                        }
                        Err(Error::ArenaExhausted { free_bytes, largest_free_bytes, .. }) => {
                            assert!(pages == 2 && free_bytes < 2 * PAGE_BYTES, "{pages} of {free_bytes}");
                            assert!(largest_free_bytes <= free_bytes);
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        };
        let other = thread::spawn(take(1));
        take(2)();
        other.join().unwrap();
        assert_eq!(arena.lease(3 * PAGE_BYTES).unwrap().len(), 3 * PAGE_BYTES, "the free runs were joined");
    });
}

#[test]
fn a_lease_goes_through_a_ticket_to_a_thread_that_outlives_the_arena() {
    explore(|| {
        let budget = Budget::new(Tier::Host, 1 << 20);
        let arena = Arena::new(&budget, PAGE_BYTES).unwrap();
        let lease = arena.lease(8).unwrap();
        let (ticket, on_done) = Ticket::new();
        let transfer = thread::spawn(move || on_done(Completion { lease, result: Ok(()) }));
        drop(arena);
        let done = ticket.wait();
        transfer.join().unwrap();
        assert_eq!(budget.used_bytes(), PAGE_BYTES as u64, "the memory lives as long as its last lease");
        drop(done);
        assert_eq!(budget.used_bytes(), 0);
    });
}

#[test]
fn threads_that_draw_from_a_budget_never_pass_its_limit() {
    explore(|| {
        let budget = Budget::new(Tier::Host, 3);
        let draw = || {
            let budget = budget.clone();
            move || {
                for bytes in [2, 1] {
                    let reservation = budget.reserve(bytes);
                    assert!(budget.used_bytes() <= 3 && (bytes == 2 || reservation.is_ok()));
                    drop(reservation);
                }
            }
        };
        let other = thread::spawn(draw());
        draw()();
        other.join().unwrap();
        assert_eq!(budget.used_bytes(), 0);
        assert!((2..=3).contains(&budget.peak_bytes()));
    });
}

/// Turns of runners as the engine's micro-batches have them: one after another, and twice the same. Three,
/// since of two there is only one that can wait.
const TURNS: [usize; 6] = [0, 1, 2, 0, 0, 2];

/// Runs through the turns of a runner as the engine does. `fails` is the number of the turn that fails, from
/// 1.
fn run(
    baton: &Baton,
    runner: usize,
    order: &std::sync::Mutex<Vec<usize>>,
    fails: usize,
) -> Result<(), Stopped> {
    baton.take(runner)?;
    for _ in TURNS.iter().filter(|&&turn| turn == runner) {
        baton.await_turn()?;
        assert_eq!(baton.holder(), runner);
        let turn = {
            let mut order = order.lock().unwrap();
            order.push(runner);
            order.len()
        };
        if turn == fails {
            baton.stop();
            return Ok(());
        }
        baton.end_turn();
    }
    baton.leave();
    Ok(())
}

#[test]
fn the_baton_makes_one_order_of_threads_and_none_waits_for_ever() {
    // Turn 0 is none.
    for fails in 0..=TURNS.len() {
        // One more preemption takes minutes.
        explore_with(2, move || {
            let baton = Arc::new(Baton::new(TURNS.to_vec(), Duration::from_secs(1)));
            let order = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
            let others = [1, 2].map(|runner| {
                let (baton, order) = (baton.clone(), order.clone());
                thread::spawn(move || run(&baton, runner, &order, fails))
            });
            let mut ends = vec![run(&baton, 0, &order, fails)];
            ends.extend(others.map(|other| other.join().unwrap()));
            let taken = if fails == 0 { TURNS.len() } else { fails };
            assert_eq!(order.lock().unwrap()[..], TURNS[..taken]);
            for (runner, end) in ends.into_iter().enumerate() {
                // All that had more to do than the one that failed are told.
                let has_failed = fails > 0 && TURNS[fails - 1] == runner;
                let has_more = TURNS[taken..].contains(&runner) && !has_failed;
                assert_eq!(end.is_err(), has_more, "{fails}, {runner}: {end:?}");
            }
        });
    }
}
