use orchestra_model::{
    quantity::Timespan,
    route::RouteId,
    traffic::{Arm, LatencyHistogram, Permille, TrafficCell},
};

use super::*;

fn route(service: &str) -> RouteId {
    RouteId {
        environment: "demo/dev".parse().unwrap(),
        service: service.parse().unwrap(),
        port: "http".parse().unwrap(),
    }
}

fn traffic(service: &str, watch: u64, sequence: u64) -> DataPlaneEvent {
    let cell = TrafficCell {
        arm: Arm::Canary,
        client: sequence % 3 + 1,
        canary: Permille::new(50),
        requests: 1,
        ..TrafficCell::default()
    };
    DataPlaneEvent::Proxy(ProxyEvent::Traffic(TrafficReport {
        route: route(service),
        watch,
        sequence,
        cells: vec![cell],
        stable_latency: LatencyHistogram::default(),
        mirrored: (0, 0),
    }))
}

fn load(service: &str, requests: u64, in_flight: u32) -> DataPlaneEvent {
    DataPlaneEvent::Proxy(ProxyEvent::Load(LoadReport {
        route: route(service),
        over: Timespan::seconds(1),
        requests,
        in_flight,
        streams: 0,
        tokens: 0,
        tokens_in_flight: 0,
        held: 0,
    }))
}

/// A queue that nobody reads.
fn stuck() -> Events {
    Events(Arc::default())
}

#[test]
fn evidence_that_is_not_read_adds_up_and_stays_in_order() {
    let events = stuck();
    for sequence in 1..=1000 {
        events.push(1, traffic("api", 1, sequence));
        events.push(1, traffic("web", 9, sequence));
    }
    let waiting = events.waiting();
    let reports: Vec<&TrafficReport> = waiting
        .iter()
        .map(|(_, event)| match event {
            DataPlaneEvent::Proxy(ProxyEvent::Traffic(report)) => report,
            other => panic!("{other:?}"),
        })
        .filter(|report| report.watch == 1)
        .collect();
    assert_eq!((waiting.len(), reports.len()), (2 * TRAFFIC, TRAFFIC));
    assert!(reports.is_sorted_by(|a, b| a.sequence < b.sequence));
    assert_eq!(reports.last().unwrap().sequence, 1000);
    let requests: u32 = reports.iter().flat_map(|report| &report.cells).map(|cell| cell.requests).sum();
    assert_eq!(requests, 1000);
}

#[test]
fn evidence_of_an_earlier_watch_goes_when_the_next_one_begins() {
    let events = stuck();
    events.push(1, traffic("api", 1, 1));
    events.push(1, traffic("web", 1, 1));
    events.push(1, traffic("api", 2, 1));
    let left: Vec<DataPlaneEvent> = events.waiting().iter().map(|(_, event)| event.clone()).collect();
    assert_eq!(left, [traffic("web", 1, 1), traffic("api", 2, 1)]);
}

#[test]
fn a_newer_load_takes_the_place_of_an_older_one() {
    let events = stuck();
    for in_flight in 1..=100 {
        events.push(1, load("api", 2, in_flight));
        events.push(1, load("web", 1, in_flight));
    }
    let left: Vec<DataPlaneEvent> = events.waiting().iter().map(|(_, event)| event.clone()).collect();
    assert_eq!(left.len(), 2);
    let DataPlaneEvent::Proxy(ProxyEvent::Load(api)) = &left[0] else { panic!() };
    assert_eq!((api.requests, api.in_flight, api.over), (200, 100, Timespan::seconds(100)));
}
