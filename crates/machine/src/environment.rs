//! One environment as a whole: its workloads, volumes and routes, and the run that changes them.
//!
//! ```text
//!   event --> the instance, volume or run that it is about
//!                 |
//!                 v  marks resources as changed
//!   settle:  for each changed resource: reconcile its instances with what is wanted (replacement.rs),
//!            tell its users about readiness, let the run go on (run.rs); repeat until nothing changes
//!                 |
//!                 v
//!   launch what waits and may (workload.rs)
//!                 |
//!                 v
//!   batch: what to write down, then what to do; routes are sent once per batch, one revision in flight
//! ```
//!
//! It is level-triggered: `settle` looks at what is and at what is wanted, so the same code carries a first start, an
//! update, a revert, a crash of any part, and the time after a recovery.

mod addresses;
mod fill;
mod flags;
mod pairs;
mod preview;
mod recover;
mod rollouts;
mod routes;
mod run;
mod scaling;
mod traffic;
mod view;
mod workload;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    Diagnostic, Event as Note, EventKind, InstanceId, Name, Now, ReleaseNumber, Resource, ResourceId, ResourceKind,
    RunId,
    consult::Answer,
    desired::{Condition, OnLoss, Volume},
    flag::ServedFlags,
    launch::{LaunchKey, ProviderEvent, Usage},
    preview::Preview,
    quantity::Timespan,
    record::{Change, EnvironmentRecord, JournalEntry, JournalKind, ReleaseRecord, ResourceRecord, RunRecord},
    rollout::RolloutCommand,
    route::{EndpointKey, EndpointState, RouteId},
    time::UnixMillis,
    traffic::{LoadReport, TrafficReport},
};

pub use self::{
    flags::{FlagSwitch, FlagsStatus},
    traffic::TrafficMove,
};
use self::{routes::Routes, run::ActiveRun, workload::Workload};
use crate::{
    Batch, ConsultKey, Effect, HookKey, PairKey, ProbeKey,
    instance::{self, Instance, Phase},
    rng::Rng,
};

/// What a machine must know of the place where it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Seed of jitter and port choice.
    pub seed: u64,
    /// Ports for instances: first and last. Outside the kernel's range for outgoing connections.
    pub ports: (u16, u16),
    /// The documented minimum of every instance's environment.
    pub base_env: BTreeMap<String, String>,
    /// How long a request may wait for a ready instance.
    pub hold: Timespan,
    /// How many requests of a route may wait.
    pub hold_limit: u32,
    /// Longest log file before it is rotated, in bytes.
    pub log_max_bytes: u64,
    /// Rotated log files that are kept per instance.
    pub log_keep: u32,
    /// Wall-clock time at [`Now::ZERO`]: what must be written down of a moment is counted from it, so that a changed
    /// clock moves nothing while a server lives.
    pub epoch: UnixMillis,
}

/// What happens to an environment.
#[derive(Clone, Debug)]
pub enum Event {
    /// A run was accepted.
    RunRequested {
        /// Its record, as it was numbered.
        run: Box<RunRecord>,
        /// The release it puts into force.
        release: Option<Box<ReleaseRecord>>,
        /// Absolute path of the stack file.
        source: String,
    },
    /// A person wants the run to stop.
    CancelRequested {
        /// Which.
        run: RunId,
    },
    /// The provider recorded a launch.
    Launched(LaunchKey),
    /// The provider refused a launch.
    LaunchFailed {
        /// Which.
        key: LaunchKey,
        /// Why.
        problem: Diagnostic,
        /// Pause before the next try, if one can help.
        retry: Option<Duration>,
    },
    /// A port of a launch is in use by somebody else; nothing was started.
    PortsTaken(LaunchKey),
    /// From the provider.
    Provider {
        /// Which launch.
        key: LaunchKey,
        /// What.
        event: ProviderEvent,
    },
    /// A leaf was answered.
    Probed {
        /// Which.
        key: ProbeKey,
        /// Whether it passed.
        passed: bool,
        /// In words.
        detail: String,
    },
    /// A revision of the routes is in force.
    RoutesApplied {
        /// Which.
        revision: u64,
        /// Where each route listens.
        addresses: BTreeMap<RouteId, SocketAddr>,
    },
    /// A revision of the routes was refused; the one before is still in force.
    RoutesRefused {
        /// Which.
        revision: u64,
        /// Why, by route; empty if the data plane does not answer.
        problems: BTreeMap<RouteId, Diagnostic>,
    },
    /// Nothing is in flight to a leaving endpoint. A driver hands over reports that arrived before an acknowledgement
    /// of routes before that acknowledgement; one that comes early is asked for again.
    Drained(EndpointKey),
    /// What is in flight to a leaving endpoint.
    InFlight {
        /// Which.
        endpoint: EndpointKey,
        /// Requests.
        requests: u32,
        /// Streams.
        streams: u32,
    },
    /// What went through a route that a rollout watches.
    Traffic(Box<TrafficReport>),
    /// How much a metered route carries.
    Load(LoadReport),
    /// What launches of a service use; those that could not be measured are missing.
    Usage {
        /// Whose.
        service: Name,
        /// What.
        usage: Vec<(LaunchKey, Usage)>,
    },
    /// A person moves a rollout.
    Rollout {
        /// Of this service; `None` means every rollout of the run.
        service: Option<Name>,
        /// What they want.
        command: RolloutCommand,
        /// Who.
        by: String,
    },
    /// Something newer takes the place of the run, which is turned back.
    Superseded {
        /// What, in words.
        by: String,
    },
    /// A person switches a flag.
    Flag(FlagSwitch),
    /// A person holds traffic up, or lets it go on.
    MoveTraffic(TrafficMove),
    /// A hook answered.
    HookDone {
        /// Which.
        key: HookKey,
        /// Yes, or why not.
        answer: Result<(), String>,
    },
    /// Numbers from elsewhere.
    Consulted {
        /// Which question it answers.
        key: ConsultKey,
        /// What came of it.
        answer: Answer,
    },
    /// A pair of synthetic requests was answered, or not.
    PairAnswered {
        /// Which.
        key: PairKey,
        /// What the set on trial answered: well, or why not.
        canary: Result<(), String>,
        /// What the other one answered.
        stable: Result<(), String>,
    },
    /// A volume was created or deleted, or could not be.
    VolumeDone {
        /// Which.
        resource: ResourceId,
        /// How it went.
        result: Result<(), Diagnostic>,
    },
    /// An `up` changed nothing of a preview: its time begins anew all the same.
    PreviewRenewed(Box<Preview>),
    /// The driver found that the time of a preview is over, and will take it down.
    PreviewOver,
    /// A preview was taken down of which nothing was there.
    PreviewRemoved,
    /// Time passed.
    Tick,
}

/// The machine of one environment.
#[derive(Debug)]
pub struct Environment {
    settings: Arc<Settings>,
    record: EnvironmentRecord,
    record_changed: bool,
    resources: BTreeMap<ResourceId, ResourceRecord>,
    releases: BTreeMap<ReleaseNumber, ReleaseRecord>,
    workloads: BTreeMap<ResourceId, Workload>,
    volumes: BTreeMap<ResourceId, VolumeState>,
    instances: BTreeMap<InstanceId, Instance>,
    timers: BTreeSet<(Now, InstanceId)>,
    timer_of: BTreeMap<InstanceId, Now>,
    /// When a workload must be looked at again.
    alarms: BTreeMap<ResourceId, Now>,
    routes: Routes,
    /// What the data plane is to answer with; `None` without flags.
    flags: Option<Arc<ServedFlags>>,
    run: Option<ActiveRun>,
    /// Who depends on a resource, by what is wanted now.
    users: BTreeMap<ResourceId, BTreeSet<ResourceId>>,
    changed: BTreeSet<ResourceId>,
    /// Workloads that were reconciled and may have instances to launch.
    reconciled: BTreeSet<ResourceId>,
    watch: preview::Watch,
    /// Questions about numbers from elsewhere so far.
    asked: u64,
    rng: Rng,
    out: Batch,
}

/// A volume. One call about it goes on at a time, so an answer is never about something else.
#[derive(Clone, Debug, Default)]
struct VolumeState {
    want: Option<Volume>,
    /// Path of the directory that is known to be there.
    made: Option<String>,
    /// Path of a directory that is to be deleted.
    doomed: Option<String>,
    busy: Option<VolumeCall>,
    problem: Option<Diagnostic>,
}

/// What is being done with a volume.
#[derive(Clone, Debug, PartialEq)]
enum VolumeCall {
    Create(String),
    Delete(String),
}

impl VolumeState {
    fn exists(&self) -> bool {
        self.want.as_ref().is_some_and(|want| self.made.as_ref() == Some(&want.path))
    }

    /// What must be done next.
    fn next(&self) -> Option<VolumeCall> {
        match (&self.doomed, &self.want) {
            (Some(path), _) => Some(VolumeCall::Delete(path.clone())),
            (None, Some(want)) if !self.exists() => Some(VolumeCall::Create(want.path.clone())),
            _ => None,
        }
    }
}

impl Environment {
    /// A machine for an environment that has nothing yet.
    pub fn new(record: EnvironmentRecord, settings: Arc<Settings>) -> Self {
        let rng = Rng::new(settings.seed);
        Self {
            settings,
            record,
            record_changed: false,
            resources: BTreeMap::new(),
            releases: BTreeMap::new(),
            workloads: BTreeMap::new(),
            volumes: BTreeMap::new(),
            instances: BTreeMap::new(),
            timers: BTreeSet::new(),
            timer_of: BTreeMap::new(),
            alarms: BTreeMap::new(),
            routes: Routes::default(),
            flags: None,
            run: None,
            users: BTreeMap::new(),
            changed: BTreeSet::new(),
            reconciled: BTreeSet::new(),
            watch: preview::Watch::default(),
            asked: 0,
            rng,
            out: Batch::default(),
        }
    }

    /// Its record.
    pub fn record(&self) -> &EnvironmentRecord {
        &self.record
    }

    /// What was last applied.
    pub fn resources(&self) -> &BTreeMap<ResourceId, ResourceRecord> {
        &self.resources
    }

    /// The release in force as a whole.
    pub fn stable_release(&self) -> Option<&ReleaseRecord> {
        self.record.stable.and_then(|number| self.releases.get(&number))
    }

    /// Its instances.
    pub fn instances(&self) -> impl Iterator<Item = &Instance> {
        self.instances.values()
    }

    /// The run that has not ended.
    pub fn run(&self) -> Option<&RunRecord> {
        self.run.as_ref().map(|run| &run.record)
    }

    /// Advances on one event. No I/O, no clock.
    pub fn handle(&mut self, now: Now, event: Event) -> Batch {
        self.apply(now, event);
        self.finish(now)
    }

    /// Advances on several events that are there at the same time; effects that replace each other are sent once.
    pub fn handle_all(&mut self, now: Now, events: impl IntoIterator<Item = Event>) -> Batch {
        for event in events {
            self.apply(now, event);
            self.settle(now);
        }
        self.finish(now)
    }

    /// When the driver must call again with [`Event::Tick`].
    pub fn deadline(&self) -> Option<Now> {
        let run = self.run_deadline();
        let instance = self.timers.first().map(|(at, _)| *at);
        let alarm = self.alarms.values().min().copied();
        [run, instance, alarm, self.routes.retry_at(), self.preview_deadline(), self.traffic_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    fn apply(&mut self, now: Now, event: Event) {
        match event {
            Event::RunRequested { run, release, source } => self.run_requested(now, *run, release.map(|r| *r), source),
            Event::CancelRequested { run } => self.cancel_requested(now, run),
            Event::Launched(key) => {
                self.journal(launch_intent(&key), JournalKind::Done);
                self.tell_attempt(now, &key, instance::Event::Launched);
            }
            Event::LaunchFailed { key, problem, retry } => {
                self.journal(launch_intent(&key), JournalKind::Failed(problem.message.clone()));
                self.tell_attempt(now, &key, instance::Event::LaunchFailed { problem, retry });
            }
            Event::PortsTaken(key) => self.ports_taken(now, &key),
            Event::Provider { key, event } => self.tell_attempt(now, &key, instance::Event::Provider(event)),
            Event::Probed { key, passed, detail } => {
                let launch = self.launch_key(&key.instance, key.attempt);
                let event = instance::Event::Probed { which: key.which, leaf: key.leaf, passed, detail };
                self.tell_attempt(now, &launch, event);
            }
            Event::RoutesApplied { revision, addresses } => self.routes_applied(now, revision, &addresses),
            Event::RoutesRefused { revision, problems } => self.routes_refused(now, revision, problems),
            Event::Drained(endpoint) => self.drained(now, &endpoint),
            Event::InFlight { endpoint, requests, streams } => {
                let key = self.launch_key(&endpoint.instance, endpoint.attempt);
                self.tell_attempt(now, &key, instance::Event::InFlight { requests, streams });
            }
            Event::Traffic(report) => self.traffic(now, &report),
            Event::Load(report) => self.load(now, &report),
            Event::Usage { service, usage } => {
                self.account(now, &usage);
                self.usage(now, &service, usage);
            }
            Event::Rollout { service, command, by } => self.rollout_command(now, service.as_ref(), &command, &by),
            Event::Superseded { by } => self.supersede_run(now, &by),
            Event::Flag(switch) => self.switch_flag(now, switch),
            Event::MoveTraffic(wish) => self.move_traffic(now, wish),
            Event::HookDone { key, answer } => self.hook_done(now, &key, answer),
            Event::Consulted { key, answer } => self.consulted(now, &key, answer),
            Event::PairAnswered { key, canary, stable } => self.pair_answered(now, &key, &canary, &stable),
            Event::VolumeDone { resource, result } => self.volume_done(&resource, result),
            Event::PreviewRenewed(preview) => self.enter_preview(now, &preview),
            Event::PreviewOver => self.preview_over(now),
            Event::PreviewRemoved => self.preview_removed(now),
            Event::Tick => self.tick(now),
        }
    }

    /// Settles, launches, sends routes, and hands over the batch.
    fn finish(&mut self, now: Now) -> Batch {
        self.settle(now);
        // Only when nothing moves any more: what is looked at later may turn the run back, and with it what is wanted of
        // what was looked at first. Nobody is launched and stopped in one batch.
        while !self.reconciled.is_empty() {
            for id in std::mem::take(&mut self.reconciled) {
                self.launch_pending(now, &id);
            }
            self.settle(now);
        }
        self.send_routes();
        let mut batch = std::mem::take(&mut self.out);
        if std::mem::take(&mut self.record_changed) {
            // First, because everything else belongs to it.
            batch.changes.insert(0, Change::Environment(self.record.clone()));
        }
        batch
    }

    fn settle(&mut self, now: Now) {
        while let Some(id) = self.changed.pop_first() {
            match id.kind {
                ResourceKind::Service | ResourceKind::Job => self.reconcile(now, &id),
                ResourceKind::Volume => self.reconcile_volume(&id),
            }
            self.tell_users(now, &id);
            self.advance_run(now, &id);
        }
    }

    fn tick(&mut self, now: Now) {
        while let Some((at, id)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.timer_of.remove(&id);
            self.tell_instance(now, &id, instance::Event::Tick);
            // A back-off that has passed changes nothing in the instance, but it may be launched now.
            if let Some(instance) = self.instances.get(&id) {
                self.changed.insert(ResourceId::new(instance.record().kind, id.workload.clone()));
            }
        }
        let due: Vec<ResourceId> = self.alarms.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
        for id in due {
            self.alarms.remove(&id);
            self.changed.insert(id);
        }
        self.routes.tick(now);
        self.run_tick(now);
        self.preview_tick(now);
        self.traffic_tick(now);
    }

    // === events to instances ===

    fn launch_key(&self, instance: &InstanceId, attempt: u32) -> LaunchKey {
        LaunchKey { environment: self.record.id.clone(), instance: instance.clone(), attempt }
    }

    /// Delivers an event about one attempt; events of other attempts are late and mean nothing any more.
    fn tell_attempt(&mut self, now: Now, key: &LaunchKey, event: instance::Event) {
        if self.instances.get(&key.instance).is_some_and(|i| i.record().attempt == key.attempt) {
            self.tell_instance(now, &key.instance, event);
        }
    }

    fn tell_instance(&mut self, now: Now, id: &InstanceId, event: instance::Event) {
        let Some(instance) = self.instances.get_mut(id) else { return };
        let before = instance.endpoint();
        let (was_ready, was_confirmed) = (instance.is_ready(), instance.is_confirmed());
        let commands = instance.handle(now, event, &mut self.rng);
        if instance.is_confirmed() != was_confirmed {
            // After a recovery: its readiness is not new, but a step may have waited for its confirmation.
            self.changed.insert(ResourceId::new(instance.record().kind, id.workload.clone()));
        }
        self.after_instance(now, id, commands, before, was_ready);
    }

    fn after_instance(
        &mut self,
        now: Now,
        id: &InstanceId,
        commands: Vec<instance::Command>,
        endpoint_before: Option<EndpointState>,
        ready_before: bool,
    ) {
        let Some(instance) = self.instances.get(id) else { return };
        let resource = ResourceId::new(instance.record().kind, id.workload.clone());
        let endpoint = instance.endpoint();
        if endpoint != endpoint_before {
            self.routes.touch();
        }
        if endpoint == Some(EndpointState::Draining) && endpoint != endpoint_before {
            // Also if no route leads to it any more: what is in flight is reported anew with each table.
            self.routes.send_again();
        }
        // In-flight counts and answers that change no verdict need no reconciliation.
        if !commands.is_empty() || instance.is_ready() != ready_before {
            self.changed.insert(resource);
        }
        // A back-off that has passed is for `reconcile`, not for the timer; every other deadline that has passed is due.
        let waits = matches!(instance.phase(), Phase::Pending { .. });
        let deadline = instance.deadline().filter(|at| *at > now || !waits);
        self.set_timer(id, deadline);
        for command in commands {
            self.carry_out(now, id, command);
        }
    }

    fn set_timer(&mut self, id: &InstanceId, at: Option<Now>) {
        if let Some(old) = self.timer_of.remove(id) {
            self.timers.remove(&(old, id.clone()));
        }
        if let Some(at) = at {
            self.timers.insert((at, id.clone()));
            self.timer_of.insert(id.clone(), at);
        }
    }

    fn carry_out(&mut self, _now: Now, id: &InstanceId, command: instance::Command) {
        let Some(instance) = self.instances.get(id) else { return };
        let key = self.launch_key(id, instance.record().attempt);
        match command {
            instance::Command::Launch => self.launch(id),
            instance::Command::Terminate(how) => self.out.effects.push(Effect::Terminate { key, how }),
            instance::Command::Cut => {
                let endpoint =
                    EndpointKey { environment: key.environment, instance: key.instance, attempt: key.attempt };
                self.out.effects.push(Effect::Cut(endpoint));
            }
            instance::Command::StartProbes(which) => self.start_probes(id, which),
            instance::Command::StopProbes(attempt, leaves) => {
                for (which, leaf) in leaves {
                    let key = ProbeKey { instance: id.clone(), attempt, which, leaf };
                    self.out.effects.push(Effect::StopProbe(key));
                }
            }
            instance::Command::Persist => {
                self.out.changes.push(Change::Instance(Box::new(instance.record().clone())));
            }
            instance::Command::Forget(attempt) => self.out.effects.push(Effect::Forget(LaunchKey { attempt, ..key })),
            instance::Command::Note(kind, cause) => {
                let resource = ResourceId::new(instance.record().kind, id.workload.clone());
                self.note(kind, Some(resource), Some(id.clone()), Some(id.release), cause);
            }
        }
    }

    // === volumes ===

    fn volume_done(&mut self, id: &ResourceId, result: Result<(), Diagnostic>) {
        let Some(volume) = self.volumes.get_mut(id) else { return };
        let Some(call) = volume.busy.take() else { return };
        match result {
            Ok(()) => match call {
                VolumeCall::Create(path) => volume.made = Some(path),
                VolumeCall::Delete(path) => {
                    volume.doomed.take_if(|doomed| *doomed == path);
                    volume.made.take_if(|made| *made == path);
                }
            },
            // A failure of what nobody wants any more is none.
            Err(problem) if volume.next().as_ref() == Some(&call) => volume.problem = Some(problem),
            Err(_) => {}
        }
        self.changed.insert(id.clone());
    }

    fn reconcile_volume(&mut self, id: &ResourceId) {
        let Some(volume) = self.volumes.get_mut(id) else { return };
        if volume.busy.is_some() || volume.problem.is_some() {
            return;
        }
        let call = volume.next();
        volume.busy.clone_from(&call);
        let resource = id.clone();
        match call {
            Some(VolumeCall::Create(path)) => self.out.effects.push(Effect::CreateVolume { resource, path }),
            Some(VolumeCall::Delete(path)) => self.out.effects.push(Effect::DeleteVolume { resource, path }),
            None if volume.want.is_none() => {
                self.volumes.remove(id);
            }
            None => {}
        }
    }

    // === telling ===

    fn note(
        &mut self,
        kind: EventKind,
        resource: Option<ResourceId>,
        instance: Option<InstanceId>,
        release: Option<ReleaseNumber>,
        cause: String,
    ) {
        let run = self.run.as_ref().map(|run| run.record.id);
        let environment = self.record.id.clone();
        let note = Note { sequence: 0, at: 0, environment, kind, resource, instance, release, run, cause };
        self.out.changes.push(Change::Event(Box::new(note)));
    }

    fn journal(&mut self, key: String, entry: JournalKind) {
        let run = self.run.as_ref().map(|run| run.record.id);
        self.out.changes.push(Change::Journal(JournalEntry { key, run, entry }));
    }

    // === what depends on what ===

    /// Records what is wanted of a resource, and so who depends on whom.
    fn index_dependencies(&mut self, id: &ResourceId, resource: Option<&Resource>) {
        for users in self.users.values_mut() {
            users.remove(id);
        }
        if let Some(resource) = resource {
            let mut on: BTreeSet<ResourceId> = resource.dependencies().into_keys().collect();
            if let Some(service) = resource.as_service() {
                for probe in [&service.health.ready, &service.health.live].into_iter().flatten() {
                    let health = crate::health::Health::new(probe.clone());
                    on.extend(health.dependencies().map(service_id));
                }
            }
            for dependency in on {
                self.users.entry(dependency).or_default().insert(id.clone());
            }
        }
    }

    /// Tells the users of a resource whether it is there for them.
    fn tell_users(&mut self, now: Now, id: &ResourceId) {
        if id.kind != ResourceKind::Service {
            return;
        }
        // Also while nobody depends on it: users that come later lose what was there before them.
        self.note_presence(id);
        let Some(users) = self.users.get(id).cloned() else { return };
        let serves = self.serves(id);
        for user in users {
            let Some(workload) = self.workloads.get(&user) else { continue };
            let members: Vec<InstanceId> = workload.members.iter().cloned().collect();
            if self.losses(&user) != workload.lost {
                self.changed.insert(user);
            }
            for member in members {
                self.tell_instance(now, &member, instance::Event::DependencyReady(id.name.clone(), serves));
            }
        }
    }

    /// Dependencies of a service that are not there and whose absence matters. What a job did and what a volume holds
    /// cannot be lost in this sense.
    fn losses(&self, id: &ResourceId) -> BTreeSet<ResourceId> {
        let Some(workload) = self.workloads.get(id).filter(|workload| workload.begun) else { return BTreeSet::new() };
        let Some(service) = workload.want.as_ref().and_then(|want| want.resource.as_service()) else {
            return BTreeSet::new();
        };
        let matters = service.depends_on.iter().filter(|(on, dependency)| {
            let Some(other) = self.workloads.get(*on).filter(|_| on.kind == ResourceKind::Service) else {
                return false;
            };
            let lost = match dependency.until {
                Condition::Started => other.ran && !self.runs(on),
                Condition::Ready | Condition::Completed => other.served && !self.serves(on),
            };
            lost && dependency.on_loss != OnLoss::Ignore
        });
        matters.map(|(on, _)| on.clone()).collect()
    }

    /// Looks at what a service depends on, and withholds requests from its instances or lets them through again.
    fn refresh_losses(&mut self, now: Now, id: &ResourceId) {
        let lost = self.losses(id);
        let Some(workload) = self.workloads.get_mut(id) else { return };
        let before = std::mem::replace(&mut workload.lost, lost.clone());
        let edges = workload.want.as_ref().map(|want| want.resource.dependencies()).unwrap_or_default();
        let on_loss = |on: &ResourceId| edges.get(on).map(|dependency| dependency.on_loss);
        for on in before.symmetric_difference(&lost) {
            let (kind, words) = match (lost.contains(on), on_loss(on)) {
                (true, Some(OnLoss::Hold)) => (EventKind::DependencyLost, "was lost: requests are held"),
                (true, _) => (EventKind::DependencyLost, "was lost: stopping"),
                (false, Some(_)) => (EventKind::DependencyRestored, "is there again"),
                // The edge itself is gone.
                (false, None) => continue,
            };
            self.note(kind, Some(id.clone()), None, None, format!("{on} {words}"));
        }
        let held = lost.iter().any(|on| on_loss(on) == Some(OnLoss::Hold));
        let differ = self.instances_of(&self.workloads[id]).filter(|instance| instance.is_held() != held);
        let differ: Vec<InstanceId> = differ.map(|instance| instance.record().id.clone()).collect();
        for member in differ {
            self.tell_instance(now, &member, instance::Event::Held(held));
        }
    }
}

/// Journal key of a launch.
fn launch_intent(key: &LaunchKey) -> String {
    format!("{key} launch")
}

/// Id of the service with this name.
fn service_id(name: &Name) -> ResourceId {
    ResourceId::new(ResourceKind::Service, name.clone())
}

/// Whether an instance is on its way out.
fn is_leaving(instance: &Instance) -> bool {
    instance.intent() != orchestra_model::record::InstanceIntent::Run || *instance.phase() == Phase::Gone
}
