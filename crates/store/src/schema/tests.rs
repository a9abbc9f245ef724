use super::*;

const V2: &str = "CREATE TABLE extra (id INTEGER PRIMARY KEY) STRICT;";

fn tables(connection: &Connection) -> Vec<String> {
    let mut statement =
        connection.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

#[test]
fn an_older_format_is_brought_up_to_date_with_its_content() {
    let home = tempfile::tempdir().unwrap();
    let old = open_writer(home.path()).unwrap();
    row::put_setting(&old, "a", &1.into()).unwrap();
    drop(old);
    let new = open_writer_with(home.path(), &[V1, V2]).unwrap();
    assert!(tables(&new).contains(&"extra".to_owned()));
    assert_eq!(row::setting(&new, "a").unwrap(), Some(1.into()));
}

#[test]
fn a_migration_that_fails_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    drop(open_writer(home.path()).unwrap());
    assert!(open_writer_with(home.path(), &[V1, V2, "CREATE TABLE events (oops INTEGER)"]).is_err());
    let unharmed = open_writer(home.path()).unwrap();
    assert!(!tables(&unharmed).contains(&"extra".to_owned()));
}

#[test]
fn a_newer_format_is_refused_and_named() {
    let home = tempfile::tempdir().unwrap();
    drop(open_writer_with(home.path(), &[V1, V2]).unwrap());
    let Err(OpenError::Format { found, supported, .. }) = open_writer(home.path()) else { panic!("it was opened") };
    assert_eq!((found, supported), (2, 1));
}

#[test]
fn a_half_made_database_is_no_state() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join(NEW), b"half").unwrap();
    drop(open_writer(home.path()).unwrap());
    assert!(!home.path().join(NEW).exists());
}

#[test]
fn every_commit_is_synced() {
    let home = tempfile::tempdir().unwrap();
    let connection = open_writer(home.path()).unwrap();
    let level: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
    assert_eq!(level, 2, "FULL");
}
