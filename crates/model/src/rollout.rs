//! How instances are replaced: the strategies and their steps as a stack declares them, what people may ask of a
//! rollout, and what is written down of one.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    consult::Selector,
    desired::Service,
    flag::FlagName,
    id::{Name, ReleaseNumber, RunId},
    quantity::{Amount, Percent, Timespan},
    secret::SecretSource,
    time::UnixMillis,
    traffic::{Permille, RequestMatch},
};

/// How the instances of a service are replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rollout {
    /// Strategy.
    pub strategy: Strategy,
    /// What instances that leave may still finish.
    pub drain: crate::desired::Drain,
    /// Absolute deadline of the whole rollout, drain apart.
    pub deadline: Timespan,
    /// A new instance counts once it has been ready for so long without a break.
    #[serde(default)]
    pub min_ready: Timespan,
    /// Longest time in which no further instance becomes available though one is wanted; it begins anew with each.
    #[serde(default = "Rollout::default_progress")]
    pub progress: Timespan,
}

impl Rollout {
    /// Ten minutes, as Kubernetes and Nomad have it.
    pub const fn default_progress() -> Timespan {
        Timespan::seconds(600)
    }
}

/// Ways to replace instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// A few at a time, each new one ready before an old one leaves.
    Rolling {
        /// Instances above `replicas` at one time; a share is rounded up.
        max_surge: Amount,
        /// Ready instances below `replicas` at one time; a share is rounded down.
        max_unavailable: Amount,
    },
    /// All old ones are gone before the first new one starts. Requests wait no longer than for any restart.
    Recreate,
    /// As `Recreate`, for what cannot hold two versions at a time: requests queue until the new one is ready.
    Hold {
        /// Requests that may wait; more are answered 503.
        queue: u32,
        /// Longest wait of a request; then 503.
        timeout: Timespan,
    },
    /// Beside the old ones, with a growing share of the traffic.
    Canary(Stepped),
    /// A full second set beside the first, switched at once.
    BlueGreen(Stepped),
}

impl Strategy {
    /// The steps, if it has any.
    pub fn stepped(&self) -> Option<&Stepped> {
        match self {
            Self::Canary(stepped) | Self::BlueGreen(stepped) => Some(stepped),
            Self::Rolling { .. } | Self::Recreate | Self::Hold { .. } => None,
        }
    }

    /// Its name in the stack file.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Rolling { .. } => "rolling",
            Self::Recreate => "recreate",
            Self::Hold { .. } => "hold",
            Self::Canary(_) => "canary",
            Self::BlueGreen(_) => "blue_green",
        }
    }
}

/// A rollout in steps. Both sets of instances exist until the new one is promoted in place; the first release of a
/// service, a change that replaces no instance, and every way back take no steps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stepped {
    /// Taken in order. After the last the new set is scaled to all replicas and gets all traffic.
    pub steps: Vec<RolloutStep>,
    /// How long the old set stays, ready and without traffic, after the release is in force.
    pub keep_warm: Timespan,
    /// What turns the rollout back whenever the evidence says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutStep {
    /// Gives the new set this share of the traffic, once it has as many instances as that needs.
    Weight(
        #[serde(with = "crate::share")]
        #[schemars(with = "Percent")]
        Permille,
    ),
    /// Gives the new set so many instances, whatever its share of the traffic is.
    Scale(Amount),
    /// Waits.
    Pause(PauseStep),
    /// Waits for a verdict.
    Analysis(AnalysisStep),
    /// Asks somebody else.
    Hook(Hook),
    /// Requests that go to the new set whatever its share is; replaces those of earlier steps, so that none removes them.
    Match(Vec<RequestMatch>),
    /// Copies this share of the requests to the new set; nothing ends it.
    Mirror {
        /// Share of the stable set's requests.
        #[serde(with = "crate::share")]
        #[schemars(with = "Percent")]
        share: Permille,
        /// Also methods that are not safe.
        unsafe_methods: bool,
    },
}

/// Waits for time or for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PauseStep {
    /// So long; `None` waits until a person promotes.
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Timespan>,
    /// Who is to decide, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Longest wait for a person.
    pub expires: Timespan,
    /// What happens then.
    pub on_expiry: OnExpiry,
}

/// What happens when nobody decided in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnExpiry {
    /// Back to what was there before.
    #[default]
    RollBack,
    /// On with the next step.
    Promote,
}

/// Waits for a verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AnalysisStep {
    /// Longest time for evidence; a pass may come earlier.
    #[serde(rename = "for")]
    pub duration: Timespan,
    /// What an inconclusive one means here, if not what the guard says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inconclusive: Option<OnInconclusive>,
}

/// What an inconclusive verdict means. An error (it could not be measured) is treated alike and named apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnInconclusive {
    /// Pause until a person decides.
    #[default]
    Hold,
    /// Promote, keep the old set while it stays warm, and go on judging by absolute bounds.
    PromoteAndWatch,
    /// Turn back.
    RollBack,
}

/// Asks somebody else whether to go on: 2xx or exit code 0 says yes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hook {
    /// How it is called in events.
    pub name: String,
    /// What is done.
    pub call: HookCall,
    /// Longest wait for the answer; then it counts as no.
    pub timeout: Timespan,
    /// Further tries after a no, ten seconds apart.
    pub retries: u32,
}

/// What a hook does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HookCall {
    /// POST of a JSON document that says which rollout is where.
    Webhook {
        /// `http://…`
        url: String,
    },
    /// A command with the same document on its standard input, in the service's directory.
    Command(Vec<String>),
}

/// What turns a rollout back, and on which evidence. All bounds hold for responses of the new set that were assigned to
/// it at random.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Guard {
    /// Probability that a release that is as good as the old one is turned back.
    #[serde(with = "crate::share")]
    #[schemars(with = "Percent")]
    pub alpha: Permille,
    /// Compare server errors and broken responses with those of the old set.
    pub errors: bool,
    /// With all traffic, where no old set is left to compare with, more bad responses than this share fail.
    #[serde(default, with = "crate::share::option", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Percent>")]
    pub max_errors: Option<Permille>,
    /// What makes a response slow as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<LatencyBound>,
    /// What makes its head slow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte: Option<Timespan>,
    /// What makes its first event slow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token: Option<Timespan>,
    /// Counters that the service exports (`Service::metrics`): their increase is bad.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counters: Vec<Selector>,
    /// One client counts for at most so many bad responses.
    pub per_client: u32,
    /// Distinct clients that must have seen bad responses before it fails.
    pub clients: u32,
    /// What a new instance answers in this time after its admission does not count.
    pub warm_up: Timespan,
    /// What too little evidence means.
    pub inconclusive: OnInconclusive,
    /// The share may grow up to this while the evidence comes too slowly.
    #[serde(default, with = "crate::share::option", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Percent>")]
    pub raise_to: Option<Permille>,
    /// What is asked of both sets in pairs while there is too little traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<PairProbe>,
    /// A bad verdict turns this flag off instead of turning the release back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flag: Option<String>,
    /// Further sources.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prometheus: Vec<PrometheusMetric>,
}

/// A safe request that the server itself sends to one instance of each set at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PairProbe {
    /// Port that is asked, one that speaks HTTP/1.1.
    pub port: Name,
    /// Path with query, asked with `GET`.
    pub path: String,
    /// Pause between pairs.
    pub every: Timespan,
    /// Longest wait for an answer; none is a bad one.
    pub timeout: Timespan,
}

/// What makes a response slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LatencyBound {
    /// The old set's 95th percentile as it was when the rollout began.
    Stable,
    /// This.
    Fixed(Timespan),
}

/// A question to a Prometheus server, with the limits that Argo Rollouts has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PrometheusMetric {
    /// How it is called in events.
    pub name: String,
    /// `http://prometheus:9090` or `https://prometheus.example`
    pub address: String,
    /// A query (`PromQL`) with one number, or a few, as its result.
    pub query: String,
    /// Condition on `result` that makes a measurement good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success: Option<String>,
    /// Condition on `result` that makes it bad.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Pause between measurements.
    pub every: Timespan,
    /// Pause before the first one.
    #[serde(default)]
    pub initial_delay: Timespan,
    /// Longest wait for an answer.
    #[serde(default = "PrometheusMetric::default_timeout")]
    pub timeout: Timespan,
    /// Measurements after which it passes; `None` measures as long as the analysis lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Bad measurements that are put up with; `None` is any number.
    pub failure_limit: Option<u32>,
    /// Inconclusive ones that are put up with; `None` is any number.
    pub inconclusive_limit: Option<u32>,
    /// Errors in a row that are put up with; `None` is any number.
    pub error_limit: Option<u32>,
    /// Good ones in a row after which it passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_limit: Option<u32>,
    /// What opens the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<SecretSource>,
    /// Absolute path of the certificates (PEM) that are trusted; `None` trusts those of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// Only told, never decided by.
    pub dry_run: bool,
}

impl PrometheusMetric {
    /// Ten seconds.
    const fn default_timeout() -> Timespan {
        Timespan::seconds(10)
    }
}

/// What people ask of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutCommand {
    /// On with the next step, now.
    Promote,
    /// On to the end, without any further step.
    PromoteFully,
    /// No further step until it is promoted.
    Pause,
    /// Back to what was there before, as a whole.
    Abort,
}

/// What is written down of a rollout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RolloutRecord {
    /// Run that it is part of.
    pub run: RunId,
    /// Release that was in force when it began: the baseline.
    pub from: ReleaseNumber,
    /// Release that it leads to.
    pub to: ReleaseNumber,
    /// What the baseline is made from, so that it can be kept whole.
    pub baseline: Box<Service>,
    /// Where it stands.
    pub phase: RolloutPhase,
    /// Step that it is at; as many as there are once all are done.
    pub step: u32,
    /// When it began.
    pub started_at: UnixMillis,
    /// When the phase or the step began.
    pub since: UnixMillis,
    /// When it is turned back if it has not ended.
    pub deadline: UnixMillis,
    /// A pause that a person or a verdict asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<Paused>,
    /// Share of the traffic that was asked for last.
    pub weight: Permille,
    /// Share that the traffic was raised to because the evidence came too slowly; no later step but one that lowers the
    /// share goes below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raised: Option<Permille>,
    /// Instances that were asked for by a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<u32>,
    /// Requests that go to the new set whatever its share is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<RequestMatch>,
    /// Copied requests: share, and whether unsafe methods are among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<(Permille, bool)>,
    /// The current hook: how often it was called.
    #[serde(default)]
    pub hook_calls: u32,
    /// What the verdict needs to go on after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<serde_json::Value>,
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RolloutPhase {
    /// At a step.
    Stepping,
    /// All steps are done, or it has none: the new set grows to its full size and takes over.
    Promoting,
    /// The new set has taken over and is watched before the old one is let go.
    Watching,
    /// In force; the old set stays for a while.
    Warm,
}

/// A pause that is not a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Paused {
    /// Who is to decide: a person's name, or what the verdict waits for.
    pub owner: String,
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: UnixMillis,
    /// Until when.
    pub expires: UnixMillis,
    /// What happens then.
    pub on_expiry: OnExpiry,
}

/// A verdict, stored with the release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerdictRecord {
    /// Service.
    pub service: Name,
    /// Release it was compared with.
    pub baseline: ReleaseNumber,
    /// Step at which it was given, from 1; 0 if it came between steps.
    pub step: u32,
    /// When.
    pub at: UnixMillis,
    /// What.
    pub outcome: VerdictOutcome,
    /// Why, in one sentence.
    pub reason: String,
    /// The numbers, by name.
    pub evidence: BTreeMap<String, serde_json::Value>,
    /// Flag that it turned off instead of turning the release back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flag: Option<FlagName>,
}

/// What a verdict says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerdictOutcome {
    /// As good as the old one, as far as the evidence can tell.
    Pass,
    /// Worse.
    Fail,
    /// Too little evidence.
    Inconclusive,
    /// It could not be measured.
    Error,
}
