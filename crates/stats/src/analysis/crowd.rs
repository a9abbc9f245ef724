//! Evidence that does not rest on one client.
//!
//! Clients fall into 64 groups by their hash. Beside the wealth over all bad responses there is one for each group that
//! has had any, over all responses *but* that group's: a leave-one-out that stays a fair bet, and exact, because each of
//! them is a wealth like any other. Whatever one client does, the wealth without its group knows nothing of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wealth::Wealth;

const GROUPS: u64 = 64;

/// Bad responses at one weight, of one group of clients: the canary's part and the stable release's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) group: u8,
    pub(super) weight: f64,
    pub(super) canary: f64,
    pub(super) stable: f64,
}

/// The group of a client.
pub(super) fn group(client: u64) -> u8 {
    // Multiplied first: the caller's hash may be a counter.
    u8::try_from((client.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % GROUPS).unwrap_or(0)
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

    /// Takes in the bad responses of one look.
    pub(super) fn observe(&mut self, parts: &[Part]) {
        if parts.is_empty() {
            return;
        }
        for part in parts {
            // Until now it had nothing to leave out.
            self.without.entry(part.group).or_insert_with(|| self.all.clone());
        }
        self.all.observe_all(&merged(parts, None));
        for (group, wealth) in &mut self.without {
            wealth.observe_all(&merged(parts, Some(*group)));
        }
    }

    /// The wealth over all.
    pub(super) const fn all(&self) -> &Wealth {
        &self.all
    }

    /// Logarithm of what is left of the wealth without the client that contributes most.
    pub(super) fn ln_without_one(&self) -> f64 {
        self.without.values().map(Wealth::ln).fold(self.all.ln(), f64::min)
    }
}

/// Sums by weight.
fn merged(parts: &[Part], without: Option<u8>) -> Vec<(f64, f64, f64)> {
    let mut sums: Vec<(f64, f64, f64)> = Vec::new();
    for part in parts.iter().filter(|part| Some(part.group) != without) {
        match sums.iter_mut().find(|(weight, ..)| weight.to_bits() == part.weight.to_bits()) {
            Some(sum) => {
                sum.1 += part.canary;
                sum.2 += part.stable;
            }
            None => sums.push((part.weight, part.canary, part.stable)),
        }
    }
    sums
}
