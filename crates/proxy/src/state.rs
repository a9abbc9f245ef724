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
use http::HeaderValue;
use orchestra_model::{
    id::InstanceId,
    route::{Endpoint, EndpointKey, EndpointState, ProxyEvent, Route, RouteId},
    traffic::{Arm, Fallback, Permille},
};
use orchestra_task::TaskTree;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, mpsc},
    time::Instant,
};

use crate::{
    assign::Steering,
    exchange::replay::Memory,
    flags::Flags,
    flight::Flight,
    idle::Connections,
    load::Meter,
    metrics::{Registry, Series},
    mirror::Mirroring,
    rules::Rules,
    table::{BackendPlan, RoutePlan, RouteShared, Table},
    tls::Terminators,
    upstream::Upstream,
    watch::Watching,
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
    /// What is answered here and by no instance.
    pub(crate) flags: Flags,
    /// Certificates and handshakes.
    pub(crate) tls: Terminators,
    /// Told when something about traffic is to be reported before its time.
    pub(crate) traffic: Notify,
    /// What is kept of uploads.
    pub(crate) memory: Arc<Memory>,
    /// Those of clients.
    pub(crate) connections: Connections,
    reporter: Arc<Notify>,
    known: Mutex<Known>,
}

/// What outlives versions of the table.
#[derive(Debug, Default)]
struct Known {
    version: u64,
    endpoints: BTreeMap<EndpointKey, KnownEndpoint>,
    routes: HashMap<RouteId, Arc<RouteShared>>,
    /// What is reported of each route goes on from one version to the next.
    reported: HashMap<RouteId, Reported>,
    /// To the server, if one is connected.
    link: Option<Link>,
}

/// Watch and meter of a route.
type Reported = (Option<Arc<Watching>>, Option<Arc<Meter>>);

/// Where reports go.
pub(crate) type Link = mpsc::Sender<Report>;

/// A report on its way.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) body: Response,
    /// Given back once it was written: bounds what a server that does not read makes us keep.
    pub(crate) permit: Option<OwnedSemaphorePermit>,
}

impl From<Response> for Report {
    fn from(body: Response) -> Self {
        Self { body, permit: None }
    }
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
            flags: Flags::default(),
            tls: Terminators::default(),
            traffic: Notify::new(),
            memory: Arc::default(),
            connections: Connections::default(),
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
        // A leaving proxy gets no sockets, but keeps those that its connections came from.
        let before: HashMap<RouteId, SocketId> =
            self.table.load().routes.iter().map(|(socket, plan)| (plan.id.clone(), *socket)).collect();
        let socket_of = |id: &RouteId| sockets.get(id).or_else(|| before.get(id)).copied();
        let terminators = self.tls.apply(wanted);
        table.tls = terminators.into_iter().filter_map(|(id, tls)| Some((socket_of(&id)?, tls))).collect();
        table.flags = self.flags.apply(wanted, &sockets, &self.table.load().flags, &self.metrics);
        for route in wanted.routes.iter().filter(|route| route.flags.is_none()) {
            let mut backends = Vec::new();
            for backend in &route.backends {
                let mut upstreams = Vec::new();
                let series = self.metrics.series(&route.id, Some((backend.release, backend.arm)));
                for endpoint in &backend.endpoints {
                    let upstream = self.upstream(known, route, &series, endpoint);
                    if endpoint.state == EndpointState::Active {
                        active.insert(upstream.flight.key().clone(), Arc::clone(&upstream.flight));
                        upstreams.push(upstream);
                    }
                }
                if !upstreams.is_empty() {
                    backends.push(BackendPlan {
                        release: backend.release,
                        name: HeaderValue::from(backend.release.0),
                        arm: backend.arm,
                        weight: backend.weight,
                        upstreams,
                        series,
                    });
                }
            }
            let before = known.reported.get(&route.id).cloned().unwrap_or_default();
            let watch = route.split.watch.as_ref().map(|watch| {
                let tally = before.0.as_ref().map(|watching| &watching.tally);
                Arc::new(Watching::new(watch, &route.id, tally))
            });
            let meter = route.metered.then(|| before.1.unwrap_or_default());
            known.reported.insert(route.id.clone(), (watch.clone(), meter.clone()));
            let plan = RoutePlan {
                version: wanted.version,
                id: route.id.clone(),
                protocol: route.protocol,
                hold: route.hold.duration(),
                hold_limit: route.hold_limit,
                shared: Arc::clone(known.routes.entry(route.id.clone()).or_default()),
                canary_weight: canary_weight(&backends),
                backends,
                series: self.metrics.series(&route.id, None),
                paused: route.split.paused,
                steering: Steering::of(route),
                watch,
                meter,
                mirror: route.split.mirror.as_ref().map(Mirroring::from),
                rules: Rules::new(&route.policy, fallback(route).and_then(|id| socket_of(&id))),
            };
            if let Some(socket) = socket_of(&route.id) {
                let plan = Arc::new(plan);
                if plan.watch.is_some() || plan.meter.is_some() {
                    table.reported.push(Arc::clone(&plan));
                }
                table.routes.insert(socket, plan);
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
        known.reported.retain(|id, _| wanted.routes.iter().any(|r| r.id == *id));
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
        self.traffic.notify_one();
    }

    fn upstream(&self, known: &mut Known, route: &Route, series: &Arc<Series>, endpoint: &Endpoint) -> Arc<Upstream> {
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
            // A canary that was promoted is stable from here on.
            upstream.series.store(Arc::clone(series));
            return Arc::clone(upstream);
        }
        let series = Arc::clone(series);
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

    /// Metrics in Prometheus text format 0.0.4.
    pub(crate) fn page(&self) -> String {
        let mut page = self.metrics.render();
        self.tls.render(&mut page);
        self.table.load().render(&mut page);
        page
    }

    /// Everything in flight, to any endpoint.
    pub(crate) fn in_flight(&self) -> u64 {
        self.known().endpoints.values().map(|e| u64::from(e.flight.load())).sum()
    }

    /// Sets or clears where reports go. A new server is told again what is true.
    pub(crate) fn link(&self, link: Option<Link>) {
        let mut known = self.known();
        known.link = link;
        for endpoint in known.endpoints.values_mut() {
            endpoint.reported = None;
            endpoint.told = None;
        }
        for meter in known.reported.values().filter_map(|(_, meter)| meter.as_ref()) {
            meter.hurry();
        }
        drop(known);
        self.tls.repeat();
        self.reporter.notify_one();
        self.traffic.notify_one();
    }

    /// Version of the table in force, and where reports go, if anywhere.
    pub(crate) fn linked(&self) -> Option<(u64, Link)> {
        let known = self.known();
        known.link.clone().map(|link| (known.version, link))
    }

    /// Tells the server that this proxy leaves.
    pub(crate) async fn said_leaving(&self) {
        let link = self.known().link.clone();
        if let Some(link) = link {
            // A server that is gone need not know.
            let _ = link.send(Response::Leaving.into()).await;
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
                if link.send(report.into()).await.is_err() {
                    break;
                }
            }
        }
    }

    /// Reports that are due, where they go, and when to look again.
    fn due(&self) -> (Option<Link>, Vec<Response>, Option<Instant>) {
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

/// The route that answers for this one while it has no instance.
fn fallback(route: &Route) -> Option<RouteId> {
    let Fallback { service, port } = route.policy.fallback.clone()?;
    Some(RouteId { environment: route.id.environment.clone(), service, port }).filter(|id| *id != route.id)
}

/// Share of the canary arm where only weights decide, rounded up: whoever judges by it errs to the new release's favour.
fn canary_weight(backends: &[BackendPlan]) -> Permille {
    let sum = |arm: &[Arm]| -> u64 {
        backends.iter().filter(|backend| arm.contains(&backend.arm)).map(|backend| u64::from(backend.weight)).sum()
    };
    let share = (sum(&[Arm::Canary]) * 1000).div_ceil(sum(&[Arm::Canary, Arm::Stable]).max(1));
    Permille::new(u16::try_from(share).unwrap_or(u16::MAX))
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
    /// TLS is spoken on it.
    pub(crate) secure: bool,
}
