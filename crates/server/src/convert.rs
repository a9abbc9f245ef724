//! From the engine's views to the API's types.

use std::time::Duration;

use orchestra_api::{
    Address, CheckState, Cost, Ejected, EnvironmentHealth, EnvironmentStatus, EnvironmentSummary, HealthStatus,
    InFlight, InstancePhase, InstanceStatus, JobState, JobStatus, Mirrored, PreviewStatus, Progress, ProgressState,
    Queue, RolloutStatus, RunSummary, ServiceState, ServiceStatus, UsageNow, VolumeState, VolumeStatus, Waiting,
};
use orchestra_engine::{Shown, View};
use orchestra_machine::{
    health::Verdict,
    status::{CheckStatus, InstanceStatus as Seen, ResourceStatus},
};
use orchestra_model::{
    Code, Diagnostic, ResourceKind,
    desired::Protocol,
    plan::Step,
    preview::{Preview, PreviewRecord},
    quantity::Timespan,
    record::{RunState, StepState},
    route::Standing,
};

fn waiting(reason: String) -> Waiting {
    Waiting { on: None, until: None, reason, deadline: None, due: None }
}

fn instance(view: &View, seen: &Seen) -> InstanceStatus {
    let phase = match seen.phase {
        "pending" => InstancePhase::Pending,
        "launching" => InstancePhase::Launching,
        "starting" => InstancePhase::Starting,
        "ready" => InstancePhase::Ready,
        "unready" => InstancePhase::Unready,
        "draining" => InstancePhase::Draining,
        "stopping" => InstancePhase::Stopping,
        "exited" => InstancePhase::Exited,
        _ => InstancePhase::Ended,
    };
    let (requests, streams) = seen.in_flight;
    InstanceStatus {
        id: seen.id.clone(),
        phase,
        since: view.since(seen),
        attempt: seen.attempt,
        pid: seen.pid,
        ports: seen.ports.iter().filter_map(|(name, port)| Some((name.parse().ok()?, *port))).collect(),
        restarts: seen.restarts,
        last_exit: seen.last_exit,
        waits_for: seen.waits_for.clone().map(|reason| Waiting {
            due: seen.due.map(|left| view.at.saturating_add(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))),
            ..waiting(reason)
        }),
        ready: health(seen.ready.as_ref()),
        live: health(seen.live.as_ref()),
        in_flight: (phase == InstancePhase::Draining).then_some(InFlight { requests, streams }),
        ejected: Vec::new(),
        status_text: seen.status_text.clone(),
    }
}

/// Adds which instances get no requests for a while, and how many requests wait.
pub(crate) fn stand(status: &mut EnvironmentStatus, standing: &Standing) {
    for queue in standing.queues.iter().filter(|queue| queue.route.environment == status.id) {
        for service in status.services.iter_mut().filter(|service| service.name == queue.route.service) {
            let (port, length, limit) = (queue.route.port.clone(), queue.length, queue.limit);
            service.queues.push(Queue { port, length, limit });
        }
    }
    for ejection in standing.ejected.iter().filter(|ejection| ejection.route.environment == status.id) {
        let of_it = status.services.iter_mut().filter(|service| service.name == ejection.route.service);
        for instance in of_it.flat_map(|service| &mut service.instances).filter(|i| i.id == ejection.instance) {
            let left = u64::try_from(ejection.left.duration().as_millis()).unwrap_or(u64::MAX);
            instance.ejected.push(Ejected { port: ejection.route.port.clone(), until: status.at.saturating_add(left) });
        }
    }
    for service in &mut status.services {
        service.queues.sort_by(|a, b| a.port.cmp(&b.port));
    }
    for instance in status.services.iter_mut().flat_map(|service| &mut service.instances) {
        instance.ejected.sort_by(|a, b| a.port.cmp(&b.port));
    }
}

fn health(seen: Option<&CheckStatus>) -> Option<HealthStatus> {
    let CheckStatus { verdict, streak, detail } = seen?;
    let state = match verdict {
        Verdict::Unknown => CheckState::Unknown,
        Verdict::Passing => CheckState::Passing,
        Verdict::Failing => CheckState::Failing,
    };
    Some(HealthStatus { state, streak: *streak, detail: (!detail.is_empty()).then(|| detail.clone()) })
}

fn service_state(resource: &ResourceStatus) -> ServiceState {
    match resource.state {
        "ready" => ServiceState::Ready,
        "asleep" => ServiceState::Asleep,
        "starting" => ServiceState::Starting,
        "rolling" => ServiceState::Rolling,
        "paused" => ServiceState::Paused,
        "degraded" => ServiceState::Degraded,
        "failed" => ServiceState::Failed,
        "held" => ServiceState::Held,
        "stopping" => ServiceState::Stopping,
        "stopped" | "gone" => ServiceState::Stopped,
        _ => ServiceState::Waiting,
    }
}

/// Whether it is as it should be; one that sleeps is, and one of which no instance is wanted.
fn is_well(resource: &ResourceStatus) -> bool {
    matches!(resource.state, "ready" | "asleep" | "stopped")
}

fn rollout(seen: &orchestra_machine::status::RolloutStatus) -> RolloutStatus {
    let record = &seen.record;
    RolloutStatus {
        strategy: seen.strategy.to_owned(),
        from: record.from,
        to: record.to,
        phase: record.phase,
        words: seen.words.clone(),
        step: if record.step < seen.steps { record.step + 1 } else { 0 },
        steps: seen.steps,
        weight: record.weight,
        available: seen.instances.0,
        wanted: seen.instances.1,
        baseline: seen.baseline,
        started_at: record.started_at,
        since: record.since,
        deadline: record.deadline,
        paused: record.paused.clone(),
        waits_for: seen.waits_for.clone(),
        mirrored: (seen.mirrored != (0, 0)).then_some(Mirrored { agreed: seen.mirrored.0, differed: seen.mirrored.1 }),
        kept_until: seen.cold_at,
    }
}

fn problem(resource: &ResourceStatus) -> Option<Diagnostic> {
    let message = resource.instances.iter().find_map(|i| i.problem.clone())?;
    Some(Diagnostic::error(Code::EXITED, message))
}

fn environment_health(view: &View) -> EnvironmentHealth {
    let resources = &view.status.resources;
    if view.status.run.is_some() {
        EnvironmentHealth::Changing
    } else if view.status.stable.is_none() && resources.iter().all(|r| r.instances.is_empty()) {
        EnvironmentHealth::Down
    } else if view.trouble.is_none() && resources.iter().filter(|r| r.id.kind == ResourceKind::Service).all(is_well) {
        EnvironmentHealth::Ready
    } else {
        EnvironmentHealth::Degraded
    }
}

/// One line.
pub(crate) fn summary(view: &View) -> EnvironmentSummary {
    let services = || view.status.resources.iter().filter(|r| r.id.kind == ResourceKind::Service);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    EnvironmentSummary {
        id: view.record.id.clone(),
        preview: preview_of(view),
        usage: None,
        source: view.record.source.clone(),
        health: environment_health(view),
        release: view.status.stable,
        ready: count(services().filter(|r| is_well(r)).count()),
        services: count(services().count()),
        run: run(view),
    }
}

fn run(view: &View) -> Option<RunSummary> {
    let run = view.status.run.as_ref()?;
    Some(RunSummary {
        id: run.id,
        environment: view.record.id.clone(),
        kind: run.kind.clone(),
        release: run.release,
        state: run.state,
        started_at: run.started_at,
        ended_at: None,
    })
}

/// Everything.
pub(crate) fn status(view: &View) -> EnvironmentStatus {
    let mut status = EnvironmentStatus {
        id: view.record.id.clone(),
        source: view.record.source.clone(),
        target: orchestra_model::desired::Target::Process,
        health: environment_health(view),
        release: view.status.stable,
        at: view.at,
        run: run(view),
        preview: preview_of(view),
        trouble: view.trouble.clone(),
        services: Vec::new(),
        jobs: Vec::new(),
        volumes: Vec::new(),
    };
    for resource in &view.status.resources {
        let shown = view.shown.get(&resource.id);
        let instances: Vec<InstanceStatus> = resource.instances.iter().map(|seen| instance(view, seen)).collect();
        let name = resource.id.name.clone();
        let waits_for: Vec<Waiting> = resource.waits_for.clone().map(waiting).into_iter().collect();
        match resource.id.kind {
            ResourceKind::Service => status.services.push(ServiceStatus {
                name,
                state: service_state(resource),
                release: resource.release,
                desired: resource.replicas,
                ready: resource.ready,
                addresses: addresses(view, resource, shown),
                waits_for,
                rollout: resource.rollout.as_ref().map(rollout),
                traffic_paused: view.record.paused.get(&resource.id.name).cloned(),
                queues: Vec::new(),
                scaling: resource.scaling.clone(),
                problem: (!is_well(resource)).then(|| problem(resource)).flatten(),
                instances,
            }),
            ResourceKind::Job => status.jobs.push(JobStatus {
                name,
                state: match resource.state {
                    "completed" => JobState::Completed,
                    "running" | "starting" => JobState::Running,
                    "failed" => JobState::Failed,
                    _ => JobState::Waiting,
                },
                release: resource.release,
                waits_for,
                last_exit: resource.instances.iter().rev().find_map(|i| i.last_exit),
                problem: problem(resource),
                instances,
            }),
            ResourceKind::Volume => status.volumes.push(volume(resource, shown)),
        }
    }
    status
}

/// What is written down of a preview.
fn preview_of(view: &View) -> Option<PreviewStatus> {
    view.record.preview.as_deref().map(|record| preview(record, view.status.preview_left))
}

/// `left` is how much of its time it has left, if that ends.
pub(crate) fn preview(record: &PreviewRecord, left: Option<Duration>) -> PreviewStatus {
    let Preview { from, ttl, owner, shared, prices } = &record.preview;
    PreviewStatus {
        from: from.clone(),
        ttl: *ttl,
        owner: owner.clone(),
        shared: shared.clone(),
        created_at: record.created_at,
        expires_at: record.expires_at,
        expires_in: left.map(|left| Timespan::millis(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))),
        removed_at: record.removed_at,
        used: record.used,
        cost: Cost { millionths: record.used.cost(prices), currency: prices.currency.clone() },
    }
}

pub(crate) fn usage(seen: orchestra_engine::UsageNow) -> UsageNow {
    UsageNow { cpu_thousandths: seen.cpu_thousandths, memory: seen.memory, instances: seen.instances }
}

/// Where a preview is reached by people: browsers and curl find every name below `localhost` on this machine
/// (RFC 6761, 6.3). What programs are given stays an address, because not every resolver does.
fn by_name(view: &View, protocol: Protocol, url: String) -> String {
    let is_preview = view.record.preview.as_deref().is_some_and(PreviewRecord::is_live);
    if !is_preview || protocol == Protocol::Tcp {
        return url;
    }
    url.replacen("://127.0.0.1:", &format!("://{}.localhost:", view.record.id.environment), 1)
}

fn addresses(view: &View, resource: &ResourceStatus, shown: Option<&Shown>) -> Vec<Address> {
    resource
        .addresses
        .iter()
        .filter_map(|(port, url)| {
            let port: orchestra_model::Name = port.parse().ok()?;
            let protocol = match shown {
                Some(Shown::Ports(ports)) => ports.get(&port).copied(),
                _ => None,
            };
            let protocol = protocol.unwrap_or(Protocol::Http);
            Some(Address { port, protocol, url: by_name(view, protocol, url.clone()?) })
        })
        .collect()
}

fn volume(resource: &ResourceStatus, shown: Option<&Shown>) -> VolumeStatus {
    let (path, managed) = match shown {
        Some(Shown::Volume { path, managed }) => (path.clone(), *managed),
        _ => (String::new(), false),
    };
    let state = if resource.state == "present" { VolumeState::Present } else { VolumeState::Missing };
    VolumeStatus { name: resource.id.name.clone(), state, path, managed }
}

/// Where one step of a run stands.
pub(crate) fn progress(run: RunState, state: Option<StepState>, step: &Step, view: &View, elapsed_ms: u64) -> Progress {
    let resources = &view.status.resources;
    // They are in the order of their ids: a run of ten thousand steps is looked at often.
    let seen = resources.binary_search_by(|r| r.id.cmp(&step.resource)).ok().map(|at| &resources[at]);
    let reverting = run == RunState::Reverting;
    let state = match state {
        None => ProgressState::Waiting,
        Some(StepState::Reverted) => ProgressState::Reverted,
        Some(StepState::Failed) if !reverting => ProgressState::Failed,
        Some(_) if reverting => ProgressState::Reverting,
        Some(StepState::Running) => ProgressState::Running,
        Some(StepState::Succeeded) => ProgressState::Succeeded,
        Some(StepState::Failed) => ProgressState::Failed,
    };
    let done = state.is_final();
    let message =
        seen.filter(|_| !done).and_then(|seen| seen.instances.iter().find_map(|i| i.problem.clone())).or_else(|| {
            let draining = seen?.instances.iter().filter(|i| i.phase == "draining");
            let (count, streams) = draining.fold((0, 0), |(n, s), i| (n + 1, s + i.in_flight.1));
            (count > 0).then(|| format!("{count} draining, {streams} stream{}", if streams == 1 { "" } else { "s" }))
        });
    Progress {
        resource: step.resource.clone(),
        action: step.action,
        state,
        ready: seen.map_or(0, |s| s.ready),
        desired: seen.map_or(0, |s| s.replicas),
        elapsed_ms,
        waits_for: seen.filter(|_| !done).and_then(|s| s.waits_for.clone()).map(waiting).into_iter().collect(),
        message,
    }
}
