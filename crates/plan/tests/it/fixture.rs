//! Desired states for the tests and the benchmark, and a tiny pure apply.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use orchestra_model::{
    Desired, EnvironmentId, Plan, ReleaseNumber, Resource, ResourceId, Text,
    desired::{
        Condition, Dependency, Drain, Health, Job, OnLoss, Port, Program, Protocol, Resources, Restart, RestartPolicy,
        Rollout, Service, Signal, Stop, Strategy, Target, Volume,
    },
    flag::FlagSet,
    plan::Action,
    quantity::{Amount, Timespan},
    record::ResourceRecord,
    text::{Reference, Segment},
    traffic::PortPolicy,
};
use orchestra_plan::Current;

pub(crate) fn environment() -> EnvironmentId {
    "demo/dev".parse().expect("a valid id")
}

pub(crate) fn rid(text: &str) -> ResourceId {
    text.parse().expect("a valid id")
}

pub(crate) fn text(text: &str) -> Text {
    Text::literal(text)
}

/// A text with a hole in it.
pub(crate) fn url_of(service: &str) -> Text {
    let reference =
        Reference::ServiceUrl { service: service.parse().expect("a name"), port: "http".parse().expect("a name") };
    Text(vec![Segment::Reference(reference), Segment::Literal("/v1".to_owned())])
}

pub(crate) fn program(command: &str) -> Program {
    Program {
        command: command.split(' ').map(text).collect(),
        directory: "/srv/demo".to_owned(),
        env: BTreeMap::new(),
        user: None,
        umask: None,
        limits: BTreeMap::new(),
        ports: BTreeSet::from(["http".parse().expect("a name")]),
        resources: Resources::default(),
        ready_line: None,
        notify: false,
        watchdog: None,
    }
}

fn stop() -> Stop {
    Stop { signal: Signal::Term, grace: Timespan::seconds(10) }
}

pub(crate) fn service(command: &str) -> Service {
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    Service {
        program: program(command),
        replicas: 1,
        scale: None,
        metrics: None,
        restarts: 0,
        ports: [(
            "http".parse().expect("a name"),
            Port { host, port: Some(8080), protocol: Protocol::Http, policy: PortPolicy::default() },
        )]
        .into(),
        depends_on: BTreeMap::new(),
        health: Health { ready: None, live: None, start_deadline: Timespan::seconds(60) },
        restart: Restart {
            policy: RestartPolicy::Always,
            backoff: Timespan::millis(500),
            max_backoff: Timespan::seconds(60),
            reset_after: Timespan::seconds(600),
            budget: Some(5),
        },
        stop: stop(),
        rollout: Rollout {
            strategy: Strategy::Rolling { max_surge: Amount::Count(1), max_unavailable: Amount::Count(0) },
            drain: Drain { requests: Timespan::seconds(30), streams: Timespan::seconds(900) },
            deadline: Timespan::seconds(600),
            min_ready: Timespan::default(),
            progress: Rollout::default_progress(),
        },
    }
}

pub(crate) fn job(command: &str) -> Job {
    Job {
        program: program(command),
        depends_on: BTreeMap::new(),
        retries: 2,
        timeout: Timespan::seconds(600),
        backoff: Timespan::seconds(1),
        stop: stop(),
    }
}

pub(crate) fn volume(path: &str) -> Resource {
    Resource::Volume(Volume { path: path.to_owned(), managed: true })
}

/// Makes `resource` depend on `to`, in the way that fits its kind.
pub(crate) fn depend(resource: &mut Resource, to: &str) {
    let to = rid(to);
    let until = match to.kind {
        orchestra_model::ResourceKind::Volume => Condition::Started,
        orchestra_model::ResourceKind::Job => Condition::Completed,
        orchestra_model::ResourceKind::Service => Condition::Ready,
    };
    let edges = match resource {
        Resource::Service(service) => &mut service.depends_on,
        Resource::Job(job) => &mut job.depends_on,
        Resource::Volume(_) => return,
    };
    edges.insert(to, Dependency { until, on_loss: OnLoss::Ignore });
}

pub(crate) fn depending(mut resource: Resource, on: &[&str]) -> Resource {
    for to in on {
        depend(&mut resource, to);
    }
    resource
}

pub(crate) fn desired(resources: impl IntoIterator<Item = (&'static str, Resource)>) -> Desired {
    Desired {
        environment: environment(),
        target: Target::Process,
        resources: resources.into_iter().map(|(id, resource)| (rid(id), resource)).collect(),
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    }
}

/// A volume, a migration that needs it, an API that needs both, a page that needs the API.
pub(crate) fn stack() -> Desired {
    let mut web = service("./bin/web --listen");
    web.program.env.insert("API_URL".to_owned(), url_of("api"));
    desired([
        ("volume.data", volume("/var/lib/demo/data")),
        ("job.migrate", depending(Resource::Job(job("./bin/migrate")), &["volume.data"])),
        ("service.api", depending(Resource::Service(service("./bin/api")), &["job.migrate", "volume.data"])),
        ("service.web", depending(Resource::Service(web), &["service.api"])),
    ])
}

pub(crate) fn service_of<'a>(desired: &'a mut Desired, id: &str) -> &'a mut Service {
    match desired.resources.get_mut(&rid(id)) {
        Some(Resource::Service(service)) => service,
        _ => panic!("no service {id}"),
    }
}

pub(crate) fn job_of<'a>(desired: &'a mut Desired, id: &str) -> &'a mut Job {
    match desired.resources.get_mut(&rid(id)) {
        Some(Resource::Job(job)) => job,
        _ => panic!("no job {id}"),
    }
}

pub(crate) fn record(id: &ResourceId, applied: &Resource, release: u64) -> ResourceRecord {
    ResourceRecord {
        environment: environment(),
        id: id.clone(),
        applied: applied.clone(),
        digest: applied.digest(),
        release: ReleaseNumber(release),
        depends_on: applied.dependencies(),
        completed: true,
    }
}

/// What is there once everything desired was applied as release 1.
pub(crate) fn applied(desired: &Desired) -> Current {
    Current {
        base: Some(ReleaseNumber(1)),
        resources: desired.resources.iter().map(|(id, r)| (id.clone(), record(id, r, 1))).collect(),
        observed: BTreeMap::new(),
        flags: desired.flags.clone(),
    }
}

/// What is there once every step of the plan was done as the next release.
pub(crate) fn apply(plan: &Plan, current: &Current) -> Current {
    let release = ReleaseNumber(current.base.map_or(1, |base| base.0 + 1));
    let mut next =
        Current { base: plan.desired.is_some().then_some(release), observed: BTreeMap::new(), ..current.clone() };
    next.flags = plan.desired.as_ref().map(|desired| desired.flags.clone()).unwrap_or_default();
    for step in &plan.steps {
        if step.action == Action::Delete {
            next.resources.remove(&step.resource);
        } else {
            let desired = plan.desired.as_ref().expect("only deletions have no goal");
            let record = record(&step.resource, &desired.resources[&step.resource], release.0);
            assert_eq!(Some(&record.digest), step.target.as_ref(), "a step names the digest that it leads to");
            next.resources.insert(step.resource.clone(), record);
        }
    }
    next
}
