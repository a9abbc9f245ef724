//! The simulated world: one server (the real machine under a driver), one provider, one data plane, one prober.
//!
//! ```text
//!   queue (virtual time) --> provider, data plane, prober, operator, faults
//!            ^                        |
//!            |                        v  events, late, doubled, out of order between sources
//!            +------- effects <--- commit <--- Environment::handle
//! ```
//!
//! One thread, no clock, no hash map: a seed decides everything, so it replays exactly. A crash of the server drops the
//! machine and every answer on its way; calls that it had begun happen or do not, as the seed says. A recovery reads the
//! disk and asks the provider, as the engine does.

mod data_plane;
mod probes;
mod provider;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use orchestra_machine::{Batch, Effect, Environment, Event, ProbeKey, Settings, rng::Rng};
use orchestra_model::{
    EnvironmentId, EventKind, InstanceId, Now, ResourceId,
    consult::Answer,
    launch::{Exit, Launch, LaunchKey, Observed, Termination},
    quantity::Timespan,
    record::{Change, RunState},
    route::{EndpointKey, Route},
    time::UnixMillis,
};

pub use self::{
    data_plane::DataPlane,
    probes::Prober,
    provider::{Process, Provider},
};
use crate::{check::Checks, disk::Disk};

/// How often things go wrong, in thousandths.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The server crashes at a batch.
    pub crash: u64,
    /// A call or event takes long.
    pub slow: u64,
    /// An event arrives twice.
    pub double: u64,
    /// A launch fails for a moment.
    pub launch_fails: u64,
    /// A chosen port is taken.
    pub port_taken: u64,
    /// The data plane stops answering at an offer.
    pub silent: u64,
    /// A volume cannot be made or deleted.
    pub volume_fails: u64,
    /// Events that are there at the same time are handed over together.
    pub together: u64,
    /// The data plane's driver hides its silence and answers later.
    pub patient: bool,
}

/// When the server dies, relative to a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPoint {
    /// The batch was not committed.
    BeforeCommit,
    /// It was; so many of its effects were begun.
    AfterEffects(usize),
}

/// What the clock shows when a world begins: midnight of 1 January 2026.
const MIDNIGHT: UnixMillis = 1_767_225_600_000;

/// Something that will happen.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// An event reaches the server, if it is still the same.
    Deliver { epoch: u64, event: Event },
    /// A deadline of the machine.
    Tick { epoch: u64, at: Now },
    /// The server starts again.
    Recover,
    /// A call reaches a port.
    Call { epoch: u64, call: Call },
    /// Something happens to a process.
    Process { key: LaunchKey, what: provider::What },
    /// A leaf is asked.
    Ask { epoch: u64, key: ProbeKey, generation: u64 },
    /// A request or stream ends.
    FlowEnd { endpoint: EndpointKey, stream: bool },
    /// The data plane serves again.
    DataPlaneUp,
    /// The data plane answers again.
    DataPlaneAnswers,
    /// A random process is killed.
    Kill,
    /// The data plane is killed.
    KillDataPlane,
    /// The server is killed between two batches.
    KillServer,
    /// Whoever drives the world looks again.
    Wake,
}

/// A call of a port.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Launch(Box<Launch>),
    Terminate(LaunchKey, Termination),
    Forget(LaunchKey),
    SetRoutes { revision: u64, version: u64, routes: Vec<Route> },
    Cut(EndpointKey),
    CreateVolume(ResourceId, String),
    DeleteVolume(ResourceId, String),
}

/// The world.
pub struct World {
    /// The present.
    pub now: Now,
    /// What is written down.
    pub disk: Disk,
    /// The machine, unless the server is dead.
    pub server: Option<Environment>,
    /// Processes.
    pub provider: Provider,
    /// Routes.
    pub data_plane: DataPlane,
    /// Checks.
    pub prober: Prober,
    /// Directories.
    pub volumes: BTreeSet<String>,
    /// How often things go wrong now.
    pub faults: Faults,
    /// Where the server dies next, at the first batch with such an event.
    pub crash_at: Option<(EventKind, Option<ResourceId>, CrashPoint)>,
    /// Where the server dies next, at the batch with this number.
    pub crash_batch: Option<(u64, CrashPoint)>,
    /// Number of batches so far.
    pub batches: u64,
    /// How long a crashed server stays away; random if missing.
    pub downtime: Option<Duration>,
    /// Every call and event takes the shortest time, for outputs that people compare.
    pub exact: bool,
    /// What is in flight to an endpoint when it stops being active: requests, streams, and how long they take; random if
    /// missing.
    pub traffic: Option<(u32, u32, Duration)>,
    /// What the clock on the wall shows at the origin of time, in Unix milliseconds. It may be changed at any time.
    pub clock: UnixMillis,
    /// What happened, if it is wanted.
    pub trace: Option<String>,
    pub(crate) checks: Checks,
    pub(crate) rng: Rng,
    pub(crate) epoch: u64,
    /// Number of crashes so far.
    pub crashes: u32,
    /// Somebody killed an instance since this was last looked at.
    pub(crate) killed: bool,
    /// Somebody killed an instance.
    pub(crate) killed_once: bool,
    queue: BTreeMap<(Now, u64), Item>,
    sequence: u64,
    tick_for: Option<Now>,
    /// The last call on each instance: calls on one instance happen in order.
    order: BTreeMap<InstanceId, Now>,
    next_version: u64,
    next_run: u64,
    busy: (Now, u32),
    failure: Option<String>,
    /// Number of items handled.
    pub steps: u64,
    shown: usize,
}

impl World {
    /// An empty world with a running server.
    pub fn new(id: EnvironmentId, seed: u64, faults: Faults) -> Self {
        let disk = Disk::new(id);
        let mut world = Self {
            now: Now::ZERO,
            server: None,
            provider: Provider::default(),
            data_plane: DataPlane::new(),
            prober: Prober::default(),
            volumes: BTreeSet::new(),
            faults,
            crash_at: None,
            crash_batch: None,
            batches: 0,
            downtime: None,
            exact: false,
            traffic: None,
            clock: MIDNIGHT,
            trace: None,
            checks: Checks::default(),
            rng: Rng::new(seed),
            epoch: 1,
            crashes: 0,
            killed: false,
            killed_once: false,
            queue: BTreeMap::new(),
            sequence: 0,
            tick_for: None,
            order: BTreeMap::new(),
            next_version: 0,
            next_run: 0,
            busy: (Now::ZERO, 0),
            failure: None,
            steps: 0,
            shown: 0,
            disk,
        };
        world.server = Some(Environment::new(world.disk.environment.clone(), world.settings()));
        world
    }

    pub(crate) fn settings(&mut self) -> Arc<Settings> {
        Arc::new(Settings {
            seed: self.rng.next_u64(),
            ports: (20_000, 20_999),
            base_env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
            hold: Timespan::seconds(10),
            hold_limit: 1000,
            log_max_bytes: 1 << 20,
            log_keep: 2,
            epoch: self.clock,
        })
    }

    // === randomness and time ===

    pub(crate) fn chance(&mut self, thousandths: u64) -> bool {
        self.rng.below(1000) < thousandths
    }

    /// A number of milliseconds between two, more if it is slow.
    pub(crate) fn latency(&mut self, low: u64, high: u64) -> Duration {
        if self.exact {
            return Duration::from_millis(low.max(1));
        }
        let slow = self.faults.slow;
        let factor = if self.chance(slow) { 1 + self.rng.below(60) } else { 1 };
        Duration::from_micros((low * 1000 + self.rng.below((high - low) * 1000 + 1)) * factor)
    }

    /// What the clock on the wall shows.
    pub fn wall(&self) -> UnixMillis {
        self.clock.saturating_add(u64::try_from(self.now.since_origin().as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn push(&mut self, at: Now, item: Item) {
        self.sequence += 1;
        self.queue.insert((at.max(self.now), self.sequence), item);
    }

    /// Has [`Self::step`] return at that time.
    pub fn wake_at(&mut self, at: Now) {
        self.push(at, Item::Wake);
    }

    /// Kills something at that time.
    pub(crate) fn fault_at(&mut self, at: Now, item: Item) {
        self.push(at, item);
    }

    pub(crate) fn tell(&mut self, after: Duration, event: Event) {
        let epoch = self.epoch;
        self.push(self.now + after, Item::Deliver { epoch, event });
    }

    /// Adds a line to the trace.
    pub fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let _ = writeln!(trace, "{:>11.3} {}", self.now.since_origin().as_secs_f64(), line());
        }
    }

    /// Notes a broken law; the first one counts.
    pub fn violate(&mut self, law: impl Into<String>) {
        let law = law.into();
        self.log(|| format!("BROKEN: {law}"));
        if self.failure.is_none() {
            self.failure = Some(format!("at {:.3} s: {law}", self.now.since_origin().as_secs_f64()));
        }
    }

    /// The first broken law.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The next run's number.
    pub(crate) fn next_run(&mut self) -> u64 {
        self.next_run += 1;
        self.next_run
    }

    // === the loop ===

    /// Lets the next thing happen. Returns whether whoever drives the world should look.
    pub fn step(&mut self) -> bool {
        let Some(((at, _), item)) = self.queue.pop_first() else {
            return true;
        };
        self.now = at;
        self.steps += 1;
        match item {
            Item::Wake => return true,
            Item::Deliver { epoch, event } => {
                if epoch == self.epoch && self.server.is_some() {
                    self.deliver(event);
                }
            }
            Item::Tick { epoch, at } => {
                if epoch == self.epoch && self.tick_for == Some(at) && self.server.is_some() {
                    self.tick_for = None;
                    self.deliver(Event::Tick);
                }
            }
            Item::Recover => self.recover(),
            Item::Call { epoch, call } => self.call(epoch, call),
            Item::Process { key, what } => self.process(&key, what),
            Item::Ask { epoch, key, generation } => self.ask(epoch, &key, generation),
            Item::FlowEnd { endpoint, stream } => self.flow_end(&endpoint, stream),
            Item::DataPlaneUp => self.data_plane_up(),
            Item::DataPlaneAnswers => self.data_plane_answers(),
            Item::Kill => self.kill_random(),
            Item::KillDataPlane => self.kill_data_plane(),
            Item::KillServer => {
                if self.server.is_some() {
                    self.crash();
                }
            }
        }
        self.check();
        false
    }

    /// Whether nothing but periodic questions is on its way.
    pub fn is_quiet(&self) -> bool {
        self.queue.values().all(|item| matches!(item, Item::Ask { .. } | Item::Wake))
    }

    /// Hands an event to the machine, with others that are there at the same time if the seed says so.
    pub fn deliver(&mut self, event: Event) {
        let mut events = vec![event];
        let together = self.faults.together;
        while self.chance(together) {
            let Some(entry) = self.queue.first_entry() else { break };
            if entry.key().0 > self.now + Duration::from_millis(2) {
                break;
            }
            let Item::Deliver { epoch, event } = entry.get().clone() else { break };
            if epoch != self.epoch {
                break;
            }
            entry.remove();
            events.push(event);
        }
        if self.busy.0 == self.now {
            self.busy.1 += 1;
            if self.busy.1 > 5000 {
                self.violate("the machine wants a tick again and again without time passing");
                self.queue.clear();
                return;
            }
        } else {
            self.busy = (self.now, 0);
        }
        if self.trace.is_some() {
            for event in &events {
                if !matches!(event, Event::Probed { passed: true, .. } | Event::RunRequested { .. }) {
                    self.log(|| format!("  event  {}", brief(event)));
                }
            }
        }
        let now = self.now;
        let Some(server) = &mut self.server else { return };
        let batch =
            if events.len() == 1 { server.handle(now, events.remove(0)) } else { server.handle_all(now, events) };
        self.carry_out(batch);
    }

    /// Commits, then begins the effects; dies in between if that is what the seed or the script says.
    fn carry_out(&mut self, batch: Batch) {
        let point = self.crash_point(&batch);
        if point == Some(CrashPoint::BeforeCommit) {
            self.log(|| "         the batch is lost".to_owned());
            self.crash();
            return;
        }
        if !batch.changes.is_empty() {
            self.note_steps(&batch.changes);
            if let Err(law) = self.disk.commit(self.now, self.wall(), &batch.changes) {
                self.violate(law);
            }
            self.show_events();
        }
        let count = match point {
            Some(CrashPoint::AfterEffects(count)) => count.min(batch.effects.len()),
            _ => batch.effects.len(),
        };
        for effect in batch.effects.into_iter().take(count) {
            self.begin(effect);
        }
        if point.is_some() {
            self.crash();
            return;
        }
        self.schedule_tick();
    }

    fn crash_point(&mut self, batch: &Batch) -> Option<CrashPoint> {
        if batch.is_empty() {
            return None;
        }
        self.batches += 1;
        if let Some((number, point)) = self.crash_batch
            && number == self.batches
        {
            self.crash_batch = None;
            return Some(point);
        }
        if let Some((kind, resource, point)) = &self.crash_at {
            let hit = batch.changes.iter().any(|change| {
                matches!(change, Change::Event(event) if event.kind == *kind && (resource.is_none() || event.resource == *resource))
            });
            if hit {
                let point = *point;
                self.crash_at = None;
                return Some(point);
            }
        }
        let crash = self.faults.crash;
        if crash > 0 && self.chance(crash) {
            let choice = self.rng.below(batch.effects.len() as u64 + 2);
            return Some(match choice {
                0 => CrashPoint::BeforeCommit,
                n => CrashPoint::AfterEffects(usize::try_from(n - 1).unwrap_or(0)),
            });
        }
        None
    }

    fn schedule_tick(&mut self) {
        let Some(server) = &self.server else { return };
        let deadline = server.deadline();
        if deadline == self.tick_for {
            return;
        }
        self.tick_for = deadline;
        if let Some(at) = deadline {
            let epoch = self.epoch;
            let late = if self.exact { Duration::ZERO } else { Duration::from_micros(self.rng.below(3000)) };
            self.push(at.max(self.now) + late, Item::Tick { epoch, at });
        }
    }

    fn show_events(&mut self) {
        if self.trace.is_none() {
            return;
        }
        let events: Vec<String> = self.disk.events[self.shown..].iter().map(crate::script::event_line).collect();
        self.shown = self.disk.events.len();
        for line in events {
            self.log(|| line);
        }
    }

    // === effects ===

    fn begin(&mut self, effect: Effect) {
        let quiet = matches!(effect, Effect::StartProbe { .. } | Effect::StopProbe(_));
        if self.trace.is_some() && !quiet {
            self.log(|| format!("  effect {}", brief_effect(&effect)));
        }
        match effect {
            Effect::Launch(launch) => {
                self.check_launch(&launch);
                let instance = launch.key.instance.clone();
                self.in_order(instance, Call::Launch(launch));
            }
            Effect::Terminate { key, how } => {
                self.check_terminate(&key);
                self.in_order(key.instance.clone(), Call::Terminate(key, how));
            }
            Effect::Forget(key) => self.in_order(key.instance.clone(), Call::Forget(key)),
            Effect::SetRoutes { revision, routes } => {
                self.next_version += 1;
                let version = self.next_version;
                let after = self.latency(1, 10);
                self.begin_call(self.now + after, Call::SetRoutes { revision, version, routes });
            }
            Effect::Cut(endpoint) => {
                let after = self.latency(1, 10);
                self.begin_call(self.now + after, Call::Cut(endpoint));
            }
            Effect::StartProbe { key, target, every, timeout } => self.start_probe(key, target, every, timeout),
            Effect::StopProbe(key) => self.prober.stop(&key),
            Effect::RunHook { key, .. } => {
                self.deliver(Event::HookDone { key, answer: Ok(()) });
            }
            Effect::Consult { key, .. } => {
                self.deliver(Event::Consulted { key, answer: Answer::Error("nobody is there".to_owned()) });
            }
            Effect::AskPair { key, .. } => self.deliver(Event::PairAnswered { key, canary: Ok(()), stable: Ok(()) }),
            Effect::MeasureUsage { service, .. } => self.deliver(Event::Usage { service, usage: Vec::new() }),
            Effect::CreateVolume { resource, path } => {
                let after = self.latency(1, 50);
                self.begin_call(self.now + after, Call::CreateVolume(resource, path));
            }
            Effect::DeleteVolume { resource, path } => {
                let after = self.latency(1, 50);
                self.begin_call(self.now + after, Call::DeleteVolume(resource, path));
            }
        }
    }

    fn in_order(&mut self, instance: InstanceId, call: Call) {
        let after = self.latency(1, 20);
        let at = (self.now + after).max(self.order.get(&instance).copied().unwrap_or_default());
        self.order.insert(instance, at);
        self.begin_call(at, call);
    }

    fn begin_call(&mut self, at: Now, call: Call) {
        let epoch = self.epoch;
        self.push(at, Item::Call { epoch, call });
    }

    fn call(&mut self, epoch: u64, call: Call) {
        match call {
            Call::Launch(launch) => self.launch(epoch, *launch),
            Call::Terminate(key, how) => self.terminate(&key, how),
            Call::Forget(key) => self.forget(&key),
            Call::SetRoutes { revision, version, routes } => self.offer(epoch, revision, version, routes),
            Call::Cut(endpoint) => self.cut(&endpoint),
            Call::CreateVolume(resource, path) => self.create_volume(epoch, resource, path),
            Call::DeleteVolume(resource, path) => self.delete_volume(epoch, resource, &path),
        }
    }

    /// An answer to a call; nobody hears it if the caller died.
    pub(crate) fn answer(&mut self, epoch: u64, after: Duration, event: Event) {
        self.push(self.now + after, Item::Deliver { epoch, event });
    }

    // === death and return of the server ===

    /// The server dies: the machine, its timers and every answer on its way are gone. Calls that it had begun happen or
    /// do not.
    pub fn crash(&mut self) {
        self.log(|| "server crashed".to_owned());
        self.crashes += 1;
        self.server = None;
        self.epoch += 1;
        self.tick_for = None;
        self.prober.clear();
        let keys: Vec<(Now, u64)> =
            self.queue.iter().filter(|(_, item)| matches!(item, Item::Call { .. })).map(|(key, _)| *key).collect();
        for key in keys {
            if self.chance(500) {
                self.queue.remove(&key);
            }
        }
        let downtime = self.downtime.unwrap_or_else(|| match self.rng.below(3) {
            0 => Duration::from_millis(self.rng.below(50)),
            1 => Duration::from_millis(self.rng.below(2000)),
            _ => Duration::from_millis(self.rng.below(20_000)),
        });
        self.push(self.now + downtime, Item::Recover);
    }

    fn recover(&mut self) {
        if self.server.is_some() {
            return;
        }
        self.log(|| "server recovers".to_owned());
        // `find_by_intent` is a fence: what was not started until now never will be.
        let lost: Vec<(Now, u64)> = self
            .queue
            .iter()
            .filter(|(_, item)| matches!(item, Item::Call { call: Call::Launch(_), .. }))
            .map(|(key, _)| *key)
            .collect();
        for key in lost {
            self.queue.remove(&key);
        }
        self.order.clear();
        let state = self.disk.state();
        let observed: BTreeMap<InstanceId, Option<Observed>> = state
            .instances
            .values()
            .map(|record| {
                let key = LaunchKey {
                    environment: record.environment.clone(),
                    instance: record.id.clone(),
                    attempt: record.attempt,
                };
                (record.id.clone(), self.provider.find(&key))
            })
            .collect();
        // The engine drops the provider's records of launches that are gone and that nobody knows any more.
        let known: BTreeSet<LaunchKey> = observed.values().flatten().map(|o| o.key.clone()).collect();
        self.provider.forget_unknown(&known);
        let settings = self.settings();
        let (machine, batch) = Environment::recover(state, &observed, settings, self.now);
        self.server = Some(machine);
        self.checks.recovered(self.now, &self.disk);
        for key in known {
            self.replay(&key);
        }
        self.carry_out(batch);
    }

    // === volumes ===

    fn create_volume(&mut self, epoch: u64, resource: ResourceId, path: String) {
        let fails = self.faults.volume_fails;
        let result = if self.chance(fails) {
            Err(orchestra_model::Diagnostic::error(orchestra_model::Code::STATE_WRITE, format!("cannot create {path}")))
        } else {
            self.volumes.insert(path);
            Ok(())
        };
        let after = self.latency(0, 5);
        self.answer(epoch, after, Event::VolumeDone { resource, result });
    }

    fn delete_volume(&mut self, epoch: u64, resource: ResourceId, path: &str) {
        let fails = self.faults.volume_fails;
        let result = if self.chance(fails) {
            Err(orchestra_model::Diagnostic::error(orchestra_model::Code::STATE_WRITE, format!("cannot delete {path}")))
        } else {
            self.volumes.remove(path);
            Ok(())
        };
        let after = self.latency(0, 5);
        self.answer(epoch, after, Event::VolumeDone { resource, result });
    }

    /// Whether a run goes on, as far as the disk knows.
    pub fn run_state(&self) -> Option<RunState> {
        self.disk.active_run().map(|run| run.state)
    }
}

/// An event in a few words.
pub(crate) fn brief(event: &Event) -> String {
    match event {
        Event::Launched(key) => format!("launched {}#{}", key.instance, key.attempt),
        Event::LaunchFailed { key, retry, .. } => {
            format!("launch failed {}#{} retry {retry:?}", key.instance, key.attempt)
        }
        Event::PortsTaken(key) => format!("ports taken {}#{}", key.instance, key.attempt),
        Event::Provider { key, event } => format!("{}#{} {event:?}", key.instance, key.attempt),
        Event::Probed { key, passed, .. } => {
            format!("probed {}#{} {:?} {passed}", key.instance, key.attempt, key.which)
        }
        Event::RoutesApplied { revision, .. } => format!("routes {revision} applied"),
        Event::RoutesRefused { revision, problems } => {
            let of: Vec<String> = problems.keys().map(|route| route.service.to_string()).collect();
            format!("routes {revision} refused {}", of.join(" "))
        }
        Event::Drained(endpoint) => format!("drained {}#{}", endpoint.instance, endpoint.attempt),
        Event::InFlight { endpoint, requests, streams } => {
            format!("in flight {}#{} {requests} {streams}", endpoint.instance, endpoint.attempt)
        }
        Event::VolumeDone { resource, result } => format!("{resource} done {}", result.is_ok()),
        Event::RunRequested { run, .. } => format!("{} requested", run.id),
        Event::CancelRequested { run } => format!("cancel {run}"),
        Event::Traffic(report) => format!("traffic {} {}", report.route.service, report.cells.len()),
        Event::Load(report) => format!("load {} {}", report.route.service, report.requests),
        Event::Flag(_) => "flag".to_owned(),
        Event::Rollout { service, command, .. } => {
            let of = service.as_ref().map_or_else(|| "all".to_owned(), ToString::to_string);
            format!("rollout {of} {command:?}")
        }
        Event::Superseded { by } => format!("superseded by {by}"),
        Event::Usage { service, usage } => format!("usage {service} {}", usage.len()),
        Event::Consulted { key, .. } => format!("consulted {} {:?} {}", key.service, key.about, key.number),
        Event::PairAnswered { key, canary, stable } => {
            format!("pair {} {} {} {}", key.service, key.number, canary.is_ok(), stable.is_ok())
        }
        Event::HookDone { key, answer } => format!("hook {} {} {}", key.service, key.step, answer.is_ok()),
        Event::MoveTraffic(_) => "traffic is moved".to_owned(),
        Event::PreviewRenewed(_) => "preview renewed".to_owned(),
        Event::PreviewOver => "preview over".to_owned(),
        Event::PreviewRemoved => "preview removed".to_owned(),
        Event::Tick => "tick".to_owned(),
    }
}

pub(crate) fn brief_effect(effect: &Effect) -> String {
    match effect {
        Effect::Launch(launch) => {
            format!("launch {}#{} {}", launch.key.instance, launch.key.attempt, launch.command.join(" "))
        }
        Effect::Terminate { key, .. } => format!("terminate {}#{}", key.instance, key.attempt),
        Effect::Forget(key) => format!("forget {}#{}", key.instance, key.attempt),
        Effect::SetRoutes { revision, routes } => {
            let routes: Vec<String> = routes
                .iter()
                .map(|route| {
                    let endpoints = route.backends.iter().flat_map(|b| &b.endpoints);
                    let endpoints: Vec<String> =
                        endpoints.map(|e| format!("{}#{}:{:?}", e.instance, e.attempt, e.state)).collect();
                    format!("{}@{}[{}]", route.id.service, route.listen.port(), endpoints.join(" "))
                })
                .collect();
            format!("routes {revision} {}", routes.join(" "))
        }
        Effect::Cut(endpoint) => format!("cut {}#{}", endpoint.instance, endpoint.attempt),
        Effect::StartProbe { key, .. } => format!("start probe {}#{}", key.instance, key.attempt),
        Effect::StopProbe(key) => format!("stop probe {}#{}", key.instance, key.attempt),
        Effect::AskPair { key, .. } => format!("ask pair {} {}", key.service, key.number),
        Effect::RunHook { key, .. } => format!("hook {} {} {}", key.service, key.step, key.call),
        Effect::Consult { key, .. } => format!("consult {} {:?} {}", key.service, key.about, key.number),
        Effect::MeasureUsage { service, keys } => format!("measure {service} {}", keys.len()),
        Effect::CreateVolume { resource, .. } => format!("create {resource}"),
        Effect::DeleteVolume { resource, .. } => format!("delete {resource}"),
    }
}

/// How a process ends that is killed from outside.
pub(crate) const KILLED: Exit = Exit::Signal(9);
