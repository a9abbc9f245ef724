//! Seeds: 50 of them in the normal run.
//!
//! `ORCHESTRA_SIM_SEED=n` replays one with its trace; `ORCHESTRA_SIM_SEEDS=100000` runs that many.

use std::sync::atomic::{AtomicU64, Ordering};

use orchestra_sim::seed;

use crate::variable;

#[test]
fn every_seed_obeys_the_laws() {
    if let Some(one) = variable("ORCHESTRA_SIM_SEED") {
        match seed::run(one, true) {
            Ok(report) => println!("seed {one} obeys the laws: {report:?}"),
            Err(failure) => {
                println!("{}", failure.trace.unwrap_or_default());
                panic!("seed {one}: {}", failure.law);
            }
        }
        return;
    }
    let first = variable("ORCHESTRA_SIM_FIRST").unwrap_or(1);
    let count = variable("ORCHESTRA_SIM_SEEDS").unwrap_or(50);
    let next = AtomicU64::new(first);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let (mut reports, mut failures) = (Vec::new(), Vec::new());
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= first + count || failures.len() >= 10 {
                            return (reports, failures);
                        }
                        let outcome = std::panic::catch_unwind(|| seed::run(seed, false));
                        match outcome {
                            Ok(Ok(report)) => reports.push(report),
                            Ok(Err(failure)) => failures.push((seed, failure.law)),
                            Err(_) => failures.push((seed, "it panicked".to_owned())),
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("workers catch panics")).collect::<Vec<_>>()
    });
    let reports: Vec<_> = results.iter().flat_map(|(reports, _)| reports).collect();
    let mut failures: Vec<_> = results.iter().flat_map(|(_, failures)| failures).collect();
    failures.sort();
    let sum = |of: fn(&seed::Report) -> u64| reports.iter().map(|report| of(report)).sum::<u64>();
    println!(
        "{} seeds: {} steps, {} launches, {} crashes of the server; runs: {} succeeded, {} failed, {} cancelled",
        reports.len(),
        sum(|r| r.steps),
        sum(|r| r.launches as u64),
        sum(|r| u64::from(r.crashes)),
        sum(|r| u64::from(r.runs.0)),
        sum(|r| u64::from(r.runs.1)),
        sum(|r| u64::from(r.runs.2)),
    );
    for (seed, law) in &failures {
        println!(
            "seed {seed} {law}\n  replay: ORCHESTRA_SIM_SEED={seed} cargo test -p orchestra-sim --test it seeds -- --nocapture"
        );
    }
    assert!(failures.is_empty(), "{} seeds broke a law", failures.len());
}
