//! Programs that make a supervisor's life hard, as parts of a stack: nothing survives, nothing is left behind as a zombie,
//! and every byte that was written is in the logs.

use orchestra_testbed::pattern;
use rustix::process::Signal;

use crate::{
    environment::{TestEnvironment, find},
    processes::{self, Role},
};

/// Bytes of a flood; less than a log file holds before it is rotated.
const FLOOD: usize = 6 << 20;

#[test]
fn nothing_survives() {
    let env = TestEnvironment::new();
    let common = "health: {ready: {log: \"up|serving\"}}\n    stop: {grace: 300ms}\n    restart: {backoff: 20ms, budget: unlimited}";
    env.write(&format!(
        r#"
version: 1
name: torture
services:
  deaf:
    command: [APP, torture, ignore-term]
    {common}
  family:
    command: [APP]
    env: {{PORT: "0", FORK_CHILDREN: "8", IGNORE_TERM: "1"}}
    {common}
  storm:
    command: [APP, torture, storm]
    {common}
  daemon:
    command: "APP child & (setsid sh -c 'sleep 300 & sleep 300' &) ; echo up; wait; sleep 300"
    {common}
  bare:
    command: "env -i setsid sh -c 'cd HERE; exec sleep 300' & echo up; sleep 300"
    {common}
"#
    ));
    env.ok(&["up"]);
    let services = ["deaf", "family", "storm", "daemon", "bare"];
    let all: Vec<(&str, u64)> = services.iter().map(|name| (*name, 1)).collect();
    env.assert_consistent(&all, "after `up`");
    let running = env.all(Role::Instance).len();
    assert!(running > 15, "the torture does not run: {running} processes");

    // Replaced: the trees of the old ones are empty before they count as stopped.
    env.ok(&["restart"]);
    env.assert_consistent(&all, "after `restart`");
    // Killed main processes take their trees with them.
    for (id, pid) in env.pids() {
        processes::kill(u32::try_from(pid).unwrap(), Signal::KILL);
        let name = id.split("-r").next().unwrap().to_owned();
        env.wait_for("the next attempt", |status| find(status, &name)["instances"][0]["attempt"].as_u64() >= Some(2));
    }
    env.assert_consistent(&all, "after killed main processes");
    // Killed shims, and then down at once.
    for shim in env.all(Role::Shim) {
        shim.kill();
    }
    env.ok(&["down"]);
    env.assert_empty();
    let left: Vec<_> = env.processes().into_iter().filter(|process| process.role == Role::Other).collect();
    assert!(left.is_empty(), "survived: {left:#?}");
    env.finish();
}

#[test]
fn no_byte_is_lost() {
    let env = TestEnvironment::new();
    env.write(&format!(
        r#"
version: 1
name: bytes
jobs:
  flood: {{command: [APP, torture, flood], env: {{FLOOD_BYTES: "{FLOOD}"}}}}
  silent: {{command: ["true"]}}
  one: {{command: ["printf", "x"]}}
  lines: {{command: ["printf", "\\n\\n\\000\\r\\n\\377"]}}
services:
  chatty:
    command: [APP]
    env: {{PORT: "0", FLOOD_BYTES: "1000003", LOG_READY: "READY NOW"}}
    depends_on: {{flood: completed}}
    health: {{ready: {{log: READY NOW}}}}
    stop: {{grace: 5s}}
"#
    ));
    env.ok(&["up"]);
    let raw = |instance: &str, stream: &str| env.bytes(&["logs", "--raw", "--instance", instance, "--stream", stream]);
    let same = |name: &str, found: &[u8], expected: &[u8]| {
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        assert!(found == expected, "{name}: {} bytes of {}, different at {differs:?}", found.len(), expected.len());
    };
    let mut expected = pattern::bytes(FLOOD);
    expected.extend_from_slice(b"the last line has no end");
    same("standard output", &raw("flood-r1-1", "stdout"), &expected);
    same("standard error", &raw("flood-r1-1", "stderr"), &pattern::bytes(FLOOD / 2));
    same("nothing", &raw("silent-r1-1", "stdout"), b"");
    same("one byte", &raw("one-r1-1", "stdout"), b"x");
    same("line ends", &raw("lines-r1-1", "stdout"), b"\n\n\0\r\n\xff");
    let chatty = raw("chatty-r1-1", "stdout");
    same("before ready", &chatty[..1_000_003], &pattern::bytes(1_000_003));

    // The server and the shims killed while a flood goes on, and a tree that is killed in the middle of it: what is there
    // is a beginning of what was written, without a gap.
    env.ok(&["down"]);
    env.write(
        r"
version: 1
name: bytes
services:
  endless: {command: [APP, torture, endless-flood], stop: {grace: 200ms}, restart: {backoff: 20ms, budget: unlimited}}
",
    );
    env.ok(&["up"]);
    env.one(Role::Server).kill();
    env.assert_consistent(&[("endless", 1)], "after a killed server");
    let endless = env.pids();
    env.ok(&["down"]);
    let instance = endless.keys().next().unwrap();
    let found = raw(instance, "stdout");
    let block = pattern::bytes(65_536);
    assert!(found.len() > block.len(), "only {} bytes", found.len());
    // Older files were rotated away, so the beginning may be missing; from there on no byte may be.
    let files_hold_all = found.starts_with(&block[..1024]);
    if files_hold_all {
        for (index, part) in found.chunks(block.len()).enumerate() {
            assert!(part == &block[..part.len()], "block {index} of the flood is not what was written");
        }
    }
    eprintln!("compared {} bytes of an endless flood, from its beginning: {files_hold_all}", found.len());
    env.finish();
}
