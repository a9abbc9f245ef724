//! How much one client, and one moment, may contribute.
//!
//! One client that sends the same poisonous request again and again, or one stall that makes everything late that is in
//! flight, is one piece of evidence and not a hundred. Both caps choose how much of a group counts by the size of the
//! group alone, never by which arm it fell on, so that the test stays valid (see [`crate::wealth`]): the cap of a client is
//! over both arms together. A cap per arm would be a trap: a client whose requests are always bad would reach it on
//! both, and 20 % of weight would look like half of the bad responses.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Clients with bad responses that are told apart; all further ones share one cap.
pub const MAX_CLIENTS: usize = 4096;

/// Sessions of the canary of which it is remembered that they were seen.
pub const MAX_SEEN: usize = 2048;

/// How many bad responses of each client have counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Caps {
    counted: BTreeMap<u64, u32>,
    others: u32,
    age: Duration,
}

impl Caps {
    /// Lets time pass; after `window` every client may contribute again. `None`: never.
    pub fn pass(&mut self, time: Duration, window: Option<Duration>) {
        let Some(window) = window else { return };
        self.age = self.age.saturating_add(time);
        if self.age >= window {
            *self = Self::default();
        }
    }

    /// How many of `bad` responses of `client` count, given that at most `cap` may.
    pub fn take(&mut self, client: u64, bad: u64, cap: u32) -> u32 {
        let full = self.counted.len() >= MAX_CLIENTS;
        let counted = match self.counted.get_mut(&client) {
            Some(counted) => counted,
            None if full => &mut self.others,
            None => self.counted.entry(client).or_insert(0),
        };
        let take = cap.saturating_sub(*counted).min(u32::try_from(bad).unwrap_or(u32::MAX));
        *counted += take;
        take
    }
}

/// Bad responses beyond the usual that may count: a bucket that fills with time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Burst {
    /// Events beyond the usual that may count in a second.
    rate: f64,
    /// What may count now.
    level: f64,
    /// The median number of bad responses in a second: a stall now and then does not move it, steady errors do.
    usual: f64,
    /// The second that is being counted: how much of it has passed, and how many were bad.
    second: (f64, f64),
}

/// The bucket holds what flows in during so many seconds, and one event at least.
const DEPTH: f64 = 2.0;

/// The estimate of the median moves by this share of itself and a bit with each second: it follows a tenfold change in
/// about half a minute.
const MEDIAN_STEP: (f64, f64) = (0.1, 0.5);

impl Burst {
    /// A full bucket for `rate` events per second beyond the usual.
    pub fn new(rate: f64) -> Self {
        Self { rate, level: (rate * DEPTH).max(1.0), usual: 0.0, second: (0.0, 0.0) }
    }

    /// The share (0 to 1) of `bad` responses of the last `time` that counts.
    pub fn take(&mut self, time: Duration, bad: f64) -> f64 {
        let seconds = time.as_secs_f64().min(3600.0);
        let bad = bad.clamp(0.0, 1e12);
        // The usual number is that before this look, so that a surge does not excuse itself.
        let flow = self.rate + self.usual;
        self.level = (self.level + flow * seconds).min((flow * DEPTH.max(seconds)).max(1.0));
        self.second = (self.second.0 + seconds, self.second.1 + bad);
        if self.second.0 >= 1.0 {
            let step = MEDIAN_STEP.0 * (self.usual + MEDIAN_STEP.1);
            let above = self.second.1 > self.usual * self.second.0;
            self.usual = if above { self.usual + step } else { (self.usual - step).max(0.0) };
            self.second = (0.0, 0.0);
        }
        if bad <= 0.0 {
            return 1.0;
        }
        let taken = bad.min(self.level);
        self.level -= taken;
        taken / bad
    }
}

/// Distinct clients, counted up to a bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distinct(BTreeSet<u64>);

impl Distinct {
    /// Beyond this it says "so many or more".
    pub const MAX: usize = 64;

    /// Notes a client.
    pub fn insert(&mut self, client: u64) {
        if self.0.len() < Self::MAX {
            self.0.insert(client);
        }
    }

    /// How many, at most [`Self::MAX`].
    pub fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }
}

/// Sessions on the canary, each counted once: whether it has had a bad response.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions(BTreeMap<u64, bool>);

impl Sessions {
    /// What a session's responses add to the numbers of bad and of good sessions. A session that was good and becomes
    /// bad takes its good one back. After [`MAX_SEEN`] sessions all are forgotten, and count again.
    pub fn note(&mut self, client: u64, bad: bool) -> (f64, f64) {
        match self.0.get_mut(&client) {
            Some(was) if bad && !*was => {
                *was = true;
                (1.0, -1.0)
            }
            Some(_) => (0.0, 0.0),
            None => {
                if self.0.len() >= MAX_SEEN {
                    self.0.clear();
                }
                self.0.insert(client, bad);
                if bad { (1.0, 0.0) } else { (0.0, 1.0) }
            }
        }
    }
}
