//! Finding an endpoint for a request or a connection, and waiting where there is none.
//!
//! A route without an active endpoint is mostly one whose instance is just being restarted. What arrives then waits, up
//! to the route's hold time and in bounded number, and goes on as soon as a new table brings an endpoint: a restart is a
//! delay and not an error. Waiters are woken in the order in which they came.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    exchange::failure::Failure,
    flight::{InFlight, Kind},
    metrics::ErrorKind,
    state::{Arrival, Proxy},
    table::{RoutePlan, RouteShared},
    upstream::Upstream,
};

/// First and longest pause before endpoints that all refused a connection are tried again. An instance that has just
/// crashed is still in the table; its successor comes with the next one, which ends the pause at once.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// An endpoint, entered.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) flight: InFlight,
}

/// Finds endpoints for one request, over all its attempts.
pub(crate) struct Seeker<'a> {
    proxy: &'a Proxy,
    arrival: &'a Arrival,
    since: Instant,
    kind: Kind,
    /// Endpoints that refused a connection, or whose gate was closed.
    tried: Vec<Arc<Upstream>>,
    /// The last refused connection, for the message.
    trouble: Option<String>,
    waiting: Option<Waiting<'a>>,
    pause: Duration,
}

impl<'a> Seeker<'a> {
    pub(crate) fn new(proxy: &'a Proxy, arrival: &'a Arrival, kind: Kind) -> Self {
        let since = Instant::now();
        Self { proxy, arrival, since, kind, tried: Vec::new(), trouble: None, waiting: None, pause: RECONNECT.0 }
    }

    /// Enters an endpoint; waits for one if there is none.
    pub(crate) async fn acquire(&mut self) -> Result<Ticket, Failure> {
        loop {
            let plan = self.plan()?;
            if let Some(ticket) = self.enter(&plan) {
                self.waiting = None;
                return Ok(ticket);
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
        }
    }

    /// The endpoint did not accept a connection; another one is to be found.
    pub(crate) fn unreachable(&mut self, ticket: &Ticket, error: &io::Error) {
        self.trouble = Some(format!("instance {}: {error}", ticket.upstream.flight.key().instance));
        self.tried.push(Arc::clone(&ticket.upstream));
    }

    fn plan(&self) -> Result<Arc<RoutePlan>, Failure> {
        let table = self.proxy.table.load();
        let plan = table.routes.get(&self.arrival.socket);
        plan.cloned().ok_or_else(|| Failure::new(ErrorKind::NoRoute, "the route does not exist any more"))
    }

    fn enter(&mut self, plan: &RoutePlan) -> Option<Ticket> {
        loop {
            let upstream = plan.choose(&self.tried)?;
            if let Some(flight) = upstream.flight.enter(self.kind) {
                return Some(Ticket { upstream: Arc::clone(upstream), flight });
            }
            // Turned away: a newer table closed the gate (then the plan is an old one), or it was cut.
            self.tried.push(Arc::clone(upstream));
        }
    }

    fn wait(&mut self, plan: &RoutePlan) -> Result<(), Failure> {
        if self.waiting.is_some() {
            return Ok(());
        }
        let step = |holding: u32| (holding < plan.hold_limit).then_some(holding + 1);
        if plan.shared.holding.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_err() {
            return Err(match &self.trouble {
                Some(trouble) => Failure::new(ErrorKind::Connect, trouble.clone()),
                None => Failure::new(
                    ErrorKind::HoldFull,
                    format!("no instance is ready, and {} requests wait for one already", plan.hold_limit),
                ),
            });
        }
        self.waiting = Some(Waiting { shared: Arc::clone(&plan.shared), proxy: self.proxy });
        self.proxy.metrics.holding.fetch_add(1, Ordering::Relaxed);
        self.proxy.metrics.held.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn too_late(&self, plan: &RoutePlan) -> Failure {
        let hold = orchestra_model::quantity::Timespan::millis(plan.hold.as_millis().try_into().unwrap_or(u64::MAX));
        match &self.trouble {
            Some(trouble) => Failure::new(ErrorKind::Connect, format!("no instance accepts connections ({trouble})")),
            None => Failure::new(ErrorKind::Hold, format!("no instance became ready within {hold}")),
        }
    }
}

/// A place among those who wait; given back when dropped, also when the client goes away.
struct Waiting<'a> {
    shared: Arc<RouteShared>,
    proxy: &'a Proxy,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.holding.fetch_sub(1, Ordering::AcqRel);
        self.proxy.metrics.holding.fetch_sub(1, Ordering::Relaxed);
    }
}
