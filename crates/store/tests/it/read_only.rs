//! Reading without the lock: beside a running server, after a killed one, and without a trace.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use orchestra_model::record::Change;
use orchestra_store::{OpenError, open_read_only};

use crate::fixture::{environment, id, launch, open};

/// Names, contents and times of change of all files, and of the directory itself.
fn trace(home: &Path) -> BTreeMap<String, (Vec<u8>, std::time::SystemTime)> {
    let mut trace: BTreeMap<_, _> = fs::read_dir(home)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let content = fs::read(entry.path()).unwrap();
            (entry.file_name().into_string().unwrap(), (content, entry.metadata().unwrap().modified().unwrap()))
        })
        .collect();
    trace.insert(".".to_owned(), (Vec::new(), fs::metadata(home).unwrap().modified().unwrap()));
    trace
}

fn copy(from: &Path, names: &[&str]) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for name in names {
        fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    to
}

/// Reads everything twice, through a reader and its clone, and says how many instances there are.
fn look(home: &Path) -> usize {
    let reader = open_read_only(home).unwrap().unwrap();
    reader.verify().unwrap();
    reader.clone().state(&id()).unwrap().map_or(0, |state| state.instances.len())
}

#[test]
fn no_state_is_no_error_and_none_is_made() {
    let home = tempfile::tempdir().unwrap();
    assert!(open_read_only(home.path()).unwrap().is_none());
    assert!(open_read_only(&home.path().join("missing")).unwrap().is_none());
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn a_running_server_is_looked_at_without_a_trace() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let reader = open_read_only(home.path()).unwrap().unwrap();
    assert!(reader.state(&id()).unwrap().is_none());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    for number in 1..=30 {
        store.commit_blocking(launch(number)).unwrap();
        assert_eq!(reader.state(&id()).unwrap().unwrap().instances.len(), number as usize, "the same reader follows");
    }
    let before = trace(home.path());
    assert_eq!(look(home.path()), 30);
    assert_eq!(trace(home.path()), before);
}

#[test]
fn a_stopped_server_is_looked_at_without_a_trace() {
    let home = tempfile::tempdir().unwrap();
    // Never written, closed at once; then closed after commits.
    drop(open(home.path()));
    let before = trace(home.path());
    assert_eq!(look(home.path()), 0);
    assert_eq!(trace(home.path()), before);
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    store.commit_blocking(launch(1)).unwrap();
    drop(store);
    let before = trace(home.path());
    assert_eq!(look(home.path()), 1);
    assert_eq!(trace(home.path()), before);
}

#[test]
fn a_killed_server_is_looked_at_without_a_trace() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    for number in 1..=30 {
        store.commit_blocking(launch(number)).unwrap();
    }
    // What a killed server leaves behind: nobody holds a lock on these files.
    for names in [&["state.db", "state.db-wal", "state.db-shm", "state.lock"][..], &["state.db", "state.db-wal"]] {
        let left = copy(home.path(), names);
        let before = trace(left.path());
        assert_eq!(look(left.path()), 30, "{names:?}");
        assert_eq!(trace(left.path()), before, "{names:?}");
    }
    // The database alone is an earlier state, but a whole one.
    let left = copy(home.path(), &["state.db"]);
    let before = trace(left.path());
    assert_eq!(look(left.path()), 0);
    assert_eq!(trace(left.path()), before);
}

#[test]
fn a_reader_follows_a_server_that_starts_later() {
    let home = tempfile::tempdir().unwrap();
    drop(open(home.path()));
    for name in ["state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(home.path().join(name));
    }
    let alone = open_read_only(home.path()).unwrap().unwrap();
    assert!(alone.state(&id()).unwrap().is_none());
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    store.commit_blocking(launch(1)).unwrap();
    assert_eq!(alone.state(&id()).unwrap().unwrap().instances.len(), 1);
    drop(store);
    let after_the_end = open_read_only(home.path()).unwrap().unwrap();
    assert_eq!(after_the_end.state(&id()).unwrap().unwrap().instances.len(), 1);
    let store = open(home.path());
    store.commit_blocking(launch(2)).unwrap();
    assert_eq!(after_the_end.state(&id()).unwrap().unwrap().instances.len(), 2);
}

#[test]
fn every_look_during_heavy_writing_is_a_whole_one() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let lookers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let (mut looks, mut last) = (0, 0);
                    while !done.load(Ordering::Relaxed) || looks == 0 {
                        // A new one each time: opening beside a writer is what commands do.
                        let reader = open_read_only(home.path()).unwrap().unwrap();
                        let state = reader.state(&id()).unwrap().unwrap();
                        let there = state.instances.len();
                        assert!(state.instances.keys().map(|id| id.ordinal).eq(1..=u32::try_from(there).unwrap()));
                        assert!(there >= last, "{there} after {last}");
                        (looks, last) = (looks + 1, there);
                    }
                    looks
                })
            })
            .collect();
        // Enough for several checkpoints.
        for number in 1..=1500 {
            store.commit_blocking(launch(number)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        for looker in lookers {
            assert!(looker.join().unwrap() > 0);
        }
    });
    assert_eq!(look(home.path()), 1500);
}

#[test]
fn another_format_or_file_is_refused_without_the_lock_too() {
    let home = tempfile::tempdir().unwrap();
    drop(open(home.path()));
    let connection = rusqlite::Connection::open(home.path().join("state.db")).unwrap();
    connection.pragma_update(None, "user_version", 999).unwrap();
    drop(connection);
    let Err(error) = open_read_only(home.path()) else { panic!("opened") };
    assert!(matches!(error, OpenError::Format { found: 999, .. }), "{error}");
}
