//! Finding an endpoint for a request or a connection, and waiting where there is none.
//!
//! A route without an active endpoint is mostly one whose instance is just being restarted. What arrives then waits, up
//! to the route's hold time and in bounded number, and goes on as soon as a new table brings an endpoint: a restart is a
//! delay and not an error. Waiters are woken in the order in which they came. A paused route lets everybody wait, and so
//! does one whose instances all have as much in flight as the breaker allows.
//!
//! With a fallback nobody waits for an instance: while there is none, or none accepts connections, requests go to the
//! route of the other service. Not to the fallback of that one, whatever it says: chains and circles end after one step.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use orchestra_model::desired::Protocol;
use tokio::time::Instant;

use crate::{
    assign::{Asker, Way},
    clock,
    exchange::{failure::Failure, headers::Head},
    flight::{InFlight, Kind},
    metrics::{ErrorKind, Gauge, Series},
    rules::Rules,
    state::{Arrival, Proxy},
    table::{BackendPlan, RoutePlan},
    upstream::Upstream,
    watch::Evidence,
};

/// First and longest pause before endpoints that all refused a connection are tried again. An instance that has just
/// crashed is still in the table; its successor comes with the next one, which ends the pause at once.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// Longest time until a request that waits for room looks again by itself: an instance may be behind other routes too.
const LOOK: Duration = Duration::from_millis(250);

/// Says in a response that another service gave it.
const FALLBACK: HeaderName = HeaderName::from_static("orchestra-fallback");

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
    /// When this endpoint was entered; only where somebody asks.
    entered: Option<Instant>,
    /// It is of another service.
    fallback: bool,
}

impl Ticket {
    pub(crate) fn backend(&self) -> &BackendPlan {
        &self.plan.backends[self.chosen.backend]
    }

    /// What the route says of requests.
    pub(crate) fn rules(&self) -> &Rules {
        &self.plan.rules
    }

    /// When the time from its choice is over; `None` without an end.
    pub(crate) fn deadline(&self, after: Option<Duration>) -> Option<Instant> {
        after.map(|after| self.chosen.entered.unwrap_or_else(Instant::now) + after)
    }

    /// The instance failed this request.
    pub(crate) fn failed(&self) {
        self.plan.failed(self.backend(), &self.upstream);
    }

    /// It answered as it should.
    pub(crate) fn succeeded(&self) {
        self.upstream.health.succeeded();
    }

    /// What is in flight, and where it comes from.
    pub(crate) fn split(self) -> (InFlight, Origin) {
        let Self { upstream, flight, plan, chosen } = self;
        (flight, Origin { plan, upstream, backend: chosen.backend })
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
        if self.chosen.fallback {
            headers.insert(FALLBACK, HeaderValue::from_str(self.plan.id.service.as_str()).expect("a name is ASCII"));
        }
    }
}

/// Where a response comes from.
#[derive(Debug)]
pub(crate) struct Origin {
    plan: Arc<RoutePlan>,
    upstream: Arc<Upstream>,
    backend: usize,
}

impl Origin {
    /// What the route says of requests.
    pub(crate) fn rules(&self) -> &Rules {
        &self.plan.rules
    }

    /// The instance failed in the middle of its response.
    pub(crate) fn failed(&self) {
        self.plan.failed(&self.plan.backends[self.backend], &self.upstream);
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
    way: Option<(Way, Instant, Drawn)>,
    begun: bool,
    /// The plan that the request began with, until it is used.
    first: Option<Arc<RoutePlan>>,
    /// Endpoints that refused a connection, or whose gate was closed.
    tried: Vec<Arc<Upstream>>,
    /// Endpoints that failed a try: avoided as long as there are others.
    spared: Vec<Arc<Upstream>>,
    /// An endpoint was passed over because it is full.
    full: bool,
    /// The last refused connection, for the message.
    trouble: Option<String>,
    /// What the last refused connection says of its arm, should no other endpoint be found.
    missed: Evidence,
    waiting: Option<Waiting<'a>>,
    crowding: Option<Crowding>,
    fell_back: bool,
    pause: Duration,
}

/// For which table and route a way was drawn.
type Drawn = (u64, bool);

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
            first: None,
            tried: Vec::new(),
            spared: Vec::new(),
            full: false,
            trouble: None,
            missed: Evidence::none(),
            waiting: None,
            crowding: None,
            fell_back: false,
            pause: RECONNECT.0,
        }
    }

    /// Enters an endpoint; waits for one if there is none.
    pub(crate) async fn acquire(&mut self) -> Result<Ticket, Failure> {
        loop {
            let plan = match self.first.take() {
                Some(plan) => plan,
                None => self.plan()?,
            };
            if !self.begun {
                if let Some(meter) = &plan.meter {
                    meter.began();
                }
                if plan.rules.attempts > 0 {
                    plan.shared.budget.began(clock::of(self.since));
                }
            }
            if let Some((upstream, flight, chosen)) = self.enter(&plan, false)? {
                (self.waiting, self.crowding) = (None, None);
                return Ok(Ticket { upstream, flight, plan, chosen });
            }
            if plan.rules.fallback.is_some()
                && let Some(ticket) = self.fall_back(&plan)?
            {
                (self.waiting, self.crowding) = (None, None);
                return Ok(ticket);
            }
            let mut changed = std::pin::pin!(plan.shared.changed.notified());
            // Registered before looking again, so that no table comes unseen in between.
            changed.as_mut().enable();
            if !Arc::ptr_eq(&plan, &self.plan()?) {
                continue;
            }
            self.wait(&plan)?;
            if self.full && self.crowding.is_none() {
                let first = !plan.shared.load.is_crowded();
                self.crowding = Some(Crowding::new(&plan));
                if first {
                    // Something may have ended before it was known that somebody waits.
                    continue;
                }
            }
            let deadline = self.since + plan.hold;
            if Instant::now() >= deadline {
                return Err(self.too_late(&plan));
            }
            let pause = if self.full { LOOK } else { self.pause };
            let look = self.full || !self.tried.is_empty();
            let again = if look { deadline.min(Instant::now() + pause) } else { deadline };
            tokio::select! {
                () = changed => {}
                () = plan.shared.load.room.notified(), if self.full => {}
                () = tokio::time::sleep_until(again) => self.pause = (self.pause * 2).min(RECONNECT.1),
            }
            self.tried.clear();
            self.full = false;
            self.way = None;
        }
    }

    /// Who asks.
    pub(crate) fn asker(&self) -> &Asker<'a> {
        &self.asker
    }

    /// When the request arrived.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// The first endpoint is chosen by this plan.
    pub(crate) fn begin(&mut self, plan: Arc<RoutePlan>) {
        self.first = Some(plan);
    }

    /// A try at the endpoint failed; the next one goes to another, if its release or arm has one.
    pub(crate) fn spare(&mut self, ticket: &Ticket) {
        self.spared.push(Arc::clone(&ticket.upstream));
    }

    /// The endpoint did not accept a connection; another one is to be found.
    pub(crate) fn unreachable(&mut self, ticket: &Ticket, error: &io::Error) {
        self.trouble = Some(format!("instance {}: {error}", ticket.upstream.flight.key().instance));
        self.tried.push(Arc::clone(&ticket.upstream));
        ticket.failed();
        let evidence = ticket.evidence();
        if !evidence.is_none() {
            std::mem::replace(&mut self.missed, evidence).forget();
        }
    }

    /// What was missed, if it is to be told after all.
    fn missed(&mut self) -> Evidence {
        std::mem::replace(&mut self.missed, Evidence::none())
    }

    /// The route as it is now.
    pub(crate) fn plan(&self) -> Result<Arc<RoutePlan>, Failure> {
        let table = self.proxy.table.load();
        let plan = table.routes.get(&self.arrival.socket);
        plan.cloned().ok_or_else(|| Failure::new(ErrorKind::NoRoute, "the route does not exist any more"))
    }

    /// Enters an endpoint of the route of another service, if this one has none that could be entered.
    fn fall_back(&mut self, plan: &RoutePlan) -> Result<Option<Ticket>, Failure> {
        // Busy or paused instances are there, and are waited for.
        if plan.paused || self.full {
            return Ok(None);
        }
        let other = {
            let table = self.proxy.table.load();
            plan.rules.fallback.and_then(|socket| table.routes.get(&socket).cloned())
        };
        let speaks = |other: &RoutePlan| (other.protocol == Protocol::Tcp) == (plan.protocol == Protocol::Tcp);
        let Some(other) = other.filter(|other| speaks(other) && !other.paused) else { return Ok(None) };
        let Some((upstream, flight, chosen)) = self.enter(&other, true)? else { return Ok(None) };
        // The release that was meant answers nothing: for its verdict that is no answer.
        self.missed().broken();
        if !std::mem::replace(&mut self.fell_back, true) {
            plan.series.fell_back();
        }
        Ok(Some(Ticket { upstream, flight, plan: other, chosen }))
    }

    fn enter(
        &mut self,
        plan: &RoutePlan,
        fallback: bool,
    ) -> Result<Option<(Arc<Upstream>, InFlight, Chosen)>, Failure> {
        // One draw for a request and all that follows from it: were it drawn again where the first arm refused it, the
        // arms would not get their shares.
        let (way, since) = match &mut self.way {
            Some((way, since, drawn)) if *drawn == (plan.version, fallback) => {
                way.bits = plan.shared.draw();
                (*way, *since)
            }
            way => {
                let since = if self.begun { Instant::now() } else { self.since };
                let (drawn, ..) = way.insert((self.asker.way(plan), since, (plan.version, fallback)));
                (*drawn, since)
            }
        };
        self.begun = true;
        if plan.paused {
            return Ok(None);
        }
        let rules = &plan.rules;
        let bounded = rules.is_bounded();
        if rules.per_instance > 0 && self.crowding.is_none() && plan.shared.load.is_crowded() {
            // Others wait for room already.
            self.full = true;
            return Ok(None);
        }
        let mut spared = plan.ejected();
        spared.extend(self.spared.iter().cloned());
        loop {
            let Some(choice) = plan.choose_sparing(&way, &self.tried, &spared) else { return Ok(None) };
            let (upstream, backend, as_meant) = (choice.upstream, choice.backend, choice.as_meant);
            if self.full && !as_meant {
                // An arm that is full does not give way: its shares would be lost under load.
                return Ok(None);
            }
            if let Some(mut flight) = upstream.flight.enter_below(self.kind, rules.per_instance) {
                if bounded {
                    let Some(place) = plan.shared.load.enter(rules.total) else {
                        let message = format!("{} requests are in flight already", rules.total);
                        return Err(Failure::new(ErrorKind::Breaker, message));
                    };
                    flight.hold(place);
                }
                let timed = rules.first_byte.is_some() || rules.response.is_some();
                let entered = timed.then(Instant::now);
                let chosen = Chosen { backend, way, as_meant, since, entered, fallback };
                return Ok(Some((Arc::clone(upstream), flight, chosen)));
            }
            // Turned away: it is full, or a newer table closed the gate (then the plan is an old one), or it was cut.
            self.full |= rules.per_instance > 0 && !upstream.flight.is_closed();
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
                    format!("{}, and {} requests wait already", self.why(plan), plan.hold_limit),
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

    fn why(&self, plan: &RoutePlan) -> String {
        match () {
            () if plan.paused => "the route is paused".to_owned(),
            () if self.full => format!("every instance has {} requests in flight", plan.rules.per_instance),
            () => "no instance is ready".to_owned(),
        }
    }

    fn too_late(&mut self, plan: &RoutePlan) -> Failure {
        self.missed().broken();
        let hold = orchestra_model::quantity::Timespan::millis(plan.hold.as_millis().try_into().unwrap_or(u64::MAX));
        match &self.trouble {
            Some(trouble) => Failure::new(ErrorKind::Connect, format!("no instance accepts connections ({trouble})")),
            None if plan.paused || self.full => {
                Failure::new(ErrorKind::Hold, format!("{} for longer than {hold}", self.why(plan)))
            }
            None => Failure::new(ErrorKind::Hold, format!("no instance became ready within {hold}")),
        }
    }
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

/// One of those who wait for room; given back when dropped.
struct Crowding(Arc<RoutePlan>);

impl Crowding {
    fn new(plan: &Arc<RoutePlan>) -> Self {
        plan.shared.load.crowd.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(plan))
    }
}

impl Drop for Crowding {
    fn drop(&mut self) {
        self.0.shared.load.crowd.fetch_sub(1, Ordering::AcqRel);
    }
}
