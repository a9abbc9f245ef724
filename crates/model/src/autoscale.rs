//! How many instances a service has by itself: the policy that a stack declares, what the autoscaler decided and why,
//! and what is written down of it.
//!
//! The semantics are those of the Kubernetes `HorizontalPodAutoscaler` (`autoscaling/v2`), and a service may sleep: with
//! `min: 0` it has no instance while nobody asks for one. The arithmetic is in `orchestra-machine`; these are the nouns.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    consult::Selector,
    quantity::{ByteSize, Cpu, Measure, Percent, Timespan},
};

/// The policy of one service. Complete: every default is filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Autoscale {
    /// Fewest instances; 0 only with `to_zero`.
    pub min: u32,
    /// Most instances, at least 1 and at least `min`.
    pub max: u32,
    /// What is looked at; the metric that asks for most wins. Empty: only `to_zero` moves anything.
    pub on: Vec<Metric>,
    /// How often it is decided (`--horizontal-pod-autoscaler-sync-period`).
    pub every: Timespan,
    /// How it grows.
    pub up: Behavior,
    /// How it shrinks.
    pub down: Behavior,
    /// An instance that is younger counts for CPU only while it is ready, with what was measured since it became so
    /// (`--horizontal-pod-autoscaler-cpu-initialization-period`).
    pub cpu_initialization: Timespan,
    /// An older instance that became unready within this time of its start has never been ready
    /// (`--horizontal-pod-autoscaler-initial-readiness-delay`).
    pub initial_readiness: Timespan,
    /// How it sleeps; present exactly if `min` is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_zero: Option<ToZero>,
}

impl Autoscale {
    /// The nearest number of instances that the policy allows: what a release makes of the number that is in force.
    pub fn clamp(&self, replicas: u32) -> u32 {
        replicas.min(self.max).max(self.min)
    }

    /// Fewest instances of a service that is awake.
    pub fn floor(&self) -> u32 {
        self.min.max(1)
    }
}

/// Something that is measured, with what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Metric {
    /// What is measured.
    pub source: MetricSource,
    /// What it should be; never 0.
    pub target: Level,
}

/// What can be measured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetricSource {
    /// CPU of the instances, in cores.
    Cpu,
    /// Memory of the instances, in bytes.
    Memory,
    /// Requests that begin, per second.
    RequestsPerSecond,
    /// Requests that are under way or wait for an instance.
    RequestsInFlight,
    /// Tokens that the responses under way have sent so far.
    TokensInFlight,
    /// Requests that wait for an instance.
    QueueDepth,
    /// A metric that the service exports (`Service::metrics`).
    Exported {
        /// Its name.
        name: String,
        /// Labels that its series must have; those that fit are added up.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        labels: BTreeMap<String, String>,
    },
}

impl MetricSource {
    /// Whether it says how busy instances are, and not what there is to do: an idle service may sleep whatever it says.
    pub const fn is_of_instances(&self) -> bool {
        matches!(self, Self::Cpu | Self::Memory)
    }

    /// What of the service's exported metrics it is, if it is one.
    pub fn selector(&self) -> Option<Selector> {
        let Self::Exported { name, labels } = self else { return None };
        Some(Selector { name: name.clone(), labels: labels.clone() })
    }

    /// The level as people write it for this source.
    fn describe(&self, level: Level) -> String {
        match (self, level) {
            (_, Level::Utilization(percent)) => format!("{percent}%"),
            (Self::Memory, Level::Average(measure) | Level::Value(measure)) => {
                ByteSize::bytes(measure.floor()).to_string()
            }
            (Self::Cpu, Level::Average(measure) | Level::Value(measure)) => {
                Cpu::millis(measure.as_thousandths()).to_string()
            }
            (_, Level::Average(measure) | Level::Value(measure)) => measure.to_string(),
        }
    }
}

impl fmt::Display for MetricSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::RequestsPerSecond => "requests_per_second",
            Self::RequestsInFlight => "requests_in_flight",
            Self::TokensInFlight => "tokens_in_flight",
            Self::QueueDepth => "queue_depth",
            Self::Exported { name, labels } if labels.is_empty() => name,
            Self::Exported { name, labels } => {
                let selector = Selector { name: name.clone(), labels: labels.clone() };
                return f.pad(&selector.to_string());
            }
        })
    }
}

/// What a metric should be, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Percent of what the instances ask for (`resources`), on average. May be above 100.
    Utilization(u32),
    /// Per instance, on average.
    Average(Measure),
    /// Of the service as a whole.
    Value(Measure),
}

/// How the number of instances moves in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Behavior {
    /// Down: the highest recommendation of this time counts, so that a dip removes nothing. Up: the lowest one.
    pub window: Timespan,
    /// How far the metrics may be off their targets in this direction before anything moves.
    pub tolerance: Percent,
    /// Bounds of the change per time; never empty.
    pub policies: Vec<ScalePolicy>,
    /// Which of them counts.
    pub select: Select,
}

/// A bound of the change per time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScalePolicy {
    /// How much.
    pub change: Change,
    /// In which time.
    pub per: Timespan,
}

/// An amount of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Percent of the instances at the beginning of the time.
    Percent(u32),
    /// That many instances.
    Instances(u32),
}

/// Which of several policies counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// The one that allows the most.
    #[default]
    Max,
    /// The one that allows the least.
    Min,
    /// None: it does not move in this direction.
    Disabled,
}

/// How a service sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ToZero {
    /// Time without any request, under way or waiting, after which its instances leave.
    pub idle_for: Timespan,
    /// Time from the request that wakes it until an instance is ready; held requests wait no longer.
    pub cold_start: Timespan,
}

/// What the autoscaler found at one moment, and what follows from it. `from` and `to` are equal if nothing does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScaleDecision {
    /// Instances wanted before.
    pub from: u32,
    /// Instances wanted from now on.
    pub to: u32,
    /// Why.
    pub reason: ScaleReason,
    /// What the metrics ask for, before windows, policies and bounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recommended: Option<u32>,
    /// What a window made of it, if it changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stabilized: Option<Stabilized>,
    /// What kept it from going all the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<ScaleLimit>,
    /// The metrics, in the order of the policy; empty if they were not looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<MetricReport>,
}

/// Why a number of instances was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleReason {
    /// The metrics ask for it.
    Metrics,
    /// There were more than `max`.
    AboveMax,
    /// There were fewer than `min`.
    BelowMin,
    /// Somebody set the number.
    ByHand,
    /// Somebody set the number to 0 though `min` is more: nothing moves until it is raised.
    Resting,
    /// No metric is available.
    NoMetrics,
    /// The metrics that are available ask for fewer instances, and another one is not available.
    DownBlocked,
    /// Nobody has asked for it.
    Idle {
        /// For so long.
        idle: Timespan,
    },
    /// It sleeps, and there is nothing to do.
    Asleep,
    /// It slept, and a request waits.
    Woken,
    /// It slept, and a metric of the service as a whole says that there is work.
    Work,
}

/// What a stabilisation window made of a recommendation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stabilized {
    /// Instances.
    pub to: u32,
    /// Length of the window.
    pub window: Timespan,
}

/// What kept a decision from going all the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleLimit {
    /// `max`.
    Max,
    /// `min`.
    Min,
    /// The policies of `up`.
    UpRate,
    /// The policies of `down`.
    DownRate,
    /// `up` is disabled.
    UpDisabled,
    /// `down` is disabled.
    DownDisabled,
    /// It has one instance and has not been idle for long enough to sleep.
    NotIdle,
    /// It would sleep, but a rollout of it goes on.
    Rollout,
}

/// One metric in a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MetricReport {
    /// Which, and what it should be.
    pub metric: Metric,
    /// What it is, over the instances that were not set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<Level>,
    /// Instances that it asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proposes: Option<u32>,
    /// Why it asks for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Instances that are not ready yet: set aside, and taken as idle if it would grow.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unready: u32,
    /// Instances without a measurement: set aside, and taken as what allows the smaller change.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub missing: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// What people see of an autoscaler.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AutoscaleStatus {
    /// What it found last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<ScaleDecision>,
    /// Time since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ago: Option<Timespan>,
    /// The last decision that changed the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<ScaleDecision>,
    /// Time since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_ago: Option<Timespan>,
    /// Time without a request, of a service that may sleep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Timespan>,
    /// A cold start that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStart>,
}

/// A cold start that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ColdStart {
    /// Time since the request that woke it.
    pub waited: Timespan,
    /// Longest that a request waits for it.
    pub deadline: Timespan,
}

impl ColdStart {
    /// Whether requests have waited in vain.
    pub fn is_overdue(&self) -> bool {
        self.waited >= self.deadline
    }
}

/// What must survive a restart, as ages: a monotonic clock does not. The time in which nobody counted adds nothing to
/// them, so that windows and policies hold for longer rather than shorter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AutoscaleRecord {
    /// Recommendations that windows still look at, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recommendations: Vec<AgedRecommendation>,
    /// Changes that policies still count, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<AgedChange>,
    /// What it found last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<ScaleDecision>,
    /// Its age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ago: Option<Timespan>,
    /// The last decision that changed the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<ScaleDecision>,
    /// Its age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_ago: Option<Timespan>,
    /// Age of a cold start that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<Timespan>,
}

/// A recommendation of an earlier moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgedRecommendation {
    /// How long ago.
    pub ago: Timespan,
    /// Instances.
    pub replicas: u32,
}

/// A change of an earlier moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgedChange {
    /// How long ago.
    pub ago: Timespan,
    /// Instances added; removed ones are negative.
    pub by: i64,
}

// === impl ScaleDecision ===

impl ScaleDecision {
    /// Whether the number of instances changes.
    pub fn is_change(&self) -> bool {
        self.from != self.to
    }

    /// The metric that asked for most.
    pub fn leader(&self) -> Option<&MetricReport> {
        // The first of equals, as the published algorithm has it.
        self.metrics.iter().filter(|report| report.proposes.is_some()).rev().max_by_key(|report| report.proposes)
    }

    /// One line for each metric: what it is, what it should be, what it asks for, and what was set aside.
    pub fn details(&self) -> Vec<String> {
        self.metrics.iter().map(ToString::to_string).collect()
    }

    fn because(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            ScaleReason::Metrics => self.by_metrics(f),
            ScaleReason::AboveMax => f.write_str("that is more than `max`"),
            ScaleReason::BelowMin => f.write_str("that is less than `min`"),
            ScaleReason::ByHand => f.write_str("it was set by hand"),
            ScaleReason::Resting => f.write_str("it was set to 0, and autoscaling rests until it is raised"),
            ScaleReason::NoMetrics => {
                f.write_str("no metric is available")?;
                self.problems(f)
            }
            ScaleReason::DownBlocked => {
                let fewer = self.recommended.unwrap_or(self.from);
                write!(f, "the metrics ask for {fewer}, but not all are available, and so nothing is taken away")?;
                self.problems(f)
            }
            ScaleReason::Idle { idle } => write!(f, "no request for {idle}"),
            ScaleReason::Asleep => f.write_str("it sleeps until the next request"),
            ScaleReason::Woken => f.write_str("it slept, and a request waits for an instance"),
            ScaleReason::Work => match self.leader() {
                Some(report) => write!(f, "it slept, and there is work: {report}"),
                None => f.write_str("it slept, and there is work"),
            },
        }
    }

    fn by_metrics(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.leader() {
            Some(report) => write!(f, "{report}"),
            None => f.write_str("no metric is looked at"),
        }
    }

    fn problems(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = " (";
        for report in &self.metrics {
            if let Some(problem) = &report.problem {
                write!(f, "{separator}{}: {problem}", report.metric.source)?;
                separator = "; ";
            }
        }
        if separator == "; " { f.write_str(")") } else { Ok(()) }
    }
}

impl fmt::Display for ScaleDecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from.cmp(&self.to) {
            std::cmp::Ordering::Less => write!(f, "scaled up from {} to {}: ", self.from, self.to)?,
            std::cmp::Ordering::Greater => write!(f, "scaled down from {} to {}: ", self.from, self.to)?,
            std::cmp::Ordering::Equal => write!(f, "stays at {}: ", self.from)?,
        }
        self.because(f)?;
        if let Some(Stabilized { to, window }) = self.stabilized {
            write!(f, "; the recommendations of the last {window} keep it at {to}")?;
        }
        if let Some(limit) = self.limit {
            write!(f, "; {limit}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ScaleLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Max => "limited by `max`",
            Self::Min => "limited by `min`",
            Self::UpRate => "limited by the policies of `up`",
            Self::DownRate => "limited by the policies of `down`",
            Self::UpDisabled => "`up` is disabled",
            Self::DownDisabled => "`down` is disabled",
            Self::NotIdle => "it sleeps only after `idle_for` without a request",
            Self::Rollout => "it sleeps only after its rollout",
        })
    }
}

impl fmt::Display for MetricReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Metric { source, target } = &self.metric;
        write!(f, "{source}")?;
        if let Some(problem) = &self.problem {
            return write!(f, ": {problem}");
        }
        if let Some(current) = self.current {
            write!(f, " is {}", source.describe(current))?;
        }
        write!(f, " of {}", source.describe(*target))?;
        match target {
            Level::Utilization(_) | Level::Average(_) => f.write_str(" per instance")?,
            Level::Value(_) => f.write_str(" in all")?,
        }
        if let Some(proposes) = self.proposes {
            write!(f, ", which asks for {proposes}")?;
        }
        match (self.unready, self.missing) {
            (0, 0) => Ok(()),
            (unready, 0) => write!(f, " ({unready} not ready yet)"),
            (0, missing) => write!(f, " ({missing} without a measurement)"),
            (unready, missing) => write!(f, " ({unready} not ready yet, {missing} without a measurement)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(source: MetricSource, target: Level, current: Level, proposes: u32) -> MetricReport {
        MetricReport {
            metric: Metric { source, target },
            current: Some(current),
            proposes: Some(proposes),
            problem: None,
            unready: 0,
            missing: 0,
        }
    }

    fn decision(from: u32, to: u32, reason: ScaleReason, metrics: Vec<MetricReport>) -> ScaleDecision {
        let recommended = metrics.iter().filter_map(|report| report.proposes).max();
        ScaleDecision { from, to, reason, recommended, stabilized: None, limit: None, metrics }
    }

    #[test]
    fn decisions_are_sentences() {
        let cpu = report(MetricSource::Cpu, Level::Utilization(70), Level::Utilization(91), 4);
        let memory = report(
            MetricSource::Memory,
            Level::Average(Measure::whole(1 << 30)),
            Level::Average(Measure::whole(512 << 20)),
            2,
        );
        let up = decision(3, 4, ScaleReason::Metrics, vec![cpu.clone(), memory.clone()]);
        assert_eq!(up.to_string(), "scaled up from 3 to 4: cpu is 91% of 70% per instance, which asks for 4");
        assert_eq!(up.details()[1], "memory is 512Mi of 1Gi per instance, which asks for 2");

        let mut held = decision(5, 5, ScaleReason::Metrics, vec![memory.clone()]);
        held.stabilized = Some(Stabilized { to: 5, window: Timespan::seconds(300) });
        assert_eq!(
            held.to_string(),
            "stays at 5: memory is 512Mi of 1Gi per instance, which asks for 2; the recommendations of the last 5m keep it at 5"
        );

        let gone = MetricReport {
            current: None,
            proposes: None,
            problem: Some("no instance reports it".to_owned()),
            ..report(MetricSource::QueueDepth, Level::Value(Measure::whole(10)), Level::Value(Measure::default()), 0)
        };
        let blocked = decision(5, 5, ScaleReason::DownBlocked, vec![memory, gone]);
        assert_eq!(
            blocked.to_string(),
            "stays at 5: the metrics ask for 2, but not all are available, and so nothing is taken away \
             (queue_depth: no instance reports it)"
        );

        let idle = decision(1, 0, ScaleReason::Idle { idle: Timespan::seconds(300) }, Vec::new());
        assert_eq!(idle.to_string(), "scaled down from 1 to 0: no request for 5m");
        let limited =
            ScaleDecision { limit: Some(ScaleLimit::UpRate), ..decision(3, 4, ScaleReason::Metrics, vec![cpu]) };
        assert!(limited.to_string().ends_with("; limited by the policies of `up`"), "{limited}");
    }

    #[test]
    fn the_first_of_equal_metrics_leads() {
        let metrics = vec![
            report(MetricSource::Memory, Level::Utilization(50), Level::Utilization(10), 1),
            report(MetricSource::Cpu, Level::Utilization(50), Level::Utilization(99), 4),
            report(MetricSource::QueueDepth, Level::Value(Measure::whole(1)), Level::Value(Measure::whole(2)), 4),
        ];
        let decision = decision(2, 4, ScaleReason::Metrics, metrics);
        assert_eq!(decision.leader().unwrap().metric.source, MetricSource::Cpu);
    }

    #[test]
    fn records_survive_their_notation() {
        let record = AutoscaleRecord {
            recommendations: vec![AgedRecommendation { ago: Timespan::seconds(12), replicas: 4 }],
            changes: vec![AgedChange { ago: Timespan::millis(1500), by: -2 }],
            last: Some(decision(1, 0, ScaleReason::Idle { idle: Timespan::seconds(300) }, Vec::new())),
            last_ago: Some(Timespan::seconds(1)),
            changed: None,
            changed_ago: None,
            cold_start: Some(Timespan::seconds(3)),
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<AutoscaleRecord>(&text).unwrap(), record);
        assert_eq!(serde_json::from_str::<AutoscaleRecord>("{}").unwrap(), AutoscaleRecord::default());
    }
}
