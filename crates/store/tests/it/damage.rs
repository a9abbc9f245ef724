//! Damage is named, never papered over, and never answered by starting anew.

use std::fs;

use orchestra_model::{
    RunId,
    record::{Change, StepState},
};
use orchestra_store::{EventFilter, OpenError, ReadError, Reader, Store, open_read_only};
use rusqlite::Connection;

use crate::fixture::{NOW, begin, environment, id, launch, open, resource, succeed};

fn filled() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(begin(1, None)).unwrap();
    store.commit_blocking(succeed(1, None)).unwrap();
    store.commit_blocking(begin(2, Some(1))).unwrap();
    store.commit_blocking(vec![Change::Resource(Box::new(resource("v0", "/srv/2")))]).unwrap();
    store.commit_blocking(vec![Change::Step(RunId(2), "volume.v0".parse().unwrap(), StepState::Running)]).unwrap();
    for number in 1..=200 {
        store.commit_blocking(launch(number)).unwrap();
    }
    drop(store);
    // All of it into the database itself.
    let connection = Connection::open(home.path().join("state.db")).unwrap();
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    home
}

/// Something that befalls the database.
type Harm = fn(&std::path::Path);

fn open_error(home: &std::path::Path) -> OpenError {
    match Store::open(home, || NOW) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

#[test]
fn an_empty_cut_foreign_or_missing_database_is_damage() {
    let cases: [(&str, Harm); 5] = [
        ("empty", |db| fs::write(db, b"").unwrap()),
        ("cut", |db| fs::OpenOptions::new().write(true).open(db).unwrap().set_len(5 * 4096).unwrap()),
        ("text", |db| fs::write(db, "not a database at all, but text of some length".repeat(200)).unwrap()),
        ("zeros", |db| fs::write(db, vec![0; 40_960]).unwrap()),
        ("foreign", |db| {
            fs::remove_file(db).unwrap();
            Connection::open(db).unwrap().execute_batch("CREATE TABLE other (id INTEGER)").unwrap();
        }),
    ];
    for (name, harm) in cases {
        let home = filled();
        let database = home.path().join("state.db");
        harm(&database);
        let before = fs::read(&database).unwrap();
        let error = open_error(home.path());
        assert!(matches!(error, OpenError::Damaged { .. }), "{name}: {error:?}");
        assert_eq!(error.diagnostic().code.as_str(), "ORC0403", "{name}");
        assert!(error.diagnostic().help.is_some_and(|help| help.contains("mv ")), "{name}");
        assert_eq!(fs::read(&database).unwrap(), before, "{name}: it was written to");
        if name != "cut" {
            // Without the check of every page, which a look is too short for.
            assert!(matches!(open_read_only(home.path()), Err(OpenError::Damaged { .. })), "{name}");
        }
    }
}

#[test]
fn a_log_without_its_database_is_damage() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.commit_blocking(vec![Change::Environment(environment())]).unwrap();
    let left = tempfile::tempdir().unwrap();
    fs::copy(home.path().join("state.db-wal"), left.path().join("state.db-wal")).unwrap();
    assert!(matches!(open_error(left.path()), OpenError::Damaged { .. }));
    assert!(matches!(open_read_only(left.path()), Err(OpenError::Damaged { .. })));
    assert!(!left.path().join("state.db").exists());
}

#[test]
fn a_newer_format_is_refused() {
    let home = filled();
    let connection = Connection::open(home.path().join("state.db")).unwrap();
    connection.pragma_update(None, "user_version", 2).unwrap();
    drop(connection);
    let error = open_error(home.path());
    assert!(matches!(error, OpenError::Format { found: 2, supported: 1, .. }), "{error}");
    assert_eq!(error.diagnostic().code.as_str(), "ORC0402");
}

/// Every byte of the file, in steps: what opens must read back right or say that it is damaged.
#[test]
fn no_flipped_byte_goes_unnoticed() {
    let home = filled();
    let bytes = fs::read(home.path().join("state.db")).unwrap();
    let all = |reader: &Reader| -> Result<_, ReadError> {
        Ok((
            reader.environments()?,
            reader.state(&id())?,
            reader.events(&EventFilter { environment: Some(id()), ..EventFilter::default() })?,
            reader.open_intents()?,
            reader.journal_tail(1000)?,
            reader.releases(&id(), 10)?,
            reader.run(RunId(1))?,
        ))
    };
    let good = all(&open_read_only(home.path()).unwrap().unwrap()).unwrap();
    let (mut noticed, mut harmless) = (0, 0);
    let step = std::env::var("ORCHESTRA_STORE_FLIPS").ok().and_then(|text| text.parse().ok()).unwrap_or(509);
    for at in (0..bytes.len()).step_by(step) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x04;
        let copy = tempfile::tempdir().unwrap();
        fs::write(copy.path().join("state.db"), &flipped).unwrap();
        let store = match Store::open(copy.path(), || NOW) {
            Ok(store) => store,
            // Not `Write` or a panic: the words must lead to the cause.
            Err(OpenError::Damaged { .. } | OpenError::Format { .. }) => {
                noticed += 1;
                continue;
            }
            Err(error) => panic!("byte {at}: {error:?}"),
        };
        let reader = store.reader();
        match all(reader) {
            // In a part that holds nothing.
            Ok(read) => {
                assert!(read == good, "byte {at} changed the answer unnoticed");
                harmless += 1;
            }
            Err(ReadError::Damaged(_) | ReadError::Database(_)) => noticed += 1,
            Err(error) => panic!("byte {at}: {error:?}"),
        }
    }
    println!("{noticed} noticed, {harmless} harmless");
    assert!(noticed > 100, "{noticed} noticed, {harmless} harmless");
}

#[test]
fn a_database_that_is_a_directory_is_refused() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("state.db")).unwrap();
    let error = open_error(home.path());
    assert!(matches!(error, OpenError::Database { .. } | OpenError::Damaged { .. }), "{error:?}");
}
