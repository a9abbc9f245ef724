//! The planner: from what is desired, what was last applied and what was observed, to an ordered list of steps.
//!
//! Pure: equal inputs give equal plans, byte for byte. It never acts, never waits, reads no clock and no file. Apply walks
//! exactly the graph that [`plan`] emits, so whatever must be decided is decided here: what is done to each resource, why,
//! in which order, and what each step waits for.
//!
//! ```text
//! desired ──────┐ changes
//!               ├──────────> diff ──> graph ──> Plan ──> render
//! last applied ─┤                                 └────> save, load, check_saved, rebase
//!               ├──────────> repairs
//! observed ─────┘
//! ```

mod diff;
mod error;
mod flags;
mod graph;
mod planner;
mod render;
mod saved;

pub use error::PlanError;
pub use planner::{Current, Observation, Options, plan, plan_owned};
pub use render::{Style, render};
pub use saved::{check_saved, check_saved_flags, load, rebase, save};
