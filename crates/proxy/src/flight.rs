//! What is in flight to an instance, counted exactly.
//!
//! The hand-over of a release stands on one promise: when an endpoint is reported drained, no request is on its way to
//! it and none will be. Gate and counts therefore live in **one** atomic word, and entering is one compare-exchange
//! that succeeds only while the gate is open:
//!
//! ```text
//!   bit 63: gate closed   bits 31..62: streams   bits 0..31: requests
//! ```
//!
//! Why that suffices: all changes of one word have one order. Let C be the step that closed the gate. An entry before C
//! is in the count that C and everybody after it sees, until it left. An entry after C sees the closed bit and fails.
//! So once a reader finds "closed, nothing in flight", nothing is and nothing can be in flight, whatever older table
//! some other thread still holds in its hands. The new table is stored before the gate closes, and the gate's
//! release/acquire order makes it visible to whoever was turned away: choosing again finds the new table.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use orchestra_model::route::EndpointKey;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::breaker::Place;

const CLOSED: u64 = 1 << 63;
const REQUEST: u64 = 1;
const STREAM: u64 = 1 << 31;
const MASK: u64 = STREAM - 1;

/// What kind of thing is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A request with an end in sight.
    Request,
    /// An event stream, a gRPC call, an upgraded or a plain TCP connection.
    Stream,
}

impl Kind {
    fn unit(self) -> u64 {
        match self {
            Self::Request => REQUEST,
            Self::Stream => STREAM,
        }
    }
}

/// Gate and counts of one endpoint, over all routes that lead to it.
#[derive(Debug)]
pub(crate) struct Flight {
    key: EndpointKey,
    word: AtomicU64,
    /// Cancelled when what is in flight is to be ended; replaced when the gate opens again.
    cut: ArcSwap<CancellationToken>,
    /// Told whenever something left through a closed gate.
    reporter: Arc<Notify>,
    left: Notify,
}

impl Flight {
    /// With a closed gate.
    pub(crate) fn new(key: EndpointKey, reporter: Arc<Notify>) -> Self {
        Self { key, word: AtomicU64::new(CLOSED), cut: ArcSwap::default(), reporter, left: Notify::new() }
    }

    pub(crate) fn key(&self) -> &EndpointKey {
        &self.key
    }

    /// Enters through the gate. `None` if it is closed.
    pub(crate) fn enter(self: &Arc<Self>, kind: Kind) -> Option<InFlight> {
        self.enter_below(kind, 0)
    }

    /// Enters through the gate if less than `limit` is in flight; zero is no limit.
    pub(crate) fn enter_below(self: &Arc<Self>, kind: Kind, limit: u32) -> Option<InFlight> {
        let full = |word: u64| limit > 0 && (word & MASK) + ((word / STREAM) & MASK) >= u64::from(limit);
        let step = |word: u64| if word & CLOSED == 0 && !full(word) { Some(word + kind.unit()) } else { None };
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).ok()?;
        // Read after entering: a cut that comes later cancels this token or an older one, which `cut` replaces only
        // when the gate opens anew, that is when the table says so.
        Some(InFlight { kind, cut: self.cut.load_full(), flight: Arc::clone(self), place: None })
    }

    /// Opens the gate.
    pub(crate) fn open(&self) {
        if self.word.fetch_and(!CLOSED, Ordering::AcqRel) & CLOSED != 0 && self.cut.load().is_cancelled() {
            self.cut.store(Arc::default());
        }
    }

    /// Closes the gate. Returns whether it was open.
    pub(crate) fn close(&self) -> bool {
        self.word.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    /// Closes the gate and asks everything in flight to end.
    pub(crate) fn cut(&self) {
        self.close();
        self.cut.load().cancel();
    }

    /// Requests and streams in flight.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let word = self.word.load(Ordering::Acquire) & !CLOSED;
        let part = |bits: u64| u32::try_from(bits & MASK).expect("31 bits");
        (part(word), part(word / STREAM))
    }

    /// Everything in flight, for comparing loads.
    pub(crate) fn load(&self) -> u32 {
        let (requests, streams) = self.counts();
        requests + streams
    }

    /// Whether the gate is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether the gate is closed and nothing is in flight: from here on, nothing will be.
    pub(crate) fn is_drained(&self) -> bool {
        self.word.load(Ordering::Acquire) == CLOSED
    }

    /// Completes once nothing is in flight through a closed gate.
    pub(crate) async fn drained(&self) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            // Registered before looking, so that a leave in between is not missed.
            left.as_mut().enable();
            if self.is_drained() {
                return;
            }
            left.await;
        }
    }
}

/// Something in flight: counted until dropped.
#[derive(Debug)]
pub(crate) struct InFlight {
    flight: Arc<Flight>,
    kind: Kind,
    cut: Arc<CancellationToken>,
    /// On a bounded route. Given back after it was counted out, so that who waits for room finds some.
    place: Option<Place>,
}

impl InFlight {
    /// Keeps a place until it ends.
    pub(crate) fn hold(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// From now on it counts as a stream. One step of the word, so that no reader sees it absent or twice.
    pub(crate) fn become_stream(&mut self) {
        if self.kind == Kind::Request {
            self.kind = Kind::Stream;
            self.flight.word.fetch_add(STREAM - REQUEST, Ordering::AcqRel);
        }
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.kind == Kind::Stream
    }

    /// Cancelled when it is to end.
    pub(crate) fn cut(&self) -> &Arc<CancellationToken> {
        &self.cut
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let before = self.flight.word.fetch_sub(self.kind.unit(), Ordering::AcqRel);
        // Only draining endpoints have listeners: the hot path ends here.
        if before & CLOSED != 0 {
            self.flight.left.notify_waiters();
            self.flight.reporter.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flight() -> Arc<Flight> {
        let key =
            EndpointKey { environment: "demo/dev".parse().unwrap(), instance: "api-r1-1".parse().unwrap(), attempt: 1 };
        Arc::new(Flight::new(key, Arc::default()))
    }

    #[test]
    fn the_gate_turns_away_and_the_counts_are_exact() {
        let flight = flight();
        assert!(flight.enter(Kind::Request).is_none(), "a new endpoint is closed until a table opens it");
        flight.open();
        let mut first = flight.enter(Kind::Request).unwrap();
        let second = flight.enter(Kind::Stream).unwrap();
        assert_eq!(flight.counts(), (1, 1));
        first.become_stream();
        first.become_stream();
        assert_eq!(flight.counts(), (0, 2));
        assert!(flight.close() && !flight.close());
        assert!(flight.enter(Kind::Request).is_none() && !flight.is_drained());
        drop(first);
        drop(second);
        assert!(flight.is_drained());
        flight.open();
        assert!(!flight.is_drained() && flight.enter(Kind::Request).is_some());
    }

    #[test]
    fn a_limit_counts_requests_and_streams() {
        let flight = flight();
        flight.open();
        let mut one = flight.enter_below(Kind::Request, 2).unwrap();
        one.become_stream();
        let two = flight.enter_below(Kind::Request, 2).unwrap();
        assert!(flight.enter_below(Kind::Request, 2).is_none() && flight.enter_below(Kind::Request, 3).is_some());
        drop(two);
        assert!(flight.enter_below(Kind::Stream, 2).is_some());
    }

    #[test]
    fn a_cut_reaches_what_is_in_flight_and_not_what_comes_after_the_gate_opened_again() {
        let flight = flight();
        flight.open();
        let before = flight.enter(Kind::Request).unwrap();
        flight.cut();
        assert!(before.cut().is_cancelled() && flight.enter(Kind::Request).is_none());
        flight.open();
        assert!(!flight.enter(Kind::Request).unwrap().cut().is_cancelled());
    }

    /// Law: whoever entered is seen by the drain, whoever was not seen did not enter.
    #[test]
    fn nothing_is_in_flight_after_drained_was_seen() {
        use std::sync::atomic::AtomicBool;
        for _ in 0..200 {
            let (flight, stopped) = (flight(), Arc::new(AtomicBool::new(false)));
            flight.open();
            let workers: Vec<_> = (0..3)
                .map(|_| {
                    let (flight, stopped) = (Arc::clone(&flight), Arc::clone(&stopped));
                    std::thread::spawn(move || {
                        let mut entered = 0_u32;
                        while let Some(guard) = flight.enter(Kind::Request) {
                            assert!(!stopped.load(Ordering::SeqCst), "in flight to a stopped instance");
                            drop(guard);
                            entered += 1;
                        }
                        entered
                    })
                })
                .collect();
            std::thread::yield_now();
            flight.close();
            while !flight.is_drained() {
                std::hint::spin_loop();
            }
            stopped.store(true, Ordering::SeqCst);
            for worker in workers {
                worker.join().unwrap();
            }
        }
    }
}
