//! The server dies at every batch of a life, at every place within it: the law of recovery without a gap.

use std::time::Duration;

use orchestra_model::record::{RunKind, RunState};
use orchestra_sim::{
    operator, stack,
    world::{CrashPoint, Faults, World},
};

const V1: &str = "
version: 1
name: demo
volumes: {data: }
jobs:
  migrate: {command: [program, exit=0@200ms, 'v={{ volumes.data.path }}']}
services:
  api:
    command: [program, ready=100ms]
    replicas: 2
    ports: {http: auto}
    depends_on: {migrate: completed}
    health: {ready: {http: /ready}}
  web:
    command: [program, ready=50ms]
    depends_on: {api: {until: ready, on_loss: hold}}
    ports: {http: 8080}
    health: {ready: {http: /ready}}
";

const V2: &str = "
version: 1
name: demo
volumes: {data: }
jobs:
  migrate: {command: [program, exit=0@200ms, v=2, 'v={{ volumes.data.path }}']}
services:
  api:
    command: [program, ready=100ms, v=2]
    replicas: 3
    ports: {http: auto}
    depends_on: {migrate: completed}
    health: {ready: {http: /ready}}
  worker:
    command: [program, ready=50ms]
    depends_on: {api: started}
";

/// The same, but its last part never becomes ready, so that everything is put back.
const BAD: &str = "
version: 1
name: demo
volumes: {data: }
jobs:
  migrate: {command: [program, exit=0@200ms, v=3, 'v={{ volumes.data.path }}']}
services:
  api:
    command: [program, ready=100ms, v=3]
    replicas: 1
    ports: {http: 8081}
    depends_on: {migrate: completed}
    health: {ready: {http: /ready}}
  worker:
    command: [program, never-ready]
    depends_on: {api: ready}
    health: {ready: {exec: [./check]}, start_deadline: 2s}
";

/// Lives through first start, update, failed update and `down`. Returns the number of batches, or the broken law.
fn live(crash: Option<(u64, CrashPoint)>) -> Result<u64, String> {
    let mut world = World::new("demo/dev".parse().unwrap(), 7, Faults::default());
    world.exact = true;
    world.downtime = Some(Duration::from_millis(300));
    world.crash_batch = crash;
    let mut expected = None;
    for (text, ends) in [
        (Some(V1), RunState::Succeeded),
        (Some(V2), RunState::Succeeded),
        (Some(BAD), RunState::Failed),
        (None, RunState::Succeeded),
    ] {
        // A run whose request died with the server never was: it is asked for again.
        while world.disk.runs.values().next_back().map(|run| (run.state, run.id)) == expected {
            let here = |world: &World| world.server.is_some();
            let limit = world.now + Duration::from_secs(60);
            assert!(operator::until(&mut world, limit, here), "the server did not come back");
            match text {
                Some(text) => operator::up(&mut world, stack::load(text).unwrap()),
                None => operator::submit(&mut world, RunKind::Down { volumes: true }, None),
            };
            let ended =
                |world: &World| world.server.is_some() && world.disk.active_run().is_none() && world.is_settled();
            let limit = world.now + Duration::from_secs(3600);
            let settled = operator::until(&mut world, limit, ended);
            if let Some(law) = world.failure() {
                return Err(law.to_owned());
            }
            if !settled {
                return Err("it did not come to rest".to_owned());
            }
        }
        let last = world.disk.runs.values().next_back().map(|run| (run.state, run.id));
        if last.is_none_or(|(state, _)| state != ends) {
            return Err(format!("the run ended as {last:?}, not as {ends:?}"));
        }
        expected = last;
        let limit = world.now + Duration::from_secs(2);
        operator::until(&mut world, limit, |_| false);
        world.check_quiet();
        if let Some(law) = world.failure() {
            return Err(law.to_owned());
        }
    }
    if world.provider.alive().next().is_some() || !world.disk.instances.is_empty() || !world.volumes.is_empty() {
        return Err("something is left after `down --volumes`".to_owned());
    }
    Ok(world.batches)
}

#[test]
fn a_crash_at_any_place_changes_no_outcome() {
    let batches = live(None).expect("it goes well without a crash");
    assert!(batches > 100, "{batches} batches are not a life");
    let mut broken = Vec::new();
    for batch in 1..=batches {
        for point in [
            CrashPoint::BeforeCommit,
            CrashPoint::AfterEffects(0),
            CrashPoint::AfterEffects(1),
            CrashPoint::AfterEffects(usize::MAX),
        ] {
            if let Err(law) = live(Some((batch, point))) {
                broken.push(format!("batch {batch}, {point:?}: {law}"));
            }
        }
    }
    assert!(broken.is_empty(), "{} of {} crashes broke a law:\n{}", broken.len(), batches * 4, broken.join("\n"));
}
