//! Errors as answers: a status and the diagnostics that a user reads.

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Request},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use orchestra_api::ErrorBody;
use orchestra_engine::EngineError;
use orchestra_model::{Code, Diagnostic, diagnostic::Location};
use serde::de::DeserializeOwned;

/// An answer that says what is wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    pub(crate) errors: Vec<Diagnostic>,
}

impl Failure {
    pub(crate) fn new(status: StatusCode, error: Diagnostic) -> Self {
        Self { status, errors: vec![error] }
    }

    pub(crate) fn not_found(what: impl std::fmt::Display) -> Self {
        EngineError::NotFound(what.to_string()).into()
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let errors = error.diagnostics();
        let status = match &error {
            EngineError::Refused(_) => match errors.first().map(|e| e.code) {
                Some(Code::NOT_FOUND) => StatusCode::NOT_FOUND,
                Some(Code::SERVER_UNREACHABLE) => StatusCode::SERVICE_UNAVAILABLE,
                Some(Code::TOO_LARGE) => StatusCode::PAYLOAD_TOO_LARGE,
                _ => StatusCode::UNPROCESSABLE_ENTITY,
            },
            EngineError::Busy { .. } | EngineError::Stale(_) => StatusCode::CONFLICT,
            EngineError::NotFound(_) => StatusCode::NOT_FOUND,
            EngineError::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            EngineError::Read(_) | EngineError::Write(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, errors }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { errors: self.errors })).into_response()
    }
}

/// What every request that cannot be understood is told beside what is wrong with it.
const DESCRIBED: &str = "GET /v1/openapi.json describes what each operation takes";

/// A JSON body; what is wrong with one is said as a diagnostic, with its place.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let media = request.headers().get(header::CONTENT_TYPE).map(|value| value.as_bytes().to_owned());
        if !media.as_deref().is_some_and(is_json) {
            let message = match media {
                None => "the body has no content type; it must be JSON".to_owned(),
                Some(media) => {
                    format!("the body must be JSON, and its content type is `{}`", media.escape_ascii())
                }
            };
            let error =
                Diagnostic::error(Code::BAD_REQUEST, message).help("send the header `Content-Type: application/json`");
            return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                let message = format!("the body is larger than {} MiB", crate::handlers::BODY_LIMIT >> 20);
                let error = Diagnostic::error(Code::TOO_LARGE, message).help("split the stack into several");
                return Failure::new(rejection.status(), error);
            }
            let error = Diagnostic::error(Code::BAD_REQUEST, "the body was cut off").help("send it again");
            Failure::new(StatusCode::BAD_REQUEST, error)
        })?;
        parse(&bytes).map(Self).map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error))
    }
}

fn is_json(media: &[u8]) -> bool {
    let essence = media.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Diagnostic> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|error| {
            let path = error.path().to_string();
            (path, error.into_inner())
        })
        .and_then(|value| deserializer.end().map(|()| value).map_err(|error| (String::new(), error)));
    parsed.map_err(|(path, error)| {
        // serde_json says the place again at the end of its message.
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let what = text.strip_suffix(&place).unwrap_or(&text);
        let message = match error.classify() {
            serde_json::error::Category::Data if matches!(path.as_str(), "" | ".") => format!("the body: {what}"),
            serde_json::error::Category::Data => format!("the body at `{path}`: {what}"),
            _ if bytes.is_empty() => "the body is empty; it must be JSON".to_owned(),
            _ => format!("the body is not JSON: {what}"),
        };
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
        let location = place_in("request body", line, error.line(), error.column());
        Diagnostic::error(Code::BAD_REQUEST, message).at(location, "").help(DESCRIBED)
    })
}

/// A place in what a client sent. Of a long line it shows the part around the place.
fn place_in(file: &str, line: &str, number: usize, column: usize) -> Location {
    /// Longest part of a line that is shown, and how much of it stands before the place, in characters.
    const SHOWN: usize = 120;
    const BEFORE: usize = 80;
    let at = line.len().min(column.saturating_sub(1));
    let at = line[..line.floor_char_boundary(at)].chars().count();
    let skipped = if line.chars().count() > SHOWN { at.saturating_sub(BEFORE) } else { 0 };
    let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    Location {
        file: file.to_owned(),
        line: small(number.max(1)),
        column: small(at - skipped + 1),
        length: 1,
        source: line.chars().skip(skipped).take(SHOWN).collect(),
    }
}

/// A query string; what is wrong with one is said as a diagnostic, with its place.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let query = parts.uri.query().unwrap_or_default();
        let deserializer = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
        serde_path_to_error::deserialize(deserializer).map(Self).map_err(|error| {
            let path = error.path().to_string();
            let what = error.into_inner();
            let known = path != "." && !path.is_empty();
            let message = if known { format!("the query at `{path}`: {what}") } else { format!("the query: {what}") };
            // The key as it stands there: at the beginning, or behind an ampersand.
            let mut at = 0;
            for pair in query.split('&') {
                if known && pair.split('=').next() == Some(&path) {
                    break;
                }
                at += pair.len() + 1;
            }
            let at = if at > query.len() { 0 } else { at };
            let error = Diagnostic::error(Code::BAD_REQUEST, message)
                .at(place_in("query string", query, 1, at + 1), "")
                .help(DESCRIBED);
            Failure::new(StatusCode::BAD_REQUEST, error)
        })
    }
}

/// A path with ids in it; an id that is none names nothing.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(_) => Err(Failure::not_found(format!("`{}`", parts.uri.path()))),
        }
    }
}
