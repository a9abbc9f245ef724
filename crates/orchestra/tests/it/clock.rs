//! The wall clock jumps while everything runs. Under `libfaketime` (a Debian package) the server sees another time of day than
//! the machine, and it is moved while it runs; the monotonic clock goes on as it is, as it does when somebody sets a machine's
//! clock.

use std::{cell::Cell, fs, path::PathBuf, process::Stdio};

use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find, pids},
    load::get,
    processes::Role,
};

const HOUR: u64 = 3_600_000;

const STACK: &str = r#"
version: 1
name: clock
services:
  api:
    command: [APP]
    replicas: 2
    ports: {http: auto}
    env: {VERSION: "1"}
    health:
      ready: {http: /ready, every: 100ms, every_starting: 20ms}
      live: {http: /health, every: 100ms}
    rollout:
      canary: {steps: [{weight: 20}, {pause: {owner: ada, expires: 20m}}, {weight: 60}, {pause: 200ms}], keep_warm: 20m}
      progress_deadline: 10m
      drain: {requests: 5s, streams: 5s}
"#;

/// The library, where it is installed.
fn library() -> Option<PathBuf> {
    let folders = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())
}

struct Clock {
    env: TestEnvironment,
    library: PathBuf,
}

impl Clock {
    /// Sets the clock of what runs under it: so many hours from the right time.
    fn set(&self, hours: i32) {
        let new = self.env.path("clock.new");
        fs::write(&new, format!("{hours:+}h\n")).unwrap();
        fs::rename(new, self.env.path("clock")).unwrap();
    }

    /// Starts the server under it.
    fn start_server(&self) {
        let mut command = self.env.command(&["server", "start"]);
        command
            .env("LD_PRELOAD", &self.library)
            .env("FAKETIME_TIMESTAMP_FILE", self.env.path("clock"))
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("FAKETIME_DISABLE_SHM", "1");
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{status}");
    }

    /// The server's wall clock, in milliseconds.
    fn now(&self) -> u64 {
        self.env.status()["at"].as_u64().unwrap()
    }

    fn instances(&self) -> Vec<(String, u64)> {
        pids(&self.env.status()).into_iter().collect()
    }
}

#[test]
fn a_clock_that_is_set_changes_nothing() {
    let Some(library) = library() else {
        eprintln!("SKIPPED: libfaketime is not installed (Debian package `faketime`)");
        return;
    };
    let clock = Clock { env: TestEnvironment::new(), library };
    let env = &clock.env;
    clock.set(0);
    clock.start_server();
    env.write(STACK);
    env.ok(&["up"]);
    env.write(&STACK.replace("VERSION: \"1\"", "VERSION: \"2\""));
    // Nobody follows it, who would start another server under the right time.
    env.ok(&["up", "--detach"]);
    let paused = |status: &Value| find(status, "api")["rollout"]["step"] == 2;
    env.wait_for("the pause", paused);
    let before = clock.instances();
    assert_eq!(before.len(), 3, "two stable ones and a canary: {before:?}");
    let origin = clock.now();
    let events = env.ok(&["events", "--json"]).json_lines().len();
    // Beyond every deadline that there is, and back.
    for hours in [1, 0, -1, 25, 0] {
        clock.set(hours);
        let rounds = Cell::new(0);
        env.wait_for("the clock", |status| {
            let offset = status["at"].as_u64().unwrap().abs_diff(origin);
            let near = offset.abs_diff(u64::from(hours.unsigned_abs()) * HOUR) < HOUR / 2;
            rounds.set(rounds.get() + u32::from(near));
            // A few checks and ticks under the new time.
            rounds.get() >= 20
        });
        let status = env.status();
        assert!(paused(&status), "{hours} h: {status:#}");
        assert_eq!(clock.instances(), before, "{hours} h");
    }
    let after = env.ok(&["events", "--json"]).json_lines();
    assert_eq!(after.len(), events, "{:#?}", &after[events..]);

    // The same with a server that is killed and started at another time of day.
    env.one(Role::Server).kill();
    clock.set(-2);
    clock.start_server();
    let status = env.wait_for("the instances", |status| pids(status).len() == 3);
    assert!(paused(&status), "{status:#}");
    assert_eq!(clock.instances(), before);

    // Everything goes on: the rest of the rollout, with its time of a fifth of a second, and a stop.
    clock.set(3);
    env.ok(&["promote", "api"]);
    env.wait_for("the release", |status| status["release"] == 2 && status["run"].is_null());
    assert_eq!(get(env.address("api"), "/version").unwrap(), "2");
    clock.set(0);
    clock.env.finish();
}
