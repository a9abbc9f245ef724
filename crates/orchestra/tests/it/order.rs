//! Dependencies and checks.

use std::{fmt::Write as _, fs};

use serde_json::Value;

use crate::environment::{TestEnvironment, find};

fn position(events: &[Value], kind: &str, about: &str) -> usize {
    let fits = |event: &Value| {
        event["kind"] == kind
            && (event["instance"].as_str().is_some_and(|id| id.starts_with(about)) || event["resource"] == about)
    };
    events.iter().position(fits).unwrap_or_else(|| {
        let line = |event: &Value| format!("{} {} {}", event["kind"], event["instance"], event["resource"]);
        let all: Vec<String> = events.iter().map(line).collect();
        panic!("no {kind} of {about} in {all:#?}")
    })
}

#[test]
fn started_ready_and_completed_mean_what_they_say() {
    let env = TestEnvironment::new();
    env.write(
        r#"
version: 1
name: order
jobs:
  prepare: {command: [APP, job], env: {START_DELAY_MS: "100"}}
services:
  slow:
    command: [APP]
    ports: {http: auto}
    env: {START_DELAY_MS: "400"}
    health: {ready: {http: /ready, every_starting: 20ms}}
    stop: {grace: 5s}
  early:
    command: [APP]
    env: {PORT: "0", LOG_READY: go}
    depends_on: {slow: started}
    health: {ready: {log: go}}
    stop: {grace: 5s}
  late:
    command: [APP]
    env: {PORT: "0", LOG_READY: go}
    depends_on: {slow: ready, prepare: completed}
    health: {ready: {log: go}}
    stop: {grace: 5s}
"#,
    );
    env.ok(&["up"]);
    env.assert_consistent(&[("slow", 1), ("early", 1), ("late", 1)], "after `up`");
    let events = env.ok(&["events", "--json"]).json_lines();
    let at = |kind, about| position(&events, kind, about);
    assert!(at("instance_starting", "slow") < at("instance_launching", "early"));
    assert!(at("instance_launching", "early") < at("instance_ready", "slow"), "`started` waited for readiness");
    assert!(at("instance_ready", "slow") < at("instance_launching", "late"));
    assert!(at("instance_exited", "prepare") < at("instance_launching", "late"));

    // Down in the opposite order.
    env.ok(&["down"]);
    let events = env.ok(&["events", "--json"]).json_lines();
    let at = |kind, about| position(&events, kind, about);
    for user in ["early", "late"] {
        assert!(at("instance_gone", user) < at("instance_stopping", "slow"), "{user} outlived what it depends on");
    }
    env.finish();
}

#[test]
fn a_failed_job_fails_the_run() {
    let env = TestEnvironment::new();
    let stack = r#"
version: 1
name: failing
jobs:
  migrate: {command: [APP, job], env: {EXIT_CODE: "3", JOB_FILE: HERE/tries}, retries: 2, backoff: 20ms}
services:
  api:
    command: [APP]
    env: {PORT: "0"}
    depends_on: {migrate: completed}
    stop: {grace: 5s}
"#;
    env.write(stack);
    let failed = env.run(&["up"]).expect(1);
    for part in ["migrate", "exit code 3", "this job was told to fail", "nothing runs"] {
        assert!(failed.stderr.contains(part), "no `{part}`: {failed}");
    }
    assert_eq!(fs::read_to_string(env.path("tries")).unwrap().lines().count(), 3, "one try and two retries");
    env.assert_consistent(&[], "after a failed job");
    let events = env.ok(&["events", "--json"]).json_lines();
    assert!(
        !events.iter().any(|event| event["instance"].as_str().is_some_and(|id| id.starts_with("api"))),
        "api was started"
    );
    // A job that does not end within its time.
    env.write(&stack.replace("EXIT_CODE: \"3\"", "START_DELAY_MS: \"60000\"").replace("retries: 2", "timeout: 200ms"));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("200ms") || failed.stderr.contains("200 ms"), "{failed}");
    env.finish();
}

#[test]
fn a_lost_dependency_holds_stops_or_is_ignored() {
    let env = TestEnvironment::new();
    env.write(
        r"
version: 1
name: loss
services:
  db:
    command: [APP]
    ports: {http: auto}
    env: {UNREADY_FILE: HERE/unready}
    health: {ready: {http: /ready, every: 50ms, every_starting: 20ms}}
    stop: {grace: 5s}
  holds:
    command: [APP]
    ports: {http: auto}
    depends_on: {db: {until: ready, on_loss: hold}}
    health: {ready: {http: /ready, every: 50ms, every_starting: 20ms}}
    stop: {grace: 5s}
  stops:
    command: [APP]
    ports: {http: auto}
    depends_on: {db: {until: ready, on_loss: stop}}
    health: {ready: {http: /ready, every: 50ms, every_starting: 20ms}}
    stop: {grace: 5s}
  ignores:
    command: [APP]
    ports: {http: auto}
    depends_on: {db: {until: ready, on_loss: ignore}}
    health: {ready: {http: /ready, every: 50ms, every_starting: 20ms}}
    stop: {grace: 5s}
",
    );
    env.ok(&["up"]);
    let all = [("db", 1), ("holds", 1), ("stops", 1), ("ignores", 1)];
    env.assert_consistent(&all, "after `up`");
    let before = env.pids();
    let mut events = env.follow();
    fs::write(env.path("unready"), "").unwrap();
    events.event("instance_unready", "db");
    let status = env.wait_for("the consequences", |status| {
        find(status, "holds")["state"] == "held"
            && find(status, "stops")["instances"].as_array().is_none_or(|all| all.iter().all(|i| i["pid"].is_null()))
    });
    assert_eq!(status["health"], "degraded");
    assert_eq!(find(&status, "ignores")["state"], "ready", "{status:#}");
    let during = env.pids();
    assert_eq!(during.get("holds-r1-1"), before.get("holds-r1-1"), "hold must not touch the process");
    assert_eq!(during.get("ignores-r1-1"), before.get("ignores-r1-1"));
    fs::remove_file(env.path("unready")).unwrap();
    events.event("instance_ready", "db");
    env.assert_consistent(&all, "after the dependency came back");
    let after = env.pids();
    assert_eq!(after.get("holds-r1-1"), before.get("holds-r1-1"));
    assert_ne!(after.values().collect::<Vec<_>>(), before.values().collect::<Vec<_>>(), "`stop` stopped nothing");
    drop(events);
    env.finish();
}

#[test]
fn every_kind_of_check_works() {
    let env = TestEnvironment::new();
    let mut stack = String::from("version: 1\nname: checks\nservices:\n");
    let checks = [
        ("http", "http: {path: /ready, contains: ready, status: 200}"),
        ("tcp", "tcp: http"),
        ("exec", "exec: [\"sh\", \"-c\", \"test -n \\\"$PORT\\\"\"]"),
        ("log", "log: \"^here (I|we) am\""),
        ("notify", "notify: true"),
        ("grpc", "grpc: grpc"),
        ("all", "all: [{http: /ready}, {tcp: true}, {notify: true}]"),
        ("any", "any: [{http: /nothing-there}, {tcp: http}]"),
        ("most", "at_least: {count: 2, of: [{http: /ready}, {http: /nothing-there}, {log: \"^here\"}]}"),
        ("uses", "all: [{http: /ready}, {dependency: http}]"),
    ];
    for (name, check) in checks {
        let port = if name == "grpc" { "grpc" } else { "http" };
        write!(
            stack,
            "  {name}:\n    command: [APP]\n    ports: {{{port}: auto}}\n    env: {{NOTIFY: \"1\", LOG_READY: here we am, START_DELAY_MS: \"50\", UNREADY_FILE: HERE/unready}}\n    \
             health: {{ready: {{{check}, every: 100ms, every_starting: 20ms, timeout: 2s}}, start_deadline: 20s}}\n    stop: {{grace: 5s}}\n"
        )
        .unwrap();
    }
    env.write(&stack);
    env.ok(&["up"]);
    let all: Vec<(&str, u64)> = checks.iter().map(|(name, _)| (*name, 1)).collect();
    env.assert_consistent(&all, "after `up`");
    // What asks the program hears that it is not ready; what does not, does not.
    fs::write(env.path("unready"), "").unwrap();
    let asks = ["http", "grpc", "all", "most", "uses"];
    env.wait_for("what the checks say", |status| {
        checks.iter().all(|(name, _)| (find(status, name)["ready"] == 0) == asks.contains(name))
    });
    fs::remove_file(env.path("unready")).unwrap();
    env.assert_consistent(&all, "after the file is gone");
    env.finish();
}

#[test]
fn without_a_check_a_release_that_does_not_listen_replaces_nothing() {
    let env = TestEnvironment::new();
    let stack = r"
version: 1
name: quiet
services:
  api:
    command: [APP]
    ports: {http: auto}
    env: {VERSION: one}
    health: {start_deadline: 20s}
    restart: {backoff: 20ms, max_backoff: 50ms, budget: 2}
    stop: {grace: 5s}
";
    env.write(stack);
    env.ok(&["up"]);
    let pids = env.pids();
    // It runs for a moment, and ends before it listens: by its process alone it would have been ready.
    env.write(&stack.replace("command: [APP]", "command: \"sleep 0.2; exit 3\""));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0503") && failed.stderr.contains("release 1 is in force again"), "{failed}");
    assert_eq!(env.pids(), pids);
    assert_eq!(crate::tour::version(&env), "one");
    // Nothing is asked of who wants that.
    env.write(&stack.replace("command: [APP]", "command: sleep 1000").replace("start_deadline: 20s", "ready: none"));
    env.ok(&["up"]);
    env.assert_consistent(&[("api", 1)], "after `ready: none`");
    env.finish();
}

#[test]
fn a_failed_live_check_restarts() {
    let env = TestEnvironment::new();
    env.write(
        r"
version: 1
name: live
services:
  api:
    command: [APP]
    ports: {http: auto}
    env: {UNREADY_FILE: HERE/dead}
    health:
      ready: {tcp: true, every: 100ms, every_starting: 20ms}
      live: {http: /ready, every: 50ms, fail_after: 2}
    restart: {backoff: 20ms, max_backoff: 50ms, budget: unlimited}
    stop: {grace: 5s}
",
    );
    env.ok(&["up"]);
    let before = env.pids();
    let mut events = env.follow();
    fs::write(env.path("dead"), "").unwrap();
    let stopping = events.event("instance_stopping", "api");
    assert!(stopping["cause"].as_str().is_some_and(|cause| cause.contains("503")), "{stopping}");
    fs::remove_file(env.path("dead")).unwrap();
    events.event("instance_ready", "api");
    env.assert_consistent(&[("api", 1)], "after a restart by liveness");
    assert_ne!(env.pids(), before);
    drop(events);
    env.finish();
}
