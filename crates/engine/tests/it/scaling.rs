//! The number of instances follows what they use, and belongs to no release.

use std::time::Duration;

use orchestra_engine::RunRequest;
use orchestra_model::{EventKind, ReleaseNumber, launch::Usage, quantity::ByteSize, record::RunState};
use orchestra_store::EventFilter;

use crate::support::{Place, environment, until};

/// A program that keeps one core busy.
const STACK: &str = "
version: 1
name: demo
services:
  api:
    command: [spin]
    ports: {http: 8080}
    health: {ready: none}
    resources: {cpu: 1}
    scale: {min: 1, max: 3, on: [{cpu: 60%}], every: 1s, down: {window: 1s}}
";

#[tokio::test(flavor = "multi_thread")]
async fn a_service_grows_and_shrinks_with_its_cpu_and_its_releases_do_not_mind() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    assert_eq!(running.run(&id, running.stack(STACK)).await.state, RunState::Succeeded);
    until(&running, "each uses more than it should", async || running.pids(&id).await.len() == 3).await;
    assert!(place.network.table().routes[0].metered);
    let view = running.control.view(&id).await.unwrap();
    assert!(view.status.resources[0].scaling[0].contains("cpu is "), "{:?}", view.status.resources[0].scaling);
    assert_eq!(view.record.scaled["api"].replicas, 3);
    // The file says one to begin with, and that is no difference.
    assert!(running.run(&id, running.stack(STACK)).await.plan.is_empty());

    // The next control plane finds the number in force, and goes on with it.
    running.kill().await;
    let running = place.open().await;
    assert_eq!(running.control.view(&id).await.unwrap().status.resources[0].replicas, 3);
    for key in place.world.running() {
        place
            .world
            .set_usage(&key, Usage { cpu: Duration::from_secs(1000), memory: ByteSize::bytes(1 << 20), processes: 1 });
    }
    until(&running, "nothing is to be done", async || running.pids(&id).await.len() == 1).await;

    // A number by hand is compared with the one in force; it ends within the bounds.
    let by_hand = running.run(&id, RunRequest::scale([("api".parse().unwrap(), 1)].into())).await;
    assert!(by_hand.plan.is_empty(), "{:?}", by_hand.plan.steps);
    let request = RunRequest::scale([("api".parse().unwrap(), 9)].into());
    let planned = running.control.plan(&id, request.clone()).await.unwrap();
    let change = &planned.steps[0].changes[0];
    assert_eq!((change.path.as_str(), change.after.clone()), ("replicas", Some(3.into())), "{change:?}");
    let started = running.control.start_run(&id, request).await.unwrap();
    assert!(
        started.warnings[0].message.contains("scales by itself from 1 to 3: 9 becomes 3"),
        "{:?}",
        started.warnings
    );
    assert_eq!(started.run.release, Some(ReleaseNumber(2)));
    until(&running, "the run has ended", async || {
        running.control.run(started.run.id).await.unwrap().state == RunState::Succeeded
    })
    .await;
    let events =
        running.control.store().reader().events(&EventFilter { limit: 10_000, ..EventFilter::default() }).unwrap();
    let scaled: Vec<&str> =
        events.iter().filter(|event| event.kind == EventKind::Scaled).map(|event| event.cause.as_str()).collect();
    assert!(scaled.iter().any(|cause| cause.starts_with("scaled up from 1 to 2: cpu is ")), "{scaled:#?}");
    assert!(scaled.iter().any(|cause| cause.starts_with("scaled down from ")), "{scaled:#?}");
    running.kill().await;
}
