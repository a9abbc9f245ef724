//! The measuring device is measured first: load must count what is good as good, and see what is broken.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::Duration,
};

use orchestra_testbed::{
    handled,
    load::{Kind, Load, Plan},
};
use tempfile::TempDir;

struct App {
    child: Child,
    address: SocketAddr,
    folder: TempDir,
}

impl App {
    fn start(env: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut child = Command::new(env!("CARGO_BIN_EXE_testbed-app"))
            .env("PORT", port.to_string())
            .env("HANDLED", folder.path().join("handled"))
            .env("VERSION", "one")
            .env("LOG_READY", "now")
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "now"), "it ended before it was ready");
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: SocketAddr::from(([127, 0, 0, 1], port)), folder }
    }

    fn plan(&self) -> Plan {
        Plan {
            get: 100,
            post: 100,
            fresh: 50,
            h2c: 50,
            streams: 3,
            websockets: 3,
            session: Duration::from_millis(200),
            token: Duration::from_millis(10),
            timeout: Duration::from_secs(5),
            ..Plan::to(self.address)
        }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_counted_and_nothing_fails() {
    let app = App::start(&[]);
    let load = Load::start(app.plan());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let report = load.stop().await;
    assert!(report.failures.is_empty(), "{report}");
    for kind in [Kind::Get, Kind::Post, Kind::Fresh, Kind::H2c, Kind::Stream, Kind::WebSocket] {
        let tally = report.of(kind);
        assert!(tally.sent > 5 && tally.sent == tally.ok, "{kind:?}: {report}");
    }
    let handled = handled::read(&app.folder.path().join("handled")).unwrap();
    assert_eq!(handled.len() as u64, report.sent());
    assert!(handled.values().all(|handled| handled.begun.len() == 1 && handled.finished.len() == 1));
    assert_eq!(handled::twice(&handled, ""), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_seen_by_every_kind_of_client() {
    let mut app = App::start(&[]);
    let load = Load::start(app.plan());
    tokio::time::sleep(Duration::from_millis(500)).await;
    app.child.kill().unwrap();
    app.child.wait().unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let report = load.stop().await;
    for kind in [Kind::Get, Kind::Post, Kind::Fresh, Kind::H2c, Kind::Stream, Kind::WebSocket] {
        let tally = report.of(kind);
        assert!(tally.failed.contains_key("refused"), "{kind:?}: {report}");
        assert_eq!(tally.sent, tally.ok + tally.failures(), "{kind:?}: {report}");
    }
    for kind in [Kind::Stream, Kind::WebSocket] {
        assert!(report.of(kind).failed.contains_key("truncated"), "{kind:?}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_end_cuts_no_stream() {
    let mut app = App::start(&[]);
    let load = Load::start(Plan { get: 0, post: 0, fresh: 0, h2c: 0, ..app.plan() });
    tokio::time::sleep(Duration::from_millis(500)).await;
    app.signal("-TERM");
    let status = app.child.wait().unwrap();
    assert!(status.success(), "{status}");
    let report = load.stop().await;
    for kind in [Kind::Stream, Kind::WebSocket] {
        let tally = report.of(kind);
        assert!(tally.ok > 0 && !tally.failed.contains_key("truncated"), "{report}");
    }
}

#[test]
fn a_crash_has_its_code() {
    let mut app = App::start(&[("CRASH_AFTER_MS", "50"), ("EXIT_CODE", "7")]);
    assert_eq!(app.child.wait().unwrap().code(), Some(7));
    let mut stream = std::net::TcpStream::connect(app.address);
    assert!(stream.as_mut().map(|stream| stream.write(b"x")).is_err());
}
