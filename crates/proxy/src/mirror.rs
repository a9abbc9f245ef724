//! Copies of requests to the canary arm, whose responses are compared and thrown away.
//!
//! A copy is made when the response to its original begins: by then the whole body of the request is usually known, and
//! the client waits for nothing of this. It counts as in flight to its instance, so that a drain waits for it, and in
//! nothing that concerns clients. Bodies of responses are compared by a digest, up to [`COMPARED`] bytes.

use std::{
    hash::{DefaultHasher, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use http::StatusCode;
use http_body_util::BodyExt as _;
use orchestra_model::traffic::{Arm, Mirror, Permille};
use orchestra_task::TaskKind;
use tokio::sync::oneshot;

use crate::{
    assign::below_million,
    exchange::{headers::Head, replay::Replay},
    flight::Kind,
    metrics::{MirrorOutcome, Series},
    state::Proxy,
    table::{BackendPlan, RoutePlan},
    upstream::Upstream,
    watch::Tally,
};

/// Longest body of a response that is compared.
const COMPARED: usize = 64 << 10;
/// A copy that takes longer is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// Which requests of a route are copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mirroring {
    share: Permille,
    unsafe_methods: bool,
    limit: u32,
}

impl From<&Mirror> for Mirroring {
    fn from(mirror: &Mirror) -> Self {
        Self { share: mirror.share, unsafe_methods: mirror.unsafe_methods, limit: mirror.limit }
    }
}

impl Mirroring {
    /// Whether a request is copied.
    pub(crate) fn wants(self, plan: &RoutePlan, head: &Head, arm: Arm) -> bool {
        arm == Arm::Stable
            && head.upgrade.is_none()
            && (self.unsafe_methods || head.is_safe())
            && below_million(plan.shared.draw()) < u32::from(self.share.get()) * 1000
    }
}

/// What is compared of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    status: StatusCode,
    /// `None` for one that is too long or a stream.
    body: Option<u64>,
}

impl Seen {
    fn agrees(self, other: Self) -> bool {
        self.status == other.status && (self.body.is_none() || other.body.is_none() || self.body == other.body)
    }
}

/// Digest of a body.
#[derive(Clone, Debug, Default)]
struct Digest {
    hasher: DefaultHasher,
    size: usize,
}

impl Digest {
    fn advance(&mut self, bytes: &[u8]) {
        self.size += bytes.len();
        if self.size <= COMPARED {
            self.hasher.write(bytes);
        }
    }

    fn end(&self) -> Option<u64> {
        (self.size <= COMPARED).then(|| self.hasher.finish())
    }
}

/// The response that the client gets, while it passes.
#[derive(Debug)]
pub(crate) struct Original {
    status: StatusCode,
    digest: Digest,
    seen: oneshot::Sender<Seen>,
}

impl Original {
    /// Its body is not compared.
    pub(crate) fn only_status(self) -> Option<Self> {
        // A copy that is gone has said so already.
        let _ = self.seen.send(Seen { status: self.status, body: None });
        None
    }

    pub(crate) fn advance(&mut self, bytes: &[u8]) {
        self.digest.advance(bytes);
    }

    /// It was whole.
    pub(crate) fn complete(self) {
        let _ = self.seen.send(Seen { status: self.status, body: self.digest.end() });
    }
}

/// A place among the copies under way.
struct Slot(Arc<AtomicU32>);

impl Slot {
    fn take(count: &Arc<AtomicU32>, limit: u32) -> Option<Self> {
        let step = |under_way: u32| (under_way < limit).then_some(under_way + 1);
        count.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).ok()?;
        Some(Self(Arc::clone(count)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Sends a copy of a request whose response begins with `status`, if there is room and somewhere to send it.
pub(crate) fn send(
    proxy: &Proxy,
    plan: &RoutePlan,
    head: &Head,
    body: &Replay,
    status: StatusCode,
) -> Option<Original> {
    let mirroring = plan.mirror?;
    let (backend, upstream) = target(plan)?;
    let series = Arc::clone(&backend.series);
    let (Some(slot), Some(body)) = (Slot::take(&plan.shared.mirroring, mirroring.limit), body.copy()) else {
        series.mirrored(MirrorOutcome::Skipped);
        return None;
    };
    let flight = upstream.flight.enter(Kind::Request)?;
    let (head, body) = (head.mirrored(), body.attempt(&series));
    let (upstream, tally) = (Arc::clone(upstream), plan.watch.as_ref().map(|watch| Arc::clone(&watch.tally)));
    let (seen, original) = oneshot::channel();
    proxy.tree.start(TaskKind::Connection, "copy of a request", async move {
        let gauge = series.gauge(false);
        let cut = Arc::clone(flight.cut());
        let copied = async move {
            let (response, lease) = upstream.send(&head, body, false, None).await.ok()?;
            let (parts, mut body) = response.into_parts();
            let mut digest = Digest::default();
            while let Some(frame) = body.frame().await {
                if let Some(data) = frame.ok()?.data_ref() {
                    digest.advance(data);
                }
            }
            lease.release(&mut body, flight);
            Some(Seen { status: parts.status, body: digest.end() })
        };
        // Each arm that loses is dropped, which closes its connection or resets its stream.
        let copy = tokio::select! {
            biased;
            () = cut.cancelled() => return,
            copy = tokio::time::timeout(LIMIT, copied) => copy.ok().flatten(),
        };
        drop((gauge, slot));
        compare(copy, original, &series, tally.as_deref()).await;
    });
    Some(Original { status, digest: Digest::default(), seen })
}

/// An instance of the canary arm, also one that gets no requests of clients yet.
fn target(plan: &RoutePlan) -> Option<(&BackendPlan, &Arc<Upstream>)> {
    let canary = plan.backends.iter().filter(|backend| backend.arm == Arm::Canary);
    let all = canary.flat_map(|backend| backend.upstreams.iter().map(move |upstream| (backend, upstream)));
    let one = usize::try_from(plan.shared.draw() >> 32).unwrap_or(0).checked_rem(all.clone().count())?;
    { all }.nth(one)
}

async fn compare(copy: Option<Seen>, original: oneshot::Receiver<Seen>, series: &Series, tally: Option<&Tally>) {
    // A client that went away has seen nothing to compare with.
    let Ok(original) = original.await else { return series.mirrored(MirrorOutcome::Skipped) };
    let agreed = copy.is_some_and(|copy| copy.agrees(original));
    series.mirrored(match copy {
        None => MirrorOutcome::Failed,
        Some(_) if agreed => MirrorOutcome::Agreed,
        Some(_) => MirrorOutcome::Differed,
    });
    if let Some(tally) = tally {
        tally.compared(agreed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(status: u16, pieces: &[&[u8]]) -> Seen {
        let mut digest = Digest::default();
        for piece in pieces {
            digest.advance(piece);
        }
        Seen { status: StatusCode::from_u16(status).unwrap(), body: digest.end() }
    }

    #[test]
    fn responses_agree_in_status_and_small_bodies() {
        assert!(seen(200, &[b"one", b"two"]).agrees(seen(200, &[b"on", b"", b"etwo"])));
        assert!(!seen(200, &[b"one"]).agrees(seen(200, &[b"two"])));
        assert!(!seen(200, &[b"one"]).agrees(seen(404, &[b"one"])));
        let long = vec![0; COMPARED + 1];
        assert!(seen(200, &[&long]).agrees(seen(200, &[b"short"])));
        assert!(!seen(200, &[&long[1..]]).agrees(seen(200, &[b"short"])));
    }
}
