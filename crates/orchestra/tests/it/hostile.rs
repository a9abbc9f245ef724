//! What strangers do to it.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    environment::{TestEnvironment, binary, find},
    processes::Role,
    readme::skipped,
    tour::{STACK, version},
};

#[test]
fn two_of_everything() {
    let env = TestEnvironment::new();
    env.write(STACK);
    // Two first commands at once: one server, one run; the other command is refused or finds nothing to do.
    let both = [env.spawn(&["up"]), env.spawn(&["up"])];
    let codes: Vec<_> = both
        .map(|command| command.wait())
        .into_iter()
        .map(|ran| {
            assert!(ran.code() == Some(0) || ran.stderr.contains("ORC0702"), "{ran}");
            ran.code()
        })
        .collect();
    assert!(codes.contains(&Some(0)), "{codes:?}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after two `up`");
    assert_eq!(env.ok(&["history", "--json"]).json().as_array().unwrap().len(), 1);

    // A second run during a run is refused in one clear line, and disturbs nothing.
    env.write(&STACK.replace("VERSION: one", "VERSION: two, START_DELAY_MS: \"500\""));
    let mut events = env.follow();
    let up = env.spawn(&["up"]);
    events.event("instance_starting", "api-r2");
    for command in [&["up"][..], &["scale", "api=1"], &["down"], &["restart"]] {
        let refused = env.run(command).expect(4);
        assert!(refused.stderr.contains("ORC0702") && refused.stderr.contains("run_2"), "{refused}");
    }
    up.wait().expect(0);
    assert_eq!(version(&env), "two");
    drop(events);

    // A second server is refused, the first one serves on.
    let server = env.one(Role::Server);
    let second = env.run(&["server", "run"]).expect(4);
    // Nothing is announced before it serves.
    assert!(second.stderr.starts_with("error[ORC0401]") && second.stderr.contains(&server.pid.to_string()), "{second}");
    assert_eq!(env.one(Role::Server).pid, server.pid);
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a second server");

    // Many clients while it rolls.
    env.write(STACK);
    let up = env.spawn(&["up"]);
    let readers: Vec<_> = (0..8).map(|_| env.spawn(&["status", "--json"])).collect();
    for reader in readers {
        reader.wait().expect(0).json();
    }
    up.wait().expect(0);
    env.finish();
}

#[test]
fn a_deleted_socket_is_found_again() {
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    let pids = env.pids();
    let socket = env.home().join("server.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    fs::remove_file(&socket).unwrap();
    // Its server has the state locked: it must be found again soon, and no second one may start over the same state.
    let began = Instant::now();
    let answer = env.ok(&["status"]);
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}: {answer}", began.elapsed());
    assert!(!answer.stderr.contains("started the server") || env.all(Role::Server).len() == 1, "{answer}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a deleted socket");
    assert_eq!(env.pids(), pids);
    env.finish();
}

#[test]
fn garbage_in_the_state_is_refused_and_kept() {
    let env = TestEnvironment::new();
    env.write(STACK);
    fs::create_dir_all(env.home()).unwrap();
    fs::set_permissions(env.home(), fs::Permissions::from_mode(0o700)).unwrap();
    let garbage = b"this is not a database, and somebody may want it back".repeat(100);
    let state = env.home().join("state.db");
    fs::write(&state, &garbage).unwrap();
    for command in [&["up"][..], &["status"], &["plan"], &["down"]] {
        // The same error and exit code whether the server met it or the command itself.
        let refused = env.run(command).expect(1);
        assert!(refused.stderr.starts_with("error[ORC0403]"), "`{command:?}` does not say what is wrong: {refused}");
        assert!(refused.stderr.contains("= help: nothing was changed; restore"), "{refused}");
        let refused = env.run(&[command, &["--json"]].concat()).expect(1);
        assert_eq!(refused.json()["errors"][0]["code"], "ORC0403", "{refused}");
    }
    assert_eq!(fs::read(&state).unwrap(), garbage, "it was changed");
    assert!(env.all(Role::Instance).is_empty());
    // Damage in the middle of a real one.
    let env = TestEnvironment::new();
    env.write(STACK);
    env.ok(&["up"]);
    env.ok(&["down"]);
    env.stop_server();
    // The log as well, if there is one left: what is in it makes up for damage in the database.
    let damaged: Vec<_> = ["state.db", "state.db-wal"]
        .map(|name| env.home().join(name))
        .into_iter()
        .filter(|file| file.exists())
        .collect();
    for file in &damaged {
        let mut bytes = fs::read(file).unwrap();
        let length = bytes.len().min(100);
        bytes[..length].fill(0xAA);
        fs::write(file, &bytes).unwrap();
    }
    let bytes = fs::read(&damaged[0]).unwrap();
    let refused = env.run(&["status"]);
    assert!(refused.code() == Some(1) && refused.stderr.starts_with("error[ORC0403]"), "{refused}");
    assert_eq!(fs::read(&damaged[0]).unwrap(), bytes, "it was changed");
}

#[test]
fn a_home_that_cannot_be_written_is_one_clear_error() {
    let env = TestEnvironment::new();
    env.write(STACK);
    let is_clear = |env: &TestEnvironment, reason: &str| {
        for command in [&["up"][..], &["tls", "trust", "--print"], &["server", "start"]] {
            let refused = env.run(command).expect(1);
            let said = &refused.stderr;
            assert!(said.starts_with("error[ORC0404]: ") && said.matches("error[").count() == 1, "{refused}");
            assert!(said.contains(reason) && said.contains("`--home`"), "{refused}");
        }
        assert!(env.all(Role::Server).is_empty() && env.all(Role::Instance).is_empty());
    };
    // A file where the folder should be stops root, too.
    fs::write(env.root().join("file"), "").unwrap();
    let env = {
        let home = env.root().join("file/home");
        env.with_home(home)
    };
    is_clear(&env, "/file is not a folder");
    assert!(env.run(&["doctor"]).expect(1).text().contains("is not a folder"));

    let Some(mount) = Mount::tmpfs("size=1m,mode=0700") else {
        skipped("a read-only home", "mounting needs root");
        return;
    };
    let env = TestEnvironment::new().with_home(mount.path().to_owned());
    env.write(STACK);
    assert!(mount.remount("ro"));
    is_clear(&env, &format!("{} is not writable (Read-only", mount.path().display()));
    env.run(&["doctor"]).expect(1);
}

#[test]
fn a_full_disk_stops_nothing_that_runs_and_is_survived() {
    let Some(mount) = Mount::tmpfs("size=4m,mode=0700") else {
        skipped("a full disk", "mounting needs root");
        return;
    };
    let env = TestEnvironment::new().with_home(mount.path().to_owned());
    env.write(STACK);
    env.ok(&["up"]);
    let pids = env.pids();
    let fill = mount.path().join("fill");
    let full = fill_up(&fill);
    assert!(full > 0);
    // A change cannot be written down, so it must not be begun; the command must not wait for ever in silence.
    let scale = env.spawn(&["scale", "api=3", "--detach"]);
    let address = env.address("api");
    assert_eq!(crate::load::get(address, "/version").unwrap(), "one", "requests are served");
    assert_eq!(env.pids(), pids);
    // Room again: it goes on by itself.
    fs::remove_file(&fill).unwrap();
    let scaled = scale.wait();
    if scaled.code() == Some(0) {
        env.wait_for("the end of the run", |status| status["run"].is_null() && status["health"] == "ready");
    } else {
        assert!(scaled.stderr.contains("ORC"), "{scaled}");
        env.ok(&["scale", "api=3"]);
    }
    env.assert_consistent(&[("api", 3), ("worker", 1)], "after a full disk");
    // Killed while it is full: the next one says what is wrong, or recovers; with room it recovers. The proxy cannot log
    // that its server is gone, and serves on.
    fill_up(&fill);
    let proxy = env.one(Role::Proxy).pid;
    env.one(Role::Server).kill();
    for _ in 0..20 {
        assert_eq!(crate::load::get(address, "/version").unwrap(), "one", "requests are served");
    }
    assert_eq!(env.one(Role::Proxy).pid, proxy);
    let status = env.run(&["status"]);
    assert!(status.code() == Some(0) || status.stderr.contains("ORC"), "{status}");
    fs::remove_file(&fill).unwrap();
    env.assert_consistent(&[("api", 3), ("worker", 1)], "after a kill on a full disk");
    env.finish();
}

/// What cannot be written down is not begun, and whoever waits for it hears why.
#[test]
fn whoever_waits_for_a_full_disk_is_told() {
    let Some(mount) = Mount::tmpfs("size=4m,mode=0700") else {
        skipped("a full disk", "mounting needs root");
        return;
    };
    let env = TestEnvironment::new().with_home(mount.path().to_owned());
    let stack = |version: &str| {
        let canary = "rollout: {canary: {steps: [{weight: 10}, {pause: manual}], keep_warm: 0s}, drain";
        let stack =
            STACK.replace("VERSION: one", &format!("VERSION: {version}")).replacen("rollout: {drain", canary, 1);
        format!("{stack}\nflags: {{editor: true}}\n")
    };
    env.write(&stack("one"));
    env.ok(&["up"]);
    env.write(&stack("two"));
    let up = env.spawn(&["up"]);
    env.wait_for("the pause", |status| find(status, "api")["rollout"]["step"] == 2);
    let fill = mount.path().join("fill");
    fill_up(&fill);
    let blocked = "nothing goes on: ";
    // The first that cannot be written holds up what comes after it: each says so, and ends once there is room.
    let switch = env.spawn(&["flags", "off", "editor"]);
    let pause = env.spawn(&["pause", "api"]);
    up.complains(blocked);
    let abort = env.spawn(&["abort"]);
    abort.complains(blocked);
    drop(pause);
    // Longer than a slow proxy would be waited for.
    switch.complains(blocked);
    std::thread::sleep(Duration::from_secs(6));
    fs::remove_file(&fill).unwrap();
    let switched = switch.wait().expect(0);
    assert!(switched.text().contains("everybody gets off (false)"), "{switched}");
    abort.wait().expect(0);
    up.wait().expect(5);
    assert_eq!(version(&env), "one");
    env.finish();
}

/// Writes until there is no room.
fn fill_up(path: &Path) -> usize {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    let mut written = 0;
    for size in [65536, 4096, 512, 1] {
        let block = vec![1; size];
        while file.write_all(&block).is_ok() {
            written += size;
        }
    }
    written
}

/// A file system of its own.
struct Mount(tempfile::TempDir);

impl Mount {
    fn tmpfs(options: &str) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("orc-mount-").tempdir().unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder.path()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()).then_some(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn remount(&self, option: &str) -> bool {
        let options = format!("remount,{option}");
        Command::new("mount").args(["-o", &options]).arg(self.path()).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a failed test may have left processes in it, which end later.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_replaced_binary_is_the_one_that_goes_on() {
    let mut env = TestEnvironment::new();
    let copy = env.root().join("bin/orchestra");
    fs::create_dir(copy.parent().unwrap()).unwrap();
    fs::copy(binary(), &copy).unwrap();
    env.use_binary(copy.clone());
    env.write(STACK);
    env.ok(&["up"]);
    let pids = env.pids();
    // As a package manager does it: a new file under the old name.
    let replacement = env.root().join("bin/new");
    fs::copy(binary(), &replacement).unwrap();
    fs::rename(&replacement, &copy).unwrap();
    // A new proxy and new shims in the place of killed ones come from the new file.
    env.one(Role::Proxy).kill();
    for shim in env.all(Role::Shim) {
        shim.kill();
    }
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a replaced binary");
    assert_eq!(env.pids(), pids);
    env.ok(&["restart", "api"]);
    env.one(Role::Server).kill();
    env.assert_consistent(&[("api", 2), ("worker", 1)], "after a restart with a replaced binary");
    assert_eq!(version(&env), "one");
    env.finish();
}

#[test]
fn two_hundred_services() {
    let env = TestEnvironment::new();
    let mut stack = String::from("version: 1\nname: many\nservices:\n");
    for index in 0..200 {
        let depends = if index >= 20 { format!(", depends_on: [s{}]", index - 20) } else { String::new() };
        let service = "command: [sleep, \"1000\"], stop: {grace: 5s}";
        writeln!(stack, "  s{index}: {{{service}, env: {{N: \"{index}\"}}{depends}}}").unwrap();
    }
    env.write(&stack);
    let began = Instant::now();
    env.ok(&["up"]);
    let up = began.elapsed();
    let names: Vec<String> = (0..200).map(|index| format!("s{index}")).collect();
    let all: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    env.assert_consistent(&all, "after `up`");
    let began = Instant::now();
    assert!(env.ok(&["up"]).text().contains("up to date"));
    let nothing = began.elapsed();
    env.one(Role::Server).kill();
    let pids = crate::environment::pids(&env.status());
    assert_eq!(pids.len(), 200);
    env.assert_consistent(&all, "after a killed server");
    let began = Instant::now();
    env.ok(&["down"]);
    eprintln!("200 services: up {up:?}, nothing to do {nothing:?}, down {:?}", began.elapsed());
    env.finish();
}

#[test]
fn nothing_that_is_logged_drives_the_terminal() {
    let env = TestEnvironment::new();
    env.write(
        r#"
version: 1
name: logs
jobs:
  escapes: {command: ["printf", "red \\033[31mred\\033[0m \\033]0;title\\007 bell\\007 back\\b \\033[2J\\302\\233 über 日本語 🦀 \\342\\200\\256reversed\\n"]}
  binary: {command: ["printf", "bad \\377\\376 bytes \\000 nul\\n"]}
  huge: {command: ["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' a; echo; echo after"]}
  fails: {command: ["sh", "-c", "printf '\\033[2Jlast words\\n'; exit 4"]}
"#,
    );
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("last words") && !failed.stderr.contains('\u{1b}'), "{failed:?}");
    env.write(&fs::read_to_string(env.path("orchestra.yaml")).unwrap().replace("exit 4", "exit 0"));
    env.ok(&["up"]);
    for command in [&["logs", "escapes"][..], &["logs", "--color", "always", "escapes"], &["logs", "binary"]] {
        let text = env.ok(command).text();
        for bad in ['\u{7}', '\u{8}', '\0', '\u{9b}', '\u{202e}'] {
            assert!(!text.contains(bad), "{bad:?} from {command:?}: {text:?}");
        }
        assert!(!text.contains("\u{1b}[2J") && !text.contains("\u{1b}]0"), "{command:?}: {text:?}");
    }
    assert!(env.ok(&["logs", "escapes"]).text().contains("über 日本語 🦀"));
    let huge = env.bytes(&["logs", "--raw", "--instance", "huge-r2-1", "--tail", "2"]);
    assert!(huge.ends_with(b"a\nafter\n"), "{} bytes", huge.len());
    let whole = env.ok(&["logs", "--instance", "huge-r2-1"]).text();
    assert_eq!(whole.matches('a').count() - whole.matches("after").count(), 3_000_000);
    env.ok(&["logs", "--json", "huge"]).json_lines();
    env.finish();
}
