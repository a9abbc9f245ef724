//! Evidence that does not rest on one client.
//!
//! Clients fall into 64 groups by their hash. Beside the wealth over all bad responses there is one for each group that
//! has had any, over all *but* that group's bad responses: a leave-one-out that stays a fair bet, and exact, because each of
//! them is a wealth like any other. Whatever one client does, the wealth without its group knows nothing of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wealth::{Look, Wealth};

const GROUPS: u64 = 64;

/// Trials of one group of clients that hit with the same probability under the null hypothesis.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Part {
    /// Whose; `None` for what is never left out.
    pub(super) group: Option<u8>,
    pub(super) p: f64,
    pub(super) hits: f64,
    pub(super) misses: f64,
    /// Hits that do not count; they only move on the moment at which late bettors begin.
    pub(super) idle: f64,
}

/// The group of a client.
pub(super) fn group(client: u64) -> Option<u8> {
    // Multiplied first: the caller's hash may be a counter.
    u8::try_from((client.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % GROUPS).ok()
}

/// A wealth, and the same without each group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Crowd {
    all: Wealth,
    without: BTreeMap<u8, Wealth>,
}

impl Crowd {
    pub(super) fn new(all: Wealth) -> Self {
        Self { all, without: BTreeMap::new() }
    }

    /// Takes in what happened at one moment.
    pub(super) fn observe(&mut self, parts: &[Part]) {
        if parts.is_empty() {
            return;
        }
        for group in parts.iter().filter_map(|part| part.group) {
            // Until now it had nothing to leave out.
            self.without.entry(group).or_insert_with(|| self.all.clone());
        }
        let all = look(&self.all, parts.iter());
        self.all.take(&all);
        for (group, wealth) in &mut self.without {
            if parts.iter().any(|part| part.group == Some(*group)) {
                let own = look(wealth, parts.iter().filter(|part| part.group == Some(*group)));
                wealth.take(&all.without(&own));
            } else {
                wealth.take(&all);
            }
        }
    }

    /// The wealth over all.
    pub(super) const fn all(&self) -> &Wealth {
        &self.all
    }

    /// Logarithm of what counts if a fail must not rest on one client: at most so many times (as a logarithm) what is left
    /// without the client that contributes most.
    pub(super) fn guarded_ln(&self, times: f64) -> f64 {
        let ln = self.all.ln();
        self.without.values().map(|without| without.ln() + times).fold(ln, f64::min)
    }
}

fn look<'a>(wealth: &Wealth, parts: impl Iterator<Item = &'a Part> + Clone) -> Look {
    wealth.look(&merged(parts.clone())).with_idle(parts.map(|part| part.idle).sum())
}

/// Sums by probability.
fn merged<'a>(parts: impl Iterator<Item = &'a Part>) -> Vec<(f64, f64, f64)> {
    let mut sums: Vec<(f64, f64, f64)> = Vec::new();
    for part in parts {
        match sums.iter_mut().find(|(p, ..)| p.to_bits() == part.p.to_bits()) {
            Some(sum) => {
                sum.1 += part.hits;
                sum.2 += part.misses;
            }
            None => sums.push((part.p, part.hits, part.misses)),
        }
    }
    sums
}
