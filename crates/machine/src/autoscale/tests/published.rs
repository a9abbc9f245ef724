//! The examples of the documentation and of the reference implementation's tests, as tables.

use orchestra_model::autoscale::{ScaleLimit, ScaleReason};

use super::*;

/// Decides once, from `replicas`, without windows and rates.
fn once(replicas: u32, on: Vec<Metric>, sample: &Sample) -> u32 {
    let mut policy = policy(1, 1_000, on);
    policy.up = policy_of(&[(Change::Instances(1_000), 15)], Select::Max, 0);
    policy.down.window = Timespan::default();
    Autoscaler::new(policy).handle(at(0), sample).map_or(replicas, |decision| decision.to)
}

fn cpu(percent: u32) -> Vec<Metric> {
    vec![metric(MetricSource::Cpu, Level::Utilization(percent))]
}

/// "If the current metric value is 200m, and the desired value is 100m, the number of replicas will be doubled … if the
/// current value is instead 50m, you'll halve the number of replicas."
#[test]
fn the_ratio_of_the_documentation() {
    let on = |target| vec![metric(MetricSource::QueueDepth, Level::Average(Measure::thousandths(target)))];
    for (replicas, level, to) in [(3, 200, 6), (4, 50, 2), (3, 50, 2), (10, 100, 10), (10, 110, 10), (10, 90, 10)] {
        let sample = sample(replicas).with(MetricSource::QueueDepth, points(at(0), &vec![level; replicas as usize]));
        assert_eq!(once(replicas, on(100), &sample), to, "{replicas} at {level}");
    }
    // "50 × (90/75) = 60"
    let sample = sample(50).with(MetricSource::Cpu, points(at(0), &[900; 50]));
    assert_eq!(once(50, cpu(75), &sample), 60);
}

/// Cases of the reference implementation: CPU requests of 1 each, levels in thousandths.
#[test]
fn cases_of_the_reference_implementation() {
    // replicas, target, levels (None: no measurement), ready, to
    type Case = (u32, u32, &'static [Option<u64>], &'static [bool], u32);
    let cases: [Case; 13] = [
        (3, 30, &[Some(300), Some(500), Some(700)], &[true, true, true], 5),
        // Unready ones count as idle when it grows.
        (3, 30, &[Some(300), Some(500), Some(700)], &[false, true, true], 4),
        // … and if that turns it around, nothing happens.
        (3, 30, &[Some(400), Some(500), Some(700)], &[true, false, false], 3),
        (5, 50, &[Some(100), Some(300), Some(500), Some(250), Some(250)], &[true; 5], 3),
        // When it shrinks, unready ones do not count at all.
        (5, 50, &[Some(100), Some(300), Some(500), Some(250), Some(250)], &[true, true, true, false, false], 2),
        (3, 100, &[Some(1010), Some(1030), Some(1020)], &[true; 3], 3),
        // Missing ones: at the target or more if it would shrink, at nothing if it would grow.
        (2, 100, &[Some(1000), None], &[true; 2], 2),
        (2, 100, &[Some(1900), None], &[true; 2], 2),
        (2, 100, &[Some(600), None], &[true; 2], 2),
        (4, 100, &[Some(400), Some(400), Some(400), None], &[true; 4], 3),
        // Above 100 % that is the target: 50 % and 150 % make 100 % of 150 %.
        (2, 150, &[Some(500), None], &[true; 2], 2),
        (3, 50, &[Some(950), Some(950), None], &[true; 3], 4),
        (3, 50, &[Some(1500), Some(1500), None], &[true, false, true], 3),
    ];
    for (replicas, target, levels, ready, to) in cases {
        let now = at(0);
        let mut sample = sample(replicas);
        let mut measured = BTreeMap::new();
        for (index, (level, ready)) in levels.iter().zip(ready).enumerate() {
            let started = Now::at(Duration::from_secs(START - 60));
            sample.instances[index].phase = InstancePhase::Running { started, ready: *ready, since: started };
            if let Some(level) = level {
                let point = Point { value: Measure::thousandths(*level), at: now, over: Duration::from_secs(15) };
                measured.insert(instance_id(index + 1), point);
            }
        }
        let sample = sample.with(MetricSource::Cpu, Reading::PerInstance(measured));
        assert_eq!(
            once(replicas, cpu(target), &sample),
            to,
            "{replicas} of {levels:?}, ready {ready:?}, target {target}"
        );
    }
}

/// An instance that has just become ready was measured while it started: its CPU says nothing until a whole window of
/// the metric lies after that.
#[test]
fn cpu_of_a_start_does_not_count() {
    let now = at(0);
    let ago = |seconds| Now::at(Duration::from_secs(START - seconds));
    for (started, since, ready, over, counts) in [
        (60, 20, true, 15, true),
        (60, 10, true, 15, false),
        (60, 20, false, 15, false),
        // After the initialisation period a ready one counts whatever was measured, …
        (300, 10, true, 15, true),
        (301, 1, true, 15, true),
        // … one that was ready once counts too, and one that never was does not.
        (301, 200, false, 15, true),
        (301, 272, false, 15, false),
    ] {
        let mut sample = sample(2);
        sample.instances[1].phase = InstancePhase::Running { started: ago(started), ready, since: ago(since) };
        let reading = |id: usize, value: u64| {
            (instance_id(id), Point { value: Measure::thousandths(value), at: now, over: Duration::from_secs(over) })
        };
        let sample = sample.with(MetricSource::Cpu, Reading::PerInstance([reading(1, 600), reading(2, 2_000)].into()));
        let mut autoscaler = Autoscaler::new(policy(1, 100, cpu(50)));
        let to = autoscaler.handle(now, &sample).map_or(2, |decision| decision.to);
        // 130 % of 50 % for both, or 60 % of 50 % with the other one idle: that is 30 % and turns it around.
        assert_eq!(to, if counts { 6 } else { 2 }, "started {started}, since {since}, ready {ready}");
        let unready = autoscaler.status(now).last.unwrap().metrics[0].unready;
        assert_eq!(unready, u32::from(!counts));
    }
    // Only CPU is spared: other metrics count from the first measurement.
    let mut sample = sample(2);
    sample.instances[1].phase = InstancePhase::Running { started: ago(1), ready: false, since: ago(1) };
    let sample = sample.with(MetricSource::QueueDepth, points(now, &[1_000, 3_000]));
    assert_eq!(once(2, vec![metric(MetricSource::QueueDepth, average(1))], &sample), 4);
}

/// "The largest of the desired replica counts is chosen. If any of these metrics cannot be converted into a desired
/// replica count and a scale down is suggested by the metrics which can be fetched, scaling is skipped."
#[test]
fn several_metrics() {
    let on = || {
        vec![
            metric(MetricSource::RequestsPerSecond, average(100)),
            metric(MetricSource::QueueDepth, Level::Value(Measure::whole(10))),
        ]
    };
    let gone = || Reading::Unavailable("gone".to_owned());
    for (rate, queue, to, reason) in [
        (Some(600), Some(20), 8, ScaleReason::Metrics),
        (Some(900), Some(10), 9, ScaleReason::Metrics),
        (Some(100), Some(1), 1, ScaleReason::Metrics),
        (Some(900), None, 9, ScaleReason::Metrics),
        (Some(100), None, 4, ScaleReason::DownBlocked),
        (Some(400), None, 4, ScaleReason::Metrics),
        (None, None, 4, ScaleReason::NoMetrics),
    ] {
        let reading = |value: Option<u64>| value.map_or_else(gone, |value| Reading::Total(Measure::whole(value)));
        let sample = sample(4)
            .with(MetricSource::RequestsPerSecond, reading(rate))
            .with(MetricSource::QueueDepth, reading(queue));
        let mut policy = policy(1, 100, on());
        policy.up = policy_of(&[(Change::Instances(100), 15)], Select::Max, 0);
        policy.down.window = Timespan::default();
        let mut autoscaler = Autoscaler::new(policy);
        assert_eq!(autoscaler.handle(at(0), &sample).map_or(4, |d| d.to), to, "{rate:?} {queue:?}");
        assert_eq!(autoscaler.status(at(0)).last.unwrap().reason, reason);
    }
}

#[test]
fn what_cannot_be_asked_says_why() {
    for (target, reading, cpu, problem) in [
        (Level::Utilization(50), None, Some(1), "nobody measures it"),
        (Level::Utilization(50), Some(Reading::Unavailable("no cgroup".to_owned())), Some(1), "no cgroup"),
        (Level::Utilization(50), Some(points(at(0), &[])), Some(1), "no instance that is ready reports it"),
        (Level::Utilization(50), Some(points(at(0), &[5])), None, "api-r1-1 does not say in `resources` what it needs"),
        (Level::Utilization(50), Some(points(at(0), &[5])), Some(0), "its instances ask for nothing"),
        (
            Level::Utilization(50),
            Some(Reading::Total(Measure::whole(1))),
            Some(1),
            "it is measured only for the service as a whole",
        ),
        (Level::Utilization(0), Some(points(at(0), &[5])), Some(1), "its target is 0"),
    ] {
        let mut sample = sample(1);
        sample.instances[0].cpu = cpu.map(Cpu::millis);
        sample.readings.extend(reading.map(|reading| (MetricSource::Cpu, reading)));
        let mut autoscaler = Autoscaler::new(policy(1, 10, vec![metric(MetricSource::Cpu, target)]));
        assert_eq!(autoscaler.handle(at(0), &sample), None);
        let last = autoscaler.status(at(0)).last.unwrap();
        assert_eq!((last.reason, last.metrics[0].problem.as_deref()), (ScaleReason::NoMetrics, Some(problem)));
    }
}

/// "If there are 80 replicas and the target has to be scaled down to 10 replicas then during the first step 8 replicas
/// will be reduced. In the next iteration when the number of replicas is 72, 10% of the pods is 7.2 but the number is
/// rounded up to 8 … When the number of replicas falls below 40 the first policy is applied and 4 replicas will be
/// reduced at a time."
#[test]
fn the_policies_of_the_documentation() {
    let mut policy = policy(1, 100, vec![metric(MetricSource::QueueDepth, average(1))]);
    policy.down = policy_of(&[(Change::Instances(4), 60), (Change::Percent(10), 60)], Select::Max, 0);
    let mut scaled = Scaled::new(policy, 80);
    let load = only(MetricSource::QueueDepth, Reading::Total(Measure::whole(10)));
    let mut seen = vec![80];
    for minute in 0..20 {
        // Between the full minutes there is nothing left to take away.
        for second in [0, 15, 30, 45] {
            let to = scaled.step(at(minute * 60 + second), &load);
            if second == 0 {
                seen.push(to);
            } else {
                assert_eq!(to, *seen.last().unwrap(), "minute {minute}, second {second}");
            }
        }
    }
    assert_eq!(seen[..], [80, 72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16, 12, 10, 10, 10, 10, 10, 10, 10]);
}

/// "To ensure that no more than 5 Pods are removed per minute, you can add a second scale-down policy with a fixed size
/// of 5, and set selectPolicy to minimum." "… Disabled turns off scaling the given direction."
#[test]
fn the_select_policies_of_the_documentation() {
    let on = || vec![metric(MetricSource::QueueDepth, average(1))];
    let changes = [(Change::Percent(10), 60), (Change::Instances(5), 60)];
    for (replicas, select, to, limit) in [
        (100, Select::Min, 95, ScaleLimit::DownRate),
        (100, Select::Max, 90, ScaleLimit::DownRate),
        (20, Select::Min, 18, ScaleLimit::DownRate),
        (20, Select::Max, 15, ScaleLimit::DownRate),
        (20, Select::Disabled, 20, ScaleLimit::DownDisabled),
    ] {
        let down = policy_of(&changes, select, 0);
        let mut autoscaler = Autoscaler::new(Autoscale { down, ..policy(1, 100, on()) });
        let to_now =
            autoscaler.handle(at(0), &sample(replicas).total(MetricSource::QueueDepth, 1)).map_or(replicas, |d| d.to);
        assert_eq!(to_now, to, "{replicas} {select:?}");
        assert_eq!(autoscaler.status(at(0)).last.unwrap().limit, Some(limit));
    }
    let up = policy_of(&[(Change::Percent(100), 15)], Select::Disabled, 0);
    let mut autoscaler = Autoscaler::new(Autoscale { up, ..policy(1, 100, on()) });
    assert_eq!(autoscaler.handle(at(0), &sample(2).total(MetricSource::QueueDepth, 50)), None);
    assert_eq!(autoscaler.status(at(0)).last.unwrap().limit, Some(ScaleLimit::UpDisabled));
}

/// "There are 2 policies where 4 pods or a 100% of the currently running replicas will be added every 15 seconds."
#[test]
fn the_default_policies_for_growth() {
    let mut scaled = Scaled::new(policy(1, 100, vec![metric(MetricSource::QueueDepth, average(1))]), 1);
    let load = only(MetricSource::QueueDepth, Reading::Total(Measure::whole(90)));
    let seen: Vec<u32> = (0..6).map(|step| scaled.step(at(step * 15), &load)).collect();
    assert_eq!(seen, [5, 10, 20, 40, 80, 90]);
}

/// "All desired states from the past 5 minutes will be considered": the highest of them holds.
#[test]
fn the_default_window_for_shrinking() {
    let mut scaled = Scaled::new(policy(1, 100, vec![metric(MetricSource::QueueDepth, average(1))]), 10);
    let load = |queue| only(MetricSource::QueueDepth, Reading::Total(Measure::whole(queue)));
    assert_eq!(scaled.step(at(0), &load(10)), 10);
    assert_eq!(scaled.step(at(15), &load(6)), 10);
    assert_eq!(scaled.step(at(30), &load(2)), 10);
    assert_eq!(scaled.step(at(299), &load(2)), 10);
    let last = scaled.autoscaler.status(at(299)).last.unwrap();
    assert_eq!((last.recommended, last.stabilized.map(|s| s.to)), (Some(2), Some(10)));
    assert_eq!(scaled.step(at(300), &load(2)), 6);
    assert_eq!(scaled.step(at(314), &load(2)), 6);
    assert_eq!(scaled.step(at(315), &load(2)), 2);
}

/// A window for growth takes the lowest of its time: a peak that is shorter moves nothing.
#[test]
fn a_window_for_growth_waits_for_the_peak_to_last() {
    let mut policy = policy(1, 100, vec![metric(MetricSource::QueueDepth, average(1))]);
    policy.up.window = Timespan::seconds(60);
    let mut scaled = Scaled::new(policy, 2);
    let load = |queue| only(MetricSource::QueueDepth, Reading::Total(Measure::whole(queue)));
    for (second, queue, expected) in [(0, 2, 2), (15, 8, 2), (45, 8, 2), (59, 8, 2), (60, 8, 6), (74, 8, 6), (75, 8, 8)]
    {
        assert_eq!(scaled.step(at(second), &load(queue)), expected, "{second}");
    }
    for (second, queue) in [(90, 20), (105, 8), (120, 20)] {
        assert_eq!(scaled.step(at(second), &load(queue)), 8, "{second}");
    }
}

#[test]
fn bounds_hold_at_once_and_zero_by_hand_rests() {
    let on = || vec![metric(MetricSource::QueueDepth, average(1))];
    for (replicas, to, reason) in
        [(12, Some(10), ScaleReason::AboveMax), (1, Some(3), ScaleReason::BelowMin), (0, None, ScaleReason::Resting)]
    {
        let mut autoscaler = Autoscaler::new(policy(3, 10, on()));
        assert_eq!(autoscaler.handle(at(0), &sample(replicas)).map(|d| d.to), to);
        assert_eq!(autoscaler.status(at(0)).last.unwrap().reason, reason);
        assert_eq!(autoscaler.wake(at(0), replicas), None);
    }
}

/// A total that is within the tolerance of those that exist keeps them; the second set of a rollout does not count.
#[test]
fn the_second_set_of_a_rollout_does_not_feed_itself() {
    let on = || vec![metric(MetricSource::RequestsPerSecond, average(100))];
    let mut sample = sample(10).total(MetricSource::RequestsPerSecond, 1_000);
    sample.instances.extend((11..=15).map(instance));
    sample.rollout = true;
    assert_eq!(once(10, on(), &sample), 10);
    // What is measured by instance cancels out: 10 at 800 and 15 at 533 are the same work.
    for (instances, level) in [(10, 800), (15, 533)] {
        let mut sample = super::sample(10);
        sample.instances = (1..=instances).map(instance).collect();
        let on = vec![metric(MetricSource::Cpu, Level::Average(Measure::thousandths(800)))];
        let sample = sample.with(MetricSource::Cpu, points(at(0), &vec![level; instances]));
        assert_eq!(once(10, on, &sample), 10);
    }
}
