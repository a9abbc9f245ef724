//! The control plane: all environments of one state directory.
//!
//! `open` recovers: it asks the provider what became of every recorded launch, builds each environment's machine from
//! that, lets all of them say their routes, and only then touches the data plane. From then on each environment is driven
//! by a task of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use orchestra_machine::{Environment, Event, FlagSwitch, FlagsStatus, Settings, TrafficMove};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Event as HistoryEvent, InstanceId, Name, Plan, ReleaseNumber, ResourceId,
    ResourceKind, RunId,
    launch::{LaunchKey, Observed, ProviderEvent, Termination},
    quantity::Timespan,
    record::{EnvironmentRecord, ReleaseRecord, ReleaseState, RunRecord},
    rollout::RolloutCommand,
    route::{RouteId, Standing},
    time::UnixMillis,
};
use orchestra_probe::{Limits, Prober};
use orchestra_provider::{DataPlane, DataPlaneError, LogLine, LogQuery, Provider};
use orchestra_secrets::Vault;
use orchestra_store::{Reader, Store};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    clock::Clock,
    effects::{Effects, Ports, diagnostic},
    environment_task::{EnvironmentHandle, EnvironmentTask, Request},
    error::EngineError,
    planning::{self, LoadedStack},
    port_pool::PortPool,
    previews,
    probe_hub::ProbeHub,
    route_hub::{self, Certificates, RouteHub, ShownCertificate},
    secrets,
    served::served,
    view::{Look, View},
};

/// Events that may wait for a driver. A driver that waits for a full disk lets its senders wait.
const INBOX: usize = 4096;

/// What a control plane is made of.
pub struct Options {
    /// State and journal.
    pub store: Store,
    /// The world that runs instances.
    pub provider: Arc<dyn Provider>,
    /// What carries requests to them.
    pub data_plane: Arc<dyn DataPlane>,
    /// Owner of all tasks.
    pub tree: TaskTree,
    /// Settings of the machines.
    pub settings: Settings,
    /// Folder of managed volumes.
    pub volumes: String,
    /// Values of secrets.
    pub secrets: Arc<Vault>,
}

/// What to do, checked and ready to be planned.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// What.
    pub(crate) what: What,
    /// Volumes whose directory is not there.
    pub(crate) missing: BTreeSet<ResourceId>,
    /// Idempotency key: a request with the key of a recorded run starts nothing and is answered with that run.
    pub(crate) key: Option<String>,
}

/// Kinds of requests.
#[derive(Clone, Debug)]
pub(crate) enum What {
    Up(Box<LoadedStack>),
    Apply { plan: Box<Plan>, source: Option<String> },
    Down { volumes: bool },
    Restart { services: Vec<Name> },
    Scale { replicas: BTreeMap<Name, u32> },
    Rollback { release: Box<ReleaseRecord> },
}

impl RunRequest {
    fn new(what: What) -> Self {
        Self { what, missing: BTreeSet::new(), key: None }
    }

    /// Names the request, so that asking again does not start a second run.
    #[must_use]
    pub fn with_key(self, key: Option<String>) -> Self {
        Self { key, ..self }
    }

    /// Make the environment what a stack file says.
    pub fn up(stack: LoadedStack) -> Self {
        Self::new(What::Up(Box::new(stack)))
    }

    /// Apply a saved plan.
    pub fn apply(plan: Plan, source: Option<String>) -> Self {
        Self::new(What::Apply { plan: Box::new(plan), source })
    }

    /// Take the environment down.
    pub fn down(volumes: bool) -> Self {
        Self::new(What::Down { volumes })
    }

    /// Replace the instances of services; of all if none is named.
    pub fn restart(services: Vec<Name>) -> Self {
        Self::new(What::Restart { services })
    }

    /// Change replica counts.
    pub fn scale(replicas: BTreeMap<Name, u32>) -> Self {
        Self::new(What::Scale { replicas })
    }
}

/// A run that was accepted.
#[derive(Clone, Debug)]
pub struct StartedRun {
    /// The run. If there was nothing to do, its plan is empty, it has succeeded, and it was not recorded.
    pub run: RunRecord,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
}

/// The control plane. Clones are handles to the same one.
#[derive(Clone)]
pub struct ControlPlane {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    ports: Ports,
    data_plane: Arc<dyn DataPlane>,
    certificates: Certificates,
    settings: Arc<Settings>,
    volumes: String,
    secrets: Arc<Vault>,
    clock: Clock,
    environments: Mutex<BTreeMap<EnvironmentId, EnvironmentHandle>>,
    /// Held while a driver is made.
    creating: tokio::sync::Mutex<()>,
    /// When the recovery was done, by the wall clock.
    opened_at: OnceLock<UnixMillis>,
    /// See [`ControlPlane::entered`].
    entered: Mutex<BTreeMap<EnvironmentId, Arc<BTreeMap<InstanceId, HistoryEvent>>>>,
}

impl ControlPlane {
    /// Recovers everything that is recorded, and goes on.
    pub async fn open(options: Options) -> Result<Self, EngineError> {
        let Options { store, provider, data_plane, tree, mut settings, volumes, secrets } = options;
        let clock = Clock::start();
        settings.epoch = Clock::wall();
        let (prober, outcomes) = Prober::new(provider.clone(), &tree, Limits::default());
        let (routes, messages) = mpsc::channel(INBOX);
        let ports = Ports {
            provider: provider.clone(),
            probes: Arc::new(ProbeHub::new(prober)),
            routes,
            pool: Arc::new(PortPool::default()),
            tree: tree.clone(),
        };
        let reports = data_plane.take_events().ok_or(EngineError::ShuttingDown)?;
        let provider_events = provider.take_events().ok_or(EngineError::ShuttingDown)?;
        let certificates = Certificates::default();
        let hub = RouteHub::new(data_plane.clone(), store.clone(), tree.clone(), certificates.clone());
        tree.start(TaskKind::Loop, "route hub", hub.run(messages, reports));
        let inner = Inner {
            store,
            ports,
            data_plane,
            certificates,
            settings: Arc::new(settings),
            volumes,
            secrets,
            clock,
            environments: Mutex::default(),
            creating: tokio::sync::Mutex::default(),
            opened_at: OnceLock::new(),
            entered: Mutex::default(),
        };
        let this = Self { inner: Arc::new(inner) };
        tree.start(TaskKind::Loop, "provider events", this.clone().deliver_provider_events(provider_events));
        tree.start(TaskKind::Loop, "probe outcomes", this.clone().deliver_probe_outcomes(outcomes));
        secrets::sweep(&this.inner.secrets, &this.inner.store).await?;
        this.recover().await?;
        let _ = this.inner.opened_at.set(Clock::wall());
        Ok(this)
    }

    async fn recover(&self) -> Result<(), EngineError> {
        let records = self.inner.store.read(Reader::environments).await?;
        let mut begun = Vec::new();
        for record in records {
            let id = record.id;
            // Its inbox first: a launch that is adopted below may report at once, and no report may be lost.
            let mailbox = self.register(&id).await;
            let Some(state) = self
                .inner
                .store
                .read({
                    let id = id.clone();
                    move |reader| reader.state(&id)
                })
                .await?
            else {
                continue;
            };
            let mut observed: BTreeMap<InstanceId, Option<Observed>> = BTreeMap::new();
            for (instance, record) in &state.instances {
                let key = LaunchKey { environment: id.clone(), instance: instance.clone(), attempt: record.attempt };
                let found = self
                    .inner
                    .ports
                    .provider
                    .find_by_intent(key.clone())
                    .await
                    .map_err(|error| EngineError::Refused(vec![diagnostic(&error)]))?;
                if found.as_ref().is_some_and(|f| !f.gone) {
                    self.inner.ports.pool.assume(key, record.ports.values().copied());
                }
                observed.insert(instance.clone(), found);
            }
            self.end_strays(&id, &state.instances.iter().map(|(i, r)| (i.clone(), r.attempt)).collect()).await;
            let (machine, first) =
                Environment::recover(state, &observed, self.settings_of(&id), self.inner.clock.now());
            begun.push(self.drive(machine, first, mailbox));
        }
        for begun in begun {
            // A driver that ended before it began has said why; the others' routes must not wait for it.
            let _ = begun.await;
        }
        let _ = self.inner.ports.routes.send(route_hub::Message::Begin).await;
        Ok(())
    }

    /// Ends launches that the world knows and the records do not. There should be none.
    async fn end_strays(&self, environment: &EnvironmentId, known: &BTreeSet<(InstanceId, u32)>) {
        let provider = &self.inner.ports.provider;
        let found = match provider.observe(environment.clone()).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%environment, %error, "cannot look for stray launches");
                return;
            }
        };
        for stray in found {
            if known.contains(&(stray.key.instance.clone(), stray.key.attempt)) {
                continue;
            }
            if stray.gone {
                let _ = provider.forget(stray.key).await;
                continue;
            }
            tracing::warn!(launch = %stray.key, "ending a launch that no record knows");
            let how = Termination { signal: orchestra_model::desired::Signal::Term, grace: Timespan::seconds(10) };
            if let Err(error) = provider.terminate(stray.key.clone(), how).await {
                tracing::error!(launch = %stray.key, %error, "could not end a stray launch");
            }
        }
    }

    /// Makes the inbox of an environment, in which events wait for its driver.
    async fn register(&self, id: &EnvironmentId) -> Mailbox {
        let (events, inbox) = mpsc::channel(INBOX);
        let (requests, questions) = mpsc::channel(64);
        let (trouble, watching) = watch::channel(None);
        let _ = self.inner.ports.routes.send(route_hub::Message::Register(id.clone(), events.clone())).await;
        let handle = EnvironmentHandle { events: events.clone(), requests, trouble: watching };
        self.environments().insert(id.clone(), handle);
        Mailbox { events, inbox, questions, trouble }
    }

    /// Starts the driver of a machine. The receiver completes once its first batch was carried out.
    fn drive(&self, machine: Environment, first: orchestra_machine::Batch, mailbox: Mailbox) -> oneshot::Receiver<()> {
        let (begin, begun) = oneshot::channel();
        let task = EnvironmentTask {
            effects: Effects::new(self.inner.ports.clone(), machine.record().id.clone(), mailbox.events),
            record: Arc::new(machine.record().clone()),
            machine,
            store: self.inner.store.clone(),
            clock: self.inner.clock,
            events: mailbox.inbox,
            requests: mailbox.questions,
            trouble: mailbox.trouble,
            first,
            created: BTreeMap::new(),
            postponed: std::collections::VecDeque::new(),
            next: None,
            switching: Vec::new(),
            moving: Vec::new(),
            begun: Some(begin),
        };
        self.inner.ports.tree.start(TaskKind::Loop, "environment", task.run());
        begun
    }

    fn environments(&self) -> std::sync::MutexGuard<'_, BTreeMap<EnvironmentId, EnvironmentHandle>> {
        self.inner.environments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, environment: &EnvironmentId) -> Option<EnvironmentHandle> {
        self.environments().get(environment).cloned()
    }

    fn known(&self, environment: &EnvironmentId) -> Result<EnvironmentHandle, EngineError> {
        self.handle(environment).ok_or_else(|| EngineError::NotFound(format!("environment {environment}")))
    }

    async fn deliver_provider_events(self, mut events: mpsc::Receiver<(LaunchKey, ProviderEvent)>) {
        while let Some((key, event)) = events.recv().await {
            if let Some(handle) = self.handle(&key.environment) {
                let _ = handle.events.send(Event::Provider { key, event }).await;
            }
        }
    }

    async fn deliver_probe_outcomes(self, mut outcomes: orchestra_probe::Outcomes) {
        while let Some(outcome) = outcomes.recv().await {
            let Some((environment, key)) = self.inner.ports.probes.who(outcome.id) else { continue };
            if let Some(handle) = self.handle(&environment) {
                let event = Event::Probed { key, passed: outcome.passed, detail: outcome.detail };
                let _ = handle.events.send(event).await;
            }
        }
    }

    // === what can be asked ===

    /// Folder of managed volumes.
    pub fn volumes(&self) -> &str {
        &self.inner.volumes
    }

    /// The world that runs instances.
    pub(crate) fn provider(&self) -> &Arc<dyn Provider> {
        &self.inner.ports.provider
    }

    /// State and journal.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Starts a run.
    pub async fn start_run(&self, environment: &EnvironmentId, request: RunRequest) -> Result<StartedRun, EngineError> {
        self.check_previews(environment, &request).await?;
        let request = secrets::settle(&self.inner.secrets, request).await?;
        let handle = self.handle_for(environment, &request).await?;
        let request = self.look(environment, request).await?;
        let (reply, answer) = oneshot::channel();
        let warning = self.previews_that_lose(environment, &request).await?;
        handle.requests.send(Request::Start(Box::new(request), reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        let mut started = answer.await.map_err(|_| EngineError::ShuttingDown)??;
        started.warnings.extend(warning);
        Ok(started)
    }

    /// The run that was started by the request with this idempotency key, if there is one.
    pub async fn run_of_request(&self, key: String) -> Result<Option<RunRecord>, EngineError> {
        let found = self.inner.store.read(move |reader| match reader.run_of_request(&key)? {
            Some(run) => reader.run(run),
            None => Ok(None),
        });
        Ok(found.await?)
    }

    /// Says what a run would do. Changes nothing.
    pub async fn plan(&self, environment: &EnvironmentId, request: RunRequest) -> Result<Plan, EngineError> {
        let request = secrets::settle(&self.inner.secrets, request).await?;
        if self.handle(environment).is_none() {
            // Planning must not create an environment: an empty one says the same.
            let machine = Environment::new(EnvironmentRecord::new(environment.clone()), self.settings_of(environment));
            return planning::plan_request(&machine, self.inner.clock.now(), &request).map(|planned| planned.plan);
        }
        let handle = self.known(environment)?;
        let request = self.look(environment, request).await?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::Plan(Box::new(request), reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        answer.await.map_err(|_| EngineError::ShuttingDown)?
    }

    /// The settings of its machine. Each environment has a seed of its own: with the same one they would choose the same
    /// ports, one after the other.
    fn settings_of(&self, environment: &EnvironmentId) -> Arc<Settings> {
        let settings = &self.inner.settings;
        let mix = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let seed = environment.to_string().bytes().fold(settings.seed, mix);
        Arc::new(Settings { seed, ..Settings::clone(settings) })
    }

    /// The handle of an environment; a new one is made for `up` and `apply`.
    async fn handle_for(
        &self,
        environment: &EnvironmentId,
        request: &RunRequest,
    ) -> Result<EnvironmentHandle, EngineError> {
        if let Some(handle) = self.handle(environment) {
            return Ok(handle);
        }
        if !matches!(request.what, What::Up(_) | What::Apply { .. }) {
            return self.known(environment);
        }
        // Two first runs at once: the second one finds the first one's driver.
        let _creating = self.inner.creating.lock().await;
        let machine = Environment::new(EnvironmentRecord::new(environment.clone()), self.settings_of(environment));
        if let Some(handle) = self.handle(environment) {
            return Ok(handle);
        }
        let mailbox = self.register(environment).await;
        drop(self.drive(machine, orchestra_machine::Batch::default(), mailbox));
        self.known(environment)
    }

    /// Completes a request with what only the world knows.
    async fn look(&self, environment: &EnvironmentId, mut request: RunRequest) -> Result<RunRequest, EngineError> {
        let id = environment.clone();
        let resources = self.inner.store.read(move |reader| reader.resources(&id)).await?;
        for (id, record) in resources.into_iter().filter(|(id, _)| id.kind == ResourceKind::Volume) {
            let orchestra_model::Resource::Volume(volume) = record.applied else { continue };
            // A provider that cannot tell is not a reason to repair anything.
            if matches!(self.inner.ports.provider.volume_exists(volume.path).await, Ok(false)) {
                request.missing.insert(id);
            }
        }
        Ok(request)
    }

    /// A request to go back to a release; to the last one that was in force before the present one if none is named.
    pub async fn rollback(
        &self,
        environment: &EnvironmentId,
        to: Option<ReleaseNumber>,
    ) -> Result<RunRequest, EngineError> {
        self.known(environment)?;
        let view = self.view(environment).await?;
        if let Some(gone) = view.record.preview.as_deref().filter(|preview| !preview.is_live()) {
            return Err(previews::removed(&environment.environment, gone));
        }
        let id = environment.clone();
        let releases = self.inner.store.read(move |reader| reader.releases(&id, 1000)).await?;
        let number = match to {
            Some(number) => number,
            None => releases
                .iter()
                .filter(|r| {
                    r.state == ReleaseState::Retired
                        && Some(r.number) < view.record.stable.or(Some(ReleaseNumber(u64::MAX)))
                })
                .map(|r| r.number)
                .next()
                .ok_or_else(|| {
                    let message = format!("{environment} has no earlier release that was in force");
                    EngineError::Refused(vec![
                        Diagnostic::error(Code::NOTHING_TO_ROLL_BACK_TO, message)
                            .help("`orchestra history` lists its releases"),
                    ])
                })?,
        };
        let id = environment.clone();
        let release = self.inner.store.read(move |reader| reader.release(&id, number)).await?;
        let release = release.ok_or_else(|| EngineError::NotFound(format!("release {number} of {environment}")))?;
        // The way back takes no step and asks no verdict, so it leads only to what stood the test of being in force.
        if release.state.never_was_in_force() {
            let why = if release.state == ReleaseState::Superseded { "it was superseded" } else { "its run failed" };
            let message = format!("release {number} of {environment} was never in force: {why}");
            return Err(EngineError::Refused(vec![Diagnostic::error(Code::NOTHING_TO_ROLL_BACK_TO, message).help(
                "`orchestra history` lists those that were; `orchestra up` tries its stack file again, step by step",
            )]));
        }
        Ok(RunRequest::new(What::Rollback { release: Box::new(release) }))
    }

    /// Cancels a run. Returns its record as it is now; `None` if it has ended.
    pub async fn cancel(&self, run: RunId) -> Result<Option<RunRecord>, EngineError> {
        let record = self.run(run).await?;
        let handle = self.known(&record.environment)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::Cancel(run, reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        answer.await.map_err(|_| EngineError::ShuttingDown)
    }

    /// Moves the rollout of a service, or every rollout of the run that goes on; an abort always turns the whole run
    /// back. Returns the run.
    ///
    /// # Errors
    ///
    /// Nothing is in progress that could be moved.
    pub async fn rollout(
        &self,
        environment: &EnvironmentId,
        service: Option<Name>,
        command: RolloutCommand,
        by: String,
    ) -> Result<RunRecord, EngineError> {
        let handle = self.known(environment)?;
        let (reply, answer) = oneshot::channel();
        let request = Request::Rollout { service, command, by, reply };
        handle.requests.send(request).await.map_err(|_| EngineError::ShuttingDown)?;
        answer.await.map_err(|_| EngineError::ShuttingDown)?
    }

    /// A run.
    pub async fn run(&self, run: RunId) -> Result<RunRecord, EngineError> {
        let found = self.inner.store.read(move |reader| reader.run(run)).await?;
        found.ok_or_else(|| EngineError::NotFound(run.to_string()))
    }

    /// Environments that are known.
    pub fn environment_ids(&self) -> Vec<EnvironmentId> {
        self.environments().keys().cloned().collect()
    }

    /// An environment at one moment.
    pub async fn view(&self, environment: &EnvironmentId) -> Result<View, EngineError> {
        let handle = self.known(environment)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::View(reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        let Look { record, shown, status, at } = answer.await.map_err(|_| EngineError::ShuttingDown)?;
        let trouble = handle.trouble.borrow().clone();
        let opened_at = self.inner.opened_at.get().copied().unwrap_or(0);
        let mut view = View { record, shown, status, at, trouble, opened_at, entered: Arc::default() };
        if view.needs_history() {
            view.entered = self.entered(environment).await?;
        }
        Ok(view)
    }

    /// The events by which instances entered the phases in which this control plane found them. Asked once: what happens
    /// later the machines know by themselves.
    async fn entered(
        &self,
        environment: &EnvironmentId,
    ) -> Result<Arc<BTreeMap<InstanceId, HistoryEvent>>, EngineError> {
        let known = || self.inner.entered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(environment) {
            return Ok(Arc::clone(found));
        }
        let id = environment.clone();
        let events = self.inner.store.read(move |reader| reader.phases(&id)).await?;
        let found = events.into_iter().filter_map(|event| Some((event.instance.clone()?, event))).collect();
        let found = Arc::new(found);
        known().insert(environment.clone(), Arc::clone(&found));
        Ok(found)
    }

    /// The flags of an environment.
    ///
    /// # Errors
    ///
    /// There is no such environment.
    pub async fn flags(&self, environment: &EnvironmentId) -> Result<FlagsStatus, EngineError> {
        let handle = self.known(environment)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::Flags(reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        answer.await.map_err(|_| EngineError::ShuttingDown)
    }

    /// Lays something over a flag, or takes it back. Returns once it is written down and the data plane serves it; one
    /// that does not answer within a few seconds will later, as the answer then says.
    ///
    /// # Errors
    ///
    /// There is no such flag or variant, or nothing to take back.
    pub async fn switch_flag(
        &self,
        environment: &EnvironmentId,
        switch: FlagSwitch,
    ) -> Result<FlagsStatus, EngineError> {
        let handle = self.known(environment)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::SwitchFlag(switch, reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        match served(&handle.trouble, answer).await {
            Some(answer) => answer.map_err(|_| EngineError::ShuttingDown)?,
            None => self.flags(environment).await,
        }
    }

    /// Holds the traffic of a service up, or lets it go on. Returns whether the data plane does so already; one that does
    /// not answer within a few seconds will later.
    ///
    /// # Errors
    ///
    /// There is no such service, or nothing to resume.
    pub async fn move_traffic(&self, environment: &EnvironmentId, wish: TrafficMove) -> Result<bool, EngineError> {
        let handle = self.known(environment)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(Request::MoveTraffic(wish, reply)).await.map_err(|_| EngineError::ShuttingDown)?;
        match served(&handle.trouble, answer).await {
            Some(answer) => answer.map_err(|_| EngineError::ShuttingDown)?.map(|()| true),
            None => Ok(false),
        }
    }

    /// Reads logs.
    pub async fn logs(&self, query: LogQuery) -> Result<mpsc::Receiver<LogLine>, EngineError> {
        self.inner.ports.provider.logs(query).await.map_err(|error| EngineError::Refused(vec![diagnostic(&error)]))
    }

    /// What the ports in force show to clients that speak TLS.
    pub fn certificates(&self) -> BTreeMap<RouteId, ShownCertificate> {
        self.inner.certificates.list()
    }

    /// Instances that the data plane leaves out for a while, and requests that wait. Nothing if it does not answer.
    pub async fn standing(&self) -> Standing {
        self.inner.data_plane.standing().await.unwrap_or_default()
    }

    /// Metrics of the data plane in Prometheus text format.
    pub async fn data_plane_metrics(&self) -> Result<String, EngineError> {
        self.inner.data_plane.metrics().await.map_err(|error| unavailable(&error))
    }

    /// Whether the data plane answers at all; otherwise why not.
    pub async fn data_plane_answers(&self) -> Result<(), EngineError> {
        self.inner.data_plane.standing().await.map(|_| ()).map_err(|error| unavailable(&error))
    }
}

fn unavailable(error: &DataPlaneError) -> EngineError {
    EngineError::Refused(vec![Diagnostic::error(Code::PROXY_UNAVAILABLE, "the proxy does not answer").caused_by(error)])
}

/// The driver's ends of an environment's channels.
struct Mailbox {
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    questions: mpsc::Receiver<Request>,
    trouble: watch::Sender<Option<String>>,
}
