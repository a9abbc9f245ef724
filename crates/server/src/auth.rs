//! Who may ask over TCP: whoever knows the token. The Unix socket needs none; its file permissions are the check.

use axum::{
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use orchestra_model::{Code, Diagnostic};

use crate::answer::Failure;

/// Lets requests with the right bearer token pass (RFC 6750, section 2.1).
pub(crate) async fn require_token(State(token): State<std::sync::Arc<str>>, request: Request, next: Next) -> Response {
    let given =
        request.headers().get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if given.is_some_and(|given| equal(given, token.as_bytes())) {
        return next.run(request).await;
    }
    let error = Diagnostic::error(Code::UNAUTHORIZED, "the request carries no valid token")
        .help("give the token of the server with `--token-file` or ORCHESTRA_TOKEN");
    let mut response = Failure::new(StatusCode::UNAUTHORIZED, error).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

/// Compares in a time that depends on the lengths only.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}
