//! The control plane as a library: plans, runs, and keeps running what was deployed.
//!
//! It is the only place that composes ports: store, provider, data plane and prober. What to do is decided by the
//! machines; this crate carries time, events and effects between them and the world, and makes sure that an intent is
//! on disk before its effect begins. It knows no concrete provider, no terminal and no socket of its own.

mod clock;
mod control_plane;
mod effects;
mod environment_task;
mod error;
mod planning;
mod port_pool;
mod previews;
mod probe_hub;
mod route_hub;
mod secrets;
mod served;
mod view;

pub use clock::Clock;
pub use control_plane::{ControlPlane, Options, RunRequest, StartedRun};
pub use error::EngineError;
pub use orchestra_machine::{FlagSwitch, FlagsStatus, TrafficMove};
pub use orchestra_spec::{IMPLICIT_ENVIRONMENT, Outline, PreviewContext};
pub use planning::{LoadedStack, StackSource, load, outline, plan_down, plan_stack};
pub use previews::{PreviewWish, UsageNow, find_preview};
pub use route_hub::ShownCertificate;
pub use secrets::settle_stack;
pub use view::{Shown, View};
