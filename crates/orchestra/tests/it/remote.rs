//! The API over TCP, and the way back after the machine was switched off.

use std::fs;

use rustix::process::Signal;

use crate::{
    environment::{TestEnvironment, find},
    processes::{self, Role},
    tour::STACK,
};

#[test]
fn over_tcp_a_token_is_needed_and_nobody_can_read_it() {
    const TOKEN: &str = "the-token-of-this-test-0123456789";
    let env = TestEnvironment::new();
    env.write(STACK);
    fs::write(env.path("token"), format!("{TOKEN}\n")).unwrap();
    fs::write(env.path("wrong"), "another-token-0123456789abcdefgh\n").unwrap();
    let short = env.run(&["server", "start", "--listen", "127.0.0.1:0", "--token-file", "orchestra.yaml"]);
    assert!(short.code().is_some(), "{short}");
    env.run(&["server", "stop"]);
    let listen = ["server", "start", "--listen", "127.0.0.1:0", "--token-file", "token"];
    let started = env.ok(&listen).text();
    let address = env.ok(&["server", "status", "--json"]).json()["listen"].as_str().unwrap().to_owned();
    assert!(started.contains(&format!("listens on http://{address}")), "{started}");
    let url = format!("http://{address}");

    for arguments in [vec!["--server", &url], vec!["--server", &url, "--token-file", "wrong"]] {
        let refused = env.run(&[&arguments[..], &["server", "status"]].concat()).expect(3);
        assert!(refused.stderr.starts_with("error[ORC0802]"), "{refused}");
        let refused = env.run(&[&arguments[..], &["up"]].concat()).expect(3);
        assert!(refused.stderr.starts_with("error[ORC0802]"), "{refused}");
    }
    assert!(env.all(Role::Instance).is_empty(), "a refused request did something");

    // The whole way, streams as well.
    let remote = ["--server", &url, "--token-file", "token"];
    env.ok(&[&remote[..], &["up"]].concat());
    let status = env.ok(&[&remote[..], &["status", "--json"]].concat()).json();
    assert_eq!(find(&status, "api")["ready"], 2);
    let mut events = env.spawn(&[&remote[..], &["events", "--follow", "--json"]].concat());
    env.ok(&[&remote[..], &["restart", "worker"]].concat());
    events.event("run_succeeded", "run_2");
    drop(events);
    assert!(env.ok(&[&remote[..], &["logs", "api"]].concat()).text().contains("serving"));

    // Whoever lists processes, or reads the log, learns nothing.
    for process in env.processes() {
        let command = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&command).contains(TOKEN), "{process:?}");
        if matches!(process.role, Role::Instance | Role::Shim | Role::Proxy) {
            let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&environment).contains(TOKEN), "{process:?}");
        }
    }
    let log = fs::read_to_string(env.home().join("server.log")).unwrap();
    assert!(!log.contains(TOKEN), "{log}");
    env.finish();
}

#[test]
fn after_a_reboot_the_server_alone_brings_everything_back() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let before = env.pids();
    let release = env.status()["release"].clone();
    // Nothing is left of any process, as after the machine was switched off; first who could start others.
    for role in [Role::Server, Role::Proxy, Role::Shim, Role::Instance] {
        for process in env.all(role) {
            process.kill();
        }
    }
    for process in env.processes() {
        processes::kill(process.pid, Signal::KILL);
    }
    // What the unit of `server install` does. Nothing else asks for anything.
    let unit = env.ok(&["server", "install", "--print", "--system"]).text();
    assert!(unit.contains("server run\n") && unit.contains("KillMode=process"), "{unit}");
    env.ok(&["server", "start"]);
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a reboot");
    let after = env.pids();
    assert!(after.values().all(|pid| !before.values().any(|old| old == pid)), "{before:?} {after:?}");
    assert_eq!(env.status()["release"], release, "it is the same release");
    assert_eq!(crate::tour::version(&env), "one");
    env.finish();
}
