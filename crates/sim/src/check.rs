//! The laws: what must hold after every step of the world, and what must hold once it is quiet.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_machine::{instance::Phase, rollout::budget};
use orchestra_model::{
    EventKind, Now, Resource, ResourceId, ResourceKind,
    desired::{Check, Condition, OnLoss, RestartPolicy, Service, Strategy},
    launch::{Launch, LaunchKey},
    plan::Wait,
    record::{Change, InstanceIntent, RunRecord},
    rollout::{PauseStep, RolloutStep},
    route::EndpointState,
};

use crate::{behaviour::Behaviour, disk::Disk, world::World};

/// What the laws must remember.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// Services that had all their replicas active at some time.
    reached: BTreeSet<ResourceId>,
    /// When the run that goes on must have ended.
    run_until: Option<Now>,
    /// Launches whose drain budget ended.
    cut: BTreeSet<LaunchKey>,
}

impl Checks {
    /// After a recovery every deadline starts anew: a machine's time does not outlive it.
    pub(crate) fn recovered(&mut self, now: Now, disk: &Disk) {
        self.run_until = disk.active_run().map(|run| now + longest(run, disk));
    }
}

/// Longest time that a run may take: every step there and back, each with its waits.
fn longest(run: &RunRecord, disk: &Disk) -> Duration {
    let mut total = Duration::from_secs(60);
    let states = run.plan.desired.iter().chain(disk.stable().map(|stable| &stable.desired));
    let resources =
        states.flat_map(|desired| desired.resources.iter()).map(|(id, resource)| (id.clone(), resource.clone()));
    let applied = disk.resources.iter().map(|(id, record)| (id.clone(), record.applied.clone()));
    for (_, resource) in resources.chain(applied) {
        let one = match &resource {
            Resource::Service(service) => {
                let leave = service.rollout.drain.requests.duration().max(service.rollout.drain.streams.duration())
                    + service.stop.grace.duration()
                    + Duration::from_secs(40);
                let asked = |step: &RolloutStep| match step {
                    RolloutStep::Pause(PauseStep { duration: None, expires, .. }) => expires.duration(),
                    _ => Duration::ZERO,
                };
                let steps = service.rollout.strategy.stepped().into_iter().flat_map(|stepped| &stepped.steps);
                let people: Duration = steps.map(asked).sum();
                budget(&service.rollout) + people + leave * (service.replicas + 1)
            }
            Resource::Job(job) => {
                (job.timeout.duration() + job.stop.grace.duration() + Duration::from_secs(40)) * (job.retries + 1)
                    + job.backoff.duration() * 2u32.pow(job.retries + 1)
            }
            Resource::Volume(_) => Duration::from_secs(60),
        };
        total += one * 2;
    }
    total
}

/// Instances above and below the wanted number that may be there while they are replaced.
fn surge(service: &Service) -> (u32, u32) {
    match &service.rollout.strategy {
        Strategy::Rolling { max_surge, max_unavailable } => {
            let surge = max_surge.rounded_up(service.replicas);
            let unavailable = max_unavailable.rounded_down(service.replicas);
            // Neither up nor down would never move.
            if surge == 0 && unavailable == 0 { (1, 0) } else { (surge, unavailable) }
        }
        Strategy::Recreate | Strategy::Hold { .. } => (0, service.replicas),
        Strategy::Canary(_) | Strategy::BlueGreen(_) => (service.replicas, 0),
    }
}

pub(crate) fn command(resource: &Resource) -> Vec<String> {
    resource
        .program()
        .map(|program| program.command.iter().map(|text| text.known().unwrap_or_default()).collect())
        .unwrap_or_default()
}

/// A program that either serves until it is told to stop or never serves at all.
fn is_predictable(service: &Service) -> bool {
    let command = &command(&Resource::Service(service.clone()));
    let it = Behaviour::parse(command, 1);
    if service.health.ready.is_none() {
        return it.exit.is_none() && it.hang.is_none();
    }
    let never =
        it.missing || it.ready.is_none() || it.exit.is_some_and(|(at, _)| it.ready.is_none_or(|ready| at < ready));
    Behaviour::is_solid(command) || never
}

impl World {
    /// Laws of every moment.
    pub(crate) fn check(&mut self) {
        if self.failure().is_some() {
            return;
        }
        let mut broken = Vec::new();
        for (key, _) in self.provider.alive() {
            match self.disk.instances.get(&key.instance) {
                None => broken.push(format!("{key} runs, and the disk does not know its instance")),
                Some(record) if record.attempt != key.attempt => {
                    broken.push(format!("{key} runs, and the disk is at attempt {}", record.attempt));
                }
                Some(_) => {}
            }
        }
        if self.disk.environment.rollouts.values().any(|rollout| rollout.paused.is_some()) {
            // A person is asked; that has an expiry of its own.
            let longest = self.disk.active_run().map_or(Duration::ZERO, |run| longest(run, &self.disk));
            self.checks.run_until = self.checks.run_until.max(Some(self.now + longest));
        }
        if let (Some(until), Some(run)) = (self.checks.run_until, self.disk.active_run())
            && self.server.is_some()
            && self.now > until
        {
            broken.push(format!("{} has not ended by its deadline", run.id));
        }
        broken.extend(self.check_services());
        for law in broken {
            self.violate(law);
        }
    }

    /// What a service could be at the moment: as applied, as the run wants it, as the stable release has it.
    fn forms(&self, id: &ResourceId) -> Vec<&Service> {
        let applied = self.disk.resources.get(id).map(|record| &record.applied);
        let wanted = self
            .disk
            .active_run()
            .and_then(|run| run.plan.desired.as_ref())
            .and_then(|desired| desired.resources.get(id));
        let stable = self.disk.stable().and_then(|release| release.desired.resources.get(id));
        [applied, wanted, stable].into_iter().flatten().filter_map(Resource::as_service).collect()
    }

    /// Whether nothing but the control plane can take an endpoint of this service away.
    fn is_steady(&self, id: &ResourceId) -> bool {
        let run_removes = self
            .disk
            .active_run()
            .is_some_and(|run| run.plan.desired.as_ref().is_none_or(|desired| !desired.resources.contains_key(id)));
        let forms = self.forms(id);
        let stable = self.disk.resources.contains_key(id)
            && self.disk.stable().is_some_and(|r| r.desired.resources.contains_key(id));
        let asks = |service: &Service| service.health.ready.as_ref().map(|probe| probe.check.clone());
        stable
            && forms.windows(2).all(|pair| asks(pair[0]) == asks(pair[1]))
            && !run_removes
            && forms.iter().all(|service| {
                let depends = |check: &Check| matches!(check, Check::Dependency { .. });
                is_predictable(service)
                    && surge(service).1 == 0
                    && !service.ports.is_empty()
                    && service.health.ready.as_ref().is_none_or(|probe| !any(&probe.check, &depends))
                    && service.depends_on.iter().all(|(on, dependency)| {
                        dependency.on_loss == OnLoss::Ignore || on.kind != ResourceKind::Service || self.is_steady(on)
                    })
            })
    }

    fn check_services(&mut self) -> Vec<String> {
        let mut broken = Vec::new();
        let services: BTreeSet<ResourceId> = self
            .disk
            .resources
            .keys()
            .chain(
                self.disk
                    .active_run()
                    .iter()
                    .flat_map(|run| run.plan.desired.iter())
                    .flat_map(|desired| desired.resources.keys()),
            )
            .filter(|id| id.kind == ResourceKind::Service)
            .cloned()
            .collect();
        if self.killed {
            self.killed = false;
            self.checks.reached.clear();
        }
        let endpoints = self.data_plane.endpoints();
        for id in services {
            let forms = self.forms(&id);
            let most = forms.iter().map(|service| service.replicas).max().unwrap_or(0);
            let extra = forms.iter().map(|service| surge(service).0).max().unwrap_or(0);
            let staying = self
                .disk
                .instances
                .values()
                .filter(|record| {
                    record.kind == ResourceKind::Service
                        && record.id.workload == id.name
                        && record.intent == InstanceIntent::Run
                })
                .count();
            if staying > (most + extra) as usize {
                broken.push(format!("{id} has {staying} staying instances, but may have {most} + {extra}"));
            }
            let floor = forms.iter().map(|service| service.replicas).min().unwrap_or(0) as usize;
            let active = endpoints
                .iter()
                .filter(|(endpoint, state)| {
                    let key = LaunchKey {
                        environment: endpoint.environment.clone(),
                        instance: endpoint.instance.clone(),
                        attempt: endpoint.attempt,
                    };
                    endpoint.instance.workload == id.name
                        && **state == EndpointState::Active
                        && self.provider.launches.get(&key).is_some_and(super::world::Process::is_alive)
                })
                .count();
            // Somebody killed what it depends on, and it was declared to give way then.
            let gives_way = forms.iter().any(|service| {
                service.depends_on.iter().any(|(on, dependency)| {
                    dependency.on_loss != OnLoss::Ignore
                        && on.kind == ResourceKind::Service
                        && !self.checks.reached.contains(on)
                })
            });
            if gives_way || !self.is_steady(&id) {
                self.checks.reached.remove(&id);
            } else if active >= floor {
                self.checks.reached.insert(id);
            } else if self.checks.reached.contains(&id) {
                broken.push(format!("{id} has {active} active endpoints, but must never have fewer than {floor}"));
            }
        }
        broken
    }

    /// Laws of a launch that is about to begin.
    pub(crate) fn check_launch(&mut self, launch: &Launch) {
        let key = &launch.key;
        let intent = format!("{key} launch");
        if !self.disk.intents.contains(&intent) {
            self.violate(format!("{key} is launched without its intent in the journal"));
        }
        match self.disk.instances.get(&key.instance) {
            Some(record) if record.attempt == key.attempt => {
                if record.ports != launch.ports {
                    self.violate(format!("{key} is launched with other ports than the disk has"));
                }
            }
            other => {
                let law = format!("{key} is launched, but the disk has {:?}", other.map(|r| (r.attempt, r.intent)));
                self.violate(law);
            }
        }
        let id = ResourceId::new(ResourceKind::Service, key.instance.workload.clone());
        let forms = self.forms(&id);
        // A restart takes the place of its own predecessor, whatever else still leaves.
        if key.attempt == 1 && !forms.is_empty() && forms.iter().all(|service| surge(service).0 == 0) {
            let most = forms.iter().map(|service| service.replicas).max().unwrap_or(0);
            let alive = self.provider.alive().filter(|(other, _)| other.instance.workload == id.name).count();
            if alive >= most as usize {
                self.violate(format!(
                    "{key} is launched beside {alive} processes, but without surge there may be {most}"
                ));
            }
        }
        let holes = launch.command.iter().chain(launch.env.values()).any(|text| text.contains("{{"));
        if holes {
            self.violate(format!("{key} is launched with a hole in its texts"));
        }
    }

    /// Laws of a termination that is about to begin.
    pub(crate) fn check_terminate(&mut self, key: &LaunchKey) {
        let instance = self
            .server
            .as_ref()
            .and_then(|server| server.instances().find(|instance| instance.record().id == key.instance));
        if instance.is_some_and(|instance| instance.record().forced.is_some()) {
            return;
        }
        let why = instance
            .and_then(|instance| if let Phase::Stopping { why } = instance.phase() { Some(why.clone()) } else { None })
            .unwrap_or_default();
        let alive = self.provider.launches.get(key).is_some_and(super::world::Process::is_alive);
        if !alive {
            return;
        }
        if why == "cut" {
            self.checks.cut.insert(key.clone());
        }
        let cut = self.checks.cut.contains(key);
        let trouble = self.data_plane.trouble.is_some_and(|at| self.now.since(at) < Duration::from_secs(120));
        if self.data_plane.is_active(key) && !(cut && trouble) {
            self.violate(format!("{key} is stopped ({why}) while new requests go to it"));
        }
        let (requests, streams) = self.data_plane.in_flight(key);
        if requests + streams > 0 && !cut {
            self.violate(format!("{key} is stopped ({why}) with {requests} requests and {streams} streams in flight"));
        }
    }

    /// Laws of changes that are about to be committed: a step begins only when what it waits for held.
    pub(crate) fn note_steps(&mut self, changes: &[Change]) {
        let mut broken = Vec::new();
        let mut run = self.disk.active_run().cloned();
        for change in changes {
            match change {
                Change::Run(record) => {
                    if self.disk.runs.contains_key(&record.id) {
                        continue;
                    }
                    run = Some((**record).clone());
                    self.checks.run_until = Some(self.now + longest(record, &self.disk));
                }
                Change::Event(event) if event.kind == EventKind::StepStarted => {
                    let (Some(run), Some(id)) = (&run, &event.resource) else { continue };
                    let Some(step) = run.plan.step(id) else { continue };
                    for (on, wait) in &step.after {
                        if let Wait::Until(condition) = wait
                            && !self.held(run, on, *condition)
                        {
                            broken.push(format!("the step of {id} began before {on} was {condition:?}"));
                        }
                    }
                }
                _ => {}
            }
        }
        for law in broken {
            self.violate(law);
        }
    }

    fn held(&self, run: &RunRecord, on: &ResourceId, condition: Condition) -> bool {
        // What happened within the last seconds, the machine may not have heard of.
        let recent = |at: Now| self.now.since(at) < Duration::from_secs(5);
        match (on.kind, condition) {
            (ResourceKind::Volume, _) => {
                let path = run.plan.desired.as_ref().and_then(|d| d.resources.get(on)).and_then(|resource| {
                    if let Resource::Volume(volume) = resource { Some(&volume.path) } else { None }
                });
                path.is_none_or(|path| self.volumes.contains(path))
            }
            (ResourceKind::Job, Condition::Completed | Condition::Ready) => self.provider.completed.contains(&on.name),
            (_, condition) => {
                let service =
                    run.plan.desired.as_ref().and_then(|d| d.resources.get(on)).and_then(Resource::as_service);
                let unasked = service.is_some_and(|service| service.health.ready.is_none());
                let count = self
                    .provider
                    .launches
                    .iter()
                    .filter(|(key, process)| {
                        let was = process.exit.is_none_or(|(at, _)| recent(at));
                        let ready = condition == Condition::Started || unasked || process.ready_seen;
                        key.instance.workload == on.name && process.started.is_some() && was && ready
                    })
                    .count();
                let wanted = service.map_or(1, |service| service.replicas);
                count >= wanted as usize || on.kind == ResourceKind::Job
            }
        }
    }

    // === laws of a quiet world ===

    /// Whether the machine has nothing more to do by itself.
    pub fn is_settled(&self) -> bool {
        let Some(server) = &self.server else { return false };
        let moving = |phase: &Phase| {
            matches!(
                phase,
                Phase::Pending { .. }
                    | Phase::Launching
                    | Phase::Starting
                    | Phase::Draining { .. }
                    | Phase::Stopping { .. }
                    | Phase::Exited { .. }
            )
        };
        server.run().is_none()
            && !server.instances().any(|instance| moving(instance.phase()))
            && self.data_plane.answers(self.now)
            && !self.data_plane.has_waiting()
    }

    /// Whether a resource and everything whose loss would stop it can be relied on.
    fn is_reliable(&self, id: &ResourceId) -> bool {
        let Some(resource) = self.disk.stable().and_then(|release| release.desired.resources.get(id)) else {
            return false;
        };
        let returns = resource.as_service().is_some_and(|service| {
            let restarts = service.restart.policy != RestartPolicy::Never
                && service.restart.budget.is_none_or(|budget| budget > 4);
            restarts || !self.killed_once
        });
        let own = id.kind != ResourceKind::Service || (Behaviour::is_solid(&command(resource)) && returns);
        let check = |check: &Check| {
            if let Check::Dependency { service } = check {
                !self.is_reliable(&ResourceId::new(ResourceKind::Service, service.clone()))
            } else {
                false
            }
        };
        let asks =
            resource.as_service().and_then(|s| s.health.ready.as_ref()).is_some_and(|probe| any(&probe.check, &check));
        own && !asks
            && resource.dependencies().iter().all(|(on, dependency)| {
                dependency.on_loss == OnLoss::Ignore || on.kind != ResourceKind::Service || self.is_reliable(on)
            })
    }

    /// Whether everything that is desired can be relied on, so that the world must come to rest.
    pub fn must_settle(&self) -> bool {
        let Some(stable) = self.disk.stable() else { return true };
        stable.desired.resources.keys().all(|id| self.is_reliable(id))
    }

    /// Whether an instance belongs to a set that a rollout has replaced and that is kept for a while.
    fn is_kept(&self, key: &LaunchKey) -> bool {
        let rollout = self.disk.environment.rollouts.get(&key.instance.workload);
        let baseline = rollout.map(|rollout| rollout.baseline.launch_digest());
        let record = self.disk.instances.get(&key.instance);
        baseline.is_some_and(|digest| record.is_some_and(|record| record.launch_digest == digest))
    }

    /// Laws after the last run ended and time was given.
    pub fn check_quiet(&mut self) {
        if self.failure().is_some() {
            return;
        }
        let mut broken = Vec::new();
        if self.server.is_none() {
            broken.push("the server is not there".to_owned());
        }
        if let Some(run) = self.disk.active_run() {
            broken.push(format!("{} has not ended", run.id));
        }
        let unrepaired = self
            .disk
            .runs
            .values()
            .next_back()
            .and_then(|run| run.reverted.as_ref())
            .is_some_and(|text| text.contains("except"));
        let desired = self.disk.stable().map(|release| release.desired.clone());
        let resources = desired.as_ref().map(|desired| desired.resources.clone()).unwrap_or_default();
        // What runs belongs to the stable release and is launched as it says.
        for (key, process) in self.provider.alive().filter(|(key, _)| !self.is_kept(key)) {
            let id =
                self.disk.instances.get(&key.instance).map(|r| ResourceId::new(r.kind, key.instance.workload.clone()));
            let Some(id) = id else { continue };
            let record = &self.disk.instances[&key.instance];
            match resources.get(&id) {
                Some(Resource::Service(service)) if service.launch_digest() == record.launch_digest => {
                    let expected = command(&Resource::Service(service.clone()));
                    if process.launch.command != expected {
                        broken.push(format!("{key} runs {:?}, not {expected:?}", process.launch.command));
                    }
                }
                _ if unrepaired => {}
                _ => broken.push(format!("{key} runs, but the stable release does not want it")),
            }
        }
        for (id, resource) in &resources {
            let Some(service) = resource.as_service() else { continue };
            let alive: Vec<&LaunchKey> = self
                .provider
                .alive()
                .map(|(key, _)| key)
                .filter(|key| key.instance.workload == id.name && !self.is_kept(key))
                .collect();
            let staying = alive
                .iter()
                .filter(|key| self.disk.instances.get(&key.instance).is_some_and(|r| r.intent == InstanceIntent::Run));
            if staying.clone().count() > service.replicas as usize {
                broken.push(format!("{id} stays {} times, but {} are wanted", staying.count(), service.replicas));
            }
            if !self.is_reliable(id) || unrepaired {
                continue;
            }
            if alive.len() != service.replicas as usize {
                broken.push(format!("{id} runs {} times, but {} are wanted", alive.len(), service.replicas));
            }
            for port in service.ports.keys() {
                let route =
                    self.data_plane.routes.iter().find(|route| route.id.service == id.name && route.id.port == *port);
                let Some(route) = route else {
                    broken.push(format!("{id} has no route for port {port}"));
                    continue;
                };
                let active: BTreeSet<LaunchKey> = route
                    .backends
                    .iter()
                    .flat_map(|backend| &backend.endpoints)
                    .filter(|endpoint| endpoint.state == EndpointState::Active)
                    .map(|endpoint| LaunchKey {
                        environment: route.id.environment.clone(),
                        instance: endpoint.instance.clone(),
                        attempt: endpoint.attempt,
                    })
                    .filter(|key| !self.is_kept(key))
                    .collect();
                let expected: BTreeSet<LaunchKey> = if service.program.ports.contains(port) {
                    alive.iter().copied().cloned().collect()
                } else {
                    BTreeSet::new()
                };
                if active != expected {
                    broken.push(format!("{id}: requests go to {active:?}, but {expected:?} are there"));
                }
            }
        }
        for route in &self.data_plane.routes {
            let service = resources
                .get(&ResourceId::new(ResourceKind::Service, route.id.service.clone()))
                .and_then(Resource::as_service);
            if !service.is_some_and(|service| service.ports.contains_key(&route.id.port)) && !unrepaired {
                broken.push(format!("{} is still routed", route.id));
            }
        }
        for (key, question) in &self.prober.open {
            if !self.provider.launches.get(&question.target.launch).is_some_and(super::world::Process::is_alive) {
                broken.push(format!("{}#{} is still asked", key.instance, key.attempt));
            }
        }
        if !unrepaired {
            let applied: BTreeMap<&ResourceId, _> = self
                .disk
                .resources
                .iter()
                .filter(|(id, _)| id.kind != ResourceKind::Volume)
                .map(|(id, record)| (id, &record.digest))
                .collect();
            for (id, resource) in resources.iter().filter(|(id, _)| id.kind != ResourceKind::Volume) {
                match applied.get(id) {
                    Some(digest) if **digest == resource.digest() => {}
                    other => broken.push(format!("{id} is recorded as {other:?}, not as the stable release has it")),
                }
            }
            for id in applied.keys().filter(|id| !resources.contains_key(id)) {
                broken.push(format!("{id} is recorded, but the stable release does not have it"));
            }
            for record in self.disk.instances.values() {
                let id = ResourceId::new(record.kind, record.id.workload.clone());
                if !resources.contains_key(&id) || id.kind == ResourceKind::Job {
                    broken.push(format!("{} is recorded, but nothing wants it", record.id));
                }
            }
        }
        for (key, process) in &self.provider.launches {
            if process.gone && !self.disk.instances.contains_key(&key.instance) && self.crashes == 0 {
                broken.push(format!("the provider still has a record of {key}"));
            }
        }
        for law in broken {
            self.violate(law);
        }
    }
}

/// Whether a leaf of a check is as asked.
fn any(check: &Check, is: &dyn Fn(&Check) -> bool) -> bool {
    match check {
        Check::All(of) | Check::Any(of) | Check::AtLeast { of, .. } => of.iter().any(|part| any(part, is)),
        leaf => is(leaf),
    }
}
