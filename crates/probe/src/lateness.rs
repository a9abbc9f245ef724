//! How late checks begin: a histogram of fixed size that costs one atomic addition per check.
//!
//! Buckets are exact below 16 µs and then split each power of two into 16, so a quantile is at most 1/16 too high; the
//! layout is that of `HdrHistogram` (<http://hdrhistogram.org>) with 4 significant bits.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

const SUB: u64 = 1 << SUB_BITS;
const SUB_BITS: u32 = 4;
/// Covers everything below 2^36 µs, which is 19 hours; what is later counts as that.
const BUCKETS: usize = (36 - 4 + 1) * 16;

/// Snapshot of how late checks began.
#[derive(Clone, Debug, Default)]
pub struct Lateness {
    /// First checks of a target, which are due at once: many targets that appear together wait for each other here.
    pub first: Distribution,
    /// All others.
    pub repeated: Distribution,
    /// Checks that were left out, because the one before was still running or the whole machine stood still.
    pub skipped: u64,
}

/// Counted durations.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    buckets: Vec<u64>,
    max: Duration,
}

impl Distribution {
    /// How many.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// What was added since an earlier snapshot of the same. Its longest is then at most 1/16 too high.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.buckets.iter().chain(std::iter::repeat(&0));
        let buckets: Vec<u64> = self.buckets.iter().zip(before).map(|(now, then)| now.saturating_sub(*then)).collect();
        let last = buckets.iter().rposition(|n| *n > 0).map_or(0, last_in);
        Self { buckets, max: Duration::from_micros(last).min(self.max) }
    }

    /// The longest, exactly.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The duration that a share `q` (0 to 1) of all do not exceed, at most 1/16 too high. Zero if there are none.
    pub fn quantile(&self, q: f64) -> Duration {
        let count = self.count();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank; counts stay far below 2^52 and q is clamped"
        )]
        let rank = ((q.clamp(0.0, 1.0) * count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return Duration::from_micros(last_in(index)).min(self.max);
            }
        }
        self.max
    }
}

/// A histogram that is written from many tasks.
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
    max_micros: AtomicU64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max_micros: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, value: Duration) {
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].fetch_add(1, Relaxed);
        self.max_micros.fetch_max(micros, Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Distribution {
        Distribution {
            buckets: self.buckets.iter().map(|n| n.load(Relaxed)).collect(),
            max: Duration::from_micros(self.max_micros.load(Relaxed)),
        }
    }
}

fn bucket(micros: u64) -> usize {
    if micros < SUB {
        return usize::try_from(micros).expect("below 16");
    }
    let octave = u64::from(micros.ilog2() - SUB_BITS);
    let index = (octave + 1) * SUB + ((micros >> octave) - SUB);
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest value that falls into a bucket.
fn last_in(index: usize) -> u64 {
    let index = index as u64;
    if index < SUB {
        return index;
    }
    let octave = index / SUB - 1;
    (((index % SUB) + SUB + 1) << octave) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_values_and_is_at_most_a_sixteenth_too_high(micros in 0..(1u64 << 36)) {
            let last = last_in(bucket(micros));
            prop_assert!(last >= micros);
            prop_assert!(last - micros <= micros / 16);
        }
    }

    #[test]
    fn quantiles() {
        let histogram = Histogram::new();
        assert_eq!(histogram.snapshot().quantile(0.99), Duration::ZERO);
        for ms in 1..=100 {
            histogram.add(Duration::from_millis(ms));
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 100);
        assert_eq!(snapshot.max(), Duration::from_millis(100));
        let p50 = snapshot.quantile(0.5).as_micros();
        assert!((50_000..=53_200).contains(&p50), "{p50}");
        assert_eq!(snapshot.quantile(1.0), Duration::from_millis(100));
        histogram.add(Duration::from_millis(10));
        let since = histogram.snapshot().since(&snapshot);
        assert_eq!(since.count(), 1);
        assert!((10_000..=10_700).contains(&since.max().as_micros()), "{:?}", since.max());
        histogram.add(Duration::MAX);
        assert_eq!(histogram.snapshot().count(), 102, "a value beyond the range is counted too");
    }
}
