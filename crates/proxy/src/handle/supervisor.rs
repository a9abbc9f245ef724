//! The loop that owns the sockets, the last table and the living proxies.
//!
//! It does one thing at a time: a table that is being applied is either acknowledged, refused, or kept for the next
//! proxy, before anything else is begun. Reports of the proxy do not pass through here; they must not wait.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use orchestra_model::route::{ApplyError, EndpointKey, ProxyEvent, RouteTable};
use orchestra_provider::{Applied, DataPlaneError, DataPlaneEvent};
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    OpenError, Options, Shared,
    connection::{Connection, News},
    events::Events,
    launch::{Found, Launcher},
    sockets::Sockets,
    traffic::Traffic,
    unexpected,
};
use crate::wire::{Request, Response, Snapshot};

/// First and longest pause between two attempts to start a proxy that cannot be started.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));

/// What callers ask of the loop.
#[derive(Debug)]
pub(super) enum Command {
    Apply(RouteTable, oneshot::Sender<Result<Applied, DataPlaneError>>),
    Table(oneshot::Sender<Option<(RouteTable, Applied)>>),
    Shutdown(oneshot::Sender<()>),
}

pub(super) struct Supervisor {
    launcher: Launcher,
    sockets: Sockets,
    table: Option<RouteTable>,
    current: Option<Arc<Connection>>,
    leaving: Vec<Arc<Connection>>,
    backoff: Duration,
    retry: Option<Instant>,
    /// Answered once the last proxy is gone; none is started any more.
    ending: Option<Vec<oneshot::Sender<()>>>,
    news: mpsc::Receiver<News>,
    shared: Arc<Shared>,
    reports: Reports,
}

impl Supervisor {
    pub(super) async fn open(
        options: Options,
        tree: TaskTree,
        shared: Arc<Shared>,
        events: Events,
    ) -> Result<Self, OpenError> {
        // Few: a proxy says by itself only that it leaves or ended; reports take their own way.
        let (sender, news) = mpsc::channel(64);
        let reports = Reports::new(events, Arc::clone(&shared), tree.clone());
        let admin = options.admin;
        let mut launcher = Launcher::new(options, tree, sender, reports.clone())?;
        let found = launcher.find_or_start().await?;
        let mut supervisor = Self {
            launcher,
            sockets: Sockets::adopt(found.snapshot.sockets, found.fds, found.snapshot.chosen),
            table: found.snapshot.table,
            current: Some(found.connection),
            leaving: Vec::new(),
            backoff: BACKOFF.0,
            retry: None,
            ending: None,
            news,
            shared,
            reports,
        };
        let address = supervisor.sockets.ensure_admin(admin).map_err(|reason| OpenError::Admin {
            address: admin.expect("only an address that was asked for can fail"),
            reason,
        })?;
        supervisor.shared.admin.store(address.map(Arc::new));
        if let Err(error) = supervisor.hand_over().await {
            return Err(OpenError::Busy { reason: format!("it did not take the sockets: {error}") });
        }
        supervisor.serving();
        Ok(supervisor)
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            // Every arm only takes a message or a time out of a queue, so an arm that loses a race has lost nothing.
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Apply(table, reply)) => {
                        let result = self.apply(table).await;
                        // The caller may have given up; the table is in force all the same.
                        let _ = reply.send(result);
                    }
                    Some(Command::Table(reply)) => {
                        let _ = reply.send(self.table.clone().map(|table| (table, self.applied())));
                    }
                    Some(Command::Shutdown(reply)) => self.shutdown(reply).await,
                    None => return,
                },
                news = self.news.recv() => match news {
                    Some(news) => self.heard(news).await,
                    None => return,
                },
                () = until(self.retry) => self.start().await,
            }
        }
    }

    /// Brings a table into force.
    async fn apply(&mut self, table: RouteTable) -> Result<Applied, DataPlaneError> {
        if let Some(current) = self.table.as_ref().map(|t| t.version).filter(|current| table.version <= *current) {
            return Err(ApplyError::Stale { offered: table.version, current }.into());
        }
        if self.ending.is_some() {
            return Err(DataPlaneError::Unavailable(io::Error::other("the proxy was told to end")));
        }
        let proposal = self.sockets.propose(&table)?;
        let (attached, fds) = proposal.attachments().map_err(DataPlaneError::Unavailable)?;
        let snapshot =
            Snapshot { table: Some(table.clone()), sockets: proposal.infos.clone(), chosen: self.sockets.chosen() };
        let before = self.reports.expect(self.table.as_ref(), &table);
        // A leaving proxy learns the table first: what it still serves must not go where the new table forbids it.
        for peer in &self.leaving {
            let snapshot = Snapshot { sockets: Vec::new(), ..snapshot.clone() };
            // One that does not answer is about to be gone.
            let _ = peer.call(Request::Apply { snapshot, attached: Vec::new() }, Vec::new()).await;
        }
        let answer = match &self.current {
            Some(current) => current.call(Request::Apply { snapshot, attached }, fds).await,
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "no proxy is running")),
        };
        match answer {
            Ok(Response::Refused(error)) => {
                self.reports.restore(before);
                Err(error.into())
            }
            Ok(Response::Done) => {
                self.sockets.accept(proposal);
                self.table = Some(table);
                self.reports.in_force(self.table.as_ref());
                Ok(self.applied())
            }
            Ok(other) => {
                self.reports.restore(before);
                Err(unexpected(&other))
            }
            Err(error) => {
                // Kept for the next proxy, as the port promises. A proxy that is only slow takes it when it wakes up.
                self.sockets.accept(proposal);
                self.table = Some(table);
                if error.kind() == io::ErrorKind::TimedOut {
                    return Err(DataPlaneError::Unavailable(error));
                }
                if self.current.is_some() {
                    self.lost(&error.to_string()).await;
                }
                match &self.current {
                    Some(_) => Ok(self.applied()),
                    None => Err(DataPlaneError::Unavailable(error)),
                }
            }
        }
    }

    fn applied(&self) -> Applied {
        let version = self.table.as_ref().map_or(0, |t| t.version);
        Applied { version, addresses: self.sockets.addresses() }
    }

    async fn heard(&mut self, news: News) {
        match news {
            News::Ended(number, cause) => {
                self.leaving.retain(|peer| peer.number() != number);
                if self.current.as_ref().is_some_and(|c| c.number() == number) {
                    self.lost(&cause).await;
                }
                self.publish();
            }
            News::Leaving(number) => {
                if let Some(peer) = self.current.take_if(|c| c.number() == number) {
                    self.leaving.push(peer);
                    if self.ending.is_none() {
                        // It gave up lock and control socket before it said so: the successor can serve at once.
                        self.reports.push(DataPlaneEvent::Lost { cause: "the proxy was told to end".to_owned() });
                        self.start().await;
                    }
                }
                self.publish();
            }
        }
        if self.current.is_none() && self.leaving.is_empty() {
            for reply in self.ending.iter_mut().flat_map(std::mem::take) {
                let _ = reply.send(());
            }
        }
    }

    async fn lost(&mut self, cause: &str) {
        self.current = None;
        self.publish();
        if self.ending.is_none() {
            tracing::warn!(cause, "the proxy is lost; connections wait in its sockets");
            self.reports.push(DataPlaneEvent::Lost { cause: cause.to_owned() });
            self.start().await;
        }
    }

    /// Starts a proxy and gives it all it needs; on failure sets the time of the next attempt.
    async fn start(&mut self) {
        self.retry = None;
        let result = match self.launcher.find_or_start().await {
            Ok(Found { connection, .. }) => {
                self.current = Some(connection);
                self.hand_over().await.map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match result {
            Ok(()) => {
                self.backoff = BACKOFF.0;
                self.serving();
            }
            Err(reason) => {
                self.current = None;
                self.publish();
                tracing::error!(reason, again_in = ?self.backoff, "the proxy cannot be started");
                self.retry = Some(Instant::now() + self.backoff);
                self.backoff = (self.backoff * 2).min(BACKOFF.1);
            }
        }
    }

    /// Gives the current proxy all sockets and the last table.
    async fn hand_over(&mut self) -> io::Result<()> {
        let current = self.current.as_ref().expect("called with a proxy that was just greeted");
        let (sockets, fds) = self.sockets.duplicates()?;
        let attached = sockets.iter().map(|s| s.id).collect();
        let snapshot = Snapshot { table: self.table.clone(), sockets, chosen: self.sockets.chosen() };
        match current.call(Request::Apply { snapshot, attached }, fds).await? {
            Response::Done => Ok(()),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{other:?}"))),
        }
    }

    fn serving(&mut self) {
        self.publish();
        self.reports.in_force(self.table.as_ref());
        self.reports.settle();
        let pid = self.current.as_ref().map_or(0, |c| c.pid());
        self.reports.push(DataPlaneEvent::Serving { pid });
    }

    fn publish(&self) {
        self.shared.peers.store(Arc::new(self.current.iter().chain(&self.leaving).cloned().collect()));
    }

    async fn shutdown(&mut self, reply: oneshot::Sender<()>) {
        self.retry = None;
        if let Some(current) = &self.current {
            // If it cannot be asked it is gone, which the end of its connection tells.
            let _ = current.call(Request::Leave, Vec::new()).await;
        } else if self.leaving.is_empty() {
            let _ = reply.send(());
            return;
        }
        self.ending.get_or_insert_default().push(reply);
        self.sockets = Sockets::default();
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Sends the proxy's reports on to the engine, and makes them whole across versions and across several proxies.
///
/// A report that was overtaken by a newer table is dropped: the endpoint may be active again, and if it is not, the proxy
/// reports it again under the new version. While an old proxy is leaving, an endpoint is drained only when nothing is in
/// flight to it in either. When a proxy is killed, everything that was in flight in it is over: endpoints that the table
/// does not have any more, and that were not reported yet, are reported then.
#[derive(Clone, Debug)]
pub(super) struct Reports(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    events: Events,
    shared: Arc<Shared>,
    tree: TaskTree,
    books: Mutex<Books>,
    traffic: Mutex<Traffic>,
}

#[derive(Debug, Default)]
struct Books {
    /// Version in force, and the endpoints that it has.
    version: u64,
    present: BTreeSet<EndpointKey>,
    /// Endpoints that left the table and were not reported drained yet.
    owed: BTreeSet<EndpointKey>,
}

impl Inner {
    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        lock(&self.books)
    }

    /// Queues a report unless it is overtaken.
    fn report(&self, version: u64, event: ProxyEvent) {
        // Under the lock: a table that comes into force afterwards finds the report in the queue and drops it there.
        let books = self.books();
        if !books.overtakes(version, &event) {
            self.events.push(version, DataPlaneEvent::Proxy(event));
        }
    }
}

impl Books {
    fn overtakes(&self, version: u64, event: &ProxyEvent) -> bool {
        let (ProxyEvent::Drained { endpoint } | ProxyEvent::Draining { endpoint, .. }) = event else { return false };
        version < self.version && self.present.contains(endpoint)
    }
}

impl Reports {
    pub(super) fn new(events: Events, shared: Arc<Shared>, tree: TaskTree) -> Self {
        Self(Arc::new(Inner { events, shared, tree, books: Mutex::default(), traffic: Mutex::default() }))
    }

    /// A report of the handle itself.
    fn push(&self, event: DataPlaneEvent) {
        self.0.events.push(u64::MAX, event);
    }

    /// Notes which endpoints leave with the next table; returns what to restore should it be refused.
    fn expect(&self, old: Option<&RouteTable>, new: &RouteTable) -> BTreeSet<EndpointKey> {
        let kept: BTreeSet<EndpointKey> = crate::table::keys(new).collect();
        let mut books = self.0.books();
        let before = books.owed.clone();
        books.owed.extend(old.into_iter().flat_map(crate::table::keys));
        books.owed.retain(|key| !kept.contains(key));
        before
    }

    fn restore(&self, before: BTreeSet<EndpointKey>) {
        self.0.books().owed = before;
    }

    /// A table is in force; overtaken reports that the engine did not read yet are dropped.
    fn in_force(&self, table: Option<&RouteTable>) {
        let Some(table) = table else { return };
        let mut books = self.0.books();
        books.version = books.version.max(table.version);
        books.present = crate::table::keys(table).collect();
        self.0.events.retain(|version, event| match event {
            DataPlaneEvent::Proxy(event) => !books.overtakes(version, event),
            _ => true,
        });
    }

    /// After a proxy was lost: what is owed has come true.
    fn settle(&self) {
        let (version, owed) = {
            let mut books = self.0.books();
            (books.version, std::mem::take(&mut books.owed))
        };
        for endpoint in owed {
            self.drained(version, endpoint);
        }
    }

    /// A report of the proxy with this connection.
    pub(super) fn heard(&self, number: u64, version: u64, event: ProxyEvent) {
        match event {
            ProxyEvent::Drained { endpoint } => self.drained(version, endpoint),
            ProxyEvent::Draining { .. } => self.0.report(version, event),
            ProxyEvent::Certificate(_) => {
                // What a leaving proxy shows to the connections that it still has concerns nobody.
                if self.0.shared.peers.load().iter().skip(1).all(|peer| peer.number() != number) {
                    self.0.report(version, event);
                }
            }
            ProxyEvent::Traffic(_) | ProxyEvent::Load(_) => {
                let leaving: Vec<u64> = self.0.shared.peers.load().iter().skip(1).map(|peer| peer.number()).collect();
                let whole = lock(&self.0.traffic).heard(number, &leaving, event);
                if let Some(event) = whole {
                    self.0.report(version, event);
                }
            }
        }
    }

    fn drained(&self, version: u64, endpoint: EndpointKey) {
        let event = ProxyEvent::Drained { endpoint: endpoint.clone() };
        self.0.books().owed.remove(&endpoint);
        let leaving: Vec<Arc<Connection>> = self.0.shared.peers.load().iter().skip(1).cloned().collect();
        if leaving.is_empty() {
            return self.0.report(version, event);
        }
        let inner = Arc::clone(&self.0);
        self.0.tree.start(TaskKind::Connection, "proxy drain of two", async move {
            for peer in leaving {
                // An error means that the proxy is gone, and with it all that it had in flight.
                let _ = peer.ask(Request::AwaitDrained { endpoint: endpoint.clone() }, Vec::new()).await;
            }
            inner.report(version, event);
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
