//! The time that bytes take on something of limited bandwidth.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Knows when the next byte may start, at a given bandwidth.
#[derive(Debug)]
pub(crate) struct Clock {
    bytes_per_s: f64,
    free_at: Option<Instant>,
}

impl Clock {
    pub(crate) fn new(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, free_at: None }
    }

    /// Sleeps until `bytes` more have had their time.
    pub(crate) fn wait_for(&mut self, bytes: usize) {
        let now = Instant::now();
        let done_at = self.done_at(now, bytes);
        thread::sleep(done_at.saturating_duration_since(now));
    }

    /// When `bytes` that arrive at `now` are through. A bandwidth that is no positive number means no limit.
    fn done_at(&mut self, now: Instant, bytes: usize) -> Instant {
        let start = self.free_at.map_or(now, |free_at| free_at.max(now));
        let taken = Duration::try_from_secs_f64(bytes as f64 / self.bytes_per_s).unwrap_or_default();
        *self.free_at.insert(start + taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_queue_behind_each_other_and_idle_time_is_not_saved_up() {
        let mut clock = Clock::new(1000.0);
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(clock.done_at(start, 100), after(100));
        assert_eq!(clock.done_at(start, 50), after(150), "the second waits for the first");
        assert_eq!(clock.done_at(after(500), 10), after(510), "idle time does not make it faster");
        assert_eq!(Clock::new(f64::INFINITY).done_at(start, 1 << 40), start);
    }
}
