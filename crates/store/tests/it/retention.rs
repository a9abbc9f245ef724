//! History is bounded: old events, plans and desired states go, what is in force or open stays.

use orchestra_model::{
    ReleaseNumber, RunId,
    record::{Change, JournalKind},
};
use orchestra_store::EventFilter;

use crate::fixture::{begin, environment, event, id, journal, open, succeed};

#[test]
fn the_last_hundred_thousand_events_and_every_open_intent_are_kept() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    store.commit_blocking(vec![journal("still open", JournalKind::Intent)]).unwrap();
    let many = || {
        (0..500)
            .flat_map(|_| {
                [
                    Change::Event(Box::new(event("e"))),
                    journal("k", JournalKind::Intent),
                    journal("k", JournalKind::Done),
                ]
            })
            .collect::<Vec<_>>()
    };
    // 104,000 events, 208,001 lines of the journal.
    for _ in 0..208 {
        store.commit_blocking(many()).unwrap();
    }
    // Cutting comes after the answer; the next answer comes after the cutting.
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let events = store.reader().events(&EventFilter { limit: usize::MAX, ..EventFilter::default() }).unwrap();
    assert_eq!(events.last().unwrap().sequence, 104_000);
    assert!((100_000..102_000).contains(&events.len()), "{} events", events.len());
    let lines = store.reader().journal_tail(usize::MAX).unwrap().len();
    assert!((100_000..110_000).contains(&lines), "{lines} lines");
    let open_intents = store.reader().open_intents().unwrap();
    assert_eq!(open_intents.iter().map(|line| line.entry.key.as_str()).collect::<Vec<_>>(), ["still open"]);
    drop(store);
    assert_eq!(
        open(home.path()).commit_blocking(vec![Change::Event(Box::new(event("e")))]).unwrap().events[0].sequence,
        104_001
    );
}

#[test]
fn fifty_releases_keep_what_they_ask_for_and_so_does_the_stable_one() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(begin(1, None)).unwrap();
    store.commit_blocking(succeed(1, None)).unwrap();
    // Release 1 stays in force, all others fail.
    for number in 2..=70 {
        store.commit_blocking(begin(number, Some(1))).unwrap();
        let mut changes = succeed(number, None);
        changes[0] = Change::ReleaseState(id(), ReleaseNumber(number), orchestra_model::record::ReleaseState::Failed);
        let Change::Environment(record) = &mut changes[2] else { unreachable!() };
        record.stable = Some(ReleaseNumber(1));
        store.commit_blocking(changes).unwrap();
    }
    store.commit_blocking(vec![]).unwrap();
    let releases = store.reader().releases(&id(), 1000).unwrap();
    assert_eq!(releases.len(), 70, "old ones are compacted, not gone");
    let kept: Vec<u64> = releases.iter().filter(|r| r.kept).map(|r| r.number.0).rev().collect();
    assert_eq!(kept, std::iter::once(1).chain(21..=70).collect::<Vec<_>>());
    assert!(store.reader().release(&id(), ReleaseNumber(1)).unwrap().is_some());
    assert!(store.reader().release(&id(), ReleaseNumber(20)).unwrap().is_none());
    assert!(store.reader().release(&id(), ReleaseNumber(21)).unwrap().is_some());
    let plan = |run| store.reader().run(RunId(run)).unwrap().unwrap().plan;
    assert!(plan(20).desired.is_none());
    assert!(plan(21).desired.is_some());
    store.reader().verify().unwrap();
}
