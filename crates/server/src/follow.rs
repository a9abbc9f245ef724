//! Answers that go on: runs, events and logs.
//!
//! What happened is read from the store and then continued from its subscription, joined by sequence numbers, so nothing
//! is missed and nothing comes twice; a follower that is too slow for the subscription is served from the store again.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::header,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event as Frame, KeepAlive},
    },
};
use bytes::Bytes;
use orchestra_api::{LogLine, Progress, RunEvent};
use orchestra_engine::ControlPlane;
use orchestra_model::{Event, EventKind, ReleaseNumber, ResourceId, record::RunRecord};
use orchestra_provider::{LogQuery, LogStream};
use orchestra_store::{EventFilter, Store};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{broadcast, mpsc};

use crate::convert;

/// Longest time without looking at what steps wait for.
const REFRESH: Duration = Duration::from_millis(500);
/// Time in which several events make one look.
const GATHER: Duration = Duration::from_millis(15);
/// Last lines of a culprit that are shown.
const LAST_LINES: usize = 10;
/// Events that are read at once.
const CHUNK: usize = 1000;

/// Past and coming events, in order, each once.
struct Tail {
    store: Store,
    filter: EventFilter,
    subscription: broadcast::Receiver<Arc<Event>>,
    ready: std::collections::VecDeque<Event>,
    /// Whether the store may hold events that were not delivered.
    behind: bool,
}

impl Tail {
    fn new(store: Store, filter: EventFilter) -> Self {
        // Subscribed before the first read, so that nothing falls between.
        let subscription = store.subscribe_events();
        let filter = EventFilter { limit: CHUNK, ..filter };
        Self { store, filter, subscription, ready: std::collections::VecDeque::new(), behind: true }
    }

    /// The next event; `None` when the server stops. Cancel-safe: what was read is kept.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.filter.after_sequence = event.sequence;
                return Some(event);
            }
            if self.behind {
                let filter = self.filter.clone();
                let events = self.store.read(move |reader| reader.events(&filter)).await.ok()?;
                self.behind = events.len() >= CHUNK;
                self.ready.extend(events);
                continue;
            }
            match self.subscription.recv().await {
                Ok(event) if event.sequence > self.filter.after_sequence && self.wants(&event) => {
                    self.ready.push_back((*event).clone());
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => self.behind = true,
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }

    fn wants(&self, event: &Event) -> bool {
        let filter = &self.filter;
        filter.environment.as_ref().is_none_or(|id| *id == event.environment)
            && filter.resource.as_ref().is_none_or(|id| Some(id) == event.resource.as_ref())
            && filter.run.is_none_or(|run| Some(run) == event.run)
    }
}

fn sse(receiver: mpsc::Receiver<Frame>) -> Response {
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|frame| (Ok::<_, Infallible>(frame), receiver))
    });
    Sse::new(frames).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))).into_response()
}

/// Follows the events of an environment.
pub(crate) fn events(tree: &TaskTree, control: &ControlPlane, filter: EventFilter, tail: Option<u32>) -> Response {
    let (frames, receiver) = mpsc::channel(64);
    let store = control.store().clone();
    tree.start(TaskKind::Connection, "follow events", async move {
        let mut filter = filter;
        if let Some(tail) = tail {
            // The last so many of what there is, and then what comes.
            let last = EventFilter { limit: tail as usize, tail: true, ..filter.clone() };
            let newest = EventFilter { limit: 1, tail: true, ..filter.clone() };
            let newest = store.read(move |reader| reader.events(&newest)).await.unwrap_or_default();
            if tail == 0 {
                filter.after_sequence = newest.last().map_or(filter.after_sequence, |event| event.sequence);
            } else if let Some(first) = store.read(move |reader| reader.events(&last)).await.unwrap_or_default().first()
            {
                filter.after_sequence = first.sequence - 1;
            }
        }
        let mut tail = Tail::new(store, filter);
        while let Some(event) = tail.next().await {
            let Ok(data) = serde_json::to_string(&event) else { continue };
            let frame = Frame::default().event("event").id(event.sequence.to_string()).data(data);
            if frames.send(frame).await.is_err() {
                return;
            }
        }
    });
    sse(receiver)
}

/// Follows a run from its beginning to its end.
pub(crate) fn run(tree: &TaskTree, control: ControlPlane, record: RunRecord, after: Option<u64>) -> Response {
    let (frames, receiver) = mpsc::channel(64);
    tree.start(TaskKind::Connection, "follow run", async move {
        let mut follower =
            Follower { control, record, frames, sent: HashMap::new(), begun: HashMap::new(), took: HashMap::new() };
        // An error means that the client is gone.
        let _ = follower.follow(after.unwrap_or(0)).await;
    });
    sse(receiver)
}

struct Gone;

struct Follower {
    control: ControlPlane,
    record: RunRecord,
    frames: mpsc::Sender<Frame>,
    /// What was last said of each resource, apart from its running time.
    sent: HashMap<ResourceId, Progress>,
    begun: HashMap<ResourceId, u64>,
    took: HashMap<ResourceId, u64>,
}

impl Follower {
    async fn follow(&mut self, after: u64) -> Result<(), Gone> {
        let store = self.control.store().clone();
        let filter = EventFilter {
            environment: Some(self.record.environment.clone()),
            run: Some(self.record.id),
            ..EventFilter::default()
        };
        if self.record.state.is_final() {
            return self.replay(store, filter, after).await;
        }
        let mut tail = Tail::new(store, filter);
        let mut ended = false;
        self.look().await?;
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !ended {
            // Both arms are cancel-safe: `next` keeps what it read, and a tick that is lost comes again.
            tokio::select! {
                event = tail.next() => {
                    let Some(event) = event else { return Ok(()) };
                    ended = self.tell(&event, after).await?;
                    let until = Instant::now() + GATHER;
                    while !ended && Instant::now() < until {
                        match tokio::time::timeout_at(until.into(), tail.next()).await {
                            Ok(Some(event)) => ended = self.tell(&event, after).await?,
                            Ok(None) => return Ok(()),
                            Err(_) => break,
                        }
                    }
                }
                _ = refresh.tick() => {}
            }
            if !ended {
                self.look().await?;
            }
        }
        self.finish().await
    }

    /// Tells a run that has ended, as far back as its events are kept.
    async fn replay(&mut self, store: Store, mut filter: EventFilter, after: u64) -> Result<(), Gone> {
        filter.limit = CHUNK;
        loop {
            let chunk = filter.clone();
            let Ok(events) = store.read(move |reader| reader.events(&chunk)).await else { return Ok(()) };
            for event in &events {
                filter.after_sequence = event.sequence;
                self.tell(event, after).await?;
            }
            if events.len() < CHUNK {
                return self.finish().await;
            }
        }
    }

    /// Passes an event on. Returns whether it ends the run.
    async fn tell(&mut self, event: &Event, after: u64) -> Result<bool, Gone> {
        if let Some(resource) = &event.resource {
            match event.kind {
                EventKind::StepStarted => {
                    self.begun.insert(resource.clone(), event.at);
                }
                EventKind::StepSucceeded | EventKind::StepFailed => {
                    let begun = self.begun.get(resource).copied().unwrap_or(event.at);
                    self.took.insert(resource.clone(), event.at.saturating_sub(begun));
                }
                _ => {}
            }
        }
        if event.sequence > after {
            self.send(&RunEvent::Event(event.clone())).await?;
        }
        Ok(matches!(event.kind, EventKind::RunSucceeded | EventKind::RunFailed | EventKind::RunCancelled))
    }

    /// Says what changed of each step.
    async fn look(&mut self) -> Result<(), Gone> {
        let Ok(view) = self.control.view(&self.record.environment).await else { return Ok(()) };
        let Some(run) = view.status.run.as_ref().filter(|run| run.id == self.record.id) else { return Ok(()) };
        let now = orchestra_engine::Clock::wall();
        for step in &self.record.plan.steps {
            let elapsed = self.took.get(&step.resource).copied();
            let elapsed = elapsed.or_else(|| Some(now.saturating_sub(*self.begun.get(&step.resource)?))).unwrap_or(0);
            let state = run.steps.get(&step.resource).copied();
            let progress = convert::progress(run.state, state, step, &view, elapsed);
            let same = Progress { elapsed_ms: 0, ..progress.clone() };
            if self.sent.get(&step.resource) != Some(&same) {
                self.sent.insert(step.resource.clone(), same);
                self.send(&RunEvent::Progress(progress)).await?;
            }
        }
        Ok(())
    }

    /// Says where every step ended, and how the run did.
    async fn finish(&mut self) -> Result<(), Gone> {
        let Ok(mut record) = self.control.run(self.record.id).await else { return Ok(()) };
        if let Ok(view) = self.control.view(&record.environment).await {
            // Something newer may go on already, which is not this run's affair.
            let is_over = view.status.run.as_ref().is_some_and(|run| run.id != record.id);
            for step in record.plan.steps.clone() {
                // One that was put back has neither succeeded nor failed.
                let begun = self.begun.get(&step.resource);
                let whole = begun.map(|begun| record.ended_at.unwrap_or(*begun).saturating_sub(*begun));
                let elapsed = self.took.get(&step.resource).copied().or(whole).unwrap_or(0);
                let state = record.steps.get(&step.resource).copied();
                let mut progress = convert::progress(record.state, state, &step, &view, elapsed);
                progress.waits_for.clear();
                if let Some(last) = self.sent.get(&step.resource).filter(|_| is_over) {
                    (progress.ready, progress.desired) = (last.ready, last.desired);
                }
                let same = Progress { elapsed_ms: 0, ..progress.clone() };
                if self.sent.get(&step.resource) != Some(&same) {
                    self.send(&RunEvent::Progress(progress)).await?;
                }
            }
        }
        explain(&self.control, &mut record).await;
        self.send(&RunEvent::Done(Box::new(record))).await
    }

    async fn send(&self, event: &RunEvent) -> Result<(), Gone> {
        let inner = match event {
            RunEvent::Event(event) => serde_json::to_string(event),
            RunEvent::Progress(progress) => serde_json::to_string(progress),
            RunEvent::Done(record) => serde_json::to_string(record),
        };
        let Ok(data) = inner else { return Ok(()) };
        let mut frame = Frame::default().event(event.name()).data(data);
        if let Some(id) = event.id() {
            frame = frame.id(id.to_string());
        }
        self.frames.send(frame).await.map_err(|_| Gone)
    }
}

/// Adds the last output of the instances that made a run fail.
async fn explain(control: &ControlPlane, record: &mut RunRecord) {
    let mut culprits = record.culprits.clone();
    culprits.dedup();
    for culprit in culprits.into_iter().take(3) {
        let query = LogQuery {
            environment: record.environment.clone(),
            workloads: Vec::new(),
            instance: Some(culprit.clone()),
            stream: None,
            tail: Some(LAST_LINES),
            since: None,
            follow: false,
        };
        let Ok(mut lines) = control.logs(query).await else { continue };
        let mut text = String::new();
        while let Some(line) = lines.recv().await {
            text.push_str("\n  ");
            text.push_str(String::from_utf8_lossy(&line.bytes).trim_end_matches(['\n', '\r']));
        }
        let Some(problem) = record
            .problems
            .iter_mut()
            .find(|p| p.message.contains(&culprit.to_string()) || p.message.contains(culprit.workload.as_str()))
        else {
            continue;
        };
        problem.notes.push(if text.is_empty() {
            format!("{culprit} wrote nothing")
        } else {
            format!("last output of {culprit}:{text}")
        });
    }
}

/// Lines as newline-delimited JSON.
pub(crate) fn logs(lines: mpsc::Receiver<orchestra_provider::LogLine>, release: Option<ReleaseNumber>) -> Response {
    let stream = futures_util::stream::unfold(lines, move |mut lines| async move {
        loop {
            let line = lines.recv().await?;
            if release.is_some_and(|release| line.instance.release != release) {
                continue;
            }
            let line = LogLine {
                instance: line.instance,
                attempt: line.attempt,
                stream: match line.stream {
                    LogStream::Stdout => orchestra_api::LogStream::Stdout,
                    LogStream::Stderr => orchestra_api::LogStream::Stderr,
                },
                at: line.at,
                line: line.bytes.into(),
            };
            let Ok(mut json) = serde_json::to_vec(&line) else { continue };
            json.push(b'\n');
            return Some((Ok::<_, Infallible>(Bytes::from(json)), lines));
        }
    });
    ([(header::CONTENT_TYPE, orchestra_api::NDJSON)], Body::from_stream(stream)).into_response()
}
