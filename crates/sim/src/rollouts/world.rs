//! The world of a schedule: a queue, one machine, what it has committed, and people.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use orchestra_machine::{
    Batch, ConsultKey, Effect, Environment, Event, HookKey, PairKey, ProbeKey, Settings, Which, rng::Rng,
};
use orchestra_model::{
    EnvironmentId, Now, ReleaseNumber,
    consult::Question,
    launch::{Exit, Launch, LaunchKey, Termination},
    quantity::Timespan,
    record::{Change, EnvironmentState, ReleaseRecord, RunRecord},
    rollout::RolloutCommand,
    route::{EndpointKey, Route, RouteId},
};

use crate::disk::Disk;

use super::{
    Report,
    laws::Laws,
    schedule::{Deed, Faults, Traits},
};

/// Microseconds of virtual time.
pub(super) type Micros = u64;

pub(super) const MILLI: Micros = 1000;
pub(super) const SECOND: Micros = 1_000_000;

/// More things than a schedule can need; a machine that is busy for ever is caught by it.
const MOST_STEPS: u64 = 400_000;

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Item {
    /// An event reaches the server, if it is still the same.
    Deliver(u32, Event),
    /// A deadline of the machine.
    Tick(u32, Now),
    /// The server starts again.
    Recover,
    /// A call reaches a port.
    Call(u32, Call),
    /// Something happens to a process.
    Process(usize, What),
    /// The data plane answers again.
    DataPlaneAnswers,
    /// A random process is killed.
    Kill,
    /// The server is killed between two batches.
    KillServer,
    /// Somebody does something.
    Deed(Deed),
    /// Somebody who was asked to decide has come, and comes again.
    Owner(RolloutCommand),
    /// Somebody wants the next release.
    Wish,
    /// What went through a route is reported, so many times more.
    Traffic(RouteId, u64, u32),
}

/// A call of a port.
#[derive(Debug)]
pub(super) enum Call {
    Launch(Box<Launch>),
    Terminate(LaunchKey, Termination),
    Forget(LaunchKey),
    SetRoutes { revision: u64, version: u64, routes: Vec<Route> },
    Cut(EndpointKey),
    Hook(HookKey),
    Pair(PairKey, SocketAddr, SocketAddr),
    Consult(ConsultKey, Question),
}

/// What happens to a process.
#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    Start,
    Ready,
    Unready,
    Exit(Exit),
    Gone,
    FlowsEnd,
}

/// One start of an instance.
#[derive(Debug)]
pub(super) struct Process {
    pub key: LaunchKey,
    pub version: usize,
    /// Ports that it listens on.
    pub ports: Vec<u16>,
    pub traits: Traits,
    pub started: Option<Micros>,
    pub ready: bool,
    pub notified: bool,
    pub told: bool,
    pub exit: Option<Exit>,
    pub ended: Option<Micros>,
    pub gone: bool,
    pub forgotten: bool,
    /// Its ready check, while it is asked.
    pub asked: Option<ProbeKey>,
    /// New requests go to it.
    pub active: bool,
    /// Since when they do not any more.
    pub withdrawn: Option<Micros>,
    /// In flight since then: requests, streams.
    pub flows: (u32, u32),
    pub cut: bool,
    /// What the machine has been told: that it is ready, that it ended.
    pub heard_ready: bool,
    pub heard_exit: bool,
    /// Its events are delivered in order.
    pub delivered: Micros,
}

impl Process {
    pub(super) fn is_alive(&self) -> bool {
        self.exit.is_none()
    }
}

/// The data plane.
#[derive(Debug, Default)]
pub(super) struct DataPlane {
    pub version: u64,
    pub routes: Vec<Route>,
    pub addresses: BTreeMap<RouteId, u16>,
    pub silent_until: Micros,
    /// The last time that it did not do what was asked at once.
    pub trouble: Option<Micros>,
    /// Offer that waits for it to answer: epoch, revision, version, routes, and whether somebody waits for the answer.
    pub waiting: Option<(u32, u64, u64, Vec<Route>, bool)>,
    pub last_report: Micros,
    /// Reports of traffic so far.
    pub reports: u64,
}

/// The world.
pub(super) struct World {
    pub now: Micros,
    pub server: Option<Environment>,
    pub disk: EnvironmentState,
    pub processes: Vec<Process>,
    pub data_plane: DataPlane,
    pub versions: Vec<Traits>,
    pub faults: Faults,
    /// Nothing goes wrong but what releases and people do.
    pub calm: bool,
    pub rng: Rng,
    pub laws: Laws,
    pub report: Report,
    pub failure: Option<String>,
    pub trace: Option<String>,
    pub epoch: u32,
    /// Wall-clock milliseconds at the origin, as the present server counts.
    pub clock: u64,
    queue: BinaryHeap<Reverse<(Micros, u64, usize)>>,
    items: Vec<Option<Item>>,
    free: Vec<usize>,
    sequence: u64,
    tick_for: Option<Now>,
    next_version: u64,
    /// Runs so far.
    pub next_run: u64,
    /// Releases that somebody will still ask for.
    pub wishes: u64,
    /// Another release waits for the run to end.
    pub superseding: bool,
    busy: (Micros, u32),
}

static ENVIRONMENT: LazyLock<EnvironmentId> = LazyLock::new(|| "demo/dev".parse().expect("a valid id"));

impl World {
    pub(super) fn new(rng: &mut Rng, trace: bool) -> Self {
        let disk = EnvironmentState::new(Disk::new(ENVIRONMENT.clone()).environment);
        let mut world = Self {
            now: 0,
            server: None,
            disk,
            processes: Vec::new(),
            data_plane: DataPlane::default(),
            versions: Vec::new(),
            faults: Faults::random(rng),
            calm: false,
            rng: Rng::new(rng.next_u64()),
            laws: Laws::default(),
            report: Report::default(),
            failure: None,
            trace: trace.then(String::new),
            epoch: 1,
            clock: 1_700_000_000_000,
            queue: BinaryHeap::new(),
            items: Vec::new(),
            free: Vec::new(),
            sequence: 0,
            tick_for: None,
            next_version: 0,
            next_run: 0,
            wishes: 2 + rng.below(3),
            superseding: false,
            busy: (0, 0),
        };
        world.server = Some(Environment::new(world.disk.environment.clone(), world.settings()));
        let faults = world.faults.clone();
        world.log(|| format!("{faults:?}"));
        world
    }

    fn settings(&mut self) -> Arc<Settings> {
        Arc::new(Settings {
            seed: self.rng.next_u64(),
            ports: (20_000, 20_999),
            base_env: BTreeMap::new(),
            hold: Timespan::seconds(10),
            hold_limit: 1000,
            log_max_bytes: 1 << 20,
            log_keep: 2,
            epoch: self.clock,
        })
    }

    // === randomness, time, words ===

    pub(super) fn chance(&mut self, thousandths: u64) -> bool {
        thousandths > 0 && self.rng.below(1000) < thousandths
    }

    /// Microseconds up to so many milliseconds, more if it is slow.
    pub(super) fn latency(&mut self, most: u64) -> Micros {
        let slow = self.faults.slow;
        let factor = if self.chance(slow) { 1 + self.rng.below(60) } else { 1 };
        (1 + self.rng.below(most * MILLI)) * factor
    }

    pub(super) fn moment(&self) -> Now {
        Now::at(Duration::from_micros(self.now))
    }

    /// What the server's records call this moment.
    pub(super) fn wall(&self) -> u64 {
        self.clock + self.now / MILLI
    }

    pub(super) fn push(&mut self, at: Micros, item: Item) {
        self.sequence += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.items.push(None);
            self.items.len() - 1
        });
        self.items[slot] = Some(item);
        self.queue.push(Reverse((at.max(self.now), self.sequence, slot)));
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let _ = writeln!(trace, "{:>11.4} {}", std::time::Duration::from_micros(self.now).as_secs_f64(), line());
        }
    }

    pub(super) fn violate(&mut self, law: impl Into<String>) {
        let law = law.into();
        self.log(|| format!("BROKEN: {law}"));
        if self.failure.is_none() {
            let at = std::time::Duration::from_micros(self.now).as_secs_f64();
            self.failure = Some(format!("at {at:.4} s: {law}"));
        }
    }

    // === the loop ===

    /// Plays until nothing happens any more.
    pub(super) fn play(&mut self, rng: &mut Rng) {
        self.calm = self.faults == Faults::default() && rng.below(3) > 0;
        if !self.calm {
            let kills = if rng.below(3) == 0 { 0 } else { rng.below(6) };
            for _ in 0..kills {
                let at = rng.below(100 * SECOND);
                self.push(at, Item::Kill);
            }
            for _ in 0..rng.below(3) {
                let at = rng.below(100 * SECOND);
                self.push(at, Item::KillServer);
            }
        }
        self.push(0, Item::Wish);
        while self.failure.is_none() {
            while let Some(Reverse((at, _, slot))) = self.queue.pop() {
                self.now = at;
                let item = self.items[slot].take().expect("a slot in the queue is full");
                self.free.push(slot);
                self.report.steps += 1;
                self.happen(item);
                if self.failure.is_some() {
                    return;
                }
                if self.report.steps > MOST_STEPS {
                    self.violate("the world does not come to rest");
                    return;
                }
            }
            // Nothing will ever happen by itself again.
            self.check_rest();
            if self.wishes == 0 || self.failure.is_some() {
                return;
            }
            self.now += self.rng.below(20 * SECOND);
            self.push(self.now, Item::Wish);
        }
    }

    fn happen(&mut self, item: Item) {
        match item {
            Item::Deliver(epoch, event) => {
                if epoch == self.epoch && self.server.is_some() {
                    self.hear(&event);
                    self.deliver(event);
                }
            }
            Item::Tick(epoch, at) => {
                if epoch == self.epoch && self.tick_for == Some(at) && self.server.is_some() {
                    self.tick_for = None;
                    self.deliver(Event::Tick);
                }
            }
            Item::Recover => self.recover(),
            Item::Call(epoch, call) => self.call(epoch, call),
            Item::Process(index, what) => self.process(index, what),
            Item::DataPlaneAnswers => self.data_plane_answers(),
            Item::Kill => self.kill_random(),
            Item::KillServer => {
                if self.server.is_some() {
                    self.crash();
                }
            }
            Item::Deed(deed) => self.deed(deed),
            Item::Owner(command) => self.owner(command),
            Item::Wish => self.wish(),
            Item::Traffic(route, watch, times) => self.report_traffic(&route, watch, times),
        }
    }

    fn retain(&mut self, keep: impl Fn(&Item) -> bool) {
        let (items, free) = (&mut self.items, &mut self.free);
        self.queue.retain(|Reverse((_, _, slot))| {
            let stays = items[*slot].as_ref().is_some_and(&keep);
            if !stays {
                items[*slot] = None;
                free.push(*slot);
            }
            stays
        });
    }

    /// Hands an event to the machine.
    pub(super) fn deliver(&mut self, event: Event) {
        if self.busy.0 == self.now {
            self.busy.1 += 1;
            if self.busy.1 > 2000 {
                self.violate("the machine is busy without time passing");
                return;
            }
        } else {
            self.busy = (self.now, 0);
        }
        if self.trace.is_some() && !matches!(event, Event::RunRequested { .. }) {
            self.log(|| format!("  event  {}", crate::world::brief(&event)));
        }
        let now = self.moment();
        let Some(server) = &mut self.server else { return };
        let batch = server.handle(now, event);
        self.carry_out(batch);
    }

    /// Commits, then begins the effects; dies in between if chance says so.
    fn carry_out(&mut self, batch: Batch) {
        if batch.is_empty() {
            self.check_moment();
            self.schedule_tick();
            return;
        }
        let crash = self.faults.crash;
        let dies = self.chance(crash);
        let effects = batch.effects.len() as u64;
        let point = if dies { self.rng.below(effects + 2) } else { effects + 2 };
        if point == 0 {
            self.log(|| "         the batch is lost".to_owned());
            self.crash();
            return;
        }
        if !batch.changes.is_empty() {
            self.commit(batch.changes);
        }
        let count = usize::try_from(point - 1).unwrap_or(usize::MAX);
        for effect in batch.effects.into_iter().take(count) {
            self.begin(effect);
            if self.failure.is_some() {
                return;
            }
        }
        if dies {
            self.crash();
            return;
        }
        self.check_moment();
        self.schedule_tick();
    }

    fn schedule_tick(&mut self) {
        let Some(server) = &self.server else { return };
        let deadline = server.deadline();
        if deadline == self.tick_for {
            return;
        }
        self.tick_for = deadline;
        if let Some(at) = deadline {
            let micros = u64::try_from(at.since_origin().as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
            let late = self.rng.below(3 * MILLI);
            self.push(micros.max(self.now) + late, Item::Tick(self.epoch, at));
        }
    }

    // === what is written down ===

    fn commit(&mut self, changes: Vec<Change>) {
        let before = self.laws.before(&self.disk);
        for change in changes {
            self.check_change(&change);
            if let Some(event) = self.disk.apply(change)
                && self.trace.is_some()
            {
                self.log(|| crate::script::event_line(&event));
            }
        }
        self.check_commit(&before);
        if before.is_going() && self.active_run().is_none() {
            if std::mem::take(&mut self.superseding) {
                // While the old ones still drain.
                self.push(self.now, Item::Wish);
            } else if self.rng.below(3) == 0 {
                // While the old ones are still kept.
                let at = self.now + self.rng.below(5 * SECOND);
                self.push(at, Item::Wish);
            }
        }
    }

    /// The run that has not ended.
    pub(super) fn active_run(&self) -> Option<&RunRecord> {
        self.disk.run.as_ref().filter(|run| !run.state.is_final())
    }

    pub(super) fn stable(&self) -> Option<&ReleaseRecord> {
        self.disk.environment.stable.and_then(|number| self.disk.releases.get(&number))
    }

    // === effects ===

    fn begin(&mut self, effect: Effect) {
        if self.trace.is_some() && !matches!(effect, Effect::StartProbe { .. } | Effect::StopProbe(_)) {
            self.log(|| format!("  effect {}", crate::world::brief_effect(&effect)));
        }
        match effect {
            Effect::Launch(launch) => {
                self.check_launch(&launch);
                self.call_in_order(&launch.key.clone(), Call::Launch(launch));
            }
            Effect::Terminate { key, how } => {
                self.check_terminate(&key);
                self.call_in_order(&key.clone(), Call::Terminate(key, how));
            }
            Effect::Forget(key) => self.call_in_order(&key.clone(), Call::Forget(key)),
            Effect::SetRoutes { revision, routes } => {
                self.check_routes(&routes);
                self.next_version += 1;
                let version = self.next_version;
                let at = self.now + self.latency(10);
                self.push(at, Item::Call(self.epoch, Call::SetRoutes { revision, version, routes }));
            }
            Effect::Cut(endpoint) => {
                self.check_cut(&endpoint);
                let at = self.now + self.latency(10);
                self.push(at, Item::Call(self.epoch, Call::Cut(endpoint)));
            }
            Effect::StartProbe { key, .. } => self.start_probe(key),
            Effect::StopProbe(key) => {
                if let Some(process) = self.process_of_probe(&key)
                    && key.which == Which::Ready
                {
                    self.processes[process].asked = None;
                }
            }
            Effect::RunHook { key, .. } => {
                self.check_hook(&key);
                let at = self.now + self.latency(500);
                self.push(at, Item::Call(self.epoch, Call::Hook(key)));
            }
            Effect::Consult { key, question, .. } => {
                let at = self.now + self.latency(500);
                self.push(at, Item::Call(self.epoch, Call::Consult(key, question)));
            }
            Effect::AskPair { key, canary, stable, .. } => {
                let at = self.now + self.latency(50);
                self.push(at, Item::Call(self.epoch, Call::Pair(key, canary, stable)));
            }
            Effect::MeasureUsage { .. } => self.violate("nothing scales by itself"),
            Effect::CreateVolume { .. } | Effect::DeleteVolume { .. } => self.violate("nobody wants a volume"),
        }
    }

    /// Calls about one instance happen in order.
    fn call_in_order(&mut self, key: &LaunchKey, call: Call) {
        let at = self.now + self.latency(20);
        let at = at.max(self.laws.last_call(key, at));
        self.push(at, Item::Call(self.epoch, call));
    }

    fn call(&mut self, epoch: u32, call: Call) {
        match call {
            Call::Launch(launch) => self.launch(epoch, *launch),
            Call::Terminate(key, how) => self.terminate(&key, how),
            Call::Forget(key) => self.forget(&key),
            Call::SetRoutes { revision, version, routes } => self.offer(epoch, revision, version, routes),
            Call::Cut(endpoint) => self.cut(&endpoint),
            Call::Consult(key, question) => self.consult(epoch, key, question),
            Call::Pair(key, canary, stable) => {
                let lost = self.faults.hook_lost;
                if self.chance(lost) {
                    return;
                }
                let (canary, stable) = (self.answer_pair(canary), self.answer_pair(stable));
                let at = self.now + self.latency(5);
                self.push(at, Item::Deliver(epoch, Event::PairAnswered { key, canary, stable }));
            }
            Call::Hook(key) => {
                let (no, lost) = (self.faults.hook_no, self.faults.hook_lost);
                if self.chance(lost) {
                    return;
                }
                let answer = if self.chance(no) { Err("answered 500".to_owned()) } else { Ok(()) };
                self.report.refusals += u64::from(answer.is_err());
                let at = self.now + self.latency(5);
                self.push(at, Item::Deliver(epoch, Event::HookDone { key, answer }));
            }
        }
    }

    // === death and return of the server ===

    fn crash(&mut self) {
        self.log(|| "server crashed".to_owned());
        self.report.crashes += 1;
        self.server = None;
        self.epoch += 1;
        self.tick_for = None;
        for process in &mut self.processes {
            process.asked = None;
        }
        // Calls that it had begun happen or do not.
        let mut rng = Rng::new(self.rng.next_u64());
        let coin = std::cell::RefCell::new(&mut rng);
        self.retain(|item| !matches!(item, Item::Call(..)) || coin.borrow_mut().below(2) == 0);
        let downtime = match self.rng.below(4) {
            0 => self.rng.below(50 * MILLI),
            1 | 2 => self.rng.below(2 * SECOND),
            _ => self.rng.below(20 * SECOND),
        };
        self.push(self.now + downtime, Item::Recover);
    }

    fn recover(&mut self) {
        if self.server.is_some() {
            return;
        }
        let mut set_back = false;
        if self.faults.clock && self.rng.below(2) == 0 {
            let hour = 3_600_000;
            let before = self.clock;
            self.clock = match self.rng.below(2) {
                0 => self.clock.saturating_sub(self.rng.below(2 * hour)),
                _ => self.clock + self.rng.below(2 * hour),
            };
            let after = self.clock;
            self.log(|| format!("the clock was set by {} s", (after.cast_signed() - before.cast_signed()) / 1000));
            self.laws.clock_changed();
            self.report.clocks += 1;
            set_back = after < before;
        }
        self.log(|| "server recovers".to_owned());
        // What was not started until now never will be: `find` is a fence.
        self.retain(|item| !matches!(item, Item::Call(_, Call::Launch(_))));
        self.laws.forget_calls();
        let run = self.active_run().cloned();
        let matters = |number: &ReleaseNumber| {
            Some(*number) == self.disk.environment.stable
                || run.as_ref().is_some_and(|run| run.release == Some(*number))
        };
        let releases = self.disk.releases.iter().filter(|(number, _)| matters(number));
        let state = EnvironmentState {
            environment: self.disk.environment.clone(),
            resources: self.disk.resources.clone(),
            instances: self.disk.instances.clone(),
            releases: releases.map(|(number, release)| (*number, release.clone())).collect(),
            run,
        };
        let observed = self.observe(&state);
        let settings = self.settings();
        let now = self.moment();
        let (machine, batch) = Environment::recover(state, &observed, settings, now);
        self.server = Some(machine);
        self.note_recovery(set_back);
        self.recovered();
        self.carry_out(batch);
    }
}

/// The version of a program that a service runs.
pub(super) fn version_of(service: &orchestra_model::desired::Service) -> usize {
    service
        .program
        .command
        .get(1)
        .and_then(orchestra_model::Text::known)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}
