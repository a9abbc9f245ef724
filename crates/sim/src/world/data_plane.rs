//! The fake data plane: a table in force, what is in flight to each endpoint, and reports about it.
//!
//! Requests are not simulated one by one: when an endpoint stops being active, a random number of requests and streams
//! is in flight to it, and each ends at a random time. Reports and acknowledgements travel over one connection, so a
//! report that was sent before an acknowledgement is not delivered after it; the other way round is possible.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orchestra_machine::Event;
use orchestra_model::{
    Code, Diagnostic, Now,
    launch::LaunchKey,
    route::{EndpointKey, EndpointState, Route, RouteId},
};

use super::{Item, World};

/// The data plane.
#[derive(Debug)]
pub struct DataPlane {
    /// Version of the table in force.
    pub version: u64,
    /// The table in force.
    pub routes: Vec<Route>,
    /// Where each route listens.
    pub addresses: BTreeMap<RouteId, u16>,
    /// Addresses that other programs have.
    pub foreign: BTreeSet<u16>,
    /// What is in flight to endpoints that are not active any more: requests, streams.
    pub flows: BTreeMap<EndpointKey, (u32, u32)>,
    /// It does not answer until then.
    pub silent_until: Now,
    /// It is dead.
    pub dead: bool,
    /// The last time that it did not do what was asked at once.
    pub trouble: Option<Now>,
    waiting: Option<Offer>,
    last_report: Now,
    next_port: u16,
}

#[derive(Clone, Debug)]
struct Offer {
    epoch: u64,
    revision: u64,
    version: u64,
    routes: Vec<Route>,
    /// Whether somebody still waits for the answer.
    awaited: bool,
}

impl DataPlane {
    pub(crate) fn new() -> Self {
        Self {
            version: 0,
            routes: Vec::new(),
            addresses: BTreeMap::new(),
            foreign: BTreeSet::new(),
            flows: BTreeMap::new(),
            silent_until: Now::ZERO,
            dead: false,
            trouble: None,
            waiting: None,
            last_report: Now::ZERO,
            next_port: 40_000,
        }
    }

    /// State of every endpoint of the table in force; active on one route is active.
    pub fn endpoints(&self) -> BTreeMap<EndpointKey, EndpointState> {
        endpoints(&self.routes)
    }

    /// Whether new requests go to a launch.
    pub fn is_active(&self, key: &LaunchKey) -> bool {
        self.routes.iter().flat_map(|route| &route.backends).flat_map(|backend| &backend.endpoints).any(|endpoint| {
            endpoint.instance == key.instance
                && endpoint.attempt == key.attempt
                && endpoint.state == EndpointState::Active
        })
    }

    /// What is in flight to a launch.
    pub fn in_flight(&self, key: &LaunchKey) -> (u32, u32) {
        self.flows.get(&endpoint_of(key)).copied().unwrap_or_default()
    }

    /// Whether it does what it is asked.
    pub fn answers(&self, now: Now) -> bool {
        !self.dead && now >= self.silent_until
    }

    /// Whether an offer waits for it to answer again.
    pub fn has_waiting(&self) -> bool {
        self.waiting.is_some()
    }
}

fn endpoint_of(key: &LaunchKey) -> EndpointKey {
    EndpointKey { environment: key.environment.clone(), instance: key.instance.clone(), attempt: key.attempt }
}

fn endpoints(routes: &[Route]) -> BTreeMap<EndpointKey, EndpointState> {
    let mut all = BTreeMap::new();
    for route in routes {
        for endpoint in route.backends.iter().flat_map(|backend| &backend.endpoints) {
            let key = EndpointKey {
                environment: route.id.environment.clone(),
                instance: endpoint.instance.clone(),
                attempt: endpoint.attempt,
            };
            if endpoint.state == EndpointState::Active {
                all.insert(key, EndpointState::Active);
            } else {
                all.entry(key).or_insert(EndpointState::Draining);
            }
        }
    }
    all
}

impl World {
    pub(crate) fn offer(&mut self, epoch: u64, revision: u64, version: u64, routes: Vec<Route>) {
        if version <= self.data_plane.version {
            return;
        }
        let silent = self.faults.silent;
        if self.data_plane.answers(self.now) && self.chance(silent) {
            self.silence(Duration::from_millis(200 + self.rng.clone().below(6000)));
        }
        if !self.data_plane.answers(self.now) {
            self.data_plane.trouble = Some(self.now);
            // The table will be applied when it answers again; the offerer may or may not be told that it waits.
            let awaited = self.faults.patient;
            self.data_plane.waiting = Some(Offer { epoch, revision, version, routes, awaited });
            if !awaited {
                let after = self.latency(1, 20);
                self.answer(epoch, after, Event::RoutesRefused { revision, problems: BTreeMap::new() });
            }
            return;
        }
        self.take(&Offer { epoch, revision, version, routes, awaited: true });
    }

    fn take(&mut self, offer: &Offer) {
        if offer.version <= self.data_plane.version {
            return;
        }
        let mut problems = BTreeMap::new();
        for route in &offer.routes {
            let port = route.listen.port();
            let owned = self.data_plane.addresses.get(&route.id) == Some(&port);
            if port != 0 && !owned && self.data_plane.foreign.contains(&port) {
                let problem = Diagnostic::error(Code::ADDRESS_IN_USE, format!("cannot listen on {}", route.listen));
                problems.insert(route.id.clone(), problem);
            }
        }
        if !problems.is_empty() {
            self.data_plane.trouble = Some(self.now);
            if offer.awaited {
                let after = self.latency(1, 10);
                self.answer(offer.epoch, after, Event::RoutesRefused { revision: offer.revision, problems });
            }
            return;
        }
        let addresses = self.put_into_force(offer);
        if offer.awaited {
            let after = self.latency(0, 10);
            let at = (self.now + after).max(self.data_plane.last_report);
            let event = Event::RoutesApplied { revision: offer.revision, addresses };
            self.push(at, Item::Deliver { epoch: offer.epoch, event });
        }
    }

    fn put_into_force(&mut self, offer: &Offer) -> BTreeMap<RouteId, std::net::SocketAddr> {
        let before = self.data_plane.endpoints();
        let after = endpoints(&offer.routes);
        let mut addresses = BTreeMap::new();
        let mut listening = BTreeMap::new();
        for route in &offer.routes {
            let port = match route.listen.port() {
                0 => self.data_plane.addresses.get(&route.id).copied().unwrap_or_else(|| {
                    self.data_plane.next_port += 1;
                    self.data_plane.next_port
                }),
                port => port,
            };
            let mut address = route.listen;
            address.set_port(port);
            addresses.insert(route.id.clone(), address);
            listening.insert(route.id.clone(), port);
        }
        self.data_plane.addresses = listening;
        self.data_plane.version = offer.version;
        self.data_plane.routes.clone_from(&offer.routes);
        self.log(|| format!("table {} in force", offer.version));
        for (endpoint, state) in &before {
            if *state == EndpointState::Active && after.get(endpoint) != Some(&EndpointState::Active) {
                self.begin_flows(endpoint);
            }
        }
        // Said once per version in which it is true.
        let leaving: BTreeSet<EndpointKey> = after
            .iter()
            .filter(|(_, state)| **state == EndpointState::Draining)
            .map(|(endpoint, _)| endpoint.clone())
            .chain(before.keys().filter(|endpoint| !after.contains_key(*endpoint)).cloned())
            .collect();
        for endpoint in leaving {
            self.report_flow(&endpoint);
        }
        addresses
    }

    /// What happens to be in flight to an endpoint that stops being active.
    fn begin_flows(&mut self, endpoint: &EndpointKey) {
        let key = LaunchKey {
            environment: endpoint.environment.clone(),
            instance: endpoint.instance.clone(),
            attempt: endpoint.attempt,
        };
        if !self.provider.launches.get(&key).is_some_and(super::provider::Process::is_alive) || self.data_plane.dead {
            return;
        }
        let (requests, streams, time) = if let Some((requests, streams, time)) = self.traffic {
            (requests, streams, Some(time))
        } else {
            let some = |number: u64| u32::try_from(number).unwrap_or(0);
            (some(self.rng.below(4)), some(self.rng.below(3)), None)
        };
        if requests + streams == 0 {
            return;
        }
        let flows = self.data_plane.flows.entry(endpoint.clone()).or_default();
        flows.0 += requests;
        flows.1 += streams;
        for stream in (0..requests).map(|_| false).chain((0..streams).map(|_| true)) {
            let longest = match (stream, self.rng.below(8)) {
                (_, 0) => 60_000,
                (false, _) => 1500,
                (true, _) => 6000,
            };
            let after = time.unwrap_or_else(|| Duration::from_millis(1 + self.rng.below(longest)));
            self.push(self.now + after, Item::FlowEnd { endpoint: endpoint.clone(), stream });
        }
    }

    pub(crate) fn flow_end(&mut self, endpoint: &EndpointKey, stream: bool) {
        let Some(flows) = self.data_plane.flows.get_mut(endpoint) else { return };
        let counter = if stream { &mut flows.1 } else { &mut flows.0 };
        *counter = counter.saturating_sub(1);
        if *flows == (0, 0) {
            self.data_plane.flows.remove(endpoint);
        }
        if self.data_plane.endpoints().get(endpoint) != Some(&EndpointState::Active) {
            self.report_flow(endpoint);
        }
    }

    fn report_flow(&mut self, endpoint: &EndpointKey) {
        if self.data_plane.dead {
            return;
        }
        let event = match self.data_plane.flows.get(endpoint) {
            Some((requests, streams)) => {
                Event::InFlight { endpoint: endpoint.clone(), requests: *requests, streams: *streams }
            }
            None => Event::Drained(endpoint.clone()),
        };
        let after = self.latency(0, 5);
        let at = (self.now + after).max(self.data_plane.last_report);
        self.data_plane.last_report = at;
        let epoch = self.epoch;
        self.push(at, Item::Deliver { epoch, event: event.clone() });
        let double = self.faults.double;
        if self.chance(double) {
            self.push(at, Item::Deliver { epoch, event });
        }
    }

    pub(crate) fn endpoint_died(&mut self, key: &LaunchKey) {
        let endpoint = endpoint_of(key);
        if self.data_plane.flows.remove(&endpoint).is_some()
            && self.data_plane.endpoints().get(&endpoint) != Some(&EndpointState::Active)
        {
            self.report_flow(&endpoint);
        }
    }

    pub(crate) fn cut(&mut self, endpoint: &EndpointKey) {
        if !self.data_plane.answers(self.now) {
            return;
        }
        self.data_plane.flows.remove(endpoint);
        self.report_flow(endpoint);
    }

    /// It stops answering for a while; it goes on serving.
    pub fn silence(&mut self, time: Duration) {
        self.log(|| format!("data plane silent for {time:?}"));
        self.data_plane.silent_until = self.now + time;
        self.data_plane.trouble = Some(self.data_plane.silent_until);
        self.push(self.now + time, Item::DataPlaneAnswers);
    }

    pub(crate) fn data_plane_answers(&mut self) {
        if self.data_plane.answers(self.now)
            && let Some(offer) = self.data_plane.waiting.take()
        {
            self.take(&offer);
        }
    }

    /// It dies: what was in flight is lost, connections wait.
    pub fn kill_data_plane(&mut self) {
        if self.data_plane.dead {
            return;
        }
        self.log(|| "data plane killed".to_owned());
        self.data_plane.dead = true;
        self.data_plane.flows.clear();
        let downtime = self.latency(30, 2000);
        self.data_plane.trouble = Some(self.now + downtime);
        self.push(self.now + downtime, Item::DataPlaneUp);
    }

    pub(crate) fn data_plane_up(&mut self) {
        self.log(|| "data plane serves again".to_owned());
        self.data_plane.dead = false;
        let draining: Vec<EndpointKey> = self
            .data_plane
            .endpoints()
            .into_iter()
            .filter(|(_, state)| *state == EndpointState::Draining)
            .map(|(endpoint, _)| endpoint)
            .collect();
        for endpoint in draining {
            self.report_flow(&endpoint);
        }
        self.data_plane_answers();
    }
}
