//! A bound on handshakes that are under way, and who gives way when it is reached.
//!
//! A client that says hello and then nothing keeps memory for as long as a handshake may take. Without a bound many such
//! clients use the memory up; with a plain one they keep everybody else out. So the place of whoever keeps us waiting
//! longest goes to whoever comes: one that had a second, and of whom nothing has arrived that was not read yet. A client
//! that only waits for our processor is never among them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::stream::Socket;

/// Handshakes under way: some 20 kB each.
const PLACES: usize = 1024;
/// Whoever keeps us waiting may do so for this long, even if others wait.
const FAIR: Duration = Duration::from_secs(1);
/// How often those who wait look for somebody who must give way.
const LOOK: Duration = Duration::from_millis(100);

/// The places.
#[derive(Debug)]
pub(super) struct Slots {
    free: Semaphore,
    next: AtomicU64,
    /// Those who have a place, the oldest first.
    taken: Mutex<BTreeMap<u64, Taken>>,
}

#[derive(Debug)]
struct Taken {
    since: Instant,
    socket: Arc<Socket>,
    leave: CancellationToken,
}

/// A place, until dropped.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    slots: &'a Slots,
    number: u64,
    #[expect(dead_code, reason = "held until dropped")]
    permit: tokio::sync::SemaphorePermit<'a>,
    /// Cancelled when others need the place.
    pub(super) leave: CancellationToken,
}

impl Default for Slots {
    fn default() -> Self {
        Self { free: Semaphore::new(PLACES), next: AtomicU64::new(0), taken: Mutex::default() }
    }
}

impl Slots {
    fn taken(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place as soon as there is one. First come, first served.
    pub(super) async fn take(&self, socket: &Arc<Socket>) -> Slot<'_> {
        let mut acquire = std::pin::pin!(self.free.acquire());
        let permit = loop {
            match tokio::time::timeout(LOOK, &mut acquire).await {
                Ok(permit) => break permit.expect("the semaphore is never closed"),
                Err(_still_full) => self.make_room(),
            }
        };
        let (number, leave) = (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        let taken = Taken { since: Instant::now(), socket: Arc::clone(socket), leave: leave.clone() };
        self.taken().insert(number, taken);
        Slot { slots: self, number, permit, leave }
    }

    /// Asks one to leave who keeps us waiting: each who waits needs one place.
    fn make_room(&self) {
        let now = Instant::now();
        let taken = self.taken();
        let mut slow = taken.values().take_while(|taken| now.duration_since(taken.since) >= FAIR);
        if let Some(taken) = slow.find(|taken| !taken.leave.is_cancelled() && taken.socket.is_quiet()) {
            taken.leave.cancel();
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.slots.taken().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::stream::Stream;

    async fn pair() -> (Stream, tokio::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = Stream::connect(listener.local_addr().unwrap()).await.unwrap();
        (ours, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn who_keeps_us_waiting_gives_way_and_who_waits_for_us_does_not() {
        let slots = Slots { free: Semaphore::new(2), ..Slots::default() };
        let (silent, _peer) = pair().await;
        let (waiting, mut peer) = pair().await;
        // Something to read: it is our turn.
        peer.write_all(b"hello").await.unwrap();
        while waiting.socket().is_quiet() {
            tokio::task::yield_now().await;
        }
        let slow = slots.take(silent.socket()).await;
        let ours = slots.take(waiting.socket()).await;
        let (newcomer, _) = pair().await;
        let mut take = std::pin::pin!(slots.take(newcomer.socket()));
        tokio::select! {
            _ = &mut take => panic!("there is no place"),
            () = slow.leave.cancelled() => {}
        }
        assert!(!ours.leave.is_cancelled());
        drop(slow);
        take.await;
        assert_eq!(slots.taken().len(), 1, "the newcomer left again, and one place is taken");
    }
}
