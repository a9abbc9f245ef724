//! Obeying the server: control connections, listeners, and the way out.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    io,
    net::TcpListener as StdTcpListener,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use orchestra_model::route::ApplyError;
use orchestra_task::TaskKind;
use rustix::net::sockopt;
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
    time::Instant,
};

use crate::{
    admin,
    files::Files,
    listen::{Ending, Listener},
    state::{Proxy, Report},
    wire::{self, PROTOCOL, Received, Request, Response, Snapshot, SocketId, SocketUse, Writer},
};

/// A proxy that serves nothing and that nobody steers ends after this time.
const USELESS: Duration = Duration::from_secs(10);

/// The receiving end of the server's will.
pub(super) struct Control {
    proxy: Arc<Proxy>,
    files: Files,
    /// Given up when the proxy leaves, so that its successor can serve.
    lock: Option<File>,
    listener: Option<UnixListener>,
    snapshot: Snapshot,
    sockets: BTreeMap<SocketId, Held>,
    connections: Arc<Semaphore>,
    /// The connection that steers.
    steering: Option<u64>,
    next: u64,
}

/// A listening socket and what it runs.
struct Held {
    fd: OwnedFd,
    ending: Ending,
    purpose: SocketUse,
    /// The task that accepts: it has a duplicate of the socket until it ends.
    task: JoinHandle<Option<()>>,
}

/// From the tasks that read control connections.
enum Heard {
    /// A connection greets.
    Hello { number: u64, protocol: u32, id: u64, outgoing: mpsc::Sender<Outgoing> },
    /// A request of the connection that steers.
    Asked { number: u64, frame: Received<Request>, outgoing: mpsc::Sender<Outgoing> },
    /// A connection ended.
    Ended(u64),
}

/// A frame to send, with sockets beside it.
struct Outgoing {
    id: u64,
    body: Response,
    fds: Vec<OwnedFd>,
    /// Given back once it was written.
    permit: Option<OwnedSemaphorePermit>,
}

impl Outgoing {
    fn new(id: u64, body: Response, fds: Vec<OwnedFd>) -> Self {
        Self { id, body, fds, permit: None }
    }
}

impl Control {
    pub(super) fn new(proxy: Arc<Proxy>, files: Files, lock: File, connections: usize) -> io::Result<Self> {
        let path = files.socket();
        // The lock says that whoever made it is gone.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = StdUnixListener::bind(&path)?;
        // The directory is 0700, so nobody else came near it before this.
        rustix::fs::chmod(&path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            proxy,
            files,
            lock: Some(lock),
            listener: Some(UnixListener::from_std(listener)?),
            snapshot: Snapshot::default(),
            sockets: BTreeMap::new(),
            connections: Arc::new(Semaphore::new(connections.clamp(64, Semaphore::MAX_PERMITS))),
            steering: None,
            next: 0,
        })
    }

    /// Obeys until told to end and everything is finished.
    pub(super) async fn run(mut self, first: Option<StdUnixStream>, told: impl Future<Output = ()>) {
        let (sender, mut heard) = mpsc::channel(64);
        if let Some(stream) = first.and_then(|stream| UnixStream::from_std(stream).ok()) {
            self.connect(stream, &sender);
        }
        let mut told = std::pin::pin!(told);
        let mut useless_since = Some(Instant::now());
        loop {
            let useless = self.steering.is_none() && self.serves_nothing();
            useless_since = if useless { useless_since.or_else(|| Some(Instant::now())) } else { None };
            let give_up = async {
                match useless_since {
                    Some(since) => tokio::time::sleep_until(since + USELESS).await,
                    None => std::future::pending().await,
                }
            };
            // Each arm takes one thing out of a queue or notes a time: losing a race loses nothing.
            tokio::select! {
                accepted = accept(self.listener.as_ref()) => if let Ok(stream) = accepted {
                    self.connect(stream, &sender);
                },
                Some(message) = heard.recv() => if self.heard(message).await {
                    break;
                },
                () = &mut told => break,
                () = give_up => return,
            }
        }
        self.leave(heard, sender).await;
    }

    fn serves_nothing(&self) -> bool {
        self.snapshot.table.as_ref().is_none_or(|table| table.routes.is_empty()) && self.proxy.in_flight() == 0
    }

    /// Takes a connection in if it is of the same user.
    fn connect(&mut self, stream: UnixStream, heard: &mpsc::Sender<Heard>) {
        let own = rustix::process::geteuid();
        if sockopt::socket_peercred(stream.as_fd()).map_or(true, |peer| peer.uid != own && !peer.uid.is_root()) {
            return;
        }
        self.next += 1;
        let number = self.next;
        let (mut reader, writer) = wire::split(stream);
        let (outgoing, queue) = mpsc::channel(256);
        self.proxy.tree.start(TaskKind::Connection, "control writer", write(writer, queue));
        let heard = heard.clone();
        self.proxy.tree.start(TaskKind::Connection, "control reader", async move {
            loop {
                let message = match reader.next::<Request>().await {
                    Ok(Some(Received { id, body: Request::Hello { protocol }, .. })) => {
                        Heard::Hello { number, protocol, id, outgoing: outgoing.clone() }
                    }
                    Ok(Some(frame)) => Heard::Asked { number, frame, outgoing: outgoing.clone() },
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "a control connection broke");
                        break;
                    }
                };
                if heard.send(message).await.is_err() {
                    break;
                }
            }
            // A loop that is gone is the process's end.
            let _ = heard.send(Heard::Ended(number)).await;
        });
    }

    /// Returns whether the server wants the proxy to leave.
    async fn heard(&mut self, message: Heard) -> bool {
        match message {
            Heard::Hello { number, protocol, id, outgoing } => {
                let free = self.steering.is_none() || self.steering == Some(number);
                if protocol != PROTOCOL || !free || self.lock.is_none() {
                    let body = Response::Busy { protocol: PROTOCOL };
                    let _ = outgoing.send(Outgoing::new(id, body, Vec::new())).await;
                    return false;
                }
                self.steering = Some(number);
                let welcome = self.welcome();
                let (body, fds) = welcome.unwrap_or_else(|error| {
                    (Response::Failed { message: format!("cannot hand the sockets back: {error}") }, Vec::new())
                });
                // A server that is gone again is noticed at the end of its connection.
                let _ = outgoing.send(Outgoing::new(id, body, fds)).await;
                let (reports, mut queue) = mpsc::channel(256);
                self.proxy.tree.start(TaskKind::Connection, "reports to the server", async move {
                    while let Some(Report { body, permit }) = queue.recv().await {
                        if outgoing.send(Outgoing { id: 0, body, fds: Vec::new(), permit }).await.is_err() {
                            return;
                        }
                    }
                });
                self.proxy.link(Some(reports));
                false
            }
            Heard::Asked { number, frame, outgoing } => {
                if self.steering != Some(number) {
                    let body = Response::Failed { message: "say hello first".to_owned() };
                    let _ = outgoing.send(Outgoing::new(frame.id, body, Vec::new())).await;
                    return false;
                }
                let leave = matches!(frame.body, Request::Leave);
                self.asked(frame, outgoing).await;
                leave
            }
            Heard::Ended(number) => {
                if self.steering == Some(number) {
                    tracing::info!("the server is gone; serving on");
                    self.steering = None;
                    self.proxy.link(None);
                }
                false
            }
        }
    }

    fn welcome(&self) -> io::Result<(Response, Vec<OwnedFd>)> {
        let fd = |info: &wire::SocketInfo| self.sockets[&info.id].fd.try_clone();
        let fds: io::Result<Vec<OwnedFd>> = self.snapshot.sockets.iter().map(fd).collect();
        let snapshot = self.snapshot.clone();
        let pid = std::process::id();
        Ok((Response::Welcome { protocol: PROTOCOL, pid, snapshot, knows_standing: true }, fds?))
    }

    async fn asked(&mut self, frame: Received<Request>, outgoing: mpsc::Sender<Outgoing>) {
        let id = frame.id;
        let body = match frame.body {
            Request::Apply { snapshot, attached } => self.apply(snapshot, &attached, frame.fds).await,
            Request::Cut { endpoint } => {
                self.proxy.cut(&endpoint);
                Response::Done
            }
            Request::Metrics => {
                Response::Metrics { text: self.proxy.page(), standing: self.proxy.table.load().standing() }
            }
            Request::Standing => Response::Standing(self.proxy.table.load().standing()),
            Request::AwaitDrained { endpoint } => {
                if let Some(flight) = self.proxy.flight(&endpoint) {
                    self.proxy.tree.start(TaskKind::Connection, "drain of an endpoint", async move {
                        flight.drained().await;
                        let _ = outgoing.send(Outgoing::new(id, Response::Done, Vec::new())).await;
                    });
                    return;
                }
                Response::Done
            }
            Request::Leave => Response::Done,
            Request::Hello { .. } => Response::Failed { message: "said hello twice".to_owned() },
        };
        let _ = outgoing.send(Outgoing::new(id, body, Vec::new())).await;
    }

    /// Puts a snapshot into force, or changes nothing.
    async fn apply(&mut self, snapshot: Snapshot, attached: &[SocketId], fds: Vec<OwnedFd>) -> Response {
        if let (Some(current), Some(offered)) = (&self.snapshot.table, &snapshot.table)
            // The same table may come again, from a new server that only brings other sockets.
            && (offered.version < current.version || (offered.version == current.version && offered != current))
        {
            let (offered, current) = (offered.version, current.version);
            return Response::Refused(ApplyError::Stale { offered, current });
        }
        if self.lock.is_none() {
            // Leaving: the table matters for what is still here, sockets do not.
            self.proxy.apply(&snapshot);
            self.snapshot.table = snapshot.table;
            return Response::Done;
        }
        if attached.len() != fds.len() {
            return Response::Failed { message: "sockets and their names do not match".to_owned() };
        }
        let mut fresh: BTreeMap<SocketId, OwnedFd> = attached.iter().copied().zip(fds).collect();
        fresh.retain(|id, _| !self.sockets.contains_key(id));
        let mut listeners = Vec::new();
        for info in &snapshot.sockets {
            if self.sockets.contains_key(&info.id) {
                continue;
            }
            let listener =
                fresh.remove(&info.id).ok_or_else(|| io::Error::other("a socket is missing")).and_then(|fd| {
                    let tcp = StdTcpListener::from(fd.try_clone()?);
                    tcp.set_nonblocking(true)?;
                    Ok((fd, TcpListener::from_std(tcp)?))
                });
            match listener {
                Ok((fd, tcp)) => listeners.push((info, fd, tcp)),
                Err(error) => {
                    let addresses = vec![(info.requested, format!("the proxy cannot use the socket: {error}"))];
                    return Response::Refused(ApplyError::Bind { addresses });
                }
            }
        }
        // Nothing can fail from here on.
        self.proxy.apply(&snapshot);
        for (info, fd, tcp) in listeners {
            let ending = Ending::default();
            let task = match &info.purpose {
                SocketUse::Admin => {
                    let admin = admin::run(Arc::clone(&self.proxy), tcp, ending.stop.clone());
                    self.proxy.tree.start(TaskKind::Connection, "admin listener", admin)
                }
                SocketUse::Route(_) => {
                    let listener = Listener {
                        proxy: Arc::clone(&self.proxy),
                        socket: info.id,
                        tcp,
                        ending: ending.clone(),
                        connections: Arc::clone(&self.connections),
                    };
                    self.proxy.tree.start(TaskKind::Connection, "listener", listener.run())
                }
            };
            self.sockets.insert(info.id, Held { fd, ending, purpose: info.purpose.clone(), task });
        }
        let kept: std::collections::BTreeSet<SocketId> = snapshot.sockets.iter().map(|s| s.id).collect();
        let removed: Vec<Held> =
            self.sockets.extract_if(.., |id, _| !kept.contains(id)).map(|(_, held)| held).collect();
        for held in removed {
            held.ending.last.cancel();
            held.ending.stop.cancel();
            held.ending.drain.cancel();
            // Until then the address is in use, and the server may bind it anew as soon as it hears `Done`.
            let _ = held.task.await;
        }
        self.snapshot = snapshot;
        Response::Done
    }

    /// Stops accepting, lets a successor in, finishes what is in flight.
    async fn leave(mut self, mut heard: mpsc::Receiver<Heard>, sender: mpsc::Sender<Heard>) {
        tracing::info!("leaving: no new connections, finishing what is in flight");
        for held in self.sockets.values() {
            // What the kernel has queued is for the successor.
            held.ending.stop.cancel();
            if held.purpose != SocketUse::Admin {
                held.ending.drain.cancel();
            }
        }
        self.sockets.clear();
        self.proxy.flags.leave();
        // A successor makes its own; removing ours later could remove that one.
        let _ = std::fs::remove_file(self.files.socket());
        self.listener = None;
        self.lock = None;
        self.proxy.said_leaving().await;
        drop(sender);
        let finished = finished(Arc::clone(&self.proxy));
        let mut finished = std::pin::pin!(finished);
        loop {
            tokio::select! {
                () = &mut finished => return,
                Some(message) = heard.recv() => {
                    // Asked to leave once more: it does already.
                    self.heard(message).await;
                }
            }
        }
    }
}

/// Looks for what is still to be reported, after everything has ended.
const LAST_REPORTS: u32 = 40;

/// Completes once no client connection and nothing in flight is left, and the server was told what became of the last.
async fn finished(proxy: Arc<Proxy>) {
    // Only while leaving, where a twentieth of a second matters to nobody; no hot path pays for an exact signal.
    let mut interval = tokio::time::interval(Duration::from_millis(50));
    let (mut looks, mut said) = (0, false);
    loop {
        interval.tick().await;
        if proxy.metrics.connections.load(Ordering::Relaxed) > 0 || proxy.in_flight() > 0 {
            continue;
        }
        looks += 1;
        let table = proxy.table.load();
        let watched = table.reported.iter().filter_map(|plan| plan.watch.as_ref());
        let unsaid = watched.filter(|watching| watching.hurry()).count() > 0;
        if unsaid && proxy.linked().is_some() && looks < LAST_REPORTS {
            proxy.traffic.notify_one();
            said = true;
        } else if std::mem::take(&mut said) {
            // Once more around: it is on its way to the server.
        } else {
            return;
        }
    }
}

async fn accept(listener: Option<&UnixListener>) -> io::Result<UnixStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

async fn write(writer: Writer, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { id, body, fds, permit }) = queue.recv().await {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        // The reader of the same connection sees its end.
        if writer.send(id, body, &fds).await.is_err() {
            return;
        }
        drop(permit);
    }
}
