//! One voice of several proxies: a proxy that leaves still ends requests, and its successor reports already.
//!
//! What a leaving proxy says is kept and goes out with the next report of the serving one, which comes within a second.

use std::collections::BTreeMap;

use orchestra_model::{
    route::{ProxyEvent, RouteId},
    traffic::{LoadReport, TrafficReport},
};

use crate::{load, watch};

/// What leaving proxies said, by route.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    ended: BTreeMap<RouteId, TrafficReport>,
    /// By connection too: what each has in flight is as of now, not a sum.
    loads: BTreeMap<(RouteId, u64), LoadReport>,
}

impl Traffic {
    /// A report of the proxy with the connection `number`, while those with the numbers `leaving` leave. Returns what
    /// is to be told.
    pub(super) fn heard(&mut self, number: u64, leaving: &[u64], event: ProxyEvent) -> Option<ProxyEvent> {
        self.loads.retain(|(_, number), _| leaving.contains(number));
        match event {
            ProxyEvent::Traffic(report) if leaving.contains(&number) => {
                let mut report = report;
                if let Some(before) = self.ended.remove(&report.route).filter(|before| before.watch == report.watch) {
                    watch::merge(&mut report, &before);
                }
                self.ended.insert(report.route.clone(), report);
                None
            }
            ProxyEvent::Traffic(mut report) => {
                if let Some(ended) = self.ended.remove(&report.route).filter(|ended| ended.watch == report.watch) {
                    // Only the numbers of the serving proxy form a sequence.
                    watch::merge(&mut report, &TrafficReport { sequence: 0, ..ended });
                }
                Some(ProxyEvent::Traffic(report))
            }
            ProxyEvent::Load(mut report) if leaving.contains(&number) => {
                if let Some(before) = self.loads.remove(&(report.route.clone(), number)) {
                    load::merge(&before, &mut report);
                }
                self.loads.insert((report.route.clone(), number), report);
                None
            }
            ProxyEvent::Load(mut report) => {
                let route = report.route.clone();
                for (_, other) in self.loads.iter_mut().filter(|((of, _), _)| *of == route) {
                    load::add(&mut report, other);
                    // Counts were told now; what is in flight stays.
                    (other.requests, other.tokens) = (0, 0);
                }
                Some(ProxyEvent::Load(report))
            }
            other => Some(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use orchestra_model::{
        quantity::Timespan,
        traffic::{LatencyHistogram, TrafficCell},
    };

    use super::*;

    fn route() -> RouteId {
        RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        }
    }

    fn ended(watch: u64, sequence: u64, requests: u32) -> ProxyEvent {
        let cells = vec![TrafficCell { client: 7, requests, ..TrafficCell::default() }];
        let stable_latency = LatencyHistogram { counts: vec![0, requests] };
        ProxyEvent::Traffic(TrafficReport { route: route(), watch, sequence, cells, stable_latency, mirrored: (1, 0) })
    }

    #[test]
    fn what_a_leaving_proxy_ends_goes_out_with_the_next_report_of_the_serving_one() {
        let mut traffic = Traffic::default();
        assert_eq!(traffic.heard(1, &[1], ended(5, 900, 2)), None);
        assert_eq!(traffic.heard(1, &[1], ended(5, 901, 3)), None);
        let Some(ProxyEvent::Traffic(report)) = traffic.heard(2, &[1], ended(5, 40, 10)) else { panic!() };
        assert_eq!((report.sequence, report.cells[0].requests, report.cells.len()), (40, 15, 1));
        assert_eq!((report.stable_latency.total(), report.mirrored), (15, (3, 0)));
        // Once, and not for another watch.
        assert_eq!(traffic.heard(1, &[1], ended(5, 902, 1)), None);
        assert_eq!(traffic.heard(2, &[1], ended(6, 1, 4)), Some(ended(6, 1, 4)));
        assert_eq!(traffic.heard(2, &[1], ended(6, 2, 4)), Some(ended(6, 2, 4)));
    }

    #[test]
    fn loads_of_two_proxies_add_up() {
        let mut traffic = Traffic::default();
        let load = |requests, in_flight| {
            let (over, streams, tokens, held) = (Timespan::seconds(1), in_flight, requests, 0);
            ProxyEvent::Load(LoadReport {
                route: route(),
                over,
                requests,
                in_flight,
                streams,
                tokens,
                tokens_in_flight: u64::from(in_flight) * 10,
                held,
            })
        };
        assert_eq!(traffic.heard(1, &[1], load(5, 3)), None);
        assert_eq!(traffic.heard(1, &[1], load(2, 2)), None);
        assert_eq!(traffic.heard(2, &[1], load(10, 1)), Some(load(17, 3)));
        assert_eq!(traffic.heard(2, &[1], load(10, 1)), Some(load(10, 3)));
        // It is gone.
        assert_eq!(traffic.heard(2, &[], load(10, 1)), Some(load(10, 1)));
    }
}
