//! Carries reports to the engine without ever making the proxy wait for it.
//!
//! The channel to the engine is bounded; in front of it is a list in which a newer `Draining` takes the place of an
//! older one of the same endpoint, a newer `Load` that of one of the same route, and in which `Traffic` of one watch adds
//! up once there is much of it. What remains is bounded by the number of endpoints, routes, versions and restarts that
//! the engine itself caused and has not read about.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use orchestra_model::{
    route::ProxyEvent,
    traffic::{LoadReport, TrafficReport},
};
use orchestra_provider::DataPlaneEvent;
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{Notify, mpsc};

use crate::{load, watch};

/// Reports of one watch that wait; further ones add up with the last.
const TRAFFIC: usize = 16;

type Waiting = VecDeque<(u64, DataPlaneEvent)>;

/// Takes reports; clones feed the same channel.
#[derive(Clone, Debug)]
pub(super) struct Events(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<Waiting>,
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
    pub(super) fn push(&self, version: u64, mut event: DataPlaneEvent) {
        let mut waiting = self.waiting();
        match &mut event {
            DataPlaneEvent::Proxy(ProxyEvent::Load(new)) => join_load(&mut waiting, new),
            DataPlaneEvent::Proxy(ProxyEvent::Traffic(new)) => join_traffic(&mut waiting, new),
            _ => {}
        }
        if let DataPlaneEvent::Proxy(ProxyEvent::Certificate(new)) = &event {
            waiting.retain(|(_, old)| {
                !matches!(old, DataPlaneEvent::Proxy(ProxyEvent::Certificate(old)) if old.route == new.route)
            });
        }
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

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes an older load of the route out of the list and adds it to the new one.
fn join_load(waiting: &mut Waiting, new: &mut LoadReport) {
    let older = |(_, event): &(u64, DataPlaneEvent)| match event {
        DataPlaneEvent::Proxy(ProxyEvent::Load(old)) => old.route == new.route,
        _ => false,
    };
    if let Some(index) = waiting.iter().position(older)
        && let Some((_, DataPlaneEvent::Proxy(ProxyEvent::Load(old)))) = waiting.remove(index)
    {
        load::merge(&old, new);
    }
}

/// Forgets what waits of earlier watches of the route, and adds the last report to the new one if many wait.
fn join_traffic(waiting: &mut Waiting, new: &mut TrafficReport) {
    let of_route = |event: &DataPlaneEvent| match event {
        DataPlaneEvent::Proxy(ProxyEvent::Traffic(old)) if old.route == new.route => Some(old.watch),
        _ => None,
    };
    waiting.retain(|(_, event)| of_route(event).is_none_or(|watch| watch == new.watch));
    let of_watch: Vec<usize> =
        waiting.iter().enumerate().filter(|(_, (_, event))| of_route(event).is_some()).map(|(i, _)| i).collect();
    if of_watch.len() >= TRAFFIC
        && let Some(last) = of_watch.last()
        && let Some((_, DataPlaneEvent::Proxy(ProxyEvent::Traffic(old)))) = waiting.remove(*last)
    {
        watch::merge(new, &old);
    }
}

#[cfg(test)]
mod tests;
