//! What the tests of the parts of an environment begin with.

use std::collections::{BTreeMap, VecDeque};

use orchestra_model::{
    Desired, EventKind, Now, Plan, ResourceId, RunId, Text,
    desired::{
        Drain, Health, Port, Program, Protocol, Resources, Restart, RestartPolicy, Service, Signal, Stop, Strategy,
    },
    plan::{Action, PLAN_FORMAT, Step},
    quantity::{Amount, Percent, Timespan},
    record::{EnvironmentRecord, EnvironmentState, RunKind},
    rollout::{Guard, OnInconclusive, Rollout},
    time::UnixMillis,
    traffic::{Permille, PortPolicy},
};

use super::{Environment, Event};
use crate::{Batch, Effect, Settings};

/// What a world in memory is made of: a machine, what it wrote down, what was noted, and the time.
pub(crate) type Parts<'a> = (&'a mut Environment, &'a mut EnvironmentState, &'a mut Vec<(EventKind, String)>, Now);

/// A world in memory that carries out at once what a machine wants.
pub(crate) trait World {
    fn parts(&mut self) -> Parts<'_>;

    /// What comes of an effect.
    fn effect(&mut self, effect: Effect) -> Vec<Event>;

    fn send(&mut self, event: Event) {
        let (machine, _, _, now) = self.parts();
        let batch = machine.handle(now, event);
        self.carry_out(batch);
    }

    fn carry_out(&mut self, batch: Batch) {
        let mut batches = VecDeque::from([batch]);
        while let Some(batch) = batches.pop_front() {
            let (_, disk, notes, _) = self.parts();
            let noted = batch.changes.into_iter().filter_map(|change| disk.apply(change));
            notes.extend(noted.map(|note| (note.kind, note.cause)));
            for effect in batch.effects {
                for event in self.effect(effect) {
                    let (machine, _, _, now) = self.parts();
                    batches.push_back(machine.handle(now, event));
                }
            }
        }
    }
}

/// A place whose wall clock shows `epoch` when the machine starts.
pub(crate) fn settings(epoch: UnixMillis) -> Settings {
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

pub(crate) fn step(resource: ResourceId, action: Action) -> Step {
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

pub(crate) fn plan(record: &EnvironmentRecord, desired: Option<Desired>, steps: Vec<Step>) -> Plan {
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
pub(crate) fn requested(record: &EnvironmentRecord, kind: RunKind, plan: Plan) -> Event {
    let run = record.next_run(RunId(record.generation.0 + 1), kind, plan, 5);
    let release = run.new_release(String::new()).map(Box::new);
    Event::RunRequested { run: Box::new(run), release, source: String::new() }
}

pub(crate) fn rolling() -> Strategy {
    Strategy::Rolling { max_surge: Amount::Share(Percent::whole(25)), max_unavailable: Amount::Count(0) }
}

/// One instance behind a port `http`.
pub(crate) fn service(version: u32, strategy: Strategy) -> Service {
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

/// A verdict over errors alone, at one percent, that holds where it does not know.
pub(crate) fn guard() -> Guard {
    Guard {
        alpha: Permille::new(10),
        errors: true,
        max_errors: None,
        latency: None,
        first_byte: None,
        first_token: None,
        counters: vec![],
        per_client: 2,
        clients: 2,
        warm_up: Timespan::default(),
        inconclusive: OnInconclusive::Hold,
        raise_to: None,
        probe: None,
        flag: None,
        prometheus: vec![],
    }
}
