//! Is the canary worse than the stable release? Statistics that may be looked at any time.
//!
//! [`Analysis`] is fed with what the data plane saw, one [`Tick`] after another, and asked for a [`Verdict`]. The test is
//! sequential: looking often costs nothing, and the chance that a good release is ever failed stays below the stated
//! alpha, at 3 requests a minute as at 1,000 a second. [`Evidence`] is the compact form that is stored with a release and
//! shown to people. [`Measurements`] and [`Condition`] judge numbers that come from elsewhere, such as a Prometheus
//! server.
//!
//! Pure arithmetic: no I/O, no clock, no randomness. Time is what the ticks say they cover. Every state is serialisable
//! and finite whatever comes in, so that it survives a crash of the server in the journal.

pub mod advice;
pub mod analysis;
pub mod clients;
pub mod condition;
pub mod latency;
pub mod measurement;
pub mod observation;
pub mod settings;
mod usual;
pub mod verdict;
pub mod wealth;

pub use advice::Advice;
pub use analysis::Analysis;
pub use condition::{Condition, ConditionError};
pub use latency::{Bounds, Freeze, Histogram, frozen_bound};
pub use measurement::{Limits, Measured, Measurements};
pub use observation::{Arm, Bad, Cell, Counter, Kind, Pair, Tick};
pub use settings::{Policy, Settings, Unit, WarmUp};
pub use verdict::{Evidence, Outcome, Verdict};
