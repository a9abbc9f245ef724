//! Torn and garbled tails: whatever part of the write-ahead log reached the disk, the state opens with a prefix of the
//! commits, and never with half of one.

use std::{fs, path::Path};

use orchestra_model::record::Change;
use orchestra_store::Store;
use proptest::prelude::*;

use crate::{
    crash::whole_launches,
    fixture::{NOW, environment, event, id, journal, launch, open},
};

/// Database and log of a state that was not closed.
struct Snapshot {
    database: Vec<u8>,
    log: Vec<u8>,
}

fn snapshot(home: &Path) -> Snapshot {
    // The writer is idle: every commit was acknowledged.
    Snapshot { database: fs::read(home.join("state.db")).unwrap(), log: fs::read(home.join("state.db-wal")).unwrap() }
}

fn reopen(database: &[u8], log: &[u8]) -> (tempfile::TempDir, Store) {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("state.db"), database).unwrap();
    fs::write(home.path().join("state.db-wal"), log).unwrap();
    let store = Store::open(home.path(), || NOW).unwrap();
    (home, store)
}

/// How many launches a reader without the lock sees, once with the index that a killed server leaves behind and once
/// without.
fn look(database: &[u8], log: &[u8]) -> usize {
    let counts = [false, true].map(|index| {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("state.db"), database).unwrap();
        fs::write(home.path().join("state.db-wal"), log).unwrap();
        if index {
            fs::write(home.path().join("state.db-shm"), vec![0; 32_768]).unwrap();
        }
        let reader = orchestra_store::open_read_only(home.path()).unwrap().unwrap();
        reader.state(&id()).unwrap().map_or(0, |state| state.instances.len())
    });
    assert_eq!(counts[0], counts[1]);
    counts[0]
}

#[test]
fn a_log_cut_or_garbled_anywhere_gives_a_prefix() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    for number in 1..=12 {
        store.commit_blocking(launch(number)).unwrap();
    }
    let Snapshot { database, log } = snapshot(home.path());
    let mut most = 0;
    // Prime, so that cuts fall everywhere within frames and pages; and each boundary of a frame exactly.
    let frame = 24 + 4096;
    let boundaries = (0..).map(|n| 32 + n * frame).take_while(|at| *at <= log.len());
    let mut cuts: Vec<usize> =
        (0..log.len()).step_by(2039).chain(boundaries).chain([1, 23, 31, 33, 40]).chain([log.len()]).collect();
    cuts.sort_unstable();
    let mut before = 0;
    for cut in cuts {
        // Looking does not depend on the repair that opening makes.
        let looked = look(&database, &log[..cut]);
        let (_home, store) = reopen(&database, &log[..cut]);
        let there = whole_launches(&store);
        assert!(there.iter().copied().eq(1..=u32::try_from(there.len()).unwrap()), "cut at {cut}: {there:?}");
        assert_eq!(looked, there.len(), "cut at {cut}: read-only shows another state");
        assert!(there.len() >= before, "cut at {cut}: a longer log has less in it");
        before = there.len();
        most = most.max(there.len());
        // The same length, with rubbish where the rest would be.
        let mut garbled = log.clone();
        garbled[cut..].iter_mut().for_each(|byte| *byte ^= 0x5a);
        assert_eq!(look(&database, &garbled), there.len(), "garbled from {cut}: read-only shows another state");
        let (_home, store) = reopen(&database, &garbled);
        assert_eq!(whole_launches(&store), there, "garbled from {cut}");
        // What opened can be written on.
        store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
        store.commit_blocking(launch(100)).unwrap();
    }
    assert_eq!(most, 12);
}

/// What readers see, for comparison.
fn view(store: &Store) -> String {
    store.reader().verify().unwrap();
    let events = store.reader().events(&orchestra_store::EventFilter::default()).unwrap();
    let journal = store.reader().journal_tail(1000).unwrap();
    let state = store.reader().state(&id()).unwrap();
    format!("{events:?}\n{journal:?}\n{state:?}")
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        "[a-z]{0,300}".prop_map(|cause| Change::Event(Box::new(event(cause)))),
        "[a-z]{1,20}".prop_map(|key| journal(key, orchestra_model::record::JournalKind::Intent)),
        "/[a-z]{1,3000}".prop_map(|source| {
            let mut record = environment();
            record.source = source;
            Change::Environment(record)
        }),
        (1..40_u32).prop_map(|n| Change::Instance(Box::new(crate::fixture::instance(n)))),
        (1..40_u32).prop_map(|n| Change::ForgetInstance(id(), crate::fixture::instance(n).id)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_crash_index_recovers_a_prefix(
        commits in prop::collection::vec(prop::collection::vec(change(), 1..6), 1..12),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 4),
    ) {
        let home = tempfile::tempdir().unwrap();
        let store = open(home.path());
        let mut views = vec![view(&store)];
        store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
        views.push(view(&store));
        for commit in commits {
            store.commit_blocking(commit).unwrap();
            views.push(view(&store));
        }
        let Snapshot { database, log } = snapshot(home.path());
        for (cut, flip) in cuts {
            let cut = cut.index(log.len() + 1);
            let mut torn = log[..cut].to_vec();
            if let Some(last) = torn.last_mut() {
                *last ^= flip;
            }
            let (_home, store) = reopen(&database, &torn);
            prop_assert!(views.contains(&view(&store)), "cut at {cut} of {}", log.len());
        }
        let (_home, whole) = reopen(&database, &log);
        prop_assert_eq!(&view(&whole), views.last().unwrap());
    }
}
