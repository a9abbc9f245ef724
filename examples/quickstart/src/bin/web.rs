//! The web page, and the way from it to the API: `/api/…` is passed on to `$API_URL`, so that a browser needs one origin.
//!
//! Environment: `PORT`, `API_URL` (`http://host:port`); optional `RELEASE_LABEL`.

use std::{process::ExitCode, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    response::{Html, IntoResponse, Response},
    routing::{any, get},
};
use hyper_util::rt::TokioIo;
use orchestra_quickstart::{
    serve::{Gate, log, run, serve, termination},
    settings::{self, Error},
};
use serde_json::json;
use tokio::net::TcpStream;

const PAGE: &str = include_str!("../../web/index.html");

/// Fields that concern one connection and are not passed on (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [&str; 7] =
    ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];

fn main() -> ExitCode {
    run(async {
        let end = termination()?;
        let url: Uri = settings::text("API_URL").ok_or("API_URL is not set")?.parse()?;
        let api =
            url.authority().filter(|_| url.scheme_str() == Some("http")).ok_or("API_URL must be http://host:port")?;
        let api: Arc<str> = format!("{}:{}", api.host(), api.port_u16().unwrap_or(80)).into();
        log(format_args!("web, API at {api}"));
        let router = Router::new()
            .route("/", get(async || ([(header::CACHE_CONTROL, "no-store")], Html(PAGE))))
            .route("/ready", get(async || "ready\n"))
            .route("/health", get(async || "ok\n"))
            .route("/version", get(async || Json(json!({ "release": settings::text("RELEASE_LABEL") }))))
            .route("/api/{*path}", any(pass_on))
            .with_state(api);
        serve(router, Gate::default(), end).await
    })
}

async fn pass_on(State(api): State<Arc<str>>, request: Request) -> Response {
    match ask(&api, request).await {
        Ok(response) => response,
        Err(error) => {
            log(format_args!("error: the API at {api}: {error}"));
            (StatusCode::BAD_GATEWAY, Json(json!({ "error": format!("the API does not answer: {error}") })))
                .into_response()
        }
    }
}

/// One request over a connection of its own; bodies are passed on as they come, in both directions.
async fn ask(api: &str, request: Request) -> Result<Response, Error> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    head.uri = path.strip_prefix("/api").unwrap_or(path).parse()?;
    strip(&mut head.headers);
    head.headers.insert(header::HOST, HeaderValue::from_str(api)?);
    let stream = TcpStream::connect(api).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // The connection is driven by whoever reads the response: when the browser goes away, so does the request.
    let mut connection = Box::pin(connection);
    let answered = tokio::select! {
        biased;
        answered = sender.send_request(Request::from_parts(head, body)) => answered,
        ended = &mut connection => {
            ended?;
            return Err("the connection was closed".into());
        }
    }?;
    let (mut head, body) = answered.into_parts();
    strip(&mut head.headers);
    let body = Driven { body, connection: Some(connection), _sender: sender };
    Ok(Response::from_parts(head, Body::new(body)))
}

fn strip(headers: &mut HeaderMap) {
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

type Connection = hyper::client::conn::http1::Connection<TokioIo<TcpStream>, Body>;

/// A response body that drives the connection which it comes from.
struct Driven {
    body: hyper::body::Incoming,
    connection: Option<std::pin::Pin<Box<Connection>>>,
    /// Without it the connection would end.
    _sender: hyper::client::conn::http1::SendRequest<Body>,
}

impl hyper::body::Body for Driven {
    type Data = hyper::body::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        if let Some(connection) = &mut self.connection
            && connection.as_mut().poll(context).is_ready()
        {
            // An error of the connection reaches the body as well.
            self.connection = None;
        }
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}
