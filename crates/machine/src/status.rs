//! What people see of an environment: a plain value, made on demand.

use std::{collections::BTreeMap, time::Duration};

use orchestra_model::{
    InstanceId, Now, ReleaseNumber, ResourceId, RunId,
    launch::Exit,
    record::{RunKind, RunRecord, RunState, StepState},
    rollout::{RolloutPhase, RolloutRecord},
    time::UnixMillis,
};

use crate::{
    Environment, Which,
    health::{Health, Verdict},
    instance::Instance,
};

/// An environment at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Release in force as a whole.
    pub stable: Option<ReleaseNumber>,
    /// Run that has not ended.
    pub run: Option<RunStatus>,
    /// Services and jobs, and volumes.
    pub resources: Vec<ResourceStatus>,
    /// How much of its time a preview has left, if that ends; nothing once it is over.
    pub preview_left: Option<Duration>,
}

/// A run at one moment. Its plan, which may be large and never changes, has [`Environment::run`].
#[derive(Clone, Debug, PartialEq)]
pub struct RunStatus {
    /// Which.
    pub id: RunId,
    /// Why it exists.
    pub kind: RunKind,
    /// Release that it puts into force.
    pub release: Option<ReleaseNumber>,
    /// Where it stands.
    pub state: RunState,
    /// Where its steps stand; steps that have not begun are missing.
    pub steps: BTreeMap<ResourceId, StepState>,
    /// When it began.
    pub started_at: UnixMillis,
}

/// A resource at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct ResourceStatus {
    /// Which.
    pub id: ResourceId,
    /// One word: `ready`, `asleep`, `stopped`, `starting`, `degraded`, `failed`, `stopping`, `waiting`, `completed`, `running`, `present`, `gone`.
    pub state: &'static str,
    /// Release it is at, or moves to.
    pub release: Option<ReleaseNumber>,
    /// Instances that are wanted.
    pub replicas: u32,
    /// Instances that are ready and of that release's form.
    pub ready: u32,
    /// Published addresses: port name and URL, if known.
    pub addresses: Vec<(String, Option<String>)>,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// Its step in the run, if it has one that began.
    pub step: Option<StepState>,
    /// Its instances.
    pub instances: Vec<InstanceStatus>,
    /// Its rollout, or the old set that is still kept.
    pub rollout: Option<RolloutStatus>,
    /// What its autoscaler found and decided last, and what it waits for, in sentences; empty if it does not scale.
    pub scaling: Vec<String>,
}

/// A rollout at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutStatus {
    /// What is written down of it.
    pub record: RolloutRecord,
    /// `canary`, `blue_green`, …
    pub strategy: &'static str,
    /// Steps in all.
    pub steps: u32,
    /// Where it stands: `step 2 of 5: weight 25 %`.
    pub words: String,
    /// Instances of the new set: available, and wanted now.
    pub instances: (u32, u32),
    /// Instances of the old set that are ready.
    pub baseline: u32,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// Copied requests so far: those of which both responses agreed, and the others.
    pub mirrored: (u64, u64),
    /// When the old set is let go, if that is known.
    pub cold_at: Option<UnixMillis>,
}

/// An instance at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceStatus {
    /// Which.
    pub id: InstanceId,
    /// Phase.
    pub phase: &'static str,
    /// Which start of it.
    pub attempt: u32,
    /// Main process.
    pub pid: Option<u32>,
    /// Its ports.
    pub ports: Vec<(String, u16)>,
    /// Time in this phase.
    pub since: Duration,
    /// Restarts so far.
    pub restarts: u32,
    /// How its last process ended.
    pub last_exit: Option<Exit>,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// How long until that is over by itself, if it is a pause.
    pub due: Option<Duration>,
    /// Its ready check.
    pub ready: Option<CheckStatus>,
    /// Its live check.
    pub live: Option<CheckStatus>,
    /// What it said last of itself.
    pub status_text: Option<String>,
    /// What went wrong last.
    pub problem: Option<String>,
    /// Launched with what is wanted now.
    pub current: bool,
    /// Requests and streams in flight while it drains.
    pub in_flight: (u32, u32),
}

/// A check at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckStatus {
    /// How it is.
    pub verdict: Verdict,
    /// Answers of the same kind in a row.
    pub streak: u32,
    /// What does not pass.
    pub detail: String,
}

impl Environment {
    /// What people see.
    pub fn status(&self, now: Now) -> Status {
        let mut ids: Vec<ResourceId> = self.resource_ids();
        if let Some(run) = self.run() {
            ids.extend(run.plan.steps.iter().map(|step| step.resource.clone()));
        }
        ids.sort();
        ids.dedup();
        Status {
            stable: self.record().stable,
            run: self.run().map(RunStatus::of),
            resources: ids.into_iter().map(|id| self.resource_status(now, id)).collect(),
            preview_left: self.preview_left(now),
        }
    }
}

impl Status {
    /// Whether a rollout in steps goes on.
    pub fn is_rolling_out(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.state == RunState::Running)
            && self
                .resources
                .iter()
                .filter_map(|resource| resource.rollout.as_ref())
                .any(|rollout| rollout.steps > 0 && rollout.record.phase != RolloutPhase::Warm)
    }
}

impl RunStatus {
    fn of(run: &RunRecord) -> Self {
        Self {
            id: run.id,
            kind: run.kind.clone(),
            release: run.release,
            state: run.state,
            steps: run.steps.clone(),
            started_at: run.started_at,
        }
    }
}

impl InstanceStatus {
    pub(crate) fn of(instance: &Instance, current: bool, now: Now) -> Self {
        let record = instance.record();
        let health = |which| {
            let of = |health: &Health| CheckStatus {
                verdict: health.verdict(),
                streak: health.streak(),
                detail: health.detail(),
            };
            instance.health(which).map(of)
        };
        Self {
            id: record.id.clone(),
            phase: instance.phase().as_str(),
            attempt: record.attempt,
            pid: instance.pid(),
            ports: record.ports.iter().map(|(name, port)| (name.to_string(), *port)).collect(),
            since: now.since(instance.since()),
            restarts: instance.restarts(),
            last_exit: record.last_exit,
            waits_for: instance.waits_for(),
            due: instance.due().map(|due| due.since(now)),
            ready: health(Which::Ready),
            live: health(Which::Live),
            status_text: instance.status_text().map(str::to_owned),
            problem: instance.problem().map(|p| p.message.clone()),
            current,
            in_flight: instance.in_flight(),
        }
    }
}
