//! Laws of every commit: what may be written down, and who may leave by it.

use orchestra_model::{
    Code, InstanceId, RunId,
    record::{Change, InstanceIntent, RunState},
    rollout::VerdictOutcome,
};

use super::{Before, lengths::longest};
use crate::rollouts::world::World;

impl World {
    /// Laws of one change, before it is applied.
    pub(in crate::rollouts) fn check_change(&mut self, change: &Change) {
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
    pub(in crate::rollouts) fn check_commit(&mut self, before: &Before) {
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
}
