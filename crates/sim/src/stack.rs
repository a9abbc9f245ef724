//! Random stacks as stack files, and what a stack file desires.

use std::{collections::BTreeMap, fmt::Write as _};

use orchestra_machine::rng::Rng;
use orchestra_model::{
    Desired, Name, ResourceId, ResourceKind,
    desired::{Condition, Dependency, OnLoss, RestartPolicy},
    quantity::Amount,
};
use orchestra_spec::{Context, Source};

/// What a stack file desires.
///
/// # Errors
/// All that is wrong with it, one line each.
pub fn load(text: &str) -> Result<Desired, String> {
    let context =
        Context { directory: "/stack".to_owned(), volumes: "/volumes".to_owned(), environment: None, preview: None };
    match orchestra_spec::load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context) {
        Ok(loaded) => Ok(loaded.desired),
        Err(problems) => Err(problems.iter().map(|problem| problem.message.clone()).collect::<Vec<_>>().join("\n")),
    }
}

/// A stack before it is written out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stack {
    /// Services by name.
    pub services: BTreeMap<String, ServiceShape>,
    /// Jobs by name.
    pub jobs: BTreeMap<String, JobShape>,
    /// Volumes by name, with their path if Orchestra does not choose it.
    pub volumes: BTreeMap<String, Option<String>>,
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

/// Ports that another program has in every random world.
pub const FOREIGN_PORTS: [u16; 4] = [8660, 8661, 8662, 8663];

// === as text ===

impl Stack {
    /// The stack file.
    pub fn text(&self) -> String {
        let mut text = "version: 1\nname: demo\n".to_owned();
        let mut section = |key: &str, parts: Vec<String>| {
            if !parts.is_empty() {
                let _ = writeln!(text, "{key}:\n{}", parts.join("\n"));
            }
        };
        let volume = |(name, path): (&String, &Option<String>)| match path {
            Some(path) => format!("  {name}: {{path: {path}}}"),
            None => format!("  {name}:"),
        };
        section("volumes", self.volumes.iter().map(volume).collect());
        section("jobs", self.jobs.iter().map(|(name, shape)| format!("  {name}:\n{}", shape.text())).collect());
        section("services", self.services.iter().map(|(name, shape)| format!("  {name}:\n{}", shape.text())).collect());
        text
    }
}

fn command(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!(", \"{word}\"")).collect();
    format!("[program{}]", words.concat())
}

fn edges(depends_on: &BTreeMap<ResourceId, Dependency>) -> String {
    let edge = |(on, dependency): (&ResourceId, &Dependency)| {
        let until = match dependency.until {
            Condition::Started => "started",
            Condition::Ready => "ready",
            Condition::Completed => "completed",
        };
        let on_loss = match dependency.on_loss {
            OnLoss::Ignore => "ignore",
            OnLoss::Hold => "hold",
            OnLoss::Stop => "stop",
        };
        format!("{}: {{until: {until}, on_loss: {on_loss}}}", on.name)
    };
    format!("{{{}}}", depends_on.iter().map(edge).collect::<Vec<_>>().join(", "))
}

impl ServiceShape {
    fn text(&self) -> String {
        // A check over HTTP needs a port.
        let ready = match self.ready {
            ReadyBy::Http | ReadyBy::Deep if self.port.is_none() => ReadyBy::Exec,
            ready => ready,
        };
        let check = match ready {
            ReadyBy::Nothing => None,
            ReadyBy::Http => Some("http: /ready".to_owned()),
            ReadyBy::Exec => Some("exec: [./check]".to_owned()),
            ReadyBy::Notify => Some("notify: true".to_owned()),
            ReadyBy::Log => Some("log: listening".to_owned()),
            ReadyBy::Deep => {
                let on = self.depends_on.keys().filter(|on| on.kind == ResourceKind::Service);
                let parts: Vec<String> = on.map(|on| format!(", {{dependency: {}}}", on.name)).collect();
                Some(format!("all: [{{http: /ready}}{}]", parts.concat()))
            }
        };
        let timing = format!(
            "every: {}ms, every_starting: 200ms, timeout: 1s, pass_after: {}, fail_after: {}",
            self.every, self.thresholds.0, self.thresholds.1
        );
        let policy = match self.restart {
            RestartPolicy::Always => "always",
            RestartPolicy::OnFailure => "on_failure",
            RestartPolicy::Never => "never",
        };
        let budget = self.budget.map_or_else(|| "unlimited".to_owned(), |budget| budget.to_string());
        let mut lines = vec![
            format!("command: {}", command(&self.words)),
            format!("env: {{LEVEL: {}}}", self.level),
            format!("replicas: {}", self.replicas),
            format!("depends_on: {}", edges(&self.depends_on)),
            format!(
                "restart: {{policy: {policy}, backoff: 200ms, max_backoff: 5s, reset_after: 20s, budget: {budget}}}"
            ),
            format!("stop: {{grace: {}ms}}", self.grace),
            "rollout:".to_owned(),
            format!("  rolling: {{max_surge: {}, max_unavailable: {}}}", self.surge.0, self.surge.1),
            format!("  drain: {{requests: {}ms, streams: {}ms}}", self.drain.0, self.drain.1),
            format!("  deadline: {}s", self.deadlines.1),
            "health:".to_owned(),
            format!("  start_deadline: {}s", self.deadlines.0),
        ];
        lines.extend(check.map(|check| format!("  ready: {{{check}, {timing}}}")));
        lines.extend(self.live.then(|| format!("  live: {{exec: [./live], {timing}}}")));
        lines.extend(self.port.map(|port| {
            let port = port.map_or_else(|| "auto".to_owned(), |port| port.to_string());
            format!("ports: {{http: {port}}}")
        }));
        lines.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
    }
}

impl JobShape {
    fn text(&self) -> String {
        format!(
            "    command: {}\n    depends_on: {}\n    retries: {}\n    timeout: {}s\n    backoff: 300ms\n    stop: {{grace: 1s}}",
            command(&self.words),
            edges(&self.depends_on),
            self.retries,
            self.timeout
        )
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
            stack.volumes.insert("data".to_owned(), one_of(rng, &[None, Some("/elsewhere/data")]).map(str::to_owned));
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
            let index = SERVICES.iter().position(|known| *known == name).unwrap_or(0);
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
                        2 => Some(Some(fixed_port(rng, index))),
                        _ => Some(Some(FOREIGN_PORTS[index])),
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
                        *path =
                            one_of(rng, &[None, Some("/elsewhere/data"), Some("/elsewhere/other")]).map(str::to_owned);
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

/// A port that no other service of the stack has.
fn fixed_port(rng: &mut Rng, index: usize) -> u16 {
    8000 + 100 * u16::try_from(index).unwrap_or(0) + u16::try_from(rng.below(100)).unwrap_or(0)
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
                1 => Some(Some(fixed_port(rng, index))),
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
