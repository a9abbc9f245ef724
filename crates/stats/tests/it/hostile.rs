//! Bounds: memory and numbers, whatever a client or a caller sends.

use std::time::Duration;

use orchestra_stats::{Analysis, Arm, Bad, Cell, Counter, Outcome, Policy, Settings, Tick, Unit};

fn tick(cells: Vec<Cell>) -> Tick {
    Tick { covers: Duration::from_millis(500), cells, ..Tick::default() }
}

fn cell(arm: Arm, client: u64, weight: f64, requests: u64, failed: u64) -> Cell {
    let bad = Bad { server_error: failed, ..Bad::default() };
    Cell { arm, client, weight, requests, bad, client_failed: 0 }
}

/// A state in the journal stays below this, whatever comes.
const MOST: usize = 256 * 1024;

#[test]
fn a_million_clients_take_bounded_memory() {
    for unit in [Unit::Request, Unit::Session] {
        let settings = Settings { unit, client_window: Duration::MAX, ..Settings::default() };
        let mut analysis = Analysis::new(settings);
        analysis.step(0.5);
        for look in 0..100_u64 {
            let client = |at: u64| (look * 10_000 + at).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let cells = (0..10_000).map(|at| {
                let arm = if at % 2 == 0 { Arm::Canary } else { Arm::Stable };
                cell(arm, client(at), 0.5, 1, 1)
            });
            analysis.observe(&tick(cells.collect()));
        }
        let size = serde_json::to_string(&analysis).expect("finite").len();
        assert!(size < MOST, "{size} bytes with {unit:?}");
        assert!(analysis.verdict(false).is_none(), "an outage of both: {}", analysis.evidence().reason);
        assert_eq!(analysis.evidence().canary.bad.server_error, 500_000);
    }
}

#[test]
fn a_small_state_is_small() {
    let mut analysis = Analysis::new(Settings::default());
    analysis.step(0.1);
    analysis.observe(&tick(vec![cell(Arm::Canary, 1, 0.1, 10, 1), cell(Arm::Stable, 2, 0.1, 90, 1)]));
    let state = serde_json::to_string(&analysis).expect("finite").len();
    assert!(state < 6 * 1024, "{state} bytes");
    let evidence = serde_json::to_string(&analysis.evidence()).expect("finite").len();
    assert!(evidence < 2048, "{evidence} bytes");
}

#[test]
fn thousands_of_weight_changes_keep_the_first_and_the_last() {
    let mut analysis = Analysis::new(Settings::default());
    for change in 0..5000 {
        analysis.step(f64::from(change) / 10_000.0);
    }
    let weights = analysis.evidence().weights;
    assert_eq!(weights.len(), 64);
    assert!(weights[0].weight == 0.0 && (weights[63].weight - 0.4999).abs() < 1e-9);
}

#[test]
fn a_single_look_with_a_flood_of_one_client_counts_little() {
    let mut analysis = Analysis::new(Settings::default());
    analysis.step(0.2);
    analysis.observe(&tick(vec![cell(Arm::Canary, 7, 0.2, 100_000, 100_000)]));
    let evidence = analysis.evidence();
    assert!((evidence.counted.0 - 2.0).abs() < 1e-9, "{:?}", evidence.counted);
    assert!(analysis.verdict(false).is_none());
}

#[test]
fn what_keeps_a_bad_canary_from_failing_is_said() {
    // A single caller, whose bad responses count for two: no sum of them is a fail.
    let mut analysis = Analysis::new(Settings::default());
    analysis.step(0.5);
    for _ in 0..30 {
        analysis.observe(&tick(vec![cell(Arm::Canary, 7, 0.5, 4, 4), cell(Arm::Stable, 7, 0.5, 4, 0)]));
    }
    let verdict = analysis.verdict(true).unwrap();
    assert_eq!(verdict.outcome, Outcome::Inconclusive);
    assert!(
        verdict.reason.contains("1 client has seen it") && verdict.reason.contains("a fail needs 2"),
        "{verdict:?}"
    );

    // A stall: every response of many clients is late at one moment.
    let mut analysis = Analysis::new(Settings::default());
    analysis.step(0.5);
    let late = |client| Cell { bad: Bad { slow: 4, ..Bad::default() }, ..cell(Arm::Canary, client, 0.5, 4, 0) };
    let cells = (0..20).map(late).chain((0..20).map(|client| cell(Arm::Stable, client, 0.5, 4, 0)));
    analysis.observe(&tick(cells.collect()));
    analysis.observe(&tick(vec![cell(Arm::Stable, 1, 0.5, 4, 0)]));
    analysis.observe(&tick(vec![cell(Arm::Stable, 1, 0.5, 4, 0)]));
    let reason = analysis.evidence().reason;
    assert!(reason.contains("far from a pass") && reason.contains("of 80 bad ones"), "{reason}");
}

#[test]
fn impossible_weights_accuse_nobody() {
    for weight in [0.0, -0.5, f64::NAN, f64::NEG_INFINITY, 1e-9, 1.5, f64::INFINITY] {
        let mut analysis = Analysis::new(Settings { min_clients: 1, ..Settings::default() });
        analysis.step(weight);
        for client in 0..100 {
            analysis.observe(&tick(vec![cell(Arm::Canary, client, weight, 10, 10)]));
        }
        assert!(analysis.verdict(false).is_none(), "{weight}: {}", analysis.evidence().reason);
    }
}

#[test]
fn unknown_counters_and_counters_of_one_arm_say_nothing() {
    let mut analysis = Analysis::new(Settings { counters: vec!["known".into()], ..Settings::default() });
    analysis.step(0.2);
    let counter = |name: &str, arm| Counter { name: name.into(), arm, increase: 1000, requests: 10 };
    for _ in 0..100 {
        let counters =
            vec![counter("known", Arm::Canary), counter("other", Arm::Canary), counter("other", Arm::Stable)];
        analysis.observe(&Tick { covers: Duration::from_secs(1), counters, ..Tick::default() });
    }
    assert!(analysis.verdict(false).is_none());
    assert_eq!(analysis.evidence().counters.len(), 1);
}

#[test]
fn settings_out_of_range_are_brought_into_it() {
    let settings = Settings {
        alpha: f64::NAN,
        beta: 7.0,
        errors: Some(f64::INFINITY),
        min_clients: 1_000_000,
        client_cap: 0,
        counters: (0..1000).map(|at| format!("c{at}")).collect(),
        inconclusive: Policy::RollBack,
        ..Settings::default()
    };
    let analysis = Analysis::new(settings);
    let settings = analysis.settings();
    assert!((settings.alpha - 0.01).abs() < 1e-12 && settings.beta <= 0.5);
    assert!(settings.errors.is_some_and(|it| it < 1.0));
    assert_eq!((settings.min_clients, settings.client_cap, settings.counters.len()), (16, 1, 16));
    let verdict = analysis.verdict(true).expect("the step is over");
    assert_eq!((verdict.outcome, verdict.then), (Outcome::Error, Some(Policy::RollBack)));
}
