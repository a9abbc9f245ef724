//! Effects: from a value in a batch to a call of a port, and back to an event.
//!
//! Effects on one instance begin in the order in which its machine asked for them; those on different instances run
//! side by side. Each runs in a task that outlives whoever waits, so a cancelled wait never loses what was begun.

use std::{collections::HashMap, sync::Arc, time::Duration};

use orchestra_machine::{Effect, Event, HookKey};
use orchestra_model::{Code, Diagnostic, EnvironmentId, InstanceId};
use orchestra_provider::{Error, Provider, Retry};
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{port_pool::PortPool, probe_hub::ProbeHub, route_hub};

/// Longest useful pause of a provider's own retry advice.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// What effects need.
#[derive(Clone)]
pub(crate) struct Ports {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) probes: Arc<ProbeHub>,
    pub(crate) routes: mpsc::Sender<route_hub::Message>,
    pub(crate) pool: Arc<PortPool>,
    pub(crate) tree: TaskTree,
}

/// Carries out the effects of one environment.
pub(crate) struct Effects {
    ports: Ports,
    environment: EnvironmentId,
    inbox: mpsc::Sender<Event>,
    /// The last effect on each instance; the next one waits for it.
    last: HashMap<InstanceId, JoinHandle<Option<()>>>,
    /// Hooks that are being asked; whoever lets go of one ends it.
    hooks: HashMap<HookKey, oneshot::Sender<()>>,
}

impl Effects {
    pub(crate) fn new(ports: Ports, environment: EnvironmentId, inbox: mpsc::Sender<Event>) -> Self {
        Self { ports, environment, inbox, last: HashMap::new(), hooks: HashMap::new() }
    }

    /// Begins one effect. Returns soon; its outcome is an event in the inbox.
    pub(crate) async fn begin(&mut self, effect: Effect) {
        let Ports { provider, probes, routes, pool, tree } = self.ports.clone();
        let inbox = self.inbox.clone();
        match effect {
            Effect::Launch(launch) => {
                let instance = launch.key.instance.clone();
                self.in_order(instance, "launch", async move {
                    let key = launch.key.clone();
                    if !pool.promise(&key, launch.ports.values().copied()) {
                        let _ = inbox.send(Event::PortsTaken(key)).await;
                        return;
                    }
                    let event = match provider.start(*launch).await {
                        Ok(()) => Event::Launched(key),
                        Err(error) => {
                            pool.release(&key);
                            let retry = match error.retry {
                                Retry::After(pause) => Some(pause.min(MAX_RETRY)),
                                Retry::Never | Retry::OnChange => None,
                            };
                            Event::LaunchFailed { key, problem: diagnostic(&error), retry }
                        }
                    };
                    let _ = inbox.send(event).await;
                });
            }
            Effect::Terminate { key, how } => {
                self.in_order(key.instance.clone(), "terminate", async move {
                    while let Err(error) = provider.terminate(key.clone(), how).await {
                        tracing::error!(launch = %key, %error, "could not stop an instance");
                        let Retry::After(pause) = error.retry else { return };
                        tokio::time::sleep(pause.min(MAX_RETRY)).await;
                    }
                });
            }
            Effect::Forget(key) => {
                self.in_order(key.instance.clone(), "forget", async move {
                    pool.release(&key);
                    if let Err(error) = provider.forget(key.clone()).await {
                        tracing::warn!(launch = %key, %error, "could not forget a launch");
                    }
                });
            }
            Effect::SetRoutes { revision, routes: part } => {
                let message = route_hub::Message::Set(self.environment.clone(), revision, part);
                let _ = routes.send(message).await;
            }
            Effect::Cut(endpoint) => {
                let _ = routes.send(route_hub::Message::Cut(endpoint)).await;
            }
            Effect::StartProbe { key, target, every, timeout } => {
                probes.start(&self.environment, key, target, every.duration(), timeout.duration());
            }
            Effect::StopProbe(key) => probes.stop(&self.environment, &key),
            Effect::RunHook { key, hook, directory, document } => {
                let (hold, ended) = oneshot::channel();
                self.hooks.insert(key.clone(), hold);
                tree.start(TaskKind::Effect, "hook", async move {
                    let timeout = hook.timeout.duration();
                    // Cancelling the question kills a command with everything that it started.
                    let answer = tokio::select! {
                        answer = orchestra_probe::hook::ask(&hook.call, &directory, &document, timeout) => answer,
                        _ = ended => return,
                    };
                    let _ = inbox.send(Event::HookDone { key, answer }).await;
                });
            }
            Effect::Consult { key, question, timeout } => {
                tree.start(TaskKind::Effect, "consult", async move {
                    let answer = orchestra_probe::consult::ask(question, timeout.duration()).await;
                    let _ = inbox.send(Event::Consulted { key, answer }).await;
                });
            }
            Effect::AskPair { key, canary, stable, path, timeout } => {
                tree.start(TaskKind::Effect, "pair of probes", async move {
                    let timeout = timeout.duration();
                    let (canary, stable) = tokio::join!(
                        orchestra_probe::pair::ask(canary, &path, timeout),
                        orchestra_probe::pair::ask(stable, &path, timeout),
                    );
                    let _ = inbox.send(Event::PairAnswered { key, canary, stable }).await;
                });
            }
            Effect::MeasureUsage { service, keys } => {
                tree.start(TaskKind::Effect, "measure usage", async move {
                    let usage = provider.usage(keys).await;
                    let _ = inbox.send(Event::Usage { service, usage }).await;
                });
            }
            Effect::CreateVolume { resource, path } => {
                tree.start(TaskKind::Effect, "create volume", async move {
                    let result = provider.create_volume(path).await.map_err(|error| diagnostic(&error));
                    let _ = inbox.send(Event::VolumeDone { resource, result }).await;
                });
            }
            Effect::DeleteVolume { resource, path } => {
                tree.start(TaskKind::Effect, "delete volume", async move {
                    let result = provider.delete_volume(path).await.map_err(|error| diagnostic(&error));
                    let _ = inbox.send(Event::VolumeDone { resource, result }).await;
                });
            }
        }
    }

    /// Ends the hooks whose answer nobody waits for any more.
    pub(crate) fn end_hooks(&mut self, is_waited_for: impl Fn(&HookKey) -> bool) {
        self.hooks.retain(|key, _| is_waited_for(key));
    }

    fn in_order(
        &mut self,
        instance: InstanceId,
        name: &'static str,
        effect: impl Future<Output = ()> + Send + 'static,
    ) {
        let before = self.last.remove(&instance).filter(|task| !task.is_finished());
        let task = self.ports.tree.start(TaskKind::Effect, name, async move {
            if let Some(before) = before {
                // A panic in it is reported by its own task; what follows must happen all the same.
                let _ = before.await;
            }
            effect.await;
        });
        if self.last.len() > 1024 {
            self.last.retain(|_, task| !task.is_finished());
        }
        self.last.insert(instance, task);
    }
}

/// A provider's error in the form that users read.
pub(crate) fn diagnostic(error: &Error) -> Diagnostic {
    let mut diagnostic = Diagnostic::error(error.code, error.message.clone());
    if let Some(source) = &error.source {
        diagnostic = diagnostic.caused_by(&**source);
    }
    let help = error.help.clone().or_else(|| {
        (error.code == Code::INTERNAL).then(|| "report it with the output of `orchestra doctor --json`".to_owned())
    });
    Diagnostic { help, ..diagnostic }
}
