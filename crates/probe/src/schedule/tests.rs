use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn at(millis: u64) -> Now {
    Now::at(Duration::from_millis(millis))
}

/// All checks until `end`, each ending `takes` after it began, with the driver awake at every deadline.
fn run(schedule: &mut Schedule<()>, end: Now, takes: Duration) -> Vec<(Now, ProbeId)> {
    let mut log = Vec::new();
    let mut ends: BTreeSet<(Now, ProbeId)> = BTreeSet::new();
    while let Some(now) = schedule.deadline().filter(|now| *now <= end) {
        while let Some(&(ended, id)) = ends.first().filter(|(ended, _)| *ended <= now) {
            ends.remove(&(ended, id));
            schedule.finished(id);
        }
        while let Some(due) = schedule.next_due(now) {
            log.push((due.at, due.id));
            ends.insert((now + takes, due.id));
        }
    }
    log
}

#[test]
fn first_at_once_then_a_grid_that_does_not_drift() {
    let mut schedule = Schedule::new();
    let id = ProbeId(7);
    schedule.set(at(500), id, SECOND, ());
    let first = schedule.next_due(at(500)).expect("due at once");
    assert!(first.first);
    schedule.finished(id);
    let phase = phase(id, SECOND);
    // The driver comes 300 ms late each time; the grid stays.
    for n in 0..1_000u32 {
        let slot = at(500) + phase + SECOND * n;
        assert_eq!(schedule.deadline(), Some(slot));
        assert!(schedule.next_due(slot + Duration::from_millis(300)).is_some_and(|due| due.at == slot && !due.first));
        schedule.finished(id);
    }
    assert_eq!(schedule.skipped(), 0);
}

#[test]
fn a_slot_during_a_running_check_is_left_out() {
    let mut schedule = Schedule::new();
    schedule.set(at(0), ProbeId(1), SECOND, ());
    // 2.5 intervals long: of every three slots two are left out.
    let log = run(&mut schedule, at(60_000), Duration::from_millis(2_500));
    assert!((20..=21).contains(&log.len()), "{}", log.len());
    assert_eq!(log.len() as u64 + schedule.skipped(), 61);
    for pair in log[1..].windows(2) {
        assert_eq!(pair[1].0 - pair[0].0, SECOND * 3);
    }
}

#[test]
fn no_burst_after_a_standstill() {
    let mut schedule = Schedule::new();
    schedule.set(at(0), ProbeId(1), SECOND, ());
    assert!(schedule.next_due(at(0)).is_some());
    schedule.finished(ProbeId(1));
    let now = at(3_600_500);
    assert!(schedule.next_due(now).is_some(), "the slot that passed is asked once");
    schedule.finished(ProbeId(1));
    assert!(schedule.next_due(now).is_none());
    assert!((3_599..=3_600).contains(&schedule.skipped()), "{}", schedule.skipped());
    assert!(schedule.deadline().is_some_and(|next| next > now && next - now <= SECOND));
}

#[test]
fn ten_thousand_targets_are_spread() {
    let mut schedule = Schedule::new();
    for id in 0..10_000 {
        schedule.set(Now::ZERO, ProbeId(id), SECOND * 10, ());
    }
    let log = run(&mut schedule, at(20_000), Duration::ZERO);
    assert_eq!(log.len(), 30_000, "one at once and one per interval");
    // The busiest 10 ms of the second interval; 10 on average, and an even hash stays near that.
    let mut slots = vec![0u32; 1_000];
    for (due, _) in log.iter().filter(|(due, _)| *due > at(10_000)) {
        slots[usize::try_from((*due - at(10_000)).as_millis() / 10).unwrap().min(999)] += 1;
    }
    let busiest = *slots.iter().max().unwrap();
    assert!(busiest <= 30, "{busiest} checks in 10 ms");
}

#[test]
fn replaced_and_removed_targets_leave_nothing() {
    let mut schedule = Schedule::new();
    for n in 0..100 {
        assert_eq!(schedule.set(at(n), ProbeId(1), SECOND * 3_600, n), n.checked_sub(1));
    }
    assert_eq!(schedule.queue.len(), 1);
    assert_eq!(schedule.remove(ProbeId(1)), Some(99));
    assert_eq!(schedule.remove(ProbeId(1)), None);
    assert_eq!(schedule.deadline(), None);
    assert!(schedule.entries.is_empty());
}

proptest! {
    #[test]
    fn gaps_are_never_longer_than_the_interval(id: u64, every in 1u64..100_000, start in 0u64..1_000_000) {
        let every = Duration::from_millis(every);
        let mut schedule = Schedule::new();
        schedule.set(at(start), ProbeId(id), every, ());
        let log = run(&mut schedule, at(start) + every * 5, Duration::ZERO);
        prop_assert!(log.len() >= 6);
        prop_assert_eq!(log[0].0, at(start));
        prop_assert!(log[1].0 - log[0].0 <= every && log[1].0 > log[0].0);
        for pair in log[1..].windows(2) {
            prop_assert_eq!(pair[1].0 - pair[0].0, every);
        }
    }
}
