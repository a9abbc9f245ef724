//! Errors as answers: a status and the diagnostics that a user reads.

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Request, rejection::JsonRejection},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use orchestra_api::ErrorBody;
use orchestra_engine::EngineError;
use orchestra_model::{Code, Diagnostic};
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

/// A JSON body; what is wrong with one is said as a diagnostic.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => {
                let status = match &rejection {
                    JsonRejection::BytesRejection(inner) => inner.status(),
                    _ => StatusCode::BAD_REQUEST,
                };
                let (code, help) = if status == StatusCode::PAYLOAD_TOO_LARGE {
                    (Code::TOO_LARGE, "split the stack into several")
                } else {
                    (Code::INCOMPATIBLE, "GET /v1/openapi.json describes what each operation takes")
                };
                Err(Self::failure(status, Diagnostic::error(code, rejection.body_text()).help(help)))
            }
        }
    }
}

impl<T> Body<T> {
    fn failure(status: StatusCode, error: Diagnostic) -> Failure {
        Failure::new(status, error)
    }
}

/// A query string; what is wrong with one is said as a diagnostic.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(Failure::new(
                StatusCode::BAD_REQUEST,
                Diagnostic::error(Code::INCOMPATIBLE, rejection.body_text())
                    .help("GET /v1/openapi.json describes what each operation takes"),
            )),
        }
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
