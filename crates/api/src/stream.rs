//! Answers that go on: events of a run, events of an environment, lines of output.
//!
//! Events can be replayed, so a stream of them that is cut off goes on where it was, for as long as the client's patience
//! lasts. After an error `next` may be called again: it tries once more from the same place. Lines of output cannot be
//! replayed exactly, so that stream reports the loss and leaves the decision to the caller.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use http_body_util::BodyExt;
use orchestra_model::{Event, RunId};

use crate::{
    client::{Client, ClientError, protocol},
    observe::LogLine,
    query::{EventsQuery, query_string},
    routes::Method,
    run::RunEvent,
    sse::{Frame, SseParser},
    transport::{Body, TransportError},
};

/// Frames of one stream of server-sent events over as many connections as it takes.
struct Frames {
    client: Client,
    operation: &'static str,
    connection: Option<(Body, SseParser)>,
    ready: VecDeque<Frame>,
    last_id: Option<u64>,
}

impl Frames {
    fn new(client: Client, operation: &'static str, last_id: Option<u64>) -> Self {
        Self { client, operation, connection: None, ready: VecDeque::new(), last_id }
    }

    /// The next frame, from the path that `path` gives. Cancel-safe: what was read is kept.
    async fn next(&mut self, path: &str) -> Result<Frame, ClientError> {
        let mut pause = Duration::from_millis(20);
        let mut waited = Duration::ZERO;
        loop {
            match self.attempt(path).await {
                Ok(frame) => return Ok(frame),
                Err(error) if error.is_lost() => {
                    self.connection = None;
                    if waited >= self.client.patience {
                        return Err(error);
                    }
                    tokio::time::sleep(pause).await;
                    waited += pause;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Err(error) => return Err(error),
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
            if self.connection.is_none() {
                let body = self.client.request(self.operation, Method::Get, path, Bytes::new(), self.last_id).await?;
                self.connection = Some((body, SseParser::new()));
            }
            let Some((body, parser)) = &mut self.connection else { continue };
            match body.frame().await {
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    self.ready.extend(parser.push(&data).map_err(|error| protocol(self.operation, error))?);
                }
                Some(Err(error)) => {
                    self.connection = None;
                    return Err(ClientError::Transport(error));
                }
                None => {
                    self.connection = None;
                    return Err(ClientError::Transport(TransportError::Lost {
                        endpoint: self.client.describe(),
                        source: "the server ended the stream".into(),
                    }));
                }
            }
        }
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
        self.frames.client = client;
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
        self.frames.client = client;
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
