//! A control plane that dies and comes back.

use orchestra_engine::{Clock, RunRequest};
use orchestra_model::record::RunState;

use crate::support::{Place, environment, until};

const STACK: &str = "
version: 1
name: demo
services:
  web: {command: [run], replicas: 2, ports: {http: 8080}, depends_on: {db: ready}, health: {ready: none}}
  db: {command: [run], health: {ready: {notify: true}}}
";

#[tokio::test(flavor = "multi_thread")]
async fn instances_are_adopted_and_routes_stay() {
    let place = Place::new();
    let id = environment("demo/dev");
    let stack = STACK.replace(", health: {ready: {notify: true}}", "");
    let running = place.open().await;
    assert_eq!(running.run(&id, running.stack(&stack)).await.state, RunState::Succeeded);
    let pids = running.pids(&id).await;
    let endpoints = |place: &Place| {
        place
            .network
            .table()
            .routes
            .iter()
            .flat_map(|r| r.backends.clone())
            .flat_map(|b| b.endpoints)
            .collect::<Vec<_>>()
    };
    let before = endpoints(&place);
    running.kill().await;
    for _ in 0..3 {
        running_again(&place, &id, &pids).await;
        assert_eq!(endpoints(&place), before, "the first table after a recovery has every endpoint");
    }
}

async fn running_again(
    place: &Place,
    id: &orchestra_model::EnvironmentId,
    pids: &std::collections::BTreeMap<String, u32>,
) {
    let running = place.open().await;
    assert_eq!(&running.pids(id).await, pids);
    running.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_keep_the_time_at_which_they_entered_their_phase() {
    let place = Place::new();
    let id = environment("demo/dev");
    let stack = STACK.replace(", health: {ready: {notify: true}}", "");
    let running = place.open().await;
    assert_eq!(running.run(&id, running.stack(&stack)).await.state, RunState::Succeeded);
    let before = Clock::wall();
    running.kill().await;
    for _ in 0..2 {
        let running = place.open().await;
        let view = running.control.view(&id).await.unwrap();
        let instances: Vec<_> = view.status.resources.iter().flat_map(|resource| &resource.instances).collect();
        assert_eq!(instances.len(), 3);
        for instance in instances {
            let since = view.since(instance);
            assert!(since <= before, "{} is {} since {since}, not before {before}", instance.id, instance.phase);
        }
        running.kill().await;
    }
    // What begins anew counts from then.
    let running = place.open().await;
    let ended = running.run(&id, RunRequest::restart(Vec::new())).await;
    assert_eq!(ended.state, RunState::Succeeded);
    let view = running.control.view(&id).await.unwrap();
    for instance in view.status.resources.iter().flat_map(|resource| &resource.instances) {
        assert!(view.since(instance) >= ended.started_at, "{}", instance.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_after_the_control_plane_died_in_it() {
    let place = Place::new();
    let id = environment("demo/dev");
    let running = place.open().await;
    let started = running.control.start_run(&id, running.stack(STACK)).await.unwrap();
    until(&running, "db runs", async || running.pids(&id).await.contains_key("db-r1-1")).await;
    running.kill().await;

    let running = place.open().await;
    let key = orchestra_model::launch::LaunchKey {
        environment: id.clone(),
        instance: "db-r1-1".parse().unwrap(),
        attempt: 1,
    };
    place.world.notify(&key, orchestra_model::launch::ProviderEvent::NotifiedReady);
    until(&running, "the run succeeded", async || {
        running.control.run(started.run.id).await.unwrap().state == RunState::Succeeded
    })
    .await;
    assert_eq!(running.pids(&id).await.len(), 3);
    running.run(&id, RunRequest::down(false)).await;
    assert!(running.pids(&id).await.is_empty());
}
