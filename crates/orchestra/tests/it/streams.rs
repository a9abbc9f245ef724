//! Long streams across deploys: what `bench/streams` runs for minutes, and the normal tests for seconds.
//!
//! 200 token streams and as many `WebSocket` sessions are open at every moment, each for a time of its own, while calm times
//! and times full of deploys (rolling, blue-green, canary) take turns. Every session that is within the drain budget must end as it should,
//! and tokens must come as evenly during deploys as without. Then releases whose drain budget is far too short: every session
//! that is cut must have been told so in the way of its protocol.
//!
//! `ORCHESTRA_STREAMS` is `short` (the default), `normal` or `long`.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use orchestra_testbed::load::{Kind, Load, Plan, Report, Session, Timing};

use crate::environment::TestEnvironment;

/// Sessions of each kind.
const SESSIONS: u32 = 200;
/// By how much the time between two tokens may grow, at the 99th percentile.
const GROWTH: Duration = Duration::from_millis(1);

const WARM_UP: usize = 0;
const CALM: usize = 1;
const DEPLOYS: usize = 2;
const REST: usize = 3;

const STRATEGIES: [&str; 3] = [
    "rolling: {max_surge: 1, max_unavailable: 0}",
    "blue_green: {after: [{pause: 200ms}], keep_warm: 200ms}",
    "canary: {steps: [{weight: 20}, {pause: 200ms}, {weight: 60}, {pause: 200ms}], keep_warm: 200ms}",
];

/// How long it all takes.
struct Mode {
    name: &'static str,
    shortest: Duration,
    longest: Duration,
    token: Duration,
    /// Length of a calm time, and least length of a time of deploys.
    turn: Duration,
    turns: u32,
    /// Between the end of a deploy and the next one.
    pause: Duration,
}

impl Mode {
    fn of(name: &str) -> Self {
        let [seconds, millis] = [Duration::from_secs, Duration::from_millis];
        match name {
            "short" => Self {
                name: "short",
                shortest: seconds(2),
                longest: seconds(7),
                token: millis(200),
                turn: millis(1500),
                turns: 3,
                pause: millis(100),
            },
            "normal" => Self {
                name: "normal",
                shortest: seconds(10),
                longest: seconds(60),
                token: millis(100),
                turn: seconds(15),
                turns: 5,
                pause: seconds(2),
            },
            "long" => Self {
                name: "long",
                shortest: seconds(10),
                longest: seconds(600),
                token: millis(100),
                turn: seconds(60),
                turns: 6,
                pause: seconds(10),
            },
            other => panic!("no mode is called {other}"),
        }
    }
}

fn stack(version: u32, drain: &str) -> String {
    format!(
        r#"
version: 1
name: streams
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}"}}
    health: {{ready: {{http: /ready, every: 1s, every_starting: 20ms}}}}
    rollout: {{{}, drain: {drain}}}
"#,
        STRATEGIES[version as usize % STRATEGIES.len()]
    )
}

struct Bench {
    env: TestEnvironment,
    runtime: tokio::runtime::Runtime,
    version: u32,
}

impl Bench {
    fn start(drain: &str) -> Self {
        let env = TestEnvironment::new();
        env.write(&stack(0, drain));
        env.ok(&["up"]);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { env, runtime, version: 0 }
    }

    fn load(&self, shortest: Duration, longest: Duration, token: Duration) -> Load {
        let plan = Plan {
            streams: SESSIONS,
            websockets: SESSIONS,
            session: shortest,
            spread: longest.saturating_sub(shortest),
            token,
            ..Plan::to(self.env.address("api"))
        };
        let load = self.runtime.block_on(async { Load::start(plan) });
        // All of them are open.
        let deadline = Instant::now() + Duration::from_secs(30);
        let timing = load.timing();
        while [Kind::Stream, Kind::WebSocket].iter().any(|kind| timing.gaps(*kind, WARM_UP).len() < SESSIONS as usize) {
            assert!(Instant::now() < deadline, "the load does not begin: {}", load.report());
            std::thread::sleep(Duration::from_millis(20));
        }
        load
    }

    fn deploy(&mut self, drain: &str) {
        self.version += 1;
        self.env.write(&stack(self.version, drain));
        self.env.ok(&["up"]);
    }
}

/// The value that so many of a thousand do not exceed.
fn percentile(sorted: &[Duration], permille: usize) -> Duration {
    sorted.get((sorted.len() * permille).div_ceil(1000).saturating_sub(1)).copied().unwrap_or_default()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A table of the times between two tokens; and by how much the worst 99th percentile grew.
fn evenness(timing: &Timing, text: &mut String) -> Duration {
    let _ = writeln!(
        text,
        "{:<10} {:<8} {:>8} {:>8} {:>8} {:>8} {:>8}  (ms between two tokens)",
        "kind", "time", "tokens", "p50", "p99", "p99.9", "longest"
    );
    let mut growth = Duration::ZERO;
    for kind in [Kind::Stream, Kind::WebSocket] {
        let all = [("calm", CALM), ("deploys", DEPLOYS)].map(|(name, phase)| (name, timing.gaps(kind, phase)));
        for (name, gaps) in &all {
            let [p50, p99, p999, longest] = [500, 990, 999, 1000].map(|permille| millis(percentile(gaps, permille)));
            let _ = writeln!(
                text,
                "{:<10} {name:<8} {:>8} {p50:>8.2} {p99:>8.2} {p999:>8.2} {longest:>8.2}",
                kind.as_str(),
                gaps.len()
            );
        }
        let [calm, deploys] = all.map(|(_, gaps)| percentile(&gaps, 990));
        growth = growth.max(deploys.saturating_sub(calm));
    }
    growth
}

/// How many deploys ended while a session was open: fewest, and on average.
fn crossed(sessions: &[Session], deploys: &[Duration], kind: Kind) -> (usize, f64, usize) {
    let counts: Vec<usize> = sessions
        .iter()
        .filter(|session| session.kind == kind)
        .map(|session| deploys.iter().filter(|at| session.begun < **at && **at < session.ended).count())
        .collect();
    let most = counts.iter().max().copied().unwrap_or(0);
    let none = counts.iter().filter(|count| **count == 0).count();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let average = counts.iter().sum::<usize>() as f64 / counts.len().max(1) as f64;
    (none, average, most)
}

#[test]
fn streams_live_across_deploys() {
    let name = std::env::var("ORCHESTRA_STREAMS").unwrap_or_else(|_| "short".to_owned());
    let mode = Mode::of(&name);
    let drain = "{requests: 10s, streams: 15m}";
    let mut bench = Bench::start(drain);
    let load = bench.load(mode.shortest, mode.longest, mode.token);
    let timing = load.timing();
    let mut deploys = Vec::new();
    for _ in 0..mode.turns {
        timing.enter(CALM);
        std::thread::sleep(mode.turn);
        timing.enter(DEPLOYS);
        let end = Instant::now() + mode.turn;
        while Instant::now() < end {
            bench.deploy(drain);
            deploys.push(load.elapsed());
            std::thread::sleep(mode.pause);
        }
        // What deploys left behind must not be counted as calm.
        timing.enter(REST);
        bench.env.wait_for("the end of the run", |status| status["run"].is_null());
    }
    let report = bench.runtime.block_on(load.stop());

    let mut text = format!(
        "{} mode: {SESSIONS} token streams and {SESSIONS} WebSockets of {:?} to {:?}, {} deploys\n{report}",
        mode.name,
        mode.shortest,
        mode.longest,
        deploys.len()
    );
    let sessions = timing.sessions();
    for kind in [Kind::Stream, Kind::WebSocket] {
        let (none, average, most) = crossed(&sessions, &deploys, kind);
        let _ = writeln!(
            text,
            "{}: open across {average:.1} deploys on average, {most} at most; {none} across none",
            kind.as_str()
        );
    }
    let growth = evenness(&timing, &mut text);
    let _ = writeln!(text, "the 99th percentile grew by {:.2} ms", millis(growth));
    eprintln!("{text}");
    assert_eq!(report.failures.len(), 0, "{text}");
    assert!(deploys.len() >= mode.turns as usize, "{text}");
    // Short turns beside other tests measure the machine; they are printed alone.
    assert!(mode.name == "short" || growth <= GROWTH, "{text}");
    bench.env.finish();
}

/// Sessions that did not end as they should, by how they ended.
fn announced(report: &Report, kind: Kind) -> (u64, u64) {
    let failed = report.of(kind).failed;
    let announced = failed.get("announced").copied().unwrap_or(0);
    (announced, failed.values().sum::<u64>() - announced)
}

#[test]
fn a_stream_that_must_be_cut_is_told_so() {
    let drain = "{requests: 300ms, streams: 300ms}";
    let mut bench = Bench::start(drain);
    let load = bench.load(Duration::from_secs(2), Duration::from_secs(60), Duration::from_millis(50));
    // One of each strategy.
    for _ in STRATEGIES {
        let before = load.report();
        bench.deploy(drain);
        // Half of the sessions at least were with the old instances.
        let deadline = Instant::now() + Duration::from_secs(20);
        for kind in [Kind::Stream, Kind::WebSocket] {
            let cut = |report: &Report| report.of(kind).failures();
            while cut(&load.report()) - cut(&before) < u64::from(SESSIONS) / 2 {
                assert!(Instant::now() < deadline, "too few {kind:?}s were cut: {}", load.report());
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    let report = load.report();
    drop(load);
    let [streams, sockets] = [Kind::Stream, Kind::WebSocket].map(|kind| announced(&report, kind));
    eprintln!("cut: {} token streams, {} of them unannounced", streams.0 + streams.1, streams.1);
    eprintln!("cut: {} WebSockets, {} of them unannounced", sockets.0 + sockets.1, sockets.1);
    let silent: Vec<_> = report.failures.iter().filter(|failure| failure.problem != "announced").collect();
    assert!(silent.is_empty(), "{silent:#?}\n{report}");
    bench.env.finish();
}
