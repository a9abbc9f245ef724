//! What is wanted of a resource, and where it stands on its way there.
//!
//! The same for both ways of a run: a step sets what the new release wants, a step that is put back what the stable one
//! wants, and the world shows when it is reached.

use orchestra_model::{Code, Diagnostic, InstanceId, Now, ReleaseNumber, Resource, ResourceId, ResourceKind};

use crate::{
    environment::{Environment, is_leaving, workload::Want},
    instance::{Event, Instance},
    replacement::Set,
    rollout::Rollout,
};

pub(super) enum TargetState {
    Moving,
    Reached,
    Failed(Diagnostic, Option<InstanceId>),
}

impl Environment {
    /// Makes `target` what is wanted of a resource; of a service with the number of instances that is in force. `again`
    /// says that it was wanted already before the server died.
    pub(super) fn set_target(
        &mut self,
        now: Now,
        id: &ResourceId,
        target: Option<(Resource, ReleaseNumber)>,
        again: bool,
    ) {
        // What was given up gets another chance, but not one for each server.
        let failed: Vec<InstanceId> = self
            .workloads
            .get(id)
            .into_iter()
            .filter(|_| !again)
            .flat_map(|workload| self.instances_of(workload))
            .filter(|instance| instance.is_failed())
            .map(|instance| instance.record().id.clone())
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
                let workload = &self.workloads[id];
                let runs = self.instances_of(workload).any(|i| {
                    !is_leaving(i) && wanted.as_ref().is_some_and(|w| w.launch_digest == i.record().launch_digest)
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

    /// Where a resource stands on its way to what is wanted of it.
    pub(super) fn target_state(&self, id: &ResourceId, delete: bool) -> TargetState {
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
                let mut instances = self.instances_of(workload).filter(|i| !is_leaving(i));
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
        let instances = || self.instances_of(workload).filter(|i| !is_leaving(i));
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
        let no_old = || instances().all(|i| current(&i) || kept(&i));
        let exact = || instances().filter(|i| !kept(i)).count() == service.replicas as usize;
        if enough && no_old() && exact() && self.routes_in_force(id) {
            TargetState::Reached
        } else {
            TargetState::Moving
        }
    }
}
