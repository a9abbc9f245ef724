//! Clients that do not speak TLS, or not fast enough.

use super::*;

/// What a client says first: everything up to its first flight's end.
fn client_hello(config: &Arc<ClientConfig>) -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::clone(config), name).unwrap();
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

#[tokio::test]
async fn http_without_tls_is_told_so_and_other_bytes_are_not_answered() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let web = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let bytes = route("bytes", Protocol::Tcp, vec![endpoint(2, instance.address)]);
    let applied = world.apply(vec![secured(web, certificates.files()), secured(bytes, certificates.files())]).await;
    let at = |name: &str| applied.addresses[&format!("demo/dev/{name}:main")];
    for request in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let answer = raw(at("api"), request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("https://"), "{answer}");
    }
    assert_eq!(raw(at("bytes"), b"SELECT 1;\r\n").await, "");
    assert_eq!(instance.connections(), 0);
    assert_eq!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"not_tls\"").await, 2.0);
    // A record that is none, and a hello that is none.
    for odd in [&b"\x16\x03\x01\xff\xff"[..], b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", &[22; 4000]] {
        let mut tcp = TcpStream::connect(at("api")).await.unwrap();
        tcp.write_all(odd).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = soon("the end", tcp.read_to_end(&mut answer)).await;
        assert!(answer.len() < 20, "an alert at most: {answer:?}");
    }
    assert_eq!(client(at("api"), &certificates.client(&[])).await.unwrap().get("/").await.unwrap().status, 200);
}

#[tokio::test]
async fn clients_that_dawdle_hold_up_nobody_and_are_left() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let config = certificates.client(&["http/1.1"]);
    let hello = client_hello(&config);
    let mut slow = Vec::new();
    let begun = Instant::now();
    // More than there are places for handshakes: half a hello, a whole one, and one byte.
    for count in 0..1500 {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let said = [hello.len() / 2, hello.len(), 1][count % 3];
        tcp.write_all(&hello[..said]).await.unwrap();
        slow.push(tcp);
    }
    for _ in 0..20 {
        let mut client = client(address, &config).await.unwrap();
        assert_eq!(client.get("/").await.unwrap().status, 200);
    }
    let served = begun.elapsed();
    for mut tcp in slow {
        let mut answer = Vec::new();
        let _ = soon("a slow client is left", tcp.read_to_end(&mut answer)).await;
    }
    let left = begun.elapsed();
    println!("1500 slow clients: 20 others were served within {served:?}, the last slow one left after {left:?}");
    assert_eq!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"done\"").await, 20.0);
    assert!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"late\"").await >= 1000.0);
}
