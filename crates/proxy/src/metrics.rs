//! Counters of the proxy in Prometheus text format.
//!
//! A request touches a handful of atomics that were looked up when the table was compiled: no lock, no map, no
//! formatting. Label values come only from the route table and from closed lists in this file, so a client cannot grow
//! the output; releases that are long gone are forgotten.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Method, StatusCode};
use orchestra_model::{
    id::{Name, ReleaseNumber},
    route::RouteId,
    traffic::Arm,
};

use crate::load::Meter;

/// Series of releases that the table does not have any more and that are still shown, per service.
const OLD_RELEASES: usize = 4;

/// Upper bounds of the latency histogram, in microseconds: 1 ms to 60 s, as fine as dashboards need.
const BOUNDS: [u64; 15] = [
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000, 30_000_000, 60_000_000,
];

const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "other"];
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

fn method_index(method: &Method) -> usize {
    METHODS.iter().position(|m| *m == method.as_str()).unwrap_or(METHODS.len() - 1)
}

fn class_index(status: StatusCode) -> usize {
    usize::from(status.as_u16() / 100).clamp(1, CLASSES.len()) - 1
}

/// Why the proxy answered by itself, or why a response ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// No connection to an instance could be made.
    Connect,
    /// The instance closed the connection or spoke nonsense before its response was complete.
    Upstream,
    /// No ready instance appeared in time.
    Hold,
    /// Too many requests were waiting already.
    HoldFull,
    /// The drain budget ended first.
    Cut,
    /// The request was not acceptable.
    BadRequest,
    /// The route is gone.
    NoRoute,
    /// The client went away first.
    Client,
    /// The body of the request is too long.
    TooLarge,
    /// The client asks too often.
    RateLimited,
    /// The client sends its body too slowly.
    ClientTimeout,
    /// No answer, or no whole one, in the time that the route gives.
    Timeout,
    /// As much is under way as the route allows.
    Breaker,
    /// A stream on which nothing was sent for too long.
    Idle,
    /// The target of the request is too long.
    TargetTooLong,
}

impl ErrorKind {
    const ALL: [Self; 15] = [
        Self::Connect,
        Self::Upstream,
        Self::Hold,
        Self::HoldFull,
        Self::Cut,
        Self::BadRequest,
        Self::NoRoute,
        Self::Client,
        Self::TooLarge,
        Self::RateLimited,
        Self::ClientTimeout,
        Self::Timeout,
        Self::Breaker,
        Self::Idle,
        Self::TargetTooLong,
    ];

    /// The label, also of the `x-orchestra-error` header.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Upstream => "upstream",
            Self::Hold => "hold_timeout",
            Self::HoldFull => "hold_full",
            Self::Cut => "cut",
            Self::BadRequest => "bad_request",
            Self::NoRoute => "no_route",
            Self::Client => "client",
            Self::TooLarge => "too_large",
            Self::RateLimited => "rate_limited",
            Self::ClientTimeout => "client_timeout",
            Self::Timeout => "timeout",
            Self::Breaker => "breaker",
            Self::Idle => "idle",
            Self::TargetTooLong => "target_too_long",
        }
    }
}

/// Why a request was sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetryKind {
    /// The connection could not be made.
    Connect,
    /// A reused connection was closed before it carried anything.
    Stale,
    /// The instance said that it did not process it.
    Refused,
    /// It was sent and not answered, and may be sent twice.
    Failed,
}

impl RetryKind {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Connect, "connect"),
        (Self::Stale, "stale_connection"),
        (Self::Refused, "refused_stream"),
        (Self::Failed, "no_answer"),
    ];
}

/// What became of the copy of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MirrorOutcome {
    /// Its response was the same.
    Agreed,
    /// It was another.
    Differed,
    /// There was none, or not all of it.
    Failed,
    /// No copy was made, or there was nothing to compare it with.
    Skipped,
}

impl MirrorOutcome {
    const ALL: [(Self, &'static str); 4] =
        [(Self::Agreed, "agreed"), (Self::Differed, "differed"), (Self::Failed, "failed"), (Self::Skipped, "skipped")];
}

/// Numbers of one release of one service on one arm (or of a service without a release: what never reached one).
#[derive(Debug, Default)]
pub(crate) struct Series {
    requests: [[AtomicU64; CLASSES.len()]; METHODS.len()],
    errors: [AtomicU64; ErrorKind::ALL.len()],
    retries: [AtomicU64; RetryKind::ALL.len()],
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
    connections: AtomicU64,
    upstream_connections: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    requests_in_flight: AtomicU64,
    streams_in_flight: AtomicU64,
    mirrored: [AtomicU64; MirrorOutcome::ALL.len()],
    holding: AtomicU64,
    held: AtomicU64,
    ejections: AtomicU64,
    fallbacks: AtomicU64,
    unbudgeted: AtomicU64,
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Series {
    /// A response head went to the client, this long after the request arrived.
    pub(crate) fn responded(&self, method: &Method, status: StatusCode, after: Duration) {
        add(&self.requests[method_index(method)][class_index(status)], 1);
        let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        add(&self.buckets[BOUNDS.partition_point(|bound| *bound < micros)], 1);
        add(&self.micros, micros);
    }

    pub(crate) fn error(&self, kind: ErrorKind) {
        add(&self.errors[kind as usize], 1);
    }

    pub(crate) fn retry(&self, kind: RetryKind) {
        add(&self.retries[kind as usize], 1);
    }

    /// A request was not sent again because the budget was used up.
    pub(crate) fn unbudgeted(&self) {
        add(&self.unbudgeted, 1);
    }

    /// An instance is left out for a while.
    pub(crate) fn ejected(&self) {
        add(&self.ejections, 1);
    }

    /// Another service answers.
    pub(crate) fn fell_back(&self) {
        add(&self.fallbacks, 1);
    }

    /// A client connected (TCP routes).
    pub(crate) fn connected(&self) {
        add(&self.connections, 1);
    }

    /// A connection to an instance was made.
    pub(crate) fn dialled(&self) {
        add(&self.upstream_connections, 1);
    }

    /// Bytes of bodies from clients.
    pub(crate) fn received(&self, bytes: usize) {
        add(&self.received, bytes as u64);
    }

    /// Bytes of bodies to clients.
    pub(crate) fn sent(&self, bytes: usize) {
        add(&self.sent, bytes as u64);
    }

    /// What became of a copy of a request.
    pub(crate) fn mirrored(&self, outcome: MirrorOutcome) {
        add(&self.mirrored[outcome as usize], 1);
    }

    /// A request begins to wait for an instance.
    pub(crate) fn waits(&self) {
        add(&self.holding, 1);
        add(&self.held, 1);
    }

    /// It does not wait any more.
    pub(crate) fn waited(&self) {
        self.holding.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts something in flight until dropped.
    pub(crate) fn gauge(self: &Arc<Self>, stream: bool) -> Gauge {
        let gauge = Gauge { series: Arc::clone(self), stream, meter: None };
        add(gauge.counter(), 1);
        gauge
    }
}

/// Something in flight.
#[derive(Debug)]
pub(crate) struct Gauge {
    series: Arc<Series>,
    stream: bool,
    meter: Option<Arc<Meter>>,
}

impl Gauge {
    /// Counts for the meter of a route too, if it has one.
    pub(crate) fn metered(mut self, meter: Option<&Arc<Meter>>) -> Self {
        if let Some(meter) = meter {
            meter.enter(self.stream);
            self.meter = Some(Arc::clone(meter));
        }
        self
    }

    fn counter(&self) -> &AtomicU64 {
        if self.stream { &self.series.streams_in_flight } else { &self.series.requests_in_flight }
    }

    pub(crate) fn become_stream(&mut self) {
        if !self.stream {
            self.counter().fetch_sub(1, Ordering::Relaxed);
            self.stream = true;
            add(self.counter(), 1);
            if let Some(meter) = &self.meter {
                meter.become_stream();
            }
        }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.counter().fetch_sub(1, Ordering::Relaxed);
        if let Some(meter) = &self.meter {
            meter.leave(self.stream);
        }
    }
}

/// Name, help and value of a counter with the labels of its series.
type Counter = (&'static str, &'static str, fn(&Series) -> &AtomicU64);

/// Whose numbers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    stack: Name,
    environment: Name,
    service: Name,
    /// `None`: the request reached no release.
    release: Option<(ReleaseNumber, Arm)>,
}

impl Key {
    fn new(route: &RouteId, release: Option<(ReleaseNumber, Arm)>) -> Self {
        Self {
            stack: route.environment.stack.clone(),
            environment: route.environment.environment.clone(),
            service: route.service.clone(),
            release,
        }
    }
}

/// Numbers of the whole process, and the series of all services.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    /// Client connections that are open.
    pub(crate) connections: AtomicU64,
    /// Client connections that were ever accepted.
    pub(crate) accepted: AtomicU64,
    /// Client connections that were let go to make room.
    pub(crate) evicted: AtomicU64,
    /// Requests that wait for a ready instance.
    pub(crate) holding: AtomicU64,
    /// Requests that ever waited.
    pub(crate) held: AtomicU64,
    /// Version of the table in force.
    pub(crate) table: AtomicU64,
    series: Mutex<BTreeMap<Key, Arc<Series>>>,
}

impl Registry {
    fn all(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Arc<Series>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The series of a release on an arm, or of what reached none.
    pub(crate) fn series(&self, route: &RouteId, release: Option<(ReleaseNumber, Arm)>) -> Arc<Series> {
        let key = Key::new(route, release);
        Arc::clone(self.all().entry(key).or_default())
    }

    /// Forgets releases that nobody uses any more, except the latest few.
    pub(crate) fn forget(&self) {
        let mut all = self.all();
        let idle: Vec<Key> = all
            .iter()
            .filter(|(key, series)| key.release.is_some() && Arc::strong_count(series) == 1)
            .map(|(key, _)| key.clone())
            .collect();
        // Sorted by service, then release: the latest of each service stay.
        for (index, key) in idle.iter().enumerate() {
            let same = |other: &&Key| {
                (&other.stack, &other.environment, &other.service) == (&key.stack, &key.environment, &key.service)
            };
            if idle[index + 1..].iter().take_while(same).count() >= OLD_RELEASES {
                all.remove(key);
            }
        }
    }

    /// Prometheus text format 0.0.4.
    pub(crate) fn render(&self) -> String {
        let mut page = Page { text: String::with_capacity(16 << 10), family: "" };
        let all: Vec<(String, Arc<Series>)> =
            self.all().iter().map(|(key, series)| (labels(key), Arc::clone(series))).collect();
        page.family("orchestra_proxy_requests_total", "counter", "Responses that went to clients.");
        for (labels, series) in &all {
            for (method, classes) in METHODS.iter().zip(&series.requests) {
                for (class, count) in CLASSES.iter().zip(classes) {
                    page.nonzero(&format!("{labels},method=\"{method}\",code=\"{class}\""), count);
                }
            }
        }
        page.family("orchestra_proxy_errors_total", "counter", "Answers by the proxy itself, and cut responses.");
        for (labels, series) in &all {
            for (kind, count) in ErrorKind::ALL.iter().zip(&series.errors) {
                page.nonzero(&format!("{labels},kind=\"{}\"", kind.label()), count);
            }
        }
        page.family("orchestra_proxy_retries_total", "counter", "Requests that were sent once more.");
        for (labels, series) in &all {
            for ((_, kind), count) in RetryKind::ALL.iter().zip(&series.retries) {
                page.nonzero(&format!("{labels},reason=\"{kind}\""), count);
            }
        }
        let counters: [Counter; 3] = [
            ("orchestra_proxy_retry_budget_exhausted_total", "Requests not sent again for want of budget.", |s| {
                &s.unbudgeted
            }),
            ("orchestra_proxy_ejections_total", "Instances left out because they failed.", |s| &s.ejections),
            ("orchestra_proxy_fallbacks_total", "Requests that another service got.", |s| &s.fallbacks),
        ];
        for (name, help, counter) in counters {
            page.family(name, "counter", help);
            for (labels, series) in &all {
                page.nonzero(labels, counter(series));
            }
        }
        page.family("orchestra_proxy_mirrored_total", "counter", "Copies of requests, by what became of them.");
        for (labels, series) in &all {
            for ((_, outcome), count) in MirrorOutcome::ALL.iter().zip(&series.mirrored) {
                page.nonzero(&format!("{labels},outcome=\"{outcome}\""), count);
            }
        }
        page.histogram(&all);
        page.gauges(&all);
        page.holds(self);
        let plain: [(&'static str, &str, &str, &AtomicU64); 6] = [
            ("orchestra_proxy_client_connections", "gauge", "Open connections of clients.", &self.connections),
            ("orchestra_proxy_client_connections_total", "counter", "Connections of clients.", &self.accepted),
            ("orchestra_proxy_evicted_total", "counter", "Connections that made room.", &self.evicted),
            ("orchestra_proxy_holding", "gauge", "Requests that wait for a ready instance.", &self.holding),
            ("orchestra_proxy_holds_total", "counter", "Requests that had to wait.", &self.held),
            ("orchestra_proxy_table_version", "gauge", "Version of the route table in force.", &self.table),
        ];
        for (name, kind, help, value) in plain {
            page.family(name, kind, help);
            let _ = writeln!(page.text, "{name} {}", value.load(Ordering::Relaxed));
        }
        page.text
    }
}

/// Names are DNS labels and releases numbers: nothing to escape.
pub(crate) fn release_labels(route: &RouteId, release: ReleaseNumber, arm: Arm) -> String {
    labels(&Key::new(route, Some((release, arm))))
}

fn labels(key: &Key) -> String {
    let release = key.release.map(|(release, _)| release.to_string()).unwrap_or_default();
    let arm = match key.release {
        None => "",
        Some((_, Arm::Stable)) => "stable",
        Some((_, Arm::Canary)) => "canary",
    };
    format!("{},release=\"{release}\",arm=\"{arm}\"", service_labels(key))
}

/// Text under construction.
struct Page {
    text: String,
    /// Family of the samples that follow.
    family: &'static str,
}

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self.family = name;
    }

    fn sample(&mut self, suffix: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{}{suffix}{{{labels}}} {value}", self.family);
    }

    /// Most combinations never happen; those are left out.
    fn nonzero(&mut self, labels: &str, count: &AtomicU64) {
        let count = count.load(Ordering::Relaxed);
        if count > 0 {
            self.sample("", labels, count);
        }
    }

    fn histogram(&mut self, all: &[(String, Arc<Series>)]) {
        self.family(
            "orchestra_proxy_response_seconds",
            "histogram",
            "Time from a request's arrival to the head of its response, waiting for a ready instance included.",
        );
        for (labels, series) in all {
            let mut count = 0;
            for (index, bucket) in series.buckets.iter().enumerate() {
                count += bucket.load(Ordering::Relaxed);
                let bound = BOUNDS.get(index).map_or_else(|| "+Inf".to_owned(), |micros| seconds(*micros));
                self.sample("_bucket", &format!("{labels},le=\"{bound}\""), count);
            }
            self.sample("_sum", labels, seconds(series.micros.load(Ordering::Relaxed)));
            self.sample("_count", labels, count);
        }
    }

    fn gauges(&mut self, all: &[(String, Arc<Series>)]) {
        self.family("orchestra_proxy_in_flight", "gauge", "Requests and streams in flight to instances.");
        for (labels, series) in all {
            for (kind, value) in [("request", &series.requests_in_flight), ("stream", &series.streams_in_flight)] {
                self.sample("", &format!("{labels},kind=\"{kind}\""), value.load(Ordering::Relaxed));
            }
        }
        self.family("orchestra_proxy_body_bytes_total", "counter", "Bytes of bodies and spliced connections.");
        for (labels, series) in all {
            for (direction, value) in [("received", &series.received), ("sent", &series.sent)] {
                self.nonzero(&format!("{labels},direction=\"{direction}\""), value);
            }
        }
        self.family("orchestra_proxy_tcp_connections_total", "counter", "Connections of clients to TCP routes.");
        for (labels, series) in all {
            self.nonzero(labels, &series.connections);
        }
        self.family("orchestra_proxy_instance_connections_total", "counter", "Connections made to instances.");
        for (labels, series) in all {
            self.nonzero(labels, &series.upstream_connections);
        }
    }
}

impl Page {
    /// By service: what waits has not reached a release.
    fn holds(&mut self, registry: &Registry) {
        let services: Vec<(String, Arc<Series>)> = {
            let all = registry.all();
            let routes = all.iter().filter(|(key, _)| key.release.is_none());
            routes.map(|(key, series)| (service_labels(key), Arc::clone(series))).collect()
        };
        self.family("orchestra_proxy_service_holding", "gauge", "Requests that wait for a ready instance, by service.");
        for (labels, series) in &services {
            self.sample("", labels, series.holding.load(Ordering::Relaxed));
        }
        self.family("orchestra_proxy_service_holds_total", "counter", "Requests that had to wait, by service.");
        for (labels, series) in &services {
            self.nonzero(labels, &series.held);
        }
    }
}

fn service_labels(key: &Key) -> String {
    format!("stack=\"{}\",environment=\"{}\",service=\"{}\"", key.stack, key.environment, key.service)
}

/// Seconds without rounding.
fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> RouteId {
        RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        }
    }

    #[test]
    fn the_page_says_what_happened() {
        let registry = Registry::default();
        let series = registry.series(&route(), Some((ReleaseNumber(3), Arm::Canary)));
        series.responded(&Method::GET, StatusCode::OK, Duration::from_micros(2_500));
        series.responded(&Method::from_bytes(b"BREW").unwrap(), StatusCode::IM_A_TEAPOT, Duration::from_secs(90));
        series.error(ErrorKind::Cut);
        series.retry(RetryKind::Refused);
        let mut gauge = series.gauge(false);
        gauge.become_stream();
        let page = registry.render();
        let labels = r#"stack="demo",environment="dev",service="api",release="3",arm="canary""#;
        for line in [
            format!("orchestra_proxy_requests_total{{{labels},method=\"GET\",code=\"2xx\"}} 1"),
            format!("orchestra_proxy_requests_total{{{labels},method=\"other\",code=\"4xx\"}} 1"),
            format!("orchestra_proxy_errors_total{{{labels},kind=\"cut\"}} 1"),
            format!("orchestra_proxy_retries_total{{{labels},reason=\"refused_stream\"}} 1"),
            format!("orchestra_proxy_response_seconds_bucket{{{labels},le=\"0.001\"}} 0"),
            format!("orchestra_proxy_response_seconds_bucket{{{labels},le=\"0.0025\"}} 1"),
            format!("orchestra_proxy_response_seconds_bucket{{{labels},le=\"60\"}} 1"),
            format!("orchestra_proxy_response_seconds_bucket{{{labels},le=\"+Inf\"}} 2"),
            format!("orchestra_proxy_response_seconds_sum{{{labels}}} 90.0025"),
            format!("orchestra_proxy_in_flight{{{labels},kind=\"request\"}} 0"),
            format!("orchestra_proxy_in_flight{{{labels},kind=\"stream\"}} 1"),
        ] {
            assert!(page.lines().any(|l| l == line), "{line}\n{page}");
        }
        drop(gauge);
        assert!(registry.render().contains(&format!("in_flight{{{labels},kind=\"stream\"}} 0")));
    }

    #[test]
    fn old_releases_are_forgotten_and_used_ones_kept() {
        let registry = Registry::default();
        let used = registry.series(&route(), Some((ReleaseNumber(1), Arm::Stable)));
        for release in 2..=20 {
            registry.series(&route(), Some((ReleaseNumber(release), Arm::Stable)));
        }
        registry.forget();
        let kept: Vec<u64> = registry.all().keys().filter_map(|k| k.release).map(|(r, _)| r.0).collect();
        assert_eq!(kept, [1, 17, 18, 19, 20]);
        drop(used);
    }
}
