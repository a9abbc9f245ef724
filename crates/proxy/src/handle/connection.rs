//! One control connection to one proxy: calls with answers, and what the proxy says by itself.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use super::supervisor::Reports;
use crate::wire::{self, PROTOCOL, Request, Response, Snapshot};

/// What becomes of a connection, with its number.
#[derive(Debug)]
pub(super) enum News {
    /// The proxy finishes what it has and ends.
    Leaving(u64),
    /// The connection ended.
    Ended(u64, String),
}

/// Questions without an answer yet.
type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Response>>>>>;

/// A connection after its greeting.
#[derive(Debug)]
pub(super) struct Connection {
    number: u64,
    pid: u32,
    knows_standing: bool,
    patience: Duration,
    next: AtomicU64,
    outgoing: mpsc::Sender<(u64, Request, Vec<OwnedFd>)>,
    /// `None` once the connection ended: then nobody would answer.
    waiting: Waiting,
}

/// How a greeting went.
pub(super) enum Greeting {
    /// The proxy is ours, with all it had.
    Welcome { connection: Arc<Connection>, snapshot: Snapshot, fds: Vec<OwnedFd> },
    /// It cannot be had.
    Busy { reason: String },
}

impl Connection {
    /// Greets a proxy. On success its reports go to `reports`, its fate to `news`.
    pub(super) async fn greet(
        stream: UnixStream,
        number: u64,
        patience: Duration,
        news: mpsc::Sender<News>,
        reports: Reports,
        tree: &TaskTree,
    ) -> io::Result<Greeting> {
        let (mut reader, writer) = wire::split(stream);
        writer.send(0, Request::Hello { protocol: PROTOCOL }, &[]).await?;
        let first = tokio::time::timeout(patience, reader.next::<Response>())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the proxy does not answer"))??
            .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the proxy closed the control connection"))?;
        let (pid, snapshot, knows_standing) = match first.body {
            Response::Welcome { protocol: PROTOCOL, pid, snapshot, knows_standing }
                if snapshot.sockets.len() == first.fds.len() =>
            {
                (pid, snapshot, knows_standing)
            }
            Response::Busy { protocol } if protocol == PROTOCOL => {
                return Ok(Greeting::Busy { reason: "another server steers it".to_owned() });
            }
            Response::Welcome { protocol, .. } | Response::Busy { protocol } => {
                return Ok(Greeting::Busy {
                    reason: format!("it speaks protocol {protocol}, this server speaks {PROTOCOL}"),
                });
            }
            other => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an odd greeting: {other:?}"))),
        };
        let (outgoing, mut queue) = mpsc::channel::<(u64, Request, Vec<OwnedFd>)>(64);
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        tree.start(TaskKind::Connection, "proxy control writer", async move {
            while let Some((id, request, fds)) = queue.recv().await {
                let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
                // The reader sees the end of the connection too and tells everybody.
                if writer.send(id, request, &fds).await.is_err() {
                    return;
                }
            }
        });
        tree.start(TaskKind::Connection, "proxy control reader", {
            let waiting = Arc::clone(&waiting);
            async move {
                let cause = loop {
                    match reader.next::<Response>().await {
                        Ok(Some(frame)) if frame.id == 0 => match frame.body {
                            Response::Event { version, event } => reports.heard(number, version, event),
                            Response::Leaving => {
                                // A loop that is gone needs no news; the handle is being dropped.
                                let _ = news.send(News::Leaving(number)).await;
                            }
                            other => tracing::warn!(?other, "the proxy said something that nobody asked for"),
                        },
                        Ok(Some(frame)) => {
                            let asked = lock(&waiting).as_mut().and_then(|w| w.remove(&frame.id));
                            // Nobody waits any more for an answer that came too late.
                            let _ = asked.map(|asked| asked.send(frame.body).is_ok());
                        }
                        Ok(None) => break "the proxy process ended".to_owned(),
                        Err(error) => break format!("the control connection broke: {error}"),
                    }
                };
                // Drops every sender: whoever waits for an answer learns that none will come.
                *lock(&waiting) = None;
                let _ = news.send(News::Ended(number, cause)).await;
            }
        });
        let connection = Self { number, pid, knows_standing, patience, next: AtomicU64::new(1), outgoing, waiting };
        Ok(Greeting::Welcome { connection: Arc::new(connection), snapshot, fds: first.fds })
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks who waits and who is left out. Of an earlier proxy that is a part of its metrics, which it renders for it.
    pub(super) async fn standing(&self) -> io::Result<Response> {
        self.call(if self.knows_standing { Request::Standing } else { Request::Metrics }, Vec::new()).await
    }

    /// Asks, and waits for the answer at most as long as patience allows.
    pub(super) async fn call(&self, request: Request, fds: Vec<OwnedFd>) -> io::Result<Response> {
        tokio::time::timeout(self.patience, self.ask(request, fds))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the proxy does not answer")))
    }

    /// Asks, and waits for the answer as long as the connection lives.
    pub(super) async fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> io::Result<Response> {
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the proxy process ended");
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).as_mut().ok_or_else(ended)?.insert(id, sender);
        self.outgoing.send((id, request, fds)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::handle::events;

    /// What a proxy that greets with `welcome` is asked when somebody wants to know who waits.
    async fn asked(welcome: serde_json::Value) -> Request {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = wire::split(theirs);
        let tree = TaskTree::new();
        let (events, _receiver) = events::queue(&tree);
        let reports = Reports::new(events, Arc::default(), tree.clone());
        let (news, _fates) = mpsc::channel(1);
        let greeting = Connection::greet(ours, 1, Duration::from_secs(10), news, reports, &tree);
        let greeted = async {
            assert!(matches!(reader.next().await.unwrap().unwrap().body, Request::Hello { .. }));
            writer.send(0, json!({"welcome": welcome}), &[]).await.unwrap();
        };
        let (greeting, ()) = tokio::join!(greeting, greeted);
        let Ok(Greeting::Welcome { connection, .. }) = greeting else { panic!("it is not ours") };
        let heard = async { reader.next::<Request>().await.unwrap().unwrap().body };
        // Both arms are cancel-safe; the answer never comes.
        let heard = tokio::select! { heard = heard => heard, answer = connection.standing() => panic!("{answer:?}") };
        tree.cancel();
        heard
    }

    #[tokio::test]
    async fn a_proxy_renders_its_metrics_only_for_those_who_want_them() {
        let snapshot = json!({"table": null, "sockets": [], "chosen": []});
        let of_today = json!({"protocol": PROTOCOL, "pid": 7, "snapshot": snapshot, "knows_standing": true});
        assert!(matches!(asked(of_today).await, Request::Standing));
        let earlier = json!({"protocol": PROTOCOL, "pid": 7, "snapshot": snapshot});
        assert!(matches!(asked(earlier).await, Request::Metrics));
    }
}
