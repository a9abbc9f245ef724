//! The gRPC health protocol against a server of hyper that writes the protocol's bytes, and against other peers.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use orchestra_probe::{Leaf, Outcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{Server, ask, ask_within};

/// What the server sends: fields of the head, messages, trailers.
#[derive(Clone, Default)]
struct Answer {
    status: u16,
    head: Vec<(&'static str, &'static str)>,
    messages: Vec<&'static [u8]>,
    trailers: Vec<(&'static str, &'static str)>,
}

impl Answer {
    fn message(message: &'static [u8]) -> Self {
        Self { status: 200, messages: vec![message], trailers: vec![("grpc-status", "0")], ..Self::default() }
    }
}

fn fields(list: &[(&'static str, &'static str)]) -> HeaderMap {
    list.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

type Seen = Arc<Mutex<Vec<(String, HeaderMap, Vec<u8>)>>>;

async fn health(answer: Answer) -> (Server, Seen) {
    let seen = Seen::default();
    let writer = seen.clone();
    let server = Server::start(move |stream| {
        let (answer, writer) = (answer.clone(), writer.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let (answer, writer) = (answer.clone(), writer.clone());
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes().to_vec();
                writer.lock().unwrap().push((head.uri.path().to_owned(), head.headers, body));
                let mut frames: Vec<Result<Frame<Bytes>, Infallible>> =
                    answer.messages.iter().map(|m| Ok(Frame::data(Bytes::from_static(m)))).collect();
                if !answer.trailers.is_empty() {
                    frames.push(Ok(Frame::trailers(fields(&answer.trailers))));
                }
                let body: BoxBody<Bytes, Infallible> =
                    BodyExt::boxed(StreamBody::new(futures_util::stream::iter(frames)));
                let mut response = Response::new(body);
                *response.status_mut() = answer.status.try_into().unwrap();
                response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
                response.headers_mut().extend(fields(&answer.head));
                Ok::<_, Infallible>(response)
            }
        });
        async move {
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    })
    .await;
    (server, seen)
}

async fn outcome(answer: Answer) -> Outcome {
    let (server, _) = health(answer).await;
    ask(Leaf::Grpc { address: server.address, service: String::new() }).await
}

#[tokio::test]
async fn serving_statuses_are_told_apart() {
    for (message, passed, detail) in [
        (&[0, 0, 0, 0, 2, 8, 1][..], true, "SERVING"),
        (&[0, 0, 0, 0, 2, 8, 2], false, "NOT_SERVING"),
        (&[0, 0, 0, 0, 2, 8, 0], false, "UNKNOWN"),
        (&[0, 0, 0, 0, 0], false, "UNKNOWN"),
        (&[0, 0, 0, 0, 2, 8, 3], false, "SERVICE_UNKNOWN"),
        (&[0, 0, 0, 0, 2, 8, 77], false, "serving status 77"),
        (&[0, 0, 0, 0, 9, 8, 1], false, "not an answer of the gRPC health protocol"),
        (b"hello, world", false, "not an answer of the gRPC health protocol"),
    ] {
        let outcome = outcome(Answer::message(message)).await;
        assert_eq!((outcome.passed, outcome.detail.as_str()), (passed, detail));
    }
    let parts = Answer { messages: vec![&[0, 0, 0], &[0, 2, 8], &[1]], ..Answer::message(&[]) };
    assert_eq!(outcome(parts).await.detail, "SERVING", "a message in pieces");
}

#[tokio::test]
async fn the_question_names_the_service() {
    let (server, seen) = health(Answer::message(&[0, 0, 0, 0, 2, 8, 1])).await;
    let service = "llm.Chat".to_owned();
    assert!(ask(Leaf::Grpc { address: server.address, service }).await.passed);
    let (path, headers, body) = seen.lock().unwrap().remove(0);
    assert_eq!(path, "/grpc.health.v1.Health/Check");
    assert_eq!(headers["content-type"], "application/grpc");
    assert_eq!(headers["te"], "trailers");
    assert_eq!(headers["grpc-timeout"], "20000m");
    assert_eq!(body, b"\0\0\0\0\x0a\x0a\x08llm.Chat");
}

#[tokio::test]
async fn refusals_of_the_call() {
    let refused = |code, message| Answer {
        status: 200,
        head: vec![("grpc-status", code), ("grpc-message", message)],
        ..Answer::default()
    };
    for (answer, detail) in [
        (refused("5", "no such service"), "NOT_FOUND: no such service"),
        (refused("12", ""), "UNIMPLEMENTED"),
        (refused("99", ""), "an unknown gRPC status"),
        (Answer { trailers: vec![("grpc-status", "14")], ..Answer::message(&[0, 0, 0, 0, 2, 8, 1]) }, "UNAVAILABLE"),
        (Answer { status: 503, ..Answer::default() }, "HTTP 503"),
    ] {
        let outcome = outcome(answer).await;
        assert_eq!((outcome.passed, outcome.detail.as_str()), (false, detail));
    }
}

#[tokio::test]
async fn other_peers() {
    let wrong = "the peer does not speak HTTP/2 without TLS, or closed the connection";
    let http1 = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 1_024]).await;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
    })
    .await;
    let outcome = ask(Leaf::Grpc { address: http1.address, service: String::new() }).await;
    assert!(!outcome.passed);
    assert!([wrong, "connection reset by the peer"].contains(&outcome.detail.as_str()), "{}", outcome.detail);

    let closing = Server::start(|_| async {}).await;
    let outcome = ask(Leaf::Grpc { address: closing.address, service: String::new() }).await;
    assert!(!outcome.passed);
    assert!([wrong, "connection reset by the peer"].contains(&outcome.detail.as_str()), "{}", outcome.detail);

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let outcome = ask(Leaf::Grpc { address: closed, service: String::new() }).await;
    assert_eq!(outcome.detail, "connection refused");

    let silent = Server::start(|mut stream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let leaf = Leaf::Grpc { address: silent.address, service: String::new() };
    let outcome = ask_within(leaf, Duration::from_millis(300)).await;
    assert_eq!(outcome.detail, "timeout after 300ms while waiting for the answer");
}

#[tokio::test]
async fn an_endless_answer_is_cut_off() {
    let answer = Answer { messages: vec![&[0; 1_024]; 64], ..Answer::message(&[]) };
    assert_eq!(outcome(answer).await.detail, "the answer is longer than 4 KiB");
}
