//! What was recommended and what was changed, for as long as windows and policies look back.
//!
//! Both follow the reference implementation of the `HorizontalPodAutoscaler`: every raw recommendation is remembered, a
//! window takes the lowest (to grow) or the highest (to shrink) of its time, and a policy bounds what its time has added
//! and removed together. Ages are compared strictly: what is exactly as old as a window is outside of it.

use std::time::Duration;

use orchestra_model::{
    Now,
    autoscale::{Autoscale, Behavior, Change, Select},
};

/// Recommendations and changes, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct History {
    recommendations: Vec<(Now, u32)>,
    changes: Vec<(Now, i64)>,
}

impl History {
    pub(super) fn of(recommendations: Vec<(Now, u32)>, changes: Vec<(Now, i64)>) -> Self {
        Self { recommendations, changes }
    }

    pub(super) fn recommendations(&self) -> &[(Now, u32)] {
        &self.recommendations
    }

    pub(super) fn changes(&self) -> &[(Now, i64)] {
        &self.changes
    }

    /// Brings what is recommended now between the lowest recommendation of the window for growth and the highest of the
    /// window for shrinking, as near to `current` as that allows.
    pub(super) fn stabilize(&self, policy: &Autoscale, now: Now, current: u32, recommended: u32) -> u32 {
        let within = |window: Duration| {
            self.recommendations.iter().filter(move |(at, _)| now.since(*at) < window).map(|(_, replicas)| *replicas)
        };
        let lowest = within(policy.up.window.duration()).fold(recommended, u32::min);
        let highest = within(policy.down.window.duration()).fold(recommended, u32::max);
        current.max(lowest).min(highest)
    }

    /// Remembers a recommendation, and forgets those that no window can choose any more: they are too old, or younger
    /// ones are both as high and as low. So there are never more of them than twice the numbers that were recommended.
    pub(super) fn recommend(&mut self, policy: &Autoscale, now: Now, replicas: u32) {
        let longest = policy.up.window.max(policy.down.window).duration();
        self.recommendations.push((now, replicas));
        let (mut lowest, mut highest) = (None, None);
        let mut kept: Vec<(Now, u32)> = Vec::with_capacity(self.recommendations.len());
        for (at, replicas) in self.recommendations.drain(..).rev() {
            let lower = lowest.is_none_or(|lowest| replicas < lowest);
            let higher = highest.is_none_or(|highest| replicas > highest);
            if now.since(at) >= longest && at != now {
                break;
            }
            if lower || higher {
                kept.push((at, replicas));
            }
            lowest = Some(lowest.map_or(replicas, |lowest: u32| lowest.min(replicas)));
            highest = Some(highest.map_or(replicas, |highest: u32| highest.max(replicas)));
        }
        kept.reverse();
        self.recommendations = kept;
    }

    /// Remembers a change, and forgets those that no policy counts any more.
    pub(super) fn change(&mut self, policy: &Autoscale, now: Now, from: u32, to: u32) {
        let policies = policy.up.policies.iter().chain(&policy.down.policies);
        let longest = policies.map(|policy| policy.per).max().unwrap_or_default().duration();
        self.changes.retain(|(at, _)| now.since(*at) < longest);
        self.changes.push((now, i64::from(to) - i64::from(from)));
    }

    /// Most instances that the policies of `up` allow; never fewer than `current`.
    pub(super) fn ceiling(&self, up: &Behavior, now: Now, current: u32) -> u32 {
        let allowed = up.policies.iter().map(|policy| {
            let start = self.at_start_of(policy.per.duration(), now, current);
            match policy.change {
                Change::Instances(instances) => start + i64::from(instances),
                // Rounded up, or a small service would never grow.
                Change::Percent(percent) => -((-start * (100 + i64::from(percent))).div_euclid(100)),
            }
        });
        let limit = match up.select {
            Select::Max => allowed.max(),
            Select::Min => allowed.min(),
            Select::Disabled => None,
        };
        limit.map_or(current, saturated).max(current)
    }

    /// Fewest instances that the policies of `down` allow; never more than `current`.
    pub(super) fn floor(&self, down: &Behavior, now: Now, current: u32) -> u32 {
        let allowed = down.policies.iter().map(|policy| {
            let start = self.at_start_of(policy.per.duration(), now, current);
            match policy.change {
                Change::Instances(instances) => start - i64::from(instances),
                Change::Percent(percent) => start * (100 - i64::from(percent)) / 100,
            }
        });
        let limit = match down.select {
            Select::Max => allowed.min(),
            Select::Min => allowed.max(),
            Select::Disabled => None,
        };
        limit.map_or(current, saturated).min(current)
    }

    /// Instances at the beginning of a period that ends now; below zero if others have taken away what was added.
    fn at_start_of(&self, period: Duration, now: Now, current: u32) -> i64 {
        let since: i64 = self.changes.iter().filter(|(at, _)| now.since(*at) < period).map(|(_, by)| by).sum();
        i64::from(current) - since
    }
}

fn saturated(number: i64) -> u32 {
    u32::try_from(number.max(0)).unwrap_or(u32::MAX)
}
