//! The one table of what the API offers. The OpenAPI document is drawn from it, and the server's tests check that the
//! server answers exactly these.

use orchestra_model::{
    Event, Plan,
    record::{ReleaseRecord, RunRecord},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::{
    environment::{EnvironmentStatus, EnvironmentSummary},
    flags::{FlagStatus, Flags, SwitchFlag},
    observe::{LogLine, ReleaseSummary},
    query::{EventsQuery, LogsQuery, PageQuery, ReleasesQuery, ValidateQuery},
    request::{PlanRequest, PlanResponse, Source, StartRun, ValidateResponse},
    rollout::MoveRollout,
    run::{RunEvent, StartedRun},
    server::{DoctorReport, Empty, Page, Version},
    tls::TlsStatus,
    traffic::{MoveTraffic, TrafficStatus},
};

/// HTTP methods in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Reads.
    Get,
    /// Asks for a change.
    Post,
}

impl Method {
    /// As in a request line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }
}

/// The schema of a type, within a generator.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What an answer's body is.
#[derive(Clone, Copy, Debug)]
pub enum BodyKind {
    /// One JSON value.
    Json(SchemaOf),
    /// Server-sent events; each `data:` is such a value.
    EventStream(SchemaOf),
    /// One JSON value, or with `follow=true` server-sent events, each with a value of the second kind.
    JsonOrEventStream(SchemaOf, SchemaOf),
    /// JSON values with a line feed after each; blank lines are to be skipped.
    Ndjson(SchemaOf),
    /// Text of this media type.
    Text(&'static str),
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct RouteSpec {
    /// Method.
    pub method: Method,
    /// Path with `{parameters}`, as axum and OpenAPI write it.
    pub path: &'static str,
    /// Name of the operation, unique: the name of the client's method.
    pub operation: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Schema of the query string, an object of scalars.
    pub query: Option<SchemaOf>,
    /// Header that it looks at, and what for.
    pub header: Option<(&'static str, &'static str)>,
    /// Schema of the request's body.
    pub request: Option<SchemaOf>,
    /// Status of success.
    pub status: u16,
    /// Body of success.
    pub response: BodyKind,
    /// Statuses of failure beside 400, 401 and 500, which every operation may answer, and 415, which those with a body may.
    pub errors: &'static [u16],
}

impl RouteSpec {
    /// Whether the answer may go on until somebody ends it.
    pub const fn is_streaming(&self) -> bool {
        !matches!(self.response, BodyKind::Json(_) | BodyKind::Text(_))
    }

    const fn get(path: &'static str, operation: &'static str, summary: &'static str, response: BodyKind) -> Self {
        Self {
            method: Method::Get,
            path,
            operation,
            summary,
            query: None,
            header: None,
            request: None,
            status: 200,
            response,
            errors: &[],
        }
    }

    const fn post(path: &'static str, operation: &'static str, summary: &'static str, response: BodyKind) -> Self {
        Self { method: Method::Post, ..Self::get(path, operation, summary, response) }
    }

    const fn query(self, query: SchemaOf) -> Self {
        Self { query: Some(query), ..self }
    }

    const fn header(self, name: &'static str, what: &'static str) -> Self {
        Self { header: Some((name, what)), ..self }
    }

    const fn request(self, request: SchemaOf) -> Self {
        Self { request: Some(request), ..self }
    }

    const fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    const fn errors(self, errors: &'static [u16]) -> Self {
        Self { errors, ..self }
    }
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const LAST_EVENT_ID: &str = "Last-Event-ID";
const SEEN: &str = "Number of the last event that was seen: only what came after it is sent.";

/// Every operation, in the order of the reference.
///
/// 404: the path names something that does not exist. 409: what is there now stands against it (a run in progress, a
/// stale plan). 413: the body is larger than the server reads. 422: the stack file or the request means nothing that
/// can be done. 503: the server starts or stops.
pub const ROUTES: &[RouteSpec] = &[
    RouteSpec::get("/v1/version", "version", "Which server answers", BodyKind::Json(of::<Version>)),
    RouteSpec::post("/v1/validate", "validate", "Check a stack file", BodyKind::Json(of::<ValidateResponse>))
        .query(of::<ValidateQuery>)
        .request(of::<Source>)
        .errors(&[413, 422]),
    RouteSpec::post("/v1/plan", "plan", "Say what a run would do; changes nothing", BodyKind::Json(of::<PlanResponse>))
        .request(of::<PlanRequest>)
        .errors(&[404, 413, 422, 503]),
    RouteSpec::post("/v1/runs", "start_run", "Start a run", BodyKind::Json(of::<StartedRun>))
        .header(
            "Idempotency-Key",
            "Up to 64 letters, digits, `-` and `_`, made at random by the client. A request with the key of an earlier one starts nothing, and is answered with the run that that one started, as it is now: after a lost answer it is safe to ask again. Without it every request is new.",
        )
        .request(of::<StartRun>)
        .status(201)
        .errors(&[404, 409, 413, 422, 503]),
    RouteSpec::get("/v1/runs/{run}", "run", "One run with its plan", BodyKind::Json(of::<RunRecord>)).errors(&[404]),
    RouteSpec::post("/v1/runs/{run}/cancel", "cancel_run", "Ask a run to stop safely", BodyKind::Json(of::<RunRecord>))
        .status(202)
        .errors(&[404, 409]),
    RouteSpec::get(
        "/v1/runs/{run}/events",
        "run_events",
        "Follow a run from its beginning to its end",
        BodyKind::EventStream(of::<RunEvent>),
    )
    .header(LAST_EVENT_ID, SEEN)
    .errors(&[404, 503]),
    RouteSpec::get("/v1/environments", "environments", "Environments", BodyKind::Json(of::<Page<EnvironmentSummary>>))
        .query(of::<PageQuery>),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}",
        "environment",
        "Everything about one environment, and what each thing that is not ready waits for",
        BodyKind::Json(of::<EnvironmentStatus>),
    )
    .errors(&[404]),
    RouteSpec::post(
        "/v1/environments/{stack}/{environment}/rollout",
        "move_rollout",
        "Promote, pause or abort rollouts; the answer is their run",
        BodyKind::Json(of::<RunRecord>),
    )
    .request(of::<MoveRollout>)
    .status(202)
    .errors(&[404, 409, 422, 503]),
    RouteSpec::post(
        "/v1/environments/{stack}/{environment}/services/{service}/traffic",
        "move_traffic",
        "Let new requests to a service wait, or go on; answered once the proxy does so",
        BodyKind::Json(of::<TrafficStatus>),
    )
    .request(of::<MoveTraffic>)
    .errors(&[404, 422, 503]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/flags",
        "flags",
        "Feature flags, and what everybody gets",
        BodyKind::Json(of::<Flags>),
    )
    .errors(&[404, 503]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/flags/{flag}",
        "flag",
        "One feature flag with its definition",
        BodyKind::Json(of::<FlagStatus>),
    )
    .errors(&[404, 503]),
    RouteSpec::post(
        "/v1/environments/{stack}/{environment}/flags/{flag}",
        "switch_flag",
        "Lay something over a feature flag, or take it back; answered once the proxy serves it",
        BodyKind::Json(of::<FlagStatus>),
    )
    .request(of::<SwitchFlag>)
    .errors(&[404, 503]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/releases",
        "releases",
        "Releases, the newest first",
        BodyKind::Json(of::<Page<ReleaseSummary>>),
    )
    .query(of::<ReleasesQuery>)
    .errors(&[404]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/releases/{release}",
        "release",
        "One release with its desired state",
        BodyKind::Json(of::<ReleaseRecord>),
    )
    .errors(&[404]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/events",
        "events",
        "What happened",
        BodyKind::JsonOrEventStream(of::<Page<Event>>, of::<Event>),
    )
    .query(of::<EventsQuery>)
    .header(LAST_EVENT_ID, SEEN)
    .errors(&[404]),
    RouteSpec::get(
        "/v1/environments/{stack}/{environment}/logs",
        "logs",
        "What instances wrote",
        BodyKind::Ndjson(of::<LogLine>),
    )
    .query(of::<LogsQuery>)
    .errors(&[404]),
    RouteSpec::get(
        "/v1/tls",
        "tls",
        "The development authority, and what ports with TLS show",
        BodyKind::Json(of::<TlsStatus>),
    ),
    RouteSpec::get("/v1/doctor", "doctor", "What may stand in the way", BodyKind::Json(of::<DoctorReport>)),
    RouteSpec::post(
        "/v1/shutdown",
        "shutdown",
        "Stop the server; instances and proxy go on",
        BodyKind::Json(of::<Empty>),
    )
    .status(202),
    RouteSpec::get("/v1/openapi.json", "openapi", "The OpenAPI document", BodyKind::Json(of::<serde_json::Value>)),
    RouteSpec::get("/metrics", "metrics", "Metrics", BodyKind::Text("text/plain; version=0.0.4")),
];

/// A saved plan is a [`Plan`]: named here so that the document lists it though no operation answers it alone.
pub(crate) const EXTRA_SCHEMAS: &[SchemaOf] = &[of::<Plan>];
