//! Integration tests of the simulator.

mod clocks;
mod crashes;
mod rollouts;
mod scenarios;
mod seeds;

/// A number that a person gave for this run.
fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}
