//! One seed: a random stack, a random sequence of what an operator does with it, random faults, and the laws.

use std::time::Duration;

use orchestra_machine::rng::Rng;
use orchestra_model::{
    Name, Now, ReleaseNumber, Resource,
    record::{RunKind, RunState},
};

use crate::{
    operator,
    stack::{self, FOREIGN_PORTS, Stack},
    world::{Faults, Item, World},
};

/// A law that a seed broke.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which seed.
    pub seed: u64,
    /// Which law, when.
    pub law: String,
    /// What happened, if it was traced.
    pub trace: Option<String>,
}

/// What a seed did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Things that happened in its world.
    pub steps: u64,
    /// Runs that ended: reached their goal, did not, were cancelled.
    pub runs: (u32, u32, u32),
    /// Crashes of the server.
    pub crashes: u32,
    /// Processes that were started.
    pub launches: usize,
}

/// Longest virtual time in which a quiet, sound world must settle.
const SETTLE: Duration = Duration::from_secs(600);

/// Runs one seed.
///
/// # Errors
/// The first law that was broken.
pub fn run(seed: u64, trace: bool) -> Result<Report, Failure> {
    let mut rng = Rng::new(seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(11));
    for _ in 0..4 {
        rng.next_u64();
    }
    let faults = random_faults(&mut rng);
    let id = "demo/dev".parse().expect("a valid id");
    let mut world = World::new(id, rng.next_u64(), faults.clone());
    world.trace = trace.then(String::new);
    world.data_plane.foreign.extend(FOREIGN_PORTS);
    world.log(|| format!("{faults:?}"));
    schedule_deaths(&mut world, &mut rng);
    operate(&mut world, &mut rng);
    let fail = |world: &mut World, law: String| Failure { seed, law, trace: world.trace.take() };
    if let Some(law) = world.failure().map(str::to_owned) {
        return Err(fail(&mut world, law));
    }
    let mut report =
        Report { steps: world.steps, crashes: world.crashes, launches: world.provider.ever.len(), ..Report::default() };
    for run in world.disk.runs.values() {
        match run.state {
            RunState::Succeeded => report.runs.0 += 1,
            RunState::Failed => report.runs.1 += 1,
            RunState::Cancelled => report.runs.2 += 1,
            RunState::Running | RunState::Reverting => {}
        }
    }
    Ok(report)
}

fn random_faults(rng: &mut Rng) -> Faults {
    let together = [0, 300, 800][usize::try_from(rng.below(3)).unwrap_or(0)];
    if rng.below(5) == 0 {
        return Faults { together, ..Faults::default() };
    }
    let mut some = |most: u64| if rng.below(2) == 0 { 0 } else { rng.below(most + 1) };
    Faults {
        crash: some(12),
        slow: some(80),
        double: some(100),
        launch_fails: some(80),
        port_taken: some(80),
        silent: some(60),
        volume_fails: some(100),
        together,
        patient: some(1) == 1,
    }
}

/// Random deaths of instances, of the data plane and of the server.
fn schedule_deaths(world: &mut World, rng: &mut Rng) {
    if rng.below(3) == 0 {
        return;
    }
    for item in [Item::Kill, Item::KillDataPlane, Item::KillServer] {
        if rng.below(2) == 0 {
            for _ in 0..rng.below(5) {
                let at = Now::at(Duration::from_millis(rng.below(150_000)));
                world.fault_at(at, item.clone());
            }
        }
    }
}

fn operate(world: &mut World, rng: &mut Rng) {
    let mut stack = Stack::random(rng);
    let count = 2 + rng.below(6);
    for number in 0..count {
        if !idle(world) {
            return;
        }
        let stable = world.disk.stable().map(|release| release.desired.clone());
        let accepted = match (number, rng.below(12), stable) {
            (0, ..) | (_, 0..=4, _) | (_, _, None) => {
                if number > 0 && rng.below(10) > 0 {
                    stack = stack.changed(rng);
                }
                match stack::load(&stack.text()) {
                    Ok(desired) => operator::up(world, desired),
                    Err(problems) => {
                        world.log(|| stack.text());
                        world.violate(format!("a stack is refused: {problems}"));
                        return;
                    }
                }
            }
            (_, 5 | 6, Some(mut desired)) => {
                let services: Vec<Name> = desired
                    .resources
                    .values_mut()
                    .filter_map(|r| if let Resource::Service(s) = r { Some(s) } else { None })
                    .map(|s| {
                        s.restarts += 1;
                        "all".parse().expect("a name")
                    })
                    .collect();
                operator::submit(world, RunKind::Restart { services }, Some(&desired))
            }
            (_, 7, Some(mut desired)) => {
                for resource in desired.resources.values_mut() {
                    if let Resource::Service(service) = resource {
                        service.replicas = u32::try_from(rng.below(5)).unwrap_or(0);
                    }
                }
                operator::submit(world, RunKind::Scale { replicas: std::collections::BTreeMap::new() }, Some(&desired))
            }
            (_, 8 | 9, Some(_)) => {
                let older: Vec<ReleaseNumber> = world.disk.releases.keys().copied().collect();
                let to = older[usize::try_from(rng.below(older.len() as u64)).unwrap_or(0)];
                let desired = world.disk.releases[&to].desired.clone();
                operator::submit(world, RunKind::Rollback { to }, Some(&desired))
            }
            (_, _, Some(_)) => operator::submit(world, RunKind::Down { volumes: rng.below(2) == 0 }, None),
        };
        if accepted && rng.below(5) == 0 {
            let longest = [50, 2000, 20_000][usize::try_from(rng.below(3)).unwrap_or(0)];
            let at = world.now + Duration::from_millis(1 + rng.below(longest));
            if !operator::until(world, at, |world| world.disk.active_run().is_none()) && world.failure().is_none() {
                operator::cancel(world);
            }
        }
        if rng.below(2) == 0 {
            if !idle(world) {
                return;
            }
            let pause = Duration::from_millis(rng.below(30_000));
            operator::until(world, world.now + pause, |_| false);
        }
        if world.failure().is_some() {
            return;
        }
    }
    if !idle(world) {
        return;
    }
    // The faults end; now everything must come to rest.
    world.faults = Faults { together: world.faults.together, ..Faults::default() };
    rest(world);
    if world.failure().is_none() && rng.below(2) == 0 && world.disk.stable().is_some() {
        operator::submit(world, RunKind::Down { volumes: true }, None);
        if idle(world) {
            rest(world);
        }
    }
}

/// Waits until the server is there and no run goes on. Returns whether all is well so far.
fn idle(world: &mut World) -> bool {
    // No run takes as long; its own deadline is checked all the time.
    let limit = world.now + Duration::from_secs(24 * 3600);
    let idle =
        operator::until(world, limit, |world| world.server.as_ref().is_some_and(|server| server.run().is_none()));
    if !idle && world.failure().is_none() {
        world.violate("the run never ended");
    }
    world.failure().is_none()
}

fn rest(world: &mut World) {
    let limit = world.now + SETTLE;
    // Faults that were scheduled long before may still come.
    operator::until(world, (world.now + Duration::from_secs(60)).max(Now::at(Duration::from_secs(160))), |_| false);
    let settled = operator::until(world, limit, World::is_settled);
    if world.failure().is_some() {
        return;
    }
    if !settled && world.must_settle() {
        let status = world.server.as_ref().map(|server| format!("{:#?}", server.status(world.now).resources));
        world.log(|| status.unwrap_or_default());
        world.violate("the world does not come to rest");
        return;
    }
    // Time for late events, and for the last routes.
    operator::until(world, world.now + Duration::from_secs(5), |_| false);
    world.check_quiet();
}
