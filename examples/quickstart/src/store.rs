//! The state of the agents: one SQLite file on the volume, shared by every instance of every program.
//!
//! WAL lets readers go on while one writes, and `busy_timeout` makes writers wait for each other. Nothing that a client
//! was told is lost with a killed process: `synchronous = FULL` syncs each commit.
//!
//! The `tasks` table is a queue with at-least-once delivery. A worker leases a task for a time; if it dies, the lease runs
//! out and another takes the task. A result is accepted only from whoever holds the lease, so a worker that was
//! thought dead cannot overwrite its successor's result.
//!
//! ```text
//! queued --lease--> leased --complete--> done
//!    ^                 |--lease ran out, attempts left--> queued (by the next lease)
//!    |---- release ----|--lease ran out, none left-----> failed
//! ```

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::Serialize;
use serde_json::Value;

use crate::settings::Error;

/// What each version of the schema adds. Only ever additions: instances of the release before run on beside it.
pub const MIGRATIONS: [(&str, &str); 3] = [
    (
        "sessions and messages",
        "CREATE TABLE sessions (id TEXT PRIMARY KEY, created_at INTEGER NOT NULL) STRICT;
         CREATE TABLE messages (
             id INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions, role TEXT NOT NULL, text TEXT NOT NULL,
             release TEXT NOT NULL, created_at INTEGER NOT NULL) STRICT;",
    ),
    (
        "task queue",
        "CREATE TABLE tasks (
             id INTEGER PRIMARY KEY, tool TEXT NOT NULL, input TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'queued',
             result TEXT, attempts INTEGER NOT NULL DEFAULT 0, owner TEXT, leased_until INTEGER,
             created_at INTEGER NOT NULL) STRICT;
         CREATE INDEX tasks_open ON tasks (id) WHERE state IN ('queued', 'leased');",
    ),
    ("messages by session", "CREATE INDEX messages_of_session ON messages (session, id);"),
];

/// How often a task is leased before it counts as failed.
const ATTEMPTS: u32 = 5;

/// A handle to the database. Clones share one connection.
#[derive(Clone)]
pub struct Store(Arc<Mutex<Connection>>);

/// A line of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `user` or `agent`.
    pub role: String,
    /// What was said.
    pub text: String,
    /// Release that wrote it.
    pub release: String,
    /// Unix time in milliseconds.
    pub created_at: i64,
}

/// A conversation in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Its name.
    pub id: String,
    /// Its first message.
    pub title: String,
    /// How many messages it has.
    pub messages: i64,
}

/// A task that a worker holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its number.
    pub id: i64,
    /// What to do.
    pub tool: String,
    /// With what.
    pub input: Value,
    /// How often it was leased, this time included.
    pub attempt: u32,
}

/// What became of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Queued or leased.
    Open,
    /// Done, with its result.
    Done(Value),
    /// Given up.
    Failed,
}

// === impl Store ===

/// Longest wait for another writer.
const BUSY: Duration = Duration::from_secs(5);

/// Switches to WAL. Two who open a new file at once may stand in each other's way, and SQLite says so at once where
/// waiting could deadlock, without asking its busy handler; so it is tried again for as long as that one would wait.
fn use_wal(connection: &Connection) -> Result<(), Error> {
    let until = std::time::Instant::now() + BUSY;
    loop {
        match connection.pragma_update(None, "journal_mode", "wal") {
            Err(error)
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
                    && std::time::Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return Ok(outcome?),
        }
    }
}

impl Store {
    /// Opens the file; its folder must exist. The schema is not looked at, see [`Self::check`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let connection = Connection::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
        connection.busy_timeout(BUSY)?;
        use_wal(&connection)?;
        connection.pragma_update(None, "synchronous", "full")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    /// Runs `operation` where it may block.
    pub async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || operation(&store)).await?
    }

    /// Brings the schema up to date, one transaction per step; tells `done` about each step that was missing. Returns the
    /// version. Safe to run again, and beside another that does the same.
    pub fn migrate(&self, mut done: impl FnMut(usize, &str)) -> Result<usize, Error> {
        let mut connection = self.connection();
        loop {
            // Immediate: the version is read under the write lock, so two never run one step.
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let version = version(&transaction)?;
            let Some((name, sql)) = MIGRATIONS.get(version) else { return Ok(version) };
            transaction.execute_batch(sql)?;
            transaction.pragma_update(None, "user_version", i64::try_from(version + 1)?)?;
            transaction.commit()?;
            done(version + 1, name);
        }
    }

    /// Whether the schema is what this program needs, or newer.
    pub fn check(&self) -> Result<(), Error> {
        let (found, needed) = (version(&self.connection())?, MIGRATIONS.len());
        if found < needed {
            return Err(format!("the schema has version {found}, this program needs {needed}: run migrate").into());
        }
        Ok(())
    }

    /// A name for a new session.
    pub fn new_session_id(&self) -> Result<String, Error> {
        Ok(self.connection().query_row("SELECT lower(hex(randomblob(8)))", [], |row| row.get(0))?)
    }

    /// Adds a line to a conversation, which begins with its first; returns the lines before it.
    pub fn add_message(&self, session: &str, role: &str, text: &str, release: &str) -> Result<Vec<Message>, Error> {
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction
            .execute("INSERT OR IGNORE INTO sessions (id, created_at) VALUES (?1, ?2)", params![session, now()])?;
        let before = messages(&transaction, session)?;
        transaction.execute(
            "INSERT INTO messages (session, role, text, release, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![session, role, text, release, now()],
        )?;
        transaction.commit()?;
        Ok(before)
    }

    /// A conversation; `None` if there is none of this name.
    pub fn session(&self, session: &str) -> Result<Option<Vec<Message>>, Error> {
        let connection = self.connection();
        let known = connection.query_row("SELECT 1 FROM sessions WHERE id = ?1", [session], |_| Ok(())).optional()?;
        known.map(|()| messages(&connection, session)).transpose()
    }

    /// The latest conversations, at most 50.
    pub fn sessions(&self) -> Result<Vec<Session>, Error> {
        let connection = self.connection();
        let mut statement = connection.prepare_cached(
            "SELECT session, (SELECT text FROM messages WHERE session = m.session ORDER BY id LIMIT 1), count(*)
             FROM messages m GROUP BY session ORDER BY max(id) DESC LIMIT 50",
        )?;
        let rows = statement
            .query_map([], |row| Ok(Session { id: row.get(0)?, title: row.get(1)?, messages: row.get(2)? }))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Queues a task.
    pub fn queue(&self, tool: &str, input: &Value) -> Result<i64, Error> {
        let connection = self.connection();
        connection.execute(
            "INSERT INTO tasks (tool, input, created_at) VALUES (?1, ?2, ?3)",
            params![tool, input.to_string(), now()],
        )?;
        Ok(connection.last_insert_rowid())
    }

    /// What became of a task.
    pub fn task_state(&self, id: i64) -> Result<TaskState, Error> {
        let (state, result): (String, Option<String>) =
            self.connection().query_row("SELECT state, result FROM tasks WHERE id = ?1", [id], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })?;
        Ok(match (state.as_str(), result) {
            ("done", Some(result)) => TaskState::Done(serde_json::from_str(&result)?),
            ("failed", _) => TaskState::Failed,
            _ => TaskState::Open,
        })
    }

    /// Takes the oldest task that is queued or whose lease ran out, and holds it for `lease`.
    pub fn lease(&self, owner: &str, lease: Duration) -> Result<Option<Task>, Error> {
        let mut connection = self.connection();
        // A look without the write lock first: an idle worker must not take turns with the writers.
        let open = "SELECT 1 FROM tasks WHERE state = 'queued' OR (state = 'leased' AND leased_until <= ?1) LIMIT 1";
        if connection.query_row(open, [now()], |_| Ok(())).optional()?.is_none() {
            return Ok(None);
        }
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute(
            "UPDATE tasks SET state = 'failed' WHERE state = 'leased' AND leased_until <= ?1 AND attempts >= ?2",
            params![now(), ATTEMPTS],
        )?;
        let row = transaction
            .query_row(
                "UPDATE tasks SET state = 'leased', owner = ?1, leased_until = ?2, attempts = attempts + 1
                 WHERE id = (SELECT id FROM tasks WHERE state = 'queued' OR (state = 'leased' AND leased_until <= ?3)
                             ORDER BY id LIMIT 1)
                 RETURNING id, tool, input, attempts",
                params![owner, now() + i64::try_from(lease.as_millis())?, now()],
                |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?, row.get(3)?)),
            )
            .optional()?;
        transaction.commit()?;
        row.map(|(id, tool, input, attempt)| Ok(Task { id, tool, input: serde_json::from_str(&input)?, attempt }))
            .transpose()
    }

    /// Stores a result. False if the lease went to somebody else meanwhile.
    pub fn complete(&self, id: i64, owner: &str, result: &Value) -> Result<bool, Error> {
        let changed = self.connection().execute(
            "UPDATE tasks SET state = 'done', result = ?3 WHERE id = ?1 AND owner = ?2 AND state = 'leased'",
            params![id, owner, result.to_string()],
        )?;
        Ok(changed == 1)
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock is held leaves the connection as usable as before: transactions roll back.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn version(connection: &Connection) -> Result<usize, Error> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    Ok(usize::try_from(version)?)
}

fn messages(connection: &Connection, session: &str) -> Result<Vec<Message>, Error> {
    let mut statement = connection
        .prepare_cached("SELECT role, text, release, created_at FROM messages WHERE session = ?1 ORDER BY id")?;
    let rows = statement.query_map([session], |row| {
        Ok(Message { role: row.get(0)?, text: row.get(1)?, release: row.get(2)?, created_at: row.get(3)? })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("agents.db")).unwrap();
        store.migrate(|_, _| {}).unwrap();
        (folder, store)
    }

    #[test]
    fn migrations_run_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("agents.db")).unwrap();
        assert!(store.check().unwrap_err().to_string().contains("run migrate"));
        let mut steps = Vec::new();
        assert_eq!(store.migrate(|n, _| steps.push(n)).unwrap(), 3);
        assert_eq!(steps, [1, 2, 3]);
        assert_eq!(store.migrate(|n, _| steps.push(n)).unwrap(), 3);
        assert_eq!(steps.len(), 3);
        store.check().unwrap();
    }

    #[test]
    fn a_task_whose_worker_died_goes_to_the_next() {
        let (_folder, store) = store();
        assert_eq!(store.lease("a", Duration::ZERO).unwrap(), None);
        let id = store.queue("keywords", &json!({"text": "x"})).unwrap();
        assert_eq!(store.lease("a", Duration::ZERO).unwrap().unwrap().attempt, 1);
        let again = store.lease("b", Duration::from_mins(1)).unwrap().expect("the lease of a ran out");
        assert_eq!((again.id, again.attempt, again.input), (id, 2, json!({"text": "x"})));
        assert_eq!(store.lease("c", Duration::from_mins(1)).unwrap(), None, "b holds it");
        assert!(!store.complete(id, "a", &json!("late")).unwrap(), "a lost it");
        assert_eq!(store.task_state(id).unwrap(), TaskState::Open);
        assert!(store.complete(id, "b", &json!("result")).unwrap());
        assert_eq!(store.task_state(id).unwrap(), TaskState::Done(json!("result")));
        assert_eq!(store.lease("c", Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn a_task_that_kills_its_workers_is_given_up() {
        let (_folder, store) = store();
        let id = store.queue("keywords", &json!({})).unwrap();
        for attempt in 1..=ATTEMPTS {
            assert_eq!(store.lease("a", Duration::ZERO).unwrap().unwrap().attempt, attempt);
        }
        assert_eq!(store.lease("a", Duration::ZERO).unwrap(), None);
        assert_eq!(store.task_state(id).unwrap(), TaskState::Failed);
    }

    #[test]
    fn conversations() {
        let (_folder, store) = store();
        assert_eq!(store.session("s").unwrap(), None);
        assert!(store.add_message("s", "user", "hello", "1").unwrap().is_empty());
        let before = store.add_message("s", "agent", "hi", "1").unwrap();
        assert_eq!(before[0].text, "hello");
        assert_eq!(store.session("s").unwrap().unwrap().len(), 2);
        let listed = store.sessions().unwrap();
        assert_eq!(listed, [Session { id: "s".to_owned(), title: "hello".to_owned(), messages: 2 }]);
    }
}
