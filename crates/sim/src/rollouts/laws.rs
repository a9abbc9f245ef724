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

use std::collections::{BTreeMap, BTreeSet};

use orchestra_machine::HookKey;
use orchestra_model::{
    Code, InstanceId, Name, ReleaseNumber, Resource, ResourceId, RunId,
    desired::{Desired, Service},
    launch::{Launch, LaunchKey},
    record::{Change, EnvironmentState, InstanceIntent, RunKind, RunRecord, RunState, StepState},
    rollout::{PauseStep, Rollout, RolloutPhase, RolloutRecord, RolloutStep, Strategy, VerdictOutcome},
    route::{EndpointKey, EndpointState, Route},
    traffic::Permille,
};

use super::{
    ports::micros,
    schedule::id_of,
    world::{MILLI, Micros, SECOND, World, version_of},
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

// === how long things may take ===

fn leave(service: &Service) -> Micros {
    let drain = service.rollout.drain.requests.duration().max(service.rollout.drain.streams.duration());
    micros(drain + service.stop.grace.duration()) + 12 * SECOND
}

/// Time for a rollout's own steps, hooks with all their tries among them.
fn timed(rollout: &Rollout) -> Micros {
    let steps = rollout.strategy.stepped().map_or(&[][..], |stepped| &stepped.steps);
    steps
        .iter()
        .map(|step| match step {
            RolloutStep::Pause(PauseStep { duration: Some(length), .. }) => micros(length.duration()),
            RolloutStep::Analysis(step) => micros(step.duration.duration()),
            RolloutStep::Hook(hook) => {
                (micros(hook.timeout.duration()) + 10 * SECOND) * u64::from(hook.retries + 1) + 10 * SECOND
            }
            _ => 0,
        })
        .sum()
}

/// Longest time from the begin of a service's step to its end.
fn forward(service: &Service) -> Micros {
    let rollout = &service.rollout;
    let watch = rollout.strategy.stepped().map_or(0, |stepped| micros(stepped.keep_warm.duration()));
    micros(rollout.deadline.duration()) + timed(rollout) + watch + leave(service) * u64::from(service.replicas + 1)
}

/// Longest time that a run may take, there and back, while nobody is asked.
fn longest(run: &RunRecord, disk: &EnvironmentState) -> Micros {
    let mut total = 60 * SECOND;
    let stable = disk.environment.stable.and_then(|number| disk.releases.get(&number)).map(|release| &release.desired);
    for desired in run.plan.desired.iter().chain(stable) {
        for service in desired.resources.values().filter_map(Resource::as_service) {
            total += 2 * forward(service) + 2 * leave(service);
        }
    }
    for service in disk.resources.values().filter_map(|record| record.applied.as_service()) {
        total += 2 * leave(service) + forward(service);
    }
    total
}

/// Whether a rollout waits for a person, and until when.
fn asks(record: &RolloutRecord, service: Option<&Service>) -> Option<u64> {
    if let Some(paused) = &record.paused {
        return Some(paused.expires);
    }
    if record.phase != RolloutPhase::Stepping {
        return None;
    }
    match service?.rollout.strategy.stepped()?.steps.get(record.step as usize)? {
        RolloutStep::Pause(PauseStep { duration: None, expires, .. }) => {
            Some(record.since + u64::try_from(expires.duration().as_millis()).unwrap_or(u64::MAX))
        }
        _ => None,
    }
}

/// Instances that a weight must have behind it. A stack may say how many a step has, whatever its weight is.
fn needed(record: &RolloutRecord, service: &Service) -> u32 {
    let scales = |step: &RolloutStep| matches!(step, RolloutStep::Scale(_));
    let scaled = service.rollout.strategy.stepped().is_some_and(|stepped| stepped.steps.iter().any(scales));
    if scaled { u32::from(record.weight > Permille::ZERO) } else { record.weight.of_rounded_up(service.replicas) }
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

fn surge(service: &Service) -> u32 {
    match &service.rollout.strategy {
        Strategy::Rolling { max_surge, max_unavailable } => {
            let (surge, unavailable) =
                (max_surge.rounded_up(service.replicas), max_unavailable.rounded_down(service.replicas));
            if surge == 0 && unavailable == 0 { 1 } else { surge }
        }
        Strategy::Recreate | Strategy::Hold { .. } => 0,
        Strategy::Canary(_) | Strategy::BlueGreen(_) => service.replicas,
    }
}

fn stops_first(service: &Service) -> bool {
    matches!(service.rollout.strategy, Strategy::Recreate | Strategy::Hold { .. })
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
        let serves = |process: &&super::world::Process| {
            let routed = process.active || service.ports.is_empty();
            process.key.instance.workload == *name && process.version == version && routed && process.heard_ready
        };
        u32::try_from(self.processes.iter().filter(serves).count()).unwrap_or(u32::MAX)
    }

    // === of every commit ===

    /// Laws of one change, before it is applied.
    pub(super) fn check_change(&mut self, change: &Change) {
        match change {
            Change::Run(record) if self.disk.run.as_ref().is_none_or(|run| run.id != record.id) => {
                if let Some(old) = self.active_run() {
                    let law = format!("{} begins while {} goes on", record.id, old.id);
                    self.violate(law);
                }
                if self.disk.run.as_ref().is_some_and(|run| run.id > record.id || run.generation >= record.generation) {
                    self.violate(format!("{} is not newer than the run before it", record.id));
                }
                self.laws.run_until = self.now + longest(record, &self.disk);
            }
            Change::Instance(record) => {
                let old = self.disk.instances.get(&record.id);
                let staying = old.is_some_and(|old| old.intent == InstanceIntent::Run);
                if old.is_some_and(|old| old.attempt > record.attempt || old.launch_digest != record.launch_digest) {
                    self.violate(format!("{} went backwards", record.id));
                }
                if staying && record.intent != InstanceIntent::Run {
                    let id = record.id.clone();
                    let attempt = record.attempt;
                    self.laws_of_leaving(&id, attempt);
                }
            }
            Change::Verdict(_, number, verdict) => {
                if self.active_run().is_none_or(|run| run.release != Some(*number)) {
                    self.violate(format!("a verdict about release {number} is given, and nobody rolls it out"));
                }
                self.report.verdicts[verdict.outcome as usize] += 1;
                self.laws.bad |= verdict.outcome == VerdictOutcome::Fail;
            }
            Change::Step(run, id, _) if self.active_run().is_none_or(|active| active.id != *run) => {
                let law = format!("{run} has ended, and its step {id} moved");
                self.violate(law);
            }
            _ => {}
        }
    }

    /// Somebody leaves by decision: enough others stay.
    fn laws_of_leaving(&mut self, id: &InstanceId, attempt: u32) {
        let Some(index) = self.find(id, attempt) else { return };
        let process = &self.processes[index];
        if !process.active || !process.heard_ready {
            return;
        }
        let floor = self.floor(&id.workload);
        // Where a release has no ports any more, being ready is being in service.
        let unrouted = self.acting(&id.workload).is_none_or(|service| service.ports.is_empty());
        let others = self
            .processes
            .iter()
            .enumerate()
            .filter(|(other, process)| {
                *other != index
                    && process.key.instance.workload == id.workload
                    && (process.active || unrouted)
                    && process.heard_ready
                    && self
                        .disk
                        .instances
                        .get(&process.key.instance)
                        .is_some_and(|record| record.intent == InstanceIntent::Run)
            })
            .count();
        if others < floor as usize {
            self.violate(format!("{id} leaves, and {others} of at least {floor} stay in service"));
        }
    }

    /// Laws of a whole batch, after it was applied.
    pub(super) fn check_commit(&mut self, before: &Before) {
        let run = self.disk.run.as_ref().map(|run| (run.id, run.state));
        if std::mem::take(&mut self.laws.bad) && run.is_some_and(|(_, state)| state == RunState::Running) {
            self.violate("a verdict was bad, and the run goes on");
        }
        if run != before.run
            && let Some((id, state)) = run
        {
            self.run_moved(id, state, before);
        }
        if before.rollouts || !self.disk.environment.rollouts.is_empty() {
            self.check_rollouts(before);
        }
        self.check_deadlines();
        let going = self.active_run().map(|run| run.id);
        if self.disk.environment.run != going {
            let law = format!("the environment names {:?}, and {going:?} goes on", self.disk.environment.run);
            self.violate(law);
        }
    }

    fn run_moved(&mut self, id: RunId, state: RunState, before: &Before) {
        let environment = &self.disk.environment;
        let release = self.disk.run.as_ref().and_then(|run| run.release);
        match state {
            RunState::Running | RunState::Reverting => {}
            RunState::Succeeded => {
                self.report.succeeded += 1;
                if environment.stable != release {
                    self.violate(format!("{id} succeeded, and release {release:?} is not in force"));
                }
            }
            RunState::Failed | RunState::Cancelled => {
                if self.laws.sound == Some(id) {
                    let why = self
                        .disk
                        .run
                        .as_ref()
                        .and_then(|run| run.problems.first())
                        .map(|problem| problem.message.clone());
                    self.violate(format!("{id} was put back though nothing went wrong: {}", why.unwrap_or_default()));
                }
                let environment = &self.disk.environment;
                let cause = self.disk.run.as_ref().and_then(|run| run.problems.first()).map(|problem| problem.code);
                self.report.late += u64::from(cause == Some(Code::RUN_TIMED_OUT));
                self.report.loops += u64::from(cause == Some(Code::CRASH_LOOP));
                if state == RunState::Failed {
                    self.report.rolled_back += 1;
                } else {
                    self.report.cancelled += 1;
                }
                if environment.stable != before.stable {
                    self.violate(format!("{id} was put back, and another release is in force"));
                }
            }
        }
        if state.is_final() {
            self.train_law(id);
        }
    }

    /// All services of a release move, or none does.
    fn train_law(&mut self, id: RunId) {
        let Some(run) = &self.disk.run else { return };
        if run.reverted.as_ref().is_some_and(|text| text.contains("except")) {
            return;
        }
        let mut broken = None;
        let stable = self.stable_desired();
        for (resource, record) in &self.disk.resources {
            if stable.and_then(|desired| desired.resources.get(resource)) != Some(&record.applied) {
                broken = Some(format!("{id} has ended, and {resource} is not as the release in force has it"));
            }
        }
        if let Some(desired) = stable
            && desired.resources.len() != self.disk.resources.len()
        {
            broken = Some(format!("{id} has ended, and not every service of the release in force is recorded"));
        }
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    /// No deadline moves away, but by the time that a person took.
    fn check_deadlines(&mut self) {
        let lifted = std::mem::take(&mut self.laws.lifted);
        let before = std::mem::take(&mut self.laws.steps);
        let Some(run) = self.active_run() else {
            if self.disk.environment.deadlines.is_some() {
                self.violate("no run goes on, and there are deadlines of one");
            }
            return;
        };
        let mut broken = None;
        let mut known = BTreeMap::new();
        for (id, at) in self.disk.environment.deadlines.iter().flat_map(|deadlines| &deadlines.steps) {
            let state = run.steps.get(id).copied();
            let allowed = lifted.get(&id.name).copied().unwrap_or_default() + 1;
            let same = before.get(id).filter(|(of, way, step, _)| (*of, *way, *step) == (run.id, run.state, state));
            if let Some((.., was)) = same
                && *at > was + allowed
            {
                broken = Some(format!("the deadline of {id} moved from {was} to {at}"));
            }
            known.insert(id.clone(), (run.id, run.state, state, *at));
        }
        self.laws.steps = known;
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    fn check_rollouts(&mut self, before: &Before) {
        let mut broken = Vec::new();
        let wall = self.wall();
        let run = self.active_run().map(|run| (run.id, run.state));
        let stable = before.stable;
        let mut known = std::mem::take(&mut self.laws.watched);
        known.retain(|name, _| self.disk.environment.rollouts.contains_key(name));
        let (mut stepped, mut paused) = (0, 0);
        for (name, record) in &self.disk.environment.rollouts {
            let service = service_in(self.wanted(), name);
            let asked = asks(record, service);
            let Some(watched) = known.get_mut(name).filter(|watched| watched.run == record.run) else {
                let length = service.map_or(0, |service| {
                    (micros(service.rollout.deadline.duration()) + timed(&service.rollout)) / MILLI
                });
                if record.phase != RolloutPhase::Warm {
                    let base = service_in(self.stable_desired(), name);
                    if base.is_none_or(|base| base.program != record.baseline.program) || Some(record.from) > stable {
                        let law = format!(
                            "release {}, from which the rollout of {name} begins, is not in force",
                            record.from
                        );
                        broken.push(law);
                    }
                    if run.map(|(id, _)| id) != Some(record.run) {
                        broken.push(format!("the rollout of {name} belongs to no run"));
                    }
                    stepped += u64::from(record.phase == RolloutPhase::Stepping);
                }
                let watched = Watched {
                    run: record.run,
                    step: record.step,
                    phase: record.phase,
                    weight: record.weight,
                    deadline: record.started_at + length,
                    asked: asked.map(|_| wall),
                    watching: None,
                };
                known.insert(name.clone(), watched);
                continue;
            };
            let order = |phase: RolloutPhase| match phase {
                RolloutPhase::Stepping => 0,
                RolloutPhase::Promoting => 1,
                RolloutPhase::Watching => 2,
                RolloutPhase::Warm => 3,
            };
            let moved = (watched.step, order(watched.phase)) != (record.step, order(record.phase));
            if moved {
                if record.step < watched.step || order(record.phase) < order(watched.phase) {
                    broken.push(format!(
                        "the rollout of {name} went from step {} {:?} back to step {} {:?}",
                        watched.step, watched.phase, record.step, record.phase
                    ));
                }
                let turned =
                    |run: Option<(RunId, RunState)>| run.is_some_and(|(_, state)| state == RunState::Reverting);
                if turned(run) && turned(before.run) {
                    broken.push(format!("the rollout of {name} moves on while the run is turned back"));
                }
            }
            if record.weight > watched.weight
                && let Some(service) = service
            {
                let serving = self.serving(name, service);
                let needed = needed(record, service);
                if serving < needed {
                    broken.push(format!("{name} gives {} to {serving} of {needed} new instances", record.weight));
                }
            }
            if record.weight < watched.weight {
                broken.push(format!("the weight of {name} fell from {} to {}", watched.weight, record.weight));
            }
            match (watched.asked, asked) {
                (None, Some(_)) => {
                    watched.asked = Some(wall);
                    paused += 1;
                }
                (Some(since), None) => {
                    watched.deadline += wall.saturating_sub(since);
                    watched.asked = None;
                    self.laws.lifted.insert(name.clone(), wall.saturating_sub(since));
                }
                _ => {}
            }
            match (watched.watching, record.phase) {
                (None, RolloutPhase::Watching) => watched.watching = Some(wall),
                (Some(since), RolloutPhase::Warm) => {
                    watched.deadline += wall.saturating_sub(since);
                    watched.watching = None;
                }
                _ => {}
            }
            if let Some(pause) = &record.paused
                && (pause.owner.is_empty() || pause.reason.is_empty())
            {
                broken.push(format!("the rollout of {name} is paused without an owner or a reason"));
            }
            let since = watched.asked.map_or(0, |since| wall.saturating_sub(since));
            if record.deadline > watched.deadline + since + 1 && !self.laws.clock_changed {
                broken.push(format!(
                    "the deadline of the rollout of {name} moved to {} though it is {}",
                    record.deadline, watched.deadline
                ));
            }
            (watched.step, watched.phase, watched.weight) = (record.step, record.phase, record.weight);
        }
        self.laws.watched = known;
        self.report.stepped += stepped;
        self.report.paused += paused;
        for law in broken {
            self.violate(law);
        }
    }

    // === of every moment ===

    /// Laws of the moment after a batch.
    pub(super) fn check_moment(&mut self) {
        let Some(run) = self.active_run() else { return };
        let wall = self.wall();
        let settled = self.now >= self.laws.up_since + SLACK;
        let mut broken = None;
        // Until when somebody is asked.
        let mut asked: Option<u64> = None;
        for (id, at) in self.disk.environment.deadlines.iter().flat_map(|deadlines| &deadlines.steps) {
            let limit = self.step_ends_by(run, id, *at);
            if settled && limit.is_some_and(|at| wall > at + SLACK / MILLI) {
                broken = Some(format!("the step of {id} is beyond its deadline"));
            }
        }
        if run.state == RunState::Running {
            for (name, record) in &self.disk.environment.rollouts {
                let service = service_in(self.wanted(), name);
                if record.run != run.id {
                    continue;
                }
                let expires = asks(record, service);
                asked = asked.max(expires);
                // Without steps it is the run's step that has a deadline.
                let stepped = service.is_some_and(|service| service.rollout.strategy.stepped().is_some());
                let over = !stepped
                    || matches!(record.phase, RolloutPhase::Warm | RolloutPhase::Watching)
                    || run.steps.get(&id_of(name)) == Some(&StepState::Succeeded);
                if over {
                    continue;
                }
                let limit = expires.unwrap_or(record.deadline);
                if settled && wall > limit + SLACK / MILLI {
                    let what = if expires.is_some() { "expiry" } else { "deadline" };
                    broken = Some(format!("the rollout of {name} is beyond its {what}"));
                }
            }
        }
        if let Some(expires) = asked {
            // Time in which a person is asked does not count; it has an expiry of its own, until which nothing need happen.
            let state = self.disk.run.as_ref().map(|run| longest(run, &self.disk)).unwrap_or_default();
            let left = expires.saturating_sub(wall) * MILLI;
            self.laws.run_until = self.laws.run_until.max(self.now + left + state);
        }
        if self.now > self.laws.run_until {
            broken = Some("the run has not ended by its absolute deadline".to_owned());
        }
        if self.rng.below(64) == 0 {
            broken = broken.or(self.why_law());
        }
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    /// When a step must have ended; none while its rollout has clocks of its own.
    fn step_ends_by(&self, run: &RunRecord, id: &ResourceId, stored: u64) -> Option<u64> {
        let forward = run.state == RunState::Running && run.steps.get(id) == Some(&StepState::Running);
        let rollout = self.disk.environment.rollouts.get(&id.name).filter(|record| forward && record.run == run.id);
        let Some(rollout) = rollout else { return Some(stored) };
        let service = service_in(run.plan.desired.as_ref(), &id.name);
        let stepped = service.is_some_and(|service| service.rollout.strategy.stepped().is_some());
        match rollout.phase {
            _ if rollout.paused.is_some() && rollout.phase != RolloutPhase::Warm => None,
            RolloutPhase::Warm => Some(rollout.deadline),
            _ if stepped => None,
            _ => Some(stored),
        }
    }

    /// Whatever goes on says what it waits for.
    fn why_law(&self) -> Option<String> {
        let server = self.server.as_ref()?;
        let status = server.status(self.moment());
        let run = server.run()?;
        let waits = |id| status.resources.iter().find(|resource| resource.id == id).and_then(|r| r.waits_for.as_ref());
        for step in &run.plan.steps {
            let state = run.steps.get(&step.resource);
            let open = match run.state {
                RunState::Running => matches!(state, None | Some(StepState::Running)),
                _ => state.is_some_and(|state| *state != StepState::Reverted),
            };
            if open && waits(step.resource.clone()).is_none() {
                return Some(format!("{} does not say what {} waits for", run.id, step.resource));
            }
        }
        None
    }

    // === of effects ===

    /// Laws of a launch that is about to begin.
    pub(super) fn check_launch(&mut self, launch: &Launch) {
        let key = &launch.key;
        let record = self.disk.instances.get(&key.instance);
        if record.is_none_or(|record| record.attempt != key.attempt || record.ports != launch.ports) {
            self.violate(format!("{key} is launched, and the disk does not say so"));
        }
        let name = &key.instance.workload;
        if let Some(run) = self.active_run().map(|run| run.id).filter(|run| self.laws.returns == Some(*run)) {
            self.violate(format!("{run} goes back to what is kept, and {key} is started"));
        }
        let version: usize = launch.command.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        self.check_budget(launch, version);
        // One that is started again adds nobody: those beside whom it ran were judged when the later of them was started.
        // Nor does anybody wait on the way back from a release that was meant to run beside it.
        let earlier: Vec<&super::world::Process> =
            self.processes.iter().filter(|process| process.key.instance == key.instance).collect();
        let back = self.active_run().is_none_or(|run| run.state == RunState::Reverting);
        let overlaps = |process: &super::world::Process| {
            let mut forms = self.disk.releases.values().filter_map(|release| service_in(Some(&release.desired), name));
            forms.find(|form| version_of(form) == process.version).is_some_and(|form| !stops_first(form))
        };
        let beside = |process: &super::world::Process| {
            ((back || key.attempt > 1) && process.version != version && overlaps(process))
                || earlier.iter().any(|own| process.started.is_none_or(|at| own.ended.is_none_or(|ended| at <= ended)))
        };
        let others = |process: &&super::world::Process| {
            process.key.instance.workload == *name && !process.gone && !beside(process)
        };
        let stable = service_in(self.stable_desired(), name);
        let form = if back && stable.is_some_and(|service| version_of(service) == version) {
            stable
        } else if back {
            service_in(self.wanted(), name)
        } else {
            self.acting(name)
        };
        if let Some(replicas) = form.filter(|form| stops_first(form)).map(|form| form.replicas) {
            let running: Vec<&super::world::Process> = self.processes.iter().filter(others).collect();
            let count = running.len();
            if let Some(other) = running.iter().find(|process| process.version != version) {
                self.violate(format!("{key} is launched beside {} of another version, but stops first", other.key));
            } else if count >= replicas as usize {
                self.violate(format!("{key} is launched beside {count} others, but stops first"));
            }
        }
        let forms = [service_in(self.wanted(), name), service_in(self.stable_desired(), name)];
        let most = forms.iter().flatten().map(|service| service.replicas).max().unwrap_or(0);
        let extra = forms.iter().flatten().map(|service| surge(service)).max().unwrap_or(0);
        let kept = self.disk.environment.rollouts.get(name).map_or(0, |record| record.baseline.replicas);
        let staying = self
            .disk
            .instances
            .values()
            .filter(|record| record.id.workload == *name && record.intent == InstanceIntent::Run)
            .count();
        if staying > (most + extra + kept) as usize {
            self.violate(format!("{name} has {staying} staying instances, but may have {most} + {extra} + {kept}"));
        }
    }

    /// Nobody is started more often than its budget allows, however many servers counted.
    fn check_budget(&mut self, launch: &Launch, version: usize) {
        let name = &launch.key.instance.workload;
        let of_version = |service: &&Service| version_of(service) == version;
        let forms = [service_in(self.wanted(), name), service_in(self.stable_desired(), name)];
        let budgets = forms.into_iter().flatten().filter(of_version).map(|service| {
            (service.restart.budget.unwrap_or(u32::MAX), micros(service.restart.reset_after.duration()))
        });
        let Some((budget, reset)) = budgets.max() else { return };
        let starts = self
            .processes
            .iter()
            .filter(|process| process.started.is_some() && process.key.instance == launch.key.instance);
        // One that lived for long may have been ready for long.
        let short = |process: &&super::world::Process| {
            process.started.is_none_or(|at| process.ended.unwrap_or(self.now) < at + reset)
        };
        let in_a_row = starts.rev().take_while(short).count();
        if in_a_row > budget as usize {
            self.violate(format!("{} is started again beyond its budget of {budget}", launch.key));
        }
    }

    /// Laws of a termination that is about to begin.
    pub(super) fn check_terminate(&mut self, key: &LaunchKey) {
        let record = self.disk.instances.get(&key.instance);
        if record.is_some_and(|record| record.forced.is_some()) {
            return;
        }
        let Some(index) = self.find(&key.instance, key.attempt) else { return };
        let process = &self.processes[index];
        if !process.is_alive() {
            return;
        }
        let trouble = self.data_plane.trouble.is_some_and(|at| self.now < at + 120 * SECOND);
        let (active, cut, flows) = (process.active, process.cut, process.flows);
        if active && !(cut && trouble) {
            self.violate(format!("{key} is stopped while new requests go to it"));
        }
        if flows != (0, 0) && !cut {
            self.violate(format!("{key} is stopped with {flows:?} requests and streams in flight"));
        }
    }

    /// Laws of a cut: not before the drain budget is used.
    pub(super) fn check_cut(&mut self, endpoint: &EndpointKey) {
        let Some(index) = self.find(&endpoint.instance, endpoint.attempt) else { return };
        self.processes[index].cut = true;
        let name = &endpoint.instance.workload;
        let process = &self.processes[index];
        let trouble = self.data_plane.trouble.is_some_and(|at| self.now < at + 120 * SECOND);
        let forms = self.disk.releases.values().filter_map(|release| service_in(Some(&release.desired), name));
        let least = forms.map(|service| micros(service.rollout.drain.requests.duration())).min().unwrap_or(0);
        let early = process.active || process.withdrawn.is_some_and(|at| self.now < at + least);
        if process.is_alive() && early && !trouble {
            self.violate(format!("{}#{} is cut before its time", endpoint.instance, endpoint.attempt));
        }
    }

    /// Laws of a hook that is about to be asked.
    pub(super) fn check_hook(&mut self, key: &HookKey) {
        if self.active_run().is_none_or(|run| run.state != RunState::Running) {
            self.violate(format!("the hook of step {} of {} is asked, and no run goes forward", key.step, key.service));
        }
        if !self.laws.hooks.insert((key.service.clone(), key.release.0, key.step, key.call)) {
            self.violate(format!(
                "call {} of the hook of step {} of {} was made twice",
                key.call, key.step, key.service
            ));
        }
    }

    /// Laws of routes that are about to be offered.
    pub(super) fn check_routes(&mut self, routes: &[Route]) {
        let mut broken = None;
        let run = self.active_run().filter(|run| run.state == RunState::Running).map(|run| run.id);
        for (name, record) in &self.disk.environment.rollouts {
            let stepped = service_in(self.wanted(), name).is_some_and(|s| s.rollout.strategy.stepped().is_some());
            if Some(record.run) != run || record.phase == RolloutPhase::Warm || !stepped {
                continue;
            }
            let there = |port: &Name| routes.iter().any(|route| route.id.service == *name && route.id.port == *port);
            if let Some(port) = record.baseline.ports.keys().find(|port| !there(port)) {
                broken =
                    Some(format!("the address of {name}.{port} is closed before the release without it is promoted"));
            }
        }
        for route in routes {
            let forms =
                [service_in(self.wanted(), &route.id.service), service_in(self.stable_desired(), &route.id.service)];
            let queue = |service: &&Service| match service.rollout.strategy {
                Strategy::Hold { queue, timeout } => Some((timeout, queue)),
                _ => None,
            };
            let queues: Vec<_> = forms.iter().flatten().map(queue).collect();
            let leaving = self.acting(&route.id.service).is_none();
            if let Some(Some((timeout, queue))) = queues.first()
                && queues.iter().all(|other| *other == Some((*timeout, *queue)))
                && !leaving
                && (route.hold, route.hold_limit) != (*timeout, *queue)
            {
                broken = Some(format!("{} holds {} for {}", route.id.service, route.hold_limit, route.hold));
            }
        }
        for route in routes {
            for backend in &route.backends {
                for endpoint in backend.endpoints.iter().filter(|endpoint| endpoint.state == EndpointState::Active) {
                    let known = self.find(&endpoint.instance, endpoint.attempt);
                    if known.is_none_or(|index| !self.processes[index].heard_ready) {
                        let endpoint = format!("{}#{}", endpoint.instance, endpoint.attempt);
                        broken = Some(format!("requests go to {endpoint}, which never said that it is ready"));
                    }
                }
            }
        }
        if let Some(law) = broken {
            self.violate(law);
        }
    }

    // === of a world at rest ===

    /// Laws once nothing happens any more.
    pub(super) fn check_rest(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let mut broken = Vec::new();
        if self.server.is_none() {
            broken.push("the server is not there".to_owned());
        }
        if let Some(run) = self.active_run() {
            broken.push(format!("{} goes on, and nothing will ever happen again", run.id));
        }
        let unrepaired =
            self.disk.run.as_ref().and_then(|run| run.reverted.as_ref()).is_some_and(|text| text.contains("except"));
        let down = self
            .disk
            .run
            .as_ref()
            .is_some_and(|run| matches!(run.kind, RunKind::Down { .. }) && run.state == RunState::Succeeded);
        let stable = self.stable_desired();
        // What was kept of an earlier release goes on serving where the release in force cannot.
        let whole = |name: &Name, service: &Service| {
            let current = |process: &&super::world::Process| {
                process.key.instance.workload == *name && process.version == version_of(service) && process.ready
            };
            self.processes.iter().filter(current).count() >= service.replicas as usize
        };
        for process in &self.processes {
            let name = &process.key.instance.workload;
            if !process.gone {
                let service = service_in(stable, name);
                let known = self
                    .disk
                    .instances
                    .get(&process.key.instance)
                    .is_some_and(|record| record.attempt == process.key.attempt);
                if !known {
                    broken.push(format!("{} runs, and nobody knows it", process.key));
                } else if service.is_none_or(|service| version_of(service) != process.version && whole(name, service))
                    && !unrepaired
                {
                    broken.push(format!("{} runs, and the release in force does not want it", process.key));
                }
            }
        }
        if down && self.processes.iter().any(|process| !process.gone) {
            broken.push("something runs after `down`".to_owned());
        }
        for (id, resource) in stable.into_iter().flat_map(|desired| &desired.resources) {
            let Some(service) = resource.as_service() else { continue };
            let version = version_of(service);
            let current = |process: &&super::world::Process| {
                process.key.instance.workload == id.name && process.version == version && process.is_alive()
            };
            let alive: Vec<&super::world::Process> = self.processes.iter().filter(current).collect();
            let lasting = self.versions[version_of(service)].is_solid() && self.laws.kills == 0;
            if unrepaired || down {
                continue;
            }
            if alive.len() > service.replicas as usize || (lasting && alive.len() != service.replicas as usize) {
                broken.push(format!("{id} runs {} times, but {} are wanted", alive.len(), service.replicas));
            }
            if let Some(process) =
                alive.iter().find(|process| process.active != (process.ready && !service.ports.is_empty()))
                && !service.ports.is_empty()
                && service.health.ready.is_some()
                && lasting
            {
                broken.push(format!(
                    "{} is ready: {}, and gets requests: {}",
                    process.key, process.ready, process.active
                ));
            }
        }
        for law in broken {
            self.violate(law);
        }
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
