//! Raw counts of what happened.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::http::Problem;

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `GET` over kept connections.
    Get,
    /// `POST` over kept connections.
    Post,
    /// `GET`, each over a connection of its own.
    Fresh,
    /// `POST` over HTTP/2.
    H2c,
    /// Token stream.
    Stream,
    /// WebSocket.
    WebSocket,
}

impl Kind {
    /// Its name, also the beginning of its requests' ids.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Fresh => "fresh",
            Self::H2c => "h2c",
            Self::Stream => "stream",
            Self::WebSocket => "websocket",
        }
    }
}

/// One request that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What it was.
    pub kind: Kind,
    /// Its id.
    pub id: String,
    /// When it was sent, since the start of the load.
    pub begun: Duration,
    /// When it had failed.
    pub ended: Duration,
    /// In a word: `refused`, `reset`, `status 502`, `truncated`, `wrong`, `timeout`; `announced` if a stream was ended before
    /// its time in the way of its protocol: by a last event, or by a close with code 1012.
    pub problem: String,
    /// More.
    pub detail: String,
}

/// Counts of one kind.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Sent.
    pub sent: u64,
    /// Answered as they should.
    pub ok: u64,
    /// Failed, by problem.
    pub failed: BTreeMap<String, u64>,
    /// Tokens or messages received.
    pub tokens: u64,
    /// Longest time to a good answer; for streams to their end.
    pub slowest: Duration,
    /// Longest time between two good answers of this kind; for streams between two tokens of one stream.
    pub gap: Duration,
}

impl Tally {
    /// All failures.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

/// What happened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By kind.
    pub tallies: BTreeMap<Kind, Tally>,
    /// Each failure.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Counts of a kind.
    pub fn of(&self, kind: Kind) -> Tally {
        self.tallies.get(&kind).cloned().unwrap_or_default()
    }

    /// All that was sent.
    pub fn sent(&self) -> u64 {
        self.tallies.values().map(|tally| tally.sent).sum()
    }

    /// All that was answered as it should.
    pub fn ok(&self) -> u64 {
        self.tallies.values().map(|tally| tally.ok).sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<10} {:>7} {:>7} {:>7} {:>8} {:>10} {:>9}",
            "kind", "sent", "ok", "failed", "tokens", "slowest ms", "gap ms"
        )?;
        for (kind, tally) in &self.tallies {
            write!(
                f,
                "{:<10} {:>7} {:>7} {:>7} {:>8} {:>10} {:>9}",
                kind.as_str(),
                tally.sent,
                tally.ok,
                tally.failures(),
                tally.tokens,
                tally.slowest.as_millis(),
                tally.gap.as_millis(),
            )?;
            for (problem, count) in &tally.failed {
                write!(f, "  {problem}: {count}")?;
            }
            writeln!(f)?;
        }
        for failure in self.failures.iter().take(20) {
            writeln!(
                f,
                "  {} {} from {} ms to {} ms: {}",
                failure.id,
                failure.problem,
                failure.begun.as_millis(),
                failure.ended.as_millis(),
                failure.detail,
            )?;
        }
        Ok(())
    }
}

/// What a success says.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Success {
    pub(super) tokens: u64,
    pub(super) gap: Duration,
}

pub(super) struct Recorder {
    origin: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    report: Report,
    last_ok: BTreeMap<Kind, Duration>,
}

impl Recorder {
    pub(super) fn new() -> Self {
        Self { origin: Instant::now(), state: Mutex::default() }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, kind: Kind) -> Duration {
        self.state().report.tallies.entry(kind).or_default().sent += 1;
        self.elapsed()
    }

    pub(super) fn end(&self, kind: Kind, id: &str, begun: Duration, outcome: Result<Success, Problem>) {
        let ended = self.elapsed();
        let mut state = self.state();
        let State { report, last_ok } = &mut *state;
        let tally = report.tallies.entry(kind).or_default();
        match outcome {
            Ok(success) => {
                tally.ok += 1;
                tally.tokens += success.tokens;
                tally.slowest = tally.slowest.max(ended.saturating_sub(begun));
                let between = ended.saturating_sub(last_ok.insert(kind, ended).unwrap_or(ended));
                let gap = if matches!(kind, Kind::Stream | Kind::WebSocket) { success.gap } else { between };
                tally.gap = tally.gap.max(gap);
            }
            Err(Problem { problem, detail }) => {
                *tally.failed.entry(problem.clone()).or_default() += 1;
                report.failures.push(Failure { kind, id: id.to_owned(), begun, ended, problem, detail });
            }
        }
    }

    pub(super) fn report(&self) -> Report {
        self.state().report.clone()
    }
}
