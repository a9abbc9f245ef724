//! The server killed at every journal boundary: `strace` kills it as it enters its n-th `fsync` or `fdatasync`, for each n
//! until no more of them are needed. First while the server makes or opens its state, then during an `up`. The client
//! starts the next server, and the same command succeeds.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    environment::{PATIENCE, TestEnvironment, binary},
    processes::{self, Role},
    readme::skipped,
    tour::STACK,
};

/// More boundaries than there can be; reaching it means that the injection does not work.
const MOST: u32 = 400;

struct Strace(Child);

impl Strace {
    fn command(boundary: u32) -> Command {
        let mut command = Command::new("strace");
        // Each thread counts for itself; one thread writes the journal.
        let inject = format!("inject=fsync,fdatasync:signal=KILL:when={boundary}");
        command.args(["-f", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", &inject]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// A server that is traced from its first instruction.
    fn start(env: &TestEnvironment, boundary: u32) -> Self {
        let mut command = Self::command(boundary);
        command.arg(binary()).arg("--home").arg(env.home()).args(["server", "run"]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", env.root());
        Self(command.stderr(Stdio::null()).spawn().unwrap())
    }

    /// Traces a server that runs. Returns once all its threads are traced.
    fn attach(server: u32, boundary: u32) -> Self {
        let mut command = Self::command(boundary);
        let mut child = command.args(["-p", &server.to_string()]).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("attached")), "strace cannot attach");
        // The rest would fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self(child)
    }

    /// Whether the traced program was killed.
    fn has_ended(&self) -> bool {
        !processes::alive(self.0.id())
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // It lets go of what it traces, which goes on. It may wait for a tracee that waits for it.
        processes::kill(self.0.id(), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(2);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn strace_works() -> bool {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let works = works.is_ok_and(|status| status.success());
    if !works {
        skipped("kills at journal boundaries", "strace is not there or may not trace; `apt-get install strace`");
    }
    works
}

#[track_caller]
fn converges(env: &TestEnvironment, context: &str) {
    let mut up = env.run(&["up"]);
    if up.code() == Some(3) && up.stderr.contains("may have been started") {
        // Killed before it had answered: the command cannot know, and says so. What it names must work.
        let status = env.run(&["status", "--json"]);
        assert!(status.code() == Some(0) || status.text().contains("ORC0405"), "{context}: {status}");
        if status.code() == Some(0) {
            env.wait_for("the run's end", |status| status["run"].is_null());
        }
        up = env.run(&["up"]);
    }
    assert_eq!(up.code(), Some(0), "{context}: {up}");
    env.assert_consistent(&[("api", 2), ("worker", 1)], context);
    assert!(!std::fs::read_to_string(env.path("jobs")).unwrap().is_empty(), "{context}: the job did not run");
}

#[test]
fn the_server_may_be_killed_at_every_boundary_of_its_first_start() {
    if !strace_works() {
        return;
    }
    for boundary in 1..MOST {
        let env = TestEnvironment::new();
        env.write(STACK);
        let strace = Strace::start(&env, boundary);
        let deadline = Instant::now() + PATIENCE;
        let serves = loop {
            if env.run(&["server", "status"]).code() == Some(0) {
                break true;
            }
            if strace.has_ended() {
                break false;
            }
            assert!(Instant::now() < deadline, "boundary {boundary}: no server");
            std::thread::sleep(Duration::from_millis(5));
        };
        if serves {
            drop(strace);
            env.ok(&["server", "stop"]);
            eprintln!("killed at each of {} boundaries of a first start", boundary - 1);
            assert!(boundary > 1, "nothing was injected");
            return;
        }
        drop(strace);
        converges(&env, &format!("boundary {boundary} of a first start"));
        env.finish();
    }
    panic!("still killed at boundary {MOST}");
}

#[test]
fn the_server_may_be_killed_at_every_journal_boundary_of_an_up() {
    if !strace_works() {
        return;
    }
    for boundary in 1..MOST {
        let env = TestEnvironment::new();
        env.write(STACK);
        env.ok(&["server", "start"]);
        let server = env.one(Role::Server);
        let strace = Strace::attach(server.pid, boundary);
        converges(&env, &format!("boundary {boundary} of an `up`"));
        let survived = server.is_alive();
        drop(strace);
        env.finish();
        if survived {
            eprintln!("killed at each of {} journal boundaries of an `up`", boundary - 1);
            assert!(boundary > 5, "so few boundaries mean that nothing was injected");
            return;
        }
    }
    panic!("still killed at boundary {MOST}");
}
