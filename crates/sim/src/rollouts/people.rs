//! People: who wants a release, who moves it, and who is asked to decide.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_machine::{Event, rng::Rng};
use orchestra_model::{
    Desired, ReleaseNumber, Resource, ResourceId, RunId,
    record::{InstanceIntent, RunKind},
    rollout::{RolloutCommand, RolloutPhase},
};
use orchestra_plan::{Current, Observation, Options};

use super::{
    schedule::{self, Deed, Wish},
    world::{Item, SECOND, World, version_of},
};
use crate::operator;

impl World {
    pub(super) fn wish(&mut self) {
        let ready = self.server.as_ref().is_some_and(|server| server.run().is_none());
        if !ready || self.wishes == 0 {
            // When everything is at rest there is another chance.
            return;
        }
        self.wishes -= 1;
        let mut rng = Rng::new(self.rng.next_u64());
        let mut versions = std::mem::take(&mut self.versions);
        let wish = schedule::wish(&mut rng, self.stable().map(|release| &release.desired), &mut versions);
        let wish = if self.warm().is_some() && rng.below(3) == 0 { Wish::Rollback } else { wish };
        self.versions = versions;
        let calm = self.calm;
        let sound = match &wish {
            Wish::Up(desired) => calm && schedule::is_sound(desired, &self.versions),
            _ => false,
        };
        self.laws.sound = sound.then_some(RunId(self.next_run + 1));
        if !self.submit(wish, &mut rng) {
            return;
        }
        for _ in 0..rng.below(4) {
            if rng.below(3) == 0 {
                let latest = schedule::one_of(&mut rng, &[SECOND, 10 * SECOND, 60 * SECOND]);
                let at = self.now + rng.below(latest);
                let deed = if calm { schedule::good_deed(&mut rng) } else { schedule::deed(&mut rng) };
                self.push(at, Item::Deed(deed));
            }
        }
        if calm || rng.below(10) > 0 {
            let command = match rng.below(4) {
                0 => RolloutCommand::PromoteFully,
                1 if !calm => RolloutCommand::Abort,
                _ => RolloutCommand::Promote,
            };
            let after = if calm { 20 } else { 200 };
            let at = self.now + 20 * SECOND + rng.below(after * SECOND);
            self.push(at, Item::Owner(command));
        }
    }

    /// A release whose instances are still kept.
    fn warm(&self) -> Option<ReleaseNumber> {
        let mut rollouts = self.disk.environment.rollouts.values();
        rollouts.find(|record| record.phase == RolloutPhase::Warm).map(|record| record.from)
    }

    /// Asks for a release. Returns whether there was anything to do.
    fn submit(&mut self, wish: Wish, rng: &mut Rng) -> bool {
        let Some(server) = &self.server else { return false };
        let record = server.record();
        let stable = self.stable();
        let (kind, desired) = match wish {
            Wish::Up(desired) => (RunKind::Up, Some(desired)),
            Wish::Down => (RunKind::Down { volumes: false }, None),
            Wish::Restart | Wish::Scale(_) | Wish::Rollback => {
                let Some(stable) = stable else { return false };
                let mut desired = stable.desired.clone();
                let kind = match wish {
                    Wish::Rollback => {
                        let index = usize::try_from(rng.below(self.disk.releases.len() as u64)).unwrap_or(0);
                        let any = *self.disk.releases.keys().nth(index).expect("there is a stable one");
                        let to = self.warm().filter(|_| rng.below(4) > 0).unwrap_or(any);
                        desired = self.disk.releases[&to].desired.clone();
                        RunKind::Rollback { to }
                    }
                    Wish::Scale(replicas) => {
                        for resource in desired.resources.values_mut() {
                            if let Resource::Service(service) = resource {
                                service.replicas = replicas;
                            }
                        }
                        RunKind::Scale { replicas: BTreeMap::new() }
                    }
                    _ => {
                        for resource in desired.resources.values_mut() {
                            if let Resource::Service(service) = resource {
                                service.restarts += 1;
                            }
                        }
                        RunKind::Restart { services: Vec::new() }
                    }
                };
                (kind, Some(desired))
            }
        };
        let given_up: BTreeSet<&str> = server
            .instances()
            .filter(|instance| instance.is_failed())
            .map(|instance| instance.record().id.workload.as_str())
            .collect();
        let observation = |id: &ResourceId| {
            if given_up.contains(id.name.as_str()) {
                Observation::Degraded("an instance was given up".to_owned())
            } else {
                Observation::Present
            }
        };
        let current = Current {
            base: record.stable,
            resources: server.resources().clone(),
            observed: server.resources().keys().map(|id| (id.clone(), observation(id))).collect(),
            ..Current::default()
        };
        let plan = match orchestra_plan::plan(&record.id, &current, desired.as_ref(), Options::default()) {
            Ok(plan) => plan,
            Err(error) => {
                self.violate(format!("the planner refused: {error}"));
                return false;
            }
        };
        if plan.is_empty() {
            return false;
        }
        self.next_run += 1;
        let id = RunId(self.next_run);
        self.laws.returns = self.returns(&kind, desired.as_ref()).then_some(id);
        self.report.warm_returns += u64::from(self.laws.returns.is_some());
        let source = record.source.clone();
        let (run, release) = operator::request(record, id, kind, plan);
        if self.trace.is_some() {
            let steps: Vec<String> =
                run.plan.steps.iter().map(|step| format!("{} {:?}", step.resource, step.action)).collect();
            let services: Vec<String> = release
                .iter()
                .flat_map(|release| &release.desired.resources)
                .filter_map(|(id, resource)| {
                    let service = resource.as_service()?;
                    let version = version_of(service);
                    let (strategy, traits) = (&service.rollout, &self.versions[version]);
                    Some(format!("{id} x{} v{version} {traits:?} {strategy:?}", service.replicas))
                })
                .collect();
            self.log(|| format!("{id} {:?} release {:?}: {}", run.kind, run.release, steps.join(", ")));
            for line in services {
                self.log(|| line);
            }
        }
        self.deliver(Event::RunRequested { run, release, source });
        true
    }

    /// Whether a rollback finds all that it wants kept ready: then nothing need be started.
    fn returns(&self, kind: &RunKind, desired: Option<&Desired>) -> bool {
        let (RunKind::Rollback { .. }, Some(desired), true) = (kind, desired, self.calm) else { return false };
        let Some(stable) = self.stable() else { return false };
        desired.resources.iter().all(|(id, resource)| {
            let Some(service) = resource.as_service() else { return false };
            let same = stable.desired.resources.get(id) == Some(resource);
            let kept = self.disk.environment.rollouts.get(&id.name).is_some_and(|record| {
                record.phase == RolloutPhase::Warm
                    && version_of(&record.baseline) == version_of(service)
                    && record.baseline.restarts == service.restarts
            });
            let ready = self.processes.iter().filter(|process| {
                let record = self.disk.instances.get(&process.key.instance);
                process.key.instance.workload == id.name
                    && process.version == version_of(service)
                    && process.ready
                    && record.is_some_and(|record| record.intent == InstanceIntent::Run)
            });
            (same || kept)
                && self.versions[version_of(service)].is_solid()
                && ready.count() >= service.replicas as usize
        })
    }

    pub(super) fn deed(&mut self, deed: Deed) {
        let Some(server) = &self.server else { return };
        let event = match deed {
            Deed::Cancel => {
                let Some(run) = server.run() else { return };
                Event::CancelRequested { run: run.id }
            }
            Deed::Supersede => {
                // As the engine does: what goes on is turned back, and nothing of the next release is planned before that.
                if server.run().is_none() || self.wishes == 0 {
                    return;
                }
                self.superseding = true;
                self.report.superseded += 1;
                Event::Superseded { by: "a newer release".to_owned() }
            }
            Deed::Command(service, command) => {
                if server.can_command(service.as_ref(), &command).is_err() && self.rng.below(4) > 0 {
                    // The engine refuses these; the machine must survive them all the same.
                    return;
                }
                self.report.commands += 1;
                Event::Rollout { service, command, by: "anna".to_owned() }
            }
        };
        self.deliver(event);
    }

    pub(super) fn owner(&mut self, command: RolloutCommand) {
        if let Some(server) = &self.server
            && server.run().is_none()
        {
            return;
        }
        if self.server.is_some() {
            self.deliver(Event::Rollout { service: None, command: command.clone(), by: "olga".to_owned() });
        }
        let at = self.now + 30 * SECOND;
        self.push(at, Item::Owner(command));
    }
}
