//! The server's side of the data plane: keeps a proxy process alive and steers it.
//!
//! A proxy must outlive the server, and the addresses must outlive both alone: the handle binds every listening socket,
//! keeps it, and gives the proxy a duplicate. A proxy that was killed leaves connections waiting in the kernel's queue
//! for its successor; a server that was killed gets its sockets back from the proxy, which never stopped serving.
//!
//! ```text
//!   open ──> connect to the living proxy ──────────────┐ Welcome: its sockets, its table
//!     └──> none: start one, with one end of a          ├──> Serving ──(connection ends)──> Lost
//!          socket pair as its standard input ──────────┘        ^                            │
//!                                    start again, give sockets and last table <──────────────┘
//! ```
//!
//! All state is in one loop (`supervisor.rs`); this file is what callers see.

use std::{ffi::OsString, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use orchestra_model::route::{EndpointKey, RouteTable, Standing};
use orchestra_provider::{Applied, BoxFuture, DataPlane, DataPlaneError, DataPlaneEvent};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::{mpsc, oneshot};

use crate::wire;

mod connection;
mod events;
mod holder;
mod launch;
mod sockets;
mod supervisor;
mod traffic;

use connection::Connection;
use supervisor::{Command, Supervisor};

/// How a data plane is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state directory; the proxy's files are in `proxy/` below it. At most one proxy serves a home.
    pub home: PathBuf,
    /// The program to start: the `orchestra` binary.
    pub proxy_program: PathBuf,
    /// Arguments that make it a proxy, such as `proxy`; `--home DIR --control-stdin` is appended.
    pub proxy_args: Vec<OsString>,
    /// Where the proxy serves its metrics itself, in Prometheus text format; port 0 lets the machine choose.
    pub admin: Option<SocketAddr>,
    /// How long the proxy may take to answer before it counts as unavailable.
    pub patience: Duration,
}

impl Options {
    /// Usual options: metrics on a free port of loopback, five seconds of patience.
    pub fn new(home: impl Into<PathBuf>, proxy_program: impl Into<PathBuf>) -> Self {
        Self {
            home: home.into(),
            proxy_program: proxy_program.into(),
            proxy_args: Vec::new(),
            admin: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            patience: Duration::from_secs(5),
        }
    }
}

/// Why no proxy could be reached or started.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The proxy's directory cannot be used.
    #[error("cannot use the proxy's directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The metrics address cannot be listened on.
    #[error("cannot serve the proxy's metrics on {address}: {reason}")]
    Admin {
        /// The address.
        address: SocketAddr,
        /// Why, and who holds it if that can be seen.
        reason: String,
    },
    /// The program could not be started, or ended before it served.
    #[error("cannot start the proxy {}: {reason}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why, with the last line of its log.
        reason: String,
    },
    /// A proxy lives, but another server steers it, or it speaks another protocol.
    #[error("a proxy of this home is alive but cannot be taken over: {reason}")]
    Busy {
        /// Why.
        reason: String,
    },
}

/// Keeps and steers a proxy process. Dropping it leaves the proxy serving.
#[derive(Debug)]
pub struct ProxyHandle {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    events: std::sync::Mutex<Option<mpsc::Receiver<DataPlaneEvent>>>,
    tree: TaskTree,
}

/// What the loop shows to callers.
#[derive(Debug, Default)]
struct Shared {
    /// Proxies that answer: the serving one first, then those that are leaving.
    peers: arc_swap::ArcSwap<Vec<Arc<Connection>>>,
    admin: arc_swap::ArcSwapOption<SocketAddr>,
}

impl ProxyHandle {
    /// The proxy that serves.
    fn serving(&self) -> Result<Arc<Connection>, DataPlaneError> {
        self.shared.peers.load().first().cloned().ok_or_else(absent)
    }

    /// Connects to the living proxy of this home, or starts one.
    ///
    /// # Errors
    /// See [`OpenError`]. Once opened, the handle starts the proxy again by itself as often as needed.
    pub async fn open(options: Options, tree: &TaskTree) -> Result<Self, OpenError> {
        // A child, so that dropping the handle ends its tasks and nobody else's.
        let tree = tree.child();
        let shared = Arc::new(Shared::default());
        let (events, receiver) = events::queue(&tree);
        let (commands, requests) = mpsc::channel(64);
        let supervisor = match Supervisor::open(options, tree.clone(), Arc::clone(&shared), events).await {
            Ok(supervisor) => supervisor,
            Err(error) => {
                tree.cancel();
                return Err(error);
            }
        };
        tree.start(TaskKind::Loop, "proxy supervisor", supervisor.run(requests));
        Ok(Self { shared, commands, events: std::sync::Mutex::new(Some(receiver)), tree })
    }

    /// Where the proxy serves its metrics.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.shared.admin.load().as_deref().copied()
    }

    /// Process id of the serving proxy.
    pub fn pid(&self) -> Option<u32> {
        self.shared.peers.load().first().map(|peer| peer.pid())
    }

    /// The table in force, also one that an earlier server applied.
    ///
    /// # Errors
    /// [`DataPlaneError::Unavailable`] when the handle has ended.
    pub async fn table(&self) -> Result<Option<(RouteTable, Applied)>, DataPlaneError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Table(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())
    }

    /// Ends the proxy for good: it stops accepting, finishes what it has and exits; it is not started again, and the
    /// listening sockets are closed. Returns once it is gone or `patience` is over, and says which (`true` is gone).
    ///
    /// # Errors
    /// [`DataPlaneError::Unavailable`] when the handle has ended.
    pub async fn shutdown(&self, patience: Duration) -> Result<bool, DataPlaneError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Shutdown(reply)).await.map_err(|_| ended())?;
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer.map(|()| true).map_err(|_| ended()),
            Err(_late) => Ok(false),
        }
    }
}

impl Drop for ProxyHandle {
    fn drop(&mut self) {
        self.tree.cancel();
    }
}

impl DataPlane for ProxyHandle {
    fn apply(&self, table: RouteTable) -> BoxFuture<'_, Result<Applied, DataPlaneError>> {
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            self.commands.send(Command::Apply(table, reply)).await.map_err(|_| ended())?;
            answer.await.map_err(|_| ended())?
        })
    }

    fn cut(&self, endpoint: EndpointKey) -> BoxFuture<'_, Result<(), DataPlaneError>> {
        Box::pin(async move {
            let peers = self.shared.peers.load_full();
            // A proxy that is gone has nothing in flight: only the serving one must answer.
            for (index, peer) in peers.iter().enumerate() {
                let answer = peer.call(wire::Request::Cut { endpoint: endpoint.clone() }, Vec::new()).await;
                match answer {
                    Ok(wire::Response::Done) => {}
                    Ok(other) => return Err(unexpected(&other)),
                    Err(_) if index > 0 => {}
                    Err(error) => return Err(DataPlaneError::Unavailable(error)),
                }
            }
            if peers.is_empty() { Err(absent()) } else { Ok(()) }
        })
    }

    fn metrics(&self) -> BoxFuture<'_, Result<String, DataPlaneError>> {
        Box::pin(async move {
            let answer = self.serving()?.call(wire::Request::Metrics, Vec::new()).await;
            match answer.map_err(DataPlaneError::Unavailable)? {
                wire::Response::Metrics { text, .. } => Ok(text),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn standing(&self) -> BoxFuture<'_, Result<Standing, DataPlaneError>> {
        Box::pin(async move {
            match self.serving()?.standing().await.map_err(DataPlaneError::Unavailable)? {
                wire::Response::Standing(standing) | wire::Response::Metrics { standing, .. } => Ok(standing),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn take_events(&self) -> Option<mpsc::Receiver<DataPlaneEvent>> {
        self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }
}

fn ended() -> DataPlaneError {
    DataPlaneError::Unavailable(io::Error::other("the proxy handle has ended"))
}

fn absent() -> DataPlaneError {
    DataPlaneError::Unavailable(io::Error::new(io::ErrorKind::NotConnected, "no proxy is running"))
}

fn unexpected(response: &wire::Response) -> DataPlaneError {
    let reason = match response {
        wire::Response::Failed { message } => message.clone(),
        other => format!("an unexpected answer: {other:?}"),
    };
    DataPlaneError::Unavailable(io::Error::new(io::ErrorKind::InvalidData, reason))
}
