//! The API of the control plane: its types, its route table, its OpenAPI document and a client.
//!
//! REST with JSON over a Unix socket, or TCP with a token. [`ROUTES`] is the one table from which the OpenAPI document,
//! the server's coverage test and the reference come. The crate never serves a request itself (that is `server`) and
//! never prints (that is `cli`).

mod address;
mod client;
mod environment;
mod flags;
mod observe;
mod openapi;
mod payload;
mod preview;
mod query;
mod request;
mod rollout;
mod routes;
mod run;
#[cfg(feature = "scripted")]
pub mod scripted;
mod server;
mod sse;
mod stream;
mod tls;
mod traffic;
mod transport;

pub use address::{Endpoint, ParseEndpointError, ShortPath, socket_path};
pub use client::{Client, ClientError};
pub use environment::{
    Address, CheckState, Ejected, EnvironmentHealth, EnvironmentStatus, EnvironmentSummary, HealthStatus, InFlight,
    InstancePhase, InstanceStatus, JobState, JobStatus, Queue, ServiceState, ServiceStatus, VolumeState, VolumeStatus,
    Waiting,
};
pub use flags::{FlagState, FlagStatus, Flags, SwitchFlag, SwitchTo};
pub use observe::{LogLine, LogStream, ReleaseSummary};
pub use openapi::document;
pub use payload::Payload;
pub use preview::{Cost, PreviewRequest, PreviewStatus, UsageNow};
pub use query::{EventsQuery, LogsQuery, NameList, PageQuery, ReleasesQuery, ValidateQuery};
pub use request::{
    Apply, Down, PlanRequest, PlanResponse, ResourceCount, Restart, Rollback, Scale, Source, StartRun, Up,
    ValidEnvironment, ValidateResponse,
};
pub use rollout::{Mirrored, MoveRollout, RolloutStatus};
pub use routes::{BodyKind, Method, ROUTES, RouteSpec, SchemaOf};
pub use run::{Progress, ProgressState, RunEvent, RunSummary, StartedRun};
pub use server::{CheckOutcome, DoctorCheck, DoctorReport, Empty, ErrorBody, Page, Version};
pub use sse::{Frame, SseParser};
pub use stream::{EventStream, LogLineStream, RunEventStream};
pub use tls::{AuthorityStatus, CertificateStatus, TlsStatus};
pub use traffic::{MoveTraffic, TrafficAction, TrafficStatus};
pub use transport::{Body, BoxFuture, SocketTransport, Transport, TransportError};

/// Version of this API: the number in `/v1`.
pub const API_VERSION: u32 = 1;
/// Header with which a client names a request that starts a run, so that asking again does not start a second one: up to
/// 64 letters, digits, `-` and `_`, made at random by the client.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Header with the last event that a client has seen, as server-sent events have it.
pub const LAST_EVENT_ID: &str = "last-event-id";
/// Media type of newline-delimited JSON.
pub const NDJSON: &str = "application/x-ndjson";
/// Media type of server-sent events.
pub const EVENT_STREAM: &str = "text/event-stream";
