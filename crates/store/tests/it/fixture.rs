//! Records for the tests and the benchmark.

use std::{collections::BTreeMap, path::Path};

use orchestra_model::{
    Desired, Digest, EnvironmentId, Event, EventKind, Generation, Plan, ReleaseNumber, Resource, ResourceId,
    ResourceKind, RunId,
    desired::{Target, Volume},
    flag::FlagSet,
    plan::{Action, FlagStep, PLAN_FORMAT},
    record::{
        Change, EnvironmentRecord, InstanceIntent, InstanceRecord, JournalEntry, JournalKind, ReleaseRecord,
        ReleaseState, ResourceRecord, RunKind, RunRecord, RunState,
    },
};
use orchestra_store::Store;

/// The wall-clock time of every test.
pub(crate) const NOW: u64 = 1_800_000_000_000;

pub(crate) fn open(home: &Path) -> Store {
    Store::open(home, || NOW).unwrap()
}

pub(crate) fn id() -> EnvironmentId {
    "demo/dev".parse().unwrap()
}

pub(crate) fn environment() -> EnvironmentRecord {
    EnvironmentRecord {
        source: "/srv/demo/orchestra.yaml".to_owned(),
        generation: Generation(1),
        ..EnvironmentRecord::new(id())
    }
}

pub(crate) fn instance(ordinal: u32) -> InstanceRecord {
    InstanceRecord {
        environment: id(),
        id: format!("api-r1-{ordinal}").parse().unwrap(),
        kind: ResourceKind::Service,
        launch_digest: Digest::of("launch"),
        attempt: 1,
        ports: [("http".parse().unwrap(), 40_000)].into(),
        intent: InstanceIntent::Run,
        was_ready: false,
        last_exit: None,
        forced: None,
        recent_restarts: 0,
        restarts: 0,
        created_at: NOW,
    }
}

pub(crate) fn journal(key: impl Into<String>, entry: JournalKind) -> Change {
    Change::Journal(JournalEntry { key: key.into(), run: None, entry })
}

pub(crate) fn event(cause: impl Into<String>) -> Event {
    Event {
        sequence: 0,
        at: 0,
        environment: id(),
        kind: EventKind::InstanceReady,
        resource: None,
        instance: None,
        release: None,
        run: None,
        cause: cause.into(),
    }
}

/// What the launch of one instance writes.
pub(crate) fn launch(ordinal: u32) -> Vec<Change> {
    vec![
        Change::Instance(Box::new(instance(ordinal))),
        journal(format!("demo/dev/api-r1-{ordinal}#1 launch"), JournalKind::Intent),
        Change::Event(Box::new(event(format!("launch {ordinal}")))),
    ]
}

pub(crate) fn volume(name: &str, path: &str) -> (ResourceId, Resource) {
    let id = ResourceId::new(ResourceKind::Volume, name.parse().unwrap());
    (id, Resource::Volume(Volume { path: path.to_owned(), managed: true }))
}

pub(crate) fn desired(paths: &[&str]) -> Desired {
    let resources = paths.iter().enumerate().map(|(at, path)| volume(&format!("v{at}"), path)).collect();
    Desired {
        environment: id(),
        target: Target::Process,
        resources,
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    }
}

pub(crate) fn release(number: u64, run: u64) -> ReleaseRecord {
    ReleaseRecord {
        environment: id(),
        number: ReleaseNumber(number),
        created_at: NOW,
        run: RunId(run),
        reason: "up".to_owned(),
        state: ReleaseState::Deploying,
        desired: desired(&[&format!("/srv/{number}")]),
        verdicts: Vec::new(),
    }
}

pub(crate) fn run(number: u64, generation: u64, release: Option<u64>) -> RunRecord {
    RunRecord {
        id: RunId(number),
        environment: id(),
        kind: RunKind::Up,
        generation: Generation(generation),
        release: release.map(ReleaseNumber),
        plan: Plan {
            format: PLAN_FORMAT,
            environment: id(),
            base: None,
            desired: release.map(|number| desired(&[&format!("/srv/{number}")])),
            steps: Vec::new(),
            unchanged: 3,
            kept: Vec::new(),
            flags: vec![FlagStep {
                flag: "editor".parse().unwrap(),
                action: Action::Delete,
                changes: Vec::new(),
                base: Some(Digest::of(&1)),
                target: None,
            }],
        },
        state: RunState::Running,
        steps: BTreeMap::new(),
        started_at: NOW,
        ended_at: None,
        problems: Vec::new(),
        reverted: None,
        culprits: Vec::new(),
        request_key: None,
    }
}

/// The changes that begin run `number` with generation and release of the same number.
pub(crate) fn begin(number: u64, stable: Option<u64>) -> Vec<Change> {
    vec![
        Change::Environment(EnvironmentRecord {
            generation: Generation(number),
            last_release: ReleaseNumber(number),
            stable: stable.map(ReleaseNumber),
            run: Some(RunId(number)),
            ..environment()
        }),
        Change::Release(Box::new(release(number, number))),
        Change::Run(Box::new(run(number, number, Some(number)))),
    ]
}

/// The changes that end it well.
pub(crate) fn succeed(number: u64, before: Option<u64>) -> Vec<Change> {
    let mut changes = vec![
        Change::ReleaseState(id(), ReleaseNumber(number), ReleaseState::Stable),
        Change::Run(Box::new(RunRecord {
            state: RunState::Succeeded,
            ended_at: Some(NOW),
            ..run(number, number, Some(number))
        })),
        Change::Environment(EnvironmentRecord {
            generation: Generation(number),
            last_release: ReleaseNumber(number),
            stable: Some(ReleaseNumber(number)),
            ..environment()
        }),
    ];
    if let Some(before) = before {
        changes.push(Change::ReleaseState(id(), ReleaseNumber(before), ReleaseState::Retired));
    }
    changes
}

pub(crate) fn resource(name: &str, path: &str) -> ResourceRecord {
    let (id, applied) = volume(name, path);
    ResourceRecord {
        environment: self::id(),
        id,
        digest: applied.digest(),
        applied,
        release: ReleaseNumber(1),
        depends_on: BTreeMap::new(),
        completed: false,
    }
}
