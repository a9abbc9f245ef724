//! From what is on disk and what the provider sees to a machine that goes on where the last one died.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use orchestra_model::{
    InstanceId, Now, Resource, ResourceId, ResourceKind,
    launch::Observed,
    record::{EnvironmentState, RunRecord, RunState, StepState},
};

use super::{
    Environment, Settings, VolumeState,
    run::ActiveRun,
    workload::{Want, Workload},
};
use crate::{
    Batch,
    instance::{Instance, Policy},
};

impl Environment {
    /// Recovers. `observed` says for each instance what the provider found under its last attempt; a missing entry or
    /// `None` means that it was never started. The batch carries what must be done first.
    pub fn recover(
        state: EnvironmentState,
        observed: &BTreeMap<InstanceId, Option<Observed>>,
        settings: Arc<Settings>,
        now: Now,
    ) -> (Self, Batch) {
        let mut this = Self::new(state.environment, settings);
        this.releases = state.releases;
        this.resources = state.resources;
        let running = state.run.filter(|run| !run.state.is_final());

        // What is wanted: what was last applied, unless a step of the run was about to change it.
        let applied: Vec<(ResourceId, Resource, orchestra_model::ReleaseNumber)> =
            this.resources.iter().map(|(id, r)| (id.clone(), r.applied.clone(), r.release)).collect();
        for (id, resource, release) in applied {
            this.index_dependencies(&id, Some(&resource));
            match (id.kind, resource) {
                (ResourceKind::Volume, Resource::Volume(volume)) => {
                    this.volumes.insert(
                        id,
                        VolumeState { made: Some(volume.path.clone()), want: Some(volume), ..VolumeState::default() },
                    );
                }
                (ResourceKind::Service, resource) => {
                    let resource = this.as_scaled(&id.name, resource);
                    let wanted = resource.as_service().is_some_and(|service| service.replicas > 0);
                    let want = Want::new(resource, release);
                    let workload = Workload {
                        last: Some(want.resource.clone()),
                        want: Some(want),
                        begun: true,
                        ran: wanted,
                        served: wanted,
                        ..Workload::default()
                    };
                    this.workloads.insert(id.clone(), workload);
                    this.fit_scaling(now, &id);
                }
                _ => {}
            }
        }

        // Before any instance is launched again: it must find them.
        this.recover_flags(running.as_ref());
        for (id, record) in state.instances {
            let resource = ResourceId::new(record.kind, id.workload.clone());
            let want = this.spec_of(&resource, &record.launch_digest, running.as_ref());
            let seen = observed.get(&id).and_then(Option::as_ref);
            let (policy, (ready, live)) =
                want.as_ref().map_or_else(|| (Policy::unknown(), (None, None)), |w| (w.policy(), w.health()));
            let (instance, commands) = Instance::recover(record, policy, ready, live, seen, now, &mut this.rng);
            this.instances.insert(id.clone(), instance);
            let workload = this.workloads.entry(resource.clone()).or_default();
            workload.members.insert(id.clone());
            workload.begun = true;
            if workload.want.is_none() && workload.last.is_none() {
                workload.last = want.map(|want| want.resource);
            }
            this.persist(&id);
            this.after_instance(now, &id, commands, None, false);
            this.changed.insert(resource);
        }

        this.recover_rollouts(now);
        this.recover_preview(now);
        this.recover_traffic(now);
        this.routes.touch();
        let everything: Vec<ResourceId> = this.resources.keys().cloned().collect();
        this.changed.extend(everything);
        if let Some(run) = running {
            this.resume_run(now, run);
        } else if this.record.run.take().is_some() {
            this.record_changed = true;
        }
        // Facts that are not asked: who is ready for whom.
        let services: Vec<ResourceId> = this.workloads.keys().cloned().collect();
        for id in services {
            this.tell_users(now, &id);
        }
        let batch = this.finish(now);
        (this, batch)
    }

    /// What an instance was made from: what is wanted now, the run's release, the stable one, or what a rollout replaces.
    fn spec_of(
        &self,
        id: &ResourceId,
        launch_digest: &orchestra_model::Digest,
        run: Option<&RunRecord>,
    ) -> Option<Want> {
        let current = self.workloads.get(id).and_then(|w| w.want.clone());
        let planned = run.and_then(|run| {
            let resource = run.plan.desired.as_ref()?.resources.get(id)?.clone();
            Some(Want::new(resource, run.release?))
        });
        let stable = self
            .record
            .stable
            .and_then(|n| self.releases.get(&n))
            .and_then(|release| Some(Want::new(release.desired.resources.get(id)?.clone(), release.number)));
        // What a rollout replaces, also once its run has ended and the old set is only kept.
        let rollout = self.record.rollouts.get(&id.name).filter(|_| id.kind == ResourceKind::Service);
        let baseline = rollout.map(|record| Want::new(Resource::Service((*record.baseline).clone()), record.from));
        let candidates: Vec<Want> = [current, planned, stable, baseline].into_iter().flatten().collect();
        let exact = candidates.iter().find(|want| want.launch_digest == *launch_digest);
        exact.or(candidates.first()).cloned()
    }

    fn resume_run(&mut self, now: Now, record: RunRecord) {
        let steps = record.plan.steps.clone();
        let reverting = record.state == RunState::Reverting;
        let running: BTreeSet<ResourceId> =
            record.steps.iter().filter(|(_, state)| **state == StepState::Running).map(|(id, _)| id.clone()).collect();
        self.run = Some(ActiveRun::resumed(record));
        if reverting {
            // What a step had begun without end is not wanted any more; what was completed stays until its turn comes.
            self.revert_ready_steps(now);
            self.conclude(now);
        } else {
            // Beginning a step again changes nothing that is there.
            for step in steps.iter().filter(|step| running.contains(&step.resource)) {
                self.begin_step(now, step, true);
            }
            self.continue_run(now);
        }
    }
}
