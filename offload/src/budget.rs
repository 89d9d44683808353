//! What a tier may use, and who has drawn how much of it.

use std::{fmt, sync::PoisonError};

// The same code under the real and the modelled locks: see tests/loom.rs.
#[cfg(loom)]
use loom::sync::{Arc, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::Error;

/// Where bytes can live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The memory of the device that computes.
    Device,
    /// The memory of the host; pinned when there is a GPU.
    Host,
    /// Files.
    Disk,
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Disk => "disk",
        })
    }
}

/// The bytes that a tier may use. Clones draw from the same budget.
#[derive(Clone, Debug)]
pub struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tier: Tier,
    limit_bytes: u64,
    usage: Mutex<Usage>,
}

#[derive(Debug, Default)]
struct Usage {
    used_bytes: u64,
    peak_bytes: u64,
}

impl Shared {
    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Budget {
    /// A budget of `limit_bytes` of which nothing is used.
    pub fn new(tier: Tier, limit_bytes: u64) -> Self {
        let usage = Mutex::new(Usage::default());
        Self { shared: Arc::new(Shared { tier, limit_bytes, usage }) }
    }

    /// Draws `bytes`, which come back when the reservation is dropped.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when fewer than `bytes` are left.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, Error> {
        let mut usage = self.shared.usage();
        match usage.used_bytes.checked_add(bytes) {
            Some(used_bytes) if used_bytes <= self.shared.limit_bytes => {
                usage.used_bytes = used_bytes;
                usage.peak_bytes = usage.peak_bytes.max(used_bytes);
                Ok(Reservation { budget: self.clone(), bytes })
            }
            _ => Err(Error::OverBudget {
                tier: self.shared.tier,
                requested_bytes: bytes,
                used_bytes: usage.used_bytes,
                limit_bytes: self.shared.limit_bytes,
            }),
        }
    }

    /// The tier that this budget is of.
    pub fn tier(&self) -> Tier {
        self.shared.tier
    }

    /// Bytes reserved now.
    pub fn used_bytes(&self) -> u64 {
        self.shared.usage().used_bytes
    }

    /// The most bytes that were ever reserved at once.
    pub fn peak_bytes(&self) -> u64 {
        self.shared.usage().peak_bytes
    }

    /// Bytes that may be reserved at once.
    pub fn limit_bytes(&self) -> u64 {
        self.shared.limit_bytes
    }
}

/// Bytes drawn from a [`Budget`]; dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its bytes back"]
pub struct Reservation {
    budget: Budget,
    bytes: u64,
}

impl Reservation {
    /// Bytes that this reservation holds.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.shared.usage().used_bytes -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_names_what_is_used_and_takes_nothing() {
        let budget = Budget::new(Tier::Host, 100);
        let held = budget.reserve(60).unwrap();
        let refused = budget.reserve(41).unwrap_err();
        assert!(matches!(
            refused,
            Error::OverBudget { tier: Tier::Host, requested_bytes: 41, used_bytes: 60, limit_bytes: 100 }
        ));
        assert!(budget.reserve(u64::MAX).is_err(), "a sum that overflows is over budget");
        assert_eq!(budget.used_bytes(), 60);
        drop(held);
        assert_eq!((budget.used_bytes(), budget.peak_bytes()), (0, 60));
    }

    #[test]
    fn many_threads_never_pass_the_limit_and_give_everything_back() {
        let budget = Budget::new(Tier::Device, 1000);
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let budget = budget.clone();
                scope.spawn(move || {
                    for round in 0..2000 {
                        if let Ok(reservation) = budget.reserve((thread * 37 + round) % 400) {
                            assert!(budget.used_bytes() <= 1000);
                            drop(reservation);
                        }
                    }
                });
            }
        });
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.peak_bytes() <= 1000 && budget.peak_bytes() > 0);
    }
}
