//! Open-loop load: requests are sent when their time has come, whatever became of those before. Nothing is tried again,
//! and what happened to each one is counted: a client that forgives cannot prove anything.

mod http;
mod report;
mod stream;
mod timing;
mod websocket;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

pub use report::{Failure, Kind, Report, Tally};
pub use timing::{Session, Timing};

use crate::random::Random;
use report::Recorder;

/// What to send.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where.
    pub address: SocketAddr,
    /// `GET /work` per second over kept connections.
    pub get: u32,
    /// `POST /echo` per second over kept connections.
    pub post: u32,
    /// `GET /version` per second, each over a connection of its own.
    pub fresh: u32,
    /// `POST /echo` per second over one HTTP/2 connection.
    pub h2c: u32,
    /// Milliseconds that `GET /work` takes.
    pub work_ms: u32,
    /// Token streams that are open at every moment: one that ended is followed by another.
    pub streams: u32,
    /// WebSocket sessions that are open at every moment.
    pub websockets: u32,
    /// Length of a token stream or WebSocket session.
    pub session: Duration,
    /// Up to so much longer is a session, at random.
    pub spread: Duration,
    /// Time between two tokens or messages.
    pub token: Duration,
    /// Longest wait for an answer.
    pub timeout: Duration,
}

impl Plan {
    /// Nothing to an address yet.
    pub fn to(address: SocketAddr) -> Self {
        Self {
            address,
            get: 0,
            post: 0,
            fresh: 0,
            h2c: 0,
            work_ms: 5,
            streams: 0,
            websockets: 0,
            session: Duration::from_secs(1),
            spread: Duration::ZERO,
            token: Duration::from_millis(50),
            timeout: Duration::from_secs(20),
        }
    }
}

/// Load that goes on.
pub struct Load {
    shared: Arc<Shared>,
    generators: JoinSet<()>,
}

pub(crate) struct Shared {
    pub(crate) plan: Plan,
    record: Recorder,
    pub(crate) timing: Timing,
    pool: http::Pool,
    stop: AtomicBool,
    next: AtomicU64,
}

impl Shared {
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// An id that no other request of this load has.
    pub(crate) fn id(&self, kind: Kind) -> String {
        format!("{}-{}", kind.as_str(), self.next.fetch_add(1, Ordering::Relaxed))
    }
}

impl Load {
    /// Starts. Within a tokio runtime.
    pub fn start(plan: Plan) -> Self {
        let shared = Arc::new(Shared {
            record: Recorder::new(),
            timing: Timing::default(),
            pool: http::Pool::new(plan.address),
            stop: AtomicBool::new(false),
            next: AtomicU64::new(1),
            plan,
        });
        let mut generators = JoinSet::new();
        let plan = &shared.plan;
        for (kind, rate) in
            [(Kind::Get, plan.get), (Kind::Post, plan.post), (Kind::Fresh, plan.fresh), (Kind::H2c, plan.h2c)]
        {
            if rate > 0 {
                generators.spawn(open_loop(Arc::clone(&shared), kind, rate));
            }
        }
        for (kind, count) in [(Kind::Stream, plan.streams), (Kind::WebSocket, plan.websockets)] {
            for index in 0..count {
                let lengths = Random::new(u64::from(index) << 1 | u64::from(kind == Kind::Stream));
                generators.spawn(back_to_back(Arc::clone(&shared), kind, lengths));
            }
        }
        Self { shared, generators }
    }

    /// What happened until now.
    pub fn report(&self) -> Report {
        self.shared.record.report()
    }

    /// Time since the start, on the clock of [`Failure::begun`].
    pub fn elapsed(&self) -> Duration {
        self.shared.record.elapsed()
    }

    /// When tokens came and sessions ended.
    pub fn timing(&self) -> Timing {
        self.shared.timing.clone()
    }

    /// Sends nothing more, waits for what is in flight, and reports.
    pub async fn stop(mut self) -> Report {
        self.shared.stop.store(true, Ordering::Relaxed);
        while self.generators.join_next().await.is_some() {}
        self.shared.record.report()
    }
}

async fn open_loop(shared: Arc<Shared>, kind: Kind, rate: u32) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    // Missed ticks are made up for at once: load that waits for the system under test flatters it.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut requests = JoinSet::new();
    let http2 = http::Http2::default();
    while !shared.is_stopped() {
        ticks.tick().await;
        let (shared, http2) = (Arc::clone(&shared), http2.clone());
        requests.spawn(async move {
            let id = shared.id(kind);
            let begun = shared.record.begin(kind);
            let request = http::send(&shared, &shared.pool, &http2, kind, &id);
            let outcome = tokio::time::timeout(shared.plan.timeout, request).await;
            shared.record.end(kind, &id, begun, outcome.unwrap_or_else(|_| Err(http::Problem::new("timeout", ""))));
        });
        while requests.try_join_next().is_some() {}
    }
    while requests.join_next().await.is_some() {}
}

async fn back_to_back(shared: Arc<Shared>, kind: Kind, mut lengths: Random) {
    let spread = u64::try_from(shared.plan.spread.as_millis()).unwrap_or(u64::MAX);
    while !shared.is_stopped() {
        let id = shared.id(kind);
        let begun = shared.record.begin(kind);
        let length = shared.plan.session + Duration::from_millis(lengths.below(spread));
        let session = async {
            match kind {
                Kind::WebSocket => websocket::session(&shared, &id, length).await,
                _ => stream::session(&shared, &id, length).await,
            }
        };
        let outcome = tokio::time::timeout(shared.plan.timeout + length, session).await;
        let outcome = outcome.unwrap_or_else(|_| Err(http::Problem::new("timeout", "")));
        let failed = outcome.is_err();
        shared.timing.ended(Session { kind, begun, ended: shared.record.elapsed(), whole: !failed });
        shared.record.end(kind, &id, begun, outcome);
        if failed {
            // A refused connection must not become a thousand of them.
            tokio::time::sleep_until(Instant::now() + Duration::from_millis(20)).await;
        }
    }
}
