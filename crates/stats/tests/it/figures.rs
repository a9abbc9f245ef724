//! The figures of the verdict on fewer releases than `docs/figures/verdict.md` has: quick, and able to fail.

use orchestra_stats::{Arm, Bad, Cell, Outcome, Tick, Unit};

use crate::world::{Over, Poison, Run, Stalls, World, many, quantile};

const SEED: u64 = 20_261_121;

fn failed(runs: &[Run]) -> usize {
    runs.iter().filter(|run| run.failed.is_some()).count()
}

fn seconds(runs: &[Run]) -> Vec<f64> {
    runs.iter().map(|run| run.failed.unwrap_or(f64::INFINITY)).collect()
}

/// With a false-alarm probability of 1 % the chance of more than 4 in 60 releases is below 0.1 %.
const TOLERATED: usize = 4;

#[test]
fn good_releases_are_kept_at_any_traffic() {
    for rate in [0.05, 1.0, 30.0, 1000.0] {
        let mut world = World::steady(rate, 0.2, 0.0);
        world.bad = (|_| 0.005, |_| 0.005);
        world.steps = vec![(0.05, 60.0), (0.2, 60.0), (0.5, 60.0), (1.0, 60.0)];
        if rate < 1.0 {
            (world.tick, world.steps) = (10.0, vec![(0.05, 3600.0), (0.5, 3600.0), (1.0, 3600.0)]);
        }
        let failed = failed(&many(&world, SEED, 60));
        assert!(failed <= TOLERATED, "{failed} of 60 at {rate}/s");
    }
}

#[test]
fn good_releases_of_a_service_with_many_errors_are_kept_to_the_end() {
    for (rate, unit) in [(2.0, Unit::Request), (50.0, Unit::Request), (50.0, Unit::Session)] {
        let mut world = World::steady(rate, 0.2, 0.0);
        world.bad = (|_| 0.06, |_| 0.06);
        world.settings.unit = unit;
        world.steps = vec![(0.2, 300.0), (1.0, 600.0)];
        let failed = failed(&many(&world, SEED, 60));
        assert!(failed <= TOLERATED, "{failed} of 60 at {rate}/s, {unit:?}");
    }
}

#[test]
fn a_looser_alpha_does_fail_good_releases() {
    // The bound is no accident of a test that never fails anything.
    let mut world = World::steady(5.0, 0.2, 300.0);
    world.bad = (|_| 0.1, |_| 0.1);
    world.settings.alpha = 0.5;
    let failed = failed(&many(&world, SEED, 100));
    assert!((5..=60).contains(&failed), "{failed} of 100");
}

#[test]
fn an_outage_of_both_rolls_back_nothing() {
    let outages: [Over; 3] = [
        |now| if now < 40.0 { 1.0 } else { 0.001 },
        |now| if (10.0..50.0).contains(&now) { 0.9 } else { 0.001 },
        |now| if now % 20.0 > 10.0 { 1.0 } else { 0.005 },
    ];
    for (rate, unit) in [(1.0, Unit::Request), (10.0, Unit::Request), (50.0, Unit::Session)] {
        for outage in outages {
            let mut world = World::steady(rate, 0.2, 60.0);
            world.bad = (outage, outage);
            world.settings.unit = unit;
            world.tick = 0.5;
            let runs = many(&world, SEED, 60);
            assert_eq!(failed(&runs), 0, "at {rate}/s, {unit:?}");
        }
    }
}

#[test]
fn a_step_does_not_pass_during_an_outage_of_both() {
    let mut world = World::steady(50.0, 0.2, 60.0);
    world.bad = (|_| 0.9, |_| 0.9);
    for run in many(&world, SEED, 10).iter().filter(|run| run.failed.is_none()) {
        assert_eq!(run.outcomes, [Outcome::Inconclusive], "{}", run.analysis.evidence().reason);
    }
}

#[test]
fn a_broken_canary_is_caught_within_seconds_and_a_few_bad_responses() {
    let mut world = World::steady(10.0, 0.2, 120.0);
    world.bad.1 = |_| 1.0;
    let runs = many(&world, SEED, 200);
    let p95 = quantile(seconds(&runs), 0.95);
    assert!(p95 <= 5.0, "{p95} s");
    #[expect(clippy::cast_precision_loss, reason = "a few responses")]
    let bad = quantile(runs.iter().map(|run| run.canary_bad as f64).collect(), 0.95);
    assert!(bad <= 8.0, "{bad} bad responses");
}

#[test]
fn a_canary_with_a_twentieth_bad_is_caught_within_fifteen_seconds() {
    let mut world = World::steady(100.0, 0.2, 120.0);
    world.bad.1 = |_| 0.05;
    let p95 = quantile(seconds(&many(&world, SEED, 100)), 0.95);
    assert!(p95 <= 15.0, "{p95} s");
}

#[test]
fn a_release_that_is_late_is_caught_too() {
    let mut world = World::steady(10.0, 0.2, 120.0);
    world.bad.1 = |_| 1.0;
    world.late = true;
    let p95 = quantile(seconds(&many(&world, SEED, 50)), 0.95);
    assert!(p95 <= 20.0, "{p95} s");
}

#[test]
fn a_regression_after_a_long_good_time_is_caught() {
    let mut world = World::steady(20.0, 0.2, 900.0);
    world.bad = (|_| 0.02, |now| if now < 600.0 { 0.02 } else { 0.5 });
    world.tick = 1.0;
    let p95 = quantile(seconds(&many(&world, SEED, 40)), 0.95);
    assert!((600.0..=630.0).contains(&p95), "{p95} s");
}

#[test]
fn one_client_rolls_back_nothing() {
    // What it sends fails on the canary alone, and it repeats it; others have ordinary errors.
    let mut world = World::steady(10.0, 0.2, 300.0);
    world.bad = (|_| 0.005, |_| 0.005);
    world.poison = Poison::OnCanary { per_second: 2.0 };
    world.tick = 0.5;
    let runs = many(&world, SEED, 60);
    assert!(failed(&runs) <= 6, "{} of 60", failed(&runs));
    let held = runs.iter().find(|run| run.failed.is_none()).expect("not all failed");
    let reason = held.analysis.evidence().reason;
    assert!(reason.contains("must not rest on one"), "{reason}");
}

#[test]
fn bursts_of_a_client_in_a_sticky_session_roll_back_nothing() {
    let mut world = World::steady(20.0, 0.2, 300.0);
    world.poison = Poison::Burst { every: 20.0, size: 100 };
    world.settings.unit = Unit::Session;
    world.tick = 0.5;
    let runs = many(&world, SEED, 60);
    assert!(failed(&runs) <= TOLERATED, "{} of 60", failed(&runs));
}

#[test]
fn stalls_that_both_have_roll_back_nothing() {
    let mut world = World::steady(100.0, 0.2, 600.0);
    world.stalls = Some(Stalls { every: 60.0, lasts: 0.5, instances: (1, 4), fails: false });
    let guarded = failed(&many(&world, SEED, 30));
    assert!(guarded <= 2, "{guarded} of 30");
    // Without the cap on moments they would.
    (world.settings.failed_burst, world.settings.late_burst) = (1e6, 1e6);
    let open = failed(&many(&world, SEED, 30));
    assert!(open >= 20, "{open} of 30");
}

#[test]
fn a_degraded_release_rarely_passes_and_a_good_one_does() {
    let mut world = World::steady(50.0, 0.2, 60.0);
    world.bad = (|_| 0.001, |_| 0.02);
    let passed = |runs: &[Run]| runs.iter().filter(|run| run.outcomes == [Outcome::Pass]).count();
    let degraded = passed(&many(&world, SEED, 60));
    assert!(degraded <= 8, "{degraded} of 60 passed");
    world.bad = (|_| 0.001, |_| 0.001);
    let good = passed(&many(&world, SEED, 60));
    assert!(good >= 57, "{good} of 60 passed");
}

#[test]
fn too_little_traffic_is_inconclusive() {
    let runs = many(&World::steady(1.0, 0.05, 120.0), SEED, 20);
    assert!(runs.iter().all(|run| run.outcomes == [Outcome::Inconclusive]));
}

#[test]
fn counters_and_probes_catch_what_responses_do_not_show() {
    let mut world = World::steady(100.0, 0.2, 300.0);
    world.settings.counters = vec!["parse_failures_total".into()];
    world.counted = (0.02, 0.1);
    let runs = many(&world, SEED, 20);
    assert_eq!(failed(&runs), 20);
    assert!(runs.iter().all(|run| run.analysis.evidence().reason.contains("counter parse_failures_total grew")));

    let mut world = World::steady(0.0, 0.2, 120.0);
    world.settings.probes = true;
    world.probes = (1.0, 0.0, 1.0);
    let runs = many(&world, SEED, 20);
    assert_eq!(failed(&runs), 20);
    assert!(runs.iter().all(|run| run.analysis.evidence().reason.contains("pairs of probes")));
}

#[test]
fn ordinary_counters_and_probes_roll_back_nothing() {
    let mut world = World::steady(20.0, 0.2, 600.0);
    world.settings.counters = vec!["a".into(), "b".into()];
    world.counted = (0.05, 0.05);
    world.settings.probes = true;
    world.probes = (0.5, 0.05, 0.05);
    world.tick = 0.5;
    let runs = many(&world, SEED, 60);
    assert!(failed(&runs) <= TOLERATED, "{} of 60", failed(&runs));
}

/// The reason of a fail says what was seen, in whole sentences.
#[test]
fn a_fail_explains_itself() {
    let mut analysis = orchestra_stats::Analysis::new(orchestra_stats::Settings::default());
    analysis.step(0.2);
    for client in 0..20 {
        let bad = Bad { server_error: 1, ..Bad::default() };
        let canary = Cell { arm: Arm::Canary, client, weight: 0.2, requests: 2, bad, client_failed: 0 };
        let stable = Cell { arm: Arm::Stable, client, weight: 0.2, requests: 8, bad: Bad::default(), client_failed: 1 };
        let covers = std::time::Duration::from_secs(1);
        analysis.observe(&Tick { covers, cells: vec![canary, stable], ..Tick::default() });
    }
    let verdict = analysis.verdict(false).expect("it failed");
    assert_eq!(verdict.outcome, Outcome::Fail);
    assert_eq!(
        verdict.reason,
        "on the canary 5 of 10 responses were bad (50 %: 5 server errors), on the stable release 0 of 40 responses were \
         bad (0 %), at a weight of 20 %; luck explains this at most once in 190 releases"
    );
    let evidence = analysis.evidence();
    assert_eq!((evidence.canary.requests, evidence.stable.requests, evidence.stable.client_failed), (40, 160, 20));
    assert_eq!(evidence.reason, verdict.reason);
}
