//! A crowd at the door: connections whose clients begin something and never end it.

use orchestra_task::TaskTree;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};

use super::*;

/// Places for connections.
const PLACES: usize = 4;

/// How long a client with a whole request waits for its answer while all places are taken by clients that said this.
async fn beside(said: &[u8]) -> Duration {
    let tree = TaskTree::new();
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let (proxy, connections) = (Arc::new(Proxy::new(tree.clone())), Arc::new(Semaphore::new(PLACES)));
    let listener = Listener {
        proxy: Arc::clone(&proxy),
        socket: SocketId(1),
        tcp,
        ending: Ending::default(),
        connections: Arc::clone(&connections),
    };
    tree.start(TaskKind::Connection, "listener", listener.run());
    let mut crowd = Vec::new();
    while proxy.metrics.accepted.load(Ordering::Relaxed) < PLACES as u64 {
        let mut one = TcpStream::connect(address).await.unwrap();
        one.write_all(said).await.unwrap();
        crowd.push(one);
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = [0; 9];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 ");
    assert!(proxy.metrics.evicted.load(Ordering::Relaxed) > 0);
    tree.cancel();
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn clients_that_never_end_what_they_begin_keep_nobody_out() {
    let idle_h2 = [&PREFACE[..], &[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]].concat();
    let half_h2 = [&idle_h2[..], b"\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82"].concat();
    for said in [&b""[..], b"G", b"GET / HTTP/1.1\r\nhost: a\r\nx-", &PREFACE[..10], &idle_h2, &half_h2] {
        let waited = beside(said).await;
        let said = String::from_utf8_lossy(said);
        assert!(waited < HEAD_TIMEOUT / 2, "{waited:?} beside clients that said {said:?}");
    }
}
