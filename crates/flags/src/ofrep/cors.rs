//! Leave for programs in browsers, which ask from pages of another origin (Fetch Standard, CORS protocol).
//!
//! Nothing here depends on cookies, so no credentials are ever allowed, and any page may be: what it can see, everybody who
//! reaches the port can see.

use super::{Request, Response};

/// Pages that may ask from within a browser.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    /// All.
    #[default]
    Any,
    /// These, written as browsers do: `https://app.example.com`, `http://localhost:8080`. None of them is nobody.
    Only(Vec<String>),
}

/// Longest list of header fields that is repeated to a browser.
const MAX_HEADERS: usize = 1024;

/// Adds to a response what lets the page read it.
pub(super) fn allow(origins: &Origins, request: &Request<'_>, mut response: Response) -> Response {
    let Some(origin) = request.first("origin") else { return response };
    let allowed = match origins {
        Origins::Any => "*",
        Origins::Only(list) => {
            // Whether it is allowed or not, the answer depends on who asks.
            response = response.with("vary", "origin");
            match list.iter().find(|allowed| *allowed == origin) {
                Some(origin) => origin,
                None => return response,
            }
        }
    };
    response = response.with("access-control-allow-origin", allowed);
    let asked = request.first("access-control-request-method");
    if request.method != "OPTIONS" || asked.is_none() {
        return response.with("access-control-expose-headers", "etag, retry-after");
    }
    if let Some(headers) = request.first("access-control-request-headers").filter(|headers| are_names(headers)) {
        response = response.with("access-control-allow-headers", headers);
    }
    response.with("access-control-allow-methods", "GET, POST, OPTIONS").with("access-control-max-age", "600")
}

/// A list of `token`s (RFC 9110, section 5.6.2): clients may be told to send any field along.
fn are_names(headers: &str) -> bool {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    headers.len() <= MAX_HEADERS
        && headers.split(',').map(str::trim).all(|name| !name.is_empty() && name.bytes().all(token))
}
