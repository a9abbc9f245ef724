//! Connections to one endpoint of one route.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use http::{Request, Response};
use hyper::body::Incoming;
use orchestra_model::desired::Protocol;
use orchestra_task::{TaskKind, TaskTree};

use crate::{
    exchange::replay::RequestBody,
    flight::Flight,
    metrics::{RetryKind, Series},
    stream::Stream,
    table,
};

mod h1;
mod h2;

/// A connection over loopback takes microseconds; one that takes this long goes nowhere.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// hyper's way to start tasks.
#[derive(Clone, Debug)]
pub(crate) struct Executor(pub(crate) TaskTree);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: std::future::Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.start(TaskKind::Connection, "http", future);
    }
}

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
    pool: Pool,
    tree: TaskTree,
}

#[derive(Debug)]
enum Pool {
    H1(Arc<h1::Pool>),
    H2(h2::Pool),
    Tcp,
}

/// A connection in use by a request. Dropping it closes an HTTP/1.1 connection and frees an HTTP/2 stream.
#[derive(Debug)]
pub(crate) enum Lease {
    H1(h1::Lease),
    H2(#[expect(dead_code, reason = "held until dropped")] h2::Lease),
}

impl Lease {
    /// The response was read to its end: the connection may serve the next request.
    pub(crate) fn release(self) {
        if let Self::H1(lease) = self {
            lease.release();
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
    /// A reused connection ended without a byte of response. What the endpoint did is unknown.
    Silent(String),
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
        Self { flight, series: ArcSwap::new(series), address, protocol, slot, pool, tree }
    }

    /// Whether requests go to it as HTTP/2.
    pub(crate) fn is_h2(&self) -> bool {
        matches!(self.pool, Pool::H2(_))
    }

    /// Sends a request. `safe` says that it may be sent again if a reused connection stays silent.
    pub(crate) async fn send(
        &self,
        request: Request<RequestBody>,
        safe: bool,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        match &self.pool {
            Pool::H1(pool) => {
                let (response, lease) = h1::send(self, pool, request, safe).await?;
                Ok((response, Lease::H1(lease)))
            }
            Pool::H2(pool) => {
                let (response, lease) = h2::send(self, pool, request).await?;
                Ok((response, Lease::H2(lease)))
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
