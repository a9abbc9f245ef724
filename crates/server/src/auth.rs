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
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
    if given.is_some_and(|given| equal(given, token.as_bytes())) {
        return next.run(request).await;
    }
    let error = Diagnostic::error(Code::UNAUTHORIZED, "the request carries no valid token")
        .help("give the token of the server with `--token-file` or ORCHESTRA_TOKEN");
    let mut response = Failure::new(StatusCode::UNAUTHORIZED, error).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

/// The token in `Bearer TOKEN`; the scheme is written in any case (RFC 9110, section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// Compares in a time that depends on the lengths only: how many characters of a guess are right must not be measurable.
fn equal(a: &[u8], b: &[u8]) -> bool {
    // Every byte is looked at, also after the first difference; the barrier keeps the compiler from knowing better.
    let difference = a.iter().zip(b).fold(0, |difference, (a, b)| std::hint::black_box(difference | (a ^ b)));
    a.len() == b.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_equal_or_not() {
        for (a, b, expected) in [
            ("0123456789abcdef", "0123456789abcdef", true),
            ("0123456789abcdef", "0123456789abcdeF", false),
            ("x123456789abcdef", "0123456789abcdef", false),
            ("0123456789abcde", "0123456789abcdef", false),
            ("0123456789abcdef0", "0123456789abcdef", false),
            ("", "0123456789abcdef", false),
        ] {
            assert_eq!(equal(a.as_bytes(), b.as_bytes()), expected, "{a} {b}");
        }
    }

    #[test]
    fn only_bearer_tokens_count() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer abc"), Some(&b"abc"[..]));
        for other in [&b"Basic abc"[..], b"Bearer", b"abc", b"", b"Bearerabc"] {
            assert_eq!(bearer(other), None);
        }
    }
}
