//! The server killed at every journal boundary of an `up`: `strace` kills it as it enters its n-th `fsync` or `fdatasync`,
//! for each n until an `up` needs no more of them. The client starts the next server, and the same command succeeds.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    environment::{PATIENCE, TestEnvironment, binary},
    processes::{self, Role},
    tour::STACK,
};

/// More boundaries than an `up` of the stack can have; reaching it means that the injection does not work.
const MOST: u32 = 400;

struct Strace(Child);

impl Strace {
    fn server(env: &TestEnvironment, boundary: u32) -> Self {
        let mut command = Command::new("strace");
        let inject = format!("inject=fsync,fdatasync:signal=KILL:when={boundary}");
        command.args(["-f", "-qqq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", &inject]);
        command.arg(binary()).arg("--home").arg(env.home()).args(["server", "run"]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", env.root());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // It lets go of what it traces, which goes on.
        processes::kill(self.0.id(), Signal::TERM);
        let _ = self.0.wait();
    }
}

fn strace_works() -> bool {
    Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn the_server_may_be_killed_at_every_journal_boundary() {
    if !strace_works() {
        eprintln!("SKIPPED: strace is not there or may not trace; install it with `apt-get install strace`");
        return;
    }
    let (mut killed, mut before_serving) = (0, 0);
    for boundary in 1..MOST {
        let env = TestEnvironment::new();
        env.write(STACK);
        let strace = Strace::server(&env, boundary);
        let deadline = Instant::now() + PATIENCE;
        // It serves, or it was killed while it made its files.
        let mut seen = false;
        let server = loop {
            if env.run(&["server", "status"]).code() == Some(0) {
                break Some(env.one(Role::Server));
            }
            let servers = env.all(Role::Server).len();
            seen |= servers > 0;
            if seen && servers == 0 {
                before_serving += 1;
                break None;
            }
            assert!(Instant::now() < deadline, "boundary {boundary}: no server");
            std::thread::sleep(Duration::from_millis(5));
        };
        let up = env.run(&["up"]);
        assert_eq!(up.code(), Some(0), "boundary {boundary}: {up}");
        let done = server.is_some_and(|server| server.is_alive());
        env.assert_consistent(&[("api", 2), ("worker", 1)], &format!("boundary {boundary}"));
        let jobs = std::fs::read_to_string(env.path("jobs")).unwrap();
        assert!(!jobs.is_empty(), "boundary {boundary}: the job did not run");
        drop(strace);
        env.finish();
        if done {
            eprintln!("killed at each of {killed} journal boundaries of an `up`, {before_serving} of them before it served");
            assert!(killed > 5, "so few boundaries mean that nothing was injected");
            return;
        }
        killed += 1;
    }
    panic!("still killed at boundary {MOST}");
}
