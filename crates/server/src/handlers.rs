//! One handler per operation of `orchestra_api::ROUTES`, in its order.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use orchestra_api::{
    DoctorReport, Empty, EnvironmentStatus, EnvironmentSummary, EventsQuery, LogsQuery, MoveRollout, MoveTraffic, Page,
    PageQuery, PlanRequest, PlanResponse, ReleaseSummary, ReleasesQuery, ResourceCount, Source, StartRun, StartedRun,
    TrafficAction, TrafficStatus, ValidateQuery, ValidateResponse, Version,
};
use orchestra_engine::{EngineError, LoadedStack, PreviewWish, RunRequest, StackSource, TrafficMove};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Event, Name, Plan, ReleaseNumber, ResourceId, RunId,
    preview::PreviewRecord,
    quantity::Timespan,
    record::{ReleaseRecord, ResourceRecord, RunRecord},
    rollout::RolloutCommand,
    traffic::TrafficCommand,
};
use orchestra_provider::{LogQuery, LogStream};
use orchestra_store::EventFilter;
use orchestra_task::TaskTree;
use tokio::sync::Notify;

use crate::{
    answer::{Body, Failure, Path, Query},
    backend::{App, Backend, Facts},
    convert, doctor, flags, follow, tls, validate,
};

/// Largest body that is read: a stack file of the largest size, escaped as JSON.
pub(crate) const BODY_LIMIT: usize = 64 << 20;

type Answer<T> = Result<Json<T>, Failure>;

/// All operations. `stop` is notified when a client asks the server to stop.
pub fn router(backend: Backend, facts: Facts, tree: TaskTree, stop: Arc<Notify>) -> Router {
    let app = App { backend, facts: Arc::new(facts), tree, stop };
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/validate", post(validate))
        .route("/v1/plan", post(plan))
        .route("/v1/runs", post(start_run))
        .route("/v1/runs/{run}", get(run))
        .route("/v1/runs/{run}/cancel", post(cancel_run))
        .route("/v1/environments/{stack}/{environment}/rollout", post(move_rollout))
        .route("/v1/runs/{run}/events", get(run_events))
        .route("/v1/environments", get(environments))
        .route("/v1/environments/{stack}/{environment}", get(environment))
        .route("/v1/environments/{stack}/{environment}/services/{service}/traffic", post(move_traffic))
        .route("/v1/environments/{stack}/{environment}/flags", get(flags::flags))
        .route("/v1/environments/{stack}/{environment}/flags/{flag}", get(flags::flag).post(flags::switch_flag))
        .route("/v1/environments/{stack}/{environment}/releases", get(releases))
        .route("/v1/environments/{stack}/{environment}/releases/{release}", get(release))
        .route("/v1/environments/{stack}/{environment}/events", get(events))
        .route("/v1/environments/{stack}/{environment}/logs", get(logs))
        .route("/v1/tls", get(tls::tls))
        .route("/v1/doctor", get(doctor))
        .route("/v1/shutdown", post(shutdown))
        .route("/v1/openapi.json", get(openapi))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(app)
}

async fn unknown(uri: http::Uri) -> Failure {
    Failure::not_found(format!("operation `{}`", uri.path()))
}

async fn not_allowed(method: http::Method, uri: http::Uri) -> Failure {
    let error = Diagnostic::error(Code::NOT_FOUND, format!("`{}` does not take {method}", uri.path()))
        .help("GET /v1/openapi.json describes the operations");
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, error)
}

async fn version(State(app): State<App>) -> Json<Version> {
    Json(Version {
        version: app.facts.version.clone(),
        api: orchestra_api::API_VERSION,
        pid: std::process::id(),
        home: app.facts.home.clone(),
        listen: app.facts.listen.map(|address| address.to_string()),
        started_at: app.facts.started_at,
    })
}

/// Reads a stack file; off the async threads, because a large one takes a while.
pub(crate) async fn load(app: &App, source: Source) -> Result<LoadedStack, EngineError> {
    let volumes = app.facts.volumes.clone();
    let shown = source.shown_path().to_owned();
    let wish = source.preview.map(|asked| PreviewWish { from: asked.from, ttl: asked.ttl, owner: asked.owner });
    let mut source = StackSource {
        path: source.source_path,
        shown,
        text: source.source_text,
        environment: source.environment,
        preview: None,
    };
    let reader = app.reader();
    let loaded = tokio::task::spawn_blocking(move || {
        source.preview = orchestra_engine::find_preview(&source, wish.as_ref(), reader.as_ref())?;
        orchestra_engine::load(&source, &volumes)
    });
    let loaded = loaded.await;
    loaded.map_err(|_| EngineError::ShuttingDown)?
}

pub(crate) fn counts(stack: &LoadedStack) -> Vec<ResourceCount> {
    let mut by_kind: BTreeMap<_, Vec<Name>> = BTreeMap::new();
    for id in stack.desired.resources.keys() {
        by_kind.entry(id.kind).or_default().push(id.name.clone());
    }
    by_kind.into_iter().map(|(kind, names)| ResourceCount { kind, names }).collect()
}

async fn validate(
    State(app): State<App>,
    Query(query): Query<ValidateQuery>,
    Body(source): Body<Source>,
) -> Answer<ValidateResponse> {
    let others = if query.all { validate::others(&app, &source).await? } else { validate::Others::default() };
    let meant = load(&app, source).await;
    let stack = match meant {
        Ok(stack) if others.errors.is_empty() => stack,
        Ok(_) => return Err(EngineError::Refused(others.errors).into()),
        Err(EngineError::Refused(mut errors)) => {
            validate::add(&mut errors, others.errors);
            return Err(EngineError::Refused(errors).into());
        }
        Err(error) => return Err(error.into()),
    };
    let meant = stack.desired.environment.clone();
    let resources = counts(&stack);
    let mut warnings = stack.warnings;
    validate::add(&mut warnings, others.warnings);
    let others = others.valid.into_iter().filter(|other| other.environment != meant).collect();
    Ok(Json(ValidateResponse { environment: meant, resources, environments: stack.environments, others, warnings }))
}

async fn plan(State(app): State<App>, Body(request): Body<PlanRequest>) -> Answer<PlanResponse> {
    let (environment, request, warnings) = match request {
        PlanRequest::Up(source) => {
            let stack = load(&app, source).await?;
            (stack.desired.environment.clone(), Planned::Up(Box::new(stack.clone())), stack.warnings)
        }
        PlanRequest::Down(down) => (down.environment, Planned::Down { volumes: down.volumes }, Vec::new()),
    };
    let plan = match &app.backend {
        Backend::Live(control) => control.plan(&environment, request.into_request()).await?,
        Backend::Recorded(_) => recorded_plan(&app, environment, request).await?,
    };
    Ok(Json(PlanResponse { plan, warnings }))
}

enum Planned {
    Up(Box<LoadedStack>),
    Down { volumes: bool },
}

impl Planned {
    fn into_request(self) -> RunRequest {
        match self {
            Self::Up(stack) => RunRequest::up(*stack),
            Self::Down { volumes } => RunRequest::down(volumes),
        }
    }
}

/// What is recorded of an environment: release, resources, flags, and whether it is a preview.
type Recorded = (Option<ReleaseNumber>, BTreeMap<ResourceId, ResourceRecord>, orchestra_model::flag::FlagSet, bool);

/// A plan from what is recorded, while no server runs. Nothing is observed, so nothing is repaired.
async fn recorded_plan(app: &App, environment: EnvironmentId, request: Planned) -> Result<Plan, EngineError> {
    let id = environment.clone();
    let recorded = app
        .read(move |reader| {
            let record = reader.environments()?.into_iter().find(|record| record.id == id);
            let is_preview = record.as_ref().and_then(|r| r.preview.as_deref()).is_some_and(PreviewRecord::is_live);
            let base = record.and_then(|record| record.stable);
            let flags = match base {
                Some(base) => reader.release(&id, base)?.map(|release| release.desired.flags).unwrap_or_default(),
                None => orchestra_model::flag::FlagSet::default(),
            };
            Ok((base, reader.resources(&id)?, flags, is_preview))
        })
        .await?;
    let (base, resources, flags, is_preview): Recorded = recorded.unwrap_or_default();
    match request {
        Planned::Up(stack) => {
            let stack = orchestra_engine::settle_stack(app.facts.home.as_ref(), *stack).await?;
            orchestra_engine::plan_stack(base, resources, BTreeMap::new(), flags, &stack.desired)
        }
        Planned::Down { volumes } => orchestra_engine::plan_down(&environment, base, resources, volumes || is_preview),
    }
}

async fn start_run(
    State(app): State<App>,
    headers: HeaderMap,
    Body(request): Body<StartRun>,
) -> Result<Response, Failure> {
    let control = app.live()?;
    let key = idempotency_key(&headers)?;
    let started = |run, warnings| (StatusCode::CREATED, Json(StartedRun { run, warnings })).into_response();
    // Before anything is looked at that the first request may have changed. What it is still doing, the driver knows.
    if let Some(key) = key.clone()
        && let Some(run) = control.run_of_request(key).await?
    {
        return Ok(started(run, Vec::new()));
    }
    let (environment, request) = match request {
        StartRun::Up(up) => {
            let stack = load(&app, up.source).await?;
            (stack.desired.environment.clone(), RunRequest::up(stack))
        }
        StartRun::Apply(apply) => (apply.plan.environment.clone(), RunRequest::apply(apply.plan, apply.source_path)),
        StartRun::Down(down) => (down.environment, RunRequest::down(down.volumes)),
        StartRun::Restart(restart) => (restart.environment, RunRequest::restart(restart.services)),
        StartRun::Scale(scale) => (scale.environment, RunRequest::scale(scale.replicas)),
        StartRun::Rollback(rollback) => {
            // In the middle of a rollout the way back is to turn its run back, with the same effect.
            if rollback.to.is_none() && control.view(&rollback.environment).await?.status.is_rolling_out() {
                let abort = RolloutCommand::Abort;
                let run = control.rollout(&rollback.environment, None, abort, "a rollback".to_owned()).await?;
                return Ok(started(run, Vec::new()));
            }
            let request = control.rollback(&rollback.environment, rollback.to).await?;
            (rollback.environment, request)
        }
    };
    let accepted = control.start_run(&environment, request.with_key(key)).await?;
    Ok(started(accepted.run, accepted.warnings))
}

/// The key by which a client may ask again.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get(orchestra_api::IDEMPOTENCY_KEY) else { return Ok(None) };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match value.to_str() {
        Ok(key) if (1..=64).contains(&key.len()) && key.bytes().all(allowed) => Ok(Some(key.to_owned())),
        _ => Err(Failure::new(
            StatusCode::BAD_REQUEST,
            Diagnostic::error(Code::BAD_REQUEST, "the header `Idempotency-Key` is not a key")
                .help("make one of 1 to 64 letters, digits, `-` and `_` at random, such as a UUID"),
        )),
    }
}

async fn recorded_run(app: &App, id: RunId) -> Result<RunRecord, Failure> {
    let found = app.read(move |reader| reader.run(id)).await?.flatten();
    found.ok_or_else(|| Failure::not_found(id))
}

async fn run(State(app): State<App>, Path(id): Path<RunId>) -> Answer<RunRecord> {
    Ok(Json(recorded_run(&app, id).await?))
}

async fn cancel_run(State(app): State<App>, Path(id): Path<RunId>) -> Result<Response, Failure> {
    let control = app.live()?;
    if let Some(record) = control.cancel(id).await? {
        return Ok((StatusCode::ACCEPTED, Json(record)).into_response());
    }
    let error =
        Diagnostic::error(Code::RUN_CANCELLED, format!("{id} has ended already")).help("`orchestra history` shows how");
    Err(Failure::new(StatusCode::CONFLICT, error))
}

async fn run_events(State(app): State<App>, Path(id): Path<RunId>, headers: HeaderMap) -> Result<Response, Failure> {
    let control = app.live()?.clone();
    let record = recorded_run(&app, id).await?;
    Ok(follow::run(&app.tree, control, record, last_event_id(&headers)))
}

fn last_event_id(headers: &HeaderMap) -> Option<u64> {
    headers.get("last-event-id")?.to_str().ok()?.parse().ok()
}

async fn environments(State(app): State<App>, Query(query): Query<PageQuery>) -> Answer<Page<EnvironmentSummary>> {
    let limit = usize::try_from(query.limit.unwrap_or(100).clamp(1, 1000)).unwrap_or(1000);
    let control = match &app.backend {
        Backend::Live(control) => control,
        Backend::Recorded(_) => return Ok(Json(recorded_environments(&app).await?)),
    };
    let mut items = Vec::new();
    let mut views = Vec::new();
    let mut next = None;
    for id in control
        .environment_ids()
        .into_iter()
        .filter(|id| query.after.as_ref().is_none_or(|after| id.to_string() > *after))
    {
        if items.len() == limit {
            next = items.last().map(|last: &EnvironmentSummary| last.id.to_string());
            break;
        }
        let view = control.view(&id).await?;
        items.push(convert::summary(&view));
        views.push(view);
    }
    if query.usage {
        let mut usage = control.usage(&views).await;
        for item in &mut items {
            item.usage = usage.remove(&item.id).map(convert::usage);
        }
    }
    Ok(Json(Page { items, next }))
}

/// What is recorded of environments, while no server runs: whether they serve is not known then.
async fn recorded_environments(app: &App) -> Result<Page<EnvironmentSummary>, Failure> {
    let records = app.read(orchestra_store::Reader::environments).await?.unwrap_or_default();
    let now = orchestra_engine::Clock::wall();
    let items = records
        .into_iter()
        .map(|record| EnvironmentSummary {
            id: record.id,
            source: record.source,
            health: if record.stable.is_some() {
                orchestra_api::EnvironmentHealth::Degraded
            } else {
                orchestra_api::EnvironmentHealth::Down
            },
            release: record.stable,
            ready: 0,
            services: 0,
            run: None,
            preview: record.preview.as_deref().map(|preview| {
                let end = preview.expires_at.filter(|_| preview.is_live());
                convert::preview(preview, end.map(|end| Duration::from_millis(end.saturating_sub(now))))
            }),
            usage: None,
        })
        .collect();
    Ok(Page { items, next: None })
}

/// How long traffic is paused unless its person says otherwise.
const PAUSE: Timespan = Timespan::seconds(300);

type EnvironmentPath = Path<(Name, Name)>;

fn environment_id(Path((stack, environment)): EnvironmentPath) -> EnvironmentId {
    EnvironmentId { stack, environment }
}

async fn environment(State(app): State<App>, path: EnvironmentPath) -> Answer<EnvironmentStatus> {
    let control = app.live()?;
    let view = control.view(&environment_id(path)).await?;
    let mut status = convert::status(&view);
    convert::stand(&mut status, &control.standing().await);
    Ok(Json(status))
}

async fn move_rollout(
    State(app): State<App>,
    path: EnvironmentPath,
    Body(request): Body<MoveRollout>,
) -> Result<Response, Failure> {
    let MoveRollout { service, command, by } = request;
    let by = by.filter(|by| !by.trim().is_empty()).unwrap_or_else(|| "a person".to_owned());
    let record = app.live()?.rollout(&environment_id(path), service, command, by).await?;
    Ok((StatusCode::ACCEPTED, Json(record)).into_response())
}

async fn move_traffic(
    State(app): State<App>,
    Path((stack, environment, service)): Path<(Name, Name, Name)>,
    Body(request): Body<MoveTraffic>,
) -> Answer<TrafficStatus> {
    let MoveTraffic { action, duration, by } = request;
    let command = match action {
        TrafficAction::Pause => TrafficCommand::Pause(duration.unwrap_or(PAUSE)),
        TrafficAction::Resume => TrafficCommand::Resume,
    };
    let by = by.filter(|by| !by.trim().is_empty()).unwrap_or_else(|| "a person".to_owned());
    let id = EnvironmentId { stack, environment };
    let wish = TrafficMove { service: service.clone(), command, by };
    let in_force = app.live()?.move_traffic(&id, wish).await?;
    let paused = app.live()?.view(&id).await?.record.paused.get(&service).cloned();
    Ok(Json(TrafficStatus { service, paused, in_force }))
}

async fn known(app: &App, id: &EnvironmentId) -> Result<(), Failure> {
    let wanted = id.clone();
    let records = app.read(orchestra_store::Reader::environments).await?.unwrap_or_default();
    if records.iter().any(|record| record.id == wanted) {
        return Ok(());
    }
    Err(Failure::not_found(format!("environment {id}")))
}

async fn releases(
    State(app): State<App>,
    path: EnvironmentPath,
    Query(query): Query<ReleasesQuery>,
) -> Answer<Page<ReleaseSummary>> {
    let id = environment_id(path);
    known(&app, &id).await?;
    let limit = usize::try_from(query.limit.unwrap_or(100).clamp(1, 1000)).unwrap_or(1000);
    let all = app.read(move |reader| reader.releases(&id, usize::MAX)).await?.unwrap_or_default();
    let mut items: Vec<ReleaseSummary> = all
        .into_iter()
        .filter(|release| query.after.is_none_or(|after| release.number < after))
        .map(|release| ReleaseSummary {
            number: release.number,
            created_at: release.created_at,
            run: release.run,
            reason: release.reason,
            state: release.state,
        })
        .take(limit + 1)
        .collect();
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|last| last.number.to_string());
    Ok(Json(Page { items, next }))
}

async fn release(
    State(app): State<App>,
    Path((stack, environment, number)): Path<(Name, Name, u64)>,
) -> Answer<ReleaseRecord> {
    let (id, number) = (EnvironmentId { stack, environment }, ReleaseNumber(number));
    let wanted = id.clone();
    let found = app.read(move |reader| reader.release(&wanted, number)).await?.flatten();
    found.map(Json).ok_or_else(|| Failure::not_found(format!("release {number} of {id}")))
}

async fn events(
    State(app): State<App>,
    path: EnvironmentPath,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let id = environment_id(path);
    known(&app, &id).await?;
    let after = last_event_id(&headers).or(query.after).unwrap_or(0);
    let filter = EventFilter {
        environment: Some(id),
        resource: query.resource.clone(),
        after_sequence: after,
        ..EventFilter::default()
    };
    if query.follow {
        let control = app.live()?.clone();
        return Ok(follow::events(&app.tree, &control, filter, query.tail));
    }
    let limit = usize::try_from(query.limit.unwrap_or(1000).clamp(1, 10_000)).unwrap_or(1000);
    let filter = match query.tail {
        Some(tail) => EventFilter { limit: (tail as usize).min(10_000), tail: true, ..filter },
        None => EventFilter { limit: limit + 1, ..filter },
    };
    let mut items: Vec<Event> = app.read(move |reader| reader.events(&filter)).await?.unwrap_or_default();
    let more = query.tail.is_none() && items.len() > limit;
    if more {
        items.truncate(limit);
    }
    let next = items.last().filter(|_| more).map(|last| last.sequence.to_string());
    Ok(Json(Page { items, next }).into_response())
}

async fn logs(
    State(app): State<App>,
    path: EnvironmentPath,
    Query(query): Query<LogsQuery>,
) -> Result<Response, Failure> {
    let id = environment_id(path);
    known(&app, &id).await?;
    let control = app.live()?;
    let lines = control
        .logs(LogQuery {
            environment: id,
            workloads: query.workload.map(|names| names.0).unwrap_or_default(),
            instance: query.instance,
            stream: query.stream.map(|stream| match stream {
                orchestra_api::LogStream::Stdout => LogStream::Stdout,
                orchestra_api::LogStream::Stderr => LogStream::Stderr,
            }),
            tail: query.tail.map(|tail| tail as usize),
            since: query.since,
            follow: query.follow,
        })
        .await?;
    Ok(follow::logs(lines, query.release))
}

async fn doctor(State(app): State<App>) -> Json<DoctorReport> {
    Json(doctor::report(&app).await)
}

async fn shutdown(State(app): State<App>) -> Result<Response, Failure> {
    app.live()?;
    app.stop.notify_one();
    Ok((StatusCode::ACCEPTED, Json(Empty {})).into_response())
}

async fn openapi() -> Json<serde_json::Value> {
    Json(orchestra_api::document())
}

async fn metrics(State(app): State<App>) -> Result<Response, Failure> {
    let control = app.live()?;
    let mut text = String::new();
    let mut views = Vec::new();
    for id in control.environment_ids() {
        views.push(control.view(&id).await?);
    }
    crate::metrics::write(&mut text, &views);
    match control.data_plane_metrics().await {
        Ok(proxy) => text.push_str(&proxy),
        // The control plane's own metrics are worth having without the proxy's.
        Err(error) => tracing::warn!(%error, "no metrics from the proxy"),
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
