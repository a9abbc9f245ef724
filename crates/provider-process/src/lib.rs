//! Runs instances as processes of this machine, each under a shim of its own.
//!
//! [`ProcessProvider`] lives in the server. For each launch it makes one [`shim`] (forked from one that is kept waiting,
//! the zygote, or else executed), which is the parent of the user's program: it owns the program's control group, its
//! logs until the last byte, and its exit status, and it outlives the server. Server and shim share a launch folder
//! (`<root>/<stack>/<environment>/<instance>/<attempt>/`):
//!
//! | file | what |
//! |---|---|
//! | `lock` | held by `flock` from before anything else exists until the shim is gone: who holds it may act |
//! | `launch.json` | what to run (0600); written once |
//! | `status.json` | what became of it; replaced atomically. No `status.json` means that nothing was ever run |
//! | `control` | Unix socket of the shim; JSON lines |
//! | `stdout`, `stderr` | FIFOs that the program itself holds open in both directions, so that it outlives its shim |
//!
//! Values of secrets are in none of these: a shim hears them on its connection ([`secrets`]).
//!
//! This crate decides nothing: not what runs, not when it is restarted, not how long it may take to stop.

mod cgroup;
mod clock;
mod folder;
mod log_format;
mod provider;
mod secrets;
pub mod shim;
mod sys;
mod wire;

pub use cgroup::{Cgroups, Enforced};
pub use provider::{LogRetention, Options, ProcessProvider};
