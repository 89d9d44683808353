//! Bytes and completion for ferrozero: budgets, leases, CUDA streams and a checked disk store.
//!
//! This crate moves bytes between tiers and says when they have arrived. It knows no tensors. A training step
//! of the engine is a schedule over the words below.
//!
//! | memory | who owns it | bounded by |
//! |---|---|---|
//! | [`Arena`]: one pinned mapping of host memory | whoever holds a [`Lease`] of it | a [`Budget`] |
//! | [`Store`]: files with two places for each piece of state | its directories' one process | the sizes of its extents |
//!
//! A lease moves into a transfer and comes back in its [`Completion`], also after an error, so nothing can
//! free or touch a buffer in flight:
//!
//! ```
//! use ferrozero_offload::*;
//!
//! # fn main() -> Result<(), Error> {
//! let budget = Budget::new(Tier::Host, 1 << 20);
//! let arena = Arena::new(&budget, 1 << 16)?;
//! let extent = ExtentSpec { name: "h.0/first_moment".into(), bytes: 10_000, kind: ExtentKind::State };
//! let options = StoreOptions { backend: BackendChoice::Memory, piece_bytes: 8192, ..StoreOptions::default()
//! }; let store = Store::create("unused".as_ref(), vec![extent], options)?; let extent =
//! store.extent("h.0/first_moment").expect("just made");
//!
//! let mut lease = arena.lease(store.piece_bytes_of(extent, 0)?)?;
//! lease.as_f32_mut().fill(0.5);
//! let (ticket, on_done) = Ticket::new();
//! store.write(extent, 0, lease, on_done);
//! let Completion { lease, result } = ticket.wait();
//! result?;
//! assert_eq!(store.commit(serde_json::json!({ "step": 1 }))?, 1);
//!
//! let (ticket, on_done) = Ticket::new();
//! store.read(extent, 0, lease, on_done);
//! assert!(ticket.wait().lease.as_f32().iter().all(|&value| value == 0.5));
//! # Ok(())
//! # }
//! ```
//!
//! Modules, from the bottom: `budget` and `arena` are memory, and with the feature `cuda` the module of that
//! name copies between it and a device; [`io`] is the trait of disk backends with its backends and wrappers;
//! `store` gives pieces, checksums and commits; [`memory`] counts what the rest of a process allocates.
//! [`Baton`] lets threads run one at a time, in an order that is known.

// `unsafe` is for memory that is mapped by hand and for system calls that std does not have, and nowhere
// else.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod arena;
mod baton;
mod budget;
mod clock;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod cuda;
mod error;
mod folder;
pub mod io;
#[allow(unsafe_code)]
pub mod memory;
mod notice;
mod store;

pub use arena::{Arena, Lease, PAGE_BYTES, padded_bytes};
pub use baton::{Baton, Stopped};
pub use budget::{Budget, Reservation, Tier};
pub use error::{Error, Whereabouts};
pub use folder::{Access, Folder};
pub use io::{Completion, Throttle, Ticket, report_file_size_limit};
pub use notice::Notice;
pub use store::{
    BackendChoice, Commit, Extent, ExtentId, ExtentKind, ExtentSpec, Store, StoreOptions, Traffic,
};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a panic elsewhere: every critical section of this crate leaves its data whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
