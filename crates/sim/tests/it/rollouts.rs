//! Schedules of rollouts: 1,000 of them in the normal run.
//!
//! `ORCHESTRA_ROLLOUT_SEED=n` replays one with its trace; `ORCHESTRA_ROLLOUT_SEEDS=1000000` plays that many, from
//! `ORCHESTRA_ROLLOUT_FIRST` on, and `ORCHESTRA_LONG=1` a million.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use orchestra_sim::{rollouts, rollouts::Report};

use crate::variable;

/// Schedules of the normal run and of the long one.
const COUNTS: (u64, u64) = (1000, 1_000_000);

/// Schedules that once broke a law, rare ones: a set that became smaller took away what stood in for the crashed instances
/// of another, and an instance was launched and stopped in one batch. With the last the law was too narrow: it counted by
/// the release before while the set still had the size of the one that was turned back.
const ONCE_BROKEN: [u64; 9] = [348_725, 642_171, 676_946, 721_667, 816_635, 931_478, 296_450, 638_830, 3_009_944];

#[test]
fn what_once_broke_a_law_obeys_it() {
    for seed in ONCE_BROKEN {
        if let Err(failure) = rollouts::run(seed, false) {
            panic!("schedule {seed}: {}", failure.law);
        }
    }
}

#[test]
fn every_schedule_obeys_the_laws() {
    if let Some(one) = variable("ORCHESTRA_ROLLOUT_SEED") {
        match rollouts::run(one, true) {
            Ok(report) => println!("schedule {one} obeys the laws: {report:?}"),
            Err(failure) => {
                println!("{}", failure.trace.unwrap_or_default());
                panic!("schedule {one}: {}", failure.law);
            }
        }
        return;
    }
    let long = std::env::var_os("ORCHESTRA_LONG").is_some_and(|value| value == "1");
    let first = variable("ORCHESTRA_ROLLOUT_FIRST").unwrap_or(1);
    let count = variable("ORCHESTRA_ROLLOUT_SEEDS").unwrap_or(if long { COUNTS.1 } else { COUNTS.0 });
    let next = AtomicU64::new(first);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let began = Instant::now();
    let results = std::thread::scope(|scope| {
        let work = || {
            let (mut total, mut failures) = (Report::default(), Vec::new());
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + count || failures.len() >= 10 {
                    return (total, failures);
                }
                match std::panic::catch_unwind(|| rollouts::run(seed, false)) {
                    Ok(Ok(report)) => total.add(&report),
                    Ok(Err(failure)) => failures.push((seed, failure.law)),
                    Err(_) => failures.push((seed, "it panicked".to_owned())),
                }
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("workers catch panics")).collect::<Vec<_>>()
    });
    let mut total = Report::default();
    for (report, _) in &results {
        total.add(report);
    }
    let mut failures: Vec<_> = results.into_iter().flat_map(|(_, failures)| failures).collect();
    failures.sort();
    let seconds = began.elapsed().as_secs_f64();
    println!("{count} schedules in {seconds:.1} s on {threads} threads: {total:#?}");
    for (seed, law) in &failures {
        println!(
            "schedule {seed} {law}\n  replay: ORCHESTRA_ROLLOUT_SEED={seed} cargo test -p orchestra-sim --test it rollouts -- --nocapture"
        );
    }
    assert!(failures.is_empty(), "{} schedules broke a law", failures.len());
}
