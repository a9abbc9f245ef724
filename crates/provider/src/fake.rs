//! A provider without a world, as strict as the real ones: same idempotency, same order of events, same errors.
//!
//! A [`FakeWorld`] outlives the [`FakeProvider`]s that are opened on it, as processes outlive servers. Programs are
//! named by what they do (see [`FakeWorld::command`]); every other command is a program that runs until it is told to
//! end, by a signal or by the test ([`FakeWorld::exit`], [`FakeWorld::notify`], [`FakeWorld::print`]). They use what the
//! test says ([`FakeWorld::set_usage`]). Time is tokio's, so that it can be paused.

mod no_routes;
mod world;

use std::{sync::Arc, time::Duration};

use orchestra_model::{
    Code, EnvironmentId,
    launch::{Exec, ExecOutcome, Exit, Launch, LaunchKey, Observed, ProviderEvent, Termination, Usage},
};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{Mutex, mpsc};

use crate::{BoxFuture, Error, LogLine, LogQuery, Provider, Retry};

pub use no_routes::NoRoutes;
pub use world::FakeWorld;

/// A provider on a [`FakeWorld`].
#[derive(Clone, Debug)]
pub struct FakeProvider {
    world: Arc<FakeWorld>,
    tree: TaskTree,
    /// Which of the world's listeners this is.
    listener: u64,
    receiver: Arc<Mutex<Option<Events>>>,
}

type Events = mpsc::Receiver<(LaunchKey, ProviderEvent)>;

impl FakeProvider {
    /// Opens a provider on a world. Tasks are started in `tree`, within a tokio runtime. Events go to the provider that
    /// was opened last: an earlier one is a server that was killed.
    pub fn open(world: &Arc<FakeWorld>, tree: TaskTree) -> Self {
        let (sender, receiver) = mpsc::channel(1024);
        let (listener, queue) = world.listen();
        let own = Arc::clone(world);
        tree.start(TaskKind::Connection, "deliver events", async move {
            loop {
                let waiting = queue.notified();
                for event in own.take_queue(listener) {
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                waiting.await;
            }
        });
        let receiver = Arc::new(Mutex::new(Some(receiver)));
        Self { world: Arc::clone(world), tree, listener, receiver }
    }

    fn effect<T: Send + 'static>(
        &self,
        name: &'static str,
        effect: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, Error>> {
        let task = self.tree.start(TaskKind::Effect, name, effect);
        Box::pin(async move {
            match task.await {
                Ok(Some(result)) => result,
                _ => Err(Error::new(Code::INTERNAL, Retry::Never, format!("{name} ended without a result"))),
            }
        })
    }
}

impl Provider for FakeProvider {
    fn start(&self, launch: Launch) -> BoxFuture<'_, Result<(), Error>> {
        let (world, listener) = (Arc::clone(&self.world), self.listener);
        self.effect("start launch", async move { world.start(listener, launch) })
    }

    fn terminate(&self, key: LaunchKey, how: Termination) -> BoxFuture<'_, Result<(), Error>> {
        let (world, listener, tree) = (Arc::clone(&self.world), self.listener, self.tree.clone());
        self.effect("terminate launch", async move {
            if let Some(deadline) = world.terminate(listener, &key, how) {
                // The world goes on with a stop although the server dies.
                tree.start(TaskKind::Effect, "end grace", async move {
                    tokio::time::sleep_until(deadline).await;
                    world.end_grace(&key);
                });
            }
            Ok(())
        })
    }

    fn find_by_intent(&self, key: LaunchKey) -> BoxFuture<'_, Result<Option<Observed>, Error>> {
        let (world, listener) = (Arc::clone(&self.world), self.listener);
        self.effect("find launch", async move { Ok(world.find(listener, &key)) })
    }

    fn observe(&self, environment: EnvironmentId) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        let (world, listener) = (Arc::clone(&self.world), self.listener);
        self.effect("observe environment", async move { Ok(world.observe(listener, &environment)) })
    }

    fn forget(&self, key: LaunchKey) -> BoxFuture<'_, Result<(), Error>> {
        let world = Arc::clone(&self.world);
        self.effect("forget launch", async move { world.forget(&key) })
    }

    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecOutcome, Error>> {
        Box::pin(async move {
            let Exec { key, command, timeout } = exec;
            let outcome = self.world.exec(&key, &command)?;
            if outcome.exit.is_none() {
                tokio::time::sleep(timeout).await;
            }
            Ok(outcome)
        })
    }

    fn usage(&self, keys: Vec<LaunchKey>) -> BoxFuture<'_, Vec<(LaunchKey, Usage)>> {
        Box::pin(std::future::ready(self.world.usage(self.listener, keys)))
    }

    fn create_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>> {
        let world = Arc::clone(&self.world);
        self.effect("create volume", async move {
            world.create_volume(path);
            Ok(())
        })
    }

    fn volume_exists(&self, path: String) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(async move { Ok(self.world.volume_exists(&path)) })
    }

    fn delete_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>> {
        let world = Arc::clone(&self.world);
        self.effect("delete volume", async move { world.delete_volume(&path) })
    }

    fn logs(&self, query: LogQuery) -> BoxFuture<'_, Result<mpsc::Receiver<LogLine>, Error>> {
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(256);
            let world = Arc::clone(&self.world);
            self.tree.start(TaskKind::Connection, "read logs", async move {
                let (history, mut position) = world.history(&query);
                let mut lines = history;
                loop {
                    for line in lines {
                        if sender.send(line).await.is_err() {
                            return;
                        }
                    }
                    if !query.follow {
                        return;
                    }
                    // Both arms may be dropped: what was not read is read by the next turn.
                    tokio::select! {
                        () = sender.closed() => return,
                        more = world.more(&query, position) => (lines, position) = more,
                    }
                }
            });
            Ok(receiver)
        })
    }

    fn take_events(&self) -> Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>> {
        self.receiver.try_lock().ok()?.take()
    }
}

/// What a launch that cannot be found is answered with.
fn not_running(key: &LaunchKey) -> Error {
    Error::new(Code::NOT_FOUND, Retry::OnChange, format!("{key} does not run, so nothing can run beside it"))
}

fn not_gone(key: &LaunchKey) -> Error {
    Error::new(Code::STOP_FAILED, Retry::After(Duration::from_secs(1)), format!("{key} is not gone yet"))
        .help("terminate it and wait until it is gone")
}

fn killed() -> Exit {
    Exit::Signal(9)
}
