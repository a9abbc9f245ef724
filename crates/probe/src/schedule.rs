//! When each check is due: pure arithmetic on [`Now`], no clock and no task.
//!
//! The first check of a target is due at once. The others lie on a grid of `every` that begins one phase later, the
//! phase being a hash of the id spread evenly over the interval:
//!
//! ```text
//! start      start+phase      start+phase+every      start+phase+2·every
//!   |--phase-----|-----every--------|------every----------|
//!   1st          2nd                3rd                   4th        0 < phase <= every
//! ```
//!
//! Targets that appear in the same instant are thus asked in one burst only once, and a target never waits longer than
//! `every`. Slots are computed from the grid, never from when a check ran, so they do not drift. A slot that comes
//! while the check before is still running is left out, and so are slots that passed while nobody looked (a suspended
//! machine): there is never a burst to catch up.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use orchestra_model::Now;

use crate::target::ProbeId;

/// Shortest interval; a shorter one is taken as this.
pub(crate) const MIN_EVERY: Duration = Duration::from_millis(1);

/// Deadlines of all targets, each with a value of the caller's.
pub(crate) struct Schedule<T> {
    entries: HashMap<ProbeId, Entry<T>>,
    /// The same deadlines in order. A tree and not a heap: a removed target leaves nothing behind.
    queue: BTreeSet<(Now, ProbeId)>,
    skipped: u64,
}

struct Entry<T> {
    value: T,
    every: Duration,
    /// Next slot.
    due: Now,
    /// What the slot after the first one is measured from; `None` once the first check was handed out.
    start: Option<Now>,
    running: bool,
}

/// A check that is due.
pub(crate) struct Due<'a, T> {
    pub(crate) id: ProbeId,
    /// When it was due.
    pub(crate) at: Now,
    /// Whether it is the first of its target.
    pub(crate) first: bool,
    pub(crate) value: &'a mut T,
}

impl<T> Schedule<T> {
    pub(crate) fn new() -> Self {
        Self { entries: HashMap::new(), queue: BTreeSet::new(), skipped: 0 }
    }

    /// Adds a target that is due at once; returns the value of the one that it replaces.
    pub(crate) fn set(&mut self, now: Now, id: ProbeId, every: Duration, value: T) -> Option<T> {
        let before = self.remove(id);
        self.queue.insert((now, id));
        let every = every.max(MIN_EVERY);
        self.entries.insert(id, Entry { value, every, due: now, start: Some(now), running: false });
        before
    }

    pub(crate) fn remove(&mut self, id: ProbeId) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        self.queue.remove(&(entry.due, id));
        Some(entry.value)
    }

    pub(crate) fn get(&self, id: ProbeId) -> Option<&T> {
        self.entries.get(&id).map(|entry| &entry.value)
    }

    pub(crate) fn get_mut(&mut self, id: ProbeId) -> Option<&mut T> {
        self.entries.get_mut(&id).map(|entry| &mut entry.value)
    }

    /// The next deadline.
    pub(crate) fn deadline(&self) -> Option<Now> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Slots that were left out so far.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Hands out the earliest check that is due at `now` and moves its target on. The target counts as running until
    /// [`Self::finished`]. `None` if nothing is due.
    pub(crate) fn next_due(&mut self, now: Now) -> Option<Due<'_, T>> {
        loop {
            let &(at, id) = self.queue.first().filter(|(at, _)| *at <= now)?;
            self.queue.pop_first();
            let entry = self.entries.get_mut(&id).expect("every queued id has an entry");
            let first = entry.start.is_some();
            let next = match entry.start.take() {
                Some(start) => start + phase(id, entry.every),
                None => at + entry.every,
            };
            let missed = missed_slots(next, entry.every, now);
            self.skipped = self.skipped.saturating_add(missed);
            entry.due = next + times(entry.every, missed);
            self.queue.insert((entry.due, id));
            if entry.running {
                self.skipped = self.skipped.saturating_add(1);
                continue;
            }
            entry.running = true;
            let entry = self.entries.get_mut(&id).expect("found above");
            return Some(Due { id, at, first, value: &mut entry.value });
        }
    }

    /// The check that was handed out last for this target has ended.
    pub(crate) fn finished(&mut self, id: ProbeId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.running = false;
        }
    }
}

/// How many slots from `next` on lie at or before `now`.
fn missed_slots(next: Now, every: Duration, now: Now) -> u64 {
    if next > now {
        return 0;
    }
    let slots = now.since(next).as_nanos() / every.as_nanos() + 1;
    u64::try_from(slots).unwrap_or(u64::MAX)
}

fn times(every: Duration, n: u64) -> Duration {
    let nanos = every.as_nanos().saturating_mul(u128::from(n));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Where in its interval a target is asked: above zero, at most `every`.
fn phase(id: ProbeId, every: Duration) -> Duration {
    let nanos = every.as_nanos();
    let share = (u128::from(mix(id.0)) * nanos) >> 64;
    Duration::from_nanos(u64::try_from(nanos - share).unwrap_or(u64::MAX))
}

/// Finaliser of `SplitMix64` (Steele, Lea, Flood 2014): ids that follow each other land far apart.
fn mix(id: u64) -> u64 {
    let mut z = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
