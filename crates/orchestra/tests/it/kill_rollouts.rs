//! `kill -9` of the server at random moments of rollouts. Whatever was begun must end by itself, within five seconds, with all
//! services on the old release or all on the new one; nothing may be left over, and nothing may have been started twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant},
};

use orchestra_testbed::random::Random;
use serde_json::Value;

use crate::{
    environment::{TestEnvironment, find},
    lanes::Lanes,
    load::get,
    processes::Role,
};

/// Lanes run at the same time, each with its own home and seed. Rollouts mostly wait.
const LANES: u64 = 6;
/// Longest time from the kill to the end of everything that was begun.
const CONVERGED: Duration = Duration::from_secs(5);
const REPLICAS: [(&str, u64); 3] = [("db", 1), ("api", 2), ("single", 1)];

/// How `api` moves, and the time in which that happens, in milliseconds.
const STRATEGIES: [(&str, &str, u64); 3] = [
    ("rolling", "rolling: {max_surge: 1, max_unavailable: 0}, min_ready: 100ms", 600),
    ("blue-green", "blue_green: {before: [{pause: 100ms}], after: [{pause: 100ms}], keep_warm: 100ms}", 700),
    (
        "canary",
        "canary: {steps: [{weight: 20}, {pause: 100ms}, {scale: 100%}, {weight: 60}, {pause: 100ms}], keep_warm: 100ms}",
        800,
    ),
];
/// How `single` moves, which must never run twice.
const ALONE: [&str; 2] = ["recreate: true", "hold: {queue: 10, timeout: 5s}"];

fn stack(version: u64, strategy: &str, alone: &str, fault: &str) -> String {
    format!(
        r#"
version: 1
name: rollouts
services:
  db:
    command: [APP]
    ports: {{http: auto}}
    env: {{VERSION: "{version}", STARTS: HERE/starts}}
    health: {{ready: {{http: /ready, every: 500ms, every_starting: 20ms}}}}
    rollout: {{blue_green: {{keep_warm: 100ms}}, drain: {{requests: 1s, streams: 1s}}}}
  api:
    command: [APP]
    replicas: 2
    ports: {{http: auto}}
    env: {{VERSION: "{version}", STARTS: HERE/starts{fault}}}
    depends_on: {{db: ready}}
    health: {{ready: {{http: /ready, every: 500ms, every_starting: 20ms}}, start_deadline: 2s}}
    # One more try: six servers choose ports without knowing of each other, and one start in ten thousand finds its port taken.
    restart: {{backoff: 20ms, max_backoff: 50ms, budget: 1}}
    rollout: {{{strategy}, drain: {{requests: 1s, streams: 1s}}}}
  single:
    command: [APP]
    ports: {{http: auto}}
    env: {{VERSION: "{version}", STARTS: HERE/starts, ALONE: HERE/alone}}
    depends_on: {{api: started}}
    health: {{ready: {{http: /ready, every: 500ms, every_starting: 20ms}}}}
    rollout: {{{alone}, drain: {{requests: 1s, streams: 1s}}}}
"#
    )
}

#[derive(Debug, Default)]
struct Counts {
    /// Kills while a rollout was in progress.
    points: u64,
    /// Kills that came after its end.
    after: u64,
    /// By strategy, and what came of it.
    outcomes: BTreeMap<String, u64>,
    exits: BTreeMap<String, u64>,
    /// Points that took too long.
    late: Vec<String>,
    /// Instances that were started.
    starts: usize,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.points += other.points;
        self.after += other.after;
        self.starts += other.starts;
        self.late.extend(other.late.iter().cloned());
        for (mine, theirs) in [(&mut self.outcomes, &other.outcomes), (&mut self.exits, &other.exits)] {
            for (name, count) in theirs {
                *mine.entry(name.clone()).or_default() += count;
            }
        }
    }
}

/// The release that all services are of.
#[track_caller]
fn release(env: &TestEnvironment, context: &str) -> u64 {
    let status = env.status();
    let mut versions = BTreeSet::new();
    for (service, count) in REPLICAS {
        let address = find(&status, service)["addresses"][0]["url"].as_str().unwrap_or_default().to_owned();
        let address = address.rsplit_once('/').unwrap().1.parse().unwrap();
        for _ in 0..=count {
            versions.insert(get(address, "/version").unwrap_or_else(|error| panic!("{context}: {service}: {error}")));
        }
    }
    assert_eq!(versions.len(), 1, "{context}: neither all old nor all new: {versions:?}\n{status:#}");
    versions.pop_first().unwrap().parse().unwrap()
}

/// Every launch that ran, and the proof that none did twice.
fn starts(env: &TestEnvironment) -> usize {
    let starts = fs::read_to_string(env.path("starts")).unwrap();
    let mut seen = BTreeSet::new();
    for launch in starts.lines() {
        assert!(seen.insert(launch), "started twice: {launch}\n{starts}");
    }
    let alone = fs::read_to_string(env.path("alone")).unwrap();
    assert_eq!(alone, "", "a service that must run alone did not\n{}", env.ok(&["events", "--tail", "100000"]).text());
    seen.len()
}

/// Counts, and the times from the kill to the end of everything.
fn lane(seed: u64, points: u64) -> (Counts, Vec<Duration>) {
    let mut random = Random::new(seed);
    let (mut counts, mut times) = (Counts::default(), Vec::new());
    let env = TestEnvironment::new();
    let (mut version, mut stable) = (1, 1);
    env.write(&stack(version, STRATEGIES[0].1, ALONE[0], ""));
    env.ok(&["up"]);
    while counts.points < points {
        version += 1;
        let (name, strategy, time) = *random.pick(&STRATEGIES).unwrap();
        let alone = *random.pick(&ALONE).unwrap();
        // Every fifth one has to be turned back.
        let fault = random.below(5) == 0;
        env.write(&stack(version, strategy, alone, if fault { ", CRASH_AFTER_MS: \"30\"" } else { "" }));
        let kill = Duration::from_micros(random.below(time * 1000));
        let point = format!(
            "seed {seed} point {}: release {version} over {stable}, {name}, {alone}, fault: {fault}, killed after {kill:?}",
            counts.points
        );
        let server = env.one(Role::Server);
        let mut up = env.spawn(&["up"]);
        std::thread::sleep(kill);
        server.kill();
        let killed = Instant::now();
        let in_time = !up.has_ended();
        // Nobody does anything but look. The `up` looks too: it starts the next server, and asks again if it had no answer.
        env.ok(&["status"]);
        let ran = up.wait();
        env.assert_consistent(&REPLICAS, &point);
        let took = killed.elapsed();
        let found = release(&env, &point);
        if took > CONVERGED {
            counts.late.push(format!("{point}: took {took:?}\n{}", env.ok(&["events", "--tail", "60"]).text()));
        }
        assert!(found == stable || (found == version && !fault), "{point}: {found} is in force");
        assert!(matches!(ran.code(), Some(0 | 1 | 3)) && !ran.stderr.contains("panicked"), "{point}: {ran}");
        let expected = if found == version { [Some(0), Some(3)] } else { [Some(1), Some(3)] };
        assert!(expected.contains(&ran.code()), "{point}: {found} is in force, but {ran}");
        stable = found;
        if in_time {
            counts.points += 1;
            times.push(took);
        } else {
            counts.after += 1;
        }
        starts(&env);
        let outcome = if found == version { "all new" } else { "all old" };
        *counts.outcomes.entry(format!("{name}{}: {outcome}", if fault { ", bad" } else { "" })).or_default() += 1;
        *counts.exits.entry(format!("{:?}", ran.code())).or_default() += 1;
    }
    counts.starts = starts(&env);
    let history = env.ok(&["history", "--json"]).json();
    let states: Vec<&Value> = history.as_array().unwrap().iter().map(|release| &release["state"]).collect();
    assert_eq!(states.iter().filter(|state| **state == "stable").count(), 1, "{history:#}");
    assert!(!states.iter().any(|state| *state == "deploying"), "{history:#}");
    env.finish();
    (counts, times)
}

#[test]
fn a_server_killed_in_the_middle_of_a_rollout_ends_it() {
    let lanes = Lanes::run(LANES, lane);
    let (mut total, mut times) = (Counts::default(), Vec::<Duration>::new());
    for (counts, took) in &lanes.results {
        total.add(counts);
        times.extend(took);
    }
    times.sort_unstable();
    let at = |permille: usize| times.get((times.len() * permille / 1000).min(times.len().saturating_sub(1)));
    eprintln!("{total:#?}");
    eprintln!("from the kill to the end: median {:?}, 95 % {:?}, longest {:?}", at(500), at(950), at(1000));
    lanes.prove(total.points);
    assert!(total.late.is_empty(), "{} points took longer than {CONVERGED:?}", total.late.len());
}
