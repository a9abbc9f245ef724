//! What the data plane saw: responses by arm and client, counters that the service exports, pairs of probes.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which release answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The release that is being judged.
    Canary,
    /// The release that it would replace: the baseline.
    Stable,
}

/// Why a response is bad. A response that is bad in several ways counts under the first of them in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It ended before it was complete, or never came, and the instance was at fault.
    Broken,
    /// Its status was 500 or above.
    ServerError,
    /// Its first byte came later than the bound.
    SlowFirstByte,
    /// Its first token came later than the bound.
    SlowFirstToken,
    /// It was complete later than the bound.
    Slow,
}

impl Kind {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::Broken, Self::ServerError, Self::SlowFirstByte, Self::SlowFirstToken, Self::Slow];

    /// In words, as a person reads it after "3 of 20 responses".
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::Broken => "broken",
            Self::ServerError => "server errors",
            Self::SlowFirstByte => "late first byte",
            Self::SlowFirstToken => "late first token",
            Self::Slow => "too slow",
        }
    }
}

/// Bad responses by kind. Each response is in at most one of the numbers; see [`Kind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bad {
    /// [`Kind::Broken`].
    pub broken: u64,
    /// [`Kind::ServerError`].
    pub server_error: u64,
    /// [`Kind::SlowFirstByte`].
    pub slow_first_byte: u64,
    /// [`Kind::SlowFirstToken`].
    pub slow_first_token: u64,
    /// [`Kind::Slow`].
    pub slow: u64,
}

impl Bad {
    /// The number of one kind.
    pub const fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Broken => self.broken,
            Kind::ServerError => self.server_error,
            Kind::SlowFirstByte => self.slow_first_byte,
            Kind::SlowFirstToken => self.slow_first_token,
            Kind::Slow => self.slow,
        }
    }

    /// Broken responses and server errors.
    pub const fn failed(&self) -> u64 {
        self.broken.saturating_add(self.server_error)
    }

    /// Responses that are bad only because they were late.
    pub const fn late(&self) -> u64 {
        self.slow_first_byte.saturating_add(self.slow_first_token).saturating_add(self.slow)
    }

    /// All bad responses.
    pub const fn total(&self) -> u64 {
        self.failed().saturating_add(self.late())
    }

    /// Adds `other`.
    pub const fn add(&mut self, other: &Self) {
        self.broken = self.broken.saturating_add(other.broken);
        self.server_error = self.server_error.saturating_add(other.server_error);
        self.slow_first_byte = self.slow_first_byte.saturating_add(other.slow_first_byte);
        self.slow_first_token = self.slow_first_token.saturating_add(other.slow_first_token);
        self.slow = self.slow.saturating_add(other.slow);
    }
}

/// Responses that ended during a tick, of one client on one arm, assigned at one weight.
///
/// Requests that were not assigned by chance (a header or cookie route to the canary, say) must not be reported: nothing
/// can be concluded from whom they hit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Who answered.
    pub arm: Arm,
    /// Whoever the data plane takes to be one client, hashed: a session, an account, an address.
    pub client: u64,
    /// The probability, 0 to 1, with which these requests went to the canary when they were assigned; 1 when nothing
    /// but the canary could be chosen. Cells of both arms carry the same kind of number: the canary's probability.
    pub weight: f64,
    /// Responses, bad ones included, those in `client_failed` not.
    pub requests: u64,
    /// The bad ones among them.
    pub bad: Bad,
    /// Apart, and never bad: answers 4xx, and requests that the client gave up.
    pub client_failed: u64,
}

/// By how much a counter that the service exports grew on one arm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Its name, as in [`Settings::counters`](crate::Settings::counters).
    pub name: String,
    /// The arm whose instances were asked.
    pub arm: Arm,
    /// Growth since they were last asked, resets taken out.
    pub increase: u64,
    /// Requests that the arm answered in the same time: the exposure.
    pub requests: u64,
}

/// The same synthetic request, sent to both arms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The canary's answer was bad.
    pub canary_bad: bool,
    /// The stable release's answer was bad.
    pub stable_bad: bool,
}

/// What was seen since the tick before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tick {
    /// The time that it covers.
    pub covers: Duration,
    /// Responses.
    pub cells: Vec<Cell>,
    /// Counters, if any were read.
    pub counters: Vec<Counter>,
    /// Probes, if any were sent.
    pub pairs: Vec<Pair>,
}
