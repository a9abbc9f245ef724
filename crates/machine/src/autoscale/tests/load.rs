//! Reports of the data plane, made into readings.

use orchestra_model::{Name, route::RouteId, traffic::LoadReport};

use super::{super::LoadMeter, *};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn report(port: &str, requests: u64, in_flight: u32, held: u32) -> LoadReport {
    let route = RouteId { environment: "demo/dev".parse().unwrap(), service: name("api"), port: name(port) };
    let over = Timespan::seconds(1);
    LoadReport { route, over, requests, in_flight, streams: 0, tokens: 0, tokens_in_flight: 0, held }
}

fn meter(ports: &[&str]) -> LoadMeter {
    let mut meter = LoadMeter::new(Duration::from_secs(30));
    let ports: Vec<Name> = ports.iter().map(|port| name(port)).collect();
    meter.expect(ports.iter());
    meter
}

fn total(meter: &LoadMeter, now: Now, source: &MetricSource) -> Option<Measure> {
    match meter.readings(now).remove(source) {
        Some(Reading::Total(total)) => Some(total),
        Some(Reading::Unavailable(_)) => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn rates_are_over_the_window_and_counts_are_the_latest_of_all_routes() {
    let mut meter = meter(&["http", "grpc"]);
    for second in 0..60 {
        meter.report(at(second), &report("http", if second < 40 { 10 } else { 40 }, 3, 0));
        meter.report(at(second), &report("grpc", 1, 2, 1));
        meter.report(at(second), &report("other", 1_000, 1_000, 1_000));
    }
    // Of the last thirty seconds ten had 10 requests and twenty had 40; the other route has 1 a second.
    let rate = total(&meter, at(59), &MetricSource::RequestsPerSecond);
    assert_eq!(rate, Some("31".parse().unwrap()));
    assert_eq!(total(&meter, at(59), &MetricSource::RequestsInFlight), Some(Measure::whole(6)));
    let activity = meter.activity(at(59)).unwrap();
    assert_eq!(activity, Activity { begun: 400 + 800 + 60, in_flight: 5, held: 1 });
}

#[test]
fn a_silent_route_is_neither_idle_nor_busy() {
    let mut meter = meter(&["http", "grpc"]);
    assert_eq!(meter.activity(at(0)), None);
    meter.report(at(0), &report("http", 0, 0, 0));
    assert_eq!((meter.activity(at(1)), total(&meter, at(1), &MetricSource::RequestsInFlight)), (None, None));
    meter.report(at(1), &report("grpc", 0, 0, 0));
    assert_eq!(meter.activity(at(9)), Some(Activity::default()));
    assert_eq!(meter.activity(at(10)), None);
    // Reports that were too old when nothing newer came are no part of a rate.
    let mut slow = LoadMeter::new(Duration::ZERO);
    slow.expect([name("http")].iter());
    slow.report(at(0), &report("http", 100, 0, 0));
    slow.report(at(9), &report("http", 2, 0, 0));
    assert_eq!(total(&slow, at(9), &MetricSource::RequestsPerSecond), Some(Measure::whole(51)));
    assert_eq!(total(&slow, at(18), &MetricSource::RequestsPerSecond), Some(Measure::whole(2)));
    // Without a route there is nothing to be idle.
    assert_eq!(self::meter(&[]).activity(at(0)), None);
    // A port that is no longer published says nothing, and nothing is expected of it.
    meter.report(at(20), &report("grpc", 0, 0, 0));
    meter.expect([name("grpc")].iter());
    assert_eq!(meter.activity(at(21)), Some(Activity::default()));
}
