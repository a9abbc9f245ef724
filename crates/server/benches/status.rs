//! What one look at a large environment costs: `GET /v1/environments/{stack}/{environment}` of 10,000 services, from the
//! question to the last byte of the answer, within one process. The world is a fake; the store is real.
//!
//! `cargo bench -p orchestra-server --bench status` prints the rows of `docs/benchmarks.md`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::BodyExt;
use orchestra_api::Transport;
use orchestra_engine::{Clock, ControlPlane, Options, RunRequest, StackSource};
use orchestra_machine::Settings;
use orchestra_model::{EventKind, quantity::Timespan};
use orchestra_provider::fake::{FakeProvider, FakeWorld, NoRoutes};
use orchestra_server::{Backend, Facts, InProcess, router};
use orchestra_store::Store;
use orchestra_task::TaskTree;

const SERVICES: usize = 10_000;
const LOOKS: u32 = 30;

fn stack() -> String {
    let mut text = "version: 1\nname: large\nservices:\n".to_owned();
    for index in 0..SERVICES {
        let _ = writeln!(
            text,
            "  s{index}: {{command: [./run, --number, \"{index}\"], env: {{A: one, B: two, C: \"{index}\", URL: \"http://127.0.0.1:8080/path\"}}}}"
        );
    }
    text
}

fn cpu_time() -> Duration {
    let spec = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(spec.tv_sec.unsigned_abs(), u32::try_from(spec.tv_nsec).unwrap_or(0))
}

async fn up(home: &std::path::Path, tree: &TaskTree) -> ControlPlane {
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
    let control = ControlPlane::open(Options {
        store: Store::open(home, Clock::wall).expect("a fresh state directory"),
        provider: Arc::new(FakeProvider::open(&Arc::new(FakeWorld::default()), tree.clone())),
        data_plane: Arc::new(NoRoutes::default()),
        tree: tree.clone(),
        settings,
        volumes: "/bench/volumes".to_owned(),
        secrets: std::sync::Arc::new(orchestra_secrets::Vault::below(home)),
    })
    .await
    .expect("nothing stands in the way");
    let source = StackSource {
        path: "/bench/orchestra.yaml".to_owned(),
        shown: "orchestra.yaml".to_owned(),
        text: stack(),
        environment: None,
        preview: None,
    };
    let loaded = orchestra_engine::load(&source, "/bench/volumes").expect("a valid stack");
    let environment = loaded.desired.environment.clone();
    let mut events = control.store().subscribe_events();
    let ended = async {
        loop {
            match events.recv().await {
                Ok(event) if event.kind == EventKind::RunSucceeded => return,
                Ok(event) => assert!(event.kind != EventKind::RunFailed, "{}", event.cause),
                // The end of the run comes long after the burst that was too fast for us.
                Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    let (started, ()) = tokio::join!(control.start_run(&environment, RunRequest::up(loaded)), ended);
    started.expect("the run is accepted");
    control
}

async fn measure() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let tree = TaskTree::new();
    let control = up(home.path(), &tree).await;
    let facts = Facts {
        version: "0.0.0".to_owned(),
        home: "/bench".to_owned(),
        volumes: "/bench/volumes".to_owned(),
        listen: None,
        started_at: Clock::wall(),
    };
    let server = InProcess::new(router(Backend::Live(control.clone()), facts, tree.clone(), Arc::default()));
    let environment = "large/dev".parse().expect("a valid id");
    println!("| what | n | wall | CPU |\n|---|---|---|---|");
    let mut bytes = 0;
    for what in ["a look of the engine", "status over the API"] {
        let (begun, cpu) = (Instant::now(), cpu_time());
        for _ in 0..LOOKS {
            if what.starts_with('a') {
                let view = control.view(&environment).await.expect("it is there");
                assert_eq!(view.status.resources.len(), SERVICES);
            } else {
                let request = http::Request::get("/v1/environments/large/dev").body(Bytes::new()).expect("valid");
                let answer = server.send(request).await.expect("an answer");
                bytes = answer.into_body().collect().await.expect("all of it").to_bytes().len();
            }
        }
        let (wall, cpu) = (begun.elapsed() / LOOKS, cpu_time().saturating_sub(cpu) / LOOKS);
        println!("| {what} | {SERVICES} | {:.1} ms | {:.1} ms |", wall.as_secs_f64() * 1e3, cpu.as_secs_f64() * 1e3);
    }
    println!("({bytes} bytes of JSON)");
    tree.shutdown(Duration::from_secs(5)).await;
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure());
}
