//! The client: one method per operation of [`ROUTES`](crate::ROUTES).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Event, Name, ReleaseNumber, RunId,
    flag::FlagName,
    record::{ReleaseRecord, RunRecord},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    API_VERSION, IDEMPOTENCY_KEY,
    address::Endpoint,
    environment::{EnvironmentStatus, EnvironmentSummary},
    flags::{FlagStatus, Flags, SwitchFlag},
    observe::ReleaseSummary,
    query::{EventsQuery, LogsQuery, PageQuery, ReleasesQuery, ValidateQuery, encode, query_string},
    request::{PlanRequest, PlanResponse, Source, StartRun, ValidateResponse},
    rollout::MoveRollout,
    routes::Method,
    run::StartedRun,
    server::{DoctorReport, Empty, Page, Version},
    stream::{EventStream, LogLineStream, RunEventStream},
    tls::TlsStatus,
    traffic::{MoveTraffic, TrafficStatus},
    transport::{Body, SocketTransport, Transport, TransportError},
};

/// Longest answer that is read into memory, in bytes.
const LIMIT: usize = 256 << 20;

/// A handle to a server. Clones share the transport.
#[derive(Clone)]
pub struct Client {
    transport: Arc<dyn Transport>,
    pub(crate) patience: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.transport.describe())
    }
}

/// Why a call did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no answer, or not all of it.
    #[error("the server cannot be reached")]
    Transport(#[source] TransportError),
    /// The server refused or failed, and says why.
    #[error("the server answered {status}")]
    Answer {
        /// HTTP status.
        status: u16,
        /// At least one.
        errors: Vec<Diagnostic>,
    },
    /// The answer makes no sense.
    #[error("the answer to {operation} is not what this client understands")]
    Protocol {
        /// Operation.
        operation: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server speaks another version of the API.
    #[error("the server ({server}) speaks version {api} of the API, this client version {API_VERSION}")]
    Incompatible {
        /// Version of the server.
        server: String,
        /// Its version of the API.
        api: u32,
    },
}

impl ClientError {
    /// Whether no request was answered because nobody listens.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Transport(TransportError::Connect { .. }))
    }

    /// Whether the connection was refused or lost, so that trying again may help.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Transport(_)) || self.status() == Some(503)
    }

    /// HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        if let Self::Answer { status, .. } = self { Some(*status) } else { None }
    }

    /// For the user.
    pub fn into_diagnostics(self) -> Vec<Diagnostic> {
        match self {
            Self::Answer { errors, .. } => errors,
            Self::Transport(error) => {
                let diagnostic = Diagnostic::error(Code::SERVER_UNREACHABLE, error.to_string());
                let diagnostic = match std::error::Error::source(&error) {
                    Some(source) => diagnostic.caused_by(source),
                    None => diagnostic,
                };
                vec![
                    diagnostic.help(
                        "see whether it runs with `orchestra server status`, and why not with `orchestra doctor`",
                    ),
                ]
            }
            error @ Self::Incompatible { .. } => {
                let help = "stop the older one with `orchestra server stop`; instances go on, and the next command starts a new server";
                vec![Diagnostic::error(Code::INCOMPATIBLE, error.to_string()).help(help)]
            }
            error @ Self::Protocol { .. } => {
                let diagnostic = Diagnostic::error(Code::INCOMPATIBLE, error.to_string());
                let source = std::error::Error::source(&error);
                let diagnostic = source.map_or(diagnostic.clone(), |source| diagnostic.caused_by(source));
                vec![diagnostic.help("compare `orchestra --version` with `orchestra server status`")]
            }
        }
    }
}

impl Client {
    /// A client over any transport. Asks nothing yet.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport, patience: Duration::from_secs(10) }
    }

    /// A client of the server at `endpoint`, once that has answered that it speaks this version of the API.
    pub async fn connect(endpoint: Endpoint) -> Result<(Self, Version), ClientError> {
        let client = Self::new(Arc::new(SocketTransport::new(endpoint)));
        let version = client.version().await?;
        if version.api != API_VERSION {
            return Err(ClientError::Incompatible { server: version.version, api: version.api });
        }
        Ok((client, version))
    }

    /// Sets how long a stream that was cut off tries to go on by itself before it reports that; 10 s if not set.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Where requests go, for messages.
    pub fn describe(&self) -> String {
        self.transport.describe()
    }

    /// Which server answers.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("version", "/v1/version".into()).await
    }

    /// Checks a stack file.
    pub async fn validate(&self, source: &Source) -> Result<ValidateResponse, ClientError> {
        self.post("validate", "/v1/validate".into(), source).await
    }

    /// Checks a stack file in every environment that it defines.
    pub async fn validate_all(&self, source: &Source) -> Result<ValidateResponse, ClientError> {
        let query = query_string(&ValidateQuery { all: true });
        self.post("validate", format!("/v1/validate{query}"), source).await
    }

    /// Says what a run would do.
    pub async fn plan(&self, request: &PlanRequest) -> Result<PlanResponse, ClientError> {
        self.post("plan", "/v1/plan".into(), request).await
    }

    /// Starts a run. With the key of an earlier request it starts none, and answers with the run that that one started:
    /// after a lost answer it is safe to ask again.
    pub async fn start_run(&self, request: &StartRun, key: Option<&str>) -> Result<StartedRun, ClientError> {
        let header = key.map(|key| (IDEMPOTENCY_KEY, key.to_owned()));
        self.send("start_run", "/v1/runs".into(), request, header).await
    }

    /// One run with its plan.
    pub async fn run(&self, run: RunId) -> Result<RunRecord, ClientError> {
        self.get("run", format!("/v1/runs/{run}")).await
    }

    /// Asks a run to stop safely.
    pub async fn cancel_run(&self, run: RunId) -> Result<RunRecord, ClientError> {
        self.post("cancel_run", format!("/v1/runs/{run}/cancel"), &Empty {}).await
    }

    /// Promotes, pauses or aborts rollouts. Returns their run.
    pub async fn move_rollout(
        &self,
        environment: &EnvironmentId,
        request: &MoveRollout,
    ) -> Result<RunRecord, ClientError> {
        let path = format!("/v1/environments/{}/{}/rollout", environment.stack, environment.environment);
        self.post("move_rollout", path, request).await
    }

    /// Follows a run from its beginning to its end. Reconnects by itself.
    pub fn run_events(&self, run: RunId) -> RunEventStream {
        RunEventStream::new(self.clone(), run)
    }

    /// Environments.
    pub async fn environments(&self, query: &PageQuery) -> Result<Page<EnvironmentSummary>, ClientError> {
        self.get("environments", format!("/v1/environments{}", query_string(query))).await
    }

    /// All environments, page after page.
    pub async fn all_environments(&self) -> Result<Vec<EnvironmentSummary>, ClientError> {
        self.every_environment(false).await
    }

    /// All environments, page after page, with what they use.
    pub async fn all_environments_with_usage(&self) -> Result<Vec<EnvironmentSummary>, ClientError> {
        self.every_environment(true).await
    }

    async fn every_environment(&self, usage: bool) -> Result<Vec<EnvironmentSummary>, ClientError> {
        let mut all = Vec::new();
        let mut query = PageQuery { after: None, limit: Some(1000), usage };
        loop {
            let mut page = self.environments(&query).await?;
            let empty = page.items.is_empty();
            all.append(&mut page.items);
            if empty || page.next.is_none() || page.next == query.after {
                return Ok(all);
            }
            query.after = page.next;
        }
    }

    /// Everything about one environment.
    pub async fn environment(&self, environment: &EnvironmentId) -> Result<EnvironmentStatus, ClientError> {
        self.get("environment", path(environment, "")).await
    }

    /// Feature flags, and what everybody gets.
    pub async fn flags(&self, environment: &EnvironmentId) -> Result<Flags, ClientError> {
        self.get("flags", path(environment, "/flags")).await
    }

    /// One feature flag with its definition.
    pub async fn flag(&self, environment: &EnvironmentId, flag: &FlagName) -> Result<FlagStatus, ClientError> {
        self.get("flag", path(environment, &format!("/flags/{flag}"))).await
    }

    /// Lays something over a feature flag, or takes it back.
    pub async fn switch_flag(
        &self,
        environment: &EnvironmentId,
        flag: &FlagName,
        request: &SwitchFlag,
    ) -> Result<FlagStatus, ClientError> {
        self.post("switch_flag", path(environment, &format!("/flags/{flag}")), request).await
    }

    /// Holds the traffic of a service up, or lets it go on.
    pub async fn move_traffic(
        &self,
        environment: &EnvironmentId,
        service: &Name,
        request: &MoveTraffic,
    ) -> Result<TrafficStatus, ClientError> {
        self.post("move_traffic", path(environment, &format!("/services/{service}/traffic")), request).await
    }

    /// Releases, the newest first.
    pub async fn releases(
        &self,
        environment: &EnvironmentId,
        query: &ReleasesQuery,
    ) -> Result<Page<ReleaseSummary>, ClientError> {
        self.get("releases", path(environment, "/releases") + &query_string(query)).await
    }

    /// One release with its desired state.
    pub async fn release(
        &self,
        environment: &EnvironmentId,
        release: ReleaseNumber,
    ) -> Result<ReleaseRecord, ClientError> {
        self.get("release", path(environment, &format!("/releases/{release}"))).await
    }

    /// What happened, as one page. `query.follow` is ignored.
    pub async fn events(&self, environment: &EnvironmentId, query: &EventsQuery) -> Result<Page<Event>, ClientError> {
        let query = EventsQuery { follow: false, ..query.clone() };
        self.get("events", path(environment, "/events") + &query_string(&query)).await
    }

    /// What happened and what will. Reconnects by itself, without gap or repetition.
    pub fn follow_events(&self, environment: &EnvironmentId, query: &EventsQuery) -> EventStream {
        EventStream::new(self.clone(), path(environment, "/events"), query.clone())
    }

    /// What instances wrote. Ends when all was read, or with `query.follow` never.
    pub async fn logs(&self, environment: &EnvironmentId, query: &LogsQuery) -> Result<LogLineStream, ClientError> {
        let path = path(environment, "/logs") + &query_string(query);
        Ok(LogLineStream::new(self.request("logs", Method::Get, &path, Bytes::new(), None).await?))
    }

    /// The development authority, and what ports with TLS show.
    pub async fn tls(&self) -> Result<TlsStatus, ClientError> {
        self.get("tls", "/v1/tls".into()).await
    }

    /// What may stand in the way.
    pub async fn doctor(&self) -> Result<DoctorReport, ClientError> {
        self.get("doctor", "/v1/doctor".into()).await
    }

    /// Stops the server. It answers before it does.
    pub async fn shutdown(&self) -> Result<Empty, ClientError> {
        self.post("shutdown", "/v1/shutdown".into(), &Empty {}).await
    }

    /// The OpenAPI document.
    pub async fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.get("openapi", "/v1/openapi.json".into()).await
    }

    /// Metrics in Prometheus text format.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let body = self.request("metrics", Method::Get, "/metrics", Bytes::new(), None).await?;
        let bytes = collect("metrics", body).await?;
        String::from_utf8(bytes.into()).map_err(|error| protocol("metrics", error))
    }

    async fn get<T: DeserializeOwned>(&self, operation: &'static str, path: String) -> Result<T, ClientError> {
        let body = self.request(operation, Method::Get, &path, Bytes::new(), None).await?;
        parse(operation, body).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        path: String,
        value: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(operation, path, value, None).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        path: String,
        value: &impl Serialize,
        header: Option<(&'static str, String)>,
    ) -> Result<T, ClientError> {
        let json = serde_json::to_vec(value).expect("requests serialize to JSON");
        let body = self.request(operation, Method::Post, &path, json.into(), header).await?;
        parse(operation, body).await
    }

    /// Sends a request, and hands over the body of a success.
    pub(crate) async fn request(
        &self,
        operation: &'static str,
        method: Method,
        path: &str,
        body: Bytes,
        header: Option<(&'static str, String)>,
    ) -> Result<Body, ClientError> {
        let mut request = http::Request::builder().method(method.as_str()).uri(path);
        if !body.is_empty() {
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|error| protocol(operation, error))?;
        let response = self.transport.send(request).await.map_err(ClientError::Transport)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = collect(operation, response.into_body()).await?;
        Err(ClientError::Answer { status: status.as_u16(), errors: errors(operation, status, &body)? })
    }
}

/// Diagnostics of an error answer, also of a newer server: a code that we do not know becomes a note.
fn errors(operation: &'static str, status: http::StatusCode, body: &[u8]) -> Result<Vec<Diagnostic>, ClientError> {
    let refused = || protocol(operation, format!("status {status} without a list of errors"));
    let body: serde_json::Value = serde_json::from_slice(body).map_err(|_| refused())?;
    let items = body.get("errors").and_then(serde_json::Value::as_array).ok_or_else(refused)?;
    let errors: Vec<Diagnostic> = items
        .iter()
        .filter_map(|item| {
            serde_json::from_value(item.clone()).ok().or_else(|| {
                let text = |key: &str| item.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
                let mut diagnostic = Diagnostic::error(Code::INCOMPATIBLE, text("message")?);
                diagnostic.notes.extend(text("code").map(|code| format!("the server calls this {code}")));
                diagnostic.help = text("help");
                Some(diagnostic)
            })
        })
        .collect();
    if errors.is_empty() { Err(refused()) } else { Ok(errors) }
}

async fn parse<T: DeserializeOwned>(operation: &'static str, body: Body) -> Result<T, ClientError> {
    let bytes = collect(operation, body).await?;
    serde_json::from_slice(&bytes).map_err(|error| protocol(operation, error))
}

async fn collect(operation: &'static str, body: Body) -> Result<Bytes, ClientError> {
    match Limited::new(body, LIMIT).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => match error.downcast::<TransportError>() {
            Ok(error) => Err(ClientError::Transport(*error)),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(protocol(operation, format!("it is larger than {LIMIT} bytes")))
            }
            Err(error) => Err(protocol(operation, error)),
        },
    }
}

pub(crate) fn protocol(
    operation: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> ClientError {
    ClientError::Protocol { operation, source: source.into() }
}

fn path(environment: &EnvironmentId, rest: &str) -> String {
    // Names need no encoding; a defect here must not become a path that leads elsewhere.
    let (stack, environment) = (encode(environment.stack.as_str()), encode(environment.environment.as_str()));
    format!("/v1/environments/{stack}/{environment}{rest}")
}
