//! Answers that go on: events of a run, events of an environment, lines of output.
//!
//! Events can be replayed, so a stream of them that is cut off goes on where it was, for as long as the client's patience
//! lasts. After an error `next` may be called again: it tries once more from the same place. Lines of output cannot be
//! replayed exactly, so that stream reports the loss and leaves the decision to the caller.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use http_body_util::BodyExt;
use orchestra_model::{Event, RunId};
use tokio::time::Instant;

use crate::{
    LAST_EVENT_ID,
    client::{Client, ClientError, protocol},
    observe::LogLine,
    query::{EventsQuery, query_string},
    routes::Method,
    run::RunEvent,
    sse::{Frame, SseParser},
    transport::{Body, BoxFuture, TransportError},
};

/// First and longest pause between two attempts to connect again.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Where a stream stands between two calls of `next`: everything that a dropped call must not lose.
enum Connection {
    None,
    /// A request is under way.
    Asked(BoxFuture<'static, Result<Body, ClientError>>),
    Open(Body, SseParser),
}

/// Frames of one stream of server-sent events over as many connections as it takes.
struct Frames {
    client: Client,
    operation: &'static str,
    connection: Connection,
    ready: VecDeque<Frame>,
    last_id: Option<u64>,
    /// When the connection was lost, if it was not found again since.
    lost_since: Option<Instant>,
    retry_at: Option<Instant>,
    pause: Duration,
}

impl Frames {
    fn new(client: Client, operation: &'static str, last_id: Option<u64>) -> Self {
        Self {
            client,
            operation,
            connection: Connection::None,
            ready: VecDeque::new(),
            last_id,
            lost_since: None,
            retry_at: None,
            pause: PAUSE,
        }
    }

    /// The next frame, from the path that `path` gives. Cancel-safe: a dropped call loses neither what was read nor a
    /// request that is under way, and the next call goes on with both.
    async fn next(&mut self, path: &str) -> Result<Frame, ClientError> {
        loop {
            if let Some(at) = self.retry_at {
                tokio::time::sleep_until(at).await;
                self.retry_at = None;
            }
            match self.attempt(path).await {
                Ok(frame) => {
                    self.lost_since = None;
                    self.pause = PAUSE;
                    return Ok(frame);
                }
                Err(error) => {
                    self.connection = Connection::None;
                    let now = Instant::now();
                    let since = *self.lost_since.get_or_insert(now);
                    if !error.is_lost() || now >= since + self.client.patience {
                        self.lost_since = None;
                        return Err(error);
                    }
                    self.retry_at = Some(now + self.pause);
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn attempt(&mut self, path: &str) -> Result<Frame, ClientError> {
        loop {
            while let Some(frame) = self.ready.pop_front() {
                if let Some(id) = frame.id.as_deref().and_then(|id| id.parse().ok()) {
                    if self.last_id.is_some_and(|last| id <= last) {
                        continue;
                    }
                    self.last_id = Some(id);
                }
                return Ok(frame);
            }
            match &mut self.connection {
                Connection::None => {
                    let (client, operation, path) = (self.client.clone(), self.operation, path.to_owned());
                    let last_id = self.last_id;
                    self.connection = Connection::Asked(Box::pin(async move {
                        let header = last_id.map(|id| (LAST_EVENT_ID, id.to_string()));
                        client.request(operation, Method::Get, &path, Bytes::new(), header).await
                    }));
                }
                Connection::Asked(request) => {
                    let body = request.await?;
                    self.connection = Connection::Open(body, SseParser::new());
                }
                Connection::Open(body, parser) => match body.frame().await {
                    Some(Ok(frame)) => {
                        let Ok(data) = frame.into_data() else { continue };
                        self.ready.extend(parser.push(&data).map_err(|error| protocol(self.operation, error))?);
                    }
                    Some(Err(error)) => return Err(ClientError::Transport(error)),
                    None => {
                        return Err(ClientError::Transport(TransportError::Lost {
                            endpoint: self.client.describe(),
                            source: "the server ended the stream".into(),
                        }));
                    }
                },
            }
        }
    }

    fn use_client(&mut self, client: Client) {
        self.client = client;
        self.connection = Connection::None;
        self.retry_at = None;
    }
}

/// Events of a run.
pub struct RunEventStream {
    frames: Frames,
    path: String,
    done: bool,
}

impl RunEventStream {
    pub(crate) fn new(client: Client, run: RunId) -> Self {
        Self { frames: Frames::new(client, "run_events", None), path: format!("/v1/runs/{run}/events"), done: false }
    }

    /// The next event; `None` after `Done`. Cancel-safe. After an error it may be called again.
    pub async fn next(&mut self) -> Option<Result<RunEvent, ClientError>> {
        while !self.done {
            let frame = match self.frames.next(&self.path).await {
                Ok(frame) => frame,
                Err(error) => return Some(Err(error)),
            };
            let event = match frame.event.as_deref() {
                Some("event") => serde_json::from_str(&frame.data).map(RunEvent::Event),
                Some("progress") => serde_json::from_str(&frame.data).map(RunEvent::Progress),
                Some("done") => serde_json::from_str(&frame.data).map(RunEvent::Done),
                // A newer server may have more to say.
                _ => continue,
            };
            self.done = matches!(event, Ok(RunEvent::Done(_)));
            return Some(event.map_err(|error| protocol("run_events", error)));
        }
        None
    }

    /// Uses another client from the next connection on: of the server that took over.
    pub fn use_client(&mut self, client: Client) {
        self.frames.use_client(client);
    }
}

/// Events of an environment.
pub struct EventStream {
    frames: Frames,
    path: String,
    query: EventsQuery,
}

impl EventStream {
    pub(crate) fn new(client: Client, path: String, query: EventsQuery) -> Self {
        Self { frames: Frames::new(client, "events", query.after), path, query }
    }

    /// The next event. Cancel-safe. After an error it may be called again.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            let mut query = EventsQuery { follow: true, ..self.query.clone() };
            if self.frames.last_id > self.query.after {
                // Something was delivered already: go on from there, and not with the tail again.
                (query.after, query.tail) = (self.frames.last_id, None);
            }
            let path = format!("{}{}", self.path, query_string(&query));
            let frame = self.frames.next(&path).await?;
            if frame.event.as_deref() == Some("event") {
                return serde_json::from_str(&frame.data).map_err(|error| protocol("events", error));
            }
        }
    }

    /// Uses another client from the next connection on: of the server that took over.
    pub fn use_client(&mut self, client: Client) {
        self.frames.use_client(client);
    }
}

/// Lines of output.
pub struct LogLineStream {
    body: Body,
    buffer: Vec<u8>,
    /// Where the search for the next line feed goes on.
    searched: usize,
    ended: bool,
}

impl LogLineStream {
    pub(crate) fn new(body: Body) -> Self {
        Self { body, buffer: Vec::new(), searched: 0, ended: false }
    }

    /// The next line; `None` when the server said that there are no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<LogLine, ClientError>> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Some(serde_json::from_slice(&line).map_err(|error| protocol("logs", error)));
            }
            self.searched = self.buffer.len();
            if self.ended {
                // Chunked encoding tells an end from a cut, so a rest without its end is the server's mistake.
                let rest = std::mem::take(&mut self.buffer);
                self.searched = 0;
                return (!rest.is_empty()).then(|| Err(protocol("logs", "the last line is cut off")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    self.ended = true;
                    self.buffer.clear();
                    self.searched = 0;
                    return Some(Err(ClientError::Transport(error)));
                }
                None => self.ended = true,
            }
        }
    }
}
