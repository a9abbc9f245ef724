//! The ports to the worlds that Orchestra runs things in: what the engine asks of a provider and of a data plane.
//!
//! An adapter obeys and decides nothing: which instance, which port, which order comes from the plan and the machines.
//! This crate never talks to a world itself; it holds the traits, their errors, a fake, and the conformance suite that
//! every adapter must pass.

#[cfg(feature = "conformance")]
pub mod conformance;
mod data_plane;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod port;

pub use data_plane::{Applied, DataPlane, DataPlaneError, DataPlaneEvent};
pub use error::{Error, Retry};
pub use port::{BoxFuture, LogLine, LogQuery, LogStream, Provider};
