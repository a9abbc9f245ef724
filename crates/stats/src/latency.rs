//! How late is bad: an explicit bound, or the stable release's own latency, frozen at the start.
//!
//! A bound makes "slow" a yes-or-no property of a response, and both arms are held to the same bound. So lateness runs
//! through the same test as errors do: it does not matter that some of the stable release's responses are late too, only
//! that the canary has more than its share of them. The bound is frozen because a bound that follows the stable release
//! would follow a common slowdown into the comparison.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets per doubling: a quantile is exact to 9 %.
const PER_DOUBLING: f64 = 8.0;
/// The upper edge of the first bucket.
const FIRST: f64 = 50e-6;
/// 50 µs times 2^(232/8) is 7.5 hours.
const BUCKETS: usize = 233;

/// Durations in buckets that grow by 9 %, from 50 µs to 7 hours: 2 kB, whatever is put in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u16, u64)>", into = "Vec<(u16, u64)>")]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        self.add(bucket(duration), 1);
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (at, &count) in other.counts.iter().enumerate() {
            self.add(at, count);
        }
    }

    /// How many durations were counted.
    pub const fn count(&self) -> u64 {
        self.total
    }

    /// The duration that a share `quantile` (0 to 1) of all does not exceed, rounded up by at most 9 %. `None` if there
    /// are none.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        if self.total == 0 || quantile.is_nan() {
            return None;
        }
        let mut below = 0.0;
        #[expect(clippy::cast_precision_loss, reason = "a count beyond 2^52 does not need its last digits")]
        let rank = (self.total as f64 * quantile.clamp(0.0, 1.0)).max(1.0);
        for (at, &count) in self.counts.iter().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "as above")]
            let count = count as f64;
            below += count;
            if below >= rank && count > 0.0 {
                return Some(edge(at));
            }
        }
        self.counts.iter().rposition(|&count| count > 0).map(edge)
    }

    fn add(&mut self, at: usize, count: u64) {
        let at = at.min(BUCKETS - 1);
        self.counts[at] = self.counts[at].saturating_add(count);
        self.total = self.total.saturating_add(count);
    }
}

impl From<Vec<(u16, u64)>> for Histogram {
    fn from(filled: Vec<(u16, u64)>) -> Self {
        let mut histogram = Self::default();
        for (at, count) in filled {
            histogram.add(usize::from(at), count);
        }
        histogram
    }
}

impl From<Histogram> for Vec<(u16, u64)> {
    fn from(histogram: Histogram) -> Self {
        (0_u16..).zip(histogram.counts).filter(|(_, count)| *count > 0).collect()
    }
}

fn bucket(duration: Duration) -> usize {
    let doublings = (duration.as_secs_f64() / FIRST).max(1.0).log2();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the logarithm of a number of at least 1 and at most 2^64 seconds"
    )]
    let at = (doublings * PER_DOUBLING).ceil() as usize;
    at.min(BUCKETS - 1)
}

fn edge(at: usize) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "below 233")]
    let doublings = at as f64 / PER_DOUBLING;
    // Whole microseconds, so that it reads well.
    Duration::from_micros(Duration::from_secs_f64(FIRST * doublings.exp2()).as_micros().try_into().unwrap_or(u64::MAX))
}

/// How a bound is taken from the stable release.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Freeze {
    /// The quantile of the stable release's latency (0 to 1).
    pub quantile: f64,
    /// A response is late above so many times the quantile,
    pub factor: f64,
    /// and above the quantile by at least this.
    pub slack: Duration,
    /// With fewer durations than this there is no bound, and lateness is not judged.
    pub min_samples: u64,
}

impl Default for Freeze {
    fn default() -> Self {
        Self { quantile: 0.95, factor: 1.5, slack: Duration::from_millis(10), min_samples: 200 }
    }
}

/// The bound above which a response is late, from the stable release's latencies so far. `None` while there are too few.
///
/// The default needs 200 responses: the quantile then has ten of them above it.
pub fn frozen_bound(stable: &Histogram, freeze: &Freeze) -> Option<Duration> {
    if stable.count() < freeze.min_samples.max(1) {
        return None;
    }
    let quantile = stable.quantile(freeze.quantile)?;
    let factor = if freeze.factor.is_nan() { 1.0 } else { freeze.factor.clamp(1.0, 1e3) };
    let scaled = Duration::try_from_secs_f64(quantile.as_secs_f64() * factor).unwrap_or(Duration::MAX);
    Some(scaled.max(quantile.saturating_add(freeze.slack)))
}

/// The bounds in force, for the report; the data plane applies them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// For the whole response.
    pub whole: Option<Duration>,
    /// For its first byte.
    pub first_byte: Option<Duration>,
    /// For its first token.
    pub first_token: Option<Duration>,
}
