//! Connections of clients, known so that some can be let go when there are too many: those that keep us waiting for
//! what they began, then those that are idle longest.
//!
//! A client that opens connections and leaves them idle, or begins on each what it never ends, must not keep others out.
//! Each connection is entered once when it is accepted and notes by itself since when it waits for what, which costs a
//! store; only under pressure are they looked through. Requests that are being answered are never among them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::time::Instant;

use crate::{clock, stream::Socket};

/// Parts of the table, so that threads rarely meet.
const SHARDS: usize = 16;
/// Whoever began something may keep us waiting for the rest for this long, even if others are kept out: milliseconds.
const FAIR: u64 = 1000;
/// Of those that keep us waiting for longer, so many go where one that is idle would.
const AT_ONCE: usize = 16;

/// All connections of clients.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Known>>; SHARDS],
}

#[derive(Debug)]
struct Known {
    socket: Weak<Socket>,
    lull: Arc<Lull>,
}

/// A connection among the others; forgotten when dropped.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    all: &'a Connections,
    number: u64,
}

/// What a connection that has no request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaits {
    /// A request.
    Request,
    /// The rest of what its client began: a handshake, a head. A client that connected began one.
    Rest,
}

/// What is awaited of a client, and since when: one word, which its connection writes and others look at.
#[derive(Debug, Default)]
pub(crate) struct Lull(AtomicU64);

impl Lull {
    /// Notes it.
    pub(crate) fn begins(&self, awaits: Awaits, since: Instant) {
        let rest = u64::from(awaits == Awaits::Rest);
        self.0.store(clock::millis(clock::of(since)) << 1 | rest, Ordering::Relaxed);
    }

    /// Nothing is awaited of the client.
    pub(crate) fn ends(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn get(&self) -> Option<(Awaits, u64)> {
        let word = self.0.load(Ordering::Relaxed);
        let awaits = if word & 1 == 1 { Awaits::Rest } else { Awaits::Request };
        (word > 0).then_some((awaits, word >> 1))
    }
}

impl Connections {
    fn shard(&self, number: u64) -> std::sync::MutexGuard<'_, HashMap<u64, Known>> {
        let shard = usize::try_from(number % SHARDS as u64).unwrap_or(0);
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection.
    pub(crate) fn enter(&self, socket: &Arc<Socket>, lull: &Arc<Lull>) -> Entry<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(number).insert(number, Known { socket: Arc::downgrade(socket), lull: Arc::clone(lull) });
        Entry { all: self, number }
    }

    /// Makes room: lets those go that keep us waiting, at most [`AT_ONCE`] times `count`; if there are none, at most
    /// `count` of those that are idle. The longest first. Returns how many that were.
    pub(crate) fn evict(&self, count: usize) -> usize {
        let now = clock::millis(clock::now());
        let (mut slow, mut idle) = (Vec::new(), Vec::new());
        for number in 0..SHARDS as u64 {
            for known in self.shard(number).values() {
                match known.lull.get() {
                    Some((Awaits::Rest, since)) if now.saturating_sub(since) >= FAIR => {
                        slow.extend(known.socket.upgrade().map(|socket| (since, socket)));
                    }
                    Some((Awaits::Request, since)) => {
                        idle.extend(known.socket.upgrade().map(|socket| (since, socket)));
                    }
                    _ => {}
                }
            }
        }
        let mut leaving = longest(slow, count * AT_ONCE);
        if leaving.is_empty() {
            leaving = longest(idle, count);
        }
        for socket in &leaving {
            // A request that is on its way meets the end of the connection, as after any time of idleness.
            socket.end();
        }
        leaving.len()
    }
}

/// At most so many, the longest first. One of which something has arrived that was not read yet waits for us, and stays.
fn longest(mut waiting: Vec<(u64, Arc<Socket>)>, count: usize) -> Vec<Arc<Socket>> {
    waiting.sort_unstable_by_key(|(since, _)| *since);
    waiting.into_iter().map(|(_, socket)| socket).filter(|socket| socket.is_quiet()).take(count).collect()
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.all.shard(self.number).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stream::Stream;

    struct Guest {
        stream: Stream,
        lull: Arc<Lull>,
        peer: tokio::net::TcpStream,
    }

    /// A connection that awaits something for so long, or has a request.
    async fn guest(lull: Option<(Awaits, Duration)>) -> Guest {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = Stream::connect(listener.local_addr().unwrap()).await.unwrap();
        let guest = Guest { stream, lull: Arc::default(), peer: listener.accept().await.unwrap().0 };
        if let Some((awaits, age)) = lull {
            guest.lull.begins(awaits, Instant::now().checked_sub(age).unwrap());
        }
        guest
    }

    #[tokio::test]
    async fn whoever_keeps_us_waiting_goes_first_and_whoever_is_answered_stays() {
        let seconds = Duration::from_secs;
        clock::now();
        // Moments before the clock's start are its start.
        tokio::time::pause();
        tokio::time::advance(seconds(1000)).await;
        let all = Connections::default();
        let busy = guest(None).await;
        let fresh = guest(Some((Awaits::Rest, seconds(0)))).await;
        let slow = [guest(Some((Awaits::Rest, seconds(2)))).await, guest(Some((Awaits::Rest, seconds(9)))).await];
        let unread = guest(Some((Awaits::Rest, seconds(9)))).await;
        let asks = guest(Some((Awaits::Request, seconds(99)))).await;
        for one in [&unread, &asks] {
            one.peer.try_write(b"GET / HTTP/1.1").unwrap();
            while one.stream.socket().is_quiet() {
                tokio::task::yield_now().await;
            }
        }
        let idle =
            [guest(Some((Awaits::Request, seconds(3)))).await, guest(Some((Awaits::Request, seconds(50)))).await];
        let _entries = [&busy, &fresh, &slow[0], &slow[1], &unread, &asks, &idle[0], &idle[1]]
            .map(|guest| all.enter(guest.stream.socket(), &guest.lull));
        // What was ended is quiet no more: it reads as the end.
        let ended = |guest: &Guest| !guest.stream.socket().is_quiet();
        assert_eq!(all.evict(1), 2, "all that are slow, though one of those idle would do");
        assert!(slow.iter().all(ended) && !idle.iter().any(ended) && !ended(&busy) && !ended(&fresh));
        for guest in &slow {
            guest.lull.ends();
        }
        assert_eq!(all.evict(1), 1);
        assert!(ended(&idle[1]) && !ended(&idle[0]), "the one that is idle longest");
        idle[1].lull.ends();
        assert_eq!(all.evict(5), 1);
        assert!(ended(&idle[0]) && !ended(&busy) && !ended(&fresh));
    }
}
