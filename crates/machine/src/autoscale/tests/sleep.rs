//! Services that sleep.

use orchestra_model::autoscale::{ScaleLimit, ScaleReason};

use super::*;

fn busy(begun: u64, in_flight: u64, held: u64) -> Activity {
    Activity { begun, in_flight, held }
}

fn by_rate() -> Vec<Metric> {
    vec![metric(MetricSource::RequestsPerSecond, average(10))]
}

fn quiet(replicas: u32, begun: u64) -> Sample {
    let activity = Some(busy(begun, 0, 0));
    Sample { activity, ..sample(replicas) }.total(MetricSource::RequestsPerSecond, 0)
}

/// A service with one instance whose last request has just been seen.
fn awake(policy: Autoscale) -> Scaled {
    let mut scaled = Scaled::new(policy, 1);
    assert_eq!(scaled.give(at(0), &quiet(1, 7)), 1);
    scaled
}

#[test]
fn it_sleeps_after_idle_for_and_not_before() {
    let mut scaled = awake(policy(0, 10, by_rate()));
    assert_eq!(scaled.autoscaler.deadline(), at(15));
    assert_eq!(scaled.give(at(290), &quiet(1, 7)), 1);
    let last = scaled.autoscaler.status(at(290)).last.unwrap();
    assert_eq!((last.reason, last.limit), (ScaleReason::Metrics, Some(ScaleLimit::NotIdle)));
    assert_eq!(scaled.autoscaler.deadline(), at(300), "it is looked at when the time is up");
    assert_eq!(scaled.autoscaler.explain(at(290)).last().unwrap(), "no request for 4m50s; it sleeps after 5m");
    let decision = scaled.autoscaler.handle(at(300), &quiet(1, 7)).unwrap();
    assert_eq!(decision.to_string(), "scaled down from 1 to 0: no request for 5m");
    // Asleep: nothing moves, and nothing is looked at more often than that.
    let mut sample = quiet(0, 7);
    assert_eq!(scaled.autoscaler.handle(at(301), &sample), None);
    sample.activity = None;
    assert_eq!(scaled.autoscaler.handle(at(316), &sample), None);
    assert_eq!(scaled.autoscaler.deadline(), at(331));
    assert_eq!(scaled.autoscaler.explain(at(316))[0], "stays at 0: it sleeps until the next request");
}

#[test]
fn any_request_begins_the_idle_time_anew() {
    for between in [
        Some(busy(7, 1, 0)), // a stream goes on
        Some(busy(7, 0, 1)), // one waits
        Some(busy(8, 0, 0)), // one came and went
        Some(busy(1, 0, 0)), // the count began anew
        None,                // nobody counted
    ] {
        let mut scaled = awake(policy(0, 10, by_rate()));
        let begun = between.map_or(7, |activity| activity.begun);
        let sample = Sample { activity: between, ..quiet(1, 0) };
        assert_eq!(scaled.give(at(200), &sample), 1);
        assert_eq!(scaled.give(at(310), &quiet(1, begun)), 1, "{between:?}");
        assert_eq!(scaled.give(at(499), &quiet(1, begun)), 1, "{between:?}");
        assert_eq!(scaled.give(at(611), &quiet(1, begun)), 0, "{between:?}");
    }
}

#[test]
fn work_of_the_service_as_a_whole_keeps_it_awake_and_busy_instances_do_not() {
    let on = vec![
        metric(MetricSource::QueueDepth, Level::Value(Measure::whole(100))),
        metric(MetricSource::Memory, Level::Utilization(50)),
    ];
    let full = || points(at(0), &[1 << 50]);
    for (queue, sleeps) in [
        (Some(Reading::Total(Measure::thousandths(1))), false),
        (Some(Reading::Unavailable("gone".to_owned())), false),
        (None, false),
        (Some(Reading::Total(Measure::default())), true),
    ] {
        let mut scaled = Scaled::new(policy(0, 1, on.clone()), 1);
        let mut sample = Sample { activity: Some(busy(0, 0, 0)), ..sample(1) }.with(MetricSource::Memory, full());
        sample.readings.extend(queue.map(|queue| (MetricSource::QueueDepth, queue)));
        scaled.give(at(0), &sample);
        assert_eq!(scaled.give(at(1000), &sample) == 0, sleeps, "{:?}", sample.readings);
    }
}

#[test]
fn a_rollout_and_a_disabled_way_down_keep_it_awake() {
    let mut scaled = awake(policy(0, 10, by_rate()));
    let rollout = Sample { rollout: true, ..quiet(1, 7) };
    assert_eq!(scaled.give(at(400), &rollout), 1);
    assert_eq!(scaled.autoscaler.status(at(400)).last.unwrap().limit, Some(ScaleLimit::Rollout));
    assert_eq!(scaled.give(at(401), &quiet(1, 7)), 0);

    let mut disabled = policy(0, 10, Vec::new());
    disabled.down.select = Select::Disabled;
    let mut scaled = awake(disabled);
    assert_eq!(scaled.give(at(400), &quiet(1, 7)), 1);
    assert_eq!(scaled.autoscaler.status(at(400)).last.unwrap().limit, Some(ScaleLimit::DownDisabled));
}

/// The rates of `down` hold on the way to sleep; its window does not: `idle_for` stands for it.
#[test]
fn the_way_to_sleep_keeps_its_pace() {
    let mut policy = policy(0, 10, by_rate());
    policy.down = policy_of(&[(Change::Instances(2), 60)], Select::Max, 3_600);
    let mut scaled = Scaled::new(policy, 5);
    let give = |scaled: &mut Scaled, second| {
        let sample = quiet(scaled.replicas, 7);
        scaled.give(at(second), &sample)
    };
    assert_eq!(give(&mut scaled, 0), 5);
    assert_eq!(give(&mut scaled, 299), 5);
    let seen: Vec<u32> = [300, 315, 359, 360, 419, 420].into_iter().map(|second| give(&mut scaled, second)).collect();
    assert_eq!(seen, [3, 3, 3, 1, 1, 0]);
}

#[test]
fn a_held_request_wakes_it_at_once_past_windows_and_rates() {
    let mut policy = policy(0, 10, by_rate());
    policy.up = policy_of(&[(Change::Percent(100), 1_800)], Select::Min, 3_600);
    let asleep = || {
        let mut scaled = awake(policy.clone());
        assert_eq!(scaled.give(at(300), &quiet(1, 7)), 0);
        scaled
    };
    // By a sample …
    let mut scaled = asleep();
    let sample = Sample { activity: Some(busy(7, 0, 1)), ..quiet(0, 7) };
    let decision = scaled.autoscaler.handle(at(301), &sample).unwrap();
    assert_eq!((decision.to, decision.reason), (1, ScaleReason::Woken));
    // … or by the event itself.
    let mut scaled = asleep();
    let decision = scaled.autoscaler.wake(at(301), 0).unwrap();
    assert_eq!(decision.to_string(), "scaled up from 0 to 1: it slept, and a request waits for an instance");
    assert_eq!(scaled.autoscaler.wake(at(301), 1), None, "it is awake");
    assert_eq!(scaled.autoscaler.status(at(301)).idle, None);
    // Nothing is looked at for the sake of a sleep that has begun.
    policy.every = Timespan::seconds(3_600);
    let mut autoscaler = Autoscaler::new(policy);
    assert_eq!(autoscaler.handle(at(0), &quiet(0, 7)), None);
    assert_eq!(autoscaler.deadline(), at(3_600));
}

#[test]
fn work_wakes_it_as_well() {
    let on = vec![metric(MetricSource::QueueDepth, average(100)), metric(MetricSource::Cpu, Level::Utilization(50))];
    let mut autoscaler = Autoscaler::new(policy(0, 10, on));
    let sample = |queue| Sample { activity: Some(busy(0, 0, 0)), ..sample(0) }.total(MetricSource::QueueDepth, queue);
    assert_eq!(autoscaler.handle(at(0), &sample(0)), None);
    let decision = autoscaler.handle(at(15), &sample(900)).unwrap();
    assert_eq!(decision.to, 1, "the first instance comes at once, the others by the metrics");
    assert_eq!(
        decision.to_string(),
        "scaled up from 0 to 1: it slept, and there is work: queue_depth is 900 of 100 per instance, which asks for 9"
    );
}

#[test]
fn a_cold_start_ends_with_the_first_ready_instance() {
    let mut autoscaler = Autoscaler::new(policy(0, 10, by_rate()));
    autoscaler.handle(at(0), &quiet(0, 7));
    autoscaler.wake(at(1), 0).unwrap();
    let mut sample = Sample { activity: Some(busy(8, 0, 1)), ..quiet(1, 8) };
    sample.instances[0].phase = InstancePhase::Pending;
    assert_eq!(autoscaler.handle(at(16), &sample), None);
    let cold_start = autoscaler.status(at(21)).cold_start.unwrap();
    assert_eq!((cold_start.waited, cold_start.is_overdue()), (Timespan::seconds(20), false));
    assert_eq!(
        autoscaler.explain(at(21)).last().unwrap(),
        "starting for 20s; requests wait for an instance for at most 1m"
    );
    sample.instances[0] = instance(1);
    autoscaler.handle(at(25), &sample);
    assert_eq!(autoscaler.status(at(25)).cold_start, None);
}

#[test]
fn a_cold_start_that_takes_too_long_says_so_and_then_sleeps_again() {
    let mut short = policy(0, 10, by_rate());
    short.to_zero = Some(ToZero { idle_for: Timespan::seconds(10), cold_start: Timespan::seconds(60) });
    let mut autoscaler = Autoscaler::new(short);
    autoscaler.handle(at(0), &quiet(0, 7));
    autoscaler.wake(at(1), 0).unwrap();
    // The client has gone away; the start has its time all the same.
    let mut sample = quiet(1, 8);
    sample.instances[0].phase = InstancePhase::Pending;
    for second in [16, 31, 46, 60] {
        assert_eq!(autoscaler.handle(at(second), &sample), None, "{second}");
    }
    assert_eq!(autoscaler.deadline(), at(61), "the deadline of the cold start");
    assert_eq!(autoscaler.handle(at(61), &sample), None);
    assert!(autoscaler.status(at(61)).cold_start.unwrap().is_overdue());
    let said = autoscaler.explain(at(61));
    assert!(
        said.iter()
            .any(|line| line == "no instance is ready 1m after the request that woke it; requests wait at most 1m"),
        "{said:?}"
    );
    assert_eq!(autoscaler.deadline(), at(71));
    assert_eq!(autoscaler.handle(at(71), &sample).unwrap().to, 0);
    assert_eq!(autoscaler.handle(at(72), &quiet(0, 8)), None);
    assert_eq!(autoscaler.status(at(72)).cold_start, None);
}

/// The proxy serves while nobody counts: after a restart the idle time begins anew, and a cold start goes on.
#[test]
fn sleep_survives_a_restart() {
    let policy = policy(0, 10, by_rate());
    let mut scaled = awake(policy.clone());
    scaled.give(at(299), &quiet(1, 7));
    let record = scaled.autoscaler.record(at(299));
    let later = |seconds| Now::at(Duration::from_secs(seconds));
    let mut restored = Scaled { autoscaler: Autoscaler::restore(policy.clone(), &record, Now::ZERO), replicas: 1 };
    for (second, replicas) in [(1, 1), (10, 1), (300, 1), (301, 0)] {
        let sample = quiet(restored.replicas, 0);
        assert_eq!(restored.give(later(second), &sample), replicas, "{second}");
    }
    restored.autoscaler.wake(later(400), 0).unwrap();
    let record = restored.autoscaler.record(later(410));
    let restored = Autoscaler::restore(policy, &record, Now::ZERO);
    assert_eq!(restored.status(later(5)).cold_start.unwrap().waited, Timespan::seconds(15));
}

#[test]
fn without_metrics_only_sleep_moves_it() {
    let mut scaled = Scaled::new(policy(0, 1, Vec::new()), 1);
    let sample = |replicas, held| Sample { activity: Some(busy(0, 0, held)), ..sample(replicas) };
    assert_eq!(scaled.give(at(0), &sample(1, 0)), 1);
    assert_eq!(scaled.autoscaler.explain(at(0))[0], "stays at 1: no metric is looked at");
    assert_eq!(scaled.give(at(300), &sample(1, 0)), 0);
    assert_eq!(scaled.give(at(301), &sample(0, 1)), 1);
}
