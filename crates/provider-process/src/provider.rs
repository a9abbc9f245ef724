//! The provider: starts shims, listens to them, and replaces the ones that were killed.
//!
//! All truth is in the launch folders and with the shims; what is kept here is a task per living launch
//! ([`supervisor`]) and can be lost at any time. Calls for one key are serialized by its slot, calls for different keys
//! run in parallel, and what a call began is seen through by a task of its own even if the caller goes away.

mod begin;
mod inotify;
mod logs;
mod supervisor;
mod usage;
mod zygote;

use std::{
    collections::HashMap,
    ffi::OsString,
    fs, io,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use orchestra_model::{
    Code, EnvironmentId, InstanceId,
    launch::{Exec, ExecOutcome, Launch, LaunchKey, Observed, ProviderEvent, Termination, Usage},
};
use orchestra_provider::{BoxFuture, Error, LogLine, LogQuery, Provider, Retry};
use orchestra_secrets::Vault;
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::{
    cgroup::{Cgroups, Enforced},
    folder::{self, Folder, Status},
    log_format,
    provider::{
        begin::{Begun, Look},
        supervisor::{Command, Supervisor, replay},
        zygote::Zygote,
    },
    secrets::Unavailable,
};

/// Events that may wait for the engine before supervisors begin to hold theirs back.
const EVENTS: usize = 1024;
/// Patience with a launch folder whose lock is held but whose shim does not answer (yet).
const BUSY_PATIENCE: Duration = Duration::from_secs(10);
/// Patience of a sample with all that it asks.
const USAGE_PATIENCE: Duration = Duration::from_millis(250);
/// Time between looks at such a folder: a shim that starts is there within a millisecond or two.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// Patience with a zygote that was asked for a shim.
const FORK_PATIENCE: Duration = Duration::from_secs(2);

/// Where a provider keeps its things, and what it runs as shim.
#[derive(Clone, Debug)]
pub struct Options {
    /// Launch folders.
    pub root: PathBuf,
    /// Logs.
    pub logs: PathBuf,
    /// Volumes that may be deleted.
    pub volumes: PathBuf,
    /// Program to run as shim.
    pub shim_program: PathBuf,
    /// Its arguments before the shim's own, usually `shim`.
    pub shim_args: Vec<OsString>,
    /// Whether launches get control groups.
    pub cgroups: Cgroups,
    /// How long logs of launches that were forgotten are kept.
    pub retention: LogRetention,
    /// Values of secrets.
    pub secrets: Arc<Vault>,
}

impl Options {
    /// Everything below one state directory.
    pub fn below(state: &Path, shim_program: impl Into<PathBuf>) -> Self {
        Self {
            root: state.join("launches"),
            logs: state.join("logs"),
            volumes: state.join("volumes"),
            shim_program: shim_program.into(),
            shim_args: vec!["shim".into()],
            cgroups: Cgroups::Auto,
            retention: LogRetention::default(),
            secrets: Arc::new(Vault::below(state)),
        }
    }
}

/// Which logs are kept when a launch is forgotten. Size within one launch is limited by the launch itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogRetention {
    /// Newest attempts of each instance.
    pub attempts: usize,
    /// Newest instances of each workload.
    pub instances: usize,
}

impl Default for LogRetention {
    fn default() -> Self {
        Self { attempts: 10, instances: 20 }
    }
}

/// Runs instances as processes of this machine. Clones are handles to the same provider.
#[derive(Clone)]
pub struct ProcessProvider {
    inner: Arc<Inner>,
}

/// The task of a living launch, or nothing.
type Slot = Arc<Mutex<Option<mpsc::Sender<Command>>>>;

pub(crate) struct Inner {
    options: Options,
    tree: TaskTree,
    enforced: Enforced,
    boot: String,
    events: mpsc::Sender<(LaunchKey, ProviderEvent)>,
    receiver: Mutex<Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>>>,
    slots: Mutex<HashMap<LaunchKey, Slot>>,
    zygote: Zygote,
}

/// What there is under a key.
enum Attached {
    Live(mpsc::Sender<Command>),
    Ended(Box<Status>),
    Never,
}

// === impl ProcessProvider ===

impl ProcessProvider {
    /// Opens the provider on its folders, which are made if they do not exist. Launches of earlier servers are left
    /// alone until they are asked for. Tasks are started in `tree`, within a tokio runtime.
    pub fn open(options: Options, tree: TaskTree) -> Result<Self, Error> {
        let failed = |what: &str, path: &Path, source: io::Error| {
            Error::new(Code::STATE_WRITE, Retry::OnChange, format!("{what} `{}` cannot be made", path.display()))
                .source(source)
        };
        let mut options = options;
        for (what, path) in [
            ("launch folder", &mut options.root),
            ("log folder", &mut options.logs),
            ("volume folder", &mut options.volumes),
        ] {
            // Shims run in their launch folders, where relative paths mean something else.
            *path = std::path::absolute(&*path).map_err(|source| failed(what, path, source))?;
            folder::create_private(path).map_err(|source| failed(what, path, source))?;
        }
        let boot = folder::boot_id().map_err(|source| {
            Error::new(Code::INTERNAL, Retry::Never, "the boot id of this machine cannot be read").source(source)
        })?;
        let (events, receiver) = mpsc::channel(EVENTS);
        let enforced = Enforced::detect(options.cgroups);
        Ok(Self {
            inner: Arc::new(Inner {
                zygote: Zygote::keep(&options, &tree),
                options,
                tree,
                enforced,
                boot,
                events,
                receiver: Mutex::new(Some(receiver)),
                slots: Mutex::default(),
            }),
        })
    }

    /// What this machine can enforce, for `orchestra doctor`.
    pub fn enforced(&self) -> &Enforced {
        &self.inner.enforced
    }

    /// Runs something to its end even if the caller goes away.
    fn effect<T: Send + 'static>(
        &self,
        name: &'static str,
        effect: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, Error>> {
        let task = self.inner.tree.start(TaskKind::Effect, name, effect);
        Box::pin(async move {
            match task.await {
                Ok(Some(result)) => result,
                _ => Err(Error::new(Code::INTERNAL, Retry::Never, format!("{name} ended without a result"))),
            }
        })
    }
}

impl Provider for ProcessProvider {
    fn start(&self, launch: Launch) -> BoxFuture<'_, Result<(), Error>> {
        let inner = Arc::clone(&self.inner);
        self.effect("start launch", async move { inner.start(launch).await })
    }

    fn terminate(&self, key: LaunchKey, how: Termination) -> BoxFuture<'_, Result<(), Error>> {
        let inner = Arc::clone(&self.inner);
        self.effect("terminate launch", async move { inner.terminate(key, how).await })
    }

    fn find_by_intent(&self, key: LaunchKey) -> BoxFuture<'_, Result<Option<Observed>, Error>> {
        let inner = Arc::clone(&self.inner);
        self.effect("find launch", async move { inner.find(&key, true).await })
    }

    fn observe(&self, environment: EnvironmentId) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        let inner = Arc::clone(&self.inner);
        self.effect("observe environment", async move { inner.observe(&environment).await })
    }

    fn forget(&self, key: LaunchKey) -> BoxFuture<'_, Result<(), Error>> {
        let inner = Arc::clone(&self.inner);
        self.effect("forget launch", async move { inner.forget(key).await })
    }

    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecOutcome, Error>> {
        Box::pin(self.inner.exec(exec))
    }

    fn usage(&self, keys: Vec<LaunchKey>) -> BoxFuture<'_, Vec<(LaunchKey, Usage)>> {
        Box::pin(self.inner.usage(keys))
    }

    fn create_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>> {
        self.effect("create volume", async move {
            let made = path.clone();
            blocking(move || fs::create_dir_all(made)).await.map_err(|source| {
                Error::new(Code::STATE_WRITE, Retry::OnChange, format!("volume `{path}` cannot be made")).source(source)
            })
        })
    }

    fn volume_exists(&self, path: String) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(async move {
            let looked = path.clone();
            let is_dir = blocking(move || match fs::metadata(looked) {
                Ok(meta) => Ok(meta.is_dir()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            });
            is_dir.await.map_err(|source| {
                Error::new(Code::NOT_READABLE, Retry::OnChange, format!("volume `{path}` cannot be looked at"))
                    .source(source)
            })
        })
    }

    fn delete_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>> {
        let volumes = self.inner.options.volumes.clone();
        self.effect("delete volume", async move {
            let volume = inside(&volumes, Path::new(&path)).ok_or_else(|| {
                Error::new(Code::INVALID_VALUE, Retry::Never, format!("`{path}` is not a volume that Orchestra made"))
                    .help(format!("only folders below {} are deleted; remove it by hand", volumes.display()))
            })?;
            let removed = blocking(move || match fs::remove_dir_all(volume) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            });
            removed.await.map_err(|source| {
                Error::new(Code::STATE_WRITE, Retry::OnChange, format!("volume `{path}` cannot be deleted"))
                    .source(source)
            })
        })
    }

    fn logs(&self, query: LogQuery) -> BoxFuture<'_, Result<mpsc::Receiver<LogLine>, Error>> {
        Box::pin(async move { logs::read(&self.inner.options.logs, query, &self.inner.tree) })
    }

    fn take_events(&self) -> Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>> {
        self.inner.receiver.try_lock().ok()?.take()
    }
}

// === impl Inner ===

impl Inner {
    fn folder(&self, key: &LaunchKey) -> Folder {
        Folder::of(&self.options.root, key)
    }

    async fn slot(&self, key: &LaunchKey) -> Slot {
        Arc::clone(self.slots.lock().await.entry(key.clone()).or_default())
    }

    /// Removes a slot that nobody else is about to use: two slots for one key would be two tasks for one launch.
    async fn drop_slot(&self, key: &LaunchKey, slot: &Slot) {
        let mut slots = self.slots.lock().await;
        // One count is ours, one the table's.
        if Arc::strong_count(slot) <= 2 && slot.try_lock().is_ok_and(|task| task.is_none()) {
            slots.remove(key);
        }
    }

    /// Reports events of a launch that has no task. They are delivered by a task, because the caller may be the one
    /// who has to take them.
    fn report(&self, key: LaunchKey, events: Vec<ProviderEvent>) {
        let sender = self.events.clone();
        self.tree.start(TaskKind::Connection, "report events", async move {
            for event in events {
                if sender.send((key.clone(), event)).await.is_err() {
                    return;
                }
            }
        });
    }

    async fn start(self: &Arc<Self>, launch: Launch) -> Result<(), Error> {
        let key = launch.key.clone();
        let failed = |source: io::Error| {
            if let Some(secrets) = source.get_ref().and_then(|error| error.downcast_ref::<Unavailable>()) {
                return Error::new(Code::SECRET, Retry::After(Duration::from_secs(1)), secrets.to_string())
                    .help("`orchestra up` reads the present values and keeps them");
            }
            Error::new(Code::START_FAILED, Retry::After(Duration::from_secs(1)), format!("{key} could not be started"))
                .help("see whether the state directory is writable and the disk has space")
                .source(source)
        };
        let slot = self.slot(&key).await;
        let mut slot = slot.lock().await;
        // A shim that was killed before it had recorded anything has started nothing: once more, then give up.
        for attempt in 0..3 {
            if slot.as_ref().is_some_and(|task| !task.is_closed()) {
                return Ok(());
            }
            let (inner, launch) = (Arc::clone(self), launch.clone());
            match blocking(move || inner.begin(launch, attempt > 0)).await.map_err(failed)? {
                Begun::Spawned(connection) => {
                    let (task, mut recorded) = Supervisor::start(self, &key, connection).map_err(failed)?;
                    let mut answer = tokio::time::timeout(FORK_PATIENCE, &mut recorded).await;
                    if answer.is_err() {
                        // Stopped by somebody, perhaps: then its request must not be carried out later.
                        self.zygote.kill();
                        answer = Ok(recorded.await);
                    }
                    if matches!(answer, Ok(Ok(()))) {
                        *slot = Some(task);
                        return Ok(());
                    }
                }
                Begun::Existed => match self.attach(&key, &mut slot).await? {
                    Attached::Live(_) => return Ok(()),
                    Attached::Ended(status) => {
                        self.report(key, replay(&status));
                        return Ok(());
                    }
                    Attached::Never => {}
                },
            }
        }
        Err(Error::new(
            Code::START_FAILED,
            Retry::After(Duration::from_secs(1)),
            format!("{key} could not be started: its shim ended before it had recorded anything"),
        )
        .help(format!("run `{} {}` to see why", self.options.shim_program.display(), self.shim_words())))
    }

    fn shim_words(&self) -> String {
        self.options.shim_args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    /// Finds what there is under a key, connecting to its shim or replacing a killed one.
    async fn attach(
        self: &Arc<Self>,
        key: &LaunchKey,
        slot: &mut Option<mpsc::Sender<Command>>,
    ) -> Result<Attached, Error> {
        if let Some(task) = slot.as_ref().filter(|task| !task.is_closed()) {
            return Ok(Attached::Live(task.clone()));
        }
        *slot = None;
        let failed = |source: io::Error| {
            Error::new(Code::STATE_DAMAGED, Retry::After(Duration::from_secs(1)), format!("{key} cannot be looked up"))
                .source(source)
        };
        let give_up = tokio::time::Instant::now() + BUSY_PATIENCE;
        loop {
            let (inner, folder) = (Arc::clone(self), self.folder(key));
            let connection = match blocking(move || inner.look(&folder, None)).await.map_err(failed)? {
                Look::Never => return Ok(Attached::Never),
                Look::Ended(status) => return Ok(Attached::Ended(status)),
                Look::Connected(connection) => Some(connection),
                Look::Busy => None,
            };
            if let Some(connection) = connection {
                let (task, recorded) = Supervisor::start(self, key, connection).map_err(failed)?;
                if recorded.await.is_ok() {
                    *slot = Some(task.clone());
                    return Ok(Attached::Live(task));
                }
            }
            if self.tree.is_cancelled() {
                let message = format!("{key} cannot be looked up: the server is shutting down");
                return Err(Error::new(Code::RUN_CANCELLED, Retry::OnChange, message));
            }
            // The shim is just starting or just ending, and nothing tells when: the folder's next state is at most
            // milliseconds away.
            tokio::time::sleep(BUSY_PAUSE).await;
            if tokio::time::Instant::now() > give_up {
                let message = format!("{key} does not answer: its launch folder is locked, but no shim serves it");
                return Err(Error::new(Code::STATE_DAMAGED, Retry::After(Duration::from_secs(1)), message));
            }
        }
    }

    async fn terminate(self: &Arc<Self>, key: LaunchKey, how: Termination) -> Result<(), Error> {
        loop {
            let attached = {
                let slot = self.slot(&key).await;
                let mut slot = slot.lock().await;
                self.attach(&key, &mut slot).await?
            };
            match attached {
                Attached::Live(task) => {
                    let (reply, answer) = oneshot::channel();
                    // A task that ended meanwhile leaves an ended launch behind, which the next turn finds.
                    if task.send(Command::Terminate { how, reply }).await.is_ok()
                        && let Ok(result) = answer.await
                    {
                        return result;
                    }
                }
                Attached::Ended(status) => {
                    self.report(key, replay(&status));
                    return Ok(());
                }
                Attached::Never => {
                    self.report(key, vec![ProviderEvent::Gone]);
                    return Ok(());
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn find(self: &Arc<Self>, key: &LaunchKey, replay: bool) -> Result<Option<Observed>, Error> {
        loop {
            let attached = {
                let slot = self.slot(key).await;
                let mut slot = slot.lock().await;
                self.attach(key, &mut slot).await?
            };
            match attached {
                Attached::Live(task) => {
                    let (reply, answer) = oneshot::channel();
                    if task.send(Command::Report { replay, reply }).await.is_ok()
                        && let Ok(observed) = answer.await
                    {
                        return Ok(Some(observed));
                    }
                }
                Attached::Ended(status) => return Ok(Some(status.observed(key.clone()))),
                Attached::Never => {
                    let slot = self.slot(key).await;
                    self.drop_slot(key, &slot).await;
                    return Ok(None);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn observe(self: &Arc<Self>, environment: &EnvironmentId) -> Result<Vec<Observed>, Error> {
        let path = folder::environment_path(&self.options.root, environment);
        let failed = |source| {
            let message = format!("the launches of {environment} cannot be listed");
            Error::new(Code::STATE_DAMAGED, Retry::After(Duration::from_secs(1)), message).source(source)
        };
        let environment_id = environment.clone();
        let keys = blocking(move || {
            let mut keys = Vec::new();
            for instance in folder::entries::<InstanceId>(&path)? {
                for attempt in folder::entries::<u32>(&path.join(instance.to_string()))? {
                    keys.push(LaunchKey { environment: environment_id.clone(), instance: instance.clone(), attempt });
                }
            }
            keys.sort();
            Ok(keys)
        });
        let mut observed = Vec::new();
        for key in keys.await.map_err(failed)? {
            observed.extend(self.find(&key, false).await?);
        }
        Ok(observed)
    }

    async fn forget(self: &Arc<Self>, key: LaunchKey) -> Result<(), Error> {
        let runs = |key: &LaunchKey| {
            Error::new(Code::STOP_FAILED, Retry::After(Duration::from_secs(1)), format!("{key} is not gone yet"))
                .help("terminate it and wait until it is gone")
        };
        let failed = |source: io::Error| {
            Error::new(Code::STATE_WRITE, Retry::After(Duration::from_secs(1)), format!("{key} cannot be forgotten"))
                .source(source)
        };
        let shared = self.slot(&key).await;
        let mut slot = shared.lock().await;
        if let Attached::Live(task) = self.attach(&key, &mut slot).await? {
            let (reply, answer) = oneshot::channel();
            let asked = task.send(Command::Report { replay: false, reply }).await.is_ok();
            if asked && answer.await.is_ok_and(|observed| !observed.gone) {
                return Err(runs(&key));
            }
            // The shim has said its last word; its task ends with it.
            task.closed().await;
        }
        let give_up = tokio::time::Instant::now() + BUSY_PATIENCE;
        loop {
            let (inner, gone) = (Arc::clone(self), key.clone());
            let removed = blocking(move || {
                let folder = inner.folder(&gone);
                match folder.try_lock() {
                    Ok(Some(lock)) => {
                        match folder.read_status() {
                            Ok(Some(status)) if !status.gone => return Ok(Some(false)),
                            _ => {}
                        }
                        folder.remove(&lock)?;
                        // Log retention is housekeeping: it must not make forgetting fail.
                        let _ = prune_logs(&inner.options, &gone);
                        Ok(Some(true))
                    }
                    Ok(None) => Ok(None),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(true)),
                    Err(error) => Err(error),
                }
            });
            match removed.await.map_err(failed)? {
                Some(true) => break,
                Some(false) => return Err(runs(&key)),
                None if tokio::time::Instant::now() > give_up => return Err(runs(&key)),
                // The shim of a gone launch is between its last record and its exit.
                None => tokio::time::sleep(BUSY_PAUSE).await,
            }
        }
        *slot = None;
        drop(slot);
        self.drop_slot(&key, &shared).await;
        Ok(())
    }

    async fn usage(&self, keys: Vec<LaunchKey>) -> Vec<(LaunchKey, Usage)> {
        let deadline = tokio::time::Instant::now() + USAGE_PATIENCE;
        let slots: Vec<(LaunchKey, Slot)> = {
            let slots = self.slots.lock().await;
            keys.into_iter().filter_map(|key| slots.get(&key).cloned().map(|slot| (key, slot))).collect()
        };
        let mut asked = Vec::with_capacity(slots.len());
        for (key, slot) in slots {
            // A launch that somebody starts or looks up at this moment may be in his hands for a while.
            let Ok(task) = tokio::time::timeout_at(deadline, slot.lock()).await.map(|task| task.clone()) else {
                continue;
            };
            let (reply, answer) = oneshot::channel();
            // A task that does not take it is replacing its shim.
            if task.is_some_and(|task| task.try_send(Command::Locate { reply }).is_ok()) {
                asked.push((key, answer));
            }
        }
        let mut places = Vec::with_capacity(asked.len());
        for (key, answer) in asked {
            if let Ok(Ok(Some(place))) = tokio::time::timeout_at(deadline, answer).await {
                places.push((key, place));
            }
        }
        blocking(move || Ok(usage::sample(places))).await.unwrap_or_default()
    }

    async fn exec(self: &Arc<Self>, exec: Exec) -> Result<ExecOutcome, Error> {
        let not_running = |key: &LaunchKey| {
            Error::new(Code::NOT_FOUND, Retry::OnChange, format!("{key} does not run, so nothing can run beside it"))
        };
        let key = exec.key.clone();
        let attached = {
            let slot = self.slot(&key).await;
            let mut slot = slot.lock().await;
            self.attach(&key, &mut slot).await?
        };
        let Attached::Live(task) = attached else { return Err(not_running(&key)) };
        let (reply, answer) = oneshot::channel();
        task.send(Command::Exec { exec, reply }).await.map_err(|_| not_running(&key))?;
        answer.await.map_err(|_| not_running(&key))?
    }
}

/// Runs file system calls where they may block.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The path if it is strictly below a folder, also after following links in both.
fn inside(folder: &Path, path: &Path) -> Option<PathBuf> {
    let lexically = path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && path != folder
        && path.starts_with(folder);
    if !lexically {
        return None;
    }
    // A link on the way could lead out. The last part itself may be missing, or a link, which is removed and not
    // followed.
    let parent = path.parent()?;
    match (fs::canonicalize(parent), fs::canonicalize(folder)) {
        (Ok(parent), Ok(folder)) => parent.starts_with(folder).then(|| path.to_owned()),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => Some(path.to_owned()),
        _ => None,
    }
}

/// Deletes logs of attempts and instances beyond what is kept.
fn prune_logs(options: &Options, key: &LaunchKey) -> io::Result<()> {
    let environment = folder::environment_path(&options.logs, &key.environment);
    let lives = |instance: &InstanceId, attempt: Option<u32>| {
        let mut path = folder::environment_path(&options.root, &key.environment).join(instance.to_string());
        path.extend(attempt.map(|attempt| attempt.to_string()));
        path.exists()
    };
    let mut attempts = folder::entries::<u32>(&environment.join(key.instance.to_string()))?;
    attempts.sort_unstable_by(|a, b| b.cmp(a));
    for attempt in attempts.into_iter().skip(options.retention.attempts) {
        if !lives(&key.instance, Some(attempt)) {
            fs::remove_dir_all(log_format::path_of(&options.logs, &LaunchKey { attempt, ..key.clone() }))?;
        }
    }
    let mut instances = folder::entries::<InstanceId>(&environment)?;
    instances.retain(|instance| instance.workload == key.instance.workload);
    instances.sort_unstable_by_key(|instance| std::cmp::Reverse((instance.release, instance.ordinal)));
    for instance in instances.into_iter().skip(options.retention.instances) {
        if !lives(&instance, None) {
            fs::remove_dir_all(environment.join(instance.to_string()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_inside_the_volume_folder_may_be_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = dir.path().join("volumes");
        fs::create_dir_all(volumes.join("a")).unwrap();
        fs::create_dir_all(dir.path().join("outside/b")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), volumes.join("link")).unwrap();
        assert!(inside(&volumes, &volumes.join("a")).is_some());
        assert!(inside(&volumes, &volumes.join("not-there/x")).is_some());
        assert!(inside(&volumes, &volumes.join("link")).is_some(), "the link itself is ours");
        for bad in [volumes.clone(), volumes.join("../outside"), volumes.join("link/b"), dir.path().join("outside")] {
            assert_eq!(inside(&volumes, &bad), None, "{}", bad.display());
        }
    }
}
