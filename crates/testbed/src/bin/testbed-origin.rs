//! An origin for measuring what stands in front of it: answers HTTP/1.1 with as little work as possible, on one thread.
//!
//! `testbed-origin` listens on `127.0.0.1` to `127.0.0.5`, on the port of every variable `PORT_…` of its environment: whoever
//! connects has some 28,000 ports for each of these addresses, so that one who takes them all leaves those of others.
//!
//! | path | answer |
//! |---|---|
//! | `/size/N` | `N` bytes |
//! | `/events` | an event stream with one event, and then silence until the client leaves |
//! | `/address` | the address on which the connection arrived |
//! | anything else | two bytes |
//!
//! It understands what honest proxies and load generators send: requests without a body.

use std::{collections::HashMap, io, net::Ipv4Addr, rc::Rc};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinSet, LocalSet},
};

const EVENTS: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n\
    transfer-encoding: chunked\r\n\r\n11\r\ndata: connected\n\n\r\n";
/// Largest answer.
const MAX_SIZE: usize = 16 << 20;
/// Longest head of a request.
const MAX_HEAD: usize = 64 << 10;

fn main() -> io::Result<()> {
    let ports: Vec<u16> = std::env::vars()
        .filter(|(name, _)| name.starts_with("PORT_"))
        .filter_map(|(_, value)| value.parse().ok())
        .collect();
    if ports.is_empty() {
        return Err(io::Error::other("no variable PORT_… names a port"));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut listeners = JoinSet::new();
        for (port, last) in ports.into_iter().flat_map(|port| (1..=5).map(move |last| (port, last))) {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind((Ipv4Addr::new(127, 0, 0, last), port).into())?;
            listeners.spawn_local(accept(socket.listen(4096)?));
        }
        listeners.join_next().await.expect("there is a listener").map_err(io::Error::other)
    })
}

async fn accept(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        // What accept(2) reports may be the fault of one connection, or pass: others are served all the same.
        let Ok((tcp, _)) = listener.accept().await else {
            tokio::task::yield_now().await;
            continue;
        };
        let _ = tcp.set_nodelay(true);
        connections.spawn_local(async move {
            // A client that went away is the client's affair.
            let _ = serve(tcp).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut tcp: TcpStream) -> io::Result<()> {
    // Small: ten thousand connections are idle at a time.
    let mut input = BytesMut::with_capacity(1024);
    let mut answers: HashMap<usize, Rc<[u8]>> = HashMap::new();
    loop {
        let Some(head) = take_head(&mut input) else {
            if input.len() > MAX_HEAD || tcp.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
            continue;
        };
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let path = line.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        let closes = head.windows(17).any(|part| part.eq_ignore_ascii_case(b"connection: close"));
        match path {
            b"/events" => {
                tcp.write_all(EVENTS).await?;
                // Whatever comes now, the stream ends with the connection.
                while tcp.read_buf(&mut input).await? > 0 {
                    input.clear();
                }
                return Ok(());
            }
            b"/address" => tcp.write_all(&whole(tcp.local_addr()?.to_string().as_bytes())).await?,
            _ => {
                let size = path.strip_prefix(b"/size/").and_then(|n| std::str::from_utf8(n).ok()?.parse().ok());
                let size: usize = size.unwrap_or(2).min(MAX_SIZE);
                let answer = answers.entry(size).or_insert_with(|| whole(&vec![b'x'; size]).into());
                tcp.write_all(answer).await?;
            }
        }
        if closes {
            return tcp.shutdown().await;
        }
    }
}

/// The next head, with its end.
fn take_head(input: &mut BytesMut) -> Option<Bytes> {
    let end = input.windows(4).position(|part| part == b"\r\n\r\n")?;
    Some(input.split_to(end + 4).freeze())
}

fn whole(body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}
