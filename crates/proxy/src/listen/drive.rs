//! Watching over a connection: how long its client may take, and how it is let go.
//!
//! A begun head has [`HEAD_TIMEOUT`] to become whole, and an idle connection is closed in good order after
//! [`IDLE_TIMEOUT`]. One timer per connection is set anew only when it fires or when a shorter deadline begins.

use std::{
    pin::pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::HEAD_TIMEOUT;
use crate::{exchange::body::ClientConnection, idle::Awaits};

/// Time between requests of a connection. Longer than that of common clients (90 s in Go and reqwest), so that they close
/// first: a request that crosses our close would be lost.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for an idle connection that was asked to end to do so.
pub(super) const GOODBYE: Duration = Duration::from_secs(5);
/// After so much idleness a connection may rest.
const REST: Duration = Duration::from_millis(50);

/// A connection as hyper runs it.
pub(super) trait Connection {
    /// Ready when it has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Ends it after the requests that have begun.
    fn graceful_shutdown(&mut self);
}

/// What a connection is doing, as far as its deadline goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A request is being answered: no deadline.
    Busy,
    /// Nothing is asked.
    Idle,
    /// A head has begun.
    Head,
    /// It was asked to end and has nothing more to do.
    Goodbye,
}

impl Phase {
    fn allowance(self) -> Option<Duration> {
        match self {
            Self::Busy => None,
            Self::Idle => Some(IDLE_TIMEOUT),
            Self::Head => Some(HEAD_TIMEOUT),
            Self::Goodbye => Some(GOODBYE),
        }
    }
}

/// Runs a connection to its end, or until it can rest: then says since when it is idle.
pub(super) async fn drive(
    connection: &mut impl Connection,
    client: &ClientConnection,
    drain: &CancellationToken,
) -> Option<Instant> {
    let mut draining = pin!(drain.cancelled());
    let mut asked_to_end = false;
    let mut phase = Phase::Head;
    let mut since = Instant::now();
    let mut timer = pin!(tokio::time::sleep_until(since + HEAD_TIMEOUT));
    std::future::poll_fn(|cx| {
        loop {
            if connection.poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            if matches!(client.socket.poll_push(cx), Poll::Ready(Err(_))) {
                // Nobody is there any more.
                return Poll::Ready(None);
            }
            if client.poll_leash(cx).is_ready() {
                if client.old.load(Ordering::Relaxed) {
                    // Only a reset says that this is not the end.
                    client.socket.abort_on_close();
                }
                return Poll::Ready(None);
            }
            if !asked_to_end && draining.as_mut().poll(cx).is_ready() {
                asked_to_end = true;
                connection.graceful_shutdown();
                continue;
            }
            let now_in = if client.active.load(Ordering::Acquire) > 0 {
                Phase::Busy
            } else if asked_to_end {
                Phase::Goodbye
            } else if client.h1 && client.socket.read() > client.seen.load(Ordering::Relaxed) {
                Phase::Head
            } else {
                Phase::Idle
            };
            if now_in != phase {
                // A head that begins where one is awaited keeps the deadline of the first byte.
                phase = now_in;
                since = Instant::now();
                match phase {
                    Phase::Idle => client.lull.begins(Awaits::Request, since),
                    Phase::Head => client.lull.begins(Awaits::Rest, since),
                    Phase::Busy | Phase::Goodbye => client.lull.ends(),
                }
            }
            if phase == Phase::Idle {
                client.socket.rest();
            }
            let Some(allowance) = phase.allowance() else { return Poll::Pending };
            let rests = phase == Phase::Idle && client.may_rest();
            let deadline = since + if rests { REST } else { allowance };
            if timer.deadline() > deadline || timer.is_elapsed() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() < deadline {
                continue;
            }
            if rests {
                return Poll::Ready(Some(since));
            }
            if phase == Phase::Idle {
                asked_to_end = true;
                connection.graceful_shutdown();
                continue;
            }
            // A head that does not come, or a client that does not take its leave.
            return Poll::Ready(None);
        }
    })
    .await
}
