//! Evidence: what became of the requests to a watched route, by arm and client.
//!
//! A verdict on a release is a statement about chance, so only requests whose arm chance decided are in here
//! (`assign.rs`). Each leaves one mark when it ends, or when it is known to be bad: a response that began too late is
//! not waited for. What counts as what:
//!
//! | ends with | counts as |
//! |---|---|
//! | 5xx; a gRPC status that blames the server | `server_errors`, bad |
//! | no answer, half a response, gRPC without a status | `broken`, bad |
//! | a head, first event or end that is late | `slow_first_byte`, `slow_first_token`, `slow`, bad |
//! | 4xx; a gRPC status that blames the client | `client_failed` |
//! | the client going away | the bounds that had passed by then, bad; else `client_failed` |
//! | a cut at the end of a drain budget | the bounds that had passed by then, bad; else nothing at all |
//!
//! Clocks begin when an instance is chosen: waiting for one is no fault of a release. A stream has no bound as a whole.
//! An upgraded connection (WebSocket) has ended, as a request, with its 101.
//!
//! Marks go into one of a few shards, by thread, so that two threads rarely meet; a report empties all of them. Without a
//! server the shards just fill: clients beyond [`CLIENTS`] share the client 0, so that their size is bounded.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use http::{HeaderMap, StatusCode};
use orchestra_model::{
    quantity::Timespan,
    route::RouteId,
    traffic::{Arm, LATENCY_BUCKETS, LatencyHistogram, Permille, TrafficCell, TrafficReport, Watch, latency_bound},
};
use tokio::time::Instant;

use crate::exchange::replay::Upload;

/// Clients that are told apart in one report.
pub(crate) const CLIENTS: usize = 1_000;
/// A report comes at least this often, if only to say that nothing ended.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Reports are at least this far apart, whatever is asked for.
const SHORTEST: Duration = Duration::from_millis(20);
/// More than threads that usually serve.
const SHARDS: usize = 8;

/// How a route is watched.
#[derive(Debug)]
pub(crate) struct Watching {
    slow: Duration,
    first_byte: Duration,
    first_token: Duration,
    every: Duration,
    pub(crate) tally: Arc<Tally>,
}

impl Watching {
    /// As asked for; marks that were made for the same watch before are kept.
    pub(crate) fn new(watch: &Watch, route: &RouteId, before: Option<&Arc<Tally>>) -> Self {
        let bound = |bound: Option<Timespan>| bound.map_or(Duration::MAX, Timespan::duration);
        let same = before.filter(|tally| tally.watch == watch.id);
        Self {
            slow: bound(watch.slow),
            first_byte: bound(watch.first_byte),
            first_token: bound(watch.first_token),
            every: watch.every.duration().max(SHORTEST),
            tally: same.map_or_else(|| Arc::new(Tally::new(route.clone(), watch.id)), Arc::clone),
        }
    }

    /// Whether a report is due; if not, when to look again.
    pub(crate) fn is_due(&self, now: Instant) -> Result<(), Instant> {
        let told = self.tally.told();
        let (due, heartbeat) = (told + self.every, told + self.every.max(HEARTBEAT));
        if now < due {
            Err(due)
        } else if now < heartbeat && self.tally.is_empty() {
            // Whoever leaves a mark wakes nobody.
            Err(heartbeat.min(now + self.every))
        } else {
            Ok(())
        }
    }

    /// Makes what was not reported yet due at once. Whether there is any.
    pub(crate) fn hurry(&self) -> bool {
        let unsaid = !self.tally.is_empty();
        if let Some(past) = Instant::now().checked_sub(self.every).filter(|_| unsaid) {
            *lock(&self.tally.told) = past;
        }
        unsaid
    }
}

/// Marks of one watch.
#[derive(Debug)]
pub(crate) struct Tally {
    route: RouteId,
    watch: u64,
    shards: [Mutex<Marks>; SHARDS],
    /// Of the last report.
    sequence: AtomicU64,
    told: Mutex<Instant>,
}

/// What was marked.
#[derive(Debug, Default)]
struct Marks {
    cells: HashMap<(Arm, u64, Permille), TrafficCell>,
    /// By bucket; empty until the first.
    latency: Vec<u32>,
    mirrored: (u32, u32),
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shard of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    MINE.with(|mine| *mine)
}

/// The bucket of a duration (`LatencyHistogram::add`, without going through all buckets).
fn bucket(micros: u64) -> usize {
    static BOUNDS: LazyLock<Vec<u64>> = LazyLock::new(|| (0..LATENCY_BUCKETS - 1).map(latency_bound).collect());
    BOUNDS.partition_point(|bound| *bound < micros)
}

impl Marks {
    fn is_empty(&self) -> bool {
        self.cells.is_empty() && self.mirrored == (0, 0)
    }

    fn cell(&mut self, arm: Arm, client: u64, canary: Permille) -> &mut TrafficCell {
        let full = self.cells.len() >= CLIENTS && !self.cells.contains_key(&(arm, client, canary));
        let client = if full { 0 } else { client };
        self.cells.entry((arm, client, canary)).or_insert(TrafficCell { arm, client, canary, ..TrafficCell::default() })
    }

    fn add(&mut self, other: &TrafficCell) {
        let cell = self.cell(other.arm, other.client, other.canary);
        for (mine, theirs) in [
            (&mut cell.requests, other.requests),
            (&mut cell.bad, other.bad),
            (&mut cell.server_errors, other.server_errors),
            (&mut cell.broken, other.broken),
            (&mut cell.slow, other.slow),
            (&mut cell.slow_first_byte, other.slow_first_byte),
            (&mut cell.slow_first_token, other.slow_first_token),
            (&mut cell.client_failed, other.client_failed),
        ] {
            *mine = mine.saturating_add(theirs);
        }
    }

    fn add_latency(&mut self, bucket: usize, count: u32) {
        if self.latency.is_empty() {
            self.latency = vec![0; LATENCY_BUCKETS];
        }
        let bucket = &mut self.latency[bucket.min(LATENCY_BUCKETS - 1)];
        *bucket = bucket.saturating_add(count);
    }

    fn add_report(&mut self, report: &TrafficReport) {
        report.cells.iter().for_each(|cell| self.add(cell));
        for (bucket, count) in report.stable_latency.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            self.add_latency(bucket, *count);
        }
        self.mirrored.0 = self.mirrored.0.saturating_add(report.mirrored.0);
        self.mirrored.1 = self.mirrored.1.saturating_add(report.mirrored.1);
    }

    fn into_report(self, route: RouteId, watch: u64, sequence: u64) -> TrafficReport {
        let mut cells: Vec<TrafficCell> = self.cells.into_values().collect();
        cells.sort_unstable_by_key(|cell| (cell.arm, cell.canary, cell.client));
        let mut counts = self.latency;
        counts.truncate(counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1));
        let stable_latency = LatencyHistogram { counts };
        TrafficReport { route, watch, sequence, cells, stable_latency, mirrored: self.mirrored }
    }
}

/// Adds a report to one of the same watch; the later number stays.
pub(crate) fn merge(into: &mut TrafficReport, other: &TrafficReport) {
    let sequence = into.sequence.max(other.sequence);
    let mut marks = Marks::default();
    marks.add_report(into);
    marks.add_report(other);
    *into = marks.into_report(into.route.clone(), into.watch, sequence);
}

impl Tally {
    fn new(route: RouteId, watch: u64) -> Self {
        // Numbers go on growing when a proxy that was killed is replaced, whose successor knows nothing of them: the
        // jump says truly that something was lost.
        let start = u64::try_from(UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()).unwrap_or(0);
        let (sequence, told) = (AtomicU64::new(start), Mutex::new(Instant::now()));
        Self { route, watch, shards: Default::default(), sequence, told }
    }

    fn told(&self) -> Instant {
        *lock(&self.told)
    }

    fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| lock(shard).is_empty())
    }

    fn mark(&self, cell: &TrafficCell, stable_latency: Option<Duration>) {
        let bucket = stable_latency.map(|took| bucket(u64::try_from(took.as_micros()).unwrap_or(u64::MAX)));
        let mut marks = lock(&self.shards[shard()]);
        marks.add(cell);
        if let Some(bucket) = bucket {
            marks.add_latency(bucket, 1);
        }
    }

    /// The responses to a request and to its copy agreed, or not.
    pub(crate) fn compared(&self, agreed: bool) {
        let mut marks = lock(&self.shards[shard()]);
        let count = if agreed { &mut marks.mirrored.0 } else { &mut marks.mirrored.1 };
        *count = count.saturating_add(1);
    }

    /// Everything that was marked since the last report.
    pub(crate) fn report(&self) -> TrafficReport {
        let mut all = Marks::default();
        for shard in &self.shards {
            let marks = std::mem::take(&mut *lock(shard));
            marks.cells.values().for_each(|cell| all.add(cell));
            for (bucket, count) in marks.latency.iter().enumerate().filter(|(_, count)| **count > 0) {
                all.add_latency(bucket, *count);
            }
            all.mirrored.0 = all.mirrored.0.saturating_add(marks.mirrored.0);
            all.mirrored.1 = all.mirrored.1.saturating_add(marks.mirrored.1);
        }
        *lock(&self.told) = Instant::now();
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        all.into_report(self.route.clone(), self.watch, sequence)
    }

    /// Takes a report back that could not be sent.
    pub(crate) fn take_back(&self, report: &TrafficReport) {
        lock(&self.shards[0]).add_report(report);
        self.sequence.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is known of one request so far; leaves its mark when it ends. Dropped before that, the client has left. Empty for
/// a request of which nobody wants to know, which is most.
#[derive(Debug)]
pub(crate) struct Evidence(Option<Box<Trace>>);

#[derive(Debug)]
struct Trace {
    watching: Arc<Watching>,
    arm: Arm,
    client: u64,
    canary: Permille,
    since: Instant,
    /// The body of the request: a client that breaks off may look like an instance that does.
    upload: Option<Upload>,
    /// Time to the head of the response.
    head: Option<Duration>,
    first_token: Option<Duration>,
    /// The response is a stream, or, before it began, is expected to be one.
    stream: bool,
    grpc: bool,
    blame: Blame,
    marked: bool,
}

/// Whom a status blames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blame {
    Nobody,
    Client,
    Server,
    /// gRPC: no status yet.
    Open,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// It has not, but is known to be bad.
    Late,
    Broken,
    Cut,
    Left,
}

impl Evidence {
    /// Of nothing.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Of a request that was just assigned to `arm`, the canary arm having had this share.
    pub(crate) fn new(watching: &Arc<Watching>, arm: Arm, client: u64, canary: Permille, since: Instant) -> Self {
        Self(Some(Box::new(Trace {
            watching: Arc::clone(watching),
            arm,
            client,
            canary,
            since,
            upload: None,
            head: None,
            first_token: None,
            stream: false,
            grpc: false,
            blame: Blame::Nobody,
            marked: false,
        })))
    }

    pub(crate) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// What the request says: its body, and whether its sender expects a stream.
    pub(crate) fn asked(mut self, said: impl FnOnce() -> (Option<Upload>, bool)) -> Self {
        if let Some(trace) = &mut self.0 {
            (trace.upload, trace.stream) = said();
        }
        self
    }

    /// The request goes elsewhere: this try says nothing.
    pub(crate) fn forget(mut self) {
        if let Some(trace) = &mut self.0 {
            trace.marked = true;
        }
    }

    /// The head of the response came.
    pub(crate) fn answered(&mut self, status: StatusCode, headers: &HeaderMap, grpc: bool, stream: bool) {
        let Some(trace) = &mut self.0 else { return };
        trace.head = Some(trace.since.elapsed());
        (trace.stream, trace.grpc) = (stream, grpc);
        trace.blame = match status.as_u16() {
            500.. => Blame::Server,
            400.. => Blame::Client,
            _ if grpc => grpc_blame(headers).unwrap_or(Blame::Open),
            _ => Blame::Nobody,
        };
        if stream && trace.head > Some(trace.watching.first_byte) {
            trace.mark(End::Late);
        }
    }

    /// An event of a stream came.
    pub(crate) fn token(&mut self) {
        if let Some(trace) = &mut self.0
            && trace.first_token.is_none()
        {
            trace.first_token = Some(trace.since.elapsed());
            if trace.first_token > Some(trace.watching.first_token) {
                trace.mark(End::Late);
            }
        }
    }

    pub(crate) fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(trace) = &mut self.0
            && trace.grpc
            && let Some(blame) = grpc_blame(trailers)
        {
            trace.blame = blame;
        }
    }

    /// The response is whole.
    pub(crate) fn complete(self) {
        self.end(End::Complete);
    }

    /// The instance gave no response, or not all of it.
    pub(crate) fn broken(self) {
        self.end(End::Broken);
    }

    /// The instance was stopped before it was done.
    pub(crate) fn cut(self) {
        self.end(End::Cut);
    }

    fn end(mut self, end: End) {
        if let Some(trace) = &mut self.0 {
            trace.mark(end);
        }
    }
}

impl Trace {
    fn mark(&mut self, end: End) {
        if std::mem::replace(&mut self.marked, true) {
            return;
        }
        let after = self.since.elapsed();
        let client_broke = end == End::Broken && self.upload.as_ref().is_some_and(Upload::is_broken);
        let end = if client_broke { End::Left } else { end };
        let (arm, client, canary) = (self.arm, self.client, self.canary);
        let mut cell = TrafficCell { arm, client, canary, requests: 1, ..TrafficCell::default() };
        if self.blame == Blame::Client {
            cell.client_failed = 1;
            self.watching.tally.mark(&cell, None);
            return;
        }
        let watching = &*self.watching;
        cell.slow_first_byte = u32::from(self.head.unwrap_or(after) > watching.first_byte);
        cell.slow_first_token = u32::from(self.stream && self.first_token.unwrap_or(after) > watching.first_token);
        cell.slow = u32::from(!self.stream && after > watching.slow);
        cell.server_errors = u32::from(self.blame == Blame::Server);
        let without_status = end == End::Complete && self.blame == Blame::Open;
        cell.broken = u32::from(end == End::Broken || without_status);
        cell.bad =
            u32::from(cell.slow_first_byte | cell.slow_first_token | cell.slow | cell.server_errors | cell.broken > 0);
        match end {
            End::Cut if cell.bad == 0 => return,
            End::Left if cell.bad == 0 => cell.client_failed = 1,
            _ => {}
        }
        let whole = end == End::Complete && !self.stream && self.blame == Blame::Nobody;
        self.watching.tally.mark(&cell, (whole && self.arm == Arm::Stable).then_some(after));
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.mark(End::Left);
    }
}

/// Whether these headers or trailers have a gRPC status that blames the server.
pub(crate) fn blames_server(headers: &HeaderMap) -> bool {
    grpc_blame(headers) == Some(Blame::Server)
}

/// Whom a gRPC status blames ("Status codes and their use in gRPC"). `None` without one.
fn grpc_blame(headers: &HeaderMap) -> Option<Blame> {
    let status: u8 = headers.get("grpc-status")?.to_str().ok()?.parse().unwrap_or(2);
    Some(match status {
        0 => Blame::Nobody,
        // CANCELLED, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED,
        // FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNAUTHENTICATED
        1 | 3 | 5..=11 | 16 => Blame::Client,
        // UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, and what is no status
        _ => Blame::Server,
    })
}

#[cfg(test)]
mod tests;
