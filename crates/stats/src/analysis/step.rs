//! What is counted anew with every step, and the warm-up.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{observation::Arm, settings::WarmUp};

/// The present step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) weight: f64,
    pub(super) measured: Duration,
    pub(super) lost: Duration,
    /// Responses, and the bad ones among them.
    canary: (u64, u64),
    stable: (u64, u64),
    /// Pairs of probes.
    #[serde(default)]
    pairs: u64,
}

impl Step {
    pub(super) fn new(weight: f64) -> Self {
        Self { weight, ..Self::default() }
    }

    pub(super) fn add(&mut self, arm: Arm, requests: u64, bad: u64) {
        let of = match arm {
            Arm::Canary => &mut self.canary,
            Arm::Stable => &mut self.stable,
        };
        *of = (of.0.saturating_add(requests), of.1.saturating_add(bad));
    }

    pub(super) const fn add_pair(&mut self) {
        self.pairs = self.pairs.saturating_add(1);
    }

    pub(super) const fn pairs(&self) -> u64 {
        self.pairs
    }

    pub(super) const fn requests(&self, arm: Arm) -> u64 {
        match arm {
            Arm::Canary => self.canary.0,
            Arm::Stable => self.stable.0,
        }
    }

    pub(super) const fn bad(&self, arm: Arm) -> u64 {
        match arm {
            Arm::Canary => self.canary.1,
            Arm::Stable => self.stable.1,
        }
    }

    /// More than half of what both arms answered was bad: nobody promotes during an outage.
    pub(super) fn outage(&self) -> bool {
        let most = |(requests, bad): (u64, u64)| bad > requests / 2;
        most(self.canary) && most(self.stable)
    }
}

/// So many warm-ups' time is excluded, however often instances come.
const WARM_UPS: u32 = 6;

/// How cold the canary is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Warmth {
    time: Duration,
    requests: u64,
    spent: Duration,
}

impl Warmth {
    pub(super) fn admitted(&mut self, warm_up: &WarmUp) {
        if self.spent == Duration::ZERO || self.spent < warm_up.time.saturating_mul(WARM_UPS) {
            self.time = warm_up.time;
            self.requests = warm_up.requests;
        }
    }

    pub(super) const fn is_cold(&self) -> bool {
        !self.time.is_zero() || self.requests > 0
    }

    pub(super) fn pass(&mut self, time: Duration, requests: u64) {
        if self.is_cold() {
            self.spent = self.spent.saturating_add(time);
        }
        self.time = self.time.saturating_sub(time);
        self.requests = self.requests.saturating_sub(requests);
    }
}
