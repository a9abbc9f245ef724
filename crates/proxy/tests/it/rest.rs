//! Connections that pause: what rests in between is a socket, and the client must not notice.

use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use orchestra_model::desired::Protocol;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::*;

/// Longer than it takes an idle connection to begin to rest. Nothing can be awaited instead: that nobody notices is the
/// point.
const PAUSE: Duration = Duration::from_millis(200);

/// Answers with the body of the request.
pub(crate) async fn back(request: Request<hyper::body::Incoming>) -> Response<AnyBody> {
    Response::new(full(request.into_body().collect().await.unwrap().to_bytes()))
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), bytes: &str) {
    stream.write_all(bytes.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    tokio::time::sleep(PAUSE).await;
}

/// Reads answers until one ends like this.
async fn hear(stream: &mut (impl AsyncRead + Unpin), end: &str) -> String {
    let mut heard = String::new();
    while !heard.ends_with(end) {
        let mut buffer = [0; 4096];
        let count = soon(end, stream.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "the connection ended after {heard:?}");
        heard.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    heard
}

/// Everything that a client may say before, in and after a pause. What is behind it answers with the body of a request.
pub(crate) async fn pauses(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let post = |body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    // Nothing at all, twice; a body and none.
    say(stream, &post("one")).await;
    hear(stream, "one").await;
    tokio::time::sleep(PAUSE).await;
    say(stream, &post("two")).await;
    hear(stream, "two").await;
    // A request and the beginning of the next one, which hyper had read when the pause began.
    let third = post("three");
    say(stream, &format!("{}{}", post("second"), &third[..20])).await;
    hear(stream, "second").await;
    say(stream, &third[20..40]).await;
    say(stream, &third[40..]).await;
    hear(stream, "three").await;
    // One byte ends the pause, the rest takes its time.
    let fourth = post("four");
    say(stream, &fourth[..1]).await;
    say(stream, &fourth[1..fourth.len() - 2]).await;
    say(stream, &fourth[fourth.len() - 2..]).await;
    hear(stream, "four").await;
    // Chunks, and the empty line that some clients send behind a body.
    let chunks = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nfiv\r\n";
    say(stream, chunks).await;
    say(stream, "1\r\ne\r\n0\r\n\r\n\r\n").await;
    hear(stream, "five").await;
    say(stream, &post("six")).await;
    hear(stream, "six").await;
    // The end.
    say(stream, &post("seven").replace("host", "connection: close\r\nhost")).await;
    hear(stream, "seven").await;
    assert_eq!(soon("the end", stream.read(&mut [0; 8])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_client_does_not_notice_that_its_connection_rests() {
    let world = World::new().await;
    let instance = Instance::http(back).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    pauses(&mut TcpStream::connect(address).await.unwrap()).await;
}

#[tokio::test]
async fn a_request_that_is_still_sent_keeps_its_connection_awake() {
    let world = World::new().await;
    // Answers at once, whatever is still to come.
    let instance = Instance::raw(|mut tcp| async move {
        let mut buffer = [0; 4096];
        while let Ok(1..) = tcp.read(&mut buffer).await {
            if buffer.starts_with(b"POST") {
                let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly").await;
            }
            buffer.fill(0);
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    say(&mut stream, "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 40\r\n\r\nhalf of the body ..").await;
    hear(&mut stream, "early").await;
    // Were the rest of the body taken for a request, it would be answered with 400, or reach the instance.
    let _ = stream.write_all(b"POST /smuggled HTTP/1.1").await;
    let mut heard = String::new();
    let _ = soon("the end", stream.read_to_string(&mut heard)).await;
    assert_eq!(heard, "");
    assert_eq!(instance.connections(), 1);
}

#[tokio::test]
async fn connections_that_rest_end_with_their_route() {
    let world = World::new().await;
    let instance = Instance::http(back).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    say(&mut stream, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut buffer = [0; 4096];
    assert!(stream.read(&mut buffer).await.unwrap() > 0);
    world.apply(Vec::new()).await;
    assert_eq!(soon("the end", stream.read(&mut buffer)).await.unwrap(), 0);
}
