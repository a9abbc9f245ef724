//! Random stacks, and what they desire.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use orchestra_machine::rng::Rng;
use orchestra_model::{
    Desired, EnvironmentId, Name, Resource, ResourceId, ResourceKind, Text,
    desired::{
        Check, Condition, Dependency, Drain, Health, Job, OnLoss, Port, Probe, Program, Protocol, Resources, Restart,
        RestartPolicy, Rollout, Service, Stop, Strategy, Target, Volume,
    },
    quantity::{Amount, Timespan},
};

/// A stack before it is written out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stack {
    /// Services by name.
    pub services: BTreeMap<String, ServiceShape>,
    /// Jobs by name.
    pub jobs: BTreeMap<String, JobShape>,
    /// Volumes by name, with their path.
    pub volumes: BTreeMap<String, String>,
}

/// How a service is known to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadyBy {
    /// Its process runs.
    Nothing,
    /// HTTP.
    Http,
    /// A command.
    Exec,
    /// `READY=1`.
    Notify,
    /// A line of output.
    Log,
    /// HTTP, and every service it depends on.
    Deep,
}

/// A service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceShape {
    /// Words of its command after the program's name.
    pub words: Vec<String>,
    /// Value of a variable.
    pub level: u64,
    /// Instances.
    pub replicas: u32,
    /// Published port: none, chosen by the machine, or this.
    pub port: Option<Option<u16>>,
    /// Edges.
    pub depends_on: BTreeMap<ResourceId, Dependency>,
    /// Readiness.
    pub ready: ReadyBy,
    /// Interval of its checks in milliseconds.
    pub every: u64,
    /// Thresholds.
    pub thresholds: (u32, u32),
    /// Has a live check.
    pub live: bool,
    /// Restart policy.
    pub restart: RestartPolicy,
    /// Restarts before it is given up.
    pub budget: Option<u32>,
    /// Grace in milliseconds.
    pub grace: u64,
    /// Surge and unavailability.
    pub surge: (Amount, Amount),
    /// Drain in milliseconds: requests, streams.
    pub drain: (u64, u64),
    /// Seconds: to first readiness, for the whole rollout.
    pub deadlines: (u64, u64),
    /// Restarts that were asked for.
    pub restarts: u64,
}

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobShape {
    /// Words of its command after the program's name.
    pub words: Vec<String>,
    /// Edges.
    pub depends_on: BTreeMap<ResourceId, Dependency>,
    /// Retries.
    pub retries: u32,
    /// Seconds of one try.
    pub timeout: u64,
}

fn name(text: &str) -> Name {
    text.parse().expect("names of the simulator are valid")
}

/// Id of a service.
pub fn service(text: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Service, name(text))
}

/// Id of a job.
pub fn job(text: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Job, name(text))
}

/// Id of a volume.
pub fn volume(text: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Volume, name(text))
}

/// Addresses that another program has in every world.
pub const FOREIGN_PORT: u16 = 8666;

// === what it desires ===

impl Stack {
    /// The desired state.
    pub fn desired(&self, environment: &EnvironmentId) -> Desired {
        let volumes = self.volumes.iter().map(|(name, path)| {
            (volume(name), Resource::Volume(Volume { path: path.clone(), managed: path.starts_with("/managed") }))
        });
        let jobs = self.jobs.iter().map(|(name, shape)| (job(name), Resource::Job(shape.desired())));
        let services = self.services.iter().map(|(name, shape)| (service(name), Resource::Service(shape.desired())));
        Desired {
            environment: environment.clone(),
            target: Target::Process,
            resources: volumes.chain(jobs).chain(services).collect(),
        }
    }
}

fn program(words: &[String], port: bool) -> Program {
    let mut command = vec![Text::literal("program")];
    command.extend(words.iter().map(Text::literal));
    Program {
        command,
        directory: "/stack".to_owned(),
        env: BTreeMap::new(),
        user: None,
        umask: None,
        limits: BTreeMap::new(),
        ports: if port { BTreeSet::from([name("http")]) } else { BTreeSet::new() },
        resources: Resources::default(),
        ready_line: None,
        notify: false,
        watchdog: None,
    }
}

impl ServiceShape {
    fn desired(&self) -> Service {
        let mut program =
            program(&self.words, self.port.is_some() || matches!(self.ready, ReadyBy::Http | ReadyBy::Deep));
        program.env.insert("LEVEL".to_owned(), Text::literal(self.level.to_string()));
        program.notify = self.ready == ReadyBy::Notify;
        program.ready_line = (self.ready == ReadyBy::Log).then(|| "listening".to_owned());
        let http = || Check::Http {
            port: name("http"),
            method: "GET".to_owned(),
            path: "/ready".to_owned(),
            headers: BTreeMap::new(),
            body: None,
            status: BTreeSet::new(),
            contains: None,
        };
        let check = match self.ready {
            ReadyBy::Nothing => None,
            ReadyBy::Http => Some(http()),
            ReadyBy::Exec => Some(Check::Exec { command: vec![Text::literal("./check")] }),
            ReadyBy::Notify => Some(Check::Notify),
            ReadyBy::Log => Some(Check::Log),
            ReadyBy::Deep => {
                let on = self.depends_on.keys().filter(|on| on.kind == ResourceKind::Service);
                Some(Check::All(
                    std::iter::once(http())
                        .chain(on.map(|on| Check::Dependency { service: on.name.clone() }))
                        .collect(),
                ))
            }
        };
        let probe = |check| Probe {
            check,
            every: Timespan::millis(self.every),
            every_starting: Timespan::millis(200),
            timeout: Timespan::millis(1000),
            pass_after: self.thresholds.0,
            fail_after: self.thresholds.1,
        };
        let published = self
            .port
            .map(|port| (name("http"), Port { host: IpAddr::V4(Ipv4Addr::LOCALHOST), port, protocol: Protocol::Http }));
        Service {
            program,
            replicas: self.replicas,
            restarts: self.restarts,
            ports: published.into_iter().collect(),
            depends_on: self.depends_on.clone(),
            health: Health {
                ready: check.map(probe),
                live: self.live.then(|| probe(Check::Exec { command: vec![Text::literal("./live")] })),
                start_deadline: Timespan::seconds(self.deadlines.0),
            },
            restart: Restart {
                policy: self.restart,
                backoff: Timespan::millis(200),
                max_backoff: Timespan::seconds(5),
                reset_after: Timespan::seconds(20),
                budget: self.budget,
            },
            stop: Stop { signal: orchestra_model::desired::Signal::Term, grace: Timespan::millis(self.grace) },
            rollout: Rollout {
                strategy: Strategy::Rolling { max_surge: self.surge.0, max_unavailable: self.surge.1 },
                drain: Drain { requests: Timespan::millis(self.drain.0), streams: Timespan::millis(self.drain.1) },
                deadline: Timespan::seconds(self.deadlines.1),
            },
        }
    }
}

impl JobShape {
    fn desired(&self) -> Job {
        Job {
            program: program(&self.words, false),
            depends_on: self.depends_on.clone(),
            retries: self.retries,
            timeout: Timespan::seconds(self.timeout),
            backoff: Timespan::millis(300),
            stop: Stop { signal: orchestra_model::desired::Signal::Term, grace: Timespan::seconds(1) },
        }
    }
}

// === random ones ===

const SERVICES: [&str; 4] = ["cache", "api", "web", "worker"];

fn one_of<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[usize::try_from(rng.below(of.len() as u64)).unwrap_or(0)]
}

fn coin(rng: &mut Rng, percent: u64) -> bool {
    rng.below(100) < percent
}

impl Stack {
    /// A stack that should come up: its programs are good, or misbehave only later.
    pub fn random(rng: &mut Rng) -> Self {
        let mut stack = Self::default();
        if coin(rng, 40) {
            stack.volumes.insert("data".to_owned(), one_of(rng, &["/managed/data", "/elsewhere/data"]).to_owned());
        }
        if coin(rng, 50) {
            let mut job = JobShape::random(rng);
            if stack.volumes.contains_key("data") && coin(rng, 50) {
                job.depends_on
                    .insert(volume("data"), Dependency { until: Condition::Started, on_loss: OnLoss::Ignore });
            }
            stack.jobs.insert("migrate".to_owned(), job);
        }
        let count = 1 + rng.below(4);
        for (index, name) in SERVICES.iter().enumerate().take(usize::try_from(count).unwrap_or(1)) {
            let shape = ServiceShape::random(rng, &stack, index);
            stack.services.insert((*name).to_owned(), shape);
        }
        if coin(rng, 25) {
            let mut job = JobShape::random(rng);
            job.depends_on.insert(service("cache"), Dependency { until: Condition::Ready, on_loss: OnLoss::Ignore });
            stack.jobs.insert("seed".to_owned(), job);
        }
        stack
    }

    /// Another form of it: one to three things changed, perhaps for the worse.
    #[must_use]
    pub fn changed(&self, rng: &mut Rng) -> Self {
        let mut stack = self.clone();
        for _ in 0..=rng.below(3) {
            let names: Vec<String> = stack.services.keys().cloned().collect();
            let name = names[usize::try_from(rng.below(names.len() as u64)).unwrap_or(0)].clone();
            let choice = rng.below(19);
            let before = stack.clone();
            let shape = stack.services.get_mut(&name).expect("it was listed");
            match choice {
                0..=3 => shape.level += 1,
                4 => shape.words = words(rng, true),
                5 => {
                    shape.words =
                        one_of(rng, &["never-ready", "exit=1@30ms", "missing", "exit=1@400ms", "exit=0@100ms"])
                            .split(' ')
                            .map(str::to_owned)
                            .collect();
                }
                6 | 7 => shape.replicas = u32::try_from(rng.below(5)).unwrap_or(0),
                8 => {
                    shape.port = match rng.below(4) {
                        0 => None,
                        1 => Some(None),
                        2 => Some(Some(8000 + u16::try_from(rng.below(500)).unwrap_or(0))),
                        _ => Some(Some(FOREIGN_PORT)),
                    };
                }
                9 => shape.every = one_of(rng, &[300, 1000, 2000]),
                10 => {
                    shape.ready = one_of(
                        rng,
                        &[ReadyBy::Nothing, ReadyBy::Http, ReadyBy::Exec, ReadyBy::Notify, ReadyBy::Log, ReadyBy::Deep],
                    );
                }
                11 => shape.surge = surge(rng),
                12 => shape.live = !shape.live,
                13 => {
                    // Nobody may depend on what is taken away.
                    let id = service(&name);
                    let used = stack.services.values().any(|s| s.depends_on.contains_key(&id))
                        || stack.jobs.values().any(|j| j.depends_on.contains_key(&id));
                    if !used && stack.services.len() > 1 {
                        stack.services.remove(&name);
                    }
                }
                14 => {
                    if let Some(index) = SERVICES.iter().position(|name| !stack.services.contains_key(*name)) {
                        let shape = ServiceShape::random(rng, &before, index);
                        stack.services.insert(SERVICES[index].to_owned(), shape);
                    }
                }
                15 => {
                    for job in stack.jobs.values_mut() {
                        *job = JobShape { words: job_words(rng), ..job.clone() };
                    }
                }
                16 => {
                    for job in stack.jobs.values_mut() {
                        job.retries = u32::try_from(rng.below(3)).unwrap_or(0);
                    }
                }
                17 => {
                    if let Some(path) = stack.volumes.get_mut("data") {
                        one_of(rng, &["/managed/data", "/managed/other", "/elsewhere/data"]).clone_into(path);
                    }
                }
                _ => {
                    let users = |stack: &Stack| {
                        stack.services.values().any(|s| s.depends_on.contains_key(&volume("data")))
                            || stack.jobs.values().any(|j| j.depends_on.contains_key(&volume("data")))
                    };
                    if users(&stack) {
                        shape_edges(rng, &mut stack, &name);
                    } else {
                        stack.volumes.remove("data");
                    }
                }
            }
        }
        stack
    }
}

/// Changes what happens when the dependencies of a service are lost.
fn shape_edges(rng: &mut Rng, stack: &mut Stack, name: &str) {
    let shape = stack.services.get_mut(name).expect("it was listed");
    for dependency in shape.depends_on.values_mut() {
        dependency.on_loss = one_of(rng, &[OnLoss::Ignore, OnLoss::Hold, OnLoss::Stop]);
    }
}

fn surge(rng: &mut Rng) -> (Amount, Amount) {
    let share = |text: &str| text.parse::<Amount>().expect("a share");
    match rng.below(5) {
        0 => (Amount::Count(0), Amount::Count(1)),
        1 => (share("25%"), share("25%")),
        2 => (Amount::Count(2), Amount::Count(1)),
        _ => (Amount::Count(1), Amount::Count(0)),
    }
}

fn words(rng: &mut Rng, later: bool) -> Vec<String> {
    let mut words = vec![format!("ready={}ms", one_of(rng, &[5, 50, 300, 2000]))];
    match rng.below(8) {
        0 => words.push("term=ignore".to_owned()),
        1 => words.push(format!("term={}ms", one_of(rng, &[1, 500, 3000]))),
        2 => words.push(format!("linger={}ms", one_of(rng, &[50, 1000]))),
        _ => {}
    }
    if later {
        match rng.below(14) {
            0 => words.push(format!("exit=1@{}s", one_of(rng, &[3, 8, 30]))),
            1 => words.push("flaky=3s".to_owned()),
            2 => words.push("hang=6s".to_owned()),
            3 => words.extend(["exit=1@1s".to_owned(), "times=2".to_owned()]),
            4 => words.push("exit=0@9s".to_owned()),
            _ => {}
        }
    }
    words
}

fn job_words(rng: &mut Rng) -> Vec<String> {
    let text = match rng.below(7) {
        0 => "exit=1@200ms",
        1 => "exit=1@100ms times=1 then-exit=0@200ms",
        2 => "exit=3@10ms times=2 then-exit=0@500ms",
        3 => "exit=0@4s",
        _ => "exit=0@300ms",
    };
    text.split(' ').map(str::to_owned).collect()
}

impl ServiceShape {
    fn random(rng: &mut Rng, stack: &Stack, index: usize) -> Self {
        let mut depends_on = BTreeMap::new();
        for earlier in SERVICES.iter().take(index).filter(|name| stack.services.contains_key(**name)) {
            if coin(rng, 45) {
                let until = one_of(rng, &[Condition::Ready, Condition::Ready, Condition::Started]);
                let on_loss = one_of(rng, &[OnLoss::Ignore, OnLoss::Hold, OnLoss::Stop]);
                depends_on.insert(service(earlier), Dependency { until, on_loss });
            }
        }
        if stack.jobs.contains_key("migrate") && coin(rng, 40) {
            depends_on.insert(
                job("migrate"),
                Dependency { until: Condition::Completed, on_loss: one_of(rng, &[OnLoss::Ignore, OnLoss::Hold]) },
            );
        }
        if stack.volumes.contains_key("data") && coin(rng, 40) {
            depends_on.insert(volume("data"), Dependency { until: Condition::Started, on_loss: OnLoss::Ignore });
        }
        let ready = one_of(
            rng,
            &[
                ReadyBy::Nothing,
                ReadyBy::Http,
                ReadyBy::Http,
                ReadyBy::Exec,
                ReadyBy::Notify,
                ReadyBy::Log,
                ReadyBy::Deep,
            ],
        );
        Self {
            words: words(rng, true),
            level: 0,
            replicas: u32::try_from(rng.below(5)).unwrap_or(1),
            port: match rng.below(4) {
                0 => None,
                1 => Some(Some(8000 + u16::try_from(rng.below(500)).unwrap_or(0))),
                _ => Some(None),
            },
            depends_on,
            ready,
            every: one_of(rng, &[500, 1000, 3000]),
            thresholds: (one_of(rng, &[1, 1, 2]), one_of(rng, &[1, 2, 3])),
            live: coin(rng, 40),
            restart: one_of(
                rng,
                &[RestartPolicy::Always, RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never],
            ),
            budget: one_of(rng, &[None, Some(2), Some(5)]),
            grace: one_of(rng, &[100, 1000, 5000]),
            surge: surge(rng),
            drain: (one_of(rng, &[0, 500, 3000]), one_of(rng, &[0, 2000, 8000])),
            deadlines: (one_of(rng, &[5, 10]), one_of(rng, &[30, 60, 120])),
            restarts: 0,
        }
    }
}

impl JobShape {
    fn random(rng: &mut Rng) -> Self {
        Self {
            words: job_words(rng),
            depends_on: BTreeMap::new(),
            retries: u32::try_from(rng.below(4)).unwrap_or(0),
            timeout: one_of(rng, &[1, 10]),
        }
    }
}
