//! The route table as requests see it: compiled once per version, then only read.
//!
//! Endpoints, gates and connection pools outlive a version; a compiled table refers to them. It is put into force by one
//! pointer swap (`state.rs`), so a request sees one version or the next and never a mixture.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use orchestra_model::{
    desired::Protocol,
    id::{InstanceId, ReleaseNumber},
    quantity::Timespan,
    route::{Ejection, EndpointKey, Queue, RouteId, RouteTable, Standing},
    traffic::{Arm, Permille},
};
use tokio::sync::Notify;

use crate::{
    assign::{Steering, Way, hash, mix, random},
    breaker::Load,
    budget::Budget,
    clock,
    flags::Station,
    limit::Clients,
    load::Meter,
    metrics::{Series, release_labels},
    mirror::Mirroring,
    rules::Rules,
    tls::Terminator,
    upstream::Upstream,
    watch::Watching,
    wire::SocketId,
};

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
    /// Sockets on which flags are asked for.
    pub(crate) flags: HashMap<SocketId, Arc<Station>>,
    /// Sockets on which TLS is spoken.
    pub(crate) tls: HashMap<SocketId, Arc<Terminator>>,
    /// Those of which somebody wants reports.
    pub(crate) reported: Vec<Arc<RoutePlan>>,
}

/// A route in force.
#[derive(Debug)]
pub(crate) struct RoutePlan {
    /// Of the table.
    pub(crate) version: u64,
    pub(crate) id: RouteId,
    pub(crate) protocol: Protocol,
    pub(crate) hold: Duration,
    pub(crate) hold_limit: u32,
    pub(crate) shared: Arc<RouteShared>,
    /// Backends with at least one active endpoint.
    pub(crate) backends: Vec<BackendPlan>,
    /// Numbers of what reaches no release.
    pub(crate) series: Arc<Series>,
    /// New requests wait though instances are there.
    pub(crate) paused: bool,
    /// `None` if nothing depends on the request.
    pub(crate) steering: Option<Box<Steering>>,
    /// Share of the canary arm by weights, rounded up.
    pub(crate) canary_weight: Permille,
    pub(crate) watch: Option<Arc<Watching>>,
    pub(crate) meter: Option<Arc<Meter>>,
    pub(crate) mirror: Option<Mirroring>,
    pub(crate) rules: Rules,
}

impl Table {
    /// Appends the instances that are ejected now, in Prometheus text format.
    pub(crate) fn render(&self, page: &mut String) {
        page.push_str("# HELP orchestra_proxy_ejected Instances that are left out because they failed.\n");
        page.push_str("# TYPE orchestra_proxy_ejected gauge\n");
        for plan in self.routes.values() {
            for (backend, instance, _) in plan.left_out() {
                let labels = release_labels(&plan.id, backend.release, backend.arm);
                let port = &plan.id.port;
                let _ = writeln!(page, "orchestra_proxy_ejected{{{labels},port=\"{port}\",instance=\"{instance}\"}} 1");
            }
        }
    }

    /// Instances that are ejected, whether that is in force or not, and requests that wait.
    pub(crate) fn standing(&self) -> Standing {
        let of_route = |plan: &Arc<RoutePlan>| -> Vec<Ejection> {
            let ejection = |(_, instance, left): (&BackendPlan, &InstanceId, Duration)| Ejection {
                route: plan.id.clone(),
                instance: instance.clone(),
                left: Timespan::millis(u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            };
            plan.left_out().map(ejection).collect()
        };
        let queue = |plan: &Arc<RoutePlan>| {
            let length = plan.shared.holding.load(Ordering::Relaxed);
            (length > 0).then(|| Queue { route: plan.id.clone(), length, limit: plan.hold_limit })
        };
        Standing {
            ejected: self.routes.values().flat_map(of_route).collect(),
            queues: self.routes.values().filter_map(queue).collect(),
        }
    }

    /// How the routes stand, for people who look at the proxy alone.
    pub(crate) fn status(&self) -> serde_json::Value {
        let mut plans: Vec<&Arc<RoutePlan>> = self.routes.values().collect();
        plans.sort_by(|a, b| a.id.cmp(&b.id));
        let route = |plan: &&Arc<RoutePlan>| {
            let ejected: Vec<serde_json::Value> = plan
                .left_out()
                .map(|(backend, instance, left)| {
                    let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                    serde_json::json!({"instance": instance, "release": backend.release, "for_ms": left})
                })
                .collect();
            serde_json::json!({
                "route": plan.id.to_string(),
                "instances": plan.backends.iter().map(|backend| backend.upstreams.len()).sum::<usize>(),
                "waiting": plan.shared.holding.load(Ordering::Relaxed),
                "paused": plan.paused,
                "ejected": ejected,
            })
        };
        serde_json::json!({"routes": plans.iter().map(route).collect::<Vec<_>>()})
    }
}

/// A release behind a route.
#[derive(Debug)]
pub(crate) struct BackendPlan {
    pub(crate) release: ReleaseNumber,
    /// The release, as it stands in responses.
    pub(crate) name: HeaderValue,
    pub(crate) arm: Arm,
    /// Zero: only for those who ask for this release.
    pub(crate) weight: u32,
    /// Active endpoints only.
    pub(crate) upstreams: Vec<Arc<Upstream>>,
    pub(crate) series: Arc<Series>,
}

/// What of a route outlives versions.
#[derive(Debug)]
pub(crate) struct RouteShared {
    pub(crate) holding: AtomicU32,
    /// Told after a new version is in force.
    pub(crate) changed: Notify,
    /// Copies of requests under way.
    pub(crate) mirroring: Arc<AtomicU32>,
    draws: AtomicU64,
    pub(crate) budget: Budget,
    /// What is under way, where that is bounded.
    pub(crate) load: Arc<Load>,
    /// Made when it is first asked for.
    clients: OnceLock<Box<Clients>>,
    /// When the last ejection ends, in milliseconds of [`clock`]; 0 while nobody is ejected.
    ejected_until: AtomicU64,
    /// Held by who ejects.
    ejecting: Mutex<()>,
}

impl Default for RouteShared {
    fn default() -> Self {
        Self {
            holding: AtomicU32::default(),
            changed: Notify::default(),
            mirroring: Arc::default(),
            draws: AtomicU64::new(random()),
            budget: Budget::default(),
            load: Arc::default(),
            clients: OnceLock::new(),
            ejected_until: AtomicU64::new(0),
            ejecting: Mutex::default(),
        }
    }
}

impl RouteShared {
    /// The next of a sequence that looks random and begins elsewhere in every process (`SplitMix64`, Steele et al.
    /// 2014). It depends on nothing of a request, which is what makes a comparison of two arms a fair one.
    pub(crate) fn draw(&self) -> u64 {
        mix(self.draws.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// Who asked how often, where that is limited.
    pub(crate) fn clients(&self) -> &Clients {
        self.clients.get_or_init(Box::default)
    }
}

/// A number below `bound` from 32 random bits, without the bias or the cost of a division (Lemire 2019).
fn below(bits: u32, bound: u32) -> u32 {
    let scaled = (u64::from(bits) * u64::from(bound)) >> 32;
    u32::try_from(scaled).expect("less than bound")
}

/// The high and the low half.
fn halves(bits: u64) -> (u32, u32) {
    let low = bits & 0xFFFF_FFFF;
    (u32::try_from(bits >> 32).expect("32 bits"), u32::try_from(low).expect("32 bits"))
}

/// An endpoint that was chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice<'a> {
    pub(crate) upstream: &'a Arc<Upstream>,
    /// Which of the plan's backends it belongs to.
    pub(crate) backend: usize,
    /// Whether it is of the release or the arm that was meant.
    pub(crate) as_meant: bool,
}

impl RoutePlan {
    /// Whether a release has an active endpoint.
    pub(crate) fn serves(&self, release: ReleaseNumber) -> bool {
        self.backends.iter().any(|backend| backend.release == release)
    }

    /// Whether an arm has an active endpoint for everybody.
    pub(crate) fn is_usable(&self, arm: Arm) -> bool {
        self.backends.iter().any(|backend| backend.arm == arm && backend.weight > 0)
    }

    /// Chooses an endpoint: of the release or the arm that is meant, then a release by weight, then the less loaded of
    /// two of its endpoints (Mitzenmacher 2001). What is in `avoid` was tried already. `None` if nothing is left.
    pub(crate) fn choose(&self, way: &Way, avoid: &[Arc<Upstream>]) -> Option<Choice<'_>> {
        if let Some(release) = way.release
            && let Some(choice) = self.pick(|b| if b.release == release { b.weight.max(1) } else { 0 }, way, avoid)
        {
            return Some(choice);
        }
        let Some(arm) = way.arm else { return self.pick(|b| b.weight, way, avoid) };
        self.pick(|b| if b.arm == arm { b.weight } else { 0 }, way, avoid).or_else(|| {
            let other = self.pick(|b| if b.arm == arm { 0 } else { b.weight }, way, avoid)?;
            Some(Choice { as_meant: false, ..other })
        })
    }

    /// The same, without what is in `spared` as long as the release or the arm that is meant has another: there a try
    /// failed, or it is ejected. Being spared moves nobody to another arm.
    pub(crate) fn choose_sparing(
        &self,
        way: &Way,
        avoid: &[Arc<Upstream>],
        spared: &[Arc<Upstream>],
    ) -> Option<Choice<'_>> {
        if spared.is_empty() {
            return self.choose(way, avoid);
        }
        let both = [avoid, spared].concat();
        let meant = |choice: &Choice<'_>| {
            choice.as_meant && way.release.is_none_or(|release| self.backends[choice.backend].release == release)
        };
        self.choose(way, &both).filter(meant).or_else(|| self.choose(way, avoid))
    }

    /// Instances that are left out for now. Of a release of which too few would be left, nobody is.
    pub(crate) fn ejected(&self) -> Vec<Arc<Upstream>> {
        let until = self.shared.ejected_until.load(Ordering::Relaxed);
        let Some(rule) = self.rules.outlier.filter(|_| until > 0) else { return Vec::new() };
        let now = clock::now();
        if until <= clock::millis(now) {
            // Whoever ejects in between has stored another moment.
            let _ = self.shared.ejected_until.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
            return Vec::new();
        }
        let mut all = Vec::new();
        for backend in &self.backends {
            let ejected = backend.upstreams.iter().filter(|upstream| upstream.health.is_ejected(now));
            if !rule.panics(ejected.clone().count(), backend.upstreams.len()) {
                all.extend(ejected.cloned());
            }
        }
        all
    }

    /// Instances that are ejected, whether that is in force or not, and for how long yet.
    fn left_out(&self) -> impl Iterator<Item = (&BackendPlan, &InstanceId, Duration)> {
        let now = clock::now();
        self.backends.iter().flat_map(move |backend| {
            let of_it = backend.upstreams.iter();
            of_it.filter_map(move |u| Some((backend, &u.flight.key().instance, u.health.remaining(now)?)))
        })
    }

    /// An instance failed a request; too often in a row, and it is ejected.
    pub(crate) fn failed(&self, backend: &BackendPlan, upstream: &Upstream) {
        let Some(rule) = self.rules.outlier else { return };
        if !upstream.health.failed(rule) {
            return;
        }
        let _alone = self.shared.ejecting.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::now();
        let ejected = backend.upstreams.iter().filter(|upstream| upstream.health.is_ejected(now)).count();
        if upstream.health.is_ejected(now) || !rule.has_room(ejected, backend.upstreams.len()) {
            return;
        }
        let until = upstream.health.eject(rule, now);
        self.shared.ejected_until.fetch_max(clock::millis(until), Ordering::Relaxed);
        backend.series.ejected();
        let key = upstream.flight.key();
        tracing::warn!(route = %self.id, instance = %key.instance, "ejected for {:?}: {} failures in a row", until.saturating_sub(now), rule.failures);
    }

    /// Chooses by these weights.
    fn pick(&self, weight: impl Fn(&BackendPlan) -> u32, way: &Way, avoid: &[Arc<Upstream>]) -> Option<Choice<'_>> {
        let as_meant = true;
        if let Some(key) = way.key {
            return self.rendezvous(weight, key, avoid);
        }
        let (high, low) = halves(way.bits);
        if avoid.is_empty() {
            let total: u32 = self.backends.iter().fold(0, |sum, b| sum.saturating_add(weight(b)));
            let mut ticket = below(high, total);
            let (backend, plan) =
                self.backends.iter().enumerate().find(|(_, backend)| match ticket.checked_sub(weight(backend)) {
                    Some(rest) => {
                        ticket = rest;
                        false
                    }
                    None => true,
                })?;
            return less_loaded(&plan.upstreams, low).map(|upstream| Choice { upstream, backend, as_meant });
        }
        // Rare: after a failure, or while one is ejected. The same among those that are left.
        let mut candidates: Vec<(u32, usize, Vec<Arc<Upstream>>)> = Vec::new();
        for (index, backend) in self.backends.iter().enumerate() {
            let fresh: Vec<Arc<Upstream>> =
                backend.upstreams.iter().filter(|u| !avoid.iter().any(|a| Arc::ptr_eq(a, u))).cloned().collect();
            if weight(backend) > 0 && !fresh.is_empty() {
                candidates.push((weight(backend), index, fresh));
            }
        }
        let mut ticket = below(high, candidates.iter().fold(0, |sum: u32, (weight, ..)| sum.saturating_add(*weight)));
        let (_, backend, fresh) = candidates.iter().find(|(weight, ..)| match ticket.checked_sub(*weight) {
            Some(rest) => {
                ticket = rest;
                false
            }
            None => true,
        })?;
        let chosen = less_loaded(fresh, low)?;
        let upstream = self.backends[*backend].upstreams.iter().find(|u| Arc::ptr_eq(u, chosen))?;
        Some(Choice { upstream, backend: *backend, as_meant })
    }

    /// The endpoint with the highest score for this key. An instance's weight is its share of its release's (weighted
    /// rendezvous hashing, Schindelhauer and Schomaker 2005): what grows takes clients from all others, and they keep
    /// the rest.
    fn rendezvous(
        &self,
        weight: impl Fn(&BackendPlan) -> u32,
        key: u64,
        avoid: &[Arc<Upstream>],
    ) -> Option<Choice<'_>> {
        let mut best: Option<(f64, Choice<'_>)> = None;
        for (backend, plan) in self.backends.iter().enumerate().filter(|(_, backend)| weight(backend) > 0) {
            let share = f64::from(weight(plan)) / f64::from(u32::try_from(plan.upstreams.len()).unwrap_or(u32::MAX));
            for upstream in &plan.upstreams {
                if avoid.iter().any(|a| Arc::ptr_eq(a, upstream)) {
                    continue;
                }
                // In (0, 1): 32 bits are exact in a float.
                let (high, _) = halves(mix(key ^ upstream.slot));
                let uniform = (f64::from(high) + 0.5) / 4_294_967_296.0;
                let score = -share / uniform.ln();
                if best.as_ref().is_none_or(|(highest, _)| score > *highest) {
                    best = Some((score, Choice { upstream, backend, as_meant: true }));
                }
            }
        }
        best.map(|(_, choice)| choice)
    }
}

/// Where an instance stands in rendezvous hashing; the same for all its starts.
pub(crate) fn slot(key: &EndpointKey) -> u64 {
    hash(key.instance.to_string().as_bytes())
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
pub(crate) mod tests {
    use orchestra_task::TaskTree;

    use super::*;
    use crate::{
        assign::Asker,
        flight::{Flight, Kind},
        metrics::Registry,
    };

    /// Backends as (weight, endpoints); releases and ports count from 1.
    pub(crate) fn plan(backends: &[(Arm, u32, u32)]) -> RoutePlan {
        let id = RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: "api".parse().unwrap(),
            port: "http".parse().unwrap(),
        };
        let registry = Registry::default();
        let mut port = 1;
        let backends = backends.iter().zip(1..).map(|(&(arm, weight, endpoints), release)| {
            let series = registry.series(&id, Some((ReleaseNumber(release), arm)));
            let upstream = |ordinal: u32| {
                let key = EndpointKey {
                    environment: id.environment.clone(),
                    instance: format!("api-r{release}-{ordinal}").parse().unwrap(),
                    attempt: 1,
                };
                let flight = Arc::new(Flight::new(key, Arc::default()));
                flight.open();
                port += 1;
                let address = ([127, 0, 0, 1], port).into();
                Arc::new(Upstream::new(Protocol::Http, address, flight, Arc::clone(&series), TaskTree::new()))
            };
            let upstreams = (0..endpoints).map(upstream).collect();
            let name = HeaderValue::from(release);
            BackendPlan { release: ReleaseNumber(release), name, arm, weight, upstreams, series: Arc::clone(&series) }
        });
        let backends = backends.collect();
        RoutePlan {
            version: 1,
            protocol: Protocol::Http,
            hold: Duration::ZERO,
            hold_limit: 0,
            shared: Arc::default(),
            backends,
            series: registry.series(&id, None),
            paused: false,
            steering: None,
            canary_weight: Permille::ZERO,
            watch: None,
            meter: None,
            mirror: None,
            rules: Rules::default(),
            id,
        }
    }

    /// Where anything of this arm (or anything at all), with this key, goes.
    fn way(plan: &RoutePlan, arm: Option<Arm>, key: Option<u64>) -> Way {
        let mut way = Asker::new(None, ([127, 0, 0, 1], 1).into()).way(plan);
        (way.arm, way.key) = (arm, key);
        way
    }

    fn port(plan: &RoutePlan, way: &Way, avoid: &[Arc<Upstream>]) -> Option<u16> {
        plan.choose(way, avoid).map(|choice| choice.upstream.address.port())
    }

    #[test]
    fn traffic_is_split_by_weight_and_evenly_within() {
        let plan = plan(&[(Arm::Stable, 950, 3), (Arm::Canary, 50, 1), (Arm::Stable, 0, 2)]);
        let mut hits: HashMap<u16, u32> = HashMap::new();
        for _ in 0..100_000 {
            *hits.entry(port(&plan, &way(&plan, None, None), &[]).unwrap()).or_default() += 1;
        }
        for port in 2..=4 {
            assert!((30_000..33_500).contains(&hits[&port]), "{hits:?}");
        }
        assert!((4_600..5_400).contains(&hits[&5]), "{hits:?}");
        assert_eq!(hits.len(), 4, "{hits:?}");
    }

    #[test]
    fn the_less_loaded_of_two_is_taken() {
        let plan = plan(&[(Arm::Stable, 1, 2)]);
        let busy = plan.backends[0].upstreams[0].flight.enter(Kind::Stream).unwrap();
        for _ in 0..100 {
            assert_eq!(port(&plan, &way(&plan, None, None), &[]), Some(3));
        }
        drop(busy);
    }

    #[test]
    fn what_was_tried_is_avoided_until_nothing_is_left() {
        let plan = plan(&[(Arm::Stable, 900, 2), (Arm::Canary, 100, 1)]);
        for key in [None, Some(5)] {
            for (arm, last) in [(None, None), (Some(Arm::Stable), Some(2)), (Some(Arm::Canary), Some(0))] {
                let way = way(&plan, arm, key);
                let (mut tried, mut meant) = (Vec::new(), 0);
                while let Some(next) = plan.choose(&way, &tried) {
                    assert!(!tried.iter().any(|t| Arc::ptr_eq(t, next.upstream)));
                    meant += usize::from(next.as_meant);
                    // The meant arm first, then the other.
                    assert!(last.is_none_or(|last| next.as_meant == (tried.len() < last.max(1))), "{arm:?}");
                    tried.push(Arc::clone(next.upstream));
                }
                assert_eq!(tried.len(), 3);
                assert_eq!(meant, arm.map_or(3, |arm| if arm == Arm::Stable { 2 } else { 1 }));
            }
        }
        assert!(plan_without_backends().choose(&way(&plan, None, None), &[]).is_none());
    }

    fn plan_without_backends() -> RoutePlan {
        plan(&[])
    }

    #[test]
    fn a_release_is_reached_by_name_alone_if_it_has_no_weight() {
        let plan = plan(&[(Arm::Stable, 1, 1), (Arm::Stable, 0, 1)]);
        let mut pinned = way(&plan, None, None);
        pinned.release = Some(ReleaseNumber(2));
        assert_eq!(port(&plan, &pinned, &[]), Some(3));
        let gone = [Arc::clone(&plan.backends[1].upstreams[0])];
        assert_eq!(port(&plan, &pinned, &gone), Some(2));
        assert!(plan.serves(ReleaseNumber(2)) && !plan.serves(ReleaseNumber(3)));
    }

    /// Law: an instance that comes takes only what it keeps, one that goes gives away only what it had.
    #[test]
    fn sticky_clients_move_only_with_their_instance() {
        let all = plan(&[(Arm::Stable, 4, 4)]);
        let mut fewer = plan(&[(Arm::Stable, 3, 4)]);
        fewer.backends[0].upstreams.remove(1);
        let mut hits: HashMap<u16, u32> = HashMap::new();
        for key in 0..20_000 {
            let key = Some(hash(format!("session-{key}").as_bytes()));
            let (before, after) =
                (port(&all, &way(&all, None, key), &[]).unwrap(), port(&fewer, &way(&fewer, None, key), &[]).unwrap());
            assert!(before == after || before == 3, "{before} to {after}");
            *hits.entry(before).or_default() += 1;
        }
        assert!(hits.values().all(|hits| (4_700..5_300).contains(hits)), "{hits:?}");
    }

    #[test]
    fn sticky_clients_are_split_by_weight() {
        let plan = plan(&[(Arm::Stable, 900, 2), (Arm::Canary, 100, 1)]);
        let to_canary = (0..50_000)
            .filter(|key| port(&plan, &way(&plan, None, Some(hash(format!("{key}").as_bytes()))), &[]) == Some(4))
            .count();
        assert!((4_650..5_350).contains(&to_canary), "{to_canary}");
    }
}
