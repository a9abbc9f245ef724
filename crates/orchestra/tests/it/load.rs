//! Load during change. The clients are open-loop and forgive nothing (`orchestra_testbed::load`): a request that is not
//! answered as it should is a failure, a stream that misses its last event is truncated. Raw counts are printed; see them
//! with `--no-capture`.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use orchestra_testbed::{
    handled,
    load::{Failure, Kind, Load, Plan, Report},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};

use crate::{
    environment::TestEnvironment,
    processes::{self, Role},
};

const STACK: &str = r#"
version: 1
name: load
services:
  api:
    command: [APP]
    replicas: 3
    ports: {http: auto}
    env: {VERSION: "0", HANDLED: HERE/handled}
    health:
      ready: {http: /ready, every: 500ms, every_starting: 20ms}
    restart: {backoff: 50ms, max_backoff: 200ms, budget: unlimited}
    rollout: {drain: {requests: 10s, streams: 20s}}
    stop: {grace: 10s}
"#;

/// One request on a connection of its own.
pub(crate) fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other(format!("no head in `{answer}`")))?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(io::Error::other(answer));
    }
    Ok(body.to_owned())
}

fn plan(address: SocketAddr) -> Plan {
    Plan {
        get: 60,
        post: 40,
        fresh: 20,
        h2c: 20,
        streams: 4,
        websockets: 4,
        session: Duration::from_millis(800),
        token: Duration::from_millis(40),
        ..Plan::to(address)
    }
}

/// A stack under load, with a runtime for the clients.
struct Loaded {
    env: TestEnvironment,
    runtime: tokio::runtime::Runtime,
    load: Option<Load>,
    handled: PathBuf,
    /// Instances are killed.
    kills: bool,
}

impl Loaded {
    fn start() -> Self {
        let env = TestEnvironment::new();
        env.write(STACK);
        env.ok(&["up"]);
        env.assert_consistent(&[("api", 3)], "after `up`");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let plan = plan(env.address("api"));
        let load = runtime.block_on(async { Load::start(plan) });
        let handled = env.path("handled");
        let this = Self { env, runtime, load: Some(load), handled, kills: false };
        this.more(200);
        this
    }

    fn load(&self) -> &Load {
        self.load.as_ref().expect("it goes on until it is stopped")
    }

    /// Waits until so many more requests were answered: load goes on between two changes.
    fn more(&self, count: u64) {
        let goal = self.load().report().ok() + count;
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while self.load().report().ok() < goal {
            assert!(std::time::Instant::now() < deadline, "the load does not go on: {}", self.load().report());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills a process and waits until it has ended.
    fn kill(&self, pid: u32) -> Death {
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
        let process = pidfd_open(process, PidfdFlags::empty()).unwrap();
        let begun = self.load().elapsed();
        processes::kill(pid, Signal::KILL);
        let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
        // Readable when it has ended (pidfd_open(2)).
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ended, 1, "process {pid} does not die");
        begun..=self.load().elapsed()
    }

    fn stop(&mut self, what: &str) -> Report {
        let load = self.load.take().expect("it is stopped once");
        let report = self.runtime.block_on(load.stop());
        eprintln!("load during {what}:\n{report}");
        let handled = handled::read(&self.handled).unwrap();
        for kind in [Kind::Post, Kind::H2c, Kind::WebSocket] {
            let twice = handled::twice(&handled, kind.as_str());
            assert!(twice.is_empty(), "handled twice: {twice:?}");
        }
        // The data plane may send an idempotent request without a body again if a kept connection to an instance ended
        // in silence (RFC 9110, 9.2.2); that happens to those alone whose instance was killed.
        let again = handled::twice(&handled, "");
        eprintln!("sent to a second instance after a kill of the first: {again:?}");
        assert!(again.is_empty() || self.kills, "sent twice though no instance was killed: {again:?}");
        for kind in [Kind::Get, Kind::Post, Kind::Fresh, Kind::H2c, Kind::Stream, Kind::WebSocket] {
            let tally = report.of(kind);
            assert_eq!(tally.sent, tally.ok + tally.failures(), "something is not accounted for");
        }
        report
    }
}

#[test]
fn nothing_is_lost_while_releases_roll_and_services_scale() {
    let mut loaded = Loaded::start();
    let env = &loaded.env;
    for round in 1..=3 {
        env.write(&STACK.replace("VERSION: \"0\"", &format!("VERSION: \"{round}\"")));
        env.ok(&["up"]);
        loaded.more(50);
    }
    env.ok(&["scale", "api=5"]);
    loaded.more(50);
    env.ok(&["scale", "api=2"]);
    loaded.more(50);
    env.ok(&["restart", "api"]);
    loaded.more(50);
    env.ok(&["rollback"]);
    loaded.more(50);
    env.ok(&["scale", "api=1"]);
    env.ok(&["restart"]);
    loaded.more(50);
    // Fewer at a time instead of more.
    env.write(
        &STACK
            .replace("VERSION: \"0\"", "VERSION: last")
            .replace("rollout: {", "rollout: {rolling: {max_surge: 0, max_unavailable: 1}, "),
    );
    env.ok(&["up"]);
    loaded.more(50);
    let report = loaded.stop("3 updates, 3 scalings, 2 restarts, a rollback and an update without surge");
    assert_eq!(report.failures.len(), 0, "{report}");
    loaded.env.assert_consistent(&[("api", 3)], "after the changes");
    loaded.env.finish();
}

/// From the signal until the process has ended: on a busy machine it may take a while to die, and what comes meanwhile
/// dies with it.
type Death = RangeInclusive<Duration>;

/// Failures that began after a death (plus the time that a busy machine needs to notice), or are of another kind.
fn unexcused(report: &Report, deaths: &[Death], excused: impl Fn(&Failure) -> bool) -> Vec<Failure> {
    let slack = Duration::from_millis(100);
    let in_flight = |failure: &&Failure| {
        deaths.iter().any(|it| failure.begun <= *it.end() + slack && failure.ended + slack >= *it.start())
            && excused(failure)
    };
    report.failures.iter().filter(|failure| !in_flight(failure)).cloned().collect()
}

#[test]
fn a_killed_instance_fails_only_what_it_had_begun() {
    let mut loaded = Loaded::start();
    loaded.kills = true;
    let mut deaths = Vec::new();
    for _ in 0..3 {
        let pids = loaded.env.pids();
        let pid = u32::try_from(*pids.values().next().unwrap()).unwrap();
        deaths.push(loaded.kill(pid));
        loaded.env.assert_consistent(&[("api", 3)], "after a killed instance");
        loaded.more(100);
    }
    let report = loaded.stop("3 kills of an instance");
    let left = unexcused(&report, &deaths, |failure| failure.problem != "refused");
    assert!(left.is_empty(), "{left:#?}\n{report}");
    // What failed had reached an instance: nothing that was not begun may fail.
    let handled = handled::read(&loaded.handled).unwrap();
    let begun = report.failures.iter().filter(|failure| handled.contains_key(&failure.id)).count();
    eprintln!("{} failed, {begun} of them had been begun by a killed instance", report.failures.len());
    // A third of what is in flight: 8 streams and sockets, and a few requests; three times.
    assert!(report.failures.len() <= 3 * 12, "{report}");
    loaded.env.finish();
}

#[test]
fn a_killed_proxy_refuses_nobody_and_a_killed_server_costs_nothing() {
    let mut loaded = Loaded::start();
    for _ in 0..3 {
        loaded.env.one(Role::Server).kill();
        loaded.more(50);
        loaded.env.ok(&["status"]);
        loaded.env.assert_consistent(&[("api", 3)], "after a killed server");
        loaded.more(50);
    }
    let report = loaded.load().report();
    assert_eq!(report.failures.len(), 0, "a killed server cost requests: {report}");
    let mut deaths = Vec::new();
    for _ in 0..3 {
        let proxy = loaded.env.one(Role::Proxy);
        deaths.push(loaded.kill(proxy.pid));
        loaded.env.assert_consistent(&[("api", 3)], "after a killed proxy");
        loaded.more(100);
    }
    let report = loaded.stop("3 kills of the server and 3 of the proxy");
    let refused: u64 = report.tallies.values().filter_map(|tally| tally.failed.get("refused")).sum();
    assert_eq!(refused, 0, "{report}");
    let left = unexcused(&report, &deaths, |_| true);
    assert!(left.is_empty(), "{left:#?}\n{report}");
    loaded.env.finish();
}
