//! What the machine acts upon: processes, their ready checks, and a data plane. They speak only when something changes.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use orchestra_machine::{About, ConsultKey, Event, ProbeKey, Which};
use orchestra_model::{
    Code, Diagnostic, InstanceId,
    consult::{Answer, Question, ScrapeTarget, Scraped},
    launch::{Exit, Launch, LaunchKey, Observed, ProviderEvent, Termination},
    record::EnvironmentState,
    route::{EndpointKey, EndpointState, Route, RouteId},
    traffic::{Arm, LatencyHistogram, TrafficCell, TrafficReport},
};

use super::schedule::ReadyBy;
use super::world::{Item, MILLI, Micros, Process, SECOND, What, World};

/// How a process ends that is killed.
const KILLED: Exit = Exit::Signal(9);

impl World {
    pub(super) fn find(&self, instance: &InstanceId, attempt: u32) -> Option<usize> {
        self.processes.iter().rposition(|process| {
            process.key.attempt == attempt
                && process.key.instance.ordinal == instance.ordinal
                && process.key.instance.release == instance.release
                && process.key.instance.workload == instance.workload
        })
    }

    // === processes ===

    pub(super) fn launch(&mut self, epoch: u32, launch: Launch) {
        let answer = self.now + self.latency(5);
        let (taken, fails) = (self.faults.port_taken, self.faults.launch_fails);
        if !launch.ports.is_empty() && self.chance(taken) {
            self.push(answer, Item::Deliver(epoch, Event::PortsTaken(launch.key)));
            return;
        }
        if self.chance(fails) {
            let problem = Diagnostic::error(Code::START_FAILED, "cannot start it");
            let retry = Some(Duration::from_millis(50 + self.rng.below(1000)));
            self.push(answer, Item::Deliver(epoch, Event::LaunchFailed { key: launch.key, problem, retry }));
            return;
        }
        let key = launch.key;
        if self.find(&key.instance, key.attempt).is_some() {
            self.violate(format!("{key} was started twice"));
        }
        if self.processes.iter().any(|process| process.key.instance == key.instance && process.is_alive()) {
            self.violate(format!("{key} was started while an earlier attempt runs"));
        }
        self.report.launches += 1;
        let version: usize = launch.command.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        let traits = self.versions[version];
        let index = self.processes.len();
        self.processes.push(Process {
            key: key.clone(),
            version,
            ports: launch.ports.values().copied().collect(),
            traits,
            started: None,
            ready: false,
            notified: false,
            told: false,
            exit: None,
            ended: None,
            gone: false,
            forgotten: false,
            asked: None,
            active: false,
            withdrawn: None,
            flows: (0, 0),
            cut: false,
            heard_ready: false,
            heard_exit: false,
            delivered: 0,
        });
        self.push(answer, Item::Deliver(epoch, Event::Launched(key)));
        let at = self.now + self.latency(10);
        let what = if traits.missing { What::Exit(Exit::NotStarted) } else { What::Start };
        self.push(at, Item::Process(index, what));
    }

    pub(super) fn terminate(&mut self, key: &LaunchKey, how: Termination) {
        let Some(index) = self.find(&key.instance, key.attempt).filter(|index| !self.processes[*index].forgotten)
        else {
            // It never was: that is said at once.
            let at = self.now + self.latency(5);
            let event = Event::Provider { key: key.clone(), event: ProviderEvent::Gone };
            self.push(at, Item::Deliver(self.epoch, event));
            return;
        };
        let process = &mut self.processes[index];
        if process.exit.is_some() {
            // Asked again: it is said again.
            self.replay(index);
            return;
        }
        if std::mem::replace(&mut process.told, true) {
            return;
        }
        let grace = micros(how.grace.duration());
        let (after, exit) = match process.traits.term {
            Some(term) if term <= grace => (term, Exit::Code(0)),
            _ => (grace, KILLED),
        };
        self.push(self.now + after, Item::Process(index, What::Exit(exit)));
    }

    pub(super) fn forget(&mut self, key: &LaunchKey) {
        let Some(index) = self.find(&key.instance, key.attempt) else { return };
        if !self.processes[index].gone {
            self.violate(format!("{key} was forgotten before it was gone"));
        }
        self.processes[index].forgotten = true;
    }

    pub(super) fn process(&mut self, index: usize, what: What) {
        let now = self.now;
        let process = &mut self.processes[index];
        if process.exit.is_some() && !matches!(what, What::Gone | What::FlowsEnd) {
            return;
        }
        match what {
            What::Start => {
                process.started = Some(now);
                let (traits, attempt) = (process.traits, process.key.attempt);
                let pid = u32::try_from(index).unwrap_or(0) + 1000;
                self.report_process(index, ProviderEvent::Started { pid });
                if let Some(ready) = traits.ready {
                    self.push(now + ready, Item::Process(index, What::Ready));
                }
                if let Some((after, _)) = traits.exit.filter(|(_, times)| attempt <= *times) {
                    self.push(now + after, Item::Process(index, What::Exit(Exit::Code(1))));
                }
                if let Some((from, to)) = traits.unready {
                    self.push(now + from, Item::Process(index, What::Unready));
                    if let Some(to) = to {
                        self.push(now + to, Item::Process(index, What::Ready));
                    }
                }
            }
            What::Ready => {
                process.ready = true;
                if process.traits.ready_by == ReadyBy::Notify && !std::mem::replace(&mut process.notified, true) {
                    self.report_process(index, ProviderEvent::NotifiedReady);
                }
                self.answer_probe(index);
            }
            What::Unready => {
                process.ready = false;
                self.answer_probe(index);
            }
            What::Exit(exit) => {
                process.exit = Some(exit);
                process.ended = Some(now);
                process.ready = false;
                let flows = std::mem::take(&mut process.flows);
                self.log(|| format!("process {index} ended: {exit}"));
                let message = (exit == Exit::NotStarted).then(|| "no such file or directory".to_owned());
                self.report_process(index, ProviderEvent::Exited { exit, message });
                if flows != (0, 0) && !self.processes[index].active {
                    self.report_flows(index);
                }
                let at = self.now + self.latency(5);
                self.push(at, Item::Process(index, What::Gone));
            }
            What::Gone => {
                process.gone = true;
                self.report_process(index, ProviderEvent::Gone);
            }
            What::FlowsEnd => {
                if process.flows != (0, 0) {
                    process.flows = (0, 0);
                    self.report_flows(index);
                }
            }
        }
    }

    /// What whoever listens at an address answers.
    pub(super) fn answer_pair(&mut self, address: SocketAddr) -> Result<(), String> {
        let listens = |process: &Process| process.is_alive() && process.ports.contains(&address.port());
        let Some(index) = self.processes.iter().rposition(listens) else { return Err("nobody is there".to_owned()) };
        let bad = u64::from(self.processes[index].traits.bad);
        if self.rng.below(1000) < bad { Err("HTTP 500".to_owned()) } else { Ok(()) }
    }

    fn tell_process(&mut self, index: usize, event: Event) {
        let at = (self.now + self.latency(5)).max(self.processes[index].delivered);
        self.processes[index].delivered = at;
        self.push(at, Item::Deliver(self.epoch, event));
    }

    fn report_process(&mut self, index: usize, event: ProviderEvent) {
        let key = self.processes[index].key.clone();
        self.tell_process(index, Event::Provider { key, event });
        let double = self.faults.double;
        if self.chance(double) {
            self.replay(index);
        }
    }

    /// What is known of a launch is reported again, from the beginning.
    pub(super) fn replay(&mut self, index: usize) {
        let process = &self.processes[index];
        let pid = u32::try_from(index).unwrap_or(0) + 1000;
        let story = [
            process.started.map(|_| ProviderEvent::Started { pid }),
            process.notified.then_some(ProviderEvent::NotifiedReady),
            process.exit.map(|exit| ProviderEvent::Exited { exit, message: None }),
            process.gone.then_some(ProviderEvent::Gone),
        ];
        let key = process.key.clone();
        for event in story.into_iter().flatten() {
            self.tell_process(index, Event::Provider { key: key.clone(), event });
        }
    }

    pub(super) fn observe(&mut self, state: &EnvironmentState) -> BTreeMap<InstanceId, Option<Observed>> {
        let mut observed = BTreeMap::new();
        for record in state.instances.values() {
            let found = self.find(&record.id, record.attempt).filter(|index| !self.processes[*index].forgotten);
            let seen = found.map(|index| {
                let process = &self.processes[index];
                Observed {
                    pid: process
                        .started
                        .filter(|_| process.is_alive())
                        .map(|_| u32::try_from(index).unwrap_or(0) + 1000),
                    notified_ready: process.notified,
                    exit: process.exit,
                    gone: process.gone,
                    ..Observed::new(process.key.clone())
                }
            });
            observed.insert(record.id.clone(), seen);
        }
        observed
    }

    /// What the next server knows, and what is told to it again.
    pub(super) fn recovered(&mut self) {
        for index in 0..self.processes.len() {
            let process = &self.processes[index];
            if process.forgotten {
                continue;
            }
            let key = process.key.clone();
            let record = self.disk.instances.get(&key.instance).filter(|record| record.attempt == key.attempt);
            let (known, was_ready) = (record.is_some(), record.is_some_and(|record| record.was_ready));
            let process = &mut self.processes[index];
            process.heard_exit = process.exit.is_some();
            let seen = match process.traits.ready_by {
                ReadyBy::Nothing => process.started.is_some(),
                ReadyBy::Notify => process.notified,
                ReadyBy::Http => false,
            };
            process.heard_ready = (was_ready || seen) && process.exit.is_none();
            if known {
                self.replay(index);
            } else {
                // The engine drops the provider's records of launches that are gone and that nobody knows any more.
                process.forgotten = process.gone;
            }
        }
    }

    /// What the machine learns from an event.
    pub(super) fn hear(&mut self, event: &Event) {
        let (instance, attempt) = match event {
            Event::Provider { key, .. } => (&key.instance, key.attempt),
            Event::Probed { key, .. } => (&key.instance, key.attempt),
            _ => return,
        };
        let Some(index) = self.find(instance, attempt) else { return };
        let process = &mut self.processes[index];
        match event {
            Event::Provider { event: ProviderEvent::Started { .. }, .. } => {
                process.heard_ready |= !process.heard_exit && process.traits.ready_by == ReadyBy::Nothing;
            }
            Event::Provider { event: ProviderEvent::NotifiedReady, .. } => process.heard_ready = !process.heard_exit,
            Event::Provider { event: ProviderEvent::Exited { .. } | ProviderEvent::Gone, .. } => {
                (process.heard_ready, process.heard_exit) = (false, true);
            }
            Event::Probed { passed, .. } => process.heard_ready = *passed && !process.heard_exit,
            _ => {}
        }
    }

    pub(super) fn kill_random(&mut self) {
        let alive: Vec<usize> = (0..self.processes.len())
            .filter(|i| self.processes[*i].is_alive() && self.processes[*i].started.is_some())
            .collect();
        if alive.is_empty() {
            return;
        }
        let index = alive[usize::try_from(self.rng.below(alive.len() as u64)).unwrap_or(0)];
        self.log(|| format!("process {index} is killed"));
        self.laws.kills += 1;
        self.report.kills += 1;
        self.process(index, What::Exit(KILLED));
    }

    // === ready checks ===

    pub(super) fn process_of_probe(&self, key: &ProbeKey) -> Option<usize> {
        self.find(&key.instance, key.attempt)
    }

    pub(super) fn start_probe(&mut self, key: ProbeKey) {
        if key.which == Which::Live {
            self.violate("nobody has a live check");
            return;
        }
        let Some(index) = self.process_of_probe(&key) else { return };
        self.processes[index].asked = Some(key);
        self.answer_probe(index);
    }

    fn answer_probe(&mut self, index: usize) {
        let process = &self.processes[index];
        let Some(key) = process.asked.clone() else { return };
        let passed = process.ready;
        let detail = if passed { String::new() } else { "no".to_owned() };
        self.tell_process(index, Event::Probed { key, passed, detail });
    }

    // === data plane ===

    pub(super) fn answers(&self) -> bool {
        self.now >= self.data_plane.silent_until
    }

    pub(super) fn offer(&mut self, epoch: u32, revision: u64, version: u64, routes: Vec<Route>) {
        if version <= self.data_plane.version {
            return;
        }
        let silent = self.faults.silent;
        if self.answers() && self.chance(silent) {
            let time = 200 * MILLI + self.rng.below(6 * SECOND);
            self.data_plane.silent_until = self.now + time;
            self.log(|| format!("data plane silent for {} ms", time / MILLI));
            if self.rng.below(3) == 0 {
                // It died, and another one takes over: what was in flight is lost.
                self.processes.iter_mut().for_each(|process| process.flows = (0, 0));
            }
            self.push(self.now + time, Item::DataPlaneAnswers);
        }
        if !self.answers() {
            self.data_plane.trouble = Some(self.data_plane.silent_until);
            let awaited = self.faults.patient;
            self.data_plane.waiting = Some((epoch, revision, version, routes, awaited));
            if !awaited {
                let at = self.now + self.latency(20);
                self.push(at, Item::Deliver(epoch, Event::RoutesRefused { revision, problems: BTreeMap::new() }));
            }
            return;
        }
        self.put_into_force(epoch, revision, version, routes, true);
    }

    pub(super) fn data_plane_answers(&mut self) {
        if !self.answers() {
            return;
        }
        for index in 0..self.processes.len() {
            if !self.processes[index].active && self.processes[index].withdrawn.is_some() {
                self.report_flows(index);
            }
        }
        if let Some((epoch, revision, version, routes, awaited)) = self.data_plane.waiting.take()
            && version > self.data_plane.version
        {
            self.put_into_force(epoch, revision, version, routes, awaited);
        }
    }

    fn put_into_force(&mut self, epoch: u32, revision: u64, version: u64, routes: Vec<Route>, awaited: bool) {
        self.log(|| format!("table {version} in force"));
        let mut addresses = BTreeMap::new();
        for route in &routes {
            let next = 40_000 + u16::try_from(self.data_plane.addresses.len()).unwrap_or(0);
            let port = match route.listen.port() {
                0 => *self.data_plane.addresses.entry(route.id.clone()).or_insert(next),
                port => port,
            };
            addresses.insert(route.id.clone(), SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        }
        self.data_plane.version = version;
        let mut active = vec![false; self.processes.len()];
        let mut draining = vec![false; self.processes.len()];
        for endpoint in routes.iter().flat_map(|route| &route.backends).flat_map(|backend| &backend.endpoints) {
            if let Some(index) = self.find(&endpoint.instance, endpoint.attempt) {
                active[index] |= endpoint.state == EndpointState::Active;
                draining[index] |= endpoint.state == EndpointState::Draining;
            }
        }
        for route in &routes {
            let Some(watch) = &route.split.watch else { continue };
            let before = self.data_plane.routes.iter().find(|old| old.id == route.id);
            // There is traffic for a while whenever something changes, and silence afterwards.
            if before.is_none_or(|old| old.split != route.split) {
                let times = u32::try_from(self.rng.below(12)).unwrap_or(0);
                let at = self.now + self.rng.below(SECOND);
                self.push(at, Item::Traffic(route.id.clone(), watch.id, times));
            }
        }
        self.data_plane.routes = routes;
        for index in 0..self.processes.len() {
            let was = std::mem::replace(&mut self.processes[index].active, active[index]);
            if active[index] {
                self.processes[index].withdrawn = None;
                continue;
            }
            if was {
                self.processes[index].withdrawn = Some(self.now);
                self.begin_flows(index);
            }
            // Said once per version in which it is true.
            if was || draining[index] {
                self.report_flows(index);
            }
        }
        if awaited {
            let at = (self.now + self.latency(10)).max(self.data_plane.last_report);
            self.push(at, Item::Deliver(epoch, Event::RoutesApplied { revision, addresses }));
        }
    }

    /// What went through a watched route in the last second.
    pub(super) fn report_traffic(&mut self, id: &RouteId, watch: u64, times: u32) {
        let Some(route) = self.data_plane.routes.iter().find(|route| route.id == *id) else { return };
        if route.split.watch.as_ref().is_none_or(|current| current.id != watch) || !self.answers() {
            return;
        }
        let canary = route.split.canary.unwrap_or_default();
        let mut cells = Vec::new();
        for backend in &route.backends {
            let mut active = backend.endpoints.iter().filter(|endpoint| endpoint.state == EndpointState::Active);
            let Some(index) = active.next_back().and_then(|endpoint| self.find(&endpoint.instance, endpoint.attempt))
            else {
                continue;
            };
            let share = u64::from(if backend.arm == Arm::Canary { canary.get() } else { 1000 - canary.get() });
            let (arm, bad) = (backend.arm, self.processes[index].traits.bad);
            let requests = u32::try_from(share * 30 / 1000).unwrap_or(0);
            for client in 1..=3 {
                let bad =
                    u32::try_from((0..requests).filter(|_| self.rng.below(1000) < u64::from(bad)).count()).unwrap_or(0);
                let cell =
                    TrafficCell { arm, client, canary, requests, bad, server_errors: bad, ..TrafficCell::default() };
                cells.push(cell);
            }
        }
        self.data_plane.reports += 1;
        let report = TrafficReport {
            route: id.clone(),
            watch,
            sequence: self.data_plane.reports,
            cells,
            stable_latency: LatencyHistogram::default(),
            mirrored: (0, 0),
        };
        let at = self.now + self.latency(5);
        self.push(at, Item::Deliver(self.epoch, Event::Traffic(Box::new(report))));
        if times > 0 {
            self.push(self.now + SECOND, Item::Traffic(id.clone(), watch, times - 1));
        }
    }

    /// Somebody is asked for numbers. A good version never has bad ones; there may be none.
    pub(super) fn consult(&mut self, epoch: u32, key: ConsultKey, question: Question) {
        let (error, lost) = (self.faults.consult_error, self.faults.consult_lost);
        if self.chance(lost) {
            return;
        }
        let failed = self.chance(error);
        let answer = match question {
            _ if failed && self.rng.below(2) == 0 => Answer::Error("connection refused".to_owned()),
            Question::Query { .. } => {
                let bad = self.bad_of(&key);
                Answer::Values(match self.rng.below(3) {
                    0 if failed => Vec::new(),
                    1 if failed => vec![f64::NAN],
                    _ => vec![f64::from(bad) / 1000.0],
                })
            }
            Question::Scrape { targets, series, .. } => {
                let scraped = targets.into_iter().map(|ScrapeTarget { instance, attempt, .. }| {
                    let process = self.find(&instance, attempt).filter(|_| !failed).map(|index| &self.processes[index]);
                    let counted = process.and_then(|process| {
                        let seconds = (self.now - process.started?) / SECOND;
                        Some(f64::from(process.traits.bad) * f64::from(u32::try_from(seconds).ok()?))
                    });
                    let values = counted.map(|counted| vec![Some(counted); series.len()]);
                    Scraped { instance, attempt, values: values.ok_or_else(|| "HTTP 404".to_owned()) }
                });
                Answer::Scraped(scraped.collect())
            }
        };
        let at = self.now + self.latency(5);
        let twice = self.faults.double;
        let event = Event::Consulted { key, answer };
        if self.chance(twice) {
            self.push(at + SECOND, Item::Deliver(epoch, event.clone()));
        }
        self.push(at, Item::Deliver(epoch, event));
    }

    /// Bad responses in a thousand of the release that a question is about.
    fn bad_of(&self, key: &ConsultKey) -> u32 {
        let About::Verdict(release, _) = key.about else { return 0 };
        let desired = self.disk.releases.get(&release).map(|release| &release.desired);
        let service = desired.and_then(|desired| desired.service(&key.service));
        service.map_or(0, |service| self.versions[super::world::version_of(service)].bad)
    }

    /// What happens to be in flight to an endpoint that stops being active.
    fn begin_flows(&mut self, index: usize) {
        if !self.processes[index].is_alive() {
            return;
        }
        let requests = u32::try_from(self.rng.below(3)).unwrap_or(0);
        let streams = u32::try_from(self.rng.below(2)).unwrap_or(0);
        if requests + streams == 0 {
            return;
        }
        self.processes[index].flows = (requests, streams);
        let longest = match self.rng.below(8) {
            0 => 60 * SECOND,
            _ if streams > 0 => 6 * SECOND,
            _ => 1500 * MILLI,
        };
        let at = self.now + self.rng.below(longest);
        self.push(at, Item::Process(index, What::FlowsEnd));
    }

    fn report_flows(&mut self, index: usize) {
        if !self.answers() {
            return;
        }
        let process = &self.processes[index];
        let endpoint = endpoint_of(&process.key);
        let (requests, streams) = process.flows;
        let event = if (requests, streams) == (0, 0) {
            Event::Drained(endpoint)
        } else {
            Event::InFlight { endpoint, requests, streams }
        };
        let at = (self.now + self.latency(5)).max(self.data_plane.last_report);
        self.data_plane.last_report = at;
        self.push(at, Item::Deliver(self.epoch, event));
    }

    pub(super) fn cut(&mut self, endpoint: &EndpointKey) {
        if !self.answers() {
            return;
        }
        if let Some(index) = self.find(&endpoint.instance, endpoint.attempt) {
            self.processes[index].flows = (0, 0);
            self.report_flows(index);
        }
    }
}

pub(super) fn endpoint_of(key: &LaunchKey) -> EndpointKey {
    EndpointKey { environment: key.environment.clone(), instance: key.instance.clone(), attempt: key.attempt }
}

pub(super) fn micros(length: Duration) -> Micros {
    u64::try_from(length.as_micros()).unwrap_or(u64::MAX)
}
