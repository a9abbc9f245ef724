//! The kill harness: a real change in progress, `kill -9` of a part at a random moment, and then one command, after which
//! everything is as wanted.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use orchestra_testbed::random::Random;
use serde_json::Value;

use crate::{environment::TestEnvironment, lanes::Lanes, processes::Role};

/// Lanes run at the same time, each with its own environment and seed.
const LANES: u64 = 4;
/// Latest moment of a kill after the command began, in microseconds: a little more than a change takes.
const LATEST: u64 = 160_000;

/// What a lane wants at the moment.
#[derive(Clone, Debug)]
struct Wanted {
    version: u64,
    api: u64,
}

impl Wanted {
    fn stack(&self) -> String {
        let common = "restart: {backoff: 20ms, max_backoff: 100ms, budget: unlimited}\n    rollout: {drain: {requests: 2s, streams: 2s}}\n    stop: {grace: 5s}";
        format!(
            r#"
version: 1
name: kill
volumes:
  data: {{}}
jobs:
  migrate:
    command: [APP, job]
    env: {{VERSION: "{version}", START_DELAY_MS: "25", DATA: "{{{{ volumes.data.path }}}}"}}
    retries: 5
    backoff: 20ms
services:
  db:
    command: [APP]
    env: {{PORT: "0", NOTIFY: "1"}}
    health: {{ready: {{notify: true}}}}
    {common}
  api:
    command: [APP]
    replicas: {api}
    ports: {{http: auto}}
    env: {{VERSION: "{version}", START_DELAY_MS: "25"}}
    depends_on: {{db: ready, migrate: completed}}
    health: {{ready: {{http: /ready, every: 500ms, every_starting: 20ms}}}}
    {common}
  worker:
    command: [APP]
    env: {{PORT: "0", LOG_READY: ready, VERSION: "{half}", API: "{{{{ services.api.url }}}}"}}
    depends_on: {{api: ready}}
    health: {{ready: {{log: ready}}}}
    {common}
"#,
            version = self.version,
            api = self.api,
            half = self.version / 2,
        )
    }

    fn replicas(&self) -> [(&'static str, u64); 3] {
        [("db", 1), ("api", self.api), ("worker", 1)]
    }
}

#[derive(Debug, Default)]
struct Counts {
    /// Kills while the command was in progress.
    points: u64,
    /// Kills that came after its end.
    after: u64,
    /// Moments at which there was nothing to kill yet.
    missed: u64,
    victims: BTreeMap<&'static str, u64>,
    exits: BTreeMap<String, u64>,
    /// Commands that found the run of the one before still going on.
    waited: u64,
    /// Longest time to converge.
    slowest: Duration,
}

fn lane(seed: u64, points: u64) -> Counts {
    let mut random = Random::new(seed);
    let mut counts = Counts::default();
    let mut wanted = Wanted { version: 1, api: 2 };
    let env = TestEnvironment::new();
    env.write(&wanted.stack());
    while counts.points < points {
        let point = format!("seed {seed} point {}", counts.points);
        // The first `up` is a change from nothing.
        let choice = if counts.points == 0 { 0 } else { random.below(10) };
        let change = match choice {
            0..=4 => {
                wanted.version += 1;
                wanted.api = 1 + random.below(3);
                env.write(&wanted.stack());
                vec!["up".to_owned()]
            }
            5 | 6 => vec!["scale".to_owned(), format!("api={}", 1 + random.below(3))],
            7 => vec!["restart".to_owned(), "api".to_owned(), "db".to_owned()],
            8 => vec!["rollback".to_owned()],
            _ => vec!["down".to_owned()],
        };
        let arguments: Vec<&str> = change.iter().map(String::as_str).collect();
        let mut command = env.spawn(&arguments);
        // The moment is what is varied here: any instant must do.
        std::thread::sleep(Duration::from_micros(random.below(LATEST)));
        let role = match random.below(10) {
            0..=3 => Role::Server,
            4 => Role::Proxy,
            5..=6 => Role::Shim,
            7 => Role::Zygote,
            _ => Role::Instance,
        };
        let mut victims = env.all(role);
        if victims.is_empty() {
            victims = env.all(Role::Server);
        }
        match random.pick(&victims) {
            Some(victim) => {
                victim.kill();
                if command.has_ended() {
                    // It still must be survived, but it is no point of a change in progress.
                    counts.after += 1;
                } else {
                    counts.points += 1;
                }
                let name = match victim.role {
                    Role::Server => "server",
                    Role::Proxy => "proxy",
                    Role::Shim => "shim",
                    Role::Zygote => "zygote",
                    _ => "instance",
                };
                *counts.victims.entry(name).or_default() += 1;
            }
            None => counts.missed += 1,
        }
        let context = format!("{point}: {role:?} killed during `{}`", change.join(" "));
        let ended = command.wait();
        *counts.exits.entry(format!("{} {:?}", change[0], ended.code())).or_default() += 1;
        assert!(matches!(ended.code(), Some(0 | 1 | 3 | 4)), "{context}: {ended}");
        assert!(!ended.stderr.contains("panicked"), "{context}: {ended}");
        // The state is readable at once.
        let status = env.run(&["status", "--json"]);
        let nothing_yet = counts.points + counts.after <= 1 && status.text().contains("ORC0405");
        assert!(status.code() == Some(0) || nothing_yet, "{context}: {status}");
        status.json();
        // And one command makes everything as wanted.
        let began = Instant::now();
        loop {
            let up = env.run(&["up"]);
            assert!(!up.stderr.contains("panicked"), "{context}: {up}");
            if up.code() == Some(4) && up.stderr.contains("ORC0702") {
                // The command lost its server at the end, and the run that it began goes on.
                counts.waited += 1;
                env.wait_for("the run's end", |status| status["run"].is_null());
                continue;
            }
            assert_eq!(up.code(), Some(0), "{context}, then: {up}\n{}", env.run(&["events", "--tail", "60"]).text());
            break;
        }
        env.assert_consistent(&wanted.replicas(), &context);
        counts.slowest = counts.slowest.max(began.elapsed());
    }
    // History in order: one stable release, and numbers without a gap.
    let history = env.ok(&["history", "--json"]).json();
    let releases: Vec<&Value> = history.as_array().unwrap().iter().collect();
    assert_eq!(releases.iter().filter(|release| release["state"] == "stable").count(), 1, "{history:#}");
    assert!(releases.iter().all(|release| release["state"] != "deploying"), "{history:#}");
    env.finish();
    counts
}

#[test]
fn any_part_may_be_killed_at_any_moment() {
    let lanes = Lanes::run(LANES, lane);
    let mut total = Counts::default();
    for counts in &lanes.results {
        total.points += counts.points;
        total.missed += counts.missed;
        total.after += counts.after;
        total.waited += counts.waited;
        total.slowest = total.slowest.max(counts.slowest);
        for (victim, count) in &counts.victims {
            *total.victims.entry(victim).or_default() += count;
        }
        for (exit, count) in &counts.exits {
            *total.exits.entry(exit.clone()).or_default() += count;
        }
    }
    eprintln!("{total:#?}");
    lanes.prove(total.points);
}
