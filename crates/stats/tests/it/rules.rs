//! What each rule does, one at a time: warm-up, steps, outcomes, advice, frozen bounds.

use std::time::Duration;

use orchestra_stats::{
    Advice, Analysis, Arm, Bad, Bounds, Cell, Freeze, Histogram, Outcome, Policy, Settings, Tick, Unit, Verdict,
    WarmUp, advice::advise, frozen_bound,
};

const SECOND: Duration = Duration::from_secs(1);

fn tick(cells: Vec<Cell>) -> Tick {
    Tick { covers: SECOND, cells, ..Tick::default() }
}

fn cell(arm: Arm, client: u64, weight: f64, requests: u64, bad: Bad) -> Cell {
    Cell { arm, client, weight, requests, bad, client_failed: 0 }
}

fn failed(number: u64) -> Bad {
    Bad { server_error: number, ..Bad::default() }
}

fn late(number: u64) -> Bad {
    Bad { slow: number, ..Bad::default() }
}

fn at_weight(weight: f64, settings: Settings) -> Analysis {
    let mut analysis = Analysis::new(settings);
    analysis.step(weight);
    analysis
}

// === warm-up ===

#[test]
fn late_responses_of_cold_instances_do_not_count() {
    let mut analysis = at_weight(0.2, Settings::default());
    analysis.admitted();
    for client in 0..10 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 5, late(5))]));
    }
    assert!(analysis.evidence().ln_evidence <= 1e-9);
    assert_eq!(analysis.evidence().canary.warm_up, 50);
    // It is warm now.
    for client in 100..200 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 5, late(5))]));
    }
    assert_eq!(analysis.verdict(false).map(|it| it.outcome), Some(Outcome::Fail));
}

#[test]
fn errors_of_cold_instances_count_unless_excluded() {
    for (errors_too, fails) in [(false, true), (true, false)] {
        let warm_up = WarmUp { errors_too, ..WarmUp::default() };
        let mut analysis = at_weight(0.2, Settings { warm_up, ..Settings::default() });
        analysis.admitted();
        for client in 0..9 {
            analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 5, failed(5))]));
        }
        assert_eq!(analysis.verdict(false).is_some(), fails);
    }
}

#[test]
fn a_warm_up_can_be_so_many_requests() {
    let warm_up = WarmUp { time: Duration::ZERO, requests: 50, errors_too: true };
    let mut analysis = at_weight(0.2, Settings { warm_up, ..Settings::default() });
    analysis.admitted();
    for client in 0..5 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 10, failed(10))]));
    }
    assert_eq!(analysis.evidence().canary.warm_up, 50);
    analysis.observe(&tick(vec![cell(Arm::Canary, 9, 0.2, 10, failed(10))]));
    assert_eq!(analysis.evidence().canary.warm_up, 50);
}

#[test]
fn instances_that_keep_coming_back_are_judged_in_the_end() {
    let warm_up = WarmUp { errors_too: true, ..WarmUp::default() };
    let mut analysis = at_weight(0.2, Settings { warm_up, ..Settings::default() });
    for client in 0..120 {
        analysis.admitted();
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 5, failed(5))]));
    }
    assert_eq!(analysis.verdict(false).map(|it| it.outcome), Some(Outcome::Fail));
}

// === the relative test ===

/// One good response of the stable release, and one of the canary.
fn pair(client: u64, canary: Bad, stable: Bad) -> Tick {
    tick(vec![cell(Arm::Canary, client, 0.2, 1, canary), cell(Arm::Stable, client, 0.2, 4, stable)])
}

#[test]
fn four_bad_responses_of_four_clients_at_a_fifth_are_enough() {
    let mut analysis = at_weight(0.2, Settings::default());
    for client in 0..4 {
        assert!(analysis.verdict(false).is_none());
        analysis.observe(&pair(client, failed(1), Bad::default()));
    }
    // The stable release has not answered since the fourth.
    assert!(analysis.verdict(false).is_none());
    assert!(analysis.evidence().reason.contains("what the stable release answers next"));
    analysis.observe(&tick(vec![cell(Arm::Stable, 9, 0.2, 2, Bad::default())]));
    assert_eq!(analysis.verdict(false).map(|it| it.outcome), Some(Outcome::Fail));
}

// === the witness ===

#[test]
fn what_fails_on_both_does_not_count_though_the_canary_was_first() {
    let mut analysis = at_weight(0.2, Settings::default());
    analysis.observe(&tick(vec![cell(Arm::Stable, 99, 0.2, 100, Bad::default())]));
    for client in 0..20 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 1, failed(1))]));
        if client == 7 {
            break;
        }
    }
    analysis.observe(&tick(vec![cell(Arm::Stable, 50, 0.2, 2, failed(2))]));
    let evidence = analysis.evidence();
    assert!(evidence.ln_evidence < 5.0, "{evidence:?}");
    assert!(evidence.doubted > 0.0, "{evidence:?}");
    assert!(analysis.verdict(false).is_none());
}

#[test]
fn half_a_witness_is_half_the_evidence() {
    let evidence = |stable_bad: u64| {
        let mut analysis = at_weight(0.2, Settings::default());
        analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.2, 1, failed(1))]));
        let client_failed = Bad { server_error: stable_bad, ..Bad::default() };
        analysis.observe(&tick(vec![cell(Arm::Stable, 2, 0.2, 2, client_failed)]));
        (analysis.evidence().ln_evidence, analysis.evidence().doubted)
    };
    let ((all, doubted), (half, half_doubted), (nothing, all_doubted)) = (evidence(0), evidence(1), evidence(2));
    assert!(all > 0.5 && half < all && nothing <= half, "{all} {half} {nothing}");
    assert!(doubted.abs() < 1e-9 && (half_doubted - 0.5).abs() < 1e-9 && (all_doubted - 1.0).abs() < 1e-9);
}

#[test]
fn a_stable_release_that_never_answers_is_no_alibi() {
    // Its responses take longer than the canary's failures.
    let mut analysis = at_weight(0.2, Settings::default());
    let mut looks = 0;
    while analysis.verdict(false).is_none() {
        looks += 1;
        assert!(looks < 20, "{}", analysis.evidence().reason);
        analysis.observe(&tick(vec![cell(Arm::Canary, looks, 0.2, 1, failed(1))]));
    }
    // Four that count, and five more of which luck gives none to the stable release.
    assert!((8..=10).contains(&looks), "{looks}");
}

#[test]
fn what_the_client_did_wrong_is_not_bad() {
    let mut analysis = at_weight(0.2, Settings::default());
    for client in 0..1000 {
        let mut cell = cell(Arm::Canary, client, 0.2, 0, Bad::default());
        cell.client_failed = 10;
        analysis.observe(&tick(vec![cell]));
    }
    assert!(analysis.verdict(false).is_none());
    assert_eq!(analysis.evidence().canary.client_failed, 10_000);
    assert_eq!(analysis.evidence().canary.requests, 0);
}

#[test]
fn each_response_is_judged_at_the_weight_it_was_assigned_at() {
    // Assigned at 90 %, reported after the weight fell to 1 %: nothing unusual about it.
    let mut analysis = at_weight(0.01, Settings::default());
    for client in 0..20 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.9, 1, failed(1))]));
    }
    assert!(analysis.verdict(false).is_none());
}

#[test]
fn a_fail_stands_for_good() {
    let mut analysis = at_weight(0.2, Settings::default());
    for client in 0..10 {
        analysis.observe(&tick(vec![cell(Arm::Canary, client, 0.2, 1, failed(1))]));
    }
    let reason = analysis.verdict(false).expect("it failed").reason;
    analysis.step(0.5);
    for client in 0..100 {
        let stable = cell(Arm::Stable, client, 0.5, 10, failed(10));
        analysis.observe(&tick(vec![stable, cell(Arm::Canary, client, 0.5, 100, Bad::default())]));
    }
    assert_eq!(analysis.verdict(true).map(|it| it.reason), Some(reason));
    assert!(analysis.advice(SECOND).is_none());
}

#[test]
fn one_client_can_be_enough_if_asked_for() {
    let judge = |min_clients| {
        let mut analysis = at_weight(0.2, Settings { min_clients, ..Settings::default() });
        for _ in 0..100 {
            analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.2, 1, failed(1))]));
        }
        analysis.verdict(true).map(|it| it.outcome)
    };
    assert_eq!(judge(1), Some(Outcome::Fail));
    assert_eq!(judge(2), Some(Outcome::Inconclusive));
}

#[test]
fn one_client_is_held_back_at_full_weight_as_well() {
    let mut analysis = at_weight(0.2, Settings::default());
    let observe = |analysis: &mut Analysis, weight| {
        for client in 0..100 {
            let ordinary = cell(Arm::Canary, client, weight, 10, Bad::default());
            analysis.observe(&tick(vec![cell(Arm::Canary, 999, weight, 1, failed(1)), ordinary]));
        }
    };
    observe(&mut analysis, 0.2);
    // Another client has one bad response too.
    analysis.observe(&tick(vec![cell(Arm::Canary, 5, 0.2, 1, failed(1))]));
    assert!(analysis.verdict(false).is_none());
    analysis.step(1.0);
    observe(&mut analysis, 1.0);
    assert!(analysis.verdict(false).is_none(), "{}", analysis.evidence().reason);
}

// === the absolute bound ===

#[test]
fn without_a_baseline_the_bound_decides() {
    let judge = |errors, bad: u64| {
        let mut analysis = at_weight(1.0, Settings { errors, ..Settings::default() });
        for client in 0..200 {
            let bad = u64::from(client % 20 < bad);
            analysis.observe(&tick(vec![cell(Arm::Canary, client, 1.0, 1, failed(bad))]));
        }
        analysis.verdict(true).map(|it| (it.outcome, it.reason))
    };
    let (outcome, reason) = judge(Some(0.02), 4).expect("over");
    assert_eq!(outcome, Outcome::Fail);
    assert!(reason.contains("above the bound of 2.0 %"), "{reason}");
    assert_ne!(judge(Some(0.3), 4).expect("over").0, Outcome::Fail);
    assert_ne!(judge(None, 4).expect("over").0, Outcome::Fail);
    assert_eq!(judge(Some(0.02), 0).expect("over").0, Outcome::Pass);
}

#[test]
fn the_bound_gives_way_to_what_the_stable_release_did() {
    let judge = |errors_give_way, bad: u64| {
        let mut analysis = at_weight(0.5, Settings { errors_give_way, ..Settings::default() });
        for client in 0..2_000 {
            let usual = u64::from(client % 20 == 0);
            let cells = vec![
                cell(Arm::Stable, client, 0.5, 1, failed(usual)),
                cell(Arm::Canary, client + 10_000, 0.5, 1, failed(usual)),
            ];
            analysis.observe(&tick(cells));
        }
        analysis.step(1.0);
        for client in 20_000..22_000 {
            analysis.observe(&tick(vec![cell(Arm::Canary, client, 1.0, 1, failed(u64::from(client % 20 < bad)))]));
        }
        analysis.verdict(true).map(|it| (it.outcome, it.reason)).expect("over")
    };
    assert_ne!(judge(true, 1).0, Outcome::Fail, "one of twenty is usual");
    let (outcome, reason) = judge(true, 6);
    assert_eq!(outcome, Outcome::Fail);
    assert!(reason.contains("above the bound of 6.7 %"), "{reason}");
    let (outcome, reason) = judge(false, 1);
    assert_eq!(outcome, Outcome::Fail, "who writes a bound down means it");
    assert!(reason.contains("above the bound of 2.0 %"), "{reason}");
}

#[test]
fn sticky_sessions_are_held_to_the_bound_for_as_long_as_it_takes() {
    let judge = |later: u64| {
        let settings = Settings { unit: Unit::Session, errors_give_way: false, ..Settings::default() };
        let mut analysis = at_weight(1.0, settings);
        for session in 0..20_000 {
            let one_in = if session < 15_000 { 200 } else { later };
            let cells = (0..3).map(|_| cell(Arm::Canary, session, 1.0, 2, failed(u64::from(session % one_in == 0))));
            analysis.observe(&tick(cells.collect()));
        }
        (analysis.verdict(false).map(|it| it.outcome), analysis.evidence().reason)
    };
    let (outcome, reason) = judge(200);
    assert_eq!(outcome, None, "{reason}");
    let (outcome, reason) = judge(5);
    assert_eq!(outcome, Some(Outcome::Fail), "{reason}");
}

// === outcomes ===

#[test]
fn a_pass_needs_the_evidence_in_this_step() {
    let mut analysis = at_weight(0.2, Settings::default());
    for client in 0..60 {
        analysis.observe(&tick(vec![
            cell(Arm::Canary, client, 0.2, 5, Bad::default()),
            cell(Arm::Stable, client, 0.2, 20, Bad::default()),
        ]));
    }
    assert!(analysis.enough());
    let verdict = analysis.verdict(true).expect("over");
    assert_eq!(
        (verdict.outcome, verdict.reason.as_str(), verdict.then),
        (
            Outcome::Pass,
            "in this step 0 of 300 responses of the canary were bad, and 0 of 1200 of the stable release; 2.0 % bad, with \
             2 times the odds of the stable release, would have been seen",
            None
        )
    );
    analysis.step(0.5);
    assert!(!analysis.enough());
}

#[test]
fn the_responses_that_are_needed_are_enough() {
    let mut analysis = at_weight(0.2, Settings::default());
    let needed = analysis.needed();
    assert!((150..=250).contains(&needed), "{needed}");
    analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.2, needed - 20, Bad::default())]));
    let rest = analysis.needed();
    assert_eq!(rest, 20);
    analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.2, rest, Bad::default())]));
    assert_eq!((analysis.enough(), analysis.needed()), (true, 0));
}

#[test]
fn what_could_not_be_measured_is_an_error_and_never_promotes() {
    for (policy, then) in
        [(Policy::PromoteAndWatch, Policy::Hold), (Policy::Hold, Policy::Hold), (Policy::RollBack, Policy::RollBack)]
    {
        let mut analysis = at_weight(0.2, Settings { inconclusive: policy, ..Settings::default() });
        analysis.observe(&tick(vec![]));
        analysis.lost(SECOND * 9);
        let verdict = analysis.verdict(true).expect("over");
        assert_eq!((verdict.outcome, verdict.then), (Outcome::Error, Some(then)));
        assert_eq!(verdict.reason, "nothing was measured for 9 s of 10 s");
    }
}

#[test]
fn no_traffic_is_inconclusive_and_follows_the_policy() {
    for policy in [Policy::PromoteAndWatch, Policy::Hold, Policy::RollBack] {
        let mut analysis = at_weight(0.2, Settings { inconclusive: policy, ..Settings::default() });
        analysis.observe(&tick(vec![]));
        let verdict = analysis.verdict(true).expect("over");
        assert_eq!((verdict.outcome, verdict.then), (Outcome::Inconclusive, Some(policy)));
    }
}

#[test]
fn the_worst_of_several_verdicts_stands() {
    let verdict = |outcome, reason: &str| Verdict { outcome, reason: reason.into(), then: None };
    let all = [Outcome::Pass, Outcome::Fail, Outcome::Error, Outcome::Inconclusive, Outcome::Fail];
    let worst = Verdict::worst((0..).zip(all).map(|(at, outcome)| verdict(outcome, &format!("{at}"))));
    assert_eq!(worst, Some(verdict(Outcome::Fail, "1")));
    assert_eq!(Verdict::worst([]), None);
}

// === advice ===

#[test]
fn advice_fits_the_traffic() {
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    assert_eq!(advise(0, 0.0, 0.05, minutes(1)), Advice::Wait(Duration::ZERO));
    // 200 responses at 2 per second.
    assert_eq!(advise(200, 10.0, 0.2, minutes(2)), Advice::Wait(Duration::from_secs(100)));
    // 200 in 120 s of 10 per second need a sixth.
    assert_eq!(advise(200, 10.0, 0.05, minutes(2)), Advice::RaiseWeight(0.167));
    // Half of 1 per second gives 60 in two minutes: 140 pairs make up for the rest.
    let probes = Advice::SyntheticProbes { weight: 0.5, pairs: 140, every: minutes(2) / 140 };
    match (advise(200, 1.0, 0.05, minutes(2)), probes) {
        (
            Advice::SyntheticProbes { weight, pairs, every },
            Advice::SyntheticProbes { weight: w, pairs: p, every: e },
        ) => {
            assert_eq!((weight.to_bits(), pairs), (w.to_bits(), p));
            assert!(every.abs_diff(e) < Duration::from_micros(1));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(advise(200, 0.0, 0.05, Duration::ZERO), Advice::SyntheticProbes { pairs: 200, .. }));
    assert!(matches!(advise(u64::MAX, f64::NAN, f64::NAN, Duration::MAX), Advice::SyntheticProbes { .. }));
}

#[test]
fn following_the_advice_leads_to_a_verdict() {
    let mut analysis = at_weight(0.05, Settings { probes: true, ..Settings::default() });
    analysis.observe(&tick(vec![cell(Arm::Stable, 1, 0.05, 1, Bad::default())]));
    let Some(Advice::SyntheticProbes { pairs, .. }) = analysis.advice(Duration::from_secs(60)) else {
        panic!("{:?}", analysis.advice(Duration::from_secs(60)));
    };
    // The traffic that it counts on does not come, so it asks again for what is missing.
    for _ in 0..pairs + 30 {
        let pairs = vec![orchestra_stats::Pair { canary_bad: false, stable_bad: false }];
        analysis.observe(&Tick { covers: SECOND, pairs, ..Tick::default() });
    }
    // But one path that answers says little of all others.
    let verdict = analysis.verdict(true).expect("over");
    assert_eq!(verdict.outcome, Outcome::Inconclusive);
    assert!(verdict.reason.contains("probes alone let nothing pass: it needs 20 real responses"), "{}", verdict.reason);
    let real = |requests| tick(vec![cell(Arm::Canary, 2, 0.05, requests, Bad::default())]);
    analysis.observe(&real(19));
    assert!(!analysis.enough());
    analysis.observe(&real(1));
    assert_eq!(analysis.verdict(true).map(|it| it.outcome), Some(Outcome::Pass));
}

#[test]
fn a_raised_weight_keeps_what_was_gathered() {
    let mut analysis = at_weight(0.05, Settings::default());
    analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.05, 100, Bad::default())]));
    let before = analysis.needed();
    analysis.reweigh(0.5);
    assert_eq!(analysis.needed(), before);
    assert_eq!(analysis.evidence().weights.last().map(|it| it.weight.to_bits()), Some(0.5_f64.to_bits()));
    analysis.step(0.5);
    assert!(analysis.needed() > before);
}

// === latency ===

#[test]
fn a_bound_is_frozen_from_enough_samples() {
    let mut stable = Histogram::default();
    for sample in 1..200 {
        stable.record(Duration::from_millis(sample));
    }
    assert_eq!(frozen_bound(&stable, &Freeze::default()), None);
    stable.record(Duration::from_millis(200));
    let bound = frozen_bound(&stable, &Freeze::default()).expect("enough").as_secs_f64();
    assert!((0.285..=0.285 * 1.1).contains(&bound), "{bound}");
    // Where responses take a millisecond, half as much again is noise: the slack decides.
    let mut fast = Histogram::default();
    (0..200).for_each(|_| fast.record(Duration::from_millis(1)));
    let bound = frozen_bound(&fast, &Freeze::default()).expect("enough");
    assert!((Duration::from_millis(11)..Duration::from_millis(12)).contains(&bound), "{bound:?}");
    for hostile in [f64::NAN, -1.0, f64::INFINITY] {
        let freeze = Freeze { quantile: hostile, factor: hostile, ..Freeze::default() };
        let _ = frozen_bound(&stable, &freeze);
    }
    let mut analysis = at_weight(0.2, Settings::default());
    analysis.latency(Bounds { whole: Some(bound), ..Bounds::default() });
    assert_eq!(analysis.evidence().latency.whole, Some(bound));
}
