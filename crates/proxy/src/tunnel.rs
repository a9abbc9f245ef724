//! Connections that carry bytes: TCP routes, and HTTP connections after an upgrade.
//!
//! Each direction is pumped by itself, so that one side may finish sending while the other goes on (half-close). A cut
//! closes plain connections at once; a WebSocket gets a close frame with code 1012 ("service restart", IANA WebSocket
//! close codes) in both directions, each behind the last whole frame, and a moment to be read.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    flight::{InFlight, Kind},
    metrics::{ErrorKind, Gauge, Series},
    seek::Seeker,
    state::{Arrival, Proxy},
    stream::Stream,
    tls::stream::ClientStream,
};

mod websocket;

use websocket::{Frames, Side};

/// Bytes on their way in one direction.
const BUFFER: usize = 8 << 10;
/// How long a cut waits for the end of a frame, and for the peer to close.
const GRACE: Duration = Duration::from_secs(1);

/// What a tunnel keeps in flight until both directions ended.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) flight: InFlight,
    pub(crate) series: Arc<Series>,
    #[expect(dead_code, reason = "counts until dropped")]
    pub(crate) gauge: Gauge,
    /// Silence in both directions that ends it.
    pub(crate) idle: Option<Duration>,
}

/// Splices an upgraded connection.
pub(crate) async fn upgraded(tunnel: Tunnel, client: Upgraded, instance: Stream, websocket: bool) {
    let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
    let (from_instance, to_instance) = tokio::io::split(instance);
    let quiet = Quiet::new(&tunnel);
    let frames = |side| websocket.then(|| Frames::new(side));
    let up = Pump { from: from_client, to: to_instance, frames: frames(Side::Client), quiet: &quiet };
    let down = Pump { from: from_instance, to: to_client, frames: frames(Side::Server), quiet: &quiet };
    // An error of one direction ends both: the other one would wait for a peer that is gone.
    let both = async {
        tokio::try_join!(up.run(|bytes| tunnel.series.received(bytes)), down.run(|bytes| tunnel.series.sent(bytes)))
    };
    let result = quiet.watch(both).await;
    // A cut that was announced in the protocol's own way ends without an error, but a cut it was.
    if result == Err(End::Cut) || quiet.cut.is_cancelled() {
        tunnel.series.error(quiet.kind());
    }
}

/// Serves a connection to a TCP route.
pub(crate) async fn tcp(proxy: &Proxy, arrival: &Arrival, client: ClientStream) {
    let mut seeker = Seeker::new(proxy, arrival, Kind::Stream, None);
    let (ticket, instance) = loop {
        let ticket = match seeker.acquire().await {
            Ok(ticket) => ticket,
            Err(failure) => {
                if let Some(plan) = proxy.table.load().routes.get(&arrival.socket) {
                    plan.series.error(failure.kind);
                }
                // A reset says better than an end that nobody was there.
                client.socket().abort_on_close();
                return;
            }
        };
        match ticket.upstream.connect().await {
            Ok(instance) => break (ticket, instance),
            Err(error) => seeker.unreachable(&ticket, &error),
        }
    };
    let series = Arc::clone(ticket.series());
    series.connected();
    let gauge = ticket.gauge();
    let idle = ticket.rules().idle;
    let (flight, _) = ticket.split();
    let tunnel = Tunnel { flight, series, gauge, idle };
    let (client_socket, instance_socket) = (Arc::clone(client.socket()), Arc::clone(instance.socket()));
    let (from_client, to_client) = tokio::io::split(client);
    let (from_instance, to_instance) = tokio::io::split(instance);
    let quiet = Quiet::new(&tunnel);
    let up = Pump { from: from_client, to: to_instance, frames: None, quiet: &quiet };
    let down = Pump { from: from_instance, to: to_client, frames: None, quiet: &quiet };
    // They keep the connections until it is known how those are to be closed.
    let mut up = pin!(up.run(|bytes| tunnel.series.received(bytes)));
    let mut down = pin!(down.run(|bytes| tunnel.series.sent(bytes)));
    let result = quiet.watch(async { tokio::try_join!(up.as_mut(), down.as_mut()) }).await;
    match result {
        Ok(_) => {}
        Err(End::Cut) => tunnel.series.error(quiet.kind()),
        Err(End::Broken) => {
            // A reset on one side is a reset on the other: half a message must not look like a whole one.
            client_socket.abort_on_close();
            instance_socket.abort_on_close();
        }
    }
}

/// When a tunnel is to end: after a cut, or after silence in both directions.
struct Quiet {
    /// Cancelled by either.
    cut: CancellationToken,
    drained: Arc<CancellationToken>,
    idle: Option<Duration>,
    /// Milliseconds of [`clock`] of the last bytes.
    last: AtomicU64,
}

impl Quiet {
    fn new(tunnel: &Tunnel) -> Self {
        let drained = Arc::clone(tunnel.flight.cut());
        let last = AtomicU64::new(clock::millis(clock::now()));
        Self { cut: drained.child_token(), drained, idle: tunnel.idle, last }
    }

    /// Something was sent.
    fn moved(&self) {
        if self.idle.is_some() {
            self.last.store(clock::millis(clock::now()), Ordering::Relaxed);
        }
    }

    /// Runs both directions, and cuts them when nothing moves any more.
    async fn watch<T>(&self, both: impl Future<Output = T>) -> T {
        let silence = async {
            while let Some(idle) = self.idle {
                let end = Duration::from_millis(self.last.load(Ordering::Relaxed)) + idle;
                let now = clock::now();
                if end <= now {
                    self.cut.cancel();
                    break;
                }
                tokio::time::sleep(end.saturating_sub(now)).await;
            }
            std::future::pending::<()>().await;
        };
        // The second arm never completes: it ends with the first.
        tokio::select! {
            biased;
            done = both => done,
            () = silence => unreachable!("it waits for ever"),
        }
    }

    /// Why it was cut.
    fn kind(&self) -> ErrorKind {
        if self.drained.is_cancelled() { ErrorKind::Cut } else { ErrorKind::Idle }
    }
}

/// Why both directions end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Cut,
    Broken,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}

/// One direction.
struct Pump<'a, R, W> {
    from: R,
    to: W,
    frames: Option<Frames>,
    quiet: &'a Quiet,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Pump<'_, R, W> {
    /// Runs until this direction ended by itself or after a cut.
    async fn run(mut self, count: impl Fn(usize)) -> Result<(), End> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let received = tokio::select! {
                biased;
                () = self.quiet.cut.cancelled() => return self.end(&mut buffer).await,
                received = self.from.read(&mut buffer) => received?,
            };
            if received == 0 {
                // The other direction may go on.
                self.to.shutdown().await?;
                return Ok(());
            }
            count(received);
            self.quiet.moved();
            if let Some(frames) = &mut self.frames {
                frames.advance(&buffer[..received]);
            }
            let stuck = async {
                self.quiet.cut.cancelled().await;
                tokio::time::sleep(if self.frames.is_some() { GRACE } else { Duration::ZERO }).await;
            };
            // TLS takes what it cannot send yet: only the flush tells.
            let write = async {
                self.to.write_all(&buffer[..received]).await?;
                self.to.flush().await
            };
            tokio::select! {
                biased;
                written = write => written?,
                // A peer that does not read cannot be told anything.
                () = stuck => return Err(End::Cut),
            }
        }
    }

    /// Ends this direction after a cut.
    async fn end(mut self, buffer: &mut [u8]) -> Result<(), End> {
        let Some(frames) = self.frames.take() else { return Err(End::Cut) };
        let deadline = Instant::now() + GRACE;
        // A peer that does not take part in the goodbye is left at the deadline.
        let goodbye = async {
            let mut frames = frames;
            while !frames.is_between() {
                let received = self.from.read(buffer).await?;
                if received == 0 {
                    break;
                }
                let rest = frames.finish(&buffer[..received]);
                self.to.write_all(&buffer[..rest]).await?;
            }
            if frames.is_between() && !frames.is_closed() {
                self.to.write_all(&frames.close(self.quiet.drained.is_cancelled())).await?;
            }
            self.to.flush().await?;
            self.to.shutdown().await?;
            // Read to the end: closing with unread bytes would reset the connection and take the close frame along.
            while self.from.read(buffer).await? > 0 {}
            Ok::<(), io::Error>(())
        };
        let _ = tokio::time::timeout_at(deadline, goodbye).await;
        Ok(())
    }
}
