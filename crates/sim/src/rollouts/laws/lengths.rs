//! How long things may take, as the laws compute it: from the spec alone, apart from what the machine writes down.

use orchestra_model::{
    Resource,
    desired::Service,
    record::{EnvironmentState, RunRecord},
    rollout::{PauseStep, Rollout, RolloutPhase, RolloutRecord, RolloutStep},
};

use crate::rollouts::{
    ports::micros,
    world::{Micros, SECOND},
};

pub(super) fn leave(service: &Service) -> Micros {
    let drain = service.rollout.drain.requests.duration().max(service.rollout.drain.streams.duration());
    micros(drain + service.stop.grace.duration()) + 12 * SECOND
}

/// Time for a rollout's own steps, hooks with all their tries among them.
pub(super) fn timed(rollout: &Rollout) -> Micros {
    let steps = rollout.strategy.stepped().map_or(&[][..], |stepped| &stepped.steps);
    steps
        .iter()
        .map(|step| match step {
            RolloutStep::Pause(PauseStep { duration: Some(length), .. }) => micros(length.duration()),
            RolloutStep::Analysis(step) => micros(step.duration.duration()),
            RolloutStep::Hook(hook) => {
                (micros(hook.timeout.duration()) + 10 * SECOND) * u64::from(hook.retries + 1) + 10 * SECOND
            }
            _ => 0,
        })
        .sum()
}

/// Longest time from the begin of a service's step to its end.
pub(super) fn forward(service: &Service) -> Micros {
    let rollout = &service.rollout;
    let watch = rollout.strategy.stepped().map_or(0, |stepped| micros(stepped.keep_warm.duration()));
    micros(rollout.deadline.duration()) + timed(rollout) + watch + leave(service) * u64::from(service.replicas + 1)
}

/// Longest time that a run may take, there and back, while nobody is asked.
pub(super) fn longest(run: &RunRecord, disk: &EnvironmentState) -> Micros {
    let mut total = 60 * SECOND;
    let stable = disk.environment.stable.and_then(|number| disk.releases.get(&number)).map(|release| &release.desired);
    for desired in run.plan.desired.iter().chain(stable) {
        for service in desired.resources.values().filter_map(Resource::as_service) {
            total += 2 * forward(service) + 2 * leave(service);
        }
    }
    for service in disk.resources.values().filter_map(|record| record.applied.as_service()) {
        total += 2 * leave(service) + forward(service);
    }
    total
}

/// Whether a rollout waits for a person, and until when.
pub(super) fn asks(record: &RolloutRecord, service: Option<&Service>) -> Option<u64> {
    if let Some(paused) = &record.paused {
        return Some(paused.expires);
    }
    if record.phase != RolloutPhase::Stepping {
        return None;
    }
    match service?.rollout.strategy.stepped()?.steps.get(record.step as usize)? {
        RolloutStep::Pause(PauseStep { duration: None, expires, .. }) => {
            Some(record.since + u64::try_from(expires.duration().as_millis()).unwrap_or(u64::MAX))
        }
        _ => None,
    }
}
