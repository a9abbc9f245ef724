//! Answers that the proxy gives by itself, in the client's protocol.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use orchestra_model::route::RouteId;

use super::body::ResponseBody;
use crate::metrics::ErrorKind;

const REASON: HeaderName = HeaderName::from_static("x-orchestra-error");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Why the client gets no answer of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    /// When a client may try again.
    after: Duration,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), after: Duration::ZERO }
    }

    /// Tells the client to wait for so long, in whole seconds.
    pub(crate) fn after(self, after: Duration) -> Self {
        Self { after, ..self }
    }

    /// Whether nothing more is read of the client's connection: the rest of the request is of no interest any more, or has
    /// no end that could be found.
    pub(crate) fn ends_connection(&self) -> bool {
        matches!(self.kind, ErrorKind::BadRequest | ErrorKind::TooLarge | ErrorKind::ClientTimeout | ErrorKind::Client)
    }

    fn status(&self) -> StatusCode {
        match self.kind {
            ErrorKind::Connect | ErrorKind::Upstream => StatusCode::BAD_GATEWAY,
            ErrorKind::Hold | ErrorKind::HoldFull | ErrorKind::Cut | ErrorKind::NoRoute | ErrorKind::Breaker => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ErrorKind::BadRequest | ErrorKind::Client => StatusCode::BAD_REQUEST,
            ErrorKind::TargetTooLong => StatusCode::URI_TOO_LONG,
            ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorKind::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::ClientTimeout => StatusCode::REQUEST_TIMEOUT,
            ErrorKind::Timeout | ErrorKind::Idle => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The same in gRPC ("Status codes and their use in gRPC").
    fn grpc_status(&self) -> &'static str {
        match self.kind {
            // INVALID_ARGUMENT
            ErrorKind::BadRequest | ErrorKind::TargetTooLong | ErrorKind::Client => "3",
            // DEADLINE_EXCEEDED
            ErrorKind::Timeout | ErrorKind::Idle | ErrorKind::ClientTimeout => "4",
            // RESOURCE_EXHAUSTED
            ErrorKind::TooLarge | ErrorKind::RateLimited => "8",
            // UNAVAILABLE
            _ => "14",
        }
    }

    /// A short text that names the service and the reason; for gRPC a status, in trailers-only form.
    pub(crate) fn response(&self, route: Option<&RouteId>, grpc: bool) -> Response<ResponseBody> {
        let service = route.map_or_else(|| "this address".to_owned(), |route| format!("{}", route.service));
        let text = format!("{service}: {}", self.message);
        let mut response;
        if grpc {
            response = Response::new(ResponseBody::full(Bytes::new()));
            let status = HeaderValue::from_static(self.grpc_status());
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            response.headers_mut().insert(GRPC_STATUS, status);
            response.headers_mut().insert(GRPC_MESSAGE, percent(&text));
        } else {
            response = Response::new(ResponseBody::full(Bytes::from(format!("{text}\n"))));
            *response.status_mut() = self.status();
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, plain);
            if matches!(self.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
                let seconds = self.after.as_secs() + u64::from(self.after.subsec_nanos() > 0);
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
            }
        }
        response.headers_mut().insert(REASON, HeaderValue::from_static(self.kind.label()));
        response
    }
}

/// Percent-encoding of `grpc-message` (gRPC over HTTP/2, "Responses").
fn percent(text: &str) -> HeaderValue {
    let encode = |byte: u8| match byte {
        b' '..=b'$' | b'&'..=b'~' => (byte as char).to_string(),
        _ => format!("%{byte:02X}"),
    };
    let text: String = text.bytes().map(encode).collect();
    HeaderValue::from_str(&text).expect("visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_name_service_and_reason_in_both_forms() {
        let route = RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        };
        let failure = Failure::new(ErrorKind::Hold, "no ready instance within 5s (50 % ä)");
        let plain = failure.response(Some(&route), false);
        assert_eq!(plain.status(), 503);
        assert_eq!(plain.headers()["retry-after"], "1");
        assert_eq!(plain.headers()["x-orchestra-error"], "hold_timeout");
        let grpc = failure.response(Some(&route), true);
        assert_eq!((grpc.status().as_u16(), &grpc.headers()["grpc-status"]), (200, &HeaderValue::from_static("14")));
        assert_eq!(grpc.headers()["grpc-message"], "api: no ready instance within 5s (50 %25 %C3%A4)");
    }
}
