use orchestra_model::{
    rollout::PairProbe,
    traffic::{Arm, TrafficCell},
};

use super::*;
use crate::environment::fixture;

pub(super) fn guard() -> Guard {
    Guard { latency: Some(LatencyBound::Stable), ..fixture::guard() }
}

fn report(sequence: u64, cells: Vec<TrafficCell>) -> TrafficReport {
    let route = RouteId {
        environment: "demo/dev".parse().unwrap(),
        service: "api".parse().unwrap(),
        port: "http".parse().unwrap(),
    };
    let mut stable_latency = LatencyHistogram::default();
    for _ in 0..50 {
        stable_latency.add(20_000);
    }
    TrafficReport { route, watch: 2, sequence, cells, stable_latency, mirrored: (0, 0) }
}

/// Requests of distinct clients in one report.
fn cells(sequence: u64, arm: Arm, requests: u32, bad: u32) -> Vec<TrafficCell> {
    let one = |n: u32| TrafficCell {
        arm,
        client: sequence * 1000 + u64::from(n),
        canary: Permille::new(200),
        requests: 1,
        bad: u32::from(n < bad),
        server_errors: u32::from(n < bad),
        ..TrafficCell::default()
    };
    (0..requests).map(one).collect()
}

fn second(n: u64) -> Now {
    Now::at(Duration::from_millis(n * 250))
}

#[test]
fn a_broken_canary_fails_and_an_outage_of_both_does_not() {
    let (mut broken, mut outage) = (Judge::new(&guard(), false), Judge::new(&guard(), false));
    for judge in [&mut broken, &mut outage] {
        judge.weighed(Permille::new(200));
    }
    for n in 0..40 {
        let canary = cells(n * 2, Arm::Canary, 1, 1);
        let good = cells(n * 2 + 1, Arm::Stable, 4, 0);
        let bad = cells(n * 2 + 1, Arm::Stable, 4, 4);
        broken.observe(second(n), &report(n, [canary.clone(), good].concat()));
        outage.observe(second(n), &report(n, [canary, bad].concat()));
    }
    assert_eq!(broken.verdict(false).unwrap().0, VerdictOutcome::Fail);
    assert_eq!(outage.verdict(false), None);
    assert!(broken.evidence().contains_key("ln_evidence"));
}

#[test]
fn enough_good_responses_pass_early_and_few_are_inconclusive() {
    let mut judge = Judge::new(&guard(), false);
    judge.weighed(Permille::new(200));
    for n in 0..4 {
        judge.observe(second(n), &report(n, cells(n, Arm::Canary, 10, 0)));
    }
    assert_eq!(judge.verdict(false), None);
    assert_eq!(judge.verdict(true).unwrap().0, VerdictOutcome::Inconclusive);
    for n in 4..40 {
        judge.observe(second(n), &report(n, cells(n, Arm::Canary, 10, 0)));
    }
    assert_eq!(judge.verdict(false).unwrap().0, VerdictOutcome::Pass);
}

#[test]
fn nothing_measured_is_an_error_and_no_failure() {
    let mut judge = Judge::new(&guard(), false);
    judge.weighed(Permille::new(200));
    judge.observe(second(0), &report(0, vec![]));
    judge.observe(second(400), &report(1, vec![]));
    assert_eq!(judge.verdict(true).unwrap().0, VerdictOutcome::Error);
}

#[test]
fn the_bound_of_lateness_is_frozen_once() {
    let mut judge = Judge::new(&guard(), false);
    assert_eq!(judge.watch(2).slow, None);
    assert!(!(0..3).any(|n| judge.observe(second(n), &report(n, vec![]))));
    assert!(judge.observe(second(3), &report(3, vec![])));
    let bound = judge.watch(2).slow.unwrap().duration();
    assert!((Duration::from_millis(29)..Duration::from_millis(38)).contains(&bound), "{bound:?}");
    assert!(!judge.observe(second(4), &report(4, vec![])));
    let resumed = Judge::resume(&guard(), false, judge.memory().as_ref());
    assert_eq!(resumed.watch(2), judge.watch(2));
}

#[test]
fn a_raise_within_an_analysis_keeps_what_was_gathered() {
    let mut judge = Judge::new(&guard(), false);
    judge.follow(Permille::new(50), 0, 1);
    judge.follow(Permille::new(50), 1, 1);
    for n in 0..12 {
        judge.observe(second(n), &report(n, cells(n, Arm::Canary, 10, 0)));
    }
    // 40 requests a second are enough for two minutes, and not for one second.
    assert_eq!(judge.advice(Duration::from_secs(120)), None);
    assert!(judge.advice(Duration::from_secs(1)).unwrap() > Permille::new(50));
    judge.raised(Permille::new(400));
    judge.follow(Permille::new(400), 1, 1);
    for n in 12..20 {
        judge.observe(second(n), &report(n, cells(n, Arm::Canary, 10, 0)));
    }
    assert_eq!(judge.verdict(false).unwrap().0, VerdictOutcome::Pass);
    // The next step gathers anew.
    judge.follow(Permille::new(400), 2, 1);
    assert_eq!(judge.verdict(false), None);
}

#[test]
fn what_comes_in_the_warm_up_after_a_change_counts_for_nothing() {
    let guard = Guard { warm_up: Timespan::seconds(10), ..guard() };
    // A flag was turned off, and answers go on being bad for nine seconds, or for good.
    for (ends, expected) in [(36, None), (160, Some(VerdictOutcome::Fail))] {
        let mut judge = Judge::new(&guard, false).anew().from(Some(second(0) + Duration::from_secs(10)));
        judge.weighed(Permille::new(200));
        for n in 0..160 {
            let canary = cells(n * 2, Arm::Canary, 1, u32::from(n < ends));
            judge.observe(second(n), &report(n, [canary, cells(n * 2 + 1, Arm::Stable, 4, 0)].concat()));
            judge.pair(second(n), &if n < ends { Err("HTTP 500".to_owned()) } else { Ok(()) }, &Ok(()));
            assert!(n >= 40 || judge.verdict(false).is_none());
        }
        assert_eq!(judge.verdict(false).map(|(outcome, _)| outcome), expected);
    }
}

#[test]
fn pairs_of_probes_turn_back_alone_and_let_nothing_pass_alone() {
    let path = PairProbe {
        port: "http".parse().unwrap(),
        path: "/".to_owned(),
        every: Timespan::seconds(1),
        timeout: Timespan::seconds(1),
    };
    let guard = Guard { probe: Some(path), ..guard() };
    let (mut bad, mut good) = (Judge::new(&guard, false), Judge::new(&guard, false));
    for n in 0..300 {
        for judge in [&mut bad, &mut good] {
            judge.follow(Permille::new(50), 1, 1);
            judge.observe(second(n), &report(n, vec![]));
        }
        if n < 12 {
            bad.pair(second(n), &Err("HTTP 500".to_owned()), &Ok(()));
        }
        good.pair(second(n), &Ok(()), &Ok(()));
    }
    assert_eq!(bad.verdict(false).unwrap().0, VerdictOutcome::Fail);
    assert_eq!(bad.evidence()["probed"], "HTTP 500");
    assert_eq!(good.verdict(false), None);
    let (outcome, reason) = good.verdict(true).unwrap();
    assert_eq!(outcome, VerdictOutcome::Inconclusive);
    assert!(reason.contains("probes alone let nothing pass"), "{reason}");
    // What fails on both says nothing.
    let mut outage = Judge::new(&guard, false);
    for n in 0..300 {
        outage.observe(second(n), &report(n, vec![]));
        outage.pair(second(n), &Err("HTTP 503".to_owned()), &Err("HTTP 503".to_owned()));
    }
    assert_eq!(outage.verdict(false), None);
}

#[test]
fn what_has_all_traffic_is_held_to_a_bound_unless_there_is_none_to_hold_it_to() {
    let of = |errors, max_errors: Option<u16>, sticky| {
        let guard = Guard { errors, max_errors: max_errors.map(Permille::new), ..guard() };
        let judge = Judge::new(&guard, sticky);
        let settings = judge.memory.analysis.settings();
        settings.errors.map(|bound| ((bound * 1000.0).round(), settings.errors_give_way))
    };
    assert_eq!(of(true, None, false), Some((20.0, true)));
    assert_eq!(of(true, Some(5), false), Some((5.0, false)));
    assert_eq!(of(false, Some(50), false), Some((50.0, false)));
    assert_eq!(of(false, None, false), None);
    assert_eq!(of(true, None, true), None, "how many sessions see an error depends on how long they are");
    assert_eq!(of(true, Some(5), true), Some((5.0, false)));
}
