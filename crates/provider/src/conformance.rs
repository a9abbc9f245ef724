//! What every provider must do, as cases that run against any of them.
//!
//! An adapter describes its world by a [`World`] and calls [`run`] in a test. The programs are named by what they do;
//! the adapter says how that is written in its world. Each case uses a world and an environment of its own.

mod cases;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orchestra_model::{
    EnvironmentId, InstanceId, ReleaseNumber,
    desired::{Resources, Signal},
    launch::{Exit, Launch, LaunchKey, ProviderEvent, Termination},
    quantity::Timespan,
};
use tokio::{sync::mpsc, time::timeout};

use crate::{BoxFuture, Provider};

/// Longest wait for an event that must come.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A place to run things in, and how programs are written there.
pub trait World: Send + Sync + 'static {
    /// Opens a provider on this world. Called again, it acts as a server that was restarted: what an earlier provider
    /// started is still there, and the earlier one is not used any more.
    fn open(&self) -> Arc<dyn Provider>;
    /// How a program that does this is started.
    fn command(&self, program: Program) -> Vec<String>;
    /// Working directory for programs.
    fn directory(&self) -> String;
    /// Path of a volume with this name, inside the folder that the provider may delete from.
    fn volume(&self, name: &str) -> String;
}

/// What a program does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// Runs until a signal kills it.
    Run,
    /// Prints `armed` and runs; only SIGKILL ends it.
    Stubborn,
    /// Exits with this code.
    Exit(i32),
    /// Prints these texts on standard output and standard error, then exits with this code.
    Print(String, String, i32),
    /// Prints this text, then runs until a signal kills it.
    PrintAndRun(String),
    /// Sends `READY=1` and `STATUS=` with this text, then runs until a signal kills it.
    Notify(String),
    /// Uses as much CPU time as it gets until a signal kills it.
    Spin,
    /// Does not exist.
    Missing,
}

/// A case: a name, and what is done.
pub type Case = (&'static str, fn(Arc<Bench>) -> BoxFuture<'static, ()>);

/// Every case.
pub const CASES: &[Case] = cases::ALL;

/// Runs every case, each against a world of its own. Panics with what was found wrong, naming the case first.
pub async fn run<W: World>(world: impl Fn() -> W) {
    for (name, case) in CASES {
        eprintln!("conformance: {name}");
        case(Arc::new(Bench::new(name, Box::new(world())))).await;
    }
}

/// What a case works with.
pub struct Bench {
    world: Box<dyn World>,
    environment: EnvironmentId,
}

/// A provider with its events.
pub struct Server {
    /// The provider.
    pub provider: Arc<dyn Provider>,
    events: mpsc::Receiver<(LaunchKey, ProviderEvent)>,
    seen: BTreeMap<LaunchKey, Vec<ProviderEvent>>,
}

impl Bench {
    /// A bench for one case, which gets an environment of its own.
    pub fn new(case: &str, world: Box<dyn World>) -> Self {
        let name: String = case.chars().map(|c| if c == '_' { '-' } else { c }).take(40).collect();
        let environment = name.trim_end_matches('-').parse().expect("case names are names");
        let stack = "conformance".parse().expect("a name");
        Self { world, environment: EnvironmentId { stack, environment } }
    }

    /// A server on the world.
    pub fn serve(&self) -> Server {
        let provider = self.world.open();
        let events = provider.take_events().expect("a new provider has its events");
        Server { provider, events, seen: BTreeMap::new() }
    }

    fn key(&self, ordinal: u32) -> LaunchKey {
        let workload = "api".parse().expect("a name");
        LaunchKey {
            environment: self.environment.clone(),
            instance: InstanceId { workload, release: ReleaseNumber(1), ordinal },
            attempt: 1,
        }
    }

    /// A launch of a program.
    pub fn launch(&self, ordinal: u32, program: Program) -> Launch {
        Launch {
            key: self.key(ordinal),
            notify: matches!(program, Program::Notify(_)),
            command: self.world.command(program),
            directory: self.world.directory(),
            env: BTreeMap::from([("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned())]),
            secrets: BTreeMap::new(),
            user: None,
            umask: 0o022,
            limits: BTreeMap::new(),
            resources: Resources::default(),
            ports: BTreeMap::new(),
            ready_line: None,
            watchdog: None,
            log_max_bytes: 1 << 20,
            log_keep: 3,
        }
    }
}

/// A termination by SIGTERM.
pub fn term(grace: Timespan) -> Termination {
    Termination { signal: Signal::Term, grace }
}

impl Server {
    /// Waits until the events of a launch up to now satisfy a condition, and returns them.
    pub async fn until(
        &mut self,
        key: &LaunchKey,
        what: &str,
        condition: impl Fn(&[ProviderEvent]) -> bool,
    ) -> Vec<ProviderEvent> {
        let waited = timeout(PATIENCE, async {
            loop {
                if let Some(seen) = self.seen.get(key).filter(|seen| condition(seen)) {
                    return seen.clone();
                }
                let (key, event) = self.events.recv().await.expect("the provider lives");
                self.seen.entry(key).or_default().push(event);
            }
        });
        match waited.await {
            Ok(seen) => seen,
            Err(elapsed) => panic!("{key}: waited for {what}: {elapsed}; seen: {:?}", self.seen.get(key)),
        }
    }

    /// Waits until a launch is gone. Its events must be in order: nothing after `Gone`, `Exited` before it.
    pub async fn gone(&mut self, key: &LaunchKey) -> Vec<ProviderEvent> {
        let seen = self.until(key, "Gone", |seen| seen.contains(&ProviderEvent::Gone)).await;
        assert_eq!(seen.last(), Some(&ProviderEvent::Gone), "{key}: nothing comes after Gone");
        assert!(exit(&seen).is_some(), "{key}: Exited comes before Gone: {seen:?}");
        seen
    }

    /// Waits until a launch's main process runs and returns its id.
    pub async fn started(&mut self, key: &LaunchKey) -> u32 {
        let seen = self.until(key, "Started", |seen| pid(seen).is_some()).await;
        pid(&seen).unwrap_or(0)
    }
}

fn pid(seen: &[ProviderEvent]) -> Option<u32> {
    seen.iter().find_map(|event| if let ProviderEvent::Started { pid } = event { Some(*pid) } else { None })
}

fn exit(seen: &[ProviderEvent]) -> Option<(Exit, Option<String>)> {
    seen.iter().rev().find_map(|event| {
        if let ProviderEvent::Exited { exit, message } = event { Some((*exit, message.clone())) } else { None }
    })
}
