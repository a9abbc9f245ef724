//! What the proxy knows: the table in force, every endpoint it may still have something in flight to, and who is told.
//!
//! [`Proxy::apply`] is the only writer. Its order is what makes the flip atomic and the drain exact:
//!
//! 1. open the gates of all endpoints that the new table wants active: nobody chooses them yet;
//! 2. store the new table: from here on every choice is made by it;
//! 3. close the gates of all others. A request that still chooses by the old table either entered before this step, and
//!    is counted, or is turned away and chooses again by the new table (see `flight.rs`).

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use arc_swap::ArcSwap;
use orchestra_model::{
    id::{InstanceId, ReleaseNumber},
    route::{Endpoint, EndpointKey, EndpointState, ProxyEvent, Route, RouteId},
};
use orchestra_task::TaskTree;
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use crate::{
    flight::Flight,
    metrics::Registry,
    table::{BackendPlan, RoutePlan, RouteShared, Table},
    upstream::Upstream,
    wire::{Response, Snapshot, SocketId, SocketUse},
};

/// Reports about an endpoint that only changed its counts are at least this far apart.
const REPORT_EVERY: std::time::Duration = std::time::Duration::from_secs(1);

/// The state of a proxy process.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) table: ArcSwap<Table>,
    pub(crate) metrics: Registry,
    pub(crate) tree: TaskTree,
    reporter: Arc<Notify>,
    known: Mutex<Known>,
}

/// What outlives versions of the table.
#[derive(Debug, Default)]
struct Known {
    version: u64,
    endpoints: BTreeMap<EndpointKey, KnownEndpoint>,
    routes: HashMap<RouteId, Arc<RouteShared>>,
    /// To the server, if one is connected.
    link: Option<mpsc::Sender<Response>>,
}

#[derive(Debug)]
struct KnownEndpoint {
    flight: Arc<Flight>,
    /// One for each route and address that it is reached by.
    upstreams: Vec<(RouteId, Arc<Upstream>)>,
    /// Not in the table any more: forgotten once it was reported drained.
    absent: bool,
    /// Version for which it was reported drained.
    reported: Option<u64>,
    /// Counts that were reported last, and when.
    told: Option<((u32, u32), Instant)>,
}

impl Proxy {
    pub(crate) fn new(tree: TaskTree) -> Self {
        Self {
            table: ArcSwap::default(),
            metrics: Registry::default(),
            tree,
            reporter: Arc::default(),
            known: Mutex::default(),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a snapshot into force.
    pub(crate) fn apply(&self, snapshot: &Snapshot) {
        let Some(wanted) = &snapshot.table else { return };
        let sockets: HashMap<&RouteId, SocketId> = snapshot
            .sockets
            .iter()
            .filter_map(|s| if let SocketUse::Route(route) = &s.purpose { Some((route, s.id)) } else { None })
            .collect();
        let mut known = self.known();
        let known = &mut *known;
        let mut active: BTreeMap<EndpointKey, Arc<Flight>> = BTreeMap::new();
        for endpoint in known.endpoints.values_mut() {
            endpoint.absent = true;
        }
        let mut table = Table::default();
        for route in &wanted.routes {
            let mut backends = Vec::new();
            for backend in &route.backends {
                let mut upstreams = Vec::new();
                for endpoint in &backend.endpoints {
                    let upstream = self.upstream(known, route, backend.release, endpoint);
                    if endpoint.state == EndpointState::Active {
                        active.insert(upstream.flight.key().clone(), Arc::clone(&upstream.flight));
                        upstreams.push(upstream);
                    }
                }
                if backend.weight > 0 && !upstreams.is_empty() {
                    backends.push(BackendPlan { weight: backend.weight, upstreams });
                }
            }
            let plan = RoutePlan {
                id: route.id.clone(),
                protocol: route.protocol,
                hold: route.hold.duration(),
                hold_limit: route.hold_limit,
                shared: Arc::clone(known.routes.entry(route.id.clone()).or_default()),
                backends,
                series: self.metrics.series(&route.id, None),
            };
            // A leaving proxy gets no sockets, but keeps those that its connections came from.
            let previous = || {
                let table = self.table.load();
                table.routes.iter().find(|(_, plan)| plan.id == route.id).map(|(socket, _)| *socket)
            };
            if let Some(socket) = sockets.get(&route.id).copied().or_else(previous) {
                table.routes.insert(socket, Arc::new(plan));
            }
        }
        known.version = wanted.version;
        for flight in active.values() {
            flight.open();
        }
        let old = self.table.swap(Arc::new(table));
        let mut closed = Vec::new();
        for (key, endpoint) in &mut known.endpoints {
            if active.contains_key(key) {
                endpoint.reported = None;
                endpoint.told = None;
            } else if endpoint.flight.close() {
                closed.extend(endpoint.upstreams.iter().map(|(_, upstream)| Arc::clone(upstream)));
            }
        }
        // Connections to addresses that no table names any more go with the last request on them.
        for endpoint in known.endpoints.values_mut().filter(|e| !e.absent) {
            let key = endpoint.flight.key();
            endpoint.upstreams.retain(|(route, upstream)| {
                let still = wanted.routes.iter().filter(|r| r.id == *route).flat_map(|r| &r.backends).any(|backend| {
                    backend.endpoints.iter().any(|e| {
                        e.address == upstream.address && e.instance == key.instance && e.attempt == key.attempt
                    })
                });
                if !still {
                    closed.push(Arc::clone(upstream));
                }
                still
            });
        }
        known.routes.retain(|id, _| wanted.routes.iter().any(|r| r.id == *id));
        // After the gates are closed: nothing is put back into a pool whose gate is closed.
        for upstream in closed {
            upstream.close_idle();
        }
        // Those who wait look at the new table; also those of routes that are gone, to be told so.
        for plan in old.routes.values().chain(self.table.load().routes.values()) {
            plan.shared.changed.notify_waiters();
        }
        drop(old);
        self.metrics.table.store(wanted.version, Ordering::Relaxed);
        self.metrics.forget();
        self.reporter.notify_one();
    }

    fn upstream(&self, known: &mut Known, route: &Route, release: ReleaseNumber, endpoint: &Endpoint) -> Arc<Upstream> {
        let key = key(route, &endpoint.instance, endpoint.attempt);
        let entry = known.endpoints.entry(key.clone()).or_insert_with(|| KnownEndpoint {
            flight: Arc::new(Flight::new(key, Arc::clone(&self.reporter))),
            upstreams: Vec::new(),
            absent: false,
            reported: None,
            told: None,
        });
        entry.absent = false;
        let same = |(id, upstream): &&(RouteId, Arc<Upstream>)| {
            *id == route.id && upstream.address == endpoint.address && upstream.protocol == route.protocol
        };
        if let Some((_, upstream)) = entry.upstreams.iter().find(same) {
            return Arc::clone(upstream);
        }
        let series = self.metrics.series(&route.id, Some(release));
        let (flight, tree) = (Arc::clone(&entry.flight), self.tree.clone());
        let upstream = Arc::new(Upstream::new(route.protocol, endpoint.address, flight, series, tree));
        entry.upstreams.push((route.id.clone(), Arc::clone(&upstream)));
        upstream
    }

    /// Ends what is in flight to an endpoint.
    pub(crate) fn cut(&self, endpoint: &EndpointKey) {
        if let Some(endpoint) = self.known().endpoints.get(endpoint) {
            endpoint.flight.cut();
        }
        self.reporter.notify_one();
    }

    /// Gate and counts of an endpoint, if it is known.
    pub(crate) fn flight(&self, endpoint: &EndpointKey) -> Option<Arc<Flight>> {
        self.known().endpoints.get(endpoint).map(|e| Arc::clone(&e.flight))
    }

    /// Everything in flight, to any endpoint.
    pub(crate) fn in_flight(&self) -> u64 {
        self.known().endpoints.values().map(|e| u64::from(e.flight.load())).sum()
    }

    /// Sets or clears where reports go. A new server is told again what is true.
    pub(crate) fn link(&self, link: Option<mpsc::Sender<Response>>) {
        let mut known = self.known();
        known.link = link;
        for endpoint in known.endpoints.values_mut() {
            endpoint.reported = None;
            endpoint.told = None;
        }
        drop(known);
        self.reporter.notify_one();
    }

    /// Tells the server that this proxy leaves.
    pub(crate) async fn said_leaving(&self) {
        let link = self.known().link.clone();
        if let Some(link) = link {
            // A server that is gone need not know.
            let _ = link.send(Response::Leaving).await;
        }
    }

    /// Reports drained and draining endpoints; never ends.
    pub(crate) async fn report(self: Arc<Self>) {
        let mut again: Option<Instant> = None;
        loop {
            let timer = async {
                match again {
                    Some(time) => tokio::time::sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.reporter.notified() => {}
                () = timer => {}
            }
            let (link, reports, next) = self.due();
            again = next;
            let Some(link) = link else { continue };
            for report in reports {
                // A server that is gone gets its reports when it is back.
                if link.send(report).await.is_err() {
                    break;
                }
            }
        }
    }

    /// Reports that are due, where they go, and when to look again.
    fn due(&self) -> (Option<mpsc::Sender<Response>>, Vec<Response>, Option<Instant>) {
        let now = Instant::now();
        let mut known = self.known();
        let Some(link) = known.link.clone() else { return (None, Vec::new(), None) };
        let version = known.version;
        let (mut reports, mut again) = (Vec::new(), None::<Instant>);
        known.endpoints.retain(|key, endpoint| {
            if endpoint.flight.is_drained() {
                if endpoint.reported != Some(version) {
                    endpoint.reported = Some(version);
                    for (_, upstream) in &endpoint.upstreams {
                        upstream.close_idle();
                    }
                    let event = ProxyEvent::Drained { endpoint: key.clone() };
                    reports.push(Response::Event { version, event });
                }
                return !endpoint.absent;
            }
            if !endpoint.flight.is_closed() {
                return true;
            }
            let counts = endpoint.flight.counts();
            match endpoint.told {
                Some((told, _)) if told == counts => {}
                Some((_, when)) if now < when + REPORT_EVERY => {
                    let due = when + REPORT_EVERY;
                    again = Some(again.map_or(due, |a| a.min(due)));
                }
                _ => {
                    endpoint.told = Some((counts, now));
                    let event = ProxyEvent::Draining { endpoint: key.clone(), requests: counts.0, streams: counts.1 };
                    reports.push(Response::Event { version, event });
                }
            }
            true
        });
        (Some(link), reports, again)
    }
}

fn key(route: &Route, instance: &InstanceId, attempt: u32) -> EndpointKey {
    EndpointKey { environment: route.id.environment.clone(), instance: instance.clone(), attempt }
}

/// Where a connection came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) socket: SocketId,
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
}
