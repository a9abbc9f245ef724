use http::HeaderValue;

use super::*;

fn route() -> RouteId {
    RouteId { environment: "demo/dev".parse().unwrap(), service: "api".parse().unwrap(), port: "http".parse().unwrap() }
}

fn watch(id: u64) -> Watch {
    Watch {
        id,
        every: Timespan::millis(200),
        slow: Some(Timespan::seconds(2)),
        first_byte: Some(Timespan::seconds(1)),
        first_token: Some(Timespan::seconds(5)),
    }
}

fn watching() -> Arc<Watching> {
    Arc::new(Watching::new(&watch(1), &route(), None))
}

fn evidence(watching: &Arc<Watching>) -> Evidence {
    Evidence::new(watching, Arm::Canary, 7, Permille::new(50), Instant::now())
}

/// The one cell of a report, as (requests, bad, server, broken, slow, first byte, first token, client).
fn marked(watching: &Watching) -> Option<[u32; 8]> {
    let report = watching.tally.report();
    assert!(report.cells.len() <= 1, "{report:?}");
    report.cells.first().map(|cell| {
        assert_eq!((cell.arm, cell.client, cell.canary), (Arm::Canary, 7, Permille::new(50)));
        [
            cell.requests,
            cell.bad,
            cell.server_errors,
            cell.broken,
            cell.slow,
            cell.slow_first_byte,
            cell.slow_first_token,
            cell.client_failed,
        ]
    })
}

const FINE: [u32; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
const SERVER: [u32; 8] = [1, 1, 1, 0, 0, 0, 0, 0];
const BROKEN: [u32; 8] = [1, 1, 0, 1, 0, 0, 0, 0];
const CLIENT: [u32; 8] = [1, 0, 0, 0, 0, 0, 0, 1];

/// One way for a request to go: how long until the head, its status and kind, how long until the end, and the end.
struct Case {
    head: Option<(u64, u16, Kind)>,
    /// Milliseconds after the head to the first event, if there is one.
    token: Option<u64>,
    trailer: Option<&'static str>,
    rest: u64,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Events,
    Grpc,
}

async fn run(case: Case) -> Option<[u32; 8]> {
    let watching = watching();
    let mut evidence = evidence(&watching);
    if let Some((after, status, kind)) = case.head {
        tokio::time::advance(Duration::from_millis(after)).await;
        let status = StatusCode::from_u16(status).unwrap();
        evidence.answered(status, &HeaderMap::new(), kind == Kind::Grpc, kind != Kind::Plain);
    }
    if let Some(after) = case.token {
        tokio::time::advance(Duration::from_millis(after)).await;
        evidence.token();
    }
    tokio::time::advance(Duration::from_millis(case.rest)).await;
    if let Some(status) = case.trailer {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        evidence.trailers(&trailers);
    }
    match case.end {
        End::Complete => evidence.complete(),
        End::Broken => evidence.broken(),
        End::Cut => evidence.cut(),
        End::Left => drop(evidence),
        End::Late => unreachable!("not the end of a request"),
    }
    marked(&watching)
}

#[tokio::test(start_paused = true)]
async fn each_end_counts_as_documented() {
    let plain = |status| Some((1, status, Kind::Plain));
    let grpc = Some((1, 200, Kind::Grpc));
    let events = |head| Some((head, 200, Kind::Events));
    let case = |head, token, trailer, rest, end| Case { head, token, trailer, rest, end };
    let table = [
        ("fine", case(plain(200), None, None, 1, End::Complete), Some(FINE)),
        ("a redirect is fine", case(plain(302), None, None, 1, End::Complete), Some(FINE)),
        ("500", case(plain(500), None, None, 1, End::Complete), Some(SERVER)),
        ("503, and the client did not wait for the text", case(plain(503), None, None, 1, End::Left), Some(SERVER)),
        ("404", case(plain(404), None, None, 1, End::Complete), Some(CLIENT)),
        ("a slow 404 is still the client's", case(plain(404), None, None, 9000, End::Complete), Some(CLIENT)),
        ("no answer", case(None, None, None, 1, End::Broken), Some(BROKEN)),
        ("half an answer", case(plain(200), None, None, 1, End::Broken), Some(BROKEN)),
        ("slow as a whole", case(plain(200), None, None, 2000, End::Complete), Some([1, 1, 0, 0, 1, 0, 0, 0])),
        ("just in time", case(plain(200), None, None, 1999, End::Complete), Some(FINE)),
        (
            "a slow head",
            case(Some((1001, 200, Kind::Plain)), None, None, 1, End::Complete),
            Some([1, 1, 0, 0, 0, 1, 0, 0]),
        ),
        (
            "a slow 500 is bad once",
            case(Some((3000, 500, Kind::Plain)), None, None, 1, End::Complete),
            Some([1, 1, 1, 0, 1, 1, 0, 0]),
        ),
        ("the client left early", case(None, None, None, 900, End::Left), Some(CLIENT)),
        (
            "the client gave up after the bound of the head",
            case(None, None, None, 1500, End::Left),
            Some([1, 1, 0, 0, 0, 1, 0, 0]),
        ),
        (
            "the client gave up after all bounds",
            case(None, None, None, 60_000, End::Left),
            Some([1, 1, 0, 0, 1, 1, 0, 0]),
        ),
        ("the client left in the middle", case(plain(200), None, None, 100, End::Left), Some(CLIENT)),
        ("cut early: says nothing", case(None, None, None, 900, End::Cut), None),
        ("cut after the bound", case(None, None, None, 1500, End::Cut), Some([1, 1, 0, 0, 0, 1, 0, 0])),
        ("a long stream is fine", case(events(10), Some(100), None, 600_000, End::Complete), Some(FINE)),
        ("a stream that was cut after long", case(events(10), Some(100), None, 600_000, End::Cut), None),
        ("a stream that broke", case(events(10), Some(100), None, 60_000, End::Broken), Some(BROKEN)),
        ("a stream that its reader left", case(events(10), Some(100), None, 60_000, End::Left), Some(CLIENT)),
        (
            "a late first event",
            case(events(10), Some(5000), None, 60_000, End::Complete),
            Some([1, 1, 0, 0, 0, 0, 1, 0]),
        ),
        (
            "a late first event, and then it breaks: once",
            case(events(10), Some(5000), None, 60_000, End::Broken),
            Some([1, 1, 0, 0, 0, 0, 1, 0]),
        ),
        (
            "the reader gave up on a silent stream",
            case(events(10), None, None, 6000, End::Left),
            Some([1, 1, 0, 0, 0, 0, 1, 0]),
        ),
        ("an empty stream", case(events(10), None, None, 10, End::Complete), Some(FINE)),
        ("gRPC OK", case(grpc, Some(1), Some("0"), 1, End::Complete), Some(FINE)),
        ("gRPC NOT_FOUND", case(grpc, None, Some("5"), 1, End::Complete), Some(CLIENT)),
        ("gRPC RESOURCE_EXHAUSTED", case(grpc, None, Some("8"), 1, End::Complete), Some(CLIENT)),
        ("gRPC UNKNOWN", case(grpc, None, Some("2"), 1, End::Complete), Some(SERVER)),
        ("gRPC DEADLINE_EXCEEDED", case(grpc, None, Some("4"), 1, End::Complete), Some(SERVER)),
        ("gRPC UNIMPLEMENTED", case(grpc, None, Some("12"), 1, End::Complete), Some(SERVER)),
        ("gRPC INTERNAL", case(grpc, None, Some("13"), 1, End::Complete), Some(SERVER)),
        ("gRPC UNAVAILABLE", case(grpc, None, Some("14"), 1, End::Complete), Some(SERVER)),
        ("gRPC DATA_LOSS", case(grpc, None, Some("15"), 1, End::Complete), Some(SERVER)),
        ("gRPC UNAUTHENTICATED", case(grpc, None, Some("16"), 1, End::Complete), Some(CLIENT)),
        ("gRPC with a status that is none", case(grpc, None, Some("x"), 1, End::Complete), Some(SERVER)),
        ("gRPC without a status", case(grpc, Some(1), None, 1, End::Complete), Some(BROKEN)),
        ("gRPC over HTTP 502", case(Some((1, 502, Kind::Grpc)), None, None, 1, End::Complete), Some(SERVER)),
    ];
    for (name, case, expected) in table {
        assert_eq!(run(case).await, expected, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_stream_is_known_before_it_ends() {
    let watching = watching();
    let mut evidence = evidence(&watching);
    evidence.answered(StatusCode::OK, &HeaderMap::new(), false, true);
    assert!(watching.tally.is_empty());
    tokio::time::advance(Duration::from_secs(6)).await;
    evidence.token();
    assert_eq!(marked(&watching), Some([1, 1, 0, 0, 0, 0, 1, 0]));
    evidence.complete();
    assert_eq!(marked(&watching), None);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_went_elsewhere_says_nothing() {
    let watching = watching();
    evidence(&watching).forget();
    assert_eq!(marked(&watching), None);
}

#[tokio::test(start_paused = true)]
async fn only_whole_good_responses_of_the_stable_arm_make_the_latency() {
    let watching = watching();
    let of = |arm| Evidence::new(&watching, arm, 1, Permille::ZERO, Instant::now());
    let answered = |mut evidence: Evidence, status: u16, stream| {
        evidence.answered(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), false, stream);
        evidence
    };
    let all = [
        answered(of(Arm::Stable), 200, false),
        answered(of(Arm::Canary), 200, false),
        answered(of(Arm::Stable), 500, false),
        answered(of(Arm::Stable), 200, true),
    ];
    tokio::time::advance(Duration::from_millis(100)).await;
    all.into_iter().for_each(Evidence::complete);
    let latency = watching.tally.report().stable_latency;
    let median = latency.quantile(Permille::new(500)).unwrap();
    assert_eq!((latency.total(), (100_000..=112_000).contains(&median)), (1, true), "{median}");
    let mut same = LatencyHistogram::default();
    same.add(100_000);
    assert_eq!(latency, same);
}

#[test]
fn buckets_are_those_of_the_model() {
    for micros in [0, 1, 99, 100, 101, 200, 12_345, 999_999, 5_000_000, 6_000_000, u64::MAX] {
        let mut histogram = LatencyHistogram::default();
        histogram.add(micros);
        assert_eq!(histogram.counts.len(), bucket(micros) + 1, "{micros}");
    }
}

#[tokio::test(start_paused = true)]
async fn reports_count_up_and_come_when_they_are_due() {
    let watching = watching();
    let start = Instant::now();
    let millis = Duration::from_millis;
    assert_eq!(watching.is_due(start), Err(start + millis(200)));
    tokio::time::advance(millis(200)).await;
    // Nothing to say: looks again, and says so after a second.
    assert_eq!(watching.is_due(Instant::now()), Err(start + millis(400)));
    evidence(&watching).complete();
    assert_eq!(watching.is_due(Instant::now()), Ok(()));
    let first = watching.tally.report();
    assert_eq!(watching.is_due(Instant::now()), Err(start + millis(400)));
    tokio::time::advance(millis(999)).await;
    assert_eq!(watching.is_due(Instant::now()), Err(start + millis(1200)));
    tokio::time::advance(millis(1)).await;
    assert_eq!(watching.is_due(Instant::now()), Ok(()));
    let second = watching.tally.report();
    assert_eq!((second.sequence, second.cells.len()), (first.sequence + 1, 0));
    // What could not be sent comes again, under the same number.
    evidence(&watching).complete();
    watching.tally.compared(true);
    let unsent = watching.tally.report();
    watching.tally.take_back(&unsent);
    assert_eq!(watching.tally.report(), unsent);
}

#[tokio::test(start_paused = true)]
async fn a_changed_bound_keeps_what_was_marked_and_another_watch_does_not() {
    let first = watching();
    evidence(&first).complete();
    let tighter = Watch { slow: Some(Timespan::millis(1)), ..watch(1) };
    let second = Watching::new(&tighter, &route(), Some(&first.tally));
    assert!(Arc::ptr_eq(&first.tally, &second.tally));
    let third = Watching::new(&watch(2), &route(), Some(&second.tally));
    assert!(third.tally.is_empty() && !second.tally.is_empty());
}

#[tokio::test(start_paused = true)]
async fn many_clients_share_what_is_left() {
    let watching = watching();
    let mut sent = 0;
    for client in 1..=100_000 {
        let arm = if client % 10 == 0 { Arm::Canary } else { Arm::Stable };
        Evidence::new(&watching, arm, client, Permille::new(100), Instant::now()).complete();
        sent += 1;
    }
    let report = watching.tally.report();
    assert!(report.cells.len() <= CLIENTS + 2, "{}", report.cells.len());
    assert_eq!(report.cells.iter().map(|cell| cell.requests).sum::<u32>(), sent);
    let shared: u32 = report.cells.iter().filter(|cell| cell.client == 0).map(|cell| cell.requests).sum();
    assert!(shared > 90_000 && shared < 100_000, "{shared}");
    // As bounded after adding up.
    let mut sum = report.clone();
    let more: Vec<TrafficCell> =
        (200_000..201_000).map(|client| TrafficCell { client, requests: 1, ..TrafficCell::default() }).collect();
    merge(&mut sum, &TrafficReport { cells: more, ..report });
    assert!(sum.cells.len() <= CLIENTS + 3, "{}", sum.cells.len());
    assert_eq!(sum.cells.iter().map(|cell| cell.requests).sum::<u32>(), sent + 1000);
}
