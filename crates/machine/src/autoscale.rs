//! How many instances a service has: the decision of the Kubernetes `HorizontalPodAutoscaler` (`autoscaling/v2`), and
//! sleep for services that nobody uses.
//!
//! ```text
//!                       idle for `idle_for`, no work, no rollout
//!            Awake ------------------------------------------------> Asleep
//!          (min 1..max)                                             (0, only with min: 0)
//!            ^    ^                                                    |
//!            |    |  an instance is ready                              | a request waits, or a total says work
//!            |    +------------------------------ Starting <-----------+
//!            |                                   (1 instance, `cold_start` runs)
//!            | raised by hand
//!          Resting (0 by hand, with min > 0: nothing moves)
//! ```
//!
//! One evaluation, in this order (1 to 5 are those of the reference implementation):
//!
//! 1. 0 instances with `min` above 0: somebody switched the service off; rest.
//! 2. More than `max`, fewer than `min`: go there at once.
//! 3. Every metric makes a proposal (`proposal`), the largest wins. If some have none, nothing shrinks; if none has
//!    one, nothing moves, and nothing is remembered.
//! 4. The raw recommendation is brought into the windows (`history`), and then remembered raw.
//! 5. The policies of the direction bound the step, `max` or `min` bounds the number.
//! 6. Sleep: with `min: 0` the number above never falls below 1. An idle service goes to 0 instead: `idle_for` takes the
//!    place of the window, the policies of `down` hold. Waking takes no window and no policy: it goes to 1 at once.
//!
//! **During a rollout** the number that is scaled is that of the service in all; the rollout splits it by its weights. As
//! with Argo Rollouts and the `HorizontalPodAutoscaler`, both directions stay active: a pause may last for days, and the
//! load follows no step. What Argo reports as the present number leaves the second set out, and so does
//! [`Sample::replicas`]: otherwise a total that is divided by it would feed on itself. A release that fails fast and cheap
//! lowers CPU; that takes nothing away from the old set before a verdict, because the window of `down` (five minutes) is
//! longer than a verdict takes. Only sleep waits for the end of a rollout, which needs an instance to look at.
//!
//! Every deviation from the reference implementation is deliberate: exact rounding (`proposal`), sleep (6), instances that
//! leave need no request, and the length of the history, of which only what cannot matter is forgotten.

mod history;
mod load;
mod proposal;
mod sample;

use std::{cmp::Ordering, time::Duration};

use orchestra_model::{
    Now,
    autoscale::{
        AgedChange, AgedRecommendation, Autoscale, AutoscaleRecord, AutoscaleStatus, ColdStart, Metric, MetricReport,
        ScaleDecision, ScaleLimit, ScaleReason, Select, Stabilized,
    },
    quantity::Timespan,
};

use history::History;
pub use load::LoadMeter;
pub use sample::{Activity, InstancePhase, InstanceSample, Point, Reading, Sample};

/// The autoscaler of one service.
#[derive(Clone, Debug)]
pub struct Autoscaler {
    policy: Autoscale,
    history: History,
    /// The present number was recommended once, so that windows have something to begin with.
    seeded: bool,
    next: Now,
    last: Option<(Now, ScaleDecision)>,
    changed: Option<(Now, ScaleDecision)>,
    /// Last count of requests.
    begun: Option<u64>,
    /// Since when nobody has asked.
    idle_since: Option<Now>,
    cold_start: Option<Now>,
}

/// Inner time runs ahead of the driver's by this much, so that what is remembered from before a restart, when the
/// driver's time begins anew, has a place on the line.
const AHEAD: Duration = Duration::from_secs(366 * 86_400);

fn inner(now: Now) -> Now {
    now + AHEAD
}

fn outer(now: Now) -> Now {
    Now::at(now.since_origin().saturating_sub(AHEAD))
}

fn before(now: Now, age: Timespan) -> Now {
    Now::at(now.since_origin().saturating_sub(age.duration()))
}

fn age(now: Now, then: Now) -> Timespan {
    Timespan::millis(u64::try_from(now.since(then).as_millis()).unwrap_or(u64::MAX))
}

impl Autoscaler {
    /// For a service that was not scaled before.
    pub fn new(policy: Autoscale) -> Self {
        Self {
            policy,
            history: History::default(),
            seeded: false,
            next: Now::ZERO,
            last: None,
            changed: None,
            begun: None,
            idle_since: None,
            cold_start: None,
        }
    }

    /// Goes on from what was written down. The idle time begins anew: nobody saw the requests of the meantime.
    pub fn restore(policy: Autoscale, record: &AutoscaleRecord, now: Now) -> Self {
        let now = inner(now);
        let recommendations = record.recommendations.iter().map(|r| (before(now, r.ago), r.replicas)).collect();
        let changes = record.changes.iter().map(|change| (before(now, change.ago), change.by)).collect();
        let decided = |decision: &Option<ScaleDecision>, ago: Option<Timespan>| {
            decision.clone().map(|decision| (before(now, ago.unwrap_or_default()), decision))
        };
        Self {
            history: History::of(recommendations, changes),
            last: decided(&record.last, record.last_ago),
            changed: decided(&record.changed, record.changed_ago),
            cold_start: record.cold_start.map(|ago| before(now, ago)),
            ..Self::new(policy)
        }
    }

    /// What must survive a restart. It is enough to write it down with every decision that changes the number: a window
    /// that begins anew is longer, never shorter.
    pub fn record(&self, now: Now) -> AutoscaleRecord {
        let now = inner(now);
        AutoscaleRecord {
            recommendations: self
                .history
                .recommendations()
                .iter()
                .map(|(at, replicas)| AgedRecommendation { ago: age(now, *at), replicas: *replicas })
                .collect(),
            changes: (self.history.changes().iter())
                .map(|(at, by)| AgedChange { ago: age(now, *at), by: *by })
                .collect(),
            last: self.last.as_ref().map(|(_, decision)| decision.clone()),
            last_ago: self.last.as_ref().map(|(at, _)| age(now, *at)),
            changed: self.changed.as_ref().map(|(_, decision)| decision.clone()),
            changed_ago: self.changed.as_ref().map(|(at, _)| age(now, *at)),
            cold_start: self.cold_start.map(|at| age(now, at)),
        }
    }

    /// The policy in force.
    pub fn policy(&self) -> &Autoscale {
        &self.policy
    }

    /// Goes on under another policy, at once.
    pub fn set_policy(&mut self, policy: Autoscale) {
        if self.policy != policy {
            self.policy = policy;
            self.next = Now::ZERO;
        }
    }

    /// Evaluates a sample: at the [`Self::deadline`], or earlier if something happened. `Some` is a change, which the
    /// caller carries out and hands back as [`Sample::replicas`] from then on.
    pub fn handle(&mut self, now: Now, sample: &Sample) -> Option<ScaleDecision> {
        let inner = inner(now);
        self.next = now + self.policy.every.duration();
        self.observe(inner, sample);
        if !self.seeded {
            self.seeded = true;
            self.history.recommend(&self.policy, inner, sample.replicas);
        }
        let decision = self.evaluate(now, sample);
        self.decided(inner, decision)
    }

    /// Wakes a service because a request waits for an instance; nothing if it does not sleep. Spares the caller a
    /// sample when it matters.
    pub fn wake(&mut self, now: Now, replicas: u32) -> Option<ScaleDecision> {
        if replicas > 0 || self.policy.min > 0 {
            return None;
        }
        self.decided(inner(now), woken(ScaleReason::Woken))
    }

    /// Somebody else set the number. It counts as recommended now, so that the window of `down` keeps it for a while, and
    /// the idle time begins anew.
    pub fn moved(&mut self, now: Now, replicas: u32) {
        self.history.recommend(&self.policy, inner(now), replicas);
        self.idle_since = None;
        self.cold_start = None;
        // What was decided before says nothing about this number.
        (self.last, self.changed) = (None, None);
    }

    /// As [`Self::moved`], by a person, which is the last change from then on.
    pub fn set_by_hand(&mut self, now: Now, from: u32, to: u32) {
        self.moved(now, to);
        let decision = ScaleDecision { from, to, ..woken(ScaleReason::ByHand) };
        self.last = Some((inner(now), decision.clone()));
        self.changed = Some((inner(now), decision));
    }

    /// Whether it was woken and has not been seen ready since.
    pub fn is_starting_cold(&self) -> bool {
        self.cold_start.is_some()
    }

    /// When the next sample must come at the latest.
    pub fn deadline(&self) -> Now {
        let mut deadline = self.next;
        let evaluated = self.last.as_ref().map(|(at, _)| *at).unwrap_or_default();
        if let Some(to_zero) = self.policy.to_zero {
            let awake = self.last.as_ref().is_some_and(|(_, decision)| decision.to > 0);
            let idle = self.idle_since.filter(|_| awake).map(|since| since + to_zero.idle_for.duration());
            let overdue = self.cold_start.map(|since| since + to_zero.cold_start.duration());
            for point in [idle, overdue].into_iter().flatten().filter(|point| *point > evaluated) {
                deadline = deadline.min(outer(point));
            }
        }
        deadline
    }

    /// What people see.
    pub fn status(&self, now: Now) -> AutoscaleStatus {
        let now = inner(now);
        let to_zero = self.policy.to_zero;
        AutoscaleStatus {
            last: self.last.as_ref().map(|(_, decision)| decision.clone()),
            last_ago: self.last.as_ref().map(|(at, _)| age(now, *at)),
            changed: self.changed.as_ref().map(|(_, decision)| decision.clone()),
            changed_ago: self.changed.as_ref().map(|(at, _)| age(now, *at)),
            idle: to_zero.and(self.idle_since).map(|since| age(now, since)),
            cold_start: to_zero
                .zip(self.cold_start)
                .map(|(to_zero, since)| ColdStart { waited: age(now, since), deadline: to_zero.cold_start }),
        }
    }

    /// Sentences for `orchestra why`: the last evaluation, its metrics, the last change, and what is waited for.
    pub fn explain(&self, now: Now) -> Vec<String> {
        let status = self.status(now);
        let mut lines = Vec::new();
        let Some(last) = &status.last else {
            return vec!["autoscaling waits for its first measurement".to_owned()];
        };
        lines.push(last.to_string());
        if last.metrics.len() > 1 {
            lines.extend(last.details().into_iter().map(|detail| format!("  {detail}")));
        }
        if let (Some(changed), Some(ago)) = (&status.changed, status.changed_ago)
            && changed != last
        {
            lines.push(format!("{} ago: {changed}", whole_seconds(ago)));
        }
        if let Some(cold_start) = status.cold_start {
            let (waited, deadline) = (whole_seconds(cold_start.waited), cold_start.deadline);
            lines.push(if cold_start.is_overdue() {
                format!(
                    "no instance is ready {waited} after the request that woke it; requests wait at most {deadline}"
                )
            } else {
                format!("starting for {waited}; requests wait for an instance for at most {deadline}")
            });
        }
        if let (Some(idle), Some(to_zero)) = (status.idle, self.policy.to_zero)
            && last.to > 0
            && idle < to_zero.idle_for
        {
            lines.push(format!("no request for {}; it sleeps after {}", whole_seconds(idle), to_zero.idle_for));
        }
        lines
    }

    /// Keeps the clocks of sleep.
    fn observe(&mut self, now: Now, sample: &Sample) {
        if sample.replicas == 0 || sample.ready() > 0 {
            self.cold_start = None;
        }
        let Some(activity) = sample.activity else {
            self.idle_since = None;
            self.begun = None;
            return;
        };
        let begun = self.begun.replace(activity.begun) != Some(activity.begun);
        // Whoever is woken is given the time to become ready, also when the request that woke it has gone.
        if activity.is_busy() || self.is_starting(now) {
            self.idle_since = None;
        } else if begun || self.idle_since.is_none() {
            self.idle_since = Some(now);
        }
    }

    fn is_starting(&self, now: Now) -> bool {
        let deadline = self.policy.to_zero.map(|to_zero| to_zero.cold_start.duration());
        deadline.zip(self.cold_start).is_some_and(|(deadline, since)| now.since(since) < deadline)
    }

    fn evaluate(&mut self, now: Now, sample: &Sample) -> ScaleDecision {
        let current = sample.replicas;
        let plain = |to, reason| ScaleDecision {
            from: current,
            to,
            reason,
            recommended: None,
            stabilized: None,
            limit: None,
            metrics: Vec::new(),
        };
        if current == 0 && self.policy.min > 0 {
            plain(0, ScaleReason::Resting)
        } else if current > self.policy.max {
            plain(self.policy.max, ScaleReason::AboveMax)
        } else if current < self.policy.min {
            plain(self.policy.min, ScaleReason::BelowMin)
        } else if current == 0 {
            self.asleep(now, sample)
        } else {
            match self.tired(inner(now), sample) {
                Some(Tired { idle, kept_by: None }) => self.fall_asleep(inner(now), current, idle),
                tired => {
                    let mut decision = self.by_metrics(now, sample);
                    if matches!(decision.limit, None | Some(ScaleLimit::NotIdle)) {
                        decision.limit = tired.and_then(|tired| tired.kept_by).or(decision.limit);
                    }
                    decision
                }
            }
        }
    }

    /// A service at 0 that may be there: only a request or work moves it.
    fn asleep(&self, now: Now, sample: &Sample) -> ScaleDecision {
        if sample.activity.is_some_and(|activity| activity.held > 0) {
            return woken(ScaleReason::Woken);
        }
        let metrics = self.ask(now, sample);
        let work = metrics.iter().any(|report| report.proposes.is_some_and(|proposes| proposes > 0));
        if work {
            return ScaleDecision { metrics, ..woken(ScaleReason::Work) };
        }
        ScaleDecision { to: 0, metrics, ..woken(ScaleReason::Asleep) }
    }

    /// Whether nobody needs the service, and what keeps it awake all the same.
    fn tired(&self, now: Now, sample: &Sample) -> Option<Tired> {
        let to_zero = self.policy.to_zero.filter(|_| self.policy.min == 0)?;
        let idle = now.since(self.idle_since?);
        if idle < to_zero.idle_for.duration() {
            return None;
        }
        // Work that cannot be seen may be there.
        let without_work = |metric: &Metric| match sample.readings.get(&metric.source) {
            _ if metric.source.is_of_instances() => true,
            Some(Reading::Total(total)) => total.as_thousandths() == 0,
            // With instances there, one that says nothing may have something to do.
            Some(Reading::PerInstance(points)) => {
                !points.is_empty() && points.values().all(|point| point.value.as_thousandths() == 0)
            }
            Some(Reading::Unavailable(_)) | None => false,
        };
        if !self.policy.on.iter().all(without_work) {
            return None;
        }
        let kept_by = if sample.rollout {
            Some(ScaleLimit::Rollout)
        } else {
            (self.policy.down.select == Select::Disabled).then_some(ScaleLimit::DownDisabled)
        };
        Some(Tired { idle: Timespan::seconds(idle.as_secs()), kept_by })
    }

    fn fall_asleep(&mut self, now: Now, current: u32, idle: Timespan) -> ScaleDecision {
        self.history.recommend(&self.policy, now, 0);
        let to = self.history.floor(&self.policy.down, now, current);
        ScaleDecision {
            from: current,
            to,
            reason: ScaleReason::Idle { idle },
            recommended: Some(0),
            stabilized: None,
            limit: (to > 0).then_some(ScaleLimit::DownRate),
            metrics: Vec::new(),
        }
    }

    fn by_metrics(&mut self, now: Now, sample: &Sample) -> ScaleDecision {
        let current = sample.replicas;
        let metrics = self.ask(now, sample);
        let recommended = metrics.iter().filter_map(|report| report.proposes).max();
        let decision = ScaleDecision {
            from: current,
            to: current,
            reason: ScaleReason::Metrics,
            recommended,
            stabilized: None,
            limit: None,
            metrics,
        };
        let Some(recommended) = recommended else {
            let reason = if self.policy.on.is_empty() { ScaleReason::Metrics } else { ScaleReason::NoMetrics };
            return ScaleDecision { reason, ..decision };
        };
        let incomplete = decision.metrics.iter().any(|report| report.proposes.is_none());
        if incomplete && recommended < current {
            return ScaleDecision { reason: ScaleReason::DownBlocked, ..decision };
        }
        let now = inner(now);
        // One is what the bounds leave of nothing, whatever the window says.
        if current == 1 && recommended == 0 && self.policy.min == 0 {
            self.history.recommend(&self.policy, now, recommended);
            return ScaleDecision { limit: Some(ScaleLimit::NotIdle), ..decision };
        }
        let stable = self.history.stabilize(&self.policy, now, current, recommended);
        self.history.recommend(&self.policy, now, recommended);
        let window = if recommended > stable { self.policy.up.window } else { self.policy.down.window };
        let (to, limit) = self.limited(now, current, stable);
        ScaleDecision {
            to,
            stabilized: (stable != recommended).then_some(Stabilized { to: stable, window }),
            limit,
            ..decision
        }
    }

    /// A number within the policies of its direction and the bounds of the service, and what bounded it.
    fn limited(&self, now: Now, current: u32, wanted: u32) -> (u32, Option<ScaleLimit>) {
        let Autoscale { up, down, max, .. } = &self.policy;
        match wanted.cmp(&current) {
            Ordering::Equal => (wanted, None),
            Ordering::Greater => {
                let ceiling = self.history.ceiling(up, now, current);
                let limit = match up.select {
                    _ if *max <= ceiling => ScaleLimit::Max,
                    Select::Disabled => ScaleLimit::UpDisabled,
                    Select::Max | Select::Min => ScaleLimit::UpRate,
                };
                let most = ceiling.min(*max);
                if wanted > most { (most, Some(limit)) } else { (wanted, None) }
            }
            Ordering::Less => {
                let (floor, min) = (self.history.floor(down, now, current), self.policy.floor());
                let limit = match down.select {
                    _ if min >= floor && self.policy.min == 0 => ScaleLimit::NotIdle,
                    _ if min >= floor => ScaleLimit::Min,
                    Select::Disabled => ScaleLimit::DownDisabled,
                    Select::Max | Select::Min => ScaleLimit::DownRate,
                };
                let fewest = floor.max(min);
                if wanted < fewest { (fewest, Some(limit)) } else { (wanted, None) }
            }
        }
    }

    fn ask(&self, now: Now, sample: &Sample) -> Vec<MetricReport> {
        let ask = |metric: &Metric| {
            let metric = metric.clone();
            match proposal::propose(&self.policy, &metric, sample, now) {
                Ok(proposal) => MetricReport {
                    metric,
                    current: Some(proposal.current),
                    proposes: Some(proposal.replicas),
                    problem: None,
                    unready: proposal.unready,
                    missing: proposal.missing,
                },
                Err(problem) => MetricReport {
                    metric,
                    current: None,
                    proposes: None,
                    problem: Some(problem),
                    unready: 0,
                    missing: 0,
                },
            }
        };
        self.policy.on.iter().map(ask).collect()
    }

    /// Remembers a decision; a change is handed on.
    fn decided(&mut self, now: Now, decision: ScaleDecision) -> Option<ScaleDecision> {
        self.last = Some((now, decision.clone()));
        if !decision.is_change() {
            return None;
        }
        if decision.from == 0 {
            self.cold_start = Some(now);
            self.idle_since = None;
        }
        self.history.change(&self.policy, now, decision.from, decision.to);
        self.changed = Some((now, decision.clone()));
        Some(decision)
    }
}

/// A service that nobody needs.
struct Tired {
    idle: Timespan,
    kept_by: Option<ScaleLimit>,
}

fn woken(reason: ScaleReason) -> ScaleDecision {
    ScaleDecision { from: 0, to: 1, reason, recommended: None, stabilized: None, limit: None, metrics: Vec::new() }
}

fn whole_seconds(span: Timespan) -> Timespan {
    if span.duration() < Duration::from_secs(1) { span } else { Timespan::seconds(span.duration().as_secs()) }
}

#[cfg(test)]
mod tests;
