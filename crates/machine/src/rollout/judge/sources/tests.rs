use orchestra_model::{
    quantity::Timespan,
    rollout::{OnInconclusive, VerdictOutcome},
    route::RouteId,
    traffic::{LatencyHistogram, Permille, TrafficReport},
};

use super::*;
use crate::{rng::Rng, rollout::judge::Judge};

fn guard(counters: &[&str], prometheus: Vec<PrometheusMetric>) -> Guard {
    let base = crate::rollout::judge::tests::guard();
    Guard {
        counters: counters.iter().map(|name| name.parse().unwrap()).collect(),
        latency: None,
        prometheus,
        inconclusive: OnInconclusive::Hold,
        ..base
    }
}

fn metric() -> PrometheusMetric {
    PrometheusMetric {
        name: "errors".to_owned(),
        address: "http://p:9090".to_owned(),
        query: "errors".to_owned(),
        success: Some("result < 0.1".to_owned()),
        failure: None,
        every: Timespan::seconds(10),
        initial_delay: Timespan::default(),
        timeout: Timespan::seconds(2),
        count: Some(2),
        failure_limit: Some(0),
        inconclusive_limit: Some(0),
        error_limit: Some(1),
        success_limit: None,
        token: None,
        ca: None,
        dry_run: false,
    }
}

fn at(seconds: u64) -> Now {
    Now::at(Duration::from_secs(seconds))
}

fn start(release: u64, ordinal: u32) -> (InstanceId, u32) {
    (format!("api-r{release}-{ordinal}").parse().unwrap(), 1)
}

fn scraped(values: &[(u64, u32, f64)]) -> Answer {
    let one = |(release, ordinal, value): &(u64, u32, f64)| {
        let (instance, attempt) = start(*release, *ordinal);
        let values = if *value < 0.0 { Err("HTTP 404".to_owned()) } else { Ok(vec![Some(*value)]) };
        Scraped { instance, attempt, values }
    };
    Answer::Scraped(values.iter().map(one).collect())
}

/// Requests of so many clients each, to the new set and to the old one.
fn cells(canary: u32, stable: u32) -> Vec<TrafficCell> {
    let cell = |arm, client, requests| TrafficCell {
        arm,
        client,
        requests,
        canary: Permille::new(200),
        ..TrafficCell::default()
    };
    let mut cells: Vec<TrafficCell> =
        (0..u64::from(canary)).map(|client| cell(traffic::Arm::Canary, client, 1)).collect();
    cells.push(cell(traffic::Arm::Stable, 1, stable));
    cells
}

struct Counting {
    sources: Sources,
    now: u64,
}

impl Counting {
    fn new() -> Self {
        let mut sources = Sources::new(&guard(&["errors_total"], vec![]));
        sources.follow(at(0), &mut Memory::default(), (1, true), true, false);
        Self { sources, now: 0 }
    }

    /// One look at these instances, of which those of release 2 are new. Growth and requests of the new set and the old.
    fn look(&mut self, values: &[(u64, u32, f64)]) -> Option<[(u64, u64); 2]> {
        assert_eq!(self.sources.due(at(self.now)), [Due::Counters]);
        let new = values.iter().filter(|(release, ..)| *release == 2);
        self.sources.looks_at(new.map(|(release, ordinal, _)| start(*release, *ordinal)).collect());
        self.sources.asked(at(self.now), Due::Counters, self.now, Duration::from_secs(5), Duration::from_secs(1));
        assert_eq!(self.sources.due(at(self.now + 6)), [], "one question at a time");
        let counters = self.sources.scraped(self.now, scraped(values));
        self.now += 5;
        let of = |arm| {
            let counter = counters.iter().find(|it| it.arm == arm)?;
            Some((counter.increase, counter.requests))
        };
        Some([of(Arm::Canary)?, of(Arm::Stable)?])
    }
}

#[test]
fn growth_is_counted_by_start_of_an_instance_from_its_first_reading() {
    let mut counting = Counting::new();
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 1000.0), (2, 1, 7.0)]), Some([(0, 2), (0, 8)]), "what was there before is old");
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 1003.0), (2, 1, 8.0)]), Some([(1, 2), (3, 8)]));
    // A number that fell began anew.
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 2.0), (2, 1, 1.0)]), Some([(1, 2), (2, 8)]));
    // Another instance comes with whatever it has.
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 2.0), (1, 2, 500.0), (2, 1, 1.0)]), Some([(0, 2), (0, 8)]));
}

#[test]
fn a_reading_counts_once_it_is_whole_and_two_clients_were_answered() {
    let mut counting = Counting::new();
    counting.sources.served(&cells(2, 8));
    counting.look(&[(1, 1, 0.0), (1, 2, 0.0), (2, 1, 0.0)]).unwrap();
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 1.0), (1, 2, -1.0), (2, 1, 1.0)]), None, "a part of the old set is unknown");
    assert_eq!(counting.sources.words(&Memory::default()), ["counters: api-r1-2: HTTP 404"]);
    counting.sources.served(&cells(1, 8));
    // Nothing was lost.
    assert_eq!(counting.look(&[(1, 1, 1.0), (1, 2, 2.0), (2, 1, 2.0)]), Some([(2, 3), (3, 16)]));
    counting.sources.served(&cells(1, 8));
    assert_eq!(counting.look(&[(1, 1, 1.0), (1, 2, 2.0), (2, 1, 3.0)]), None, "one client alone");
    counting.sources.served(&cells(2, 0));
    assert_eq!(counting.look(&[(1, 1, 1.0), (1, 2, 2.0), (2, 1, 4.0)]), Some([(2, 3), (0, 8)]));
}

#[test]
fn no_instance_counts_for_more_than_its_share_of_the_requests() {
    let mut counting = Counting::new();
    let zero = [(1, 1, 0.0), (2, 1, 0.0), (2, 2, 0.0), (2, 3, 0.0)];
    counting.sources.served(&cells(30, 60));
    counting.look(&zero).unwrap();
    counting.sources.served(&cells(30, 60));
    let wild = [(1, 1, 1e9), (2, 1, 1e300), (2, 2, 0.0), (2, 3, 4.0)];
    assert_eq!(counting.look(&wild), Some([(14, 30), (60, 60)]));
}

#[test]
fn requests_that_chance_did_not_send_let_nothing_count() {
    let mut counting = Counting::new();
    let mut memory = Memory::default();
    counting.sources.served(&cells(2, 8));
    counting.look(&[(1, 1, 0.0), (2, 1, 0.0)]).unwrap();
    counting.sources.follow(at(5), &mut memory, (2, false), true, true);
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 0.0), (2, 1, 9.0)]), None);
    counting.sources.follow(at(10), &mut memory, (3, false), true, false);
    counting.sources.served(&cells(2, 8));
    assert_eq!(counting.look(&[(1, 1, 0.0), (2, 1, 9.0)]), Some([(0, 2), (0, 8)]), "nor later");
}

#[test]
fn an_answer_that_never_comes_or_comes_late_does_no_harm() {
    let mut counting = Counting::new();
    counting.sources.asked(at(0), Due::Counters, 1, Duration::from_secs(5), Duration::from_secs(1));
    assert_eq!(counting.sources.deadline(), Some(at(6)));
    counting.sources.follow(at(6), &mut Memory::default(), (1, true), true, false);
    assert_eq!(counting.sources.due(at(6)), [Due::Counters]);
    counting.sources.asked(at(6), Due::Counters, 2, Duration::from_secs(5), Duration::from_secs(1));
    assert_eq!(counting.sources.scraped(1, scraped(&[(2, 1, 5.0)])), []);
    assert!(counting.sources.counters.read.is_empty());
}

// === a judge with its sources ===

struct Trial {
    judge: Judge,
    guard: Guard,
    now: u64,
    asked: u64,
    counters: [f64; 2],
}

impl Trial {
    fn new(guard: Guard) -> Self {
        let mut judge = Judge::new(&guard, false);
        judge.follow(Permille::new(200), 1, 1);
        Self { judge, guard, now: 0, asked: 0, counters: [0.0; 2] }
    }

    /// Lets seconds pass at step `step`; a Prometheus server answers with `answer`.
    fn pass(&mut self, seconds: u64, step: (u32, bool), answer: Option<&Answer>) {
        for _ in 0..seconds {
            self.now += 1;
            self.judge.follow(Permille::new(200), step.0, 1);
            self.judge.look(at(self.now), step, true, false);
            for due in self.judge.due(at(self.now)) {
                self.asked += 1;
                self.judge.asked(at(self.now), due, self.asked, Duration::from_secs(2), Duration::from_secs(1));
                match due {
                    Due::Counters => {
                        self.judge.looks_at([start(2, 1)].into());
                        let values = [(1, 1, self.counters[1]), (2, 1, self.counters[0])];
                        self.judge.consulted(due, self.asked, scraped(&values));
                    }
                    Due::Metric(_) => {
                        if let Some(answer) = answer {
                            self.judge.consulted(due, self.asked, answer.clone());
                        }
                    }
                }
            }
        }
    }

    /// Good answers, every second, of clients who are all different.
    fn traffic(&mut self, sequence: u64, canary: u32, stable: u32) {
        let route = RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        };
        let report = TrafficReport {
            route,
            watch: 2,
            sequence,
            cells: cells(canary, stable),
            stable_latency: LatencyHistogram::default(),
            mirrored: (0, 0),
        };
        self.judge.observe(at(self.now), &report);
    }

    fn outcome(&self, over: bool) -> Option<VerdictOutcome> {
        self.judge.verdict(over).map(|(outcome, _)| outcome)
    }

    /// Enough good answers for a pass of what the data plane sees.
    fn good_traffic(&mut self) {
        for sequence in 0..60 {
            self.traffic(sequence, 10, 40);
        }
    }
}

fn values(value: f64) -> Answer {
    Answer::Values(vec![value])
}

#[test]
fn a_canary_that_only_a_counter_knows_to_be_bad_fails() {
    let mut trial = Trial::new(guard(&["errors_total"], vec![]));
    for sequence in 0..60 {
        trial.pass(1, (1, true), None);
        trial.traffic(sequence, 2, 8);
        trial.counters[0] += 1.0;
        if trial.outcome(false) == Some(VerdictOutcome::Fail) {
            let (_, reason) = trial.judge.verdict(false).unwrap();
            assert!(reason.starts_with("counter errors_total grew by"), "{reason}");
            assert!(sequence < 40, "{sequence}");
            return;
        }
    }
    panic!("{}", trial.judge.words());
}

/// Law: a counter that grows with the requests of both sets alike fails a good release with probability `alpha` at most,
/// however unevenly it grows and however late.
#[test]
fn a_counter_that_grows_on_both_sets_alike_fails_hardly_any_release() {
    let mut failed = 0;
    for seed in 0..300 {
        let mut rng = Rng::new(seed * 7919 + 1);
        let mut trial = Trial::new(guard(&["errors_total"], vec![]));
        let share = 1 + rng.below(900);
        let late = rng.below(3);
        let mut owed = std::collections::VecDeque::new();
        for sequence in 0..120 {
            trial.pass(1, (1, true), None);
            let total = rng.below(12);
            let canary = (0..total).filter(|_| rng.below(1000) < 200).count() as u64;
            trial.traffic(sequence, u32::try_from(canary).unwrap(), u32::try_from(total - canary).unwrap());
            let outage = rng.below(20) == 0;
            let mut bad = |of: u64| {
                let count = (0..of).filter(|_| outage || rng.below(1000) < share).count();
                f64::from(u32::try_from(count).unwrap())
            };
            owed.push_back([bad(canary), bad(total - canary)]);
            if owed.len() as u64 > late {
                let [new, old] = owed.pop_front().unwrap();
                trial.counters[0] += new;
                trial.counters[1] += old;
            }
        }
        failed += u32::from(trial.outcome(false) == Some(VerdictOutcome::Fail));
    }
    assert!(failed <= 6, "{failed} of 300 good releases failed");
}

#[test]
fn counters_that_cannot_be_read_are_an_error_at_the_end_of_the_analysis() {
    let mut trial = Trial::new(guard(&["errors_total"], vec![]));
    trial.counters = [-1.0, -1.0];
    trial.pass(4, (1, true), None);
    trial.good_traffic();
    let (outcome, reason) = trial.judge.verdict(true).unwrap();
    assert_eq!(outcome, VerdictOutcome::Error);
    assert!(reason.contains("could not be read: api-r2-1: HTTP 404"), "{reason}");
    assert!(trial.judge.evidence().contains_key("counters_unread"));
    trial.counters = [0.0, 0.0];
    trial.pass(4, (1, true), None);
    assert_eq!(trial.outcome(true), Some(VerdictOutcome::Pass));
}

#[test]
fn a_pass_needs_every_source_and_one_that_fails_is_enough() {
    let mut trial = Trial::new(guard(&[], vec![metric()]));
    trial.good_traffic();
    trial.pass(1, (1, true), Some(&values(0.0)));
    assert_eq!(trial.outcome(false), None, "one of two measurements");
    trial.pass(2, (1, true), Some(&values(0.0)));
    assert_eq!(trial.outcome(false), Some(VerdictOutcome::Pass));
    assert!(trial.judge.deadline().is_none(), "it has said enough");

    // Each analysis measures anew.
    trial.pass(1, (2, false), Some(&values(9.0)));
    assert_eq!(trial.asked, 2, "once it is settled nobody asks");
    trial.pass(1, (3, true), Some(&values(9.0)));
    let (outcome, reason) = trial.judge.verdict(false).unwrap();
    assert_eq!((outcome, reason.as_str()), (VerdictOutcome::Fail, "errors: 1 measurement failed, last value 9"));
    assert_eq!(trial.judge.evidence()["prometheus"][0]["failed"], 1);
}

#[test]
fn no_data_is_inconclusive_and_errors_are_errors() {
    for (answer, outcome) in [
        (Answer::Values(vec![]), VerdictOutcome::Inconclusive),
        (values(f64::NAN), VerdictOutcome::Inconclusive),
        (Answer::Error("connection refused".to_owned()), VerdictOutcome::Error),
    ] {
        let mut trial = Trial::new(guard(&[], vec![metric()]));
        trial.pass(6, (1, true), Some(&answer));
        trial.good_traffic();
        assert_eq!(trial.outcome(false), None, "{answer:?}");
        assert_eq!(trial.outcome(true), Some(outcome), "{answer:?}");
    }
    // Nobody answers at all.
    let mut trial = Trial::new(guard(&[], vec![metric()]));
    trial.pass(40, (1, true), None);
    trial.good_traffic();
    let (outcome, reason) = trial.judge.verdict(true).unwrap();
    assert_eq!((outcome, reason.as_str()), (VerdictOutcome::Error, "errors: 2 errors in a row: no answer"));
}

#[test]
fn a_dry_run_decides_nothing_and_is_told() {
    let mut trial = Trial::new(guard(&[], vec![PrometheusMetric { dry_run: true, ..metric() }]));
    trial.pass(1, (1, true), Some(&values(9.0)));
    trial.good_traffic();
    assert_eq!(trial.outcome(false), Some(VerdictOutcome::Pass));
    assert!(trial.judge.sources()[0].starts_with("errors (dry run): 0 good, 1 bad"), "{:?}", trial.judge.sources());
    assert_eq!(trial.judge.evidence()["prometheus"][0]["settled"], "fail");
}

#[test]
fn what_was_measured_outlives_a_crash_and_what_was_asked_is_asked_again() {
    let mut trial = Trial::new(guard(&[], vec![PrometheusMetric { initial_delay: Timespan::seconds(3), ..metric() }]));
    trial.pass(3, (1, true), Some(&values(0.0)));
    assert_eq!(trial.asked, 0, "it waits");
    trial.pass(1, (1, true), Some(&values(0.0)));
    assert_eq!(trial.asked, 1);
    trial.pass(2, (1, true), None);
    assert_eq!(trial.asked, 2);
    trial.judge = Judge::resume(&trial.guard, false, trial.judge.memory().as_ref());
    trial.pass(1, (1, true), Some(&values(0.0)));
    assert_eq!(trial.asked, 3, "at once");
    trial.good_traffic();
    assert_eq!(trial.outcome(false), Some(VerdictOutcome::Pass));
}

#[test]
fn a_service_without_requests_is_judged_by_its_sources_alone() {
    let mut trial = Trial::new(guard(&[], vec![metric()]));
    trial.judge = trial.judge.blind(true);
    trial.pass(1, (1, true), Some(&values(0.0)));
    assert_eq!(trial.outcome(false), None);
    trial.pass(2, (1, true), Some(&values(0.0)));
    assert_eq!(trial.outcome(false), Some(VerdictOutcome::Pass));
    let nobody = Judge::new(&guard(&[], vec![]), false).blind(true);
    assert_eq!(nobody.verdict(true).unwrap().0, VerdictOutcome::Error);
}
