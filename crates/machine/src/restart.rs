//! When to start an instance again: exponential back-off with jitter, reset after healthy time, and a budget.
//!
//! systemd's ramp never resets by itself and Compose has none; both end in either a busy loop or an endless wait. Here
//! the pause doubles per restart up to a cap, starts anew after `reset_after` of readiness, and a budget turns a crash
//! loop into a failure that somebody is told about.

use std::time::Duration;

use orchestra_model::{
    desired::{Restart, RestartPolicy},
    launch::Exit,
};

use crate::rng::Rng;

/// Restarts of one instance so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct History {
    /// Since the last reset.
    pub(crate) recent: u32,
    /// In all.
    pub(crate) total: u32,
}

/// What follows from an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start again after this pause.
    After(Duration),
    /// The policy does not want a restart.
    NotWanted,
    /// The budget is used up.
    CrashLoop,
}

impl History {
    /// Forgets recent restarts after `ready_for` of uninterrupted readiness, if that was long enough.
    pub(crate) fn observe_readiness(&mut self, policy: &Restart, ready_for: Duration) {
        if ready_for >= policy.reset_after.duration() {
            self.recent = 0;
        }
    }

    /// Decides about a restart after `exit`, and counts it. `forced` is a restart that was caused from outside
    /// (liveness, watchdog), which every policy but `never` wants.
    pub(crate) fn decide(&mut self, policy: &Restart, exit: Exit, forced: bool, rng: &mut Rng) -> Decision {
        let wanted = match policy.policy {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => forced || !exit.is_success(),
            RestartPolicy::Never => false,
        };
        if !wanted {
            return Decision::NotWanted;
        }
        if policy.budget.is_some_and(|budget| self.recent >= budget) {
            return Decision::CrashLoop;
        }
        let doubled =
            policy.backoff.duration().saturating_mul(1u32.checked_shl(self.recent.min(31)).unwrap_or(u32::MAX));
        let pause = doubled.min(policy.max_backoff.duration());
        // Up to 10 % more, so that instances that died together do not return together.
        let jitter = pause.mul_f64(0.1 * f64::from(u32::try_from(rng.below(1000)).unwrap_or(0)) / 1000.0);
        self.recent += 1;
        self.total += 1;
        Decision::After(pause + jitter)
    }
}

#[cfg(test)]
mod tests {
    use orchestra_model::quantity::Timespan;

    use super::*;

    fn policy() -> Restart {
        Restart {
            policy: RestartPolicy::Always,
            backoff: Timespan::millis(500),
            max_backoff: Timespan::seconds(4),
            reset_after: Timespan::seconds(60),
            budget: Some(5),
        }
    }

    #[test]
    fn pauses_double_to_the_cap_and_then_the_budget_ends() {
        let (mut history, mut rng) = (History::default(), Rng::new(1));
        for base in [500, 1000, 2000, 4000, 4000] {
            let Decision::After(pause) = history.decide(&policy(), Exit::Code(1), false, &mut rng) else { panic!() };
            let base = Duration::from_millis(base);
            assert!(pause >= base && pause <= base.mul_f64(1.1), "{pause:?}");
        }
        assert_eq!(history.decide(&policy(), Exit::Code(1), false, &mut rng), Decision::CrashLoop);
        history.observe_readiness(&policy(), Duration::from_secs(59));
        assert_eq!(history.recent, 5);
        history.observe_readiness(&policy(), Duration::from_secs(60));
        assert!(matches!(history.decide(&policy(), Exit::Code(0), false, &mut rng), Decision::After(_)));
    }

    #[test]
    fn policies() {
        let mut rng = Rng::new(1);
        let mut decide = |policy_kind, exit, forced| {
            History::default().decide(&Restart { policy: policy_kind, ..policy() }, exit, forced, &mut rng)
        };
        assert_eq!(decide(RestartPolicy::OnFailure, Exit::Code(0), false), Decision::NotWanted);
        assert!(matches!(decide(RestartPolicy::OnFailure, Exit::Code(0), true), Decision::After(_)));
        assert!(matches!(decide(RestartPolicy::OnFailure, Exit::Signal(9), false), Decision::After(_)));
        assert_eq!(decide(RestartPolicy::Never, Exit::Code(1), true), Decision::NotWanted);
    }
}
