//! Every state machine of Orchestra, without a clock, a socket or a runtime.
//!
//! All share one shape: `handle(now, event)` advances on one event and returns what must be written down and what must
//! then be done; `deadline()` says when the driver must call again; `status()` is what people see. Time, randomness
//! and the world are parameters, so the same code runs under the engine and under the simulator.

pub mod autoscale;
mod batch;
mod environment;
pub mod health;
pub mod instance;
mod replacement;
mod restart;
pub mod rng;
pub mod rollout;
pub mod status;

pub use autoscale::Autoscaler;
pub use batch::{About, Batch, ConsultKey, Effect, HookKey, Leaf, PairKey, ProbeKey, ProbeTarget, Which};
pub use environment::{Environment, Event, FlagSwitch, FlagsStatus, Settings, TrafficMove};
