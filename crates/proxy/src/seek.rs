//! Finding an endpoint for a request or a connection, and waiting where there is none.
//!
//! A route without an active endpoint is mostly one whose instance is just being restarted. What arrives then waits, up
//! to the route's hold time and in bounded number, and goes on as soon as a new table brings an endpoint: a restart is a
//! delay and not an error. Waiters are woken in the order in which they came. A paused route lets everybody wait.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::HeaderMap;
use tokio::time::Instant;

use crate::{
    assign::{Asker, Way},
    exchange::{failure::Failure, headers::Head},
    flight::{InFlight, Kind},
    metrics::{ErrorKind, Gauge, Series},
    state::{Arrival, Proxy},
    table::{BackendPlan, RoutePlan},
    upstream::Upstream,
    watch::Evidence,
};

/// First and longest pause before endpoints that all refused a connection are tried again. An instance that has just
/// crashed is still in the table; its successor comes with the next one, which ends the pause at once.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// An endpoint, entered.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) flight: InFlight,
    pub(crate) plan: Arc<RoutePlan>,
    chosen: Chosen,
}

/// How an endpoint was chosen.
#[derive(Debug)]
struct Chosen {
    backend: usize,
    way: Way,
    /// It is of the release or the arm that was meant.
    as_meant: bool,
    /// When the arm was chosen; the same over all endpoints that were tried for it.
    since: Instant,
}

impl Ticket {
    pub(crate) fn backend(&self) -> &BackendPlan {
        &self.plan.backends[self.chosen.backend]
    }

    /// Numbers of its release.
    pub(crate) fn series(&self) -> &Arc<Series> {
        &self.backend().series
    }

    /// Counts what it is for as in flight.
    pub(crate) fn gauge(&self) -> Gauge {
        self.series().gauge(self.flight.is_stream()).metered(self.plan.meter.as_ref())
    }

    /// What this try is to say of its arm; nothing if chance did not choose it, or nobody watches.
    pub(crate) fn evidence(&self) -> Evidence {
        let Chosen { way, as_meant, since, .. } = &self.chosen;
        match (&self.plan.watch, way.chance) {
            (Some(watching), Some(canary)) if *as_meant => {
                Evidence::new(watching, self.backend().arm, way.client, canary, *since)
            }
            _ => Evidence::none(),
        }
    }

    /// Says in the head of a response which release gave it, and what the client shall keep.
    pub(crate) fn mark(&self, headers: &mut HeaderMap) {
        let backend = self.backend();
        self.chosen.way.mark(&self.plan, backend.release, &backend.name, headers);
    }
}

/// Finds endpoints for one request, over all its attempts.
pub(crate) struct Seeker<'a> {
    proxy: &'a Proxy,
    arrival: &'a Arrival,
    asker: Asker<'a>,
    since: Instant,
    kind: Kind,
    /// As it was chosen, when, and by which version of the table; chosen anew by another, and after waiting.
    way: Option<(Way, Instant, u64)>,
    begun: bool,
    /// Endpoints that refused a connection, or whose gate was closed.
    tried: Vec<Arc<Upstream>>,
    /// The last refused connection, for the message.
    trouble: Option<String>,
    /// What the last refused connection says of its arm, should no other endpoint be found.
    missed: Evidence,
    waiting: Option<Waiting<'a>>,
    pause: Duration,
}

impl<'a> Seeker<'a> {
    /// For a request with this head, or for a TCP connection.
    pub(crate) fn new(proxy: &'a Proxy, arrival: &'a Arrival, kind: Kind, head: Option<&'a Head>) -> Self {
        Self {
            proxy,
            arrival,
            asker: Asker::new(head, arrival.peer),
            since: Instant::now(),
            kind,
            way: None,
            begun: false,
            tried: Vec::new(),
            trouble: None,
            missed: Evidence::none(),
            waiting: None,
            pause: RECONNECT.0,
        }
    }

    /// Enters an endpoint; waits for one if there is none.
    pub(crate) async fn acquire(&mut self) -> Result<Ticket, Failure> {
        loop {
            let plan = self.plan()?;
            if !self.begun
                && let Some(meter) = &plan.meter
            {
                meter.began();
            }
            if let Some((upstream, flight, chosen)) = self.enter(&plan) {
                self.waiting = None;
                return Ok(Ticket { upstream, flight, plan, chosen });
            }
            let mut changed = std::pin::pin!(plan.shared.changed.notified());
            // Registered before looking again, so that no table comes unseen in between.
            changed.as_mut().enable();
            if !Arc::ptr_eq(&plan, &self.plan()?) {
                continue;
            }
            self.wait(&plan)?;
            let deadline = self.since + plan.hold;
            if Instant::now() >= deadline {
                return Err(self.too_late(&plan));
            }
            let again = if self.tried.is_empty() { deadline } else { deadline.min(Instant::now() + self.pause) };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(again) => self.pause = (self.pause * 2).min(RECONNECT.1),
            }
            self.tried.clear();
            self.way = None;
        }
    }

    /// The endpoint did not accept a connection; another one is to be found.
    pub(crate) fn unreachable(&mut self, ticket: &Ticket, error: &io::Error) {
        self.trouble = Some(format!("instance {}: {error}", ticket.upstream.flight.key().instance));
        self.tried.push(Arc::clone(&ticket.upstream));
        let evidence = ticket.evidence();
        if !evidence.is_none() {
            std::mem::replace(&mut self.missed, evidence).forget();
        }
    }

    /// What was missed, if it is to be told after all.
    fn missed(&mut self) -> Evidence {
        std::mem::replace(&mut self.missed, Evidence::none())
    }

    fn plan(&self) -> Result<Arc<RoutePlan>, Failure> {
        let table = self.proxy.table.load();
        let plan = table.routes.get(&self.arrival.socket);
        plan.cloned().ok_or_else(|| Failure::new(ErrorKind::NoRoute, "the route does not exist any more"))
    }

    fn enter(&mut self, plan: &RoutePlan) -> Option<(Arc<Upstream>, InFlight, Chosen)> {
        // One draw for a request and all that follows from it: were it drawn again where the first arm refused it, the
        // arms would not get their shares.
        let (way, since) = match &mut self.way {
            Some((way, since, version)) if *version == plan.version => {
                way.bits = plan.shared.draw();
                (*way, *since)
            }
            way => {
                let since = if self.begun { Instant::now() } else { self.since };
                let (drawn, ..) = way.insert((self.asker.way(plan), since, plan.version));
                (*drawn, since)
            }
        };
        self.begun = true;
        if plan.paused {
            return None;
        }
        loop {
            let choice = plan.choose(&way, &self.tried)?;
            let (upstream, backend, as_meant) = (choice.upstream, choice.backend, choice.as_meant);
            if let Some(flight) = upstream.flight.enter(self.kind) {
                return Some((Arc::clone(upstream), flight, Chosen { backend, way, as_meant, since }));
            }
            // Turned away: a newer table closed the gate (then the plan is an old one), or it was cut.
            self.tried.push(Arc::clone(upstream));
        }
    }

    fn wait(&mut self, plan: &Arc<RoutePlan>) -> Result<(), Failure> {
        if self.waiting.is_some() {
            return Ok(());
        }
        let step = |holding: u32| (holding < plan.hold_limit).then_some(holding + 1);
        if plan.shared.holding.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_err() {
            self.missed().broken();
            return Err(match &self.trouble {
                Some(trouble) => Failure::new(ErrorKind::Connect, trouble.clone()),
                None => Failure::new(
                    ErrorKind::HoldFull,
                    format!("{}, and {} requests wait already", why(plan), plan.hold_limit),
                ),
            });
        }
        self.waiting = Some(Waiting { plan: Arc::clone(plan), proxy: self.proxy });
        self.proxy.metrics.holding.fetch_add(1, Ordering::Relaxed);
        self.proxy.metrics.held.fetch_add(1, Ordering::Relaxed);
        plan.series.waits();
        if let Some(meter) = &plan.meter {
            meter.waits(&self.proxy.traffic);
        }
        Ok(())
    }

    fn too_late(&mut self, plan: &RoutePlan) -> Failure {
        self.missed().broken();
        let hold = orchestra_model::quantity::Timespan::millis(plan.hold.as_millis().try_into().unwrap_or(u64::MAX));
        match &self.trouble {
            Some(trouble) => Failure::new(ErrorKind::Connect, format!("no instance accepts connections ({trouble})")),
            None if plan.paused => Failure::new(ErrorKind::Hold, format!("{} for longer than {hold}", why(plan))),
            None => Failure::new(ErrorKind::Hold, format!("no instance became ready within {hold}")),
        }
    }
}

fn why(plan: &RoutePlan) -> &'static str {
    if plan.paused { "the route is paused" } else { "no instance is ready" }
}

impl Drop for Seeker<'_> {
    fn drop(&mut self) {
        // Another endpoint answered, or the client left: the one that was not reached is no evidence.
        self.missed().forget();
    }
}

/// A place among those who wait; given back when dropped, also when the client goes away.
struct Waiting<'a> {
    plan: Arc<RoutePlan>,
    proxy: &'a Proxy,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.plan.shared.holding.fetch_sub(1, Ordering::AcqRel);
        self.plan.series.waited();
        self.proxy.metrics.holding.fetch_sub(1, Ordering::Relaxed);
    }
}
