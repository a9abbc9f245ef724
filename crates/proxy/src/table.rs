//! The route table as requests see it: compiled once per version, then only read.
//!
//! Endpoints, gates and connection pools outlive a version; a compiled table refers to them. It is put into force by one
//! pointer swap (`state.rs`), so a request sees one version or the next and never a mixture.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use orchestra_model::{
    desired::Protocol,
    route::{EndpointKey, RouteId, RouteTable},
};
use tokio::sync::Notify;

use crate::{metrics::Series, upstream::Upstream, wire::SocketId};

/// The endpoints of a table; an endpoint behind several routes comes several times.
pub(crate) fn keys(table: &RouteTable) -> impl Iterator<Item = EndpointKey> + '_ {
    table.routes.iter().flat_map(|route| {
        let endpoints = route.backends.iter().flat_map(|backend| &backend.endpoints);
        endpoints.map(|endpoint| EndpointKey {
            environment: route.id.environment.clone(),
            instance: endpoint.instance.clone(),
            attempt: endpoint.attempt,
        })
    })
}

/// A table in force.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// By the socket on which connections arrive: looking up hashes one number.
    pub(crate) routes: HashMap<SocketId, Arc<RoutePlan>>,
}

/// A route in force.
#[derive(Debug)]
pub(crate) struct RoutePlan {
    pub(crate) id: RouteId,
    pub(crate) protocol: Protocol,
    pub(crate) hold: Duration,
    pub(crate) hold_limit: u32,
    pub(crate) shared: Arc<RouteShared>,
    /// Backends with a weight and at least one active endpoint.
    pub(crate) backends: Vec<BackendPlan>,
    /// Numbers of what reaches no release.
    pub(crate) series: Arc<Series>,
}

/// A release behind a route.
#[derive(Debug)]
pub(crate) struct BackendPlan {
    pub(crate) weight: u32,
    /// Active endpoints only.
    pub(crate) upstreams: Vec<Arc<Upstream>>,
}

/// What of a route outlives versions.
#[derive(Debug, Default)]
pub(crate) struct RouteShared {
    pub(crate) holding: AtomicU32,
    /// Told after a new version is in force.
    pub(crate) changed: Notify,
    draws: AtomicU64,
}

impl RouteShared {
    /// The next of a sequence that looks random and is the same in every process (`SplitMix64`, Steele et al. 2014).
    fn draw(&self) -> u64 {
        let mut z = self.draws.fetch_add(1, Ordering::Relaxed).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// A number below `bound` from 32 random bits, without the bias or the cost of a division (Lemire 2019).
fn below(bits: u32, bound: u32) -> u32 {
    let scaled = (u64::from(bits) * u64::from(bound)) >> 32;
    u32::try_from(scaled).expect("less than bound")
}

impl RoutePlan {
    /// Chooses an endpoint: a release by weight, then the less loaded of two of its endpoints (Mitzenmacher 2001).
    /// What is in `avoid` was tried already. `None` if nothing is left.
    pub(crate) fn choose(&self, avoid: &[Arc<Upstream>]) -> Option<&Arc<Upstream>> {
        let bits = self.shared.draw();
        let (high, low) =
            (u32::try_from(bits >> 32).expect("32 bits"), u32::try_from(bits & 0xFFFF_FFFF).expect("32 bits"));
        if avoid.is_empty() {
            let total: u32 = self.backends.iter().fold(0, |sum, b| sum.saturating_add(b.weight));
            let mut ticket = below(high, total);
            let backend = self.backends.iter().find(|backend| match ticket.checked_sub(backend.weight) {
                Some(rest) => {
                    ticket = rest;
                    false
                }
                None => true,
            })?;
            return less_loaded(&backend.upstreams, low);
        }
        // Rare: after a failure. Any endpoint that was not tried, the same release first by weight.
        let fresh = |backend: &BackendPlan| -> Vec<Arc<Upstream>> {
            backend.upstreams.iter().filter(|u| !avoid.iter().any(|a| Arc::ptr_eq(a, u))).cloned().collect()
        };
        let mut candidates: Vec<(u32, Vec<Arc<Upstream>>)> =
            self.backends.iter().map(|b| (b.weight, fresh(b))).filter(|(_, u)| !u.is_empty()).collect();
        candidates.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
        let chosen = less_loaded(&candidates.first()?.1, low).cloned()?;
        self.backends.iter().flat_map(|b| &b.upstreams).find(|u| Arc::ptr_eq(u, &chosen))
    }
}

fn less_loaded(upstreams: &[Arc<Upstream>], bits: u32) -> Option<&Arc<Upstream>> {
    let count = u32::try_from(upstreams.len()).ok()?;
    if count < 2 {
        return upstreams.first();
    }
    // Two different ones out of one draw: the halves of the bits are independent enough for this.
    let first = below(bits, count);
    let second = (first + 1 + below(bits.rotate_left(16), count - 1)) % count;
    let (first, second) = (&upstreams[first as usize], &upstreams[second as usize]);
    Some(if second.flight.load() < first.flight.load() { second } else { first })
}

#[cfg(test)]
mod tests {
    use orchestra_model::id::ReleaseNumber;
    use orchestra_task::TaskTree;

    use super::*;
    use crate::{
        flight::{Flight, Kind},
        metrics::Registry,
    };

    fn plan(backends: &[(u32, u32)]) -> RoutePlan {
        let id = RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        };
        let registry = Registry::default();
        let mut port = 1;
        let backends = backends.iter().zip(1..).map(|(&(weight, endpoints), release)| {
            let upstream = |ordinal: u32| {
                let key = EndpointKey {
                    environment: id.environment.clone(),
                    instance: format!("api-r{release}-{ordinal}").parse().unwrap(),
                    attempt: 1,
                };
                let flight = Arc::new(Flight::new(key, Arc::default()));
                flight.open();
                port += 1;
                let series = registry.series(&id, Some(ReleaseNumber(release)));
                let address = ([127, 0, 0, 1], port).into();
                Arc::new(Upstream::new(Protocol::Http, address, flight, series, TaskTree::new()))
            };
            BackendPlan { weight, upstreams: (0..endpoints).map(upstream).collect() }
        });
        let backends = backends.collect();
        RoutePlan {
            protocol: Protocol::Http,
            hold: Duration::ZERO,
            hold_limit: 0,
            shared: Arc::default(),
            backends,
            series: registry.series(&id, None),
            id,
        }
    }

    #[test]
    fn traffic_is_split_by_weight_and_evenly_within() {
        let plan = plan(&[(950, 3), (50, 1)]);
        let mut hits: HashMap<u16, u32> = HashMap::new();
        for _ in 0..100_000 {
            *hits.entry(plan.choose(&[]).unwrap().address.port()).or_default() += 1;
        }
        for port in 2..=4 {
            assert!((30_000..33_500).contains(&hits[&port]), "{hits:?}");
        }
        assert!((4_700..5_300).contains(&hits[&5]), "{hits:?}");
    }

    #[test]
    fn the_less_loaded_of_two_is_taken() {
        let plan = plan(&[(1, 2)]);
        let busy = plan.backends[0].upstreams[0].flight.enter(Kind::Stream).unwrap();
        for _ in 0..100 {
            assert_eq!(plan.choose(&[]).unwrap().address.port(), 3);
        }
        drop(busy);
    }

    #[test]
    fn what_was_tried_is_avoided_until_nothing_is_left() {
        let plan = plan(&[(900, 2), (100, 1)]);
        let mut tried = Vec::new();
        while let Some(next) = plan.choose(&tried) {
            assert!(!tried.iter().any(|t| Arc::ptr_eq(t, next)));
            tried.push(Arc::clone(next));
        }
        assert_eq!(tried.len(), 3);
        assert!(self::plan(&[]).choose(&[]).is_none());
    }
}
