//! Laws of every moment: nothing is beyond its deadline, no deadline moves away, a rollout goes forward only, and
//! whatever goes on says what it waits for.

use std::collections::BTreeMap;

use orchestra_model::{
    ResourceId, RunId,
    desired::Service,
    record::{RunRecord, RunState, StepState},
    rollout::{RolloutPhase, RolloutRecord, RolloutStep},
    traffic::Permille,
};

use super::{
    Before, SLACK, Watched,
    lengths::{asks, longest, timed},
    service_in,
};
use crate::rollouts::{
    ports::micros,
    schedule::id_of,
    world::{MILLI, World},
};

impl World {
    /// No deadline moves away, but by the time that a person took.
    pub(super) fn check_deadlines(&mut self) {
        let lifted = std::mem::take(&mut self.laws.lifted);
        let before = std::mem::take(&mut self.laws.steps);
        let Some(run) = self.active_run() else {
            if self.disk.environment.deadlines.is_some() {
                self.violate("no run goes on, and there are deadlines of one");
            }
            return;
        };
        let mut broken = None;
        let mut known = BTreeMap::new();
        for (id, at) in self.disk.environment.deadlines.iter().flat_map(|deadlines| &deadlines.steps) {
            let state = run.steps.get(id).copied();
            let allowed = lifted.get(&id.name).copied().unwrap_or_default() + 1;
            let same = before.get(id).filter(|(of, way, step, _)| (*of, *way, *step) == (run.id, run.state, state));
            if let Some((.., was)) = same
                && *at > was + allowed
            {
                broken = Some(format!("the deadline of {id} moved from {was} to {at}"));
            }
            known.insert(id.clone(), (run.id, run.state, state, *at));
        }
        self.laws.steps = known;
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    pub(super) fn check_rollouts(&mut self, before: &Before) {
        let mut broken = Vec::new();
        let wall = self.wall();
        let run = self.active_run().map(|run| (run.id, run.state));
        let stable = before.stable;
        let mut known = std::mem::take(&mut self.laws.watched);
        known.retain(|name, _| self.disk.environment.rollouts.contains_key(name));
        let (mut stepped, mut paused) = (0, 0);
        for (name, record) in &self.disk.environment.rollouts {
            let service = service_in(self.wanted(), name);
            let asked = asks(record, service);
            let Some(watched) = known.get_mut(name).filter(|watched| watched.run == record.run) else {
                let length = service.map_or(0, |service| {
                    (micros(service.rollout.deadline.duration()) + timed(&service.rollout)) / MILLI
                });
                if record.phase != RolloutPhase::Warm {
                    let base = service_in(self.stable_desired(), name);
                    if base.is_none_or(|base| base.program != record.baseline.program) || Some(record.from) > stable {
                        let law = format!(
                            "release {}, from which the rollout of {name} begins, is not in force",
                            record.from
                        );
                        broken.push(law);
                    }
                    if run.map(|(id, _)| id) != Some(record.run) {
                        broken.push(format!("the rollout of {name} belongs to no run"));
                    }
                    stepped += u64::from(record.phase == RolloutPhase::Stepping);
                }
                let watched = Watched {
                    run: record.run,
                    step: record.step,
                    phase: record.phase,
                    weight: record.weight,
                    deadline: record.started_at + length,
                    asked: asked.map(|_| wall),
                    watching: None,
                };
                known.insert(name.clone(), watched);
                continue;
            };
            let order = |phase: RolloutPhase| match phase {
                RolloutPhase::Stepping => 0,
                RolloutPhase::Promoting => 1,
                RolloutPhase::Watching => 2,
                RolloutPhase::Warm => 3,
            };
            let moved = (watched.step, order(watched.phase)) != (record.step, order(record.phase));
            if moved {
                if record.step < watched.step || order(record.phase) < order(watched.phase) {
                    broken.push(format!(
                        "the rollout of {name} went from step {} {:?} back to step {} {:?}",
                        watched.step, watched.phase, record.step, record.phase
                    ));
                }
                let turned =
                    |run: Option<(RunId, RunState)>| run.is_some_and(|(_, state)| state == RunState::Reverting);
                if turned(run) && turned(before.run) {
                    broken.push(format!("the rollout of {name} moves on while the run is turned back"));
                }
            }
            if record.weight > watched.weight
                && let Some(service) = service
            {
                let serving = self.serving(name, service);
                let needed = needed(record, service);
                if serving < needed {
                    broken.push(format!("{name} gives {} to {serving} of {needed} new instances", record.weight));
                }
            }
            if record.weight < watched.weight {
                broken.push(format!("the weight of {name} fell from {} to {}", watched.weight, record.weight));
            }
            match (watched.asked, asked) {
                (None, Some(_)) => {
                    watched.asked = Some(wall);
                    paused += 1;
                }
                (Some(since), None) => {
                    watched.deadline += wall.saturating_sub(since);
                    watched.asked = None;
                    self.laws.lifted.insert(name.clone(), wall.saturating_sub(since));
                }
                _ => {}
            }
            match (watched.watching, record.phase) {
                (None, RolloutPhase::Watching) => watched.watching = Some(wall),
                (Some(since), RolloutPhase::Warm) => {
                    watched.deadline += wall.saturating_sub(since);
                    watched.watching = None;
                }
                _ => {}
            }
            if let Some(pause) = &record.paused
                && (pause.owner.is_empty() || pause.reason.is_empty())
            {
                broken.push(format!("the rollout of {name} is paused without an owner or a reason"));
            }
            let since = watched.asked.map_or(0, |since| wall.saturating_sub(since));
            if record.deadline > watched.deadline + since + 1 && !self.laws.clock_changed {
                broken.push(format!(
                    "the deadline of the rollout of {name} moved to {} though it is {}",
                    record.deadline, watched.deadline
                ));
            }
            (watched.step, watched.phase, watched.weight) = (record.step, record.phase, record.weight);
        }
        self.laws.watched = known;
        self.report.stepped += stepped;
        self.report.paused += paused;
        for law in broken {
            self.violate(law);
        }
    }

    /// Laws of the moment after a batch.
    pub(in crate::rollouts) fn check_moment(&mut self) {
        let Some(run) = self.active_run() else { return };
        let wall = self.wall();
        let settled = self.now >= self.laws.up_since + SLACK;
        let mut broken = None;
        // Until when somebody is asked.
        let mut asked: Option<u64> = None;
        for (id, at) in self.disk.environment.deadlines.iter().flat_map(|deadlines| &deadlines.steps) {
            let limit = self.step_ends_by(run, id, *at);
            if settled && limit.is_some_and(|at| wall > at + SLACK / MILLI) {
                broken = Some(format!("the step of {id} is beyond its deadline"));
            }
        }
        if run.state == RunState::Running {
            for (name, record) in &self.disk.environment.rollouts {
                let service = service_in(self.wanted(), name);
                if record.run != run.id {
                    continue;
                }
                let expires = asks(record, service);
                asked = asked.max(expires);
                // Without steps it is the run's step that has a deadline.
                let stepped = service.is_some_and(|service| service.rollout.strategy.stepped().is_some());
                let over = !stepped
                    || matches!(record.phase, RolloutPhase::Warm | RolloutPhase::Watching)
                    || run.steps.get(&id_of(name)) == Some(&StepState::Succeeded);
                if over {
                    continue;
                }
                let limit = expires.unwrap_or(record.deadline);
                if settled && wall > limit + SLACK / MILLI {
                    let what = if expires.is_some() { "expiry" } else { "deadline" };
                    broken = Some(format!("the rollout of {name} is beyond its {what}"));
                }
            }
        }
        if let Some(expires) = asked {
            // Time in which a person is asked does not count; it has an expiry of its own, until which nothing need happen.
            let state = self.disk.run.as_ref().map(|run| longest(run, &self.disk)).unwrap_or_default();
            let left = expires.saturating_sub(wall) * MILLI;
            self.laws.run_until = self.laws.run_until.max(self.now + left + state);
        }
        if self.now > self.laws.run_until {
            broken = Some("the run has not ended by its absolute deadline".to_owned());
        }
        if self.rng.below(64) == 0 {
            broken = broken.or(self.why_law());
        }
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    /// When a step must have ended; none while its rollout has clocks of its own.
    fn step_ends_by(&self, run: &RunRecord, id: &ResourceId, stored: u64) -> Option<u64> {
        let forward = run.state == RunState::Running && run.steps.get(id) == Some(&StepState::Running);
        let rollout = self.disk.environment.rollouts.get(&id.name).filter(|record| forward && record.run == run.id);
        let Some(rollout) = rollout else { return Some(stored) };
        let service = service_in(run.plan.desired.as_ref(), &id.name);
        let stepped = service.is_some_and(|service| service.rollout.strategy.stepped().is_some());
        match rollout.phase {
            _ if rollout.paused.is_some() && rollout.phase != RolloutPhase::Warm => None,
            RolloutPhase::Warm => Some(rollout.deadline),
            _ if stepped => None,
            _ => Some(stored),
        }
    }

    /// Whatever goes on says what it waits for.
    fn why_law(&self) -> Option<String> {
        let server = self.server.as_ref()?;
        let status = server.status(self.moment());
        let run = server.run()?;
        let waits = |id| status.resources.iter().find(|resource| resource.id == id).and_then(|r| r.waits_for.as_ref());
        for step in &run.plan.steps {
            let state = run.steps.get(&step.resource);
            let open = match run.state {
                RunState::Running => matches!(state, None | Some(StepState::Running)),
                _ => state.is_some_and(|state| *state != StepState::Reverted),
            };
            if open && waits(step.resource.clone()).is_none() {
                return Some(format!("{} does not say what {} waits for", run.id, step.resource));
            }
        }
        None
    }
}

/// Instances that a weight must have behind it. A stack may say how many a step has, whatever its weight is.
fn needed(record: &RolloutRecord, service: &Service) -> u32 {
    let scales = |step: &RolloutStep| matches!(step, RolloutStep::Scale(_));
    let scaled = service.rollout.strategy.stepped().is_some_and(|stepped| stepped.steps.iter().any(scales));
    if scaled { u32::from(record.weight > Permille::ZERO) } else { record.weight.of_rounded_up(service.replicas) }
}
