//! The proxy's own address: metrics in Prometheus text format on `/metrics`, `/status`, and `/healthz`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use orchestra_task::TaskKind;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::state::Proxy;

/// Scrapes are short; whoever takes longer is cut.
const LIMIT: Duration = Duration::from_secs(30);

/// Serves until asked to stop.
pub(crate) async fn run(proxy: Arc<Proxy>, listener: TcpListener, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((tcp, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let shared = Arc::clone(&proxy);
        proxy.tree.start(TaskKind::Connection, "admin connection", async move {
            let service = service_fn(move |request| {
                let response = answer(&shared, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(LIMIT).keep_alive(false);
            let connection = builder.serve_connection(TokioIo::new(tcp), service);
            // An admin client that fails is its own affair.
            let _ = tokio::time::timeout(LIMIT, connection).await;
        });
    }
}

fn answer(proxy: &Proxy, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", proxy.page())
        }
        (&Method::GET | &Method::HEAD, "/status") => {
            (StatusCode::OK, "application/json", format!("{:#}\n", proxy.table.load().status()))
        }
        (&Method::GET | &Method::HEAD, "/healthz") => (StatusCode::OK, "text/plain", "serving\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "try /metrics, /status or /healthz\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
