//! The view of one resource for [`crate::status`].

use orchestra_model::{Now, ResourceId, ResourceKind, desired::Service, record::StepState};

use super::{Environment, is_leaving};
use crate::{
    instance::Instance,
    replacement::Set,
    rollout::{Rollout, judge::Judge},
    status::{InstanceStatus, ResourceStatus, RolloutStatus},
};

impl Environment {
    pub(crate) fn resource_ids(&self) -> Vec<ResourceId> {
        self.resources.keys().chain(self.workloads.keys()).chain(self.volumes.keys()).cloned().collect()
    }

    pub(crate) fn resource_status(&self, now: Now, id: ResourceId) -> ResourceStatus {
        let step = self.run().and_then(|run| run.steps.get(&id).copied());
        let waits_for = self.step_waits_for(&id).or_else(|| self.workload_waits_for(&id));
        let applied = self.resources.get(&id);
        let mut status = ResourceStatus {
            state: "waiting",
            release: applied.map(|r| r.release),
            replicas: 0,
            ready: 0,
            addresses: Vec::new(),
            waits_for,
            step,
            instances: Vec::new(),
            rollout: self.rollout_status(&id),
            scaling: self
                .workloads
                .get(&id)
                .and_then(|workload| workload.scaling.as_ref())
                .map(|scaling| scaling.explain(now))
                .unwrap_or_default(),
            id,
        };
        match status.id.kind {
            ResourceKind::Volume => {
                status.state = match self.volumes.get(&status.id) {
                    Some(volume) if volume.problem.is_some() => "failed",
                    Some(volume) if volume.exists() => "present",
                    None if step == Some(StepState::Succeeded) => "gone",
                    Some(_) | None => "waiting",
                };
            }
            ResourceKind::Job => {
                let instances = self.fill_instances(now, &mut status);
                status.state = if instances.iter().any(|i| i.is_started()) {
                    "running"
                } else if instances.iter().any(|i| i.is_failed()) || step == Some(StepState::Failed) {
                    "failed"
                } else if applied.is_some_and(|r| r.completed) {
                    "completed"
                } else if instances.is_empty() {
                    "waiting"
                } else {
                    "starting"
                };
            }
            ResourceKind::Service => self.service_status(now, &mut status),
        }
        status
    }

    fn rollout_status(&self, id: &ResourceId) -> Option<RolloutStatus> {
        let workload = self.workloads.get(id)?;
        let rollout = workload.rollout.as_ref()?;
        let service = workload.want.as_ref()?.resource.as_service()?;
        let seen = self.rollout_seen(id)?;
        let ready = |set: Set| {
            let members = self.instances_of(workload);
            let ready =
                members.filter(|i| i.is_ready() && !is_leaving(i) && workload.set_of(&i.record().launch_digest) == set);
            u32::try_from(ready.count()).unwrap_or(u32::MAX)
        };
        Some(RolloutStatus {
            record: rollout.record().clone(),
            strategy: service.rollout.strategy.name(),
            steps: u32::try_from(rollout.stepped().map_or(0, |stepped| stepped.steps.len())).unwrap_or(u32::MAX),
            words: rollout.step_words(),
            instances: (seen.available, rollout.canary_wanted(seen.replicas)),
            baseline: ready(Set::Baseline),
            waits_for: self.rollout_waits_for(id),
            mirrored: workload.judge.as_ref().map(Judge::mirrored).unwrap_or_default(),
            cold_at: (rollout.is_over() && self.run().is_none()).then(|| rollout.cold_at()),
        })
    }

    fn fill_instances(&self, now: Now, status: &mut ResourceStatus) -> Vec<&Instance> {
        let Some(workload) = self.workloads.get(&status.id) else { return Vec::new() };
        let instances: Vec<&Instance> = self.instances_of(workload).collect();
        for instance in &instances {
            let current = workload.want.as_ref().is_some_and(|w| w.launch_digest == instance.record().launch_digest);
            status.instances.push(InstanceStatus::of(instance, current && !is_leaving(instance), now));
        }
        instances
    }

    fn service_status(&self, now: Now, status: &mut ResourceStatus) {
        let instances = self.fill_instances(now, status);
        let Some(workload) = self.workloads.get(&status.id) else {
            status.state = if status.step == Some(StepState::Succeeded) { "gone" } else { "waiting" };
            return;
        };
        let Some(want) = &workload.want else {
            status.state = "stopping";
            return;
        };
        let Some(service) = want.resource.as_service() else { return };
        status.release = Some(want.release);
        status.replicas = service.replicas;
        let serving = |i: &&&Instance| {
            i.is_ready()
                && !is_leaving(i)
                && i.record().launch_digest == want.launch_digest
                && (service.ports.is_empty() || self.routes.admitted(&i.record().id, i.record().attempt))
        };
        status.ready = u32::try_from(instances.iter().filter(serving).count()).unwrap_or(u32::MAX);
        status.addresses = service
            .ports
            .keys()
            .map(|port| (port.to_string(), self.published(&status.id.name, port).map(|(url, _)| url)))
            .collect();
        let kept = |i: &&Instance| {
            workload.rollout.as_ref().is_some_and(Rollout::is_over)
                && workload.set_of(&i.record().launch_digest) == Set::Baseline
        };
        let may_sleep = |service: &Service| service.scale.as_ref().is_some_and(|scale| scale.min == 0);
        let all_current =
            instances.iter().all(|i| i.record().launch_digest == want.launch_digest || is_leaving(i) || kept(i));
        let failed = instances.iter().any(|i| i.is_failed() && !kept(i));
        status.state = if workload.rollout.as_ref().is_some_and(Rollout::is_frozen) {
            "paused"
        } else if service.replicas == 0 && instances.is_empty() && may_sleep(service) {
            "asleep"
        } else if service.replicas == 0 && instances.is_empty() {
            "stopped"
        } else if status.ready >= service.replicas && all_current {
            "ready"
        } else if failed && status.ready == 0 {
            "failed"
        } else if failed {
            "degraded"
        } else if !workload.lost.is_empty() {
            // Stopped until what it depends on is back, or running without requests.
            if instances.is_empty() {
                "waiting"
            } else if instances.iter().all(|i| is_leaving(i)) {
                "stopping"
            } else {
                "held"
            }
        } else if !all_current {
            "rolling"
        } else if instances.iter().any(|i| i.restarts() > 0 || *i.phase() == crate::instance::Phase::Unready) {
            "degraded"
        } else {
            "starting"
        };
    }
}
