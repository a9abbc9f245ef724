//! The driver of one environment: events in, commits and effects out.
//!
//! ```text
//!   inbox, deadline --> machine.handle_all --> commit (durable) --> effects
//! ```
//!
//! Nothing else touches the machine, so there is no lock. What is asked of it (plans, status, runs) comes through the
//! same inbox and is answered between two events, from one consistent state.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use orchestra_machine::{Batch, Environment, Event, FlagSwitch, FlagsStatus, TrafficMove};
use orchestra_model::{
    Diagnostic, InstanceId, Name, Plan, RunId,
    record::{Change, EnvironmentRecord, RunKind, RunRecord, RunState},
    rollout::RolloutCommand,
    time::UnixMillis,
};
use orchestra_store::{CommitError, Store};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    clock::Clock,
    control_plane::{RunRequest, StartedRun, What},
    effects::Effects,
    error::EngineError,
    planning,
    view::Look,
};

/// Events that are handled together at most.
const TOGETHER: usize = 512;
/// Pause before a commit that failed for lack of space is tried again.
const COMMIT_RETRY: Duration = Duration::from_secs(1);

/// What is asked of an environment.
pub(crate) enum Request {
    /// Start a run.
    Start(Box<RunRequest>, oneshot::Sender<Result<StartedRun, EngineError>>),
    /// Say what a run would do.
    Plan(Box<RunRequest>, oneshot::Sender<Result<Plan, EngineError>>),
    /// Cancel a run.
    Cancel(RunId, oneshot::Sender<Option<RunRecord>>),
    /// Move the rollout of a service, or all of the run.
    Rollout {
        /// Of which service; `None` means every rollout of the run.
        service: Option<Name>,
        /// How.
        command: RolloutCommand,
        /// Who asks.
        by: String,
        /// The run that was moved.
        reply: oneshot::Sender<Result<RunRecord, EngineError>>,
    },
    /// Say which flags are served.
    Flags(oneshot::Sender<FlagsStatus>),
    /// Lay something over a flag, or take it back; answered once the data plane serves it.
    SwitchFlag(FlagSwitch, oneshot::Sender<Result<FlagsStatus, EngineError>>),
    /// Hold traffic up, or let it go on; answered once the data plane does so.
    MoveTraffic(TrafficMove, oneshot::Sender<Result<(), EngineError>>),
    /// Say how it is.
    View(oneshot::Sender<Look>),
}

/// Whoever waits for a run to be started.
type Started = oneshot::Sender<Result<StartedRun, EngineError>>;

/// Handle of a driver.
#[derive(Clone)]
pub(crate) struct EnvironmentHandle {
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) requests: mpsc::Sender<Request>,
    /// Why nothing can be written at the moment.
    pub(crate) trouble: watch::Receiver<Option<String>>,
}

/// The driver.
pub(crate) struct EnvironmentTask {
    pub(crate) machine: Environment,
    /// The machine's record as it was last written down, to be shared with whoever looks.
    pub(crate) record: Arc<EnvironmentRecord>,
    pub(crate) effects: Effects,
    pub(crate) store: Store,
    pub(crate) clock: Clock,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) trouble: watch::Sender<Option<String>>,
    /// What the recovery left to do.
    pub(crate) first: Batch,
    /// When instances that were made here were made.
    pub(crate) created: BTreeMap<InstanceId, UnixMillis>,
    /// Requests that came while nothing could be written.
    pub(crate) postponed: VecDeque<Request>,
    /// A newer release that waits for the run that it supersedes to be turned back.
    pub(crate) next: Option<(Box<RunRequest>, Started)>,
    /// Who switched a flag and waits until it is served.
    pub(crate) switching: Vec<oneshot::Sender<Result<FlagsStatus, EngineError>>>,
    /// Who moved the traffic of a service and waits until it is so.
    pub(crate) moving: Vec<(Name, oneshot::Sender<Result<(), EngineError>>)>,
    /// Told once the recovery's batch is committed and its effects have begun.
    pub(crate) begun: Option<oneshot::Sender<()>>,
}

enum Wake {
    Events(Vec<Event>),
    Request(Request),
    /// The time of a preview is over.
    Over,
    Closed,
}

impl EnvironmentTask {
    pub(crate) async fn run(mut self) {
        let first = std::mem::take(&mut self.first);
        if !self.carry_out(first).await {
            return;
        }
        if let Some(begun) = self.begun.take() {
            let _ = begun.send(());
        }
        loop {
            let batch = match self.wake().await {
                Wake::Closed => return,
                Wake::Events(events) => self.machine.handle_all(self.clock.now(), events),
                Wake::Over => match self.take_down().await {
                    Some(batch) => batch,
                    None => return,
                },
                Wake::Request(request) => match self.answer(request).await {
                    Some(batch) => batch,
                    None => continue,
                },
            };
            if !self.carry_out(batch).await {
                return;
            }
        }
    }

    async fn wake(&mut self) -> Wake {
        if let Some(request) = self.postponed.pop_front() {
            return Wake::Request(request);
        }
        if self.machine.run().is_none()
            && let Some((request, reply)) = self.next.take()
        {
            return Wake::Request(Request::Start(request, reply));
        }
        if self.machine.preview_is_over(self.clock.now()) {
            return Wake::Over;
        }
        let deadline = self.machine.deadline().map(|at| self.clock.instant(at));
        let timer = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        // Every arm is cancel-safe: what was not received stays in its channel, and the deadline is computed anew. The
        // choice is fair: a flood in one channel must not silence the others.
        tokio::select! {
            event = self.events.recv() => {
                let Some(event) = event else { return Wake::Closed };
                let mut events = vec![event];
                while events.len() < TOGETHER {
                    let Ok(event) = self.events.try_recv() else { break };
                    events.push(event);
                }
                Wake::Events(events)
            }
            () = timer => Wake::Events(vec![Event::Tick]),
            request = self.requests.recv() => request.map_or(Wake::Closed, Wake::Request),
        }
    }

    /// Commits, then begins the effects. Returns whether to go on.
    async fn carry_out(&mut self, mut batch: Batch) -> bool {
        if !batch.changes.is_empty() {
            self.stamp(&mut batch.changes);
            loop {
                match self.store.commit(batch.changes.clone()).await {
                    Ok(_) => break,
                    Err(error) if is_transient(&error) => {
                        // Without its intent on disk no effect may begin: wait until it can be written.
                        tracing::error!(environment = %self.machine.record().id, %error, "cannot write; waiting");
                        self.trouble.send_replace(Some(error.to_string()));
                        self.answer_in_trouble(&error).await;
                    }
                    Err(error) => {
                        let cause = std::error::Error::source(&error).map(ToString::to_string);
                        tracing::error!(environment = %self.machine.record().id, %error, ?cause, "a commit was refused");
                        return false;
                    }
                }
            }
            self.trouble.send_if_modified(|trouble| trouble.take().is_some());
            let record = batch.changes.into_iter().rev().find_map(|change| match change {
                Change::Environment(record) => Some(record),
                _ => None,
            });
            if let Some(record) = record {
                self.record = Arc::new(record);
            }
        }
        for effect in batch.effects {
            self.effects.begin(effect).await;
        }
        self.effects.end_hooks(|key| self.machine.waits_for_hook(key));
        if !self.switching.is_empty() {
            let flags = self.machine.flags();
            if flags.in_force || flags.problem.is_some() {
                for waiting in self.switching.drain(..) {
                    let _ = waiting.send(Ok(flags.clone()));
                }
            }
        }
        let machine = &self.machine;
        for (_, waiting) in self.moving.extract_if(.., |(service, _)| machine.traffic_in_force(service)) {
            let _ = waiting.send(Ok(()));
        }
        true
    }

    /// Waits for the next try of a commit. Meanwhile it answers what needs no write and refuses new runs; a cancellation
    /// waits for its turn.
    async fn answer_in_trouble(&mut self, error: &CommitError) {
        let again = tokio::time::sleep(COMMIT_RETRY);
        tokio::pin!(again);
        loop {
            // Cancel-safe: what was not received stays in its channel, and the pause goes on.
            let request = tokio::select! {
                () = &mut again => return,
                request = self.requests.recv() => request,
            };
            match request {
                Some(Request::View(reply)) => {
                    let _ = reply.send(Look::at(&self.machine, &self.record, self.clock.now()));
                }
                Some(Request::Plan(request, reply)) => {
                    let _ = reply.send(self.plan(&request).map(|planned| planned.plan));
                }
                Some(Request::Start(_, reply)) => {
                    let _ = reply.send(Err(EngineError::Write(error.clone())));
                }
                Some(Request::Flags(reply)) => {
                    let _ = reply.send(self.machine.flags());
                }
                Some(
                    request @ (Request::Cancel(..)
                    | Request::Rollout { .. }
                    | Request::SwitchFlag(..)
                    | Request::MoveTraffic(..)),
                ) => {
                    self.postponed.push_back(request);
                }
                // Nobody can ask any more; the commit is still worth its tries.
                None => return again.await,
            }
        }
    }

    /// Puts the wall clock into records that carry it. Machines do not know it.
    fn stamp(&mut self, changes: &mut [Change]) {
        for change in changes {
            match change {
                Change::Instance(instance) if instance.created_at == 0 => {
                    instance.created_at = *self.created.entry(instance.id.clone()).or_insert_with(Clock::wall);
                }
                Change::ForgetInstance(_, instance) => {
                    self.created.remove(instance);
                }
                Change::Run(run) if run.state.is_final() && run.ended_at.is_none() => {
                    run.ended_at = Some(Clock::wall());
                }
                _ => {}
            }
        }
    }

    async fn answer(&mut self, request: Request) -> Option<Batch> {
        let request = match request {
            // Before anything else: what its first time began may be over, or have been superseded.
            Request::Start(request, reply) => match self.begun_before(&request).await {
                Some(found) => {
                    let _ = reply.send(found);
                    return None;
                }
                None => Request::Start(request, reply),
            },
            request => request,
        };
        match request {
            Request::View(reply) => {
                let _ = reply.send(Look::at(&self.machine, &self.record, self.clock.now()));
                None
            }
            Request::Plan(request, reply) => {
                let _ = reply.send(self.plan(&request).map(|planned| planned.plan));
                None
            }
            Request::Flags(reply) => {
                let _ = reply.send(self.machine.flags());
                None
            }
            Request::SwitchFlag(switch, reply) => {
                if let Err(problem) = self.machine.can_switch(&switch) {
                    let _ = reply.send(Err(EngineError::Refused(vec![problem])));
                    return None;
                }
                self.switching.push(reply);
                Some(self.machine.handle(self.clock.now(), Event::Flag(switch)))
            }
            Request::MoveTraffic(wish, reply) => {
                if let Err(problem) = self.machine.can_move_traffic(&wish) {
                    let _ = reply.send(Err(EngineError::Refused(vec![problem])));
                    return None;
                }
                self.moving.push((wish.service.clone(), reply));
                Some(self.machine.handle(self.clock.now(), Event::MoveTraffic(wish)))
            }
            Request::Cancel(run, reply) => {
                // A cancelled run may end at once: the answer is then how it was, and its events say how it ended.
                let before = self.machine.run().filter(|record| record.id == run).cloned();
                let batch = self.machine.handle(self.clock.now(), Event::CancelRequested { run });
                // After the commit would be later than needed: the answer says what was asked for, not what came of it.
                let after = self.machine.run().filter(|record| record.id == run).cloned();
                let _ = reply.send(after.or(before));
                Some(batch)
            }
            Request::Rollout { service, command, by, reply } => {
                let Some(run) = self.machine.run().cloned() else {
                    let none = self.machine.can_command(service.as_ref(), &command);
                    let _ = reply.send(Err(EngineError::Refused(none.err().into_iter().collect())));
                    return None;
                };
                if let Err(problem) = self.machine.can_command(service.as_ref(), &command) {
                    let _ = reply.send(Err(EngineError::Refused(vec![problem])));
                    return None;
                }
                let batch = self.machine.handle(self.clock.now(), Event::Rollout { service, command, by });
                let after = self.machine.run().filter(|record| record.id == run.id).cloned();
                let _ = reply.send(Ok(after.unwrap_or(run)));
                Some(batch)
            }
            Request::Start(request, reply) if self.supersedes(&request) => {
                let by = match request.what {
                    What::Down { .. } => "`orchestra down`",
                    _ => "a newer release",
                };
                // Nothing of it is planned before the run that it supersedes is turned back: the newest stable release
                // is the baseline.
                if let Some((_, earlier)) = self.next.replace((request, reply)) {
                    let environment = self.machine.record().id.clone();
                    let run = self.machine.run().map_or(RunId(0), |run| run.id);
                    let _ = earlier.send(Err(EngineError::Busy { environment, run }));
                }
                Some(self.machine.handle(self.clock.now(), Event::Superseded { by: by.to_owned() }))
            }
            Request::Start(request, reply) => match self.start(&request) {
                Ok((started, batch)) => {
                    if self.carry_out(batch).await {
                        let _ = reply.send(Ok(started));
                        Some(Batch::default())
                    } else {
                        let _ = reply.send(Err(EngineError::ShuttingDown));
                        None
                    }
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    None
                }
            },
        }
    }

    /// Takes a preview down whose time is over. `None` if nothing can be written any more.
    async fn take_down(&mut self) -> Option<Batch> {
        let said = self.machine.handle(self.clock.now(), Event::PreviewOver);
        if !self.carry_out(said).await {
            return None;
        }
        match self.start(&RunRequest::down(true)) {
            Ok((_, batch)) => Some(batch),
            Err(error) => {
                tracing::error!(environment = %self.machine.record().id, %error, "a preview cannot be taken down");
                Some(Batch::default())
            }
        }
    }

    /// Whether a request takes the place of the run that goes on: one that is in the middle of a rollout in steps may
    /// take hours, and whoever sends something newer means that. The same thing once more is no newer one.
    fn supersedes(&self, request: &RunRequest) -> bool {
        let Some(run) = self.machine.run() else { return false };
        let wanted = match &request.what {
            What::Up(stack) => Some(&stack.desired),
            What::Apply { plan, .. } => plan.desired.as_ref(),
            What::Down { .. } => None,
            What::Restart { .. } | What::Scale { .. } | What::Rollback { .. } => return false,
        };
        self.machine.is_rolling_out() && run.plan.desired.as_ref() != wanted
    }

    /// The run that this very request has started already, if its client asks again because the answer was lost.
    async fn begun_before(&self, request: &RunRequest) -> Option<Result<StartedRun, EngineError>> {
        let key = request.key.clone()?;
        let found = self.store.read(move |reader| match reader.run_of_request(&key)? {
            Some(run) => reader.run(run),
            None => Ok(None),
        });
        match found.await {
            Ok(run) => run.map(|run| Ok(StartedRun { run, warnings: Vec::new() })),
            Err(error) => Some(Err(error.into())),
        }
    }

    fn plan(&self, request: &RunRequest) -> Result<planning::Planned, EngineError> {
        planning::plan_request(&self.machine, self.clock.now(), request)
    }

    fn start(&mut self, request: &RunRequest) -> Result<(StartedRun, Batch), EngineError> {
        let environment = self.machine.record().id.clone();
        if let Some(run) = self.machine.run() {
            return Err(EngineError::Busy { environment, run: run.id });
        }
        let planned = self.plan(request)?;
        let id = self.store.next_run_id();
        let record = self.machine.record();
        let nothing_to_do = planned.plan.is_empty();
        let mut run = record.next_run(id, planned.kind, planned.plan, Clock::wall());
        run.request_key.clone_from(&request.key);
        if nothing_to_do {
            run.state = RunState::Succeeded;
            run.ended_at = Some(run.started_at);
            let desired = run.plan.desired.as_ref();
            let event = match (&run.kind, desired.and_then(|desired| desired.preview.clone())) {
                (RunKind::Up, Some(preview)) => Some(Event::PreviewRenewed(preview)),
                (RunKind::Down { .. }, _) => Some(Event::PreviewRemoved),
                _ => None,
            };
            let batch = event.map(|event| self.machine.handle(self.clock.now(), event)).unwrap_or_default();
            return Ok((StartedRun { run, warnings: planned.warnings }, batch));
        }
        let release = run.new_release(planned.reason).map(Box::new);
        let started = StartedRun { run: run.clone(), warnings: planned.warnings };
        let event = Event::RunRequested { run: Box::new(run), release, source: planned.source };
        Ok((started, self.machine.handle(self.clock.now(), event)))
    }
}

/// Whether the same commit may succeed later.
fn is_transient(error: &CommitError) -> bool {
    matches!(error, CommitError::Write(_))
}

/// Kinds of runs as reasons of a release.
pub(crate) fn reason(kind: &RunKind) -> String {
    match kind {
        RunKind::Up => "up".to_owned(),
        RunKind::Down { .. } => "down".to_owned(),
        RunKind::Restart { services } if services.is_empty() => "restart".to_owned(),
        RunKind::Restart { services } => {
            let names: Vec<String> = services.iter().map(ToString::to_string).collect();
            format!("restart {}", names.join(" "))
        }
        RunKind::Scale { replicas } => {
            let parts: Vec<String> = replicas.iter().map(|(name, count)| format!("{name}={count}")).collect();
            format!("scale {}", parts.join(" "))
        }
        RunKind::Rollback { to } => format!("rollback to release {to}"),
    }
}

/// Errors that a plan gave as diagnostics.
pub(crate) fn refused(diagnostic: Diagnostic) -> EngineError {
    EngineError::Refused(vec![diagnostic])
}
