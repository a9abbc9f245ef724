//! What servers that die must not change: deadlines, budgets of restarts, addresses and drains; and what people are told.
//!
//! The world: programs run at once, and exit or stay silent if their version is listed as such; the data plane answers at
//! once; a server dies when told to, and the next one finds what was committed.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Code, Desired, Resource,
    desired::{Check, Probe, Service, Strategy, Target},
    flag::FlagSet,
    launch::{Exit, Launch, Observed},
    plan::{Action, Step, Wait},
    quantity::{Amount, Timespan},
    record::{EnvironmentState, InstanceRecord, ReleaseState, RunKind, RunState},
    rollout::{AnalysisStep, Guard, Hook, HookCall, PauseStep, PrometheusMetric, RolloutStep, Stepped},
    route::Route,
};

use super::*;
use crate::environment::fixture::{self, World as _, requested, rolling, service, step};

fn api() -> ResourceId {
    service_id(&"api".parse().unwrap())
}

fn until_promoted() -> RolloutStep {
    let expires = Timespan::seconds(1000);
    let on_expiry = orchestra_model::rollout::OnExpiry::RollBack;
    RolloutStep::Pause(PauseStep { duration: None, owner: None, expires, on_expiry })
}

/// In these steps, and the old set is kept for a while after that.
fn stepped(steps: Vec<RolloutStep>) -> Strategy {
    Strategy::BlueGreen(Stepped { steps, keep_warm: Timespan::seconds(100), guard: None })
}

/// Both sets beside each other until a person promotes, and the old one for a while after that.
fn beside() -> Strategy {
    stepped(vec![until_promoted()])
}

/// What the data plane chooses.
const CHOSEN: u16 = 40_000;

/// A program.
struct Process {
    launch: Launch,
    exited: bool,
    forgotten: bool,
}

struct World {
    machine: Environment,
    disk: EnvironmentState,
    now: Now,
    epoch: UnixMillis,
    processes: Vec<Process>,
    routes: Vec<Route>,
    notes: Vec<(EventKind, String)>,
    /// Versions that exit as soon as they run.
    doomed: BTreeSet<String>,
    /// Whether the data plane answers.
    answers: bool,
    /// Hooks that were asked.
    hooks: u32,
    /// When somebody was asked for numbers.
    consulted: Vec<Now>,
}

impl fixture::World for World {
    fn parts(&mut self) -> fixture::Parts<'_> {
        (&mut self.machine, &mut self.disk, &mut self.notes, self.now)
    }

    fn effect(&mut self, effect: Effect) -> Vec<Event> {
        let told = |key: &LaunchKey, event| Event::Provider { key: key.clone(), event };
        let ended = |key: &LaunchKey, code| {
            vec![
                told(key, ProviderEvent::Exited { exit: Exit::Code(code), message: None }),
                told(key, ProviderEvent::Gone),
            ]
        };
        match effect {
            Effect::Launch(launch) => {
                let key = launch.key.clone();
                let exited = self.doomed.contains(&launch.command[1]);
                self.processes.push(Process { launch: *launch, exited, forgotten: false });
                let mut events = vec![Event::Launched(key.clone()), told(&key, ProviderEvent::Started { pid: 7 })];
                if exited {
                    events.extend(ended(&key, 1));
                }
                events
            }
            Effect::Terminate { key, .. } => {
                let process = self.processes.iter_mut().find(|process| process.launch.key == key);
                process.expect("it was launched").exited = true;
                ended(&key, 0)
            }
            Effect::Forget(key) => {
                let process = self.processes.iter_mut().find(|process| process.launch.key == key);
                process.expect("it was launched").forgotten = true;
                Vec::new()
            }
            Effect::RunHook { .. } => {
                self.hooks += 1;
                Vec::new()
            }
            Effect::Consult { .. } => {
                self.consulted.push(self.now);
                Vec::new()
            }
            Effect::SetRoutes { revision, .. } if !self.answers => {
                vec![Event::RoutesRefused { revision, problems: BTreeMap::new() }]
            }
            Effect::SetRoutes { revision, routes } => {
                let address = |route: &Route| {
                    let port = if route.listen.port() == 0 { CHOSEN } else { route.listen.port() };
                    (route.id.clone(), SocketAddr::new(route.listen.ip(), port))
                };
                let addresses = routes.iter().map(address).collect();
                self.routes = routes;
                vec![Event::RoutesApplied { revision, addresses }]
            }
            _ => Vec::new(),
        }
    }
}

impl World {
    fn new() -> Self {
        let record = EnvironmentRecord::new("demo/dev".parse().unwrap());
        let epoch = 1_000_000_000;
        Self {
            machine: Environment::new(record.clone(), Arc::new(fixture::settings(epoch))),
            disk: EnvironmentState::new(record),
            now: Now::at(Duration::from_secs(1)),
            epoch,
            processes: Vec::new(),
            routes: Vec::new(),
            notes: Vec::new(),
            doomed: BTreeSet::new(),
            answers: true,
            hooks: 0,
            consulted: Vec::new(),
        }
    }

    fn up(&mut self, wanted: &Service) {
        self.up_all(&[(api(), wanted)]);
    }

    /// Each needs the one before it to be started.
    fn up_all(&mut self, wanted: &[(ResourceId, &Service)]) {
        let record = self.machine.record().clone();
        let desired = Desired {
            environment: record.id.clone(),
            target: Target::Process,
            resources: wanted.iter().map(|(id, service)| (id.clone(), Resource::Service((*service).clone()))).collect(),
            flags: FlagSet::default(),
            preview: None,
            secrets: BTreeMap::new(),
        };
        let mut steps: Vec<Step> = wanted.iter().map(|(id, _)| step(id.clone(), Action::Update)).collect();
        for index in 1..steps.len() {
            let before = steps[index - 1].resource.clone();
            steps[index].after.insert(before, Wait::Until(Condition::Started));
        }
        let plan = fixture::plan(&record, Some(desired), steps);
        self.send(requested(&record, RunKind::Up, plan));
    }

    /// Lets time pass, with the timers of the machine.
    fn pass(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while let Some(deadline) = self.machine.deadline().filter(|at| *at <= end) {
            self.now = self.now.max(deadline);
            self.send(Event::Tick);
        }
        self.now = end;
    }

    /// The server dies, and the next one begins at once. The clock may be set meanwhile.
    fn die(&mut self, clock: i64) {
        self.epoch = self.epoch.saturating_add_signed(clock);
        let observed = |record: &InstanceRecord| {
            let is_it = |process: &&Process| {
                process.launch.key.instance == record.id && process.launch.key.attempt == record.attempt
            };
            let process = self.processes.iter().find(is_it).filter(|process| !process.forgotten)?;
            Some(Observed {
                pid: (!process.exited).then_some(7),
                exit: process.exited.then_some(Exit::Code(1)),
                gone: process.exited,
                ..Observed::new(process.launch.key.clone())
            })
        };
        let observed = self.disk.instances.iter().map(|(id, record)| (id.clone(), observed(record))).collect();
        let settings = Arc::new(fixture::settings(self.epoch));
        let run = self.disk.run.clone().filter(|run| !run.state.is_final());
        let state = EnvironmentState { run, ..self.disk.clone() };
        let (machine, batch) = Environment::recover(state, &observed, settings, self.now);
        self.machine = machine;
        self.carry_out(batch);
    }

    fn ended(&self) -> Option<RunState> {
        self.disk.run.as_ref().map(|run| run.state).filter(|state| state.is_final())
    }

    fn said(&self, kind: EventKind, words: &str) -> bool {
        self.notes.iter().any(|(noted, cause)| *noted == kind && cause.contains(words))
    }

    fn ports(&self) -> Vec<&str> {
        self.routes.iter().map(|route| route.id.port.as_str()).collect()
    }

    fn waits_for(&self) -> String {
        self.machine.resource_status(self.now, api()).waits_for.unwrap_or_default()
    }
}

/// Never ready, and never given up for it.
fn silent(version: u32, strategy: Strategy) -> Service {
    let mut wanted = service(version, strategy);
    let second = Timespan::seconds(1);
    wanted.health.ready = Some(Probe {
        check: Check::Notify,
        every: second,
        every_starting: second,
        timeout: second,
        pass_after: 1,
        fail_after: 1,
    });
    wanted.health.start_deadline = Timespan::seconds(100_000);
    wanted
}

#[test]
fn a_server_that_dies_again_and_again_puts_no_deadline_off() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    assert_eq!(world.ended(), Some(RunState::Succeeded));
    assert!(world.disk.environment.deadlines.is_none());
    world.up(&silent(2, rolling()));
    let began = world.now;
    while world.ended() != Some(RunState::Failed) {
        assert!(world.now.since(began) <= Duration::from_secs(310), "it goes on: {}", world.waits_for());
        world.pass(7);
        world.die(0);
    }
    assert!(world.now.since(began) >= Duration::from_secs(300), "turned back after {:?}", world.now.since(began));
    assert!(world.disk.environment.deadlines.is_none());
    assert_eq!(world.disk.environment.stable, Some(ReleaseNumber(1)));
    assert!(world.said(EventKind::StepFailed, "did not finish in time"));
}

#[test]
fn a_clock_that_is_set_back_gives_a_step_its_own_time_at_most() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    world.up(&silent(2, rolling()));
    world.pass(200);
    world.die(-3_600_000);
    world.pass(299);
    assert_eq!(world.disk.run.as_ref().unwrap().state, RunState::Running);
    world.pass(2);
    assert_eq!(world.ended(), Some(RunState::Failed));
}

#[test]
fn the_time_of_a_person_does_not_count_for_a_rollout_without_steps() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    world.up(&silent(2, rolling()));
    world.pass(100);
    let ask = |command| Event::Rollout { service: None, command, by: "ada".to_owned() };
    world.send(ask(RolloutCommand::Pause));
    world.pass(1000);
    world.die(0);
    assert!(world.waits_for().contains("ada to promote or abort"), "{}", world.waits_for());
    world.send(ask(RolloutCommand::Promote));
    world.pass(199);
    assert_eq!(world.disk.run.as_ref().unwrap().state, RunState::Running);
    world.pass(2);
    assert_eq!(world.ended(), Some(RunState::Failed));
}

#[test]
fn how_often_it_was_restarted_in_vain_is_said_in_words() {
    for (budget, words) in [
        (0, "instance api-r1-1 exited, and no restart is allowed: "),
        (1, "instance api-r1-1 was restarted once without success: "),
        (2, "instance api-r1-1 was restarted 2 times without success: "),
    ] {
        let mut world = World::new();
        let mut wanted = service(1, rolling());
        wanted.restart.budget = Some(budget);
        world.up(&wanted);
        world.doomed.insert("1".to_owned());
        world.processes[0].exited = true;
        world.die(0);
        for _ in 0..10 {
            world.pass(2);
        }
        assert!(world.said(EventKind::InstanceFailed, words), "{budget}: {:?}", world.notes);
    }
}

#[test]
fn restarts_are_counted_whatever_servers_die() {
    let mut world = World::new();
    let mut wanted = service(1, rolling());
    wanted.restart.budget = Some(3);
    world.up(&wanted);
    world.doomed.insert("1".to_owned());
    let key = world.processes[0].launch.key.clone();
    world.processes[0].exited = true;
    world.die(0);
    for _ in 0..20 {
        world.pass(2);
        world.die(0);
    }
    assert_eq!(world.processes.len(), 4, "once, and three times again");
    assert!(world.said(EventKind::InstanceFailed, "restarted 3 times without success"));
    let record = &world.disk.instances[&key.instance];
    assert_eq!((record.recent_restarts, record.restarts, record.attempt), (3, 3, 4));
    // Records of before do not have the numbers.
    let mut old = serde_json::to_value(record).unwrap();
    old.as_object_mut().unwrap().retain(|name, _| name != "recent_restarts" && name != "restarts");
    assert_eq!(serde_json::from_value::<InstanceRecord>(old).unwrap().recent_restarts, 0);
}

#[test]
fn restarts_are_forgotten_after_a_time_of_readiness_and_stay_so() {
    let mut world = World::new();
    let mut wanted = service(1, rolling());
    wanted.restart.budget = Some(3);
    wanted.restart.reset_after = Timespan::seconds(60);
    world.up(&wanted);
    let key = world.processes[0].launch.key.clone();
    let exited = ProviderEvent::Exited { exit: Exit::Code(1), message: None };
    world.processes[0].exited = true;
    for event in [exited, ProviderEvent::Gone] {
        world.send(Event::Provider { key: key.clone(), event });
    }
    world.pass(30);
    assert_eq!(world.disk.instances[&key.instance].recent_restarts, 1);
    world.pass(40);
    assert_eq!(world.disk.instances[&key.instance].recent_restarts, 0);
    assert_eq!(world.disk.instances[&key.instance].restarts, 1);
}

#[test]
fn a_port_that_a_release_on_trial_removes_stays_until_it_is_promoted() {
    let mut world = World::new();
    let mut first = service(1, rolling());
    let http = first.ports.first_key_value().unwrap().1.clone();
    first.program.ports.insert("admin".parse().unwrap());
    first.ports.insert("admin".parse().unwrap(), orchestra_model::desired::Port { port: Some(9000), ..http.clone() });
    world.up(&first);
    assert_eq!(world.ports(), ["admin", "http"]);
    // It still has the port, but does not publish it: what goes there is for the old set alone.
    let mut second = service(2, beside());
    second.program.ports.insert("admin".parse().unwrap());
    world.up(&second);
    assert_eq!(world.ports(), ["http", "admin"]);
    let admin = &world.routes[1];
    assert_eq!((admin.listen.port(), &admin.split.canary), (9000, &None));
    let ends: Vec<String> = admin.backends.iter().flat_map(|b| &b.endpoints).map(|e| e.instance.to_string()).collect();
    assert_eq!(ends, ["api-r1-1"]);
    world.die(0);
    assert_eq!(world.ports(), ["http", "admin"]);
    world.send(Event::Rollout { service: None, command: RolloutCommand::Promote, by: "ada".to_owned() });
    assert_eq!(world.ended(), Some(RunState::Succeeded));
    assert_eq!(world.ports(), ["http"]);
}

#[test]
fn a_port_that_a_release_on_trial_moves_is_served_at_both_addresses_until_it_is_promoted() {
    for promoted in [true, false] {
        let mut world = World::new();
        world.release(&[("api", &at(9000, 1, rolling()))]);
        world.release(&[("api", &at(9001, 2, beside()))]);
        assert_eq!((world.ports(), world.listens()), (vec!["http", "http-before"], vec![("api", 9001), ("api", 9000)]));
        assert_eq!(world.routes[0].backends, world.routes[1].backends);
        world.die(0);
        assert_eq!(world.listens(), [("api", 9001), ("api", 9000)]);
        let command = if promoted { RolloutCommand::Promote } else { RolloutCommand::Abort };
        world.send(Event::Rollout { service: None, command, by: "ada".to_owned() });
        assert!(world.ended().is_some());
        assert_eq!(world.listens(), [("api", if promoted { 9001 } else { 9000 })]);
    }
}

#[test]
fn a_port_that_a_release_on_trial_gives_to_another_one_is_not_claimed_twice() {
    let mut world = World::new();
    let mut first = service(1, rolling());
    first.ports.values_mut().for_each(|port| port.port = Some(9000));
    world.up(&first);
    let mut second = service(2, beside());
    let http = first.ports.first_key_value().unwrap().1.clone();
    second.ports = [("web".parse().unwrap(), http)].into();
    second.program.ports = ["web".parse().unwrap()].into();
    world.up(&second);
    assert_eq!(world.ports(), ["web"]);
}

/// A service with a number.
fn at(number: u16, version: u32, strategy: Strategy) -> Service {
    let mut wanted = service(version, strategy);
    wanted.ports.values_mut().for_each(|port| port.port = Some(number));
    wanted
}

impl World {
    /// Who is listened for, and where; 0 is somewhere that nobody knows.
    fn listens(&self) -> Vec<(&str, u16)> {
        let number = |route: &Route| Some(route.listen.port()).filter(|port| *port != CHOSEN).unwrap_or(0);
        self.routes.iter().map(|route| (route.id.service.as_str(), number(route))).collect()
    }

    /// A release with these services; those of the one before that it has not are removed once these are ready.
    fn release(&mut self, wanted: &[(&str, &Service)]) {
        let record = self.machine.record().clone();
        let id = |name: &str| service_id(&name.parse().unwrap());
        let desired = Desired {
            environment: record.id.clone(),
            target: Target::Process,
            resources: wanted.iter().map(|(name, it)| (id(name), Resource::Service((*it).clone()))).collect(),
            flags: FlagSet::default(),
            preview: None,
            secrets: BTreeMap::new(),
        };
        let mut steps: Vec<Step> = wanted.iter().map(|(name, _)| step(id(name), Action::Update)).collect();
        for index in 1..steps.len() {
            let before = steps[index - 1].resource.clone();
            steps[index].after.insert(before, Wait::Until(Condition::Ready));
        }
        for gone in self.disk.resources.keys().filter(|gone| !desired.resources.contains_key(*gone)) {
            let mut step = step(gone.clone(), Action::Delete);
            step.after = wanted.iter().map(|(name, _)| (id(name), Wait::Until(Condition::Ready))).collect();
            steps.push(step);
        }
        let plan = fixture::plan(&record, Some(desired), steps);
        self.send(requested(&record, RunKind::Up, plan));
    }
}

#[test]
fn a_service_that_is_renamed_keeps_its_address_until_the_new_one_is_ready() {
    let mut world = World::new();
    world.release(&[("api", &at(9000, 1, rolling()))]);
    let mut slow = silent(2, rolling());
    slow.ports = at(9000, 2, rolling()).ports;
    slow.health.start_deadline = Timespan::seconds(5);
    world.release(&[("front", &slow)]);
    assert_eq!(world.listens(), [("api", 9000), ("front", 0)]);
    // It never becomes ready: nothing was taken away.
    world.pass(10);
    assert_eq!(world.ended(), Some(RunState::Failed));
    assert_eq!((world.listens(), world.processes[0].exited), (vec![("api", 9000)], false));
    world.release(&[("front", &at(9000, 3, rolling()))]);
    assert_eq!(world.ended(), None, "the old one is drained at an address that nobody knows");
    assert_eq!(world.listens(), [("api", 0), ("front", 9000)]);
    world.die(0);
    assert_eq!(world.listens(), [("api", 0), ("front", 9000)]);
    world.pass(60);
    assert_eq!((world.ended(), world.listens()), (Some(RunState::Succeeded), vec![("front", 9000)]));
}

#[test]
fn services_that_swap_or_pass_on_their_ports_change_them_at_one_moment() {
    for (first, second) in [((9000, 9001), (9001, 9000)), ((9000, 9001), (9001, 9002))] {
        let mut world = World::new();
        world.release(&[("api", &at(first.0, 1, rolling())), ("web", &at(first.1, 1, rolling()))]);
        // The first one waits for a person, and the step of the second for the first.
        world.release(&[("api", &at(second.0, 2, beside())), ("web", &at(second.1, 1, rolling()))]);
        assert_eq!(world.ended(), None);
        // What nobody wants stays beside the new one until a person has decided.
        let before = [("api", first.0)].into_iter().filter(|_| first.0 != second.1);
        let expected: Vec<(&str, u16)> =
            [("api", second.0)].into_iter().chain(before).chain([("web", second.1)]).collect();
        assert_eq!(world.listens(), expected);
        world.send(Event::Rollout { service: None, command: RolloutCommand::Abort, by: "ada".to_owned() });
        assert_eq!(world.listens(), [("api", first.0), ("web", first.1)]);
    }
}

#[test]
fn what_is_kept_leaves_as_its_own_release_says_also_after_a_recovery() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    // Without a port it has nothing to drain.
    let mut second = service(2, beside());
    second.ports.clear();
    world.up(&second);
    world.send(Event::Rollout { service: None, command: RolloutCommand::Promote, by: "ada".to_owned() });
    assert_eq!(world.ended(), Some(RunState::Succeeded));
    world.die(0);
    world.notes.clear();
    world.pass(101);
    assert!(world.said(EventKind::InstanceDraining, "replaced by release 2"), "{:?}", world.notes);
}

#[test]
fn it_is_said_that_an_old_set_stays_because_the_new_one_cannot_serve() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    world.up(&service(2, beside()));
    world.send(Event::Rollout { service: None, command: RolloutCommand::Promote, by: "ada".to_owned() });
    assert_eq!(world.ended(), Some(RunState::Succeeded));
    let new = world.processes.last_mut().unwrap();
    new.exited = true;
    let key = new.launch.key.clone();
    for event in [ProviderEvent::Exited { exit: Exit::Code(1), message: None }, ProviderEvent::Gone] {
        world.send(Event::Provider { key: key.clone(), event });
    }
    world.pass(101);
    let words = "release 2 to be able to serve (0 of 1 instances are ready); 1 instance of an earlier release stays";
    assert!(world.said(EventKind::StepWaiting, words), "{:?}", world.notes);
    assert!(world.waits_for().contains(words), "{}", world.waits_for());
    assert!(!world.processes[0].exited, "the old one serves");
}

#[test]
fn a_rollout_that_runs_out_of_time_names_the_instance_that_it_waited_for() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    let mut slow = silent(2, stepped(vec![RolloutStep::Scale(Amount::Count(1)), until_promoted()]));
    slow.rollout.deadline = Timespan::seconds(5);
    world.up(&slow);
    world.pass(10);
    assert_eq!(world.ended(), Some(RunState::Failed));
    let problem = &world.disk.run.as_ref().unwrap().problems[0];
    assert_eq!(problem.code, Code::RUN_TIMED_OUT);
    assert!(problem.notes.iter().any(|note| note.starts_with("api-r2-1 waits for its ready check")), "{problem:?}");
}

#[test]
fn no_hook_is_asked_about_what_is_turned_back() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    let call = HookCall::Webhook { url: "http://127.0.0.1:9".to_owned() };
    let hook = Hook { name: "smoke".to_owned(), call, timeout: Timespan::seconds(5), retries: 3 };
    let steps = vec![RolloutStep::Scale(Amount::Count(1)), RolloutStep::Hook(hook)];
    world.up(&service(2, stepped(steps)));
    assert_eq!(world.hooks, 1);
    // A server that lives would be asked again; but the first thing that the next one sees is that the release is bad.
    world.processes.last_mut().unwrap().exited = true;
    world.die(0);
    assert_eq!(world.ended(), Some(RunState::Failed));
    assert_eq!(world.hooks, 1);
}

/// A worker has no port: no route is acknowledged and no traffic reported that would wake anybody.
#[test]
fn a_prometheus_server_is_asked_as_soon_as_an_analysis_begins() {
    let mut world = World::new();
    let without_ports = |version, strategy| {
        let mut wanted = service(version, strategy);
        wanted.ports.clear();
        wanted.program.ports.clear();
        wanted
    };
    world.up(&without_ports(1, rolling()));
    let metric = PrometheusMetric {
        name: "queue".to_owned(),
        address: "http://127.0.0.1:9090".to_owned(),
        query: "up".to_owned(),
        success: Some("result == 1".to_owned()),
        failure: None,
        every: Timespan::seconds(1),
        initial_delay: Timespan::default(),
        timeout: Timespan::seconds(1),
        count: None,
        failure_limit: None,
        inconclusive_limit: None,
        error_limit: None,
        success_limit: None,
        token: None,
        ca: None,
        dry_run: false,
    };
    let guard = Some(Guard { prometheus: vec![metric], ..fixture::guard() });
    let analysis = AnalysisStep { duration: Timespan::seconds(60), inconclusive: None };
    let steps = vec![RolloutStep::Scale(Amount::Count(1)), RolloutStep::Analysis(analysis)];
    let canary = Strategy::Canary(Stepped { steps, keep_warm: Timespan::default(), guard });
    world.up(&without_ports(2, canary));
    assert_eq!(world.consulted, [world.now]);
}

/// What is still asked of a hook then is ended: a check of a set that is gone proves nothing and may do harm.
#[test]
fn an_answer_is_waited_for_until_somebody_goes_on_or_back() {
    for command in [RolloutCommand::Promote, RolloutCommand::PromoteFully, RolloutCommand::Abort] {
        let mut world = World::new();
        world.up(&service(1, rolling()));
        let call = HookCall::Webhook { url: "http://127.0.0.1:9".to_owned() };
        let hook = Hook { name: "smoke".to_owned(), call, timeout: Timespan::seconds(5), retries: 3 };
        let steps = vec![RolloutStep::Scale(Amount::Count(1)), RolloutStep::Hook(hook), until_promoted()];
        world.up(&service(2, stepped(steps)));
        let key = |call| HookKey { service: api().name, release: ReleaseNumber(2), step: 1, call };
        assert!(world.machine.waits_for_hook(&key(1)) && !world.machine.waits_for_hook(&key(2)));
        let said = format!("{command:?}");
        if command == RolloutCommand::Abort {
            world.send(Event::Rollout { service: None, command: RolloutCommand::Pause, by: "ada".to_owned() });
            assert!(world.machine.waits_for_hook(&key(1)), "a rollout that is paused hears it all the same");
        }
        world.send(Event::Rollout { service: None, command, by: "ada".to_owned() });
        assert!(!world.machine.waits_for_hook(&key(1)), "{said}");
    }
}

/// As many as a stack file may ask for are launched in one go: what is looked up for each must not grow with their number,
/// or this test is among the slowest.
#[test]
fn ten_thousand_instances_are_launched_on_ports_of_their_own() {
    let record = EnvironmentRecord::new("demo/dev".parse().unwrap());
    let settings = Settings { ports: (20_000, 32_767), ..fixture::settings(1_000_000_000) };
    let mut machine = Environment::new(record.clone(), Arc::new(settings));
    let mut many = service(1, rolling());
    many.replicas = orchestra_model::desired::MAX_REPLICAS;
    // Nothing is published, so nobody waits for the data plane.
    many.ports.clear();
    let desired = Desired {
        environment: record.id.clone(),
        target: Target::Process,
        resources: BTreeMap::from([(api(), Resource::Service(many))]),
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    };
    let plan = fixture::plan(&record, Some(desired), vec![step(api(), Action::Create)]);
    let batch = machine.handle(Now::at(Duration::from_secs(1)), requested(&record, RunKind::Up, plan));
    let launched = batch.effects.iter().filter_map(|effect| match effect {
        Effect::Launch(launch) => Some(launch),
        _ => None,
    });
    let ports: Vec<u16> = launched.flat_map(|launch| launch.ports.values().copied()).collect();
    let distinct: BTreeSet<u16> = ports.iter().copied().collect();
    assert_eq!((ports.len(), distinct.len()), (10_000, 10_000));
}

#[test]
fn nobody_is_launched_for_a_rollout_that_is_turned_back_in_the_same_moment() {
    let mut world = World::new();
    let (mut first, mut second) = (service(1, Strategy::Recreate), service(2, Strategy::Recreate));
    second.rollout.strategy = stepped(vec![RolloutStep::Scale(Amount::Count(2)), until_promoted()]);
    second.replicas = 2;
    // With ports they would wait for the data plane after a recovery.
    first.ports.clear();
    second.ports.clear();
    world.up(&first);
    world.up(&second);
    let names = |world: &World| -> Vec<String> {
        world.processes.iter().map(|process| process.launch.key.instance.to_string()).collect()
    };
    let old = "api-r1-2".parse().unwrap();
    assert!(world.disk.instances.contains_key(&old), "as many of the old release are wanted as of the new one");
    // The server died before it launched that one, and one of the new ones has exited since.
    world.processes.retain(|process| process.launch.key.instance != old);
    let others = names(&world);
    assert_eq!(others, ["api-r1-1", "api-r2-1", "api-r2-2"]);
    world.processes[1].exited = true;
    world.die(0);
    assert_eq!(world.ended(), Some(RunState::Failed));
    world.pass(20);
    assert_eq!(names(&world), others);
    let left: Vec<String> = world.disk.instances.keys().map(ToString::to_string).collect();
    assert_eq!(left, ["api-r1-1"]);
    assert!(!world.processes[0].exited, "it serves");
}

#[test]
fn a_step_that_makes_the_new_set_smaller_waits_for_the_old_one() {
    let mut world = World::new();
    let mut first = service(1, rolling());
    (first.replicas, first.restart.budget) = (2, None);
    world.up(&first);
    let scale = |count| RolloutStep::Scale(Amount::Count(count));
    let mut second = service(2, stepped(vec![scale(2), until_promoted(), scale(1), until_promoted()]));
    second.replicas = 2;
    world.up(&second);
    assert!(world.waits_for().starts_with("step 2 of 4"), "{}", world.waits_for());
    for index in [0, 1] {
        world.processes[index].exited = true;
        let key = world.processes[index].launch.key.clone();
        for event in [ProviderEvent::Exited { exit: Exit::Code(1), message: None }, ProviderEvent::Gone] {
            world.send(Event::Provider { key: key.clone(), event });
        }
    }
    world.send(Event::Rollout { service: None, command: RolloutCommand::Promote, by: "ada".to_owned() });
    let words = "enough others to serve; 1 instance of release 2 more than wanted stays until then";
    assert!(world.waits_for().starts_with("step 4 of 4"), "{}", world.waits_for());
    assert!(world.waits_for().ends_with(words), "{}", world.waits_for());
    assert!(!world.said(EventKind::InstanceDraining, "wanted"), "{:?}", world.notes);
    // The old ones are started again.
    world.pass(5);
    assert!(!world.waits_for().contains(words), "{}", world.waits_for());
    assert!(world.said(EventKind::InstanceDraining, "1 replicas are wanted"), "{:?}", world.notes);
}

#[test]
fn what_is_to_be_put_back_goes_no_further_while_its_users_are_put_back() {
    let web = service_id(&"web".parse().unwrap());
    let mut world = World::new();
    let mut first = service(1, rolling());
    first.rollout.min_ready = Timespan::seconds(10);
    world.up_all(&[(api(), &first), (web.clone(), &service(1, Strategy::Recreate))]);
    world.pass(11);
    assert_eq!(world.ended(), Some(RunState::Succeeded));
    let mut second = service(2, rolling());
    second.rollout.min_ready = Timespan::seconds(10);
    world.up_all(&[(api(), &second), (web, &silent(2, Strategy::Recreate))]);
    world.pass(5);
    world.answers = false;
    world.send(Event::Rollout { service: None, command: RolloutCommand::Abort, by: "ada".to_owned() });
    assert_eq!(world.waits_for(), "service.web to be put back first");
    world.notes.clear();
    world.pass(10);
    let old = &world.processes[0];
    assert_eq!(old.launch.key.instance.to_string(), "api-r1-1");
    assert!(!old.exited && !world.said(EventKind::InstanceDraining, "replaced by release 2"), "{:?}", world.notes);
    world.answers = true;
    world.pass(5);
    assert_eq!(world.ended(), Some(RunState::Cancelled));
}

#[test]
fn records_of_before_have_no_deadlines() {
    let mut record = serde_json::to_value(EnvironmentRecord::new("demo/dev".parse().unwrap())).unwrap();
    assert!(record.get("deadlines").is_none());
    let deadlines = BTreeMap::from([("steps", BTreeMap::from([("service.api", 5)]))]);
    record.as_object_mut().unwrap().insert("deadlines".to_owned(), serde_json::to_value(deadlines).unwrap());
    let record: EnvironmentRecord = serde_json::from_value(record).unwrap();
    assert_eq!(record.deadlines.unwrap().steps[&api()], 5);
}

#[test]
fn a_release_whose_place_was_taken_is_no_failed_one() {
    let newest = |world: &World| {
        let release = world.disk.releases.values().next_back().unwrap();
        (release.number.0, release.state)
    };
    let begun = || {
        let mut world = World::new();
        world.up(&service(1, beside()));
        world.up(&service(2, beside()));
        assert!(world.waits_for().contains("promote"), "{}", world.waits_for());
        world
    };
    for dies in [false, true] {
        let mut world = begun();
        world.answers = false;
        world.send(Event::Superseded { by: "a newer release".to_owned() });
        assert_eq!(world.ended(), None, "the routes are not back");
        if dies {
            world.answers = true;
            world.die(0);
        } else {
            world.answers = true;
            world.pass(5);
        }
        world.pass(5);
        assert_eq!(world.ended(), Some(RunState::Cancelled), "{dies}");
        assert_eq!(newest(&world), (2, ReleaseState::Superseded), "{dies}");
        let problem = &world.disk.run.as_ref().unwrap().problems[0];
        let said = (problem.code, &problem.message[..]);
        assert_eq!(said, (Code::SUPERSEDED, "release 2 was superseded by a newer release"));
    }
    // What a person aborts, or what turns back already, failed.
    let mut world = begun();
    world.send(Event::Rollout { service: None, command: RolloutCommand::Abort, by: "ada".to_owned() });
    world.send(Event::Superseded { by: "a newer release".to_owned() });
    world.pass(5);
    assert_eq!((world.ended(), newest(&world)), (Some(RunState::Cancelled), (2, ReleaseState::Failed)));
}

#[test]
fn what_is_left_of_a_pause_before_a_restart_is_counted_down() {
    let mut world = World::new();
    let mut wanted = service(1, rolling());
    wanted.restart.budget = None;
    wanted.restart.backoff = Timespan::seconds(20);
    wanted.restart.max_backoff = Timespan::seconds(20);
    world.up(&wanted);
    let key = world.processes[0].launch.key.clone();
    let told = |event| Event::Provider { key: key.clone(), event };
    let look = |world: &World| {
        let status = world.machine.resource_status(world.now, api());
        let instance = &status.instances[0];
        (instance.waits_for.clone(), instance.due)
    };
    assert_eq!(look(&world), (None, None));
    world.send(told(ProviderEvent::Exited { exit: Exit::Code(1), message: None }));
    world.send(told(ProviderEvent::Gone));
    let (reason, whole) = look(&world);
    assert_eq!(reason.as_deref(), Some("its restart after exit code 1"));
    world.pass(7);
    assert_eq!(whole, look(&world).1.map(|left| left + Duration::from_secs(7)));
    let said = world.notes.iter().find(|(kind, _)| *kind == EventKind::InstancePending).unwrap();
    assert!(said.1.starts_with("restart in ") && said.1.ends_with("s after exit code 1"), "{}", said.1);
    assert!(!said.1.contains("ms"), "{}", said.1);
}

#[test]
fn a_service_without_instances_is_stopped_and_not_ready() {
    let mut world = World::new();
    world.up(&service(1, rolling()));
    let state = |world: &World| world.machine.resource_status(world.now, api()).state;
    assert_eq!(state(&world), "ready");
    let mut none = service(1, rolling());
    none.replicas = 0;
    world.up(&none);
    world.pass(100);
    assert_eq!((world.ended(), state(&world)), (Some(RunState::Succeeded), "stopped"));
}
