//! Replacement as arithmetic: given what there is, how many instances to start and which to retire now.
//!
//! It is level-triggered: it looks at what exists and takes the next allowed step, so it continues from any state,
//! including one that a crash left behind.

use orchestra_model::{
    InstanceId,
    rollout::{Rollout, Strategy},
};

/// What matters of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub id: InstanceId,
    /// Whose it is.
    pub set: Set,
    /// Ready as far as its own check goes.
    pub healthy: bool,
    /// Healthy, and the data plane has acknowledged that it sends requests there.
    pub serving: bool,
    /// Healthy for long enough, and the data plane has acknowledged that it sends requests there.
    pub ready: bool,
    /// Leaving, but not gone.
    pub leaving: bool,
    /// Given up.
    pub failed: bool,
}

/// Which of the sets of instances one belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Launched with what the service wants now.
    Current,
    /// Launched with what a rollout replaces.
    Baseline,
    /// Launched with anything else.
    Other,
}

/// How instances are replaced at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A few at a time. With a surge of 0 an instance that is leaving still takes up room, so two versions never overlap
    /// in what they occupy.
    Rolling {
        /// Instances above the wanted number.
        surge: u32,
        /// Ready instances below it.
        unavailable: u32,
    },
    /// Nothing new starts before everything old is gone.
    StopFirst,
    /// Two sets: the current one grows to `current` beside the baseline, which is kept whole.
    Beside {
        /// Instances of the current set.
        current: u32,
    },
    /// The current set is whole; the baseline stays as it is.
    Keep,
    /// Nothing changes.
    Frozen,
}

impl Mode {
    /// What a strategy does where no rollout takes steps: a first start, a way back, another number of instances.
    pub fn direct(rollout: &Rollout, replicas: u32) -> Self {
        match &rollout.strategy {
            Strategy::Rolling { max_surge, max_unavailable } => {
                let (surge, unavailable) = (max_surge.rounded_up(replicas), max_unavailable.rounded_down(replicas));
                // Neither up nor down would never move (Kubernetes' rule is the same).
                let surge = if surge == 0 && unavailable == 0 { 1 } else { surge };
                Self::Rolling { surge, unavailable }
            }
            Strategy::Recreate | Strategy::Hold { .. } => Self::StopFirst,
            // Two whole sets are what the machine is made for then.
            Strategy::Canary(_) | Strategy::BlueGreen(_) => Self::Rolling { surge: replicas, unavailable: 0 },
        }
    }
}

/// The next allowed step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Instances to add to the current set.
    pub start: u32,
    /// Instances to add to the baseline.
    pub start_baseline: u32,
    /// Instances to retire, in order.
    pub retire: Vec<InstanceId>,
}

/// Decides the next step towards `replicas` current instances, or towards what a rollout wants meanwhile.
pub fn decide(mode: Mode, replicas: u32, members: &[Member]) -> Decision {
    let mut decision = Decision::default();
    match mode {
        Mode::Frozen => {}
        Mode::Rolling { surge, unavailable } => rolling(&mut decision, replicas, surge, unavailable, members),
        Mode::StopFirst => {
            let mut old = members.iter().filter(|m| m.set != Set::Current).peekable();
            if old.peek().is_none() {
                // One that is leaving still runs, also if it is of what is wanted again.
                decision.start = replicas.saturating_sub(count(members.iter()));
            }
            decision.retire.extend(old.filter(|m| !m.leaving).map(|m| m.id.clone()));
            surplus(&mut decision, replicas, members, Set::Current);
        }
        Mode::Beside { current } => {
            decision.start = missing(current, members, Set::Current);
            decision.start_baseline = missing(replicas, members, Set::Baseline);
            surplus(&mut decision, current, members, Set::Current);
            surplus(&mut decision, replicas, members, Set::Baseline);
            if count(members.iter().filter(|m| m.set == Set::Baseline && m.ready && !m.leaving)) >= replicas {
                retire_others(&mut decision, members);
            }
        }
        Mode::Keep => {
            decision.start = missing(replicas, members, Set::Current);
            surplus(&mut decision, replicas, members, Set::Current);
            surplus(&mut decision, replicas, members, Set::Baseline);
            retire_others(&mut decision, members);
        }
    }
    decision
}

fn count<'a>(members: impl Iterator<Item = &'a Member>) -> u32 {
    u32::try_from(members.count()).unwrap_or(u32::MAX)
}

fn of(set: Set, members: &[Member]) -> impl Iterator<Item = &Member> {
    members.iter().filter(move |m| m.set == set && !m.leaving)
}

fn missing(wanted: u32, members: &[Member], set: Set) -> u32 {
    wanted.saturating_sub(count(of(set, members)))
}

/// Too many of a set: those that serve nobody leave first, then those that have not proven themselves, then the youngest.
fn surplus(decision: &mut Decision, wanted: u32, members: &[Member], set: Set) {
    let mut all: Vec<&Member> = of(set, members).collect();
    let too_many = all.len().saturating_sub(wanted as usize);
    let worth = |member: &Member| (member.healthy, member.serving, member.ready);
    all.sort_by(|a, b| worth(a).cmp(&worth(b)).then_with(|| b.id.cmp(&a.id)));
    decision.retire.extend(all.iter().take(too_many).map(|m| m.id.clone()));
}

fn retire_others(decision: &mut Decision, members: &[Member]) {
    decision.retire.extend(of(Set::Other, members).map(|m| m.id.clone()));
}

fn rolling(decision: &mut Decision, replicas: u32, surge: u32, unavailable: u32, members: &[Member]) {
    let staying = || members.iter().filter(|m| !m.leaving);
    let current = count(of(Set::Current, members));
    let ready = count(staying().filter(|m| m.ready));
    let occupied = if surge == 0 { count(members.iter()) } else { count(staying()) };
    surplus(decision, replicas, members, Set::Current);

    // Old ones that serve nobody leave at once; ready ones as far as enough others are ready. A healthy one that the data
    // plane has not acknowledged (after a recovery nothing is) may be serving: it counts for nobody and stays.
    let floor = replicas.saturating_sub(unavailable);
    let mut spare = ready.saturating_sub(floor);
    let mut old: Vec<&Member> = staying().filter(|m| m.set != Set::Current).collect();
    old.sort_by(|a, b| a.id.cmp(&b.id));
    for member in old {
        if !member.healthy {
            decision.retire.push(member.id.clone());
        } else if member.ready && spare > 0 {
            spare -= 1;
            decision.retire.push(member.id.clone());
        }
    }

    let room = (replicas + surge).saturating_sub(occupied);
    decision.start = replicas.saturating_sub(current).min(room);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(ordinal: u32, set: Set, leaving: bool) -> Member {
        let id = format!("single-r1-{ordinal}").parse().unwrap();
        Member { id, set, healthy: true, serving: true, ready: true, leaving, failed: false }
    }

    #[test]
    fn of_too_many_the_one_that_serves_stays() {
        // None has been ready for long enough, and the data plane knows only the second.
        let new = |ordinal| Member { ready: false, serving: ordinal == 2, ..member(ordinal, Set::Current, false) };
        let decision = decide(Mode::Rolling { surge: 1, unavailable: 0 }, 1, &[new(1), new(2), new(3)]);
        let retired: Vec<String> = decision.retire.iter().map(ToString::to_string).collect();
        assert_eq!(retired, ["single-r1-3", "single-r1-1"]);
    }

    #[test]
    fn what_stops_first_never_runs_beside_one_that_leaves() {
        let decide = |members: &[Member]| decide(Mode::StopFirst, 1, members);
        let old = decide(&[member(1, Set::Other, false)]);
        assert_eq!((old.start, old.retire.len()), (0, 1));
        assert_eq!(decide(&[member(1, Set::Other, true)]), Decision::default());
        // The same after a change of mind: what leaves is what is wanted again, but it cannot come back.
        assert_eq!(decide(&[member(1, Set::Current, true)]), Decision::default());
        assert_eq!(decide(&[]).start, 1);
    }
}
