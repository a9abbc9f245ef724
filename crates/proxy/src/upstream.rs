//! Connections to one endpoint of one route.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame, SizeHint};
use orchestra_model::desired::Protocol;
use orchestra_task::TaskTree;

use crate::{
    exchange::{headers::Head, interim::Interim, replay::RequestBody},
    flight::{Flight, InFlight},
    metrics::{RetryKind, Series},
    outlier::Health,
    stream::Stream,
    table,
};

mod h1;
mod h2;

use h1::Outgoing;

/// A connection over loopback takes microseconds; one that takes this long goes nowhere.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One endpoint behind one route.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) flight: Arc<Flight>,
    /// Of the release, on the arm that it is on now.
    pub(crate) series: ArcSwap<Series>,
    pub(crate) address: SocketAddr,
    pub(crate) protocol: Protocol,
    /// Its place in rendezvous hashing.
    pub(crate) slot: u64,
    pub(crate) health: Health,
    pool: Pool,
    tree: TaskTree,
}

#[derive(Debug)]
enum Pool {
    H1(Arc<h1::Pool>),
    H2(h2::Pool),
    Tcp,
}

/// The body of an instance's response. Dropping it closes an HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) enum Incoming {
    H1(h1::body::Body),
    H2(h2::Body),
}

impl Incoming {
    /// The connection, after the instance switched protocols.
    pub(crate) fn upgrade(&mut self) -> Option<Stream> {
        if let Self::H1(body) = self { body.upgrade() } else { None }
    }

    /// Nothing more of it is wanted.
    pub(crate) fn close(&mut self) {
        if let Self::H1(body) = self {
            body.close();
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::H1(body) => body.poll_frame(cx).map_err(Into::into),
            Self::H2(body) => body.poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::H1(body) => body.is_end_stream(),
            Self::H2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::H1(body) => body.size_hint(),
            Self::H2(body) => body.size_hint(),
        }
    }
}

/// What goes back when a response ended: the way of an HTTP/1.1 connection to its pool, or a stream of HTTP/2.
#[derive(Debug)]
pub(crate) enum Lease {
    H1(h1::Lease),
    H2(#[expect(dead_code, reason = "held until dropped")] h2::Lease),
}

impl Lease {
    /// The response was read to its end: the connection may serve the next request, unless this one is still being sent.
    /// What is in flight ends with that.
    pub(crate) fn release(self, body: &mut Incoming, flight: InFlight) {
        if let (Self::H1(lease), Incoming::H1(body)) = (self, body) {
            lease.release(body, flight);
        }
    }
}

/// Why there is no response.
#[derive(Debug)]
pub(crate) enum SendError {
    /// No connection could be made: nothing was sent.
    Connect(io::Error),
    /// The endpoint did nothing with the request, for certain.
    Untouched(RetryKind, String),
    /// The connection ended without a byte of response. What the endpoint did is unknown; on a reused connection it is
    /// likely nothing.
    Silent { reused: bool, text: String },
    /// Anything else.
    Failed(String),
}

impl Upstream {
    pub(crate) fn new(
        protocol: Protocol,
        address: SocketAddr,
        flight: Arc<Flight>,
        series: Arc<Series>,
        tree: TaskTree,
    ) -> Self {
        let pool = match protocol {
            Protocol::Http => Pool::H1(Arc::default()),
            Protocol::H2c | Protocol::Grpc => Pool::H2(h2::Pool::default()),
            Protocol::Tcp => Pool::Tcp,
        };
        let slot = table::slot(flight.key());
        let (series, health) = (ArcSwap::new(series), Health::default());
        Self { flight, series, address, protocol, slot, health, pool, tree }
    }

    /// Sends a request. `safe` says that it may be sent again if the connection stays silent; `interim` is told what comes
    /// before the response.
    pub(crate) async fn send(
        &self,
        head: &Head,
        body: RequestBody,
        safe: bool,
        interim: Option<&mut Interim<'_>>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        match &self.pool {
            Pool::H1(pool) => {
                let (response, lease) = h1::send(self, pool, Outgoing::new(head, body), safe, interim).await?;
                Ok((response, Lease::H1(lease)))
            }
            Pool::H2(pool) => {
                let (response, lease) = h2::send(self, pool, head, body, interim).await?;
                Ok((response.map(Incoming::H2), Lease::H2(lease)))
            }
            Pool::Tcp => Err(SendError::Failed("the route carries no HTTP".to_owned())),
        }
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> io::Result<Stream> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, Stream::connect(self.address))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer to a connection attempt"))??;
        self.series.load().dialled();
        Ok(stream)
    }

    /// Closes connections that carry nothing: the instance will be told to stop and must not wait for us.
    pub(crate) fn close_idle(&self) {
        match &self.pool {
            Pool::H1(pool) => pool.clear(),
            Pool::H2(pool) => pool.clear(),
            Pool::Tcp => {}
        }
    }
}

/// The text of an error and of what caused it.
pub(crate) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
