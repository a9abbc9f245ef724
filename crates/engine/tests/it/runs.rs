//! Runs from request to record.

use orchestra_engine::{EngineError, RunRequest};
use orchestra_model::{
    Code, ReleaseNumber,
    record::{ReleaseState, RunState},
    rollout::RolloutCommand,
};

use crate::support::{Place, environment, until};

const STACK: &str = "
version: 1
name: demo
services:
  api: {command: [run], replicas: 2, ports: {http: 8080}, depends_on: {db: ready}, health: {ready: none}}
  db: {command: [run]}
";

#[tokio::test(flavor = "multi_thread")]
async fn up_is_a_fixed_point_and_down_leaves_nothing() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    let first = running.run(&id, running.stack(STACK)).await;
    assert_eq!(first.state, RunState::Succeeded, "{:?}", first.problems);
    assert_eq!(first.release, Some(ReleaseNumber(1)));
    let again = running.run(&id, running.stack(STACK)).await;
    assert!(again.plan.is_empty() && again.release.is_none(), "{:?}", again.plan.steps);
    assert_eq!(running.pids(&id).await.len(), 3);
    let table = place.network.table();
    assert_eq!(table.routes.len(), 1);
    assert_eq!(table.routes[0].backends.iter().map(|b| b.endpoints.len()).sum::<usize>(), 2);

    let down = running.run(&id, RunRequest::down(false)).await;
    assert_eq!(down.state, RunState::Succeeded);
    assert!(running.pids(&id).await.is_empty());
    assert!(place.network.table().routes.is_empty());
    let state = running.control.store().reader().state(&id).unwrap().unwrap();
    assert!(state.instances.is_empty() && state.resources.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn scale_restart_and_rollback_are_releases() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    running.run(&id, running.stack(STACK)).await;
    let before = running.pids(&id).await;
    running.run(&id, RunRequest::scale([("api".parse().unwrap(), 3)].into())).await;
    assert_eq!(running.pids(&id).await.len(), 4);
    running.run(&id, RunRequest::restart(vec!["db".parse().unwrap()])).await;
    until(&running, "the old db is gone", async || !running.pids(&id).await.contains_key("db-r1-1")).await;
    assert_eq!(running.pids(&id).await.get("api-r1-1"), before.get("api-r1-1"), "others are not touched");
    let back = running.control.rollback(&id, Some(ReleaseNumber(1))).await.unwrap();
    let record = running.run(&id, back).await;
    assert_eq!((record.state, record.release), (RunState::Succeeded, Some(ReleaseNumber(4))));
    let releases = running.control.store().reader().releases(&id, 10).unwrap();
    let states: Vec<ReleaseState> = releases.iter().map(|r| r.state).collect();
    assert_eq!(states, [ReleaseState::Stable, ReleaseState::Retired, ReleaseState::Retired, ReleaseState::Retired]);
    // The file says two replicas and knows no restart: nothing is left to do.
    assert!(running.run(&id, running.stack(STACK)).await.plan.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_is_refused_while_one_goes_on() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    let slow = STACK.replace("db: {command: [run]}", "db: {command: [run], health: {ready: {notify: true}}}");
    let started = running.control.start_run(&id, running.stack(&slow)).await.unwrap();
    let refused = running.control.start_run(&id, running.stack(STACK)).await.unwrap_err();
    assert!(matches!(&refused, EngineError::Busy { run, .. } if *run == started.run.id), "{refused}");
    assert_eq!(refused.diagnostics()[0].code, Code::RUN_IN_PROGRESS);
    assert!(running.control.cancel(started.run.id).await.unwrap().is_some());
    until(&running, "the run is cancelled", async || {
        running.control.run(started.run.id).await.unwrap().state == RunState::Cancelled
    })
    .await;
    assert!(running.pids(&id).await.is_empty(), "nothing ran before, so nothing runs after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_key_starts_one_run_however_often_it_is_made() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    running.run(&id, running.stack(STACK)).await;
    let restart = |key: &str| RunRequest::restart(Vec::new()).with_key(Some(key.to_owned()));
    // Twice at once: the answer to the first one may be lost before it has done anything.
    let (first, second) =
        tokio::join!(running.control.start_run(&id, restart("one")), running.control.start_run(&id, restart("one")));
    let (first, second) = (first.unwrap().run, second.unwrap().run);
    assert_eq!(first.id, second.id);
    until(&running, "the run has ended", async || {
        running.control.run(first.id).await.unwrap().state == RunState::Succeeded
    })
    .await;
    // After its end, and after the control plane died: the answer says how it went.
    assert_eq!(running.run(&id, restart("one")).await.id, first.id);
    running.kill().await;
    let running = place.open().await;
    let again = running.control.start_run(&id, restart("one")).await.unwrap().run;
    assert_eq!((again.id, again.state, again.request_key.as_deref()), (first.id, RunState::Succeeded, Some("one")));
    assert_eq!(running.control.run_of_request("one".to_owned()).await.unwrap().unwrap().id, first.id);
    // A part of a key is no key, and another key is another request.
    assert_eq!(running.control.run_of_request("on".to_owned()).await.unwrap(), None);
    assert_ne!(running.run(&id, restart("two")).await.id, first.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_refused_with_what_does() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    let missing = running.control.start_run(&id, RunRequest::down(false)).await.unwrap_err();
    assert!(matches!(missing, EngineError::NotFound(_)));
    running.run(&id, running.stack(STACK)).await;
    let refused = running.control.start_run(&id, RunRequest::restart(vec!["ap".parse().unwrap()])).await.unwrap_err();
    assert!(refused.diagnostics()[0].help.as_ref().unwrap().contains("api, db"));
    let refused = running.control.rollback(&id, None).await.unwrap_err();
    assert_eq!(refused.diagnostics()[0].code, Code::NOTHING_TO_ROLL_BACK_TO);
}

/// Whoever aborts, or promotes past a hook, does not want its command to go on by itself for as long as it likes.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_answer_nobody_waits_for_is_ended() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    let begun = place.home.path().join("begun");
    let stack = |version: u32| {
        let command = format!("[/bin/sh, -c, 'echo $$ > {}; sleep 600']", begun.display());
        let steps = format!("[{{scale: 1}}, {{hook: {{command: {command}, timeout: 1h}}}}]");
        let rollout = format!("{{canary: {{steps: {steps}, keep_warm: 0s}}, deadline: 2h}}");
        let service =
            format!("command: [run, \"{version}\"], directory: /, health: {{ready: none}}, rollout: {rollout}");
        format!("version: 1\nname: demo\nservices:\n  api: {{{service}}}\n")
    };
    running.run(&id, running.stack(&stack(1))).await;
    for (version, command, ends) in
        [(2, RolloutCommand::Abort, RunState::Cancelled), (3, RolloutCommand::Promote, RunState::Succeeded)]
    {
        let started = running.control.start_run(&id, running.stack(&stack(version))).await.unwrap();
        let pid = || std::fs::read_to_string(&begun).unwrap_or_default().trim().to_owned();
        until(&running, "the hook is asked", async || !pid().is_empty()).await;
        let process = std::path::Path::new("/proc").join(pid());
        assert!(process.exists());
        running.control.rollout(&id, None, command, "ada".to_owned()).await.unwrap();
        until(&running, "the command is gone", async || !process.exists()).await;
        until(&running, "the run has ended", async || running.control.run(started.run.id).await.unwrap().state == ends)
            .await;
        std::fs::remove_file(&begun).unwrap();
    }
}

/// What no stack file may ask for, nobody may ask for; and the driver is there for the next one.
#[tokio::test(flavor = "multi_thread")]
async fn more_instances_than_a_file_may_have_are_refused() {
    let place = Place::new();
    let running = place.open().await;
    let id = environment("demo/dev");
    running.run(&id, running.stack(STACK)).await;
    for count in [10_001, 99_999, u32::MAX] {
        let scale = RunRequest::scale([("api".parse().unwrap(), count)].into());
        let refused = running.control.start_run(&id, scale).await.unwrap_err();
        assert_eq!(refused.diagnostics()[0].code, Code::INVALID_VALUE, "{refused}");
    }
    assert_eq!(running.pids(&id).await.len(), 3);
}
