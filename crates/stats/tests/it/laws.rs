//! Laws that hold for every input.

use std::time::Duration;

use orchestra_stats::{
    Analysis, Arm, Bad, Cell, Counter, Histogram, Pair, Settings, Tick, Unit,
    wealth::{Bets, Wealth, gain, sum_of_logs},
};
use proptest::prelude::*;

fn arm() -> impl Strategy<Value = Arm> {
    prop_oneof![Just(Arm::Canary), Just(Arm::Stable)]
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..=1.0,
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(f64::MIN_POSITIVE), Just(1e300)],
    ]
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..20, 1 => Just(u64::MAX)]
}

fn cell() -> impl Strategy<Value = Cell> {
    (arm(), 0_u64..6, number(), count(), [count(), count(), count()]).prop_map(
        |(arm, client, weight, requests, bad)| {
            let bad = Bad { server_error: bad[0], slow: bad[1], broken: bad[2], ..Bad::default() };
            Cell { arm, client, weight, requests, bad, client_failed: requests }
        },
    )
}

fn tick() -> impl Strategy<Value = Tick> {
    let counter = (arm(), count(), count()).prop_map(|(arm, increase, requests)| Counter {
        name: "c".into(),
        arm,
        increase,
        requests,
    });
    let pair = (any::<bool>(), any::<bool>()).prop_map(|(canary_bad, stable_bad)| Pair { canary_bad, stable_bad });
    let covers = prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), Just(Duration::from_millis(200))];
    (
        covers,
        prop::collection::vec(cell(), 0..6),
        prop::collection::vec(counter, 0..3),
        prop::collection::vec(pair, 0..3),
    )
        .prop_map(|(covers, cells, counters, pairs)| Tick { covers, cells, counters, pairs })
}

fn settings() -> impl Strategy<Value = Settings> {
    (number(), number(), prop::option::of(number()), any::<bool>(), any::<u32>(), number()).prop_map(
        |(alpha, rate, errors, sticky, cap, burst)| Settings {
            alpha,
            beta: alpha,
            degradation: orchestra_stats::settings::Degradation { rate, ratio: 1.0 + rate },
            errors,
            unit: if sticky { Unit::Session } else { Unit::Request },
            client_cap: cap,
            min_clients: cap,
            failed_burst: burst,
            late_burst: burst,
            counters: vec!["c".into()],
            probes: true,
            ..Settings::default()
        },
    )
}

proptest! {
    /// The expected factor of every bet is 1 under the null hypothesis, and at most 1 beyond it: the bets are fair.
    #[test]
    fn bets_are_fair(p in 0.0001_f64..0.9999, below in 0.0_f64..=1.0) {
        for (bets, sign) in [(Bets::Worse, 1.0), (Bets::Better, -1.0)] {
            for &(odds, _) in bets.all() {
                let (hit, miss) = (gain(p, odds, 1.0, 0.0).exp(), gain(p, odds, 0.0, 1.0).exp());
                prop_assert!((p * hit + (1.0 - p) * miss - 1.0).abs() < 1e-9);
                // Further from the alternative than the null hypothesis.
                let q = if sign > 0.0 { p * below } else { p + (1.0 - p) * below };
                prop_assert!(q * hit + (1.0 - q) * miss <= 1.0 + 1e-9);
            }
        }
    }

    /// A trial counted as a fraction of one is a fair bet still.
    #[test]
    fn fractions_are_fair(p in 0.0001_f64..0.9999, part in 0.0_f64..=1.0) {
        for &(odds, _) in Bets::Worse.all() {
            let mean = p * gain(p, odds, part, 0.0).exp() + (1.0 - p) * gain(p, odds, 0.0, part).exp();
            prop_assert!(mean <= 1.0 + 1e-9);
        }
    }

    /// The whole wealth, late beginnings included, is fair over every sequence of trials: the mean over all outcomes,
    /// weighed with their probabilities, is 1.
    #[test]
    fn wealth_is_a_martingale(p in prop::collection::vec(0.01_f64..0.99, 1..8)) {
        let mut mean = 0.0;
        for outcome in 0..(1_u32 << p.len()) {
            let mut wealth = Wealth::new(Bets::Worse, 0.25);
            let mut probability = 1.0;
            for (at, &p) in p.iter().enumerate() {
                let hit = outcome & (1 << at) != 0;
                probability *= if hit { p } else { 1.0 - p };
                let hit = f64::from(u8::from(hit));
                wealth.observe(p, hit, 1.0 - hit);
            }
            mean += probability * wealth.ln().exp();
        }
        prop_assert!((mean - 1.0).abs() < 1e-9, "{mean}");
    }

    /// Nothing that comes in makes a number infinite or NaN, and the state survives the journal.
    #[test]
    fn states_are_finite_and_survive(settings in settings(), steps in prop::collection::vec((number(), prop::collection::vec(tick(), 0..8)), 1..4)) {
        let mut analysis = Analysis::new(settings);
        for (weight, ticks) in steps {
            analysis.step(weight);
            analysis.admitted();
            for tick in &ticks {
                analysis.observe(tick);
                let _ = analysis.verdict(false);
            }
            analysis.lost(Duration::from_secs(1));
            let verdict = analysis.verdict(true).expect("the step is over");
            prop_assert!(!verdict.reason.is_empty());
            let evidence = analysis.evidence();
            for number in [evidence.ln_evidence, evidence.chance, evidence.ln_pass_evidence, evidence.counted.0] {
                prop_assert!(number.is_finite(), "{evidence:?}");
            }
            let _ = analysis.advice(Duration::from_secs(60));
            let text = serde_json::to_string(&analysis).expect("it is finite");
            let back: Analysis = serde_json::from_str(&text).expect("what was written is read");
            prop_assert_eq!(back.verdict(true).map(|it| it.outcome), Some(verdict.outcome));
            prop_assert!((back.evidence().ln_evidence - evidence.ln_evidence).abs() <= 1e-9 * evidence.ln_evidence.abs().max(1.0));
            // Read and written again it is the same to the last byte, so a replay does not drift.
            analysis = back;
        }
    }

    /// Cells in another order, or split up, say the same.
    #[test]
    fn order_of_cells_says_nothing(mut cells in prop::collection::vec(cell(), 0..8)) {
        let run = |cells: &[Cell]| {
            let mut analysis = Analysis::new(Settings::default());
            analysis.step(0.2);
            analysis.observe(&Tick { covers: Duration::from_secs(1), cells: cells.to_vec(), ..Tick::default() });
            analysis.evidence().ln_evidence
        };
        let forwards = run(&cells);
        cells.reverse();
        prop_assert!((forwards - run(&cells)).abs() <= 1e-9 * forwards.abs().max(1.0));
    }

    /// A bad response of the stable release never speaks against the canary.
    #[test]
    fn bad_stable_responses_never_accuse(weight in 0.001_f64..0.999, bad in prop::collection::vec(1_u64..5, 1..20)) {
        let mut analysis = Analysis::new(Settings::default());
        analysis.step(weight);
        for (client, bad) in (0..).zip(bad) {
            let bad = Bad { server_error: bad, ..Bad::default() };
            let cell = Cell { arm: Arm::Stable, client, weight, requests: 9, bad, client_failed: 0 };
            analysis.observe(&Tick { covers: Duration::from_secs(1), cells: vec![cell], ..Tick::default() });
            prop_assert!(analysis.evidence().ln_evidence <= 1e-9);
        }
    }

    /// The witness takes nothing from the stable release's bad responses, and never makes a bad response of the canary count
    /// for more than it did: what counts in the end is at most what counted without a witness.
    #[test]
    fn a_witness_only_doubts(looks in prop::collection::vec((0_u64..3, 0_u64..3, 0_u64..4), 1..40)) {
        let run = |witness: bool| {
            let mut analysis = Analysis::new(Settings { failed_burst: 1e6, ..Settings::default() });
            analysis.step(0.2);
            // Before the first look it is 1.
            let mut most = 0.0_f64;
            for (at, (canary, stable, good)) in (0_u64..).zip(&looks) {
                let bad = |number| Bad { server_error: number, ..Bad::default() };
                let good = if witness { *good } else { 0 };
                let cells = vec![
                    Cell { arm: Arm::Canary, client: at, weight: 0.2, requests: *canary, bad: bad(*canary), client_failed: 0 },
                    Cell { arm: Arm::Stable, client: at, weight: 0.2, requests: stable + good, bad: bad(*stable), client_failed: 0 },
                ];
                analysis.observe(&Tick { covers: Duration::from_secs(1), cells, ..Tick::default() });
                if !witness {
                    // Good answers in a look of their own: everything counts before the next look.
                    let cell = Cell { arm: Arm::Stable, client: 1 << 40, weight: 0.2, requests: 1_000_000, bad: bad(0), client_failed: 0 };
                    analysis.observe(&Tick { cells: vec![cell], ..Tick::default() });
                }
                most = most.max(analysis.evidence().ln_evidence);
            }
            most
        };
        prop_assert!(run(true) <= run(false) + 1e-6);
    }

    /// A quantile lies at most 9 % above the duration it stands for.
    #[test]
    fn quantiles_are_close(millis in prop::collection::vec(1_u64..100_000, 1..200), quantile in 0.01_f64..1.0) {
        let mut histogram = Histogram::default();
        for milli in &millis {
            histogram.record(Duration::from_millis(*milli));
        }
        let mut sorted = millis.clone();
        sorted.sort_unstable();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below 200")]
        let exact = sorted[((sorted.len() as f64 * quantile).ceil() as usize).clamp(1, sorted.len()) - 1];
        let found = histogram.quantile(quantile).expect("there are some").as_secs_f64() * 1000.0;
        #[expect(clippy::cast_precision_loss, reason = "below 100,000")]
        let exact = exact as f64;
        prop_assert!(found >= exact * 0.999 && found <= exact * 1.0906, "{found} for {exact}");
        let back: Histogram = serde_json::from_str(&serde_json::to_string(&histogram).expect("plain")).expect("plain");
        prop_assert_eq!(back, histogram);
    }

    /// The sum of logarithms is what it says.
    #[test]
    fn logs_add_up(a in 1e-9_f64..1e9, b in 1e-9_f64..1e9) {
        let sum = sum_of_logs(&[a.ln(), b.ln()]).exp();
        prop_assert!((sum / (a + b) - 1.0).abs() < 1e-9);
    }
}
