//! Requests: over kept connections, over connections of their own, over HTTP/2.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, task::JoinSet};

use super::{
    Shared,
    report::{Kind, Success},
};

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) problem: String,
    pub(super) detail: String,
}

impl Problem {
    pub(super) fn new(problem: impl Into<String>, detail: impl std::fmt::Display) -> Self {
        Self { problem: problem.into(), detail: detail.to_string() }
    }
}

type Sender = conn::http1::SendRequest<Full<Bytes>>;

/// Connections that are kept. Their drivers live as long as the pool.
pub(super) struct Pool {
    address: SocketAddr,
    idle: Mutex<Vec<Sender>>,
    drivers: Mutex<JoinSet<()>>,
}

impl Pool {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, idle: Mutex::default(), drivers: Mutex::default() }
    }

    async fn take(&self) -> Result<Sender, Problem> {
        while let Some(mut sender) = self.pop() {
            if !sender.is_closed() && sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let (sender, driver) = open(self.address).await?;
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner).spawn(driver);
        Ok(sender)
    }

    fn pop(&self) -> Option<Sender> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, sender: Sender) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
    }
}

/// Connects.
pub(super) async fn connect(address: SocketAddr) -> Result<TcpStream, Problem> {
    let stream = TcpStream::connect(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => Problem::new("refused", ""),
        _ => Problem::new("not connected", error),
    })?;
    stream.set_nodelay(true).map_err(|error| Problem::new("not connected", error))?;
    Ok(stream)
}

async fn open(address: SocketAddr) -> Result<(Sender, impl Future<Output = ()> + Send + 'static), Problem> {
    let io = TokioIo::new(connect(address).await?);
    let (sender, connection) = conn::http1::handshake(io).await.map_err(|error| Problem::new("reset", error))?;
    Ok((sender, async move {
        // Its end is seen by the requests on it.
        let _ = connection.await;
    }))
}

/// One HTTP/2 connection that requests share; replaced when it is lost.
#[derive(Clone, Default)]
pub(super) struct Http2 {
    sender: Arc<tokio::sync::Mutex<Option<conn::http2::SendRequest<Full<Bytes>>>>>,
    drivers: Arc<Mutex<JoinSet<()>>>,
}

impl Http2 {
    async fn take(&self, address: SocketAddr) -> Result<conn::http2::SendRequest<Full<Bytes>>, Problem> {
        let mut slot = self.sender.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let io = TokioIo::new(connect(address).await?);
        let handshake = conn::http2::handshake(TokioExecutor::new(), io).await;
        let (sender, connection) = handshake.map_err(|error| Problem::new("reset", error))?;
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner).spawn(async move {
            let _ = connection.await;
        });
        *slot = Some(sender.clone());
        Ok(sender)
    }
}

/// Sends one request and checks its answer.
pub(super) async fn send(
    shared: &Shared,
    pool: &Pool,
    http2: &Http2,
    kind: Kind,
    id: &str,
) -> Result<Success, Problem> {
    let address = shared.plan.address;
    let (method, target, body) = match kind {
        Kind::Get => (Method::GET, format!("/work?ms={}", shared.plan.work_ms), String::new()),
        Kind::Fresh => (Method::GET, "/version".to_owned(), String::new()),
        _ => (Method::POST, "/echo".to_owned(), format!("{{\"id\":\"{id}\"}}")),
    };
    let uri = if kind == Kind::H2c { format!("http://{address}{target}") } else { target };
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header("host", address.to_string())
        .header("x-request-id", id)
        .body(Full::new(Bytes::from(body.clone())))
        .map_err(|error| Problem::new("wrong", error))?;
    match kind {
        Kind::H2c => {
            let mut sender = http2.take(address).await?;
            let mut request = request;
            request.headers_mut().remove("host");
            check(sender.send_request(request).await, &body).await?;
        }
        Kind::Fresh => {
            let (mut sender, driver) = open(address).await?;
            let exchange = async {
                let result = check(sender.send_request(request).await, &body).await;
                // The driver ends when the last sender is gone.
                drop(sender);
                result
            };
            let (result, ()) = tokio::join!(exchange, driver);
            result?;
        }
        _ => {
            let mut sender = pool.take().await?;
            check(sender.send_request(request).await, &body).await?;
            pool.give_back(sender);
        }
    }
    Ok(Success::default())
}

async fn check(response: hyper::Result<Response<Incoming>>, body: &str) -> Result<(), Problem> {
    let response = response.map_err(|error| Problem::new("reset", describe(&error)))?;
    let status = response.status();
    let by = response.headers().get("x-instance").and_then(|value| value.to_str().ok()).unwrap_or("?").to_owned();
    let collected = response.into_body().collect().await;
    let answer =
        collected.map_err(|error| Problem::new("truncated", format!("from {by}: {}", describe(&error))))?.to_bytes();
    if status != StatusCode::OK {
        let text: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
        return Err(Problem::new(format!("status {}", status.as_u16()), format!("from {by}: {text}")));
    }
    if !body.is_empty() && answer != body.as_bytes() {
        return Err(Problem::new("wrong", format!("{} bytes from {by} for {}", answer.len(), body.len())));
    }
    Ok(())
}

/// An error with its causes.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
