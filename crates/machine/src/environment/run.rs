//! The run: walks exactly the graph that the plan printed, and turns back as a whole when a step fails.
//!
//! ```text
//!   Running --- every step succeeded --------------------------------> Succeeded
//!      |
//!      | a step failed or passed its deadline, or a person cancelled
//!      v
//!   Reverting - every touched step is put back, in reverse order ----> Failed | Cancelled
//! ```
//!
//! A step begins when everything that it waits for holds, and is done when the world shows it. Each has a deadline of
//! its own, so the whole has one. Reverting puts each touched resource back to what the stable release says of it, or
//! removes it if that says nothing; what cannot be put back within its deadline is named in the run's record.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_model::{
    Code, Diagnostic, EventKind, InstanceId, Name, Now, ReleaseNumber, Resource, ResourceId, ResourceKind, RunId,
    desired::{Condition, Service, Strategy},
    plan::{Action, Step, Wait},
    quantity::Timespan,
    record::{
        Change, JournalKind, ReleaseRecord, ReleaseState, ResourceRecord, RunKind, RunRecord, RunState, StepState,
    },
    time::UnixMillis,
};

use super::{Environment, workload::Want};
use crate::{
    Effect,
    instance::{CUT_PATIENCE, Event, Instance},
    replacement::Set,
    rollout::{Rollout, millis},
};

/// Time for a volume to be made or deleted.
const VOLUME_DEADLINE: Duration = Duration::from_secs(60);
/// Time beyond grace and drain for a workload to be gone.
const STOP_MARGIN: Duration = Duration::from_secs(30);

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
        let cancelled = record.problems.iter().any(|p| p.code == Code::RUN_CANCELLED);
        let mut run = Self::new(record);
        run.cancelled = cancelled;
        for state in run.record.steps.values() {
            run.succeeded += usize::from(*state == StepState::Succeeded);
            run.reverted += usize::from(*state == StepState::Reverted);
        }
        run
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
        self.cancel(now, id, "the run was cancelled", "cancelled");
    }

    /// Turns the run back because a person wants so.
    pub(super) fn abort_run(&mut self, now: Now, id: RunId, by: &str) {
        self.cancel(now, id, &format!("the run was aborted by {by}"), &format!("aborted by {by}"));
    }

    fn cancel(&mut self, now: Now, id: RunId, message: &str, cause: &str) {
        let Some(run) = &mut self.run else { return };
        if run.record.id != id || run.record.state != RunState::Running {
            return;
        }
        run.cancelled = true;
        run.record.problems.push(Diagnostic::error(Code::RUN_CANCELLED, message));
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

    // === deadlines ===

    /// When the run must be looked at again.
    pub(super) fn run_deadline(&self) -> Option<Now> {
        self.run.as_ref()?;
        let deadlines = self.record.deadlines.as_ref()?;
        let flags = deadlines.flags.map(|at| self.moment(at));
        deadlines.steps.keys().filter_map(|id| self.step_ends_by(id)).chain(flags).min()
    }

    /// When the step of a resource must have ended, on the way that the run is on. None while its rollout has clocks of
    /// its own: steps, or a person who was asked.
    fn step_ends_by(&self, id: &ResourceId) -> Option<Now> {
        let run = &self.run.as_ref()?.record;
        let stored = *self.record.deadlines.as_ref()?.steps.get(id)?;
        let forward = run.state == RunState::Running && run.steps.get(id) == Some(&StepState::Running);
        match self.rollout(id).filter(|rollout| forward && rollout.record().run == run.id) {
            Some(rollout) if rollout.is_frozen() || rollout.is_trying() => None,
            Some(rollout) if rollout.keeps_both() => Some(self.moment(rollout.record().deadline)),
            _ => Some(self.moment(stored)),
        }
    }

    /// Gives the step of a resource `length` from now, unless it has less already: a step that is begun again after a
    /// recovery gets no more time than it had, even if the clock was set back meanwhile.
    fn limit_step(&mut self, now: Now, id: &ResourceId, length: Duration) {
        let at = self.wall(now).saturating_add(millis(length));
        let steps = &mut self.record.deadlines.get_or_insert_default().steps;
        if steps.get(id).is_none_or(|known| *known > at) {
            steps.insert(id.clone(), at);
            self.record_changed = true;
        }
    }

    fn unlimit_step(&mut self, id: &ResourceId) {
        let deadlines = self.record.deadlines.as_mut();
        self.record_changed |= deadlines.is_some_and(|deadlines| deadlines.steps.remove(id).is_some());
    }

    fn forget_deadlines(&mut self) {
        self.record_changed |= self.record.deadlines.take().is_some();
    }

    /// A rollout without steps goes on after a pause: the time that a person took does not count.
    pub(super) fn goes_on(&mut self, id: &ResourceId, paused_for: UnixMillis) {
        if let Some(at) = self.record.deadlines.as_mut().and_then(|deadlines| deadlines.steps.get_mut(id)) {
            *at = at.saturating_add(paused_for);
            self.record_changed = true;
        }
    }

    pub(super) fn run_tick(&mut self, now: Now) {
        let is_due = |this: &Self, id: &ResourceId| this.step_ends_by(id).is_some_and(|at| at <= now);
        let limited = self.record.deadlines.iter().flat_map(|deadlines| deadlines.steps.keys());
        let due: Vec<ResourceId> = limited.filter(|id| is_due(self, id)).cloned().collect();
        for id in due {
            // An earlier one may have turned the run back, and with it every deadline.
            if !is_due(self, &id) {
                continue;
            }
            let waits = self.step_waits_for(&id).unwrap_or_else(|| "nothing that is known".to_owned());
            self.unlimit_step(&id);
            let Some(run) = &mut self.run else { return };
            match run.record.state {
                RunState::Running if run.state(&id).is_none() => {
                    let message = format!("{id} could not begin: it waited for {waits}");
                    let problem = Diagnostic::error(Code::DEPENDENCY_FAILED, message.clone());
                    run.record.problems.push(problem);
                    self.note(EventKind::StepFailed, Some(id.clone()), None, None, message.clone());
                    self.begin_revert(now, message);
                }
                RunState::Running => {
                    let stops = run.step(&id).is_some_and(|step| step.action == Action::Delete);
                    let problem = if stops && id.kind != ResourceKind::Volume {
                        Diagnostic::error(Code::STOP_FAILED, format!("{id} could not be stopped"))
                    } else {
                        Diagnostic::error(Code::RUN_TIMED_OUT, format!("{id} did not finish in time"))
                    };
                    let problem = problem.note(format!("it waited for {waits}"));
                    self.fail_step(now, &id, problem);
                }
                RunState::Reverting => {
                    run.not_reverted.push(id.clone());
                    self.reverted(now, &id);
                }
                _ => {}
            }
        }
        self.look_at_flags(now);
    }

    // === forward ===

    /// What a step waits for before it can begin; `None` if nothing.
    fn step_obstacle(&self, step: &Step) -> Option<String> {
        let run = self.run.as_ref()?;
        step.after.iter().find_map(|(on, wait)| {
            let done = run.step(on).is_none() || run.state(on) == Some(StepState::Succeeded);
            match wait {
                // The step need not be done for this, only begun: what runs is what the step wants then.
                Wait::Until(Condition::Started)
                    if (done || run.state(on) == Some(StepState::Running)) && self.holds(on, Condition::Started) =>
                {
                    None
                }
                Wait::Until(condition) if !done || !self.holds(on, *condition) => {
                    let what = match condition {
                        Condition::Started => "to start",
                        Condition::Ready => "to be ready",
                        Condition::Completed => "to complete",
                    };
                    Some(format!("{on} {what}"))
                }
                Wait::Gone if !done => Some(format!("{on} to be gone")),
                _ => None,
            }
        })
    }

    /// What the step of a resource waits for, in words.
    pub(super) fn step_waits_for(&self, id: &ResourceId) -> Option<String> {
        let run = self.run.as_ref()?;
        let step = run.step(id)?;
        let reverting = run.record.state == RunState::Reverting;
        match run.state(id) {
            None if reverting => None,
            None => self.step_obstacle(step),
            Some(StepState::Succeeded) if !reverting => None,
            Some(StepState::Reverted) => None,
            Some(_) if self.is_to_be_put_back(id) => {
                let users = run.waiters.get(id)?.iter().map(|index| &run.record.plan.steps[*index].resource);
                let mut open = users.filter(|user| run.state(user).is_some_and(|state| state != StepState::Reverted));
                open.next().map(|user| format!("{user} to be put back first"))
            }
            Some(_) => {
                let waits = self.rollout_waits_for(id).or_else(|| self.workload_waits_for(id));
                waits.or_else(|| self.proof_waits_for(id))
            }
        }
    }

    /// What a workload or volume waits for, in words.
    pub(super) fn workload_waits_for(&self, id: &ResourceId) -> Option<String> {
        let routes = || (!self.routes_in_force(id)).then(|| "the proxy to take the new routes".to_owned());
        let Some(workload) = self.workloads.get(id) else {
            let volume = self.volumes.get(id).filter(|v| v.busy.is_some()).map(|_| "its directory".to_owned());
            return volume.or_else(routes);
        };
        let instances = || workload.members.iter().filter_map(|m| self.instances.get(m));
        let own = |i: &&Instance| workload.want.as_ref().is_none_or(|w| i.record().launch_digest == w.launch_digest);
        let current = instances().filter(own).find_map(|i| i.waits_for().map(|w| format!("{}: {w}", i.record().id)));
        current
            .or_else(|| instances().find_map(|i| i.waits_for().map(|w| format!("{}: {w}", i.record().id))))
            .or_else(routes)
            .or_else(|| self.stand_in(id))
    }

    /// Instances of an earlier release that go on serving because too few of what is wanted do, in words. Not while a
    /// rollout keeps them.
    pub(super) fn stand_in(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id).filter(|workload| workload.rollout.is_none())?;
        let want = workload.want.as_ref()?;
        let service = want.resource.as_service()?;
        let ready = workload.members.iter().filter_map(|member| self.instances.get(member));
        let ready = ready.filter(|instance| instance.is_ready() && !super::is_leaving(instance));
        let (new, old): (Vec<_>, Vec<_>) =
            ready.partition(|instance| instance.record().launch_digest == want.launch_digest);
        let stays = !old.is_empty() && new.len() < service.replicas as usize;
        stays.then(|| {
            let instances = if old.len() == 1 {
                "instance of an earlier release stays"
            } else {
                "instances of earlier releases stay"
            };
            format!(
                "release {} to be able to serve ({} of {} instances are ready); {} {instances} until then",
                want.release,
                new.len(),
                service.replicas,
                old.len()
            )
        })
    }

    /// The time that new instances must have been ready, while others are still to be replaced or their step goes on.
    fn proof_waits_for(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id)?;
        let want = workload.want.as_ref()?;
        let min_ready = want.resource.as_service()?.rollout.min_ready;
        let new =
            |id: &InstanceId| self.instances.get(id).is_some_and(|i| i.record().launch_digest == want.launch_digest);
        let waits = min_ready > Timespan::default() && workload.members.iter().any(new);
        waits.then(|| format!("its new instances to have been ready for {min_ready}"))
    }

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

    /// A step that waits for others' steps needs no deadline: they have theirs. Once these are done, what it still waits
    /// for may never come.
    fn limit_wait(&mut self, now: Now, step: &Step) {
        let Some(run) = &self.run else { return };
        let done = |on: &ResourceId| run.step(on).is_none() || run.state(on) == Some(StepState::Succeeded);
        if !step.after.keys().all(done) {
            return;
        }
        let wait = |on: &ResourceId| {
            let wanted = self.workloads.get(on).and_then(|workload| workload.want.as_ref()).map(|want| &*want.resource);
            self.step_deadline(on, wanted.or_else(|| self.resources.get(on).map(|record| &record.applied)))
        };
        let longest = step.after.keys().map(wait).max().unwrap_or(VOLUME_DEADLINE);
        self.limit_step(now, &step.resource, longest);
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

    /// Makes `target` what is wanted of a resource; of a service with the number of instances that is in force. `again`
    /// says that it was wanted already before the server died.
    fn set_target(&mut self, now: Now, id: &ResourceId, target: Option<(Resource, ReleaseNumber)>, again: bool) {
        // What was given up gets another chance, but not one for each server.
        let failed: Vec<InstanceId> = self
            .workloads
            .get(id)
            .into_iter()
            .filter(|_| !again)
            .flat_map(|w| w.members.iter())
            .filter(|m| self.instances.get(*m).is_some_and(Instance::is_failed))
            .cloned()
            .collect();
        for instance in failed {
            self.tell_instance(now, &instance, Event::Stop { cause: "it is replaced".to_owned() });
        }
        match id.kind {
            ResourceKind::Service => {
                self.begin_rollout(now, id, target.as_ref());
                self.want_service(now, id, target);
            }
            ResourceKind::Volume => {
                let volume = self.volumes.entry(id.clone()).or_default();
                volume.problem = None;
                // Making a directory that is there is a success, so it is not asked first.
                volume.made = None;
                volume.doomed = None;
                match target {
                    Some((Resource::Volume(want), _)) => volume.want = Some(want),
                    _ => volume.doomed = volume.want.take().filter(|want| want.managed).map(|want| want.path),
                }
                self.changed.insert(id.clone());
            }
            ResourceKind::Job => {
                let wanted = target.map(|(resource, release)| Want::new(resource, release));
                self.index_dependencies(id, wanted.as_ref().map(|w| &*w.resource));
                let workload = self.workloads.entry(id.clone()).or_default();
                workload.want.clone_from(&wanted);
                let runs = workload.members.iter().any(|m| {
                    self.instances.get(m).is_some_and(|i| {
                        !super::is_leaving(i)
                            && wanted.as_ref().is_some_and(|w| w.launch_digest == i.record().launch_digest)
                    })
                });
                if let Some(want) = wanted
                    && !runs
                {
                    if let Some(record) = self.resources.get_mut(id) {
                        record.completed = false;
                    }
                    self.add_instance(now, id, &want);
                }
                self.changed.insert(id.clone());
            }
        }
    }

    fn step_deadline(&self, id: &ResourceId, target: Option<&Resource>) -> Duration {
        let leaving = |resource: &Resource| match resource {
            Resource::Service(s) => s.rollout.drain.requests.duration() * 2 + s.stop.grace.duration() + STOP_MARGIN,
            Resource::Job(j) => j.stop.grace.duration() + STOP_MARGIN,
            Resource::Volume(_) => VOLUME_DEADLINE,
        };
        match target {
            Some(Resource::Service(service)) => service.rollout.deadline.duration() + drain_time(service),
            Some(Resource::Job(job)) => {
                let tries = job.retries.saturating_add(1);
                let pauses = (0..job.retries.min(20)).map(|n| job.backoff.duration().saturating_mul(1 << n.min(16)));
                (job.timeout.duration() + job.stop.grace.duration() + STOP_MARGIN).saturating_mul(tries)
                    + pauses.sum::<Duration>().mul_f64(1.1)
            }
            Some(Resource::Volume(_)) => VOLUME_DEADLINE,
            None => self.resources.get(id).map_or(VOLUME_DEADLINE, |record| leaving(&record.applied)),
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

    /// Where a resource stands on its way to what is wanted of it.
    fn target_state(&self, id: &ResourceId, delete: bool) -> TargetState {
        if let Some(problem) =
            self.routes.problems.iter().find(|(route, _)| id.kind == ResourceKind::Service && route.service == id.name)
        {
            return TargetState::Failed(problem.1.clone(), None);
        }
        match id.kind {
            ResourceKind::Volume => match self.volumes.get(id) {
                Some(volume) if volume.problem.is_some() => {
                    TargetState::Failed(volume.problem.clone().expect("checked"), None)
                }
                Some(volume) if volume.busy.is_some() || volume.next().is_some() => TargetState::Moving,
                _ => TargetState::Reached,
            },
            ResourceKind::Job | ResourceKind::Service if delete => {
                let gone = self.workloads.get(id).is_none_or(|w| w.members.is_empty());
                if gone && self.routes_in_force(id) { TargetState::Reached } else { TargetState::Moving }
            }
            ResourceKind::Job => {
                let Some(workload) = self.workloads.get(id) else { return TargetState::Moving };
                let mut instances =
                    workload.members.iter().filter_map(|m| self.instances.get(m)).filter(|i| !super::is_leaving(i));
                if let Some(failed) = instances.clone().find(|i| i.is_failed()) {
                    let problem = failed
                        .problem()
                        .cloned()
                        .unwrap_or_else(|| Diagnostic::error(Code::JOB_FAILED, format!("{id} failed")));
                    return TargetState::Failed(problem, Some(failed.record().id.clone()));
                }
                if instances.any(Instance::is_completed) { TargetState::Reached } else { TargetState::Moving }
            }
            ResourceKind::Service => self.service_state(id),
        }
    }

    fn service_state(&self, id: &ResourceId) -> TargetState {
        let Some(workload) = self.workloads.get(id) else { return TargetState::Moving };
        let Some(want) = &workload.want else { return TargetState::Moving };
        let Some(service) = want.resource.as_service() else { return TargetState::Moving };
        let instances =
            || workload.members.iter().filter_map(|m| self.instances.get(m)).filter(|i| !super::is_leaving(i));
        let current = |i: &&Instance| i.record().launch_digest == want.launch_digest;
        // One that was given up, or that was not ready in time, decides; one that only exited may still recover.
        let hopeless = instances().filter(current).find(|i| {
            // While a rollout looks at it in steps, one exit is enough: there is an old set that serves.
            let crashed = i.recent_restarts() > 0 && workload.rollout.as_ref().is_some_and(Rollout::is_trying);
            crashed || i.is_failed() || i.problem().is_some_and(|p| p.code == Code::NOT_READY)
        });
        if let Some(failed) = hopeless {
            let exited =
                || Diagnostic::error(Code::EXITED, format!("{} exited during its rollout", failed.record().id));
            let problem = failed.problem().cloned().unwrap_or_else(exited);
            return TargetState::Failed(problem, Some(failed.record().id.clone()));
        }
        let ready = instances().filter(current).filter(|i| {
            i.is_confirmed() && (service.ports.is_empty() || self.routes.admitted(&i.record().id, i.record().attempt))
        });
        let rollout = workload.rollout.as_ref().filter(|rollout| rollout.keeps_both());
        if rollout.is_some_and(|rollout| !rollout.is_over()) {
            return TargetState::Moving;
        }
        let kept = |i: &&Instance| rollout.is_some() && workload.set_of(&i.record().launch_digest) == Set::Baseline;
        let enough = ready.count() == service.replicas as usize;
        let no_old = instances().all(|i| current(&i) || kept(&i));
        let exact = instances().filter(|i| !kept(i)).count() == service.replicas as usize;
        if enough && no_old && exact && self.routes_in_force(id) { TargetState::Reached } else { TargetState::Moving }
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

    // === back ===

    pub(super) fn begin_revert(&mut self, now: Now, cause: String) {
        let Some(run) = &mut self.run else { return };
        run.record.state = RunState::Reverting;
        // Nobody is asked any more about what is being turned back: not even by what was about to be asked just now.
        self.out.effects.retain(|effect| !matches!(effect, Effect::RunHook { .. }));
        self.out.changes.push(Change::Run(Box::new(run.record.clone())));
        self.forget_deadlines();
        self.note(EventKind::RunReverting, None, None, None, cause);
        self.refresh_flags(self.wall(now));
        self.revert_ready_steps(now);
        self.conclude(now);
    }

    /// Begins to put back every touched step whose dependents have been put back.
    pub(super) fn revert_ready_steps(&mut self, now: Now) {
        let Some(run) = &self.run else { return };
        let touched = |id: &ResourceId| run.state(id).is_some();
        let open = |id: &ResourceId| run.state(id).is_some_and(|s| s != StepState::Reverted);
        let ready: Vec<ResourceId> = run
            .record
            .plan
            .steps
            .iter()
            .rev()
            .map(|step| &step.resource)
            .filter(|id| open(id) && !run.reverting.contains(id))
            .filter(|id| {
                let waiting = run.waiters.get(*id).into_iter().flatten();
                waiting.map(|index| &run.record.plan.steps[*index].resource).all(|user| !touched(user) || !open(user))
            })
            .cloned()
            .collect();
        for id in ready {
            self.revert_step(now, &id);
        }
    }

    fn revert_step(&mut self, now: Now, id: &ResourceId) {
        let stable = self.record.stable.and_then(|n| self.releases.get(&n));
        let previous = stable.and_then(|r| r.desired.resources.get(id).cloned().map(|resource| (resource, r.number)));
        let previous = previous.map(|(resource, release)| (self.with_number_in_force(now, id, resource), release));
        let run = self.run.as_mut().expect("a step of the active run is reverted");
        run.reverting.insert(id.clone());
        let again = self.record.deadlines.as_ref().is_some_and(|deadlines| deadlines.steps.contains_key(id));
        // Long enough for the old ones to return and for the new ones to leave.
        self.limit_step(now, id, self.step_deadline(id, previous.as_ref().map(|(r, _)| r)));
        match (id.kind, previous) {
            // What a job did cannot be undone; a job that still runs is ended.
            (ResourceKind::Job, previous) => {
                if let Some((resource, release)) = previous {
                    // It is of the stable release, so it completed in its time.
                    self.write_resource(id, resource, release, true);
                } else {
                    self.forget_resource(id);
                }
                self.clear_job(now, id);
            }
            // A volume keeps its data: it is only forgotten, and found again by the next `up`. Those of a preview are
            // deleted, because nobody looks for them again.
            (ResourceKind::Volume, None) if self.preview().is_none() => self.release_volume(id),
            (_, previous) => self.set_target(now, id, previous, again),
        }
        self.changed.insert(id.clone());
    }

    /// Whether what a step did to a resource will be put back, once its users have been.
    pub(super) fn is_to_be_put_back(&self, id: &ResourceId) -> bool {
        self.run.as_ref().is_some_and(|run| {
            let open = run.state(id).is_some_and(|state| state != StepState::Reverted);
            run.record.state == RunState::Reverting && open && !run.reverting.contains(id)
        })
    }

    fn check_revert(&mut self, now: Now, id: &ResourceId) {
        let Some(run) = &self.run else { return };
        if !run.reverting.contains(id) || run.state(id) == Some(StepState::Reverted) {
            return;
        }
        let stable = self.record.stable.and_then(|n| self.releases.get(&n));
        let kept = id.kind != ResourceKind::Job && stable.is_some_and(|r| r.desired.resources.contains_key(id));
        match self.target_state(id, !kept) {
            TargetState::Reached => self.reverted(now, id),
            TargetState::Moving => {}
            TargetState::Failed(..) => {
                if let Some(run) = &mut self.run {
                    run.not_reverted.push(id.clone());
                }
                self.reverted(now, id);
            }
        }
    }

    fn reverted(&mut self, now: Now, id: &ResourceId) {
        let stable = self.record.stable.and_then(|n| self.releases.get(&n));
        let previous = stable.and_then(|r| r.desired.resources.get(id).cloned().map(|resource| (resource, r.number)));
        if id.kind != ResourceKind::Job {
            match previous {
                Some((resource, release)) => self.write_resource(id, resource, release, false),
                None => self.forget_resource(id),
            }
        }
        self.set_step(id, StepState::Reverted);
        self.unlimit_step(id);
        self.revert_ready_steps(now);
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
            self.out.changes.push(Change::ReleaseState(self.record.id.clone(), release, ReleaseState::Failed));
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

/// Time that drains add to a rollout: without surge, an old one must be gone before a new one starts.
fn drain_time(service: &Service) -> Duration {
    let batches = match service.rollout.strategy {
        Strategy::Rolling { max_surge, max_unavailable } => {
            let at_once = max_unavailable.rounded_down(service.replicas);
            if max_surge.rounded_up(service.replicas) > 0 || at_once == 0 {
                return Duration::ZERO;
            }
            service.replicas.div_ceil(at_once)
        }
        Strategy::Recreate | Strategy::Hold { .. } => 1,
        Strategy::Canary(_) | Strategy::BlueGreen(_) => return Duration::ZERO,
    };
    let drain = service.rollout.drain.requests.duration().max(service.rollout.drain.streams.duration());
    let one = drain + CUT_PATIENCE + service.stop.grace.duration();
    one.saturating_mul(batches)
}

enum TargetState {
    Moving,
    Reached,
    Failed(Diagnostic, Option<InstanceId>),
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
