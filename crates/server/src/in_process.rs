//! A server within the client's process: the same handlers without a socket.

use axum::Router;
use bytes::Bytes;
use http_body_util::BodyExt;
use orchestra_api::{Body, BoxFuture, Transport, TransportError};
use tower::ServiceExt;

/// Carries requests to a router in this process.
pub struct InProcess {
    router: Router,
}

impl InProcess {
    /// A transport to `router`.
    pub fn new(router: Router) -> Self {
        Self { router }
    }
}

impl Transport for InProcess {
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Body>, TransportError>> {
        let router = self.router.clone();
        Box::pin(async move {
            let request = request.map(axum::body::Body::from);
            let response = match router.oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            let lost =
                |error: axum::Error| TransportError::Lost { endpoint: "this process".to_owned(), source: error.into() };
            Ok(response.map(|body| body.map_err(lost).boxed_unsync()))
        })
    }

    fn describe(&self) -> String {
        "this process".to_owned()
    }
}
