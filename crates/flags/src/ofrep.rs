//! The OpenFeature Remote Evaluation Protocol, version 0.3.0, from request to response.
//!
//! Source: `service/openapi.yaml` and the decision records of github.com/open-feature/protocol.
//!
//! | request | response |
//! |---|---|
//! | `POST /ofrep/v1/evaluate/flags/{key}` | 200 with the value; 400, 404 with an error code |
//! | `POST /ofrep/v1/evaluate/flags` | 200 with all values, an `ETag`, and where changes are announced; 304; 400 |
//! | `GET /ofrep/v1/events` | 200, server-sent events: [`change_event`] now and whenever the flags change |
//! | `OPTIONS` of these | 204, for programs in browsers |
//! | anything | 401 without a key where keys are set; 404, 405, 413 |
//!
//! Nothing here waits or owns a socket. The host reads a request with a body of at most [`MAX_BODY`] bytes, calls
//! [`answer`], writes the response, and if that says [`Response::follow`], keeps the connection and writes
//! [`change_event`] for each newer [`Served`], and [`KEEP_ALIVE`] every [`KEEP_ALIVE_EVERY`] in between.
//!
//! Points that the protocol leaves open, or that are easily got wrong:
//!
//! - The `ETag` of a bulk answer is made of the answer, not of the flag set: clients send their last one along when the
//!   context has changed too, and must not be told then that nothing has. A change that does not concern a context is a
//!   304 for it.
//! - The list of reasons is closed and has no `DEFAULT`. Where rules are there and none applies, the reason is `UNKNOWN` and
//!   the metadata has `orchestra.reason: DEFAULT`.
//! - `context` must be there; `targetingKey` only where a flag splits by it, because the official clients leave it out.
//! - Some clients need `variant` in every answer: a flag that is off answers with its `off` variant.
//! - A subscriber is told at once to fetch, unless it says that it has seen the present version: between its first fetch
//!   and its subscription something may have changed.

use orchestra_model::{Digest, EnvironmentId, quantity::Timespan, time::UnixMillis};
use serde_json::{Value, json};

use crate::{Compiled, Context, ErrorCode, Failure};

mod body;
mod cors;

pub use cors::Origins;

/// Largest body of a request that is read.
pub const MAX_BODY: usize = 64 << 10;

/// A comment that keeps intermediaries from closing a quiet stream of events.
pub const KEEP_ALIVE: &[u8] = b":\n\n";

/// How often [`KEEP_ALIVE`] is due on a quiet stream: half of what proxies usually allow.
pub const KEEP_ALIVE_EVERY: Timespan = Timespan::seconds(25);

const FLAGS: &str = "/ofrep/v1/evaluate/flags";
const EVENTS: &str = "/ofrep/v1/events";

/// A version of the flags as it is served.
#[derive(Clone, Debug)]
pub struct Served {
    /// The flags.
    pub flags: Compiled,
    /// When they last changed.
    pub changed_at: UnixMillis,
    /// How they are served.
    pub settings: Settings,
}

/// How flags are served.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Shown in the metadata of a bulk answer.
    pub environment: Option<EnvironmentId>,
    /// Path under which the host serves the protocol, such as `/flags`; the host takes it off before it calls [`answer`].
    pub prefix: String,
    /// Pages that may ask from within a browser.
    pub origins: Origins,
    /// Digests of the keys ([`Settings::digest_of_key`]) of which a request must show one, as `Authorization: Bearer KEY` or
    /// `X-API-Key: KEY`. None lets everybody ask.
    pub keys: Vec<Digest>,
}

impl Settings {
    /// What is kept of a key.
    pub fn digest_of_key(key: &str) -> Digest {
        Digest::of(key)
    }
}

/// A request, its body read.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// In capitals.
    pub method: &'a str,
    /// Path with query, [`Settings::prefix`] taken off.
    pub path: &'a str,
    /// The lines of the header field with a name in lower case, in their order: a list may come in several.
    pub header: &'a dyn Fn(&str) -> Vec<&'a str>,
    /// At most [`MAX_BODY`] bytes; of a longer one at least a byte more.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// The first line of a header field.
    pub(crate) fn first(&self, name: &str) -> Option<&'a str> {
        (self.header)(name).first().copied()
    }
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header fields, names in lower case. `content-length` is the host's.
    pub headers: Vec<(&'static str, String)>,
    /// Body; of a stream its beginning.
    pub body: Vec<u8>,
    /// The response goes on: see [`change_event`].
    pub follow: bool,
}

impl Response {
    fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), follow: false }
    }

    fn json(status: u16, body: Vec<u8>) -> Self {
        let headers = vec![("content-type", "application/json".to_owned()), ("cache-control", "no-store".to_owned())];
        Self { status, headers, body, follow: false }
    }

    /// A refusal that is not about a flag: `{"errorDetails": …}`.
    pub fn refusal(status: u16, details: &str) -> Self {
        Self::json(status, json!({"errorDetails": details}).to_string().into_bytes())
    }

    /// 429: the host lets the client ask again after `wait`, in whole seconds and at least one.
    pub fn too_many_requests(wait: Timespan) -> Self {
        let seconds = wait.duration().as_millis().div_ceil(1000).max(1);
        Self::refusal(429, "too many requests").with("retry-after", seconds.to_string())
    }

    /// 500: something went wrong that is not the client's fault.
    pub fn internal_error() -> Self {
        Self::refusal(500, "an unexpected error occurred")
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The first header field of a name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| *found == name).map(|(_, value)| value.as_str())
    }
}

/// What a request asks for.
enum Target<'a> {
    /// One flag, as the path spells it.
    Flag(&'a str),
    All,
    Events,
}

/// Answers a request. Never fails, and takes time in proportion to body and flags only.
pub fn answer(served: &Served, request: &Request<'_>) -> Response {
    let response = route(served, request);
    cors::allow(&served.settings.origins, request, response)
}

/// Whether a path, with [`Settings::prefix`] taken off, belongs to the protocol, so that hosts can share their port.
pub fn is_ours(path: &str) -> bool {
    path.starts_with("/ofrep/")
}

fn route(served: &Served, request: &Request<'_>) -> Response {
    let path = request.path.split(['?', '#']).next().unwrap_or_default();
    let target = match path.strip_prefix(FLAGS) {
        Some("" | "/") => Target::All,
        Some(rest) if rest.starts_with('/') => Target::Flag(&rest[1..]),
        _ if path == EVENTS => Target::Events,
        _ => return Response::refusal(404, "there is nothing here; the protocol begins at /ofrep/v1/evaluate/flags"),
    };
    let method = if matches!(target, Target::Events) { "GET" } else { "POST" };
    if request.method == "OPTIONS" {
        return Response::empty(204).with("allow", format!("{method}, OPTIONS"));
    }
    if request.method != method {
        return Response::refusal(405, &format!("use {method}")).with("allow", format!("{method}, OPTIONS"));
    }
    if !admitted(&served.settings, request) {
        return Response::refusal(401, "a valid key is needed, as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
            .with("www-authenticate", "Bearer");
    }
    match target {
        Target::Events => events(served, request),
        _ if request.body.len() > MAX_BODY => {
            Response::refusal(413, &format!("the body is longer than {MAX_BODY} bytes"))
        }
        Target::Flag(key) => one(served, key, request.body),
        Target::All => all(served, request),
    }
}

fn admitted(settings: &Settings, request: &Request<'_>) -> bool {
    if settings.keys.is_empty() {
        return true;
    }
    let bearer = request.first("authorization").and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let shown = bearer.or_else(|| request.first("x-api-key").map(str::trim));
    shown.is_some_and(|key| settings.keys.contains(&Settings::digest_of_key(key)))
}

fn one(served: &Served, key: &str, body: &[u8]) -> Response {
    let Some(key) = percent_decoded(key) else {
        let failure = Failure { code: ErrorCode::FlagNotFound, details: "the key is not UTF-8 text".to_owned() };
        return Response::json(404, body::failure(Some(""), &failure));
    };
    let shown: String = key.chars().take(100).collect();
    let answered = context(body).and_then(|context| {
        let evaluation = served.flags.evaluate(&key, &context)?;
        Ok(body::success(&key, &evaluation))
    });
    match answered {
        Ok(body) => Response::json(200, body),
        Err(failure) => {
            let status = if failure.code == ErrorCode::FlagNotFound { 404 } else { 400 };
            Response::json(status, body::failure(Some(&shown), &failure))
        }
    }
}

fn all(served: &Served, request: &Request<'_>) -> Response {
    let context = match context(request.body) {
        Ok(context) => context,
        Err(failure) => return Response::json(400, body::failure(None, &failure)),
    };
    let body = body::bulk(served, &context, &format!("{}{EVENTS}", served.settings.prefix));
    let etag = format!("\"{}\"", body::digest(&body));
    if (request.header)("if-none-match").iter().any(|seen| matches(seen, &etag)) {
        return Response::empty(304).with("etag", etag);
    }
    Response::json(200, body).with("etag", etag)
}

fn events(served: &Served, request: &Request<'_>) -> Response {
    let mut body = b"retry: 2000\n\n".to_vec();
    if request.first("last-event-id") != Some(version(served)) {
        body.extend(change_event(served));
    }
    let headers = vec![
        ("content-type", "text/event-stream".to_owned()),
        ("cache-control", "no-store".to_owned()),
        ("x-accel-buffering", "no".to_owned()),
    ];
    Response { status: 200, headers, body, follow: true }
}

/// The server-sent event that tells clients to fetch anew.
pub fn change_event(served: &Served) -> Vec<u8> {
    let version = version(served);
    let data = json!({"type": "refetchEvaluation", "etag": version, "lastModified": served.changed_at / 1000});
    format!("id: {version}\nevent: message\ndata: {data}\n\n").into_bytes()
}

fn version(served: &Served) -> &str {
    let digest = served.flags.digest().as_str();
    digest.get(..32).unwrap_or(digest)
}

/// The context in a body.
fn context(body: &[u8]) -> Result<Context, Failure> {
    // Nesting is bounded by the reader, at 128 levels.
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Failure { code: ErrorCode::ParseError, details: format!("the body is not JSON: {error}") })?;
    let invalid = |details: String| Failure { code: ErrorCode::InvalidContext, details };
    let Value::Object(mut fields) = value else { return Err(invalid("the body is not an object".to_owned())) };
    let context = fields.remove("context").ok_or_else(|| invalid("the body has no `context`".to_owned()))?;
    Context::try_from(context).map_err(|error| invalid(error.to_string()))
}

/// Whether a line of `If-None-Match` names `etag` (RFC 9110, section 13.1.2: by weak comparison). Clients may have lost the quotes.
fn matches(seen: &str, etag: &str) -> bool {
    seen.split(',').map(str::trim).any(|tag| {
        let tag = tag.strip_prefix("W/").unwrap_or(tag);
        tag == "*" || tag == etag || etag.trim_matches('"') == tag
    })
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let value = digit()? * 16 + digit()?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}
