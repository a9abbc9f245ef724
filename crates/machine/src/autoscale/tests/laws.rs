//! Laws that hold whatever the policy is.

use orchestra_model::autoscale::AutoscaleRecord;
use proptest::prelude::*;

use super::*;

fn queue(target: u64) -> Vec<Metric> {
    vec![metric(MetricSource::QueueDepth, Level::Average(Measure::thousandths(target)))]
}

fn load_of(thousandths: u64) -> BTreeMap<MetricSource, Reading> {
    only(MetricSource::QueueDepth, Reading::Total(Measure::thousandths(thousandths)))
}

proptest! {
    /// More load never asks for fewer instances, whatever is unready or not measured.
    #[test]
    fn more_load_never_gives_fewer(
        levels in prop::collection::vec((0u64..3_000, 0u64..1_000, 0u8..6), 1..12),
        target in 50u64..2_000, percent in 20u32..150, utilization in any::<bool>(),
    ) {
        let now = at(0);
        let decide = |extra: bool| {
            let mut sample = sample(u32::try_from(levels.len()).unwrap());
            let mut measured = BTreeMap::new();
            for (index, (level, more, state)) in levels.iter().enumerate() {
                match state {
                    0 => sample.instances[index].phase = InstancePhase::Pending,
                    1 => continue,
                    _ => {}
                }
                let value = Measure::thousandths(level + if extra { *more } else { 0 });
                measured.insert(instance_id(index + 1), Point { value, at: now, over: Duration::ZERO });
            }
            let level = if utilization { Level::Utilization(percent) } else { Level::Average(Measure::thousandths(target)) };
            let mut policy = policy(1, 10_000, vec![metric(MetricSource::Cpu, level)]);
            policy.up = policy_of(&[(Change::Instances(10_000), 15)], Select::Max, 0);
            policy.down.window = Timespan::default();
            let replicas = sample.replicas;
            let sample = sample.with(MetricSource::Cpu, Reading::PerInstance(measured));
            Autoscaler::new(policy).handle(now, &sample).map_or(replicas, |decision| decision.to)
        };
        prop_assert!(decide(true) >= decide(false));
    }

    /// A load that stays the same moves the number in one direction only, and then never again.
    #[test]
    fn a_constant_load_settles(
        start in 1u32..=30, load in 0u64..=40_000, target in 500u64..=2_000, up in 0u64..=60, per_instance in any::<bool>(),
    ) {
        let mut policy = policy(1, 30, queue(target));
        policy.up.window = Timespan::seconds(up);
        let mut scaled = Scaled::new(policy, start);
        let mut seen = vec![start];
        for step in 0..80 {
            let readings = if per_instance {
                // Rounded up: what a division loses would look like less load with every instance.
                let share = load.div_ceil(u64::from(scaled.replicas));
                only(MetricSource::QueueDepth, points(at(step * 15), &vec![share; scaled.replicas as usize]))
            } else {
                load_of(load)
            };
            seen.push(scaled.step(at(step * 15), &readings));
        }
        let grew = seen.windows(2).any(|pair| pair[1] > pair[0]);
        let shrank = seen.windows(2).any(|pair| pair[1] < pair[0]);
        prop_assert!(!(grew && shrank), "{seen:?}");
        prop_assert!(seen[60..].windows(2).all(|pair| pair[0] == pair[1]), "{seen:?}");
    }

    /// Noise within the tolerance moves nothing, and noise around it turns the direction at most once in a window.
    #[test]
    fn noise_does_not_flap(noise in prop::collection::vec(0u64..=60, 200), replicas in 2u32..=20) {
        let mut calm = Scaled::new(policy(1, 40, queue(1_000)), replicas);
        let mut loud = Scaled::new(policy(1, 40, queue(1_000)), replicas);
        let (mut turns, mut grew, mut before) = (Vec::new(), true, replicas);
        for (step, noise) in noise.iter().enumerate() {
            let second = u64::try_from(step).unwrap() * 15;
            let base = u64::from(replicas) * 1_000;
            // Within 10 % of the target, and 30 % around it.
            let quiet = base * (100 + noise / 3) / 100 - base / 10;
            prop_assert_eq!(calm.step(at(second), &load_of(quiet)), replicas);
            let to = loud.step(at(second), &load_of(base * (70 + noise) / 100));
            if to != before && (to > before) != grew {
                grew = to > before;
                turns.push(second);
            }
            before = to;
        }
        // A turn downwards needs a whole window without what the way up was taken for.
        prop_assert!(turns.windows(3).all(|turn| turn[2] - turn[0] >= 300), "{turns:?}");
    }

    /// Whatever the load does: the bounds hold, and nothing falls below the highest recommendation of the window.
    #[test]
    fn bounds_and_windows_hold(
        loads in prop::collection::vec((0u64..=40_000, 1u64..=40), 1..120),
        (min, more, start) in (1u32..=5, 0u32..=25, 1u32..=30), window in 0u64..=300,
    ) {
        let mut policy = policy(min, min + more, queue(1_000));
        policy.down.window = Timespan::seconds(window);
        let mut scaled = Scaled::new(policy, start.clamp(min, min + more));
        let (mut second, mut recommended): (u64, Vec<(u64, u32)>) = (0, Vec::new());
        for (load, later) in loads {
            let before = scaled.replicas;
            let to = scaled.step(at(second), &load_of(load));
            prop_assert!((min..=min + more).contains(&to));
            let now = scaled.autoscaler.status(at(second)).last.unwrap().recommended.unwrap();
            let earlier = recommended.iter().filter(|(then, _)| then + window > second).map(|(_, r)| *r);
            let highest = earlier.chain([now]).max().unwrap();
            prop_assert!(to >= before || to >= highest.min(min + more), "{to} {highest}");
            recommended.push((second, now));
            second += later;
        }
    }

    /// No period adds more than the policy allows, however often it is asked.
    #[test]
    fn rates_hold(
        loads in prop::collection::vec((0u64..=40_000, 1u64..=40), 1..120),
        start in 1u32..=30, allowed in 1u32..=6, period in 5u64..=120, grows in any::<bool>(),
    ) {
        let mut policy = policy(1, 40, queue(1_000));
        policy.down.window = Timespan::default();
        let (moving, still) = if grows { (&mut policy.up, &mut policy.down) } else { (&mut policy.down, &mut policy.up) };
        moving.policies = vec![ScalePolicy { change: Change::Instances(allowed), per: Timespan::seconds(period) }];
        still.select = Select::Disabled;
        let mut scaled = Scaled::new(policy, start);
        let (mut second, mut moved): (u64, Vec<(u64, u32)>) = (0, Vec::new());
        for (load, later) in loads {
            let before = scaled.replicas;
            let to = scaled.step(at(second), &load_of(load));
            let forward = if grows { to >= before } else { to <= before };
            prop_assert!(forward, "{before} {to}");
            moved.push((second, to.abs_diff(before)));
            let sum: u32 = moved.iter().filter(|(then, _)| then + period > second).map(|(_, by)| by).sum();
            prop_assert!(sum <= allowed, "{moved:?}");
            second += later;
        }
    }

    /// The history never grows beyond what was recommended, however often it is asked.
    #[test]
    fn the_record_stays_small(loads in prop::collection::vec(0u64..=20_000, 400)) {
        let mut scaled = Scaled::new(policy(1, 20, queue(1_000)), 5);
        for (second, load) in loads.iter().enumerate() {
            scaled.step(at(u64::try_from(second).unwrap()), &load_of(*load));
        }
        let record = scaled.autoscaler.record(at(400));
        prop_assert!(record.recommendations.len() <= 40, "{}", record.recommendations.len());
        prop_assert!(record.changes.len() <= 15, "{}", record.changes.len());
    }

    /// Restarted on a clock that begins anew, it takes no larger step in either direction than without the restart.
    #[test]
    fn a_restart_makes_it_no_bolder(
        before in prop::collection::vec(0u64..=40_000, 1..20), after in prop::collection::vec(0u64..=40_000, 1..10),
        down in 0u64..=120, up in 0u64..=60,
    ) {
        let mut policy = policy(1, 40, queue(1_000));
        policy.down.window = Timespan::seconds(down);
        policy.down.policies[0] = ScalePolicy { change: Change::Instances(3), per: Timespan::seconds(60) };
        policy.up.window = Timespan::seconds(up);
        let mut scaled = Scaled::new(policy.clone(), 5);
        let mut second = 0;
        for load in &before {
            scaled.step(at(second), &load_of(*load));
            second += 15;
        }
        let record = scaled.autoscaler.record(at(second));
        let mut again = Scaled { autoscaler: Autoscaler::restore(policy, &record, Now::ZERO), replicas: scaled.replicas };
        prop_assert_eq!(again.autoscaler.record(Now::ZERO), record);
        for (step, load) in after.iter().enumerate() {
            let later = u64::try_from(step).unwrap() * 15;
            let present = scaled.replicas;
            prop_assert_eq!(again.replicas, present);
            let on = scaled.step(at(second + later), &load_of(*load));
            let anew = again.step(Now::at(Duration::from_secs(later)), &load_of(*load));
            let bolder = if anew > present { anew > on } else { anew < on && anew < present };
            prop_assert!(!bolder, "from {present}: {on} without the restart, {anew} with it");
            if on != anew {
                break;
            }
        }
    }
}

#[test]
fn a_record_keeps_what_was_decided() {
    let mut scaled = Scaled::new(policy(1, 40, queue(1_000)), 5);
    scaled.step(at(0), &load_of(9_000));
    scaled.step(at(15), &load_of(9_000));
    let record = scaled.autoscaler.record(at(20));
    assert_eq!((record.last_ago, record.changed_ago), (Some(Timespan::seconds(5)), Some(Timespan::seconds(20))));
    assert_eq!(record.changes.iter().map(|change| change.by).collect::<Vec<_>>(), [4]);
    let restored = Autoscaler::restore(policy(1, 40, queue(1_000)), &record, Now::at(Duration::from_secs(7)));
    let now = Now::at(Duration::from_secs(17));
    assert_eq!(restored.status(now).changed_ago, Some(Timespan::seconds(30)));
    assert_eq!(
        restored.explain(now),
        [
            "stays at 9: queue_depth is 1 of 1 per instance, which asks for 9",
            "30s ago: scaled up from 5 to 9: queue_depth is 1.8 of 1 per instance, which asks for 9",
        ]
    );
    let nothing = Autoscaler::restore(policy(1, 40, queue(1_000)), &AutoscaleRecord::default(), Now::ZERO);
    assert_eq!(nothing.explain(Now::ZERO), ["autoscaling waits for its first measurement"]);
}

#[test]
fn another_policy_counts_at_once_and_keeps_the_history() {
    let mut scaled = Scaled::new(policy(1, 40, queue(1_000)), 10);
    assert_eq!(scaled.step(at(0), &load_of(10_000)), 10);
    assert_eq!(scaled.autoscaler.deadline(), at(15));
    scaled.autoscaler.set_policy(policy(1, 40, queue(1_000)));
    assert_eq!(scaled.autoscaler.deadline(), at(15), "the same policy is no change");
    scaled.autoscaler.set_policy(policy(1, 40, queue(2_000)));
    assert!(scaled.autoscaler.deadline() <= at(0));
    assert_eq!(scaled.step(at(1), &load_of(10_000)), 10, "ten were recommended a second ago");
    scaled.autoscaler.set_policy(policy(1, 8, queue(2_000)));
    assert_eq!(scaled.step(at(2), &load_of(10_000)), 8);
}
