//! The verdict of a check from the answers to its leaves.
//!
//! ```text
//!            pass_after successes in a row
//!   Unknown ------------------------------> Passing
//!      |                                     ^   |
//!      | fail_after failures                 |   | fail_after failures in a row
//!      v                                     |   v
//!   Failing <------------------------------- Failing
//!                pass_after successes in a row
//! ```
//!
//! Every leaf has this machine; `all`, `any` and `at_least` combine the leaves' states with three-valued logic, so that
//! a part that nobody has asked yet can neither pass nor fail the whole.

use orchestra_model::{
    Name,
    desired::{Check, Probe},
};

/// State of a leaf, or of a whole check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not enough answers yet.
    Unknown,
    /// It passes.
    Passing,
    /// It fails.
    Failing,
}

/// A check with the state of its leaves.
#[derive(Clone, Debug)]
pub struct Health {
    probe: Probe,
    leaves: Vec<LeafState>,
}

#[derive(Clone, Debug)]
struct LeafState {
    check: Check,
    verdict: Verdict,
    streak: u32,
    streak_passed: bool,
    detail: String,
}

impl Health {
    /// A check that nobody has asked yet.
    pub fn new(probe: Probe) -> Self {
        let mut leaves = Vec::new();
        collect(&probe.check, &mut leaves);
        Self { probe, leaves }
    }

    /// Timing and thresholds.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// The leaves in order; their positions identify them in [`Self::answered`].
    pub fn leaves(&self) -> impl Iterator<Item = (usize, &Check)> {
        self.leaves.iter().map(|leaf| &leaf.check).enumerate()
    }

    /// Counts the answer to one leaf. Answers to leaves that do not exist (an older spec) are ignored.
    pub fn answered(&mut self, leaf: usize, passed: bool, detail: &str) {
        let (pass_after, fail_after) = (self.probe.pass_after.max(1), self.probe.fail_after.max(1));
        let Some(leaf) = self.leaves.get_mut(leaf) else { return };
        leaf.streak = if leaf.streak_passed == passed { leaf.streak.saturating_add(1) } else { 1 };
        leaf.streak_passed = passed;
        if !passed || leaf.verdict != Verdict::Passing {
            detail.clone_into(&mut leaf.detail);
        }
        if passed && leaf.streak >= pass_after {
            leaf.verdict = Verdict::Passing;
            leaf.detail.clear();
        } else if !passed && leaf.streak >= fail_after {
            leaf.verdict = Verdict::Failing;
        }
    }

    /// Sets every leaf for which `matches` holds, without thresholds: facts (a line was seen, a dependency is ready).
    pub fn set(&mut self, matches: impl Fn(&Check) -> bool, verdict: Verdict, detail: &str) {
        for leaf in self.leaves.iter_mut().filter(|leaf| matches(&leaf.check)) {
            leaf.verdict = verdict;
            if verdict == Verdict::Passing { leaf.detail.clear() } else { detail.clone_into(&mut leaf.detail) }
        }
    }

    /// Begins anew for another start of the instance. What is known of other services stays known.
    pub fn restart(&mut self) {
        for leaf in self.leaves.iter_mut().filter(|leaf| !matches!(leaf.check, Check::Dependency { .. })) {
            leaf.verdict = Verdict::Unknown;
            leaf.streak = 0;
            leaf.streak_passed = false;
            leaf.detail.clear();
        }
    }

    /// Leaves that were set as facts and hold across a change of the check's timing.
    pub fn facts(&self) -> impl Iterator<Item = (Check, Verdict)> {
        self.leaves
            .iter()
            .filter(|leaf| matches!(leaf.check, Check::Log | Check::Notify | Check::Dependency { .. }))
            .map(|leaf| (leaf.check.clone(), leaf.verdict))
    }

    /// Services whose readiness this check depends on.
    pub fn dependencies(&self) -> impl Iterator<Item = &Name> {
        self.leaves
            .iter()
            .filter_map(|leaf| if let Check::Dependency { service } = &leaf.check { Some(service) } else { None })
    }

    /// The verdict of the whole.
    pub fn verdict(&self) -> Verdict {
        let mut leaves = self.leaves.iter().map(|leaf| leaf.verdict);
        combine(&self.probe.check, &mut leaves)
    }

    /// Answers of the same kind in a row; of several leaves, the fewest.
    pub fn streak(&self) -> u32 {
        self.leaves.iter().map(|leaf| leaf.streak).min().unwrap_or(0)
    }

    /// What does not pass, in words; empty if all leaves pass.
    pub fn detail(&self) -> String {
        let failing: Vec<String> = self
            .leaves
            .iter()
            .filter(|leaf| leaf.verdict != Verdict::Passing)
            .map(|leaf| {
                let what = describe(&leaf.check);
                if leaf.detail.is_empty() {
                    format!("{what}: no answer yet")
                } else {
                    format!("{what}: {}", leaf.detail)
                }
            })
            .collect();
        failing.join("; ")
    }
}

fn collect(check: &Check, leaves: &mut Vec<LeafState>) {
    match check {
        Check::All(of) | Check::Any(of) | Check::AtLeast { of, .. } => of.iter().for_each(|part| collect(part, leaves)),
        leaf => leaves.push(LeafState {
            check: leaf.clone(),
            verdict: Verdict::Unknown,
            streak: 0,
            streak_passed: false,
            detail: String::new(),
        }),
    }
}

fn combine(check: &Check, leaves: &mut impl Iterator<Item = Verdict>) -> Verdict {
    let count = |of: &[Check], leaves: &mut dyn Iterator<Item = Verdict>| {
        let mut leaves = leaves;
        of.iter().fold((0u32, 0u32), |(passing, failing), part| match combine(part, &mut leaves) {
            Verdict::Passing => (passing + 1, failing),
            Verdict::Failing => (passing, failing + 1),
            Verdict::Unknown => (passing, failing),
        })
    };
    let at_least = |needed: u32, of: &[Check], leaves: &mut dyn Iterator<Item = Verdict>| {
        let (passing, failing) = count(of, leaves);
        let total = u32::try_from(of.len()).unwrap_or(u32::MAX);
        if passing >= needed {
            Verdict::Passing
        } else if total - failing < needed {
            Verdict::Failing
        } else {
            Verdict::Unknown
        }
    };
    match check {
        Check::All(of) => at_least(u32::try_from(of.len()).unwrap_or(u32::MAX), of, leaves),
        Check::Any(of) => at_least(1, of, leaves),
        Check::AtLeast { count, of } => at_least(*count, of, leaves),
        _ => leaves.next().unwrap_or(Verdict::Unknown),
    }
}

/// Names a leaf for people: `http /ready`, `tcp db`, `exec ./check`.
pub fn describe(check: &Check) -> String {
    match check {
        Check::Http { method, path, .. } if method == "GET" => format!("http {path}"),
        Check::Http { method, path, .. } => format!("http {method} {path}"),
        Check::Tcp { port } => format!("tcp port {port}"),
        Check::Grpc { service, .. } if service.is_empty() => "grpc health".to_owned(),
        Check::Grpc { service, .. } => format!("grpc health of {service}"),
        Check::Exec { command } => format!("exec {}", command.first().map(ToString::to_string).unwrap_or_default()),
        Check::Log => "log line".to_owned(),
        Check::Notify => "sd_notify READY=1".to_owned(),
        Check::Dependency { service } => format!("service {service}"),
        Check::All(_) => "all".to_owned(),
        Check::Any(_) => "any".to_owned(),
        Check::AtLeast { count, .. } => format!("at least {count}"),
    }
}

#[cfg(test)]
mod tests {
    use orchestra_model::quantity::Timespan;
    use proptest::prelude::*;

    use super::*;

    fn probe(check: Check, pass_after: u32, fail_after: u32) -> Health {
        let second = Timespan::seconds(1);
        Health::new(Probe { check, every: second, every_starting: second, timeout: second, pass_after, fail_after })
    }

    fn tcp() -> Check {
        Check::Tcp { port: "db".parse().unwrap() }
    }

    #[test]
    fn thresholds_need_rows() {
        let mut health = probe(tcp(), 2, 3);
        let mut answer = |passed| {
            health.answered(0, passed, "refused");
            health.verdict()
        };
        assert_eq!(answer(true), Verdict::Unknown);
        assert_eq!(answer(true), Verdict::Passing);
        assert_eq!(answer(false), Verdict::Passing);
        assert_eq!(answer(false), Verdict::Passing);
        assert_eq!(answer(true), Verdict::Passing);
        assert_eq!(answer(false), Verdict::Passing);
        assert_eq!(answer(false), Verdict::Passing);
        assert_eq!(answer(false), Verdict::Failing);
        assert_eq!(answer(true), Verdict::Failing);
        assert_eq!(answer(true), Verdict::Passing);
    }

    proptest! {
        /// Composites agree with counting, whatever the leaves say, and an unknown leaf decides nothing.
        #[test]
        fn composites_count(states in prop::collection::vec(0u8..3, 1..6), needed in 1u32..6) {
            let needed = needed.min(u32::try_from(states.len()).unwrap());
            let of: Vec<Check> = states.iter().map(|_| tcp()).collect();
            let mut health = probe(Check::AtLeast { count: needed, of }, 1, 1);
            for (leaf, state) in states.iter().enumerate() {
                match state { 0 => {}, 1 => health.answered(leaf, true, ""), _ => health.answered(leaf, false, "no") }
            }
            let count = |of: u8| states.iter().fold(0u32, |n, s| n + u32::from(*s == of));
            let (passing, failing) = (count(1), count(2));
            let total = u32::try_from(states.len()).unwrap();
            let expected = if passing >= needed { Verdict::Passing }
                else if total - failing < needed { Verdict::Failing } else { Verdict::Unknown };
            prop_assert_eq!(health.verdict(), expected);
        }
    }
}
