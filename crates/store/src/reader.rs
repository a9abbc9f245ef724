//! Questions. Each is answered from one snapshot of the state, whatever is committed meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use orchestra_model::{
    Desired, Diagnostic, Digest, EnvironmentId, Event, Generation, InstanceId, Name, Plan, ReleaseNumber, ResourceId,
    RunId,
    plan::PLAN_FORMAT,
    record::{
        EnvironmentRecord, EnvironmentState, InstanceRecord, JournalEntry, ReleaseRecord, ReleaseState, ResourceRecord,
        RunKind, RunRecord, RunState,
    },
    secret::SecretVersion,
    time::UnixMillis,
};
use rusqlite::{Connection, OpenFlags, OptionalExtension, params, types::Value};
use serde::de::DeserializeOwned;

use crate::{
    error::{Damage, ReadError},
    read_only::Source,
    row::{self, Table, decode},
    schema,
    write::{self, Failure},
};

/// Idle connections that are kept.
const POOL: usize = 4;

/// Answers questions about a state. Clones share their connections.
#[derive(Clone)]
pub struct Reader {
    shared: Arc<Shared>,
}

struct Shared {
    home: PathBuf,
    access: Access,
    idle: Mutex<Vec<(Connection, Source)>>,
}

/// How connections are made.
enum Access {
    /// In the process that has the lock.
    BesideWriter,
    /// Without the right to leave a trace.
    ReadOnly,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("home", &self.shared.home).finish_non_exhaustive()
    }
}

/// A release without its desired state.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ReleaseSummary {
    /// Where.
    pub environment: EnvironmentId,
    /// Number.
    pub number: ReleaseNumber,
    /// When it was made.
    pub created_at: UnixMillis,
    /// Run that made it.
    pub run: RunId,
    /// Why.
    pub reason: String,
    /// How it fared.
    pub state: ReleaseState,
    /// Digest of its desired state: equal digests ask for the same.
    pub desired: Digest,
    /// Whether its desired state is still kept, so that [`Reader::release`] has it.
    pub kept: bool,
}

/// A run without its plan and steps.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RunSummary {
    /// Which.
    pub id: RunId,
    /// Where.
    pub environment: EnvironmentId,
    /// Why.
    pub kind: RunKind,
    /// Fencing number.
    pub generation: Generation,
    /// Release that it puts into force; `None` for `down`.
    pub release: Option<ReleaseNumber>,
    /// Where it stands.
    pub state: RunState,
    /// When it began.
    pub started_at: UnixMillis,
    /// When it ended.
    pub ended_at: Option<UnixMillis>,
    /// Why it failed.
    pub problems: Vec<Diagnostic>,
    /// What was reverted, in words.
    pub reverted: Option<String>,
    /// Instances that made it fail.
    pub culprits: Vec<InstanceId>,
}

/// A line of the journal with its place and time.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Journaled {
    /// Position; grows by one per line.
    pub sequence: u64,
    /// When it was written.
    pub at: UnixMillis,
    /// What it says.
    #[serde(flatten)]
    pub entry: JournalEntry,
}

/// Which events are asked for. Everything that is not `None` must fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventFilter {
    /// Of this environment.
    pub environment: Option<EnvironmentId>,
    /// About this resource, or an instance of it.
    pub resource: Option<ResourceId>,
    /// About this instance.
    pub instance: Option<InstanceId>,
    /// Part of this run.
    pub run: Option<RunId>,
    /// After this sequence number; 0 is from the beginning.
    pub after_sequence: u64,
    /// So many at most.
    pub limit: usize,
    /// The last `limit` ones instead of the first; in ascending order all the same.
    pub tail: bool,
}

impl Default for EventFilter {
    fn default() -> Self {
        Self {
            environment: None,
            resource: None,
            instance: None,
            run: None,
            after_sequence: 0,
            limit: 1000,
            tail: false,
        }
    }
}

impl From<Failure> for ReadError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Damaged(damage) => Self::Damaged(damage),
            Failure::Database(error) => Self::Database(error),
            Failure::Violation(violation) => unreachable!("reading breaks no invariant: {violation}"),
        }
    }
}

impl Reader {
    pub(crate) fn beside_writer(home: &Path) -> Self {
        Self::new(home, Access::BesideWriter, Vec::new())
    }

    pub(crate) fn read_only(home: &Path, first: (Connection, Source)) -> Self {
        Self::new(home, Access::ReadOnly, vec![first])
    }

    fn new(home: &Path, access: Access, idle: Vec<(Connection, Source)>) -> Self {
        Self { shared: Arc::new(Shared { home: home.to_owned(), access, idle: Mutex::new(idle) }) }
    }

    /// Every environment, by id.
    pub fn environments(&self) -> Result<Vec<EnvironmentRecord>, ReadError> {
        self.ask(|connection| {
            let mut records: Vec<EnvironmentRecord> = row::ENVIRONMENTS.all(connection, "ORDER BY id", [])?;
            for record in &mut records {
                fill_ordinals(connection, record)?;
            }
            Ok(records)
        })
    }

    /// All that is written down of one environment, except its history.
    pub fn state(&self, id: &EnvironmentId) -> Result<Option<EnvironmentState>, ReadError> {
        self.ask(|connection| {
            let Some(mut environment) = write::environment(connection, id)? else { return Ok(None) };
            fill_ordinals(connection, &mut environment)?;
            let resources = members::<ResourceRecord>(connection, &row::RESOURCES, id)?;
            let instances = members::<InstanceRecord>(connection, &row::INSTANCES, id)?;
            let going: Option<i64> = connection
                .prepare_cached("SELECT id FROM runs WHERE environment = ?1 AND state IN ('running', 'reverting')")?
                .query_row([id.to_string()], |row| row.get(0))
                .optional()?;
            let run = match going {
                Some(run) => read_run(connection, RunId(run.cast_unsigned()))?,
                None => None,
            };
            let numbers = [environment.stable, run.as_ref().and_then(|run| run.release)];
            let mut releases = BTreeMap::new();
            for number in numbers.into_iter().flatten().collect::<BTreeSet<_>>() {
                if let Some(release) = read_release(connection, id, number)? {
                    releases.insert(number, release);
                }
            }
            Ok(Some(EnvironmentState {
                environment,
                resources: resources.into_iter().map(|r| (r.id.clone(), r)).collect(),
                instances: instances.into_iter().map(|i| (i.id.clone(), i)).collect(),
                run,
                releases,
            }))
        })
    }

    /// What was last applied in one environment, by resource: all that planning needs, without the rest.
    pub fn resources(&self, id: &EnvironmentId) -> Result<BTreeMap<ResourceId, ResourceRecord>, ReadError> {
        self.ask(|connection| {
            let resources = members::<ResourceRecord>(connection, &row::RESOURCES, id)?;
            Ok(resources.into_iter().map(|r| (r.id.clone(), r)).collect())
        })
    }

    /// The versions of secrets that programs have: those of releases whose desired state is kept, and of what was applied.
    pub fn secret_versions(&self) -> Result<BTreeSet<SecretVersion>, ReadError> {
        self.ask(|connection| {
            let mut found = BTreeSet::new();
            for query in ["SELECT json FROM desired", "SELECT json FROM resources"] {
                let mut statement = connection.prepare(query)?;
                let mut rows = statement.query([])?;
                while let Some(row) = rows.next()? {
                    found.extend(versions(&row.get::<_, String>(0)?));
                }
            }
            Ok(found)
        })
    }

    /// The newest releases of an environment, newest first.
    pub fn releases(&self, environment: &EnvironmentId, limit: usize) -> Result<Vec<ReleaseSummary>, ReadError> {
        self.ask(|connection| {
            let numbers: Vec<(i64, bool)> = connection
                .prepare_cached(
                    "SELECT number, desired IS NOT NULL FROM releases WHERE environment = ?1
                     ORDER BY number DESC LIMIT ?2",
                )?
                .query_map(params![environment.to_string(), bound(limit)], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<Result<_, _>>()?;
            let mut releases = Vec::with_capacity(numbers.len());
            for (number, kept) in numbers {
                let number = ReleaseNumber(number.cast_unsigned());
                releases.extend(write::release(connection, environment, number)?.map(|row| ReleaseSummary {
                    environment: environment.clone(),
                    number,
                    created_at: row.created_at,
                    run: row.run,
                    reason: row.reason,
                    state: row.state,
                    desired: row.desired,
                    kept,
                }));
            }
            Ok(releases)
        })
    }

    /// A release with its desired state. `None` if there is none of this number, or its desired state is not kept any
    /// more ([`ReleaseSummary::kept`] tells which).
    pub fn release(
        &self,
        environment: &EnvironmentId,
        number: ReleaseNumber,
    ) -> Result<Option<ReleaseRecord>, ReadError> {
        self.ask(|connection| Ok(read_release(connection, environment, number)?))
    }

    /// The newest runs of an environment, or of all, newest first.
    pub fn runs(&self, environment: Option<&EnvironmentId>, limit: usize) -> Result<Vec<RunSummary>, ReadError> {
        self.ask(|connection| {
            let ids: Vec<i64> = match environment {
                Some(environment) => connection
                    .prepare_cached("SELECT id FROM runs WHERE environment = ?1 ORDER BY id DESC LIMIT ?2")?
                    .query_map(params![environment.to_string(), bound(limit)], |row| row.get(0))?
                    .collect::<Result<_, _>>()?,
                None => connection
                    .prepare_cached("SELECT id FROM runs ORDER BY id DESC LIMIT ?1")?
                    .query_map([bound(limit)], |row| row.get(0))?
                    .collect::<Result<_, _>>()?,
            };
            let mut runs = Vec::with_capacity(ids.len());
            for id in ids.into_iter().map(|id| RunId(id.cast_unsigned())) {
                runs.extend(write::run(connection, id)?.map(|row| summary(id, row)));
            }
            Ok(runs)
        })
    }

    /// A run with its plan and steps. The plan of an old run is empty.
    pub fn run(&self, id: RunId) -> Result<Option<RunRecord>, ReadError> {
        self.ask(|connection| Ok(read_run(connection, id)?))
    }

    /// Events that fit, in the order of their sequence numbers.
    pub fn events(&self, filter: &EventFilter) -> Result<Vec<Event>, ReadError> {
        let mut sql = String::from("WHERE sequence > ?");
        let mut values = vec![Value::Integer(filter.after_sequence.cast_signed())];
        if let Some(environment) = &filter.environment {
            sql.push_str(" AND environment = ?");
            values.push(Value::Text(environment.to_string()));
        }
        if let Some(resource) = &filter.resource {
            sql.push_str(" AND resource = ?");
            values.push(Value::Text(resource.to_string()));
        }
        if let Some(instance) = &filter.instance {
            sql.push_str(" AND instance = ?");
            values.push(Value::Text(instance.to_string()));
        }
        if let Some(run) = filter.run {
            sql.push_str(" AND run = ?");
            values.push(Value::Integer(run.0.cast_signed()));
        }
        sql.push_str(if filter.tail { " ORDER BY sequence DESC LIMIT ?" } else { " ORDER BY sequence LIMIT ?" });
        values.push(Value::Integer(bound(filter.limit)));
        self.ask(|connection| {
            let mut events = row::EVENTS.all(connection, &sql, rusqlite::params_from_iter(&values))?;
            if filter.tail {
                events.reverse();
            }
            Ok(events)
        })
    }

    /// For each instance of an environment the last event that changed its phase.
    pub fn phases(&self, environment: &EnvironmentId) -> Result<Vec<Event>, ReadError> {
        // A cause that quotes these words has its quotation marks escaped.
        let sql = r#"WHERE sequence IN (
            SELECT max(sequence) FROM events WHERE environment = ?1 AND instance IS NOT NULL
            AND instr(json, '"kind":"instance_') > 0 AND instr(json, '"kind":"instance_adopted"') = 0
            GROUP BY instance)"#;
        self.ask(|connection| Ok(row::EVENTS.all(connection, sql, [environment.to_string()])?))
    }

    /// Sequence number of the newest event; 0 if there is none.
    pub fn last_event(&self) -> Result<u64, ReadError> {
        self.ask(|connection| {
            let last: i64 =
                connection.query_row("SELECT coalesce(max(sequence), 0) FROM events", [], |row| row.get(0))?;
            Ok(last.cast_unsigned())
        })
    }

    /// Intents without an outcome, oldest first: what recovery must adopt, finish or retry.
    pub fn open_intents(&self) -> Result<Vec<Journaled>, ReadError> {
        self.ask(|connection| {
            row::OPEN_INTENTS.check(connection)?;
            let lines =
                journaled(connection, "WHERE sequence IN (SELECT sequence FROM open_intents) ORDER BY sequence", [])?;
            let intents: i64 = connection.query_row("SELECT count(*) FROM open_intents", [], |row| row.get(0))?;
            if bound(lines.len()) != intents {
                let what = "an open intent is not in the journal".to_owned();
                return Err(Damage { table: row::OPEN_INTENTS.name, key: "?".to_owned(), what }.into());
            }
            Ok(lines)
        })
    }

    /// The run that was started by the request with this idempotency key. Only recent runs are looked at: a client that
    /// has lost an answer asks again soon.
    pub fn run_of_request(&self, key: &str) -> Result<Option<RunId>, ReadError> {
        self.ask(|connection| {
            let candidates: Vec<i64> = connection
                .prepare_cached(
                    "SELECT id FROM (SELECT id, json FROM runs ORDER BY id DESC LIMIT 1000) WHERE instr(json, ?1) > 0",
                )?
                .query_map([key], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            for id in candidates.into_iter().map(|id| RunId(id.cast_unsigned())) {
                if write::run(connection, id)?.is_some_and(|run| run.request_key.as_deref() == Some(key)) {
                    return Ok(Some(id));
                }
            }
            Ok(None)
        })
    }

    /// The last lines of the journal, oldest first.
    pub fn journal_tail(&self, limit: usize) -> Result<Vec<Journaled>, ReadError> {
        self.ask(|connection| {
            let mut lines = journaled(connection, "ORDER BY sequence DESC LIMIT ?1", [bound(limit)])?;
            lines.reverse();
            Ok(lines)
        })
    }

    /// A setting that [`crate::Store::set_setting_blocking`] wrote.
    pub fn setting(&self, key: &str) -> Result<Option<serde_json::Value>, ReadError> {
        self.ask(|connection| Ok(row::setting(connection, key)?))
    }

    /// Checks every row of every table against its checksum, and that it can be read. Takes as long as that takes.
    pub fn verify(&self) -> Result<(), ReadError> {
        self.ask(|connection| {
            let answer: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
            if answer != "ok" {
                return Err(Damage { table: "sqlite_schema", key: "?".to_owned(), what: answer }.into());
            }
            Ok(row::TABLES.iter().try_for_each(|table| table.check(connection))?)
        })?;
        for environment in self.environments()? {
            self.state(&environment.id)?;
            for release in self.releases(&environment.id, usize::MAX)? {
                let there = self.release(&environment.id, release.number)?.is_some();
                if there != release.kept {
                    let key = format!("{} {}", environment.id, release.number);
                    let what = "its desired state is missing".to_owned();
                    return Err(Damage { table: row::RELEASES.name, key, what }.into());
                }
            }
        }
        for run in self.runs(None, usize::MAX)? {
            self.run(run.id)?;
        }
        self.events(&EventFilter { limit: usize::MAX, ..EventFilter::default() })?;
        self.open_intents()?;
        self.journal_tail(usize::MAX)?;
        Ok(())
    }

    /// Answers `question` from one snapshot.
    fn ask<T>(&self, question: impl Fn(&Connection) -> Result<T, ReadError>) -> Result<T, ReadError> {
        loop {
            let (connection, source) = self.connection()?;
            let answer = connection.unchecked_transaction().map_err(ReadError::from).and_then(|transaction| {
                let answer = question(&transaction)?;
                transaction.finish()?;
                Ok(answer)
            });
            // What was read from a file that nobody guarded counts only if nobody has begun to write meanwhile.
            if source.is_outdated(&self.shared.home) {
                continue;
            }
            if answer.is_ok() {
                let mut idle = self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner);
                if idle.len() < POOL {
                    idle.push((connection, source));
                }
            }
            return answer;
        }
    }

    fn connection(&self) -> Result<(Connection, Source), ReadError> {
        let mut idle = self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((connection, source)) = idle.pop() {
            if !source.is_outdated(&self.shared.home) {
                return Ok((connection, source));
            }
        }
        drop(idle);
        match self.shared.access {
            Access::BesideWriter => {
                let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                let connection = Connection::open_with_flags(self.shared.home.join(schema::FILE), flags)?;
                schema::configure(&connection)?;
                connection.set_prepared_statement_cache_capacity(64);
                Ok((connection, Source::Guarded))
            }
            Access::ReadOnly => {
                crate::read_only::connect(&self.shared.home).map_err(|error| ReadError::Open(Box::new(error)))
            }
        }
    }
}

/// A limit in SQLite's terms.
fn bound(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn members<T: DeserializeOwned>(
    connection: &Connection,
    table: &Table,
    environment: &EnvironmentId,
) -> Result<Vec<T>, Failure> {
    table.all(connection, "WHERE environment = ?1", [environment.to_string()])
}

fn fill_ordinals(connection: &Connection, record: &mut EnvironmentRecord) -> Result<(), ReadError> {
    let id = record.id.to_string();
    for ((workload, release), last) in write::ordinals(connection, &id)? {
        let workload: Name = workload.parse().map_err(|error: orchestra_model::id::ParseIdError| Damage {
            table: "ordinals",
            key: id.clone(),
            what: error.to_string(),
        })?;
        record.ordinals.entry(workload).or_default().insert(ReleaseNumber(release), last);
    }
    Ok(())
}

fn read_desired(connection: &Connection, digest: &str) -> Result<Option<Desired>, Failure> {
    row::DESIRED.one(connection, "WHERE digest = ?1", [digest])
}

fn read_release(
    connection: &Connection,
    environment: &EnvironmentId,
    number: ReleaseNumber,
) -> Result<Option<ReleaseRecord>, Failure> {
    let Some(row) = write::release(connection, environment, number)? else { return Ok(None) };
    let Some(desired) = read_desired(connection, row.desired.as_str())? else { return Ok(None) };
    Ok(Some(ReleaseRecord {
        environment: environment.clone(),
        number,
        created_at: row.created_at,
        run: row.run,
        reason: row.reason,
        state: row.state,
        desired,
        verdicts: row.verdicts,
    }))
}

fn read_run(connection: &Connection, id: RunId) -> Result<Option<RunRecord>, Failure> {
    let Some(row) = write::run(connection, id)? else { return Ok(None) };
    let plan = match row::PLANS.one::<Plan>(connection, "WHERE run = ?1", [id.0.cast_signed()])? {
        Some(plan) => {
            let desired: Option<String> = connection
                .prepare_cached("SELECT desired FROM plans WHERE run = ?1")?
                .query_row([id.0.cast_signed()], |row| row.get(0))?;
            let desired = match desired {
                Some(digest) => Some(read_desired(connection, &digest)?.ok_or_else(|| Damage {
                    table: "desired",
                    key: digest.clone(),
                    what: "it is missing".to_owned(),
                })?),
                None => None,
            };
            Plan { desired, ..plan }
        }
        None => Plan {
            format: PLAN_FORMAT,
            environment: row.environment.clone(),
            base: None,
            desired: None,
            steps: Vec::new(),
            unchanged: 0,
            kept: Vec::new(),
            flags: Vec::new(),
        },
    };
    let steps = write::run_steps(connection, id)?;
    Ok(Some(RunRecord {
        id,
        environment: row.environment,
        kind: row.kind,
        generation: row.generation,
        release: row.release,
        plan,
        state: row.state,
        steps,
        started_at: row.started_at,
        ended_at: row.ended_at,
        problems: row.problems,
        reverted: row.reverted,
        culprits: row.culprits,
        request_key: row.request_key,
    }))
}

fn summary(id: RunId, row: write::RunRow) -> RunSummary {
    RunSummary {
        id,
        environment: row.environment,
        kind: row.kind,
        generation: row.generation,
        release: row.release,
        state: row.state,
        started_at: row.started_at,
        ended_at: row.ended_at,
        problems: row.problems,
        reverted: row.reverted,
        culprits: row.culprits,
    }
}

fn journaled(
    connection: &Connection,
    condition: &str,
    params: impl rusqlite::Params,
) -> Result<Vec<Journaled>, ReadError> {
    let mut statement =
        connection.prepare_cached(&format!("SELECT sequence, at, json, sum FROM journal {condition}"))?;
    let mut rows = statement.query(params)?;
    let mut lines = Vec::new();
    while let Some(row) = rows.next()? {
        let (sequence, at) = (row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, i64>(1)?.cast_unsigned());
        let json: String = row.get(2)?;
        let entry = decode(row::JOURNAL.name, &format!("{sequence} {at}"), &json, row.get(3)?)?;
        lines.push(Journaled { sequence, at, entry });
    }
    Ok(lines)
}
/// The versions of secrets in a JSON text. Rather one too many than one too few, so nothing else of the text is looked at.
fn versions(json: &str) -> impl Iterator<Item = SecretVersion> {
    let texts = json.split("\"version\":\"").skip(1);
    texts
        .filter_map(|rest| rest.split('"').next())
        .map(|text| SecretVersion(text.to_owned()))
        .filter(SecretVersion::is_well_formed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_wherever_a_text_has_them() {
        let version = "0123456789abcdef0123456789abcdef";
        let reference = orchestra_model::text::Reference::Secret {
            secret: "db".parse().unwrap(),
            version: Some(SecretVersion(version.to_owned())),
        };
        let json = serde_json::to_string(&[&reference, &reference]).unwrap();
        let other = format!(r#"{{"version":"1.2","text":"\"version\":\"","version":"{}"}}"#, version.to_uppercase());
        assert_eq!(versions(&json).map(|version| version.0).collect::<Vec<_>>(), [version, version]);
        assert_eq!(versions(&other).count(), 0);
        assert_eq!(versions("").count(), 0);
    }
}
