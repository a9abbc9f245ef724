//! One commit: its changes, row by row, and the invariants that they must keep.
//!
//! What one change breaks by itself is found at that change; what only the whole can break (a stable release that is not
//! there, two runs that go on) is checked at the end, so that the order of changes within a commit does not matter.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use orchestra_model::{
    Desired, Digest, EnvironmentId, Event, Generation, InstanceId, Plan, ReleaseNumber, ResourceId, ResourceKind,
    RunId,
    id::ParseIdError,
    record::{
        Change, EnvironmentRecord, InstanceRecord, JournalEntry, JournalKind, ReleaseRecord, ReleaseState,
        ResourceRecord, RunRecord, RunState, StepState,
    },
    rollout::VerdictRecord,
    time::UnixMillis,
};
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Damage, Violation},
    invariant,
    row::{self, encode},
};

/// Why a commit came to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    Violation(Violation),
    Damaged(Damage),
    Database(rusqlite::Error),
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<Damage> for Failure {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// Last sequence numbers that were given out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) event: u64,
    pub(crate) journal: u64,
}

/// A release without its desired state, which is a row of its own.
#[derive(Serialize, Deserialize)]
pub(crate) struct ReleaseRow {
    pub(crate) created_at: UnixMillis,
    pub(crate) run: RunId,
    pub(crate) reason: String,
    pub(crate) state: ReleaseState,
    pub(crate) desired: Digest,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) verdicts: Vec<VerdictRecord>,
}

/// A run without its plan and steps, which are rows of their own.
#[derive(Serialize, Deserialize)]
pub(crate) struct RunRow {
    pub(crate) environment: EnvironmentId,
    pub(crate) kind: orchestra_model::record::RunKind,
    pub(crate) generation: Generation,
    pub(crate) release: Option<ReleaseNumber>,
    pub(crate) state: RunState,
    pub(crate) started_at: UnixMillis,
    pub(crate) ended_at: Option<UnixMillis>,
    pub(crate) problems: Vec<orchestra_model::Diagnostic>,
    pub(crate) reverted: Option<String>,
    pub(crate) culprits: Vec<InstanceId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_key: Option<String>,
}

/// A plan without its goal. Reads back as a [`Plan`].
#[derive(Serialize)]
struct PlanRow<'a> {
    format: u32,
    environment: &'a EnvironmentId,
    base: Option<ReleaseNumber>,
    steps: &'a [orchestra_model::plan::Step],
    unchanged: u32,
    #[serde(skip_serializing_if = "<[ResourceId]>::is_empty")]
    kept: &'a [ResourceId],
    #[serde(skip_serializing_if = "<[orchestra_model::plan::FlagStep]>::is_empty")]
    flags: &'a [orchestra_model::plan::FlagStep],
}

/// The word that a unit variant has in JSON.
pub(crate) fn word<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => unreachable!("only enums without data are stored as words"),
    }
}

/// A commit that is being written.
pub(crate) struct Write<'a> {
    connection: &'a Connection,
    at: UnixMillis,
    counters: &'a mut Counters,
    events: Vec<Arc<Event>>,
    /// Environments whose records must fit together at the end.
    touched: BTreeSet<EnvironmentId>,
    /// Environments that must exist at the end, with one thing that belongs to them.
    needed: BTreeMap<EnvironmentId, String>,
    /// Runs that must exist at the end.
    runs: BTreeSet<(EnvironmentId, RunId)>,
    /// Runs that are new, and must hold the generation of their environment at the end.
    started: Vec<(EnvironmentId, RunId, Generation)>,
    /// Environments whose history became longer.
    grown: BTreeSet<EnvironmentId>,
}

impl<'a> Write<'a> {
    pub(crate) fn new(connection: &'a Connection, at: UnixMillis, counters: &'a mut Counters) -> Self {
        Self {
            connection,
            at,
            counters,
            events: Vec::new(),
            touched: BTreeSet::new(),
            needed: BTreeMap::new(),
            runs: BTreeSet::new(),
            started: Vec::new(),
            grown: BTreeSet::new(),
        }
    }

    /// Writes all changes, or fails with the first invariant that they break.
    pub(crate) fn all(&mut self, changes: &[Change]) -> Result<(), Failure> {
        for change in changes {
            match change {
                Change::Environment(record) => self.environment(record)?,
                Change::Release(record) => self.release(record)?,
                Change::ReleaseState(environment, number, state) => self.release_state(environment, *number, *state)?,
                Change::Verdict(environment, number, verdict) => self.verdict(environment, *number, verdict)?,
                Change::Run(record) => self.run(record)?,
                Change::Step(run, resource, state) => self.step(*run, resource, *state)?,
                Change::Instance(record) => self.instance(record)?,
                Change::ForgetInstance(environment, id) => self.forget("instances", environment, &id.to_string())?,
                Change::Resource(record) => self.resource(record)?,
                Change::ForgetResource(environment, id) => self.forget("resources", environment, &id.to_string())?,
                Change::Journal(entry) => self.journal(entry)?,
                Change::Event(event) => self.event(event)?,
            }
        }
        self.check_whole()
    }

    pub(crate) fn setting(&mut self, key: &str, value: &serde_json::Value) -> Result<(), Failure> {
        row::put_setting(self.connection, key, value)
    }

    /// What it leaves behind: its events, and the environments whose history became longer.
    pub(crate) fn finish(self) -> (Vec<Arc<Event>>, BTreeSet<EnvironmentId>) {
        (self.events, self.grown)
    }

    // === environments and releases ===

    fn environment(&mut self, record: &EnvironmentRecord) -> Result<(), Failure> {
        if let Some(before) = environment(self.connection, &record.id)? {
            invariant::environment_moves_on(&before, record)?;
        }
        let id = record.id.to_string();
        // Ordinals are rows of their own, see `raise_ordinal`.
        let stripped = EnvironmentRecord {
            id: record.id.clone(),
            source: record.source.clone(),
            generation: record.generation,
            stable: record.stable,
            last_release: record.last_release,
            run: record.run,
            chosen_ports: record.chosen_ports.clone(),
            ordinals: BTreeMap::new(),
            rollouts: record.rollouts.clone(),
            flag_overrides: record.flag_overrides.clone(),
            scaled: record.scaled.clone(),
            paused: record.paused.clone(),
            preview: record.preview.clone(),
            deadlines: record.deadlines.clone(),
        };
        let row = encode(&format!("{id} {}", record.generation.0), &stripped);
        self.prepare("INSERT OR REPLACE INTO environments (id, generation, json, sum) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![id, record.generation.0.cast_signed(), row.json, row.sum])?;
        self.ordinals(&id, record)?;
        self.touched.insert(record.id.clone());
        Ok(())
    }

    /// Makes the stored ordinals those of the record, except that none goes below one that an instance has.
    fn ordinals(&self, environment: &str, record: &EnvironmentRecord) -> Result<(), Failure> {
        let mut stored = ordinals(self.connection, environment)?;
        for (workload, releases) in &record.ordinals {
            for (release, last) in releases {
                let before = stored.remove(&(workload.to_string(), release.0));
                if before.is_none_or(|before| before < *last) {
                    self.put_ordinal(environment, workload.as_str(), *release, *last)?;
                }
            }
        }
        if stored.is_empty() {
            return Ok(());
        }
        let living: BTreeSet<(String, u64)> = self
            .prepare("SELECT id FROM instances WHERE environment = ?1")?
            .query_map([environment], |row| row.get::<_, String>(0))?
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .filter_map(|id| id.parse::<InstanceId>().ok())
            .map(|id| (id.workload.to_string(), id.release.0))
            .collect();
        let mut delete =
            self.prepare("DELETE FROM ordinals WHERE environment = ?1 AND workload = ?2 AND release = ?3")?;
        for (workload, release) in stored.into_keys().filter(|pair| !living.contains(pair)) {
            delete.execute(params![environment, workload, release.cast_signed()])?;
        }
        Ok(())
    }

    fn put_ordinal(&self, environment: &str, workload: &str, release: ReleaseNumber, last: u32) -> Result<(), Failure> {
        let sum = row::checksum(&format!("{environment} {workload} {release}"), &last.to_string());
        self.prepare(
            "INSERT INTO ordinals (environment, workload, release, last, sum) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT DO UPDATE SET last = excluded.last, sum = excluded.sum WHERE excluded.last > last",
        )?
        .execute(params![environment, workload, release.0.cast_signed(), last, sum])?;
        Ok(())
    }

    fn release(&mut self, record: &ReleaseRecord) -> Result<(), Failure> {
        let (environment, number) = (&record.environment, record.number);
        let desired = Digest::of(&record.desired);
        if let Some(before) = release(self.connection, environment, number)? {
            invariant::release_is_the_same(&before, record, &desired)?;
            return self.release_state(environment, number, record.state);
        }
        let newest = self.newest_release(environment)?;
        if number <= newest {
            return Err(Violation::ReleaseNotNew { environment: environment.clone(), number, newest }.into());
        }
        self.put_desired(&desired, &record.desired)?;
        let row = ReleaseRow {
            created_at: record.created_at,
            run: record.run,
            reason: record.reason.clone(),
            state: record.state,
            desired,
            verdicts: record.verdicts.clone(),
        };
        self.put_release(environment, number, &row, true)?;
        self.runs.insert((environment.clone(), record.run));
        self.touched.insert(environment.clone());
        self.needed.insert(environment.clone(), format!("release {number}"));
        self.grown.insert(environment.clone());
        Ok(())
    }

    fn release_state(
        &mut self,
        environment: &EnvironmentId,
        number: ReleaseNumber,
        state: ReleaseState,
    ) -> Result<(), Failure> {
        let Some(mut row) = release(self.connection, environment, number)? else {
            return Err(Violation::NoRelease { environment: environment.clone(), number }.into());
        };
        invariant::release_transition(environment, number, row.state, state)?;
        row.state = state;
        self.put_release(environment, number, &row, false)?;
        self.touched.insert(environment.clone());
        Ok(())
    }

    fn verdict(
        &mut self,
        environment: &EnvironmentId,
        number: ReleaseNumber,
        verdict: &VerdictRecord,
    ) -> Result<(), Failure> {
        let Some(mut row) = release(self.connection, environment, number)? else {
            return Err(Violation::NoRelease { environment: environment.clone(), number }.into());
        };
        row.verdicts.push(VerdictRecord { at: self.at, ..verdict.clone() });
        self.put_release(environment, number, &row, false)?;
        self.touched.insert(environment.clone());
        Ok(())
    }

    fn put_release(
        &self,
        environment: &EnvironmentId,
        number: ReleaseNumber,
        release: &ReleaseRow,
        new: bool,
    ) -> Result<(), Failure> {
        let state = word(release.state);
        let row = encode(&format!("{environment} {number} {state}"), release);
        let (environment, number) = (environment.to_string(), number.0.cast_signed());
        if new {
            self.prepare(
                "INSERT INTO releases (environment, number, state, desired, json, sum) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![environment, number, state, release.desired.as_str(), row.json, row.sum])?;
        } else {
            self.prepare("UPDATE releases SET state = ?3, json = ?4, sum = ?5 WHERE environment = ?1 AND number = ?2")?
                .execute(params![environment, number, state, row.json, row.sum])?;
        }
        Ok(())
    }

    /// The highest number of a release; 0 if there is none.
    fn newest_release(&self, environment: &EnvironmentId) -> Result<ReleaseNumber, Failure> {
        let newest: Option<i64> = self
            .prepare("SELECT max(number) FROM releases WHERE environment = ?1")?
            .query_row([environment.to_string()], |row| row.get(0))?;
        Ok(ReleaseNumber(newest.unwrap_or(0).cast_unsigned()))
    }

    /// Stores a desired state, unless it is there.
    fn put_desired(&self, digest: &Digest, desired: &Desired) -> Result<(), Failure> {
        let there = self.prepare("SELECT 1 FROM desired WHERE digest = ?1")?.exists([digest.as_str()])?;
        if !there {
            let row = encode(digest.as_str(), desired);
            self.prepare("INSERT INTO desired (digest, json, sum) VALUES (?1, ?2, ?3)")?.execute(params![
                digest.as_str(),
                row.json,
                row.sum
            ])?;
        }
        Ok(())
    }

    // === runs ===

    fn run(&mut self, record: &RunRecord) -> Result<(), Failure> {
        let id = record.id;
        let environment = &record.environment;
        let current = environment_generation(self.connection, environment)?;
        if let Some(before) = run(self.connection, id)? {
            invariant::run_moves_on(&before, record)?;
            // A superseded run may still be closed, but not go on.
            if !record.state.is_final() {
                fence(environment, id, record.generation, current)?;
            }
        } else {
            let newest: Option<i64> = self
                .prepare("SELECT max(generation) FROM runs WHERE environment = ?1")?
                .query_row([environment.to_string()], |row| row.get(0))?;
            if newest.is_some_and(|newest| record.generation.0 <= newest.cast_unsigned()) {
                let (environment, generation) = (environment.clone(), record.generation);
                return Err(Violation::GenerationReused { environment, run: id, generation }.into());
            }
            self.started.push((environment.clone(), id, record.generation));
            self.grown.insert(environment.clone());
        }
        self.put_run(record)?;
        self.put_plan(id, &record.plan)?;
        self.put_steps(id, &record.steps)?;
        self.touched.insert(environment.clone());
        self.needed.insert(environment.clone(), id.to_string());
        Ok(())
    }

    fn put_run(&self, record: &RunRecord) -> Result<(), Failure> {
        let row = RunRow {
            environment: record.environment.clone(),
            kind: record.kind.clone(),
            generation: record.generation,
            release: record.release,
            state: record.state,
            started_at: record.started_at,
            ended_at: record.ended_at,
            problems: record.problems.clone(),
            reverted: record.reverted.clone(),
            culprits: record.culprits.clone(),
            request_key: record.request_key.clone(),
        };
        let (id, environment, generation) = (record.id.0, &record.environment, record.generation.0);
        let state = word(record.state);
        let encoded = encode(&format!("{id} {environment} {generation} {state}"), &row);
        self.prepare(
            "INSERT OR REPLACE INTO runs (id, environment, generation, state, json, sum)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            id.cast_signed(),
            environment.to_string(),
            generation.cast_signed(),
            state,
            encoded.json,
            encoded.sum
        ])?;
        Ok(())
    }

    /// Stores the plan of a run, unless it is there: it can be large, and a run is written more than once.
    fn put_plan(&self, run: RunId, plan: &Plan) -> Result<(), Failure> {
        let desired = plan.desired.as_ref().map(Digest::of);
        if let (Some(digest), Some(desired)) = (&desired, &plan.desired) {
            self.put_desired(digest, desired)?;
        }
        let digest = desired.as_ref().map(Digest::as_str);
        let row = encode(
            &format!("{} {}", run.0, digest.unwrap_or_default()),
            &PlanRow {
                format: plan.format,
                environment: &plan.environment,
                base: plan.base,
                steps: &plan.steps,
                unchanged: plan.unchanged,
                kept: &plan.kept,
                flags: &plan.flags,
            },
        );
        let same = self
            .prepare("SELECT 1 FROM plans WHERE run = ?1 AND desired IS ?2 AND sum = ?3 AND json = ?4")?
            .exists(params![run.0.cast_signed(), digest, row.sum, row.json])?;
        if !same {
            self.prepare("INSERT OR REPLACE INTO plans (run, desired, json, sum) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![run.0.cast_signed(), digest, row.json, row.sum])?;
        }
        Ok(())
    }

    fn put_steps(&self, run: RunId, steps: &BTreeMap<ResourceId, StepState>) -> Result<(), Failure> {
        let mut stored = run_steps(self.connection, run)?;
        for (resource, state) in steps {
            if stored.remove(resource) != Some(*state) {
                self.put_step(run, resource, *state)?;
            }
        }
        for resource in stored.into_keys() {
            self.prepare("DELETE FROM run_steps WHERE run = ?1 AND resource = ?2")?
                .execute(params![run.0.cast_signed(), resource.to_string()])?;
        }
        Ok(())
    }

    fn put_step(&self, run: RunId, resource: &ResourceId, state: StepState) -> Result<(), Failure> {
        let word = word(state);
        let sum = row::checksum(&format!("{} {resource}", run.0), &word);
        self.prepare("INSERT OR REPLACE INTO run_steps (run, resource, state, sum) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![run.0.cast_signed(), resource.to_string(), word, sum])?;
        Ok(())
    }

    fn step(&mut self, id: RunId, resource: &ResourceId, state: StepState) -> Result<(), Failure> {
        let Some(row) = run(self.connection, id)? else {
            return Err(Violation::NoRun { run: id, environment: None }.into());
        };
        if row.state.is_final() {
            return Err(Violation::StepOfEndedRun { run: id, resource: resource.clone() }.into());
        }
        let current = environment_generation(self.connection, &row.environment)?;
        fence(&row.environment, id, row.generation, current)?;
        self.put_step(id, resource, state)
    }

    // === instances and resources ===

    fn instance(&mut self, record: &InstanceRecord) -> Result<(), Failure> {
        if record.kind == ResourceKind::Volume {
            return Err(inconsistent(&record.id, "a volume has no instances"));
        }
        let (environment, id) = (record.environment.to_string(), record.id.to_string());
        let before: Option<InstanceRecord> =
            row::INSTANCES.one(self.connection, "WHERE environment = ?1 AND id = ?2", [&environment, &id])?;
        invariant::instance_moves_on(before.as_ref(), record)?;
        let row = encode(&format!("{environment} {id}"), record);
        if before.is_some() {
            self.prepare("UPDATE instances SET json = ?3, sum = ?4 WHERE environment = ?1 AND id = ?2")?
                .execute(params![environment, id, row.json, row.sum])?;
        } else {
            self.prepare("INSERT INTO instances (environment, id, json, sum) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![environment, id, row.json, row.sum])?;
            // An ordinal is used up by the instance that has it, whatever the environment's record says.
            self.put_ordinal(&environment, record.id.workload.as_str(), record.id.release, record.id.ordinal)?;
            self.needed.entry(record.environment.clone()).or_insert(id);
        }
        Ok(())
    }

    fn resource(&mut self, record: &ResourceRecord) -> Result<(), Failure> {
        if record.id.kind != record.applied.kind() {
            return Err(inconsistent(&record.id, "its id names another kind than what was applied"));
        }
        if record.digest != record.applied.digest() {
            return Err(inconsistent(&record.id, "its digest is not that of what was applied"));
        }
        let row = encode(&format!("{} {}", record.environment, record.id), record);
        self.prepare(
            "INSERT INTO resources (environment, id, json, sum) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO UPDATE SET json = excluded.json, sum = excluded.sum",
        )?
        .execute(params![record.environment.to_string(), record.id.to_string(), row.json, row.sum])?;
        self.needed.entry(record.environment.clone()).or_insert_with(|| record.id.to_string());
        Ok(())
    }

    /// Removes a row; that it is not there is fine.
    fn forget(&self, table: &'static str, environment: &EnvironmentId, id: &str) -> Result<(), Failure> {
        self.prepare(&format!("DELETE FROM {table} WHERE environment = ?1 AND id = ?2"))?
            .execute([&environment.to_string(), id])?;
        Ok(())
    }

    // === journal and events ===

    fn journal(&mut self, entry: &JournalEntry) -> Result<(), Failure> {
        self.counters.journal += 1;
        let sequence = self.counters.journal;
        if entry.entry == JournalKind::Intent {
            if let Some(id) = entry.run {
                let Some(row) = run(self.connection, id)? else {
                    return Err(Violation::NoRun { run: id, environment: None }.into());
                };
                let current = environment_generation(self.connection, &row.environment)?;
                fence(&row.environment, id, row.generation, current)?;
            }
            // After a crash an intent may be written again before it is tried again.
            let sum = row::checksum(&entry.key, &sequence.to_string());
            self.prepare("INSERT OR REPLACE INTO open_intents (key, sequence, sum) VALUES (?1, ?2, ?3)")?
                .execute(params![entry.key, sequence.cast_signed(), sum])?;
        } else {
            let closed = self.prepare("DELETE FROM open_intents WHERE key = ?1")?.execute([&entry.key])?;
            if closed == 0 {
                return Err(Violation::NoIntent { key: entry.key.clone() }.into());
            }
        }
        let row = encode(&format!("{sequence} {}", self.at), entry);
        self.prepare("INSERT INTO journal (sequence, at, json, sum) VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            sequence.cast_signed(),
            self.at.cast_signed(),
            row.json,
            row.sum
        ])?;
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), Failure> {
        self.counters.event += 1;
        let event = Event { sequence: self.counters.event, at: self.at, ..event.clone() };
        let run = event.run.map(|run| run.0.cast_signed());
        let resource = event.resource.as_ref().map(ToString::to_string);
        let instance = event.instance.as_ref().map(ToString::to_string);
        let key = format!(
            "{} {} {} {} {}",
            event.sequence,
            event.environment,
            run.map(|run| run.to_string()).unwrap_or_default(),
            resource.as_deref().unwrap_or_default(),
            instance.as_deref().unwrap_or_default()
        );
        let row = encode(&key, &event);
        self.prepare(
            "INSERT INTO events (sequence, environment, run, resource, instance, json, sum)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            event.sequence.cast_signed(),
            event.environment.to_string(),
            run,
            resource,
            instance,
            row.json,
            row.sum
        ])?;
        self.events.push(Arc::new(event));
        Ok(())
    }

    // === the whole ===

    fn check_whole(&self) -> Result<(), Failure> {
        for (environment, subject) in &self.needed {
            if !self.prepare("SELECT 1 FROM environments WHERE id = ?1")?.exists([environment.to_string()])? {
                let (environment, subject) = (environment.clone(), subject.clone());
                return Err(Violation::NoEnvironment { environment, subject }.into());
            }
        }
        for (environment, id) in &self.runs {
            self.check_run_belongs(environment, *id)?;
        }
        for id in &self.touched {
            if let Some(record) = environment(self.connection, id)? {
                self.check_releases(&record)?;
                self.check_runs(&record)?;
            }
        }
        for (environment, run, generation) in &self.started {
            let current = environment_generation(self.connection, environment)?;
            fence(environment, *run, *generation, current)?;
            if *generation > current {
                return Err(inconsistent(run, "its generation is beyond that of its environment"));
            }
        }
        Ok(())
    }

    fn check_run_belongs(&self, environment: &EnvironmentId, id: RunId) -> Result<(), Failure> {
        let belongs = self
            .prepare("SELECT 1 FROM runs WHERE id = ?1 AND environment = ?2")?
            .exists(params![id.0.cast_signed(), environment.to_string()])?;
        if belongs {
            return Ok(());
        }
        Err(Violation::NoRun { run: id, environment: Some(environment.clone()) }.into())
    }

    fn check_releases(&self, record: &EnvironmentRecord) -> Result<(), Failure> {
        let environment = record.id.clone();
        let id = record.id.to_string();
        let newest = self.newest_release(&environment)?;
        if newest > record.last_release {
            let last = record.last_release;
            return Err(Violation::ReleaseBeyondLast { environment, number: newest, last }.into());
        }
        let stable: Vec<ReleaseNumber> = self
            .prepare("SELECT number FROM releases WHERE environment = ?1 AND state = 'stable' ORDER BY number LIMIT 2")?
            .query_map([&id], |row| row.get::<_, i64>(0).map(|n| ReleaseNumber(n.cast_unsigned())))?
            .collect::<Result<_, _>>()?;
        if let [first, second] = stable[..] {
            return Err(Violation::TwoStable { environment, first, second }.into());
        }
        if let Some(number) = record.stable {
            if release(self.connection, &environment, number)?.is_none() {
                return Err(Violation::NoRelease { environment, number }.into());
            }
            if stable.first() != Some(&number) {
                return Err(Violation::NotStable { environment, number }.into());
            }
        }
        Ok(())
    }

    fn check_runs(&self, record: &EnvironmentRecord) -> Result<(), Failure> {
        let going: Vec<RunId> = self
            .prepare(
                "SELECT id FROM runs WHERE environment = ?1 AND state IN ('running', 'reverting') ORDER BY id LIMIT 2",
            )?
            .query_map([record.id.to_string()], |row| row.get::<_, i64>(0).map(|n| RunId(n.cast_unsigned())))?
            .collect::<Result<_, _>>()?;
        if let [first, second] = going[..] {
            return Err(Violation::TwoRuns { environment: record.id.clone(), first, second }.into());
        }
        record.run.map_or(Ok(()), |run| self.check_run_belongs(&record.id, run))
    }

    fn prepare(&self, sql: &str) -> rusqlite::Result<rusqlite::CachedStatement<'_>> {
        self.connection.prepare_cached(sql)
    }
}

/// Refuses what a run of an older generation writes.
fn fence(environment: &EnvironmentId, run: RunId, held: Generation, current: Generation) -> Result<(), Violation> {
    if held < current {
        return Err(Violation::Fenced { environment: environment.clone(), run, held, current });
    }
    Ok(())
}

fn inconsistent(subject: impl std::fmt::Display, what: &'static str) -> Failure {
    Violation::Inconsistent { subject: subject.to_string(), what }.into()
}

// === single rows, also for readers ===

/// The record of an environment, without its ordinals.
pub(crate) fn environment(connection: &Connection, id: &EnvironmentId) -> Result<Option<EnvironmentRecord>, Failure> {
    row::ENVIRONMENTS.one(connection, "WHERE id = ?1", [id.to_string()])
}

/// The fencing number of an environment, without the rest of its record, which can be large.
fn environment_generation(connection: &Connection, id: &EnvironmentId) -> Result<Generation, Failure> {
    let generation: Option<i64> = connection
        .prepare_cached("SELECT generation FROM environments WHERE id = ?1")?
        .query_row([id.to_string()], |row| row.get(0))
        .optional()?;
    Ok(generation.map(|generation| Generation(generation.cast_unsigned())).unwrap_or_default())
}

/// Last ordinals by workload and release.
pub(crate) fn ordinals(connection: &Connection, environment: &str) -> Result<BTreeMap<(String, u64), u32>, Failure> {
    let mut statement =
        connection.prepare_cached("SELECT workload, release, last, sum FROM ordinals WHERE environment = ?1")?;
    let mut rows = statement.query([environment])?;
    let mut ordinals = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let (workload, release, last): (String, i64, u32) = (row.get(0)?, row.get(1)?, row.get(2)?);
        row::ORDINALS.fits(&format!("{environment} {workload} {release}"), &last.to_string(), row.get(3)?)?;
        ordinals.insert((workload, release.cast_unsigned()), last);
    }
    Ok(ordinals)
}

/// A release without its desired state.
pub(crate) fn release(
    connection: &Connection,
    environment: &EnvironmentId,
    number: ReleaseNumber,
) -> Result<Option<ReleaseRow>, Failure> {
    let key = params![environment.to_string(), number.0.cast_signed()];
    row::RELEASES.one(connection, "WHERE environment = ?1 AND number = ?2", key)
}

/// A run without its plan and steps.
pub(crate) fn run(connection: &Connection, id: RunId) -> Result<Option<RunRow>, Failure> {
    row::RUNS.one(connection, "WHERE id = ?1", [id.0.cast_signed()])
}

/// Where the steps of a run stand.
pub(crate) fn run_steps(connection: &Connection, id: RunId) -> Result<BTreeMap<ResourceId, StepState>, Failure> {
    let mut statement = connection.prepare_cached("SELECT resource, state, sum FROM run_steps WHERE run = ?1")?;
    let mut rows = statement.query([id.0.cast_signed()])?;
    let mut steps = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let (resource, state): (String, String) = (row.get(0)?, row.get(1)?);
        let key = format!("{} {resource}", id.0);
        row::RUN_STEPS.fits(&key, &state, row.get(2)?)?;
        let unreadable = |what: String| Damage { table: row::RUN_STEPS.name, key: key.clone(), what };
        let resource = resource.parse().map_err(|e: ParseIdError| unreadable(e.to_string()))?;
        let state = serde_json::from_value(serde_json::Value::String(state)).map_err(|e| unreadable(e.to_string()))?;
        steps.insert(resource, state);
    }
    Ok(steps)
}
