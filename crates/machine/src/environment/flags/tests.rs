//! Which flags are served when, in a world in which instances are ready at once and the data plane answers when told to.

use std::collections::{BTreeMap, VecDeque};

use orchestra_model::{
    Desired, Digest, EnvironmentId, InstanceId, Plan, ReleaseNumber, Resource, ResourceId, ResourceKind, RunId,
    desired::{Service, Strategy, Target},
    flag::{FlagKind, VariantName},
    launch::{Exit, Launch, LaunchKey, Observed, ProviderEvent},
    plan::{Action, FlagStep},
    record::{Change, EnvironmentRecord, EnvironmentState, RunKind},
    rollout::{AnalysisStep, Guard, OnInconclusive, RolloutStep, Stepped},
    route::{EndpointKey, EndpointState},
    traffic::{Arm, LatencyHistogram, Permille, TrafficCell, TrafficReport},
};

use super::*;
use crate::{
    Batch, Effect, Settings,
    environment::{
        Event,
        fixture::{self, requested, rolling, service, step},
    },
};

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// A boolean flag.
fn flag(default: bool) -> Flag {
    let variant = |on: bool| -> VariantName { name(if on { "on" } else { "off" }) };
    Flag {
        kind: FlagKind::Boolean,
        variants: [true, false].map(|on| (variant(on), on.into())).into(),
        default: variant(default),
        enabled: true,
        off: variant(false),
        rules: Vec::new(),
        metadata: BTreeMap::new(),
    }
}

fn flags(defined: &[(&str, bool)]) -> BTreeMap<FlagName, Flag> {
    defined.iter().map(|(flag_name, default)| (name(flag_name), flag(*default))).collect()
}

fn api() -> ResourceId {
    ResourceId::new(ResourceKind::Service, name("api"))
}

/// A canary whose verdict turns the flag `editor` off.
fn canary() -> Strategy {
    judged_after(Timespan::default())
}

/// The same, which judges anew after some time.
fn judged_after(warm_up: Timespan) -> Strategy {
    let guard =
        Guard { warm_up, inconclusive: OnInconclusive::RollBack, flag: Some("editor".to_owned()), ..fixture::guard() };
    let analysis = AnalysisStep { duration: Timespan::seconds(120), inconclusive: None };
    let steps = vec![RolloutStep::Weight(Permille::new(200)), RolloutStep::Analysis(analysis)];
    Strategy::Canary(Stepped { steps, keep_warm: Timespan::default(), guard: Some(guard) })
}

struct World {
    machine: Environment,
    disk: EnvironmentState,
    now: Now,
    /// Whether the data plane answers.
    answers: bool,
    revision: u64,
    routes: Vec<Route>,
    launches: Vec<Launch>,
    notes: Vec<(EventKind, String)>,
}

impl World {
    fn new() -> Self {
        let environment: EnvironmentId = name("demo/dev");
        let record = EnvironmentRecord::new(environment);
        let disk = EnvironmentState::new(record.clone());
        Self {
            machine: Environment::new(record, Self::settings()),
            disk,
            now: Now::at(Duration::from_secs(1)),
            answers: true,
            revision: 0,
            routes: Vec::new(),
            launches: Vec::new(),
            notes: Vec::new(),
        }
    }

    fn settings() -> Arc<Settings> {
        Arc::new(fixture::settings(1_000_000))
    }

    /// Begins a run. Without a service its plan has no steps.
    fn run(&mut self, kind: RunKind, service: Option<Service>, defined: &[(&str, bool)]) {
        let record = self.machine.record().clone();
        let stable = self.machine.stable_release().map(|release| &release.desired);
        let before = stable.map(|desired| desired.flags.flags.clone()).unwrap_or_default();
        let kept = stable.map(|desired| desired.resources.clone()).unwrap_or_default();
        let step = service.as_ref().map(|_| step(api(), Action::Update));
        let after = flags(defined);
        let changed = before.keys().chain(after.keys()).filter(|flag| before.get(*flag) != after.get(*flag));
        let changed: std::collections::BTreeSet<&FlagName> = changed.collect();
        let flag_step = |flag: &&FlagName| FlagStep {
            flag: (*flag).clone(),
            action: Action::Update,
            changes: Vec::new(),
            base: None,
            target: after.get(*flag).map(Digest::of),
        };
        let desired = Desired {
            environment: record.id.clone(),
            target: Target::Process,
            resources: service.map_or(kept, |service| [(api(), Resource::Service(service))].into()),
            flags: FlagSet { flags: after.clone(), overrides: BTreeMap::new() },
            preview: None,
            secrets: BTreeMap::new(),
        };
        let plan = Plan {
            flags: changed.iter().map(flag_step).collect(),
            ..fixture::plan(&record, Some(desired), step.into_iter().collect())
        };
        self.send(requested(&record, kind, plan));
    }

    fn up(&mut self, service: Option<Service>, defined: &[(&str, bool)]) {
        self.run(RunKind::Up, service, defined);
    }

    fn down(&mut self) {
        let record = self.machine.record().clone();
        let plan = fixture::plan(&record, None, vec![step(api(), Action::Delete)]);
        self.send(requested(&record, RunKind::Down { volumes: false }, plan));
    }

    fn send(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let batch = self.machine.handle(self.now, event);
            self.carry_out(batch, &mut events);
        }
    }

    fn carry_out(&mut self, batch: Batch, events: &mut VecDeque<Event>) {
        for change in batch.changes {
            self.commit(change);
        }
        for effect in batch.effects {
            match effect {
                Effect::Launch(launch) => {
                    let key = launch.key.clone();
                    events.push_back(Event::Launched(key.clone()));
                    events.push_back(Event::Provider { key, event: ProviderEvent::Started { pid: 7 } });
                    self.launches.push(*launch);
                }
                Effect::Terminate { key, .. } => {
                    let ended = [ProviderEvent::Exited { exit: Exit::Code(0), message: None }, ProviderEvent::Gone];
                    events.extend(ended.map(|event| Event::Provider { key: key.clone(), event }));
                }
                Effect::SetRoutes { revision, routes } => {
                    (self.revision, self.routes) = (revision, routes);
                    if self.answers {
                        events.extend(self.acknowledged());
                    }
                }
                _ => {}
            }
        }
    }

    /// The last table is in force.
    fn acknowledged(&self) -> Vec<Event> {
        let address = |route: &Route| {
            let chosen = if route.id.is_flags() { 41_000 } else { 40_000 };
            let port = if route.listen.port() == 0 { chosen } else { route.listen.port() };
            (route.id.clone(), SocketAddr::new(route.listen.ip(), port))
        };
        let addresses = self.routes.iter().map(address).collect();
        let mut events = vec![Event::RoutesApplied { revision: self.revision, addresses }];
        let ends = self.routes.iter().flat_map(|r| &r.backends).flat_map(|b| &b.endpoints);
        events.extend(ends.filter(|e| e.state == EndpointState::Draining).map(|e| {
            let environment = self.disk.environment.id.clone();
            Event::Drained(EndpointKey { environment, instance: e.instance.clone(), attempt: e.attempt })
        }));
        events
    }

    /// The control plane dies, and the next one finds everything running.
    fn restart(&mut self) {
        let observed = |instance: &InstanceId, attempt: u32| {
            let key = LaunchKey { environment: name("demo/dev"), instance: instance.clone(), attempt };
            Observed { pid: Some(7), ..Observed::new(key) }
        };
        let found = self.disk.instances.values().map(|i| (i.id.clone(), Some(observed(&i.id, i.attempt)))).collect();
        let (machine, batch) = Environment::recover(self.disk.clone(), &found, Self::settings(), self.now);
        self.machine = machine;
        let mut events = VecDeque::new();
        self.carry_out(batch, &mut events);
        for event in events {
            self.send(event);
        }
    }

    fn acknowledge(&mut self) {
        self.answers = true;
        for event in self.acknowledged() {
            self.send(event);
        }
    }

    fn commit(&mut self, change: Change) {
        if let Some(note) = self.disk.apply(change) {
            self.notes.push((note.kind, note.cause));
        }
    }

    /// Lets time pass, with the timers of the machine.
    fn pass(&mut self, millis: u64) {
        let end = self.now + Duration::from_millis(millis);
        while let Some(deadline) = self.machine.deadline().filter(|at| *at <= end) {
            self.now = self.now.max(deadline);
            self.send(Event::Tick);
        }
        self.now = end;
    }

    /// What the data plane was last told: each flag with its default and whether something lies over it.
    fn served(&self) -> Vec<(String, bool, bool)> {
        let Some(flags) = self.routes.iter().find_map(|route| route.flags.clone()) else { return Vec::new() };
        let one = |(flag, definition): (&FlagName, &Flag)| {
            let default = definition.variants[&definition.default] == true;
            (flag.to_string(), default, flags.set.overrides.contains_key(flag))
        };
        flags.set.flags.iter().map(one).collect()
    }

    fn serves(&self, expected: &[(&str, bool)]) -> bool {
        let expected = expected.iter().map(|(flag, default)| ((*flag).to_owned(), *default, false));
        self.served() == expected.collect::<Vec<_>>()
    }

    fn state(&self) -> Option<RunState> {
        self.machine.run().map(|run| run.state)
    }

    fn stable(&self) -> Option<u64> {
        self.machine.record().stable.map(|number| number.0)
    }

    /// What went through the canary and beside it for some time.
    fn traffic(&mut self, from: u64, bad: bool, until: impl Fn(&Self) -> bool) {
        let route = RouteId { environment: name("demo/dev"), service: name("api"), port: name("http") };
        let cells = |sequence: u64, arm: Arm, requests: u64, bad: bool| {
            (0..requests).map(move |n| TrafficCell {
                arm,
                client: sequence * 1000 + n,
                canary: Permille::new(200),
                requests: 1,
                bad: u32::from(bad),
                server_errors: u32::from(bad),
                ..TrafficCell::default()
            })
        };
        for n in from..from + 400 {
            if until(self) {
                return;
            }
            let cells = cells(n * 2, Arm::Canary, 4, bad).chain(cells(n * 2 + 1, Arm::Stable, 16, false)).collect();
            let (route, stable_latency) = (route.clone(), LatencyHistogram::default());
            let report = TrafficReport { route, watch: 2, sequence: n, cells, stable_latency, mirrored: (0, 0) };
            self.send(Event::Traffic(Box::new(report)));
            self.pass(250);
        }
        panic!("in vain: {:#?}", self.notes);
    }

    fn switched(&self) -> Vec<&str> {
        let switched = self.notes.iter().filter(|(kind, _)| *kind == EventKind::FlagSwitched);
        switched.map(|(_, cause)| cause.as_str()).collect()
    }
}

#[test]
fn the_first_instance_finds_the_flags_of_its_release() {
    let mut world = World::new();
    world.answers = false;
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    assert!(world.launches.is_empty(), "launched before the data plane serves the flags");
    world.acknowledge();
    assert_eq!(world.launches[0].env["OFREP_ENDPOINT"], "http://127.0.0.1:41000");
    assert_eq!(world.stable(), Some(1), "{:?}", world.notes);
    let chosen = &world.disk.environment.chosen_ports[&RouteId::flags(name("demo/dev")).service];
    assert_eq!(chosen.values().copied().collect::<Vec<u16>>(), [41_000], "the port is written down");
}

#[test]
fn a_run_that_changes_flags_alone_ends_when_they_are_served() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    world.answers = false;
    world.up(None, &[("editor", false)]);
    assert_eq!(world.state(), Some(RunState::Running));
    assert!(world.serves(&[("editor", false)]));
    world.acknowledge();
    assert_eq!((world.state(), world.stable()), (None, Some(2)));
    assert_eq!(world.launches.len(), 1, "nothing restarts");

    // A data plane that never answers is no success.
    world.answers = false;
    world.up(None, &[("editor", true)]);
    world.pass(31_000);
    assert_eq!((world.state(), world.stable()), (None, Some(2)), "{:?}", world.notes);
    world.acknowledge();
    assert!(world.serves(&[("editor", false)]), "{:?}", world.served());
}

#[test]
fn flags_that_cannot_be_served_turn_the_run_back() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[]);
    world.answers = false;
    world.up(None, &[("editor", true)]);
    let problem = Diagnostic::error(Code::ADDRESS_IN_USE, "taken");
    let problems = [(RouteId::flags(name("demo/dev")), problem)].into();
    world.send(Event::RoutesRefused { revision: world.revision, problems });
    assert_eq!((world.state(), world.stable()), (None, Some(1)), "{:?}", world.notes);
    assert_eq!(world.disk.run.as_ref().unwrap().problems[0].code, Code::ADDRESS_IN_USE);
}

#[test]
fn two_releases_at_once_find_the_flags_of_both() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("old", true), ("both", false)]);
    world.up(Some(service(2, canary())), &[("new", true), ("both", true)]);
    assert_eq!(world.state(), Some(RunState::Running), "{:?}", world.notes);
    let forward = [("both", true), ("new", true), ("old", true)];
    assert!(world.serves(&forward), "the new release decides: {:?}", world.served());

    // The control plane dies: the same is served.
    world.answers = false;
    world.restart();
    assert!(world.serves(&forward), "{:?}", world.served());
    world.acknowledge();

    world.answers = false;
    world.send(Event::CancelRequested { run: RunId(2) });
    let back = [("both", false), ("new", true), ("old", true)];
    assert!(world.serves(&back), "the release in force decides: {:?} {:#?}", world.served(), world.notes);
    world.acknowledge();
    world.pass(60_000);
    assert_eq!((world.state(), world.stable()), (None, Some(1)), "{:?}", world.notes);
    assert!(world.serves(&[("both", false), ("old", true)]), "{:?}", world.served());

    world.down();
    world.pass(60_000);
    assert_eq!(world.stable(), None);
    assert!(world.routes.iter().all(|route| route.flags.is_none()));
    assert!(world.disk.environment.chosen_ports.is_empty(), "{:?}", world.disk.environment.chosen_ports);
}

#[test]
fn all_is_down_when_nobody_answers_for_the_flags_any_more() {
    for answers in [true, false] {
        let mut world = World::new();
        world.up(Some(service(1, rolling())), &[("editor", true)]);
        assert_eq!((world.state(), world.stable()), (None, Some(1)), "{:?}", world.notes);
        world.answers = false;
        world.down();
        while world.routes.iter().any(|route| route.flags.is_some()) {
            assert_eq!(world.state(), Some(RunState::Running), "{:?}", world.notes);
            for event in world.acknowledged() {
                world.send(event);
            }
        }
        assert_eq!(world.state(), Some(RunState::Running), "they are served still: {:?}", world.notes);
        if answers {
            world.acknowledge();
        } else {
            // A proxy that does not answer keeps nothing from being down.
            world.pass(31_000);
        }
        assert_eq!((world.state(), world.stable()), (None, None), "{:?}", world.notes);
    }
}

#[test]
fn a_bad_verdict_turns_the_flag_off_and_the_rollout_goes_on() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    world.up(Some(service(2, canary())), &[("editor", true)]);
    world.traffic(0, true, |world| !world.switched().is_empty());
    assert_eq!(world.state(), Some(RunState::Running), "{:?}", world.notes);
    assert_eq!(world.served(), [("editor".to_owned(), true, true)], "the data plane knows it");
    let over = &world.disk.environment.flag_overrides[&name::<FlagName>("editor")];
    assert_eq!(
        (&over.serve, over.by),
        (&OverrideServe::Off, OverrideBy::Verdict { release: ReleaseNumber(2) }),
        "it is written down"
    );
    // Without the flag the release is a good one.
    world.traffic(1000, false, |world| world.state().is_none());
    assert_eq!(world.stable(), Some(2), "{:?}", world.notes);
    assert_eq!(world.switched().len(), 1);

    let clear = FlagSwitch { flag: name("editor"), serve: None, by: "ada".to_owned(), reason: String::new() };
    world.machine.can_switch(&clear).unwrap();
    world.send(Event::Flag(clear.clone()));
    assert_eq!(world.served(), [("editor".to_owned(), true, false)]);
    assert_eq!(world.machine.can_switch(&clear).unwrap_err().code, Code::NOT_FOUND);
}

/// A refusal is one line that a person reads, also where there are thousands of flags.
#[test]
fn a_flag_that_is_not_there_lists_a_few_that_are() {
    let mut world = World::new();
    let names: Vec<String> = (0..2_000).map(|number| format!("flag-{number:04}")).collect();
    let flags: Vec<(&str, bool)> = names.iter().map(|name| (name.as_str(), true)).collect();
    world.up(Some(service(1, rolling())), &flags);
    let switch =
        FlagSwitch { flag: name("nope"), serve: Some(OverrideServe::Off), by: "ada".to_owned(), reason: String::new() };
    let help = world.machine.can_switch(&switch).unwrap_err().help.unwrap();
    assert!(help.starts_with("flags are: flag-0000, ") && help.ends_with("1988 more, see `orchestra flags`"), "{help}");
}

#[test]
fn a_flag_that_goes_off_late_leaves_the_time_of_a_whole_analysis() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    world.up(Some(service(2, canary())), &[("editor", true)]);
    // Two seconds before its end, and too little evidence turns this one back.
    world.pass(118_000);
    world.traffic(0, true, |world| !world.switched().is_empty());
    world.traffic(1000, false, |world| world.state().is_none());
    assert_eq!(world.stable(), Some(2), "{:?}", world.notes);
}

#[test]
fn a_server_that_dies_as_the_flag_goes_off_judges_anew_as_well() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    world.up(Some(service(2, judged_after(Timespan::seconds(10)))), &[("editor", true)]);
    world.traffic(0, true, |world| !world.switched().is_empty());
    world.restart();
    // Programs that were not told yet: what they answer in the warm-up does not count, nor does what was heard before.
    let end = world.now + Duration::from_secs(9);
    world.traffic(1000, true, |world| world.now >= end);
    assert_eq!(world.state(), Some(RunState::Running), "{:?}", world.notes);
    world.pass(2_000);
    // A report every 250 ms: the next one.
    world.traffic(1036, false, |world| world.state().is_none());
    assert_eq!(world.stable(), Some(2), "{:?}", world.notes);
    let verdicts = &world.disk.releases[&ReleaseNumber(2)].verdicts;
    let told: Vec<_> = verdicts.iter().map(|verdict| verdict.flag.as_ref().map(FlagName::as_str)).collect();
    assert_eq!(told, [Some("editor"), None], "which verdict did what is written down");
}

#[test]
fn a_flag_that_is_off_already_saves_no_release() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", true)]);
    let switch = FlagSwitch {
        flag: name("editor"),
        serve: Some(OverrideServe::Off),
        by: "ada".to_owned(),
        reason: "drafts".to_owned(),
    };
    world.send(Event::Flag(switch));
    assert_eq!(world.switched(), ["flag editor is off, by ada: drafts"]);
    world.up(Some(service(2, canary())), &[("editor", true)]);
    world.traffic(0, true, |world| world.state() != Some(RunState::Running));
    world.pass(60_000);
    assert_eq!((world.state(), world.stable()), (None, Some(1)), "{:?}", world.notes);
}

#[test]
fn a_flag_that_gives_no_more_than_it_gives_while_it_is_off_saves_no_release() {
    let mut world = World::new();
    world.up(Some(service(1, rolling())), &[("editor", false)]);
    world.up(Some(service(2, canary())), &[("editor", false)]);
    world.traffic(0, true, |world| world.state() != Some(RunState::Running));
    assert_eq!(world.switched(), [""; 0], "turned back at the first bad verdict");
    assert!(world.disk.releases[&ReleaseNumber(2)].verdicts[0].flag.is_none());
}
