//! How a request reaches a server: a port with two adapters, so that the same client talks over a socket and to a server
//! within the same process.
//!
//! [`SocketTransport`] opens one HTTP/1.1 connection per request. Over a Unix socket that costs a few microseconds, and
//! it removes pools, their races with keep-alive, and every task: the connection is polled by whoever waits for the
//! response or reads its body, so that dropping the body closes it.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame as BodyFrame, SizeHint};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};

use crate::address::{Endpoint, ShortPath};

/// A boxed future.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Body of a response, perhaps without an end.
pub type Body = UnsyncBoxBody<Bytes, TransportError>;

/// What carries requests to a server. The request's URI holds path and query only.
pub trait Transport: Send + Sync + 'static {
    /// Sends one request and waits for the head of the response. Dropping the future or the body gives the request up.
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Body>, TransportError>>;

    /// Where requests go, for messages.
    fn describe(&self) -> String;
}

/// Why there is no response, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nobody listens: the request was certainly not seen.
    #[error("nothing accepts connections at {endpoint}")]
    Connect {
        /// Where.
        endpoint: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The connection was lost: the request may have been seen.
    #[error("the connection to {endpoint} was lost")]
    Lost {
        /// Where.
        endpoint: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer came in time: the request may have been seen.
    #[error("{endpoint} did not answer within {} s", after.as_secs())]
    TimedOut {
        /// Where.
        endpoint: String,
        /// How long was waited.
        after: Duration,
    },
}

/// Requests over a Unix or TCP socket.
#[derive(Clone, Debug)]
pub struct SocketTransport {
    endpoint: Endpoint,
    connect_timeout: Duration,
    head_timeout: Duration,
}

impl SocketTransport {
    /// Requests to `endpoint`: 5 s to connect, 60 s for the head of a response (a plan of a large stack takes time).
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, connect_timeout: Duration::from_secs(5), head_timeout: Duration::from_mins(1) }
    }

    /// Sets the longest wait for the head of a response.
    #[must_use]
    pub fn head_timeout(mut self, timeout: Duration) -> Self {
        self.head_timeout = timeout;
        self
    }

    fn lost(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TransportError {
        TransportError::Lost { endpoint: self.endpoint.to_string(), source: source.into() }
    }

    async fn exchange(&self, mut request: http::Request<Bytes>) -> Result<http::Response<Body>, TransportError> {
        let headers = request.headers_mut();
        let stream = match &self.endpoint {
            Endpoint::Unix(path) => {
                headers.insert(http::header::HOST, http::HeaderValue::from_static("localhost"));
                let connect = async { UnixStream::connect(ShortPath::of(path)?).await };
                match tokio::time::timeout(self.connect_timeout, connect).await {
                    Ok(stream) => stream.map(Stream::Unix),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }
            Endpoint::Tcp { authority, token } => {
                if let Ok(value) = authority.parse() {
                    headers.insert(http::header::HOST, value);
                }
                if let Some(token) = token {
                    let value = format!("Bearer {token}").parse::<http::HeaderValue>();
                    let mut value = value.map_err(|error| self.lost(error))?;
                    value.set_sensitive(true);
                    headers.insert(http::header::AUTHORIZATION, value);
                }
                match tokio::time::timeout(self.connect_timeout, TcpStream::connect(authority)).await {
                    Ok(stream) => stream.map(Stream::Tcp),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            }
        };
        let connect_error = |source| TransportError::Connect { endpoint: self.endpoint.to_string(), source };
        match stream.map_err(connect_error)? {
            Stream::Unix(stream) => self.speak(TokioIo::new(stream), request).await,
            Stream::Tcp(stream) => {
                let _ = stream.set_nodelay(true);
                self.speak(TokioIo::new(stream), request).await
            }
        }
    }

    async fn speak<I>(&self, io: I, request: http::Request<Bytes>) -> Result<http::Response<Body>, TransportError>
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(io).await.map_err(|error| self.lost(error))?;
        let mut connection: Option<Connection> = Some(Box::pin(connection));
        let mut response = Box::pin(sender.send_request(request.map(Full::new)));
        let response = std::future::poll_fn(|context| {
            // The connection moves the bytes; its own result is only of interest through the response.
            drive(&mut connection, context);
            response.as_mut().poll(context)
        })
        .await
        .map_err(|error| self.lost(error))?;
        let endpoint = self.endpoint.to_string();
        Ok(response.map(|incoming| DrivenBody { incoming, connection, endpoint }.boxed_unsync()))
    }
}

impl Transport for SocketTransport {
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Body>, TransportError>> {
        Box::pin(async move {
            let after = self.head_timeout;
            match tokio::time::timeout(after, self.exchange(request)).await {
                Ok(result) => result,
                Err(_) => Err(TransportError::TimedOut { endpoint: self.endpoint.to_string(), after }),
            }
        })
    }

    fn describe(&self) -> String {
        self.endpoint.to_string()
    }
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

type Connection = Pin<Box<dyn Future<Output = Result<(), hyper::Error>> + Send>>;

fn drive(connection: &mut Option<Connection>, context: &mut Context<'_>) {
    if let Some(running) = connection
        && running.as_mut().poll(context).is_ready()
    {
        *connection = None;
    }
}

/// A response body that polls the connection it comes from.
struct DrivenBody {
    incoming: Incoming,
    connection: Option<Connection>,
    endpoint: String,
}

impl http_body::Body for DrivenBody {
    type Data = Bytes;
    type Error = TransportError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, TransportError>>> {
        let this = &mut *self;
        // First asked, so that the connection knows that somebody wants data; then again, because it may have come.
        let mut frame = Pin::new(&mut this.incoming).poll_frame(context);
        if frame.is_pending() {
            drive(&mut this.connection, context);
            frame = Pin::new(&mut this.incoming).poll_frame(context);
        }
        frame.map_err(|error| TransportError::Lost { endpoint: this.endpoint.clone(), source: error.into() })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
