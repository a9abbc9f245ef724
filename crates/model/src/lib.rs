//! The nouns of Orchestra that cross a port, and nothing else.
//!
//! Ids, quantities, the desired state, plans, launches, routes, records and diagnostics live here because more than
//! one layer speaks of them. This crate does no I/O, reads no clock and knows no async runtime; behaviour belongs to
//! the crates above it.

pub mod autoscale;
pub mod consult;
pub mod desired;
pub mod diagnostic;
pub mod event;
pub mod flag;
pub mod id;
pub mod launch;
pub mod network;
pub mod plan;
pub mod preview;
pub mod quantity;
pub mod record;
pub mod rollout;
pub mod route;
pub mod secret;
pub mod share;
pub mod text;
pub mod time;
pub mod traffic;

pub use desired::{Desired, Resource};
pub use diagnostic::{Code, Diagnostic, Severity};
pub use event::{Event, EventKind};
pub use id::{Digest, EnvironmentId, Generation, InstanceId, Name, ReleaseNumber, ResourceId, ResourceKind, RunId};
pub use plan::Plan;
pub use text::Text;
pub use time::Now;
