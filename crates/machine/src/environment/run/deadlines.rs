//! Deadlines of the steps of a run: each has one, so the whole run has.
//!
//! They are written down as moments of the wall clock, and a server that goes on where another one died gives no step more
//! time than it had. A step that waits for other steps has none, because they have theirs; a rollout in steps has clocks
//! of its own.

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind, Now, Resource, ResourceId, ResourceKind,
    desired::{Service, Strategy},
    plan::{Action, Step},
    record::{RunState, StepState},
    time::UnixMillis,
};

use crate::{environment::Environment, instance::CUT_PATIENCE, rollout::millis};

/// Time for a volume to be made or deleted.
const VOLUME_DEADLINE: Duration = Duration::from_secs(60);
/// Time beyond grace and drain for a workload to be gone.
const STOP_MARGIN: Duration = Duration::from_secs(30);

impl Environment {
    /// When the run must be looked at again.
    pub(in crate::environment) fn run_deadline(&self) -> Option<Now> {
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
    pub(super) fn limit_step(&mut self, now: Now, id: &ResourceId, length: Duration) {
        let at = self.wall(now).saturating_add(millis(length));
        let steps = &mut self.record.deadlines.get_or_insert_default().steps;
        if steps.get(id).is_none_or(|known| *known > at) {
            steps.insert(id.clone(), at);
            self.record_changed = true;
        }
    }

    /// A step that waits for others' steps needs no deadline: they have theirs. Once these are done, what it still waits
    /// for may never come.
    pub(super) fn limit_wait(&mut self, now: Now, step: &Step) {
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

    pub(super) fn unlimit_step(&mut self, id: &ResourceId) {
        let deadlines = self.record.deadlines.as_mut();
        self.record_changed |= deadlines.is_some_and(|deadlines| deadlines.steps.remove(id).is_some());
    }

    pub(super) fn forget_deadlines(&mut self) {
        self.record_changed |= self.record.deadlines.take().is_some();
    }

    /// A rollout without steps goes on after a pause: the time that a person took does not count.
    pub(in crate::environment) fn goes_on(&mut self, id: &ResourceId, paused_for: UnixMillis) {
        if let Some(at) = self.record.deadlines.as_mut().and_then(|deadlines| deadlines.steps.get_mut(id)) {
            *at = at.saturating_add(paused_for);
            self.record_changed = true;
        }
    }

    pub(in crate::environment) fn run_tick(&mut self, now: Now) {
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

    pub(super) fn step_deadline(&self, id: &ResourceId, target: Option<&Resource>) -> Duration {
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
