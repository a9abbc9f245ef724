//! How much the engine adds: a thousand instant creates with every commit on disk, and the time from a dependency's
//! readiness to its dependent's launch. The world is a fake that answers at once; store, journal and fsync are real.
//!
//! `cargo bench -p orchestra-engine --bench apply` prints the rows of `docs/benchmarks.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_engine::{Clock, ControlPlane, LoadedStack, Options, RunRequest};
use orchestra_machine::Settings;
use orchestra_model::{
    Desired, EnvironmentId, Event, EventKind, Resource, ResourceId, Text,
    desired::{
        Condition, Dependency, Drain, Health, OnLoss, Program, Resources, Restart, RestartPolicy, Rollout, Service,
        Signal, Stop, Strategy, Target,
    },
    flag::FlagSet,
    quantity::{Amount, Timespan},
};
use orchestra_provider::fake::{FakeProvider, FakeWorld, NoRoutes};
use orchestra_store::Store;
use orchestra_task::TaskTree;

fn service(depends_on: Option<ResourceId>) -> Service {
    let edge = Dependency { until: Condition::Ready, on_loss: OnLoss::Ignore };
    Service {
        program: Program {
            command: vec![Text::literal("run")],
            directory: "/".to_owned(),
            env: BTreeMap::new(),
            user: None,
            umask: None,
            limits: BTreeMap::new(),
            ports: BTreeSet::new(),
            resources: Resources::default(),
            ready_line: None,
            notify: false,
            watchdog: None,
        },
        replicas: 1,
        scale: None,
        metrics: None,
        restarts: 0,
        ports: BTreeMap::new(),
        depends_on: depends_on.into_iter().map(|id| (id, edge)).collect(),
        health: Health { ready: None, live: None, start_deadline: Timespan::seconds(120) },
        restart: Restart {
            policy: RestartPolicy::Always,
            backoff: Timespan::millis(500),
            max_backoff: Timespan::seconds(60),
            reset_after: Timespan::seconds(60),
            budget: Some(5),
        },
        stop: Stop { signal: Signal::Term, grace: Timespan::seconds(10) },
        rollout: Rollout {
            strategy: Strategy::Rolling { max_surge: Amount::Count(1), max_unavailable: Amount::Count(0) },
            drain: Drain { requests: Timespan::seconds(30), streams: Timespan::seconds(900) },
            deadline: Timespan::seconds(300),
            min_ready: Timespan::default(),
            progress: Rollout::default_progress(),
        },
    }
}

fn id(index: usize) -> ResourceId {
    format!("service.s{index}").parse().expect("a valid id")
}

fn stack(name: &str, count: usize, chained: bool) -> LoadedStack {
    let environment: EnvironmentId = format!("{name}/dev").parse().expect("a valid id");
    let resources = (0..count)
        .map(|index| (id(index), Resource::Service(service((chained && index > 0).then(|| id(index - 1))))))
        .collect();
    let desired = Desired {
        environment,
        target: Target::Process,
        resources,
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    };
    LoadedStack {
        desired,
        warnings: Vec::new(),
        environments: Vec::new(),
        preview_limit: 10,
        source: "/bench/orchestra.yaml".to_owned(),
    }
}

async fn control(home: &std::path::Path, tree: &TaskTree) -> ControlPlane {
    let world = Arc::new(FakeWorld::default());
    let settings = Settings {
        seed: 1,
        ports: (20_000, 30_000),
        base_env: BTreeMap::new(),
        hold: Timespan::seconds(30),
        hold_limit: 100,
        log_max_bytes: 1 << 20,
        log_keep: 1,
        epoch: 0,
    };
    ControlPlane::open(Options {
        store: Store::open(home, Clock::wall).expect("a fresh state directory"),
        provider: Arc::new(FakeProvider::open(&world, tree.clone())),
        data_plane: Arc::new(NoRoutes::default()),
        tree: tree.clone(),
        settings,
        volumes: "/bench/volumes".to_owned(),
        secrets: std::sync::Arc::new(orchestra_secrets::Vault::below(home)),
    })
    .await
    .expect("nothing stands in the way")
}

/// Applies a stack; returns the time from the request to success, and all events.
async fn apply(stack: LoadedStack) -> (Duration, Duration, Vec<Arc<Event>>) {
    let home = tempfile::tempdir().expect("a temporary folder");
    let tree = TaskTree::new();
    let control = control(home.path(), &tree).await;
    let mut events = control.store().subscribe_events();
    let collect = async {
        let mut all = Vec::new();
        loop {
            let event = events.recv().await.expect("the queue is long enough");
            let end = event.kind == EventKind::RunSucceeded;
            assert!(event.kind != EventKind::RunFailed, "{}", event.cause);
            all.push(event);
            if end {
                return all;
            }
        }
    };
    let cpu = cpu_time();
    let begun = Instant::now();
    let environment = stack.desired.environment.clone();
    let (started, all) = tokio::join!(control.start_run(&environment, RunRequest::up(stack)), collect);
    started.expect("the run is accepted");
    let times = (begun.elapsed(), cpu_time().checked_sub(cpu).unwrap());
    tree.shutdown(Duration::from_secs(5)).await;
    (times.0, times.1, all)
}

fn cpu_time() -> Duration {
    let spec = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(spec.tv_sec.unsigned_abs(), u32::try_from(spec.tv_nsec).unwrap_or(0))
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    println!("| what | n | wall | CPU |\n|---|---|---|---|");
    for count in [100, 1000] {
        let (wall, cpu, _) = runtime.block_on(apply(stack("creates", count, false)));
        println!("| instant creates, fsync on | {count} | {} ms | {} ms |", wall.as_millis(), cpu.as_millis());
    }
    let (wall, cpu, events) = runtime.block_on(apply(stack("chain", 200, true)));
    println!("| chain of dependents | 200 | {} ms | {} ms |", wall.as_millis(), cpu.as_millis());
    let at = |index: usize, kind: EventKind| {
        events.iter().find(|e| e.kind == kind && e.resource.as_ref() == Some(&id(index))).map(|e| e.at)
    };
    let mut gaps: Vec<u64> = (1..200)
        .filter_map(|i| at(i, EventKind::InstanceStarting)?.checked_sub(at(i - 1, EventKind::InstanceReady)?))
        .collect();
    gaps.sort_unstable();
    println!(
        "| readiness to dependent's process, ms | {} | p50 {} p99 {} | max {} |",
        gaps.len(),
        gaps[gaps.len() / 2],
        gaps[gaps.len() * 99 / 100],
        gaps[gaps.len() - 1]
    );
}
