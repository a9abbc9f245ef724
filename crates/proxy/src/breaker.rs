//! Circuit breaker: how much of a route may be under way at a time.
//!
//! `total` refuses at once. `per_instance` lets requests wait as they do without an instance: in the same bounded queue,
//! for the same time. Each end of a request lets the first of those who wait look again; a newcomer does not overtake
//! them. Routes without bounds carry nothing of this.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::sync::Notify;

/// What is under way on a bounded route.
#[derive(Debug, Default)]
pub(crate) struct Load {
    under_way: AtomicU32,
    /// Requests that wait because every instance is full.
    pub(crate) crowd: AtomicU32,
    /// Told when something ended.
    pub(crate) room: Notify,
}

/// A place among what is under way; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Load>);

impl Load {
    /// Takes a place; with `total` others it is refused. Zero is no bound.
    pub(crate) fn enter(self: &Arc<Self>, total: u32) -> Option<Place> {
        let step = |count: u32| (total == 0 || count < total).then_some(count + 1);
        self.under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).ok()?;
        Some(Place(Arc::clone(self)))
    }

    /// Whether somebody waits for room, who comes first.
    pub(crate) fn is_crowded(&self) -> bool {
        self.crowd.load(Ordering::Acquire) > 0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
        if self.0.is_crowded() {
            self.0.room.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assign::mix;

    /// Law: at no time is more under way than allowed, and a place that was given back can be taken.
    #[test]
    fn the_bound_holds_and_places_come_back() {
        for seed in 0..50_u64 {
            let total = u32::try_from(mix(seed) % 20).unwrap() + 1;
            let (load, mut places) = (Arc::new(Load::default()), Vec::new());
            for step in 0..1_000_u64 {
                let draw = mix(seed << 32 | step);
                if draw % 5 < 3 {
                    let place = load.enter(total);
                    assert_eq!(place.is_some(), places.len() < total as usize);
                    places.extend(place);
                } else if !places.is_empty() {
                    places.swap_remove(usize::try_from(draw >> 8).unwrap() % places.len());
                }
                assert!(places.len() <= total as usize);
            }
            drop(places);
            assert_eq!(load.under_way.load(Ordering::Relaxed), 0);
        }
        let (unbounded, count) = (Arc::new(Load::default()), 100);
        let places: Vec<_> = (0..count).map(|_| unbounded.enter(0).unwrap()).collect();
        assert_eq!(places.len(), count);
    }

    #[test]
    fn threads_never_exceed_the_bound() {
        let load = Arc::new(Load::default());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let load = Arc::clone(&load);
                std::thread::spawn(move || {
                    for _ in 0..20_000 {
                        let place = load.enter(2);
                        assert!(load.under_way.load(Ordering::SeqCst) <= 2);
                        drop(place);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
