//! A walk through all commands.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    processes::Role,
};

/// A job, a volume, a service behind an address and one without, in an order.
pub(crate) const STACK: &str = r#"
version: 1
name: tour
volumes:
  data: {}
jobs:
  migrate:
    command: [APP, job]
    env: {JOB_FILE: HERE/jobs}
services:
  api:
    command: [APP]
    replicas: 2
    ports: {http: auto}
    depends_on: {migrate: completed}
    env: {VERSION: one, DATA: "{{ volumes.data.path }}"}
    health:
      ready: {http: /ready, every: 500ms, every_starting: 20ms}
    rollout: {drain: {requests: 5s, streams: 5s}}
    stop: {grace: 5s}
  worker:
    command: [APP]
    depends_on: {api: ready}
    env: {PORT: "0", API: "{{ services.api.url }}", LOG_READY: "worker is ready"}
    health:
      ready: {log: worker is ready}
    stop: {grace: 5s}
"#;

/// Everything in a folder: path, inode, content. Not the index of `SQLite`'s log, which readers write too, and not what
/// server and proxy say of themselves at any time.
fn contents(folder: &Path) -> BTreeMap<String, (u64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            if meta.is_dir() {
                folders.push(path.clone());
            }
            let name = path.display().to_string();
            if !name.ends_with("-shm") && !name.ends_with("/server.log") && !name.ends_with("/proxy.log") {
                let bytes = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                all.insert(name, (meta.ino(), bytes));
            }
        }
    }
    all
}

fn kinds(events: &[Value]) -> Vec<String> {
    events.iter().map(|event| event["kind"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_stack_comes_up_changes_and_goes_down() {
    let env = TestEnvironment::new();
    env.write(STACK);

    // Nothing there yet, and asking does not make anything.
    assert_eq!(env.ok(&["status", "--json"]).json(), serde_json::json!([]));
    env.run(&["server", "status"]).expect(3);
    assert!(!env.home().exists(), "asking made a home");

    let valid = env.ok(&["validate", "--json"]).json();
    assert_eq!(valid["environment"], "tour/dev");

    // The server starts by itself and says so once.
    let up = env.ok(&["up", "--json"]);
    assert_eq!(up.stderr.matches("started the server").count(), 1, "{up}");
    let last = up.json_lines().pop().unwrap();
    assert_eq!(last["done"]["state"], "succeeded", "{up}");
    assert_eq!(last["done"]["release"], 1, "{up}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after `up`");
    assert_eq!(fs::read_to_string(env.path("jobs")).unwrap(), "migrate\n");

    // Again: nothing to do, nothing recorded, nothing restarted.
    let pids = env.pids();
    let again = env.ok(&["up"]);
    assert!(again.text().contains("up to date") && !again.stderr.contains("started the server"), "{again}");
    assert_eq!(env.pids(), pids);
    assert_eq!(env.ok(&["history", "--json"]).json().as_array().unwrap().len(), 1);
    env.run(&["plan", "--exit-code"]).expect(0);

    // What depends on what came in order.
    let events = env.ok(&["events", "--json"]).json_lines();
    let position = |kind: &str, about: &str| {
        let fits = |event: &Value| event["kind"] == kind && event.to_string().contains(about);
        events.iter().position(fits).unwrap_or_else(|| panic!("no {kind} of {about} in {:?}", kinds(&events)))
    };
    let step_done = |name: &str| position("step_succeeded", name);
    assert!(step_done("job.migrate") < position("instance_launching", "api-r1-1"));
    assert!(step_done("service.api") < position("instance_launching", "worker-r1-1"));
    let sequences: Vec<u64> = events.iter().map(|event| event["sequence"].as_u64().unwrap()).collect();
    assert!(sequences.windows(2).all(|pair| pair[0] < pair[1]), "{sequences:?}");

    let logs = env.ok(&["logs", "worker"]).text();
    assert!(logs.contains("worker is ready") && logs.contains("worker-r1-1"), "{logs}");
    let lines = env.ok(&["logs", "--json"]).json_lines();
    assert!(lines.iter().any(|line| line["instance"] == "migrate-r1-1"), "{lines:?}");

    // Up and down in number.
    env.ok(&["scale", "api=3"]);
    env.assert_consistent(&[("api", 3), ("worker", 1)], "after `scale`");
    let kept = env.pids();
    assert!(pids.iter().all(|(id, pid)| kept.get(id) == Some(pid)), "scaling up replaced {pids:?} by {kept:?}");
    env.ok(&["scale", "api=1", "--json"]).json_lines();
    env.assert_consistent(&[("api", 1), ("worker", 1)], "after `scale` down");

    // New processes for the same release's content.
    let before = env.pids();
    env.ok(&["restart", "api"]);
    env.assert_consistent(&[("api", 1), ("worker", 1)], "after `restart`");
    let after = env.pids();
    assert!(
        before.values().filter(|pid| after.values().any(|other| other == *pid)).count() == 1,
        "{before:?} {after:?}"
    );

    // A change, and back.
    let address = env.address("api");
    env.write(&STACK.replace("VERSION: one", "VERSION: two").replace("replicas: 2", "replicas: 1"));
    let plan = env.run(&["plan", "--exit-code"]).expect(10).text();
    assert!(plan.contains("one") && plan.contains("two") && plan.contains("VERSION"), "{plan}");
    let plan = env.ok(&["plan", "--json"]).json();
    assert!(plan["plan"]["steps"].as_array().is_some_and(|steps| !steps.is_empty()), "{plan:#}");
    env.ok(&["up"]);
    assert_eq!(version(&env), "two");
    assert_eq!(env.address("api"), address, "the address is stable");
    env.ok(&["rollback"]);
    assert_eq!(version(&env), "one");
    env.assert_consistent(&[("api", 1), ("worker", 1)], "after `rollback`");
    env.ok(&["rollback", "--to", "1"]);
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after `rollback --to 1`");
    env.run(&["rollback", "--to", "99"]).expect(1);

    let history = env.ok(&["history", "--json"]).json();
    let states: Vec<&str> = history.as_array().unwrap().iter().map(|r| r["state"].as_str().unwrap()).collect();
    assert_eq!((states.len(), states[0]), (7, "stable"), "{history:#}");
    assert!(states[1..].iter().all(|state| *state == "retired"), "{states:?}");
    assert!(env.ok(&["history"]).text().contains("rollback to release 1"));
    let shown = env.ok(&["show", "5", "--json"]).json();
    assert_eq!(shown["number"], 5);
    assert!(env.ok(&["show", "5"]).text().contains("VERSION"));
    env.run(&["show", "99"]).expect(1);

    assert!(env.ok(&["doctor"]).text().contains("state directory"));
    assert!(env.ok(&["doctor", "--json"]).json()["checks"].as_array().is_some_and(|checks| checks.len() > 5));
    assert!(env.ok(&["explain", "ORC0208"]).text().contains("ORC0208"));
    assert!(env.ok(&["explain", "services.health.ready"]).text().contains("every"));
    env.run(&["explain", "ORC9999"]).expect(1);
    for shell in ["bash", "zsh", "fish"] {
        assert!(env.ok(&["completions", shell]).text().contains("orchestra"));
    }
    let all = env.ok(&["status", "--all", "--json"]).json();
    assert_eq!(all[0]["id"], "tour/dev");
    assert_eq!(env.ok(&["server", "status", "--json"]).json()["pid"], env.one(Role::Server).pid);
    env.run(&["up", "--no-such-option"]).expect(2);

    // Down: nothing runs, the volume stays; once more is nothing to do; then also the volume.
    let volume = find_volume(&env);
    fs::write(Path::new(&volume).join("kept"), "data").unwrap();
    env.ok(&["down"]);
    env.assert_consistent(&[], "after `down`");
    env.assert_empty();
    assert!(Path::new(&volume).join("kept").exists());
    assert!(env.ok(&["down"]).text().contains("down already"));
    env.ok(&["up"]);
    assert_eq!(find_volume(&env), volume);
    assert!(Path::new(&volume).join("kept").exists());
    env.ok(&["down", "--volumes", "--json"]).json_lines();
    assert!(!Path::new(&volume).exists());
    env.finish();
}

fn find_volume(env: &TestEnvironment) -> String {
    env.status()["volumes"][0]["path"].as_str().unwrap().to_owned()
}

/// What `/version` answers at the address of `api`.
pub(crate) fn version(env: &TestEnvironment) -> String {
    let answer = crate::load::get(env.address("api"), "/version");
    answer.unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_new_stack_from_init_works() {
    let env = TestEnvironment::new();
    let init = env.ok(&["init"]);
    assert!(init.text().contains("orchestra.yaml") && init.text().contains("schema"), "{init}");
    assert!(env.path(".orchestra/schema.json").exists());
    env.run(&["init"]).expect(2);
    env.ok(&["validate"]);
    env.ok(&["up"]);
    env.assert_consistent(&[("hello", 1)], "after `up`");
    env.finish();
}

#[test]
fn errors_are_all_told_at_once_with_their_places() {
    let env = TestEnvironment::new();
    env.write(
        "version: 1\nname: bad\nservices:\n  api:\n    comand: [x]\n    replicas: many\n    ports: {http: 99999}\n",
    );
    let invalid = env.run(&["validate"]).expect(2);
    for part in ["orchestra.yaml:5", "orchestra.yaml:6", "orchestra.yaml:7", "command"] {
        assert!(invalid.stderr.contains(part), "no {part}: {invalid}");
    }
    let errors = env.run(&["up", "--json"]).expect(2).json();
    assert!(errors["errors"].as_array().is_some_and(|errors| errors.len() >= 3), "{errors:#}");
    env.write("version: 1\nname: bad\nservices:\n  a: {command: [x], depends_on: [b]}\n  b: {command: [x], depends_on: [a]}\n");
    assert!(env.run(&["plan"]).expect(2).stderr.contains("ORC0208"));
    fs::remove_file(env.path("orchestra.yaml")).unwrap();
    assert!(env.run(&["up"]).expect(2).stderr.contains("orchestra init"));
}

#[test]
fn plan_writes_nothing() {
    let env = TestEnvironment::new();
    env.write(STACK);
    let before = contents(env.root());
    env.ok(&["plan"]);
    env.ok(&["validate"]);
    env.ok(&["plan", "--json"]);
    assert_eq!(contents(env.root()), before, "planning without a home wrote something");

    env.ok(&["up"]);
    env.write(&STACK.replace("VERSION: one", "VERSION: two"));
    env.wait_for("readiness", |status| status["health"] == "ready");
    let before = contents(env.root());
    env.run(&["plan", "--exit-code"]).expect(10);
    env.ok(&["plan", "--down", "--volumes"]);
    let after = contents(env.root());
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (path, was) in &before {
        assert!(after[path] == *was, "planning with a server changed {path}");
    }
    // Also without a server, over the state that it left.
    env.stop_server();
    let before = contents(env.root());
    let plan = env.run(&["plan", "--exit-code", "--json"]).expect(10).json();
    assert_eq!(plan["plan"]["steps"].as_array().map(Vec::len), Some(1), "{plan:#}");
    let after = contents(env.root());
    for (path, was) in &before {
        assert!(after.get(path) == Some(was), "planning without a server changed {path}");
    }
    let new: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
    assert!(new.is_empty(), "planning without a server made {new:?}");
    env.finish();
}

#[test]
fn a_saved_plan_is_applied_or_refused() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["plan", "--out", "first.plan"]);
    env.ok(&["up", "--plan", "first.plan"]);
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after `up --plan`");
    env.write(&STACK.replace("VERSION: one", "VERSION: two"));
    env.ok(&["plan", "--out", "second.plan"]);
    env.ok(&["scale", "api=1"]);
    // What leaves may still be finishing when the run has ended.
    env.assert_consistent(&[("api", 1), ("worker", 1)], "after `scale`");
    let pids = env.pids();
    let refused = env.run(&["up", "--plan", "second.plan"]).expect(4);
    assert!(refused.stderr.contains("service.api"), "it does not say what moved on: {refused}");
    assert_eq!(env.pids(), pids, "a refused plan changed something");
    fs::write(env.path("second.plan"), "{}").unwrap();
    env.run(&["up", "--plan", "second.plan"]).expect(2);
    env.finish();
}

#[test]
fn a_failing_release_is_put_back() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let pids = env.pids();
    // Not ready for the moment that it lives: whether a check comes before its end must not matter.
    let crash = "VERSION: bad, NEVER_READY: \"1\", CRASH_AFTER_MS: \"1\", EXIT_CODE: \"9\"";
    let bad = STACK.replace("VERSION: one", crash);
    env.write(&bad.replace("stop: {grace: 5s}", "stop: {grace: 5s}\n    restart: {backoff: 10ms, budget: 1}"));
    let failed = env.run(&["up"]).expect(1);
    for part in ["exit code 9", "this program was told to crash", "release 1 is in force again"] {
        assert!(failed.stderr.contains(part), "no `{part}`: {failed}");
    }
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a failed `up`");
    let kept = env.pids();
    let lost: Vec<_> = pids.iter().filter(|(id, pid)| id.starts_with("api") && kept.get(*id) != Some(pid)).collect();
    assert!(lost.is_empty(), "the good instances were touched: {lost:?} {kept:?}");
    assert_eq!(version(&env), "one");
    let history = env.ok(&["history", "--json"]).json();
    assert_eq!((&history[0]["state"], &history[1]["state"]), (&"failed".into(), &"stable".into()), "{history:#}");
    // A program that is not there, and a first release that fails.
    env.write(&STACK.replace("command: [APP]\n    replicas", "command: [HERE/none]\n    replicas"));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("none"), "{failed}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a program that is not there");
    env.ok(&["down"]);
    env.write(
        &STACK
            .replace("VERSION: one", "NEVER_READY: \"1\"")
            .replace("  ready: {http", "  start_deadline: 300ms\n      ready: {http"),
    );
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("not ready") && failed.stderr.contains("503"), "{failed}");
    env.assert_consistent(&[], "after a first release that failed");
    env.finish();
}

#[test]
fn ctrl_c_cancels_and_says_what_it_leaves() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    env.write(&STACK.replace("VERSION: one", "VERSION: slow, START_DELAY_MS: \"60000\""));
    let mut events = env.follow();
    let up = env.spawn(&["up"]);
    events.event("instance_starting", "api-r2");
    up.signal(Signal::INT);
    let cancelled = up.wait().expect(5);
    assert!(cancelled.stderr.contains("release 1 is in force again"), "{cancelled}");
    events.event("run_cancelled", "run_2");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after Ctrl-C");
    assert_eq!(version(&env), "one");

    // Twice: the command ends at once, the server goes on with putting things back.
    let up = env.spawn(&["up"]);
    let started = events.event("instance_starting", "api-r3");
    assert!(started["cause"].as_str().is_some());
    up.signal(Signal::INT);
    events.event("run_reverting", "run_3");
    up.signal(Signal::INT);
    let code = up.wait().code();
    assert!(matches!(code, Some(130 | 5)), "{code:?}");
    events.event("run_cancelled", "run_3");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after Ctrl-C twice");
    // Of a first release nothing is left.
    env.ok(&["down"]);
    let up = env.spawn(&["up"]);
    events.event("instance_starting", "api-r4");
    up.signal(Signal::INT);
    let cancelled = up.wait().expect(5);
    assert!(cancelled.stderr.contains("nothing runs"), "{cancelled}");
    env.assert_consistent(&[], "after Ctrl-C in a first `up`");
    drop(events);
    env.finish();
}

#[test]
fn a_killed_server_is_restarted_and_adopts() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let (pids, server, proxy) = (env.pids(), env.one(Role::Server), env.one(Role::Proxy));
    server.kill();
    // The proxy serves without it.
    let started = env.ok(&["status", "--json"]);
    assert!(started.stderr.contains("started the server"), "{started}");
    assert_eq!(crate::environment::pids(&started.json()), pids, "instances were not adopted");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a killed server");
    assert_eq!(env.pids(), pids);
    assert_ne!(env.one(Role::Server).pid, server.pid);
    assert_eq!(env.one(Role::Proxy).pid, proxy.pid);
    let events = env.ok(&["events", "--json"]).json_lines();
    assert_eq!(kinds(&events).iter().filter(|kind| *kind == "instance_adopted").count(), 3);

    // A killed shim: another one takes over the same process.
    for shim in env.all(Role::Shim) {
        shim.kill();
    }
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after killed shims");
    assert_eq!(env.pids(), pids, "a killed shim cost an instance");
    // Both together.
    env.one(Role::Server).kill();
    for shim in env.all(Role::Shim) {
        shim.kill();
    }
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a killed server and killed shims");
    assert_eq!(env.pids(), pids);
    // An instance: started again under its name.
    let id = "worker-r1-1";
    crate::processes::kill(u32::try_from(pids[id]).unwrap(), Signal::KILL);
    env.wait_for("a restart", |status| {
        find(status, "worker")["instances"][0]["attempt"] == 2 && status["health"] == "ready"
    });
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a killed instance");
    // A polite stop leaves them too.
    let (pids, proxy, address) = (env.pids(), env.one(Role::Proxy), env.address("api"));
    assert!(env.ok(&["server", "stop"]).stderr.contains("instances and proxy go on"));
    env.run(&["server", "status"]).expect(3);
    assert_eq!(crate::load::get(address, "/version").unwrap(), "one", "without a server");
    assert!(env.ok(&["server", "start"]).text().contains("was started"));
    assert_eq!((env.pids(), env.one(Role::Proxy).pid), (pids, proxy.pid));

    // A proxy that nobody steers and that serves nothing ends; the next server has another one.
    env.ok(&["down"]);
    assert!(env.ok(&["server", "stop"]).stderr.contains("nothing was up"));
    env.wait_until_gone("`server stop`", |process| process.role == Role::Proxy);
    env.ok(&["up"]);
    assert_ne!(env.one(Role::Proxy).pid, proxy.pid);
    assert_eq!(version(&env), "one");
    env.finish();
}
