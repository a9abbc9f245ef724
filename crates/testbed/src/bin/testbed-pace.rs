//! Measures latency under open-loop load, or holds idle connections.
//!
//! `testbed-pace rate ADDRESS PATH kept|fresh|http2 RATE SECONDS CONNECTIONS SEED` prints one line of JSON.
//!
//! `testbed-pace hold ADDRESS PATH COUNT` opens connections, asks for the path on each, reads what comes first and
//! keeps them open; prints how many are open, and ends when its standard input does.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use orchestra_testbed::pace::{Plan, Wire, run};

const USAGE: &str = "usage: testbed-pace rate ADDRESS PATH kept|fresh|http2 RATE SECONDS CONNECTIONS SEED\n\
    \x20      testbed-pace hold ADDRESS PATH COUNT";

/// Connections that are asked at a time.
const TOGETHER: usize = 50;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["rate", address, path, wire, rate, seconds, connections, seed] => {
            let wire = match wire {
                "kept" => Wire::Kept,
                "fresh" => Wire::Fresh,
                "http2" => Wire::Http2,
                _ => return Err(io::Error::other(USAGE)),
            };
            let plan = Plan {
                address: parse(address)?,
                path: path.to_owned(),
                wire,
                rate: parse(rate)?,
                time: Duration::from_secs_f64(parse(seconds)?),
                connections: parse(connections)?,
                seed: parse(seed)?,
            };
            writeln!(io::stdout(), "{}", run(&plan)?)
        }
        ["hold", address, path, count] => hold(parse(address)?, path, parse(count)?),
        _ => Err(io::Error::other(USAGE)),
    }
}

fn parse<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("`{text}` is no value for this; {USAGE}")))
}

fn hold(address: SocketAddr, path: &str, count: usize) -> io::Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    let mut open = Vec::with_capacity(count);
    let mut buffer = vec![0; 64 << 10];
    // Some proxies hold a first event back for a while, so a few are asked before the first is read; not all at once, since
    // what is measured is what waits, and not what a storm of requests leaves behind.
    while open.len() < count {
        let begun = open.len();
        for _ in begun..count.min(begun + TOGETHER) {
            let mut tcp = TcpStream::connect(address)?;
            tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
            tcp.write_all(request.as_bytes())?;
            open.push(tcp);
        }
        for (index, tcp) in open.iter_mut().enumerate().skip(begun) {
            let mut answer = 0;
            // The head, and what follows it in the first event or the short body.
            while !buffer[..answer].windows(4).any(|part| part == b"\r\n\r\n")
                || buffer[..answer].ends_with(b"\r\n\r\n")
            {
                match tcp.read(&mut buffer[answer..])? {
                    0 => return Err(io::Error::other(format!("connection {index} was closed"))),
                    more => answer += more,
                }
            }
            if !buffer.starts_with(b"HTTP/1.1 200") {
                return Err(io::Error::other(format!("connection {index} was refused")));
            }
        }
    }
    writeln!(io::stdout(), "{}", open.len())?;
    io::stdin().read_to_end(&mut buffer)?;
    Ok(())
}
