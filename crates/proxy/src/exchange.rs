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

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use orchestra_model::desired::Protocol;
use orchestra_task::TaskKind;
use tokio::time::Instant;

use crate::{
    flight::Kind,
    metrics::{ErrorKind, Gauge, RetryKind, Series},
    mirror,
    seek::{Seeker, Ticket},
    state::{Arrival, Proxy},
    tunnel::{self, Tunnel},
    upstream::{Lease, SendError},
    watch::Evidence,
};

pub(crate) mod body;
pub(crate) mod failure;
pub(crate) mod headers;
mod inspect;
pub(crate) mod replay;
mod sse;
mod tokens;

use body::{Active, ClientConnection, InstanceBody, ResponseBody};
use failure::Failure;
use headers::Head;
use inspect::Inspection;
use replay::Replay;

/// Times that a request is sent on after it was certainly not processed, not counting connections that failed.
const RESENDS: u32 = 3;

/// A failure and whose numbers it goes into.
struct Failed(Failure, Option<Arc<Series>>);

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self(failure, None)
    }
}

/// Answers a request of a client.
pub(crate) async fn answer(
    proxy: &Arc<Proxy>,
    arrival: &Arrival,
    connection: &Arc<ClientConnection>,
    mut request: Request<Incoming>,
) -> Response<ResponseBody> {
    let active = Active::new(connection);
    let since = Instant::now();
    let method = request.method().clone();
    let grpc = headers::is_grpc(request.headers());
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let result = match headers::prepare(&mut request, arrival) {
        Ok(head) => forward(proxy, arrival, head, Replay::new(request.into_body()), upgrade).await,
        Err(reason) => Err(Failure::new(ErrorKind::BadRequest, reason.message()).into()),
    };
    let (mut response, series) = match result {
        Ok((response, series)) => (response, Some(series)),
        Err(Failed(failure, series)) => {
            let plan = proxy.table.load().routes.get(&arrival.socket).cloned();
            let series = series.or_else(|| plan.as_ref().map(|plan| Arc::clone(&plan.series)));
            if let Some(series) = &series {
                series.error(failure.kind);
            }
            let grpc = grpc || plan.as_ref().is_some_and(|plan| plan.protocol == Protocol::Grpc);
            let mut response = failure.response(plan.as_ref().map(|plan| &plan.id), grpc);
            if failure.kind == ErrorKind::BadRequest && connection.h1 {
                // Who frames one request oddly is not trusted with the boundaries of the next one.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            (response, series)
        }
    };
    if let Some(series) = series {
        series.responded(&method, response.status(), since.elapsed());
    }
    response.body_mut().hold(active);
    response
}

/// Sends a request to instances until one answers.
async fn forward(
    proxy: &Arc<Proxy>,
    arrival: &Arrival,
    head: Head,
    body: Replay,
    upgrade: Option<OnUpgrade>,
) -> Result<(Response<ResponseBody>, Arc<Series>), Failed> {
    let kind = if head.is_grpc() { Kind::Stream } else { Kind::Request };
    let safe = head.is_idempotent() && body.is_empty();
    let mut seeker = Seeker::new(proxy, arrival, kind, Some(&head));
    let mut resends = 0;
    let mut mirrored = None;
    loop {
        let ticket = seeker.acquire().await?;
        let series = Arc::clone(ticket.series());
        let gauge = ticket.gauge();
        let evidence = ticket.evidence().asked(|| (body.upload(), head.expects_stream()));
        if let Some(mirroring) = &ticket.plan.mirror
            && mirrored.is_none()
        {
            mirrored = Some(mirroring.wants(&ticket.plan, &head, ticket.backend().arm));
            if mirrored == Some(true) {
                body.keep_copy();
            }
        }
        let request = head.request(ticket.upstream.is_h2(), body.attempt(&series));
        let sent = tokio::select! {
            biased;
            sent = ticket.upstream.send(request, safe) => sent,
            // Dropping the attempt closes its connection or resets its stream.
            () = ticket.flight.cut().cancelled() => {
                let failure = Failure::new(ErrorKind::Cut, "the instance was stopped before it answered");
                evidence.cut();
                return Err(Failed(failure, Some(series)));
            }
        };
        let (retry, text) = match sent {
            Ok((response, lease)) => {
                body.commit();
                let original = (mirrored == Some(true))
                    .then(|| mirror::send(proxy, &ticket.plan, &head, &body, response.status()))
                    .flatten();
                let inspected = (evidence, original);
                return respond(proxy, &head, ticket, gauge, response, lease, upgrade, inspected).map(|r| (r, series));
            }
            Err(SendError::Connect(error)) => {
                series.retry(RetryKind::Connect);
                evidence.forget();
                seeker.unreachable(&ticket, &error);
                continue;
            }
            Err(SendError::Untouched(kind, text)) => (body.is_whole().then_some(kind), text),
            Err(SendError::Silent(text)) => (safe.then_some(RetryKind::Stale), text),
            Err(SendError::Failed(text)) => (None, text),
        };
        match retry {
            Some(kind) if resends < RESENDS => {
                resends += 1;
                series.retry(kind);
                evidence.forget();
            }
            _ if body.is_broken() => {
                let failure = Failure::new(ErrorKind::Client, "the request's body ended early");
                return Err(Failed(failure, Some(series)));
            }
            _ => {
                evidence.broken();
                let message = format!("instance {} gave no answer: {text}", ticket.upstream.flight.key().instance);
                return Err(Failed(Failure::new(ErrorKind::Upstream, message), Some(series)));
            }
        }
    }
}

/// Turns an instance's response into the client's.
#[expect(clippy::too_many_arguments, reason = "everything that one request holds changes hands here")]
fn respond(
    proxy: &Proxy,
    head: &Head,
    ticket: Ticket,
    mut gauge: Gauge,
    mut response: Response<Incoming>,
    lease: Lease,
    upgrade: Option<OnUpgrade>,
    (mut evidence, original): (Evidence, Option<mirror::Original>),
) -> Result<Response<ResponseBody>, Failed> {
    let series = Arc::clone(ticket.series());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let (Some(client), Some(_)) = (upgrade, &head.upgrade) else {
            let failure = Failure::new(ErrorKind::Upstream, "the instance switched protocols without being asked");
            evidence.broken();
            return Err(Failed(failure, Some(series)));
        };
        ticket.mark(response.headers_mut());
        evidence.answered(response.status(), response.headers(), false, false);
        evidence.complete();
        let mut flight = ticket.flight;
        flight.become_stream();
        gauge.become_stream();
        let instance = hyper::upgrade::on(&mut response);
        let protocol = response.headers_mut().remove(header::UPGRADE);
        let websocket = protocol.as_ref().is_some_and(|p| p.as_bytes().eq_ignore_ascii_case(b"websocket"));
        let tunnel = Tunnel { flight, series, gauge, lease: Some(lease) };
        proxy.tree.start(TaskKind::Connection, "upgraded connection", async move {
            // Either side may be gone before it begins; then the other one is closed.
            if let (Ok(client), Ok(instance)) = tokio::join!(client, instance) {
                tunnel::upgraded(tunnel, client, instance, websocket).await;
            }
        });
        let (mut parts, _) = response.into_parts();
        headers::strip(&mut parts.headers);
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.extend(protocol.map(|protocol| (header::UPGRADE, protocol)));
        return Ok(Response::from_parts(parts, ResponseBody::full(bytes::Bytes::new())));
    }
    let (mut parts, incoming) = response.into_parts();
    headers::strip(&mut parts.headers);
    ticket.mark(&mut parts.headers);
    let inspection = Inspection::new(evidence, ticket.plan.meter.as_ref(), original, &parts);
    let mut flight = ticket.flight;
    // What the instance speaks is its own affair; hyper adapts the answer to the client's version.
    parts.version = Version::HTTP_11;
    let events = headers::is_event_stream(&parts.headers);
    if events || headers::is_grpc(&parts.headers) {
        flight.become_stream();
        gauge.become_stream();
    }
    let events = events && is_extensible(&parts.headers);
    let body = InstanceBody::new(incoming, lease, flight, gauge, series, events, inspection);
    Ok(Response::from_parts(parts, ResponseBody::Instance(Box::new(body))))
}

/// Whether something can be added to a body: its length was not announced and it is not compressed.
fn is_extensible(headers: &HeaderMap) -> bool {
    let plain = headers.get(header::CONTENT_ENCODING).is_none_or(|v| v.as_bytes().eq_ignore_ascii_case(b"identity"));
    plain && !headers.contains_key(header::CONTENT_LENGTH)
}
