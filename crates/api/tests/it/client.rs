//! Requests, refusals, streams that break, and servers that are something else.

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use orchestra_api::{
    Client, ClientError, Endpoint, EventsQuery, Frame, LogLine, LogStream, LogsQuery, NameList, Payload, Progress,
    ProgressState, RunEvent, Scale, SocketTransport, StartRun, TransportError,
    scripted::{Exchange, ScriptedServer},
};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, Event, EventKind, Generation, Plan, RunId,
    plan::Action,
    record::{RunKind, RunRecord, RunState},
};

const DEADLINE: Duration = Duration::from_secs(20);

fn environment() -> EnvironmentId {
    "shop/dev".parse().unwrap()
}

fn event(sequence: u64) -> Event {
    Event {
        sequence,
        at: 1,
        environment: environment(),
        kind: EventKind::InstanceReady,
        resource: Some("service.api".parse().unwrap()),
        instance: Some("api-r1-1".parse().unwrap()),
        release: None,
        run: Some(RunId(7)),
        cause: "ready check passed".into(),
    }
}

fn run() -> RunRecord {
    let plan = serde_json::json!({"format": 1, "environment": "shop/dev", "base": null, "desired": null, "steps": [], "unchanged": 0, "kept": []});
    RunRecord {
        id: RunId(7),
        environment: environment(),
        kind: RunKind::Up,
        generation: Generation(1),
        release: None,
        plan: serde_json::from_value::<Plan>(plan).unwrap(),
        state: RunState::Succeeded,
        steps: [].into(),
        started_at: 1,
        ended_at: Some(2),
        problems: Vec::new(),
        reverted: None,
        culprits: Vec::new(),
        request_key: None,
    }
}

fn progress(ready: u32) -> RunEvent {
    RunEvent::Progress(Progress {
        resource: "service.api".parse().unwrap(),
        action: Action::Create,
        state: ProgressState::Running,
        ready,
        desired: 2,
        elapsed_ms: 5,
        waits_for: Vec::new(),
        message: None,
    })
}

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.sock");
        Self { _folder: folder, path }
    }

    fn client(&self) -> Client {
        Client::new(Arc::new(SocketTransport::new(Endpoint::Unix(self.path.clone())).head_timeout(DEADLINE)))
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

#[tokio::test]
async fn requests_have_the_form_that_the_table_says() {
    let place = Place::new();
    let request = StartRun::Scale(Scale { environment: environment(), replicas: [("api".parse().unwrap(), 3)].into() });
    let server = ScriptedServer::start(
        &place.path,
        vec![
            Exchange::json("POST /v1/runs", &serde_json::json!({"run": run(), "warnings": []}))
                .status(201)
                .expect_body(&serde_json::json!({"scale": {"environment": "shop/dev", "replicas": {"api": 3}}})),
            Exchange::json("POST /v1/runs/run_7/cancel", &run()).status(202).expect_body(&serde_json::json!({})),
            Exchange::json(
                "GET /v1/environments/shop/dev/events?after=4&tail=2",
                &serde_json::json!({"items": [event(9)]}),
            ),
            Exchange::json("GET /metrics", &"").chunks(vec!["up 1\n".into()]),
        ],
    )
    .unwrap();
    let (client, version) = within(Client::connect(Endpoint::Unix(place.path.clone()))).await.unwrap();
    assert_eq!(version.pid, 4321);
    assert_eq!(within(client.start_run(&request, None)).await.unwrap().run, run());
    assert_eq!(within(client.cancel_run(RunId(7))).await.unwrap(), run());
    let query = EventsQuery { after: Some(4), tail: Some(2), follow: true, ..EventsQuery::default() };
    assert_eq!(within(client.events(&environment(), &query)).await.unwrap().items, [event(9)]);
    assert_eq!(within(client.metrics()).await.unwrap(), "up 1\n");
    server.finish();
}

#[tokio::test]
async fn refusals_carry_their_diagnostics() {
    let place = Place::new();
    let stale = Diagnostic::error(Code::PLAN_STALE, "it moved on").help("plan again");
    let server = ScriptedServer::start(
        &place.path,
        vec![
            Exchange::json("GET /v1/doctor", &serde_json::json!({"errors": [stale]})).status(409),
            Exchange::json(
                "GET /v1/doctor",
                &serde_json::json!({"errors": [{"code": "ORC9999", "severity": "error", "message": "from the future", "help": "wait"}]}),
            )
            .status(418),
            Exchange::json("GET /v1/doctor", &"<html>").status(502),
            Exchange::json("GET /v1/doctor", &serde_json::json!({"unexpected": true})),
        ],
    )
    .unwrap();
    let client = place.client();
    let error = within(client.doctor()).await.unwrap_err();
    assert_eq!(error.status(), Some(409));
    assert_eq!(error.into_diagnostics(), [stale]);
    let diagnostics = within(client.doctor()).await.unwrap_err().into_diagnostics();
    assert_eq!(diagnostics[0].message, "from the future");
    assert_eq!(diagnostics[0].notes, ["the server calls this ORC9999"]);
    for _ in 0..2 {
        let error = within(client.doctor()).await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
        assert_eq!(error.into_diagnostics()[0].code, Code::INCOMPATIBLE);
    }
    server.finish();
}

#[tokio::test]
async fn another_version_of_the_api_is_refused() {
    let place = Place::new();
    let server = ScriptedServer::start(&place.path, Vec::new()).unwrap();
    server.version(|version| version.api = 2);
    let error = within(Client::connect(Endpoint::Unix(place.path.clone()))).await.unwrap_err();
    assert!(matches!(error, ClientError::Incompatible { api: 2, .. }), "{error:?}");
    server.finish();
}

#[tokio::test]
async fn nobody_there_is_told_from_somebody_lost() {
    let place = Place::new();
    assert!(within(place.client().version()).await.unwrap_err().is_unreachable());
    let listener = UnixListener::bind(&place.path).unwrap();
    let rude = std::thread::spawn(move || {
        // One that answers nonsense, one that hangs up within an answer.
        for answer in ["SSH-2.0-nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    for _ in 0..2 {
        let error = within(place.client().version()).await.unwrap_err();
        assert!(error.is_lost() && !error.is_unreachable(), "{error:?}");
        assert_eq!(error.into_diagnostics()[0].code, Code::SERVER_UNREACHABLE);
    }
    rude.join().unwrap();
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let place = Place::new();
    let _listener = UnixListener::bind(&place.path).unwrap();
    let transport = SocketTransport::new(Endpoint::Unix(place.path.clone())).head_timeout(Duration::from_millis(50));
    let error = within(Client::new(Arc::new(transport)).version()).await.unwrap_err();
    assert!(matches!(error, ClientError::Transport(TransportError::TimedOut { .. })), "{error:?}");
}

#[tokio::test]
async fn a_run_is_followed_through_lost_connections() {
    let place = Place::new();
    let path = "GET /v1/runs/run_7/events";
    let [one, two, three] = [1, 2, 3].map(|n| Frame::run_event(&RunEvent::Event(event(n))));
    let half = Frame::run_event(&progress(1));
    let done = Frame::run_event(&RunEvent::Done(Box::new(run())));
    let unknown = Frame { event: Some("weather".into()), data: "{}".into(), id: None };
    let server = ScriptedServer::start(
        &place.path,
        vec![
            Exchange::events(path, [&one, &half]).cut(),
            // A server that replays everything, and one that ends the stream in order but too early.
            Exchange::events(path, [&one, &two, &unknown]).expect_last_event_id("1"),
            Exchange::events(path, [&half, &three, &done]).expect_last_event_id("2"),
        ],
    )
    .unwrap();
    let mut stream = place.client().run_events(RunId(7));
    let mut seen = Vec::new();
    while let Some(event) = within(stream.next()).await {
        seen.push(event.unwrap());
    }
    let expected = [
        RunEvent::Event(event(1)),
        progress(1),
        RunEvent::Event(event(2)),
        progress(1),
        RunEvent::Event(event(3)),
        RunEvent::Done(Box::new(run())),
    ];
    assert_eq!(seen, expected);
    assert!(within(stream.next()).await.is_none());
    server.finish();
}

#[tokio::test]
async fn a_stream_without_patience_reports_the_loss_and_goes_on_when_asked() {
    let place = Place::new();
    let path = "GET /v1/environments/shop/dev/events";
    let server = ScriptedServer::start(
        &place.path,
        vec![
            Exchange::events(&format!("{path}?after=4&tail=10&follow=true"), [&Frame::event(&event(5))])
                .expect_last_event_id("4")
                .cut(),
            Exchange::events(&format!("{path}?after=5&follow=true"), [&Frame::event(&event(6))])
                .expect_last_event_id("5")
                .open(),
        ],
    )
    .unwrap();
    let query = EventsQuery { after: Some(4), tail: Some(10), ..EventsQuery::default() };
    let mut stream = place.client().patience(Duration::ZERO).follow_events(&environment(), &query);
    assert_eq!(within(stream.next()).await.unwrap(), event(5));
    assert!(within(stream.next()).await.unwrap_err().is_lost());
    assert_eq!(within(stream.next()).await.unwrap(), event(6));
    server.finish();
}

#[tokio::test]
async fn calls_that_are_dropped_lose_no_request_and_no_event() {
    let place = Place::new();
    let frames: Vec<Frame> = (1..=20).map(|n| Frame::run_event(&RunEvent::Event(event(n)))).collect();
    let done = Frame::run_event(&RunEvent::Done(Box::new(run())));
    let all: Vec<u8> = frames.iter().chain([&done]).flat_map(|frame| frame.encode().to_vec()).collect();
    let pieces = all.chunks(50).map(Bytes::copy_from_slice).collect();
    // One exchange only: asking again would be a surprise.
    let exchange = Exchange::events("GET /v1/runs/run_7/events", []).chunks(pieces);
    let server = ScriptedServer::start(&place.path, vec![exchange]).unwrap();
    let mut stream = place.client().run_events(RunId(7));
    let mut seen = 0;
    within(async {
        loop {
            // Polled once and dropped, over and over.
            let next = tokio::select! {
                biased;
                next = stream.next() => next,
                () = std::future::ready(()) => {
                    tokio::task::yield_now().await;
                    continue;
                }
            };
            match next.unwrap().unwrap() {
                RunEvent::Event(event) => {
                    seen += 1;
                    assert_eq!(event.sequence, seen);
                }
                RunEvent::Done(_) => break,
                RunEvent::Progress(_) => panic!("nobody sent it"),
            }
        }
    })
    .await;
    assert_eq!(seen, 20);
    server.finish();
}

#[tokio::test]
async fn log_bytes_survive_whatever_they_are_and_however_they_are_cut() {
    let place = Place::new();
    let line = |bytes: &[u8]| LogLine {
        instance: "api-r1-1".parse().unwrap(),
        attempt: 1,
        stream: LogStream::Stderr,
        at: 5,
        line: Payload(bytes.to_vec()),
    };
    let lines = [line(b"plain\n"), line(b"\xff\xfe\0\n"), line("ümläut\r\n".as_bytes()), line(b"no end"), line(b"\n")];
    let all: String = lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n\n").collect();
    let pieces = all.as_bytes().chunks(7).map(Bytes::copy_from_slice).collect();
    let server = ScriptedServer::start(
        &place.path,
        vec![
            Exchange::lines("GET /v1/environments/shop/dev/logs?workload=api,web&follow=true", &lines).chunks(pieces),
            Exchange::lines("GET /v1/environments/shop/dev/logs", &lines[..1]).cut(),
            Exchange::lines::<u8>("GET /v1/environments/shop/dev/logs", &[]).chunks(vec!["{\"half".into()]),
        ],
    )
    .unwrap();
    let workload = Some("api,web".parse::<NameList>().unwrap());
    let query = LogsQuery { workload, follow: true, ..LogsQuery::default() };
    let mut stream = within(place.client().logs(&environment(), &query)).await.unwrap();
    for expected in &lines {
        assert_eq!(within(stream.next()).await.unwrap().unwrap(), *expected);
    }
    assert!(within(stream.next()).await.is_none());
    // A cut is told from an end.
    let mut stream = within(place.client().logs(&environment(), &LogsQuery::default())).await.unwrap();
    assert_eq!(within(stream.next()).await.unwrap().unwrap(), lines[0]);
    assert!(within(stream.next()).await.unwrap().unwrap_err().is_lost());
    assert!(within(stream.next()).await.is_none());
    let mut stream = within(place.client().logs(&environment(), &LogsQuery::default())).await.unwrap();
    assert!(matches!(within(stream.next()).await, Some(Err(ClientError::Protocol { .. }))));
    server.finish();
}
