//! Finds accesses to the same memory on two streams without an order between them.
//!
//! Each stream counts its operations, and each operation knows by a vector clock how much of every stream was
//! done for certain before it: by its own stream, by events that were waited for, and by what the host had
//! waited for (L. Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978; C. Fidge
//! and F. Mattern, 1988). What only happened to be done is not in it, so a missing wait is seen whatever the
//! order was.

use std::sync::Arc;

use crate::memory::Touched;

/// How many operations of each stream are done, by the stream's number.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Clock(Vec<u64>);

impl Clock {
    /// Operations of a stream that are done.
    pub fn of(&self, stream: usize) -> u64 {
        self.0.get(stream).copied().unwrap_or(0)
    }

    /// Sets how many operations of a stream are done.
    pub fn set(&mut self, stream: usize, done: u64) {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] = done;
    }

    /// Adds what another one knows to be done.
    pub fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (own, other) in self.0.iter_mut().zip(&other.0) {
            *own = (*own).max(*other);
        }
    }
}

/// An operation of a stream.
pub struct Doing<'a> {
    /// Number of the stream.
    pub stream: usize,
    /// Its number in the stream.
    pub number: u64,
    /// What is done before it for certain.
    pub before: &'a Clock,
    /// What it is, for a person.
    pub what: &'a Arc<str>,
}

struct Entry {
    stream: usize,
    number: u64,
    range: (usize, usize),
    is_write: bool,
    what: Arc<str>,
}

/// Accesses to an allocation that a later one may not be ordered after.
#[derive(Default)]
pub struct History {
    entries: Vec<Entry>,
}

fn verb(is_write: bool) -> &'static str {
    if is_write { "writes" } else { "reads" }
}

impl History {
    /// Adds the accesses of an operation. Answers a sentence for each earlier one that is not ordered before
    /// it.
    pub fn add(&mut self, doing: &Doing<'_>, touched: &Touched) -> Vec<String> {
        let mut races = vec![];
        let accesses = [(false, touched.read), (true, touched.written)];
        for (is_write, range) in accesses.into_iter().filter(|(_, (start, end))| start < end) {
            for entry in &self.entries {
                let overlap = entry.range.0 < range.1 && range.0 < entry.range.1;
                let other = entry.stream != doing.stream && doing.before.of(entry.stream) < entry.number;
                if overlap && other && (is_write || entry.is_write) {
                    races.push(format!(
                        "{} {} bytes {} to {} of allocation {} on stream {}, which is not ordered after: \
                         {} {} bytes {} to {} on stream {}",
                        doing.what,
                        verb(is_write),
                        range.0,
                        range.1,
                        touched.allocation,
                        doing.stream,
                        entry.what,
                        verb(entry.is_write),
                        entry.range.0,
                        entry.range.1,
                        entry.stream,
                    ));
                }
            }
        }
        for (is_write, range) in accesses.into_iter().filter(|(_, (start, end))| start < end) {
            self.remember(doing, range, is_write);
        }
        races
    }

    /// Forgets accesses that any later conflict has with this one, too.
    fn remember(&mut self, doing: &Doing<'_>, range: (usize, usize), is_write: bool) {
        self.entries.retain(|entry| {
            let covered = range.0 <= entry.range.0 && entry.range.1 <= range.1;
            let is_before = doing.before.of(entry.stream) >= entry.number;
            let same_reader = !entry.is_write && entry.stream == doing.stream;
            !(covered && if is_write { is_before } else { same_reader })
        });
        self.entries.push(Entry {
            stream: doing.stream,
            number: doing.number,
            range,
            is_write,
            what: doing.what.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn races(before: &[u64], first_writes: bool, second_writes: bool, start: usize) -> usize {
        let what: Arc<str> = "kernel".into();
        let none = (usize::MAX, 0);
        let touched = |range, is_write: bool| Touched {
            allocation: 0,
            read: if is_write { none } else { range },
            written: if is_write { range } else { none },
        };
        let mut history = History::default();
        let first = Clock(vec![1]);
        let doing = Doing { stream: 0, number: 1, before: &first, what: &what };
        assert!(history.add(&doing, &touched((0, 8), first_writes)).is_empty());
        let before = Clock(before.to_vec());
        let doing = Doing { stream: 1, number: 1, before: &before, what: &what };
        history.add(&doing, &touched((start, start + 8), second_writes)).len()
    }

    #[test]
    fn a_race_needs_a_write_an_overlap_and_no_order() {
        assert_eq!(races(&[0, 1], true, true, 0), 1);
        assert_eq!(races(&[0, 1], true, false, 7), 1);
        assert_eq!(races(&[0, 1], false, true, 0), 1);
        assert_eq!(races(&[0, 1], false, false, 0), 0);
        assert_eq!(races(&[0, 1], true, true, 8), 0);
        assert_eq!(races(&[1, 1], true, true, 0), 0);
    }
}
