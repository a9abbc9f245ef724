//! One request and its response, from the client to an instance and back.
//!
//! ```text
//!   request ──> prepare ──> acquire ──────────> send ──> response ──> body ──> end
//!                 │ 400       │ waits: hold       │        │            │ cut: in the protocol's own way
//!                 v           │ 503 afterwards    │        v            v
//!               refuse        └──<── nothing was ─┘      upgrade     counts end
//!                                    sent or done        (tunnel.rs)
//! ```
//!
//! What may be sent again: everything of which it is certain that no instance did anything (no connection, nothing
//! written, `REFUSED_STREAM`, `GOAWAY`), and idempotent requests without a body whose reused connection ended before a
//! byte of the response. Everything else fails with 502 once; a `POST` never arrives twice.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::{
    flight::{InFlight, Kind},
    metrics::{ErrorKind, RetryKind, Series},
    state::{Arrival, Proxy},
    table::RoutePlan,
    tunnel,
    upstream::{Lease, SendError, Upstream},
};

pub(crate) mod body;
mod failure;
mod headers;
pub(crate) mod replay;
mod sse;

use body::{Active, ClientConnection, InstanceBody, ResponseBody};
use failure::Failure;
use headers::Head;
use replay::Replay;

/// Times that a request is sent on after it was certainly not processed, not counting connections that failed.
const RESENDS: u32 = 3;
/// Between two looks at endpoints that all refuse connections, if the table does not change before.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// An endpoint, entered.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) flight: InFlight,
}

/// Finds endpoints for one request, over all its attempts.
pub(crate) struct Seeker<'a> {
    proxy: &'a Proxy,
    arrival: &'a Arrival,
    since: Instant,
    kind: Kind,
    tried: Vec<Arc<Upstream>>,
    /// The last failed connection, for the message.
    trouble: Option<String>,
    waiting: Option<Waiting>,
    pause: Duration,
}

/// A place among those who wait; given back when dropped.
struct Waiting {
    route: Arc<RoutePlan>,
    holding: *const (),
}

impl<'a> Seeker<'a> {
    pub(crate) fn new(proxy: &'a Proxy, arrival: &'a Arrival, kind: Kind) -> Self {
        let since = Instant::now();
        Self { proxy, arrival, since, kind, tried: Vec::new(), trouble: None, waiting: None, pause: RECONNECT.0 }
    }
}
