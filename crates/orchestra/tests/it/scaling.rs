//! A service whose number of instances follows its load: it sleeps, is woken by a request, grows under load and shrinks
//! again, and no request fails on the way.

use std::time::{Duration, Instant};

use orchestra_testbed::load::{Load, Plan};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    load::get,
    processes::{self, Role},
};

const STACK: &str = r#"
version: 1
name: scaling
services:
  api:
    command: [APP]
    ports: {http: auto}
    env: {START_DELAY_MS: "500", VERSION: "1"}
    health: {ready: {http: /ready, every: 200ms, every_starting: 20ms}}
    rollout: {drain: {requests: 10s, streams: 20s}}
    scale:
      min: 0
      max: 3
      on: [{requests_in_flight: 2}]
      every: 1s
      down: {window: 2s}
      to_zero: {idle_for: 2s, cold_start: 20s}
"#;

fn api(env: &TestEnvironment) -> Value {
    find(&env.status(), "api").clone()
}

/// Waits until it has so many instances, all ready, and no other.
fn until(env: &TestEnvironment, count: u64) {
    env.wait_for(&format!("{count} instances"), |status| {
        let api = find(status, "api");
        let instances = api["instances"].as_array().map_or(0, Vec::len) as u64;
        (api["desired"].as_u64(), api["ready"].as_u64(), instances) == (Some(count), Some(count), count)
    });
}

#[test]
fn a_service_sleeps_wakes_grows_and_shrinks_and_no_request_fails() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    assert_eq!(api(&env)["ready"], 1, "a release shows that it works before it sleeps");
    let address = env.address("api");

    // It sleeps, says so, and an `up` of the same file has nothing to do.
    until(&env, 0);
    env.wait_for("its reason", |status| {
        find(status, "api")["scaling"].to_string().contains("it sleeps until the next request")
    });
    assert_eq!(api(&env)["state"], "asleep");
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("scaled down from 1 to 0: no request for 2s"), "{why}");
    let plan = env.ok(&["plan", "--json"]).json();
    assert_eq!(plan["plan"]["steps"].as_array().map(Vec::len), Some(0), "{plan:#}");

    // The next request waits for an instance, and for nothing else.
    let asked = Instant::now();
    assert_eq!(get(address, "/version").unwrap(), "1");
    let cold = asked.elapsed();
    assert!(cold >= Duration::from_millis(500), "it slept: {cold:?}");
    eprintln!("the request that woke it took {cold:?}; its program needs 500 ms");
    assert_eq!(api(&env)["desired"], 1);

    // It grows with what is in flight, and shrinks when that is gone.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let plan = Plan { get: 40, post: 20, streams: 6, ..Plan::to(address) };
    let load = runtime.block_on(async { Load::start(plan) });
    until(&env, 3);
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("requests_in_flight is"), "{why}");
    let report = runtime.block_on(load.stop());
    until(&env, 0);

    // Many at once wake it as one does.
    let load = runtime.block_on(async { Load::start(Plan { fresh: 50, streams: 2, ..Plan::to(address) }) });
    until(&env, 1);
    let second = runtime.block_on(load.stop());
    for report in [report, second] {
        eprintln!("{report}");
        assert!(report.ok() > 0 && report.failures.is_empty(), "{report}");
    }
    let events = env.ok(&["events", "--tail", "500", "--json"]).json_lines();
    let scaled: Vec<&str> =
        events.iter().filter(|event| event["kind"] == "scaled").filter_map(|event| event["cause"].as_str()).collect();
    assert!(scaled.iter().any(|cause| cause.starts_with("scaled up from 0 to 1: it slept")), "{scaled:#?}");
    assert!(scaled.iter().any(|cause| cause.contains(" to 3: requests_in_flight is")), "{scaled:#?}");
    env.finish();
}

#[test]
fn a_request_wakes_a_service_though_the_server_died_while_it_slept() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let address = env.address("api");
    until(&env, 0);
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    let request = std::thread::spawn(move || get(address, "/version"));
    // The next command starts a server; it finds a request that waits.
    env.wait_for("an instance", |status| find(status, "api")["ready"] == 1);
    assert_eq!(request.join().unwrap().unwrap(), "1");

    // A person sets the number; the next release keeps it, a person's bounds are those of the stack.
    let steady = STACK.replace("down: {window: 2s}", "down: {window: 5m}").replace("idle_for: 2s", "idle_for: 5m");
    env.write(&steady);
    env.ok(&["up"]);
    let scaled = env.ok(&["scale", "api=7"]);
    assert!(scaled.stderr.contains("scales by itself from 0 to 3: 7 becomes 3"), "{scaled}");
    until(&env, 3);
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    env.write(&steady.replace("VERSION: \"1\"", "VERSION: \"2\""));
    env.ok(&["up"]);
    until(&env, 3);
    assert_eq!(get(address, "/version").unwrap(), "2");
    env.finish();
}

#[test]
fn what_processes_use_is_measured() {
    let env = TestEnvironment::new();
    env.write(
        r#"
version: 1
name: busy
services:
  burner:
    command: [/bin/sh, -c, "while :; do :; done"]
    health: {ready: none}
    scale: {min: 1, max: 2, on: [{cpu: 50m}, {memory: 10Gi}], every: 1s}
"#,
    );
    env.ok(&["up"]);
    let status = env.wait_for("a second instance", |status| find(status, "burner")["ready"] == 2);
    let lines = find(&status, "burner")["scaling"].to_string();
    assert!(lines.contains("cpu is ") && lines.contains("memory is "), "{lines}");
    env.finish();
}
