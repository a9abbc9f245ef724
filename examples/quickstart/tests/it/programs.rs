//! What a stack relies on: migration once, chats that stream, a queue that survives its workers, an orderly end.

use std::time::{Duration, Instant};

use orchestra_quickstart::store::{Store, TaskState};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::{API, Program, SOON, WEB, WORKER, migrate};

fn data() -> TempDir {
    let data = tempfile::tempdir().unwrap();
    migrate(data.path());
    data
}

fn text(events: &[(String, Value)]) -> String {
    events.iter().filter(|(name, _)| name == "token").map(|(_, data)| data["text"].as_str().unwrap()).collect()
}

fn last(events: &[(String, Value)]) -> &str {
    &events.last().expect("a chat has events").0
}

#[test]
fn migrate_says_what_it_did_and_does_it_once() {
    let data = tempfile::tempdir().unwrap();
    let first = migrate(data.path());
    assert!(first.contains("step 1 of 3: sessions and messages") && first.contains("version 3 now"), "{first}");
    assert!(migrate(data.path()).contains("nothing to do"));
}

#[test]
fn migrations_side_by_side_do_each_step_once() {
    let data = tempfile::tempdir().unwrap();
    let logs: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| migrate(data.path()))).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    let steps: usize = logs.iter().map(|log| log.matches("step ").count()).sum();
    assert_eq!(steps, 3, "{logs:?}");
}

#[test]
fn a_chat_calls_a_tool_and_is_kept() {
    let data = data();
    let worker = Program::start(WORKER, data.path(), &[]);
    let api = Program::start(API, data.path(), &[("RELEASE_LABEL", "1.0"), ("INSTANCE", "api-r1-1"), ("PACE_MS", "0")]);
    assert_eq!(worker.get("/ready").0, 200);
    assert_eq!(api.get("/ready").0, 200);
    assert_eq!(api.get_json("/version"), json!({"release": "1.0", "style": "calm", "instance": "api-r1-1"}));

    let events = api.chat(&json!({"message": "What is 12 * 7?", "session": "s-1"}));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..3], ["session", "tool", "tool"]);
    assert_eq!(events[0].1["release"], "1.0");
    assert_eq!(events[2].1["state"], "done");
    assert_eq!(events[2].1["result"]["value"], 84.0);
    assert!(text(&events).contains("12 * 7 is 84."), "{}", text(&events));
    assert_eq!(last(&events), "done");
    worker.wait_for_line("calculate attempt 1 done");

    let events = api.chat(&json!({"message": "What did we say so far?", "session": "s-1"}));
    assert!(text(&events).contains("1 message of 5 words"), "{}", text(&events));
    let kept = api.get_json("/v1/sessions/s-1");
    assert_eq!(kept["messages"].as_array().unwrap().len(), 4);
    assert_eq!(kept["messages"][0]["text"], "What is 12 * 7?");
    assert_eq!(kept["messages"][3]["text"], text(&events));
    assert_eq!(api.get_json("/v1/sessions")["sessions"][0]["id"], "s-1");
    assert_eq!(api.get("/v1/sessions/other").0, 404);
}

#[test]
fn instances_share_the_volume() {
    let data = data();
    let apis: Vec<Program> = (0..2).map(|_| Program::start(API, data.path(), &[("PACE_MS", "0")])).collect();
    std::thread::scope(|scope| {
        for n in 0..4 {
            let apis = &apis;
            scope.spawn(move || {
                for turn in 0..8 {
                    let session = format!("s-{n}");
                    let chat = json!({"message": "count to 5", "session": session});
                    assert_eq!(text(&apis[turn % 2].chat(&chat)), "1 2 3 4 5");
                }
            });
        }
    });
    for n in 0..4 {
        let kept = apis[n % 2].get_json(&format!("/v1/sessions/s-{n}"));
        assert_eq!(kept["messages"].as_array().unwrap().len(), 16);
    }
}

#[test]
fn without_a_worker_the_agent_says_so() {
    let data = data();
    let api =
        Program::start(API, data.path(), &[("TOOL_TIMEOUT_MS", "100"), ("PACE_MS", "0"), ("AGENT_STYLE", "brisk")]);
    let events = api.chat(&json!({"message": "hello"}));
    assert_eq!(text(&events), "keywords: no worker. Turn 1. Next?");
    assert_eq!(last(&events), "done");
}

#[test]
fn a_killed_workers_task_is_done_by_the_next() {
    let data = data();
    let store = Store::open(&data.path().join("agents.db")).unwrap();
    // A worker took the task and was killed: nobody will ever complete this lease.
    let id = store.queue("calculate", &json!({"text": "1 + 1"})).unwrap();
    store.lease("killed", Duration::from_millis(300)).unwrap().unwrap();
    let worker = Program::start(WORKER, data.path(), &[]);
    worker.wait_for_line(&format!("task {id} calculate attempt 2 done"));
    assert_eq!(store.task_state(id).unwrap(), TaskState::Done(json!({"expression": "1 + 1", "value": 2.0})));
}

#[test]
fn on_term_readiness_fails_and_what_has_begun_is_finished() {
    let data = data();
    let mut api = Program::start(API, data.path(), &[]);
    let mut stream = api.post("/v1/chat", &json!({"message": "count to 100", "pace_ms": 20}).to_string());
    assert_eq!(stream.event().unwrap().0, "session");
    api.signal("TERM");
    api.wait_for_line("asked to end; 1 in flight");
    let end = Instant::now() + SOON;
    while api.get("/ready").0 != 503 {
        assert!(Instant::now() < end);
    }
    assert_eq!(api.post("/v1/chat", &json!({"message": "hello"}).to_string()).status(), 503);
    let events: Vec<_> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(text(&events).split(' ').count(), 100);
    assert_eq!(last(&events), "done");
    assert!(api.wait().success());
}

#[test]
fn a_client_that_goes_away_leaves_nothing_in_flight() {
    let data = data();
    let mut api = Program::start(API, data.path(), &[]);
    let mut stream = api.post("/v1/chat", &json!({"message": "count to 100000", "pace_ms": 1}).to_string());
    stream.event().unwrap();
    drop(stream);
    api.signal("TERM");
    assert!(api.wait().success(), "it ends at once and not after a hundred thousand tokens");
}

#[test]
fn workers_and_web_end_when_asked() {
    let data = data();
    for (program, env) in [(WORKER, ("X", "")), (WEB, ("API_URL", "http://127.0.0.1:1"))] {
        let mut program = Program::start(program, data.path(), &[env]);
        assert_eq!(program.get("/health").0, 200);
        program.signal("TERM");
        assert!(program.wait().success());
    }
}

#[test]
fn not_ready_when_told_so_or_before_the_migration() {
    let data = data();
    let api = Program::start(API, data.path(), &[("FAIL_READY", "1")]);
    assert_eq!(api.get("/health").0, 200);
    assert_eq!(api.get("/ready"), (503, "FAIL_READY=1: this release never becomes ready\n".to_owned()));

    let empty = tempfile::tempdir().unwrap();
    let api = Program::start(API, empty.path(), &[]);
    let (status, reason) = api.get("/ready");
    assert!(status == 503 && reason.contains("run migrate"), "{reason}");
    let worker = Program::start(WORKER, empty.path(), &[]);
    assert_eq!(worker.get("/ready").0, 503);
    migrate(empty.path());
    assert_eq!(api.get("/ready").0, 200, "ready without a restart");
    assert_eq!(worker.get("/ready").0, 200);
}

#[test]
fn every_third_request_fails_when_told_so_and_no_check() {
    let data = data();
    let api = Program::start(API, data.path(), &[("FAIL_EVERY", "3")]);
    let answers: Vec<u16> = (0..6).map(|_| api.get("/version").0).collect();
    assert_eq!(answers, [500, 200, 200, 500, 200, 200]);
    assert!((0..6).all(|_| api.get("/ready").0 == 200 && api.get("/health").0 == 200));
}

#[test]
fn bad_requests_are_refused() {
    let data = data();
    let api = Program::start(API, data.path(), &[]);
    for body in [
        "",
        "[]",
        "{}",
        "{\"message\": \"\"}",
        "{\"message\": \"x\", \"sesion\": \"y\"}",
        "{\"message\": \"x\", \"session\": \"../x\"}",
        &json!({"message": "x".repeat(9_000)}).to_string(),
    ] {
        assert_eq!(api.post("/v1/chat", body).status(), 400, "{body}");
    }
    assert_eq!(api.post("/v1/chat", &"x".repeat(100_000)).status(), 413);
    assert_eq!(api.get_json("/v1/sessions"), json!({"sessions": []}), "nothing was kept of them");
}

#[test]
fn the_page_reaches_the_api_through_its_own_origin() {
    let data = data();
    let api = Program::start(API, data.path(), &[("RELEASE_LABEL", "1.0")]);
    let url = format!("http://{}", api.address);
    let web = Program::start(WEB, data.path(), &[("API_URL", &url)]);
    let (status, page) = web.get("/");
    assert!(status == 200 && page.contains("api/v1/chat"));
    assert_eq!(web.get_json("/api/version")["release"], "1.0");
    assert_eq!(web.get("/api/v1/sessions/none").0, 404);

    // Tokens come through as they are made: the first one long before the last one exists.
    let chat = json!({"message": "count to 4", "pace_ms": 300});
    let mut stream = web.post("/api/v1/chat", &chat.to_string());
    assert_eq!(stream.event().unwrap().0, "session");
    let mut times = Vec::new();
    while let Some((name, _)) = stream.event() {
        if name == "token" {
            times.push(Instant::now());
        }
    }
    assert_eq!(times.len(), 4);
    assert!(times[3] - times[0] >= Duration::from_millis(600), "{times:?}");

    drop(api);
    let (status, reason) = web.get("/api/version");
    assert!(status == 502 && reason.contains("does not answer"), "{reason}");
    assert_eq!(web.get("/ready").0, 200);
}
