//! The way back: every touched step is put back to what the stable release says of it, in reverse order.

use orchestra_model::{
    EventKind, Now, ResourceId, ResourceKind,
    record::{Change, RunState, StepState},
};

use super::TargetState;
use crate::{Effect, environment::Environment};

impl Environment {
    pub(in crate::environment) fn begin_revert(&mut self, now: Now, cause: String) {
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
    pub(in crate::environment) fn revert_ready_steps(&mut self, now: Now) {
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
    pub(in crate::environment) fn is_to_be_put_back(&self, id: &ResourceId) -> bool {
        self.run.as_ref().is_some_and(|run| {
            let open = run.state(id).is_some_and(|state| state != StepState::Reverted);
            run.record.state == RunState::Reverting && open && !run.reverting.contains(id)
        })
    }

    pub(super) fn check_revert(&mut self, now: Now, id: &ResourceId) {
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

    pub(super) fn reverted(&mut self, now: Now, id: &ResourceId) {
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
}
