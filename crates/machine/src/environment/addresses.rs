//! Addresses that change hands: a release that renames a service, lets two swap their ports, or gives one's port to another.
//!
//! Steps of a run begin one after the other, so that for a while two services want the same address: one whose step has
//! begun, and one whose step has not, or which leaves. It belongs to the *heir*, to whom the release gives it that the run
//! leads to; the *holder* is the other. A table in which both ask for it would be refused.
//!
//! - An heir that is new has the address once all its instances can serve; until then the holder keeps it, and the heir
//!   listens somewhere that nobody knows. So a service that is renamed answers all the time, and one that does not become
//!   ready takes nothing away.
//! - In the same table the holder moves to the address that the release gives to it, though its own step has not begun:
//!   two that swap are both reachable. One that leaves goes somewhere that nobody knows, and finishes what it has.

use std::net::{IpAddr, SocketAddr};

use orchestra_model::{
    Desired,
    record::RunState,
    route::{EndpointState, Route},
};

use super::{Environment, service_id};

impl Environment {
    /// Leaves of routes that ask for the same address one where it is.
    pub(super) fn hand_over_addresses(&self, routes: &mut [Route]) {
        let Some(target) = self.target() else { return };
        // Each move settles a clash and makes at most one other: that of a holder who moves on to the next one's address.
        for _ in 0..routes.len() {
            let Some((heir, holder)) = clash(routes, target) else { return };
            let contested = routes[heir].listen;
            if self.takes_over(&routes[heir], &routes[holder]) {
                let next = given(target, &routes[holder]).filter(|next| next.port() != 0);
                routes[holder].listen = next.unwrap_or_else(|| self.aside(&routes[holder], contested));
            } else {
                routes[heir].listen = self.aside(&routes[heir], contested);
            }
        }
    }

    /// What the run leads to.
    pub(super) fn target(&self) -> Option<&Desired> {
        let run = &self.run.as_ref()?.record;
        match run.state {
            RunState::Reverting => Some(&self.releases.get(&self.record.stable?)?.desired),
            _ => run.plan.desired.as_ref(),
        }
    }

    /// Whether the heir of an address has it from now on.
    fn takes_over(&self, heir: &Route, holder: &Route) -> bool {
        let id = service_id(&heir.id.service);
        let has_it = self.routes.listens(heir);
        let is_new = !self.resources.contains_key(&id);
        let want = self.workloads.get(&id).and_then(|workload| workload.want.as_ref());
        let replicas = want.and_then(|want| want.resource.as_service()).map_or(0, |service| service.replicas as usize);
        let enough = if is_new { replicas } else { replicas.min(1) };
        has_it || active(heir) >= enough || active(holder) == 0
    }

    /// An address that nobody knows: the one that the route has already, or any.
    fn aside(&self, route: &Route, contested: SocketAddr) -> SocketAddr {
        let in_force = self.routes.address(&route.id);
        let any = SocketAddr::new(contested.ip(), 0);
        in_force.filter(|address| address.port() != contested.port()).unwrap_or(any)
    }
}

/// Two routes that ask for one address: to which of them it is given, and which has it still.
fn clash(routes: &[Route], target: &Desired) -> Option<(usize, usize)> {
    let mut fixed: Vec<usize> =
        (0..routes.len()).filter(|index| routes[*index].listen.port() != 0 && !routes[*index].id.is_flags()).collect();
    fixed.sort_by_key(|index| routes[*index].listen.port());
    for group in fixed.chunk_by(|a, b| routes[*a].listen.port() == routes[*b].listen.port()) {
        for (place, second) in group.iter().enumerate() {
            for first in &group[..place] {
                let [one, other] = [*first, *second].map(|index| &routes[index]);
                if !overlap(one.listen.ip(), other.listen.ip()) {
                    continue;
                }
                match [one, other].map(|route| given(target, route) == Some(route.listen)) {
                    [true, false] => return Some((*first, *second)),
                    [false, true] => return Some((*second, *first)),
                    // Nobody has a better right: the data plane says so.
                    _ => {}
                }
            }
        }
    }
    None
}

/// The address that a release gives to a route; port 0 is any.
fn given(target: &Desired, route: &Route) -> Option<SocketAddr> {
    let service = target.resources.get(&service_id(&route.id.service))?.as_service()?;
    let port = service.ports.get(&route.id.port)?;
    Some(SocketAddr::new(port.host, port.port.unwrap_or(0)))
}

fn active(route: &Route) -> usize {
    let endpoints = route.backends.iter().flat_map(|backend| &backend.endpoints);
    endpoints.filter(|endpoint| endpoint.state == EndpointState::Active).count()
}

/// Whether listening on both would fail.
fn overlap(a: IpAddr, b: IpAddr) -> bool {
    a == b || a.is_unspecified() || b.is_unspecified()
}
