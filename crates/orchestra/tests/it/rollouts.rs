//! Rollouts in steps as users run them: a canary that passes and one that fails by real requests, people who promote,
//! pause and abort, a newer release in the middle, the way back to a set that is still warm, and a server that dies.

use std::time::{Duration, Instant};

use orchestra_testbed::load::{Load, Plan, Report};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    load::get,
    processes::{self, Role},
};

fn stack(version: u32, env: &str, rollout: &str) -> String {
    format!(
        r#"
version: 1
name: rollouts
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}"{env}}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout: {{{rollout}, drain: {{requests: 5s, streams: 5s}}}}
"#
    )
}

/// Clients that go on until they are dropped.
struct Clients {
    runtime: tokio::runtime::Runtime,
    load: Option<Load>,
}

impl Clients {
    fn of(env: &TestEnvironment) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let plan = Plan { get: 60, post: 40, fresh: 60, ..Plan::to(env.address("api")) };
        let load = runtime.block_on(async { Load::start(plan) });
        Self { runtime, load: Some(load) }
    }

    fn stop(mut self) -> Report {
        let load = self.load.take().expect("it is stopped once");
        self.runtime.block_on(load.stop())
    }
}

fn rollout(env: &TestEnvironment) -> Value {
    find(&env.status(), "api")["rollout"].clone()
}

/// Waits until the rollout is as wanted.
fn until(env: &TestEnvironment, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    env.wait_for(what, |status| fits(&find(status, "api")["rollout"]))
}

fn versions(env: &TestEnvironment, count: usize) -> Vec<String> {
    let address = env.address("api");
    (0..count).map(|_| get(address, "/version").unwrap()).collect()
}

const JUDGED: &str = "canary: {steps: [{weight: 20}, {analysis: 60s}], keep_warm: 30s}";

#[test]
fn a_verdict_lets_a_good_canary_pass_and_turns_a_bad_one_back() {
    let env = TestEnvironment::new();
    env.write(&stack(1, "", JUDGED));
    env.ok(&["up"]);
    let clients = Clients::of(&env);

    // As good as the one before: promoted in place.
    env.write(&stack(2, "", JUDGED));
    env.ok(&["up"]);
    assert!(versions(&env, 5).iter().all(|version| version == "2"));
    let shown = env.ok(&["show", "2"]).text();
    assert!(shown.contains("verdict pass at step 2 on api, against release 1"), "{shown}");

    // A tenth of its answers are errors: turned back.
    env.write(&stack(3, ", FAIL_PERMILLE: \"300\"", JUDGED));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0704"), "{failed}");
    assert!(versions(&env, 5).iter().all(|version| version == "2"));
    let shown = env.ok(&["show", "3", "--json"]).json();
    assert_eq!(shown["state"], "failed", "{shown:#}");
    let verdict = &shown["verdicts"][0];
    assert_eq!(verdict["outcome"], "fail", "{verdict:#}");
    assert!(verdict["evidence"]["canary"]["bad"]["server_error"].as_u64().unwrap() >= 2, "{verdict:#}");

    let report = clients.stop();
    let ours = report.failures.iter().filter(|failure| failure.problem != "status 500").count();
    assert_eq!(ours, 0, "{report}");
    env.finish();
}

#[test]
fn a_rollback_finds_the_old_set_warm() {
    let env = TestEnvironment::new();
    let strategy = "blue_green: {after: [{pause: 10ms}], keep_warm: 10m}";
    env.write(&stack(1, "", strategy));
    env.ok(&["up"]);
    let clients = Clients::of(&env);
    let before = env.pids();
    env.write(&stack(2, "", strategy));
    env.ok(&["up"]);
    assert_eq!(rollout(&env)["phase"], "warm");
    assert!(versions(&env, 3).iter().all(|version| version == "2"));
    env.ok(&["rollback"]);
    assert!(versions(&env, 5).iter().all(|version| version == "1"));
    // Nothing was started for it: the same processes serve again.
    let after = env
        .wait_for("the new set to be gone", |status| find(status, "api")["instances"].as_array().unwrap().len() == 2);
    assert_eq!(crate::environment::pids(&after), before);
    let report = clients.stop();
    assert_eq!(report.failures.len(), 0, "{report}");
    env.finish();
}

#[test]
fn people_promote_pause_and_abort() {
    let env = TestEnvironment::new();
    let strategy =
        "canary: {steps: [{weight: 10}, {pause: {owner: ada}}, {weight: 50}, {pause: manual}], keep_warm: 0s}";
    env.write(&stack(1, "", strategy));
    env.ok(&["up"]);
    env.run(&["promote", "api"]).expect(1);

    env.write(&stack(2, "", strategy));
    let up = env.spawn(&["up"]);
    until(&env, "the first pause", |rollout| rollout["step"] == 2);
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("ada to promote or abort"), "{why}");
    env.ok(&["promote", "api"]);
    until(&env, "the second pause", |rollout| rollout["step"] == 4 && rollout["weight"] == "50%");
    env.ok(&["pause", "api"]);
    assert_eq!(find(&env.status(), "api")["state"], "paused");
    // A pause on a pause is one: it takes one person to go on.
    env.ok(&["promote"]);
    up.wait().expect(0);
    assert!(versions(&env, 3).iter().all(|version| version == "2"));

    env.write(&stack(3, "", strategy));
    let up = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    env.ok(&["abort"]);
    up.wait().expect(5);
    assert!(versions(&env, 5).iter().all(|version| version == "2"));

    env.write(&stack(4, "", strategy));
    let up = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    env.ok(&["promote", "api", "--full"]);
    up.wait().expect(0);
    assert!(versions(&env, 3).iter().all(|version| version == "4"));
    env.finish();
}

#[test]
fn what_a_release_removes_stays_until_its_rollouts_are_through() {
    let env = TestEnvironment::new();
    let strategy = "canary: {steps: [{weight: 10}, {pause: manual}], keep_warm: 0s}";
    let with_helper =
        |version: u32| stack(version, "", strategy) + "  helper:\n    command: [APP]\n    ports: {http: auto}\n";
    env.write(&with_helper(1));
    env.ok(&["up"]);
    let before = env.pids();
    let helper = env.address("helper");

    env.write(&stack(2, "", strategy));
    let plan = env.ok(&["plan"]).text();
    assert!(plan.contains("after service.api ready"), "{plan}");
    let up = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    assert_eq!(env.pids()["helper-r1-1"], before["helper-r1-1"]);
    get(helper, "/version").unwrap();
    env.ok(&["abort"]);
    up.wait().expect(5);
    // It was never stopped.
    env.assert_consistent(&[("api", 2), ("helper", 1)], "after the abort");
    assert_eq!(env.pids(), before);
    get(helper, "/version").unwrap();

    let up = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    env.ok(&["promote", "api"]);
    up.wait().expect(0);
    assert!(!env.pids().keys().any(|instance| instance.starts_with("helper")), "{:?}", env.pids());
    env.finish();
}

#[test]
fn a_newer_release_supersedes_a_rollout_and_keeps_its_baseline() {
    let env = TestEnvironment::new();
    let strategy = "canary: {steps: [{weight: 10}, {pause: manual}], keep_warm: 0s}";
    env.write(&stack(1, "", strategy));
    env.ok(&["up"]);
    let clients = Clients::of(&env);
    env.write(&stack(2, "", strategy));
    let first = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    // The same once more is no newer one.
    env.run(&["up"]).expect(4);
    env.write(&stack(3, "", strategy));
    let second = env.spawn(&["up"]);
    let superseded = first.wait().expect(5).text();
    let ended = superseded.lines().find(|line| line.contains("reverted")).expect("a last word of the service");
    assert!(!ended.ends_with(" 0ms"), "{superseded}");
    let status = until(&env, "the second rollout", |rollout| rollout["step"] == 2 && rollout["to"] == 3);
    assert_eq!(find(&status, "api")["rollout"]["from"], 1, "{status:#}");
    env.ok(&["promote"]);
    second.wait().expect(0);
    assert!(versions(&env, 3).iter().all(|version| version == "3"));
    let states: Vec<Value> =
        env.ok(&["history", "--json"]).json().as_array().unwrap().iter().map(|r| r["state"].clone()).collect();
    assert_eq!(states, ["stable", "superseded", "retired"]);
    // A rollback in the middle turns back.
    env.write(&stack(4, "", strategy));
    let third = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2 && rollout["to"] == 4);
    env.ok(&["rollback"]);
    third.wait().expect(5);
    assert!(versions(&env, 3).iter().all(|version| version == "3"));
    let report = clients.stop();
    assert_eq!(report.failures.len(), 0, "{report}");
    env.finish();
}

#[test]
fn a_rollout_survives_its_server() {
    let env = TestEnvironment::new();
    let strategy = "canary: {steps: [{weight: 10}, {pause: manual}, {weight: 50}, {pause: 300ms}], keep_warm: 0s}";
    env.write(&stack(1, "", strategy));
    env.ok(&["up"]);
    let clients = Clients::of(&env);
    env.write(&stack(2, "", strategy));
    let up = env.spawn(&["up"]);
    until(&env, "the pause", |rollout| rollout["step"] == 2);
    let server = env.one(Role::Server);
    processes::kill(server.pid, Signal::KILL);
    until(&env, "the pause after the restart", |rollout| rollout["step"] == 2 && rollout["weight"] == "10%");
    env.ok(&["promote"]);
    up.wait().expect(0);
    assert!(versions(&env, 5).iter().all(|version| version == "2"));
    let report = clients.stop();
    assert_eq!(report.failures.len(), 0, "{report}");
    env.finish();
}

#[test]
fn what_cannot_hold_two_versions_is_stopped_first_while_requests_wait() {
    let env = TestEnvironment::new();
    let strategy = "hold: {queue: 1000, timeout: 30s}";
    env.write(&stack(1, "", strategy));
    env.ok(&["up"]);
    let clients = Clients::of(&env);
    let follow = env.follow();
    for version in 2..4 {
        env.write(&stack(version, ", START_DELAY_MS: \"300\"", strategy));
        env.ok(&["up"]);
        assert!(versions(&env, 3).iter().all(|answer| *answer == version.to_string()));
    }
    let report = clients.stop();
    assert_eq!(report.failures.len(), 0, "{report}");
    // Requests waited for the start.
    let slowest = report.tallies.values().map(|tally| tally.slowest).max().unwrap();
    assert!(slowest >= Duration::from_millis(300), "{report}");
    // No new one was launched before the last old one was gone.
    let events = env.ok(&["events", "--json", "--tail", "1000"]).json_lines();
    let at = |kind: &str, release: &str, last: bool| {
        let fits = |event: &&Value| {
            event["kind"] == kind
                && event["instance"].as_str().is_some_and(|id| id.starts_with(&format!("api-{release}-")))
        };
        let mut found = events.iter().filter(fits).map(|event| event["sequence"].as_u64().unwrap());
        if last { found.next_back() } else { found.next() }
    };
    for (old, new) in [("r1", "r2"), ("r2", "r3")] {
        assert!(at("instance_gone", old, true) < at("instance_launching", new, false), "{old} {new}: {events:#?}");
    }
    drop(follow);
    env.finish();
}

#[test]
fn several_services_move_as_a_train() {
    let env = TestEnvironment::new();
    let text = |version: u32, fail: &str| {
        format!(
            r#"
version: 1
name: train
services:
  db:
    command: [APP]
    ports: {{http: auto}}
    env: {{VERSION: "{version}"}}
    health: {{ready: {{http: /ready, every_starting: 20ms}}}}
    rollout: {{blue_green: {{keep_warm: 1s}}}}
  api:
    command: [APP]
    ports: {{http: auto}}
    env: {{VERSION: "{version}"{fail}}}
    depends_on: [db]
    health: {{ready: {{http: /ready, every_starting: 20ms}}, start_deadline: 1s}}
    restart: {{budget: 0}}
    rollout: {{canary: {{steps: [{{weight: 10}}, {{pause: 100ms}}], keep_warm: 1s}}}}
"#
        )
    };
    env.write(&text(1, ""));
    env.ok(&["up"]);
    let before = env.pids();
    env.write(&text(2, ", NEVER_READY: \"1\""));
    env.run(&["up"]).expect(1);
    // The first service was through, and is back with the very process that it had.
    assert_eq!(get(env.address("db"), "/version").unwrap(), "1");
    assert_eq!(get(env.address("api"), "/version").unwrap(), "1");
    let deadline = Instant::now() + Duration::from_secs(20);
    while env.pids() != before {
        assert!(Instant::now() < deadline, "{:?} {before:?}", env.pids());
        std::thread::sleep(Duration::from_millis(20));
    }
    env.write(&text(3, ""));
    env.ok(&["up"]);
    assert_eq!(get(env.address("db"), "/version").unwrap(), "3");
    env.finish();
}

#[test]
fn a_hook_decides_whether_a_rollout_goes_on() {
    let env = TestEnvironment::new();
    let strategy = |exit: u32| {
        format!(
            "canary: {{steps: [{{hook: {{name: gate, command: [sh, -c, \"cat > HERE/asked; echo not today >&2; exit {exit}\"]}}}}, {{weight: 50}}], keep_warm: 0s}}"
        )
    };
    env.write(&stack(1, "", &strategy(0)));
    env.ok(&["up"]);
    env.write(&stack(2, "", &strategy(0)));
    env.ok(&["up"]);
    let asked: Value = serde_json::from_str(&std::fs::read_to_string(env.path("asked")).unwrap()).unwrap();
    assert_eq!((&asked["service"], &asked["to_release"]), (&"api".into(), &2.into()), "{asked:#}");
    env.write(&stack(3, "", &strategy(7)));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0705") && failed.stderr.contains("exit code 7: not today"), "{failed}");
    assert!(versions(&env, 3).iter().all(|version| version == "2"));
    env.finish();
}

/// What failed never was in force: it says why, nothing is compared with it, and no way back leads to it.
#[test]
fn a_release_that_failed_says_why_and_is_no_way_back() {
    let env = TestEnvironment::new();
    // What the hook leaves behind holds its output open for longer than it may take.
    let strategy = |exit: u8| {
        let script = format!("sleep 8 & echo not today >&2; exit {exit}");
        format!("canary: {{steps: [{{weight: 50}}, {{hook: {{command: [sh, -c, '{script}'], timeout: 5s}}}}]}}")
    };
    env.write(&stack(1, "", &strategy(3)));
    env.ok(&["up"]);
    env.write(&stack(2, "", &strategy(3)));
    let refused = env.run(&["up"]).expect(1);
    assert!(refused.stderr.contains("the hook did not agree: exit code 3: not today"), "{refused}");
    let shown = env.ok(&["show", "2"]).text();
    assert!(shown.contains("failed: the hook did not agree: exit code 3: not today"), "{shown}");
    let back = env.run(&["rollback", "--to", "2"]);
    assert!(back.code() != Some(0) && back.stderr.contains("ORC0303"), "{back}");
    assert!(versions(&env, 3).iter().all(|version| version == "1"));

    env.write(&stack(3, "", &strategy(0)));
    env.ok(&["up"]);
    let shown = env.ok(&["show", "3"]).text();
    assert!(shown.contains("changes against release 1:") && shown.contains("VERSION: 1"), "{shown}");
    env.finish();
}

/// The release is bad because of what its flag turns on: here, as long as a file exists.
#[test]
fn a_bad_verdict_turns_the_flag_off_instead_whatever_becomes_of_the_server() {
    let env = TestEnvironment::new();
    let stack = |version: u32, flag: bool, broken: &str| {
        let strategy = "canary: {steps: [{weight: 50}, {analysis: 60s}], keep_warm: 0s}, \
                        guard: {flag: editor, warm_up: 6s, inconclusive: roll_back}";
        stack(version, broken, strategy).replace("services:", &format!("flags: {{editor: {flag}}}\nservices:"))
    };
    env.write(&stack(1, false, ""));
    env.ok(&["up"]);
    let clients = Clients::of(&env);
    let broken = env.path("broken");
    std::fs::write(&broken, "").unwrap();
    env.write(&stack(2, true, ", FAIL_FILE: HERE/broken"));
    let up = env.spawn(&["up"]);
    let over = "by the verdict about release 2";
    let deadline = Instant::now() + Duration::from_secs(40);
    while !env.ok(&["flags"]).text().contains(over) {
        assert!(Instant::now() < deadline, "{}", env.run(&["why"]).text());
        std::thread::sleep(Duration::from_millis(20));
    }
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("since a bad one turned flag editor off"), "{why}");
    // Programs hear of it a moment later. What they answer meanwhile is not held against the release.
    std::thread::sleep(Duration::from_secs(1));
    std::fs::remove_file(&broken).unwrap();
    let ended = up.wait().expect(0).text();
    assert!(ended.contains("(release 2)"), "{ended}");
    let shown = env.ok(&["show", "2"]).text();
    assert!(shown.contains("it turned flag editor off instead of turning the release back"), "{shown}");
    assert!(shown.contains("verdict fail at step 2") && shown.contains("verdict pass at step 2"), "{shown}");
    assert!(env.ok(&["flags"]).text().contains(over), "it stays off until a person clears it");
    env.ok(&["flags", "clear", "editor"]);
    let report = clients.stop();
    let ours = report.failures.iter().filter(|failure| failure.problem != "status 500").count();
    assert_eq!(ours, 0, "{report}");
    env.finish();
}
