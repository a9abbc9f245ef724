//! What the guard of a rollout asks for, with defaults.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What one random draw decides, and so what counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Each request is assigned by itself.
    #[default]
    Request,
    /// A client is assigned once and stays (sticky routing): its responses say the same thing again and again, so a
    /// client counts once, however many of its responses are bad.
    Session,
}

/// What happens when a step is over and the evidence allows neither pass nor fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Stay at the weight until there is more evidence or a person decides.
    Hold,
    /// Go on, keep the stable instances warm, and keep watching.
    #[default]
    PromoteAndWatch,
    /// Give up the release.
    RollBack,
}

/// What does not count while new instances are cold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", default, deny_unknown_fields)]
pub struct WarmUp {
    /// For so long after an instance of the canary was admitted.
    pub time: Duration,
    /// And for so many responses of the canary since then.
    pub requests: u64,
    /// Ignore errors too, and not late responses alone.
    pub errors_too: bool,
}

impl Default for WarmUp {
    fn default() -> Self {
        Self { time: Duration::from_secs(10), requests: 0, errors_too: false }
    }
}

/// The degradation that a pass excludes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Degradation {
    /// At least this share of the canary's responses is bad (0 to 1),
    pub rate: f64,
    /// and the odds of a bad response are at least so many times the stable release's.
    pub ratio: f64,
}

impl Default for Degradation {
    fn default() -> Self {
        Self { rate: 0.02, ratio: 2.0 }
    }
}

/// The settings of an [`Analysis`](crate::Analysis).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Probability, at most, that a release that is no worse is ever failed.
    pub alpha: f64,
    /// Probability, at most, that a release with the [`Degradation`] passes a step.
    pub beta: f64,
    /// The degradation that a pass excludes.
    pub degradation: Degradation,
    /// The share of bad responses (0 to 1) above which the canary fails where there is no stable release to compare
    /// with, that is for responses at weight 1. `None`: no such test.
    pub errors: Option<f64>,
    /// Whether that bound gives way to what the stable release was seen to do while it had traffic, where that is more.
    /// Then it is one for requests only: how many sessions see something bad depends on how long they are, and there is no
    /// bound with [`Unit::Session`].
    pub errors_give_way: bool,
    /// What counts once.
    pub unit: Unit,
    /// Bad responses of one client that count, on both arms together, per [`Settings::client_window`]. With
    /// [`Unit::Session`] it is one, for good.
    pub client_cap: u32,
    /// The time after which a client may contribute again.
    pub client_window: Duration,
    /// A fail needs bad responses of so many distinct clients on the canary (at most 16).
    pub min_clients: u32,
    /// Broken responses and server errors that count in a second beyond the usual number, on both arms together.
    pub failed_burst: f64,
    /// The same of late responses: a stall of one instance is one event, though it makes many responses late.
    pub late_burst: f64,
    /// What does not count while new instances are cold.
    pub warm_up: WarmUp,
    /// Counters of the service that are guarded, by name: more of them per request is worse.
    pub counters: Vec<String>,
    /// Whether synthetic probes may be sent.
    pub probes: bool,
    /// A pass needs so many responses of the canary in the step, whatever else is known.
    pub min_requests: u64,
    /// What happens when the step is over without a decision.
    pub inconclusive: Policy,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            alpha: 0.01,
            beta: 0.05,
            degradation: Degradation::default(),
            errors: Some(0.02),
            errors_give_way: true,
            unit: Unit::Request,
            client_cap: 2,
            client_window: Duration::from_secs(10),
            min_clients: 2,
            failed_burst: 2.0,
            late_burst: 0.2,
            warm_up: WarmUp::default(),
            counters: Vec::new(),
            probes: false,
            min_requests: 20,
            inconclusive: Policy::default(),
        }
    }
}

/// At most so many counters are guarded: each takes a share of alpha.
pub const MAX_COUNTERS: usize = 16;

/// At most so many distinct clients can be asked for.
pub const MAX_MIN_CLIENTS: u32 = 16;

impl Settings {
    /// The same with every number brought into its range; what is not a number becomes the default.
    #[must_use]
    pub fn in_range(mut self) -> Self {
        let default = Self::default();
        let number = |value: f64, low: f64, high: f64, default: f64| {
            if value.is_nan() { default } else { value.clamp(low, high) }
        };
        self.alpha = number(self.alpha, 1e-9, 0.5, default.alpha);
        self.beta = number(self.beta, 1e-9, 0.5, default.beta);
        self.degradation.rate = number(self.degradation.rate, 1e-6, 0.999, default.degradation.rate);
        self.degradation.ratio = number(self.degradation.ratio, 1.01, 1e6, default.degradation.ratio);
        let bounded = self.unit == Unit::Request || !self.errors_give_way;
        self.errors = self.errors.filter(|_| bounded).map(|bound| number(bound, 1e-6, 0.999, 0.02));
        self.failed_burst = number(self.failed_burst, 0.01, 1e6, default.failed_burst);
        self.late_burst = number(self.late_burst, 0.01, 1e6, default.late_burst);
        self.client_cap = self.client_cap.max(1);
        self.min_clients = self.min_clients.clamp(1, MAX_MIN_CLIENTS);
        self.client_window = self.client_window.max(Duration::from_secs(1));
        self.counters.sort();
        self.counters.dedup();
        self.counters.truncate(MAX_COUNTERS);
        self
    }
}
