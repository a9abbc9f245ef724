//! Routes: which endpoints there are, and which revision of them the data plane has acknowledged.
//!
//! One revision is in flight at a time; changes that come meanwhile make the next one. An instance counts as admitted,
//! and may let an old one leave, only once the data plane has acknowledged a revision with it as active endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    Diagnostic, InstanceId, Name, Now, ReleaseNumber, Resource, ResourceId, ResourceKind,
    desired::{Port, Protocol, Service, Strategy},
    quantity::Timespan,
    route::{Backend, Endpoint, EndpointKey, EndpointState, Route, RouteId},
    traffic::{Arm, Split},
};

use super::{Environment, traffic::prolonged, workload::Workload};
use crate::{Effect, instance::Instance, replacement::Set, rollout::Rollout};

/// Pause before a refused revision is offered again.
const RETRY: Duration = Duration::from_secs(1);

/// A start of an instance, as the data plane knows it.
type Start = (InstanceId, u32);

/// What the data plane knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes {
    dirty: bool,
    /// Send though nothing changed: the data plane reports what is in flight once per table.
    again: bool,
    revision: u64,
    in_flight: Option<Sent>,
    /// The revision in force, as far as it was acknowledged, by service.
    in_force: BTreeMap<Name, Vec<Route>>,
    /// Active endpoints of the revision in force.
    admitted: BTreeSet<Start>,
    /// Instances that were draining when the revision in force was made: no new request reaches them.
    leaving: BTreeSet<Start>,
    /// Instances that were reported drained before such a revision was acknowledged. The report may be about an older
    /// one, so it is asked for again.
    early: BTreeSet<Start>,
    /// Why routes were refused. They keep what they had until they are offered again.
    pub(super) problems: BTreeMap<RouteId, Diagnostic>,
    /// Leave out of the next revision what was refused, so that it does not keep everything else from changing.
    avoid: bool,
    /// When what was refused is offered again.
    whole_at: Option<Now>,
    /// The data plane did not answer: nothing is offered before.
    pause_until: Option<Now>,
    /// A revision was not answered: it may come into force later, without a word.
    unanswered: bool,
    sent: Option<Vec<Route>>,
}

#[derive(Clone, Debug)]
struct Sent {
    revision: u64,
    routes: Vec<Route>,
    leaving: BTreeSet<Start>,
    /// Nothing that was refused was left out of it.
    whole: bool,
}

impl Routes {
    pub(super) fn touch(&mut self) {
        self.dirty = true;
    }

    /// Sends a revision even if it equals the one before.
    pub(super) fn send_again(&mut self) {
        self.dirty = true;
        self.again = true;
    }

    /// What is wanted of a service's routes is another thing now: offers them at once, whatever was refused before.
    pub(super) fn retry(&mut self, service: &Name) {
        self.dirty = true;
        let before = self.problems.len();
        self.problems.retain(|route, _| route.service != *service);
        if self.problems.len() != before && self.problems.is_empty() {
            self.whole_at = None;
            self.avoid = false;
        }
    }

    /// Whether the data plane sends requests to an instance as it runs now.
    pub(super) fn admits(&self, instance: &Instance) -> bool {
        self.admitted(&instance.record().id, instance.record().attempt)
    }

    /// Whether the data plane sends requests to this start of an instance.
    pub(super) fn admitted(&self, instance: &InstanceId, attempt: u32) -> bool {
        self.admitted.contains(&(instance.clone(), attempt))
    }

    /// The route of the flags as it is in force.
    pub(super) fn flags_in_force(&self) -> Option<&Route> {
        self.in_force.values().flatten().find(|route| route.id.is_flags())
    }

    /// Whether a revision was offered that may come into force without a word.
    pub(super) fn is_unanswered(&self) -> bool {
        self.unanswered
    }

    /// Whether the data plane listens for a service.
    pub(super) fn bound(&self, service: &Name) -> bool {
        self.in_force.contains_key(service)
    }

    /// The address at which the data plane listens for a route.
    pub(super) fn address(&self, id: &RouteId) -> Option<SocketAddr> {
        let mut routes = self.in_force.get(&id.service).into_iter().flatten();
        routes.find(|route| route.id == *id).map(|route| route.listen)
    }

    /// Whether the data plane listens for a route where it asks for it.
    pub(super) fn listens(&self, route: &Route) -> bool {
        self.address(&route.id) == Some(route.listen)
    }

    pub(super) fn retry_at(&self) -> Option<Now> {
        self.whole_at.into_iter().chain(self.pause_until).min()
    }

    pub(super) fn tick(&mut self, now: Now) {
        if self.pause_until.take_if(|at| *at <= now).is_some() {
            self.send_again();
        }
        if self.whole_at.take_if(|at| *at <= now).is_some() {
            self.avoid = false;
            self.send_again();
        }
    }
}

impl Environment {
    /// Sends the next revision if there is something new and none is in flight.
    pub(super) fn send_routes(&mut self) {
        if !self.routes.dirty || self.routes.in_flight.is_some() || self.routes.pause_until.is_some() {
            return;
        }
        self.routes.dirty = false;
        let routes = self.current_routes();
        let again = std::mem::take(&mut self.routes.again);
        if !again && self.routes.sent.as_ref() == Some(&routes) {
            return;
        }
        self.routes.revision += 1;
        let revision = self.routes.revision;
        let draining = self.instances.values().filter(|i| i.endpoint() == Some(EndpointState::Draining));
        let leaving = draining.map(|i| (i.record().id.clone(), i.record().attempt)).collect();
        let active = routes.iter().flat_map(|route| &route.backends).flat_map(|backend| &backend.endpoints);
        for endpoint in active.filter(|endpoint| endpoint.state == EndpointState::Active) {
            if let Some(instance) = self.instances.get_mut(&endpoint.instance) {
                instance.routed();
            }
        }
        let whole = !self.routes.avoid || self.routes.problems.is_empty();
        self.routes.in_flight = Some(Sent { revision, routes: routes.clone(), leaving, whole });
        self.routes.sent = Some(routes.clone());
        self.out.effects.push(Effect::SetRoutes { revision, routes });
    }

    pub(super) fn routes_applied(&mut self, now: Now, revision: u64, addresses: &BTreeMap<RouteId, SocketAddr>) {
        let Some(sent) = self.routes.in_flight.take_if(|sent| sent.revision == revision) else { return };
        self.routes.unanswered = false;
        if sent.whole {
            self.routes.problems.clear();
            self.routes.avoid = false;
            self.routes.whole_at = None;
        }
        let mut routes = sent.routes;
        for route in &mut routes {
            if let Some(address) = addresses.get(&route.id) {
                match (route.listen.port(), route.id.is_flags()) {
                    (0, false) => self.keep_port(&route.id, address.port()),
                    (0, true) => self.keep_flags_port(&route.id, address.port()),
                    _ => {}
                }
                route.listen.set_port(address.port());
            }
        }
        let active: BTreeSet<Start> = routes
            .iter()
            .flat_map(|route| &route.backends)
            .flat_map(|backend| &backend.endpoints)
            .filter(|endpoint| endpoint.state == EndpointState::Active)
            .map(|endpoint| (endpoint.instance.clone(), endpoint.attempt))
            .collect();
        let newly_admitted: Vec<InstanceId> =
            active.difference(&self.routes.admitted).map(|(instance, _)| instance.clone()).collect();
        self.routes.admitted = active;
        let before = std::mem::take(&mut self.routes.in_force);
        self.routes.sent = Some(routes.clone());
        for route in routes {
            self.routes.in_force.entry(route.id.service.clone()).or_default().push(route);
        }
        self.routes.leaving = sent.leaving;
        for (instance, attempt) in self.routes.leaving.clone() {
            let key = self.launch_key(&instance, attempt);
            self.tell_attempt(now, &key, crate::instance::Event::Withdrawn);
        }
        let early = std::mem::take(&mut self.routes.early);
        if early.iter().any(|start| self.routes.leaving.contains(start)) {
            self.routes.send_again();
        }
        let bound = self.routes.in_force.keys().filter(|service| !before.contains_key(*service));
        self.changed.extend(bound.map(super::service_id));
        self.changed.extend(newly_admitted.iter().map(|instance| super::service_id(&instance.workload)));
        self.wake_for_addresses();
        self.wake_run();
        self.look_at_flags(now);
    }

    /// Remembers the port that the machine chose for a route. A number from the spec is no choice: going back from it
    /// leads to the port that was chosen before.
    fn keep_port(&mut self, route: &RouteId, port: u16) {
        let Some(workload) = self.workloads.get(&super::service_id(&route.service)) else { return };
        let spec = workload.want.as_ref().map(|want| &want.resource).or(workload.last.as_ref());
        let baseline = workload.baseline.as_ref().map(|want| &want.resource);
        let publishes = |spec: &Arc<Resource>| spec.as_service()?.ports.get(&route.port).cloned();
        let published = spec.and_then(publishes).or_else(|| baseline.and_then(publishes));
        if published.is_some_and(|published| published.port.is_none()) {
            let ports = self.record.chosen_ports.entry(route.service.clone()).or_default();
            self.record_changed |= ports.insert(route.port.clone(), port) != Some(port);
        }
    }

    /// Everybody whose step may wait for the data plane looks again.
    fn wake_run(&mut self) {
        if let Some(run) = &self.run {
            self.changed.extend(run.unfinished());
        }
    }

    fn wake_for_addresses(&mut self) {
        let waiting = self.instances.values().filter(|i| matches!(i.phase(), crate::instance::Phase::Pending { .. }));
        self.changed.extend(waiting.map(|i| ResourceId::new(i.record().kind, i.record().id.workload.clone())));
    }

    pub(super) fn routes_refused(&mut self, now: Now, revision: u64, problems: BTreeMap<RouteId, Diagnostic>) {
        let Some(sent) = self.routes.in_flight.take_if(|sent| sent.revision == revision) else { return };
        self.routes.sent = None;
        let known = |route: &RouteId| !sent.whole && self.routes.problems.contains_key(route);
        if problems.keys().all(known) {
            // It does not answer, or refuses even what was in force.
            self.routes.pause_until = Some(now + RETRY);
            self.routes.unanswered |= problems.is_empty();
            return;
        }
        self.changed.extend(problems.keys().map(|route| super::service_id(&route.service)));
        self.routes.problems.extend(problems);
        // At once without what was refused; with it after a pause.
        self.routes.avoid = true;
        self.routes.whole_at = Some(now + RETRY);
        self.routes.send_again();
        if self.flags_problem().is_some() {
            // Nobody waits for them any more.
            self.wake_for_addresses();
            self.look_at_flags(now);
        }
    }

    /// Nothing is in flight to an endpoint. That counts once a table is acknowledged in which no request reaches it.
    pub(super) fn drained(&mut self, now: Now, endpoint: &EndpointKey) {
        let start = (endpoint.instance.clone(), endpoint.attempt);
        if self.routes.leaving.contains(&start) {
            let key = self.launch_key(&endpoint.instance, endpoint.attempt);
            self.tell_attempt(now, &key, crate::instance::Event::Drained);
        } else if self.instances.get(&endpoint.instance).is_some_and(|i| i.endpoint() == Some(EndpointState::Draining))
        {
            self.routes.early.insert(start);
        }
    }

    /// Whether what is wanted of a service's routes is in force.
    pub(super) fn routes_in_force(&self, id: &ResourceId) -> bool {
        if id.kind != ResourceKind::Service {
            return true;
        }
        let wanted = self.workloads.get(id).map(|workload| self.routes_of(id, workload)).unwrap_or_default();
        let in_flight = self.routes.in_flight.as_ref().is_none_or(|sent| {
            let of_it = |route: &&Route| route.id.service == id.name;
            sent.routes.iter().filter(of_it).eq(wanted.iter())
        });
        let in_force = self.routes.in_force.get(&id.name).map_or(wanted.is_empty(), |routes| *routes == wanted);
        in_flight && in_force && !self.routes.unanswered
    }

    fn current_routes(&self) -> Vec<Route> {
        let routes = self.workloads.iter().flat_map(|(id, workload)| self.routes_of(id, workload));
        let mut routes: Vec<Route> = routes.chain(self.flags_route()).collect();
        self.hand_over_addresses(&mut routes);
        let kept = |route: Route| {
            if !self.routes.avoid || !self.routes.problems.contains_key(&route.id) {
                return Some(route);
            }
            let old = self.routes.in_force.get(&route.id.service)?.iter().find(|old| old.id == route.id)?;
            Some(Route { listen: old.listen, protocol: old.protocol, ..route })
        };
        routes.into_iter().filter_map(kept).collect()
    }

    fn routes_of(&self, id: &ResourceId, workload: &Workload) -> Vec<Route> {
        // While a service leaves, its last instances still finish what they have.
        let spec = workload.want.as_ref().map(|want| want.resource.clone());
        let leaving = spec.is_none();
        let Some(spec) = spec.or_else(|| workload.last.clone()) else { return Vec::new() };
        let Some(service) = spec.as_service() else { return Vec::new() };
        let (hold, hold_limit) = match service.rollout.strategy {
            Strategy::Hold { queue, timeout } => (timeout, queue),
            _ => (self.settings.hold, self.settings.hold_limit),
        };
        let hold = self.cold_start(workload, service).unwrap_or(hold);
        // New requests wait through a pause.
        let pause = self.traffic_pause(&id.name).filter(|_| !leaving);
        let hold = prolonged(hold, pause);
        let route = |called: Name, port: &Name, published: &Port| {
            let chosen = self.record.chosen_ports.get(&id.name).and_then(|ports| ports.get(port)).copied();
            Route {
                id: RouteId { environment: self.record.id.clone(), service: id.name.clone(), port: called },
                listen: SocketAddr::new(published.host, published.port.or(chosen).unwrap_or(0)),
                protocol: published.protocol,
                hold: if leaving { Timespan::default() } else { hold },
                hold_limit,
                drain: service.rollout.drain,
                policy: published.policy.clone(),
                split: {
                    // A port that only the old set has is not shared: all of its traffic is the old set's.
                    let shared = service.ports.contains_key(port);
                    let split = if shared { split(workload, published.protocol) } else { Split::default() };
                    Split { paused: split.paused || pause.is_some(), ..split }
                },
                metered: service.scale.is_some(),
                backends: self.backends(workload, port, service.ports.contains_key(port)),
                flags: None,
            }
        };
        let ports = service.ports.iter().chain(self.parting(workload, service));
        let moving = self.moving(workload, service, &id.name);
        let ports = ports.map(|(port, published)| (port.clone(), port, published));
        ports
            .chain(moving.iter().map(|(called, port, old)| (called.clone(), *port, old)))
            .map(|(called, port, published)| route(called, port, published))
            .collect()
    }

    /// Ports that a release on trial does not publish any more. They stay until it is promoted, because the old set still
    /// serves them; but not where somebody else wants their number now.
    fn parting<'w>(
        &'w self,
        workload: &'w Workload,
        service: &'w Service,
    ) -> impl Iterator<Item = (&'w Name, &'w Port)> {
        let trying = workload.rollout.as_ref().is_some_and(Rollout::is_trying);
        let baseline = workload.baseline.as_ref().filter(|_| trying).and_then(|want| want.resource.as_service());
        let gone =
            baseline.into_iter().flat_map(|old| &old.ports).filter(|(port, _)| !service.ports.contains_key(*port));
        gone.filter(|(_, port)| port.port.is_none_or(|number| !self.is_wanted(number)))
    }

    /// Addresses that a release on trial moves a port away from, each with a name for its route. They stay beside the new
    /// ones until it is promoted: who calls them knows nothing of a trial. Not where somebody wants the number.
    fn moving<'w>(&self, workload: &'w Workload, service: &'w Service, id: &Name) -> Vec<(Name, &'w Name, Port)> {
        let trying = workload.rollout.as_ref().is_some_and(Rollout::is_trying);
        let baseline = workload.baseline.as_ref().filter(|_| trying).and_then(|want| want.resource.as_service());
        let chosen = |port: &Name| self.record.chosen_ports.get(id).and_then(|ports| ports.get(port)).copied();
        let moves = |(port, new): (&'w Name, &Port)| {
            let old = baseline?.ports.get(port)?;
            let number = old.port.or_else(|| chosen(port))?;
            // The same number on another address cannot always be listened for twice.
            let stays = new.port.or_else(|| chosen(port)) == Some(number) || self.is_wanted(number);
            let called: Name =
                format!("{port}-before").parse().ok().filter(|name| !service.ports.contains_key(name))?;
            let old = Port { host: old.host, port: Some(number), ..new.clone() };
            (!stays).then_some((called, port, old))
        };
        service.ports.iter().filter_map(moves).collect()
    }

    /// Whether a service publishes a port under this number, by what is wanted of it or will be by the end of the run.
    fn is_wanted(&self, number: u16) -> bool {
        let wanted = self.workloads.values().filter_map(|other| Some(&*other.want.as_ref()?.resource));
        let coming = self.target().into_iter().flat_map(|target| target.resources.values());
        let services = wanted.chain(coming).filter_map(Resource::as_service);
        services.flat_map(|service| service.ports.values()).any(|port| port.port == Some(number))
    }

    /// Endpoints of a port; of one that is not `wanted` any more only those of the old set.
    fn backends(&self, workload: &Workload, port: &Name, wanted: bool) -> Vec<Backend> {
        let over = workload.rollout.as_ref().is_some_and(Rollout::is_over);
        let split = workload.rollout.as_ref().is_some_and(Rollout::keeps_both);
        let mut groups: BTreeMap<(ReleaseNumber, Arm), Vec<Endpoint>> = BTreeMap::new();
        for member in &workload.members {
            let Some(instance) = self.instances.get(member) else { continue };
            let (Some(state), Some(number)) = (instance.endpoint(), instance.record().ports.get(port)) else {
                continue;
            };
            let current = workload.set_of(&instance.record().launch_digest) == Set::Current;
            if current && !wanted {
                continue;
            }
            let arm = if split && current { Arm::Canary } else { Arm::Stable };
            groups.entry((member.release, arm)).or_default().push(Endpoint {
                instance: member.clone(),
                attempt: instance.record().attempt,
                address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), *number),
                state,
            });
        }
        let backend = |((release, arm), endpoints): ((ReleaseNumber, Arm), Vec<Endpoint>)| {
            // Each instance gets the same share of its arm, whatever its release. An old set that is only kept warm gets
            // nothing but what is pinned to it.
            let active = endpoints.iter().filter(|e| e.state == EndpointState::Active).count();
            let weight = if over && arm == Arm::Stable { 0 } else { u32::try_from(active).unwrap_or(u32::MAX) };
            Backend { release, arm, weight: weight.saturating_mul(1000), endpoints }
        };
        groups.into_iter().map(backend).collect()
    }
}

/// How the traffic of a port is split now, and what is reported of it.
fn split(workload: &Workload, protocol: Protocol) -> Split {
    let Some(rollout) = workload.rollout.as_ref().filter(|rollout| !rollout.is_over()) else { return Split::default() };
    let Some(split) = rollout.split() else { return Split::default() };
    let watch = workload.judge.as_ref().filter(|_| protocol != Protocol::Tcp);
    Split { watch: watch.map(|judge| judge.watch(rollout.record().to.0)), ..split }
}
