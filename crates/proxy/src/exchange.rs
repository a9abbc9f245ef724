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
//! written, `REFUSED_STREAM`, `GOAWAY`), and idempotent requests whose body is still whole and whose connection ended
//! before a byte of the response. Everything else fails with 502 once; a `POST` never arrives twice.
//!
//! What a connection did that was closed already is no retry: it is made good [`RESENDS`] times for free. What an
//! instance refused or left unanswered is one: it counts against the attempts and the budget of the route, and goes to
//! another instance if the release has one.

use std::sync::{Arc, atomic::Ordering};

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use orchestra_model::{desired::Protocol, quantity::Timespan};
use orchestra_task::TaskKind;
use tokio::time::Instant;

use crate::{
    clock,
    flight::Kind,
    metrics::{ErrorKind, Gauge, RetryKind, Series},
    mirror,
    seek::{Seeker, Ticket},
    state::{Arrival, Proxy},
    table::RoutePlan,
    tunnel::{self, Tunnel},
    upstream::{self, Lease, SendError},
    watch::{Evidence, blames_server},
};

pub(crate) mod body;
pub(crate) mod failure;
pub(crate) mod headers;
mod inspect;
pub(crate) mod interim;
mod leash;
pub(crate) mod replay;
pub(crate) mod source;
mod sse;
mod tokens;

use body::{Active, ClientConnection, InstanceBody, Passage, Patience, ResponseBody};
use failure::Failure;
use headers::{Head, Unacceptable};
use inspect::Inspection;
use interim::Interim;
use replay::{Fault, Replay};
use source::Source;

/// Times that a request is sent on after it was certainly not processed, not counting connections that failed.
const RESENDS: u32 = 3;

/// A failure and whose numbers it goes into.
struct Failed(Failure, Option<Arc<Series>>);

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self(failure, None)
    }
}

/// Answers a request of a client, of `stream` if the connection has several.
pub(crate) async fn answer(
    proxy: &Arc<Proxy>,
    arrival: &Arrival,
    connection: &Arc<ClientConnection>,
    stream: u32,
    mut request: Request<Source>,
) -> Response<ResponseBody> {
    let mut active = Active::new(connection, &request);
    let since = Instant::now();
    let method = request.method().clone();
    let grpc = headers::is_grpc(request.headers());
    if request.version() == Version::HTTP_10 {
        connection.old.store(true, Ordering::Relaxed);
    }
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let interim = Interim::of(&request, connection, stream);
    // Asked only where a client says something of itself.
    let trusts = |peer| {
        let table = proxy.table.load();
        table.routes.get(&arrival.socket).is_some_and(|plan| plan.rules.trusts(peer))
    };
    let result = match headers::prepare(&mut request, arrival, trusts) {
        Ok(head) => {
            let body = Replay::new(request.into_body());
            active.carry(body.upload());
            let mut result = forward(proxy, arrival, head, &body, upgrade, interim).await;
            match &mut result {
                // hyper takes trailers whose lines end with LF alone to be longer than others do: what comes behind them
                // may be a part of them, or a request that its sender takes for one.
                Ok((response, _)) if connection.h1 && body.may_trail() => {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Err(_) if connection.h1 => body.linger(&proxy.tree),
                _ => {}
            }
            result
        }
        Err(reason) => {
            let long = reason == Unacceptable::TooLong;
            let kind = if long { ErrorKind::TargetTooLong } else { ErrorKind::BadRequest };
            Err(Failure::new(kind, reason.message()).into())
        }
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
            if failure.ends_connection() && connection.h1 {
                // Who frames one request oddly is not trusted with the boundaries of the next one, and what is left of a
                // body that is not read has no end.
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
    body: &Replay,
    upgrade: Option<OnUpgrade>,
    mut interim: Interim<'_>,
) -> Result<(Response<ResponseBody>, Arc<Series>), Failed> {
    let kind = if head.is_grpc() { Kind::Stream } else { Kind::Request };
    let safe = head.is_idempotent() && body.is_empty();
    let mut seeker = Seeker::new(proxy, arrival, kind, Some(&head));
    let plan = seeker.plan()?;
    admit(&plan, &seeker, body)?;
    if kind == Kind::Stream {
        body.stream();
    }
    match plan.rules.buffer {
        Some(limit) if kind == Kind::Request && head.upgrade.is_none() && !body.is_empty() => {
            body.gather(limit, &proxy.memory).await;
            if let Some(fault) = body.fault() {
                return Err(refuse(fault, &plan).into());
            }
        }
        _ => seeker.begin(plan),
    }
    let (mut resends, mut retries) = (0, 0);
    // A request is one observation: of its first try that an instance left unanswered, whatever comes of the others.
    let mut judged = false;
    let mut mirrored = None;
    loop {
        let ticket = seeker.acquire().await?;
        let series = Arc::clone(ticket.series());
        let gauge = ticket.gauge();
        let evidence =
            if judged { Evidence::none() } else { ticket.evidence() }.asked(|| (body.upload(), head.expects_stream()));
        if let Some(mirroring) = &ticket.plan.mirror
            && mirrored.is_none()
        {
            mirrored = Some(mirroring.wants(&ticket.plan, &head, ticket.backend().arm));
            if mirrored == Some(true) {
                body.keep_copy();
            }
        }
        let attempt = body.attempt(&series);
        let patience = match (ticket.rules().first_byte, ticket.rules().response) {
            // Of a stream nobody knows how long it takes.
            (first_byte, Some(_)) if kind == Kind::Stream || head.expects_stream() => first_byte,
            (first_byte, response) => first_byte.into_iter().chain(response).min(),
        };
        let late = ticket.deadline(patience).map(|at| Box::pin(tokio::time::sleep_until(at)));
        let sent = tokio::select! {
            biased;
            // Once fooled by a connection, the next one is looked at closely.
            sent = ticket.upstream.send(&head, attempt, safe && resends == 0, Some(&mut interim)) => sent,
            () = or_never(late) => {
                evidence.broken();
                if body.is_sent() {
                    ticket.failed();
                }
                let instance = &ticket.upstream.flight.key().instance;
                let message = format!("instance {instance} did not answer within {}", span(patience));
                return Err(Failed(Failure::new(ErrorKind::Timeout, message), Some(series)));
            }
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
                    .then(|| mirror::send(proxy, &ticket.plan, &head, body, response.status()))
                    .flatten();
                let inspected = (evidence, original);
                return respond(proxy, &head, body, ticket, gauge, response, lease, upgrade, inspected)
                    .map(|response| (response, series));
            }
            Err(SendError::Connect(error)) => {
                series.retry(RetryKind::Connect);
                evidence.forget();
                seeker.unreachable(&ticket, &error);
                continue;
            }
            Err(SendError::Untouched(kind, text)) => (body.is_whole().then_some(kind), text),
            Err(SendError::Silent { reused, text }) => {
                let again = head.is_idempotent() && body.is_whole();
                (again.then_some(if reused { RetryKind::Stale } else { RetryKind::Failed }), text)
            }
            Err(SendError::Failed(text)) => (None, text),
        };
        if let Some(fault) = body.fault() {
            return Err(Failed(refuse(fault, &ticket.plan), Some(series)));
        }
        match retry {
            Some(RetryKind::Stale) if resends < RESENDS => {
                resends += 1;
                series.retry(RetryKind::Stale);
                evidence.forget();
            }
            Some(kind) if kind != RetryKind::Stale && may_retry(&ticket, &series, retries) => {
                retries += 1;
                series.retry(kind);
                ticket.failed();
                seeker.spare(&ticket);
                match kind {
                    // The instance has failed, though its client may not notice.
                    RetryKind::Failed => {
                        evidence.broken();
                        judged = true;
                    }
                    _ => evidence.forget(),
                }
            }
            _ => {
                evidence.broken();
                ticket.failed();
                let message = format!("instance {} gave no answer: {text}", ticket.upstream.flight.key().instance);
                return Err(Failed(Failure::new(ErrorKind::Upstream, message), Some(series)));
            }
        }
    }
}

/// Refuses what the route does not take, before an instance is looked for.
fn admit(plan: &RoutePlan, seeker: &Seeker<'_>, body: &Replay) -> Result<(), Failure> {
    if let Some(rate) = plan.rules.rate {
        let now = clock::of(seeker.since());
        if let Err(wait) = plan.shared.clients().admit(seeker.asker().client(&plan.rules), rate, now) {
            let message = format!("more than {rate} requests per second from one client");
            return Err(Failure::new(ErrorKind::RateLimited, message).after(wait));
        }
    }
    if let Some(most) = plan.rules.body {
        if body.announced().is_some_and(|length| length > most) {
            return Err(refuse(Fault::TooLarge, plan));
        }
        body.limit(most);
    }
    Ok(())
}

/// What a client hears whose body has no end.
fn refuse(fault: Fault, plan: &RoutePlan) -> Failure {
    match fault {
        Fault::Client => Failure::new(ErrorKind::Client, "the request's body ended early"),
        Fault::Slow => Failure::new(ErrorKind::ClientTimeout, "the request's body comes too slowly"),
        Fault::TooLarge => {
            let most = plan.rules.body.unwrap_or(u64::MAX);
            Failure::new(ErrorKind::TooLarge, format!("the request's body is longer than {most} bytes"))
        }
    }
}

/// Whether a request is sent once more after so many retries.
fn may_retry(ticket: &Ticket, series: &Series, retries: u32) -> bool {
    let rules = ticket.rules();
    if retries >= rules.attempts {
        return false;
    }
    let allowed = ticket.plan.shared.budget.take(rules.budget_percent, clock::now());
    if !allowed {
        series.unbudgeted();
    }
    allowed
}

async fn or_never(timer: Option<std::pin::Pin<Box<tokio::time::Sleep>>>) {
    match timer {
        Some(timer) => timer.await,
        None => std::future::pending().await,
    }
}

fn span(duration: Option<std::time::Duration>) -> Timespan {
    Timespan::millis(duration.unwrap_or_default().as_millis().try_into().unwrap_or(u64::MAX))
}

/// Turns an instance's response into the client's.
#[expect(clippy::too_many_arguments, reason = "everything that one request holds changes hands here")]
fn respond(
    proxy: &Proxy,
    head: &Head,
    body: &Replay,
    ticket: Ticket,
    mut gauge: Gauge,
    mut response: Response<upstream::Incoming>,
    lease: Lease,
    upgrade: Option<OnUpgrade>,
    (mut evidence, original): (Evidence, Option<mirror::Original>),
) -> Result<Response<ResponseBody>, Failed> {
    let series = Arc::clone(ticket.series());
    // A call whose answer is a status and nothing else has it in the head.
    let blamed = ticket.flight.is_stream() && blames_server(response.headers());
    if blamed || response.status().is_server_error() {
        ticket.failed();
    } else {
        ticket.succeeded();
    }
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let asked =
            head.upgrade.as_ref().filter(|asked| headers::offers(asked, response.headers().get(header::UPGRADE)));
        let (Some(client), Some(_)) = (upgrade, asked) else {
            let failure = Failure::new(ErrorKind::Upstream, "the instance switched protocols without being asked");
            evidence.broken();
            return Err(Failed(failure, Some(series)));
        };
        ticket.mark(response.headers_mut());
        evidence.answered(response.status(), response.headers(), false, false);
        evidence.complete();
        let idle = ticket.rules().idle;
        let (mut flight, _) = ticket.split();
        flight.become_stream();
        gauge.become_stream();
        let instance = response.body_mut().upgrade();
        let protocol = response.headers_mut().remove(header::UPGRADE);
        let websocket = protocol.as_ref().is_some_and(|p| p.as_bytes().eq_ignore_ascii_case(b"websocket"));
        let tunnel = Tunnel { flight, series, gauge, idle };
        proxy.tree.start(TaskKind::Connection, "upgraded connection", async move {
            // Either side may be gone before it begins; then the other one is closed.
            if let (Ok(client), Some(instance)) = (client.await, instance) {
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
    let end = ticket.deadline(ticket.rules().response);
    let (mut flight, origin) = ticket.split();
    // What the instance speaks is its own affair; hyper adapts the answer to the client's version.
    parts.version = Version::HTTP_11;
    let events = headers::is_event_stream(&parts.headers);
    let stream = events || headers::is_grpc(&parts.headers);
    let (patience, origin) = if stream {
        flight.become_stream();
        gauge.become_stream();
        (origin.rules().idle.map(|span| Patience::silence(span, body.upload())), None)
    } else {
        (end.map(Patience::whole), Some(origin))
    };
    let events = events && is_extensible(&parts.headers);
    let passage = Passage { lease, flight, gauge, series, inspection, patience, origin };
    let body = InstanceBody::new(incoming, passage, events);
    Ok(Response::from_parts(parts, ResponseBody::Instance(Box::new(body))))
}

/// Whether something can be added to a body: its length was not announced and it is not compressed.
fn is_extensible(headers: &HeaderMap) -> bool {
    let plain = headers.get(header::CONTENT_ENCODING).is_none_or(|v| v.as_bytes().eq_ignore_ascii_case(b"identity"));
    plain && !headers.contains_key(header::CONTENT_LENGTH)
}
