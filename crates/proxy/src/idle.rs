//! Connections of clients, known so that those that are idle longest can be let go when there are too many.
//!
//! A client that opens connections and leaves them idle must not keep others out. Each connection is entered once when
//! it begins and notes by itself since when it is idle, which costs a store; only under pressure are they looked through.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::exchange::body::ClientConnection;

/// Parts of the table, so that threads rarely meet.
const SHARDS: usize = 16;

/// All connections that carry requests.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Weak<ClientConnection>>>; SHARDS],
}

/// A connection among the others; forgotten when dropped.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    all: &'a Connections,
    number: u64,
}

impl Connections {
    fn shard(&self, number: u64) -> std::sync::MutexGuard<'_, HashMap<u64, Weak<ClientConnection>>> {
        let shard = usize::try_from(number % SHARDS as u64).unwrap_or(0);
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection.
    pub(crate) fn enter(&self, connection: &Arc<ClientConnection>) -> Entry<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(number).insert(number, Arc::downgrade(connection));
        Entry { all: self, number }
    }

    /// Lets at most so many go, those that are idle longest first; returns how many that were.
    pub(crate) fn evict(&self, count: usize) -> usize {
        let mut idle: Vec<(u64, Arc<ClientConnection>)> = Vec::new();
        for number in 0..SHARDS as u64 {
            let living: Vec<_> = self.shard(number).values().filter_map(Weak::upgrade).collect();
            idle.extend(living.into_iter().filter_map(|connection| Some((connection.idle_since()?, connection))));
        }
        idle.sort_unstable_by_key(|(since, _)| *since);
        idle.truncate(count);
        for (_, connection) in &idle {
            // A request that is on its way meets the end of the connection, as after any time of idleness.
            connection.socket.end();
        }
        idle.len()
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.all.shard(self.number).remove(&self.number);
    }
}
