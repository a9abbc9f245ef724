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
pub(crate) struct Member {
    /// Which.
    pub(crate) id: InstanceId,
    /// Whose it is.
    pub(crate) set: Set,
    /// Ready as far as its own check goes.
    pub(crate) healthy: bool,
    /// Healthy, and the data plane has acknowledged that it sends requests there.
    pub(crate) serving: bool,
    /// Healthy for long enough, and the data plane has acknowledged that it sends requests there.
    pub(crate) ready: bool,
    /// Leaving, but not gone.
    pub(crate) leaving: bool,
    /// Given up.
    pub(crate) failed: bool,
}

/// Which of the sets of instances one belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// Launched with what the service wants now.
    Current,
    /// Launched with what a rollout replaces.
    Baseline,
    /// Launched with anything else.
    Other,
}

/// How instances are replaced at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
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
    pub(crate) fn direct(rollout: &Rollout, replicas: u32) -> Self {
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

    /// Instances of the current set that are wanted of a service with `replicas`; `None` while nothing changes.
    pub(crate) fn wanted(self, replicas: u32) -> Option<u32> {
        match self {
            Self::Rolling { .. } | Self::StopFirst | Self::Keep => Some(replicas),
            Self::Beside { current } => Some(current),
            Self::Frozen => None,
        }
    }
}

/// The next allowed step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Instances to add to the current set.
    pub(crate) start: u32,
    /// Instances to add to the baseline.
    pub(crate) start_baseline: u32,
    /// Instances to retire, in order.
    pub(crate) retire: Vec<InstanceId>,
}

/// Decides the next step towards `replicas` current instances, or towards what a rollout wants meanwhile.
pub(crate) fn decide(mode: Mode, replicas: u32, members: &[Member]) -> Decision {
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
            surplus(&mut decision, Set::Current, replicas, 0, members);
        }
        Mode::Beside { current } => {
            decision.start = missing(current, members, Set::Current);
            decision.start_baseline = missing(replicas, members, Set::Baseline);
            surplus(&mut decision, Set::Current, current, replicas, members);
            surplus(&mut decision, Set::Baseline, replicas, replicas, members);
            if count(members.iter().filter(|m| m.set == Set::Baseline && m.ready && !m.leaving)) >= replicas {
                surplus(&mut decision, Set::Other, 0, replicas, members);
            }
        }
        Mode::Keep => {
            decision.start = missing(replicas, members, Set::Current);
            surplus(&mut decision, Set::Current, replicas, replicas, members);
            surplus(&mut decision, Set::Baseline, replicas, replicas, members);
            surplus(&mut decision, Set::Other, 0, replicas, members);
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
fn surplus(decision: &mut Decision, set: Set, wanted: u32, floor: u32, members: &[Member]) {
    let mut all: Vec<&Member> = of(set, members).collect();
    let too_many = all.len().saturating_sub(wanted as usize);
    let worth = |member: &Member| (member.healthy, member.serving, member.ready);
    all.sort_by(|a, b| worth(a).cmp(&worth(b)).then_with(|| b.id.cmp(&a.id)));
    for member in all.into_iter().take(too_many) {
        if can_be_spared(decision, member, floor, members) {
            decision.retire.push(member.id.clone());
        }
    }
}

/// Whether the service keeps its floor without a member: one that is ready leaves only if `floor` others are ready, one
/// that may be serving only if `floor` others serve. So a set that is to become smaller does not take away what stands
/// in for the crashed ones of another set.
fn can_be_spared(decision: &Decision, member: &Member, floor: u32, members: &[Member]) -> bool {
    let stands = |other: &&Member| {
        let counts = if member.ready { other.ready } else { other.serving };
        counts && !other.leaving && other.id != member.id && !decision.retire.contains(&other.id)
    };
    !member.healthy || count(members.iter().filter(stands)) >= floor
}

fn rolling(decision: &mut Decision, replicas: u32, surge: u32, unavailable: u32, members: &[Member]) {
    let staying = || members.iter().filter(|m| !m.leaving);
    let current = count(of(Set::Current, members));
    let occupied = if surge == 0 { count(members.iter()) } else { count(staying()) };
    let floor = replicas.saturating_sub(unavailable);
    surplus(decision, Set::Current, replicas, floor, members);

    // Old ones that serve nobody leave at once; ready ones as far as enough others are ready. A healthy one that the data
    // plane has not acknowledged (after a recovery nothing is) may be serving: it counts for nobody and stays.
    let mut old: Vec<&Member> = staying().filter(|m| m.set != Set::Current).collect();
    old.sort_by(|a, b| a.id.cmp(&b.id));
    for member in old {
        if !member.healthy || (member.ready && can_be_spared(decision, member, floor, members)) {
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

    /// Launched with what the service wants now or with what it replaces, and not answering.
    fn crashed(ordinal: u32, set: Set) -> Member {
        Member { healthy: false, serving: false, ready: false, ..member(ordinal, set, false) }
    }

    fn retired(mode: Mode, replicas: u32, members: &[Member]) -> Vec<u32> {
        decide(mode, replicas, members).retire.iter().map(|id| id.ordinal).collect()
    }

    #[test]
    fn a_set_that_becomes_smaller_does_not_take_away_what_stands_in_for_another() {
        let new = |ordinal| member(ordinal, Set::Current, false);
        let old = |ordinal| member(ordinal, Set::Baseline, false);
        let beside = Mode::Beside { current: 1 };
        let gone = |ordinal| crashed(ordinal, Set::Baseline);
        // One old one and one new one would be all that is left.
        assert_eq!(retired(beside, 3, &[old(1), gone(2), gone(3), new(4), new(5)]), [0; 0]);
        assert_eq!(retired(beside, 3, &[old(1), old(2), gone(3), new(4), new(5)]), [5]);
        // Those that crashed leave, whatever is missing elsewhere.
        assert_eq!(retired(beside, 3, &[old(1), gone(2), gone(3), new(4), crashed(5, Set::Current)]), [5]);
    }

    #[test]
    fn what_is_left_of_an_older_release_stays_while_others_are_missing() {
        let third = |ordinal| member(ordinal, Set::Other, false);
        let current = [member(1, Set::Current, false), crashed(2, Set::Current)];
        assert_eq!(retired(Mode::Keep, 2, &[&current[..], &[third(3), third(4)]].concat()), [4]);
        assert_eq!(retired(Mode::Keep, 2, &[&current[..], &[third(3), crashed(4, Set::Other)]].concat()), [4]);
        let whole = [member(1, Set::Current, false), member(2, Set::Current, false)];
        assert_eq!(retired(Mode::Keep, 2, &[&whole[..], &[third(3), third(4)]].concat()), [4, 3]);
    }

    #[test]
    fn of_too_many_none_leaves_that_may_serve_before_the_data_plane_knows_enough_others() {
        // After a recovery nothing is acknowledged: the third may be the one that gets the requests.
        let adopted = |ordinal| Member { serving: false, ready: false, ..member(ordinal, Set::Current, false) };
        let rolling = Mode::Rolling { surge: 1, unavailable: 0 };
        assert_eq!(retired(rolling, 2, &[adopted(1), adopted(2), adopted(3)]), [0; 0]);
        let known = |ordinal| member(ordinal, Set::Current, false);
        assert_eq!(retired(rolling, 2, &[known(1), known(2), adopted(3)]), [3]);
        assert_eq!(retired(rolling, 2, &[known(1), adopted(2), crashed(3, Set::Current)]), [3]);
        // What stops first has no floor.
        assert_eq!(retired(Mode::StopFirst, 2, &[adopted(1), adopted(2), adopted(3)]), [3]);
    }

    #[test]
    fn who_leaves_for_another_reason_is_not_counted_twice() {
        // Four are ready and two must stay: one too many of the new ones, and one old one.
        let members = [
            member(1, Set::Other, false),
            member(2, Set::Current, false),
            member(3, Set::Current, false),
            member(4, Set::Current, false),
        ];
        assert_eq!(retired(Mode::Rolling { surge: 1, unavailable: 0 }, 2, &members), [4, 1]);
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
