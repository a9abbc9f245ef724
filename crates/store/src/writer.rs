//! The writer: one thread, one connection, one transaction per batch of commits.
//!
//! While one batch is being synced, commits queue up and make the next one, so a thousand tasks that wait at the same
//! time cost a few fsyncs. Each commit has its savepoint: a refused one takes nothing of its neighbours with it. Events
//! are published and callers answered only after the sync.

use std::{
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use orchestra_model::{Event, record::Change, time::UnixMillis};
use rusqlite::Connection;
use tokio::sync::broadcast;

use crate::{
    error::{CommitError, Damage, OpenError, is_corrupt},
    lock::Lock,
    retention::Retention,
    row, schema,
    store::Committed,
    write::{Counters, Failure, Write},
};

/// Commits in one transaction at most: bounds what one fsync, and one caller, waits for.
const BATCH: usize = 4096;

/// Setting that counts how often the state was opened for writing.
const OPENED: &str = "opened";

/// Something to be written.
pub(crate) enum Work {
    Commit(Vec<Change>),
    Setting(String, serde_json::Value),
}

pub(crate) struct Request {
    pub(crate) work: Work,
    pub(crate) reply: Box<dyn FnOnce(Result<Committed, CommitError>) + Send>,
}

/// First numbers of this opening.
pub(crate) struct Start {
    pub(crate) next_run: u64,
    pub(crate) next_route_version: u64,
}

pub(crate) struct Writer {
    connection: Connection,
    clock: Box<dyn Fn() -> UnixMillis + Send + Sync>,
    events: broadcast::Sender<Arc<Event>>,
    counters: Counters,
    retention: Retention,
    /// Why nothing is written any more.
    stopped: Option<CommitError>,
    // Last, so that it is freed after the connection is closed.
    _lock: Lock,
}

impl Writer {
    pub(crate) fn new(
        home: &Path,
        connection: Connection,
        lock: Lock,
        clock: Box<dyn Fn() -> UnixMillis + Send + Sync>,
        events: broadcast::Sender<Arc<Event>>,
    ) -> Result<(Self, Start), OpenError> {
        let refused = |e| schema::refused(home, e);
        let last = |table: &str, column: &str| {
            connection.query_row(&format!("SELECT coalesce(max({column}), 0) FROM {table}"), [], |row| {
                row.get::<_, i64>(0).map(i64::cast_unsigned)
            })
        };
        let counters = Counters {
            event: last("events", "sequence").map_err(refused)?,
            journal: last("journal", "sequence").map_err(refused)?,
        };
        let next_run = last("runs", "id").map_err(refused)? + 1;
        let opened = count_opening(&connection).map_err(|failure| schema::failed(home, failure))?;
        let start = Start { next_run, next_route_version: (opened << 32) + 1 };
        let retention = Retention::new(&counters);
        Ok((Self { connection, clock, events, counters, retention, stopped: None, _lock: lock }, start))
    }

    /// Works until every sender is gone and the queue is empty.
    pub(crate) fn run(mut self, queue: &mpsc::Receiver<Request>) {
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            batch.extend(queue.try_iter().take(BATCH - 1));
            self.write(batch);
            self.retention.keep_up(&self.connection, &self.counters);
        }
        // Not needed, but the next look at the state is faster without a log to go through. Readers that are at work
        // may be in the way, which is fine.
        if self.stopped.is_none() {
            let _ = self.connection.busy_timeout(Duration::ZERO);
            let _ = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        }
    }

    fn write(&mut self, batch: Vec<Request>) {
        let (works, replies): (Vec<_>, Vec<_>) = batch.into_iter().map(|r| (r.work, r.reply)).unzip();
        let outcomes = match self.transaction(&works) {
            Ok(outcomes) => outcomes,
            // One of them may be what does not fit on the disk; the others need not fail with it.
            Err(_) if works.len() > 1 && self.stopped.is_none() => works
                .iter()
                .map(|work| match self.transaction(std::slice::from_ref(work)) {
                    Ok(mut outcomes) => outcomes.pop().expect("one outcome per commit"),
                    Err(error) => Err(error),
                })
                .collect(),
            Err(error) => vec![Err(error); works.len()],
        };
        for (outcome, reply) in outcomes.into_iter().zip(replies) {
            reply(outcome);
        }
    }

    /// Writes commits in one transaction, makes it durable, publishes its events.
    fn transaction(&mut self, works: &[Work]) -> Result<Vec<Result<Committed, CommitError>>, CommitError> {
        if let Some(stopped) = &self.stopped {
            return Err(stopped.clone());
        }
        let at = (self.clock)();
        let before = self.counters;
        match self.write_all(works, at) {
            Ok(outcomes) => {
                for committed in outcomes.iter().flatten() {
                    for event in &committed.events {
                        // Nobody listening is fine.
                        let _ = self.events.send(event.clone());
                    }
                }
                Ok(outcomes)
            }
            Err(error) => {
                self.counters = before;
                self.roll_back(&error);
                tracing::error!(%error, "the state could not be written");
                Err(CommitError::Write(Arc::new(error)))
            }
        }
    }

    fn write_all(&mut self, works: &[Work], at: UnixMillis) -> rusqlite::Result<Vec<Result<Committed, CommitError>>> {
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let mut outcomes = Vec::with_capacity(works.len());
        for work in works {
            self.connection.prepare_cached("SAVEPOINT one")?.execute([])?;
            let before = self.counters;
            let mut write = Write::new(&self.connection, at, &mut self.counters);
            let outcome = match work {
                Work::Commit(changes) => write.all(changes),
                Work::Setting(key, value) => write.setting(key, value),
            };
            let outcome = match outcome {
                Ok(()) => {
                    let (events, grown) = write.finish();
                    self.retention.note(grown);
                    Ok(Committed { events, at })
                }
                Err(failure) => {
                    let error = match failure {
                        Failure::Database(error) => return Err(error),
                        Failure::Violation(violation) => CommitError::Refused(violation),
                        Failure::Damaged(damage) => CommitError::Damaged(damage),
                    };
                    self.counters = before;
                    self.connection.prepare_cached("ROLLBACK TO one")?.execute([])?;
                    Err(error)
                }
            };
            self.connection.prepare_cached("RELEASE one")?.execute([])?;
            outcomes.push(outcome);
        }
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(outcomes)
    }

    /// Ends a failed transaction, and decides whether there may be another one.
    fn roll_back(&mut self, error: &rusqlite::Error) {
        if !self.connection.is_autocommit()
            && let Err(second) = self.connection.execute_batch("ROLLBACK")
        {
            self.stopped = Some(CommitError::Stopped(format!("{error}; then {second}")));
        }
        // After a failed fsync the kernel may have dropped what was not written, and say yes the next time.
        let fsync_failed = error.sqlite_error().is_some_and(|e| {
            [rusqlite::ffi::SQLITE_IOERR_FSYNC, rusqlite::ffi::SQLITE_IOERR_DIR_FSYNC].contains(&e.extended_code)
        });
        if fsync_failed || is_corrupt(error) {
            self.stopped = Some(CommitError::Stopped(error.to_string()));
        }
    }
}

/// Counts this opening, durably, so that no number derived from it comes twice.
fn count_opening(connection: &Connection) -> Result<u64, Failure> {
    let before = row::setting(connection, OPENED)?;
    let opened = match before {
        None => 1,
        Some(value) => value.as_u64().map(|n| n + 1).ok_or_else(|| Damage {
            table: "settings",
            key: OPENED.to_owned(),
            what: "it is not a number".to_owned(),
        })?,
    };
    row::put_setting(connection, OPENED, &opened.into())?;
    Ok(opened)
}
