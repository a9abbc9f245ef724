//! The agent's API: conversations over HTTP, answers token by token as server-sent events.
//!
//! | request | answer |
//! |---|---|
//! | `POST /v1/chat` `{"message": …, "session": …?, "pace_ms": …?}` | events `session`, `tool`, `token` …, `done` |
//! | `GET /v1/sessions` | the latest conversations |
//! | `GET /v1/sessions/{id}` | one conversation |
//! | `GET /ready` | 200 if it can take a chat |
//! | `GET /health` | 200 while it runs |
//! | `GET /version` | release, style and instance |
//!
//! Environment: `PORT`, `DATA_DIR`; optional `RELEASE_LABEL`, `INSTANCE`, `AGENT_STYLE` (calm or brisk), `PACE_MS` between
//! tokens (30), `TOOL_TIMEOUT_MS` (5000); two ways to be a bad release: `FAIL_READY=1` never becomes ready, and `FAIL_EVERY=3`
//! becomes ready and answers every third request with 500.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
    routing::{get, post},
};
use orchestra_quickstart::{
    agent::{self, Step, Style},
    serve::{Gate, log, run, serve, termination},
    settings::{self, Error},
    store::{Store, TaskState},
    stream::{Events, events},
};
use serde::Deserialize;
use serde_json::{Value, json};

/// Longest message in bytes.
const MESSAGE: usize = 8 * 1024;
/// Longest pause between two tokens that a client may ask for.
const PACE: u64 = 10_000;
/// Pause between two looks at a task.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Clone)]
struct Api {
    store: Store,
    gate: Gate,
    release: String,
    instance: Option<String>,
    style: Style,
    pace: Duration,
    tool_timeout: Duration,
    fail_ready: bool,
    /// Every so manieth request fails; 0 is none.
    fail_every: u64,
    asked: Arc<AtomicU64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Chat {
    message: String,
    session: Option<String>,
    /// Pause between two tokens; the program's own if it is not given.
    pace_ms: Option<u64>,
}

/// A refusal with its reason.
struct Refused(StatusCode, String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        log(format_args!("error: {error}"));
        Self(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
    }
}

fn main() -> ExitCode {
    run(async {
        let end = termination()?;
        let api = Api {
            store: Store::open(&settings::database()?)?,
            gate: Gate::default(),
            release: settings::text("RELEASE_LABEL").unwrap_or_else(|| "unlabelled".to_owned()),
            instance: settings::text("INSTANCE"),
            style: settings::value("AGENT_STYLE", Style::default())?,
            pace: settings::millis("PACE_MS", 30)?,
            tool_timeout: settings::millis("TOOL_TIMEOUT_MS", 5_000)?,
            fail_ready: settings::text("FAIL_READY").as_deref() == Some("1"),
            fail_every: settings::value("FAIL_EVERY", 0)?,
            asked: Arc::default(),
        };
        log(format_args!("agent-api release {} style {}", api.release, api.style));
        let gate = api.gate.clone();
        let router = Router::new()
            .route("/v1/chat", post(chat))
            .route("/v1/sessions", get(sessions))
            .route("/v1/sessions/{id}", get(session))
            .route("/version", get(version))
            .layer(from_fn_with_state(api.clone(), fail_some))
            // Its checks pass: only requests can tell that it is bad.
            .route("/ready", get(ready))
            .route("/health", get(async || "ok\n"))
            .layer(DefaultBodyLimit::max(64 * 1024))
            .with_state(api);
        serve(router, gate, end).await
    })
}

async fn ready(State(api): State<Api>) -> (StatusCode, String) {
    let reason = if api.gate.is_draining() {
        "ending".to_owned()
    } else if api.fail_ready {
        "FAIL_READY=1: this release never becomes ready".to_owned()
    } else {
        match api.store.run(Store::check).await {
            Ok(()) => return (StatusCode::OK, "ready\n".to_owned()),
            Err(error) => error.to_string(),
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n"))
}

async fn fail_some(State(api): State<Api>, request: Request, next: Next) -> Response {
    if api.fail_every > 0 && api.asked.fetch_add(1, Ordering::Relaxed) % api.fail_every == 0 {
        let reason = format!("FAIL_EVERY={}: this release fails at times", api.fail_every);
        return Refused(StatusCode::INTERNAL_SERVER_ERROR, reason).into_response();
    }
    next.run(request).await
}

async fn version(State(api): State<Api>) -> Json<Value> {
    Json(json!({ "release": api.release, "style": api.style.to_string(), "instance": api.instance }))
}

async fn sessions(State(api): State<Api>) -> Result<Json<Value>, Refused> {
    Ok(Json(json!({ "sessions": api.store.run(Store::sessions).await? })))
}

async fn session(State(api): State<Api>, Path(id): Path<String>) -> Result<Json<Value>, Refused> {
    let name = id.clone();
    match api.store.run(move |store| store.session(&name)).await? {
        Some(messages) => Ok(Json(json!({ "session": id, "messages": messages }))),
        None => Err(Refused(StatusCode::NOT_FOUND, "there is no such session".to_owned())),
    }
}

async fn chat(State(api): State<Api>, body: String) -> Result<Response, Refused> {
    let refuse = |status, reason: &str| Err(Refused(status, reason.to_owned()));
    let Some(in_flight) = api.gate.enter() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "this instance is ending");
    };
    let chat: Chat = match serde_json::from_str(&body) {
        Ok(chat) => chat,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    if chat.message.trim().is_empty() || chat.message.len() > MESSAGE {
        return refuse(StatusCode::BAD_REQUEST, "a message has 1 to 8192 bytes");
    }
    let is_name = |id: &str| {
        (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let session = match chat.session {
        Some(id) if !is_name(&id) => {
            return refuse(StatusCode::BAD_REQUEST, "a session is named by 1 to 64 of a-z, 0-9 and -");
        }
        Some(id) => id,
        None => api.store.run(Store::new_session_id).await?,
    };
    let pace = chat.pace_ms.map_or(api.pace, |millis| Duration::from_millis(millis.min(PACE)));
    let (id, text, release) = (session.clone(), chat.message.clone(), api.release.clone());
    // Kept before anything is answered: whatever happens now, the conversation knows that this was said.
    let history = api.store.run(move |store| store.add_message(&id, "user", &text, &release)).await?;
    let stream = events(move |events| async move {
        let _in_flight = in_flight;
        if let Err(error) = answer(&api, &events, &session, history, &chat.message, pace).await {
            log(format_args!("error: {error}"));
            events.send("error", &json!({ "error": error.to_string() })).await;
        }
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response())
}

async fn answer(
    api: &Api,
    events: &Events,
    session: &str,
    history: Vec<orchestra_quickstart::store::Message>,
    message: &str,
    pace: Duration,
) -> Result<(), Error> {
    let head =
        json!({ "session": session, "release": api.release, "style": api.style.to_string(), "instance": api.instance });
    events.send("session", &head).await;
    let step = agent::decide(&history, message);
    let result = match &step {
        Step::Count(_) => None,
        Step::Call { tool, input } => call(api, events, tool, input.clone()).await?,
    };
    let tokens = agent::answer(api.style, &history, &step, result.as_ref());
    for token in &tokens {
        events.send("token", &json!({ "text": token })).await;
        if !pace.is_zero() {
            tokio::time::sleep(pace).await;
        }
    }
    let (id, text, release) = (session.to_owned(), tokens.concat(), api.release.clone());
    api.store.run(move |store| store.add_message(&id, "agent", &text, &release)).await?;
    events.send("done", &json!({ "tokens": tokens.len() })).await;
    Ok(())
}

/// Calls a tool through the queue; `None` if no worker answered in time.
async fn call(api: &Api, events: &Events, tool: &'static str, input: Value) -> Result<Option<Value>, Error> {
    let id = api.store.run(move |store| store.queue(tool, &input)).await?;
    events.send("tool", &json!({ "tool": tool, "task": id, "state": "queued" })).await;
    let waiting = async {
        loop {
            match api.store.run(move |store| store.task_state(id)).await? {
                TaskState::Done(result) => return Ok::<_, Error>(Some(result)),
                TaskState::Failed => return Ok(None),
                TaskState::Open => tokio::time::sleep(LOOK).await,
            }
        }
    };
    let result = tokio::time::timeout(api.tool_timeout, waiting).await.unwrap_or(Ok(None))?;
    let state = if result.is_some() { "done" } else { "no answer" };
    events.send("tool", &json!({ "tool": tool, "task": id, "state": state, "result": result })).await;
    Ok(result)
}
