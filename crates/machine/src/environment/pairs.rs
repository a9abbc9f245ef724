//! Pairs of synthetic requests: evidence for a verdict where there is little traffic.
//!
//! The same safe request goes to one instance of each set at the same time, so each pair is an experiment of its own:
//! if the new set is no worse, then of the pairs in which only one answer is bad, it is the new set's in half of the cases at
//! most. A pair is asked in every interval in which the new set answered no real request: those say more.
//!
//! Nothing of this is written down but what the judge learned: a server that dies loses one answer.

use std::net::{Ipv4Addr, SocketAddr};

use orchestra_model::{Now, ReleaseNumber, ResourceId, rollout::PairProbe, traffic::Arm, traffic::TrafficReport};

use super::{Environment, service_id};
use crate::{Effect, PairKey, replacement::Set, rollout::Event};

/// What an answer may take beyond its timeout until it is taken for lost.
const LOST: std::time::Duration = std::time::Duration::from_secs(5);

/// The pairs of one rollout.
#[derive(Clone, Debug, Default)]
pub(super) struct Pairs {
    /// Of the last pair.
    number: u64,
    /// When the next one is due.
    next: Option<Now>,
    /// A pair without an answer, and when that is taken for lost.
    asked: Option<(u64, Now)>,
    /// The new set answered a real request since the last interval began.
    real: bool,
}

impl Pairs {
    /// Notes what really went through a route.
    pub(super) fn served(&mut self, report: &TrafficReport) {
        self.real |= report.cells.iter().any(|cell| cell.arm == Arm::Canary && cell.requests > 0);
    }
}

impl Environment {
    /// Asks the next pair when it is due, and has its service looked at when that will be.
    pub(super) fn ask_pair(&mut self, now: Now, id: &ResourceId) {
        let Some(workload) = self.workloads.get_mut(id) else { return };
        let trying = workload.rollout.as_ref().filter(|rollout| rollout.is_trying());
        let Some((probe, release)) = trying.and_then(|rollout| {
            let probe = rollout.guard()?.probe.clone()?;
            Some((probe, rollout.record().to))
        }) else {
            workload.pairs = Pairs::default();
            return;
        };
        let pairs = &mut workload.pairs;
        if pairs.asked.is_some_and(|(_, lost)| now >= lost) {
            pairs.asked = None;
        }
        let next = *pairs.next.get_or_insert(now);
        let wake = match pairs.asked {
            Some((_, lost)) => lost,
            None if now < next => next,
            None => {
                let after = now + probe.every.duration();
                pairs.next = Some(after);
                if !std::mem::take(&mut pairs.real) {
                    self.begin_pair(now, id, release, &probe);
                }
                after
            }
        };
        self.alarm(id, wake);
    }

    fn begin_pair(&mut self, now: Now, id: &ResourceId, release: ReleaseNumber, probe: &PairProbe) {
        let Some(workload) = self.workloads.get(id) else { return };
        let number = workload.pairs.number + 1;
        // Instances take turns.
        let one_of = |set: Set| -> Option<SocketAddr> {
            let members = self.instances_of(workload);
            let serving: Vec<u16> = members
                .filter(|it| it.is_ready() && !super::is_leaving(it) && self.routes.admits(it))
                .filter(|it| workload.set_of(&it.record().launch_digest) == set)
                .filter_map(|it| it.record().ports.get(&probe.port).copied())
                .collect();
            let turn = usize::try_from(number).unwrap_or(0).checked_rem(serving.len())?;
            Some((Ipv4Addr::LOCALHOST, serving[turn]).into())
        };
        let (Some(canary), Some(stable)) = (one_of(Set::Current), one_of(Set::Baseline)) else { return };
        let key = PairKey { service: id.name.clone(), release, number };
        let lost = now + (probe.timeout.duration() + LOST);
        let (path, timeout) = (probe.path.clone(), probe.timeout);
        self.out.effects.push(Effect::AskPair { key, canary, stable, path, timeout });
        if let Some(workload) = self.workloads.get_mut(id) {
            workload.pairs.number = number;
            workload.pairs.asked = Some((number, lost));
        }
    }

    /// What a pair was answered.
    pub(super) fn pair_answered(
        &mut self,
        now: Now,
        key: &PairKey,
        canary: &Result<(), String>,
        stable: &Result<(), String>,
    ) {
        let id = service_id(&key.service);
        let Some(workload) = self.workloads.get_mut(&id) else { return };
        let current = workload.rollout.as_ref().is_some_and(|rollout| rollout.record().to == key.release)
            && workload.pairs.asked.is_some_and(|(number, _)| number == key.number);
        let Some(judge) = workload.judge.as_mut().filter(|_| current) else { return };
        workload.pairs.asked = None;
        judge.pair(now, canary, stable);
        self.keep_judge_now_and_then(now, &id);
        self.look_at_rollout(now, &id, Event::Look);
        self.changed.insert(id);
    }
}
