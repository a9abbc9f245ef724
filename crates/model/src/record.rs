//! What is written down: the rows of the store, and the changes that are committed to it.
//!
//! A list of [`Change`]s is committed as a whole or not at all, and durable before the effects that depend on it begin.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    autoscale::AutoscaleRecord,
    desired::{Dependency, Desired, Resource},
    diagnostic::Diagnostic,
    event::Event,
    flag::{FlagName, Override},
    id::{Digest, EnvironmentId, Generation, InstanceId, Name, ReleaseNumber, ResourceId, ResourceKind, RunId},
    launch::Exit,
    plan::Plan,
    preview::PreviewRecord,
    rollout::{RolloutRecord, VerdictRecord},
    time::UnixMillis,
    traffic::PausedTraffic,
};

/// An environment that Orchestra knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EnvironmentRecord {
    /// Which.
    pub id: EnvironmentId,
    /// Absolute path of the stack file that was last applied.
    pub source: String,
    /// Fencing number of the last run.
    pub generation: Generation,
    /// Release in force as a whole: the one to go back to.
    pub stable: Option<ReleaseNumber>,
    /// Last release number that was given out.
    pub last_release: ReleaseNumber,
    /// Run that has not ended.
    pub run: Option<RunId>,
    /// Ports that the machine chose for published ports without a number, by service and port.
    pub chosen_ports: BTreeMap<Name, BTreeMap<Name, u16>>,
    /// Last ordinal that was given out, by workload and release.
    pub ordinals: BTreeMap<Name, BTreeMap<ReleaseNumber, u32>>,
    /// Rollouts that go on, or whose old set is still kept, by service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rollouts: BTreeMap<Name, RolloutRecord>,
    /// Decisions laid over the flags' own rules, by flag.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub flag_overrides: BTreeMap<FlagName, Override>,
    /// Numbers of instances that follow the load, by service: they count, and not what the release says.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scaled: BTreeMap<Name, ScaledRecord>,
    /// Services whose new requests wait because a person said so.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub paused: BTreeMap<Name, PausedTraffic>,
    /// What makes it a preview, if it is or was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<Box<PreviewRecord>>,
    /// By when the run that goes on must have got where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadlines: Option<Box<Deadlines>>,
}

/// Absolute deadlines of a run. Written down, so that a server that dies again and again cannot put them off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Deadlines {
    /// Of steps that have begun, or whose turn it is: forward, or back once the run is turned back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub steps: BTreeMap<ResourceId, UnixMillis>,
    /// Of the flags, once every step is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<UnixMillis>,
}

impl EnvironmentRecord {
    /// Of an environment that has nothing yet.
    pub const fn new(id: EnvironmentId) -> Self {
        Self {
            id,
            source: String::new(),
            generation: Generation(0),
            stable: None,
            last_release: ReleaseNumber(0),
            run: None,
            chosen_ports: BTreeMap::new(),
            ordinals: BTreeMap::new(),
            rollouts: BTreeMap::new(),
            flag_overrides: BTreeMap::new(),
            scaled: BTreeMap::new(),
            paused: BTreeMap::new(),
            preview: None,
            deadlines: None,
        }
    }

    /// The run that walks a plan next, with the numbers that follow. A plan that does nothing makes no release.
    pub fn next_run(&self, id: RunId, kind: RunKind, plan: Plan, at: UnixMillis) -> RunRecord {
        let releases = !plan.is_empty() && plan.desired.is_some();
        RunRecord {
            id,
            environment: self.id.clone(),
            kind,
            generation: Generation(self.generation.0 + 1),
            release: releases.then(|| ReleaseNumber(self.last_release.0 + 1)),
            plan,
            state: RunState::Running,
            steps: BTreeMap::new(),
            started_at: at,
            ended_at: None,
            problems: Vec::new(),
            reverted: None,
            culprits: Vec::new(),
            request_key: None,
        }
    }
}

/// The number of instances of a service that scales by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScaledRecord {
    /// Instances that are wanted.
    pub replicas: u32,
    /// The number before the run that goes on set another one by hand: what to go back to if it fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u32>,
    /// What its autoscaler must not forget.
    pub autoscale: AutoscaleRecord,
}

/// A numbered, immutable record of a desired state that was put into an environment. Only `state` moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReleaseRecord {
    /// Where.
    pub environment: EnvironmentId,
    /// Number, from 1.
    pub number: ReleaseNumber,
    /// When.
    pub created_at: UnixMillis,
    /// Run that made it.
    pub run: RunId,
    /// Why: `up`, `scale api=3`, `restart api`, `rollback to release 2`.
    pub reason: String,
    /// How it fared.
    pub state: ReleaseState,
    /// What it asks for.
    pub desired: Desired,
    /// Verdicts about it, in the order in which they were given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verdicts: Vec<VerdictRecord>,
}

/// How a release fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseState {
    /// Its run goes on.
    Deploying,
    /// It is in force.
    Stable,
    /// It was in force until another one was, or until it was taken down.
    Retired,
    /// It never was in force: its run failed or was cancelled.
    Failed,
    /// It never was in force: something newer took its place in the middle of its rollout.
    Superseded,
}

impl ReleaseState {
    /// Whether nobody can go back to it, because it stood no test.
    pub const fn never_was_in_force(self) -> bool {
        matches!(self, Self::Failed | Self::Superseded)
    }
}

/// Why a run exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunKind {
    /// `orchestra up`
    Up,
    /// `orchestra down`
    Down {
        /// Also delete managed volumes.
        volumes: bool,
    },
    /// `orchestra restart`
    Restart {
        /// Which services; empty means all.
        services: Vec<Name>,
    },
    /// `orchestra scale`
    Scale {
        /// New replica counts.
        replicas: BTreeMap<Name, u32>,
    },
    /// `orchestra rollback`
    Rollback {
        /// To which release.
        to: ReleaseNumber,
    },
}

/// One execution of one plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RunRecord {
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
    /// The plan.
    pub plan: Plan,
    /// Where it stands.
    pub state: RunState,
    /// Where its steps stand; steps that have not begun are missing.
    pub steps: BTreeMap<ResourceId, StepState>,
    /// When it began.
    pub started_at: UnixMillis,
    /// When it ended.
    pub ended_at: Option<UnixMillis>,
    /// Why it failed, the first cause first.
    pub problems: Vec<Diagnostic>,
    /// What was reverted, in words.
    pub reverted: Option<String>,
    /// Instances that made it fail; their last output tells more.
    #[serde(default)]
    pub culprits: Vec<InstanceId>,
    /// Idempotency key of the request that started it, as its client made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_key: Option<String>,
}

impl RunRecord {
    /// The release that it makes, if it makes one.
    pub fn new_release(&self, reason: String) -> Option<ReleaseRecord> {
        self.release.zip(self.plan.desired.clone()).map(|(number, desired)| ReleaseRecord {
            environment: self.environment.clone(),
            number,
            created_at: self.started_at,
            run: self.id,
            reason,
            state: ReleaseState::Deploying,
            desired,
            verdicts: Vec::new(),
        })
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// It goes on.
    Running,
    /// It failed or was cancelled, and puts back what was there before.
    Reverting,
    /// It reached its goal.
    Succeeded,
    /// It did not; what it had changed was put back, as `reverted` says.
    Failed,
    /// A person ended it, or something newer took its place; what it had changed was put back, as `reverted` says.
    Cancelled,
}

impl RunState {
    /// Whether it has ended.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// It goes on.
    Running,
    /// It is done.
    Succeeded,
    /// It failed.
    Failed,
    /// It was put back.
    Reverted,
}

/// One replica of a workload. Written before it is launched, forgotten after it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceRecord {
    /// Where.
    pub environment: EnvironmentId,
    /// Which.
    pub id: InstanceId,
    /// Service or job.
    pub kind: ResourceKind,
    /// Digest of what it was launched with.
    pub launch_digest: Digest,
    /// Which start of it is, or would be, current.
    pub attempt: u32,
    /// Its own ports by name.
    pub ports: BTreeMap<Name, u16>,
    /// What is intended with it.
    pub intent: InstanceIntent,
    /// Whether the current attempt was ready at some time: requests may have been routed to it.
    pub was_ready: bool,
    /// How the last attempt ended.
    pub last_exit: Option<Exit>,
    /// Why the current attempt was ended by us though it should run: a failed live check, a passed deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<String>,
    /// Restarts that its budget counts: those since it was last ready for long enough.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub recent_restarts: u32,
    /// Restarts in all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
    /// When this record was made.
    pub created_at: UnixMillis,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// What is intended with an instance: enough to continue after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceIntent {
    /// It should run; its current attempt may or may not have been launched.
    Run,
    /// It should finish what it has, and then stop.
    Drain,
    /// It should stop.
    Stop,
}

/// What was last applied for one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceRecord {
    /// Where.
    pub environment: EnvironmentId,
    /// Which.
    pub id: ResourceId,
    /// What was applied.
    pub applied: Resource,
    /// Digest of `applied`.
    pub digest: Digest,
    /// Release that applied it.
    pub release: ReleaseNumber,
    /// Its edges, kept because the spec may not have it any more when it is deleted.
    pub depends_on: BTreeMap<ResourceId, Dependency>,
    /// For a job: whether it completed.
    pub completed: bool,
}

/// One line of the journal: an intent before an effect, or its outcome after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JournalEntry {
    /// Idempotency key of the effect, such as `demo/dev/api-r3-1#1 launch`.
    pub key: String,
    /// Run that it is part of; `None` for what the control plane does to keep things running.
    pub run: Option<RunId>,
    /// Intent or outcome.
    pub entry: JournalKind,
}

/// Kinds of journal lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JournalKind {
    /// It is about to be done.
    Intent,
    /// It was done.
    Done,
    /// It failed, and how.
    Failed(String),
}

/// One change of what is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Inserts or replaces.
    Environment(EnvironmentRecord),
    /// Inserts or replaces.
    Release(Box<ReleaseRecord>),
    /// Moves a release to another state.
    ReleaseState(EnvironmentId, ReleaseNumber, ReleaseState),
    /// Appends a verdict to a release; the store gives it its time.
    Verdict(EnvironmentId, ReleaseNumber, Box<VerdictRecord>),
    /// Inserts or replaces.
    Run(Box<RunRecord>),
    /// Moves one step of a run.
    Step(RunId, ResourceId, StepState),
    /// Inserts or replaces.
    Instance(Box<InstanceRecord>),
    /// Removes.
    ForgetInstance(EnvironmentId, InstanceId),
    /// Inserts or replaces.
    Resource(Box<ResourceRecord>),
    /// Removes.
    ForgetResource(EnvironmentId, ResourceId),
    /// Appends.
    Journal(JournalEntry),
    /// Appends; the store gives it its sequence number and time.
    Event(Box<Event>),
}

/// All that is written down of one environment, except its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvironmentState {
    /// The environment.
    pub environment: EnvironmentRecord,
    /// Its resources.
    pub resources: BTreeMap<ResourceId, ResourceRecord>,
    /// Its instances.
    pub instances: BTreeMap<InstanceId, InstanceRecord>,
    /// The run that has not ended.
    pub run: Option<RunRecord>,
    /// Releases that matter: the stable one and that of the run.
    pub releases: BTreeMap<ReleaseNumber, ReleaseRecord>,
}

impl EnvironmentState {
    /// Of an environment with nothing but its record.
    pub const fn new(environment: EnvironmentRecord) -> Self {
        Self {
            environment,
            resources: BTreeMap::new(),
            instances: BTreeMap::new(),
            run: None,
            releases: BTreeMap::new(),
        }
    }

    /// What a change makes of it, for worlds that keep it in memory; the laws of the store are not checked. An event has no
    /// place in it and is given back.
    pub fn apply(&mut self, change: Change) -> Option<Event> {
        match change {
            Change::Environment(record) => self.environment = record,
            Change::Release(record) => {
                self.releases.insert(record.number, *record);
            }
            Change::ReleaseState(_, number, state) => {
                if let Some(release) = self.releases.get_mut(&number) {
                    release.state = state;
                }
            }
            Change::Verdict(_, number, verdict) => {
                if let Some(release) = self.releases.get_mut(&number) {
                    release.verdicts.push(*verdict);
                }
            }
            Change::Run(record) => self.run = Some(*record),
            Change::Step(run, resource, state) => {
                if let Some(record) = self.run.as_mut().filter(|record| record.id == run) {
                    record.steps.insert(resource, state);
                }
            }
            Change::Instance(record) => {
                self.instances.insert(record.id.clone(), *record);
            }
            Change::ForgetInstance(_, id) => {
                self.instances.remove(&id);
            }
            Change::Resource(record) => {
                self.resources.insert(record.id.clone(), *record);
            }
            Change::ForgetResource(_, id) => {
                self.resources.remove(&id);
            }
            Change::Journal(_) => {}
            Change::Event(event) => return Some(*event),
        }
        None
    }
}
