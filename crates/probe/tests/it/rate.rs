//! Rates, limits and removal, on tokio's paused clock.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use orchestra_model::launch::{ExecOutcome, Exit};
use orchestra_probe::{Leaf, Limits, Outcomes, ProbeId, Prober, Target};
use orchestra_task::TaskTree;
use tokio::time::{Instant, timeout_at};

use crate::{
    commands::exec,
    world::{Commands, next},
};

/// A prober whose commands each take `takes`; beside it how many ran at one time at most.
fn prober(takes: Duration, limits: Limits) -> (Prober, Outcomes, Arc<AtomicUsize>) {
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let commands = Commands::new(move |_| {
        let (running, most) = (running.clone(), most.clone());
        Box::pin(async move {
            most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::time::sleep(takes).await;
            running.fetch_sub(1, SeqCst);
            Ok(ExecOutcome { exit: Some(Exit::Code(0)), output: String::new() })
        })
    });
    let (prober, outcomes) = Prober::new(Arc::new(commands), &TaskTree::new(), limits);
    (prober, outcomes, seen)
}

fn target(id: u64, every: Duration) -> Target {
    Target { id: ProbeId(id), leaf: Leaf::Exec(exec("check")), every, timeout: Duration::from_mins(1) }
}

const SECOND: Duration = Duration::from_secs(1);
const WIDE: Limits = Limits { sockets: 100_000, commands: 100_000 };

#[tokio::test(start_paused = true)]
async fn the_rate_is_fixed_and_the_load_is_spread() {
    let (prober, mut outcomes, _) = prober(Duration::from_millis(20), WIDE);
    let begun = Instant::now();
    for id in 0..2_000 {
        prober.set(target(id, SECOND * 10));
    }
    let mut times = BTreeMap::<u64, Vec<Duration>>::new();
    while let Ok(outcome) = timeout_at(begun + SECOND * 100, outcomes.recv()).await {
        let outcome = outcome.unwrap();
        times.entry(outcome.id.0).or_default().push(begun.elapsed().saturating_sub(outcome.took));
    }
    assert_eq!(times.len(), 2_000);
    let mut per_second = [0; 100];
    for starts in times.values() {
        assert!(starts[0] < Duration::from_millis(50), "the first check is at once: {:?}", starts[0]);
        // The second may be left out if its slot comes while the first check runs.
        assert!((10..=11).contains(&starts.len()), "{}", starts.len());
        let grid = starts[1].as_millis() % 10_000;
        for start in &starts[1..] {
            let off = (start.as_millis() % 10_000).abs_diff(grid);
            assert!(off <= 2 || off >= 9_998, "drift: {start:?} against {grid} ms");
            per_second[usize::try_from(start.as_secs()).unwrap()] += 1;
        }
    }
    for n in &per_second[..99] {
        assert!((120..=280).contains(n), "200 a second on average, not {n}");
    }
    let lateness = prober.lateness();
    assert_eq!(lateness.first.count(), 2_000);
    assert!(lateness.repeated.max() <= Duration::from_millis(3), "{:?}", lateness.repeated.max());
}

#[tokio::test(start_paused = true)]
async fn a_slow_check_is_never_asked_twice_at_once() {
    let (prober, mut outcomes, most) = prober(Duration::from_millis(2_500), WIDE);
    let begun = Instant::now();
    prober.set(target(1, SECOND));
    let mut ended = 0;
    while timeout_at(begun + SECOND * 60, outcomes.recv()).await.is_ok() {
        ended += 1;
    }
    assert_eq!(most.load(SeqCst), 1);
    assert!((19..=20).contains(&ended), "{ended}");
    assert!((38..=41).contains(&prober.lateness().skipped), "{}", prober.lateness().skipped);
}

#[tokio::test(start_paused = true)]
async fn checks_beyond_the_limit_wait_in_order_and_count_as_late() {
    let (prober, mut outcomes, most) = prober(SECOND, Limits { sockets: 1, commands: 2 });
    for id in 0..6 {
        prober.set(target(id, SECOND * 100));
    }
    let mut order = Vec::new();
    for _ in 0..6 {
        let outcome = next(&mut outcomes).await;
        assert!(outcome.took < SECOND * 2, "waiting for a place is not part of the check");
        order.push(outcome.id.0);
    }
    assert_eq!(most.load(SeqCst), 2);
    order.chunks_mut(2).for_each(<[u64]>::sort_unstable);
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    let first = prober.lateness().first;
    assert!(first.max() >= SECOND * 2 && first.max() < SECOND * 3, "{:?}", first.max());
}

#[tokio::test(start_paused = true)]
async fn nothing_comes_after_removal_and_only_the_new_after_a_change() {
    let (prober, mut outcomes, _) = prober(Duration::from_millis(10), WIDE);
    prober.set(target(1, SECOND));
    prober.set(target(2, SECOND * 10));
    next(&mut outcomes).await;
    // Several outcomes of target 1 wait in the channel by now.
    tokio::time::sleep(SECOND * 5).await;
    prober.remove(ProbeId(1));
    let end = Instant::now() + SECOND * 30;
    let mut of_two = 0;
    while let Ok(outcome) = timeout_at(end, outcomes.recv()).await {
        assert_eq!(outcome.unwrap().id, ProbeId(2));
        of_two += 1;
    }
    assert!(of_two >= 3, "{of_two}");

    // A change is asked at once; the same again changes nothing.
    tokio::time::sleep(SECOND * 15).await;
    prober.set(target(2, SECOND * 1_000));
    let changed = Instant::now();
    prober.set(target(2, SECOND * 1_000));
    assert_eq!(next(&mut outcomes).await.id, ProbeId(2));
    assert!(changed.elapsed() < SECOND, "what waited of its former self was dropped, the new check came at once");
    assert!(timeout_at(changed + SECOND / 2, outcomes.recv()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_prober_that_is_dropped_ends_its_outcomes() {
    let (prober, mut outcomes, _) = prober(SECOND, WIDE);
    prober.set(target(1, SECOND));
    drop(prober);
    while tokio::time::timeout(SECOND * 10, outcomes.recv()).await.expect("the channel ends").is_some() {}
}
