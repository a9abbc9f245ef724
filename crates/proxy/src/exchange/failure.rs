//! Answers that the proxy gives by itself, in the client's protocol.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use orchestra_model::route::RouteId;

use super::body::ResponseBody;
use crate::metrics::ErrorKind;

const REASON: HeaderName = HeaderName::from_static("x-orchestra-error");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Seconds after which a client may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Why the client gets no answer of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    fn status(&self) -> StatusCode {
        match self.kind {
            ErrorKind::Connect | ErrorKind::Upstream => StatusCode::BAD_GATEWAY,
            ErrorKind::Hold | ErrorKind::HoldFull | ErrorKind::Cut | ErrorKind::NoRoute => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            ErrorKind::BadRequest | ErrorKind::Client => StatusCode::BAD_REQUEST,
        }
    }

    /// A short text that names the service and the reason; for gRPC the status 14 (`UNAVAILABLE`), or 3 for what will
    /// never be accepted, in trailers-only form.
    pub(crate) fn response(&self, route: Option<&RouteId>, grpc: bool) -> Response<ResponseBody> {
        let service = route.map_or_else(|| "this address".to_owned(), |route| format!("{}", route.service));
        let text = format!("{service}: {}", self.message);
        let mut response;
        if grpc {
            response = Response::new(ResponseBody::full(Bytes::new()));
            let refused = self.status() == StatusCode::BAD_REQUEST;
            let status = HeaderValue::from_static(if refused { "3" } else { "14" });
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            response.headers_mut().insert(GRPC_STATUS, status);
            response.headers_mut().insert(GRPC_MESSAGE, percent(&text));
        } else {
            response = Response::new(ResponseBody::full(Bytes::from(format!("{text}\n"))));
            *response.status_mut() = self.status();
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, plain);
            if self.status() == StatusCode::SERVICE_UNAVAILABLE {
                response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
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
