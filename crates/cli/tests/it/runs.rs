//! `up` and the other commands that start runs: progress, ends of every kind, Ctrl-C, and servers that die on the way.

use orchestra_api::{Frame, RunEvent, scripted::Exchange};
use orchestra_cli::Exit;
use orchestra_model::{Code, Diagnostic};
use serde_json::{Value, json};

use crate::environment::{TestEnvironment, plan, refusal, run, status};

const EVENTS: &str = "GET /v1/runs/run_7/events";
const STATUS: &str = "GET /v1/environments/shop/dev";

fn frame(event: Value) -> Frame {
    Frame::run_event(&serde_json::from_value::<RunEvent>(event).unwrap())
}

fn progress(resource: &str, state: &str, ready: u32, extra: &Value) -> Frame {
    let desired = if resource.starts_with("service") { 2 } else { 0 };
    let action = if resource.starts_with("job") { "run" } else { "create" };
    let mut value = json!({"resource": resource, "action": action, "state": state, "ready": ready, "desired": desired, "elapsed_ms": 1300});
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    frame(json!({"progress": value}))
}

fn done(record: &Value) -> Frame {
    frame(json!({"done": record}))
}

fn started() -> Exchange {
    Exchange::json("POST /v1/runs", &json!({"run": run("running"), "warnings": []})).status(201)
}

fn good_frames() -> Vec<Frame> {
    vec![
        progress("service.api", "waiting", 0, &json!({"waits_for": [{"reason": "job.migrate to complete"}]})),
        progress("job.migrate", "running", 0, &json!({})),
        progress("job.migrate", "succeeded", 0, &json!({})),
        progress("service.api", "running", 1, &json!({})),
        progress("service.api", "succeeded", 2, &json!({})),
        done(&run("succeeded")),
    ]
}

#[tokio::test]
async fn up_starts_a_server_shows_progress_and_ends_with_addresses() {
    let mut test = TestEnvironment::new();
    let body = json!({"up": {"source": test.source()}});
    test.spawns(vec![
        started().expect_body(&body),
        Exchange::events(EVENTS, &good_frames()),
        Exchange::json(STATUS, &status()),
    ]);
    let outcome = test.run("up").await;
    insta::assert_snapshot!(outcome.page());
    test.finish();
}

#[tokio::test]
async fn up_that_changes_nothing_says_so() {
    let mut test = TestEnvironment::new();
    let mut record = run("succeeded");
    record["plan"]["steps"] = json!([]);
    test.server(vec![
        Exchange::json("POST /v1/runs", &json!({"run": record, "warnings": []})).status(201),
        Exchange::json(STATUS, &status()),
    ]);
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::Success);
    assert!(outcome.stdout.starts_with("shop/dev is up to date (release 3): nothing to do\n"), "{}", outcome.stdout);
    assert_eq!(outcome.stderr, "", "a server that runs is not worth a word");
    test.finish();
}

#[tokio::test]
async fn up_with_json_prints_every_event_and_the_run() {
    let mut test = TestEnvironment::new();
    test.server(vec![started(), Exchange::events(EVENTS, &good_frames())]);
    let outcome = test.run("up --json").await;
    assert_eq!(outcome.exit, Exit::Success);
    let values = outcome.ndjson();
    assert_eq!(values.len(), 6);
    assert_eq!(values[0]["progress"]["resource"], "service.api");
    assert_eq!(values[5]["done"]["state"], "succeeded");
    test.finish();
}

#[tokio::test]
async fn up_quietly_prints_nothing() {
    let mut test = TestEnvironment::new();
    test.spawns(vec![started(), Exchange::events(EVENTS, &good_frames())]);
    let outcome = test.run("up --quiet").await;
    assert_eq!((outcome.exit, &outcome.stdout[..], &outcome.stderr[..]), (Exit::Success, "", ""));
    test.finish();
}

#[tokio::test]
async fn a_run_that_fails_says_why_and_what_was_put_back() {
    let mut test = TestEnvironment::new();
    let mut record = run("failed");
    let problem = Diagnostic::error(Code::NOT_READY, "api-r3-1 did not become ready within 30s")
        .note("last lines of api-r3-1:")
        .note("panic: no database\x1b[2J")
        .help("orchestra logs --instance api-r3-1");
    record["problems"] = json!([problem]);
    record["reverted"] = json!("release 2 is in force again; service.api was put back");
    let reverting = json!({"event": {"sequence": 5, "at": 1, "environment": "shop/dev", "kind": "run_reverting", "run": "run_7", "cause": "service.api failed"}});
    test.server(vec![
        started(),
        Exchange::events(
            EVENTS,
            &[
                progress("job.migrate", "succeeded", 0, &json!({})),
                progress("service.api", "failed", 0, &json!({"message": "not ready within 30s"})),
                frame(reverting),
                progress("service.api", "reverted", 0, &json!({})),
                done(&record),
            ],
        ),
    ]);
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::Failed);
    assert!(!outcome.stderr.contains('\x1b'));
    insta::assert_snapshot!(outcome.page());
    test.finish();
}

#[tokio::test]
async fn refusals_have_exit_codes_of_their_own() {
    for (status, code, exit) in [
        (409, Code::RUN_IN_PROGRESS, Exit::Refused),
        (409, Code::PLAN_STALE, Exit::Refused),
        (422, Code::UNKNOWN_KEY, Exit::Invalid),
        (500, Code::STATE_WRITE, Exit::Failed),
    ] {
        let mut test = TestEnvironment::new();
        test.server(vec![refusal("POST /v1/runs", status, &Diagnostic::error(code, "no"))]);
        let outcome = test.run("up --json").await;
        assert_eq!(outcome.exit, exit, "{code}");
        assert_eq!(outcome.json()["errors"][0]["code"], code.as_str());
        assert_eq!(outcome.stderr, "");
        test.finish();
    }
}

#[tokio::test]
async fn detach_returns_once_the_run_is_accepted() {
    let mut test = TestEnvironment::new();
    test.server(vec![started()]);
    let outcome = test.run("up --detach").await;
    assert_eq!((outcome.exit, &outcome.stdout[..]), (Exit::Success, "run_7 was started: up shop/dev\n"));
    test.finish();
}

#[tokio::test]
async fn the_other_verbs_ask_for_what_they_say() {
    for (line, body) in [
        ("down -e shop/dev", json!({"down": {"environment": "shop/dev", "volumes": false}})),
        ("down --volumes -e shop/dev", json!({"down": {"environment": "shop/dev", "volumes": true}})),
        ("restart api -e shop/dev", json!({"restart": {"environment": "shop/dev", "services": ["api"]}})),
        (
            "scale api=3 web=0 -e shop/dev",
            json!({"scale": {"environment": "shop/dev", "replicas": {"api": 3, "web": 0}}}),
        ),
        ("rollback -e shop/dev", json!({"rollback": {"environment": "shop/dev"}})),
        ("rollback --to 2 -e shop/dev", json!({"rollback": {"environment": "shop/dev", "to": 2}})),
    ] {
        let mut test = TestEnvironment::new();
        test.server(vec![started().expect_body(&body)]);
        let outcome = test.run(&format!("{line} --detach")).await;
        assert_eq!(outcome.exit, Exit::Success, "{line}: {}", outcome.page());
        test.finish();
    }
    let mut test = TestEnvironment::new();
    assert_eq!(test.run("scale api=1 api=2").await.exit, Exit::Invalid);
    test.finish();
}

#[tokio::test]
async fn ctrl_c_cancels_and_says_what_state_it_leaves() {
    let mut test = TestEnvironment::new();
    let mut record = run("cancelled");
    record["problems"] = json!([Diagnostic::error(Code::RUN_CANCELLED, "the run was cancelled")]);
    record["reverted"] = json!("service.api was taken down again");
    test.server(vec![
        started(),
        Exchange::events(EVENTS, &[progress("service.api", "running", 0, &json!({}))])
            .then_at_the_end(&[done(&record)]),
        Exchange::json("POST /v1/runs/run_7/cancel", &run("reverting")).status(202),
    ]);
    let command = test.start("up");
    let (stdout, interrupts) = (test.stdout.clone(), test.interrupts.clone());
    let press = async move {
        while !stdout.text().contains("service.api") {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
    };
    let (exit, ()) = tokio::join!(command, press);
    let outcome = test.outcome(exit);
    assert_eq!(outcome.exit, Exit::Cancelled, "{}", outcome.page());
    assert!(outcome.stderr.contains("cancelling run_7"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("run_7 was cancelled: service.api was taken down again"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn ctrl_c_twice_leaves_the_run_to_the_server() {
    let mut test = TestEnvironment::new();
    test.server(vec![
        started(),
        Exchange::events(EVENTS, &[progress("service.api", "running", 0, &json!({}))]).open(),
        Exchange::json("POST /v1/runs/run_7/cancel", &run("reverting")).status(202),
    ]);
    let command = test.start("up");
    let (stdout, stderr, interrupts) = (test.stdout.clone(), test.stderr.clone(), test.interrupts.clone());
    let presses = async move {
        while !stdout.text().contains("service.api") {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
        while !stderr.text().contains("cancelling run_7") {
            tokio::task::yield_now().await;
        }
        interrupts.send(()).await.unwrap();
    };
    let (exit, ()) = tokio::join!(command, presses);
    assert_eq!(exit, Exit::Interrupted);
}

#[tokio::test]
async fn ctrl_c_is_heard_while_a_silent_server_is_asked_for_the_reason() {
    let mut test = TestEnvironment::new();
    test.server(vec![
        started(),
        Exchange::events(EVENTS, &[progress("service.api", "running", 0, &json!({}))]).open(),
        // After two seconds without news; the answer never comes.
        Exchange::json(STATUS, &status()).chunks(Vec::new()).open(),
    ]);
    let command = test.start("up");
    let (stderr, interrupts) = (test.stderr.clone(), test.interrupts.clone());
    let presses = async {
        while !test.is_exhausted() {
            tokio::task::yield_now().await;
        }
        let pressed = std::time::Instant::now();
        interrupts.send(()).await.unwrap();
        while !stderr.text().contains("cancelling run_7") {
            tokio::task::yield_now().await;
        }
        let heard = pressed.elapsed();
        interrupts.send(()).await.unwrap();
        heard
    };
    let (exit, heard) = tokio::join!(command, presses);
    assert_eq!(exit, Exit::Interrupted);
    assert!(heard < std::time::Duration::from_secs(1), "{heard:?}");
}

#[tokio::test]
async fn a_run_whose_place_was_taken_says_so() {
    let mut test = TestEnvironment::new();
    let mut record = run("cancelled");
    record["problems"] = json!([Diagnostic::error(Code::SUPERSEDED, "release 3 was superseded by a newer release")]);
    record["reverted"] = json!("release 2 is in force again");
    test.server(vec![started(), Exchange::events(EVENTS, &[done(&record)])]);
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::Cancelled, "{}", outcome.page());
    assert!(outcome.stderr.ends_with("run_7 was superseded: release 2 is in force again\n"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn a_killed_server_is_started_again_and_the_run_followed_to_its_end() {
    let mut test = TestEnvironment::new();
    test.server(vec![started(), Exchange::events(EVENTS, &[progress("job.migrate", "running", 0, &json!({}))]).open()]);
    test.spawns(vec![Exchange::events(EVENTS, &good_frames()[2..].to_vec()), Exchange::json(STATUS, &status())]);
    let command = test.start("up");
    let stdout = test.stdout.clone();
    let kill = async {
        while !stdout.text().contains("job.migrate") {
            tokio::task::yield_now().await;
        }
        test.kill_server();
    };
    let (exit, ()) = tokio::join!(command, kill);
    let outcome = test.outcome(exit);
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    assert!(outcome.stderr.contains("the connection to the server was lost"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("started the server"), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("job.migrate  completed").count(), 1, "{}", outcome.stdout);
    test.finish();
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_and_the_run_followed() {
    let mut test = TestEnvironment::new();
    // It dies with the run started, or not: the client cannot know.
    test.server(vec![started().chunks(Vec::new()).cut()]);
    test.spawns(vec![started(), Exchange::events(EVENTS, &good_frames()), Exchange::json(STATUS, &status())]);
    let command = test.start("up");
    let kill = async {
        while !test.is_exhausted() {
            tokio::task::yield_now().await;
        }
        // What it was asked is remembered.
        let keys = test.idempotency_keys();
        test.kill_server();
        keys
    };
    let (exit, mut keys) = tokio::join!(command, kill);
    let outcome = test.outcome(exit);
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    assert!(outcome.stderr.contains("the connection to the server was lost; asking again"), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("shop/dev is ready"), "{}", outcome.stdout);
    keys.extend(test.idempotency_keys());
    let [Some(first), Some(second)] = &keys[..] else { panic!("{keys:?}") };
    assert_eq!((first, first.len()), (second, 32));
    test.finish();
    // Another command is another request.
    let mut test = TestEnvironment::new();
    test.server(vec![started(), started()]);
    test.run("up --detach").await;
    test.run("up --detach").await;
    let keys = test.idempotency_keys();
    assert_ne!(keys[0], keys[1]);
    test.finish();
}

#[tokio::test]
async fn a_server_that_never_answers_leaves_it_open_whether_the_run_was_started() {
    let mut test = TestEnvironment::new();
    test.server((0..6).map(|_| started().chunks(Vec::new()).cut()).collect());
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::NoServer, "{}", outcome.page());
    assert!(outcome.stderr.contains("the run may have been started"), "{}", outcome.stderr);
    test.finish();
}

#[tokio::test]
async fn on_a_terminal_a_tree_is_drawn_in_place() {
    let mut test = TestEnvironment::new();
    test.terminal(80, 24);
    test.variable("NO_COLOR", "1");
    test.server(vec![started(), Exchange::events(EVENTS, &good_frames()), Exchange::json(STATUS, &status())]);
    let outcome = test.run("up").await;
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    let last = outcome.stdout.rsplit("\x1b[J").next().unwrap();
    let mut lines = last.lines();
    assert!(lines.next().unwrap().starts_with("run_7  shop/dev  up  release 3"), "{last}");
    assert!(lines.next().unwrap().starts_with("├─ job.migrate  completed"), "{last}");
    assert!(lines.next().unwrap().starts_with("└─ service.api  ready        2/2"), "{last}");
    assert!(last.ends_with("api      http  http://127.0.0.1:8080\n"), "{last}");
    test.finish();
}

#[tokio::test]
async fn a_saved_plan_is_applied_as_it_is() {
    let mut test = TestEnvironment::new();
    test.in_process(vec![Exchange::json("POST /v1/plan", &json!({"plan": plan(), "warnings": []}))]);
    let outcome = test.run("plan --out next.plan --exit-code").await;
    assert_eq!(outcome.exit, Exit::Changes, "{}", outcome.page());
    let mut sent = serde_json::to_value(serde_json::from_value::<orchestra_model::Plan>(plan()).unwrap()).unwrap();
    sent.sort_all_objects();
    let body = json!({"apply": {"plan": sent, "source_path": test.cwd().join("orchestra.yaml")}});
    test.server(vec![started().expect_body(&body)]);
    let outcome = test.run("up --plan next.plan --detach").await;
    assert_eq!(outcome.exit, Exit::Success, "{}", outcome.page());
    std::fs::write(test.cwd().join("next.plan"), "{}").unwrap();
    let outcome = test.run("up --plan next.plan").await;
    assert_eq!(outcome.exit, Exit::Invalid, "{}", outcome.page());
    test.finish();
}

#[tokio::test]
async fn a_reader_that_leaves_ends_the_command_quietly() {
    let mut test = TestEnvironment::new();
    test.closes_after(40);
    test.server(vec![started(), Exchange::events(EVENTS, &good_frames())]);
    let outcome = test.run("up").await;
    assert_eq!((outcome.exit, &outcome.stderr[..]), (Exit::Success, ""));
}
