//! Carries reports to the engine without ever making the proxy wait for it.
//!
//! The channel to the engine is bounded; in front of it is a list in which a newer `Draining` takes the place of an
//! older one of the same endpoint. What remains is bounded by the number of endpoints, versions and restarts that the
//! engine itself caused and has not read about.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use orchestra_model::route::ProxyEvent;
use orchestra_provider::DataPlaneEvent;
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{Notify, mpsc};

/// Takes reports; clones feed the same channel.
#[derive(Clone, Debug)]
pub(super) struct Events(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<VecDeque<DataPlaneEvent>>,
    changed: Notify,
}

/// A queue and the engine's end of it.
pub(super) fn queue(tree: &TaskTree) -> (Events, mpsc::Receiver<DataPlaneEvent>) {
    let (sender, receiver) = mpsc::channel(256);
    let inner = Arc::new(Inner::default());
    let events = Events(Arc::clone(&inner));
    tree.start(TaskKind::Connection, "proxy events", async move {
        loop {
            let next = inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match next {
                Some(event) => {
                    if sender.send(event).await.is_err() {
                        // Nobody wants reports any more.
                        return;
                    }
                }
                None => inner.changed.notified().await,
            }
        }
    });
    (events, receiver)
}

impl Events {
    /// Adds a report.
    pub(super) fn push(&self, event: DataPlaneEvent) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let DataPlaneEvent::Proxy(ProxyEvent::Draining { endpoint, .. }) = &event {
            waiting.retain(|old| {
                !matches!(old, DataPlaneEvent::Proxy(ProxyEvent::Draining { endpoint: e, .. }) if e == endpoint)
            });
        }
        waiting.push_back(event);
        drop(waiting);
        self.0.changed.notify_one();
    }
}
