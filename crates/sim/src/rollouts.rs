//! Rollouts by the million: the machine of an environment alone, in a world that costs next to nothing.
//!
//! [`crate::world::World`] asks every check at its rate and loads every stack file; a seed of it takes tens of
//! milliseconds. Here a seed is one schedule of releases, people and faults for one to three services, and the world says
//! something only when it changes, so that a schedule takes a few hundred microseconds and a million of them a coffee
//! break. What is driven is the same [`orchestra_machine::Environment`], with commits before effects, crashes between
//! any two of them, and recoveries from what was committed.
//!
//! The queue of this world runs empty, so "nothing will ever happen again" can be seen: a run that has not ended then
//! never will. The laws are in [`laws`].

mod laws;
mod people;
mod ports;
mod schedule;
mod world;

use orchestra_machine::rng::Rng;

use self::world::World;
use crate::seed::Failure;

/// What schedules did, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Things that happened in the world.
    pub steps: u64,
    /// Processes that were started.
    pub launches: u64,
    /// Crashes of the server.
    pub crashes: u64,
    /// Runs that reached their goal.
    pub succeeded: u64,
    /// Runs that failed and were put back.
    pub rolled_back: u64,
    /// Runs that a person ended and that were put back.
    pub cancelled: u64,
    /// Rollouts that waited for a person at some time.
    pub paused: u64,
    /// Rollouts in steps.
    pub stepped: u64,
    /// Releases that arrived while another one was under way.
    pub superseded: u64,
    /// Releases that somebody went back to while their instances were still kept.
    pub warm_returns: u64,
    /// Commands of people to rollouts.
    pub commands: u64,
    /// Verdicts that were given: pass, fail, inconclusive, error.
    pub verdicts: [u64; 4],
    /// Hooks that said no.
    pub refusals: u64,
    /// Instances that were killed.
    pub kills: u64,
    /// Changes of the clock.
    pub clocks: u64,
    /// Runs that were put back because something was not done in time.
    pub late: u64,
    /// Runs that were put back because of a crash loop.
    pub loops: u64,
}

impl Report {
    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.launches += other.launches;
        self.crashes += other.crashes;
        self.succeeded += other.succeeded;
        self.rolled_back += other.rolled_back;
        self.cancelled += other.cancelled;
        self.paused += other.paused;
        self.stepped += other.stepped;
        self.superseded += other.superseded;
        self.warm_returns += other.warm_returns;
        self.commands += other.commands;
        for (sum, more) in self.verdicts.iter_mut().zip(other.verdicts) {
            *sum += more;
        }
        self.refusals += other.refusals;
        self.kills += other.kills;
        self.clocks += other.clocks;
        self.late += other.late;
        self.loops += other.loops;
    }
}

/// Plays one schedule.
///
/// # Errors
/// The first law that was broken.
pub fn run(seed: u64, trace: bool) -> Result<Report, Failure> {
    let mut rng = Rng::new(seed.wrapping_mul(0x9E6D_62D0_6F6A_9A9B).wrapping_add(5));
    for _ in 0..4 {
        rng.next_u64();
    }
    let mut world = World::new(&mut rng, trace);
    world.play(&mut rng);
    match world.failure.take() {
        None => Ok(world.report),
        Some(law) => Err(Failure { seed, law, trace: world.trace.take() }),
    }
}
