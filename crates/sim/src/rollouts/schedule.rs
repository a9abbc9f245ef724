//! What a seed decides: services and their strategies, releases that are good or bad, people, and faults.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use orchestra_machine::rng::Rng;
use orchestra_model::{
    Desired, Name, Resource, ResourceId, ResourceKind,
    consult::{Exporter, Selector},
    desired::{Check, Condition, Dependency, Drain, OnLoss, Probe, RestartPolicy, Service},
    quantity::{Amount, Timespan},
    rollout::{
        AnalysisStep, Guard, Hook, HookCall, OnExpiry, OnInconclusive, PairProbe, PauseStep, PrometheusMetric, Rollout,
        RolloutCommand, RolloutStep, Stepped, Strategy,
    },
    text::Text,
    traffic::{Permille, RequestMatch},
};

/// How often things go wrong, in thousandths, and how often somebody is killed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Faults {
    /// The server dies at a batch.
    pub crash: u64,
    /// The clock is changed while it is away.
    pub clock: bool,
    /// A call or event takes long.
    pub slow: u64,
    /// An event arrives twice.
    pub double: u64,
    /// A launch fails for a moment.
    pub launch_fails: u64,
    /// A chosen port is taken.
    pub port_taken: u64,
    /// The data plane stops answering at an offer.
    pub silent: u64,
    /// Its driver hides that and answers later.
    pub patient: bool,
    /// A hook says no.
    pub hook_no: u64,
    /// A hook says nothing.
    pub hook_lost: u64,
    /// Whoever is asked for numbers cannot give any.
    pub consult_error: u64,
    /// It says nothing at all.
    pub consult_lost: u64,
}

impl Faults {
    pub(super) fn random(rng: &mut Rng) -> Self {
        if rng.below(8) == 0 {
            return Self::default();
        }
        // A server that hardly ever lives for long.
        let dying = rng.below(10) == 0;
        let mut some = |most: u64| if rng.below(2) == 0 { 0 } else { rng.below(most + 1) };
        Self {
            crash: if dying { 80 + some(400) } else { some(40) },
            clock: some(3) == 3,
            slow: some(60),
            double: some(80),
            launch_fails: some(60),
            port_taken: some(60),
            silent: some(60),
            patient: some(1) == 1,
            hook_no: some(500),
            hook_lost: some(200),
            consult_error: some(600),
            consult_lost: some(200),
        }
    }
}

/// How a version of a program is known to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadyBy {
    /// Its process runs.
    Nothing,
    /// `READY=1`.
    Notify,
    /// It is asked.
    Http,
}

/// What a version of a program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traits {
    /// Microseconds from start to readiness.
    pub ready: Option<u64>,
    /// Microseconds from start to an exit by itself, in so many first starts.
    pub exit: Option<(u64, u32)>,
    /// Not ready from here to there, in microseconds since its start; without an end, for ever.
    pub unready: Option<(u64, Option<u64>)>,
    /// Microseconds from the stop signal to its exit; `None` ignores it.
    pub term: Option<u64>,
    /// It cannot be started.
    pub missing: bool,
    /// How its readiness is known.
    pub ready_by: ReadyBy,
    /// Bad responses in a thousand.
    pub bad: u32,
}

impl Traits {
    /// One that does what is hoped for.
    pub(super) const GOOD: Self = Self {
        ready: Some(50_000),
        exit: None,
        unready: None,
        term: Some(20_000),
        missing: false,
        ready_by: ReadyBy::Nothing,
        bad: 0,
    };

    pub(super) fn random(rng: &mut Rng) -> Self {
        let ready = Some(1000 * one_of(rng, &[10, 300, 2500]));
        let good = Self { ready, ..Self::GOOD };
        let good = Self { bad: one_of(rng, &[0, 0, 0, 1, 50, 1000]), ..good };
        match rng.below(14) {
            0 => Self { ready: None, ..good },
            1 => Self { ready: Some(1000 * (2000 + rng.below(12_000))), ..good },
            2 => Self { exit: Some((1000 * rng.below(8000), u32::MAX)), ..good },
            3 => Self { exit: Some((1000 * rng.below(8000), one_of(rng, &[1, 2]))), ..good },
            4 => {
                let from = 1000 * rng.below(20_000);
                let to = (rng.below(4) > 0).then(|| from + 1000 * (1 + rng.below(5000)));
                Self { unready: Some((from, to)), ..good }
            }
            5 => Self { term: if rng.below(2) == 0 { None } else { Some(700_000) }, ..good },
            6 => Self { missing: rng.below(2) == 0, ..good },
            _ => good,
        }
    }

    /// Whether it becomes ready and stays so.
    pub(super) fn is_solid(&self) -> bool {
        self.ready.is_some_and(|ready| ready < 3_000_000)
            && self.exit.is_none()
            && self.bad == 0
            && self.unready.is_none()
            && !self.missing
    }
}

/// A release that somebody asks for.
#[derive(Clone, Debug)]
pub(super) enum Wish {
    Up(Desired),
    Restart,
    Scale(u32),
    Rollback,
    Down,
}

/// What somebody does while a run goes on.
#[derive(Clone, Debug)]
pub(super) enum Deed {
    Command(Option<Name>, RolloutCommand),
    Cancel,
    /// Asks for another release, which supersedes this one.
    Supersede,
}

const STACK: &str = "
version: 1
name: demo
services:
  api:
    command: [program, '0']
    ports: {http: auto}
    health: {ready: {http: /ready}}
";

/// A service as a stack file has it, to be changed from here.
static TEMPLATE: LazyLock<Desired> = LazyLock::new(|| crate::stack::load(STACK).expect("the template is a stack"));

/// A second port.
static ADMIN: LazyLock<Name> = LazyLock::new(|| "admin".parse().expect("a valid name"));

/// Services of a stack; each needs the one before it.
static NAMES: LazyLock<Arc<[Name]>> =
    LazyLock::new(|| ["api", "web", "edge"].iter().map(|name| name.parse().expect("a valid name")).collect());

pub(super) fn one_of<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[usize::try_from(rng.below(from.len() as u64)).unwrap_or(0)]
}

pub(super) fn id_of(name: &Name) -> ResourceId {
    ResourceId::new(ResourceKind::Service, name.clone())
}

/// The first release.
pub(super) fn first(rng: &mut Rng, versions: &mut Vec<Traits>) -> Desired {
    let count = one_of(rng, &[1, 1, 1, 1, 2, 3]);
    let mut desired = TEMPLATE.clone();
    let template = desired.resources.pop_first().expect("the template has a service").1;
    for index in 0..count {
        let Resource::Service(mut service) = template.clone() else { unreachable!("the template is a service") };
        // Most first releases are good: a rollout needs something to begin with.
        let traits = if rng.below(8) == 0 { Traits::random(rng) } else { Traits::GOOD };
        fill(rng, &mut service, traits, versions);
        if rng.below(10) == 0 {
            service.ports.clear();
        }
        if index > 0 {
            let until = one_of(rng, &[Condition::Ready, Condition::Ready, Condition::Started]);
            service.depends_on =
                BTreeMap::from([(id_of(&NAMES[index - 1]), Dependency { until, on_loss: OnLoss::Ignore })]);
        }
        desired.resources.insert(id_of(&NAMES[index]), Resource::Service(service));
    }
    desired
}

/// A release after `stable`.
pub(super) fn next(rng: &mut Rng, stable: &Desired, versions: &mut Vec<Traits>) -> Desired {
    let mut desired = stable.clone();
    let all = rng.below(3) > 0;
    let chosen = rng.below(desired.resources.len() as u64);
    for (index, resource) in desired.resources.values_mut().enumerate() {
        if let Resource::Service(service) = resource
            && (all || index as u64 == chosen)
        {
            let replicas = service.replicas;
            let traits = if rng.below(2) == 0 { Traits::GOOD } else { Traits::random(rng) };
            fill(rng, service, traits, versions);
            change_ports(rng, service);
            if rng.below(4) > 0 {
                service.replicas = replicas;
            }
        }
    }
    desired
}

/// Published ports come and go.
fn change_ports(rng: &mut Rng, service: &mut Service) {
    let Some((_, http)) = service.ports.first_key_value().map(|(name, port)| (name.clone(), port.clone())) else {
        return;
    };
    match rng.below(24) {
        0..=3 if service.ports.remove(&*ADMIN).is_some() => {}
        0..=3 => {
            service.ports.insert(ADMIN.clone(), http);
        }
        4 => service.ports.clear(),
        _ => {}
    }
    service.program.ports.extend(service.ports.keys().cloned());
}

fn fill(rng: &mut Rng, service: &mut Service, traits: Traits, versions: &mut Vec<Traits>) {
    let version = versions.len();
    let ready_by = one_of(rng, &[ReadyBy::Nothing, ReadyBy::Notify, ReadyBy::Http, ReadyBy::Http]);
    versions.push(Traits { ready_by, ..traits });
    service.program.command = vec![Text::literal("program"), Text::literal(version.to_string())];
    service.replicas = 1 + u32::try_from(rng.below(4)).unwrap_or(0);
    service.health.start_deadline = Timespan::seconds(one_of(rng, &[3, 5, 10]));
    service.metrics = Some(Exporter {
        port: "http".parse().expect("a valid name"),
        path: "/metrics".to_owned(),
        every: Timespan::seconds(one_of(rng, &[60, 300])),
        timeout: Timespan::seconds(2),
    });
    service.program.notify = ready_by == ReadyBy::Notify;
    let http =
        TEMPLATE.resources.values().find_map(Resource::as_service).and_then(|service| service.health.ready.clone());
    // An answer is told once, when it changes.
    let http = http.map(|probe| Probe { pass_after: 1, fail_after: 1, ..probe });
    service.health.ready = match ready_by {
        ReadyBy::Nothing => None,
        ReadyBy::Notify => http.map(|probe| Probe { check: Check::Notify, ..probe }),
        ReadyBy::Http => http,
    };
    service.restart.policy =
        one_of(rng, &[RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::OnFailure, RestartPolicy::Never]);
    service.restart.backoff = Timespan::millis(100);
    service.restart.max_backoff = Timespan::seconds(1);
    // What exits again and again, or is never ready in time, and may do so for ever never comes to rest.
    let prompt = traits.ready.is_some_and(|ready| ready < 2_600_000);
    let endless = traits.exit.is_none() && prompt && rng.below(4) == 0;
    service.restart.budget = if endless { None } else { Some(one_of(rng, &[0, 2, 5])) };
    service.stop.grace = Timespan::seconds(one_of(rng, &[1, 3]));
    service.rollout = Rollout {
        strategy: strategy(rng),
        drain: Drain {
            requests: Timespan::millis(one_of(rng, &[0, 500, 3000])),
            streams: Timespan::millis(one_of(rng, &[0, 2000, 8000])),
        },
        deadline: Timespan::seconds(one_of(rng, &[15, 40, 120])),
        min_ready: Timespan::millis(one_of(rng, &[0, 0, 0, 500, 4000])),
        progress: Timespan::seconds(one_of(rng, &[5, 20, 600])),
    };
}

fn strategy(rng: &mut Rng) -> Strategy {
    match rng.below(10) {
        0..=2 => {
            let (max_surge, max_unavailable) =
                one_of(rng, &[(1, 0), (1, 0), (2, 0), (1, 1), (0, 1), (0, 2), (4, 4), (0, 0)]);
            Strategy::Rolling { max_surge: Amount::Count(max_surge), max_unavailable: Amount::Count(max_unavailable) }
        }
        3 => Strategy::Recreate,
        4 => Strategy::Hold { queue: 10, timeout: Timespan::seconds(20) },
        5..=7 => Strategy::Canary(stepped(rng)),
        _ => Strategy::BlueGreen(stepped(rng)),
    }
}

fn stepped(rng: &mut Rng) -> Stepped {
    let mut weight = 0;
    let steps = (0..rng.below(6)).map(|_| step(rng, &mut weight)).collect();
    let guard = (rng.below(2) == 0).then(|| guard(rng));
    Stepped { steps, keep_warm: Timespan::seconds(one_of(rng, &[0, 2, 30])), guard }
}

fn step(rng: &mut Rng, weight: &mut u16) -> RolloutStep {
    match rng.below(16) {
        0..=5 => {
            *weight = (*weight + one_of(rng, &[1, 50, 200, 500])).min(1000);
            RolloutStep::Weight(Permille::new(*weight))
        }
        6 => RolloutStep::Scale(Amount::Count(one_of(rng, &[1, 2, 9]))),
        7 | 8 => RolloutStep::Pause(PauseStep {
            duration: Some(Timespan::millis(one_of(rng, &[0, 700, 5000]))),
            owner: None,
            expires: Timespan::seconds(60),
            on_expiry: OnExpiry::RollBack,
        }),
        9 | 10 => RolloutStep::Pause(PauseStep {
            duration: None,
            owner: one_of(rng, &[None, Some("ops")]).map(str::to_owned),
            expires: Timespan::seconds(one_of(rng, &[3, 60, 300])),
            on_expiry: one_of(rng, &[OnExpiry::RollBack, OnExpiry::Promote]),
        }),
        11 | 12 => RolloutStep::Analysis(AnalysisStep {
            duration: Timespan::seconds(one_of(rng, &[2, 10])),
            inconclusive: one_of(
                rng,
                &[
                    None,
                    Some(OnInconclusive::Hold),
                    Some(OnInconclusive::PromoteAndWatch),
                    Some(OnInconclusive::RollBack),
                ],
            ),
        }),
        13 => RolloutStep::Hook(Hook {
            name: "smoke".to_owned(),
            call: HookCall::Webhook { url: "http://127.0.0.1:9".to_owned() },
            timeout: Timespan::seconds(2),
            retries: one_of(rng, &[0, 1, 2]),
        }),
        14 => RolloutStep::Match(vec![RequestMatch {
            headers: BTreeMap::from([("x-canary".to_owned(), "1".to_owned())]),
            cookies: BTreeMap::new(),
        }]),
        _ => RolloutStep::Mirror { share: Permille::new(100), unsafe_methods: false },
    }
}

fn guard(rng: &mut Rng) -> Guard {
    let probe = (rng.below(3) == 0).then(|| PairProbe {
        port: "http".parse().expect("a name"),
        path: "/".to_owned(),
        every: Timespan::seconds(one_of(rng, &[5, 60])),
        timeout: Timespan::seconds(2),
    });
    Guard {
        alpha: Permille::new(10),
        errors: true,
        max_errors: one_of(rng, &[None, Some(Permille::new(100))]),
        latency: None,
        first_byte: None,
        first_token: None,
        counters: if rng.below(3) == 0 { vec![COUNTER.clone()] } else { Vec::new() },
        per_client: 3,
        clients: 2,
        warm_up: Timespan::millis(500),
        inconclusive: one_of(rng, &[OnInconclusive::Hold, OnInconclusive::PromoteAndWatch, OnInconclusive::RollBack]),
        raise_to: one_of(rng, &[None, Some(Permille::new(300))]),
        probe,
        flag: None,
        prometheus: (0..one_of(rng, &[0, 0, 1, 2])).map(|_| metric(rng)).collect(),
    }
}

static COUNTER: LazyLock<Selector> = LazyLock::new(|| "errors_total".parse().expect("a valid selector"));

fn metric(rng: &mut Rng) -> PrometheusMetric {
    // Pauses may last for a day.
    let (every, count) = one_of(rng, &[(1, Some(3)), (120, None), (120, Some(1))]);
    PrometheusMetric {
        name: "share-of-errors".to_owned(),
        address: "http://127.0.0.1:9".to_owned(),
        query: "errors".to_owned(),
        success: one_of(rng, &[None, Some("result < 0.01")]).map(str::to_owned),
        failure: Some("result >= 0.05".to_owned()),
        every: Timespan::seconds(every),
        initial_delay: Timespan::seconds(one_of(rng, &[0, 1])),
        timeout: Timespan::seconds(2),
        count,
        failure_limit: Some(one_of(rng, &[0, 1])),
        inconclusive_limit: one_of(rng, &[Some(0), None]),
        error_limit: Some(one_of(rng, &[0, 4])),
        success_limit: one_of(rng, &[None, None, Some(2)]),
        token: None,
        ca: None,
        dry_run: rng.below(4) == 0,
    }
}

/// What somebody wants next.
pub(super) fn wish(rng: &mut Rng, stable: Option<&Desired>, versions: &mut Vec<Traits>) -> Wish {
    let Some(stable) = stable else { return Wish::Up(first(rng, versions)) };
    match rng.below(16) {
        0 => Wish::Restart,
        1 => Wish::Scale(u32::try_from(rng.below(5)).unwrap_or(1)),
        2 | 3 => Wish::Rollback,
        4 => Wish::Down,
        _ => Wish::Up(next(rng, stable, versions)),
    }
}

/// Whether nothing but time, people and faults can make a release fail.
pub(super) fn is_sound(desired: &Desired, versions: &[Traits]) -> bool {
    desired.resources.values().filter_map(Resource::as_service).all(|service| {
        let traits = &versions[super::world::version_of(service)];
        let asks_much = |step: &RolloutStep| match step {
            RolloutStep::Pause(pause) => pause.duration.is_none() && pause.expires < Timespan::seconds(60),
            // Nobody judges here.
            RolloutStep::Analysis(_) => true,
            _ => false,
        };
        // Old ones have to leave before new ones start, and the clocks go on meanwhile.
        let overlaps = match &service.rollout.strategy {
            Strategy::Rolling { max_surge, .. } => max_surge.rounded_up(service.replicas) > 0,
            Strategy::Recreate | Strategy::Hold { .. } => false,
            Strategy::Canary(_) | Strategy::BlueGreen(_) => true,
        };
        let patient =
            service.rollout.progress >= Timespan::seconds(20) && service.rollout.deadline >= Timespan::seconds(120);
        traits.is_solid()
            && (overlaps || patient)
            && traits.ready.is_some_and(|ready| ready <= 300_000)
            && service.rollout.min_ready <= Timespan::millis(500)
            && !service.rollout.strategy.stepped().is_some_and(|stepped| stepped.steps.iter().any(asks_much))
    })
}

/// What somebody does who wants the release.
pub(super) fn good_deed(rng: &mut Rng) -> Deed {
    match rng.below(4) {
        0 => Deed::Command(None, RolloutCommand::Pause),
        1 => Deed::Command(None, RolloutCommand::PromoteFully),
        _ => Deed::Command(None, RolloutCommand::Promote),
    }
}

/// What somebody does, as often as not at the wrong time.
pub(super) fn deed(rng: &mut Rng) -> Deed {
    let service = (rng.below(3) == 0).then(|| NAMES[usize::try_from(rng.below(3)).unwrap_or(0)].clone());
    match rng.below(14) {
        12 | 13 => Deed::Supersede,
        0..=3 => Deed::Command(service, RolloutCommand::Promote),
        4 | 5 => Deed::Command(service, RolloutCommand::PromoteFully),
        6..=8 => Deed::Command(service, RolloutCommand::Pause),
        9 | 10 => Deed::Command(service, RolloutCommand::Abort),
        _ => Deed::Cancel,
    }
}
