//! Deploys under load and faults: what `bench/deploys` runs for a thousand of them, and the normal tests for thirty.
//!
//! Each deploy is drawn from a seed: 40 % rolling, 30 % blue-green, 30 % canary; in 30 % of them a fault happens. A request
//! that fails counts against us unless the application failed it: it had reached an instance that was killed, or that
//! crashed. Requests that are not idempotent and were executing on such an instance are counted apart, and so are those
//! that lay in its socket, whole, when it died: it had not begun them, but nobody who is alive can know that, so nobody may
//! send them again.
//!
//! `ORCHESTRA_DEPLOYS` is the number of deploys, `ORCHESTRA_DEPLOYS_SEED` the seed.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use orchestra_testbed::{
    handled,
    load::{Failure, Kind, Load, Plan},
    random::Random,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    environment::{Background, TestEnvironment, find},
    processes,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Strategy {
    Rolling,
    BlueGreen,
    Canary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    None,
    /// A new instance is killed at a random moment.
    KillNew,
    /// An old instance is killed while it finishes what it has.
    KillOld,
    NeverReady,
    /// Every new instance exits soon after it is ready.
    CrashSoon,
    SlowStart,
}

const FAULTS: [Fault; 5] = [Fault::KillNew, Fault::KillOld, Fault::NeverReady, Fault::CrashSoon, Fault::SlowStart];

#[derive(Clone, Copy, Debug)]
struct Deploy {
    number: u64,
    strategy: Strategy,
    fault: Fault,
    /// For faults that happen at a random moment, in milliseconds.
    moment: u64,
}

impl Deploy {
    fn draw(number: u64, random: &mut Random) -> Self {
        let strategy = match random.below(10) {
            0..4 => Strategy::Rolling,
            4..7 => Strategy::BlueGreen,
            _ => Strategy::Canary,
        };
        let fault = if random.below(10) < 3 { *random.pick(&FAULTS).unwrap() } else { Fault::None };
        Self { number, strategy, fault, moment: random.below(400) }
    }

    fn stack(self) -> String {
        let mut env = format!("VERSION: \"{}\", HANDLED: HERE/handled", self.number);
        match self.fault {
            Fault::NeverReady => env.push_str(", NEVER_READY: \"1\""),
            Fault::CrashSoon => env.push_str(", CRASH_AFTER_MS: \"250\""),
            Fault::SlowStart => env.push_str(", START_DELAY_MS: \"500\""),
            _ => {}
        }
        let strategy = match self.strategy {
            Strategy::Rolling => "rolling: {max_surge: 1, max_unavailable: 0}",
            Strategy::BlueGreen => "blue_green: {before: [{pause: 400ms}], after: [{pause: 100ms}], keep_warm: 300ms}",
            Strategy::Canary => {
                "canary: {steps: [{weight: 20}, {pause: 400ms}, {weight: 60}, {pause: 100ms}], keep_warm: 300ms}"
            }
        };
        // Who crashes soon after its readiness is told from who does not by waiting for a moment.
        let min_ready = if self.strategy == Strategy::Rolling { "min_ready: 400ms, " } else { "" };
        format!(
            r"
version: 1
name: deploys
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{{env}}}
    health:
      ready: {{http: /ready, every: 200ms, every_starting: 20ms}}
      start_deadline: 1500ms
    restart: {{backoff: 50ms, max_backoff: 100ms, budget: 2}}
    rollout: {{{strategy}, {min_ready}drain: {{requests: 10s, streams: 20s}}, deadline: 30s}}
    stop: {{grace: 10s}}
"
        )
    }

    /// Whether the release can be put into force.
    fn can_succeed(self) -> bool {
        !matches!(self.fault, Fault::NeverReady | Fault::CrashSoon)
    }
}

/// What happened in all.
#[derive(Default)]
struct Sums {
    deploys: u64,
    succeeded: u64,
    turned_back: u64,
    by_kind: std::collections::BTreeMap<(Strategy, Fault), (u64, u64)>,
}

struct Bench {
    env: TestEnvironment,
    runtime: tokio::runtime::Runtime,
    load: Option<Load>,
    handled: PathBuf,
    sums: Sums,
    /// Instances that were killed or crash by themselves.
    broken: BTreeSet<String>,
    stable: u64,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

impl Bench {
    fn start() -> Self {
        let env = TestEnvironment::new();
        let first = Deploy { number: 0, strategy: Strategy::Rolling, fault: Fault::None, moment: 0 };
        env.write(&first.stack());
        env.ok(&["up"]);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let plan = Plan {
            get: 20,
            post: 40,
            fresh: 10,
            h2c: 10,
            streams: 2,
            websockets: 2,
            session: Duration::from_millis(800),
            token: Duration::from_millis(40),
            ..Plan::to(env.address("api"))
        };
        let load = runtime.block_on(async { Load::start(plan) });
        let handled = env.path("handled");
        Self { env, runtime, load: Some(load), handled, sums: Sums::default(), broken: BTreeSet::new(), stable: 0 }
    }

    fn deploy(&mut self, deploy: Deploy) {
        self.env.write(&deploy.stack());
        let up = self.env.spawn(&["up"]);
        match deploy.fault {
            Fault::KillNew => self.kill(deploy, &up, |instance, release| {
                release_of(instance) == release && instance["phase"] != "stopping"
            }),
            Fault::KillOld => self.kill(deploy, &up, |instance, release| {
                release_of(instance) != release && instance["phase"] == "draining"
            }),
            _ => {}
        }
        let ran = up.wait();
        let succeeded = ran.code() == Some(0);
        assert!(succeeded || ran.code() == Some(1), "{deploy:?}: {ran}");
        assert!(succeeded || deploy.fault != Fault::None, "{deploy:?} failed without a fault: {ran}");
        assert!(!succeeded || deploy.can_succeed(), "{deploy:?} cannot be in force: {ran}");
        if succeeded {
            self.stable = deploy.number;
        }
        let status = self.env.status();
        if deploy.fault == Fault::CrashSoon {
            // Every instance of it was going to crash.
            let release = newest(&self.env);
            self.broken.extend((1..100).map(|n| format!("api-r{release}-{n}")));
        }
        let service = find(&status, "api");
        assert_eq!(service["desired"], 2, "{deploy:?}: {status:#}");
        self.assert_version(deploy);
        self.sums.deploys += 1;
        let (ok, back) = self.sums.by_kind.entry((deploy.strategy, deploy.fault)).or_default();
        *(if succeeded { ok } else { back }) += 1;
        *(if succeeded { &mut self.sums.succeeded } else { &mut self.sums.turned_back }) += 1;
    }

    /// All that answers is of the release in force.
    fn assert_version(&self, deploy: Deploy) {
        let address = self.env.address("api");
        for _ in 0..4 {
            let version = crate::load::get(address, "/version");
            let version = version.unwrap_or_else(|error| panic!("{deploy:?}: {error}"));
            assert_eq!(version, self.stable.to_string(), "after {deploy:?}");
        }
    }

    /// Kills the first instance that fits, at the deploy's moment after it was seen.
    fn kill(&mut self, deploy: Deploy, up: &Background, fits: impl Fn(&Value, u64) -> bool) {
        let _ = up;
        let deadline = Instant::now() + Duration::from_secs(3);
        let release = newest(&self.env);
        let mut seen = None;
        while Instant::now() < deadline {
            let status = self.env.status();
            let instances = find(&status, "api")["instances"].as_array().cloned().unwrap_or_default();
            // The release of the run that goes on; the newest one before it has begun.
            let current = status["run"]["release"].as_u64().unwrap_or(release);
            let Some(victim) = instances.iter().find(|i| i["pid"].is_u64() && fits(i, current)) else { continue };
            if seen.is_none() {
                seen = Some(());
                std::thread::sleep(Duration::from_millis(deploy.moment / 4));
            }
            let (Some(pid), Some(id)) = (victim["pid"].as_u64(), victim["id"].as_str()) else { continue };
            self.broken.insert(id.to_owned());
            processes::kill(u32::try_from(pid).unwrap(), Signal::KILL);
            return;
        }
    }

    fn stop(mut self) {
        let load = self.load.take().expect("it is stopped once");
        let report = self.runtime.block_on(load.stop());
        let handled = handled::read(&self.handled).unwrap();
        let mut excused = std::collections::BTreeMap::<Kind, u64>::new();
        let (mut unread, mut ours) = (0, Vec::new());
        for failure in &report.failures {
            let by = handled.get(&failure.id).map(|handled| &handled.begun);
            let broke = by.is_some_and(|begun| begun.iter().any(|instance| self.broken.contains(instance)));
            if broke {
                *excused.entry(failure.kind).or_default() += 1;
            } else if by.is_none() && self.died_with(failure) {
                unread += 1;
            } else {
                ours.push(format!("{failure:?} begun by {by:?}"));
            }
        }
        let mut text = format!(
            "{} deploys: {} in force, {} turned back\n",
            self.sums.deploys, self.sums.succeeded, self.sums.turned_back
        );
        for ((strategy, fault), (ok, back)) in &self.sums.by_kind {
            let _ = writeln!(text, "  {strategy:?} {fault:?}: {ok} in force, {back} turned back");
        }
        let _ = writeln!(text, "{report}");
        let post = excused.get(&Kind::Post).copied().unwrap_or(0) + excused.get(&Kind::H2c).copied().unwrap_or(0);
        let _ =
            writeln!(text, "failed because their instance was killed or crashed: {}", excused.values().sum::<u64>());
        let _ = writeln!(text, "  of them not idempotent and executing: {post}");
        let _ = writeln!(text, "not idempotent, in the socket of an instance that died before it read them: {unread}");
        let _ = writeln!(text, "failed otherwise: {}", ours.len());
        eprintln!("{text}");
        for kind in [Kind::Post, Kind::H2c] {
            let twice = handled::twice(&handled, kind.as_str());
            assert!(twice.is_empty(), "handled twice: {twice:?}");
        }
        assert!(ours.is_empty(), "{ours:#?}\n{text}");
        self.env.assert_consistent(&[("api", 2)], "after the deploys");
        self.env.finish();
    }
}

impl Bench {
    /// Whether a request that is not idempotent had been handed to an instance that then broke, as the answer says.
    fn died_with(&self, failure: &Failure) -> bool {
        let named = failure.detail.split_once("instance ").and_then(|(_, rest)| rest.split_once(" gave no answer"));
        matches!(failure.kind, Kind::Post | Kind::H2c) && named.is_some_and(|(id, _)| self.broken.contains(id))
    }
}

fn release_of(instance: &Value) -> u64 {
    let id = instance["id"].as_str().unwrap_or_default();
    id.rsplit('-').nth(1).and_then(|release| release.strip_prefix('r')).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Number of the newest release.
fn newest(env: &TestEnvironment) -> u64 {
    let releases = env.ok(&["history", "--limit", "1", "--json"]).json();
    releases[0]["number"].as_u64().unwrap_or(0)
}

#[test]
fn deploys_under_load_and_faults_lose_nothing() {
    let (count, seed) = (number("ORCHESTRA_DEPLOYS", 30), number("ORCHESTRA_DEPLOYS_SEED", 7));
    eprintln!("{count} deploys of seed {seed}");
    let mut random = Random::new(seed);
    let mut bench = Bench::start();
    for number in 1..=count {
        bench.deploy(Deploy::draw(number, &mut random));
    }
    bench.stop();
}
