//! What one metric asks for: the replica calculation of the Kubernetes `HorizontalPodAutoscaler`.
//!
//! Published as "Algorithm details" in <https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/>;
//! where that text is silent, the reference implementation decides (`pkg/controller/podautoscaler` of Kubernetes 1.33).
//!
//! 1. Instances that leave are ignored. The others are *unready* (pending; for CPU also those that are not ready yet, or
//!    were measured before they were), *missing* (no measurement), or they count.
//! 2. Level: sum over those that count, divided by their number (or by the sum of what they ask for, in whole percent),
//!    cut to the unit. Ratio: level by target.
//! 3. Nothing set aside that matters: within the tolerance nothing changes, else ⌈ratio · counting instances⌉.
//! 4. Otherwise the ratio is taken again with those set aside: missing ones at the target if it would shrink (at all that
//!    they ask for, for a utilisation) and at 0 if it would grow; unready ones at 0 if it would grow. If that is within the
//!    tolerance, or turns the direction around, nothing changes.
//!
//! Everything is integer arithmetic on thousandths. Kubernetes multiplies in binary floating point before it rounds up,
//! which now and then makes ⌈7.000000000000001⌉ of an exact 7; the published formula is followed here, not that accident.

use std::collections::BTreeMap;

use orchestra_model::{
    InstanceId, Now,
    autoscale::{Autoscale, Level, Metric, MetricSource},
    quantity::Measure,
};

use super::sample::{InstancePhase, InstanceSample, Point, Reading, Sample};

/// What a metric asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proposal {
    pub(super) replicas: u32,
    /// Without those that were set aside, as Kubernetes reports it.
    pub(super) current: Level,
    pub(super) unready: u32,
    pub(super) missing: u32,
}

/// Asks one metric. The error is one clause that says why it has no answer.
pub(super) fn propose(policy: &Autoscale, metric: &Metric, sample: &Sample, now: Now) -> Result<Proposal, String> {
    let reading = match sample.readings.get(&metric.source) {
        None => return Err("nobody measures it".to_owned()),
        Some(Reading::Unavailable(problem)) => return Err(problem.clone()),
        Some(reading) => reading,
    };
    let target = match metric.target {
        Level::Utilization(percent) => u128::from(percent),
        Level::Average(measure) | Level::Value(measure) => u128::from(measure.as_thousandths()),
    };
    if target == 0 {
        return Err("its target is 0".to_owned());
    }
    let asking = Asking { policy, metric, sample, now, target };
    match (metric.target, reading) {
        (Level::Utilization(_) | Level::Average(_), Reading::PerInstance(points)) => asking.by_instances(points),
        (Level::Average(_), Reading::Total(total)) => Ok(asking.average_of_total(*total)),
        (Level::Value(_), Reading::Total(total)) => asking.value(*total),
        (Level::Value(_), Reading::PerInstance(points)) => asking.value(asking.sum(points)),
        (Level::Utilization(_), Reading::Total(_)) => Err("it is measured only for the service as a whole".to_owned()),
        (_, Reading::Unavailable(problem)) => Err(problem.clone()),
    }
}

/// One question with all that bears on it.
#[derive(Clone, Copy)]
struct Asking<'s> {
    policy: &'s Autoscale,
    metric: &'s Metric,
    sample: &'s Sample,
    now: Now,
    target: u128,
}

/// One instance in a sum: what it uses and what it asks for, both in thousandths.
#[derive(Clone, Copy)]
struct Entry {
    used: u128,
    requested: u128,
}

/// Instances by what they can say.
#[derive(Default)]
struct Groups {
    counting: Vec<Entry>,
    unready: Vec<Entry>,
    missing: Vec<Entry>,
}

impl Asking<'_> {
    /// Averages over instances (`Resource` and `Pods` metrics).
    fn by_instances(self, points: &BTreeMap<InstanceId, Point>) -> Result<Proposal, String> {
        let Groups { counting, unready, missing } = self.group(points)?;
        if counting.is_empty() {
            return Err("no instance that is ready reports it".to_owned());
        }
        let level = self.level(&counting)?;
        let proposal = |replicas| Proposal {
            replicas,
            current: self.as_level(level),
            unready: count(unready.len()),
            missing: count(missing.len()),
        };
        let first = Ratio { of: level, to: self.target };
        let grows_with_unready = !unready.is_empty() && first.is_above_one();
        if !grows_with_unready && missing.is_empty() {
            return Ok(proposal(self.scaled(first, counting.len())));
        }

        let mut all = counting;
        if first.is_below_one() {
            all.extend(missing.iter().map(|entry| Entry { used: self.in_full(*entry), ..*entry }));
        } else if first.is_above_one() {
            all.extend(missing.iter().map(|entry| Entry { used: 0, ..*entry }));
        }
        if grows_with_unready {
            all.extend(unready.iter().map(|entry| Entry { used: 0, ..*entry }));
        }
        let second = Ratio { of: self.level(&all)?, to: self.target };
        let turned = (first.is_below_one() && second.is_above_one()) || (first.is_above_one() && second.is_below_one());
        if turned {
            return Ok(proposal(self.sample.replicas));
        }
        let replicas = self.scaled(second, all.len());
        let current = self.sample.replicas;
        let against = (second.is_below_one() && replicas > current) || (second.is_above_one() && replicas < current);
        Ok(proposal(if against { current } else { replicas }))
    }

    /// The share of a total that falls to each instance (`Object` and `External` metrics with an average value).
    fn average_of_total(self, total: Measure) -> Proposal {
        // The second set of a rollout is no reason to want more: counting it would feed itself.
        let counted = count(self.sample.staying().count()).min(self.sample.replicas);
        let total = u128::from(total.as_thousandths());
        let ratio = Ratio { of: total, to: self.target * u128::from(counted) };
        let replicas =
            if counted > 0 && self.is_tolerable(ratio) { counted } else { capped(total.div_ceil(self.target)) };
        let share = if counted > 0 { total.div_ceil(u128::from(counted)) } else { total };
        Proposal { replicas, current: Level::Average(measure(share)), unready: 0, missing: 0 }
    }

    /// A total against a target (`Object` and `External` metrics with a value).
    fn value(self, total: Measure) -> Result<Proposal, String> {
        let ratio = Ratio { of: u128::from(total.as_thousandths()), to: self.target };
        let replicas = if self.sample.replicas == 0 {
            ratio.times_rounded_up(1)
        } else if self.sample.staying().next().is_none() {
            return Err("there is no instance".to_owned());
        } else {
            self.scaled(ratio, self.sample.ready())
        };
        Ok(Proposal { replicas, current: Level::Value(total), unready: 0, missing: 0 })
    }

    fn sum(self, points: &BTreeMap<InstanceId, Point>) -> Measure {
        let values = self.sample.staying().filter_map(|instance| points.get(&instance.id));
        Measure::thousandths(values.fold(0, |sum, point| point.value.as_thousandths().saturating_add(sum)))
    }

    fn group(self, points: &BTreeMap<InstanceId, Point>) -> Result<Groups, String> {
        let mut groups = Groups::default();
        for instance in self.sample.staying() {
            let requested = self.requested(instance)?;
            let InstancePhase::Running { started, ready, since } = instance.phase else {
                groups.unready.push(Entry { used: 0, requested });
                continue;
            };
            let Some(point) = points.get(&instance.id) else {
                groups.missing.push(Entry { used: 0, requested });
                continue;
            };
            let entry = Entry { used: u128::from(point.value.as_thousandths()), requested };
            let unready = self.metric.source == MetricSource::Cpu && self.is_unready(started, ready, since, point);
            if unready { groups.unready.push(entry) } else { groups.counting.push(entry) }
        }
        Ok(groups)
    }

    /// Whether the CPU of an instance says nothing yet: it was busy with its start.
    fn is_unready(self, started: Now, ready: bool, since: Now, point: &Point) -> bool {
        if started + self.policy.cpu_initialization.duration() > self.now {
            !ready || point.at < since + point.over
        } else {
            !ready && started + self.policy.initial_readiness.duration() > since
        }
    }

    fn requested(self, instance: &InstanceSample) -> Result<u128, String> {
        if !matches!(self.metric.target, Level::Utilization(_)) {
            return Ok(0);
        }
        let requested = match self.metric.source {
            MetricSource::Cpu => instance.cpu.map(|cpu| u128::from(cpu.as_millis())),
            MetricSource::Memory => instance.memory.map(|memory| u128::from(memory.as_bytes()) * 1000),
            _ => None,
        };
        requested.ok_or_else(|| format!("{} does not say in `resources` what it needs", instance.id))
    }

    /// What a missing instance is taken to use if the service would shrink.
    fn in_full(self, entry: Entry) -> u128 {
        match self.metric.target {
            Level::Utilization(percent) => entry.requested * u128::from(percent.max(100)) / 100,
            Level::Average(_) | Level::Value(_) => self.target,
        }
    }

    fn level(self, entries: &[Entry]) -> Result<u128, String> {
        let used: u128 = entries.iter().map(|entry| entry.used).sum();
        match self.metric.target {
            Level::Utilization(_) => {
                let requested: u128 = entries.iter().map(|entry| entry.requested).sum();
                (used * 100).checked_div(requested).ok_or_else(|| "its instances ask for nothing".to_owned())
            }
            Level::Average(_) | Level::Value(_) => Ok(used / u128::try_from(entries.len()).unwrap_or(u128::MAX)),
        }
    }

    fn as_level(self, level: u128) -> Level {
        match self.metric.target {
            Level::Utilization(_) => Level::Utilization(capped(level)),
            Level::Average(_) | Level::Value(_) => Level::Average(measure(level)),
        }
    }

    /// What a ratio makes of so many instances: all as it is within the tolerance.
    fn scaled(self, ratio: Ratio, instances: usize) -> u32 {
        if self.is_tolerable(ratio) { self.sample.replicas } else { ratio.times_rounded_up(instances) }
    }

    fn is_tolerable(self, ratio: Ratio) -> bool {
        const ONE: u128 = 100_000;
        let down = u128::from(self.policy.down.tolerance.as_thousandths());
        let up = u128::from(self.policy.up.tolerance.as_thousandths());
        ratio.of * ONE >= ratio.to * (ONE - down.min(ONE)) && ratio.of * ONE <= ratio.to * (ONE + up)
    }
}

/// A quotient that is never taken.
#[derive(Clone, Copy)]
struct Ratio {
    of: u128,
    to: u128,
}

impl Ratio {
    fn is_above_one(self) -> bool {
        self.of > self.to
    }

    fn is_below_one(self) -> bool {
        self.of < self.to
    }

    fn times_rounded_up(self, instances: usize) -> u32 {
        let instances = u128::try_from(instances).unwrap_or(u128::MAX);
        capped((self.of.saturating_mul(instances)).div_ceil(self.to))
    }
}

fn capped(number: u128) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn measure(thousandths: u128) -> Measure {
    Measure::thousandths(u64::try_from(thousandths).unwrap_or(u64::MAX))
}
