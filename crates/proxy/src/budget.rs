//! How many retries a route may make: a share of its requests over the last ten seconds, and always a few.
//!
//! Without a budget retries multiply the load of an instance that fails because of its load. Both counts are kept per
//! second in atomics that are taken over by a later second once they are old, so that a request costs one addition.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Seconds that count.
const WINDOW: u64 = 10;
/// More than [`WINDOW`], so that a slot is not taken over while it counts.
const SLOTS: usize = 16;
/// Retries that are always allowed.
const LEAST: u64 = 10;
/// A slot is its second in the high and its count in the low half.
const HALF: u64 = 0xFFFF_FFFF;

/// Events of the last seconds.
#[derive(Debug, Default)]
struct Counter([AtomicU64; SLOTS]);

impl Counter {
    fn slot(&self, second: u64) -> &AtomicU64 {
        &self.0[usize::try_from(second % SLOTS as u64).unwrap_or(0)]
    }

    fn add(&self, second: u64) {
        let slot = self.slot(second);
        let word = slot.load(Ordering::Relaxed);
        if word >> 32 == second & HALF {
            slot.fetch_add(1, Ordering::Relaxed);
        } else {
            let fresh = (second & HALF) << 32 | 1;
            if slot.compare_exchange(word, fresh, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                // Another thread has just taken it over.
                slot.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn sum(&self, second: u64) -> u64 {
        let of = |second: u64| {
            let word = self.slot(second).load(Ordering::Relaxed);
            if word >> 32 == second & HALF { word & HALF } else { 0 }
        };
        (second.saturating_sub(WINDOW - 1)..=second).map(of).sum()
    }
}

/// Requests and retries of a route.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    requests: Counter,
    retries: Counter,
}

impl Budget {
    /// A request began.
    pub(crate) fn began(&self, now: Duration) {
        // The first second must differ from a slot that was never used.
        self.requests.add(now.as_secs() + 1);
    }

    /// Whether one more retry is allowed; if so, it is counted.
    pub(crate) fn take(&self, percent: u32, now: Duration) -> bool {
        let second = now.as_secs() + 1;
        let allowed = (self.requests.sum(second) * u64::from(percent) / 100).max(LEAST);
        // Threads that look at the same moment may exceed it by their number.
        let free = self.retries.sum(second) < allowed;
        if free {
            self.retries.add(second);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assign::mix;

    /// Law: in any ten seconds there are at most the share of the requests of those and the ten before them, or ten; and
    /// as long as fewer than ten were made in the last ten seconds, the next is allowed.
    #[test]
    fn retries_keep_to_their_share_of_any_ten_seconds() {
        for seed in 0..100_u64 {
            let (budget, percent) = (Budget::default(), u32::try_from(mix(seed) % 60).unwrap());
            let (mut now, mut requests, mut retries) = (Duration::ZERO, Vec::new(), Vec::new());
            for step in 0..5_000_u64 {
                let draw = mix(seed << 32 | step);
                // Bursts and pauses.
                now += Duration::from_millis(if draw.is_multiple_of(97) { draw % 30_000 } else { draw % 20 });
                if draw.is_multiple_of(3) {
                    let recent = retries.iter().filter(|at| **at + Duration::from_secs(10) > now).count();
                    let allowed = budget.take(percent, now);
                    assert!(allowed || recent >= 10, "{recent} in ten seconds, and refused");
                    if allowed {
                        retries.push(now);
                    }
                } else {
                    budget.began(now);
                    requests.push(now);
                }
            }
            for end in &retries {
                let within = |times: &[Duration], span: u64| {
                    let from = end.saturating_sub(Duration::from_secs(span));
                    times.iter().filter(|at| **at > from && *at <= end).count() as u64
                };
                let allowed = (within(&requests, 20) * u64::from(percent) / 100).max(10);
                // The ten seconds before may lie across eleven whole ones.
                assert!(within(&retries, 9) <= allowed, "{} of {allowed}", within(&retries, 9));
            }
        }
    }

    #[test]
    fn ten_are_always_allowed_and_come_back_after_ten_seconds() {
        let budget = Budget::default();
        let at = Duration::from_secs(1000);
        assert_eq!((0..50).filter(|_| budget.take(20, at)).count(), 10);
        assert!(!budget.take(20, at + Duration::from_secs(9)));
        assert!(budget.take(20, at + Duration::from_secs(10)));
        for _ in 0..1_000 {
            budget.began(at + Duration::from_secs(11));
        }
        assert_eq!((0..500).filter(|_| budget.take(20, at + Duration::from_secs(12))).count(), 199);
    }

    #[test]
    fn threads_that_take_a_slot_over_lose_nothing_but_a_few() {
        let budget = std::sync::Arc::new(Budget::default());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let budget = std::sync::Arc::clone(&budget);
                std::thread::spawn(move || (0..10_000).for_each(|_| budget.began(Duration::from_secs(3))))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(budget.requests.sum(4), 40_000);
    }
}
