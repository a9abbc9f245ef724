//! The laws of a schedule.
//!
//! Of every moment:
//! - a run ends before its absolute deadline, time in which a person was asked apart; a person is never asked without a
//!   name and an expiry, and not beyond it;
//! - whoever is taken out of service by a decision leaves enough others in service: `replicas` less what the strategy may
//!   make unavailable;
//! - requests go only where readiness was told, and nobody is stopped while new requests go there or old ones are in
//!   flight, unless its drain budget is used;
//! - a weight other than zero has as many instances behind it as it needs, and a weight never falls on the way forward;
//! - steps are taken in order, none twice, and none on the way back; no hook is asked on the way back;
//! - `recreate` and `hold` never run two versions at a time, nor more than `replicas`; no key is started twice;
//! - the baseline of a rollout is the release in force;
//! - whatever goes on says what it waits for.
//!
//! Once nothing happens any more: every run has ended; what runs is what the release in force says, and nothing else.

mod clocks;
mod commits;
mod effects;
mod lengths;
mod rest;

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Name, ReleaseNumber, Resource, ResourceId, RunId,
    desired::{Desired, Service},
    launch::LaunchKey,
    record::{EnvironmentState, RunState, StepState},
    rollout::{RolloutPhase, Strategy},
    traffic::Permille,
};

use self::lengths::longest;
use super::{
    schedule::id_of,
    world::{Micros, Process, SECOND, World, version_of},
};

/// Time that the machine has to act on a deadline.
const SLACK: Micros = 2 * SECOND;

/// What the laws must remember.
#[derive(Debug, Default)]
pub(super) struct Laws {
    /// Random kills so far.
    pub kills: u32,
    /// Calls about one instance happen in order.
    calls: BTreeMap<(Name, ReleaseNumber, u32), Micros>,
    /// When the run that goes on must have ended.
    run_until: Micros,
    /// Since when the present server is there.
    up_since: Micros,
    /// Rollouts by service.
    watched: BTreeMap<Name, Watched>,
    /// Hooks that were asked.
    hooks: BTreeSet<(Name, u64, u32, u32)>,
    clock_changed: bool,
    /// A bad verdict is in the batch that is being committed.
    bad: bool,
    /// A run in which nothing goes wrong.
    pub sound: Option<RunId>,
    /// A run that goes back to instances that are all there.
    pub returns: Option<RunId>,
    /// Deadlines of steps, with the run and what they are about.
    steps: BTreeMap<ResourceId, (RunId, RunState, Option<StepState>, u64)>,
    /// How long a person was asked who has just answered, in milliseconds.
    lifted: BTreeMap<Name, u64>,
}

/// A rollout that is watched.
#[derive(Debug)]
struct Watched {
    run: RunId,
    step: u32,
    phase: RolloutPhase,
    weight: Permille,
    /// Deadline as the laws compute it, in wall-clock milliseconds.
    deadline: u64,
    /// Since when a person is asked.
    asked: Option<u64>,
    /// Since when the new set has been watched.
    watching: Option<u64>,
}

/// What matters of the disk before a commit.
pub(super) struct Before {
    run: Option<(RunId, RunState)>,
    stable: Option<ReleaseNumber>,
    /// Instances that are about to leave by decision.
    rollouts: bool,
}

impl Laws {
    pub(super) fn last_call(&mut self, key: &LaunchKey, at: Micros) -> Micros {
        let instance = &key.instance;
        let last = self.calls.entry((instance.workload.clone(), instance.release, instance.ordinal)).or_insert(at);
        *last = at.max(*last);
        *last
    }

    pub(super) fn forget_calls(&mut self) {
        self.calls.clear();
    }

    pub(super) fn clock_changed(&mut self) {
        self.clock_changed = true;
    }

    #[expect(clippy::unused_self, reason = "it belongs to the laws")]
    pub(super) fn before(&self, disk: &EnvironmentState) -> Before {
        Before {
            run: disk.run.as_ref().map(|run| (run.id, run.state)),
            stable: disk.environment.stable,
            rollouts: !disk.environment.rollouts.is_empty(),
        }
    }
}

impl Before {
    /// Whether a run went on.
    pub(super) fn is_going(&self) -> bool {
        self.run.is_some_and(|(_, state)| !state.is_final())
    }
}

fn service_in<'a>(desired: Option<&'a Desired>, name: &Name) -> Option<&'a Service> {
    desired?.resources.get(&id_of(name)).and_then(Resource::as_service)
}

fn unavailable(service: &Service) -> u32 {
    match &service.rollout.strategy {
        Strategy::Rolling { max_surge, max_unavailable } => {
            let (surge, unavailable) =
                (max_surge.rounded_up(service.replicas), max_unavailable.rounded_down(service.replicas));
            // Neither up nor down would never move.
            if surge == 0 && unavailable == 0 { 0 } else { unavailable.min(service.replicas) }
        }
        Strategy::Recreate | Strategy::Hold { .. } => service.replicas,
        Strategy::Canary(_) | Strategy::BlueGreen(_) => 0,
    }
}

impl World {
    fn wanted(&self) -> Option<&Desired> {
        self.active_run().and_then(|run| run.plan.desired.as_ref())
    }

    fn stable_desired(&self) -> Option<&Desired> {
        self.stable().map(|release| &release.desired)
    }

    /// The form that a service has or is being given now: the run's on its way there, the stable one otherwise.
    fn acting(&self, name: &Name) -> Option<&Service> {
        match self.active_run() {
            Some(run) if run.state == RunState::Running => {
                if run.steps.contains_key(&id_of(name))
                    || !run.plan.steps.iter().any(|step| step.resource.name == *name)
                {
                    service_in(self.wanted(), name)
                } else {
                    service_in(self.stable_desired(), name)
                }
            }
            _ => service_in(self.stable_desired(), name),
        }
    }

    /// Ready instances that must stay when others are taken out of service.
    fn floor(&self, name: &Name) -> u32 {
        let forms = [service_in(self.wanted(), name), service_in(self.stable_desired(), name)];
        let Some(acting) = self.acting(name) else { return 0 };
        if self.active_run().is_some() && forms.iter().any(Option::is_none) {
            return 0;
        }
        let least = forms.iter().flatten().map(|service| service.replicas).min().unwrap_or(0);
        least.saturating_sub(unavailable(acting))
    }

    /// Instances of a form that are in service.
    fn serving(&self, name: &Name, service: &Service) -> u32 {
        let version = version_of(service);
        let serves = |process: &&Process| {
            let routed = process.active || service.ports.is_empty();
            process.key.instance.workload == *name && process.version == version && routed && process.heard_ready
        };
        u32::try_from(self.processes.iter().filter(serves).count()).unwrap_or(u32::MAX)
    }

    /// A server has begun. What it has less time for by a clock that was set back it has, at most, once more.
    pub(super) fn note_recovery(&mut self, set_back: bool) {
        self.laws.up_since = self.now;
        let wall = self.wall();
        for watched in self.laws.watched.values_mut() {
            watched.asked = watched.asked.map(|since| since.min(wall));
            watched.watching = watched.watching.map(|since| since.min(wall));
        }
        if let Some(run) = self.active_run().filter(|_| set_back) {
            self.laws.run_until = self.laws.run_until.max(self.now + longest(run, &self.disk));
        }
    }
}
