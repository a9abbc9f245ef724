//! What the engine does for an operator: plans, numbers runs and releases, refuses while a run goes on.

use std::collections::BTreeMap;

use orchestra_machine::Event;
use orchestra_model::{
    Desired, Now, Plan, ReleaseNumber, Resource, ResourceId, ResourceKind, RunId,
    record::{EnvironmentRecord, ReleaseRecord, RunKind, RunRecord},
    rollout::RolloutCommand,
};
use orchestra_plan::{Current, Observation, Options};

use crate::world::World;

/// Starts a run towards what a stack file desires. It says nothing of restarts, so their counters stay.
pub fn up(world: &mut World, mut desired: Desired) -> bool {
    let Some(server) = &world.server else { return false };
    for (id, resource) in &mut desired.resources {
        let now = server.resources().get(id).and_then(|record| record.applied.as_service());
        if let (Resource::Service(service), Some(now)) = (resource, now) {
            service.restarts = now.restarts;
        }
    }
    submit(world, RunKind::Up, Some(&desired))
}

/// Starts a run towards `desired`, or takes everything down. Returns whether there was anything to do.
pub fn submit(world: &mut World, kind: RunKind, desired: Option<&Desired>) -> bool {
    let Some(server) = &world.server else { return false };
    if server.run().is_some() {
        return false;
    }
    let record = server.record().clone();
    let current = Current {
        base: record.stable,
        resources: server.resources().clone(),
        observed: observe(world),
        ..Current::default()
    };
    let options = Options { delete_volumes: matches!(kind, RunKind::Down { volumes: true }) };
    let plan = match orchestra_plan::plan(&record.id, &current, desired, options) {
        Ok(plan) => plan,
        Err(error) => {
            world.violate(format!("the planner refused: {error}"));
            return false;
        }
    };
    if plan.is_empty() {
        world.log(|| format!("{kind:?}: nothing to do"));
        return false;
    }
    let id = RunId(world.next_run());
    let number = desired.is_some().then(|| ReleaseNumber(record.last_release.0 + 1));
    world.log(|| {
        let steps: Vec<String> = plan.steps.iter().map(|step| format!("{} {:?}", step.resource, step.action)).collect();
        format!("{id} {kind:?} release {number:?}: {}", steps.join(", "))
    });
    let source = record.source.clone();
    let (run, release) = request(&record, id, kind, plan);
    world.deliver(Event::RunRequested { run, release, source });
    true
}

/// A run and its release, numbered as the engine does.
pub(crate) fn request(
    record: &EnvironmentRecord,
    id: RunId,
    kind: RunKind,
    plan: Plan,
) -> (Box<RunRecord>, Option<Box<ReleaseRecord>>) {
    let run = record.next_run(id, kind, plan, 0);
    let release = run.new_release("simulated".to_owned()).map(Box::new);
    (Box::new(run), release)
}

/// Cancels the run that goes on, if there is one and the server is there.
pub fn cancel(world: &mut World) -> bool {
    let Some(run) = world.server.as_ref().and_then(|server| server.run()).map(|run| run.id) else { return false };
    world.log(|| format!("cancel {run}"));
    world.deliver(Event::CancelRequested { run });
    true
}

/// Moves the rollouts of the run, if there are any.
pub fn rollout(world: &mut World, command: RolloutCommand) -> bool {
    if world.server.as_ref().is_none_or(|server| server.can_command(None, &command).is_err()) {
        return false;
    }
    world.log(|| format!("{command:?}"));
    world.deliver(Event::Rollout { service: None, command, by: "anna".to_owned() });
    true
}

/// Lets the world go on until a condition holds, or until a point in time. Returns whether it holds.
pub fn until(world: &mut World, limit: Now, condition: impl Fn(&World) -> bool) -> bool {
    world.wake_at(limit);
    loop {
        if condition(world) {
            return true;
        }
        if world.failure().is_some() || world.now >= limit {
            return false;
        }
        world.step();
    }
}

/// What the world shows of what was applied.
fn observe(world: &World) -> BTreeMap<ResourceId, Observation> {
    let Some(server) = &world.server else { return BTreeMap::new() };
    let ended =
        |resource: &orchestra_machine::status::ResourceStatus| resource.instances.iter().any(|i| i.phase == "ended");
    let status = server.status(world.now);
    status
        .resources
        .into_iter()
        .map(|resource| {
            let observation = match resource.id.kind {
                ResourceKind::Service if ended(&resource) => {
                    Observation::Degraded("an instance was given up".to_owned())
                }
                _ => Observation::Present,
            };
            (resource.id, observation)
        })
        .collect()
}
