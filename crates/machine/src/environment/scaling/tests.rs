//! A service that scales by itself, in a world that does at once what is asked, on virtual time.

use std::collections::VecDeque;

use orchestra_model::{
    Desired, EnvironmentId,
    autoscale::{Behavior, Change as Amount, Level, Metric, ScalePolicy, Select, ToZero},
    desired::{Strategy, Target},
    flag::FlagSet,
    launch::{Exit, Observed, ProviderEvent},
    plan::Action,
    quantity::{ByteSize, Cpu, Percent},
    record::{Change, EnvironmentRecord, EnvironmentState},
    rollout::{OnExpiry, PauseStep, RolloutStep, Stepped},
    route::{EndpointKey, EndpointState, Route, RouteId},
    traffic::Permille,
};

use super::*;
use crate::{
    Batch, Settings,
    environment::{
        Event,
        fixture::{self, requested, rolling, step},
    },
};

const HOLD: Timespan = Timespan::seconds(10);

fn behavior(window: u64) -> Behavior {
    let per = Timespan::seconds(15);
    Behavior {
        window: Timespan::seconds(window),
        tolerance: Percent::whole(10),
        policies: vec![
            ScalePolicy { change: Amount::Percent(100), per },
            ScalePolicy { change: Amount::Instances(4), per },
        ],
        select: Select::Max,
    }
}

/// The defaults of the stack file.
fn policy(min: u32, max: u32, source: MetricSource, target: Level) -> Autoscale {
    Autoscale {
        min,
        max,
        on: vec![Metric { source, target }],
        every: Timespan::seconds(15),
        up: behavior(0),
        down: behavior(300),
        cpu_initialization: Timespan::seconds(300),
        initial_readiness: Timespan::seconds(30),
        to_zero: (min == 0).then_some(ToZero { idle_for: Timespan::seconds(300), cold_start: Timespan::seconds(60) }),
    }
}

/// Two requests in flight per instance.
fn in_flight(min: u32, max: u32) -> Autoscale {
    policy(min, max, MetricSource::RequestsInFlight, Level::Average(Measure::whole(2)))
}

fn service(version: u32, scale: Option<Autoscale>) -> Service {
    let mut service = fixture::service(version, rolling());
    service.program.resources.cpu = Some(Cpu::millis(1000));
    Service { scale, ..service }
}

fn id() -> ResourceId {
    service_id(&"api".parse().unwrap())
}

/// What goes through the one route.
#[derive(Clone, Copy, Default)]
struct Traffic {
    in_flight: u32,
    held: u32,
}

/// What comes of asking an instance.
#[derive(Clone, Debug)]
enum Exported {
    /// This, or nothing of that name, or why it cannot be read.
    Is(Result<Option<f64>, String>),
    /// No answer comes.
    Lost,
}

struct World {
    machine: Environment,
    disk: EnvironmentState,
    now: Now,
    running: BTreeMap<LaunchKey, Now>,
    routes: Vec<Route>,
    notes: Vec<String>,
    traffic: Traffic,
    /// CPU that every instance uses, in thousandths of a core.
    cpu: u64,
    /// What every instance exports.
    exported: Exported,
    /// Instances are started and do not live.
    broken: bool,
    /// Instances take for ever to start.
    slow: bool,
    launches: usize,
    ended: usize,
}

impl World {
    fn new() -> Self {
        let environment: EnvironmentId = "demo/dev".parse().unwrap();
        let record = EnvironmentRecord::new(environment);
        let disk = EnvironmentState::new(record.clone());
        Self {
            machine: Environment::new(record, Self::settings()),
            disk,
            now: Now::at(Duration::from_secs(1)),
            running: BTreeMap::new(),
            routes: Vec::new(),
            notes: Vec::new(),
            traffic: Traffic::default(),
            cpu: 0,
            exported: Exported::Lost,
            broken: false,
            slow: false,
            launches: 0,
            ended: 0,
        }
    }

    fn settings() -> Arc<Settings> {
        Arc::new(Settings { hold: HOLD, ..fixture::settings(1_000_000) })
    }

    /// A service that is there, and has been measured.
    fn with(scale: Autoscale) -> Self {
        let mut world = Self::new();
        world.up(service(1, Some(scale)));
        assert!(world.machine.run().is_none(), "{:?}", world.notes);
        world
    }

    fn run(&mut self, kind: RunKind, service: Service) {
        let record = self.machine.record().clone();
        let desired = Desired {
            environment: record.id.clone(),
            target: Target::Process,
            resources: [(id(), Resource::Service(service))].into(),
            flags: FlagSet::default(),
            preview: None,
            secrets: BTreeMap::new(),
        };
        let plan = fixture::plan(&record, Some(desired), vec![step(id(), Action::Update)]);
        self.send(requested(&record, kind, plan));
    }

    fn up(&mut self, service: Service) {
        self.run(RunKind::Up, service);
    }

    /// As the engine does it: the release says what a person said.
    fn by_hand(&mut self, number: u32) {
        let Some(Resource::Service(service)) = self.machine.resources().get(&id()).map(|r| r.applied.clone()) else {
            panic!("nothing was applied");
        };
        let kind = RunKind::Scale { replicas: [("api".parse().unwrap(), number)].into() };
        self.run(kind, Service { replicas: number, ..service });
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
                    self.launches += 1;
                    let event = |event| Event::Provider { key: key.clone(), event };
                    events.push_back(Event::Launched(key.clone()));
                    if self.slow {
                        continue;
                    }
                    events.push_back(event(ProviderEvent::Started { pid: 7 }));
                    if self.broken {
                        let exit = Exit::Code(1);
                        events
                            .extend([event(ProviderEvent::Exited { exit, message: None }), event(ProviderEvent::Gone)]);
                    } else {
                        self.running.insert(key, self.now);
                    }
                }
                Effect::Terminate { key, .. } => {
                    self.ended += usize::from(self.running.remove(&key).is_some());
                    let exit = Exit::Code(0);
                    let ended = [ProviderEvent::Exited { exit, message: None }, ProviderEvent::Gone];
                    events.extend(ended.map(|event| Event::Provider { key: key.clone(), event }));
                }
                Effect::SetRoutes { revision, routes } => {
                    let address = |route: &Route| (route.id.clone(), "127.0.0.1:40000".parse().unwrap());
                    events
                        .push_back(Event::RoutesApplied { revision, addresses: routes.iter().map(address).collect() });
                    let ends = routes.iter().flat_map(|r| &r.backends).flat_map(|b| &b.endpoints);
                    let drained = ends.filter(|e| e.state == EndpointState::Draining).map(|e| {
                        let environment = self.disk.environment.id.clone();
                        Event::Drained(EndpointKey { environment, instance: e.instance.clone(), attempt: e.attempt })
                    });
                    events.extend(drained);
                    self.routes = routes;
                }
                Effect::MeasureUsage { service, keys } => {
                    let usage = |key: LaunchKey| {
                        let lived = u64::try_from(self.now.since(self.running[&key]).as_millis()).unwrap();
                        let cpu = Duration::from_micros(lived * self.cpu);
                        (key, Usage { cpu, memory: ByteSize::bytes(1 << 20), processes: 1 })
                    };
                    events.push_back(Event::Usage { service, usage: keys.into_iter().map(usage).collect() });
                }
                Effect::Consult { key, question: Question::Scrape { targets, series, .. }, .. } => {
                    let Exported::Is(values) = &self.exported else { continue };
                    let scraped = targets.into_iter().map(|target| Scraped {
                        instance: target.instance,
                        attempt: target.attempt,
                        values: values.clone().map(|value| vec![value; series.len()]),
                    });
                    events.push_back(Event::Consulted { key, answer: Answer::Scraped(scraped.collect()) });
                }
                _ => {}
            }
        }
    }

    fn commit(&mut self, change: Change) {
        if let Some(note) = self.disk.apply(change).filter(|note| note.kind == EventKind::Scaled) {
            self.notes.push(note.cause);
        }
    }

    /// The control plane dies, and the next one finds what runs and what is written down.
    fn recover(&mut self) {
        // As an adopted state does: the clock begins anew.
        let passed = self.now.since_origin();
        self.running.values_mut().for_each(|started| {
            *started = Now::at(started.since_origin().saturating_sub(passed));
        });
        self.now = Now::ZERO;
        let observed = |instance: &orchestra_model::record::InstanceRecord| {
            let environment = self.disk.environment.id.clone();
            let key = LaunchKey { environment, instance: instance.id.clone(), attempt: instance.attempt };
            self.running.contains_key(&key).then(|| Observed { pid: Some(7), ..Observed::new(key) })
        };
        let observed = self.disk.instances.values().map(|i| (i.id.clone(), observed(i))).collect();
        let (machine, batch) = Environment::recover(self.disk.clone(), &observed, Self::settings(), self.now);
        self.machine = machine;
        let mut events = VecDeque::new();
        self.carry_out(batch, &mut events);
        for event in events {
            self.send(event);
        }
    }

    fn report(&mut self) {
        let environment = self.disk.environment.id.clone();
        let Traffic { in_flight, held } = self.traffic;
        self.send(Event::Load(LoadReport {
            route: RouteId { environment, service: "api".parse().unwrap(), port: "http".parse().unwrap() },
            over: Timespan::seconds(1),
            requests: u64::from(in_flight),
            in_flight,
            streams: 0,
            tokens: 0,
            tokens_in_flight: 0,
            held,
        }));
    }

    /// Lets time pass, with a report of the data plane every second.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            let end = self.now + Duration::from_secs(1);
            while let Some(deadline) = self.machine.deadline().filter(|at| *at <= end) {
                self.now = self.now.max(deadline);
                self.send(Event::Tick);
            }
            self.now = end;
            self.report();
        }
    }

    fn busy(&mut self, in_flight: u32, seconds: u64) {
        self.traffic = Traffic { in_flight, held: 0 };
        self.pass(seconds);
    }

    /// Instances that are wanted, and that run: the record, the status and the world must agree.
    #[track_caller]
    fn expect(&self, number: u32) {
        assert_eq!(self.disk.environment.scaled[&id().name].replicas, number, "{:#?}", self.notes);
        assert_eq!(self.disk.environment, *self.machine.record(), "what is in force is written down");
        assert_eq!(self.status().replicas, number);
        assert_eq!(self.running.len(), number as usize, "{:?}", self.running);
    }

    fn status(&self) -> crate::status::ResourceStatus {
        self.machine.status(self.now).resources.into_iter().find(|resource| resource.id == id()).unwrap()
    }
}

#[test]
fn it_grows_with_load_and_shrinks_after_the_window() {
    let mut world = World::with(in_flight(1, 5));
    world.expect(1);
    assert!(world.routes[0].metered);
    world.busy(8, 20);
    world.expect(4);
    assert_eq!(
        world.notes,
        ["scaled up from 1 to 4: requests_in_flight is 8 of 2 per instance, which asks for 4"],
        "one note for each decision that changes something"
    );
    world.busy(2, 280);
    world.expect(4);
    world.busy(2, 40);
    world.expect(1);
    assert!(world.status().scaling[0].contains("requests_in_flight is 2 of 2"), "{:?}", world.status().scaling);
    // More than `max` is never wanted.
    world.busy(100, 60);
    world.expect(5);
    assert_eq!(world.machine.resources()[&id()].applied.as_service().unwrap().replicas, 1, "the release says the same");
}

#[test]
fn a_request_that_waits_wakes_a_sleeping_service_at_once() {
    let mut world = World::with(in_flight(0, 3));
    world.busy(1, 60);
    world.busy(0, 290);
    world.expect(1);
    world.busy(0, 40);
    world.expect(0);
    assert_eq!(world.status().state, "asleep");
    assert!(world.status().scaling[0].contains("it sleeps until the next request"), "{:?}", world.status().scaling);
    assert_eq!(world.routes[0].hold, Timespan::seconds(60), "whoever asks waits for a cold start");
    assert!(world.routes[0].backends.is_empty());

    world.traffic = Traffic { in_flight: 0, held: 1 };
    world.report();
    world.expect(1);
    assert_eq!(world.notes.last().unwrap(), "scaled up from 0 to 1: it slept, and a request waits for an instance");
    assert_eq!(world.routes[0].hold, HOLD, "it is ready");
    assert_eq!(world.status().state, "ready");
    world.busy(4, 20);
    world.expect(2);
}

#[test]
fn a_cold_start_is_explained_until_an_instance_is_ready() {
    let mut world = World::with(in_flight(0, 3));
    world.busy(0, 330);
    world.expect(0);
    world.slow = true;
    world.traffic = Traffic { in_flight: 0, held: 1 };
    world.pass(30);
    let lines = world.status().scaling;
    assert!(lines.iter().any(|line| line.starts_with("starting for ")), "{lines:?}");
    assert_eq!(world.routes[0].hold, Timespan::seconds(60));
}

#[test]
fn a_crash_keeps_the_number_and_the_windows() {
    let mut world = World::with(in_flight(1, 5));
    world.busy(8, 20);
    let (launches, ended) = (world.launches, world.ended);
    world.recover();
    world.expect(4);
    // Nobody has reported yet, and then there is little to do: neither takes an instance away within the window.
    world.pass(0);
    world.busy(2, 280);
    world.expect(4);
    assert_eq!((world.launches, world.ended), (launches, ended), "no instance was touched");
    world.busy(2, 60);
    world.expect(1);

    let mut asleep = World::with(in_flight(0, 3));
    asleep.busy(0, 330);
    asleep.recover();
    asleep.expect(0);
    asleep.traffic.held = 1;
    asleep.report();
    asleep.expect(1);
}

#[test]
fn a_release_keeps_the_number_within_its_bounds() {
    let mut world = World::with(in_flight(1, 5));
    world.busy(8, 20);
    let launches = world.launches;
    world.up(service(2, Some(in_flight(1, 5))));
    assert!(world.machine.run().is_none());
    world.expect(4);
    assert_eq!(world.launches, launches + 4, "all were replaced");
    world.up(service(2, Some(in_flight(1, 3))));
    world.expect(3);
    // Without `scale` the release says it; and again with it, the number stays.
    world.up(Service { replicas: 2, ..service(2, None) });
    assert!(world.disk.environment.scaled.is_empty() && world.running.len() == 2);
    assert!(!world.routes[0].metered && world.status().scaling.is_empty());
    world.up(service(2, Some(in_flight(1, 3))));
    world.expect(2);
}

#[test]
fn a_release_wakes_a_sleeping_service_to_show_that_it_works() {
    let mut world = World::with(in_flight(0, 3));
    world.busy(0, 330);
    world.expect(0);
    // What replaces no instance wakes nobody.
    world.up(service(1, Some(in_flight(0, 4))));
    world.expect(0);
    world.broken = true;
    world.up(service(2, Some(in_flight(0, 4))));
    assert_eq!(world.disk.run.as_ref().unwrap().state, RunState::Failed, "it does not work");
    world.broken = false;
    world.up(service(3, Some(in_flight(0, 4))));
    world.expect(1);
    world.busy(0, 330);
    world.expect(0);
}

#[test]
fn a_number_set_by_hand_holds_for_the_window() {
    let mut world = World::with(in_flight(1, 5));
    world.busy(2, 600);
    world.expect(1);
    world.by_hand(4);
    world.expect(4);
    world.busy(2, 290);
    world.expect(4);
    world.busy(2, 40);
    world.expect(1);

    // Switched off, it rests, whatever there is to do, and through a release.
    world.by_hand(0);
    world.expect(0);
    let by_hand = "scaled down from 1 to 0: it was set by hand";
    assert_eq!(world.status().scaling, [by_hand], "not what was decided before");
    assert_eq!(world.status().state, "stopped", "no request wakes it");
    world.recover();
    assert!(world.status().scaling.last().unwrap().ends_with(by_hand), "{:?}", world.status().scaling);
    world.busy(50, 60);
    world.up(service(2, Some(in_flight(1, 5))));
    world.expect(0);
    let lines = world.status().scaling;
    assert!(lines[0].contains("autoscaling rests") && lines[1].ends_with(by_hand), "{lines:?}");
    world.by_hand(2);
    world.busy(4, 20);
    world.expect(2);
    assert_eq!(world.status().state, "ready");
}

#[test]
fn a_number_that_does_not_come_about_is_taken_back() {
    let mut world = World::with(in_flight(1, 5));
    world.busy(4, 20);
    world.expect(2);
    world.slow = true;
    world.by_hand(5);
    world.recover();
    assert_eq!(world.machine.record().scaled[&id().name].replicas, 5, "it is begun again after the crash");
    world.busy(4, 400);
    assert_eq!(world.disk.run.as_ref().unwrap().state, RunState::Failed);
    // Not what the release before it says, but what was in force.
    world.expect(2);
    assert!(!world.status().scaling.iter().any(|line| line.contains("by hand")), "{:?}", world.status().scaling);
    assert_eq!(world.disk.environment.scaled[&id().name].before, None);
}

#[test]
fn it_grows_with_the_cpu_of_its_instances() {
    let mut world = World::with(policy(1, 10, MetricSource::Cpu, Level::Utilization(70)));
    world.cpu = 350;
    world.busy(0, 60);
    world.expect(1);
    // A core each: 100 % of what they ask for.
    let mut world = World::with(policy(1, 10, MetricSource::Cpu, Level::Utilization(70)));
    world.cpu = 1000;
    world.busy(0, 35);
    world.expect(2);
    assert_eq!(world.notes, ["scaled up from 1 to 2: cpu is 100% of 70% per instance, which asks for 2"]);
    world.recover();
    world.busy(0, 40);
    assert!(world.status().replicas >= 3, "what was measured before a crash is measured anew: {:?}", world.notes);
}

#[test]
fn during_a_rollout_it_grows_in_all_and_does_not_sleep() {
    let paused = RolloutStep::Pause(PauseStep {
        duration: None,
        owner: None,
        expires: Timespan::seconds(100_000),
        on_expiry: OnExpiry::RollBack,
    });
    let steps = vec![RolloutStep::Weight(Permille::new(500)), paused];
    let canary = |version| {
        let mut service = service(version, Some(in_flight(0, 8)));
        service.rollout.strategy =
            Strategy::Canary(Stepped { steps: steps.clone(), keep_warm: Timespan::default(), guard: None });
        service.rollout.deadline = Timespan::seconds(200_000);
        service
    };
    let mut world = World::new();
    world.up(canary(1));
    world.busy(4, 20);
    world.expect(2);
    world.up(canary(2));
    assert!(world.machine.is_rolling_out());
    world.busy(8, 20);
    assert_eq!(world.status().replicas, 4);
    assert_eq!(world.running.len(), 6, "the old set is whole, and half as many are new");
    world.busy(0, 1000);
    assert!(world.status().replicas >= 1, "{:?}", world.notes);
    assert!(world.status().scaling.iter().any(|line| line.contains("only after its rollout")));
    let command = orchestra_model::rollout::RolloutCommand::Promote;
    world.send(Event::Rollout { service: None, command, by: "a test".to_owned() });
    world.pass(30);
    assert!(world.machine.run().is_none());
    world.pass(330);
    world.expect(0);
}

/// A queue of five per instance, as the instances export it.
fn exporting() -> (Autoscale, Exporter) {
    let source = MetricSource::Exported { name: "queue".to_owned(), labels: BTreeMap::new() };
    let scale = policy(1, 16, source, Level::Average(Measure::whole(5)));
    let second = Timespan::seconds(1);
    let exporter =
        Exporter { port: "http".parse().unwrap(), path: "/metrics".to_owned(), every: second, timeout: second };
    (scale, exporter)
}

#[test]
fn what_instances_export_is_scaled_by() {
    let (scale, exporter) = exporting();
    let mut world = World::new();
    world.exported = Exported::Is(Ok(Some(4.0)));
    world.up(Service { metrics: Some(exporter), ..service(1, Some(scale)) });
    world.pass(40);
    world.expect(1);
    world.exported = Exported::Is(Ok(Some(9.0)));
    world.pass(40);
    world.expect(8);
    let lines = |world: &World| world.machine.workloads[&id()].scaling.as_ref().unwrap().explain(world.now).join("\n");
    assert!(lines(&world).contains("queue is 9 of 5 per instance"), "{}", lines(&world));

    // Whatever keeps it from being read is said, and moves nothing; a decision does not wait for ever.
    for (exported, words) in [
        (Exported::Is(Ok(None)), "no instance exports it as a finite number on /metrics"),
        (Exported::Is(Ok(Some(-1.0))), "it is below 0 on /metrics"),
        (Exported::Is(Err("HTTP 404".to_owned())), "HTTP 404"),
        (Exported::Lost, "queue: no answer"),
    ] {
        world.exported = exported;
        world.pass(100);
        assert!(lines(&world).contains(words), "{words}: {}", lines(&world));
        world.expect(8);
        world.exported = Exported::Is(Ok(Some(5.0)));
        world.pass(30);
        assert!(lines(&world).contains("queue is 5 of 5"), "{}", lines(&world));
    }
    // After a crash it is asked at once.
    world.recover();
    world.exported = Exported::Is(Ok(Some(10.0)));
    world.pass(30);
    world.expect(16);
}
