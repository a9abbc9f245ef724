//! Executes the leaf checks of health probes and decides when each is due.
//!
//! A [`Prober`] asks every [`Target`] at a fixed rate and delivers one [`Outcome`] per check. It keeps no verdict:
//! thresholds, composites, log lines, notifications and dependencies are decided by the health machine from these
//! outcomes. It never starts, stops or routes anything.
//!
//! - [`Prober`] is the handle, with [`Outcomes`] as its other end.
//! - `schedule` is the arithmetic of fixed rates and phases, without a clock.
//! - `check`, `http` and `grpc` ask one question each.
//! - [`hook`] and [`consult`] ask somebody else once: whether to go on, and for numbers;
//!   `outside` reaches who is named by a URL.

mod check;
pub mod consult;
mod grpc;
pub mod hook;
mod http;
mod lateness;
#[cfg(test)]
mod once;
mod outside;
pub mod pair;
mod prober;
mod schedule;
mod target;

pub use lateness::{Distribution, Lateness};
pub use prober::{Limits, Outcomes, Prober};
pub use target::{HttpCheck, Leaf, Outcome, ProbeId, Target};
