//! The figures of the verdict, over simulated releases on fixed seeds, as the tables of `docs/figures/verdict.md`.
//!
//! `cargo bench -p orchestra-stats --bench verdict`; with a number as argument, so many releases per row instead of 1,000;
//! with names of sections (`rates`, `good`, `outages`, `bad`, `grid`, `passes`, `guards`), only those.
//! A look covers 250 ms, as the reports of the proxy do, and 5 s below one request a second.

#[path = "../tests/it/world.rs"]
mod world;

use orchestra_stats::{Outcome, Settings, Unit};
use world::{Over, Poison, Run, Stalls, World, many, quantile};

/// The first seed of every row.
const SEED: u64 = 20_261_121;

const RATES: [f64; 6] = [0.05, 0.1, 1.0, 10.0, 100.0, 1000.0];
const WEIGHTS: [f64; 4] = [0.01, 0.05, 0.2, 0.5];

/// Steady traffic at one weight, looked at as often as it is worth.
fn steady(rate: f64, weight: f64, seconds: f64) -> World {
    with(World::steady(rate, weight, seconds), |it| it.tick = if rate > 0.0 && rate < 1.0 { 5.0 } else { 0.25 })
}

/// Weights and seconds of a usual canary.
fn steps(seconds: f64) -> Vec<(f64, f64)> {
    vec![(0.05, seconds), (0.2, seconds), (0.5, seconds), (1.0, seconds)]
}

fn good(rate: f64) -> World {
    let seconds = if rate < 1.0 { 3600.0 } else { 300.0 };
    let mut world = steady(rate, 0.2, 0.0);
    world.steps = steps(seconds);
    world.bad = (|_| 0.005, |_| 0.005);
    world
}

fn with(mut world: World, change: impl FnOnce(&mut World)) -> World {
    change(&mut world);
    world
}

fn failed(runs: &[Run]) -> usize {
    runs.iter().filter(|run| run.failed.is_some()).count()
}

fn rates(releases: u64) {
    println!("| good release | requests/s | failed of {releases} | goal |\n|---|---|---|---|");
    for rate in RATES {
        let failed = failed(&many(&good(rate), SEED, releases));
        println!("| weights 5, 20, 50, 100 %; 0.5 % errors | {rate} | {failed} | at most 1 % |");
    }
}

fn false_rollbacks(releases: u64) {
    println!("| good release | requests/s | failed of {releases} | goal |\n|---|---|---|---|");
    let mut rows: Vec<(String, f64, World)> = Vec::new();
    for rate in [1.0, 100.0] {
        rows.push((
            "weight 20 %, 20 minutes; 10 % errors".into(),
            rate,
            with(good(rate), |it| {
                it.steps = vec![(0.2, 1200.0)];
                it.bad = (|_| 0.1, |_| 0.1);
            }),
        ));
        rows.push((
            "traffic and errors follow the day, at 24 times the speed".into(),
            rate,
            with(good(rate), |it| {
                it.rate = |now| 1.0 + 0.9 * (now / 3600.0 * std::f64::consts::TAU).sin();
                it.steps = steps(900.0);
                it.bad = (day, day);
            }),
        ));
        rows.push((
            "every 30 s a client sends 50 requests that fail anywhere".into(),
            rate,
            with(good(rate), |it| {
                it.poison = Poison::Burst { every: 30.0, size: 50 };
                it.steps = vec![(0.05, 600.0), (0.2, 600.0), (0.5, 600.0)];
            }),
        ));
        rows.push((
            "the same, sticky".into(),
            rate,
            with(good(rate), |it| {
                it.poison = Poison::Burst { every: 30.0, size: 50 };
                it.steps = vec![(0.05, 600.0), (0.2, 600.0), (0.5, 600.0)];
                it.settings.unit = Unit::Session;
            }),
        ));
        rows.push((
            "three counters, probes every 5 s, 1 % of them bad".into(),
            rate,
            with(good(rate), |it| {
                it.settings.counters = ["a", "b", "c"].map(str::to_owned).to_vec();
                it.counted = (0.02, 0.02);
                it.settings.probes = true;
                it.probes = (0.2, 0.01, 0.01);
            }),
        ));
        rows.push((
            "instances stall every 120 s for 0.5 s, one on four".into(),
            rate,
            with(good(rate), |it| {
                it.stalls = Some(Stalls { every: 120.0, lasts: 0.5, instances: (1, 4), fails: false });
                it.steps = vec![(0.2, 1800.0)];
            }),
        ));
    }
    for rate in [1.0, 100.0] {
        for lasts in [0.5, 5.0] {
            rows.push((
                format!("each instance, one on four, fails everything every 600 s for {lasts} s"),
                rate,
                with(good(rate), |it| {
                    it.stalls = Some(Stalls { every: 600.0, lasts, instances: (1, 4), fails: true });
                    it.steps = vec![(0.2, 1800.0)];
                }),
            ));
        }
        for clients in [1, 2, 5] {
            let some = if clients == 1 { "one client".to_owned() } else { format!("{clients} clients") };
            rows.push((
                format!("{some}, weight 20 %, 20 minutes; 5 % errors"),
                rate,
                with(good(rate), |it| {
                    it.clients = clients;
                    it.steps = vec![(0.2, 1200.0)];
                    it.bad = (|_| 0.05, |_| 0.05);
                }),
            ));
        }
    }
    for (name, rate, world) in rows {
        let failed = failed(&many(&world, SEED, releases));
        println!("| {name} | {rate} | {failed} | at most 1 % |");
    }
}

/// Both releases need something that fails: for a minute, most of the time, half of the requests, again and again.
fn outages(releases: u64) {
    println!(
        "| outage of both at weight 20 % and 50 % | requests/s | failed of {releases} before it | in it | after it | goal |\n|---|---|---|---|---|---|"
    );
    let whole: Over = |now| if (60.0..120.0).contains(&now) { 1.0 } else { 0.001 };
    let most: Over = |now| if (60.0..120.0).contains(&now) { 0.9 } else { 0.001 };
    let half: Over = |now| if (60.0..120.0).contains(&now) { 0.5 } else { 0.001 };
    let again: Over = |now| if now > 60.0 && now % 10.0 < 3.0 { 1.0 } else { 0.001 };
    let slow: Over = |now| if (3600.0..10_800.0).contains(&now) { 1.0 } else { 0.001 };
    let mut rows = Vec::new();
    for rate in RATES {
        if rate < 1.0 {
            rows.push(("everything fails for two hours", slow, rate, Unit::Request, (3600.0, 10_800.0, 14_400.0)));
            continue;
        }
        let times = (60.0, 120.0, 180.0);
        rows.push(("everything fails for 60 s", whole, rate, Unit::Request, times));
        if rate < 1000.0 {
            rows.push(("everything fails for 60 s, sticky", whole, rate, Unit::Session, times));
        }
        rows.push(("90 % fail for 60 s", most, rate, Unit::Request, times));
        rows.push(("half fail for 60 s", half, rate, Unit::Request, times));
        rows.push(("everything fails for 3 s in every 10 s", again, rate, Unit::Request, (60.0, 180.0, 180.0)));
    }
    for (name, bad, rate, unit, (begin, end, over)) in rows {
        let mut runs = Vec::new();
        for weight in [0.2, 0.5] {
            let world = with(steady(rate, weight, over), |it| {
                it.bad = (bad, bad);
                it.settings.unit = unit;
            });
            runs.extend(many(&world, SEED, releases / 2));
        }
        let within =
            |from: f64, to: f64| runs.iter().filter(|it| it.failed.is_some_and(|at| at > from && at <= to)).count();
        println!(
            "| {name} | {rate} | {} | {} | {} | none in it |",
            within(0.0, begin),
            within(begin, end),
            within(end, f64::INFINITY)
        );
    }
}

fn day(now: f64) -> f64 {
    0.005 + 0.004 * (now / 3600.0 * std::f64::consts::TAU).cos()
}

fn bad_release(rate: f64, weight: f64, bad: Over, seconds: f64) -> World {
    with(steady(rate, weight, seconds), |it| it.bad.1 = bad)
}

/// Good releases at every rate and weight.
fn weights(releases: u64) {
    println!("### Good releases, 0.5 % of both fail: failed of {releases}\n");
    let heads: Vec<String> = WEIGHTS.iter().map(|weight| format!("{:.0} %", weight * 100.0)).collect();
    println!("| requests/s | {} |\n|---|---|---|---|---|", heads.join(" | "));
    for rate in RATES {
        let cells = WEIGHTS.map(|weight| {
            let seconds = if rate < 1.0 { 86_400.0 } else { 1800.0 };
            let world = with(steady(rate, weight, seconds), |it| it.bad = (|_| 0.005, |_| 0.005));
            failed(&many(&world, SEED, releases)).to_string()
        });
        println!("| {rate} | {} |", cells.join(" | "));
    }
}

/// How long a bad release lives, over all rates and weights.
fn grid(releases: u64, name: &str, bad: Over) {
    println!("### {name}, 0.1 % of the stable release\n");
    println!("Seconds to the verdict p50 and p95, bad responses of the canary until then p95.\n");
    let heads: Vec<String> = WEIGHTS.iter().map(|weight| format!("{:.0} %", weight * 100.0)).collect();
    println!("| requests/s | {} |\n|---|---|---|---|---|", heads.join(" | "));
    for rate in RATES {
        let cells = WEIGHTS.map(|weight| {
            let seconds = (100_000.0 / rate).clamp(600.0, 86_400.0);
            let runs = many(&bad_release(rate, weight, bad, seconds), SEED, releases);
            let caught = failed(&runs);
            let seconds: Vec<f64> = runs.iter().map(|run| run.failed.unwrap_or(f64::INFINITY)).collect();
            #[expect(clippy::cast_precision_loss, reason = "a few responses")]
            let bad: Vec<f64> = runs.iter().map(|run| run.canary_bad as f64).collect();
            let of = |at| time(quantile(seconds.clone(), at));
            let missed = if caught < runs.len() { format!(" ({caught} caught)") } else { String::new() };
            format!("{} / {} / {}{missed}", of(0.5), of(0.95), quantile(bad, 0.95))
        });
        println!("| {rate} | {} |", cells.join(" | "));
    }
    println!();
}

fn time(seconds: f64) -> String {
    match seconds {
        it if it.is_infinite() => "never".to_owned(),
        it if it >= 100.0 => format!("{it:.0}"),
        it => format!("{it:.1}"),
    }
}

fn detection(releases: u64) {
    println!(
        "| bad release, stable 0.1 % bad | requests/s | weight | caught of {releases} | s p50 | s p95 | bad p50 | bad p95 | goal |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let all: Over = |_| 1.0;
    let some: Over = |_| 0.05;
    let mut rows = vec![
        ("every response fails", bad_release(10.0, 0.2, all, 120.0), "5 s, 8 bad"),
        ("5 % fail", bad_release(100.0, 0.2, some, 300.0), "15 s"),
    ];
    let names = [
        "every response fails, one client",
        "every response fails, two clients",
        "every response fails, three clients",
    ];
    for (clients, name) in (1..).zip(names) {
        rows.push((name, with(bad_release(10.0, 0.2, all, 600.0), |it| it.clients = clients), ""));
    }
    let sticky = with(bad_release(10.0, 0.2, all, 600.0), |it| it.settings.unit = Unit::Session);
    rows.push(("every response fails, sticky", sticky, ""));
    let slow = with(bad_release(10.0, 0.2, all, 600.0), |it| it.tick = 1.0);
    rows.push(("every response fails, one look per second", slow, ""));
    let cold = with(bad_release(10.0, 0.2, all, 600.0), |it| it.warm = false);
    rows.push(("every response fails, from the admission on", cold, ""));
    let late = with(bad_release(10.0, 0.2, all, 600.0), |it| it.late = true);
    rows.push(("every response is late", late, ""));
    let late = with(bad_release(100.0, 0.2, some, 600.0), |it| it.late = true);
    rows.push(("5 % are late", late, ""));
    let later = with(bad_release(100.0, 0.2, |now| if now < 600.0 { 0.001 } else { 0.05 }, 1200.0), |_| {});
    rows.push(("5 % fail, from 600 s on (counted from 0)", later, ""));
    let twice = with(bad_release(1000.0, 0.2, |_| 0.02, 600.0), |it| it.bad.0 = |_| 0.01);
    rows.push(("2 % fail, against 1 % of the stable release", twice, ""));
    let alone = with(bad_release(100.0, 1.0, some, 600.0), |_| {});
    rows.push(("5 % fail, nothing to compare with, bound 2 %", alone, ""));
    let counter = with(steady(100.0, 0.2, 600.0), |it| {
        it.settings.counters = vec!["parse_failures_total".to_owned()];
        it.counted = (0.02, 0.1);
    });
    rows.push(("a counter grows by 10 % of requests, not 2 %, read every 10 s", counter, ""));
    let streams = with(bad_release(10.0, 0.2, all, 600.0), |it| it.silent_until = 60.0);
    rows.push(("every response fails, the stable release's take 60 s each", streams, ""));
    let probes = with(steady(0.0, 0.2, 600.0), |it| {
        it.settings.probes = true;
        it.probes = (1.0, 0.001, 1.0);
    });
    rows.push(("no traffic, one pair of probes per second, all bad on the canary", probes, ""));
    for (name, world, goal) in rows {
        let runs = many(&world, SEED, releases);
        let seconds: Vec<f64> = runs.iter().map(|run| run.failed.unwrap_or(f64::INFINITY)).collect();
        #[expect(clippy::cast_precision_loss, reason = "a few responses")]
        let bad: Vec<f64> = runs.iter().map(|run| run.canary_bad as f64).collect();
        println!(
            "| {name} | {} | {:.0} % | {} | {:.1} | {:.1} | {} | {} | {goal} |",
            world.scale,
            world.steps[0].0 * 100.0,
            failed(&runs),
            quantile(seconds.clone(), 0.5),
            quantile(seconds, 0.95),
            quantile(bad.clone(), 0.5),
            quantile(bad, 0.95),
        );
    }
}

fn passes(releases: u64) {
    println!(
        "| release | stable | requests/s | weight | passed of {releases} | inconclusive | failed | s to pass p50 | s p95 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let share: [(&str, Over); 4] = [("0 %", |_| 0.0), ("0.1 %", |_| 0.001), ("1 %", |_| 0.01), ("2 %", |_| 0.02)];
    let mut rows = Vec::new();
    for (rate, weight) in [(1.0, 0.05), (1.0, 0.5), (10.0, 0.2), (100.0, 0.2), (100.0, 0.05)] {
        rows.push((1, 1, rate, weight));
    }
    rows.extend([(0, 0, 10.0, 0.2), (2, 2, 100.0, 0.2), (2, 1, 100.0, 0.2), (3, 1, 10.0, 0.2), (3, 2, 100.0, 0.2)]);
    for (canary, stable, rate, weight) in rows {
        let world = with(steady(rate, weight, 300.0), |it| it.bad = (share[stable].1, share[canary].1));
        let runs = many(&world, SEED, releases);
        let count = |outcome| runs.iter().filter(|run| run.outcomes == [outcome]).count();
        let seconds: Vec<f64> = runs.iter().filter_map(|run| run.enough).collect();
        println!(
            "| {} bad | {} | {rate} | {:.0} % | {} | {} | {} | {:.0} | {:.0} |",
            share[canary].0,
            share[stable].0,
            weight * 100.0,
            count(Outcome::Pass),
            count(Outcome::Inconclusive),
            count(Outcome::Fail),
            quantile(seconds.clone(), 0.5),
            quantile(seconds, 0.95),
        );
    }
}

/// What a row changes in the settings.
type Change = fn(&mut Settings);

fn guards(releases: u64) {
    println!(
        "| guard | good release with stalls | poison client on the canary | three clients, all bad: s p95 | all bad: s p95 | all late: s p95 |"
    );
    println!("|---|---|---|---|---|---|");
    let rows: [(&str, Change); 7] = [
        ("default: 2 per client and 10 s, 2 failed/s, 0.2 late/s", |_| {}),
        ("1 per client and 10 s", |it| it.client_cap = 1),
        ("4 per client and 10 s", |it| it.client_cap = 4),
        ("no cap on clients", |it| it.client_cap = u32::MAX),
        ("one client is enough", |it| it.min_clients = 1),
        ("2 late/s", |it| it.late_burst = 2.0),
        ("no cap on moments", |it| (it.failed_burst, it.late_burst) = (1e6, 1e6)),
    ];
    for (name, change) in rows {
        let settle = |mut world: World| {
            change(&mut world.settings);
            world
        };
        let stalls = settle(with(steady(100.0, 0.2, 1800.0), |it| {
            it.stalls = Some(Stalls { every: 120.0, lasts: 0.5, instances: (1, 4), fails: false });
        }));
        let poison = settle(with(steady(10.0, 0.2, 1800.0), |it| {
            it.poison = Poison::OnCanary { per_second: 1.0 };
        }));
        let few = settle(with(bad_release(10.0, 0.2, |_| 1.0, 600.0), |it| it.clients = 3));
        let all = settle(bad_release(10.0, 0.2, |_| 1.0, 600.0));
        let late = settle(with(bad_release(10.0, 0.2, |_| 1.0, 600.0), |it| it.late = true));
        let seconds = |world: &World| {
            let runs = many(world, SEED, releases);
            quantile(runs.iter().map(|run| run.failed.unwrap_or(f64::INFINITY)).collect(), 0.95)
        };
        println!(
            "| {name} | {} of {releases} failed | {} of {releases} failed | {:.1} | {:.1} | {:.1} |",
            failed(&many(&stalls, SEED, releases)),
            failed(&many(&poison, SEED, releases)),
            seconds(&few),
            seconds(&all),
            seconds(&late),
        );
    }
}

/// Name, title, and what prints it over so many releases.
type Section = (&'static str, &'static str, fn(u64));

fn main() {
    let releases = std::env::args().skip(1).find_map(|it| it.parse().ok()).unwrap_or(1000);
    let sections: [Section; 7] = [
        ("rates", "Good releases at every rate", rates),
        ("good", "Good releases that mislead", false_rollbacks),
        ("outages", "An outage of both", outages),
        ("bad", "Bad releases", detection),
        ("grid", "Every rate and weight", grids),
        ("passes", "Passes", passes),
        ("guards", "What the guards do", guards),
    ];
    let named = |name: &str| std::env::args().any(|it| it == name);
    let all = !sections.iter().any(|(name, ..)| named(name));
    for (name, title, print) in sections {
        if all || named(name) {
            println!("## {title}\n");
            print(releases);
            println!();
        }
    }
}

fn grids(releases: u64) {
    grid(releases, "Every response fails", |_| 1.0);
    grid(releases, "5 % fail", |_| 0.05);
    weights(releases);
}
