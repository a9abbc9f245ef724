//! State and journal: what Orchestra knows and must not forget.
//!
//! One directory, one writer. [`Store::open`] takes the directory's lock, which the kernel frees when its owner dies.
//! [`Store::commit`] writes a list of [`Change`](orchestra_model::record::Change)s as a whole or not at all, and
//! resolves once they are on the disk; commits that wait at the same time share one fsync. Invariants are checked inside
//! the transaction, before it becomes durable, so a violating commit leaves nothing behind.
//!
//! [`Reader`] answers questions, also without the lock ([`open_read_only`]), beside a running server, after a killed one,
//! and without writing a byte.
//!
//! This crate never decides, never repairs by throwing away, and never reads a clock: the caller passes one.

mod error;
mod invariant;
mod lock;
mod read_only;
mod reader;
mod retention;
mod row;
mod schema;
mod store;
mod write;
mod writer;

pub use error::{CommitError, OpenError, ReadError, Violation};
pub use reader::{EventFilter, Journaled, Reader, ReleaseSummary, RunSummary};
pub use store::{Committed, Store};

pub use read_only::open_read_only;
