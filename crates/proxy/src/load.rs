//! How much a metered route carries.
//!
//! Counted only where somebody asked for it; what was in flight before that is not in the numbers.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use orchestra_model::{quantity::Timespan, route::RouteId, traffic::LoadReport};
use tokio::{sync::Notify, time::Instant};

/// Pause between reports.
const EVERY: Duration = Duration::from_secs(1);
/// The same when a request waits for an instance that somebody has to start.
const URGENT: Duration = Duration::from_millis(20);

/// Numbers of one route.
#[derive(Debug)]
pub(crate) struct Meter {
    begun: AtomicU64,
    in_flight: AtomicU32,
    streams: AtomicU32,
    tokens: AtomicU64,
    tokens_in_flight: AtomicU64,
    urgent: AtomicBool,
    told: Mutex<Told>,
}

/// What the last report said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    at: Instant,
    begun: u64,
    tokens: u64,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            begun: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            streams: AtomicU32::new(0),
            tokens: AtomicU64::new(0),
            tokens_in_flight: AtomicU64::new(0),
            urgent: AtomicBool::new(true),
            told: Mutex::new(Told { at: Instant::now(), begun: 0, tokens: 0 }),
        }
    }
}

impl Meter {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request began.
    pub(crate) fn began(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// A request begins to wait for an instance; the reporter is told at once.
    pub(crate) fn waits(&self, reporter: &Notify) {
        if !self.urgent.swap(true, Ordering::AcqRel) {
            reporter.notify_one();
        }
    }

    /// Something is in flight.
    pub(crate) fn enter(&self, stream: bool) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if stream {
            self.become_stream();
        }
    }

    pub(crate) fn become_stream(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    /// It is not any more.
    pub(crate) fn leave(&self, stream: bool) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if stream {
            self.streams.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The next report comes as soon as it may.
    pub(crate) fn hurry(&self) {
        self.urgent.store(true, Ordering::Release);
    }

    /// Whether a report is due; if not, when it will be.
    pub(crate) fn is_due(&self, now: Instant) -> Result<(), Instant> {
        let due = self.told().at + if self.urgent.load(Ordering::Acquire) { URGENT } else { EVERY };
        if now < due { Err(due) } else { Ok(()) }
    }

    /// Numbers since the report before, and of now; with what to give to [`Self::take_back`] if it cannot be sent.
    pub(crate) fn report(&self, route: &RouteId, held: u32) -> (LoadReport, Told) {
        // First, so that a request that waits from here on hurries the next report.
        self.urgent.store(false, Ordering::Release);
        let now = Told {
            at: Instant::now(),
            begun: self.begun.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
        };
        let before = std::mem::replace(&mut *self.told(), now);
        let report = LoadReport {
            route: route.clone(),
            over: span(now.at - before.at),
            requests: now.begun - before.begun,
            in_flight: self.in_flight.load(Ordering::Relaxed),
            streams: self.streams.load(Ordering::Relaxed),
            tokens: now.tokens - before.tokens,
            tokens_in_flight: self.tokens_in_flight.load(Ordering::Relaxed),
            held,
        };
        (report, before)
    }

    /// The last report was not sent: the next one says what it would have said.
    pub(crate) fn take_back(&self, before: Told) {
        *self.told() = before;
    }
}

/// The events of one stream, which are in flight as long as it is.
#[derive(Debug, Default)]
pub(crate) struct StreamTokens {
    meter: Option<Arc<Meter>>,
    sent: u64,
}

impl StreamTokens {
    pub(crate) fn new(meter: Option<&Arc<Meter>>) -> Self {
        Self { meter: meter.cloned(), sent: 0 }
    }

    /// It sent events.
    pub(crate) fn send(&mut self, count: u64) {
        if let Some(meter) = &self.meter {
            self.sent += count;
            meter.tokens.fetch_add(count, Ordering::Relaxed);
            meter.tokens_in_flight.fetch_add(count, Ordering::Relaxed);
        }
    }
}

impl Drop for StreamTokens {
    fn drop(&mut self) {
        if let Some(meter) = &self.meter {
            meter.tokens_in_flight.fetch_sub(self.sent, Ordering::Relaxed);
        }
    }
}

fn span(duration: Duration) -> Timespan {
    Timespan::millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// Puts a newer report in the place of an older one that nobody has read: counts add up, what is in flight is as of now.
pub(crate) fn merge(old: &LoadReport, new: &mut LoadReport) {
    new.over = span(old.over.duration() + new.over.duration());
    new.requests += old.requests;
    new.tokens += old.tokens;
}

/// Adds what another process carries on the same route.
pub(crate) fn add(to: &mut LoadReport, other: &LoadReport) {
    to.requests += other.requests;
    to.tokens += other.tokens;
    to.in_flight += other.in_flight;
    to.streams += other.streams;
    to.tokens_in_flight += other.tokens_in_flight;
    to.held += other.held;
}
