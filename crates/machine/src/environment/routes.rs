//! Routes: which endpoints there are, and which revision of them the data plane has acknowledged.
//!
//! One revision is in flight at a time; changes that come meanwhile make the next one. An instance counts as admitted,
//! and may let an old one leave, only once the data plane has acknowledged a revision with it as active endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use orchestra_model::{
    Diagnostic, InstanceId, Name, Now, ReleaseNumber, ResourceId,
    quantity::Timespan,
    route::{Backend, Endpoint, EndpointState, Route, RouteId},
};

use super::Environment;
use crate::Effect;

/// Pause before a refused revision is offered again.
const RETRY: Duration = Duration::from_secs(1);

/// What the data plane knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes {
    dirty: bool,
    revision: u64,
    in_flight: Option<Sent>,
    /// Instances that are active endpoints of the revision in force.
    admitted: BTreeSet<(InstanceId, u32)>,
    /// Services whose addresses are being listened on.
    bound: BTreeSet<Name>,
    /// Why the last revision was refused, by route.
    pub(super) problems: BTreeMap<RouteId, Diagnostic>,
    retry_at: Option<Now>,
    sent: Vec<Route>,
}

#[derive(Clone, Debug)]
struct Sent {
    revision: u64,
    active: BTreeSet<(InstanceId, u32)>,
    services: BTreeSet<Name>,
}

impl Routes {
    pub(super) fn touch(&mut self) {
        self.dirty = true;
    }

    /// Whether the data plane sends requests to this start of an instance.
    pub(super) fn admitted(&self, instance: &InstanceId, attempt: u32) -> bool {
        self.admitted.contains(&(instance.clone(), attempt))
    }

    pub(super) fn bound(&self, service: &Name) -> bool {
        self.bound.contains(service)
    }

    /// Whether the data plane has everything that is wanted of it.
    pub(super) fn is_settled(&self) -> bool {
        !self.dirty && self.in_flight.is_none()
    }

    pub(super) fn retry_at(&self) -> Option<Now> {
        self.retry_at
    }

    pub(super) fn tick(&mut self, now: Now) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.dirty = true;
        }
    }
}

impl Environment {
    /// Sends the next revision if there is something new and none is in flight.
    pub(super) fn send_routes(&mut self, _now: Now) {
        if !self.routes.dirty || self.routes.in_flight.is_some() || self.routes.retry_at.is_some() {
            return;
        }
        self.routes.dirty = false;
        let routes = self.current_routes();
        if routes == self.routes.sent && self.routes.problems.is_empty() && self.routes.revision > 0 {
            return;
        }
        self.routes.revision += 1;
        let active = routes
            .iter()
            .flat_map(|route| &route.backends)
            .flat_map(|backend| &backend.endpoints)
            .filter(|endpoint| endpoint.state == EndpointState::Active)
            .map(|endpoint| (endpoint.instance.clone(), endpoint.attempt))
            .collect();
        let services = routes.iter().map(|route| route.id.service.clone()).collect();
        let revision = self.routes.revision;
        self.routes.in_flight = Some(Sent { revision, active, services });
        self.routes.sent.clone_from(&routes);
        self.out.effects.push(Effect::SetRoutes { revision, routes });
    }

    pub(super) fn routes_applied(&mut self, _now: Now, revision: u64, addresses: &BTreeMap<RouteId, SocketAddr>) {
        let Some(sent) = self.routes.in_flight.take_if(|sent| sent.revision == revision) else { return };
        self.routes.problems.clear();
        let newly_bound: Vec<Name> = sent.services.difference(&self.routes.bound).cloned().collect();
        let newly_admitted: Vec<InstanceId> =
            sent.active.difference(&self.routes.admitted).map(|(instance, _)| instance.clone()).collect();
        self.routes.admitted = sent.active;
        self.routes.bound = sent.services;
        for (route, address) in addresses {
            let ports = self.record.chosen_ports.entry(route.service.clone()).or_default();
            if ports.insert(route.port.clone(), address.port()) != Some(address.port()) {
                self.record_changed = true;
            }
        }
        self.changed.extend(newly_bound.iter().map(super::service_id));
        self.changed.extend(newly_admitted.iter().map(|instance| super::service_id(&instance.workload)));
        self.wake_for_addresses();
        self.routes_settled();
    }

    /// Everybody whose step waits for the data plane, or whose texts wait for an address, looks again.
    fn routes_settled(&mut self) {
        if let Some(run) = &self.run {
            self.changed.extend(run.unfinished());
        }
    }

    fn wake_for_addresses(&mut self) {
        let waiting = self.instances.values().filter(|i| matches!(i.phase(), crate::instance::Phase::Pending { until: None, .. }));
        self.changed.extend(waiting.map(|i| ResourceId::new(i.record().kind, i.record().id.workload.clone())));
    }

    pub(super) fn routes_refused(&mut self, now: Now, revision: u64, problems: BTreeMap<RouteId, Diagnostic>) {
        if self.routes.in_flight.take_if(|sent| sent.revision == revision).is_none() {
            return;
        }
        self.routes.sent.clear();
        self.changed.extend(problems.keys().map(|route| super::service_id(&route.service)));
        self.routes.problems = problems;
        self.routes.retry_at = Some(now + RETRY);
    }

    fn current_routes(&self) -> Vec<Route> {
        let mut routes = Vec::new();
        for (id, workload) in &self.workloads {
            // While a service leaves, its last instances still finish what they have.
            let spec = workload.want.as_ref().map(|want| want.resource.clone());
            let leaving = spec.is_none();
            let Some(spec) = spec.or_else(|| workload.last.clone()) else { continue };
            let Some(service) = spec.as_service() else { continue };
            for (port, published) in &service.ports {
                let chosen = self.record.chosen_ports.get(&id.name).and_then(|ports| ports.get(port)).copied();
                let number = published.port.or(chosen).unwrap_or(0);
                routes.push(Route {
                    id: RouteId { environment: self.record.id.clone(), service: id.name.clone(), port: port.clone() },
                    listen: SocketAddr::new(published.host, number),
                    protocol: published.protocol,
                    hold: if leaving { Timespan::default() } else { self.settings.hold },
                    hold_limit: self.settings.hold_limit,
                    drain: service.rollout.drain,
                    backends: self.backends(id, port),
                });
            }
        }
        routes
    }

    fn backends(&self, id: &ResourceId, port: &Name) -> Vec<Backend> {
        let mut by_release: BTreeMap<ReleaseNumber, Vec<Endpoint>> = BTreeMap::new();
        for member in &self.workloads[id].members {
            let Some(instance) = self.instances.get(member) else { continue };
            let (Some(state), Some(number)) = (instance.endpoint(), instance.record().ports.get(port)) else { continue };
            by_release.entry(member.release).or_default().push(Endpoint {
                instance: member.clone(),
                attempt: instance.record().attempt,
                address: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), *number),
                state,
            });
        }
        by_release
            .into_iter()
            .map(|(release, endpoints)| {
                // Each instance gets the same share, whatever its release.
                let active = endpoints.iter().filter(|e| e.state == EndpointState::Active).count();
                Backend { release, weight: u32::try_from(active).unwrap_or(u32::MAX).saturating_mul(1000), endpoints }
            })
            .collect()
    }
}
