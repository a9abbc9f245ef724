//! Laws of every effect, at the moment when it is about to be carried out.

use orchestra_machine::HookKey;
use orchestra_model::{
    Name,
    desired::Service,
    launch::{Launch, LaunchKey},
    record::{InstanceIntent, RunState},
    rollout::{RolloutPhase, Strategy},
    route::{EndpointKey, EndpointState, Route},
};

use super::service_in;
use crate::rollouts::{
    ports::micros,
    world::{Process, SECOND, World, version_of},
};

impl World {
    /// Laws of a launch that is about to begin.
    pub(in crate::rollouts) fn check_launch(&mut self, launch: &Launch) {
        let key = &launch.key;
        let record = self.disk.instances.get(&key.instance);
        if record.is_none_or(|record| record.attempt != key.attempt || record.ports != launch.ports) {
            self.violate(format!("{key} is launched, and the disk does not say so"));
        }
        let name = &key.instance.workload;
        if let Some(run) = self.active_run().map(|run| run.id).filter(|run| self.laws.returns == Some(*run)) {
            self.violate(format!("{run} goes back to what is kept, and {key} is started"));
        }
        let version: usize = launch.command.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        self.check_budget(launch, version);
        // One that is started again adds nobody: those beside whom it ran were judged when the later of them was started.
        // Nor does anybody wait on the way back from a release that was meant to run beside it.
        let earlier: Vec<&Process> =
            self.processes.iter().filter(|process| process.key.instance == key.instance).collect();
        let back = self.active_run().is_none_or(|run| run.state == RunState::Reverting);
        let overlaps = |process: &Process| {
            let mut forms = self.disk.releases.values().filter_map(|release| service_in(Some(&release.desired), name));
            forms.find(|form| version_of(form) == process.version).is_some_and(|form| !stops_first(form))
        };
        let beside = |process: &Process| {
            ((back || key.attempt > 1) && process.version != version && overlaps(process))
                || earlier.iter().any(|own| process.started.is_none_or(|at| own.ended.is_none_or(|ended| at <= ended)))
        };
        let others = |process: &&Process| process.key.instance.workload == *name && !process.gone && !beside(process);
        let stable = service_in(self.stable_desired(), name);
        let form = if back && stable.is_some_and(|service| version_of(service) == version) {
            stable
        } else if back {
            service_in(self.wanted(), name)
        } else {
            self.acting(name)
        };
        if let Some(form) = form.filter(|form| stops_first(form)) {
            // Until its turn on the way back, a set has the size that the release gave it, and what exits is started again.
            let given = service_in(self.wanted(), name).filter(|_| back && key.attempt > 1);
            let replicas = given.map_or(form.replicas, |given| given.replicas.max(form.replicas));
            let running: Vec<&Process> = self.processes.iter().filter(others).collect();
            let count = running.len();
            if let Some(other) = running.iter().find(|process| process.version != version) {
                self.violate(format!("{key} is launched beside {} of another version, but stops first", other.key));
            } else if count >= replicas as usize {
                self.violate(format!("{key} is launched beside {count} others, but stops first"));
            }
        }
        let forms = [service_in(self.wanted(), name), service_in(self.stable_desired(), name)];
        let most = forms.iter().flatten().map(|service| service.replicas).max().unwrap_or(0);
        let extra = forms.iter().flatten().map(|service| surge(service)).max().unwrap_or(0);
        let kept = self.disk.environment.rollouts.get(name).map_or(0, |record| record.baseline.replicas);
        let staying = self
            .disk
            .instances
            .values()
            .filter(|record| record.id.workload == *name && record.intent == InstanceIntent::Run)
            .count();
        if staying > (most + extra + kept) as usize {
            self.violate(format!("{name} has {staying} staying instances, but may have {most} + {extra} + {kept}"));
        }
    }

    /// Nobody is started more often than its budget allows, however many servers counted.
    fn check_budget(&mut self, launch: &Launch, version: usize) {
        let name = &launch.key.instance.workload;
        let of_version = |service: &&Service| version_of(service) == version;
        let forms = [service_in(self.wanted(), name), service_in(self.stable_desired(), name)];
        let budgets = forms.into_iter().flatten().filter(of_version).map(|service| {
            (service.restart.budget.unwrap_or(u32::MAX), micros(service.restart.reset_after.duration()))
        });
        let Some((budget, reset)) = budgets.max() else { return };
        let starts = self
            .processes
            .iter()
            .filter(|process| process.started.is_some() && process.key.instance == launch.key.instance);
        // One that lived for long may have been ready for long.
        let short =
            |process: &&Process| process.started.is_none_or(|at| process.ended.unwrap_or(self.now) < at + reset);
        let in_a_row = starts.rev().take_while(short).count();
        if in_a_row > budget as usize {
            self.violate(format!("{} is started again beyond its budget of {budget}", launch.key));
        }
    }

    /// Laws of a termination that is about to begin.
    pub(in crate::rollouts) fn check_terminate(&mut self, key: &LaunchKey) {
        let record = self.disk.instances.get(&key.instance);
        if record.is_some_and(|record| record.forced.is_some()) {
            return;
        }
        let Some(index) = self.find(&key.instance, key.attempt) else { return };
        let process = &self.processes[index];
        if !process.is_alive() {
            return;
        }
        let trouble = self.data_plane.trouble.is_some_and(|at| self.now < at + 120 * SECOND);
        let (active, cut, flows) = (process.active, process.cut, process.flows);
        if active && !(cut && trouble) {
            self.violate(format!("{key} is stopped while new requests go to it"));
        }
        if flows != (0, 0) && !cut {
            self.violate(format!("{key} is stopped with {flows:?} requests and streams in flight"));
        }
    }

    /// Laws of a cut: not before the drain budget is used.
    pub(in crate::rollouts) fn check_cut(&mut self, endpoint: &EndpointKey) {
        let Some(index) = self.find(&endpoint.instance, endpoint.attempt) else { return };
        self.processes[index].cut = true;
        let name = &endpoint.instance.workload;
        let process = &self.processes[index];
        let trouble = self.data_plane.trouble.is_some_and(|at| self.now < at + 120 * SECOND);
        let forms = self.disk.releases.values().filter_map(|release| service_in(Some(&release.desired), name));
        // Streams have a budget of their own; a cut ends both, and so never comes before that of a request under way.
        let budget = |service: &Service| {
            let drain = &service.rollout.drain;
            let both = drain.requests.duration().min(drain.streams.duration());
            micros(if process.flows.0 > 0 { drain.requests.duration() } else { both })
        };
        let least = forms.map(budget).min().unwrap_or(0);
        let early = process.active || process.withdrawn.is_some_and(|at| self.now < at + least);
        if process.is_alive() && early && !trouble {
            self.violate(format!("{}#{} is cut before its time", endpoint.instance, endpoint.attempt));
        }
    }

    /// Laws of a hook that is about to be asked.
    pub(in crate::rollouts) fn check_hook(&mut self, key: &HookKey) {
        if self.active_run().is_none_or(|run| run.state != RunState::Running) {
            self.violate(format!("the hook of step {} of {} is asked, and no run goes forward", key.step, key.service));
        }
        if !self.laws.hooks.insert((key.service.clone(), key.release.0, key.step, key.call)) {
            self.violate(format!(
                "call {} of the hook of step {} of {} was made twice",
                key.call, key.step, key.service
            ));
        }
    }

    /// Laws of routes that are about to be offered.
    pub(in crate::rollouts) fn check_routes(&mut self, routes: &[Route]) {
        let mut broken = None;
        let run = self.active_run().filter(|run| run.state == RunState::Running).map(|run| run.id);
        for (name, record) in &self.disk.environment.rollouts {
            let stepped = service_in(self.wanted(), name).is_some_and(|s| s.rollout.strategy.stepped().is_some());
            if Some(record.run) != run || record.phase == RolloutPhase::Warm || !stepped {
                continue;
            }
            let there = |port: &Name| routes.iter().any(|route| route.id.service == *name && route.id.port == *port);
            if let Some(port) = record.baseline.ports.keys().find(|port| !there(port)) {
                broken =
                    Some(format!("the address of {name}.{port} is closed before the release without it is promoted"));
            }
        }
        for route in routes {
            let forms =
                [service_in(self.wanted(), &route.id.service), service_in(self.stable_desired(), &route.id.service)];
            let queue = |service: &&Service| match service.rollout.strategy {
                Strategy::Hold { queue, timeout } => Some((timeout, queue)),
                _ => None,
            };
            let queues: Vec<_> = forms.iter().flatten().map(queue).collect();
            let leaving = self.acting(&route.id.service).is_none();
            if let Some(Some((timeout, queue))) = queues.first()
                && queues.iter().all(|other| *other == Some((*timeout, *queue)))
                && !leaving
                && (route.hold, route.hold_limit) != (*timeout, *queue)
            {
                broken = Some(format!("{} holds {} for {}", route.id.service, route.hold_limit, route.hold));
            }
        }
        for route in routes {
            for backend in &route.backends {
                for endpoint in backend.endpoints.iter().filter(|endpoint| endpoint.state == EndpointState::Active) {
                    let known = self.find(&endpoint.instance, endpoint.attempt);
                    if known.is_none_or(|index| !self.processes[index].heard_ready) {
                        let endpoint = format!("{}#{}", endpoint.instance, endpoint.attempt);
                        broken = Some(format!("requests go to {endpoint}, which never said that it is ready"));
                    }
                }
            }
        }
        if let Some(law) = broken {
            self.violate(law);
        }
    }
}

fn surge(service: &Service) -> u32 {
    match &service.rollout.strategy {
        Strategy::Rolling { max_surge, max_unavailable } => {
            let (surge, unavailable) =
                (max_surge.rounded_up(service.replicas), max_unavailable.rounded_down(service.replicas));
            if surge == 0 && unavailable == 0 { 1 } else { surge }
        }
        Strategy::Recreate | Strategy::Hold { .. } => 0,
        Strategy::Canary(_) | Strategy::BlueGreen(_) => service.replicas,
    }
}

fn stops_first(service: &Service) -> bool {
    matches!(service.rollout.strategy, Strategy::Recreate | Strategy::Hold { .. })
}
