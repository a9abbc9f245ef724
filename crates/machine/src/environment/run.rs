//! The run: walks exactly the graph that the plan printed, and turns back as a whole when a step fails.
//!
//! ```text
//!   Running --- every step succeeded --------------------------------> Succeeded
//!      |
//!      | a step failed or passed its deadline, a person cancelled, or something newer takes its place
//!      v
//!   Reverting - every touched step is put back, in reverse order ----> Failed | Cancelled
//! ```
//!
//! A step begins when everything that it waits for holds, and is done when the world shows it. Each has a deadline of
//! its own, so the whole has one. Reverting puts each touched resource back to what the stable release says of it, or
//! removes it if that says nothing; what cannot be put back within its deadline is named in the run's record.

mod back;
mod deadlines;
mod target;
mod waits;

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Code, Diagnostic, EventKind, InstanceId, Name, Now, ReleaseNumber, Resource, ResourceId, ResourceKind, RunId,
    plan::{Action, Step},
    record::{
        Change, JournalKind, ReleaseRecord, ReleaseState, ResourceRecord, RunKind, RunRecord, RunState, StepState,
    },
};

use self::target::TargetState;
use super::Environment;
use crate::instance::Event;

/// A run that has not ended.
#[derive(Clone, Debug)]
pub(super) struct ActiveRun {
    pub(super) record: RunRecord,
    cancelled: bool,
    /// Steps that wait for a resource, by position.
    waiters: BTreeMap<ResourceId, BTreeSet<usize>>,
    position: BTreeMap<ResourceId, usize>,
    /// Steps whose revert was begun.
    reverting: BTreeSet<ResourceId>,
    /// Steps in these states.
    succeeded: usize,
    reverted: usize,
    not_reverted: Vec<ResourceId>,
}

impl ActiveRun {
    pub(super) fn new(record: RunRecord) -> Self {
        let mut waiters: BTreeMap<ResourceId, BTreeSet<usize>> = BTreeMap::new();
        let mut position = BTreeMap::new();
        for (index, step) in record.plan.steps.iter().enumerate() {
            position.insert(step.resource.clone(), index);
            for on in step.after.keys() {
                waiters.entry(on.clone()).or_default().insert(index);
            }
        }
        Self {
            record,
            cancelled: false,
            waiters,
            position,
            reverting: BTreeSet::new(),
            succeeded: 0,
            reverted: 0,
            not_reverted: Vec::new(),
        }
    }

    /// A run after a recovery.
    pub(super) fn resumed(record: RunRecord) -> Self {
        let cancelled = record.problems.iter().any(|p| p.code == Code::RUN_CANCELLED || p.code == Code::SUPERSEDED);
        let mut run = Self::new(record);
        run.cancelled = cancelled;
        for state in run.record.steps.values() {
            run.succeeded += usize::from(*state == StepState::Succeeded);
            run.reverted += usize::from(*state == StepState::Reverted);
        }
        run
    }

    /// Whether something newer takes its place. That is the first cause, if it is one: nothing is superseded that turns back.
    fn is_superseded(&self) -> bool {
        self.record.problems.first().is_some_and(|problem| problem.code == Code::SUPERSEDED)
    }

    fn step(&self, id: &ResourceId) -> Option<&Step> {
        self.position.get(id).map(|index| &self.record.plan.steps[*index])
    }

    fn state(&self, id: &ResourceId) -> Option<StepState> {
        self.record.steps.get(id).copied()
    }

    /// Resources whose step has not ended.
    pub(super) fn unfinished(&self) -> Vec<ResourceId> {
        let open = |state: Option<StepState>| match self.record.state {
            RunState::Reverting => state.is_some_and(|s| s != StepState::Reverted),
            _ => matches!(state, None | Some(StepState::Running)),
        };
        self.record.plan.steps.iter().map(|s| &s.resource).filter(|id| open(self.state(id))).cloned().collect()
    }
}

impl Environment {
    pub(super) fn run_requested(&mut self, now: Now, run: RunRecord, release: Option<ReleaseRecord>, source: String) {
        self.record.generation = run.generation;
        self.record.run = Some(run.id);
        self.record.source = source;
        self.record_changed = true;
        if let Some(release) = release {
            self.record.last_release = release.number;
            self.out.changes.push(Change::Release(Box::new(release.clone())));
            let (number, reason) = (release.number, release.reason.clone());
            self.releases.insert(number, release);
            self.note(EventKind::ReleaseCreated, None, None, Some(number), reason);
        }
        let preview = run.plan.desired.as_ref().and_then(|desired| desired.preview.as_ref());
        if let (RunKind::Up, Some(preview)) = (&run.kind, preview) {
            self.enter_preview(now, &preview.clone());
        }
        self.out.changes.push(Change::Run(Box::new(run.clone())));
        let cause = describe(&run.kind, run.release);
        self.run = Some(ActiveRun::new(run));
        self.note(EventKind::RunStarted, None, None, None, cause);
        self.refresh_flags(self.wall(now));
        self.continue_run(now);
    }

    /// Looks at every step again: at the start of a run, and after a recovery.
    pub(super) fn continue_run(&mut self, now: Now) {
        let Some(run) = &self.run else { return };
        let steps: Vec<ResourceId> = run.record.plan.steps.iter().map(|s| s.resource.clone()).collect();
        for id in &steps {
            self.try_begin(now, id);
        }
        self.changed.extend(steps);
        self.conclude(now);
    }

    pub(super) fn cancel_requested(&mut self, now: Now, id: RunId) {
        let problem = Diagnostic::error(Code::RUN_CANCELLED, "the run was cancelled");
        self.cancel(now, id, problem, "cancelled");
    }

    /// Turns the run back because a person wants so.
    pub(super) fn abort_run(&mut self, now: Now, id: RunId, by: &str) {
        let problem = Diagnostic::error(Code::RUN_CANCELLED, format!("the run was aborted by {by}"));
        self.cancel(now, id, problem, &format!("aborted by {by}"));
    }

    /// Turns the run back because something newer takes its place.
    pub(super) fn supersede_run(&mut self, now: Now, by: &str) {
        let Some(run) = &self.run else { return };
        let (id, release) = (run.record.id, run.record.release);
        let what = release.map_or_else(|| "the run".to_owned(), |release| format!("release {release}"));
        let problem = Diagnostic::error(Code::SUPERSEDED, format!("{what} was superseded by {by}"));
        self.cancel(now, id, problem, &format!("superseded by {by}"));
    }

    fn cancel(&mut self, now: Now, id: RunId, problem: Diagnostic, cause: &str) {
        let Some(run) = &mut self.run else { return };
        if run.record.id != id || run.record.state != RunState::Running {
            return;
        }
        run.cancelled = true;
        run.record.problems.push(problem);
        self.begin_revert(now, cause.to_owned());
    }

    /// A resource changed: its step may be done or failed, and steps that wait for it may begin.
    pub(super) fn advance_run(&mut self, now: Now, id: &ResourceId) {
        let Some(run) = &self.run else { return };
        match run.record.state {
            RunState::Running => {
                if run.state(id) == Some(StepState::Running) {
                    self.check_step(now, id);
                }
                self.wake_waiters(now, id);
            }
            RunState::Reverting => self.check_revert(now, id),
            RunState::Succeeded | RunState::Failed | RunState::Cancelled => {}
        }
        self.conclude(now);
    }

    fn wake_waiters(&mut self, now: Now, id: &ResourceId) {
        let Some(run) = &self.run else { return };
        let waiting: Vec<ResourceId> = run
            .waiters
            .get(id)
            .into_iter()
            .flatten()
            .map(|index| run.record.plan.steps[*index].resource.clone())
            .collect();
        for step in waiting {
            self.try_begin(now, &step);
        }
    }

    // === forward ===

    fn try_begin(&mut self, now: Now, id: &ResourceId) {
        let Some(run) = &self.run else { return };
        if run.record.state != RunState::Running || run.state(id).is_some() {
            // A step that was running when the control plane died is begun again: beginning is idempotent.
            return;
        }
        let Some(step) = run.step(id).cloned() else { return };
        if self.step_obstacle(&step).is_some() {
            self.limit_wait(now, &step);
        } else {
            self.set_step(id, StepState::Running);
            let reason = step.reasons.first().cloned().unwrap_or_else(|| "planned".to_owned());
            self.note(EventKind::StepStarted, Some(id.clone()), None, None, reason);
            self.journal_step(id, JournalKind::Intent);
            // It had one for its wait.
            self.unlimit_step(id);
            self.begin_step(now, &step, false);
        }
    }

    /// Begins a step, or begins it `again` after a recovery.
    pub(super) fn begin_step(&mut self, now: Now, step: &Step, again: bool) {
        let Some(run) = &mut self.run else { return };
        let id = step.resource.clone();
        let desired = run.record.plan.desired.as_ref().and_then(|d| d.resources.get(&id)).cloned();
        let release = run.record.release;
        let target = if step.action == Action::Delete { None } else { desired.zip(release) };
        let target = target.map(|(resource, release)| (self.with_number_in_force(now, &id, resource), release));
        self.limit_step(now, &id, self.step_deadline(&id, target.as_ref().map(|(resource, _)| resource)));
        if is_note_only(step) {
            self.changed.insert(id);
        } else {
            self.set_target(now, &id, target, again);
        }
    }

    fn check_step(&mut self, now: Now, id: &ResourceId) {
        let Some(run) = &self.run else { return };
        let Some(step) = run.step(id) else { return };
        let delete = step.action == Action::Delete;
        let state = if is_note_only(step) { TargetState::Reached } else { self.target_state(id, delete) };
        match state {
            TargetState::Moving => {}
            TargetState::Reached => self.finish_step(now, id, delete),
            TargetState::Failed(problem, culprit) => {
                if let (Some(run), Some(culprit)) = (&mut self.run, culprit) {
                    run.record.culprits.push(culprit);
                }
                self.fail_step(now, id, problem);
            }
        }
    }

    fn finish_step(&mut self, now: Now, id: &ResourceId, delete: bool) {
        self.set_step(id, StepState::Succeeded);
        self.journal_step(id, JournalKind::Done);
        if self.rollout(id).is_some_and(|rollout| !rollout.keeps_both()) {
            // Without an old set it is over: its clocks must not go on while other services are under way.
            self.forget_rollout(id);
        }
        self.unlimit_step(id);
        let run = self.run.as_ref().expect("a step of the active run is finished");
        let release = run.record.release;
        let applied = run.record.plan.desired.as_ref().and_then(|d| d.resources.get(id)).cloned();
        if delete {
            self.forget_resource(id);
        } else if let (Some(applied), Some(release)) = (applied, release) {
            self.write_resource(id, applied, release, true);
        }
        self.clear_job(now, id);
        self.note(
            EventKind::StepSucceeded,
            Some(id.clone()),
            None,
            None,
            if delete { "gone" } else { "as wanted" }.to_owned(),
        );
        self.wake_waiters(now, id);
    }

    /// Wants nothing of a volume any more, without touching its data.
    fn release_volume(&mut self, id: &ResourceId) {
        if let Some(volume) = self.volumes.get_mut(id) {
            (volume.want, volume.doomed, volume.problem) = (None, None, None);
            self.changed.insert(id.clone());
        }
    }

    fn forget_resource(&mut self, id: &ResourceId) {
        self.index_dependencies(id, None);
        self.release_volume(id);
        if self.resources.remove(id).is_some() {
            self.out.changes.push(Change::ForgetResource(self.record.id.clone(), id.clone()));
        }
        if id.kind == ResourceKind::Service {
            self.record_changed |= self.record.chosen_ports.remove(&id.name).is_some();
            self.forget_scaled(&id.name);
        }
    }

    fn write_resource(&mut self, id: &ResourceId, applied: Resource, release: ReleaseNumber, completed: bool) {
        if applied.as_service().is_some_and(|service| service.scale.is_none()) {
            self.forget_scaled(&id.name);
        }
        let record = ResourceRecord {
            environment: self.record.id.clone(),
            id: id.clone(),
            digest: applied.digest(),
            depends_on: applied.dependencies(),
            completed: completed && id.kind == ResourceKind::Job,
            applied,
            release,
        };
        self.out.changes.push(Change::Resource(Box::new(record.clone())));
        self.resources.insert(id.clone(), record);
    }

    /// Ends the instances of a job that has ended; its outcome is in its record.
    fn clear_job(&mut self, now: Now, id: &ResourceId) {
        if id.kind == ResourceKind::Job {
            let members: Vec<InstanceId> = self.workloads.get(id).into_iter().flat_map(|w| w.members.clone()).collect();
            for member in members {
                self.tell_instance(now, &member, Event::Stop { cause: "the job has ended".to_owned() });
            }
            if let Some(workload) = self.workloads.get_mut(id) {
                workload.want = None;
            }
            self.changed.insert(id.clone());
        }
    }

    pub(super) fn fail_step(&mut self, now: Now, id: &ResourceId, problem: Diagnostic) {
        let message = problem.message.clone();
        self.set_step(id, StepState::Failed);
        self.journal_step(id, JournalKind::Failed(message.clone()));
        self.note(EventKind::StepFailed, Some(id.clone()), None, None, message.clone());
        let run = self.run.as_mut().expect("a step of the active run failed");
        run.record.problems.push(problem);
        self.begin_revert(now, format!("{id} failed: {message}"));
    }

    // === end ===

    /// Ends the run if it has reached its end.
    pub(super) fn conclude(&mut self, now: Now) {
        let Some(run) = &self.run else { return };
        let total = run.record.plan.steps.len();
        let done = run.record.state == RunState::Running && run.succeeded == total;
        let back = run.record.state == RunState::Reverting && run.reverted == run.record.steps.len();
        if done && self.flags_taken(now) {
            self.succeed(now);
        } else if back {
            self.end_reverted(now);
        }
    }

    fn succeed(&mut self, now: Now) {
        let Some(mut run) = self.run.take() else { return };
        run.record.state = RunState::Succeeded;
        if matches!(run.record.kind, RunKind::Down { .. }) {
            self.preview_removed(now);
        }
        if let Some(old) = self.record.stable
            && Some(old) != run.record.release
        {
            self.out.changes.push(Change::ReleaseState(self.record.id.clone(), old, ReleaseState::Retired));
        }
        self.record.stable = run.record.release;
        if let Some(number) = run.record.release {
            self.out.changes.push(Change::ReleaseState(self.record.id.clone(), number, ReleaseState::Stable));
            self.note(EventKind::ReleaseStable, None, None, Some(number), "every step succeeded".to_owned());
        }
        self.end_run(now, run, EventKind::RunSucceeded, "every step succeeded".to_owned());
    }

    fn end_reverted(&mut self, now: Now) {
        let Some(mut run) = self.run.take() else { return };
        run.record.state = if run.cancelled { RunState::Cancelled } else { RunState::Failed };
        let put_back = match self.record.stable {
            Some(stable) => format!("release {stable} is in force again"),
            None => "nothing runs, as before".to_owned(),
        };
        let reverted = if run.record.steps.is_empty() {
            "nothing had been changed".to_owned()
        } else if run.not_reverted.is_empty() {
            put_back
        } else {
            let names: Vec<String> = run.not_reverted.iter().map(ToString::to_string).collect();
            format!("{put_back}, except {}: see `orchestra status`", names.join(", "))
        };
        run.record.reverted = Some(reverted.clone());
        if let Some(release) = run.record.release {
            let state = if run.is_superseded() { ReleaseState::Superseded } else { ReleaseState::Failed };
            self.out.changes.push(Change::ReleaseState(self.record.id.clone(), release, state));
        }
        let kind = if run.cancelled { EventKind::RunCancelled } else { EventKind::RunFailed };
        self.end_run(now, run, kind, reverted);
    }

    fn end_run(&mut self, now: Now, run: ActiveRun, kind: EventKind, cause: String) {
        self.end_rollouts(now, kind == EventKind::RunSucceeded);
        self.forget_deadlines();
        self.forget_numbers_before();
        self.record.run = None;
        self.record_changed = true;
        let stable = self.record.stable;
        self.releases.retain(|number, _| Some(*number) == stable);
        // Ordinals of releases that can never get another instance need not be remembered.
        let mut needed: BTreeSet<(&Name, ReleaseNumber)> =
            self.instances.keys().map(|instance| (&instance.workload, instance.release)).collect();
        for (id, workload) in &self.workloads {
            needed.extend(workload.want.iter().map(|want| (&id.name, want.release)));
        }
        for (name, releases) in &mut self.record.ordinals {
            releases.retain(|number, _| Some(*number) == stable || needed.contains(&(name, *number)));
        }
        self.record.ordinals.retain(|_, releases| !releases.is_empty());
        self.out.changes.push(Change::Run(Box::new(run.record.clone())));
        self.run = Some(run);
        self.note(kind, None, None, None, cause);
        self.run = None;
        self.refresh_flags(self.wall(now));
        self.forget_flags_port();
    }

    fn set_step(&mut self, id: &ResourceId, state: StepState) {
        let Some(run) = &mut self.run else { return };
        let before = run.record.steps.insert(id.clone(), state);
        run.succeeded -= usize::from(before == Some(StepState::Succeeded));
        run.reverted -= usize::from(before == Some(StepState::Reverted));
        run.succeeded += usize::from(state == StepState::Succeeded);
        run.reverted += usize::from(state == StepState::Reverted);
        self.out.changes.push(Change::Step(run.record.id, id.clone(), state));
    }

    fn journal_step(&mut self, id: &ResourceId, kind: JournalKind) {
        if let Some(run) = &self.run {
            let key = format!("{} {id}", run.record.id);
            self.journal(key, kind);
        }
    }
}

/// Whether a step only changes what is recorded: a job that has completed and is not run again.
fn is_note_only(step: &Step) -> bool {
    step.resource.kind == ResourceKind::Job && step.action == Action::Update
}

fn describe(kind: &RunKind, release: Option<ReleaseNumber>) -> String {
    let what = match kind {
        RunKind::Up => "up".to_owned(),
        RunKind::Down { volumes: false } => "down".to_owned(),
        RunKind::Down { volumes: true } => "down with volumes".to_owned(),
        RunKind::Restart { .. } => "restart".to_owned(),
        RunKind::Scale { .. } => "scale".to_owned(),
        RunKind::Rollback { to } => format!("rollback to release {to}"),
    };
    release.map_or_else(|| what.clone(), |release| format!("{what}: release {release}"))
}
