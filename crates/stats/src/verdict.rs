//! The verdict and what it rests on, as they are stored with a release and shown to people.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{latency::Bounds, observation::Bad, settings::Policy};

/// What became of a step, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// There was enough evidence to have seen the stated degradation, and it is not there.
    Pass,
    /// Neither pass nor fail: too little evidence.
    Inconclusive,
    /// It could not be measured.
    Error,
    /// The canary is worse.
    Fail,
}

/// An outcome with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What became of it.
    pub outcome: Outcome,
    /// One sentence without a full stop, with the numbers that decided.
    pub reason: String,
    /// What happens now, if the outcome is `Inconclusive` or `Error`. Without measurements nothing can be watched, so an
    /// `Error` never promotes.
    pub then: Option<Policy>,
}

impl Verdict {
    /// The verdict that stands when several sources have judged: the worst, the first of equals. `None` if there is none.
    pub fn worst(verdicts: impl IntoIterator<Item = Self>) -> Option<Self> {
        verdicts.into_iter().reduce(|worst, next| if next.outcome > worst.outcome { next } else { worst })
    }
}

/// What was seen of one arm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArmEvidence {
    /// Responses, bad ones included.
    pub requests: u64,
    /// Bad responses by kind, all of them.
    pub bad: Bad,
    /// 4xx and requests that the client gave up: not bad.
    pub client_failed: u64,
    /// Bad responses that were not counted because an instance was cold.
    pub warm_up: u64,
}

/// What a counter showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterEvidence {
    /// Its name.
    pub name: String,
    /// Growth on the canary, and the requests in which it grew.
    pub canary: (u64, u64),
    /// The same of the stable release.
    pub stable: (u64, u64),
}

/// What the probes showed, in pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeEvidence {
    /// Both answers good.
    pub both_good: u64,
    /// Both bad.
    pub both_bad: u64,
    /// Only the canary's bad.
    pub canary_bad: u64,
    /// Only the stable release's bad.
    pub stable_bad: u64,
}

/// When the weight became what.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightChange {
    /// Measured time until then.
    pub after: Duration,
    /// The canary's share of new requests from then on (0 to 1).
    pub weight: f64,
}

/// Everything a verdict rests on, in a few hundred bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The canary.
    pub canary: ArmEvidence,
    /// The stable release.
    pub stable: ArmEvidence,
    /// Bad responses that counted, after caps and warm-up: on the canary, on the stable release.
    pub counted: (f64, f64),
    /// Distinct clients with a bad response on the canary; 64 stands for 64 or more.
    pub canary_bad_clients: u32,
    /// Those on the canary that did not count after all, because the stable release answered badly at the same time.
    #[serde(default)]
    pub doubted: f64,
    /// Counters by name.
    pub counters: Vec<CounterEvidence>,
    /// Probes.
    pub probes: ProbeEvidence,
    /// Natural logarithm of the evidence that the canary is worse, as odds against luck.
    pub ln_evidence: f64,
    /// The logarithm at which it fails: `ln(1/alpha)`.
    pub ln_threshold: f64,
    /// The chance, at most, of ever seeing such evidence if the canary is no worse: valid at any moment.
    pub chance: f64,
    /// Probability, at most, of failing a release that is no worse.
    pub alpha: f64,
    /// Natural logarithm of the evidence, in this step, that the stated degradation is not there.
    pub ln_pass_evidence: f64,
    /// The logarithm at which it passes: `ln(1/beta)`.
    pub ln_pass_threshold: f64,
    /// The bounds above which a response was late.
    pub latency: Bounds,
    /// Weights, oldest first; at most 64, of which the first is kept.
    pub weights: Vec<WeightChange>,
    /// Time that the ticks covered.
    pub measured: Duration,
    /// Time for which there was no measurement.
    pub lost: Duration,
    /// The present state in one sentence.
    pub reason: String,
}

/// A share as people read it.
pub(crate) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent == 0.0 || percent >= 9.95 {
        format!("{percent:.0} %")
    } else if percent >= 0.095 {
        format!("{percent:.1} %")
    } else {
        format!("{percent:.2} %")
    }
}

/// A number of something, with a plural.
pub(crate) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// Says what happens after an outcome that decides nothing.
pub(crate) fn with_policy(mut verdict: Verdict, policy: Policy) -> Verdict {
    verdict.then = match (verdict.outcome, policy) {
        (Outcome::Pass | Outcome::Fail, _) => None,
        (Outcome::Error, Policy::PromoteAndWatch) => Some(Policy::Hold),
        (_, policy) => Some(policy),
    };
    verdict
}
