//! Tables, format version and the way from an older format to the current one.
//!
//! The format version is SQLite's `user_version`; `application_id` says that the file is ours. A new file is made under
//! another name, filled, synced and only then renamed, so that a file with the real name is always complete: an empty or
//! missing one beside its write-ahead log is damage, never a fresh start.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags};

use crate::{
    error::{OpenError, is_corrupt},
    row,
    write::Failure,
};

/// Name of the database within the state directory.
pub(crate) const FILE: &str = "state.db";
/// Name of its write-ahead log.
pub(crate) const WAL: &str = "state.db-wal";
/// Name of the index of that log, which processes share as memory.
pub(crate) const SHM: &str = "state.db-shm";
/// Name of a database that is being made.
const NEW: &str = "state.db.new";

/// `ORCH` in ASCII.
pub(crate) const APPLICATION_ID: i64 = 0x4F52_4348;

/// One script per format version: the n-th leads from format n to n + 1. Never edit one that was released.
pub(crate) const MIGRATIONS: &[&str] = &[V1];

const V1: &str = "
    CREATE TABLE settings (key TEXT PRIMARY KEY, json TEXT NOT NULL, sum INTEGER NOT NULL) STRICT, WITHOUT ROWID;

    CREATE TABLE environments (
        id TEXT PRIMARY KEY, generation INTEGER NOT NULL, json TEXT NOT NULL, sum INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- Last ordinal that was given out; raised by the store itself when an instance is written.
    CREATE TABLE ordinals (
        environment TEXT NOT NULL, workload TEXT NOT NULL, release INTEGER NOT NULL, last INTEGER NOT NULL,
        sum INTEGER NOT NULL,
        PRIMARY KEY (environment, workload, release)
    ) STRICT, WITHOUT ROWID;

    -- Desired states by digest: a release, its run's plan and a rollback to it share one.
    CREATE TABLE desired (digest TEXT PRIMARY KEY, json TEXT NOT NULL, sum INTEGER NOT NULL) STRICT;
    CREATE TABLE releases (
        environment TEXT NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL,
        desired TEXT, -- NULL once it is old
        json TEXT NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (environment, number)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX releases_by_desired ON releases (desired) WHERE desired IS NOT NULL;

    CREATE TABLE runs (
        id INTEGER PRIMARY KEY, environment TEXT NOT NULL, generation INTEGER NOT NULL, state TEXT NOT NULL,
        json TEXT NOT NULL, sum INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX runs_by_environment ON runs (environment, id);
    CREATE INDEX runs_that_go_on ON runs (environment) WHERE state IN ('running', 'reverting');
    CREATE TABLE plans (
        run INTEGER PRIMARY KEY, desired TEXT, json TEXT NOT NULL, sum INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX plans_by_desired ON plans (desired) WHERE desired IS NOT NULL;
    CREATE TABLE run_steps (
        run INTEGER NOT NULL, resource TEXT NOT NULL, state TEXT NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (run, resource)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE resources (
        environment TEXT NOT NULL, id TEXT NOT NULL, json TEXT NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (environment, id)
    ) STRICT;
    CREATE TABLE instances (
        environment TEXT NOT NULL, id TEXT NOT NULL, json TEXT NOT NULL, sum INTEGER NOT NULL,
        PRIMARY KEY (environment, id)
    ) STRICT;

    CREATE TABLE journal (
        sequence INTEGER PRIMARY KEY, at INTEGER NOT NULL, json TEXT NOT NULL, sum INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE open_intents (
        key TEXT PRIMARY KEY, sequence INTEGER NOT NULL, sum INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY, environment TEXT NOT NULL, run INTEGER, resource TEXT, instance TEXT,
        json TEXT NOT NULL, sum INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX events_by_environment ON events (environment, sequence);
    CREATE INDEX events_by_run ON events (run, sequence) WHERE run IS NOT NULL;
";

/// Newest format that this version reads and writes.
pub(crate) fn newest() -> i64 {
    version(MIGRATIONS)
}

fn version(migrations: &[&str]) -> i64 {
    i64::try_from(migrations.len()).expect("there are few migrations")
}

/// Makes the directory for its user alone, or makes it so.
pub(crate) fn private_directory(home: &Path) -> Result<(), OpenError> {
    let failed = |operation, source| OpenError::Write { operation, path: home.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(home).map_err(|e| failed("make", e))?;
    let mode = fs::metadata(home).map_err(|e| failed("look at", e))?.mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(home, Permissions::from_mode(0o700))
            .map_err(|e| failed("restrict the permissions of", e))?;
    }
    Ok(())
}

/// Opens the database for its one writer, makes it if there is none, brings it up to date and checks it. The lock must
/// be held.
pub(crate) fn open_writer(home: &Path) -> Result<Connection, OpenError> {
    open_writer_with(home, MIGRATIONS)
}

fn open_writer_with(home: &Path, migrations: &[&str]) -> Result<Connection, OpenError> {
    let path = home.join(FILE);
    let size = match fs::metadata(&path) {
        Ok(metadata) => Some(metadata.len()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(OpenError::Write { operation: "look at", path, source }),
    };
    match size {
        None if has_content(&home.join(WAL)) => {
            return Err(damaged(home, format!("{FILE} is missing, but its write-ahead log {WAL} is there")));
        }
        None => create(home, migrations)?,
        Some(0) => return Err(damaged(home, format!("{FILE} is empty"))),
        Some(_) => {}
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(&path, flags).map_err(|e| refused(home, e))?;
    prepare_writer(home, &connection, migrations)?;
    Ok(connection)
}

fn prepare_writer(home: &Path, connection: &Connection, migrations: &[&str]) -> Result<(), OpenError> {
    let refused = |e| refused(home, e);
    configure(connection).map_err(refused)?;
    // A fault is found before the first write, and reported instead of written over.
    let found = identify(home, connection, version(migrations))?;
    check_tables(home, connection, &migrations[..usize::try_from(found).unwrap_or(0)])?;
    check_structure(home, connection)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(refused)?;
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(refused)?;
    if mode != "wal" {
        return Err(damaged(home, format!("its journal mode is `{mode}`")));
    }
    keep_log_on_close(connection);
    connection.set_prepared_statement_cache_capacity(64);
    if found < version(migrations) {
        migrate(connection, found, migrations).map_err(refused)?;
    }
    check_content(home, connection)
}

/// Compares the tables with those that the migrations make: a flipped letter in a definition would change answers.
pub(crate) fn check_tables(home: &Path, connection: &Connection, migrations: &[&str]) -> Result<(), OpenError> {
    let definitions = |connection: &Connection| -> rusqlite::Result<Vec<String>> {
        let mut statement = connection
            .prepare("SELECT type || ' ' || name || ' ' || tbl_name || ' ' || coalesce(sql, '') FROM sqlite_schema ORDER BY name")?;
        statement.query_map([], |row| row.get(0))?.collect()
    };
    let expected = || -> rusqlite::Result<Vec<String>> {
        let memory = Connection::open_in_memory()?;
        migrate(&memory, 0, migrations)?;
        definitions(&memory)
    };
    let (found, expected) = (definitions(connection), expected());
    if found.map_err(|e| refused(home, e))? == expected.map_err(|e| refused(home, e))? {
        return Ok(());
    }
    Err(damaged(home, "its tables are not those of its format".to_owned()))
}

/// Settings of every connection.
pub(crate) fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)
}

/// The format version, after a look at whose file it is.
pub(crate) fn identify(home: &Path, connection: &Connection, supported: i64) -> Result<i64, OpenError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let application = pragma("application_id").map_err(|e| refused(home, e))?;
    if application != APPLICATION_ID {
        return Err(damaged(home, format!("{FILE} was not written by Orchestra")));
    }
    let found = pragma("user_version").map_err(|e| refused(home, e))?;
    if found > supported || found < 1 {
        return Err(OpenError::Format { home: home.to_owned(), found, supported });
    }
    Ok(found)
}

/// Structure of all pages, and whether indexes fit their tables.
fn check_structure(home: &Path, connection: &Connection) -> Result<(), OpenError> {
    let answer: String =
        connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(|e| refused(home, e))?;
    if answer == "ok" { Ok(()) } else { Err(damaged(home, answer)) }
}

/// The checksums of all rows but the long history, which has them checked when it is read.
fn check_content(home: &Path, connection: &Connection) -> Result<(), OpenError> {
    let history = [row::EVENTS.name, row::JOURNAL.name];
    let mut tables = row::TABLES.iter().filter(|table| !history.contains(&table.name));
    tables.try_for_each(|table| table.check(connection)).map_err(|failure| failed(home, failure))
}

/// A failure of a query during the opening.
pub(crate) fn failed(home: &Path, failure: Failure) -> OpenError {
    match failure {
        Failure::Database(error) => refused(home, error),
        Failure::Damaged(damage) => damaged(home, damage.to_string()),
        Failure::Violation(violation) => damaged(home, violation.to_string()),
    }
}

/// Keeps the write-ahead log when the last connection closes. Readers without the right to write rely on it: a log that
/// comes and goes would have to be made by whoever looks.
fn keep_log_on_close(connection: &Connection) {
    let mut on: std::ffi::c_int = 1;
    #[expect(unsafe_code, reason = "rusqlite has no safe form of this file control")]
    // SAFETY: the handle is valid while `connection` is borrowed; the control reads and writes one int.
    unsafe {
        rusqlite::ffi::sqlite3_file_control(
            connection.handle(),
            c"main".as_ptr(),
            rusqlite::ffi::SQLITE_FCNTL_PERSIST_WAL,
            (&raw mut on).cast(),
        );
    }
}

/// Makes a complete database under another name, then gives it the real one.
fn create(home: &Path, migrations: &[&str]) -> Result<(), OpenError> {
    let new = home.join(NEW);
    let failed = |operation, source| OpenError::Write { operation, path: new.clone(), source };
    for leftover in [NEW, "state.db.new-wal", "state.db.new-shm", "state.db.new-journal"] {
        match fs::remove_file(home.join(leftover)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", e)),
            _ => {}
        }
    }
    // SQLite gives its other files the permissions of this one.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(|e| failed("make", e))?;
    let fill = || -> rusqlite::Result<()> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&new, flags)?;
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
        migrate(&connection, 0, migrations)?;
        connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        connection.close().map_err(|(_, e)| e)
    };
    fill().map_err(|e| refused(home, e))?;
    File::open(&new).and_then(|file| file.sync_all()).map_err(|e| failed("sync", e))?;
    fs::rename(&new, home.join(FILE)).map_err(|e| failed("rename", e))?;
    File::open(home).and_then(|directory| directory.sync_all()).map_err(|e| failed("sync the directory of", e))
}

/// Runs the scripts from format `found` on, all or none.
fn migrate(connection: &Connection, found: i64, migrations: &[&str]) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    for script in migrations.iter().skip(usize::try_from(found).unwrap_or(0)) {
        transaction.execute_batch(script)?;
    }
    transaction.pragma_update(None, "user_version", version(migrations))?;
    transaction.commit()
}

pub(crate) fn has_content(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0)
}

pub(crate) fn damaged(home: &Path, what: String) -> OpenError {
    OpenError::Damaged { home: home.to_owned(), what }
}

pub(crate) fn refused(home: &Path, source: rusqlite::Error) -> OpenError {
    if is_corrupt(&source) {
        damaged(home, source.to_string())
    } else {
        OpenError::Database { home: home.to_owned(), source }
    }
}

#[cfg(test)]
mod tests;
