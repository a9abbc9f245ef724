//! One instance, from its first launch until nothing is left of it.
//!
//! ```text
//!              launch                started              ready check passes
//!  Pending ------------> Launching ---------> Starting -----------------------> Ready <----> Unready
//!   ^  ^                    |                    |                                |             |
//!   |  | back-off           | cannot start       | exit, start deadline           | exit, liveness, watchdog
//!   |  +--------------------+--------------------+--------------------------------+-------------+
//!   |                                            v
//!   |  gone, restart wanted                    Exited / Stopping -- gone, no restart --> Ended
//!   +--------------------------------------------+
//!
//!  intent Drain: Ready, Unready --> Draining -- nothing in flight, or budget used --> Stopping -- gone --> Gone
//!  intent Stop:  any ----------------------------------------------------------------> Stopping -- gone --> Gone
//! ```
//!
//! The intent (run, drain, stop) is written down before the machine acts on it, so a recovered record leads back into
//! the same branch. A restart keeps the id and counts an attempt; events of another attempt never reach this machine.

mod ending;
mod leaving;
mod policy;
mod recover;

use std::time::Duration;

use orchestra_model::{
    Code, Diagnostic, EventKind, Name, Now,
    desired::Check,
    launch::{Exit, ProviderEvent, Termination},
    record::{InstanceIntent, InstanceRecord},
    route::EndpointState,
};

use self::leaving::in_words;
use crate::{
    Which,
    health::{Health, Verdict},
    restart::History,
    rng::Rng,
};

pub use self::policy::Policy;

/// Time that a data plane has to report an endpoint drained after its streams were cut.
pub(crate) const CUT_PATIENCE: Duration = Duration::from_secs(5);

/// Where an instance is in its life.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Waits for its launch.
    Pending {
        /// Not before; `None` waits for what `why` names.
        until: Option<Now>,
        /// For what.
        why: String,
    },
    /// The provider was asked to start it.
    Launching,
    /// Its process runs and was not ready yet.
    Starting,
    /// It is ready.
    Ready,
    /// It was ready and is not any more.
    Unready,
    /// It gets no new requests and finishes what it has.
    Draining {
        /// When requests must be done.
        requests_by: Now,
        /// When streams must be done.
        streams_by: Now,
        /// Since when the rest is being cut.
        cut: Option<Now>,
    },
    /// It was told to stop.
    Stopping {
        /// Why.
        why: String,
    },
    /// Its main process ended; the rest of its tree and its logs are being finished.
    Exited {
        /// How.
        exit: Exit,
    },
    /// Nothing runs and nothing will be started again.
    Ended {
        /// How its last process ended, if there was one.
        exit: Option<Exit>,
    },
    /// Nothing is left.
    Gone,
}

impl Phase {
    /// The word for people and JSON.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Pending { .. } => "pending",
            Self::Launching => "launching",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Unready => "unready",
            Self::Draining { .. } => "draining",
            Self::Stopping { .. } => "stopping",
            Self::Exited { .. } => "exited",
            Self::Ended { .. } => "ended",
            Self::Gone => "gone",
        }
    }
}

/// What happens to an instance.
#[derive(Clone, Debug)]
pub enum Event {
    /// Nothing stands in the way of its launch.
    MayLaunch,
    /// The provider recorded the launch.
    Launched,
    /// The provider refused; `retry` says when to try again, if that can help.
    LaunchFailed {
        /// Why.
        problem: Diagnostic,
        /// Pause before the next try.
        retry: Option<Duration>,
    },
    /// From the provider.
    Provider(ProviderEvent),
    /// A leaf of a check was answered.
    Probed {
        /// Which check.
        which: Which,
        /// Which leaf.
        leaf: usize,
        /// Whether it passed.
        passed: bool,
        /// In words.
        detail: String,
    },
    /// A service that a check depends on became ready or stopped being it.
    DependencyReady(Name, bool),
    /// Requests are withheld because a dependency was lost, or no longer.
    Held(bool),
    /// It shall leave: finish, then stop.
    Drain {
        /// Why.
        cause: String,
        /// Streams get no longer than requests (the service is being taken down).
        brief: bool,
    },
    /// It shall stop at once.
    Stop {
        /// Why.
        cause: String,
    },
    /// What is in flight to it while it drains.
    InFlight {
        /// Requests.
        requests: u32,
        /// Streams.
        streams: u32,
    },
    /// The data plane has acknowledged that no new request reaches it: its drain budget begins.
    Withdrawn,
    /// Nothing is in flight to it any more.
    Drained,
    /// Time passed.
    Tick,
}

/// What an instance wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Start its current attempt.
    Launch,
    /// End its current attempt.
    Terminate(Termination),
    /// End what is in flight to it.
    Cut,
    /// Begin to ask (or ask at another rate) the leaves of a check.
    StartProbes(Which),
    /// Stop asking these leaves of an attempt, by check and position.
    StopProbes(u32, Vec<(Which, usize)>),
    /// Write its record down.
    Persist,
    /// Drop the provider's record of this attempt.
    Forget(u32),
    /// Tell people.
    Note(EventKind, String),
}

/// One instance.
#[derive(Clone, Debug)]
pub struct Instance {
    record: InstanceRecord,
    policy: Policy,
    phase: Phase,
    since: Now,
    /// When its process started, for the start deadline.
    started: Option<Now>,
    ready: Option<Health>,
    live: Option<Health>,
    history: History,
    held: bool,
    pid: Option<u32>,
    status_text: Option<String>,
    in_flight: (u32, u32),
    brief_drain: bool,
    /// The data plane has acknowledged that no new request reaches it while it drains.
    withdrawn: bool,
    /// It is a job's and reached its goal.
    completed: bool,
    /// The last thing that went wrong.
    problem: Option<Diagnostic>,
    /// Was ready at least once in its life.
    proven: bool,
}

impl Instance {
    /// A new instance that waits for its launch.
    pub fn new(record: InstanceRecord, policy: Policy, ready: Option<Health>, live: Option<Health>, now: Now) -> Self {
        Self {
            record,
            policy,
            phase: Phase::Pending { until: None, why: "its turn".to_owned() },
            since: now,
            started: None,
            ready,
            live,
            history: History::default(),
            held: false,
            pid: None,
            status_text: None,
            in_flight: (0, 0),
            brief_drain: false,
            withdrawn: false,
            completed: false,
            problem: None,
            proven: false,
        }
    }

    /// Its record.
    pub fn record(&self) -> &InstanceRecord {
        &self.record
    }

    /// Gives it the ports of its next attempt.
    pub fn set_ports(&mut self, ports: std::collections::BTreeMap<Name, u16>) {
        self.record.ports = ports;
    }

    /// A route leads to it, perhaps one of a newer release than its own: it must be drained before it is stopped.
    pub fn routed(&mut self) {
        self.policy.routed = true;
    }

    /// Where it is in its life.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Since when.
    pub fn since(&self) -> Now {
        self.since
    }

    /// When its process started, or was found after a recovery.
    pub fn started(&self) -> Option<Now> {
        self.started
    }

    /// What is wanted of it.
    pub fn intent(&self) -> InstanceIntent {
        self.record.intent
    }

    /// Whether it is ready for requests.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready && !self.held
    }

    /// Whether it is ready, and its check as it is now has said so: not only one that it had before an update or a
    /// recovery.
    pub fn is_confirmed(&self) -> bool {
        self.is_ready() && self.ready.as_ref().is_none_or(|health| health.verdict() == Verdict::Passing)
    }

    /// Whether its process runs as far as is known.
    pub fn is_started(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Ready | Phase::Unready)
    }

    /// Whether it was given up.
    pub fn is_failed(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. }) && !self.completed
    }

    /// Whether it is a job's and reached its goal.
    pub fn is_completed(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. }) && self.completed
    }

    /// The last thing that went wrong since it was last ready.
    pub fn problem(&self) -> Option<&Diagnostic> {
        self.problem.as_ref()
    }

    /// Main process.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Restarts so far.
    pub fn restarts(&self) -> u32 {
        self.history.total
    }

    /// Restarts since it was last ready for long enough: what its budget counts.
    pub fn recent_restarts(&self) -> u32 {
        self.history.recent
    }

    /// Requests and streams in flight, while it drains.
    pub fn in_flight(&self) -> (u32, u32) {
        self.in_flight
    }

    /// Its check.
    pub fn health(&self, which: Which) -> Option<&Health> {
        match which {
            Which::Ready => self.ready.as_ref(),
            Which::Live => self.live.as_ref(),
        }
    }

    /// How it takes part in routing.
    pub fn endpoint(&self) -> Option<EndpointState> {
        match self.phase {
            Phase::Ready if !self.held => Some(EndpointState::Active),
            Phase::Draining { .. } => Some(EndpointState::Draining),
            _ => None,
        }
    }

    /// Whether requests are withheld from it because a dependency was lost.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// What it waits for, in words; `None` if it waits for nothing.
    pub fn waits_for(&self) -> Option<String> {
        match &self.phase {
            Phase::Pending { why, .. } => Some(why.clone()),
            Phase::Launching => Some("the provider to start it".to_owned()),
            Phase::Starting | Phase::Unready if self.policy.completes => Some("its process to exit".to_owned()),
            Phase::Starting | Phase::Unready => {
                let detail = self.ready.as_ref().map(Health::detail).unwrap_or_default();
                let status = self.status_text.as_deref().map(|s| format!(" (it says: {s})")).unwrap_or_default();
                Some(format!("its ready check: {detail}{status}"))
            }
            Phase::Ready if self.held => Some("a dependency that was lost".to_owned()),
            Phase::Ready if !self.is_confirmed() => Some("its ready check to pass as it is now".to_owned()),
            Phase::Draining { .. } => Some(format!("{} in flight", in_words(self.in_flight))),
            Phase::Stopping { .. } => Some("its processes to exit".to_owned()),
            Phase::Exited { .. } => Some("the rest of its processes to exit".to_owned()),
            Phase::Ready | Phase::Ended { .. } | Phase::Gone => None,
        }
    }

    /// What it said last of itself (`STATUS=`).
    pub fn status_text(&self) -> Option<&str> {
        self.status_text.as_deref()
    }

    /// When the pause before its next launch is over, while it waits for nothing else.
    pub fn due(&self) -> Option<Now> {
        match &self.phase {
            Phase::Pending { until, .. } => *until,
            _ => None,
        }
    }

    /// Takes over changed policies and checks of a release that does not replace it. Returns what follows.
    pub fn update(
        &mut self,
        now: Now,
        policy: Policy,
        ready: Option<Health>,
        live: Option<Health>,
        rng: &mut Rng,
    ) -> Vec<Command> {
        // What was routed once may still have requests in flight, though no route leads to it any more.
        let routed = self.policy.routed || policy.routed;
        self.policy = Policy { routed, ..policy };
        if !self.is_failed() {
            // It gets another chance.
            self.problem = None;
        }
        let mut commands = Vec::new();
        let changed = |old: &Option<Health>, new: &Option<Health>| {
            old.as_ref().map(Health::probe) != new.as_ref().map(Health::probe)
        };
        if changed(&self.ready, &ready) || changed(&self.live, &live) {
            let stop = self.stop_probes();
            let facts: Vec<(Check, Verdict)> = self.ready.iter().chain(&self.live).flat_map(Health::facts).collect();
            (self.ready, self.live) = (ready, live);
            for (check, verdict) in facts.into_iter().filter(|(_, verdict)| *verdict != Verdict::Unknown) {
                self.set_fact(|c| *c == check, verdict == Verdict::Passing, "");
            }
            if self.is_started() {
                commands.push(stop);
                commands.push(Command::StartProbes(Which::Ready));
                if self.phase != Phase::Starting {
                    commands.push(Command::StartProbes(Which::Live));
                }
                commands.extend(self.judge(now, rng));
            }
        }
        commands
    }

    fn stop_probes(&self) -> Command {
        let leaves = |which| {
            self.health(which).into_iter().flat_map(move |health| health.leaves().map(move |(leaf, _)| (which, leaf)))
        };
        Command::StopProbes(self.record.attempt, leaves(Which::Ready).chain(leaves(Which::Live)).collect())
    }

    /// Advances on one event. No I/O, no clock.
    pub fn handle(&mut self, now: Now, event: Event, rng: &mut Rng) -> Vec<Command> {
        match event {
            Event::MayLaunch => self.may_launch(now),
            Event::Launched => Vec::new(),
            Event::LaunchFailed { problem, retry } => self.launch_failed(now, problem, retry),
            Event::Provider(event) => self.provider(now, event, rng),
            Event::Probed { which, leaf, passed, detail } => {
                let health = match which {
                    Which::Ready => &mut self.ready,
                    Which::Live => &mut self.live,
                };
                if let Some(health) = health {
                    health.answered(leaf, passed, &detail);
                }
                self.judge(now, rng)
            }
            Event::DependencyReady(service, is_ready) => {
                let detail = if is_ready { "" } else { "not ready" };
                self.set_fact(|c| matches!(c, Check::Dependency { service: s } if *s == service), is_ready, detail);
                self.judge(now, rng)
            }
            Event::Held(held) => {
                self.held = held;
                Vec::new()
            }
            Event::Drain { cause, brief } => self.drain(now, cause, brief),
            Event::Stop { cause } => self.stop(now, cause),
            Event::InFlight { requests, streams } => {
                self.in_flight = (requests, streams);
                Vec::new()
            }
            Event::Withdrawn => {
                self.withdraw(now);
                Vec::new()
            }
            Event::Drained => match self.phase {
                Phase::Draining { .. } => self.begin_stop(now, "drained".to_owned()),
                _ => Vec::new(),
            },
            Event::Tick => self.tick(now),
        }
    }

    /// When the driver must call again with [`Event::Tick`].
    pub fn deadline(&self) -> Option<Now> {
        match &self.phase {
            Phase::Pending { until, .. } => *until,
            Phase::Starting => self.started.map(|at| at + self.policy.start_deadline.duration()),
            // Then it is written down that its restarts are forgotten: only what is written down counts after a recovery.
            Phase::Ready => (self.history.recent > 0).then(|| self.since + self.policy.restart.reset_after.duration()),
            Phase::Draining { requests_by, streams_by, cut } => Some(match cut {
                Some(at) => *at + CUT_PATIENCE,
                None if self.in_flight.1 == 0 => *requests_by,
                None if self.in_flight.0 == 0 => *streams_by,
                // A cut ends both, so neither is cut short for the other.
                None => (*requests_by).max(*streams_by),
            }),
            _ => None,
        }
    }

    fn enter(&mut self, phase: Phase, now: Now) {
        self.phase = phase;
        self.since = now;
    }

    fn set_fact(&mut self, matches: impl Fn(&Check) -> bool, passing: bool, detail: &str) {
        let verdict = if passing { Verdict::Passing } else { Verdict::Failing };
        for health in [&mut self.ready, &mut self.live].into_iter().flatten() {
            health.set(&matches, verdict, detail);
        }
    }

    /// The environment lets it be launched; a back-off may still stand in the way.
    fn may_launch(&mut self, now: Now) -> Vec<Command> {
        match &self.phase {
            Phase::Pending { until, .. }
                if self.record.intent == InstanceIntent::Run && until.is_none_or(|at| at <= now) =>
            {
                self.enter(Phase::Launching, now);
                let cause = if self.record.attempt == 1 {
                    "wanted".to_owned()
                } else {
                    format!("restart {}", self.record.attempt - 1)
                };
                vec![Command::Persist, Command::Note(EventKind::InstanceLaunching, cause), Command::Launch]
            }
            _ => Vec::new(),
        }
    }

    /// Says why it does not launch yet.
    pub fn wait_for(&mut self, reason: String) {
        if let Phase::Pending { until: None, why } = &mut self.phase {
            *why = reason;
        }
    }

    fn provider(&mut self, now: Now, event: ProviderEvent, rng: &mut Rng) -> Vec<Command> {
        match event {
            ProviderEvent::Started { pid } => {
                self.pid = Some(pid);
                if self.phase != Phase::Launching {
                    return Vec::new();
                }
                self.started = Some(now);
                self.enter(Phase::Starting, now);
                let mut commands = vec![
                    Command::Note(EventKind::InstanceStarting, format!("process {pid} runs")),
                    Command::StartProbes(Which::Ready),
                ];
                commands.extend(self.judge(now, rng));
                commands
            }
            ProviderEvent::NotifiedReady => {
                self.set_fact(|c| matches!(c, Check::Notify), true, "");
                self.judge(now, rng)
            }
            // As with systemd, a reload is no reason to withhold requests: READY=1 confirms its end.
            ProviderEvent::NotifiedReloading => Vec::new(),
            ProviderEvent::NotifiedStopping => {
                self.set_fact(|c| matches!(c, Check::Notify), false, "it sent STOPPING=1");
                self.judge(now, rng)
            }
            ProviderEvent::NotifiedStatus(text) => {
                self.status_text = Some(text);
                Vec::new()
            }
            ProviderEvent::WatchdogMissed => {
                self.restart_it(now, Code::EXITED, "it missed its watchdog interval".to_owned())
            }
            ProviderEvent::LineMatched => {
                self.set_fact(|c| matches!(c, Check::Log), true, "");
                self.judge(now, rng)
            }
            ProviderEvent::Exited { exit, message } => self.exited(now, exit, message.as_deref()),
            ProviderEvent::Gone => self.gone(now, rng),
        }
    }

    /// Draws the consequences of the checks' verdicts.
    fn judge(&mut self, now: Now, _rng: &mut Rng) -> Vec<Command> {
        if self.policy.completes {
            return Vec::new();
        }
        let ready = self.ready.as_ref().map_or(Verdict::Passing, Health::verdict);
        match self.phase {
            Phase::Starting if ready == Verdict::Passing => {
                let cause = if self.ready.is_some() {
                    "ready check passed"
                } else {
                    "its process runs and it has no ready check"
                };
                self.become_ready(now, cause)
            }
            Phase::Unready if ready == Verdict::Passing => self.become_ready(now, "ready check passed again"),
            Phase::Ready if ready == Verdict::Failing => {
                let ready_for = now.since(self.since);
                self.history.observe_readiness(&self.policy.restart, ready_for);
                let detail = self.ready.as_ref().map(Health::detail).unwrap_or_default();
                self.enter(Phase::Unready, now);
                vec![Command::Note(EventKind::InstanceUnready, format!("ready check failed: {detail}"))]
            }
            Phase::Ready | Phase::Unready if self.live.as_ref().is_some_and(|l| l.verdict() == Verdict::Failing) => {
                let detail = self.live.as_ref().map(Health::detail).unwrap_or_default();
                self.restart_it(now, Code::EXITED, format!("live check failed: {detail}"))
            }
            _ => Vec::new(),
        }
    }

    fn become_ready(&mut self, now: Now, cause: &str) -> Vec<Command> {
        let first = self.phase == Phase::Starting;
        self.enter(Phase::Ready, now);
        self.problem = None;
        self.proven = true;
        let mut commands = Vec::new();
        if !self.record.was_ready {
            self.record.was_ready = true;
            commands.push(Command::Persist);
        }
        commands.push(Command::Note(EventKind::InstanceReady, cause.to_owned()));
        if first {
            // From now on the slower interval holds, and liveness counts.
            commands.push(Command::StartProbes(Which::Ready));
            commands.push(Command::StartProbes(Which::Live));
        }
        commands
    }

    /// Whether the leaves of the ready check are to be asked at the starting rate.
    pub fn is_first_start(&self) -> bool {
        self.phase == Phase::Starting
    }

    fn tick(&mut self, now: Now) -> Vec<Command> {
        if self.deadline().is_none_or(|at| at > now) {
            return Vec::new();
        }
        match self.phase {
            Phase::Starting => {
                let limit = self.policy.start_deadline;
                if self.policy.completes {
                    let why = format!("it did not end within {limit}");
                    return self.restart_it(now, Code::JOB_FAILED, why);
                }
                let detail = self.ready.as_ref().map(Health::detail).unwrap_or_default();
                let why = format!("not ready within {limit}: {detail}");
                self.restart_it(now, Code::NOT_READY, why)
            }
            Phase::Draining { requests_by, streams_by, cut: None } => {
                self.phase = Phase::Draining { requests_by, streams_by, cut: Some(now) };
                let cause = format!("drain budget used; cutting {}", in_words(self.in_flight));
                vec![Command::Note(EventKind::InstanceDraining, cause), Command::Cut]
            }
            Phase::Draining { cut: Some(_), .. } => self.begin_stop(now, "cut".to_owned()),
            Phase::Ready => {
                self.note_readiness(now);
                self.record.recent_restarts = self.history.recent;
                vec![Command::Persist]
            }
            // A back-off that ended: the environment sees it by `may_launch`.
            _ => Vec::new(),
        }
    }
}
