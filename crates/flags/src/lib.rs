//! Feature flags: evaluation, and the OpenFeature Remote Evaluation Protocol (OFREP 0.3) as pure functions.
//!
//! A [`FlagSet`](orchestra_model::flag::FlagSet) is [compiled](Compiled) once per version and evaluated many times:
//! [`Compiled::evaluate`] answers one flag for one [`Context`] in about a microsecond. [`ofrep::answer`] takes a request of
//! the protocol to its response; whoever owns the sockets calls it, so that flags are answered wherever the last set is,
//! control plane or not. [`bucket`] has the formula of splits.
//!
//! This crate opens no socket, reads no clock, draws no random number, and never panics on hostile requests.

pub mod bucket;
mod compiled;
mod condition;
mod context;
mod evaluation;
pub mod ofrep;

pub use compiled::Compiled;
pub use context::{Context, ContextError};
pub use evaluation::{ErrorCode, Evaluation, Failure, Reason};
