//! Micro-batches in threads that take turns.

use crate::error::{Error, Result};
use crate::sync::lock;
use ferrozero_offload::Baton;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Stack of a micro-batch's thread: what a main thread has. Candle's backward goes as deep as the graph is
/// long.
const STACK_BYTES: usize = 8 << 20;

/// Runs micro-batches vertically, each in a thread of its own, and answers what they answer, in order. The
/// first that fails ends the others: its error is the answer, and its panic goes on here.
pub fn abreast<T: Send>(
    baton: &Baton,
    micro_batches: Range<usize>,
    run: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let failure: Mutex<Option<thread::Result<Error>>> = Mutex::default();
    let fail = |with: thread::Result<Error>| {
        lock(&failure).get_or_insert(with);
        baton.stop();
    };
    let through = |micro_batch: usize| {
        let end = catch_unwind(AssertUnwindSafe(|| {
            baton.take(micro_batch).map_err(Error::from).and_then(|()| run(micro_batch))
        }));
        match end {
            Ok(Ok(value)) => {
                baton.leave();
                return Some(value);
            }
            Ok(Err(error)) => fail(Ok(error)),
            Err(panic) => fail(Err(panic)),
        }
        None
    };
    let values = thread::scope(|scope| {
        let start = |micro_batch: usize| {
            let name = format!("ferrozero micro-batch {micro_batch}");
            let builder = thread::Builder::new().name(name).stack_size(STACK_BYTES);
            builder.spawn_scoped(scope, move || through(micro_batch))
        };
        let mut threads = vec![];
        for micro_batch in micro_batches {
            match start(micro_batch) {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    fail(Ok(Error::Thread { name: "micro-batch".into(), source }));
                    break;
                }
            }
        }
        // No thread panics: what runs in it is caught.
        threads.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        None => Ok(values),
        Some(Ok(error)) => Err(error),
        Some(Err(panic)) => resume_unwind(panic),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    const TURNS: [usize; 12] = [0, 1, 2, 0, 1, 2, 0, 0, 1, 1, 2, 2];

    /// How a turn ends the micro-batch whose it is.
    #[derive(Clone, Copy, PartialEq)]
    enum End {
        Error,
        Panic,
    }

    /// Runs each micro-batch through its turns, and answers the order in which they came and what came of it.
    /// `fails` is the number of the turn that fails, from 1.
    fn run(fails: Option<(usize, End)>) -> (Vec<usize>, thread::Result<Result<Vec<usize>>>) {
        let baton = Baton::new(TURNS.to_vec(), Duration::from_secs(60));
        let order = Mutex::new(vec![]);
        let each = |micro_batch| {
            for _ in TURNS.iter().filter(|&&turn| turn == micro_batch) {
                baton.await_turn()?;
                assert_eq!(baton.holder(), micro_batch);
                lock(&order).push(micro_batch);
                match fails.filter(|(turn, _)| *turn == lock(&order).len()) {
                    Some((_, End::Error)) => return Err(Error::Unsupported("by itself".into())),
                    Some((_, End::Panic)) => std::panic::panic_any("by itself"),
                    None => baton.end_turn(),
                }
            }
            Ok(micro_batch)
        };
        let end = catch_unwind(AssertUnwindSafe(|| abreast(&baton, 0..3, each)));
        (order.into_inner().unwrap(), end)
    }

    #[test]
    fn micro_batches_take_turns_in_the_order_of_the_schedule() {
        let (order, end) = run(None);
        assert_eq!(order, TURNS);
        assert_eq!(end.unwrap().unwrap(), [0, 1, 2]);
    }

    #[test]
    fn one_that_fails_at_any_turn_ends_all_and_its_failure_is_told() {
        for turn in 1..=TURNS.len() {
            let (order, end) = run(Some((turn, End::Error)));
            assert_eq!(order, TURNS[..turn]);
            let error = end.unwrap().unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text == "by itself"), "{turn}: {error}");
            let (order, end) = run(Some((turn, End::Panic)));
            assert_eq!(order, TURNS[..turn]);
            assert_eq!(*end.unwrap_err().downcast::<&str>().unwrap(), "by itself");
        }
    }

    #[test]
    fn one_that_waits_for_what_another_holds_is_told_and_none_waits_for_ever() {
        let baton = Baton::new(vec![0, 1, 0, 1], Duration::from_millis(20));
        let (guard, held) = channel::<()>();
        let (guard, held) = (Mutex::new(Some(guard)), Mutex::new(held));
        let end = abreast(&baton, 0..2, |micro_batch| {
            let _guard = (micro_batch == 0).then(|| lock(&guard).take());
            if micro_batch == 1 {
                // Returns when the other micro-batch lets go of its guard.
                let _ = lock(&held).recv();
            }
            for _ in 0..2 {
                baton.await_turn()?;
                baton.end_turn();
            }
            Ok(())
        });
        let error = end.unwrap_err();
        assert!(matches!(error, Error::Stuck { micro_batch: 1, .. }), "{error}");
    }
}
