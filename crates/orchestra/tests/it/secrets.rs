//! Secrets: programs have the value that their release has, across a way back, kills and the loss of the source; and nothing
//! that Orchestra writes, prints or starts shows one.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use rustix::process::Signal;

use crate::{
    environment::{Ran, TestEnvironment, find},
    load::get,
    processes::{self, Role},
};

const FIRST: &str = "first-9f8a62ce51-value";
const SECOND: &str = "second-0b7d33ea48-value";

const STACK: &str = r#"
version: 1
name: safe
secrets:
  token: {file: token}
jobs:
  migrate: {command: [/bin/sh, -c, 'test "$TOKEN" = "$(cat HERE/expected)"'], env: {TOKEN: {secret: token}}}
services:
  api:
    # The program that serves prints nothing of its environment.
    command: [/bin/sh, -c, 'printf %s "$URL" > "HERE/$ORCHESTRA_INSTANCE"; exec APP']
    replicas: 2
    ports: {http: auto}
    depends_on: {migrate: completed}
    env: {URL: "{{ instance.id }}:{{ secrets.token }}@db", TOKEN: {secret: token}, TOKEN_OF: "{{ instance.id }}"}
    health:
      ready: {http: /ready, every: 200ms, every_starting: 20ms}
      live: {exec: [/bin/sh, -c, 'test "$TOKEN" = "$(cat HERE/expected)" && echo "$TOKEN_OF" >> HERE/checked'], every: 200ms, timeout: 10s, fail_after: 3}
    rollout: {drain: {requests: 5s, streams: 5s}}
    stop: {grace: 5s}
"#;

fn give(env: &TestEnvironment, value: &str) {
    fs::write(env.path("token"), format!("{value}\n")).unwrap();
    // What the check compares with, of whom the secret is not.
    fs::write(env.path("expected"), value).unwrap();
}

/// Every instance that is there has this value.
#[track_caller]
fn all_have(env: &TestEnvironment, value: &str) {
    let status = env.status();
    let instances: Vec<&str> =
        find(&status, "api")["instances"].as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert_eq!(instances.len(), 2, "{status:#}");
    for instance in instances {
        assert_eq!(fs::read_to_string(env.path(instance)).unwrap(), format!("{instance}:{value}@db"));
    }
    assert!(get(env.address("api"), "/version").is_ok());
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .flat_map(|path| match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => files(&path),
            Ok(found) if found.is_file() => vec![path],
            _ => Vec::new(),
        })
        .collect()
}

/// The value as it is, and as the encodings that files and messages use would have it.
fn shapes(value: &str) -> Vec<Vec<u8>> {
    let hex = value.bytes().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    });
    let reversed: String = value.chars().rev().collect();
    // Base64 of the middle third, at each of the three places that it can have.
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let base64 = (0..3).map(|from| {
        let triples = value.as_bytes()[from..].chunks_exact(3).take(4);
        let bits = triples.map(|t| u32::from(t[0]) << 16 | u32::from(t[1]) << 8 | u32::from(t[2]));
        bits.flat_map(|bits| [18, 12, 6, 0].map(|shift| alphabet[(bits >> shift & 63) as usize])).collect()
    });
    let plain = [value.to_owned(), hex, reversed].map(String::into_bytes);
    plain.into_iter().chain(base64).collect()
}

#[track_caller]
fn no_trace(env: &TestEnvironment, output: &str) {
    for value in [FIRST, SECOND] {
        for shape in shapes(value) {
            let found = |bytes: &[u8]| bytes.windows(shape.len()).any(|part| part == shape);
            assert!(!found(output.as_bytes()), "`{}` was printed:\n{output}", String::from_utf8_lossy(&shape));
            for path in files(env.home()) {
                assert!(!found(&fs::read(&path).unwrap_or_default()), "written to {}", path.display());
            }
            for process in env.processes() {
                let line = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
                assert!(!found(&line), "in the command line of {process:?}");
                if matches!(process.role, Role::Server | Role::Proxy | Role::Zygote) {
                    let environ = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
                    assert!(!found(&environ), "in the environment of {process:?}");
                }
            }
        }
    }
}

#[test]
fn a_release_has_the_values_that_it_was_made_with_and_nothing_shows_them() {
    let env = TestEnvironment::new();
    env.write(STACK);
    let output = RefCell::new(String::new());
    let say = |ran: Ran| output.borrow_mut().push_str(&ran.to_string());

    // Without a value there is no release, and nothing is changed.
    let refused = env.run(&["up"]).expect(2);
    assert!(refused.stderr.contains("ORC0215") && refused.stderr.contains("secret token has no value"), "{refused}");
    assert!(refused.stderr.contains(env.path("token").to_str().unwrap()), "{refused}");

    give(&env, FIRST);
    say(env.ok(&["up"]));
    all_have(&env, FIRST);

    // The same value again is no change, wherever it comes from.
    let plan = env.ok(&["plan"]);
    assert!(plan.text().contains("Nothing to do"), "{plan}");

    // Without a server as well.
    env.stop_server();
    let plan = env.ok(&["plan"]);
    assert!(plan.text().contains("Nothing to do"), "{plan}");

    // Another value is: the plan tells them apart, and says neither.
    give(&env, SECOND);
    let plan = env.ok(&["plan"]);
    assert!(plan.text().contains("program.env.TOKEN") && plan.text().contains("(secret token "), "{plan}");
    say(plan);
    say(env.ok(&["plan", "--json"]));
    say(env.ok(&["up"]));
    all_have(&env, SECOND);

    // A way back brings the old value back, though its source says another by now, or nothing.
    fs::remove_file(env.path("token")).unwrap();
    fs::write(env.path("expected"), FIRST).unwrap();
    say(env.ok(&["rollback"]));
    all_have(&env, FIRST);

    // So do instances, shims and servers that are started anew.
    let server = env.one(Role::Server);
    processes::kill(server.pid, Signal::KILL);
    for instance in env.all(Role::Instance) {
        processes::kill(instance.pid, Signal::KILL);
    }
    let ready = |status: &serde_json::Value| find(status, "api")["ready"] == 2;
    env.wait_for("both instances to be back", ready);
    all_have(&env, FIRST);
    for shim in env.all(Role::Shim) {
        processes::kill(shim.pid, Signal::KILL);
    }
    env.wait_for("other shims to take over", |status| {
        ready(status) && processes::launches(&env.processes(), Role::Shim).len() == 2
    });
    // The check that compares its variable with the value is run by those shims now, and holds.
    let _ = fs::remove_file(env.path("checked"));
    env.wait_for("a check of each instance", |status| {
        assert!(ready(status), "{status:#}");
        let checked = fs::read_to_string(env.path("checked")).unwrap_or_default();
        checked.lines().collect::<BTreeSet<_>>().len() == 2
    });

    // Nothing that can be asked for shows it.
    for asked in [
        &["show", "--json"][..],
        &["show", "2"],
        &["history", "--json"],
        &["events", "--json", "--tail", "1000"],
        &["status", "--json"],
        &["why", "api"],
        &["logs"],
        &["server", "status"],
    ] {
        say(env.run(asked));
    }
    no_trace(&env, &output.borrow());

    // Where the kept values are lost, an instance that is to be started says so, and the present value mends it.
    fs::rename(env.home().join("secrets"), env.path("lost")).unwrap();
    processes::kill(env.all(Role::Instance)[0].pid, Signal::KILL);
    env.wait_for("the loss to be said", |status| {
        let waits = find(status, "api")["waits_for"].to_string();
        waits.contains("has no value: secrets.token: version") && waits.contains("is not kept any more")
    });
    give(&env, FIRST);
    env.ok(&["up"]);
    env.wait_for("both instances to be back", ready);
    all_have(&env, FIRST);
    env.ok(&["down"]);
    env.finish();
}
