//! Verdicts about real canaries, with traffic, with little and with none. First what `docs/figures/verdict.md` says of simulated ones, once more through the proxy.
//!
//! A thousand clients, told apart by the address that a proxy in front of ours would name, send requests at the times of a
//! Poisson process, open-loop. Each request carries a lot that was drawn from the seed, and an instance answers 500 if the
//! lot is below its version's bound: which requests fail is chance, and is repeated by the seed. In the outage every instance of both
//! releases answers 500, because a file says so that stands for what they share.
//!
//! `ORCHESTRA_VERDICTS` is the number of canaries of each kind, `ORCHESTRA_VERDICTS_SEED` the seed, `ORCHESTRA_VERDICTS_KIND` a part of the name of
//! the kinds that are tried, `ORCHESTRA_VERDICTS_LANES` the number of platforms that have canaries at the same time.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use orchestra_testbed::random::Random;
use rustix::process::Signal;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    environment::{TestEnvironment, find},
    processes::{self, Role},
};

/// Lots are numbers below this.
const LOTS: u64 = 1_000_000;
const CLIENTS: u64 = 1000;
/// What a thousandth of all requests is.
const USUAL: u64 = LOTS / 1000;

/// Canaries of one kind.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    /// Requests per second.
    rate: f64,
    /// Lots that the canary fails; the stable release fails [`USUAL`].
    bad: u64,
    steps: &'static str,
    outage: bool,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "every response fails",
        rate: 10.0,
        bad: LOTS,
        steps: "{weight: 20}, {analysis: {for: 50s, inconclusive: promote_and_watch}}",
        outage: false,
    },
    Kind {
        name: "5 % fail, 0.1 % of the stable release",
        rate: 100.0,
        bad: LOTS / 20,
        steps: "{weight: 20}, {analysis: {for: 50s, inconclusive: promote_and_watch}}",
        outage: false,
    },
    Kind {
        name: "as good as the stable release, 0.1 % fail",
        rate: 100.0,
        bad: USUAL,
        steps: "{weight: 20}, {analysis: {for: 50s, inconclusive: promote_and_watch}}",
        outage: false,
    },
    Kind {
        name: "as good, and both fail for 4 s",
        rate: 50.0,
        bad: USUAL,
        steps: "{weight: 20}, {pause: 8s}",
        outage: true,
    },
];

fn stack(version: usize, bad: u64, steps: &str) -> String {
    format!(
        r#"
version: 1
name: verdicts
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}", FAIL_LOT: "{bad}", FAIL_FILE: HERE/outage}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout: {{canary: {{steps: [{steps}], keep_warm: 0s}}, drain: {{requests: 5s, streams: 5s}}}}
"#
    )
}

/// An answer.
#[derive(Clone, Copy)]
struct Answer {
    /// Unix milliseconds of its end.
    at: u64,
    /// Who answered; `None` if nobody did.
    release: Option<u64>,
    bad: bool,
}

fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the year 500 million")
}

/// Clients that go on until they are dropped.
struct Clients {
    runtime: tokio::runtime::Runtime,
    answers: Arc<Mutex<Vec<Answer>>>,
}

impl Clients {
    fn of(address: SocketAddr, rate: f64, seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let answers = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&answers);
        runtime.spawn(async move {
            let (mut random, mut requests) = (Random::new(seed), JoinSet::new());
            let mut due = tokio::time::Instant::now();
            loop {
                #[expect(clippy::cast_precision_loss, reason = "a uniform number of 53 bits")]
                let uniform = ((random.number() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
                due += Duration::from_secs_f64(-uniform.ln() / rate);
                tokio::time::sleep_until(due).await;
                let (client, lot) = (random.below(CLIENTS), random.below(LOTS));
                let into = Arc::clone(&into);
                while requests.try_join_next().is_some() {}
                requests.spawn(async move {
                    let asked = tokio::time::timeout(Duration::from_secs(20), ask(address, client, lot)).await;
                    let (release, bad) = asked.ok().and_then(Result::ok).unwrap_or((None, true));
                    into.lock().unwrap().push(Answer { at: unix_millis(), release, bad });
                });
            }
        });
        Self { runtime, answers }
    }

    fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut self.answers.lock().unwrap())
    }
}

/// One request on a connection of its own: who answered, and whether badly.
async fn ask(address: SocketAddr, client: u64, lot: u64) -> std::io::Result<(Option<u64>, bool)> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET /version HTTP/1.1\r\nhost: api\r\nconnection: close\r\nx-lot: {lot}\r\nx-forwarded-for: 198.18.{}.{}\r\n\r\n",
        client / 250,
        client % 250
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let header = |name: &str| {
        let line = answer.lines().find(|line| line.to_ascii_lowercase().starts_with(name))?;
        line.split_once(':')?.1.trim().parse().ok()
    };
    Ok((header("orchestra-release"), !answer.starts_with("HTTP/1.1 200")))
}

/// What became of one canary.
#[derive(Clone, Copy, Default)]
struct Outcome {
    rolled_back: bool,
    passed: bool,
    /// Seconds from the share's being in force to the verdict, and to the last answer of the canary.
    verdict: f64,
    last: f64,
    /// Its bad responses until the verdict, and in all.
    bad_until: usize,
    bad: usize,
    /// Bad responses of the stable release while both were there.
    stable_bad: usize,
}

fn event<'e>(events: &'e [Value], release: u64, kind: &str, cause: &str) -> Option<&'e Value> {
    let fits = |event: &&Value| {
        event["release"] == release
            && event["kind"] == kind
            && event["cause"].as_str().is_some_and(|text| text.contains(cause))
    };
    events.iter().find(fits)
}

/// Puts one canary on its way and waits for its end.
fn one(env: &TestEnvironment, clients: &Clients, kind: Kind, version: usize) -> Outcome {
    env.write(&stack(version, kind.bad, kind.steps));
    clients.take();
    let up = env.spawn(&["up"]);
    if kind.outage {
        env.wait_for("the canary to have its share", |status| find(status, "api")["rollout"]["weight"] == "20%");
        // Three seconds of good answers before it, so that there is something to compare with.
        let enough = |clients: &Clients| clients.answers.lock().unwrap().len() > 150;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !enough(clients) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::fs::write(env.path("outage"), "").unwrap();
        // The length of the outage is what is tried here; nothing else says when it is over.
        std::thread::sleep(Duration::from_secs(4));
        std::fs::remove_file(env.path("outage")).unwrap();
    }
    let ran = up.wait();
    let answers = clients.take();
    let release = u64::try_from(version).unwrap();
    let events = env.ok(&["events", "--json", "--tail", "400"]).json_lines();
    let at = |event: &Value| event["at"].as_u64().unwrap();
    let began = event(&events, release, "rollout_step", "step 2 of 2").map_or_else(|| panic!("{ran}\n{events:#?}"), at);
    let judged = event(&events, release, "verdict", "");
    let until = judged.map_or(u64::MAX, at);
    let of_canary: Vec<&Answer> = answers.iter().filter(|it| it.release == Some(release)).collect();
    let seconds = |at: u64| Duration::from_millis(at.saturating_sub(began)).as_secs_f64();
    let bad = || of_canary.iter().filter(|it| it.bad);
    Outcome {
        rolled_back: ran.code() != Some(0),
        passed: judged.is_some_and(|event| event["cause"].as_str().is_some_and(|text| text.starts_with("pass"))),
        verdict: judged.map_or(f64::NAN, |event| seconds(at(event))),
        last: of_canary.iter().map(|it| it.at).max().map_or(f64::NAN, seconds),
        bad_until: bad().filter(|it| it.at <= until).count(),
        bad: bad().count(),
        stable_bad: answers.iter().filter(|it| it.bad && it.release != Some(release)).count(),
    }
}

/// Canaries of one kind, so many one after the other, on a platform of their own.
fn lane(kind: Kind, seed: u64, count: usize) -> Vec<Outcome> {
    let env = TestEnvironment::new();
    env.write(&stack(1, USUAL, kind.steps));
    env.ok(&["up"]);
    let clients = Clients::of(env.address("api"), kind.rate, seed);
    let outcomes = (0..count).map(|at| one(&env, &clients, kind, at + 2)).collect();
    clients.runtime.shutdown_timeout(Duration::from_secs(30));
    env.finish();
    outcomes
}

/// So many canaries of one kind, on so many platforms beside each other.
fn canaries(kind: Kind, seed: u64, count: usize, lanes: usize) -> Vec<Outcome> {
    let share = |lane: usize| count / lanes + usize::from(lane < count % lanes);
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes.min(count))
            .map(|at| scope.spawn(move || lane(kind, seed + 1000 * u64::try_from(at).unwrap(), share(at))))
            .collect();
        lanes.into_iter().flat_map(|lane| lane.join().unwrap()).collect()
    })
}

fn quantile(mut of: Vec<f64>, quantile: f64) -> f64 {
    of.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few")]
    let at = ((of.len() as f64 * quantile).ceil() as usize).clamp(1, of.len().max(1)) - 1;
    of.get(at).copied().unwrap_or(f64::NAN)
}

/// Empty where there was no verdict.
fn seconds(time: f64) -> String {
    if time.is_nan() { String::new() } else { format!("{time:.1}") }
}

#[test]
fn real_canaries_get_the_verdict_that_they_deserve() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|it| it.parse().ok()).unwrap_or(default);
    let (count, seed) = (number("ORCHESTRA_VERDICTS", 1), number("ORCHESTRA_VERDICTS_SEED", 20_261_121));
    let lanes = number("ORCHESTRA_VERDICTS_LANES", 1).max(1);
    let wanted = std::env::var("ORCHESTRA_VERDICTS_KIND").unwrap_or_default();
    assert!(KINDS.iter().any(|kind| kind.name.contains(&wanted)), "no kind is named like `{wanted}`");
    let mut table = String::from(
        "| canary | requests/s | weight | rolled back of | passed | s to the verdict p50 | p95 | s to the canary's last \
         response p95 | bad responses until the verdict p50 | p95 | in all p95 |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (row, kind) in (0_u64..).zip(KINDS).filter(|(_, kind)| kind.name.contains(&wanted)) {
        let outcomes = canaries(kind, seed + row, usize::try_from(count).unwrap(), usize::try_from(lanes).unwrap());
        let rolled_back = outcomes.iter().filter(|it| it.rolled_back).count();
        let of = |what: fn(&Outcome) -> f64, at: f64| quantile(outcomes.iter().map(what).collect(), at);
        #[expect(clippy::cast_precision_loss, reason = "a few responses")]
        let bad = |at: f64| (of(|it| it.bad_until as f64, at), of(|it| it.bad as f64, at));
        writeln!(
            table,
            "| {} | {} | 20 % | {rolled_back} of {count} | {} | {} | {} | {:.1} | {} | {} | {} |",
            kind.name,
            kind.rate,
            outcomes.iter().filter(|it| it.passed).count(),
            seconds(of(|it| it.verdict, 0.5)),
            seconds(of(|it| it.verdict, 0.95)),
            of(|it| it.last, 0.95),
            bad(0.5).0,
            bad(0.95).0,
            bad(0.95).1,
        )
        .unwrap();
        eprintln!("{table}");
        if kind.bad > USUAL {
            assert_eq!(rolled_back, outcomes.len(), "{table}");
            assert!(of(|it| it.verdict, 1.0) <= 40.0, "{table}");
        } else if kind.outage {
            // Both did fail, and it was not held against the canary.
            assert!(outcomes.iter().all(|it| it.stable_bad >= 50 && it.bad >= 10), "{table}");
            assert_eq!(rolled_back, 0, "{table}");
        } else {
            // One in a hundred is what `alpha` allows.
            assert!(rolled_back * 50 <= outcomes.len(), "{table}");
        }
    }
    println!("{table}");
}

fn quiet(version: usize, env: &str, steps: &str, guard: &str) -> String {
    format!(
        r#"
version: 1
name: quiet
services:
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}"{env}}}
    health: {{ready: {{http: /ready, every: 200ms, every_starting: 20ms}}}}
    rollout: {{canary: {{steps: [{steps}], keep_warm: 0s}}, guard: {{{guard}}}, drain: {{requests: 5s, streams: 5s}}}}
"#
    )
}

#[test]
fn probes_turn_back_a_canary_that_nobody_asks_and_let_none_pass_alone() {
    let env = TestEnvironment::new();
    let steps = "{weight: 20}, {analysis: {for: 4s, inconclusive: promote_and_watch}}";
    let guard = "probe: {path: /version, every: 100ms}";
    env.write(&quiet(1, "", steps, guard));
    env.ok(&["up"]);

    // Nobody but the server asks it, and nobody is hurt.
    env.write(&quiet(2, ", FAIL_PERMILLE: \"1000\"", "{weight: 20}, {analysis: 50s}", guard));
    let failed = env.run(&["up"]).expect(1);
    assert!(failed.stderr.contains("ORC0704") && failed.stderr.contains("pairs of probes"), "{failed}");
    let shown = env.ok(&["show", "2", "--json"]).json();
    let evidence = &shown["verdicts"][0]["evidence"];
    assert!(evidence["probes"]["canary_bad"].as_u64().unwrap() >= 5, "{shown:#}");
    assert_eq!((&evidence["probed"], &evidence["canary"]["requests"]), (&"HTTP 500".into(), &0.into()), "{shown:#}");

    // That one path answers is not enough for a pass.
    env.write(&quiet(3, "", steps, guard));
    env.ok(&["up"]);
    let shown = env.ok(&["show", "3", "--json"]).json();
    let verdict = &shown["verdicts"][0];
    assert_eq!(verdict["outcome"], "inconclusive", "{shown:#}");
    assert!(verdict["reason"].as_str().unwrap().contains("probes alone let nothing pass"), "{verdict:#}");
    assert!(verdict["evidence"]["probes"]["both_good"].as_u64().unwrap() >= 5, "{verdict:#}");
    env.finish();
}

#[test]
fn little_traffic_raises_the_share_and_a_dead_server_forgets_it_not() {
    let env = TestEnvironment::new();
    let steps = "{weight: 5}, {analysis: 40s}";
    env.write(&quiet(1, "", steps, "raise_to: 30%"));
    env.ok(&["up"]);
    let clients = Clients::of(env.address("api"), 5.0, 7);
    env.write(&quiet(2, "", steps, "raise_to: 30%"));
    let up = env.spawn(&["up"]);
    let raised = |status: &Value| find(status, "api")["rollout"]["weight"] == "30%";
    env.wait_for("the share to be raised", raised);
    let why = env.ok(&["why", "api"]).text();
    assert!(why.contains("traffic raised to 30 %"), "{why}");
    let server = env.one(Role::Server);
    processes::kill(server.pid, Signal::KILL);
    env.wait_for("the share after the restart", raised);
    let events = env.ok(&["events", "--json", "--tail", "400"]).json_lines();
    let told = event(&events, 2, "rollout_step", "raised from 5 % to 30 %");
    assert!(told.is_some(), "{events:#?}");
    env.ok(&["promote", "api", "--full"]);
    up.wait().expect(0);
    let answers = clients.take();
    assert!(answers.iter().all(|answer| !answer.bad), "{} answers", answers.len());
    env.finish();
}

#[test]
fn with_all_traffic_a_release_is_held_to_a_bound_that_nobody_wrote_down() {
    let env = TestEnvironment::new();
    let beside = |version: usize, bad: u64| {
        let stack = stack(version, bad, "");
        let (before, after) = stack.split_once("canary: {steps: []").unwrap();
        format!("{before}blue_green: {{after: [{{analysis: 50s}}]{after}")
    };
    env.write(&beside(1, USUAL));
    env.ok(&["up"]);
    let clients = Clients::of(env.address("api"), 30.0, 20_261_121);
    env.write(&beside(2, LOTS / 4));
    let failed = env.run(&["up"]).expect(1);
    clients.runtime.shutdown_timeout(Duration::from_secs(30));
    assert!(failed.stderr.contains("ORC0704") && failed.stderr.contains("above the bound of 2.0 %"), "{failed}");
    env.finish();
}
