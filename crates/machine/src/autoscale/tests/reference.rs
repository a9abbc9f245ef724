//! A second implementation, written from the published text step by step and as simply as possible: nothing is forgotten,
//! nothing is shared with the first, and rounding up is counting up.

use std::cmp::Ordering;

use proptest::prelude::*;

use super::*;

/// Thousandths everywhere, time in milliseconds.
#[derive(Default)]
struct Model {
    recommendations: Option<Vec<(i128, i128)>>,
    added: Vec<(i128, i128)>,
    removed: Vec<(i128, i128)>,
}

struct Pod {
    name: InstanceId,
    requests: Option<i128>,
    metric: Option<(i128, i128, i128)>,
    phase: InstancePhase,
}

fn millis(now: Now) -> i128 {
    i128::try_from(now.since_origin().as_millis()).unwrap()
}

fn span(span: Timespan) -> i128 {
    i128::try_from(span.duration().as_millis()).unwrap()
}

fn thousandths(measure: Measure) -> i128 {
    i128::from(measure.as_thousandths())
}

/// The smallest whole number that is at least `top / bottom`, found by counting.
fn counted_up(top: i128, bottom: i128) -> i128 {
    let mut number = 0;
    while number * bottom < top {
        number += 1;
    }
    number
}

/// |1 - level/target| is within what is allowed in its direction.
fn tolerated(policy: &Autoscale, level: i128, target: i128) -> bool {
    let off = (level - target) * 100_000;
    let tolerance = if off > 0 { &policy.up.tolerance } else { &policy.down.tolerance };
    off.abs() <= target * i128::from(tolerance.as_thousandths())
}

impl Model {
    fn step(&mut self, policy: &Autoscale, now: Now, sample: &Sample) -> i128 {
        let now_ms = millis(now);
        let current = i128::from(sample.replicas);
        let (min, max) = (i128::from(policy.min), i128::from(policy.max));
        // "recordInitialRecommendation"
        self.recommendations.get_or_insert_with(|| vec![(now_ms, current)]);
        let desired = if current == 0 && min != 0 {
            return 0;
        } else if current > max {
            max
        } else if current < min {
            min
        } else {
            // The largest of the proposals; some missing: no scale down; all missing: nothing.
            let proposals: Vec<Option<i128>> =
                policy.on.iter().map(|metric| Self::proposal(policy, metric, now_ms, sample)).collect();
            let known: Vec<i128> = proposals.iter().flatten().copied().collect();
            let Some(largest) = known.iter().copied().max() else { return current };
            if known.len() < proposals.len() && largest < current {
                return current;
            }
            let stable = self.stabilize(policy, now_ms, current, largest);
            self.limit(policy, now_ms, current, stable)
        };
        match desired - current {
            0 => {}
            change if change > 0 => self.added.push((now_ms, change)),
            change => self.removed.push((now_ms, -change)),
        }
        desired
    }

    fn proposal(policy: &Autoscale, metric: &Metric, now: i128, sample: &Sample) -> Option<i128> {
        let current = i128::from(sample.replicas);
        let mut pods = Vec::new();
        for instance in &sample.instances {
            // "All Pods with a deletion timestamp set are ignored, and all failed Pods are discarded."
            if instance.phase == InstancePhase::Leaving {
                continue;
            }
            let requests = match metric.source {
                MetricSource::Cpu => instance.cpu.map(|cpu| i128::from(cpu.as_millis())),
                MetricSource::Memory => instance.memory.map(|memory| i128::from(memory.as_bytes()) * 1000),
                _ => None,
            };
            let point = match sample.readings.get(&metric.source) {
                Some(Reading::PerInstance(points)) => points.get(&instance.id).copied(),
                _ => None,
            };
            let metric =
                point.map(|p| (thousandths(p.value), millis(p.at), i128::try_from(p.over.as_millis()).unwrap()));
            pods.push(Pod { name: instance.id.clone(), requests, metric, phase: instance.phase });
        }
        match (metric.target, sample.readings.get(&metric.source)?) {
            (_, Reading::Unavailable(_)) | (Level::Utilization(_), Reading::Total(_)) => None,
            (Level::Utilization(percent), Reading::PerInstance(_)) => {
                Self::average(policy, metric, now, current, &pods, Some(i128::from(percent)))
            }
            (Level::Average(_), Reading::PerInstance(_)) => Self::average(policy, metric, now, current, &pods, None),
            (Level::Average(target), Reading::Total(total)) => {
                let status = current.min(i128::try_from(pods.len()).unwrap());
                let (total, target) = (thousandths(*total), thousandths(target));
                if status > 0 && tolerated(policy, total, target * status) {
                    return Some(status);
                }
                Some(counted_up(total, target))
            }
            (Level::Value(target), reading) => {
                let total = match reading {
                    Reading::Total(total) => thousandths(*total),
                    _ => pods.iter().filter_map(|pod| pod.metric).map(|(value, ..)| value).sum(),
                };
                let target = thousandths(target);
                if current == 0 {
                    return Some(counted_up(total, target));
                }
                if pods.is_empty() {
                    return None;
                }
                if tolerated(policy, total, target) {
                    return Some(current);
                }
                let ready =
                    pods.iter().filter(|p| matches!(p.phase, InstancePhase::Running { ready: true, .. })).count();
                Some(counted_up(total * i128::try_from(ready).unwrap(), target))
            }
        }
    }

    /// Steps of "Algorithm details" for averages; with a percentage it is of the requests.
    fn average(
        policy: &Autoscale,
        metric: &Metric,
        now: i128,
        current: i128,
        pods: &[Pod],
        percent: Option<i128>,
    ) -> Option<i128> {
        let mut metrics: BTreeMap<InstanceId, i128> = BTreeMap::new();
        let (mut unready, mut missing) = (Vec::new(), Vec::new());
        for pod in pods {
            let InstancePhase::Running { started, ready, since } = pod.phase else {
                unready.push(pod);
                continue;
            };
            let Some((value, taken, window)) = pod.metric else {
                missing.push(pod);
                continue;
            };
            if metric.source == MetricSource::Cpu {
                let young = millis(started) + span(policy.cpu_initialization) > now;
                let never_ready = !ready && millis(started) + span(policy.initial_readiness) > millis(since);
                let set_aside = if young { !ready || taken < millis(since) + window } else { never_ready };
                if set_aside {
                    unready.push(pod);
                    continue;
                }
            }
            metrics.insert(pod.name.clone(), value);
        }
        let ready = i128::try_from(metrics.len()).unwrap();
        if ready == 0 {
            return None;
        }
        if percent.is_some() && pods.iter().any(|pod| pod.requests.is_none()) {
            return None;
        }
        let requests: BTreeMap<InstanceId, i128> =
            pods.iter().map(|pod| (pod.name.clone(), pod.requests.unwrap_or(0))).collect();
        let target = match (percent, metric.target) {
            (Some(percent), _) => percent,
            (None, Level::Average(target)) => thousandths(target),
            _ => unreachable!(),
        };
        let level = |metrics: &BTreeMap<InstanceId, i128>| -> Option<i128> {
            let used: i128 = metrics.values().sum();
            if percent.is_none() {
                return Some(used / i128::try_from(metrics.len()).unwrap());
            }
            let requested: i128 = metrics.keys().map(|name| requests[name]).sum();
            (requested > 0).then(|| used * 100 / requested)
        };
        let usage = level(&metrics)?;
        let grows = usage > target;
        let shrinks = usage < target;
        if missing.is_empty() && (unready.is_empty() || !grows) {
            return Some(if tolerated(policy, usage, target) { current } else { counted_up(usage * ready, target) });
        }
        for pod in &missing {
            if shrinks {
                let all = percent.map_or(target, |percent| requests[&pod.name] * percent.max(100) / 100);
                metrics.insert(pod.name.clone(), all);
            } else if grows {
                metrics.insert(pod.name.clone(), 0);
            }
        }
        if grows {
            for pod in &unready {
                metrics.insert(pod.name.clone(), 0);
            }
        }
        let usage = level(&metrics)?;
        if tolerated(policy, usage, target) || (shrinks && usage > target) || (grows && usage < target) {
            return Some(current);
        }
        let replicas = counted_up(usage * i128::try_from(metrics.len()).unwrap(), target);
        if (usage < target && replicas > current) || (usage > target && replicas < current) {
            return Some(current);
        }
        Some(replicas)
    }

    fn stabilize(&mut self, policy: &Autoscale, now: i128, current: i128, desired: i128) -> i128 {
        let recommendations = self.recommendations.as_mut().unwrap();
        let (mut up, mut down) = (desired, desired);
        for (time, recommendation) in recommendations.iter() {
            if *time > now - span(policy.up.window) {
                up = up.min(*recommendation);
            }
            if *time > now - span(policy.down.window) {
                down = down.max(*recommendation);
            }
        }
        recommendations.push((now, desired));
        let mut stable = current;
        if stable < up {
            stable = up;
        }
        if stable > down {
            stable = down;
        }
        stable
    }

    fn limit(&self, policy: &Autoscale, now: i128, current: i128, desired: i128) -> i128 {
        let in_period = |events: &[(i128, i128)], per: Timespan| -> i128 {
            events.iter().filter(|(time, _)| *time > now - span(per)).map(|(_, change)| change).sum()
        };
        let start = |per| current - in_period(&self.added, per) + in_period(&self.removed, per);
        match desired.cmp(&current) {
            Ordering::Equal => current,
            Ordering::Greater => {
                let limits = policy.up.policies.iter().map(|policy| {
                    let start = start(policy.per);
                    match policy.change {
                        Change::Instances(number) => start + i128::from(number),
                        Change::Percent(_) if start < 0 => start,
                        Change::Percent(percent) => counted_up(start * (100 + i128::from(percent)), 100),
                    }
                });
                let limit = match policy.up.select {
                    Select::Disabled => current,
                    Select::Min => limits.min().unwrap(),
                    Select::Max => limits.max().unwrap(),
                };
                desired.min(i128::from(policy.max).min(limit.max(current)))
            }
            Ordering::Less => {
                let limits = policy.down.policies.iter().map(|policy| {
                    let start = start(policy.per);
                    match policy.change {
                        Change::Instances(number) => start - i128::from(number),
                        Change::Percent(percent) => start * (100 - i128::from(percent)) / 100,
                    }
                });
                let limit = match policy.down.select {
                    Select::Disabled => current,
                    Select::Min => limits.max().unwrap(),
                    Select::Max => limits.min().unwrap(),
                };
                desired.max(i128::from(policy.min).max(limit.min(current)))
            }
        }
    }
}

// === Random policies and histories ===

fn change() -> impl Strategy<Value = (Change, u64)> {
    let change = prop_oneof![(1u32..=200).prop_map(Change::Percent), (1u32..=8).prop_map(Change::Instances)];
    (change, prop::sample::select(vec![1u64, 15, 60, 90, 300]))
}

fn behavior() -> impl Strategy<Value = Behavior> {
    let select = prop_oneof![4 => Just(Select::Max), 2 => Just(Select::Min), 1 => Just(Select::Disabled)];
    let window = prop::sample::select(vec![0u64, 15, 60, 300]);
    (prop::collection::vec(change(), 1..4), select, window, 0u32..=30).prop_map(
        |(changes, select, window, tolerance)| Behavior {
            tolerance: Percent::whole(tolerance),
            ..policy_of(&changes, select, window)
        },
    )
}

fn any_metric() -> impl Strategy<Value = Metric> {
    let target = prop_oneof![
        (20u32..=150).prop_map(Level::Utilization),
        (50u64..=3_000).prop_map(|m| Level::Average(Measure::thousandths(m))),
        (50u64..=30_000).prop_map(|m| Level::Value(Measure::thousandths(m))),
    ];
    let source = prop::sample::select(vec![
        MetricSource::Cpu,
        MetricSource::Memory,
        MetricSource::RequestsPerSecond,
        MetricSource::QueueDepth,
    ]);
    (source, target).prop_map(|(source, target)| match (source, target) {
        (source @ (MetricSource::Cpu | MetricSource::Memory), target) => metric(source, target),
        (source, Level::Utilization(percent)) => {
            metric(source, Level::Average(Measure::thousandths(u64::from(percent))))
        }
        (source, target) => metric(source, target),
    })
}

fn any_policy() -> impl Strategy<Value = Autoscale> {
    (1u32..=4, 0u32..=20, prop::collection::vec(any_metric(), 1..4), behavior(), behavior())
        .prop_map(|(min, more, on, up, down)| Autoscale { up, down, ..policy(min, min + more, on) })
}

/// What an instance is like, beside its id. Times are seconds before the sample.
#[derive(Clone, Debug)]
struct Like {
    phase: u8,
    started: u64,
    since: u64,
    ready: bool,
    measured: bool,
    used: u64,
    taken: u64,
    over: u64,
    requested: u64,
}

fn like() -> impl Strategy<Value = Like> {
    let numbers = (0u64..=700, 0u64..=700, 0u64..=3_000, 0u64..=60, 0u64..=60);
    let requested = prop_oneof![20 => 100u64..=2_000, 1 => Just(0u64)];
    (0u8..12, prop::bool::weighted(0.85), prop::bool::weighted(0.9), numbers, requested).prop_map(
        |(phase, ready, measured, (started, since, used, taken, over), requested)| {
            let since = since.min(started);
            Like { phase, started, since, ready, measured, used, taken, over, requested }
        },
    )
}

/// One moment: seconds since the last one, how instances are, what totals are, and whether somebody else scales.
#[derive(Clone, Debug)]
struct Moment {
    later: u64,
    instances: Vec<Like>,
    surplus: usize,
    total: Option<u64>,
    by_hand: Option<u32>,
    per_instance: bool,
}

fn moment() -> impl Strategy<Value = Moment> {
    (
        prop::sample::select(vec![0u64, 1, 14, 15, 16, 30, 60, 100, 299, 300]),
        prop::collection::vec(like(), 26),
        0usize..3,
        prop::option::weighted(0.9, 0u64..=60_000),
        prop::option::weighted(0.05, 0u32..=26),
        prop::bool::weighted(0.7),
    )
        .prop_map(|(later, instances, surplus, total, by_hand, per_instance)| Moment {
            later,
            instances,
            surplus,
            total,
            by_hand,
            per_instance,
        })
}

impl Moment {
    fn sample(&self, second: u64, replicas: u32, policy: &Autoscale) -> Sample {
        let now = at(second);
        let mut sample = Sample { replicas, ..Sample::default() };
        let mut points = BTreeMap::new();
        for (index, like) in self.instances.iter().take(replicas as usize + self.surplus).enumerate() {
            let id = instance_id(index + 1);
            let ago = |seconds: u64| Now::at(now.since_origin().saturating_sub(Duration::from_secs(seconds)));
            let phase = match like.phase {
                0 => InstancePhase::Leaving,
                1 => InstancePhase::Pending,
                _ => InstancePhase::Running { started: ago(like.started), ready: like.ready, since: ago(like.since) },
            };
            if like.measured {
                let over = Duration::from_secs(like.over);
                points.insert(id.clone(), Point { value: Measure::thousandths(like.used), at: ago(like.taken), over });
            }
            let memory = ByteSize::bytes(like.requested / 1000 + 1);
            sample.instances.push(InstanceSample {
                id,
                phase,
                cpu: (like.requested > 0).then_some(Cpu::millis(like.requested)),
                memory: Some(memory),
            });
        }
        for metric in &policy.on {
            let of_instances = metric.source.is_of_instances();
            let reading = if of_instances || self.per_instance {
                Reading::PerInstance(points.clone())
            } else {
                match self.total {
                    Some(total) => Reading::Total(Measure::thousandths(total)),
                    None => Reading::Unavailable("gone".to_owned()),
                }
            };
            sample.readings.insert(metric.source.clone(), reading);
        }
        sample
    }
}

proptest! {
    /// Whatever happens, in whatever order: the decision is that of the published algorithm.
    #[test]
    fn decisions_are_those_of_the_published_algorithm(
        policy in any_policy(), first in 0u32..=26, moments in prop::collection::vec(moment(), 1..24),
    ) {
        let mut model = Model::default();
        let mut autoscaler = Autoscaler::new(policy.clone());
        let (mut replicas, mut second) = (first, 0);
        for moment in &moments {
            second += moment.later;
            replicas = moment.by_hand.unwrap_or(replicas);
            let sample = moment.sample(second, replicas, &policy);
            let expected = model.step(&policy, at(second), &sample);
            let decision = autoscaler.handle(at(second), &sample);
            let found = decision.as_ref().map_or(replicas, |decision| decision.to);
            prop_assert_eq!(i128::from(found), expected, "{:#?}", autoscaler.status(at(second)).last);
            prop_assert!(decision.is_none_or(|decision| decision.from == replicas && decision.to != replicas));
            replicas = found;
        }
    }

    /// Written in binary floating point, as the reference implementation has it, the formula gives the same except where
    /// the exact product is a whole number, or so near to one that a double cannot tell.
    #[test]
    fn exact_rounding_differs_from_floating_point_only_at_whole_numbers(level in 1u64..=5_000, target in 1u64..=5_000, n in 1u32..=50) {
        let mut on = policy(1, 1_000_000, vec![metric(MetricSource::QueueDepth, Level::Average(Measure::thousandths(target)))]);
        on.up = policy_of(&[(Change::Instances(1_000_000), 15)], Select::Max, 0);
        on.down.window = Timespan::default();
        (on.up.tolerance, on.down.tolerance) = (Percent::whole(0), Percent::whole(0));
        let levels = vec![level; n as usize];
        let sample = sample(n).with(MetricSource::QueueDepth, points(at(0), &levels));
        let to = Autoscaler::new(on).handle(at(0), &sample).map_or(n, |decision| decision.to);
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the formula as it is published")]
        let float = (level as f64 / target as f64 * f64::from(n)).ceil() as u32;
        let whole = (level * u64::from(n)).is_multiple_of(target);
        prop_assert!(to == float || (whole && to + 1 == float), "{to} {float}");
    }
}

#[test]
fn exact_rounding_follows_the_formula_where_floating_point_does_not() {
    // 0.07 * 100 is 7.000000000000001 in a double.
    let mut on = policy(1, 200, vec![metric(MetricSource::QueueDepth, average(100))]);
    on.down.window = Timespan::default();
    let sample = sample(100).with(MetricSource::QueueDepth, points(at(0), &[7_000; 100]));
    assert_eq!(Autoscaler::new(on).handle(at(0), &sample).unwrap().to, 7);
    assert_eq!((7.0f64 / 100.0 * 100.0).ceil().to_bits(), 8.0f64.to_bits());
}
