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
    waiting: Mutex<VecDeque<(u64, DataPlaneEvent)>>,
    changed: Notify,
}

/// A queue and the engine's end of it.
pub(super) fn queue(tree: &TaskTree) -> (Events, mpsc::Receiver<DataPlaneEvent>) {
    // One: what is in the channel cannot be taken back when a newer table overtakes it.
    let (sender, receiver) = mpsc::channel(1);
    let inner = Arc::new(Inner::default());
    let events = Events(Arc::clone(&inner));
    tree.start(TaskKind::Connection, "proxy events", async move {
        loop {
            // Room first, so that nothing is taken out of the list before it can go.
            let Ok(permit) = sender.reserve().await else { return };
            let next = inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            if let Some((_, event)) = next {
                permit.send(event);
            } else {
                drop(permit);
                inner.changed.notified().await;
            }
        }
    });
    (events, receiver)
}

impl Events {
    /// Adds a report that is true for this version of the table.
    pub(super) fn push(&self, version: u64, event: DataPlaneEvent) {
        let mut waiting = self.waiting();
        if let DataPlaneEvent::Proxy(ProxyEvent::Draining { endpoint, .. }) = &event {
            waiting.retain(|(_, old)| {
                !matches!(old, DataPlaneEvent::Proxy(ProxyEvent::Draining { endpoint: e, .. }) if e == endpoint)
            });
        }
        waiting.push_back((version, event));
        drop(waiting);
        self.0.changed.notify_one();
    }

    /// Keeps only those that are still wanted.
    pub(super) fn retain(&self, wanted: impl Fn(u64, &DataPlaneEvent) -> bool) {
        self.waiting().retain(|(version, event)| wanted(*version, event));
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, DataPlaneEvent)>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
