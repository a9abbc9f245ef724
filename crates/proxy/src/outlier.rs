//! Passive outlier ejection: an instance that fails real requests gets none for a while.
//!
//! ```text
//!   in rotation ──(failures in a row)──> ejected for eject_for × n ──(time)──> in rotation, failures 0
//!        │ a success: failures 0              n grows with every ejection up to 10,
//!        └────────────────────────────────────and falls by one for each eject_for without one
//! ```
//!
//! Who may be ejected is counted **within a release**: at most `max_percent` of its instances, and if fewer than
//! `panic_percent` of them would be left, ejections are ignored for it. So ejection moves requests between instances of
//! one release and never from one release or arm to another: a rollout's shares stay what they are, and its verdict
//! judges every response, also those that led to an ejection. A release with one instance ejects nobody.
//!
//! Success costs one read of an atomic; a route without ejected instances costs another.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use orchestra_model::traffic::Outlier;

use crate::clock;

/// Ejections grow to at most this many times the first one.
const LONGEST: u32 = 10;

/// When instances of a route are ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Failures in a row; never 0.
    pub(crate) failures: u32,
    pub(crate) eject_for: Duration,
    pub(crate) max_percent: u32,
    pub(crate) panic_percent: u32,
}

impl Rule {
    /// `None` if nobody is ejected.
    pub(crate) fn of(outlier: &Outlier) -> Option<Self> {
        let Outlier { failures, eject_for, max_percent, panic_percent } = *outlier;
        let eject_for = eject_for.duration();
        (failures > 0 && !eject_for.is_zero()).then_some(Self { failures, eject_for, max_percent, panic_percent })
    }

    /// Whether one more of `all` may be ejected.
    pub(crate) fn has_room(self, ejected: usize, all: usize) -> bool {
        (ejected + 1) * 100 <= all * self.max_percent as usize
    }

    /// Whether ejections are ignored, so few would be left.
    pub(crate) fn panics(self, ejected: usize, all: usize) -> bool {
        let left = all - ejected;
        left == 0 || left * 100 < all * self.panic_percent as usize
    }
}

/// How one instance behind one route has done. Times are milliseconds of [`clock`].
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Failures in a row.
    failures: AtomicU32,
    /// When the last ejection ends or ended; 0 without one.
    until: AtomicU64,
    /// Length of the last ejection in times of the first.
    times: AtomicU32,
}

impl Health {
    /// It answered as it should.
    pub(crate) fn succeeded(&self) {
        // Written only where something changes: all threads share it.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
    }

    /// It failed. Returns whether that is often enough in a row.
    pub(crate) fn failed(&self, rule: Rule) -> bool {
        self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= rule.failures
    }

    pub(crate) fn is_ejected(&self, now: Duration) -> bool {
        self.until.load(Ordering::Relaxed) > clock::millis(now)
    }

    /// How long it is still ejected.
    pub(crate) fn remaining(&self, now: Duration) -> Option<Duration> {
        let left = self.until.load(Ordering::Relaxed).checked_sub(clock::millis(now))?;
        (left > 0).then(|| Duration::from_millis(left))
    }

    /// Ejects it; returns until when. One thread at a time.
    pub(crate) fn eject(&self, rule: Rule, now: Duration) -> Duration {
        let last = Duration::from_millis(self.until.load(Ordering::Relaxed));
        let calm = now.saturating_sub(last).as_millis() / rule.eject_for.as_millis().max(1);
        let calm = u32::try_from(calm).unwrap_or(u32::MAX);
        let times = (self.times.load(Ordering::Relaxed).saturating_sub(calm) + 1).min(LONGEST);
        let until = now + rule.eject_for * times;
        self.times.store(times, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.until.store(clock::millis(until), Ordering::Relaxed);
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assign::mix;

    const RULE: Rule = Rule { failures: 5, eject_for: Duration::from_secs(10), max_percent: 50, panic_percent: 50 };

    #[test]
    fn failures_must_come_in_a_row() {
        let health = Health::default();
        for _ in 0..100 {
            assert!(!(0..4).any(|_| health.failed(RULE)));
            health.succeeded();
        }
        assert_eq!((0..5).map(|_| health.failed(RULE)).collect::<Vec<_>>(), [false, false, false, false, true]);
    }

    #[test]
    fn ejections_grow_up_to_ten_times_and_shrink_with_calm() {
        let (health, mut now) = (Health::default(), Duration::from_secs(50));
        for times in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10] {
            let until = health.eject(RULE, now);
            assert_eq!(until, now + RULE.eject_for * times);
            assert!(health.is_ejected(now) && health.is_ejected(until.saturating_sub(Duration::from_millis(1))));
            assert_eq!(health.remaining(now), Some(RULE.eject_for * times));
            assert!(!health.is_ejected(until) && health.remaining(until).is_none());
            now = until;
        }
        // Seven times the first ejection without one.
        now += RULE.eject_for * 7;
        assert_eq!(health.eject(RULE, now), now + RULE.eject_for * 4);
        assert!(!health.failed(RULE), "it begins anew");
    }

    /// Law: whatever fails, of `all` instances at most the share is out, and in force only while enough are left.
    #[test]
    fn never_more_than_the_share_is_out_and_never_all() {
        for seed in 0..500_u64 {
            let draw = |what: u64, below: u64| mix(seed << 20 | what) % below;
            let percent = |what| u32::try_from(draw(what, 101)).unwrap();
            let rule = Rule { max_percent: percent(1), panic_percent: percent(2), ..RULE };
            let all = usize::try_from(draw(3, 12)).unwrap() + 1;
            let instances: Vec<Health> = (0..all).map(|_| Health::default()).collect();
            let mut now = Duration::from_secs(1);
            for step in 0..300 {
                now += Duration::from_millis(draw(100 + step, 9_000));
                let one = &instances[usize::try_from(draw(500 + step, all as u64)).unwrap()];
                let ejected = instances.iter().filter(|health| health.is_ejected(now)).count();
                if !one.is_ejected(now) && rule.has_room(ejected, all) {
                    one.eject(rule, now);
                }
                let ejected = instances.iter().filter(|health| health.is_ejected(now)).count();
                assert!(ejected * 100 <= all * rule.max_percent as usize, "{ejected} of {all} with {rule:?}");
                assert!(ejected < all || rule.panics(ejected, all));
                let left = all - ejected;
                assert_eq!(rule.panics(ejected, all), left == 0 || left * 100 < all * rule.panic_percent as usize);
            }
        }
        assert!(!RULE.has_room(0, 1) && RULE.has_room(0, 2) && !RULE.has_room(1, 3) && RULE.has_room(1, 4));
    }

    #[test]
    fn nobody_is_ejected_where_nobody_asked_for_it() {
        assert_eq!(Rule::of(&Outlier { failures: 0, ..Outlier::default() }), None);
        assert_eq!(Rule::of(&Outlier::default()), Some(RULE));
    }
}
