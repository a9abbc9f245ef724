//! What the tests of the parts of an environment begin with.

use std::collections::BTreeMap;

use orchestra_model::{
    Desired, Plan, ResourceId, RunId, Text,
    desired::{
        Drain, Health, Port, Program, Protocol, Resources, Restart, RestartPolicy, Service, Signal, Stop, Strategy,
    },
    plan::{Action, PLAN_FORMAT, Step},
    quantity::{Amount, Percent, Timespan},
    record::{EnvironmentRecord, RunKind},
    rollout::Rollout,
    time::UnixMillis,
    traffic::PortPolicy,
};

use super::Event;
use crate::Settings;

/// A place whose wall clock shows `epoch` when the machine starts.
pub(super) fn settings(epoch: UnixMillis) -> Settings {
    Settings {
        seed: 1,
        ports: (20_000, 20_999),
        base_env: BTreeMap::new(),
        hold: Timespan::seconds(1),
        hold_limit: 100,
        log_max_bytes: 1,
        log_keep: 1,
        epoch,
    }
}

pub(super) fn step(resource: ResourceId, action: Action) -> Step {
    Step {
        resource,
        action,
        reasons: Vec::new(),
        changes: Vec::new(),
        after: BTreeMap::new(),
        base: None,
        target: None,
    }
}

pub(super) fn plan(record: &EnvironmentRecord, desired: Option<Desired>, steps: Vec<Step>) -> Plan {
    Plan {
        format: PLAN_FORMAT,
        environment: record.id.clone(),
        base: record.stable,
        desired,
        steps,
        unchanged: 0,
        kept: Vec::new(),
        flags: Vec::new(),
    }
}

/// The request for a run, numbered as the engine does.
pub(super) fn requested(record: &EnvironmentRecord, kind: RunKind, plan: Plan) -> Event {
    let run = record.next_run(RunId(record.generation.0 + 1), kind, plan, 5);
    let release = run.new_release(String::new()).map(Box::new);
    Event::RunRequested { run: Box::new(run), release, source: String::new() }
}

pub(super) fn rolling() -> Strategy {
    Strategy::Rolling { max_surge: Amount::Share(Percent::whole(25)), max_unavailable: Amount::Count(0) }
}

/// One instance behind a port `http`.
pub(super) fn service(version: u32, strategy: Strategy) -> Service {
    let second = Timespan::seconds(1);
    let port = Port {
        host: std::net::Ipv4Addr::LOCALHOST.into(),
        port: None,
        protocol: Protocol::Http,
        policy: PortPolicy::default(),
    };
    Service {
        program: Program {
            command: vec![Text::literal("/bin/api"), Text::literal(version.to_string())],
            directory: "/".to_owned(),
            env: BTreeMap::new(),
            user: None,
            umask: None,
            limits: BTreeMap::new(),
            ports: ["http".parse().unwrap()].into(),
            resources: Resources::default(),
            ready_line: None,
            notify: false,
            watchdog: None,
        },
        replicas: 1,
        scale: None,
        metrics: None,
        restarts: 0,
        ports: [("http".parse().unwrap(), port)].into(),
        depends_on: BTreeMap::new(),
        health: Health { ready: None, live: None, start_deadline: Timespan::seconds(60) },
        restart: Restart {
            policy: RestartPolicy::Always,
            backoff: second,
            max_backoff: second,
            reset_after: second,
            budget: Some(0),
        },
        stop: Stop { signal: Signal::Term, grace: second },
        rollout: Rollout {
            strategy,
            drain: Drain { requests: second, streams: second },
            deadline: Timespan::seconds(300),
            min_ready: Timespan::default(),
            progress: Timespan::seconds(100),
        },
    }
}
