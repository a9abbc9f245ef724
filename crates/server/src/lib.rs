//! The control plane's face: REST over a Unix socket or TCP, and the same handlers within one process.
//!
//! Handlers translate and nothing more: from the API's types to the engine's requests, and from its views to the API's
//! answers. Without a running server the same router answers from what is recorded ([`Backend::Recorded`]), so that
//! `plan` and `validate` need no server and write nothing.

mod answer;
mod auth;
mod backend;
mod convert;
mod doctor;
mod flags;
mod follow;
mod handlers;
mod in_process;
mod metrics;
mod serve;
mod tls;
mod validate;

pub use backend::{Backend, Facts};
pub use handlers::router;
pub use in_process::InProcess;
pub use serve::{ServeError, listen_unix, serve_tcp, serve_unix};
