//! The gRPC health protocol (`grpc.health.v1.Health/Check`, <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>).
//!
//! HTTP/2 comes from hyper; the two messages have one field each and are written and read by hand:
//! `HealthCheckRequest { string service = 1 }` and `HealthCheckResponse { ServingStatus status = 1 }`.

use std::{future::Future, net::SocketAddr, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use orchestra_task::{TaskKind, TaskTree};

use crate::check::{Fault, connect};

/// Longest answer; a well-formed one has 7 bytes.
const ANSWER: usize = 4 * 1024;

/// Names of gRPC statuses (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
const STATUSES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// A question to a health service.
pub(crate) struct Request {
    address: SocketAddr,
    message: Bytes,
    timeout: Duration,
}

/// Starts hyper's tasks in a tree that ends with the check.
#[derive(Clone)]
struct Executor(TaskTree);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.start(TaskKind::Connection, "grpc check", future);
    }
}

/// Ends the tasks of a check when it ends, in whatever way.
struct Scope(TaskTree);

impl Drop for Scope {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

// === impl Request ===

impl Request {
    pub(crate) fn new(address: SocketAddr, service: &str, timeout: Duration) -> Self {
        Self { address, message: encode(service), timeout }
    }

    pub(crate) async fn ask(&self, tree: &TaskTree, stage: &mut &'static str) -> Result<String, Fault> {
        let stream = connect(self.address).await?;
        *stage = "while waiting for the answer";
        let scope = Scope(tree.child());
        let (mut sender, connection) = hyper::client::conn::http2::Builder::new(Executor(scope.0.clone()))
            .max_header_list_size(16 * 1024)
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(64 * 1024)
            .handshake::<_, Full<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|error| fault(&error))?;
        scope.0.start(TaskKind::Connection, "grpc check", connection);
        // At most 8 digits are allowed; a longer timeout is ours alone to keep.
        let millis = self.timeout.as_millis().min(99_999_999);
        let request = http::Request::post(format!("http://{}/grpc.health.v1.Health/Check", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", format!("{millis}m"))
            .header("user-agent", concat!("orchestra-probe/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(self.message.clone()))
            .expect("an address and constant fields make a request");
        let response = sender.send_request(request).await.map_err(|error| fault(&error))?;
        if response.status() != http::StatusCode::OK {
            return Err(Fault::Answer(format!("HTTP {}", response.status().as_u16())));
        }
        // An error without a message comes as one head (a "trailers-only" response).
        refused(response.headers())?;
        let collected = Limited::new(response.into_body(), ANSWER).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                Fault::Answer("the answer is longer than 4 KiB".to_owned())
            } else {
                Fault::Answer("the answer ended early".to_owned())
            }
        })?;
        if let Some(trailers) = collected.trailers() {
            refused(trailers)?;
        }
        match decode(&collected.to_bytes()) {
            Some(0) => Err(Fault::Answer("UNKNOWN".to_owned())),
            Some(1) => Ok("SERVING".to_owned()),
            Some(2) => Err(Fault::Answer("NOT_SERVING".to_owned())),
            Some(3) => Err(Fault::Answer("SERVICE_UNKNOWN".to_owned())),
            Some(other) => Err(Fault::Answer(format!("serving status {other}"))),
            None => Err(Fault::Answer("not an answer of the gRPC health protocol".to_owned())),
        }
    }
}

fn fault(error: &hyper::Error) -> Fault {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::ConnectionReset
        {
            return Fault::Answer("connection reset by the peer".to_owned());
        }
        cause = inner.source();
    }
    Fault::Answer("the peer does not speak HTTP/2 without TLS, or closed the connection".to_owned())
}

/// An error if the fields hold a gRPC status other than OK.
fn refused(fields: &http::HeaderMap) -> Result<(), Fault> {
    let Some(status) = fields.get("grpc-status") else { return Ok(()) };
    let code: Option<usize> = status.to_str().ok().and_then(|text| text.parse().ok());
    if code == Some(0) {
        return Ok(());
    }
    let name = code.and_then(|code| STATUSES.get(code)).copied().unwrap_or("an unknown gRPC status");
    let message = fields.get("grpc-message").map(|value| String::from_utf8_lossy(value.as_bytes()));
    Err(Fault::Answer(match message {
        Some(message) if !message.is_empty() => format!("{name}: {message}"),
        _ => name.to_owned(),
    }))
}

/// The message with its prefix: uncompressed, length in 4 bytes.
fn encode(service: &str) -> Bytes {
    let mut field = BytesMut::new();
    if !service.is_empty() {
        field.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            field.put_u8(u8::try_from(length & 0x7f).expect("7 bits") | 0x80);
            length >>= 7;
        }
        field.put_u8(u8::try_from(length).expect("7 bits"));
        field.put_slice(service.as_bytes());
    }
    let mut message = BytesMut::with_capacity(5 + field.len());
    message.put_u8(0);
    message.put_u32(u32::try_from(field.len()).unwrap_or(u32::MAX));
    message.put(field);
    message.freeze()
}

/// The serving status in a prefixed `HealthCheckResponse`; `None` if it is none.
fn decode(bytes: &[u8]) -> Option<u64> {
    let (prefix, message) = bytes.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || usize::try_from(length).ok()? != message.len() {
        return None;
    }
    let mut rest = message;
    // Absent means 0; of several the last counts; other fields are skipped.
    let mut status = 0;
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        match (tag >> 3, tag & 7) {
            (1, 0) => status = varint(&mut rest)?,
            (_, 0) => drop(varint(&mut rest)?),
            (_, 1) => rest = rest.get(8..)?,
            (_, 2) => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                rest = rest.get(length..)?;
            }
            (_, 5) => rest = rest.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        assert_eq!(&encode("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&encode("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = encode(&"x".repeat(300));
        assert_eq!(long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
        assert_eq!(decode(&[0, 0, 0, 0, 0]), Some(0), "UNKNOWN is the default and not sent");
        assert_eq!(decode(&[0, 0, 0, 0, 2, 8, 1]), Some(1));
        assert_eq!(decode(&[0, 0, 0, 0, 6, 0x12, 2, 9, 9, 8, 2]), Some(2), "an unknown field before it");
        for wrong in [&[][..], &[0, 0, 0, 0], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 3, 8, 1], &[0, 0, 0, 0, 1, 8]] {
            assert_eq!(decode(wrong), None, "{wrong:?}");
        }
        assert_eq!(decode(&[0, 0, 0, 0, 12, 8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1]), None);
    }
}
