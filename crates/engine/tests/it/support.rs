//! A control plane on fakes, and waiting for what it does.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orchestra_engine::{Clock, ControlPlane, EngineError, Options, RunRequest, StackSource};
use orchestra_machine::Settings;
use orchestra_model::{EnvironmentId, quantity::Timespan, record::RunRecord};
use orchestra_provider::fake::{FakeProvider, FakeWorld};
use orchestra_store::Store;
use orchestra_task::TaskTree;

use crate::fake_data_plane::{FakeDataPlane, Network};

/// Longest wait for anything here.
const PATIENCE: Duration = Duration::from_secs(20);

/// What outlives a control plane: its folder, its world, its network.
pub(crate) struct Place {
    pub(crate) home: tempfile::TempDir,
    pub(crate) world: Arc<FakeWorld>,
    pub(crate) network: Arc<Network>,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap(), world: Arc::default(), network: Arc::default() }
    }

    pub(crate) async fn open(&self) -> Running {
        let tree = TaskTree::new();
        let settings = Settings {
            seed: 7,
            ports: (20_000, 32_767),
            base_env: BTreeMap::new(),
            hold: Timespan::seconds(30),
            hold_limit: 100,
            log_max_bytes: 1 << 20,
            log_keep: 1,
            epoch: 0,
        };
        let control = ControlPlane::open(Options {
            store: Store::open(self.home.path(), Clock::wall).unwrap(),
            provider: Arc::new(FakeProvider::open(&self.world, tree.clone())),
            data_plane: Arc::new(FakeDataPlane::open(&self.network)),
            tree: tree.clone(),
            settings,
            volumes: "/volumes".to_owned(),
            secrets: Arc::new(orchestra_secrets::Vault::below(self.home.path())),
        })
        .await
        .unwrap();
        Running { control, tree }
    }
}

/// A control plane that runs.
pub(crate) struct Running {
    pub(crate) control: ControlPlane,
    pub(crate) tree: TaskTree,
}

impl Running {
    /// Ends it without telling anybody, as `kill -9` does, except that its lock must be free before the next one opens.
    pub(crate) async fn kill(self) {
        assert!(self.tree.shutdown(PATIENCE).await, "tasks end when their tree is cancelled");
        drop(self.control);
    }

    pub(crate) fn stack(&self, text: &str) -> RunRequest {
        RunRequest::up(self.load(text).unwrap())
    }

    pub(crate) fn load(&self, text: &str) -> Result<orchestra_engine::LoadedStack, EngineError> {
        let source = StackSource {
            path: "/stack/orchestra.yaml".to_owned(),
            shown: "orchestra.yaml".to_owned(),
            text: text.to_owned(),
            environment: None,
            preview: None,
        };
        orchestra_engine::load(&source, self.control.volumes())
    }

    /// Starts a run and waits for its end.
    pub(crate) async fn run(&self, environment: &EnvironmentId, request: RunRequest) -> RunRecord {
        let mut events = self.control.store().subscribe_events();
        let started = self.control.start_run(environment, request).await.unwrap();
        if started.run.state.is_final() {
            return started.run;
        }
        let ended = async {
            loop {
                let record = self.control.run(started.run.id).await.unwrap();
                if record.state.is_final() {
                    return record;
                }
                events.recv().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("every run ends")
    }

    pub(crate) async fn pids(&self, environment: &EnvironmentId) -> BTreeMap<String, u32> {
        let view = self.control.view(environment).await.unwrap();
        let instances = view.status.resources.into_iter().flat_map(|r| r.instances);
        instances.filter_map(|i| Some((i.id.to_string(), i.pid?))).collect()
    }
}

pub(crate) fn environment(text: &str) -> EnvironmentId {
    text.parse().unwrap()
}

/// Waits until something holds, looking again after every event.
pub(crate) async fn until(running: &Running, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let mut events = running.control.store().subscribe_events();
    let wait = async {
        while !holds().await {
            // An event, or a look now and then: not everything that changes is an event.
            let _ = tokio::time::timeout(Duration::from_millis(50), events.recv()).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "waited in vain until {what}");
}
