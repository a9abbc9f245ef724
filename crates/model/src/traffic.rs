//! How requests are treated on their way: what a stack says of a published port, how a rollout splits its traffic, and
//! what the data plane reports of it.
//!
//! [`PortPolicy`] comes from the stack file and changes with releases. [`Split`] comes from a rollout and changes with
//! its steps; the two never mix, so that a step cannot lose a limit and a new limit cannot move a weight.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    id::Name,
    network::Network,
    quantity::{ByteSize, Timespan},
    route::RouteId,
    time::UnixMillis,
};

/// What a stack says of a published port, beside address and protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PortPolicy {
    /// TLS is spoken with clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// What a client is recognised by, so that its requests stay with one instance and one release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sticky: Option<RequestKey>,
    /// Skew protection: a client stays with the release that it first met for as long as that one lives. Browsers carry
    /// it in a cookie, programs may send the header [`RELEASE_HEADER`].
    pub pin: bool,
    /// Bounds of requests.
    pub limits: RouteLimits,
    /// Bounds of time.
    pub timeouts: RouteTimeouts,
    /// Uploads up to this size are read before an instance is chosen, so that a slow client binds none; larger ones
    /// are passed on as they come. `None` passes everything on as it comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub buffer: Option<ByteSize>,
    /// When a request is sent again.
    pub retry: Retry,
    /// When an instance that answers badly is left out for a while.
    pub outlier: Outlier,
    /// When further requests are refused at once.
    pub breaker: Breaker,
    /// Published port of another service of the stack that answers while this one has no instance that could.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Fallback>,
    /// Proxies in front of this one, whose word on who the client is counts. This machine is always one of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<Network>,
}

impl PortPolicy {
    /// Whether it says nothing, so that it need not be written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Response header with the release that answered, and request header that asks for one. In lower case.
pub const RELEASE_HEADER: &str = "orchestra-release";

/// Where a certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tls {
    /// From PEM files, read again when they change.
    Files {
        /// Absolute path of the certificate with its chain.
        certificate: String,
        /// Absolute path of the key.
        key: String,
        /// Absolute path of another certificate, with its key, for clients that ask for a name in their first message (RFC
        /// 6066 section 3). A proxy that does not know of it shows the one above to all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        named: Option<String>,
    },
    /// Issued by the development authority of this machine (`orchestra tls trust`) for these names and `localhost`.
    Development {
        /// DNS names.
        names: BTreeSet<String>,
    },
}

/// Domains that the development authority can vouch for, each with everything below it: names that no public site has.
/// `localhost` and `test`: RFC 6761; `internal`: reserved by ICANN in 2024; `home.arpa`: RFC 8375; `local`: RFC 6762.
pub const DEVELOPMENT_DOMAINS: [&str; 5] = ["localhost", "test", "internal", "home.arpa", "local"];

/// Whether the development authority can vouch for a DNS name.
pub fn is_development_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let below = |domain: &&str| name.strip_suffix(*domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    DEVELOPMENT_DOMAINS.iter().any(below)
}

/// Something by which requests that belong together are recognised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RequestKey {
    /// Value of this cookie; the proxy sets it where a client has none.
    Cookie(String),
    /// Value of this header, in lower case: a conversation, a session, a tenant.
    Header(String),
    /// Value of this parameter of the query.
    Query(String),
    /// Address of the client.
    Client,
}

/// Bounds of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RouteLimits {
    /// Longest body of a request; a longer one is answered 413.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<ByteSize>,
    /// Requests of one client address per second; more are answered 429 with `Retry-After`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
}

/// Bounds of time of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RouteTimeouts {
    /// From the choice of an instance to the head of its response; then 504. Zero is no bound.
    pub first_byte: Timespan,
    /// From the choice of an instance to the end of the response, streams apart; then the response is cut. Zero is no bound.
    pub response: Timespan,
    /// Silence on a stream in both directions; then it is ended. Zero is no bound.
    pub idle: Timespan,
}

impl Default for RouteTimeouts {
    fn default() -> Self {
        // Slow first tokens are the rule where models answer: only the silent hour is bounded.
        Self { first_byte: Timespan::default(), response: Timespan::default(), idle: Timespan::seconds(3600) }
    }
}

/// When a request is sent again: only before anything of a response arrived, and only where nothing was sent, or where
/// the method is idempotent (RFC 9110 section 9.2.2) and the request has no body that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Retry {
    /// Further tries of one request.
    pub attempts: u32,
    /// Retries per hundred requests over ten seconds, with at least ten; beyond that nothing is sent again, so that
    /// retries cannot make an outage worse.
    pub budget_percent: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 2, budget_percent: 20 }
    }
}

/// Passive outlier ejection: an instance that fails real requests gets none for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Outlier {
    /// Failures in a row (5xx of the instance, broken connections) that eject it; 0 ejects nobody.
    pub failures: u32,
    /// Time of the first ejection; it grows by as much with every further one, up to ten times.
    pub eject_for: Timespan,
    /// At most this share of the instances is ejected at a time.
    pub max_percent: u32,
    /// With fewer than this share of instances in rotation ejections are ignored: answers from bad ones beat none.
    pub panic_percent: u32,
}

impl Default for Outlier {
    fn default() -> Self {
        Self { failures: 5, eject_for: Timespan::seconds(10), max_percent: 50, panic_percent: 50 }
    }
}

/// Circuit breaker: bounds on what may be under way at a time. Zero is no bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Breaker {
    /// Requests in flight to one instance; with all of them full, requests wait as they do without an instance.
    pub per_instance: u32,
    /// Requests in flight to the service over this port; more are answered 503 with `Retry-After`.
    pub total: u32,
}

/// Published port of another service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Fallback {
    /// Service of the same environment.
    pub service: Name,
    /// Its port.
    pub port: Name,
}

/// The two sides of a rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// What was in force before.
    #[default]
    Stable,
    /// What is to replace it.
    Canary,
}

/// Thousandths: weights are exact to 0.1 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Permille(u16);

impl Permille {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// Everything.
    pub const ALL: Self = Self(1000);

    /// So many thousandths; more than a thousand are a thousand.
    pub const fn new(thousandths: u16) -> Self {
        if thousandths > 1000 { Self::ALL } else { Self(thousandths) }
    }

    /// Thousandths.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// That share of `total`, rounded up.
    pub fn of_rounded_up(self, total: u32) -> u32 {
        let share = u64::from(total) * u64::from(self.0);
        u32::try_from(share.div_ceil(1000)).unwrap_or(u32::MAX)
    }
}

impl std::fmt::Display for Permille {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0 / 10, self.0 % 10) {
            (whole, 0) => write!(f, "{whole} %"),
            (whole, tenth) => write!(f, "{whole}.{tenth} %"),
        }
    }
}

/// How a rollout splits the traffic of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Split {
    /// Share of the canary arm. Within an arm instances share evenly; an arm without a usable instance gives way to the
    /// other. `None`: no rollout splits, backends get traffic by their weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<Permille>,
    /// Makes the assignment of sticky clients differ between rollouts: the number of the canary's release.
    pub salt: u64,
    /// Requests that go to the canary arm whatever its share is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<RequestMatch>,
    /// Copies of requests to the canary arm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
    /// New requests wait though instances are there: a paused route.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// What is reported of the traffic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watch: Option<Watch>,
}

/// A condition on a request: all parts hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RequestMatch {
    /// Headers, in lower case, with the value that they must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Cookies with the value that they must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub cookies: BTreeMap<String, String>,
}

/// Copies of requests to the canary arm; its responses are compared and thrown away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Mirror {
    /// Share of the requests to the stable arm that is copied.
    pub share: Permille,
    /// Also methods that are not safe (RFC 9110 section 9.2.1).
    pub unsafe_methods: bool,
    /// Copies under way at a time; beyond that none is made.
    pub limit: u32,
}

/// What is reported of the traffic of a route while somebody decides by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Watch {
    /// Comes back in every report, so that a report of an earlier rollout is not taken for one of this.
    pub id: u64,
    /// Pause between reports.
    pub every: Timespan,
    /// A response that takes longer as a whole is slow, streams apart. `None`: none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow: Option<Timespan>,
    /// A head of a response that comes later is slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte: Option<Timespan>,
    /// A first event of a stream that comes later is slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token: Option<Timespan>,
}

/// What went through a watched route since the last report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// Route.
    pub route: RouteId,
    /// [`Watch::id`].
    pub watch: u64,
    /// Grows by one per report of a watch; a gap is a report that was lost.
    pub sequence: u64,
    /// Requests that ended, by arm, client and the weight that was in force when they were assigned. Requests that a
    /// [`RequestMatch`], a pin or a failed first choice sent to an arm were not assigned at random and are not in here.
    pub cells: Vec<TrafficCell>,
    /// How long responses of the stable arm took as a whole, streams apart.
    pub stable_latency: LatencyHistogram,
    /// Mirrored requests whose responses agreed, and those that did not, in status or (for small bodies) in content.
    pub mirrored: (u32, u32),
}

/// Requests of one client to one arm that ended since the last report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficCell {
    /// Arm that answered.
    pub arm: Arm,
    /// Hash of what the client is recognised by: its sticky key, else its address. Clients beyond 1,000 in one report
    /// share the client 0.
    pub client: u64,
    /// Share of the canary arm when these requests were assigned.
    pub canary: Permille,
    /// Requests.
    pub requests: u32,
    /// Requests with at least one of the faults below.
    pub bad: u32,
    /// Answered with 5xx (gRPC: UNKNOWN, INTERNAL, UNAVAILABLE, `DATA_LOSS`, `DEADLINE_EXCEEDED`, UNIMPLEMENTED).
    pub server_errors: u32,
    /// Without a complete response, by fault of the instance.
    pub broken: u32,
    /// Slow as a whole.
    pub slow: u32,
    /// With a slow head.
    pub slow_first_byte: u32,
    /// With a slow first event.
    pub slow_first_token: u32,
    /// Failed by the client: 4xx, or gone before the end. Never bad.
    pub client_failed: u32,
}

/// Durations by bucket: bucket `n` counts what took more than bound `n - 1` and at most bound `n` (`LATENCY_BOUNDS`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyHistogram {
    /// Counts; missing ones at the end are zero. The last of `LATENCY_BUCKETS` has no upper bound.
    pub counts: Vec<u32>,
}

/// Number of buckets of a [`LatencyHistogram`].
pub const LATENCY_BUCKETS: usize = 96;

/// Upper bound of a bucket in microseconds: six per doubling from 100 µs (an error of at most 12 %), up to about 5 s in
/// bucket 94; the last has none.
pub fn latency_bound(bucket: usize) -> u64 {
    // Sixth roots of two in 1/65536.
    const ROOTS: [u64; 6] = [65_536, 73_562, 82_570, 92_682, 104_032, 116_772];
    if bucket + 1 >= LATENCY_BUCKETS {
        return u64::MAX;
    }
    let (octave, step) = (bucket / 6, bucket % 6);
    ((100 * ROOTS[step]) << octave) >> 16
}

impl LatencyHistogram {
    /// Counts one duration in microseconds.
    pub fn add(&mut self, micros: u64) {
        let bucket =
            (0..LATENCY_BUCKETS).find(|bucket| micros <= latency_bound(*bucket)).unwrap_or(LATENCY_BUCKETS - 1);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] = self.counts[bucket].saturating_add(1);
    }

    /// Adds another one.
    pub fn merge(&mut self, other: &Self) {
        let length = self.counts.len().max(other.counts.len()).min(LATENCY_BUCKETS);
        self.counts.resize(length, 0);
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.counts.iter().copied().map(u64::from).sum()
    }

    /// Upper bound in microseconds of the bucket in which the quantile (in thousandths) lies; `None` without any.
    pub fn quantile(&self, of: Permille) -> Option<u64> {
        let total = self.total();
        let rank = (total * u64::from(of.get())).div_ceil(1000).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        })?;
        Some(latency_bound(bucket))
    }
}

/// What a route shows to clients that speak TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CertificateReport {
    /// Route.
    pub route: RouteId,
    /// Why the certificate's files cannot be used as they are. What is shown then is an older certificate, or none, unless
    /// it is `flawed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The problem is one of the certificate that is shown all the same: clients will not like it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub flawed: bool,
    /// DNS names and addresses that the certificate is for. Empty without one.
    pub names: Vec<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// End of the certificate, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<u64>,
}

/// Longest time for which a person may pause the traffic of a service.
pub const LONGEST_PAUSE: Timespan = Timespan::seconds(3600);

/// A person wants new requests to a service to wait, or to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrafficCommand {
    /// New requests wait for so long, at most [`LONGEST_PAUSE`]; what is in flight goes on.
    Pause(Timespan),
    /// They go on at once.
    Resume,
}

/// New requests to a service wait because a person said so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PausedTraffic {
    /// Since when.
    pub since: UnixMillis,
    /// When they go on by themselves.
    pub until: UnixMillis,
    /// Who said so.
    pub by: String,
}

/// How much a route carries, for whoever scales by it. Sent about once a second while it is asked for, and at once when
/// a request begins to wait for want of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Route.
    pub route: RouteId,
    /// Time that it covers.
    pub over: Timespan,
    /// Requests that began.
    pub requests: u64,
    /// Requests in flight now, streams among them.
    pub in_flight: u32,
    /// Streams in flight now.
    pub streams: u32,
    /// Events that streams sent: tokens, where a model answers.
    pub tokens: u64,
    /// Those among all events that were sent by streams that are in flight now.
    #[serde(default)]
    pub tokens_in_flight: u64,
    /// Requests that wait for an instance.
    pub held: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_buckets_cover_a_hundred_microseconds_to_five_seconds() {
        assert_eq!(latency_bound(0), 100);
        assert_eq!(latency_bound(6), 200);
        assert!((4_000_000..7_000_000).contains(&latency_bound(LATENCY_BUCKETS - 2)));
        assert!((1..LATENCY_BUCKETS).all(|b| latency_bound(b) > latency_bound(b - 1)));
    }

    #[test]
    fn a_quantile_is_the_bound_of_its_bucket() {
        let mut histogram = LatencyHistogram::default();
        assert_eq!(histogram.quantile(Permille::new(950)), None);
        for micros in 1..=1000 {
            histogram.add(micros * 100);
        }
        let p95 = histogram.quantile(Permille::new(950)).unwrap();
        assert!((95_000..=107_000).contains(&p95), "{p95}");
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!((twice.total(), twice.quantile(Permille::new(950))), (2000, Some(p95)));
    }

    #[test]
    fn names_of_development_and_nobody_elses() {
        for name in ["localhost", "app.localhost", "a.b.test", "LOCALHOST", "db.internal", "nas.home.arpa", "mac.local"]
        {
            assert!(is_development_name(name), "{name}");
        }
        for name in ["example.com", "notlocalhost", "localhost.example.com", "arpa", "", "mytest"] {
            assert!(!is_development_name(name), "{name}");
        }
    }

    #[test]
    fn shares_are_exact_to_a_tenth_of_a_percent() {
        assert_eq!(Permille::new(1).to_string(), "0.1 %");
        assert_eq!(Permille::new(250).to_string(), "25 %");
        assert_eq!(Permille::new(5000), Permille::ALL);
        assert_eq!(Permille::new(1).of_rounded_up(10), 1);
        assert_eq!(Permille::ZERO.of_rounded_up(10), 0);
    }
}
