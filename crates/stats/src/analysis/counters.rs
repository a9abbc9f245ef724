//! A counter that the service exports, on both arms.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    clients::Burst,
    observation::{Arm, Counter},
    verdict::CounterEvidence,
    wealth::Wealth,
};

/// Increase, and the requests in which it increased.
type Reading = (u64, u64);

/// One counter: its totals, what waits for the other arm's reading, and the bets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Tally {
    name: String,
    canary: Reading,
    stable: Reading,
    /// Readings since both arms last had one. An arm that cannot be asked says nothing, rather than "no increase".
    waiting: (Option<Reading>, Option<Reading>),
    waited: Duration,
    wealth: Wealth,
    burst: Burst,
}

impl Tally {
    pub(super) fn new(name: &str, wealth: Wealth, burst: f64) -> Self {
        Self {
            name: name.to_owned(),
            canary: (0, 0),
            stable: (0, 0),
            waiting: (None, None),
            waited: Duration::ZERO,
            wealth,
            burst: Burst::new(burst),
        }
    }

    /// `weight`: the canary's share of new requests. What grows belongs to requests that are under way as well, of which
    /// the canary may have as much as that: the larger share is the one to bet against.
    pub(super) fn observe(&mut self, readings: &[Counter], covers: Duration, weight: f64) {
        self.waited = self.waited.saturating_add(covers);
        for reading in readings.iter().filter(|it| it.name == self.name) {
            let new = (reading.increase, reading.requests);
            let (total, waiting) = match reading.arm {
                Arm::Canary => (&mut self.canary, &mut self.waiting.0),
                Arm::Stable => (&mut self.stable, &mut self.waiting.1),
            };
            *total = add(*total, new);
            *waiting = Some(add(waiting.unwrap_or_default(), new));
        }
        let (Some(canary), Some(stable)) = self.waiting else { return };
        let (canary_requests, stable_requests) = (super::float(canary.1), super::float(stable.1));
        let (hits, misses) = (super::float(canary.0), super::float(stable.0));
        let share = self.burst.take(self.waited, hits + misses);
        // A share of 0, 1 or NaN (no requests) says nothing, and is ignored there.
        let share_of_requests = canary_requests / (canary_requests + stable_requests);
        let p = if share_of_requests.is_nan() { share_of_requests } else { share_of_requests.max(weight) };
        self.wealth.observe(p, hits * share, misses * share);
        self.waiting = (None, None);
        self.waited = Duration::ZERO;
    }

    pub(super) const fn wealth(&self) -> &Wealth {
        &self.wealth
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn evidence(&self) -> CounterEvidence {
        CounterEvidence { name: self.name.clone(), canary: self.canary, stable: self.stable }
    }
}

fn add(a: Reading, b: Reading) -> Reading {
    (a.0.saturating_add(b.0), a.1.saturating_add(b.1))
}
