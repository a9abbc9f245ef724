//! What the data plane reports of a service's routes, made into what the autoscaler is told.
//!
//! Reports come about once a second per route. Rates are taken over a window of them, so that one quiet second is no
//! reason to shrink; counts are the latest. A route that has fallen silent says nothing at all: neither that it is idle
//! nor that it is busy.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use orchestra_model::{Name, Now, autoscale::MetricSource, quantity::Measure, route::RouteId, traffic::LoadReport};

use super::sample::{Activity, Reading};

/// What is read off the routes.
const SOURCES: [MetricSource; 4] = [
    MetricSource::RequestsPerSecond,
    MetricSource::RequestsInFlight,
    MetricSource::TokensInFlight,
    MetricSource::QueueDepth,
];

/// Reports of the routes of one service.
#[derive(Clone, Debug)]
pub struct LoadMeter {
    window: Duration,
    routes: BTreeMap<Name, Route>,
}

#[derive(Clone, Debug, Default)]
struct Route {
    /// When each report arrived, the time that it covers, and the requests that began in it.
    reports: VecDeque<(Now, Duration, u64)>,
    begun: u64,
    in_flight: u64,
    held: u64,
    tokens: u64,
}

impl LoadMeter {
    /// A route that has not reported for so long is silent.
    pub const SILENT_AFTER: Duration = Duration::from_secs(10);

    /// Rates over a window of this length, from [`Self::SILENT_AFTER`] to an hour.
    pub fn new(window: Duration) -> Self {
        Self { window: window.clamp(Self::SILENT_AFTER, Duration::from_secs(3600)), routes: BTreeMap::new() }
    }

    /// Keeps the routes of these ports, and forgets others: silence of a route that is gone means nothing.
    pub fn expect<'p>(&mut self, ports: impl Iterator<Item = &'p Name>) {
        let ports: Vec<&Name> = ports.collect();
        self.routes.retain(|port, _| ports.contains(&port));
        for port in ports {
            self.routes.entry(port.clone()).or_default();
        }
    }

    /// Counts a report. Reports of other routes than the expected ones are ignored.
    pub fn report(&mut self, now: Now, report: &LoadReport) {
        let RouteId { port, .. } = &report.route;
        let Some(route) = self.routes.get_mut(port) else { return };
        route.reports.push_back((now, report.over.duration(), report.requests));
        while route.reports.front().is_some_and(|(at, ..)| now.since(*at) >= self.window) {
            route.reports.pop_front();
        }
        route.begun = route.begun.saturating_add(report.requests);
        route.in_flight = u64::from(report.in_flight);
        route.held = u64::from(report.held);
        route.tokens = report.tokens_in_flight;
    }

    /// Requests, unless a route is silent.
    pub fn activity(&self, now: Now) -> Option<Activity> {
        self.is_heard(now).then(|| {
            self.routes.values().fold(Activity::default(), |sum, route| Activity {
                begun: sum.begun.saturating_add(route.begun),
                in_flight: sum.in_flight.saturating_add(route.in_flight),
                held: sum.held.saturating_add(route.held),
            })
        })
    }

    /// Requests per second, requests and tokens in flight, and requests that wait, of the service as a whole.
    pub fn readings(&self, now: Now) -> BTreeMap<MetricSource, Reading> {
        let silent = || Reading::Unavailable("the proxy has not reported it for 10s".to_owned());
        let Some(activity) = self.activity(now) else {
            return SOURCES.map(|source| (source, silent())).into();
        };
        let rates = self.routes.values().map(|route| route.thousandths_per_second(now, self.window));
        let rate = rates.fold(0, u64::saturating_add);
        let tokens = self.routes.values().map(|route| route.tokens).fold(0, u64::saturating_add);
        [
            (MetricSource::RequestsPerSecond, Reading::Total(Measure::thousandths(rate))),
            (
                MetricSource::RequestsInFlight,
                Reading::Total(Measure::whole(activity.in_flight.saturating_add(activity.held))),
            ),
            (MetricSource::TokensInFlight, Reading::Total(Measure::whole(tokens))),
            (MetricSource::QueueDepth, Reading::Total(Measure::whole(activity.held))),
        ]
        .into()
    }

    fn is_heard(&self, now: Now) -> bool {
        !self.routes.is_empty()
            && self
                .routes
                .values()
                .all(|route| route.reports.back().is_some_and(|(at, ..)| now.since(*at) < Self::SILENT_AFTER))
    }
}

impl Route {
    fn thousandths_per_second(&self, now: Now, window: Duration) -> u64 {
        let recent = self.reports.iter().filter(|(at, ..)| now.since(*at) < window);
        let (requests, micros) = recent.fold((0u128, 0u128), |(requests, micros), (_, over, begun)| {
            (requests + u128::from(*begun), micros + over.as_micros())
        });
        let rate = (requests * 1_000_000_000).checked_div(micros).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}
