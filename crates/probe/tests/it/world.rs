//! Servers that answer as a test says, a provider that runs commands as a test says, and one check asked once.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use orchestra_model::{
    EnvironmentId,
    launch::{Exec, ExecOutcome, Launch, LaunchKey, Observed, ProviderEvent, Termination},
};
use orchestra_probe::{Leaf, Limits, Outcome, Outcomes, ProbeId, Prober, Target};
use orchestra_provider::{BoxFuture, Error, LogLine, LogQuery, Provider};
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// Longest wait for anything that must come.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Asks once, with a timeout that a working answer never reaches.
pub(crate) async fn ask(leaf: Leaf) -> Outcome {
    ask_within(leaf, SOON).await
}

pub(crate) async fn ask_within(leaf: Leaf, timeout: Duration) -> Outcome {
    let tree = TaskTree::new();
    let (prober, mut outcomes) = Prober::new(Arc::new(Commands::none()), &tree, Limits::default());
    prober.set(Target { id: ProbeId(1), leaf, every: Duration::from_hours(1), timeout });
    next(&mut outcomes).await
}

/// The next outcome, or a failed test.
pub(crate) async fn next(outcomes: &mut Outcomes) -> Outcome {
    let outcome = tokio::time::timeout(SOON * 2, outcomes.recv()).await.expect("an outcome in time");
    outcome.expect("the prober runs")
}

/// A server whose connections are handled by `handle`; it ends when the tree is dropped by the test's end.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    tree: TaskTree,
}

impl Server {
    pub(crate) async fn start<F>(handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tree = TaskTree::new();
        let connections = tree.clone();
        tree.start(TaskKind::Connection, "server", async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.start(TaskKind::Connection, "connection", handle(stream));
            }
        });
        Self { address, tree }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tree.cancel();
    }
}

type Answer = Box<dyn Fn(Exec) -> BoxFuture<'static, Result<ExecOutcome, Error>> + Send + Sync>;

/// A provider that can only run commands.
pub(crate) struct Commands(Answer);

impl Commands {
    pub(crate) fn none() -> Self {
        Self::new(|_| Box::pin(std::future::pending()))
    }

    pub(crate) fn new(
        answer: impl Fn(Exec) -> BoxFuture<'static, Result<ExecOutcome, Error>> + Send + Sync + 'static,
    ) -> Self {
        Self(Box::new(answer))
    }
}

fn not_asked<T>() -> T {
    panic!("a prober only runs commands")
}

impl Provider for Commands {
    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecOutcome, Error>> {
        (self.0)(exec)
    }
    fn start(&self, _: Launch) -> BoxFuture<'_, Result<(), Error>> {
        not_asked()
    }
    fn terminate(&self, _: LaunchKey, _: Termination) -> BoxFuture<'_, Result<(), Error>> {
        not_asked()
    }
    fn find_by_intent(&self, _: LaunchKey) -> BoxFuture<'_, Result<Option<Observed>, Error>> {
        not_asked()
    }
    fn observe(&self, _: EnvironmentId) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        not_asked()
    }
    fn forget(&self, _: LaunchKey) -> BoxFuture<'_, Result<(), Error>> {
        not_asked()
    }
    fn create_volume(&self, _: String) -> BoxFuture<'_, Result<(), Error>> {
        not_asked()
    }
    fn volume_exists(&self, _: String) -> BoxFuture<'_, Result<bool, Error>> {
        not_asked()
    }
    fn delete_volume(&self, _: String) -> BoxFuture<'_, Result<(), Error>> {
        not_asked()
    }
    fn logs(&self, _: LogQuery) -> BoxFuture<'_, Result<mpsc::Receiver<LogLine>, Error>> {
        not_asked()
    }
    fn take_events(&self) -> Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>> {
        not_asked()
    }
}
