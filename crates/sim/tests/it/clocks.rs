//! The clock on the wall: it dates what is told, and decides nothing while a server lives.

use std::{path::Path, time::Duration};

use orchestra_sim::{
    operator, script, stack,
    world::{Faults, World},
};

/// Changes of the clock that are put between the commands of a scenario.
const CHANGES: [&str; 4] = ["+3h", "-5h", "+400d", "-1s"];

#[test]
fn a_changed_clock_changes_no_scenario() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/scenarios");
    let mut played = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let scenario = std::fs::read_to_string(&path).unwrap();
        // While the server is away nobody can tell a changed clock from time that has passed.
        if scenario.contains("\ncrash") {
            continue;
        }
        let (stacks, commands) = scenario.split_once("=== script\n").unwrap();
        let changed: Vec<String> = commands
            .lines()
            .zip(CHANGES.iter().cycle())
            .map(|(command, change)| format!("clock {change}\n{command}\n"))
            .collect();
        let output = |commands: &str| {
            let output = script::play(&format!("{stacks}=== script\n{commands}")).unwrap_or_else(|why| panic!("{why}"));
            output.lines().filter(|line| !line.starts_with("> clock")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(output(&changed.concat()), output(commands), "{}", path.display());
        played += 1;
    }
    assert!(played >= 10, "only {played} scenarios were played");
}

/// Dates may go back and forth; the order of events is that of what happened.
#[test]
fn events_stay_in_order_whatever_the_clock_shows() {
    const STACK: &str = "
version: 1
name: demo
services:
  api: {command: [program, ready=300ms], ports: {http: auto}, health: {ready: {http: /ready}}}
";
    let mut world = World::new("demo/dev".parse().unwrap(), 3, Faults::default());
    operator::up(&mut world, stack::load(STACK).unwrap());
    let begin = world.now;
    let clock = world.clock;
    for hours in [5u64, 0, 30, 1] {
        world.clock = clock + hours * 3_600_000;
        let limit = world.now + Duration::from_millis(110);
        operator::until(&mut world, limit, |_| false);
    }
    let limit = world.now + Duration::from_secs(60);
    assert!(operator::until(&mut world, limit, World::is_settled), "it did not come to rest");
    assert!(world.now.since(begin) < Duration::from_secs(2), "a deadline followed the clock");
    let events = &world.disk.events;
    assert!(events.windows(2).any(|pair| pair[1].at < pair[0].at), "the clock was never seen to go back");
    assert!(events.iter().zip(1..).all(|(event, sequence)| event.sequence == sequence));
    assert!(world.disk.times.windows(2).all(|pair| pair[0] <= pair[1]));
}
