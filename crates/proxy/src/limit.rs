//! How many requests per second one client may make.
//!
//! A token bucket per client that holds one second's worth, kept as the one moment at which it is full again (the
//! generic cell rate algorithm, ITU-T I.371 annex A, which is the same thing): a bucket that is full need not be kept at
//! all. The table is bounded; under more clients than it holds, those that are nearest to full are forgotten first,
//! which errs to the clients' favour.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Parts of the table, so that threads rarely meet.
const SHARDS: usize = 16;
/// Clients per part: 64 Ki in all, about 2 MiB.
const CLIENTS: usize = 4096;

/// Clients that asked within the last second.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    shards: [Mutex<Shard>; SHARDS],
}

/// By client: when its bucket is full again, in nanoseconds.
#[derive(Debug, Default)]
struct Shard(HashMap<u64, u64>);

impl Clients {
    /// Takes a token of this client (a hash). Refused, returns how long it takes until there is one again.
    pub(crate) fn admit(&self, client: u64, per_second: u32, now: Duration) -> Result<(), Duration> {
        let shard = usize::try_from(client % SHARDS as u64).unwrap_or(0);
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner).admit(client, per_second, now)
    }
}

impl Shard {
    fn admit(&mut self, client: u64, per_second: u32, now: Duration) -> Result<(), Duration> {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let per_second = u64::from(per_second.max(1));
        let interval = 1_000_000_000 / per_second;
        // A full bucket lets as many pass at once as one second brings.
        let burst = interval * (per_second - 1);
        let full = self.0.get(&client).copied().unwrap_or(0).max(now);
        if full - now > burst {
            return Err(Duration::from_nanos(full - now - burst));
        }
        if self.0.len() >= CLIENTS && !self.0.contains_key(&client) {
            self.forget(now);
        }
        self.0.insert(client, full + interval);
        Ok(())
    }

    /// Makes room: full buckets say nothing; then the quarter that is nearest to full.
    fn forget(&mut self, now: u64) {
        self.0.retain(|_, full| *full > now);
        if self.0.len() >= CLIENTS {
            let mut moments: Vec<u64> = self.0.values().copied().collect();
            let (_, quarter, _) = moments.select_nth_unstable(CLIENTS / 4);
            let quarter = *quarter;
            self.0.retain(|_, full| *full > quarter);
        }
        if self.0.len() >= CLIENTS {
            // All at the very same moment.
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assign::mix;

    /// Law: over any stretch of time a client gets at most one second's worth and what the time brought, and one that
    /// never asks for more than its rate is never refused.
    #[test]
    fn nobody_gets_more_than_burst_and_rate_and_who_keeps_to_the_rate_gets_everything() {
        for seed in 0..200_u64 {
            let rate = u32::try_from(mix(seed) % 500).unwrap() + 1;
            let (mut shard, mut now, mut passed) = (Shard::default(), Duration::ZERO, Vec::new());
            for step in 0..2_000_u64 {
                now += Duration::from_micros(mix(seed << 32 | step) % (2_000_000 / u64::from(rate)));
                match shard.admit(7, rate, now) {
                    Ok(()) => passed.push(now),
                    Err(wait) => {
                        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
                        // Told the truth: then there is one, and not much before.
                        let mut later = Shard(shard.0.clone());
                        assert_eq!(later.admit(7, rate, now + wait), Ok(()));
                        assert!(later.admit(7, rate, (now + wait).saturating_sub(Duration::from_nanos(2))).is_err());
                    }
                }
            }
            for (index, from) in passed.iter().enumerate() {
                for (count, to) in passed[index..].iter().enumerate().skip(1) {
                    let time = to.saturating_sub(*from);
                    let allowed = f64::from(rate) * (1.0 + time.as_secs_f64()) + 1.0;
                    let count = f64::from(u32::try_from(count).unwrap());
                    assert!(count <= allowed, "{count} in {time:?} at {rate}/s");
                }
            }
            let mut steady = Shard::default();
            let every = Duration::from_nanos(1_000_000_000_u64.div_ceil(u64::from(rate)));
            assert!((0..1_000).all(|turn| steady.admit(1, rate, every * turn).is_ok()), "{rate}");
        }
    }

    #[test]
    fn a_bucket_holds_one_second_and_clients_have_their_own() {
        let clients = Clients::default();
        let at = Duration::from_secs(100);
        assert_eq!((0..15).filter(|_| clients.admit(1, 10, at).is_ok()).count(), 10);
        assert_eq!(clients.admit(1, 10, at), Err(Duration::from_millis(100)));
        assert_eq!(clients.admit(2, 10, at), Ok(()));
        assert_eq!(clients.admit(1, 10, at + Duration::from_millis(100)), Ok(()));
    }

    #[test]
    fn the_table_is_bounded_and_the_busiest_stay_in_it() {
        let mut shard = Shard::default();
        let at = Duration::from_secs(1);
        while shard.admit(0, 100, at).is_ok() {}
        for client in 1..1_000_000 {
            shard.admit(client, 100, at).unwrap();
            assert!(shard.0.len() <= CLIENTS);
        }
        assert!(shard.admit(0, 100, at).is_err(), "whoever used up its tokens is not forgotten for others");
        // Later nobody counts any more.
        shard.admit(5, 100, at + Duration::from_secs(2)).unwrap();
        shard.forget(u64::try_from(Duration::from_secs(4).as_nanos()).unwrap());
        assert!(shard.0.is_empty());
    }
}
