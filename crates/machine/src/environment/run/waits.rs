//! What a step, a workload or a volume waits for, in words: whatever goes on can be asked why it has not ended.

use orchestra_model::{
    InstanceId, ResourceId,
    desired::Condition,
    plan::{Step, Wait},
    quantity::Timespan,
    record::{RunState, StepState},
};

use crate::{
    environment::{Environment, is_leaving},
    instance::Instance,
};

impl Environment {
    /// What a step waits for before it can begin; `None` if nothing.
    pub(super) fn step_obstacle(&self, step: &Step) -> Option<String> {
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
    pub(in crate::environment) fn step_waits_for(&self, id: &ResourceId) -> Option<String> {
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
    pub(in crate::environment) fn workload_waits_for(&self, id: &ResourceId) -> Option<String> {
        let routes = || (!self.routes_in_force(id)).then(|| "the proxy to take the new routes".to_owned());
        let Some(workload) = self.workloads.get(id) else {
            let volume = self.volumes.get(id).filter(|v| v.busy.is_some()).map(|_| "its directory".to_owned());
            return volume.or_else(routes);
        };
        let instances = || self.instances_of(workload);
        let own = |i: &&Instance| workload.want.as_ref().is_none_or(|w| i.record().launch_digest == w.launch_digest);
        let current = instances().filter(own).find_map(|i| i.waits_for().map(|w| format!("{}: {w}", i.record().id)));
        current
            .or_else(|| instances().find_map(|i| i.waits_for().map(|w| format!("{}: {w}", i.record().id))))
            .or_else(routes)
            .or_else(|| self.surplus_waits_for(id))
            .or_else(|| self.stand_in(id))
    }

    /// Instances of an earlier release that go on serving because too few of what is wanted do, in words. Not while a
    /// rollout keeps them.
    pub(in crate::environment) fn stand_in(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id).filter(|workload| workload.rollout.is_none())?;
        let want = workload.want.as_ref()?;
        let service = want.resource.as_service()?;
        let ready = self.instances_of(workload);
        let ready = ready.filter(|instance| instance.is_ready() && !is_leaving(instance));
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

    /// Instances of what is wanted that are more than it takes now, and stay because too few others serve, in words.
    pub(in crate::environment) fn surplus_waits_for(&self, id: &ResourceId) -> Option<String> {
        let workload = self.workloads.get(id)?;
        let want = workload.want.as_ref()?;
        let service = want.resource.as_service()?;
        let wanted = self.mode(id, service).wanted(service.replicas)?;
        let staying = self.instances_of(workload);
        let current = |i: &&Instance| !is_leaving(i) && i.record().launch_digest == want.launch_digest;
        let extra = u32::try_from(staying.filter(current).count()).unwrap_or(u32::MAX).saturating_sub(wanted);
        (extra > 0).then(|| {
            let (instances, stay) = if extra == 1 { ("instance", "stays") } else { ("instances", "stay") };
            format!(
                "enough others to serve; {extra} {instances} of release {} more than wanted {stay} until then",
                want.release
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
}
